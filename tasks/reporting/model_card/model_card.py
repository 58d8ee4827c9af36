"""Render the model card of a policy: README.md in the format of the Hugging Face hub.

Equal artifacts give equal bytes: the flow adds the names of base and data sets, the settings, and which run
it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.dataset.card import Card
from tasks.reporting.evaluation.judges import Judge
from tasks.reporting.evaluation.policies import NAMES, with_article
from tasks.reporting.model_card.labelling import LabelledRound
from tasks.reporting.model_card.licences import choose_licence
from tasks.reporting.model_card.markdown import escape_markdown
from tasks.reporting.model_card.results import TASK, as_eval_results, collect_measures, collect_wins
from tasks.reporting.numbers import format_interval, format_number, format_percent, format_range

FOLDER = Path(__file__).parent
TEMPLATE = "model_card.md.j2"
BUILTIN = "pretrain"  # the stage that makes the built-in base
METHODS = {
    "ppo": "PPO: the policy samples answers, a reward model scores them, and a KL penalty keeps it near SFT",
    "dpo": "DPO: the policy learns from the same pairs of answers without a reward model",
}
ADAPTER_LIMIT = Markup(
    "The files are an adapter for the SFT model that it was trained on, and are of no use without that model."
)
TAGS = {"ppo": ["ppo", "reward-model"], "dpo": ["dpo"]}


class Measured(NamedTuple):
    """What a run has measured, of all policies."""

    metrics: Mapping[str, Any]
    warnings: Mapping[str, Sequence[str]]  # by stage
    judges: Sequence[Judge]
    benchmarks: Sequence[Mapping[str, Any]]  # rows of the stage benchmarks' results.json
    rounds: Sequence[LabelledRound]  # whose comparisons the policy's reward model has learnt from


def render_model_card(policy: str, card: Card, measured: Measured, *, is_adapter: bool) -> str:
    """Return the card of a policy; no text of a model, a user or the data becomes markup."""
    wins = collect_wins(policy, measured.judges)
    measures = collect_measures(policy, measured.benchmarks)
    has_foreign_base = BUILTIN not in measured.warnings
    licence = choose_licence(card["licences"], has_foreign_base=has_foreign_base)
    name = f"{NAMES[policy]} on {card['site']}"
    data = ModelCardData(
        license=licence.license,
        license_name=licence.license_name,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=["alignflow", "rlhf", "preference-learning", *TAGS[policy]],
        model_name=name,
        eval_results=as_eval_results(wins, measures, site=card["site"]) or None,
    )
    body = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            name=name,
            policy=NAMES[policy],
            method=METHODS[policy],
            card=card,
            wins=wins,
            doubts=list(dict.fromkeys(win.doubt for win in wins if win.doubt)),
            measures=measures,
            graded=[judge for judge in measured.judges if judge["card"]],
            warnings=[(stage, text) for stage, texts in measured.warnings.items() for text in texts],
            attack=measured.metrics.get("reward.worst_attack"),
            kl=measured.metrics.get(f"{policy}.kl"),
            has_foreign_base=has_foreign_base,
            is_adapter=is_adapter,
            adapter_limit=ADAPTER_LIMIT,
            rounds=measured.rounds,
        )
    )
    return "\n".join(["---", data.to_yaml(line_break="\n"), "---", "", body])


def describe_merged(text: str, *, library: str) -> str:
    """Return a policy's card as that of one model with the adapter in it, which ``library`` loads."""
    card = ModelCard(text)
    setattr(card.data, "library_name", library)  # noqa: B010 - CardData declares no fields
    return str(card).replace(f"- {ADAPTER_LIMIT}\n", "")


def _environment() -> Environment:
    """Return an environment in which every text but Markup is escaped, and undefined names are errors."""
    environment = Environment(  # noqa: S701 - Markdown: finalize escapes it
        loader=FileSystemLoader(FOLDER),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=escape_markdown,
    )
    environment.filters |= {
        "percent": format_percent,
        "span": format_interval,
        "range": format_range,
        "number": format_number,
        "the": with_article,
    }
    return environment
