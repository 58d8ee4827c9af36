"""Test which run a report and a model card say they are about, and that no path of a machine is in them."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from flows.display.model_cards import FACTS, SETTINGS, complete_card
from flows.display.run_facts import collect_facts, facts_as_html, facts_as_markdown
from tasks.config.pipeline import Pipeline
from tests.support.pages.html_tags import Tags
from tests.support.reports import EVIL, make_run, render_report

NAMES = {"profile": "demo", "run_name": "demo 1", "run_id": "1-2-3"}


def make(**settings: Any) -> Pipeline:
    return Pipeline.model_validate(settings)


def test_the_facts_name_profile_base_data_seed_date_commit_and_run() -> None:
    facts = collect_facts(make(seed=7), **NAMES)
    assert list(facts) == ["profile", "base", "data", "method", "seed", "date", "commit", "run"]
    assert (facts["profile"], facts["base"], facts["data"]) == ("demo", "builtin", "shell-site")
    assert (facts["seed"], facts["run"], facts["method"]) == ("7", "demo 1", "PPO and DPO")


@pytest.mark.parametrize(
    ("ppo", "method", "shown"),
    [
        ({"algorithm": "rloo"}, "ppo", "RLOO"),
        ({"ptx": {"weight": 0.3}}, "both", "PPO-ptx and DPO"),
        ({"algorithm": "grpo", "ptx": {"gradient_share": 0.3}}, "ppo", "GRPO-ptx"),
        ({"algorithm": "grpo"}, "dpo", "DPO"),
    ],
)
def test_the_method_is_named_as_its_papers_name_it(ppo: dict[str, Any], method: str, shown: str) -> None:
    assert collect_facts(make(ppo=ppo, method=method), **NAMES)["method"] == shown


@pytest.mark.parametrize(
    ("path", "shown", "hub"),
    [
        (
            "HuggingFaceTB/SmolLM2-135M",
            "hugging-face HuggingFaceTB/SmolLM2-135M",
            "HuggingFaceTB/SmolLM2-135M",
        ),
        ("/srv/secret/models/mine", "hugging-face mine", None),
        ("./models/mine", "hugging-face mine", None),
    ],
)
def test_a_card_names_its_base_on_the_hub_and_no_folder_of_a_machine(
    tmp_path: Path, path: str, shown: str, hub: str | None
) -> None:
    config = make(base={"kind": "hugging-face", "path": path}, source={"kind": "hh-rlhf"})
    facts = collect_facts(config, **NAMES)
    assert facts["base"] == shown
    run = make_run(tmp_path, without=("pretrain",))
    render_report(run)
    text = (run.artifact / "model-cards" / "dpo" / "README.md").read_text()
    card = ModelCard(complete_card(text, "dpo", config, facts))
    assert (card.data.base_model, card.data.datasets) == (hub, ["Anthropic/hh-rlhf"])
    assert "secret" not in str(card)
    assert not [marker for marker in (FACTS, SETTINGS) if marker in str(card)]
    assert "| dpo.beta | `1.0` |" in str(card)
    assert "| weights.base | `null` |" in str(card)
    assert "| ppo." not in str(card)
    assert str(card).count("| seed | `0` |") == 2


def test_no_fact_becomes_markup() -> None:
    facts = {"run": f"{EVIL} ` | **b**\n\n# c", EVIL: "x"}
    tags = Tags(facts_as_html(facts))
    assert {tag for tag, _ in tags.opened} == {"div", "dt", "dd"}
    shown = MarkdownIt("gfm-like", {"linkify": False}).render(facts_as_markdown({"run": facts["run"]}))
    assert "<h1>" not in shown
    assert "<strong>" not in shown
    assert shown.count("<td>") == 2
    assert shown.count("<code>") == 1
