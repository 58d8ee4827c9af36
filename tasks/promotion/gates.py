"""Decide whether a policy may be promoted: compare the figures of its run with the gates of the settings."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.config.sections.gates import Gates, Promotion

JUDGES = (
    "gold",
    "lm",
    "held_out",
    "reward",
)  # which decides, if the settings leave it open: the first that has judged
POLICIES = ("ppo", "dpo")
TITLES = {
    "lm": "the language model",
    "gold": "the gold scorer",
    "held_out": "the held-out reward model",
    "reward": "the reward model",
    "ppo": "PPO",
    "dpo": "DPO",
}
PERPLEXITY = "tax.perplexity."  # in per cent, unlike the other taxes, which are points of accuracy
DAY_SECONDS = 86_400.0


class Evidence(NamedTuple):
    """What is known of a finished run."""

    metrics: Mapping[str, Any]  # of its summary
    warnings: Mapping[str, Sequence[str]]  # by stage
    data_read: float | None  # when the data stage has read its source, seconds since the epoch; None: unknown
    now: float
    compared: str = ""  # digest of the policy of an earlier run that it was compared with; "" if none


class Champion(NamedTuple):
    """The policy that is in use."""

    version: str
    digest: str  # of its artifact


class GateResult(NamedTuple):
    """What one gate says about a policy."""

    name: str  # of its setting
    passed: bool | None  # None: its figure is missing, so it cannot be decided and does not pass
    figure: str
    threshold: str
    sentence: str  # says by how much it failed


class Choice(NamedTuple):
    """The policy that would be promoted, and the judge that decides."""

    policy: str
    judge: str  # "" if no judge has compared it with SFT
    win_rate: Any  # against SFT; None if there is none


def choose(promotion: Promotion, metrics: Mapping[str, Any], trained: Sequence[str]) -> Choice | None:
    """Return the policy and the judge that the settings mean; None if no such policy was trained."""
    judge = _choose_judge(promotion, metrics)
    candidates = [name for name in trained if promotion.policy in ("auto", name)]
    if not candidates:
        return None
    rates = {name: _interval(metrics, f"{judge}_win_rate.{name}_vs_sft") for name in candidates}
    best = max(candidates, key=lambda name: rates[name]["value"] if rates[name] else -1.0)
    return Choice(best, judge, rates[best])


def _choose_judge(promotion: Promotion, metrics: Mapping[str, Any]) -> str:
    wanted = JUDGES if promotion.judge == "auto" else (promotion.judge,)
    judges = (name for name in wanted if any(metric.startswith(f"{name}_win_rate.") for metric in metrics))
    return next(judges, "")


def evaluate(
    gates: Gates, choice: Choice, evidence: Evidence, champion: Champion | None = None
) -> list[GateResult]:
    """Return the result of each gate that is on."""
    return [
        *_against_champion(gates, choice, evidence, champion),
        *_against_sft(gates, choice, evidence),
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


# --------------------------------------------------------------------------------------------- each gate


def _against_champion(
    gates: Gates, choice: Choice, evidence: Evidence, champion: Champion | None
) -> list[GateResult]:
    name, threshold = "win_rate_vs_champion", gates.win_rate_vs_champion
    if threshold is None:
        return []
    if champion:
        title = f"the champion (version {champion.version})"
        if evidence.compared != champion.digest:
            sentence = f"The run has not compared {TITLES[choice.policy]} with {title}: run it again, which "
            sentence += "samples the champion's answers and judges them"
            return [_missing(name, f"above {_percent(threshold)}", sentence)]
        return [_win_rate(name, threshold, choice, evidence, "champion", title)]
    first = "There is no champion yet, so the first model is held against SFT"
    if _interval(evidence.metrics, f"{choice.judge}_win_rate.{choice.policy}_vs_base"):
        result = _win_rate(name, threshold, choice, evidence, "base", "the base model")
        return [result._replace(sentence=f"{first} and the base model. {result.sentence}")]
    if gates.win_rate_vs_sft is None:
        sentence = "There is neither a champion nor a comparison with SFT or the base model"
        return [GateResult(name, None, "missing", f"above {_percent(threshold)}", f"{sentence}.")]
    sentence = f"{first} alone: the run has no comparison with the base model."
    return [GateResult(name, True, "no champion", f"above {_percent(threshold)}", sentence)]


def _against_sft(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    if gates.win_rate_vs_sft is None:
        return []
    return [_win_rate("win_rate_vs_sft", gates.win_rate_vs_sft, choice, evidence, "sft", "SFT")]


def _win_rate(
    gate: str, threshold: float, choice: Choice, evidence: Evidence, opponent: str, title: str
) -> GateResult:
    """Return whether the interval of the win rate against an opponent lies above the threshold."""
    policy, limit = TITLES[choice.policy], f"above {_percent(threshold)}"
    if not choice.judge:
        return _missing(gate, limit, f"No judge that the settings allow has judged {policy} against {title}")
    metric = f"{choice.judge}_win_rate.{choice.policy}_vs_{opponent}"
    rate = _interval(evidence.metrics, metric)
    if rate is None:
        return _missing(gate, limit, f"The run has no win rate of {policy} against {title} ({metric})")
    figure = _format_share(rate)
    wins = f"{policy} wins {_percent(rate['value'])} against {title} by {TITLES[choice.judge]}"
    if rate["low"] > threshold:
        return GateResult(gate, True, figure, limit, f"{wins}: better.")
    if rate["high"] < threshold:
        verdict = f"worse, by {_points(threshold - rate['value'])}"
    else:
        verdict = (
            f"not shown to be better, as the interval begins at {_percent(rate['low'])}, "
            f"{_points(threshold - rate['low'])} too low"
        )
    return GateResult(gate, False, figure, limit, f"{wins}: {verdict}.")


def _alignment_tax(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    """Return a result for each benchmark; metrics are losses in points, tax.BENCHMARK.POLICY_vs_sft."""
    allowed, ending = gates.alignment_tax, f".{choice.policy}_vs_sft"
    if allowed is None:
        return []
    found = [name for name in evidence.metrics if name.startswith("tax.") and name.endswith(ending)]
    benchmarks = [metric for metric in sorted(found) if not metric.startswith(PERPLEXITY)]
    if not benchmarks:
        limit, policy = f"at most {allowed:g} points", TITLES[choice.policy]
        return [_missing("alignment_tax", limit, f"The run has no benchmark of {policy} against SFT")]
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
    limit, loss = f"at most {allowed:g} {unit}", _interval(evidence.metrics, metric)
    if loss is None:
        return _missing(gate, limit, f"The run has no {metric} with an interval")
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
        return [_missing("kl", limit, f"The run has no {metric}")]
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
    limit = f"at most {_percent(allowed)}"
    if choice.policy != "ppo" and choice.judge != "reward":
        sentence = f"The reward model has neither trained nor judged {TITLES[choice.policy]}."
        return [GateResult(name, True, "not used", limit, sentence)]
    worst = _interval(evidence.metrics, "reward.worst_attack")
    if worst is None:
        return [_missing(name, limit, "The reward model was not tested with worthless answers")]
    passed, share = worst["high"] <= allowed, _percent(worst["value"])
    sentence = f"Worthless answers out-score {share} of the real ones by the reward model"
    if not passed and worst["low"] > allowed:
        sentence += f": it is fooled, {_points(worst['value'] - allowed)} above the limit"
    elif not passed:
        sentence += f", and {worst['n']:,} answers cannot tell whether the limit holds"
    return [GateResult(name, passed, _format_share(worst), limit, f"{sentence}.")]


def _warnings(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    if gates.warnings is None:
        return []
    limit, raised = f"at most {gates.warnings}", evidence.warnings.get(choice.policy)
    if raised is None:
        return [_missing("warnings", limit, f"The run does not say what {choice.policy} has warned of")]
    passed = len(raised) <= gates.warnings
    sentence = f"The stage {choice.policy} has raised {len(raised) or 'no'} warning{'s' * (len(raised) != 1)}"
    said = "" if passed else f": {' '.join(raised)}"
    return [GateResult("warnings", passed, str(len(raised)), limit, f"{sentence}{said or '.'}")]


def _judge_agreement(gates: Gates, choice: Choice, evidence: Evidence) -> list[GateResult]:
    name, threshold = "judge_agreement", gates.judge_agreement
    if threshold is None:
        return []
    limit = f"above {_percent(threshold)}"
    if not choice.judge:
        return [_missing(name, limit, "No judge has judged this run")]
    judge = TITLES[choice.judge]
    card, rule = (
        _interval(evidence.metrics, f"judge.{choice.judge}.{figure}")
        for figure in ("agreement", "longer_wins")
    )
    if card is None or rule is None:
        return [_missing(name, limit, f"There is no report card of {judge} on held-out votes")]
    least = max(threshold, rule["value"])
    limit = f"above {_percent(least)}" + (' ("longer wins")' if rule["value"] > threshold else "")
    agrees = f"{judge[0].upper()}{judge[1:]} agrees with {_percent(card['value'])} of held-out votes"
    if card["low"] > least:
        return [GateResult(name, True, _format_share(card), limit, f"{agrees}.")]
    reason = (
        'better than "the longer answer wins"'
        if rule["value"] > threshold
        else f"above {_percent(threshold)}"
    )
    doubt = f"not shown to be {reason}, as its interval begins {_points(least - card['low'])} too low"
    return [GateResult(name, False, _format_share(card), limit, f"{agrees}: {doubt}.")]


def _data_days(gates: Gates, evidence: Evidence) -> list[GateResult]:
    if gates.data_days is None:
        return []
    limit = f"at most {gates.data_days:g} days"
    if evidence.data_read is None:
        return [_missing("data_days", limit, "It is not known when the source was read")]
    days = (evidence.now - evidence.data_read) / DAY_SECONDS
    passed = days <= gates.data_days
    excess = "" if passed else f": {days - gates.data_days:.1f} days too long"
    sentence = f"The source was read {days:.1f} days ago{excess}."
    return [GateResult("data_days", passed, f"{days:.1f} days", limit, sentence)]


# --------------------------------------------------------------------------------------------- formats


def _missing(gate: str, limit: str, sentence: str) -> GateResult:
    return GateResult(gate, None, "missing", limit, f"{sentence}, so the gate cannot be decided.")


def _interval(metrics: Mapping[str, Any], name: str) -> Any:
    """Return a metric that has an interval; None if there is none."""
    value = metrics.get(name)
    has_interval = isinstance(value, dict) and all(
        isinstance(value.get(part), int | float) for part in ("value", "low", "high", "n")
    )
    return value if has_interval else None


def _format_share(value: Mapping[str, Any]) -> str:
    bounds = f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
    return f"{_percent(value['value'])} ({bounds}, n {value['n']:,})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
