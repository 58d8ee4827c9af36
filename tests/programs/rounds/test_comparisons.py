"""Test the program comparisons with each kind of labels, and the reward model on a mixture of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tasks.config.jobs import ComparisonsJob, MixtureJob, RewardJob
from tasks.demo_site.shell_tasks import SLOTS, TASKS, fill_slots
from tasks.judges.reward_judge import RewardScores
from tasks.programs import reward
from tasks.programs.rounds import comparisons, mixture
from tasks.programs.rounds.round_tables import ASKED, COMPARISON, LABEL, write_rows
from tasks.programs.runtime.program import Run
from tasks.rlhf.models import loading, reward_model
from tasks.system.errors import InputError
from tests.programs.rounds.rows import asked
from tests.support import tiny

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 32}
VALUES = {name: values[0] for name, values in SLOTS.items()}


def site_pairs(count: int) -> list[dict[str, Any]]:
    """Return pairs of the built-in site: the right command, and one that is wrong."""
    rows = []
    for number in range(count):
        task = TASKS[number % len(TASKS)]
        right, wrong = (f"Use `{fill_slots(one[0], VALUES)}`." for one in (task.commands, task.wrong))
        first, second = (right, wrong) if number % 2 else (wrong, right)
        prompt = fill_slots(task.questions[0], VALUES)
        rows.append(asked(f"p{number:03d}", question=number, prompt=prompt, first=first, second=second))
    return rows


def write_asked(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    write_rows(folder / "asked.parquet", rows, ASKED)
    return folder


def run_program(folder: Path, inputs: dict[str, Path], **job: Any) -> Run:
    settings = {"seed": 0, "labels": {"kind": "gold"}, "text": TEXT} | job
    run = Run(tiny.write_job(folder, "comparisons", settings, inputs))
    comparisons.compare(ComparisonsJob.model_validate(run.record), run)
    return run


def rows_of(run: Run, name: str = "comparisons") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run.artifact / f"{name}.parquet").to_pylist()
    return rows


def labeller_of(run: Run) -> dict[str, Any]:
    labeller: dict[str, Any] = json.loads((run.artifact / "summary.json").read_text())["labeller"]
    return labeller


def metrics_of(run: Run) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    return metrics


def test_gold_labels_make_comparisons_of_which_a_share_is_wrong(tmp_path: Path) -> None:
    inputs = {"asked": write_asked(tmp_path / "asked", site_pairs(60))}
    runs = [run_program(tmp_path / name, inputs, on_site=True) for name in "ab"]
    found, labels = rows_of(runs[0]), rows_of(runs[0], "labels")
    assert len(found) == len(labels) == 60
    metrics = metrics_of(runs[0])
    assert metrics["comparisons.pairs"] == metrics["comparisons.labelled"] == 60
    assert metrics["comparisons.right_by_gold"]["n"] == 60
    assert 0.75 < metrics["comparisons.right_by_gold"]["value"] < 1.0  # 3 deviations of .039 around .9
    exact = run_program(tmp_path / "exact", inputs, on_site=True, labels={"kind": "gold", "noise": 0.0})
    assert metrics_of(exact)["comparisons.right_by_gold"]["value"] == 1.0
    assert labeller_of(exact) == {"kind": "gold", "noise": 0.0, "tie": 0.0}
    assert {row["origin"] for row in found} == {"gold"}
    assert pq.read_schema(runs[0].artifact / "comparisons.parquet").names == list(COMPARISON)
    assert pq.read_schema(runs[0].artifact / "labels.parquet").names == list(LABEL)
    files = [{path.name: path.read_bytes() for path in run.artifact.iterdir()} for run in runs]
    assert files[0] == files[1]
    assert "comparisons.right_by_gold" not in metrics_of(run_program(tmp_path / "other", inputs))


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["file", "people"])
def test_labels_of_a_file_make_comparisons_and_agreement(tmp_path: Path, kind: str) -> None:
    pairs = [asked(f"p{n}", question=n) for n in range(12)]
    pairs += [asked(f"g{n}", known="first", question=100 + n) for n in range(12)]
    rows = [
        {"pair_id": pair["pair_id"], "verdict": verdict, "rater": rater}
        for pair in pairs
        for rater, verdict in (("ann", "first"), ("ben", "first"), ("cleo", "second"))
    ]
    inputs = {"asked": write_asked(tmp_path / "asked", pairs), "labels": write_labels(tmp_path / "l", rows)}
    labels = {"kind": kind} | ({"path": "l"} if kind == "file" else {})
    run = run_program(tmp_path / "run", inputs, labels=labels)
    found, metrics = rows_of(run), metrics_of(run)
    assert [row["question_id"] for row in found] == list(range(12)), "gold questions are no comparisons"
    assert {row["chosen"] for row in found} == {f"p{n} one" for n in range(12)}
    agreement = json.loads((run.artifact / "agreement.json").read_text())
    right = {one["name"]: one["right"]["value"] for one in agreement["raters"]}
    assert right == {"ann": 1.0, "ben": 1.0, "cleo": 0.0}
    assert metrics["comparisons.right_on_gold_questions"]["value"] == pytest.approx(24 / 36)
    # of each pair's labels two are equal: of 6 ordered pairs 2, by chance (24 * 23 + 12 * 11) / (36 * 35)
    by_chance = (24 * 23 + 12 * 11) / (36 * 35)
    alpha = metrics["comparisons.alpha"]["value"]
    assert alpha == pytest.approx(1 - (1 - 2 / 6) / (1 - by_chance))
    assert agreement["alpha"]["n"] == 12
    assert metrics["comparisons.flagged"] == (1 if kind == "people" else 0)
    flagged = {"people": {"ann", "ben"}, "file": {"ann", "ben", "cleo"}}
    assert {name for row in found for name in row["raters"]} == flagged[kind]
    assert labeller_of(run) == {"kind": kind}
    assert any("cleo are left out" in text for text in run.warnings) == (kind == "people")


def test_a_file_without_labels_of_the_round_says_where_its_pairs_are(tmp_path: Path) -> None:
    rows = [{"pair_id": "other", "verdict": "first", "rater": "ann"}]
    inputs = {"asked": write_asked(tmp_path / "asked", [asked("a")])}
    inputs["labels"] = write_labels(tmp_path / "labels", rows)
    with pytest.raises(InputError, match=r"none of the 1 pairs .*other pairs: 1\).*asked\.parquet"):
        run_program(tmp_path / "run", inputs, labels={"kind": "file", "path": "x"})


def test_a_round_without_a_better_answer_is_refused(tmp_path: Path) -> None:
    rows = [
        {"pair_id": name, "verdict": verdict, "rater": "ann"}
        for name, verdict in (("a", "tie"), ("b", "skip"))
    ]
    inputs = {"asked": write_asked(tmp_path / "asked", [asked("a"), asked("b")])}
    inputs["labels"] = write_labels(tmp_path / "labels", rows)
    with pytest.raises(InputError, match=r"No pair of this round has a better answer \(skip 1, tie 1\)"):
        run_program(tmp_path / "run", inputs, labels={"kind": "file", "path": "x"})
    assert not (tmp_path / "run" / "artifact" / "summary.json").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return data, a model, and a reward model with a member that PPO never sees."""
    root = tmp_path_factory.mktemp("comparisons")
    data = tiny.data_folder(root / "data", 40)
    found = {"data": data, "model": tiny.trained_folder(root / "base", data)}
    settings = {"lora": {"rank": 2, "alpha": 4}, "max_steps": 40, "epochs": 20, "learning_rate": 1e-2}
    job = {"seed": 0, "text": TEXT, "reward": settings | {"held_out_member": True}}
    run = Run(tiny.write_job(root / "reward", "reward", job, found))
    reward.train(RewardJob.model_validate(run.record), run)
    return found | {"reward": run.artifact}


def voted_pairs(data: Path) -> list[dict[str, Any]]:
    """Return the pairs of the evaluation split, with the better answer on either side."""
    rows = []
    for number, row in enumerate(pq.read_table(data / "evaluation_pairs.parquet").to_pylist()):
        answers = [row["chosen"], row["rejected"]][:: 1 - 2 * (number % 2)]
        texts = {"prompt": row["prompt"], "first": answers[0], "second": answers[1]}
        rows.append(asked(f"p{number:03d}", question=row["question_id"], **texts))
    return rows


def test_the_held_out_member_labels(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking: list[reward_model.Scorer] = []

    def keep_scorer(scorer: reward_model.Scorer, *others: Any) -> RewardScores:
        asking.append(scorer)
        return RewardScores(scorer, *others)

    monkeypatch.setattr(comparisons, "RewardScores", keep_scorer)
    pairs = voted_pairs(trained["data"])
    inputs = {"asked": write_asked(tmp_path / "asked", pairs), **trained}
    run = run_program(tmp_path / "run", inputs, labels={"kind": "judge", "by": "held_out"})
    base = loading.load(trained["model"], device=tiny.CPU)
    _, held_out = reward_model.load_held_out(trained["reward"], base, device=tiny.CPU)
    assert held_out is not None
    assert torch.equal(asking[0].members[0].head.weight, held_out.members[0].head.weight)
    found = rows_of(run)
    chosen = {row["pair_id"]: row["chosen"] for row in found}
    right = [chosen.get(pair["pair_id"]) == pair["first" if n % 2 == 0 else "second"]
             for n, pair in enumerate(pairs)]  # fmt: skip
    assert sum(right) / len(right) > 0.8, "it has learnt such pairs"
    assert {(row["raters"][0], row["origin"]) for row in found} == {("held_out", "judge:held_out")}
    assert metrics_of(run)["comparisons.raters"] == 1
    assert labeller_of(run) == {"kind": "judge", "judge": "the held-out reward model"}


def test_the_reward_model_learns_from_the_mixture_in_place_of_the_votes(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    """Labels that are all wrong make a reward model that orders votes the other way round."""
    accuracy = {}
    for name, side in (("right", 1), ("wrong", 0)):
        pairs = voted_pairs(trained["data"])
        verdicts = ["first" if (n + side) % 2 else "second" for n in range(len(pairs))]
        rows = [
            {"pair_id": pair["pair_id"], "verdict": verdict, "rater": "ann"}
            for pair, verdict in zip(pairs, verdicts, strict=True)
        ]
        inputs = {"asked": write_asked(tmp_path / f"{name} asked", pairs)}
        inputs["labels"] = write_labels(tmp_path / f"{name} labels", rows)
        labelled = run_program(tmp_path / f"{name} run", inputs, labels={"kind": "file", "path": "x"})
        mixed = Run(
            tiny.write_job(
                tmp_path / f"{name} mixture", "mixture", {"seed": 0, "old_share": 0.0},
                {"comparisons1": labelled.artifact},
            )
        )  # fmt: skip
        mixture.write_mixture(MixtureJob.model_validate(mixed.record), mixed)
        settings = {"lora": {"rank": 2, "alpha": 4}, "max_steps": 40, "epochs": 20, "learning_rate": 1e-2}
        job = {"seed": 0, "text": TEXT, "reward": settings}
        inputs = {name: trained[name] for name in ("data", "model")} | {"mixture": mixed.artifact}
        run = Run(tiny.write_job(tmp_path / f"{name} reward", "reward", job, inputs))
        reward.train(RewardJob.model_validate(run.record), run)
        accuracy[name] = metrics_of(run)["reward_accuracy.votes"]["value"]
    assert accuracy["right"] > 0.8
    assert accuracy["wrong"] < 0.2
