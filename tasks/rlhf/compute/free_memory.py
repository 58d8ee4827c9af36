"""Measure free and peak memory of the device, and reduce the fragmentation of the heap."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def available(device: torch.device, *, system: Path = Path("/")) -> int:
    """Return the bytes that can still be allocated on ``device``; ``system`` is the root of /proc, /sys."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )  # torch's cache
    described = dict(line.split(":", 1) for line in (system / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(described["MemAvailable"].split()[0])
    return min([free, *_cgroup_headroom(system)])


def peak(device: torch.device) -> int:
    """Return the peak bytes of this process: of its tensors on a GPU, of all its memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def release(device: torch.device) -> None:
    """Return to the device what no tensor uses any more, before another model is loaded."""
    gc.collect()  # modules of a model refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _cgroup_headroom(system: Path) -> Iterator[int]:
    """Yield the bytes left by each limit of the process's control groups and their parents."""
    for line in _text(system / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage = "memory.max", "memory.current"
        if controllers:
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        folder = top / group.strip("/")  # in a container the path may be the host's: then only the top exists
        for parent in (folder, *folder.parents):
            if parent.is_relative_to(top) and (text := _text(parent / limit)).isdigit():
                used = int(_text(parent / usage) or 0) - _reclaimable(parent / "memory.stat")
                yield max(0, int(text) - used)


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _reclaimable(path: Path) -> int:
    """Return the bytes of cached files: counted as used, and freed by the kernel when memory is needed."""
    fields = dict(line.split() for line in _text(path).splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def map_large_tensors() -> None:
    """Give CPU tensors of 1 MiB and more their own pages: a step then needs its estimate's ``needed`` bytes.

    For a step whose ``needed`` fits in memory and whose ``total`` does not: steps take up to half as long
    again. Only glibc has the setting, and the heap that fragments.
    """
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt"):
        process.mallopt(M_MMAP_THRESHOLD, 1 << 20)
