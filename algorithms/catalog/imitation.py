"""Entries that imitate what was written or selected."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlft.algorithms import credit, filtering, select, weigh
from rlft.algorithms.base import Algorithm, Credit, Loss, Need, Owned, Select, Weigh
from rlft.algorithms.catalog.base import Knobs, Where
from rlft.algorithms.losses import imitation
from rlft.algorithms.losses import policy as losses
from rlft.types import Group

Targets = Annotated[
    Literal["best", "all", "weighted"],
    Field(description="of each group: the best, all alike, or all weighted by their scores"),
]


class Supervised(Knobs):
    """What the entries share that imitate what is written in the data."""

    targets: Targets = "best"

    @property
    def source(self) -> Where:
        return "recorded"

    def unfit(self, group: Group) -> str | None:
        """A refused answer is no demonstration, unless it is weighted by its score, which is 0."""
        if self.targets == "weighted" or all(t.task.info.get("label", True) for t in group):
            return None
        return (
            "label is false, and every answer would be imitated; leave such rows out, or set algorithm.type=rejection, "
            "which keeps the accepted ones"
        )


class Sft(Supervised):
    """Supervised fine-tuning: maximum likelihood of the completion, the prompt masked out.

    `targets: weighted` is MORepair's objective (Yang et al. 2024, arXiv:2404.12636) for any number of targets.
    """

    type: Literal["sft"] = "sft"

    def build(self) -> Algorithm:
        return _supervised(self.targets, losses.likelihood, "log p")


class Ift(Supervised):
    """Intuitive fine-tuning: demonstrations, read as if the policy had said a part of them itself.

    Hua et al. 2024, arXiv:2405.11870, after the authors' code: the temporal residual connection puts a share of the
    policy's own greedy guess into the embedding of each token it goes on from, and the relation propagation counts a
    token for what goes wrong after it. Their schedule and noise for the share are off by default and not here.
    """

    type: Literal["ift"] = "ift"
    residual: float = Field(
        default=0.2, ge=0, le=1, description="the policy's own guess in each answer token's embedding; 0: as written"
    )
    propagation: float = Field(
        default=0.95, ge=0, le=1, description="how far back a token counts for the ones after it; 0: every token alike"
    )

    def build(self) -> Algorithm:
        what = (
            f"W log p(read with {self.residual:g} of its own guesses), W = its and later tokens' -log p at discount "
            f"{self.propagation:g}, over the row's mean of that"
        )
        loss = partial(imitation.propagated, gamma=self.propagation)
        return replace(_supervised(self.targets, loss, what, by_row=True), residual=self.residual)


class Dft(Supervised):
    """Dynamic fine-tuning: a token counts as much as the policy believes in it (Wu et al. 2025, arXiv:2508.05629)."""

    type: Literal["dft"] = "dft"

    def build(self) -> Algorithm:
        return _supervised(self.targets, imitation.confident, "p log p, no gradient through p")


class Rejection(Knobs):
    """Rejection sampling: sample, keep the best, imitate them (RAFT, Dong et al. 2023, arXiv:2304.06767)."""

    type: Literal["rejection"] = "rejection"
    k: int = Field(default=1, ge=1, description="how many of each group are kept at most")
    at_least: float = Field(default=1.0, description="the lowest score that is kept")

    def build(self) -> Algorithm:
        return _imitate(
            select.best(self.k, self.at_least),
            f"- mean over tokens of log p on each group's best {self.k} with a score of {self.at_least:g} up",
        )


class Raft(Knobs):
    """Reward-ranked fine-tuning: imitate the best of every task, whatever its score.

    Dong et al. 2023, arXiv:2304.06767. With `clip` RAFT++ (Xiong et al. 2025, arXiv:2504.11343): PPO's ratio and clip,
    for several steps on one batch. The authors' code takes PPO's minimum, with the score as the advantage and 0 where
    it is negative, over all samples; here as in the paper those of the highest score are kept, each with advantage 1.
    """

    type: Literal["raft"] = "raft"
    k: int = Field(default=1, ge=1, description="how many of each group are kept")
    clip: float | None = Field(
        default=None, gt=0, lt=1, description="the ratio is clipped at 1 +- clip; none: no ratio"
    )

    @property
    def group_size_min(self) -> int:
        return self.k + 1

    def build(self) -> Algorithm:
        kept = f"on each group's best {self.k}"
        if self.clip is None:
            return _imitate(select.best(self.k), f"- mean over tokens of log p {kept}")
        return _imitate(
            select.best(self.k),
            f"- mean over tokens of min(r, {1 + self.clip:g}) {kept}",
            loss=partial(losses.clipped, low=self.clip, high=self.clip),
            needs=("old_logprobs",),
        )


class ReinforcedSelfTraining(Knobs):
    """Reinforced self-training: imitate the upper part of what was sampled.

    ReST, Gulcehre et al. 2023, arXiv:2308.08998. With `thresholds` as in the paper, lowest scores that grow; the paper
    raises them over one set of samples, here new samples are drawn at each. Without, a share of the step is kept, and
    the lowest score in it grows with the policy.
    """

    type: Literal["reinforced_self_training"] = "reinforced_self_training"
    share: float = Field(default=0.25, gt=0, le=1, description="of the step's trajectories, the best, that are kept")
    at_least: float | None = Field(default=None, description="the lowest score that is kept besides; none: any")
    thresholds: tuple[float, ...] = Field(
        default=(), description="growing lowest scores, one after the other in place of at_least; the last one stays"
    )
    hold: int = Field(default=10, ge=1, description="optimizer steps for which each of the thresholds holds")

    @model_validator(mode="after")
    def _thresholds_grow(self) -> ReinforcedSelfTraining:
        if self.thresholds and self.at_least is not None:
            raise ValueError("at_least is one lowest score and thresholds are several: set one of them")
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError("thresholds must grow: put them in order, each once")
        return self

    def build(self) -> Algorithm:
        least = self.thresholds or (-math.inf if self.at_least is None else self.at_least,)
        named = ", then ".join(f"{score:g}" for score in least)
        floor = f" with a score of {named} up" if math.isfinite(least[0]) else ""
        what = f"- mean over tokens of log p on the best {self.share:.0%} of the step{floor}"
        built = _imitate(filtering.top_share(self.share, least[0]), what)
        if not self.thresholds:
            return built
        return replace(
            built,
            formula=f"{what}, {self.hold} steps each",
            owned=Owned(remembered={"steps": 0.0}),
            remember=_counted,
            revise=partial(_raised, share=self.share, thresholds=self.thresholds, hold=self.hold),
        )


class RewardWeighted(Knobs):
    """Reward-weighted regression (Peters and Schaal 2007), as RISE weighs its attempts (arXiv:2407.18219)."""

    type: Literal["reward_weighted"] = "reward_weighted"
    temperature: float = Field(default=0.5, gt=0, description="in units of the score; towards 0 only the best counts")

    @property
    def group_size_min(self) -> int:
        return 2

    def build(self) -> Algorithm:
        return _imitate(
            select.everything,
            f"- mean over rows, mean over tokens of A log p, A = n exp(score / {self.temperature:g}) / its group's sum",
            credits=partial(imitation.boltzmann, temperature=self.temperature),
            weighs=weigh.by_sequence,
        )


def _counted(numbers: Mapping[str, float], metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Optimizer steps so far; one in which nothing was kept is none."""
    return {**numbers, "steps": numbers["steps"] + 1}


def _raised(numbers: Mapping[str, float], share: float, thresholds: Sequence[float], hold: int) -> Mapping[str, Select]:
    """The filter at the threshold whose turn it is."""
    turn = min(int(numbers["steps"]) // hold, len(thresholds) - 1)
    return {"select": filtering.top_share(share, thresholds[turn])}


def _supervised(targets: Targets, loss: Loss, what: str, by_row: bool = False) -> Algorithm:
    """Recorded targets. Weighted ones are averaged each over its own tokens, so that a weight means what it says."""
    if targets == "weighted":
        formula = f"- mean over targets of score * mean over tokens of {what}"
        return _imitate(filtering.threshold(0.0), formula, loss, credit.raw, weigh.by_sequence)
    chosen: Select = select.best(1) if targets == "best" else select.everything
    mean, average = ("rows, mean over tokens", weigh.by_sequence) if by_row else ("completion tokens", weigh.by_token)
    return _imitate(chosen, f"- mean over {mean} of {what}", loss, weighs=average)


def _imitate(
    chosen: Select,
    formula: str,
    loss: Loss = losses.likelihood,
    credits: Credit = credit.uniform,
    weighs: Weigh = weigh.by_token,
    needs: tuple[Need, ...] = (),
) -> Algorithm:
    return Algorithm(chosen, credits, weighs, loss, needs, formula=formula)
