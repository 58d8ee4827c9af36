"""How much memory this machine still has for a program, and how a program can leave fewer holes in it."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def available(device: torch.device, *, system: Path = Path("/")) -> int:
    """Bytes that a program can still take on ``device``; ``system`` is where the files of the machine's kernel are."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return (
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )  # torch holds some for itself
    described = dict(line.split(":", 1) for line in (system / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(described["MemAvailable"].split()[0])
    return min([free, *_cgroup_headroom(system)])


def peak(device: torch.device) -> int:
    """The most bytes that this process's tensors ever took on a GPU, or that it ever held at once on a CPU, its libraries included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


def _cgroup_headroom(system: Path) -> Iterator[int]:
    """What the limits of the process's control groups leave: its own and those around it, of version 2 and 1."""
    listed = system / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else ("memory.max", "memory.current")
        )
        folder = top / group.strip(
            "/"
        )  # inside a container the path may be the host's: then only the top exists
        for place in (folder, *folder.parents):
            if place.is_relative_to(top) and (text := _text(place / limit)).isdigit():
                yield max(0, int(text) - int(_text(place / usage) or 0) + _reclaimable(place / "memory.stat"))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _reclaimable(path: Path) -> int:
    """Bytes of files that were read and are not in use: counted as used, and given up when asked for."""
    fields = dict(line.split() for line in _text(path).splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))


def map_large_tensors() -> None:
    """From now on tensors of 1 MiB and more get pages of their own on a CPU, so an estimate's ``total`` comes down to its ``needed``.

    For a step of which the one fits in memory and the other does not: steps take up to half as long again.
    Only glibc has the switch, and the heap with the holes.
    """
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt"):
        process.mallopt(M_MMAP_THRESHOLD, 1 << 20)
