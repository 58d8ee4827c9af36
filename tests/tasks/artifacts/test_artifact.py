"""Test that a stage's key depends on exactly the files of its inputs that its program reads."""

import re
from pathlib import Path
from typing import Annotated, Any

import pytest

from flows.profiles import load
from tasks.artifacts.artifact import Artifact, Step, content, only, stage_artifact, within, without_weights
from tasks.artifacts.store import SCHEMA, Manifest, flatten
from tasks.config import jobs
from tasks.config.pipeline import Pipeline
from tasks.config.sections.base import NotInKey
from tasks.config.sections.models import Weights
from tasks.config.sections.sft import Sft
from tasks.stages.answers import answers
from tasks.stages.benchmarks import benchmarks
from tasks.stages.dpo import dpo
from tasks.stages.merge import merge
from tasks.stages.ppo import ppo
from tasks.stages.pretrain import pretrain
from tasks.stages.reference import reference
from tasks.stages.report import report
from tasks.stages.reward import reward
from tasks.stages.sft import sft
from tasks.stages.winrate import winrate
from tasks.system.hashing import digest_of
from tests.support.fake_programs import MEANT, ROOT, TABLES

CONFIG = Pipeline()
LATER = ("evaluation.parquet", "evaluation_pairs.parquet", "answers.parquet")


def artifact(stage: str, changed: str = "") -> Artifact:
    names = [
        *(f"{table}.parquet" for table in TABLES),
        "card.json",
        "model/config.json",
        "model/model.safetensors",
        "adapter/a.safetensors",
    ]
    names += [
        "adapter/adapter_config.json",
        "reward.json",
        "reference.parquet",
        "reference_evaluation.parquet",
        "answers.parquet",
        "summary.json",
    ]
    files = {name: f"{stage} {name}" + "!" * (name == changed) for name in names}
    manifest = Manifest(
        schema=SCHEMA, stage=stage, key=f"{stage} {changed}", digest=digest_of(files), files=files, job={},
        inputs={}, origins={}, sources={},
        seconds=1, peak_mb=1, created=0,
    )  # fmt: skip
    return stage_artifact(manifest, {}, cached=True, seconds=1)


def keys(data: str = "", model: str = "", adapter: str = "", judge: str = "") -> dict[str, str]:
    """Return the key of every stage, with one file of an input changed."""
    table, base, tuned, scorer = (
        artifact("data", data),
        artifact("merge", model),
        artifact("sft", adapter),
        artifact("reward", judge),
    )
    steps = {
        "pretrain": pretrain.step(CONFIG, data=table),
        "sft": sft.step(CONFIG, data=table, base=base),
        "merge": merge.step(CONFIG, base=base, adapter=tuned),
        "reward": reward.step(CONFIG, data=table, model=base),
        "ppo": ppo.step(CONFIG, data=table, model=base, reward=scorer),
        "reference": reference.step(CONFIG, data=table, model=base),
        "dpo": dpo.step(CONFIG, data=table, model=base, reference=artifact("reference")),
        "answers": answers.step(
            CONFIG, data=table, base=base, model=base, ppo=artifact("ppo"), dpo=artifact("dpo")
        ),
        "winrate": winrate.step(CONFIG, data=table, model=base, reward=scorer, answers=artifact("answers")),
        "benchmarks": benchmarks.step(
            CONFIG, data=table, base=base, model=base, reward=scorer, ppo=artifact("ppo"), dpo=artifact("dpo")
        ),
        "report": report.step(CONFIG, data=table, merge=base, reward=scorer),
    }
    return {name: step.recipe.key for name, step in steps.items()}


@pytest.mark.parametrize(
    ("changed", "rebuilt"),
    [
        ({"data": "card.json"}, {"report"}),
        ({"data": "summary.json"}, {"report"}),
        ({"data": "reward_groups.parquet"}, {"report"}),
        ({"data": "finetune.parquet"}, {"sft", "reward", "report"}),
        ({"data": "reward.parquet"}, {"reward", "reference", "dpo", "report"}),
        ({"data": "rl.parquet"}, {"ppo", "report"}),
        (
            {"data": "evaluation.parquet"},
            {"sft", "ppo", "dpo", "answers", "winrate", "benchmarks", "report"},
        ),
        ({"data": "evaluation_pairs.parquet"}, {"reward", "reference", "dpo", "winrate", "report"}),
        ({"data": "corpus.parquet"}, {"pretrain", "report"}),
        ({"model": "summary.json"}, {"report"}),
        (
            {"model": "model/model.safetensors"},
            {"sft", "merge", "reward", "ppo", "reference", "dpo", "answers", "winrate", "benchmarks"},
        ),
        ({"adapter": "summary.json"}, set()),
        ({"adapter": "adapter/a.safetensors"}, {"merge"}),
        ({"judge": "reward.json"}, {"ppo", "winrate", "report"}),
        ({"judge": "adapter/a.safetensors"}, {"ppo", "winrate"}),
    ],
    ids=lambda value: (
        " ".join(f"{name} {file}" for name, file in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_a_stage_is_built_again_when_what_it_looks_at_has_changed_and_only_then(
    changed: dict[str, str], rebuilt: set[str]
) -> None:
    before, after = keys(), keys(**changed)
    assert {name for name in before if before[name] != after[name]} == rebuilt


@pytest.mark.parametrize(
    ("changed", "places"),
    [
        (["sft.tune=full"], {"merge": {"model"}}),
        (
            ["reward.members=3"],
            {
                "ppo": {"adapter", "adapter-1", "adapter-2", "reward.json"},
                "winrate": {"adapter", "adapter-1", "adapter-2", "reward.json"},
            },
        ),
        (
            ["reward.held_out_member=true"],
            {"ppo": {"adapter", "reward.json"}, "winrate": {"adapter", "adapter-1", "reward.json"}},
        ),
        (
            ["reward.held_out_member=true", "ppo.score.by=held_out"],
            {"ppo": {"adapter", "adapter-1", "reward.json"}},
        ),
        (["reward.tune=full"], {"ppo": {"model", "score.safetensors", "reward.json"}}),
        (["dpo.tune=bottleneck"], {"answers": {"bottleneck"}}),
    ],
)
def test_what_is_handed_on_is_what_was_trained(changed: list[str], places: dict[str, set[str]]) -> None:
    config = load("demo", changed)
    names = [
        f"{place}/a.safetensors" for place in ("adapter", "adapter-1", "adapter-2", "model", "bottleneck")
    ]
    whole: Artifact = {
        **artifact("sft"),
        "files": dict.fromkeys([*names, "reward.json", "score.safetensors", "rl.parquet", *LATER], ""),
    }
    steps = {
        "merge": lambda: merge.step(config, base=whole, adapter=whole).inputs["adapter"],
        "ppo": lambda: ppo.step(config, data=whole, model=whole, reward=whole).inputs["reward"],
        "answers": lambda: answers.step(config, data=whole, base=whole, model=whole, dpo=whole).inputs["dpo"],
        "winrate": lambda: winrate.step(config, data=whole, model=whole, reward=whole, answers=whole).inputs[
            "reward"
        ],
    }
    for stage, expected in places.items():
        assert {name.partition("/")[0] for name in steps[stage]()["files"]} == expected


def test_weights_to_start_from_are_an_input_known_by_their_content(tmp_path: Path) -> None:
    keys = []
    for name, weights in (("one", b"1"), ("same", b"1"), ("other", b"2")):
        (tmp_path / f"{name}.safetensors").write_bytes(weights)
        config = load("demo", [f"sft.start={tmp_path / name}.safetensors"])
        keys.append(sft.step(config, data=artifact("data"), base=artifact("merge")).recipe.key)
    keys.append(sft.step(CONFIG, data=artifact("data"), base=artifact("merge")).recipe.key)
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_settings_that_a_stage_does_not_read_are_not_in_its_key() -> None:
    def keys_of(*changed: str) -> dict[str, str]:
        config, whole = load("demo", list(changed)), artifact("merge")
        made = {
            "sft": sft.step(config, data=whole, base=whole),
            "reward": reward.step(config, data=whole, model=whole),
        }
        made["ppo"] = ppo.step(config, data=whole, model=whole, reward=whole)
        return {name: step.recipe.key for name, step in made.items()}

    plain = keys_of()
    assert {name for name, key in keys_of("weights.merged=int8").items() if key != plain[name]} == {
        "reward",
        "ppo",
    }
    assert {name for name, key in keys_of("weights.base=int8").items() if key != plain[name]} == {"sft"}
    assert keys_of("ppo.allow_exploitable=false") == plain


def test_who_samples_no_answers_reads_no_evaluation_questions() -> None:
    config = load("demo", ["samples.prompts=0"])
    step = sft.step(config, data=artifact("data"), base=artifact("merge"))
    assert list(step.inputs["data"]["files"]) == ["finetune.parquet"]


SOURCES: list[dict[str, Any]] = [
    {"kind": "shell-site"},
    {"kind": "stack-exchange", "path": "Posts.xml", "site": "a.stackexchange.com"},
    *({"kind": kind} for kind in ("stack-exchange-preferences", "stack-exchange-paired", "hh-rlhf")),
    {"kind": "own", "path": "rows.jsonl", "context": ["a", "b"]},
]
PLACE = {f"source.{name}" for name in ("path", "revision", "files", "config", "split", "columns", "take")}
NOT_IN_KEY = {
    "site": set(),
    "data": {*PLACE, "data.decontaminate_against"},
    "pretrain": set(),
    "sft": {"weights.merged", "sft.start"},
    "merge": {"weights.merged"},
    "reward": {"weights.base", "reward.start"},
    "reference": {"weights.base"},
    "ppo": {"weights.base", "ppo.allow_exploitable", "ppo.start", "ppo.ptx.path"},
    "dpo": {"weights.base", "dpo.start"},
    "answers": {"winrate.num_graded_pairs"},
    "winrate": {"weights.base", *PLACE},
    "benchmarks": {"benchmarks.files", "benchmarks.reward_bench"},
    "candidates": {"weights.base"},
    "asked": set(),
    "comparisons": {"weights.base"},
    "mixture": set(),
    "report": set(),
}


@pytest.mark.parametrize("stage", NOT_IN_KEY)
def test_all_settings_of_a_job_are_in_its_key_but_those_that_say_otherwise(stage: str) -> None:
    job_type: type[jobs.Job] = getattr(jobs, f"{stage.capitalize()}Job")
    left_out: set[str] = set()
    for source in SOURCES if stage != "site" else SOURCES[:1]:
        job = job_type.of(Pipeline.model_validate({"source": source}))
        every, in_key = flatten(job.model_dump(mode="json")), flatten(Step(stage, job, {}).recipe.job)
        assert in_key == {name: every[name] for name in in_key}
        left_out |= every.keys() - in_key.keys()
    assert left_out == NOT_IN_KEY[stage]


def test_every_job_has_its_line_above() -> None:
    names = {name.removesuffix("Job").lower() for name in vars(jobs) if re.fullmatch(r"[A-Z][a-z]+Job", name)}
    assert names - {"compare"} == set(NOT_IN_KEY)  # that one is of no pipeline


def test_a_new_setting_is_in_the_key_unless_it_says_otherwise() -> None:
    class NewSft(Sft):
        dropout: float = 0.1
        log_samples: Annotated[int, NotInKey("it only changes the log")] = 3

    class NewJob(jobs.Job):
        sft: NewSft = NewSft()
        weights: Annotated[Weights, NotInKey("only the base is read", parts=("merged",))] = Weights()
        comment: Annotated[str, NotInKey("for people")] = "hello"

    settings = NewJob().key_settings()
    assert settings["sft"]["dropout"] == 0.1
    assert "log_samples" not in settings["sft"]
    assert settings["weights"] == {"base": None}
    assert set(settings) == {"sft", "weights"}


def test_programs_look_at_what_their_tasks_name_and_nothing_else() -> None:
    # in place of its pairs; text that is mixed in
    by_choice = {"reward": {"reward_groups.parquet"}, "ppo": {"finetune.parquet"}}
    # where a part of its reading lies
    elsewhere = {
        "sft": ["token_tables/documents", "runtime/training_samples"],
        "ppo": ["token_tables/documents", "token_tables/prompts", "runtime/training_samples"],
        "dpo": ["runtime/training_samples"],
        "reward": ["runtime/reward_tests"],
    }
    for stage in ("pretrain", "sft", "merge", "reward", "ppo", "reference", "dpo", "answers", "winrate"):
        files = [stage, *elsewhere.get(stage, [])]
        program = "".join((ROOT / "tasks" / "programs" / f"{name}.py").read_text() for name in files)
        task = (ROOT / "tasks" / "stages" / f"{stage}.py").read_text()
        if "config.samples.tables" in task:
            task += repr(CONFIG.samples.tables).replace("'", '"')
        read = set(re.findall(r'run\.inputs\["data"\] / "([\w.]+)"', program))
        assert read == set(MEANT[stage].get("data", ())) | by_choice.get(stage, set()), stage
        assert (
            set(re.findall(r'"([\w]+\.parquet)"', task))
            - {"reference.parquet", "reference_evaluation.parquet", "answers.parquet"}
            == read
        )
        assert program.count('run.inputs["data"]') == len(
            re.findall(r'run\.inputs\["data"\] / "', program)
        ), "the folder goes elsewhere"
        assert set(re.findall(r'run\.inputs\["reward"\] / "([\w.]+)"', program)) <= {"adapter"}


def test_what_is_meant_of_an_artifact_is_known_by_its_files() -> None:
    whole = artifact("merge")
    assert content(whole) == whole["digest"]
    model = within(whole, "model")
    assert model["path"] == "model"
    assert set(model["files"]) == {"model/config.json", "model/model.safetensors"}
    assert set(only(whole, "adapter", "reward.json")["files"]) == {
        "adapter/a.safetensors",
        "adapter/adapter_config.json",
        "reward.json",
    }
    assert not [name for name in without_weights(whole)["files"] if name.endswith("safetensors")]
    with pytest.raises(AssertionError, match="rewards"):
        only(whole, "rewards")


def test_what_the_user_brought_is_taken_whole(tmp_path: Path) -> None:
    from tasks.artifacts.artifact import user_artifact

    (tmp_path / "Posts.xml").write_text("<posts/>")
    brought = user_artifact(tmp_path)
    assert only(brought, "model") == within(brought, "model") == brought
    assert content(brought) == brought["digest"]
