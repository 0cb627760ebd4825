"""Kernels for a GPU, in Triton's interpreter on the CPU: norms of gradients that are never written out.

The interpreter is asked for when Triton is imported, so that these run in a process of their own.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.engines.ghost import GhostEngine, contribution, fused
from lightning_dp.engines.ghost.rules import convolution, linear
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.triton import window
from lightning_dp.engines.triton.window import PIXEL, Window
from tests.new_process import in_a_new_process

IS_THERE = importlib.util.find_spec("triton") is not None
NEEDS_TRITON = pytest.mark.skipif(not IS_THERE, reason="torch brings Triton on some systems only")

CASES = {
    "plain": (1, 3, 5, (7, 6), Window((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    "views, groups, odd everything": (2, 6, 9, (9, 11), Window((3, 2), (2, 1), (1, 0), (1, 2), 3)),
    "a line, more than a tile of channels": (1, 40, 70, (9,), Window((3,), (2,), (2,), (1,), 1)),
    "a space": (1, 4, 4, (4, 5, 6), Window((2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2), 2)),
    "depthwise": (1, 5, 10, (5, 5), Window((2, 2), (1, 1), (0, 1), (1, 1), 5)),
    "positions": (37, 65, 33, (1,), PIXEL),
}
"""Name → own samples, channels, output channels, sizes of the input, the convolution."""

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


interpreted = functools.partial(in_a_new_process, TRITON_INTERPRET="1")


def given(case: str, dtype: torch.dtype, examples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, output gradients, and the gradients of the kernel in float64."""
    own, channels, out, sizes, of = CASES[case]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(examples, own, channels, *sizes, generator=draw).to(dtype)
    kernel = torch.zeros(out, channels // of.groups, *of.kernel, dtype=torch.float64, requires_grad=True)
    convolve, rows, gradients = CONVOLUTIONS[len(sizes)], [], []
    for one in x.double():
        output = convolve(one, kernel, None, of.stride, of.padding, of.dilation, of.groups)
        rows.append(torch.randn(output.shape, generator=draw).to(dtype))
        gradients += torch.autograd.grad((output * rows[-1].double()).sum(), kernel)
    return x, torch.stack(rows), torch.stack(gradients)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
@interpreted
def test_norms_are_those_of_the_gradients_of_one_example_after_the_other(case: str, dtype: torch.dtype) -> None:
    from lightning_dp.engines.triton.squares import tiles

    x, g, rows = given(case, dtype)
    of, expected = CASES[case][4], rows.flatten(1).norm(dim=1).float()
    for layout in (lambda t: t, lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)):
        lengths, sizes, of_x, of_g = torch.linalg.vector_norm(tiles(layout(x), layout(g), of), dim=2)
        torch.testing.assert_close(lengths, expected, rtol=1e-5, atol=0)
        assert (sizes >= expected * (1 - 1e-5)).all()  # ‖Σ_t g_t patch_tᵀ‖ ≤ ‖g‖ ‖patches‖
        assert (of_g >= g.flatten(1).float().norm(dim=1) * (1 - 1e-5)).all()
        assert (of_x > 0).all()
    found = fused.norms(x, g, of)
    assert (found.values >= expected).all()
    allowed = contribution.ROUNDING * torch.finfo(torch.float32).eps * sizes
    torch.testing.assert_close(found.values, lengths + allowed, rtol=1e-6, atol=0)
    assert found.lost is not None
    assert fused.norms(x[:0], g[:0], of).values.shape == (0,)


@NEEDS_TRITON
@interpreted
def test_norms_are_no_smaller_than_the_gradients_where_terms_nearly_cancel() -> None:
    draw = torch.Generator().manual_seed(1)
    x, g = torch.randn(4, 1, 3, 300, generator=draw), torch.randn(4, 1, 2, 300, generator=draw)
    for row, one in zip(g.double().clone(), x.double(), strict=True):  # g at a right angle to all channels of x, nearly
        basis = torch.linalg.qr(one[0].T)[0]
        row -= (row[0] @ basis) @ basis.T
        g[(g.double() - row).flatten(1).norm(dim=1).argmin()] = row.float()
    exact = torch.einsum("bopt,boct->bpc", g.double(), x.double()).flatten(1).norm(dim=1)
    assert (exact < 1e-4 * g.flatten(1).norm(dim=1)).all()
    assert (fused.norms(x, g, Window((1,), (1,), (0,), (1,), 1)).values >= exact).all()


class _Layers(nn.Module):
    """Convolutions with groups, strides and a kernel of one, linear layers over positions in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(2, 6, 3, padding=1, stride=2), nn.Conv2d(6, 4, (3, 2), groups=2)
        self.one, self.wide, self.last = nn.Conv2d(4, 5, 1), nn.Linear(5, 33), nn.Linear(33, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.one(torch.tanh(self.grouped(torch.tanh(self.first(x))))))
        return self.last(torch.tanh(self.wide(x.flatten(2).transpose(1, 2))))


@NEEDS_TRITON
@interpreted
def test_the_form_gives_what_the_loop_gives() -> None:
    """Clipped, with an example that is not finite, one whose squares overflow and one whose squares underflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "kernels_offered", lambda _: True)
        patch.setattr(linear, "kernels_offered", lambda _: True)
        torch.manual_seed(0)
        module, x = _Layers(), torch.randn(6, 2, 9, 10)
        scales = torch.ones(6)
        scales[1:4] = torch.tensor([torch.nan, 1e25, 1e-25])
        engine = GhostEngine(module)

        def loss(parameters: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
            output = functional_call(module, dict(parameters), (batch[0],))
            return batch[1].mean() * torch.sin(output).pow(2).mean(), []

        def summed(of: Any) -> Any:
            return of.clipped_sum(loss, dict(module.named_parameters()), (x, scales), len(x), 0.1)

        with engine.forms.listening() as seen:
            summed(engine)
        assert len(seen) == 5
        assert all(offer.estimated != fused.FUSED and fused.FUSED in offer.offered for offer in seen.values())
        used, usual = list[int](), fused.norms
        patch.setattr(fused, "norms", lambda *given: used.append(1) or usual(*given))
        engine.forms.taken = dict.fromkeys(seen, fused.FUSED)
        found, expected = summed(engine), summed(LoopEngine())
        assert len(used) >= 5
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0, equal_nan=True)
        for name, one in expected.gradient.items():
            torch.testing.assert_close(found.gradient[name], one, rtol=1e-5, atol=1e-5 * 0.1)
        for index in (0, 2, 3):  # alone, none counts for more than C
            alone = engine.clipped_sum(
                loss, dict(module.named_parameters()), (x[index : index + 1], scales[index : index + 1]), 1, 0.1
            )
            assert math.hypot(*(float(one.norm()) for one in alone.gradient.values())) <= 0.1 * (1 + 2**-20)


def test_it_is_offered_on_cuda_alone_and_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class _On:
        def __init__(self, device: str, dtype: torch.dtype) -> None:
            self.device, self.dtype = torch.device(device), dtype

    def offered(device: str, dtype: torch.dtype) -> bool:
        like: Any = _On(device, dtype)
        return window.offered(like)

    monkeypatch.setattr(window, "_can_be_imported", lambda: True)
    assert offered("cuda", torch.float32)
    assert offered("cuda", torch.bfloat16)
    assert not offered("cpu", torch.float32)
    assert not offered("cuda", torch.float64)
    monkeypatch.setattr(window, "_can_be_imported", lambda: False)
    assert not offered("cuda", torch.float32)


def test_triton_is_not_imported_on_a_cpu() -> None:
    """Neither with the package nor by a clipped sum."""
    code = (
        "import sys, torch, lightning_dp\n"
        "from lightning_dp.engines.ghost import GhostEngine\n"
        "from torch.func import functional_call\n"
        "m = torch.nn.Linear(3, 2)\n"
        "loss = lambda p, b: (functional_call(m, dict(p), (b,)).square().mean(), [])\n"
        "GhostEngine(m).clipped_sum(loss, dict(m.named_parameters()), torch.ones(2, 5, 3), 2, 1.0)\n"
        "sys.exit('lightning_dp.engines.triton.squares' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=600).returncode == 0
