"""Starting from public weights: all of them fit, or none is loaded and the names are listed."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.models import ImageClassifier, NormFreeNet, WideResNet, public_weights
from lightning_dp.models.extra import MissingExtraError
from lightning_dp.models.public_weights import WeightsError, load_public_weights


def network(seed: int = 0, classes: int = 3, inner: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, inner), nn.ReLU(), nn.Linear(inner, classes))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "network.", "module.", "model.network.", "net."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_is_loaded_whatever_it_was_wrapped_in(tmp_path: Any, prefix: str, wrapped: bool) -> None:
    there, here = network(1), network(2)
    state: dict[str, Any] = {f"{prefix}{name}": value for name, value in there.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "weights.ckpt")
    assert not same(here, there)
    assert load_public_weights(here, tmp_path / "weights.ckpt") == []
    assert same(here, there)


def test_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    there, here = network(1), network(2)
    save_file(there.state_dict(), tmp_path / "weights.safetensors")
    load_public_weights(here, tmp_path / "weights.safetensors")
    assert same(here, there)


def test_a_checkpoint_of_the_classifier_starts_another_and_its_last_layer_is_left(tmp_path: Any) -> None:
    before = ImageClassifier(WideResNet(10, 1, num_classes=10), num_classes=10)
    torch.save({"state_dict": before.network.state_dict()}, tmp_path / "w.pt")
    fresh = WideResNet(10, 1, num_classes=4)
    head = fresh.classifier.weight.detach().clone()
    after = ImageClassifier(fresh, num_classes=4, init_from=tmp_path / "w.pt", reset_classifier=True)
    names = dict(before.network.named_parameters())
    for name, parameter in after.network.named_parameters():
        if name.startswith("classifier"):
            continue
        assert torch.equal(parameter, names[name])
    assert torch.equal(fresh.classifier.weight, head)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("0.bias"), r"1 missing \(0.bias\); expected every name once"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\); "),
        (
            lambda s: s.update({"2.weight": torch.zeros(7, 5)}),
            r"1 of another shape \(2.weight \(7, 5\) for \(3, 5\)\); ",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path: Any, change: Any, text: str) -> None:
    state: dict[str, Tensor] = dict(network(1).state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    here, untouched = network(2), network(2)
    with pytest.raises(WeightsError, match=text):
        load_public_weights(here, tmp_path / "w.pth")
    assert same(here, untouched)


def test_another_number_of_classes_is_an_error_until_the_classifier_is_reset(tmp_path: Any) -> None:
    torch.save(network(1, classes=7).state_dict(), tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="reset_classifier=True"):
        load_public_weights(network(), tmp_path / "w.pt")
    assert load_public_weights(network(), tmp_path / "w.pt", reset_classifier=True) == ["2.bias", "2.weight"]


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"^init_from='no/such.ckpt': expected a file of weights"):
        load_public_weights(network(), "no/such.ckpt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": 3}])
def test_a_file_of_something_else(tmp_path: Any, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="expected a state dict, names to tensors"):
        load_public_weights(network(), tmp_path / "w.pt")


def test_a_file_that_would_run_code_or_is_broken(tmp_path: Any) -> None:
    torch.save({"state_dict": nn.Linear(1, 1)}, tmp_path / "module.pt")
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    for name in ("module.pt", "broken.pt"):
        with pytest.raises(WeightsError, match="cannot be read as weights: expected a checkpoint of tensors alone"):
            load_public_weights(network(), tmp_path / name)


def test_a_network_without_a_linear_layer_has_no_classifier() -> None:
    with pytest.raises(WeightsError, match=r"^network=Conv2d has no linear layer"):
        public_weights.classifier_name(nn.Conv2d(1, 1, 1))


def test_a_name_timm_has_no_weights_for() -> None:
    with pytest.raises(WeightsError, match=r"^init_from='wide_resnet_made_up': expected a file ending in"):
        load_public_weights(network(), "wide_resnet_made_up")


def test_timm_weights_are_matched_under_the_wrappers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    real = timm.create_model
    asked: list[dict[str, Any]] = []

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append({"name": name, "pretrained": pretrained})
        model = real(name.split(".")[0], pretrained=False, **options)
        if pretrained:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(0.25)
        return model

    monkeypatch.setattr(timm, "create_model", create)
    here = NormFreeNet("test_nfnet", num_classes=4)
    load_public_weights(here, "test_nfnet.r160_in1k", reset_classifier=True)
    assert asked[-1] == {"name": "test_nfnet.r160_in1k", "pretrained": True}
    quarter = [bool((p == 0.25).all()) for p in here.parameters()]
    assert quarter.count(False) == 2  # the classifier's weight and bias


def test_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"could not be downloaded \(OSError\): expected a connection"):
        load_public_weights(network(), "dm_nfnet_f0.dm_in1k")


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *args: Any) -> Any:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return importlib.import_module(name, *args)

    monkeypatch.setattr("lightning_dp.models.extra.import_module", missing)
    with pytest.raises(MissingExtraError, match=r"timm is not installed.*pip install 'lightning-dp\[timm\]'"):
        load_public_weights(network(), "dm_nfnet_f0.dm_in1k")
    with pytest.raises(MissingExtraError, match="comes from timm"):
        NormFreeNet("nf_resnet50")
