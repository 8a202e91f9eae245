"""Entries that learn from single answers, each desirable or not: thumbs up and down."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator

from rlft.algorithms import credit, pairing, select, weigh
from rlft.algorithms.base import Algorithm, Owned
from rlft.algorithms.catalog.base import Knobs
from rlft.algorithms.losses import unpaired as losses
from rlft.algorithms.losses.preference import TERMS


class Labelled(Knobs):
    """What they share."""

    beta: float = Field(default=0.1, gt=0, description="how much a log-ratio counts: the strength of the leash")
    threshold: float = Field(default=0.5, description="a total from here on is desirable")
    desirable_weight: float = Field(default=1.0, ge=0, description="of what is desirable; raise it where that is rare")
    undesirable_weight: float = Field(default=1.0, ge=0, description="of what is not")

    def knobs(self) -> dict[str, float]:
        """As the losses take them."""
        return {
            "beta": self.beta,
            "threshold": self.threshold,
            "desirable": self.desirable_weight,
            "undesirable": self.undesirable_weight,
        }


class Kto(Labelled):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306), losses as in TRL."""

    type: Literal["kto"] = "kto"
    loss: Literal["kto", "apo_zero_unpaired"] = Field(
        default="kto", description="apo_zero_unpaired compares with 0 and needs no mismatched answers"
    )

    @field_validator("loss", mode="before")
    @classmethod
    def _single(cls, value: Any) -> Any:
        for name in value if isinstance(value, list | tuple) else [value]:
            if isinstance(name, str) and name in TERMS:
                raise ValueError(f"{name!r} compares the two sides of a pair, and kto learns from single answers: dpo")
        return value

    @property
    def unit(self) -> int:
        return 2 if self.loss == "kto" else 1

    @property
    def tasks_min(self) -> int:
        return 2 if self.loss == "kto" else 1

    def build(self) -> Algorithm:
        twins = self.loss == "kto"
        z0 = " - z0" if twins else ""
        return Algorithm(
            select=pairing.mismatched if twins else select.everything,
            credit=credit.uniform,
            weigh=weigh.by_sequence,
            loss=partial(losses.prospect, **self.knobs()),
            needs=("ref_logprobs", "now_logprobs") if twins else ("ref_logprobs",),
            unit=self.unit,
            micro=1,
            dense=True,
            formula=f"mean over rows of 1 - sigmoid(+-{self.beta:g} (log-ratio{z0})), + where the score is "
            f"{self.threshold:g} or more" + (", z0 = log-ratio of mismatched answers, at least 0" if twins else ""),
            prepare=losses.mismatch_baseline if twins else losses.no_baseline,
        )


class Bco(Labelled):
    """Binary classifier optimization (Jung et al. 2024, arXiv:2404.04656): the reward is a classifier's logit."""

    type: Literal["bco"] = "bco"

    def build(self) -> Algorithm:
        return Algorithm(
            select=select.everything,
            credit=credit.uniform,
            weigh=weigh.by_sequence,
            loss=partial(losses.classification, **self.knobs()),
            needs=("ref_logprobs", "now_logprobs"),
            dense=True,
            formula=f"- mean over rows of log sigmoid(+-({self.beta:g} log-ratio - delta)), + where the score is "
            f"{self.threshold:g} or more, delta = mean reward so far",
            prepare=partial(losses.reward_baseline, beta=self.beta),
            owned=Owned(remembered={"shift": 0.0, "steps": 0.0}),
            remember=losses.remember_shift,
        )
