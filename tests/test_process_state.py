"""What belongs to the whole process is left alone, or put back, and other threads do not notice it."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import normal

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.accounting.losses import Deltas, LossSum
from lightning_dp.cli.recipes import command_line
from lightning_dp.engines.draws import drawn_for_all
from lightning_dp.mechanism.while_open import WhileOpen
from tests.conftest import loader, regressor, trainer


def in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def test_the_accountant_leaves_warnings_and_numpy_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    deltas = LossSum.deltas

    def settings() -> Any:
        return [*warnings.filters], warnings.showwarning, in_thread(np.geterr)

    def watched(self: LossSum, tilt: float, most_cells: int) -> Deltas:
        seen.append(settings())
        return deltas(self, tilt, most_cells)

    monkeypatch.setattr(LossSum, "deltas", watched)
    epsilon_bound([Phase(1.5, 0.2, 3), Phase(1.0, 0.1, 10)], 1e-5)
    assert len(seen) >= 2
    assert all(during == settings() for during in seen)


def test_accountants_and_warnings_in_parallel_threads() -> None:
    done, warned, raised = threading.Event(), 0, 0

    def epsilons() -> list[float]:
        return [epsilon_bound([Phase(sigma, 0.1, 50)], 1e-5).epsilon for sigma in (0.9, 1.1, 1.3)]

    def warn() -> None:
        nonlocal warned, raised
        while not done.is_set():
            warned += 1
            try:
                warnings.warn("something of the user's own", stacklevel=1)
            except UserWarning:
                raised += 1

    alone = epsilons()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warner = threading.Thread(target=warn)
        warner.start()
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.append(epsilons())) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        warner.join()
    assert warned > 0
    assert raised == 0
    assert len(results) == 2
    for found in results:  # a Fourier transform may be computed in another order where its memory is aligned otherwise
        assert np.asarray(found) == pytest.approx(np.asarray(alone), rel=1e-9)


def test_a_setting_lasts_from_the_first_thread_in_to_the_last_one_out() -> None:
    changes: list[str] = []

    @contextmanager
    def context() -> Any:
        changes.append("changed")
        yield
        changes.append("put back")

    setting = WhileOpen(context)
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with setting.open():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with setting.open():
        thread.start()
        entered.wait()
        assert setting.here
    assert not setting.here
    assert changes == ["changed"]
    leave.set()
    thread.join()
    assert changes == ["changed", "put back"]


def test_distributions_of_other_threads_draw_as_ever() -> None:
    original = normal._standard_normal
    with drawn_for_all():
        assert in_thread(lambda: normal._standard_normal((2,), torch.float64, "cpu").dtype) == torch.float64
        mine = normal._standard_normal
        with torch.random.fork_rng():
            torch.manual_seed(0)
            theirs = in_thread(lambda: mine((3,), torch.float32, "cpu"))
            torch.manual_seed(0)
            expected = original((3,), torch.float32, "cpu")
        assert torch.equal(theirs, expected), "the same function, from the same state of the generator"
    assert normal._standard_normal is original


def test_the_command_line_leaves_the_words_of_the_process() -> None:
    before = sys.argv
    with command_line(["fit", "--help"]):
        assert sys.argv[1:] == ["fit", "--help"]
    assert sys.argv is before


def test_an_audit_leaves_the_loggers_level(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_dp.cli.audit import run

    level = logging.getLogger("lightning.pytorch").level
    Path("broken.yaml").write_text("model: 3\n")
    with pytest.raises(SystemExit):
        run(["--config", "broken.yaml", "--json"])
    assert logging.getLogger("lightning.pytorch").level == level
    assert "error" in capsys.readouterr().err


def test_a_warning_points_at_the_users_own_line() -> None:
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=0.1))
    with pytest.warns(UserWarning, match=r"delta=0\.1 with dataset_size=64") as warned:
        fit.fit(regressor(), loader())
    (delta,) = [one for one in warned if "delta=" in str(one.message)]
    assert delta.filename == __file__
    assert "fit.fit(" in Path(__file__).read_text().splitlines()[delta.lineno - 1]
