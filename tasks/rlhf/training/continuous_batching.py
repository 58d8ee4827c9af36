"""Sample answers with transformers' continuous batching: paged attention, and on CUDA its recorded graphs.

Its log-probabilities are those of other kernels than the scorer's, and its random numbers are its own, so a
row's answer depends on its batch. On a CPU it takes four times as long as `sampling.sample`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tasks.rlhf.batches.sampling import Samples
from tasks.system.errors import InputError

PAGE = 256  # tokens of a page, transformers' own default
ADVICE = "set ppo.sampler=plain"


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int,
) -> Samples:
    """Sample one answer per prompt, of at most ``max_tokens``, which ends with one of ``end_ids`` or is cut.

    The same seed, rows and weights give the same answers; torch's own random numbers are as before. Raises
    InputError if the engine does not work with this model.
    """
    if isinstance(model, FSDPModule):
        raise InputError(f"ppo.sampler=continuous_batching needs the whole base on each process: {ADVICE}.")
    devices = [model.device] if model.device.type == "cuda" else []
    implementation = model.config._attn_implementation
    with torch.random.fork_rng(devices=devices):
        try:
            results = _generate(model, prompts, _generation(max_tokens, temperature, end_ids, pad_id), seed)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"ppo.sampler=continuous_batching does not work with this model ({reason}): {ADVICE}."
            ) from error
        finally:
            model.set_attn_implementation(implementation)
    return _collect(results, pad_id, model.device)


def _generation(max_tokens: int, temperature: float, end_ids: Sequence[int], pad_id: int) -> GenerationConfig:
    """Return settings under which the sampler's distribution is the model's own, at the temperature."""
    return GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=[*end_ids],
        pad_token_id=pad_id,
    )


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], generation: GenerationConfig, seed: int
) -> list[Any]:
    """Return the engine's answer to each prompt. Raises RuntimeError if one is missing."""
    longest = max(map(len, prompts)) + generation.max_new_tokens
    manager: Any = model.init_continuous_batching(  # type: ignore[operator]
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=len(prompts) * -(-longest // PAGE),  # the plain sampler's cache, in whole pages
            max_requests_per_batch=len(prompts),
            use_async_batching=False,
            return_logprobs=True,
            seed=seed,
        ),
    )
    try:
        # All wait before it starts, so that what it computes at once does not depend on the clock.
        names = manager.add_requests(inputs=prompts, max_new_tokens=generation.max_new_tokens)
        if model.device.type == "cuda":
            manager.warmup()
        manager.start()
        found: dict[str, Any] = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("it stopped in mid-run; its own message is in the log")
            if result is not None and result.error is not None:
                raise RuntimeError(result.error)
            if result is not None and result.is_finished():
                found[result.request_id] = result
    finally:
        manager.stop(block=True)
        manager.destroy()
    return [found[name] for name in names]


def _collect(results: list[Any], pad_id: int, device: torch.device) -> Samples:
    """Return the answers padded on the right."""
    width = max(len(result.generated_tokens) for result in results)
    ids = torch.full((len(results), width), pad_id)
    logp = torch.zeros(len(results), width)
    mask = torch.zeros(len(results), width, dtype=torch.bool)
    for row, result in enumerate(results):
        count = len(result.generated_tokens)
        ids[row, :count] = torch.tensor(result.generated_tokens)
        logp[row, :count] = torch.tensor(result.logprobs)
        mask[row, :count] = True
    return Samples(ids.to(device), mask.to(device), logp.to(device))
