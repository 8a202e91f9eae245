"""What an algorithm is: four functions, the extra forward passes it needs, and statistics that add.

Losses and metrics are computed on micro-batches and added up, so each is a sum: a loss is weighted by fields that
were fixed for the whole optimizer step, a metric carries its own denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft.batch import Batch
from rlft.types import Draw, Group

Need = Literal[
    "old_logprobs", "fresh_logprobs", "now_logprobs", "now_entropy", "ref_logprobs", "teacher_logprobs", "values"
]  # fmt: skip


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

    logprobs: of each chosen token at the sampling temperature. entropy: of that distribution in nats.
    Only for an algorithm that owns a head: scores: what the head says having read token i; values: its first output
    before token i, so that values[:, i] is scores[:, i - 1, 0]. Only for one that compares whole distributions: logits
    and teacher_logits at the temperature, one row per chosen token in row-major order of the mask.
    scalars: the algorithm's own numbers, learned ones with a gradient.
    """

    logprobs: Float[Tensor, "b t"]
    entropy: Float[Tensor, "b t"]
    values: Float[Tensor, "b t"] | None = None
    scores: Float[Tensor, "b t k"] | None = None
    logits: Float[Tensor, "n v"] | None = None
    teacher_logits: Float[Tensor, "n v"] | None = None
    scalars: Mapping[str, Tensor] = field(default_factory=dict)


Initial = float | Sequence[Sequence[float]]


@dataclass(frozen=True)
class Owned:
    """What an algorithm has beside the policy; the learner trains, checkpoints and hands it to the loss.

    head: outputs of a linear head on the last hidden state, which begins at zero; 0: none. learned: numbers, or tables
    of numbers, that the optimizer moves, with what they begin at. remembered: numbers that `Algorithm.remember` moves.
    Both reach the loss as `Outputs.scalars`. alone: in so many optimizer steps at the start only what is owned moves,
    the policy does not. detached: the head's gradient ends at the head, so that the trunk serves the policy alone.
    adapter: the head reads the base through a second adapter, shaped like the policy's, in a pass of its own; its
    gradients are clipped apart, so neither learns anything from the other's.
    """

    head: int = 0
    alone: int = 0
    detached: bool = False
    adapter: bool = False
    learned: Mapping[str, Initial] = field(default_factory=dict)
    remembered: Mapping[str, float] = field(default_factory=dict)


Select = Callable[[Sequence[Group]], list[Group]]
Credit = Callable[[Batch], Batch]
Weigh = Callable[[Batch], Batch]
Prepare = Callable[[Batch], Batch]
Loss = Callable[[Outputs, Batch], tuple[Tensor, Metrics]]
Remember = Callable[[Mapping[str, float], Mapping[str, float]], Mapping[str, float]]
Revise = Callable[[Mapping[str, float]], Mapping[str, Any]]


def unchanged(batch: Batch) -> Batch:
    """Nothing to prepare."""
    return batch


def forgotten(numbers: Mapping[str, float], metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Nothing to remember."""
    return numbers


def fixed(numbers: Mapping[str, float]) -> Mapping[str, Any]:
    """Every part stays as it is, whatever is remembered."""
    return {}


@dataclass(frozen=True)
class Algorithm:
    """One choice of each: which trajectories, what credit, what average, what objective.

    needs: batch fields that the learner fills by forward passes without gradients; `fresh_logprobs` are old_logprobs
    that the learner computes even where the rollout's could stand for them. unit: rows that must stay together
    in an optimizer step and in a micro-batch (2 for pairs). micro: where `prepare` drops rows, how many then stay
    together in a micro-batch; 0: as many as before. dense: the loss moves the weights even where the advantage is zero
    (a KL term), so no row may be dropped. formula: the objective in one line, for `rlft plan`.
    prepare: sees each optimizer step whole, weighed and with `now_logprobs` if needed, before it is cut into
    micro-batches: statistics of the step into `baseline`, rows paired anew, helper rows dropped.
    owned, remember: see Owned; remember(numbers, metrics of the optimizer step) gives the next step's numbers; the
    metrics hold `score/mean`, see mean_score. revise: the parts that follow from the numbers, by name: a `select` or a
    `credit` that changes as the run goes on; see `at`.
    residual: the share of the policy's own greedy guess, made in a pass before without gradients, in the embedding of
    every chosen token that the loss's forward pass reads (a temporal residual connection).
    distributions: the loss wants `logits` and the teacher's. vocabulary: it wants log-probs or entropies; False where
    it reads its head alone: no logits are made then, and both are NaN. refill: sample on until `select` has kept
    as many groups as a step has tasks. draws: further members of each group, which `Trajectory.drawn` and `Batch.drawn`
    number from 1; select, credit, weigh and loss see them with the rest.
    """

    select: Select
    credit: Credit
    weigh: Weigh
    loss: Loss
    needs: tuple[Need, ...] = ()
    unit: int = 1
    micro: int = 0
    dense: bool = False
    formula: str = ""
    prepare: Prepare = unchanged
    owned: Owned = Owned()
    remember: Remember = forgotten
    residual: float = 0.0
    distributions: bool = False
    vocabulary: bool = True
    refill: bool = False
    draws: tuple[Draw, ...] = ()
    revise: Revise = fixed

    def at(self, numbers: Mapping[str, float]) -> Algorithm:
        """The algorithm for the batch in hand, given what is remembered before it."""
        parts = self.revise(numbers)
        return replace(self, **parts) if parts else self


def row_weights(batch: Batch) -> Float[Tensor, " b"]:
    """The share of each row in the loss: its tokens' weights together."""
    return torch.where(batch.mask, batch.weights, 0.0).sum(1)


def row_sum(values: Float[Tensor, "b t"], batch: Batch) -> Float[Tensor, " b"]:
    """The sum over each row's chosen tokens; what stands elsewhere, NaN included, does not matter."""
    return torch.where(batch.mask, values, 0.0).sum(1)


def row_mean(values: Float[Tensor, " b"], rows: Bool[Tensor, " b"]) -> Stat:
    """The mean over some rows, as a statistic."""
    picked = values.detach()[rows]
    return Stat(float(picked.double().sum()), picked.numel())


def mean_score(batch: Batch) -> float:
    """The mean score of the policy's own trajectories, each counted once; NaN of none."""
    own = batch.drawn == 0
    scores = dict(zip(batch.trajectory[own].tolist(), batch.scores[own].tolist(), strict=True))
    return sum(scores.values()) / len(scores) if scores else float("nan")


def masked_sum(values: Float[Tensor, "b t"], batch: Batch) -> Float[Tensor, ""]:
    """The sum of weights * values over chosen tokens; NaN outside the mask reaches neither value nor gradient."""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    weights = torch.where(batch.mask, batch.weights.to(values.dtype), zero)
    return (weights * torch.where(batch.mask, values, zero)).sum()
