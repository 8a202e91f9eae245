"""A world of five apps (mail, calendar, shop, files, payments) and a task in it, done by one call a turn.

In the spirit of AppWorld (Trivedi et al. 2024, arXiv:2407.18901), on which LOOP trains (Chen et al. 2025,
arXiv:2502.01600): the manual is read in the world, and the task is done if every change that it asks for is there and
no other. Small and made of a seed; what is left out stands in docs/envs-own.md.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from functools import cache
from typing import Literal

from pydantic import Field

from rlft.envs.own.apps.api import APPS, SHOWN, Refused, answered, manual, rendered
from rlft.envs.own.apps.calls import Call, Unreadable, call_in
from rlft.envs.own.apps.tasks import LEVELS, Made, changes, made, state_of
from rlft.envs.own.play import Move, WorldKnobs

OPENINGS = 200  # of each kind of task, the longest of which is how long one may be
RULES = (
    "You do a task for me in these apps: mail, calendar, shop, files, payments. Each answer is one call. "
    'apis.help("mail") tells what mail can do, and so for every app. When the task is done, call apis.done(), or '
    'apis.done(answer="...") where I asked something. Change nothing that I did not ask for.'
)


class Apps:
    """One task. It reports the calls that failed (`errors`), and at the end the changes that are `missing` and those
    that nobody asked for (`collateral`).
    """

    def __init__(self, task: Made, manuals: bool) -> None:
        self._task, self._manuals = task, manuals
        self._state = copy.deepcopy(task.before)
        self._errors = 0

    def opening(self) -> str:
        """The rules and the task."""
        return opened(self._task.asked.text, self._manuals)

    def move(self, text: str) -> Move:
        """What a call gives, or why it cannot be done."""
        try:
            call = call_in(text)
        except Unreadable as error:
            return self._moved(str(error), fit=False)
        try:
            if call.app == "apis":
                return self._own(call)
            return self._moved(answered(self._state, call))
        except Refused as error:
            self._errors += 1
            return self._moved(f"Error: {error}.")

    def _own(self, call: Call) -> Move:
        given = [*call.values, *call.named.values()]
        if call.function == "help" and len(given) <= 1 and set(call.named) <= {"app"}:
            return self._moved(manual(str(given[0]) if given else ""))
        if call.function == "done" and len(given) <= 1 and set(call.named) <= {"answer"}:
            return self._over(str(given[0]) if given else "")
        raise Refused("apis has help(app) and done(answer)")

    def _over(self, answer: str) -> Move:
        asked = self._task.asked
        wanted, there = changes(self._task.before, self._task.after), changes(self._task.before, self._state)
        missing, collateral = (wanted - there).total(), (there - wanted).total()
        right = asked.answer is None or answer.strip().lower() == asked.answer
        metrics = {"errors": self._errors, "missing": missing, "collateral": collateral}
        return Move(won=right and not missing and not collateral, metrics=metrics)

    def _moved(self, said: str, fit: bool = True) -> Move:
        return Move(said[:SHOWN], fit=fit, metrics={"errors": self._errors})


def opened(task: str, manuals: bool) -> str:
    """The question that opens an episode."""
    told = "".join(f"\n{manual(app)}" for app in APPS) if manuals else ""
    return f"{RULES}{told}\nTask: {task}"


@cache
def longest(level: int) -> tuple[str, ...]:
    """The longest text of each kind of task of a level."""
    seeds = range(OPENINGS)
    each = ([kind(chance, state_of(chance)).text for chance in map(random.Random, seeds)] for kind in LEVELS[level])
    return tuple(max(texts, key=len) for texts in each)


class AppsConfig(WorldKnobs):
    """Do a task in a world of several apps."""

    type: Literal["apps"] = "apps"
    level: int = Field(default=1, ge=1, le=3, description="1: one change or look, 2: something to find out, 3: several")
    manuals: bool = Field(default=False, description="the opening tells what every app can do")
    turns: int = Field(default=20, ge=2, description="the most calls")

    @property
    def answers(self) -> int:
        return self.turns

    def openings(self) -> Iterable[str]:
        for text in longest(self.level):
            yield opened(text, self.manuals)

    def replies(self) -> Iterable[str]:
        widest = made(random.Random(0), 3).before
        for records in (rendered(some) for some in widest.values() if some):
            yield (f"{records}\n" * SHOWN)[:SHOWN]
        for app in APPS:
            yield (f"Error: {manual(app)}\n" * SHOWN)[:SHOWN]

    def world(self, chance: random.Random) -> Apps:
        return Apps(made(chance, self.level), self.manuals)
