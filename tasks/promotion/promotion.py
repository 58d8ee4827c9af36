"""Register the policy of a finished run and, if it passes the gates, make it the champion."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from tasks.config.policies import TITLES
from tasks.config.sections.gates import Promotion
from tasks.promotion.assessment import assess
from tasks.promotion.finished_runs import FinishedRun, find_manifest, read_licences
from tasks.promotion.gate_results import Choice, GateResult
from tasks.promotion.gates import failures
from tasks.promotion.person_gates import not_overruled
from tasks.promotion.report_page import REPORT, VERDICTS, gates_as_html, replace_gates, update_report
from tasks.system.errors import InputError
from tasks.tracking import registry, runs
from tasks.tracking.client import Tracker
from tasks.tracking.registry import ModelVersion
from tasks.tracking.run_origin import COMMIT
from tasks.tracking.runs import FLOW_RUN, PROFILE
from tasks.tracking.tracked_run import KEY

OUTCOME = "alignflow.promotion"  # tag of the pipeline's run: what became of its policy
GATE, SOURCE = "gate.", "raw."  # prefixes of a version's tags: a gate's result; digest of the raw data
OFF = "off"
MODEL_SCHEMA = 1
CARDS = "model-cards"  # folder of a run's files in MLflow

Outcome = Literal["Promoted", "Refused", "Rejected", "Unchanged", "Challenger"]


class Proposal(NamedTuple):
    """A policy that is registered and judged by the gates, before anything is decided."""

    run: FinishedRun
    choice: Choice
    results: list[GateResult]
    off: list[str]  # gates that the settings switch off
    version: ModelVersion
    champion: ModelVersion | None

    @property
    def title(self) -> str:
        """Return what is promoted: the policy, the version and the run."""
        name = self.run.tags.get("mlflow.runName", self.run.run_id)
        return f"{TITLES[self.choice.policy]} of {name} ({self.version.name} version {self.version.version})"

    @property
    def is_champion(self) -> bool:
        """Whether the policy is the champion already."""
        return self.champion is not None and self.champion.version == self.version.version


class Ending(NamedTuple):
    """What became of a proposal: the name of the state that a flow run ends in, and its message."""

    outcome: Outcome
    sentence: str


def propose(tracker: Tracker, promotion: Promotion, run: FinishedRun) -> Proposal:
    """Judge a run's policy by the gates and register it; leave the champion as it is. Raises InputError."""
    found = assess(tracker, promotion, run.profile, run.summary["metrics"], run.stages)
    if found is None:
        wanted = "policy" if promotion.policy == "auto" else promotion.policy
        raise InputError(f"The run has trained no {wanted}, so there is nothing to promote")
    choice, results, off, champion, is_champion = found
    if is_champion and champion:
        return Proposal(run=run, choice=choice, results=[], off=[], version=champion, champion=champion)
    data = run.stages.get("data", {}).get("key", "")
    manifest = find_manifest(tracker, "data", data) if data else None
    tags = _identity(tracker, run, choice, dict(manifest["origins"]) if manifest else {})
    tags |= {f"{GATE}{_tag_name(one.name)}": f"{VERDICTS[one.passed]}: {one.sentence}" for one in results}
    tags |= {f"{GATE}{name}": OFF for name in off}
    version = registry.register(
        tracker,
        promotion.model_name(run.profile),
        run_id=run.run_id,
        policy=choice.policy,
        content=_model_content(tracker, run, choice),
        tags=tags,
    )
    outdated = {tag: OFF for tag in version.tags if tag.startswith(GATE) and tag not in tags}
    registry.set_tags(tracker, version.name, version.version, outdated)
    return Proposal(run=run, choice=choice, results=results, off=off, version=version, champion=champion)


def _identity(tracker: Tracker, run: FinishedRun, choice: Choice, origins: dict[str, str]) -> dict[str, str]:
    """Return the tags that say what a version is and what it was made from."""
    rate = choice.win_rate
    tags = {
        KEY: run.stages[choice.policy]["key"],
        "policy": choice.policy,
        "run": run.run_id,
        FLOW_RUN: run.tags.get(FLOW_RUN, ""),
        PROFILE: run.profile,
        "judge": choice.judge,
        "win_rate_vs_sft": f"{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})" if rate else "",
        COMMIT: run.tags.get(COMMIT, ""),
        "seed": str(run.settings.get("seed", "")),
        "licence": read_licences(tracker, run.stages["data"]["key"]) if "data" in run.stages else "",
    }
    for tag, fact in ((registry.STAGE_KEYS, "key"), (registry.STAGE_DIGESTS, "digest")):
        tags[tag] = json.dumps({name: stage[fact] for name, stage in run.stages.items()})
    raw = {name: digest for name, digest in origins.items() if not name.startswith("against")}
    return tags | {f"{SOURCE}{name}": digest for name, digest in raw.items()}


def _model_content(tracker: Tracker, run: FinishedRun, choice: Choice) -> dict[str, Any]:
    """Return the content of model.json: the artifacts that the policy consists of. Raises InputError."""
    artifacts = {}
    for role, name in (("policy", choice.policy), ("model", "merge"), ("reward", "reward")):
        if name not in run.stages:
            continue
        stage = run.stages[name]
        built = runs.find_built(tracker, stage["key"])
        if not built and role == "policy":
            raise InputError(
                f"The policy of this run, {name} {stage['key'][:12]}, is not in MLflow: "
                "run it again with MLflow reachable"
            )
        artifacts[role] = {
            "stage": name,
            "key": stage["key"],
            "digest": stage["digest"],
            "files": f"runs:/{built[0][0]}/{stage['key']}" if built else "",
        }
    return {"schema": MODEL_SCHEMA, "kind": choice.policy, "artifacts": artifacts}


def _tag_name(name: str) -> str:
    """Return a gate's name with the characters that MLflow allows in the name of a tag."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


def challenge(tracker: Tracker, proposal: Proposal, *, by_person: bool = False) -> Ending:
    """Refuse a proposal that fails a gate; make the others challengers, for someone to decide.

    ``by_person`` says that a person decides, who may overrule the gates of `person_gates`.
    """
    if proposal.is_champion:
        return Ending("Unchanged", f"{proposal.title} is the champion already.")
    if failed := not_overruled(failures(proposal.results), by_person=by_person):
        reasons = " ".join(f"{one.name}: {one.sentence}" for one in failed)
        ending = Ending("Refused", f"{proposal.title} is not promoted. {reasons}")
        registry.decide(tracker, proposal.version, "refused", by="the gates", note=reasons)
        return _note(tracker, proposal, ending)
    registry.set_alias(tracker, proposal.version, registry.CHALLENGER)
    registry.set_tags(
        tracker, proposal.version.name, proposal.version.version, {registry.DECISION: "pending"}
    )
    return _note(tracker, proposal, Ending("Challenger", f"{proposal.title} {_passing(proposal)}."))


def promote(tracker: Tracker, proposal: Proposal, *, by: str, note: str = "") -> Ending:
    """Make the proposed version the champion. Raises InputError if there is another champion by now."""
    previous = proposal.champion.version if proposal.champion else ""
    registry.make_champion(tracker, proposal.version, expected=previous, by=by, note=note)
    instead = f" in place of version {previous}" if previous else ", the first one"
    said = f" ({note})" if note else ""
    sentence = f"{proposal.title} is the champion{instead}, decided by {by}{said}."
    return _note(tracker, proposal, Ending("Promoted", sentence))


def reject(tracker: Tracker, proposal: Proposal, *, by: str, note: str = "") -> Ending:
    """Record that a person has refused a version that passes the gates."""
    registry.decide(tracker, proposal.version, "rejected", by=by, note=note)
    said = f": {note}" if note else ""
    sentence = f"{proposal.title} {_passing(proposal)} and was rejected by {by}{said}."
    return _note(tracker, proposal, Ending("Rejected", sentence))


def _passing(proposal: Proposal) -> str:
    overruled = " and ".join(one.name for one in failures(proposal.results))
    return f"passes all gates but {overruled}" if overruled else "passes all gates"


def _note(tracker: Tracker, proposal: Proposal, ending: Ending) -> Ending:
    """Say in MLflow what became of a proposal: on the pages of version and run, and in the run's report."""
    text, run = f"{ending.outcome}: {ending.sentence}", proposal.run
    tracker.set_tags(run.run_id, {OUTCOME: text[: registry.MAX_TEXT]})
    parts = [_cell(text), _links(tracker, proposal), evidence_table(proposal.results)]
    registry.describe(tracker, proposal.version, "\n\n".join(filter(None, parts)) + "\n")
    # the reasons of a refusal stand below it
    sentence = ending.sentence if ending.outcome != "Refused" else f"{proposal.title} is not promoted."
    overruled = ending.outcome in ("Promoted", "Challenger")
    content = gates_as_html(
        f"{ending.outcome}.", sentence, proposal.results, proposal.off, overruled=overruled
    )
    change = partial(replace_gates, content=content)
    update_report(tracker, run.run_id, run.tags.get(FLOW_RUN, ""), change)
    return ending


def _links(tracker: Tracker, proposal: Proposal) -> str:
    """Return links to the report and the model card of a version's run; "" if MLflow is no server."""
    files = {"Report": REPORT, "model card": f"{CARDS}/{proposal.choice.policy}/README.md"}
    pages = {title: tracker.page(proposal.run.run_id, file) for title, file in files.items()}
    return " · ".join(f"[{title}]({address})" for title, address in pages.items() if address)


def evidence_table(results: Sequence[GateResult]) -> str:
    """Return the gates' results as a table in Markdown."""
    rows = [
        f"| {_cell(one.name)} | {VERDICTS[one.passed]} | {_cell(one.figure)} | {_cell(one.threshold)} |"
        for one in results
    ]
    sentences = [f"- {_cell(one.sentence)}" for one in results]
    return "\n".join(["| gate | verdict | figure | threshold |", "|---|---|---|---|", *rows, "", *sentences])


def describe(proposal: Proposal) -> str:
    """Return the evidence for and against a proposal in Markdown."""
    champion = proposal.champion
    rival = f"version {champion.version}" if champion else "none yet"
    off = f"\n\nGates that are off: {', '.join(map(_cell, proposal.off))}" if proposal.off else ""
    table = evidence_table(proposal.results)
    return f"# {_cell(proposal.title)}\n\nChampion now: {rival}\n\n{table}{off}\n"


def _cell(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is."""
    special = "\\`*<>[]|~#"
    flat = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in special else letter for letter in flat)
