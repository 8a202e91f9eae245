"""The ways in which a judge can be asked about a group: each answer alone, in pairs, as a ranking, or by yes and no.

All requests of a group are made at once. Each way returns one verdict per answer, from 0 to 1 unless a user's `choices`
have other values; an exception where the judge failed; None where there is nothing to compare with.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rlft.rewards.base import answer
from rlft.rewards.judges import briefs, compare, replies
from rlft.rewards.judges.endpoint import Asked, Reply, Tally
from rlft.types import Group, InputError, RunError, Task

T = TypeVar("T")
LIKELIEST = 20  # the most that OpenAI gives, and vLLM unless told otherwise


class Knobs(Protocol):
    """What a judge's config says of how it is asked; see `rlft.rewards.judges.judge`."""

    rubric: str
    system: str | None
    key: str | None
    low: float
    high: float
    pattern: str | None
    opponents: int | None
    rounds: int
    choices: dict[str, float]
    mass: float
    seed: int

    @property
    def brief(self) -> str: ...


@dataclass
class Verdicts:
    """One judge's on a group. notes: by name, numbers to log of each answer, None where there is none."""

    values: Sequence[float | Exception | None]
    notes: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass
class Case:
    """A group before one judge."""

    knobs: Knobs
    group: Group
    asked: Asked
    tally: Tally

    @property
    def answers(self) -> list[str]:
        return [briefs.said(trajectory) for trajectory in self.group]

    def draw(self) -> random.Random:
        """Chance that depends on the seed and the task alone."""
        return random.Random(f"{self.knobs.seed} {self.group[0].task.id}")

    async def ask(self, read: Callable[[Reply], T], likeliest: int = 0, count: int = 1, **judged: Any) -> T:
        """The verdict on what is judged, by the names of the template's placeholders."""
        messages = told(self.knobs, self.group[0].task, count, judged)
        return await self.asked.ask(messages, read, self.tally, likeliest)


def told(knobs: Knobs, task: Task, count: int, judged: Mapping[str, str | Sequence[str]]) -> list[dict[str, str]]:
    """The messages of a request. count: answers in a ranking. judged: what stands in the template's places for it."""
    plain = {"question": briefs.question(task), "rubric": knobs.rubric, "count": count}
    plain |= {"low": f"{knobs.low:g}", "high": f"{knobs.high:g}"}
    plain |= {"reference": answer(task, knobs.key)} if knobs.key else {}
    system = [{"role": "system", "content": knobs.system}] if knobs.system else []
    return [*system, {"role": "user", "content": briefs.fill(knobs.brief, plain, judged)}]


async def pointwise(case: Case) -> Verdicts:
    """Each answer's score by the rubric."""
    read = replies.score(case.knobs.low, case.knobs.high, case.knobs.pattern)
    return Verdicts(await _all(case.ask(read, answer=text) for text in case.answers))


async def yes_probability(case: Case) -> Verdicts:
    """The judge's own probability of each word in `choices`, and what they are worth."""
    read = replies.expected(case.knobs.choices, case.knobs.mass)
    return Verdicts(await _all(case.ask(read, LIKELIEST, answer=text) for text in case.answers))


async def pairwise(case: Case) -> Verdicts:
    """Each answer's win rate over others, every pair asked in both orders. The same text twice is a tie, unasked."""
    texts, count = case.answers, len(case.group)
    if count == 1:
        return Verdicts([None])
    met = compare.pairs(count, case.knobs.opponents, case.draw())
    asked = [(a, b) for a, b in met if texts[a] != texts[b]]
    said = await _all(
        case.ask(replies.better, first=texts[x], second=texts[y]) for a, b in asked for x, y in ((a, b), (b, a))
    )
    earned: dict[compare.Pair, float | None] = dict.fromkeys(met, 0.5)
    contradicted: list[list[float]] = [[] for _ in texts]
    before: list[list[float]] = [[] for _ in texts]
    for (a, b), forth, back in zip(asked, said[::2], said[1::2], strict=True):
        if isinstance(forth, Exception) or isinstance(back, Exception):
            earned[a, b] = None
            continue
        earned[a, b], wavered = compare.settled(forth, back)
        for each in (a, b):
            contradicted[each].append(float(wavered))
            before[each].append(0.5 + (forth + back) / 4)
    values = _or_why(compare.shares(count, earned), said)
    return Verdicts(values, {"contradicted": _means(contradicted), "prefers_first": _means(before)})


async def listwise(case: Case) -> Verdicts:
    """Each answer's place in a ranking of the group, over several rounds in different orders."""
    texts, count = case.answers, len(case.group)
    if count == 1:
        return Verdicts([None])
    shown = compare.orders(count, case.knobs.rounds, case.draw())
    read = replies.ranking(count)
    said = await _all(case.ask(read, count=count, answers=tuple(texts[i] for i in order)) for order in shown)
    ranked = [
        None if isinstance(found, Exception) else [order[place] for place in found]
        for order, found in zip(shown, said, strict=True)
    ]
    return Verdicts(_or_why(compare.standings(count, ranked), said))


MODES: dict[str, Callable[[Case], Awaitable[Verdicts]]] = {
    "pointwise": pointwise,
    "pairwise": pairwise,
    "listwise": listwise,
    "yes_probability": yes_probability,
}
REQUESTS: dict[str, Callable[[Knobs, int], int]] = {  # to one judge about a group of so many answers, at most
    "pointwise": lambda knobs, count: count,
    "pairwise": lambda knobs, count: 2 * len(compare.pairs(count, knobs.opponents, random.Random(0))),
    "listwise": lambda knobs, count: knobs.rounds if count > 1 else 0,
    "yes_probability": lambda knobs, count: count,
}


def sample(mode: str, count: int, text: str) -> dict[str, str | Sequence[str]]:
    """What is judged in a request about a group of so many answers, each of which is this text."""
    if mode == "pairwise":
        return {"first": text, "second": text}
    return {"answers": (text,) * count} if mode == "listwise" else {"answer": text}


async def _all(requests: Any) -> list[Any]:
    """What each request brought, or why it failed. Raises what means the run rather than one answer."""
    found = await asyncio.gather(*requests, return_exceptions=True)
    for one in found:
        if isinstance(one, InputError | RunError) or (
            isinstance(one, BaseException) and not isinstance(one, Exception)
        ):
            raise one
    return found


def _or_why(values: Sequence[float | None], said: Sequence[Any]) -> list[float | Exception]:
    """The values, and where there is none the first failure."""
    why = next((one for one in said if isinstance(one, Exception)), None)
    return [value if value is not None else _Without(why) for value in values]


class _Without(Exception):
    """Too few verdicts on an answer."""

    def __init__(self, why: Exception | None) -> None:
        super().__init__(
            f"fewer than half of what it was asked came back; the first failure: {type(why).__name__}: {why}"
        )


def _means(parts: Sequence[Sequence[float]]) -> list[float | None]:
    return [sum(own) / len(own) if own else None for own in parts]
