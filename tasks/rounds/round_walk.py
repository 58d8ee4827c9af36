"""Walk the stages of one round: answers are sampled and compared, then reward model and policy are trained.

What a round knows of earlier ones are their artifacts, which it is handed. There is no other state, so a
killed round goes on from the store.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.stages.answers import answers
from tasks.stages.benchmarks import benchmarks
from tasks.stages.ppo import ppo
from tasks.stages.reward import reward
from tasks.stages.rounds.asked import asked
from tasks.stages.rounds.candidates import candidates
from tasks.stages.rounds.comparisons import comparisons
from tasks.stages.rounds.mixture import mixture
from tasks.stages.winrate import winrate

# Stages that draw with the round's seed. All others keep the run's: every round is judged on the same
# questions, so that rounds are compared in pairs.
SEEDED = ("candidates", "asked", "comparisons", "mixture", "reward", "ppo")
SEED_STEP = 1_000_003  # between two rounds; a prime, so that seeds of neighbouring runs do not meet
SEEDS = 2**31

RunStage = Callable[..., Any]  # (stage, **inputs) -> the stage's artifact, or a promise of it


class Prepared(NamedTuple):
    """What every policy starts from: artifacts, or promises of them."""

    data: Any
    base: Any
    model: Any  # the SFT model


class Round(NamedTuple):
    """A finished round, as later ones know it; None for what it did not build."""

    number: int  # 0: what was trained before the first round
    policy: Artifact | None
    reward: Artifact | None
    asked: Artifact | None
    comparisons: Artifact | None
    run_id: str | None  # in MLflow
    metrics: Mapping[str, Any]
    has_lost: bool = False  # its policy is shown to be worse than the one it was compared with


def standing_round(rounds: Sequence[Round]) -> Round | None:
    """Return the round whose policy the next one goes on from and is compared with; None: the SFT model's.

    ``rounds`` are the earlier ones, oldest first. Answers of a policy that has lost are compared too, as
    the reward model has to learn what is wrong with them.
    """
    return next((one for one in reversed(rounds) if one.policy and not one.has_lost), None)


def round_config(config: Pipeline, number: int) -> Pipeline:
    """Return the settings of a round: the run's with the round's seed."""
    return config.model_copy(update={"seed": (config.seed + SEED_STEP * number) % SEEDS})


def seeded_stages(config: Pipeline, number: int) -> dict[str, Pipeline]:
    """Return the settings of the stages that draw with the round's seed, by name."""
    return dict.fromkeys(SEEDED, round_config(config, number))


def collect_candidates(config: Pipeline, prepared: Prepared, rounds: Sequence[Round], run: RunStage) -> Any:
    """Let the policies of the last rounds answer; return the artifact of the pairs that are asked about.

    ``rounds`` are the earlier ones, oldest first. Nothing that they have asked is asked again.
    """
    policies = [one.policy for one in reversed(rounds) if one.policy][: config.rounds.sample.policies]
    named = {f"policy{number if number > 1 else ''}": one for number, one in enumerate(policies, start=1)}
    scored_by = _given(reward=rounds[-1].reward)
    answered = run(candidates, data=prepared.data, model=prepared.model, **named, **scored_by)
    before = [one.asked for one in rounds if one.asked]
    return run(asked, candidates=answered, data=prepared.data, **_numbered("before", before))


def finish_round(
    config: Pipeline,
    prepared: Prepared,
    rounds: Sequence[Round],
    to_label: Any,
    labels: Artifact | None,
    run: RunStage,
    opponents: Mapping[str, Artifact],
) -> None:
    """Turn labels into comparisons, train the reward model anew and the policy on, and compare the policy.

    ``to_label`` is the artifact of the pairs that are asked about, ``labels`` the file of verdicts on them;
    None: the stage comparisons makes them. ``opponents`` are the champion's artifacts.
    """
    standing = standing_round(rounds)
    before = standing.policy if standing else None
    pairs, base, model = prepared
    labelled = _given(labels=labels, reward=rounds[-1].reward)
    compared = run(comparisons, asked=to_label, model=model, **labelled)
    earlier = [one.comparisons for one in rounds if one.comparisons]
    mixed = run(mixture, data=pairs, **_numbered("comparisons", [*earlier, compared]))
    reward_model = run(reward, data=pairs, model=model, mixture=mixed)
    start = _given(start=before) if config.rounds.continue_policy else {}
    policy = run(ppo, data=pairs, model=model, reward=reward_model, **start)
    against = {**_given(predecessor=before), **opponents}
    answered = run(answers, data=pairs, base=base, model=model, ppo=policy, **against)
    run(winrate, data=pairs, model=model, reward=reward_model, answers=answered)
    run(benchmarks, data=pairs, base=base, model=model, reward=reward_model, ppo=policy)


def _given(**artifacts: Artifact | None) -> dict[str, Artifact]:
    return {name: found for name, found in artifacts.items() if found}


def _numbered(name: str, artifacts: Sequence[Any]) -> dict[str, Any]:
    return {f"{name}{number}": one for number, one in enumerate(artifacts, start=1)}
