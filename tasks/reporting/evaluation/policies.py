"""Name the policies and their opponents, in the order in which the report shows them."""

from collections.abc import Mapping
from typing import Any

NAMES = {
    "chosen": "chosen answers",
    "base": "base model",
    "sft": "SFT",
    "dpo": "DPO",
    "ppo": "PPO",
    "champion": "champion",
    "predecessor": "earlier round",
}
TRAINED = ("ppo", "dpo")  # what a run may promote
# opponents: the model that all started from first, the chosen answers last
OPPONENTS = ("sft", "champion", "predecessor", "dpo", "ppo", "base", "chosen")
POLICIES = (*TRAINED, "champion", "predecessor", "sft", "base", "chosen")

Rate = Mapping[str, Any]  # value, low, high and n of a share


def with_article(policy: str) -> str:
    """Return a policy's name as a sentence has it: SFT, the base model."""
    name = NAMES.get(policy, policy)
    return name if name.isupper() else f"the {name}"
