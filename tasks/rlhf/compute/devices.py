"""Where a program computes, and the random state of one step."""

import torch

from tasks.rlhf.compute import amd_matmul
from tasks.system import torchrun
from tasks.system.errors import InputError


def set_up(device: str, threads: int) -> torch.device:
    """Choose the device ("auto": CUDA where there is one), the CPU threads (0: torch's own choice) and deterministic kernels."""
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "machine.device=cuda, but torch sees no CUDA device here: use machine.device=auto, or install a CUDA build of torch."
        )
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - nothing reads such memory; filling it costs a tenth of a step
    if device == "cpu" or not torch.cuda.is_available():
        amd_matmul.use_onednn()
        return torch.device("cpu")
    if torchrun.world() == 1:
        return torch.device("cuda")
    if torchrun.local_rank() >= (count := torch.cuda.device_count()):
        raise InputError(
            f"There are more processes than GPUs here, {count}: set machine.launch.*.processes to {count}, or machine.device=cpu."
        )
    torch.cuda.set_device(torchrun.local_rank())
    return torch.device("cuda", torchrun.local_rank())
