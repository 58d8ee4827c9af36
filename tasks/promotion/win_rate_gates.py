"""Compare a policy's win rates with the gates: against the champion, and against SFT."""

from typing import Any

from tasks.config.policies import TITLES
from tasks.config.sections.gates import Gates
from tasks.config.trusted_judges import JUDGES
from tasks.promotion.gate_results import (
    Champion,
    Choice,
    Evidence,
    GateResult,
    format_share,
    missing,
    percent,
    points,
    read_interval,
)


def judge_against_champion(
    gates: Gates, choice: Choice, evidence: Evidence, champion: Champion | None
) -> list[GateResult]:
    """Return whether the policy beats the champion, or the base model if there is no champion yet."""
    name, threshold = "win_rate_vs_champion", gates.win_rate_vs_champion
    if threshold is None:
        return []
    if champion:
        title = f"the champion (version {champion.version})"
        if own := _find_policy(evidence, champion):
            title += f", {TITLES[own]} of the same run,"
            return [_win_rate(name, threshold, choice, evidence, own, title)]
        if evidence.compared != champion.digest:
            sentence = f"The run has not compared {TITLES[choice.policy]} with {title}: run it again, which "
            sentence += "samples the champion's answers and judges them"
            return [missing(name, f"above {percent(threshold)}", sentence)]
        return [_win_rate(name, threshold, choice, evidence, "champion", title)]
    first = "There is no champion yet, so the first model is held against SFT"
    if read_interval(evidence.metrics, f"{choice.judge}_win_rate.{choice.policy}_vs_base"):
        result = _win_rate(name, threshold, choice, evidence, "base", "the base model")
        figure = f"{result.figure} against the base model"
        return [result._replace(figure=figure, sentence=f"{first} and the base model. {result.sentence}")]
    if gates.win_rate_vs_sft is None:
        sentence = "There is neither a champion nor a comparison with SFT or the base model"
        return [GateResult(name, None, "missing", f"above {percent(threshold)}", f"{sentence}.")]
    sentence = f"{first} alone: the run has no comparison with the base model."
    return [GateResult(name, True, "no champion", f"above {percent(threshold)}", sentence)]


def _find_policy(evidence: Evidence, champion: Champion) -> str:
    """Return which policy of this run the champion is; "" if it is of another run."""
    found = (policy for policy, digest in evidence.digests.items() if digest == champion.digest)
    return next(found, "")


def judge_against_sft(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    """Return whether the policy beats the SFT model."""
    if gates.win_rate_vs_sft is None:
        return []
    return [_win_rate("win_rate_vs_sft", gates.win_rate_vs_sft, choice, evidence, "sft", "SFT")]


def _win_rate(
    gate: str, threshold: float, choice: Choice, evidence: Evidence, opponent: str, title: str
) -> GateResult:
    """Return whether the interval of the win rate against an opponent lies above the threshold."""
    policy, limit = TITLES[choice.policy], f"above {percent(threshold)}"
    if not choice.judge:
        return missing(gate, limit, f"No judge that the settings allow has judged {policy} against {title}")
    metric = f"{choice.judge}_win_rate.{choice.policy}_vs_{opponent}"
    rate = read_interval(evidence.metrics, metric) or _read_reverse(evidence, choice, opponent)
    if rate is None:
        return missing(gate, limit, f"The run has no win rate of {policy} against {title} ({metric})")
    figure = format_share(rate)
    wins = f"{policy} wins {percent(rate['value'])} against {title} by {JUDGES[choice.judge]}"
    if rate["low"] > threshold:
        return GateResult(gate, True, figure, limit, f"{wins}: better.")
    if rate["high"] < threshold:
        verdict = f"worse, by {points(threshold - rate['value'])}"
    else:
        verdict = (
            f"not shown to be better, as the interval begins at {percent(rate['low'])}, "
            f"{points(threshold - rate['low'])} too low"
        )
    return GateResult(gate, False, figure, limit, f"{wins}: {verdict}.")


def _read_reverse(evidence: Evidence, choice: Choice, opponent: str) -> Any:
    """Return the win rate from that of the opponent against the policy; None if there is none.

    A pair of policies is compared once, and a tie counts half for each.
    """
    rate = read_interval(evidence.metrics, f"{choice.judge}_win_rate.{opponent}_vs_{choice.policy}")
    if rate is None:
        return None
    turned = {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"]}
    return {**rate, **turned}
