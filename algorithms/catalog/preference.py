"""Entries that learn from preference pairs: recorded ones, or the best and the worst of a group of rollouts."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlft.algorithms import credit, pairing, weigh
from rlft.algorithms.base import Algorithm, Loss, Prepare, Select, unchanged
from rlft.algorithms.catalog.base import Knobs
from rlft.algorithms.losses import divergence, policy
from rlft.algorithms.losses import preference as losses
from rlft.types import Draw

SMOOTHED = ("sigmoid", "sigmoid_norm", "exo_pair", "robust", "aot", "aot_unpaired")
DIVERGING = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
SEPARABLE = ("aot_unpaired", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "sft")
NAMES = (*losses.TERMS, "sft")


class Paired(Knobs):
    """What all of them share: pairs of a group, by their totals."""

    beta: float = Field(default=0.1, gt=0, description="how much a log-ratio counts: the strength of the leash")
    pairs: Literal["best_and_worst", "all"] = Field(default="best_and_worst", description="of each group")
    min_margin: float = Field(default=0.0, ge=0, description="groups (pairs) whose totals are less apart are dropped")

    @property
    def group_size_min(self) -> int:
        return 2

    @property
    def unit(self) -> int:
        return 2

    def select(self) -> Select:
        """The pairing that was chosen."""
        pick = pairing.best_and_worst if self.pairs == "best_and_worst" else pairing.all_pairs
        return pick(self.min_margin)


def _names(value: Any) -> tuple[str, ...]:
    """One name or a list of them, each known."""
    names = tuple(value) if isinstance(value, list | tuple) else (value,) if value else ()
    if not names:
        raise ValueError("name at least one loss")
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, 1, 0.0)[0]
            raise ValueError(f"there is no loss {name!r}; the nearest is {near!r}, the others are {', '.join(NAMES)}")
    return names


class Dpo(Paired):
    """Direct preference optimization and its relatives (Rafailov et al. 2023, arXiv:2305.18290), losses as in TRL."""

    type: Literal["dpo"] = "dpo"
    loss: tuple[str, ...] = Field(default=("sigmoid",), description="a name, or a list of names that are added up")
    loss_weights: tuple[float, ...] | None = Field(default=None, description="one per loss; none: 1 each")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="the share of labels taken to be wrong")
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="the regulariser, as in f-DPO"
    )
    f_alpha: float = Field(default=0.5, description="coefficient of the alpha divergence")
    ld_alpha: float = Field(
        default=1.0, ge=0, le=1, description="LD-DPO: what a token beyond the shorter side's length counts"
    )
    discopop_tau: float = Field(default=0.05, gt=0, lt=1, description="discopop: temperature of its modulation")
    use_weighting: bool = Field(default=False, description="WPO: weigh pairs by how likely the policy finds them")
    reference_free: bool = Field(default=False, description="take the reference to be uniform; saves its forward pass")

    @field_validator("loss", mode="before")
    @classmethod
    def _known(cls, value: Any) -> tuple[str, ...]:
        return _names(value)

    @model_validator(mode="after")
    def _fits(self) -> Dpo:
        for wrong, reason in self._conflicts():
            if wrong:
                raise ValueError(reason)
        return self

    def _conflicts(self) -> list[tuple[object, str]]:
        """What cannot go together, each with the reason."""
        named = set(self.loss)
        weights, listed = self.loss_weights, ", ".join(self.loss)
        unsmoothed = self.label_smoothing and not named & set(SMOOTHED)
        return [
            (len(named) < len(self.loss), f"loss: {listed} names one twice"),
            (
                weights is not None and len(weights) != len(self.loss),
                f"loss_weights: {len(weights or ())} for {len(self.loss)} losses; give one each",
            ),
            (named == {"sft"}, "loss: sft alone is `type: sft`; here it is added to a loss on pairs"),
            (unsmoothed, f"label_smoothing: {listed} has no use for it; {', '.join(SMOOTHED)} have"),
            (
                "robust" in named and not self.label_smoothing,
                "label_smoothing: robust corrects for flipped labels; with 0 it is sigmoid. Set the share, e.g. 0.1",
            ),
            (
                "exo_pair" in named and not self.label_smoothing,
                "label_smoothing: exo_pair takes its logarithm, so it must be above 0; its paper recommends 1e-3",
            ),
            (
                self.f_divergence != "reverse_kl" and named - set(DIVERGING),
                f"f_divergence: {self.f_divergence} leaves a term of the prompt that cancels only in the difference of "
                f"the two sides; of the losses, {', '.join(DIVERGING)} take that difference",
            ),
            (
                self.use_weighting and named & {"aot", "aot_unpaired", "sft"},
                "use_weighting: aot sorts pairs, and sft averages over tokens; neither leaves a pair to weigh",
            ),
            (
                "aot_unpaired" in named and named - set(SEPARABLE),
                f"loss: aot_unpaired pairs rows anew by rank; it goes with {', '.join(SEPARABLE[1:])} only",
            ),
            (
                "aot_unpaired" in named and self.ld_alpha != 1,
                "ld_alpha: aot_unpaired pairs rows anew, so the two sides answer different prompts; set it to 1",
            ),
        ]

    def build(self) -> Algorithm:
        weights = self.loss_weights or (1.0,) * len(self.loss)
        each = dict(zip(self.loss, weights, strict=True))
        term: Loss = partial(
            losses.preference,
            terms=[(name, weight) for name, weight in each.items() if name != "sft"],
            shape=losses.Shape(self.beta, self.label_smoothing, self.discopop_tau),
            score=divergence.score(self.f_divergence, self.f_alpha),
            tail=self.ld_alpha,
            reference=not self.reference_free,
            weighted=self.use_weighting,
        )
        ranked = {"aot", "aot_unpaired"} & set(self.loss)
        reference = () if self.reference_free else ("ref_logprobs",)
        summed = " + ".join(f"{weight:g} {name}" if weight != 1 else name for name, weight in each.items())
        return Algorithm(
            select=self.select(),
            credit=credit.uniform,
            weigh=weigh.by_sequence,
            loss=_with_nll(term, each.get("sft", 0.0)),
            needs=(*reference, "now_logprobs") if ranked else reference,
            unit=2,
            dense=True,
            formula=f"mean over pairs of {summed}, beta = {self.beta:g}, on log-ratios to "
            + ("a uniform reference" if self.reference_free else "the reference"),
            prepare=self._prepare(bool(each.get("sft"))),
            distributions=self.use_weighting,
        )

    def _prepare(self, nll: bool) -> Prepare:
        """What the losses need of the whole step."""
        reference = not self.reference_free
        steps = {
            "aot_unpaired": partial(losses.pair_by_rank, reference=reference),
            "aot": partial(losses.rank_baseline, tail=self.ld_alpha, reference=reference),
        }
        wanted = [prepare for name, prepare in steps.items() if name in self.loss]
        return losses.in_turn(*wanted, *([losses.average_chosen] if nll else []))


class StepDpo(Paired):
    """DPO on single steps: pairs that part at one step and end differently (Setlur et al. 2024, arXiv:2406.14532)."""

    type: Literal["step_dpo"] = "step_dpo"
    pairs: Literal["latest_fork"] = Field(default="latest_fork", description="of each group")  # type: ignore[assignment]
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="the share of labels taken to be wrong")
    branches: int = Field(
        default=0, ge=0, description="further episodes of a task, which branch off from its own where least expected"
    )
    branch_at: Literal["turn", "token"] = Field(
        default="turn", description="they branch off at the beginning of a turn, or at any token"
    )

    def build(self) -> Algorithm:
        shape = losses.Shape(self.beta, self.label_smoothing)
        return Algorithm(
            draws=(Draw(count=self.branches, branch=self.branch_at),) if self.branches else (),
            select=pairing.forks(self.min_margin),
            credit=credit.uniform,
            weigh=weigh.by_sequence,
            loss=partial(losses.preference, terms=[("sigmoid", 1.0)], shape=shape),
            needs=("ref_logprobs",),
            unit=2,
            dense=True,
            formula=f"- mean over pairs of log sigmoid({self.beta:g} (log-ratio of chosen - log-ratio of rejected)), "
            "from the token on at which they part",
        )


class Contrasted(Paired):
    """Log-probs of the policy alone: no reference, no extra forward pass."""

    nll: float = Field(default=0.0, ge=0, description="coefficient of the chosen side's likelihood")
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="the share of labels taken to be wrong")
    alpha: float = Field(default=0.0, description="AlphaPO's shape of the reward, (1 - p^-alpha) / alpha; 0: log p")

    def contrasted(self, term: Any, average: bool, formula: str) -> Algorithm:
        """The algorithm with a term of the margin."""
        loss = partial(losses.contrast, term=term, beta=self.beta, average=average, alpha=self.alpha)
        return _without_reference(self.select(), loss, self.nll, formula)


class Simpo(Contrasted):
    """Simple preference optimization: mean log-prob as reward, and a target margin (Meng et al. 2024,
    arXiv:2405.14734); with `alpha` AlphaPO (Gupta et al. 2025, arXiv:2501.03884)."""

    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0, description="how much a mean log-prob counts")
    gamma: float = Field(default=1.0, ge=0, description="the margin of rewards that is aimed at")

    def build(self) -> Algorithm:
        term = partial(_simpo, beta=self.beta, gamma=self.gamma, smoothing=self.label_smoothing)
        score = "reward" if self.alpha else "mean log p"
        return self.contrasted(
            term,
            True,
            f"- mean over pairs of log sigmoid({self.beta:g} ({score} of chosen - of rejected) - {self.gamma:g})",
        )


class Cpo(Contrasted):
    """Contrastive preference optimization (Xu et al. 2024, arXiv:2401.08417), losses as in TRL."""

    type: Literal["cpo"] = "cpo"
    loss: Literal["sigmoid", "hinge", "ipo", "simpo"] = Field(
        default="sigmoid", description="of the margin; ipo and simpo average log-probs over tokens"
    )
    gamma: float = Field(default=0.5, ge=0, description="simpo: the margin of rewards that is aimed at")
    nll: float = Field(default=1.0, ge=0, description="coefficient of the chosen side's likelihood")

    @model_validator(mode="after")
    def _fits(self) -> Cpo:
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing: {self.loss} has no use for it; sigmoid and simpo have")
        return self

    def build(self) -> Algorithm:
        beta = self.beta
        terms = {
            "sigmoid": partial(_simpo, beta=beta, gamma=0.0, smoothing=self.label_smoothing),
            "simpo": partial(_simpo, beta=beta, gamma=self.gamma, smoothing=self.label_smoothing),
            "hinge": partial(_hinge, beta=beta),
            "ipo": partial(losses.squared, beta=beta),
        }
        average = self.loss in ("ipo", "simpo")
        score = "mean log p" if average else "log p"
        return self.contrasted(
            terms[self.loss], average, f"mean over pairs of {self.loss} of {beta:g} ({score} of chosen - of rejected)"
        )


class Orpo(Paired):
    """Odds ratio preference optimization: likelihood of the chosen side, and the odds of both (Hong et al. 2024,
    arXiv:2403.07691)."""

    type: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0, description="weight of the odds ratio; the paper's lambda")
    nll: float = Field(default=1.0, ge=0, description="coefficient of the chosen side's likelihood")

    def build(self) -> Algorithm:
        formula = f"- {self.beta:g} mean over pairs of log sigmoid(log odds of chosen - log odds of rejected)"
        return _without_reference(self.select(), partial(losses.odds_ratio, beta=self.beta), self.nll, formula)


def _simpo(margin: Any, beta: float, gamma: float, smoothing: float) -> Any:
    return losses.logistic(beta * margin - gamma, smoothing)


def _hinge(margin: Any, beta: float) -> Any:
    return losses.hinge(beta * margin)


def _with_nll(loss: Loss, coefficient: float) -> Loss:
    """The loss and, where it counts, the likelihood of the chosen side."""
    return policy.total(loss, partial(losses.chosen_nll, coefficient=coefficient)) if coefficient else loss


def _without_reference(select: Select, loss: Loss, nll: float, formula: str) -> Algorithm:
    return Algorithm(
        select=select,
        credit=credit.uniform,
        weigh=weigh.by_sequence,
        loss=_with_nll(loss, nll),
        unit=2,
        dense=True,
        formula=formula + (f" - {nll:g} mean over the chosen sides' tokens of log p" if nll else ""),
        prepare=losses.average_chosen if nll else unchanged,
    )
