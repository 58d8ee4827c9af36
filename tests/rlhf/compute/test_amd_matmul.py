"""Test that oneDNN's products equal torch's in every layout, and are used where MKL is slow."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tasks.rlhf.compute import amd_matmul
from tests.support.paths import ROOT

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 {} sha_ni\n"
draw = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw)


LAYOUTS = {
    "plain": (drawn(70, 300), drawn(300, 200)),
    "weight": (drawn(70, 300), drawn(200, 300).t()),
    "gradient": (drawn(300, 70).t(), drawn(300, 200)),
    "both": (drawn(300, 70).t(), drawn(200, 300).t()),
    "sliced": (drawn(70, 600)[:, ::2], drawn(600, 200)[::2]),
    "expanded": (torch.ones(1, 1).expand(70, 300), drawn(300, 200)),
    "repeated rows": (drawn(1, 300).expand(70, 300), drawn(300, 1).expand(300, 200)),
    "one row": (drawn(1, 3000), drawn(3000, 800)),
    "small": (drawn(3, 4), drawn(4, 5)),
    "empty": (drawn(0, 4), drawn(4, 5)),
    "nothing to add up": (drawn(3, 0), drawn(0, 5)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_are_those_of_float64(layout: str) -> None:
    a, b = LAYOUTS[layout]
    exact = a.double() @ b.double()
    assert amd_matmul._is_worthwhile(a, b) == (layout not in ("small", "empty", "nothing to add up"))
    made = amd_matmul._mm(a, b)
    assert (made.shape, made.dtype, made.is_contiguous()) == (exact.shape, torch.float32, True)
    torch.testing.assert_close(made.double(), exact, atol=1e-4, rtol=1e-5)
    bias = drawn(b.shape[1])
    torch.testing.assert_close(amd_matmul._addmm(bias, a, b).double(), exact + bias, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        amd_matmul._addmm(bias, a, b, beta=2, alpha=3).double(), 3 * exact + 2 * bias, atol=3e-4, rtol=1e-5
    )
    added = drawn(*exact.shape)
    torch.testing.assert_close(amd_matmul._addmm(added, a, b).double(), exact + added, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in LAYOUTS["plain"])
    assert not amd_matmul._is_worthwhile(a, b)
    assert torch.equal(amd_matmul._mm(a, b), a @ b)


@pytest.mark.parametrize(
    ("text", "halved"),
    [
        (AMD.format("avx512f"), True),
        (AMD.format("fma"), False),
        (AMD.replace("AuthenticAMD", "GenuineIntel").format("avx512f"), False),
        ("", False),
    ],
)
def test_mkl_leaves_half_on_amd_processors_with_avx512(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, halved: bool
) -> None:
    monkeypatch.setattr(amd_matmul.platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(text)
    assert amd_matmul.is_slowed_by_mkl(tmp_path / "cpuinfo") == halved
    assert not amd_matmul.is_slowed_by_mkl(tmp_path / "missing")
    monkeypatch.setattr(amd_matmul.platform, "machine", lambda: "aarch64")
    assert not amd_matmul.is_slowed_by_mkl(tmp_path / "cpuinfo")


SCRIPT = """
import warnings
warnings.simplefilter("error")
import torch
from torch import nn
from tasks.rlhf.compute import amd_matmul
torch.manual_seed(0)
layer, x = nn.Linear(300, 200), torch.randn(2, 64, 300, requires_grad=True)
def gradients(biased):
    layer.zero_grad(), setattr(x, "grad", None)
    (nn.functional.linear(x, layer.weight, layer.bias if biased else None) ** 2).sum().backward()
    return [x.grad, layer.weight.grad]
before = [gradients(biased) for biased in (False, True)]
asked, product = [], amd_matmul._product
amd_matmul._product = lambda a, b, bias: asked.append(bias is not None) or product(a, b, bias)
amd_matmul.is_slowed_by_mkl = lambda path: True
amd_matmul.use_onednn()
amd_matmul.use_onednn()
for biased, expected in zip((False, True), before):
    asked.clear()
    for made, known in zip(gradients(biased), expected):
        torch.testing.assert_close(made, known, atol=1e-4, rtol=1e-4)
    assert asked == [biased, False, False], asked  # forward, by the input, by the weight
print("as before")
"""


@pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="torch was built without MKL or oneDNN",
)
def test_layers_and_their_gradients_go_through_it() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout == "as before\n", ran.stderr
