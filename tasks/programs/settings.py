"""What all settings have in common: frozen, checked to the last name, and shown in forms under readable titles."""

from pydantic import BaseModel, ConfigDict

ACRONYMS = {
    "dpo": "DPO",
    "eos": "EOS",
    "gae": "GAE",
    "gpu": "GPU",
    "cpu": "CPU",
    "kl": "KL",
    "lora": "LoRA",
    "nll": "NLL",
    "ppo": "PPO",
    "rl": "RL",
    "sft": "SFT",
}


def _title(name: str, _: object) -> str:
    """A setting's name as forms show it."""
    first, *rest = (ACRONYMS.get(word, word) for word in name.split("_"))
    return " ".join([first[:1].upper() + first[1:], *rest])


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, field_title_generator=_title)
