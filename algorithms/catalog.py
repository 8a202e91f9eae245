"""The named algorithms. Each config *is* its knobs and builds an Algorithm; the union is the registry.

A user's own enters as `type: custom, path: my_pkg.mine:build`, where `build(**options)` returns an Algorithm.
"""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from rlft.algorithms import credit, losses, select, weigh
from rlft.algorithms.base import Algorithm
from rlft.types import InputError


class Knobs(BaseModel):
    """What every entry says of itself, so that bad combinations die at config time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def group_size_min(self) -> int:
        """How many samples per task the credit needs."""
        return 1

    @property
    def source(self) -> Literal["rollouts", "recorded", "any"]:
        """Where its groups may come from: samples of the policy itself, recorded data, or either."""
        return "any"


class Grpo(Knobs):
    """Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300)."""

    type: Literal["grpo"] = "grpo"
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(default=0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")
    kl: float = Field(default=0.0, ge=0, description="coefficient of the KL to the reference; 0 costs no forward pass")
    scale: Literal["group", "none"] = Field(default="group", description="divide advantages by the group's std, or not")

    @property
    def group_size_min(self) -> int:
        return 2

    @property
    def source(self) -> Literal["rollouts", "recorded", "any"]:
        return "rollouts"

    def build(self) -> Algorithm:
        surrogate = partial(losses.clipped, low=self.clip_low, high=self.clip_high)
        kl = partial(losses.reference_kl, coefficient=self.kl)
        return Algorithm(
            select=select.everything,
            credit=partial(credit.group_relative, scale=self.scale == "group"),
            weigh=weigh.by_sequence,
            loss=losses.total(surrogate, kl) if self.kl else surrogate,
            needs=("old_logprobs", "ref_logprobs") if self.kl else ("old_logprobs",),
            dense=self.kl > 0,
            formula=f"- mean over rows, mean over tokens of min(r A, clip(r, {1 - self.clip_low:g}, "
            f"{1 + self.clip_high:g}) A), A = (score - group mean)"
            + (" / group std" if self.scale == "group" else "")
            + (f" + {self.kl:g} KL(policy || reference)" if self.kl else ""),
        )


class Rloo(Knobs):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv:2402.14740)."""

    type: Literal["rloo"] = "rloo"

    @property
    def group_size_min(self) -> int:
        return 2

    @property
    def source(self) -> Literal["rollouts", "recorded", "any"]:
        return "rollouts"

    def build(self) -> Algorithm:
        return Algorithm(
            select=select.everything,
            credit=credit.leave_one_out,
            weigh=weigh.by_token,
            loss=losses.likelihood,
            formula="- mean over tokens of A log p, A = score - mean score of the group's others",
        )


class Sft(Knobs):
    """Supervised fine-tuning: maximum likelihood of the completion, the prompt masked out."""

    type: Literal["sft"] = "sft"

    @property
    def source(self) -> Literal["rollouts", "recorded", "any"]:
        return "recorded"

    def build(self) -> Algorithm:
        return Algorithm(
            select=select.best(1, -math.inf),  # of a pair the chosen one, of scored completions the best
            credit=credit.uniform,
            weigh=weigh.by_token,
            loss=losses.likelihood,
            formula="- mean over completion tokens of log p",
        )


class Rejection(Knobs):
    """Rejection sampling: sample, keep the best, imitate them (RAFT, Dong et al. 2023, arXiv:2304.06767)."""

    type: Literal["rejection"] = "rejection"
    k: int = Field(default=1, ge=1, description="how many of each group are kept at most")
    at_least: float = Field(default=1.0, description="the lowest score that is kept")

    def build(self) -> Algorithm:
        return Algorithm(
            select=select.best(self.k, self.at_least),
            credit=credit.uniform,
            weigh=weigh.by_token,
            loss=losses.likelihood,
            formula=f"- mean over tokens of log p on each group's best {self.k} with a score of {self.at_least:g} up",
        )


class Custom(Knobs):
    """Your own: `path: package.module:build` names a function that returns an Algorithm."""

    type: Literal["custom"] = "custom"
    path: str = Field(description="package.module:function")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords given to the function")

    def build(self) -> Algorithm:
        module, _, name = self.path.partition(":")
        try:
            algorithm = getattr(importlib.import_module(module), name)(**self.options)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise InputError(f"algorithm.path: {self.path!r} does not give an algorithm: {error}") from error
        if not isinstance(algorithm, Algorithm):
            raise InputError(f"algorithm.path: {self.path!r} returned {type(algorithm).__name__}, not an Algorithm")
        return algorithm


AlgorithmConfig = Annotated[Grpo | Rloo | Sft | Rejection | Custom, Field(discriminator="type")]


def entries() -> dict[str, type[Knobs]]:
    """Every entry by its name."""
    return {kind.model_fields["type"].default: kind for kind in get_args(get_args(AlgorithmConfig)[0])}


def names() -> list[str]:
    """The names that `algorithm.type` accepts."""
    return list(entries())
