"""Whatever precision torch may multiply float32 matrices in, layers are recognised and no example counts for more than C.

On a processor without bfloat16 instructions "medium" changes nothing; on a GPU "high" does too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost import reparametrised as interception
from lightning_dp.engines.protocol import ClippedSum
from lightning_dp.mechanism.clip import clip_and_sum
from lightning_dp.mechanism.full_precision import _backends, full_precision
from lightning_dp.models.weight_standardisation import WSConv2d
from tests.test_process_state import in_thread

MATMUL = _backends()
FULL = ["ieee"] * len(MATMUL)


@pytest.fixture(params=["high", "medium"], autouse=True)
def _precision(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


def settings() -> list[Any]:
    return [backend.fp32_precision for backend in MATMUL]


def test_the_setting_is_full_inside_and_as_it_was_outside() -> None:
    before = settings()
    assert before != FULL
    with full_precision():
        assert settings() == FULL
        assert in_thread(settings) == FULL
    assert settings() == before
    with pytest.raises(KeyError), full_precision():
        raise KeyError
    assert settings() == before


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    yield
    torch.backends.cudnn.allow_tf32 = True


CUDNN: Any = torch.backends.cudnn


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("matmul", ["high", "highest"])
def test_convolutions_on_a_gpu_are_in_full_inside_too(matmul: str) -> None:
    """cuDNN rounds factors to 10 bits unless told otherwise, in the sums of gradients whose norms are computed in full."""
    torch.set_float32_matmul_precision(matmul)
    assert CUDNN.conv.fp32_precision == "tf32"
    with full_precision():
        assert CUDNN.conv.fp32_precision != "tf32"
        assert CUDNN.allow_tf32 is False
    assert (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision, CUDNN.allow_tf32) == ("tf32", "tf32", True)


@pytest.mark.usefixtures("_on_a_gpu")
def test_what_was_set_by_the_newer_names_is_there_again() -> None:
    if not hasattr(CUDNN, "conv"):
        pytest.skip(f"torch {torch.__version__} has the older name alone")
    CUDNN.rnn.fp32_precision = "ieee"
    with full_precision():
        assert CUDNN.conv.fp32_precision == "ieee"
    assert (CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision) == ("tf32", "ieee")


def test_products_are_in_full_inside() -> None:
    one, other = torch.randn(2, 4, 64, 300, generator=torch.Generator().manual_seed(0))
    exact = one.double() @ other.double().mT
    with full_precision():
        found = torch.bmm(one, other.mT)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)  # float32; bfloat16 misses by 10⁻¹


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched products round their factors to 10 bits where the setting lets a GPU do so."""
    product = torch.bmm

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)

    def bmm(one: Tensor, other: Tensor, out: Tensor | None = None) -> Tensor:
        low = one.dtype == torch.float32 and MATMUL[0].fp32_precision != "ieee"
        return product(rounded(one), rounded(other), out=out) if low else product(one, other, out=out)

    monkeypatch.setattr(torch, "bmm", bmm)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_standardised_weights_are_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    usual = interception.Recognised.projection

    def projection(*args: Any) -> Any:
        found.append(usual(*args))
        return found[-1]

    monkeypatch.setattr(interception.Recognised, "projection", projection)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(WSConv2d(16, 32, 3), nn.GELU(), WSConv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 3))
        images = torch.randn(8, 16, 8, 8)
    clipped(module, images)
    assert len(found) == 2
    assert None not in found


def clipped(module: nn.Module, batch: Tensor, clip_norm: float = 1.0) -> ClippedSum:
    def loss(parameters: Mapping[str, Tensor], one: Tensor) -> tuple[Tensor, Any]:
        return functional_call(module, dict(parameters), (one,)).sum(), {}

    return GhostEngine(module).clipped_sum(loss, dict(module.named_parameters()), batch, len(batch), clip_norm)


class Cancelling(nn.Module):
    """One linear layer at several places, whose gradients at the two halves nearly cancel: Gram matrices of large entries."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)
        self.register_buffer("signs", torch.tensor([1.0, -1.0]).repeat_interleave(places // 2).view(places, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mul(self.signs).mul(100 * torch.sin(torch.arange(64.0)))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("places", [8, 64])
@pytest.mark.usefixtures("_as_on_a_gpu")
def test_an_example_whose_gradient_cancels_is_clipped_to_c(places: int, autocast: bool) -> None:
    """Also where somebody's autocast is around the whole step: it may round what the network computes, and no norm."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Cancelling(places)
        half = torch.randn(5, places // 2, 64)
        batch = torch.cat([half, half + 0.01 * torch.randn_like(half)], dim=1)
    for index in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = clipped(module, batch[index : index + 1], 0.5)
        factor = 100 * torch.sin(torch.arange(64.0))
        factor = factor.bfloat16() if autocast else factor  # as autocast's product hands it on
        exact = batch[index].double().T @ (module.signs.double() * factor.double())
        torch.testing.assert_close(
            found.norms.double(), exact.norm()[None], rtol=0.1 if autocast else 0.05, atol=0
        )  # rounded up, if from Gram matrices
        assert float(found.gradient["layer.weight"].double().norm()) <= 0.5 * (1 + 1e-4)


def test_rows_are_clipped_and_added_in_full() -> None:
    rows = torch.randn(64, 1000, generator=torch.Generator().manual_seed(1))
    total, norms = clip_and_sum({"w": rows}, 1.0)
    expected = (rows.double() / norms.double().clamp(min=1.0)[:, None]).sum(0)
    torch.testing.assert_close(total["w"].double(), expected, rtol=1e-5, atol=1e-6)
