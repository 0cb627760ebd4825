"""Which parameters of a text model are trained: LoRA by peft, BitFit, all, or those of some names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_dp.models.classifier import train_only
from lightning_dp.models.extra import import_extra

LORA, BITFIT = "lora", "bitfit"


def adapt(
    network: nn.Module, train: str, *, targets: Sequence[str], rank: int, alpha: float, also: Sequence[str] = ()
) -> list[str]:
    """Freeze a network but for what ``train`` names, adding adapters where it is ``"lora"``.

    With ``"lora"``, h = Wx + (α/r)·BAx in each layer that ``targets`` names, W frozen, A of r rows, and B = 0 at first, so
    the network computes what it did (Hu et al. 2022). The adapters are peft's and carry its names (``lora_A``, ``lora_B``).
    With ``"bitfit"`` the biases are trained (Ben Zaken, Ravfogel, Goldberg 2022).

    Args:
        network: is changed in place.
        train: ``"lora"``, ``"bitfit"``, ``"all"``, ``"last_layer"``, or patterns of names, see
            :func:`~lightning_dp.models.classifier.train_only`.
        targets: the layers that get an adapter, by the ends of their names, such as ``["query", "value"]``.
        rank: r.
        alpha: α.
        also: patterns of parameters trained beside adapters and biases, such as the head of a new task.

    Returns:
        The names of what is trained.

    Raises:
        ValueError: a number is below 1, or a name matches nothing.
        MissingExtraError: peft is not installed.

    Example:
        >>> network = nn.ModuleDict({"query": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        >>> adapt(network, "lora", targets=["query"], rank=2, alpha=4, also=["head.*"])[:2]
        ['query.lora_A.default.weight', 'query.lora_B.default.weight']

    Source: E. Hu et al., *LoRA*, ICLR 2022 (arXiv 2106.09685); E. Ben Zaken et al., *BitFit*, ACL 2022 (arXiv 2106.10199).
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(
            f"rank={rank} with alpha={alpha}: expected rank >= 1 and alpha > 0, such as rank=4 with alpha=32."
        )
    if train == BITFIT:
        return train_only(network, ",".join(["*.bias", *also]))
    if train != LORA:
        return train_only(network, train)
    peft = import_extra("peft", "text", "train='lora': the adapters are those of peft")
    transposed = any(type(module).__name__ == "Conv1D" for module in network.modules())  # how GPT-2 keeps its weights
    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets), fan_in_fan_out=transposed
    )
    peft.inject_adapter_in_model(settings, network)
    return train_only(network, ",".join(["*lora_*", *also]))
