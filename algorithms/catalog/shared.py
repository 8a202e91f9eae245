"""The knobs that entries learning from scored samples have in common, and how an entry is put together from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from rlft.algorithms import corrections, credit, select
from rlft.algorithms.base import (
    Algorithm,
    Credit,
    Loss,
    Need,
    Owned,
    Prepare,
    Remember,
    Select,
    Weigh,
    forgotten,
    unchanged,
)
from rlft.algorithms.catalog.base import Knobs
from rlft.algorithms.losses import terms

SCALES: dict[str, Credit] = {
    "group": credit.group_relative, "batch": credit.batch_scaled, "none": credit.centred,
}  # fmt: skip
Correction = Literal["none", "truncate", "truncate_sequence", "mask", "mask_sequence", "icepop", "keep_sequence"]


class Regularised(Knobs):
    """Terms beside the surrogate, and what is done about samples that another policy drew or that were cut off."""

    kl: float = Field(default=0.0, ge=0, description="coefficient of the KL to the reference; 0 costs no forward pass")
    kl_kind: Literal["k1", "k2", "k3", "unbiased", "reward"] = Field(
        default="k3", description="the KL's estimate in the loss, or `reward`: k1, subtracted from the score"
    )
    kl_target: float | None = Field(default=None, gt=0, description="KL per token that `kl` is steered to")
    entropy: float = Field(default=0.0, ge=0, description="coefficient of the entropy bonus")
    entropy_target: float | None = Field(default=None, gt=0, description="entropy in nats that the bonus holds")
    correction: Correction = Field(
        default="none", description="what is done about the gap between rollout and old log-probs"
    )
    correction_low: float = Field(default=0.5, ge=0, lt=1, description="lower bound of the correction's ratio")
    correction_high: float = Field(default=2.0, ge=1, description="upper bound of the correction's ratio")
    to_go: float = Field(
        default=0.0, ge=0, description="share of what is paid at a token and later ones that is added to its advantage"
    )
    mask_truncated: bool = Field(default=False, description="samples cut off by the length limit are not trained on")

    @property
    def group_size_min(self) -> int:
        return 2

    @property
    def source(self) -> Literal["rollouts", "recorded", "any"]:
        return "rollouts"

    @model_validator(mode="after")
    def _target_has_a_kl(self) -> Regularised:
        if self.kl_target is not None and self.kl == 0:
            raise ValueError("kl_target steers `kl` by factors, so a `kl` of 0 stays 0: give it a start such as 0.05")
        if self.kl_target is not None and self.kl_kind == "reward":
            raise ValueError("kl_target steers the KL in the loss; with kl_kind: reward the coefficient is fixed")
        return self


class Ratio(Regularised):
    """Surrogates of the ratio of new to old probability."""

    old: Literal["learner", "rollout"] = Field(
        default="learner", description="whose log-probs are the old ones in the ratio"
    )
    top_entropy: float = Field(
        default=1.0, gt=0, le=1, description="share of a step's tokens, those of the highest entropy, that teach"
    )

    @property
    def by_row(self) -> bool:
        """A row has one ratio, whose gradient goes through all of its tokens whichever of them teach."""
        return False

    @model_validator(mode="after")
    def _counts_the_gap_once(self) -> Ratio:
        if self.old == "rollout" and self.correction != "none":
            raise ValueError(
                f"correction: {self.correction} multiplies by old / rollout, and with old: rollout the ratio already "
                "is new / rollout: the gap would count twice. Set one of them back to its default"
            )
        return self


class Clipped(Ratio):
    """Surrogates whose ratio is clipped as PPO's."""

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(default=0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")
    dual_clip: float | None = Field(
        default=None, gt=1, description="cap of the ratio where the advantage is negative; none: unbounded"
    )

    @model_validator(mode="after")
    def _dual_is_outside(self) -> Clipped:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip must lie above 1 + clip_high, which is {1 + self.clip_high:g}")
        return self

    @property
    def range(self) -> dict[str, float | None]:
        """What the loss wants to know."""
        return {"low": self.clip_low, "high": self.clip_high, "dual": self.dual_clip}


@dataclass(frozen=True)
class Memory:
    """Numbers that outlast a batch, how they move (see `Algorithm.remember`), and the credit that follows from them."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    remember: Remember = forgotten
    credit: Callable[[Mapping[str, float]], Credit] | None = None


FORGETFUL = Memory()


def compose(
    knobs: Regularised,
    advantages: Credit,
    weigh: Weigh,
    surrogate: Loss,
    formula: str,
    select: Select = select.everything,
    refill: bool = False,
    charged: bool = True,
    memory: Memory = FORGETFUL,
) -> Algorithm:
    """An entry out of its credit, average and surrogate, with the terms of its knobs around them.

    charged: a KL in the reward is taken from the score; False where `advantages` see to it. memory: its credit, where
    there is one, takes the place of `advantages`.
    """
    in_loss = knobs.kl > 0 and knobs.kl_kind != "reward"
    bonus = knobs.entropy > 0 or knobs.entropy_target is not None
    losses = [surrogate]
    if in_loss:
        losses.append(partial(terms.reference_kl, coefficient=knobs.kl, kind=knobs.kl_kind))
    if bonus:
        losses.append(partial(terms.entropy_bonus, coefficient=knobs.entropy))
    return Algorithm(
        select=select,
        credit=_credit(knobs, advantages, charged),
        weigh=weigh,
        loss=terms.total(*losses) if len(losses) > 1 else surrogate,
        needs=_needs(knobs),
        dense=in_loss or bonus,
        formula=formula + _more(knobs),
        prepare=_prepare(knobs),
        owned=Owned(remembered={**_numbers(knobs), **memory.numbers}),
        remember=partial(_remember, knobs=knobs, memory=memory),
        refill=refill,
        revise=partial(_revise, knobs=knobs, charged=charged, memory=memory),
    )


def _prepare(knobs: Regularised) -> Prepare:
    share = _teaching(knobs)
    return unchanged if share == 1 else partial(corrections.high_entropy, share=share)


def _teaching(knobs: Regularised) -> float:
    """The share of a step's tokens that carry the surrogate's gradient."""
    return knobs.top_entropy if isinstance(knobs, Ratio) else 1.0


def _revise(numbers: Mapping[str, float], knobs: Regularised, charged: bool, memory: Memory) -> Mapping[str, Any]:
    return {} if memory.credit is None else {"credit": _credit(knobs, memory.credit(numbers), charged)}


def _credit(knobs: Regularised, advantages: Credit, charged: bool) -> Credit:
    """Around the advantages: the KL in the reward, the rollout as the old policy, the correction, truncated rows."""
    found = partial(credit.to_go, credit=advantages, share=knobs.to_go) if knobs.to_go else advantages
    if charged and knobs.kl > 0 and knobs.kl_kind == "reward":
        found = partial(credit.charged, credit=found, kl=knobs.kl)
    if knobs.correction != "none":
        low, high = knobs.correction_low, knobs.correction_high
        found = partial(corrections.corrected, credit=found, kind=knobs.correction, low=low, high=high)
    if isinstance(knobs, Ratio) and knobs.old == "rollout":
        found = partial(corrections.from_rollout, credit=found)
    return partial(credit.without_truncated, credit=found) if knobs.mask_truncated else found


def _needs(knobs: Regularised) -> tuple[Need, ...]:
    """A correction compares with log-probs of the learner's own; ratios, and KLs that hold one, with the old ones."""
    needs: list[Need] = []
    given = isinstance(knobs, Ratio) and knobs.old == "rollout"
    compared = isinstance(knobs, Ratio) or (knobs.kl > 0 and knobs.kl_kind in ("reward", "unbiased"))
    if knobs.correction != "none":
        needs.append("fresh_logprobs")
    elif compared and not given:
        needs.append("old_logprobs")
    if knobs.kl > 0:
        needs.append("ref_logprobs")
    if _teaching(knobs) < 1:
        needs.append("now_entropy")
    return tuple(needs)


def _numbers(knobs: Regularised) -> dict[str, float]:
    """The coefficients that are steered."""
    numbers = {} if knobs.kl_target is None else {"kl": knobs.kl}
    return numbers if knobs.entropy_target is None else {
        **numbers, "entropy": knobs.entropy, "entropy_hidden": knobs.entropy,
    }  # fmt: skip


def _remember(
    numbers: Mapping[str, float], metrics: Mapping[str, float], knobs: Regularised, memory: Memory
) -> Mapping[str, float]:
    numbers = memory.remember(numbers, metrics)
    if knobs.kl_target is not None:
        numbers = terms.kl_towards(numbers, metrics, knobs.kl_target)
    if knobs.entropy_target is not None:
        numbers = terms.entropy_towards(numbers, metrics, knobs.entropy_target)
    return numbers


def _more(knobs: Regularised) -> str:
    """The formula's terms beside the surrogate."""
    kl = f" + {knobs.kl:g} KL(policy || reference)" if knobs.kl else ""
    held = f", held at {knobs.entropy_target:g} nats" if knobs.entropy_target is not None else ""
    bonus = f" - {knobs.entropy:g} entropy{held}" if knobs.entropy or held else ""
    fixed = f"; times old / rollout, {knobs.correction}" if knobs.correction != "none" else ""
    paid = f"; A grows by {knobs.to_go:g} times what is paid from the token on" if knobs.to_go else ""
    return kl + bonus + fixed + paid + _some(knobs)


def _some(knobs: Regularised) -> str:
    """Which tokens the surrogate is of, or how much that leaves of a row whose tokens share one ratio."""
    if _teaching(knobs) == 1:
        return ""
    which = f"the {_teaching(knobs):.0%} of tokens with the highest entropy"
    if isinstance(knobs, Ratio) and knobs.by_row:
        return f"; each row's surrogate times the share of its tokens that are among {which}"
    return f"; the surrogate of {which}"
