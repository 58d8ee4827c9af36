"""Choose the device, the number of CPU threads and deterministic kernels."""

import os

import torch

from tasks.rlhf.compute import accelerate_launch, amd_matmul, cpu_attention
from tasks.system import torchrun
from tasks.system.errors import InputError


def set_up(device: str, threads: int) -> torch.device:
    """Return the device ("auto": CUDA if there is one); set CPU threads (0: torch's choice) and determinism.

    Raises InputError if there is no CUDA device, fewer of them than processes, or accelerate wants the CPU.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "machine.device=cuda, but torch sees no CUDA device here: use machine.device=auto, or install a "
            "CUDA build of torch."
        )
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"  # read by transformers
    # Nothing reads uninitialised memory; filling it takes a tenth of a step.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    if device == "cpu" or not torch.cuda.is_available():
        amd_matmul.use_onednn()
        cpu_attention.use_float32_for_short_texts()
        return torch.device("cpu")
    accelerate_launch.check_device(os.environ, "cuda")
    if torchrun.world() == 1:
        return torch.device("cuda")
    if torchrun.local_rank() >= (count := torch.cuda.device_count()):
        raise InputError(
            f"There are more processes than GPUs here, {count}: set machine.launch.*.processes to {count}, "
            "or machine.device=cpu."
        )
    torch.cuda.set_device(torchrun.local_rank())
    return torch.device("cuda", torchrun.local_rank())
