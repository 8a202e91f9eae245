"""The parity gate: what the engine said of a token when it sampled it, against what the learner says before it learns.

Policy gradients rest on both being one policy. Where they are not (another temperature, a truncated distribution, stale
weights) nothing crashes; ratios and advantages are of another policy. So the figures are held against a bound before
the first optimizer step on a batch is taken, and a run does not learn from log-probs that are wrong.

The gap of a token is d = log p_rollout - log p_learner. Its mean over the rollout's tokens estimates KL(rollout ||
learner), but may be negative and is noisy; `kl` is the estimate exp(-d) - 1 + d, as unbiased and never negative
(Schulman 2020, joschu.net/blog/kl-approx.html, its k3). verl's rollout correction, prime-rl and miles log the same and
correct for it with importance weights; none of them asks why it is large. That is in causes.py.

Rounding in half precision has heavy tails: among thousands of tokens the largest gap says little. So there are four
bounds, and the largest gap has the most generous one. They were measured; docs/concepts.md says on what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlft.algorithms.base import Metrics, Outputs, Stat, mean, peak
from rlft.batch import Batch
from rlft.policy import Policy
from rlft.types import RunError

FEW = 3  # tokens may be outliers in any batch: 1% of 50 tokens is none


@dataclass(frozen=True)
class Bounds:
    """The most that rounding does. max: nats, of one token; mean: nats; kl: nats; outliers: share of tokens."""

    max: float
    mean: float
    kl: float
    outliers: float = 0.01

    @property
    def token(self) -> float:
        """The gap from which on a token is an outlier."""
        return 10 * self.mean


BOUNDS = {
    torch.float64: Bounds(1e-2, 2e-4, 1e-6),
    torch.float32: Bounds(1e-2, 2e-4, 1e-6),
    torch.bfloat16: Bounds(3.0, 0.15, 0.02),
    torch.float16: Bounds(0.4, 0.02, 5e-4),  # a guess: bfloat16's, with 3 bits more
}


def bounds_of(dtype: torch.dtype, **set_by_hand: float | None) -> Bounds:
    """The bounds of a dtype, with those that are not None in their place."""
    return replace(BOUNDS[dtype], **{name: value for name, value in set_by_hand.items() if value is not None})


@dataclass(frozen=True)
class Figures:
    """The gaps of some tokens in four numbers; outliers is a share of them."""

    max: float
    mean: float
    kl: float
    outliers: float
    tokens: int

    @classmethod
    def of(cls, gap: Float[Tensor, " n"], bounds: Bounds) -> Figures:
        """Of gaps, one per token."""
        stats = _stats(gap, bounds)
        return cls(**{name: stat.value for name, stat in stats.items()}, tokens=gap.numel())

    @classmethod
    def read(cls, stats: Mapping[str, Stat]) -> Figures | None:
        """Of a step's merged statistics; None where no token had anything to compare."""
        if "parity/logprob_max" not in stats:
            return None
        names = {"max": "parity/logprob_max", "mean": "parity/logprob_mean"}
        names |= {"kl": "parity/kl", "outliers": "parity/outliers"}
        found = {name: stats[logged].value for name, logged in names.items()}
        return cls(**found, tokens=round(stats["parity/kl"].count))

    def over(self, bounds: Bounds) -> list[str]:
        """Which figures are over their bound, in words; one that is not a number is."""
        limits = {"mean": bounds.mean, "max": bounds.max, "kl": bounds.kl}
        limits["outliers"] = max(bounds.outliers, FEW / max(self.tokens, 1))
        found = {name: (getattr(self, name), limit) for name, limit in limits.items()}
        return [
            f"{name} {value:.2g} (bound {limit:.2g})" for name, (value, limit) in found.items() if not value <= limit
        ]


def gaps(outputs: Outputs, batch: Batch, newest: int | None, bounds: Bounds) -> Metrics:
    """How far the learner's log-probs are from the rollout's, before the first step on them.

    Rows of an older version differ because the weights moved on, and are reported apart. NaN: nobody sampled it.
    newest: the version of the rows that count as fresh; None: nothing is compared.
    """
    if newest is None:
        return {}
    known = batch.mask & ~torch.isnan(batch.logprobs)
    fresh = known & (batch.version == newest)[:, None]
    gap = batch.logprobs - outputs.logprobs.detach()
    stale = known & ~fresh
    found: dict[str, Stat] = {}
    if fresh.any():
        stats = _stats(gap[fresh], bounds)
        found |= {"parity/logprob_max": stats["max"], "parity/logprob_mean": stats["mean"]}
        found |= {"parity/kl": stats["kl"], "parity/outliers": stats["outliers"]}
    if stale.any():
        gap = gap.abs()
        found |= {"parity/stale_logprob_max": peak(gap, stale), "parity/stale_logprob_mean": mean(gap, stale)}
    return found


def _stats(gap: Float[Tensor, " n"], bounds: Bounds) -> dict[str, Stat]:
    size, everywhere = gap.abs(), torch.ones_like(gap, dtype=torch.bool)
    wide = gap.double()
    return {
        "max": peak(size, everywhere),
        "mean": mean(size, everywhere),
        "kl": mean(torch.expm1(-wide) + wide, everywhere),
        "outliers": mean((~(size <= bounds.token)).double(), everywhere),
    }


class Mismatch(RunError):
    """The figures are over their bounds; nothing was learned from the batch.

    batch: the optimizer step in hand. agent: whose it is.
    """

    def __init__(self, figures: Figures, bounds: Bounds, batch: Batch) -> None:
        super().__init__(
            "parity: the log-probs that the engine reported of its tokens are not those that the learner computes, so "
            f"nothing was learned from them: {', '.join(figures.over(bounds))} over {figures.tokens} tokens, in nats."
        )
        self.figures = figures
        self.bounds = bounds
        self.batch = batch
        self.agent = 0


class Gate:
    """Holds a step's figures against the bounds, at the first step that has any and every so many steps.

    every: 0 is the first only. previous: the trained values of the version before the one in hand, of an adapter.
    """

    def __init__(self, bounds: Bounds, check: Literal["stop", "warn", "off"] = "off", every: int = 1) -> None:
        self.bounds = bounds
        self.check = check
        self._every = every
        self._seen = 0
        self.previous: dict[str, Tensor] = {}

    def __call__(self, stats: Mapping[str, Stat], batch: Batch) -> None:
        """Raise Mismatch where the figures are over the bounds and this step is one to check."""
        figures = Figures.read(stats)
        if self.check == "off" or figures is None:
            return
        due = self._seen % self._every == 0 if self._every else self._seen == 0
        if due and figures.over(self.bounds):
            raise Mismatch(figures, self.bounds, batch)
        self._seen += 1

    def passed(self, policy: Policy) -> None:
        """Keep the values that the batch was sampled from, before they move. Without an adapter they are too many."""
        if self.check != "off" and policy.is_peft:
            self.previous = {name: p.detach().clone() for name, p in policy.trainable()}
