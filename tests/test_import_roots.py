"""Trainers and modules of ``pytorch_lightning`` train as those of ``lightning`` do."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage, PreflightError
from lightning_dp import lightning_internals as internals
from lightning_dp.look import trainer as look
from lightning_dp.strategy import TWINS, make_private, twins
from tests.conftest import PATIENCE, loader
from tests.gallery.frame import engine_of, private_text, table
from tests.gallery.frame import run as run_script
from tests.in_the_other_root import renamed, run

BRIEF: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
"""Arguments of every Trainer here: nothing is shown and nothing is kept."""


ROOTS = ("lightning.pytorch", "pytorch_lightning")


def regressor(root: Any, manual: bool = False) -> Any:
    """The same module upon a root of Lightning, with another LightningModule inside."""

    class Inner(root.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 8)

        def forward(self, x: Any) -> Any:
            return self.layer(x).tanh()

    class Module(root.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = Inner(), nn.Linear(8, 1)
            self.automatic_optimization = not manual

        def loss(self, batch: Any) -> Any:
            return nn.functional.mse_loss(self.outer(self.inner(batch[0])).squeeze(-1), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.latest = loss = self.loss(batch)
            self.log("loss", loss)
            if manual:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()
                return None
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

        def configure_optimizers(self) -> Any:
            parts = (self.inner, self.outer) if manual else (self,)
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    torch.manual_seed(0)
    return Module()


def fitted(name: str, *callbacks: Any, data: Any = None, manual: bool = False, **options: Any) -> tuple[Any, Any]:
    root = import_module(name)
    module = regressor(root, manual)
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=1, engine=options.pop("engine", "auto"))
    options = {**BRIEF, "max_steps": 6, "max_epochs": -1, **options}
    trainer = root.Trainer(callbacks=[private, *callbacks], **options)
    torch.manual_seed(0)
    trainer.fit(module, loader() if data is None else data, loader(batch_size=64))
    return trainer, module


def seen(trainer: Any, module: Any) -> list[torch.Tensor]:
    metrics = {name: value for name, value in trainer.callback_metrics.items() if name != "dp/data_wait"}
    assert {"loss", "val", "dp/epsilon"} <= metrics.keys()
    return [*module.state_dict().values(), *(metrics[name] for name in sorted(metrics))]


@pytest.mark.parametrize(
    "case",
    [
        {"strategy": "auto"},
        {"strategy": "private", "engine": "ghost"},
        {"engine": "loop"},
        {"manual": True, "max_steps": 8},
        {"average": True},
        {"precision": "bf16-true"},
    ],
    ids=str,
)
def test_both_roots_give_the_same_weights_and_metrics(case: dict[str, Any]) -> None:
    average = case.pop("average", False)
    results = []
    for root in ROOTS:
        callbacks = [ExponentialMovingAverage(0.9, validate_raw=True)] if average else []
        trainer, module = fitted(root, *callbacks, **case)
        assert internals.root_of(trainer) == internals.root_of(module) == internals.root_of(trainer.strategy) == root
        assert type(trainer.strategy) in twins(root).values()
        assert ("val_raw" in trainer.callback_metrics) == average
        results.append(seen(trainer, module))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_views_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 1, 2, 2, generator=generator), torch.zeros(32)), batch_size=8)
    results = []
    for name in ROOTS:
        root = import_module(name)

        class Images(root.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(4, 1)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return (self.layer(batch[0].flatten(1)).squeeze(-1) - batch[1]).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        for private in ([DifferentialPrivacy(noise_multiplier=1.0, seed=1)], []):
            torch.manual_seed(0)
            module = Images()
            root.Trainer(callbacks=[AugmentationMultiplicity(3), *private], **BRIEF, max_steps=3).fit(module, data)
            results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


# ---- what is refused under one is refused under the other


@pytest.mark.parametrize("of", ROOTS)
@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda root: root.callbacks.LearningRateFinder(), "Tuner"),
        (lambda root: root.callbacks.GradientAccumulationScheduler({0: 2}), "accumulate_grad_batches"),
    ],
)
def test_callbacks_of_either_root_are_refused(of: str, callback: Any, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        fitted("pytorch_lightning", callback(import_module(of)))


def test_early_stopping_of_either_root_is_warned_about() -> None:
    for of in ROOTS:
        with pytest.warns(UserWarning, match="EarlyStopping.*not covered"):
            fitted("pytorch_lightning", import_module(of).callbacks.EarlyStopping("val"))


def test_a_ddp_comm_hook_and_a_strategy_without_a_twin() -> None:
    stock = pytorch_lightning.strategies.DDPStrategy
    with pytest.raises(PreflightError, match=r"ddp_comm_hook.*expected"):
        make_private(stock(ddp_comm_hook=print))
    with pytest.raises(PreflightError, match=r"strategy=.*expected.*private_ddp.*FSDP"):
        make_private(type("Own", (stock,), {})())


def test_an_optimizer_s_own_batch_sampler_is_told_from_lightnings() -> None:
    kinds = internals.index_batch_samplers()
    assert [kind.__module__ for kind in kinds] == [f"{root}.overrides.distributed" for root in ROOTS]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "version_of", {"lightning.pytorch": "2.6.1", "pytorch_lightning": "2.5.0"}.get)
    with pytest.raises(PreflightError, match=r"pytorch_lightning==2\.5\.0: expected .* 2\.6\.1.*Install"):
        fitted("pytorch_lightning")
    fitted("lightning.pytorch", max_steps=1)


def test_a_module_of_the_other_root_is_refused_by_lightning() -> None:
    for one, other in (ROOTS, ROOTS[::-1]):
        trainer = import_module(one).Trainer(callbacks=[DifferentialPrivacy(noise_multiplier=1.0)], **BRIEF)
        with pytest.raises(TypeError, match="must be a `LightningModule`"):
            trainer.fit(regressor(import_module(other)), loader())


# ---- finding the root


def test_the_root_of_a_thing() -> None:
    strange = type("Strange", (), {"__module__": "pytorch_lightning_extras"})()
    assert internals.root_of(strange) == internals.root_of(3) == "lightning.pytorch"
    assert internals.own("lightning.pytorch", DDPStrategy) is DDPStrategy
    assert internals.own("pytorch_lightning", DDPStrategy) is pytorch_lightning.strategies.DDPStrategy
    assert internals.either(pl.LightningModule) == (pl.LightningModule, pytorch_lightning.LightningModule)
    lone = type("Lone", (), {"__module__": "lightning.pytorch.moved"})
    assert internals.either(lone) == (lone,)


@pytest.mark.parametrize("stock", TWINS, ids=lambda stock: stock.__name__)
def test_twins_upon_the_other_root(stock: type) -> None:
    root = "pytorch_lightning"
    twin, other = TWINS[stock], twins(root)[internals.own(root, stock)]
    assert other.__bases__ == (internals.own(root, stock),)
    assert {*vars(twin)} - {*vars(other)} <= {
        "__abstractmethods__",
        "__annotations__",
        "__static_attributes__",
        "__firstlineno__",
    }
    assert pickle.loads(pickle.dumps(other)) is other
    registry = internals.strategy_registry(root)
    assert registry[twin.strategy_name]["strategy"] is other
    assert registry.keys() >= {"private_ddp_spawn", "private_ddp_fork", "private_ddp_notebook", "private_fsdp_by_layer"}


def test_no_other_name_is_found_in_the_module_of_twins() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Strategy_upon_pytorch_lightning'"):
        lightning_dp.strategy.Strategy_upon_pytorch_lightning  # noqa: B018 (reading it is the test)


def python(text: str, tmp_path: Path) -> str:
    """Run a program of its own, and return what it prints."""
    (tmp_path / "program.py").write_text(text)
    command = [sys.executable, "-W", "ignore", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTED_FIRST = """
import sys
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage, PrivateDDPStrategy
import lightning_dp.cli.main
assert not [name for name in sys.modules if name.split(".")[0] in ("pytorch_lightning", "lightning_fabric")]

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    torch.manual_seed(0)
    data, module = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=8), Module()
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=1)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[private, ExponentialMovingAverage(0.9)],
        max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )
    trainer.fit(module, data)
    print(private.ledger.steps)


if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    "options",
    [
        'strategy="private", devices=1, ',
        pytest.param('strategy="private_ddp_spawn", devices=2, ', marks=pytest.mark.nightly),
    ],
)
def test_a_root_that_is_imported_after_this_package(options: str, tmp_path: Path) -> None:
    text = IMPORTED_FIRST.replace("pl.Trainer(", f"pl.Trainer({options}")
    assert python(text, tmp_path).splitlines()[-1] == "3"


COMMAND_LINE = """
import sys
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringDataModule, DemoModel
from pytorch_lightning.demos import boring_classes

sys.argv[1:] = [
    "fit", "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.strategy=private",
    "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
    "--trainer.callbacks+=lightning_dp.DifferentialPrivacy", "--trainer.callbacks.noise_multiplier=1.0",
    "--trainer.callbacks+=lightning_dp.ExponentialMovingAverage", "--trainer.callbacks.decay=0.9",
]
cli = LightningCLI(boring_classes.BoringModel, BoringDataModule)
print(cli.trainer.callbacks[0].ledger.steps)
"""


def test_the_other_roots_command_line(tmp_path: Path) -> None:
    assert python(COMMAND_LINE, tmp_path).splitlines()[-1] == "2"


# ---- tests and scripts as they stand


@pytest.mark.parametrize("files", [("test_trainer_features", "test_same_as_plain")], ids=" ".join)
def test_tests_pass_in_the_other_root(files: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *(f"tests/training/{name}.py" for name in files))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name", ["autoencoder", "basic_gan", "gru", "multilayer_perceptron", "several_tasks", "two_names"]
)
def test_scripts_of_the_gallery_end_alike(name: str) -> None:
    text = renamed(private_text(name))
    assert "import pytorch_lightning" in text
    assert f"`{engine_of(run_script(text, name))}`" == table()[name].engine
