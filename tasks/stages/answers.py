"""Let the base model and every trained policy answer held-out questions."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import WEIGHT_FILES, only_weights, weight_files
from tasks.config.jobs import AnswersJob, Champion
from tasks.config.pipeline import Pipeline
from tasks.config.policies import PREDECESSOR, TRAINED
from tasks.config.sections.models import Text
from tasks.stages.stage import Inputs, NothingToDo, stage

OPPONENTS = ("champion", "previous")


def choose_opponent(artifacts: dict[str, Artifact]) -> dict[str, Artifact]:
    """Return the champion as the inputs "champion" and "champion_model", or nothing if there is none.

    If it is one of the run's own policies, that is the champion before it, with which the run was compared
    when it was promoted: a run whose policy became the champion finds its stages unchanged.
    """
    own = {artifacts[name]["key"] for name in TRAINED if name in artifacts}
    for name in OPPONENTS:
        if name in artifacts and artifacts[name]["key"] not in own:
            return {"champion": artifacts[name], "champion_model": artifacts[f"{name}_model"]}
    return {}


def with_champion(job: AnswersJob, **artifacts: Artifact) -> AnswersJob:
    """Return the job with the champion's prompt format and precision."""
    opponent = choose_opponent(artifacts)
    if not opponent:
        return job
    trained = opponent["champion"]["job"]
    text = Text.model_validate(trained["text"])
    precision = trained.get("weights", {}).get("merged")
    return job.model_copy(update={"champion": Champion(text=text, precision=precision)})


@stage(AnswersJob, complete=with_champion)
def answers(
    config: Pipeline, *, data: Artifact, base: Artifact, model: Artifact, **others: Artifact
) -> Inputs:
    """Sample an answer of each policy, and of the champion, to each held-out question."""
    policies = {name: others[name] for name in TRAINED if name in others}
    if not policies:
        raise NothingToDo("No policy was trained.")
    files = {"ppo": WEIGHT_FILES["lora"], "dpo": weight_files(config.dpo)}
    inputs = {
        "data": only(data, "evaluation.parquet"),
        "base": within(base, "model"),
        "model": within(model, "model"),
        **{name: only(policy, *files[name]) for name, policy in policies.items()},
    }
    if PREDECESSOR in others:
        inputs[PREDECESSOR] = only_weights(others[PREDECESSOR])
    if opponent := choose_opponent(others):
        inputs["champion"] = only_weights(opponent["champion"])
        inputs["champion_model"] = within(opponent["champion_model"], "model")
    return inputs
