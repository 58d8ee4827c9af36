"""Complete the model cards that the report stage wrote: names of base and data sets, settings, which run."""

from pathlib import Path

from flows.display.run_facts import facts_as_markdown, find_hub_id, training_settings
from tasks.config.pipeline import Pipeline
from tasks.config.sections.models import HuggingFaceBase
from tasks.system.files import replace_text

FOLDER, CARD = "model-cards", "README.md"  # a folder for each policy
FACTS, SETTINGS = "<!--run-facts-->", "<!--settings-->"


def write_cards(source: Path, target: Path, config: Pipeline, facts: dict[str, str]) -> list[str]:
    """Write the completed cards of a report's folder into ``target``; return the policies that have one."""
    policies = sorted(path.parent.name for path in (source / FOLDER).glob(f"*/{CARD}"))
    for policy in policies:
        text = (source / FOLDER / policy / CARD).read_text(encoding="utf-8")
        place = target / FOLDER / policy
        place.mkdir(parents=True, exist_ok=True)
        replace_text(place / CARD, complete_card(text, policy, config, facts))
    return policies


def complete_card(text: str, policy: str, config: Pipeline, facts: dict[str, str]) -> str:
    """Return a card with what is in no key of its artifact."""
    from huggingface_hub import ModelCard  # slow to import

    text = text.replace(FACTS, facts_as_markdown(facts), 1)
    text = text.replace(SETTINGS, facts_as_markdown(training_settings(config, policy)), 1)
    card = ModelCard(text)
    base = find_hub_id(config.base.path) if isinstance(config.base, HuggingFaceBase) else ""
    data = find_hub_id(str(getattr(config.source, "path", "")))
    if base:
        card.data["base_model"] = base
    if data:
        card.data["datasets"] = [data]
    return str(card)
