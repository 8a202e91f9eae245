"""Optimizer steps: clip, step, move the schedule on. One whose loss or gradient is not finite is not taken.

Parameters and moments then stay as they were to the bit, and the schedule moves on as if the step had been taken, so
that one bad batch costs that batch and nothing else. The batch is kept for whoever wants to know why.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rlft.batch import Batch
from rlft.policy import Policy
from rlft.reference import Reference
from rlft.schedule import Schedule, make_optimizer, make_scheduler


@dataclass(frozen=True)
class Taken:
    """What became of an optimizer step. norm: of the gradient before clipping. unsound: parameters, by name, whose
    gradient was not finite; the loss alone may be the reason that it was skipped.
    """

    norm: float
    skipped: bool = False
    unsound: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """An optimizer step that was not taken. batch: its rows, credited and weighed.

    rows: those of `batch` whose loss or gradient is not finite even alone. parameters: see `Taken.unsound`.
    """

    batch: Batch
    loss: float
    norm: float
    parameters: tuple[str, ...]
    rows: tuple[int, ...]


class Stepper:
    """Moves the policy's trained parameters and the algorithm's own, which `own` names.

    apart: the own ones are clipped by a norm of their own. alone: for so many optimizer steps the policy stays as it
    is. reference: one that follows the policy.
    """

    def __init__(
        self,
        policy: Policy,
        own: list[tuple[str, torch.nn.Parameter]],
        schedule: Schedule,
        apart: bool = False,
        alone: int = 0,
        reference: Reference | None = None,
    ) -> None:
        self.named = [*policy.trainable(), *own]
        self.parameters = [p for _, p in self.named]
        second = len(own) if apart else 0
        cut = len(self.parameters) - second
        self._clipped = [self.parameters[:cut], self.parameters[cut:]]
        self._policy, self._alone, self._reference = policy, alone, reference
        self._limit = schedule.max_grad_norm or math.inf
        self.optimizer = make_optimizer(self.parameters, schedule)
        self.scheduler = make_scheduler(self.optimizer, schedule)
        self.skipped_in_a_row = 0

    @property
    def alone(self) -> bool:
        """In this optimizer step the policy stays as it is."""
        return self.scheduler.last_epoch < self._alone

    @property
    def rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.scheduler.get_last_lr()[0])

    def take(self, loss: float) -> Taken:
        """Step along the gradients that are there, unless they or the loss are not finite; they are gone afterwards."""
        parts = [[p.grad for p in part if p.grad is not None] for part in self._clipped]
        norms = [get_total_norm(grads) if grads else torch.zeros(()) for grads in parts]
        taken = Taken(math.hypot(*map(float, norms)))
        if not (math.isfinite(taken.norm) and math.isfinite(loss)):
            taken = Taken(taken.norm, True, self.unsound())
        elif any(parts):
            for part, norm in zip(self._clipped, norms, strict=True):
                clip_grads_with_norm_(part, self._limit, norm)
            self.optimizer.step()
            if not self.alone:
                self._policy.stepped(self.scheduler.last_epoch + 1)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if taken.skipped else 0
        self.forget()
        self.pass_over(1)
        return taken

    def unsound(self) -> tuple[str, ...]:
        """The parameters whose gradient is not finite."""
        return tuple(name for name, p in self.named if p.grad is not None and not _finite(p.grad))

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def pass_over(self, steps: int) -> None:
        """Move the schedule on by optimizer steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns when a step without data had no optimizer.step
            for _ in range(steps):
                self.scheduler.step()
                if self._reference is not None:
                    self._reference.stepped(self.scheduler.last_epoch)


def _finite(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient).all())
