"""Stops a transformers `Trainer` at the step whose loss, gradients or weights are not finite, on all processes together.

    class MyTrainer(FiniteSteps, Trainer): ...

The losses of a step are added up on the device and looked at once, with the norm of the gradients, before the optimizer
moves the weights; transformers' own filter, which looks at every micro-batch and hides what it finds, is off. Weights are
looked at where they are about to be used up: before an evaluation, a checkpoint, a rollout and at the end. Under DeepSpeed
the backward pass already steps, so there the weights may be lost, but no checkpoint is written from them. Our choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sidtune.core.errors import SidtuneError
from sidtune.core.finite import broken_step, first_broken
from sidtune.core.resume import last_complete_checkpoint
from sidtune.core.truth_guard import no_truth

_FEWEST_SCALE = 1.0  # fp16: below this loss scale an overflow is no longer a matter of scale


class FiniteSteps:
    """Mixin, first of the bases of a `Trainer`; raises a `SidtuneError` that names step and culprit.

    Overrides `training_step`, `_get_grad_norm`, `_maybe_log_save_evaluate` and `train`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False
        self._step_loss: torch.Tensor | None = None
        self._step_inputs: Any = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        self._step_inputs = inputs
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        loss, inputs = self._step_loss, self._step_inputs
        self._step_loss = self._step_inputs = None
        norm = found.full_tensor() if hasattr(found, "full_tensor") else found
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=loss.device)
        bad_loss, bad_norm = self._on_any(torch.stack([loss.float(), norm]))
        if bad_loss or (bad_norm and not self._scale_may_fall()):
            raise self._broken(self._culprit(bad_loss, inputs), self.state.global_step + 1)
        return found

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_save or self.control.should_evaluate:
            self.check_weights()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with no_truth():
            result = super().train(*args, **kwargs)
        self.check_weights()
        return result

    def check_weights(self, step: int | None = None) -> None:
        """Raises SidtuneError where a weight that trains is not finite; `step` is named, default the last one that is done.
        Collective: every process must call it."""
        name = first_broken((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        place = torch.tensor([0.0 if name is None else torch.nan], device=self.args.device)
        if self._on_any(place)[0]:
            step = max(self.state.global_step, 1) if step is None else step
            raise self._broken("weights" if name is None else f"weight '{name}'", step)

    def _on_any(self, values: torch.Tensor) -> list[bool]:
        """Which of the (n,) values are not finite on some process."""
        bad = (~values.isfinite()).float()
        return [
            bool(one) for one in (self.accelerator.reduce(bad, "sum") if self.args.world_size > 1 else bad).tolist()
        ]

    def _scale_may_fall(self) -> bool:
        """Whether fp16 answers an overflow of the gradients by a smaller loss scale instead of a step."""
        if self.accelerator.mixed_precision != "fp16":
            return False
        scaler = self.accelerator.scaler
        return scaler is None or scaler.get_scale() >= _FEWEST_SCALE

    def _culprit(self, bad_loss: bool, inputs: Any) -> str:
        """What was not finite, as near to the cause as this process can see."""
        weights = list(self.model.named_parameters())
        if (name := first_broken(weights)) is not None and not self.is_deepspeed_enabled:
            return f"weight '{name}'"
        if bad_loss and isinstance(inputs, dict):
            name = first_broken((str(n), v) for n, v in inputs.items() if isinstance(v, torch.Tensor))
            return "loss" if name is None else f"input '{name}'"
        if bad_loss:
            return "loss"
        name = first_broken((n, p.grad) for n, p in weights)
        return "norm of the gradients" if name is None else f"gradient of '{name}'"

    def _broken(self, what: str, step: int) -> SidtuneError:
        return broken_step(what, step, last_complete_checkpoint(Path(self.args.output_dir)))
