"""Choose the judge that decides between the policies of several finished runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.config.commands.comparison import ComparedRun, ComparingJudge, Comparison
from tasks.config.trusted_judges import JUDGES
from tasks.promotion.finished_runs import NAME, FinishedRun, find_unique_run
from tasks.system.errors import InputError
from tasks.system.hashing import digest_of
from tasks.tracking.client import Tracker

ASK = "name one: --judge gold; or lm, held_out or reward, followed by :RUN for the judge of a certain run"
# of a run's settings, those that the verdicts of its judge depend on
SECTIONS: dict[str, tuple[str, ...]] = {
    "gold": (),
    "lm": ("judge",),
    "held_out": ("text", "weights", "winrate", "reward"),
    "reward": ("text", "weights", "winrate", "reward"),
}


class ChosenJudge(NamedTuple):
    """A judge of a finished run."""

    owner: FinishedRun
    kind: Any  # a name of JUDGES


def identify_judges(run: FinishedRun) -> dict[str, str]:
    """Return a text for each judge of a run that is equal for the same judge in another run."""
    found = {}
    if run.settings.get("source", {}).get("kind") == "shell-site":
        found["gold"] = "gold"
    if (judge := run.settings.get("judge", {})).get("kind", "none") != "none":
        found["lm"] = digest_of(judge)
    if "reward" in run.stages and "merge" in run.stages:
        digest = f"{run.stages['reward']['digest']} on {run.stages['merge']['digest']}"
        if run.settings.get("reward", {}).get("held_out_member"):
            found["held_out"] = f"held-out member of {digest}"
        found["reward"] = digest
    return found


def choose_judge(tracker: Tracker, runs: Sequence[FinishedRun], text: str) -> ChosenJudge:
    """Return the judge that KIND or KIND:RUN means.

    "auto" is the first kind of which the runs have one: the gold scorer if it knows all questions, else the
    language model, else a reward model. Raises InputError if they have none, or several.
    """
    kind, colon, name = text.partition(":")
    if kind not in ("auto", *JUDGES) or (colon and kind in ("auto", "gold")):
        raise InputError(f"{text!r} is no judge; {ASK}")
    if colon:
        owner = find_unique_run(tracker, name)
        if kind not in identify_judges(owner):
            raise InputError(f"The run {name} does not have {JUDGES[kind]} as a judge; {ASK}")
        return ChosenJudge(owner, kind)
    having = {one: [run for run in runs if one in identify_judges(run)] for one in JUDGES}
    if len(having["gold"]) < len(runs):
        having["gold"] = []  # it knows the questions of the built-in site only
    if kind == "auto":
        kind = next((one for one, owners in having.items() if owners), "reward")
    if not having[kind]:
        raise InputError(f"The runs do not have {JUDGES[kind]} as a judge; {ASK}")
    if len({identify_judges(run)[kind] for run in having[kind]}) > 1:
        raise InputError(f"{JUDGES[kind][0].upper()}{JUDGES[kind][1:]} is another one in each run; {ASK}")
    return ChosenJudge(having[kind][0], kind)


def add_judge(compared: Sequence[ComparedRun], judge: ChosenJudge) -> Comparison:
    """Return the comparison of runs by a judge, with the settings that its verdicts depend on.

    Raises InputError.
    """
    owner, kind = judge
    name, prefix = owner.tags.get(NAME, owner.run_id), f"judge.{kind}."
    metrics = {figure: one for figure, one in owner.summary["metrics"].items() if figure.startswith(prefix)}
    described = ComparingJudge(
        name=kind,
        title=JUDGES[kind] if kind == "gold" else f"{JUDGES[kind]} of {name}",
        identity=identify_judges(owner)[kind],
        card={figure.removeprefix(prefix): one for figure, one in metrics.items()},
    )
    settings = {section: owner.settings[section] for section in SECTIONS[kind] if section in owner.settings}
    try:
        return Comparison.model_validate({**settings, "runs": tuple(compared), "judged_by": described})
    except ValueError as error:
        reason = " ".join(str(error).split("\n")[1:3])
        raise InputError(
            f"The judge of the run {name} cannot be used: its settings are of another version of alignflow "
            f"({reason[:200]})"
        ) from None
