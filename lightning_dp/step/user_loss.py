"""The user's own ``training_step`` as a function of the parameters, for the engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_dp.engines.backward import backward_follows, gradients_kept, hooks_at_rest, in_place
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.loading.form import ExampleForm
from lightning_dp.mechanism.complex import put_together
from lightning_dp.step.attributes import attributes_put_back
from lightning_dp.step.in_place import replaced_tensors
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.spectral import SpectralNorms


def example_loss(
    form: ExampleForm,
    capture: StepCapture,
    rest: tuple[Any, ...],
    *,
    fixed: Mapping[str, Tensor] | None = None,
    run: Callable[[Callable[[], Any]], Any] | None = None,
    begin_with: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
) -> LossFunction:
    """The user's own training_step on a batch of one (on its K views, on a user's examples), as a function of the parameters.

    Complex parameters may be given in real parts, see :mod:`lightning_dp.mechanism.complex`.

    Args:
        form: how an example comes back to training_step; its module is used.
        capture: takes what the step logs and returns.
        rest: what Lightning passes to training_step after the batch.
        fixed: values of other parameters, by name, that are not differentiated.
        run: calls training_step and gives what it "returned"; manual optimization, where it need not return the loss,
            says what that is.
        begin_with: from all parameters by name to the values with which training_step begins, where those are others.
    """
    module = form.module
    spectral_norms = SpectralNorms(module)
    complex_names = frozenset(name for name, parameter in module.named_parameters() if parameter.is_complex())

    def loss_function(parameters: Mapping[str, Tensor], example: Any) -> tuple[Tensor, Any]:
        whole = put_together({**(fixed or {}), **parameters}, complex_names)
        if begin_with is not None:
            whole = dict(begin_with(whole))
        example = form.to_user(example)
        with in_place() as stack:
            stack.enter_context(capture.state.put_back_after())
            if backward_follows():  # it may reach any parameter, and run a part of training_step again
                stack.enter_context(gradients_kept(module.parameters()))
                stack.enter_context(hooks_at_rest(module.parameters()))
                stack.enter_context(attributes_put_back(module, report=False))
            stack.enter_context(spectral_norms.resting())
            stack.enter_context(replaced_tensors(module, whole, may_move=begin_with is not None))
            with module.trainer.precision_plugin.train_step_context():
                call = partial(module.training_step, example, *rest)
                once = partial(capture.run, call if run is None else partial(run, call))
                return capture.state.unsteered(once)

    return loss_function


def takes_batch_idx(module: pl.LightningModule) -> bool:
    """Whether Lightning passes ``batch_idx`` to this module's training_step."""
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
