"""How SFT, the reward model and DPO begin: what is trained, from which weights, by which plan."""

from peft import PeftModel
from transformers import PreTrainedModel

from tasks.programs.config import Dpo, Reward, Sft
from tasks.programs.entry import Run
from tasks.rlhf import models, schedules, tuned
from tasks.rlhf.training import Plan, Training
from tasks.rlhf.tuned import Tuned


def tuning(settings: Sft | Reward | Dpo, run: Run, base: PreTrainedModel | PeftModel, name: str, *, source: str) -> Tuned:
    """What of ``base``, which is the input ``source``, is trained (torch's global seed)."""
    folder = run.inputs[source]
    match settings.tune:
        case "lora":
            chosen = tuned.lora(base, name, fingerprint=models.fingerprint(folder), **settings.lora.model_dump())
        case "full":
            assert isinstance(base, PreTrainedModel)
            chosen = tuned.full(base, folder)
        case "bottleneck":
            assert isinstance(base, PreTrainedModel)
            chosen = tuned.bottleneck(base, fingerprint=models.fingerprint(folder), **settings.bottleneck.model_dump())
    return chosen


def training(settings: Sft | Reward | Dpo, run: Run, tuning: Tuned, *, num_rows: int, seed: int) -> Training:
    """The optimizer steps over ``num_rows`` rows, with the weights of the input "start" where there is one, or from the checkpoint."""
    if "start" in run.inputs:
        tuned.start_from(tuning.parameters, run.inputs["start"])
    plan = Plan(
        total=schedules.num_steps(num_rows, batch_size=settings.batch_size, epochs=settings.epochs, max_steps=settings.max_steps),
        seed=seed,
        peak=settings.learning_rate,
        shape=settings.schedule,
        warmup_share=settings.warmup_share,
        evaluations=settings.evaluations,
        patience=settings.patience,
        keep_best=settings.keep == "best",
    )
    begun = Training(
        tuning.parameters,
        run.checkpoints,
        plan,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        apart=tuning.apart,
    )
    run.rewind(begun.start)
    return begun
