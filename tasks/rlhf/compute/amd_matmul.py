"""Products of float32 matrices on AMD processors by oneDNN. MKL, which torch asks, leaves half the width of their vector units unused."""

import platform
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

MIN_MULTIPLICATIONS = 1 << 21  # multiplications below which the way through Python costs more than it saves


@cache
def use_onednn() -> None:
    """From now on this process asks oneDNN, where that is quicker: 480 instead of 220 GFLOPS on two Zen 5 cores, the same sums in another order."""
    if not (
        is_slowed_by_mkl(Path("/proc/cpuinfo"))
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
    ):
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="(?s).*Overriding a previously registered kernel", category=UserWarning
        )
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
    _libraries.append(library)


_libraries: list[torch.library.Library] = []  # a library that is collected takes its kernels back


def is_slowed_by_mkl(cpuinfo: Path) -> bool:
    """Whether this is a processor on which MKL does not use the AVX-512 that is there."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not cpuinfo.exists():
        return False
    text = cpuinfo.read_text()
    return "AuthenticAMD" in text and " avx512f " in text


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _is_worthwhile(a, b):
        return _product(a, b, None)
    out = a.new_empty(a.shape[0], b.shape[1])
    torch.ops.aten.mm.out(a, b, out=out)
    return out


def _addmm(added: Tensor, a: Tensor, b: Tensor, *, beta: complex = 1, alpha: complex = 1) -> Tensor:
    if beta == alpha == 1 and added.shape == b.shape[1:] and _is_worthwhile(a, b):
        return _product(a, b, added)
    out = a.new_empty(a.shape[0], b.shape[1])
    torch.ops.aten.addmm.out(added, a, b, beta=beta, alpha=alpha, out=out)
    return out


def _is_worthwhile(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and a.numel() * b.shape[1] >= MIN_MULTIPLICATIONS


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias, "none", [], "")
    return output
