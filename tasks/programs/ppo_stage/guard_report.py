"""Say what PPO's guards saw and did: sentences, metrics, and the files that the report draws from."""

from typing import Any

from tasks.programs.ppo_stage.guards import MOST_RAISES, RAISE, Guards
from tasks.programs.runtime.program import Run

SCORES = "scores.json"


def write_report(guards: Guards, run: Run, num_steps: int) -> dict[str, Any]:
    """Add the warnings to the run, write the measurements, and return the metrics of the score."""
    run.warnings += [*describe_alarms(guards), *describe_end(guards)]
    if guards.score is not None:
        run.warnings += guards.score.warnings()
    record: dict[str, Any] = {"alarms": [alarm._asdict() for alarm in guards.alarms]}
    metrics: dict[str, Any] = {}
    if guards.score is not None and guards.best is not None:
        points = guards.score.points
        metrics = {
            "ppo.independent_score.sft": _interval(points[0], guards.best.score.n),
            "ppo.independent_score.best": guards.best.score._asdict(),
            "ppo.independent_score.final": _interval(points[-1], guards.best.score.n),
            "ppo.best_step": guards.best.step,
            "ppo.kept_step": guards.good_step if guards.has_returned else num_steps,
        }
        record |= {"by": guards.settings.score.by, "points": points, "best_of_n": guards.score.best_of}
        record |= {"best_step": guards.best.step, "kept_step": metrics["ppo.kept_step"]}
    if record["alarms"] or guards.score is not None:
        run.note(SCORES, record)
    return metrics


def _interval(point: dict[str, float], n: int) -> dict[str, float]:
    value, low, high = (point[f"independent_score{end}"] for end in ("", "_low", "_high"))
    return {"value": value, "low": low, "high": high, "n": n}


def describe_end(guards: Guards) -> list[str]:
    """Return a sentence if the last weights are far below the best."""
    if not guards.last_fall:
        return []
    done = f"The policy is that of step {guards.good_step}."
    if not guards.has_returned:
        done = "The policy has these weights all the same: ppo.keep=best hands on the best ones."
    return [f"At the end {guards.last_fall}. {done}"]


def describe_alarms(guards: Guards) -> list[str]:
    """Return sentences on the first alarm, and on a stop after others."""
    if not guards.alarms:
        return []
    first, last, count = guards.alarms[0], guards.alarms[-1], len(guards.alarms)
    others = f" The alarm rang {count - 1} more times." if count > 1 else ""
    sentences = [f"In step {first.step} {first.reason}. {_describe_action(guards, first.action)}{others}"]
    if last.action != first.action:
        sentences.append(f"In step {last.step} {last.reason}. {_describe_action(guards, last.action)}")
    return sentences


def _describe_action(guards: Guards, action: str) -> str:
    raised = f"{RAISE ** min(len(guards.alarms), MOST_RAISES):.3g}"
    kept = f"that of step {guards.good_step}" if guards.good_step else "the SFT model: nothing was learnt"
    return {
        "warn": "Training went on: ppo.on_alarm=stop ends it with the weights before the fault.",
        "raise_kl": f"The weight of the KL penalty was raised, in all to {raised} times what it was.",
        "roll_back": "Training went on from the best weights with a higher weight of the KL penalty: "
        "ppo.on_alarm=warn only says so.",
        "stop": f"Training ended, and the policy is {kept}. A lower ppo.learning_rate or a higher "
        "ppo.kl_coefficient trains longer.",
    }[action]
