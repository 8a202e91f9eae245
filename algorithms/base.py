"""What an algorithm is: four functions, the extra forward passes it needs, and statistics that add.

Losses and metrics are computed on micro-batches and added up, so each is a sum: a loss is weighted by fields that
were fixed for the whole optimizer step, a metric carries its own denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft.batch import Batch
from rlft.types import Group

Need = Literal["old_logprobs", "ref_logprobs"]


@dataclass(frozen=True)
class Stat:
    """A mean (total over count) or a peak (the largest value) that can be merged with another part of the batch."""

    total: float
    count: float
    peak: bool = False

    def merge(self, other: Stat) -> Stat:
        """The statistic of both parts together."""
        if self.peak:
            return Stat(max(self.total, other.total), self.count + other.count, True)
        return Stat(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean or the peak; NaN of nothing."""
        if not self.count:
            return float("nan")
        return self.total if self.peak else self.total / self.count


Metrics = Mapping[str, Stat]


def mean(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Stat:
    """The mean of `values` where `mask`; what stands elsewhere, NaN included, does not matter."""
    picked = values.detach()[mask]
    return Stat(float(picked.double().sum()), picked.numel())


def peak(values: Float[Tensor, "b t"], mask: Bool[Tensor, "b t"]) -> Stat:
    """The largest of `values` where `mask`."""
    picked = values.detach()[mask]
    return Stat(float(picked.max()) if picked.numel() else float("-inf"), picked.numel(), True)


def merge(parts: Sequence[Metrics]) -> dict[str, Stat]:
    """The metrics of several micro-batches as those of the whole; order does not matter."""
    merged: dict[str, Stat] = {}
    for part in parts:
        for name, stat in part.items():
            merged[name] = merged[name].merge(stat) if name in merged else stat
    return merged


@dataclass(frozen=True)
class Outputs:
    """What one forward pass with gradients gives, aligned with `Batch.tokens`; 0 where the mask is False.

    logprobs: of each chosen token at the sampling temperature. entropy: of that distribution in nats, no gradient.
    """

    logprobs: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"]


Select = Callable[[Sequence[Group]], list[Group]]
Credit = Callable[[Batch], Batch]
Weigh = Callable[[Batch], Batch]
Loss = Callable[[Outputs, Batch], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Algorithm:
    """One choice of each: which trajectories, what credit, what average, what objective.

    needs: batch fields that the learner fills by forward passes without gradients. unit: rows that must stay together
    in a micro-batch (2 for pairs). dense: the loss moves the weights even where the advantage is zero (a KL term), so
    no row may be dropped. formula: the objective in one line, for `rlft plan`.
    """

    select: Select
    credit: Credit
    weigh: Weigh
    loss: Loss
    needs: tuple[Need, ...] = ()
    unit: int = 1
    dense: bool = False
    formula: str = ""


def masked_sum(values: Float[Tensor, "b t"], batch: Batch) -> Float[Tensor, ""]:
    """The sum of weights * values over chosen tokens; NaN outside the mask reaches neither value nor gradient."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    weights = torch.where(batch.mask, batch.weights.to(values.dtype), zero)
    return (weights * torch.where(batch.mask, values, zero)).sum()
