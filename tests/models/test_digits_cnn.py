"""The digits network: an ordinary LightningModule that torch.func can trace."""

import lightning as L
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp.models import DigitsCNN


@pytest.mark.parametrize(("width", "groups", "batch"), [(4, 2, 1), (16, 4, 5), (8, 8, 3)])
def test_logits_have_one_row_per_image(width, groups, batch):
    assert DigitsCNN(width=width, groups=groups)(torch.zeros(batch, 1, 8, 8)).shape == (batch, 10)


@pytest.mark.parametrize("width", [4, 16])
def test_parameter_count(width):
    first = 9 * width + width + 2 * width  # convolution, bias, affine group norm
    second = 9 * width * (2 * width) + 2 * width + 2 * (2 * width)
    head = 16 * (2 * width) * 10 + 10
    assert sum(p.numel() for p in DigitsCNN(width=width).parameters()) == first + second + head


@pytest.mark.parametrize(("width", "groups"), [(6, 4), (0, 1), (4, 0)])
def test_groups_must_divide_width(width, groups):
    with pytest.raises(ValueError, match=rf"^width={width} with groups={groups}: expected groups to divide width"):
        DigitsCNN(width=width, groups=groups)


def test_an_image_changes_no_other_images_logits():
    torch.manual_seed(0)
    model = DigitsCNN(width=4)
    images = torch.randn(3, 1, 8, 8)
    changed = images.clone()
    changed[0] = torch.randn(1, 8, 8)
    torch.testing.assert_close(model(images)[1:], model(changed)[1:])


def test_mean_of_per_example_gradients_is_the_gradient_of_training_step():
    torch.manual_seed(0)
    model = DigitsCNN(width=4)
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6)

    def loss(params, image, label):
        return F.cross_entropy(functional_call(model, params, (image[None],)), label[None])

    params = {name: p.detach() for name, p in model.named_parameters()}
    per_example = vmap(grad(loss), in_dims=(None, 0, 0))(params, images, labels)
    model.log = lambda *args, **kwargs: None  # outside a Trainer there is nothing to log to
    model.training_step((images, labels), 0).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(per_example[name].mean(0), p.grad, rtol=1e-4, atol=1e-6)


def blobs(n: int) -> TensorDataset:
    """One image per class plus a little noise: separable, so training must succeed."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    centres = torch.randn(10, 1, 8, 8, generator=generator)
    return TensorDataset(centres[labels] + 0.1 * torch.randn(n, 1, 8, 8, generator=generator), labels)


# The data are in memory, so worker processes would only cost time; Lightning suggests them anyway.
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_plain_lightning_trains_it(tmp_path):
    torch.manual_seed(0)
    model = DigitsCNN(width=4, lr=0.5)
    train, val = DataLoader(blobs(80), batch_size=20, shuffle=True), DataLoader(blobs(40), batch_size=40)
    trainer = L.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, train, val)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(logged)
    assert logged["val/accuracy"] == 1.0
    assert logged["train/accuracy"] == 1.0
    (tested,) = trainer.test(model, val, verbose=False)
    assert tested["test/accuracy"] == 1.0
    (predicted,) = trainer.predict(model, val)
    assert torch.equal(predicted, blobs(40).tensors[1])


def test_optimizer_is_sgd_with_the_given_rate_and_momentum():
    model = DigitsCNN(lr=0.25, momentum=0.5)
    optimizer = model.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.25, 0.5)
