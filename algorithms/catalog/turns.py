"""Entries that give credit from turn to turn."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from rlft.algorithms import select, turns, weigh
from rlft.algorithms.base import Algorithm
from rlft.algorithms.catalog.base import Knobs, Where
from rlft.algorithms.catalog.shared import SCALES, Clipped, compose
from rlft.algorithms.losses import policy as losses


class Rise(Knobs):
    """Recursive introspection: imitate every attempt as strongly as it was paid (Qu et al. 2024, arXiv:2407.18219)."""

    type: Literal["rise"] = "rise"
    temperature: float = Field(
        default=0.4, gt=0, description="in units of a turn's reward; towards 0 only the best turns count"
    )
    keep: turns.Keep = Field(
        default="all",
        description="turns after the first that are trained on: all, those better than the one before, "
        "or those not worse than any before",
    )
    scale: Literal["task", "none"] = Field(
        default="task", description="weights over their mean within a task, or as they are"
    )

    @property
    def source(self) -> Where:
        return "rollouts"

    @property
    def by_turn(self) -> bool:
        return True

    def build(self) -> Algorithm:
        over = " / its mean over the task" if self.scale == "task" else ""
        return Algorithm(
            select=select.everything,
            credit=partial(turns.reward_weighted, temperature=self.temperature, scale=self.scale, keep=self.keep),
            weigh=turns.by_turn,
            loss=losses.likelihood,
            formula="- mean over turns, mean over tokens of A log p, "
            f"A = exp(the turn's reward / {self.temperature:g}){over}",
        )


class Gigpo(Clipped):
    """Groups in groups: turns are compared as well, beside the episodes (Feng et al. 2025, arXiv:2505.10978)."""

    type: Literal["gigpo"] = "gigpo"
    share: float = Field(default=1.0, ge=0, description="of the turns' advantages, beside the episode's")
    gamma: float = Field(default=0.95, ge=0, le=1, description="discount of what later turns earn, per turn")
    alike: turns.Alike = Field(
        default="state",
        description="which turns of a group are compared: those after the same observation, or those of one number",
    )
    outcome: turns.Outcome = Field(
        default="last", description="what is scored beyond the payments is earned by the last turn, or by all alike"
    )
    scale: Literal["group", "none"] = Field(default="group", description="divide both advantages by their std, or not")

    def build(self) -> Algorithm:
        credit = partial(
            turns.turn_relative,
            credit=SCALES[self.scale],
            share=self.share,
            gamma=self.gamma,
            alike=self.alike,
            outcome=self.outcome,
            scale=self.scale == "group",
        )
        low, high = 1 - self.clip_low, 1 + self.clip_high
        over = " / std" if self.scale == "group" else ""
        alike = "after the same observation" if self.alike == "state" else "of the same number"
        return compose(
            self,
            advantages=credit,
            weigh=weigh.by_sequence,
            surrogate=partial(losses.clipped, **self.range),
            formula=f"- mean over rows, mean over tokens of min(r A, clip(r, {low:g}, {high:g}) A), A = (score - group "
            f"mean){over} + {self.share:g} (G - mean of the turns {alike}){over}, G = what is earned from the turn on, "
            f"discounted by {self.gamma:g} a turn",
        )
