"""Published accuracies to put beside one's own, with their sources."""

from __future__ import annotations

from dataclasses import dataclass

DE = "De, Berrada, Hayes, Smith, Balle 2022 (arXiv 2204.13650)"


@dataclass(frozen=True)
class Published:
    """A published curve.

    Args:
        label: for the legend.
        delta: δ.
        points: (ε, accuracy in [0, 1]).
        unconfirmed: those of the ε that no second source confirms; drawn hollow.
        source: whose figures they are.
    """

    label: str
    delta: float
    points: tuple[tuple[float, float], ...]
    unconfirmed: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Task:
    """What was trained on, and the published curves of it.

    Args:
        data: the data set.
        sizes: how many examples of it are trained on, with and without those that are held out for choosing settings.
        curves: published curves.
    """

    data: str
    sizes: tuple[int, ...]
    curves: tuple[Published, ...]


_CIFAR, _IMAGENET = (50_000, 45_000), (1_281_167, 1_271_167)

TASKS: dict[str, Task] = {
    "cifar10": Task(
        "cifar10",
        _CIFAR,
        (
            Published(
                "De et al. 2022, best",
                1e-5,
                ((1, 0.568), (2, 0.659), (3, 0.707), (4, 0.735), (6, 0.788), (8, 0.814)),
                (3, 6),
                DE,
            ),
            Published(
                "Tramèr and Boneh 2021, ScatterNet + CNN",
                1e-5,
                ((3, 0.693),),
                (),
                "Tramèr and Boneh 2021 (arXiv 2011.11660)",
            ),
            Published(
                "Papernot et al. 2021, tanh CNN", 1e-5, ((7.53, 0.662),), (), "Papernot et al. 2021 (arXiv 2007.14191)"
            ),
        ),
    ),
    "cifar10-finetuning": Task(
        "cifar10",
        _CIFAR,
        (
            Published(
                "De et al. 2022, from ImageNet-32", 1e-5, ((1, 0.947), (2, 0.954), (4, 0.961), (8, 0.967)), (), DE
            ),
        ),
    ),
    "cifar100-finetuning": Task(
        "cifar100",
        _CIFAR,
        (
            Published(
                "De et al. 2022, from ImageNet-32", 1e-5, ((1, 0.703), (2, 0.747), (4, 0.792), (8, 0.818)), (), DE
            ),
        ),
    ),
    "imagenet-finetuning": Task(
        "imagenet",
        _IMAGENET,
        (
            Published(
                "De et al. 2022, from JFT-4B",
                8e-7,
                ((0.5, 0.838), (1, 0.844), (2, 0.856), (4, 0.860), (8, 0.867)),
                (),
                DE,
            ),
        ),
    ),
}
