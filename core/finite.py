"""Numbers that are not finite (NaN, infinity): one check of weights and one sentence for every training loop. Our choice.

A training that met one writes nothing any more, so that its last checkpoint stays good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sidtune.core.errors import DataError

NOT_NUMBERS = (
    "The model's scores are not numbers (NaN), so no ranking exists; check the checkpoint for NaN weights, or use "
    "bfloat16 or float32 instead of float16."
)


def is_finite(tensor: Any) -> bool:
    """Whether a torch tensor holds finite numbers only; one fast pass, no copy. True for integers and for no entries.

    Of a tensor that is split over processes (ZeRO-3, FSDP) the part of this process is looked at.
    """
    import torch

    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    return all(math.isfinite(value) for value in torch.stack(torch.aminmax(tensor)).tolist())


def first_broken(named: Iterable[tuple[str, Any]]) -> str | None:
    """The name of the first of some tensors that is not finite, None where all are."""
    return next((name for name, tensor in named if tensor is not None and not is_finite(tensor)), None)


def check_weights(model: Any, where: Any) -> None:
    """Raises DataError where a weight of a torch module is not finite; `where` is the folder or name it came from."""
    name = first_broken(model.named_parameters())
    if name is not None:
        raise DataError(
            f"The weights of {where} hold NaN or infinity (first in '{name}'). {NOT_NUMBERS.split(';')[0]}; take a "
            "checkpoint from before they broke, or train or copy the model again."
        )


def check_step(loss: Any, norm: Any, of: str, step: int, kept: Path | str | None = None) -> None:
    """For a loop of its own, before the optimizer steps: raises `broken_step` unless loss and norm of the gradients are
    finite; `of` says whose they are. One synchronisation on an accelerator."""
    if not math.isfinite(float(loss + norm)):
        what = "gradients" if math.isfinite(float(loss)) else "loss"
        raise broken_step(f"{what} of the {of}", step, kept)


def broken_step(what: str, step: int, kept: Path | str | None = None) -> DataError:
    """The error that stops a training: `what` of step (or epoch) `step` was not finite.

    Args:
        what: what was not finite, for example `loss`. step: counted from 1. kept: the last good checkpoint.
    """
    left = "there is no checkpoint yet, so the same command starts anew"
    if kept is not None:
        left = f"the last good checkpoint is kept at {kept}, from which the same command goes on (a changed one starts anew)"
    return DataError(
        f"The {what} of step {step} is not finite (NaN or infinity), so the training stopped there and wrote nothing "
        f"more: lower learning_rate, or check the examples of that step for extreme values; {left}."
    )
