"""Weights that the paper's authors released: their names and axes become ours, and no other network takes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dp.models import NormFreeNet, WideResNet
from lightning_dp.models.public_weights import WeightsError, load_public_weights
from lightning_dp.models.released_weights import haiku_names


def script() -> ModuleType:
    path = Path(__file__).parents[2] / "docs" / "convert_released_weights.py"
    spec = importlib.util.spec_from_file_location("convert_released_weights", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def released(network: nn.Module, prefix: str = "wide_res_net", inside: str = "") -> dict[str, dict[str, Any]]:
    """The weights of ``network`` as the authors' code keeps them: module → array → numbers, channels last."""
    own = network.state_dict()
    tree: dict[str, dict[str, Any]] = {}
    for theirs, ours in haiku_names(network).items():
        layer, _, kind = theirs.rpartition("/")
        value = own[ours]
        if kind == "w":
            linear = layer.endswith(("linear", "linear_1", "Softmax"))
            value = value.flatten(1).T if linear else value.permute(2, 3, 1, 0)
        elif kind in ("gain", "skip_gain"):
            value = value.reshape(-1) if kind == "gain" else value
        parts = [prefix, inside, *layer.split("/")]
        tree.setdefault("/".join(part for part in parts if part), {})[kind] = value.numpy()
    return tree


def changed(network: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize(
    ("prefix", "inside"), [("wide_res_net", ""), ("WideResNet", "~norm_fn"), ("", "~conv_fn"), ("", "~")]
)
def test_a_wide_resnet_comes_back_through_the_script(tmp_path: Path, prefix: str, inside: str) -> None:
    there, here = (changed(WideResNet(16, 1, num_classes=4, same_padding=True), seed) for seed in (1, 2))
    saved = {"params": released(there, prefix, inside), "state": {}}
    names = script().convert(saved if prefix else (saved["params"], {}), tmp_path / "w.npz")
    assert len(names) == len(list(there.parameters()))
    assert load_public_weights(here, tmp_path / "w.npz") == []
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(here(images), there(images), rtol=0, atol=0)


def test_an_nfnet_comes_back(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    there = changed(NormFreeNet("dm_nfnet_f0", num_classes=3), 1)
    arrays = {
        f"{layer}/{kind}": torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape)
        for layer, kinds in released(there, "NFNet", "~").items()
        for kind, value in kinds.items()
    }
    assert {"NFNet/~/nf_block/skip_gain", "NFNet/~/nf_block_11/squeeze_excite/linear_1/w"} <= set(arrays)
    save_file(arrays, tmp_path / "w.safetensors")
    here = NormFreeNet("dm_nfnet_f0", num_classes=5)
    assert load_public_weights(here, tmp_path / "w.safetensors", reset_classifier=True) == [
        "net.head.fc.bias",
        "net.head.fc.weight",
    ]
    for (name, found), expected in zip(here.named_parameters(), there.parameters(), strict=True):
        if "head.fc" not in name:
            assert torch.equal(found, expected), name


def test_another_padding_is_refused_although_all_shapes_fit(tmp_path: Path) -> None:
    there = WideResNet(10, 1, same_padding=True)
    script().convert(released(there), tmp_path / "w.npz")
    here = WideResNet(10, 1)
    before = [p.detach().clone() for p in here.parameters()]
    with pytest.raises(WeightsError, match=r"w.npz' holds weights .* same_padding=False: expected same_padding=True"):
        load_public_weights(here, tmp_path / "w.npz")
    assert all(torch.equal(a, b) for a, b in zip(before, here.parameters(), strict=True))
    for other, text in (
        (nn.Linear(2, 2), "network=Linear: expected a WideResNet or"),
        (NormFreeNet("test_nfnet"), "network=NormFreeNet: expected a WideResNet or"),
        (NormFreeNet("dm_nfnet_f0", faithful=False), "faithful=False: expected faithful=True"),
    ):
        with pytest.raises(WeightsError, match=text):
            load_public_weights(other, tmp_path / "w.npz")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    there = WideResNet(10, 1, same_padding=True)
    tree = released(there)
    tree["wide_res_net/Block_9_norm_0_0"] = tree.pop("wide_res_net/Block_2_norm_0_0")
    tree["wide_res_net/First_conv"]["gain"] = np.ones(7, np.float32)
    script().convert(tree, tmp_path / "w.npz")
    with pytest.raises(WeightsError) as caught:
        load_public_weights(WideResNet(10, 1, same_padding=True), tmp_path / "w.npz")
    for text in (
        "2 missing (stages.1.0.residual.0.1.weight, stages.1.0.residual.0.1.bias)",
        "2 unexpected (wide_res_net/Block_9_norm_0_0/scale, wide_res_net/Block_9_norm_0_0/offset)",
        "1 of another shape (first_conv.gain (7,) for (16,))",
    ):
        assert text in str(caught.value)
    with pytest.raises(WeightsError, match=r"1 of another shape \(first_conv.weight \(16, 3, 5, 5\)"):
        load_public_weights(WideResNet(10, 1, same_padding=True), wider(tmp_path, there))


def wider(folder: Path, network: nn.Module) -> Path:
    tree = released(network)
    tree["wide_res_net/First_conv"]["w"] = np.zeros((5, 5, 3, 16), np.float32)
    script().convert(tree, folder / "wider.npz")
    return folder / "wider.npz"


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", **{"a/w": np.array([{"code": print}], dtype=object)})
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    for name in ("objects", "broken"):
        with pytest.raises(WeightsError, match=f"{name}.npz' cannot be read as arrays: expected a file of numpy.savez"):
            load_public_weights(WideResNet(10, 1, same_padding=True), tmp_path / f"{name}.npz")


def test_the_script_takes_finite_numbers_alone(tmp_path: Path) -> None:
    for saved, text in (
        ({"params": {"a": {"w": np.array([np.inf])}}}, "got a/w"),
        ({"params": {}}, "got nothing"),
        ({"a": {"step": np.array([1])}}, "got a/step"),
    ):
        with pytest.raises(ValueError, match=text):
            script().convert(saved, tmp_path / "w.npz")
