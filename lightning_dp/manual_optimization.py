"""Manual optimization: the user's training_step runs once on a batch that holds nobody's data, and steers.

Where it tells a private optimizer to step, the gradient of that step is found from the sample: training_step runs for each
example, up to that very ``step()``, and what it gave to ``manual_backward`` since the step before is the example's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_dp.engines.late import at_hand
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import Selection
from lightning_dp.errors import PreflightError
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.placeholder import emptied_or_refused, without_content
from lightning_dp.loading.reading import record, together
from lightning_dp.look.dry_run import check_no_pieces, check_private_step, check_public_steps, dry_run
from lightning_dp.look.one_example import raise_explained
from lightning_dp.mechanism.complex import as_complex_like
from lightning_dp.ranks.world import World
from lightning_dp.step.attributes import attributes_put_back
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.manual.commands import Commands, intercepted
from lightning_dp.step.manual.global_step import counting_steps, global_step
from lightning_dp.step.manual.late_logs import KnownLoss, in_place_of, log_late
from lightning_dp.step.manual.live import Live, Wanted
from lightning_dp.step.manual.same_draws import SameDraws
from lightning_dp.step.manual.step_sample import StepSample, TryEngines
from lightning_dp.step.manual.values_over_steps import PutBackInTime, ValuesOverSteps
from lightning_dp.step.parameter_hooks import put_gradient
from lightning_dp.step.user_loss import example_loss, takes_batch_idx

PREPARING_HOOKS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
"""Hooks of a LightningModule that run before its first training_step, and may set what that reads."""

MOST_TOGETHER = 64
"""At most so many rows tell whether training_step takes a batch in pieces."""


class _ReachedError(BaseException):
    """The step whose gradient is wanted has been reached; not an Exception, so that no user's ``except`` stops it."""


class ManualOptimization:
    """Runs a training_step with ``automatic_optimization=False`` privately.

    One Lightning batch is one sample and one charge, whatever the number of private optimizers m: each of their releases
    gets noise multiplier σ·√m, and m Gaussian releases of one sample with σ·√m each are together no more than one with σ
    (Dong, Roth, Su 2019, arXiv 1905.02383, corollary 2). Steps of public optimizers are neither clipped nor charged; their
    losses are computed from the placeholder, so they cannot see the data.

    Args:
        world: the processes that train.
        form: how an example comes back to training_step; the optimizers of its module's Trainer are set up.
        capture: takes what training_step logs.
        public: places in ``configure_optimizers`` of the optimizers that see no private data.
    """

    def __init__(self, world: World, form: ExampleForm, capture: StepCapture, public: Sequence[int]) -> None:
        self._world, self._form, self._capture = world, form, capture
        self._module = form.module
        self._public = frozenset(public)
        self._private = [place for place in range(len(self._optimizers)) if place not in self._public]
        self._selections: dict[tuple[int, frozenset[str]], Selection] = {}
        self._private_steps: list[Wanted] = []
        self._scripts: list[list[int]] = []
        self._rehearsed: tuple[DataLoader[Any], int | str | None] | None = None
        self._placeholder: Any = None
        self._live: Live | None = None
        self._default_dtype = torch.get_default_dtype()

    def rehearse(self, form: ExampleForm, loader: DataLoader[Any], physical_batch_size: int | str | None) -> int:
        """Run training_step on a placeholder for the first batches, and see what steps.

        Args:
            form: how a batch comes to the engines and back.
            loader: the user's; the shape of its first example is taken for public.
            physical_batch_size: bounds how many rows the placeholder has, which public steps see.

        Returns:
            The fewest optimizer steps in a batch, so that ``max_steps`` can be turned into a number of batches.

        Raises:
            PreflightError: training_step steers training in a way that cannot be private.
        """
        module = self._module
        batch_size = loader.batch_size or 1
        most = physical_batch_size if isinstance(physical_batch_size, int) else batch_size
        rows = min(batch_size, most) if self._public else 1
        collate: Any = loader.collate_fn
        first = record(loader.dataset, 0)

        def placeholder(batch: Any) -> Any:
            return without_content(batch) if self._public else without_content(batch, emptied_or_refused)

        def batch_of(rows: int, emptied: Callable[[Any], Any] = placeholder) -> Any:
            return form.closed(emptied(form.to_engine(collate(together(loader.dataset, [first] * rows)))))

        self._placeholder = batch_of(rows)
        try:
            self._scripts = dry_run(module, self._capture, self._placeholder, self._private)
        except PreflightError:
            raise
        except Exception as error:
            again = partial(dry_run, module, self._capture, private=self._private)
            raise_explained(error, module, lambda more: again(batch_of(rows - 1 + more)))
        if not any(place in script for script in self._scripts for place in self._private):
            raise PreflightError(
                f"no private optimizer steps in the first {len(self._scripts)} batches: expected training_step to call "
                "opt.step() of one of self.optimizers(). With automatic_optimization=False Lightning steps none by itself."
            )
        if batch_size > 1:
            one, many = batch_of(1), batch_of(min(batch_size, max(most, 2), MOST_TOGETHER))
            index = self._scripts.index(max(self._scripts, key=len))
            check_no_pieces(module, self._capture, one, many, index, self._taken(index), self._private)
        for place in self._public:
            at = [(index, self._taken(index)) for index, script in enumerate(self._scripts) if place in script][:1]
            check_public_steps(
                module, self._capture, [place], self._placeholder, batch_of(rows, lambda batch: batch), at
            )
        return max(1, min(len(script) for script in self._scripts if script))

    def rehearse_early(self, form: ExampleForm, loader: DataLoader[Any], physical_batch_size: int | str | None) -> int:
        """:meth:`rehearse`, before the plan is made; a training_step that fails is rehearsed once its hooks have run.

        Returns:
            The fewest optimizer steps in a batch, or 1 as long as nobody knows: then the plan has batches to spare.
        """
        self._rehearsed = loader, physical_batch_size
        try:
            return self.rehearse(form, loader, physical_batch_size)
        except PreflightError:
            raise
        except Exception:  # if it is not for want of a hook, rehearse_late has the same error
            self._scripts = []
            return 1

    def rehearse_late(self, form: ExampleForm, planned: int) -> int:
        """:meth:`rehearse` after the hooks that may prepare the module, where it has any.

        Args:
            form: how a batch comes to the engines and back, changes of hooks included.
            planned: the fewest optimizer steps in a batch, as the plan was made.
        """
        module = self._module
        if self._scripts and not any(is_overridden(hook, module) for hook in PREPARING_HOOKS):
            return planned
        assert self._rehearsed is not None, "rehearse_early comes first"
        found = self.rehearse(form, *self._rehearsed)
        if found != planned and module.trainer.max_steps != -1:
            rank_zero_warn(
                f"{found} optimizer steps in a batch after the module's hooks have run, and {planned} before: the plan turned "
                f"max_steps={module.trainer.max_steps} into batches with {planned}. Set what training_step needs in "
                "__init__ or configure_model, or give max_epochs in the place of max_steps."
            )
        return found

    def choose_engines(self, try_engines: TryEngines) -> tuple[Selection, LossFunction]:
        """Try engines for each private optimizer seen in the dry run; the first one's, and its loss, are returned.

        Raises:
            EngineError: the engine asked for cannot run this training_step.
            PreflightError: training_step writes into parameters before a private step.
        """
        module = self._module
        first: tuple[Selection, LossFunction] | None = None
        for index, script in enumerate(self._scripts):
            for number, place in enumerate(script):
                parameters = self._parameters()[place]
                key = place, frozenset(parameters)
                if place in self._public or key in self._selections:
                    continue
                rest = (index,) if takes_batch_idx(module) else ()
                wanted = Wanted(rest, number, place, parameters, global_step(module) + self._taken(index))
                loss_function = self._loss_function(wanted, self._form)
                self._selections[key] = try_engines(loss_function, parameters)
                self._private_steps.append(wanted)
                first = first or (self._selections[key], loss_function)
        assert first is not None, "the dry run saw a private step"
        loop = next((one for one in self._selections.values() if one.engine.is_reference), None)
        if loop is not None:  # one engine for all: each draws random numbers in a way of its own
            self._selections = dict.fromkeys(self._selections, loop)
            first = loop, first[1]
        return first

    def losses(self, form: ExampleForm) -> list[tuple[LossFunction, dict[str, nn.Parameter]]]:
        """The loss of each private optimizer seen in the dry run, and its parameters, once engines are chosen."""
        return [(self._loss_function(wanted, form), wanted.parameters) for wanted in self._private_steps]

    def training_step(
        self, sample: StepSample, rest: tuple[Any, ...], share: Callable[[Any], Any] | None, log: bool
    ) -> Any:
        """Run the user's training_step once, on the placeholder; private steps get their gradient from the sample.

        Args:
            sample: of this step; the private optimizers' gradients are made of it.
            rest: what Lightning passes to training_step after the batch.
            share: see :meth:`lightning_dp.step.logs.StepCapture.replay`.
            log: whether what training_step logs is handed to Lightning.

        Returns:
            What training_step returned, with the sample's mean loss in the place of the placeholder's.

        Raises:
            PreflightError: training_step did what it did not do in the dry run and what cannot be private.
        """
        module = self._module
        values, draws = ValuesOverSteps(module), SameDraws(self._world.device)
        live = self._live = Live(rest, sample, self._parameters(), values, draws, global_step(module))
        self._default_dtype = torch.get_default_dtype()
        try:
            with (
                sample.forked_rng(),
                self._capture.listening() as recording,
                module.trainer.precision_plugin.train_step_context(),
            ):
                live.recording = recording
                output = module.training_step(self._placeholder, *rest)
        finally:
            self._live = None
        if live.losses:
            raise PreflightError(
                "training_step called manual_backward without a step of an optimizer after it: expected opt.step() in "
                "every training_step that has a loss. Gradients are not accumulated over batches."
            )
        examples = 0 if live.total is None else live.total.examples
        if log:
            if live.total is not None:
                self._capture.replay(live.total.outputs, examples, share)
            log_late(self._capture, recording.log_calls[live.logged :], live.known, examples)
        return in_place_of(output, live.known)

    def backward(self, loss: Tensor, *args: Any, **options: Any) -> Tensor:
        """A ``manual_backward`` on the placeholder: its gradient is nobody's, and a private step replaces it."""
        if self._live is None:
            raise RuntimeError(
                "manual_backward outside training_step: expected it inside. Only there is it known whose data it sees."
            )
        loss = at_hand(loss)
        self._live.losses.append(loss)
        return Strategy.backward(self._module.trainer.strategy, loss, None, *args, **options)

    def step_closure(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of an ``optimizer.step()``, followed by what puts the gradient of that step into ``p.grad``."""
        live = self._live
        if live is None:
            raise RuntimeError(
                "optimizer.step() outside training_step: expected it inside. A step anywhere else would use a gradient "
                "that was released for another step."
            )
        place = next(place for place, one in enumerate(self._optimizers) if one is optimizer)

        def then() -> Any:
            outcome = closure()
            if place in self._public:
                self._average_over_ranks(live, place)
            else:
                self._put_private_gradient(live, place)
            if len(self._optimizers) > 1:  # else nothing comes after the one step
                live.values.about_to_step(optimizer)
            live.step += 1
            live.losses.clear()
            return outcome

        return then

    def _put_private_gradient(self, live: Live, place: int) -> None:
        check_private_step(place, live.losses, live.stepped)
        parameters = live.parameters[place]
        wanted = Wanted(live.rest, live.step, place, parameters, live.began_at)
        loss_function = self._loss_function(wanted, self._form, live)
        with torch.enable_grad(), self._outside_the_precision_context():
            key = place, frozenset(parameters)
            if key not in self._selections:  # later than the dry run looked, or parameters thawed since
                self._selections[key] = live.sample.try_engines(loss_function, parameters)
            several = live.draws if len(self._private) > 1 else None
            total = live.sample.clipped_sum(loss_function, parameters, self._selections[key], several)
            gradient = live.sample.released(total, len(live.stepped), len(self._private))
        for group in self._optimizers[place].param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for name, parameter in parameters.items():
            put_gradient(parameter, as_complex_like(gradient[name], parameter))
        live.stepped.append(place)
        live.total = total
        live.logged = 0 if live.recording is None else len(live.recording.log_calls)
        for column, loss in enumerate(live.losses, start=-len(live.losses)):
            means = [output[column] for output in total.outputs]
            live.known.append(
                KnownLoss(loss.detach(), torch.cat(means).mean() if means else torch.zeros_like(loss).detach())
            )

    def _average_over_ranks(self, live: Live, place: int) -> None:
        """Public losses draw other random numbers on every rank: the mean of their gradients keeps the ranks equal."""
        live.known += [KnownLoss(loss.detach(), loss.detach()) for loss in live.losses]
        if self._world.size == 1:
            return
        for parameter in live.parameters[place].values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._world.mean(gradient)

    @contextmanager
    def _outside_the_precision_context(self) -> Iterator[None]:
        """Norms, clipping and noise are computed as under automatic optimization: not in the step's low precision."""
        inside = torch.get_default_dtype()
        torch.set_default_dtype(self._default_dtype)
        try:
            with torch.autocast(self._world.device.type, enabled=False):
                yield
        finally:
            torch.set_default_dtype(inside)

    @property
    def _optimizers(self) -> list[Optimizer]:
        return self._module.trainer.optimizers

    def _parameters(self) -> list[dict[str, nn.Parameter]]:
        """For each optimizer the trainable parameters it holds, by name."""
        named = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad]
        held = [{id(p) for group in one.param_groups for p in group["params"]} for one in self._optimizers]
        return [{name: p for name, p in named if id(p) in ids} for ids in held]

    def _taken(self, index: int) -> int:
        """How many optimizer steps were rehearsed before this batch."""
        return sum(map(len, self._scripts[:index]))

    def _loss_function(self, wanted: Wanted, form: ExampleForm, live: Live | None = None) -> LossFunction:
        """An example's loss at the step that is wanted.

        What training_step makes before an earlier step it makes with the parameters of then, as ``live`` has them.
        """
        module = self._module
        fixed = {name: p.detach() for name, p in module.named_parameters() if name not in wanted.parameters}
        values = ValuesOverSteps(module) if live is None else live.values
        time = PutBackInTime(module, values, wanted.parameters)

        def up_to_the_step(call: Callable[[], Any]) -> dict[str, Any]:
            if live is not None and len(self._private) > 1:
                live.draws.at_start_of_a_call()
            with counting_steps(module, wanted.began_at) as count, attributes_put_back(module, report=False):

                def on_step(notes: Commands, stepping: int) -> None:
                    if len(notes.steps) == wanted.number:
                        if stepping != wanted.place or not notes.losses:
                            raise _other_way(wanted.number, wanted.place)
                        raise _ReachedError
                    count()
                    time.after(len(notes.steps) + 1)

                with intercepted(module, on_step) as notes:
                    try:
                        call()
                    except _ReachedError:
                        losses = [loss.reshape(()) for loss in notes.losses]
                        return {"loss": sum(losses[1:], losses[0]), "losses": losses}
            raise _other_way(wanted.number, wanted.place)

        return example_loss(form, self._capture, wanted.rest, fixed=fixed, run=up_to_the_step, begin_with=time.at_start)


def _other_way(number: int, place: int) -> PreflightError:
    return PreflightError(
        f"training_step does not come to step {number + 1}, of optimizer {place}, for an example as it does for a batch of "
        "zeros: expected the same steps in the same order for every batch. When to step may depend on batch_idx, never on "
        "the data. Remove the condition."
    )
