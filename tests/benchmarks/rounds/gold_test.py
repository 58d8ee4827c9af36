"""Compare policies with their SFT model by the gold scorer: all on the same questions and random numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tasks.artifacts.artifact import Artifact
from tasks.config.jobs import RewardJob
from tasks.config.pipeline import Pipeline
from tasks.dataset import row_sample
from tasks.demo_site.gold import gold_score
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import prompts, sampling
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.gold_agreement import ordering_agreement
from tasks.rlhf.judging.win_rate import win_rate
from tasks.rlhf.models import loading, lora
from tasks.rounds.round_walk import Prepared
from tasks.system.files import replace_text
from tests.benchmarks.negatives import measure_gold
from tests.benchmarks.rounds.stored_stages import find

# no reward model learns from the site's votes here: some of their questions are for the evaluation
MORE_QUESTIONS = "data.reward_share=0.33"
TEMPERATURE = 1.0
CPU = torch.device("cpu")
Numbers = NDArray[np.float64]


class GoldTest:
    """Gold scores of the SFT model and of policies on questions of the evaluation split.

    A model answers each question ``draws`` times; none has an id in ``apart_from``. What is measured is kept
    in ``folder``, by the keys of the artifacts, and is not measured again.
    """

    def __init__(
        self,
        config: Pipeline,
        prepared: Prepared,
        folder: Path,
        *,
        questions: int,
        draws: int,
        apart_from: Sequence[int] = (),
    ) -> None:
        self.config, self.prepared, self.folder, self.draws = config, prepared, folder, draws
        torch.set_num_threads(config.machine.threads or torch.get_num_threads())
        table = pq.read_table(find(prepared.data) / "evaluation.parquet", columns=["question_id", "prompt"])
        table = table.filter(pc.invert(pc.is_in(table["question_id"], pa.array(apart_from, pa.int64()))))
        table = table.take(sorted(row_sample.draw_sample(table["question_id"].to_pylist(), questions)))
        self.ids: list[int] = table["question_id"].to_pylist()
        self.questions: list[str] = table["prompt"].to_pylist()
        folder.mkdir(parents=True, exist_ok=True)
        self.sft = self.scores(None)

    def scores(self, policy: Artifact | None) -> Numbers:
        """Return the gold scores of a policy's answers, (D, Q); None is the SFT model."""
        key = (policy or self.prepared.model)["key"]
        name = f"scores-{key[:24]}-{len(self.ids)}-{self.draws}.json"
        return np.array(self._remember(name, lambda: self._measure(policy)))

    def outcomes(self, policy: Artifact) -> Numbers:
        """Return a policy's wins over the SFT model, ties as halves, (D, Q)."""
        return self._outcomes(self.scores(policy), self.sft)

    def win(self, policy: Artifact) -> Interval:
        """Return a policy's win rate against the SFT model, with the interval of the questions."""
        return self.win_against(policy, None)

    def win_against(self, policy: Artifact, other: Artifact | None) -> Interval:
        """Return a policy's win rate against another one, or the SFT model, with the questions' interval."""
        outcomes = self._outcomes(self.scores(policy), self.scores(other))
        return win_rate(outcomes.ravel(), np.tile(np.array(self.ids), self.draws))

    def reward_accuracy(self, reward: Artifact) -> float:
        """Return the share of pairs of evaluation answers that a reward model orders as the gold scorer."""

        def measure() -> float:
            folder = self.folder / f"reward-{reward['key'][:24]}"
            folder.mkdir(exist_ok=True)
            inputs = {"data": find(self.prepared.data), "model": find(self.prepared.model) / "model"}
            job = RewardJob.of(self.config).model_dump(mode="json")
            record = {"job": job, "inputs": {name: str(path) for name, path in inputs.items()}}
            (folder / "job.json").write_text(json.dumps(record))
            return measure_gold(Run(folder), find(reward))

        return float(self._remember(f"reward-{reward['key'][:24]}.json", measure))

    @staticmethod
    def _outcomes(scores: Numbers, others: Numbers) -> Numbers:
        return np.where(scores == others, 0.5, (scores > others).astype(float))

    def _remember(self, name: str, measure: Callable[[], Any]) -> Any:
        path = self.folder / name
        if not path.exists():
            replace_text(path, json.dumps(measure()))
        return json.loads(path.read_text())

    @torch.no_grad()
    def _measure(self, policy: Artifact | None) -> list[list[float]]:
        folder = find(self.prepared.model) / "model"
        model = loading.load(folder, device=CPU, precision=self.config.weights.merged)
        if policy is None:
            return [self._draw(model, folder, f"sft {number}") for number in range(self.draws)]
        adapted, _ = lora.load(model, "policy", find(policy) / "adapter")
        with lora.active(adapted, "policy") as active:
            return [self._draw(active, folder, f"policy {number}") for number in range(self.draws)]

    def _draw(self, model: PreTrainedModel, folder: Path, name: str) -> list[float]:
        """Return the gold scores of one answer to each question, drawn by the numbers called ``name``."""
        tokenizer = loading.load_tokenizer(folder)
        encoder = pair_tables.build_encoder(self.config.text, tokenizer, {})
        samples = sampling.sample(
            model,
            [encoder.encode_prompt(question) for question in self.questions],
            max_tokens=encoder.max_answer_tokens,
            temperature=TEMPERATURE,
            end_ids=prompts.end_tokens(tokenizer, encoder.template),
            pad_id=tokenizer.pad_token_id,
            uniform=sampling.uniform_numbers(self.config.seed, name, self.ids, encoder.max_answer_tokens),
        )
        answers = [row[kept].tolist() for row, kept in zip(samples.ids, samples.mask, strict=True)]
        texts = [prompts.decode_answer(tokenizer, one, template=encoder.template) for one in answers]
        return [gold_score(*pair) for pair in zip(self.questions, texts, strict=True)]


def accuracy_on_candidates(candidates: Artifact) -> Interval:
    """Return the share of pairs of a policy's own answers that the last reward model orders as gold does."""
    columns = ["question_id", "prompt", "answer", "reward"]
    rows = pq.read_table(find(candidates) / "candidates.parquet", columns=columns).to_pylist()
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["question_id"], []).append(row)
    truth = [[gold_score(one["prompt"], one["answer"]) for one in group] for group in groups.values()]
    return ordering_agreement([[one["reward"] for one in group] for group in groups.values()], truth)


def describe_rate(rate: Interval) -> str:
    """Return a share with its interval, in per cent."""
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"


def describe_difference(difference: Interval) -> str:
    """Return a difference of shares with its interval, in points."""
    value, low, high = (100 * one for one in difference[:3])
    return f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"
