"""Language models as judges: one or several, behind any OpenAI-compatible endpoint, a local vLLM's included.

LLM-as-a-judge: Zheng et al., arXiv:2306.05685. A panel of several judges whose verdicts are aggregated errs less than
one, and not in one direction: MultiCritique (arXiv:2410.15287) for critiques, PoLL (arXiv:2404.18796) for scores.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from rlft.rewards.base import KEY_HELP, Config
from rlft.rewards.judges import briefs
from rlft.rewards.judges.cache import Cache
from rlft.rewards.judges.endpoint import Asked, Endpoint, Tally
from rlft.rewards.judges.modes import MODES, Case, Verdicts
from rlft.types import Group, Reward, RunError

LOGGED = (
    "requests",
    "cached",
    "tokens_in",
    "tokens_out",
    "cost",
    "uncounted",
    "spread",
    "contradicted",
    "prefers_first",
)
ONLY = {  # options that one mode alone reads
    "low": "pointwise",
    "high": "pointwise",
    "pattern": "pointwise",
    "opponents": "pairwise",
    "rounds": "listwise",
    "choices": "yes_probability",
    "mass": "yes_probability",
}


def _judge_name(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name) or name in LOGGED:
        raise ValueError(f"'{name}' cannot name a judge, being logged as reward/<term>/<judge>; choose another name")
    return name


class LlmJudge(Config):
    """What one or several language models, asked over HTTP, think of the answers."""

    type: Literal["judge"] = "judge"
    judges: dict[Annotated[str, AfterValidator(_judge_name)], Endpoint] = Field(
        min_length=1, description="The models that judge, by names of your choice."
    )
    mode: Literal["pointwise", "pairwise", "listwise", "yes_probability"] = Field(
        default="pointwise",
        description="A score by the rubric; a win rate over the group's other answers; a place in a ranking of the "
        "group; the judge's probability of Yes.",
    )
    rubric: str = Field(
        default="The answer is correct, complete and clear.", description="What counts, in words for the judge."
    )
    template: str | None = Field(
        default=None, description="What the judge is told, with placeholders in braces. None: the mode's own."
    )
    system: str | None = Field(default=None, description="A system message for the judge.")
    key: str | None = Field(default=None, description=KEY_HELP + " The judge compares with it. None: it has none.")
    low: float = Field(default=1.0, allow_inf_nan=False, description="The worst score; it becomes 0.")
    high: float = Field(default=10.0, allow_inf_nan=False, description="The best score; it becomes 1.")
    pattern: str | None = Field(
        default=None, description="Regular expression whose one group is the score, for templates that ask for no JSON."
    )
    opponents: int | None = Field(
        default=None, ge=1, description="How many others each answer is compared with. None: all of the group."
    )
    rounds: int = Field(default=2, ge=1, description="Rankings of the same group, in different orders.")
    choices: dict[str, float] = Field(
        default_factory=lambda: {"yes": 1.0, "no": 0.0},
        min_length=2,
        description="Words of one token, whatever their case, and what each is worth.",
    )
    mass: float = Field(default=0.5, ge=0, le=1, description="The least probability of all `choices` together.")
    combine: Literal["mean", "median", "min"] = Field(default="mean", description="How judges are aggregated.")
    quorum: int | None = Field(
        default=None, ge=1, description="How many judges must have a verdict on an answer. None: all."
    )
    cache: str | None = Field(
        default=None,
        description="A file on a local disk for answers, relative to where rlft starts. None: none are kept.",
    )
    budget: float | None = Field(
        default=None, gt=0, description="What a session may cost, in the currency of the prices; then the run stops."
    )
    seed: int = Field(default=0, description="Of the pairs that are drawn, and of the orders in rankings.")

    @property
    def brief(self) -> str:
        """The template that is used."""
        return self.template if self.template is not None else briefs.template(self.mode, self.key is not None)

    @model_validator(mode="after")
    def _fits(self) -> LlmJudge:
        fields = type(self).model_fields
        for option, mode in ONLY.items():
            if mode != self.mode and getattr(self, option) != fields[option].get_default(call_default_factory=True):
                raise ValueError(f"{option}: only the mode {mode} reads it, and the mode is {self.mode}; remove it")
        if self.low >= self.high:
            raise ValueError(f"high ({self.high:g}) must be larger than low ({self.low:g})")
        if self.combine == "min" and any(judge.weight != 1 for judge in self.judges.values()):
            raise ValueError("judges: the least of several verdicts has no weights; remove `weight`, or `combine: min`")
        if self.quorum is not None and self.quorum > len(self.judges):
            raise ValueError(f"quorum: {self.quorum} of {len(self.judges)} judges can never have a verdict")
        if len({word.strip().lower() for word in self.choices}) < len(self.choices):
            raise ValueError("choices: two of them are the same word but for case and spaces")
        return self

    @model_validator(mode="after")
    def _readable(self) -> LlmJudge:
        known, used = briefs.HOLES[self.mode], briefs.holes(self.brief)
        if strange := sorted(used - known):
            raise ValueError(
                f"template: no placeholder {{{strange[0]}}} in the mode {self.mode}; it has "
                + ", ".join(f"{{{hole}}}" for hole in sorted(known))
            )
        if lacking := sorted(known.intersection(briefs.JUDGED) - used):
            raise ValueError(f"template: {{{lacking[0]}}} is missing, so the judge would not see what it judges")
        if ("reference" in used) != (self.key is not None):
            raise ValueError("template: {reference} is what the column `key` holds; give both or neither")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern: not a valid regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"pattern: it has {groups} groups; put the score, and nothing else, in ( )")
        return self

    def judge(self, name: str) -> Reward:
        cache = Cache(Path(self.cache)) if self.cache is not None else None
        panel = {key: Asked(endpoint, cache) for key, endpoint in self.judges.items()}
        spent = 0.0

        async def judge(group: Group) -> Sequence[Any]:
            nonlocal spent
            if self.budget is not None and spent >= self.budget:
                raise RunError(
                    f"the reward '{name}' has cost {spent:.4g}, and `budget` allows {self.budget:g}. Raise it and go "
                    "on with `rlft resume`, or choose cheaper judges."
                )
            tally = Tally()
            try:
                asking = [MODES[self.mode](Case(self, group, asked, tally)) for asked in panel.values()]
                found = dict(zip(panel, await asyncio.gather(*asking), strict=True))
            finally:
                spent += tally.cost
            self._log(name, group, found, tally)
            return [self._combined({key: own.values[i] for key, own in found.items()}) for i in range(len(group))]

        return judge

    def _combined(self, said: dict[str, float | Exception | None]) -> float | Exception | None:
        """One verdict from those of all judges; where too few have one, why the first has none."""
        there = [(value, self.judges[key].weight) for key, value in said.items() if isinstance(value, float | int)]
        if len(there) >= (self.quorum or len(self.judges)):
            return COMBINED[self.combine](there)
        return next((value for value in said.values() if isinstance(value, Exception)), None)

    def _log(self, name: str, group: Group, found: dict[str, Verdicts], tally: Tally) -> None:
        """Each judge's verdict, how far they are apart, what the mode notes, and each answer's part of what it cost."""
        for i, trajectory in enumerate(group):
            for stale in [key for key in trajectory.metrics if key.startswith(f"reward/{name}/")]:
                del trajectory.metrics[stale]
            own = {key: verdicts.values[i] for key, verdicts in found.items()}
            there = {key: float(value) for key, value in own.items() if isinstance(value, float | int)}
            numbers = _costs(tally, len(group), any(j.price_in or j.price_out for j in self.judges.values()))
            if len(self.judges) > 1:
                numbers |= there
                numbers |= {"spread": max(there.values()) - min(there.values())} if len(there) > 1 else {}
            for note in {note for verdicts in found.values() for note in verdicts.notes}:
                noted = [value for verdicts in found.values() if (value := verdicts.notes[note][i]) is not None]
                numbers |= {note: math.fsum(noted) / len(noted)} if noted else {}
            trajectory.metrics.update({f"reward/{name}/{key}": value for key, value in numbers.items()})


def _costs(tally: Tally, count: int, priced: bool) -> dict[str, float]:
    """One answer's part of what its group cost."""
    found: dict[str, Any] = {"requests": tally.requests, "cached": tally.kept}
    found |= {"tokens_in": tally.tokens_in, "tokens_out": tally.tokens_out}
    found |= {"cost": tally.cost} if priced else {}
    found |= {"uncounted": tally.uncounted} if tally.uncounted else {}
    return {key: value / count for key, value in found.items()}


def _mean(said: Sequence[tuple[float, float]]) -> float:
    return math.fsum(value * weight for value, weight in said) / math.fsum(weight for _, weight in said)


def _median(said: Sequence[tuple[float, float]]) -> float:
    """Where half of the weight is below and half above; between two values where it is exactly so."""
    ordered = sorted(said)
    half, below = math.fsum(weight for _, weight in ordered) / 2, 0.0
    for i, (value, weight) in enumerate(ordered):
        below += weight
        if math.isclose(below, half):
            return (value + ordered[i + 1][0]) / 2
        if below > half:
            return value
    raise AssertionError("the whole weight is more than half of it")


COMBINED: dict[str, Callable[[Sequence[tuple[float, float]]], float]] = {
    "mean": _mean,
    "median": _median,
    "min": lambda said: min(value for value, _ in said),
}
