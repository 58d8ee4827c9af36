"""Decide whether a policy may be promoted: compare the figures of its run with the gates of the settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.config.policies import TITLES
from tasks.config.sections.gates import Gates, Promotion
from tasks.config.trusted_judges import JUDGES, choose_judge, has_judged
from tasks.promotion.gate_results import (
    Champion,
    Choice,
    Evidence,
    GateResult,
    capitalise,
    format_share,
    missing,
    percent,
    points,
    read_interval,
)
from tasks.promotion.win_rate_gates import judge_against_champion, judge_against_sft

PERPLEXITY = "tax.perplexity."  # in per cent, unlike the other taxes, which are points of accuracy
CARD = ("agreement", "longer_wins")  # figures of a judge's report card
DAY_SECONDS = 86_400.0


def choose(promotion: Promotion, metrics: Mapping[str, Any], trained: Sequence[str]) -> Choice | None:
    """Return the policy and the judge that the settings mean; None if no such policy was trained."""
    judge = _choose_judge(promotion, metrics)
    candidates = [name for name in trained if promotion.policy in ("auto", name)]
    if not candidates:
        return None
    rates = {name: read_interval(metrics, f"{judge}_win_rate.{name}_vs_sft") for name in candidates}
    best = max(candidates, key=lambda name: rates[name]["value"] if rates[name] else -1.0)
    return Choice(best, judge, rates[best])


def _choose_judge(promotion: Promotion, metrics: Mapping[str, Any]) -> str:
    if promotion.judge == "auto":
        return choose_judge(metrics)
    return promotion.judge if has_judged(promotion.judge, metrics) else ""


def evaluate(
    gates: Gates, choice: Choice, evidence: Evidence, champion: Champion | None = None
) -> list[GateResult]:
    """Return the result of each gate that is on."""
    return [
        *judge_against_champion(gates, choice, evidence, champion),
        *judge_against_sft(gates, choice, evidence),
        *_alignment_tax(gates, choice, evidence),
        *_perplexity_tax(gates, choice, evidence),
        *_kl(gates, choice, evidence),
        *_worst_attack(gates, choice, evidence),
        *_warnings(gates, choice, evidence),
        *_judge_agreement(gates, choice, evidence),
        *_data_days(gates, evidence),
    ]


def failures(results: Sequence[GateResult]) -> list[GateResult]:
    """Return the gates that do not pass."""
    return [result for result in results if not result.passed]


def _alignment_tax(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    """Return a result for each benchmark; metrics are losses in points, tax.BENCHMARK.POLICY_vs_sft."""
    allowed, ending = gates.alignment_tax, f".{choice.policy}_vs_sft"
    if allowed is None:
        return []
    found = [name for name in evidence.metrics if name.startswith("tax.") and name.endswith(ending)]
    benchmarks = [metric for metric in sorted(found) if not metric.startswith(PERPLEXITY)]
    if not benchmarks:
        limit, policy = f"at most {allowed:g} points", TITLES[choice.policy]
        return [missing("alignment_tax", limit, f"The run has no benchmark of {policy} against SFT")]
    results = []
    for metric in benchmarks:
        title = metric.removeprefix("tax.").removesuffix(ending)
        lost = f"{TITLES[choice.policy]} loses {{}} points on {title} against SFT"
        results.append(_tax(f"alignment_tax.{title}", allowed, "points", lost, metric, evidence))
    return results


def _perplexity_tax(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    if gates.perplexity_tax is None:
        return []
    rises = f"The perplexity of {TITLES[choice.policy]} is {{}} per cent above that of SFT"
    metric = f"{PERPLEXITY}{choice.policy}_vs_sft"
    return [_tax("perplexity_tax", gates.perplexity_tax, "per cent", rises, metric, evidence)]


def _tax(gate: str, allowed: float, unit: str, sentence: str, metric: str, evidence: Evidence) -> GateResult:
    """Return whether the upper bound of a loss is within what is allowed."""
    limit, loss = f"at most {allowed:g} {unit}", read_interval(evidence.metrics, metric)
    if loss is None:
        return missing(gate, limit, f"The run has no {metric} with an interval")
    figure = f"{loss['value']:+.1f} {unit} ({loss['low']:+.1f} to {loss['high']:+.1f}, n {loss['n']:,})"
    passed = loss["high"] <= allowed
    said = f"{sentence.format(format(loss['value'], '.1f'))}, at most {loss['high']:.1f}"
    excess = "" if passed else f": {loss['high'] - allowed:.1f} more than the gate allows"
    return GateResult(gate, passed, figure, limit, f"{said}{excess}.")


def _kl(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    budget, metric = gates.kl, f"{choice.policy}.kl"
    if budget is None:
        return []
    limit, value = f"at most {budget:g} nats", evidence.metrics.get(metric)
    if not isinstance(value, dict | int | float):
        return [missing("kl", limit, f"The run has no {metric}")]
    upper = float(value["high"] if isinstance(value, dict) else value)
    figure = (
        f"{value['value']:.2f} nats (up to {upper:.2f})" if isinstance(value, dict) else f"{upper:.2f} nats"
    )
    passed = upper <= budget
    excess = "" if passed else f": {upper - budget:.2f} over the budget"
    sentence = f"{TITLES[choice.policy]} is up to {upper:.2f} nats per answer away from SFT{excess}."
    return [GateResult("kl", passed, figure, limit, sentence)]


def _worst_attack(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    name, allowed = "worst_attack", gates.worst_attack
    if allowed is None:
        return []
    limit = f"at most {percent(allowed)}"
    if choice.policy != "ppo" and choice.judge not in ("reward", "held_out"):
        sentence = f"The reward model has neither trained nor judged {TITLES[choice.policy]}."
        return [GateResult(name, True, "not used", limit, sentence)]
    worst = read_interval(evidence.metrics, "reward.worst_attack")
    if worst is None:
        return [missing(name, limit, "The reward model was not tested with worthless answers")]
    passed, share = worst["high"] <= allowed, percent(worst["value"])
    sentence = f"Worthless answers out-score {share} of the real ones by the reward model"
    if choice.policy != "ppo" and choice.judge == "held_out":
        sentence += ", whose base and votes the judge, its held-out member, shares"
    if not passed and worst["low"] > allowed:
        sentence += f": it is fooled, {points(worst['value'] - allowed)} above the limit"
    elif not passed:
        sentence += f", and {worst['n']:,} answers cannot tell whether the limit holds"
    return [GateResult(name, passed, format_share(worst), limit, f"{sentence}.")]


def _warnings(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    if gates.warnings is None:
        return []
    limit, raised = f"at most {gates.warnings}", evidence.warnings.get(choice.policy)
    if raised is None:
        return [missing("warnings", limit, f"The run does not say what {choice.policy} has warned of")]
    passed = len(raised) <= gates.warnings
    sentence = f"The stage {choice.policy} has raised {len(raised) or 'no'} warning{'s' * (len(raised) != 1)}"
    said = "" if passed else f": {' '.join(raised)}"
    return [GateResult("warnings", passed, str(len(raised)), limit, f"{sentence}{said or '.'}")]


def _judge_agreement(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    name, threshold = "judge_agreement", gates.judge_agreement
    if threshold is None:
        return []
    limit = f"above {percent(threshold)}"
    if not choice.judge:
        return [missing(name, limit, "No judge has judged this run")]
    judge = JUDGES[choice.judge]
    card, rule = (read_interval(evidence.metrics, f"judge.{choice.judge}.{figure}") for figure in CARD)
    if card is None or rule is None:
        return [missing(name, limit, f"There is no report card of {judge} on held-out votes")]
    least = max(threshold, rule["value"])
    limit = f"above {percent(least)}" + (' ("longer wins")' if rule["value"] > threshold else "")
    agrees = f"{capitalise(judge)} agrees with {percent(card['value'])} of held-out votes"
    if card["low"] > least:
        return [GateResult(name, True, format_share(card), limit, f"{agrees}.")]
    reason = (
        'better than "the longer answer wins"' if rule["value"] > threshold else f"above {percent(threshold)}"
    )
    doubt = f"not shown to be {reason}, as its interval begins {points(least - card['low'])} too low"
    other = _find_qualified(threshold, evidence.metrics)
    hint = f" {capitalise(JUDGES[other])} qualifies: --set promotion.judge={other}." if other else ""
    return [GateResult(name, False, format_share(card), limit, f"{agrees}: {doubt}.{hint}")]


def _find_qualified(threshold: float, metrics: Mapping[str, Any]) -> str:
    """Return the first judge of the run that passes the gate judge_agreement; "" if none does."""
    for judge in JUDGES:
        card, rule = (read_interval(metrics, f"judge.{judge}.{name}") for name in CARD)
        if has_judged(judge, metrics) and card and rule and card["low"] > max(threshold, rule["value"]):
            return judge
    return ""


def _data_days(gates: Gates, evidence: Evidence) -> list[GateResult]:
    if gates.data_days is None:
        return []
    limit = f"at most {gates.data_days:g} days"
    if evidence.data_read is None:
        return [missing("data_days", limit, "It is not known when the source was read")]
    days = (evidence.now - evidence.data_read) / DAY_SECONDS
    passed = days <= gates.data_days
    excess = "" if passed else f": {days - gates.data_days:.1f} days too long"
    sentence = f"The source was read {days:.1f} days ago{excess}."
    return [GateResult("data_days", passed, f"{days:.1f} days", limit, sentence)]
