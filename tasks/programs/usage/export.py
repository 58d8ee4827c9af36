"""Export a policy: as one merged model, as an adapter alone, or as GGUF.

python -m tasks.programs.usage.export DIR

inputs: card, the model card of its run, if there is one
artifact: merged: a Hugging Face folder with tokenizer, chat template and generation config;
    adapter: a folder in PEFT's format; gguf: one file that llama.cpp has written; README.md: the card
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.commands.usage import ExportJob, PolicyFiles
from tasks.programs.runtime.program import Run, main
from tasks.programs.usage.chat_templates import set_chat_template
from tasks.reporting.model_card.model_card import describe_merged
from tasks.rlhf.batches import prompts
from tasks.rlhf.compute import devices
from tasks.rlhf.models import fingerprint, loading, lora
from tasks.system.errors import InputError


def export(job: ExportJob, run: Run) -> None:
    """Write the policy in the form that the job names."""
    if job.form == "adapter":
        copy_adapter(Path(job.policy.tuned) / "adapter", run.artifact, base_name=job.base_name)
    else:
        device = devices.set_up(run.machine.device, run.machine.threads)
        if job.form == "merged":
            save_merged(job.policy, run.artifact, device)
        else:
            with tempfile.TemporaryDirectory(dir=run.directory) as folder:
                save_merged(job.policy, Path(folder), device)
                convert_to_gguf(Path(folder), run.artifact / "model.gguf", Path(job.converter))
    if "card" in run.inputs:
        card = run.inputs["card"].read_text()
        if job.form != "adapter":
            card = describe_merged(card, library={"merged": "transformers", "gguf": "gguf"}[job.form])
        (run.artifact / "README.md").write_text(card)


def save_merged(policy: PolicyFiles, folder: Path, device: torch.device) -> None:
    """Write the policy as one model that transformers and vLLM load. Raises InputError."""
    tokenizer = loading.load_tokenizer(Path(policy.folder))
    set_chat_template(tokenizer, policy.template)
    model = load_merged(policy, device)
    model.generation_config = generation_config(policy, model, tokenizer)
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_merged(policy: PolicyFiles, device: torch.device) -> PreTrainedModel:
    """Return the model with the policy's adapter merged into the weights that it was trained on.

    Raises InputError if it cannot be merged.
    """
    folder, tuned = Path(policy.folder), Path(policy.tuned)
    if policy.tuned and not (tuned / "adapter").is_dir():
        raise InputError(
            f"{policy.name} has bottlenecks, which no other program can load: chat with it here, or train it "
            "with tune=lora or tune=full."
        )
    if policy.tuned:
        base = loading.load(folder, device=device, precision=policy.precision)
        actual = fingerprint.compute_fingerprint(folder, base)
        fingerprint.check_fingerprint(tuned / "adapter", actual, setting="weights.merged")
    model = loading.load_dequantised(folder, device=device, precision=policy.precision)
    stored = loading.stored_dtype(model)
    if policy.tuned:
        adapted, _ = lora.load(model, "merged", tuned / "adapter")
        model = cast(PreTrainedModel, adapted.merge_and_unload(adapter_names=["merged"]))
    nn.Module.to(model, dtype=stored)
    return model


def generation_config(
    policy: PolicyFiles, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """Return how answers of the policy are sampled: as its run sampled those that were judged."""
    greedy, ends = policy.temperature == 0, prompts.end_tokens(tokenizer, "chat")
    return GenerationConfig(
        do_sample=not greedy,
        temperature=None if greedy else policy.temperature,
        top_k=None if greedy else 0,  # transformers' own default would leave out all but 50 tokens
        max_new_tokens=policy.max_answer_tokens,
        bos_token_id=model.config.get_text_config().bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else list(ends),
        pad_token_id=tokenizer.pad_token_id,
    )


def copy_adapter(adapter: Path, folder: Path, *, base_name: str) -> None:
    """Write an adapter in PEFT's format, which names its base."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config = folder / lora.CONFIG
    record = json.loads(config.read_text()) | {"base_model_name_or_path": base_name}
    config.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def convert_to_gguf(model: Path, file: Path, converter: Path) -> None:
    """Write a model folder as a GGUF file with llama.cpp's own program. Raises InputError if it refuses."""
    command = [sys.executable, str(converter), str(model), "--outfile", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    # without that variable the converter finds the other files of its checkout
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or not file.is_file():
        print(done.stderr, file=sys.stderr)
        rows = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        if rows[-1].startswith("ModuleNotFoundError: "):
            raise InputError(f"{converter} lacks a package that its requirements.txt names ({rows[-1]})")
        raise InputError(
            f"{converter} cannot convert this model ({rows[-1]}); --as merged writes it as it is"
        )


if __name__ == "__main__":
    main(export, ExportJob)
