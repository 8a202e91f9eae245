"""Arithmetic step by step over a list of whole numbers, each step checked: a task whose difficulty is known.

After TInt, the traced integers of Havrilla and Iyer (2024, arXiv:2402.04004): a function of a list of integers is
computed in elementary steps, and the steps are written down as its trace. There the trace is what is learned from; here
the policy says it, a step a turn, and a wrong step is told and asked again. A draft of the trace may stand in the
question, with their two kinds of noise: static noise alters lines of the right trace, each for itself; dynamic noise
alters a step while the trace is computed, so that all later ones go on from the wrong number.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from rlft.envs.own.play import Move, WorldKnobs, last_number

Next = Callable[[int, int, int], int]  # of what there is, the next number, and its place, from 1


@dataclass(frozen=True)
class Function:
    """A function of a list, as what one step does. says: one step in words. tells: the whole in words."""

    tells: str
    says: Callable[[int, int, int], str]
    step: Next


FUNCTIONS = {
    "sum": Function("Add up", lambda a, b, i: f"{a} + {b}", lambda a, b, i: a + b),
    "alternating": Function(
        "Take away and add, by turns,",
        lambda a, b, i: f"{a} {'-' if i % 2 else '+'} {b}",
        lambda a, b, i: a - b if i % 2 else a + b,
    ),
    "maximum": Function("Find the largest of", lambda a, b, i: f"the larger of {a} and {b}", lambda a, b, i: max(a, b)),
    "modular": Function(
        "Multiply, keeping the remainder by 100 of each product,",
        lambda a, b, i: f"{a} * {b} modulo 100",
        lambda a, b, i: a * b % 100,
    ),
}
Name = Literal["sum", "alternating", "maximum", "modular"]
Draft = Literal["none", "clean", "static", "dynamic"]


def trace(function: Name, numbers: Sequence[int], noise: Callable[[int], int] | None = None) -> list[int]:
    """What there is after each step, from the first number on. noise: makes another number of a step's, and the trace
    goes on from that: dynamic noise.
    """
    step, steps = FUNCTIONS[function].step, [numbers[0]]
    for i, number in enumerate(numbers[1:], 1):
        value = step(steps[-1], number, i)
        steps.append(noise(value) if noise else value)
    return steps[1:]


class Traces:
    """One list. It reports `progress`, the share of the steps that were said, and `difficulty`: steps times digits."""

    def __init__(self, chance: random.Random, knobs: TracesConfig) -> None:
        self._function = FUNCTIONS[knobs.function]
        self._numbers = [chance.randrange(10**knobs.digits) for _ in range(knobs.numbers)]
        self._steps = trace(knobs.function, self._numbers)
        self._draft = drafted(chance, knobs, self._numbers)
        self._difficulty = float(len(self._steps) * knobs.digits)
        self._turns, self._said = knobs.answers, 0

    def opening(self) -> str:
        """The list, the draft if there is one, and the first step."""
        numbers = ", ".join(map(str, self._numbers))
        return (
            f"{self._function.tells} these numbers from left to right: {numbers}. Do one step at a time, in at most "
            f"{self._turns} answers, each of which is one number.{told(self._draft)}\nStep 1: {self._asked()} = ?"
        )

    def move(self, text: str) -> Move:
        """The next step, or the same again."""
        number = last_number(text)
        if number is None:
            return self._answered(f"Answer with one number.\n{self._step()}", fit=False)
        if number != self._steps[self._said]:
            return self._answered(f"No, that is too {'large' if number > self._steps[self._said] else 'small'}.\n")
        self._said += 1
        return self._answered("Right.\n", won=self._said == len(self._steps) or None)

    def _answered(self, said: str, won: bool | None = None, fit: bool = True) -> Move:
        metrics = {"progress": self._said / len(self._steps), "difficulty": self._difficulty}
        return Move(said if won or not fit else said + self._step(), won=won, fit=fit, metrics=metrics)

    def _step(self) -> str:
        return f"Step {self._said + 1}: {self._asked()} = ?"

    def _asked(self) -> str:
        i = self._said
        before = self._steps[i - 1] if i else self._numbers[0]
        return self._function.says(before, self._numbers[i + 1], i + 1)


def told(draft: Sequence[int]) -> str:
    """The draft in the question."""
    return f"\nSomebody's notes, which may be wrong: {', '.join(map(str, draft))}." if draft else ""


def drafted(chance: random.Random, knobs: TracesConfig, numbers: Sequence[int]) -> list[int]:
    """The trace as somebody else wrote it, with the noise that was asked for; the last step is always left out."""

    def noisy(value: int) -> int:
        return value + chance.choice((-1, 1)) * chance.randint(1, 9) if chance.random() < knobs.noise else value

    kinds: dict[Draft, Callable[[], list[int]]] = {
        "none": list,
        "clean": lambda: trace(knobs.function, numbers),
        "static": lambda: [noisy(value) for value in trace(knobs.function, numbers)],
        "dynamic": lambda: trace(knobs.function, numbers, noisy),
    }
    return kinds[knobs.draft]()[:-1]


class TracesConfig(WorldKnobs):
    """Say the trace of a function of whole numbers, a step a turn."""

    type: Literal["traces"] = "traces"
    function: Name = Field(
        default="sum", description="sum, alternating (- and + by turns), maximum, or modular products"
    )
    numbers: int = Field(default=4, ge=2, le=100, description="of the list; one step fewer")
    digits: int = Field(default=1, ge=1, le=6, description="of each number, at most")
    mistakes: int = Field(default=2, ge=0, description="answers beside one for each step")
    draft: Draft = Field(
        default="none",
        description="a trace shown in the question, without its last step: none, clean, static (lines altered), or "
        "dynamic (errors that the later steps go on from)",
    )
    noise: float = Field(default=0.3, ge=0, le=1, description="share of the draft's steps that are altered")

    @property
    def answers(self) -> int:
        return self.numbers - 1 + self.mistakes

    def openings(self) -> Iterable[str]:
        world = self.world(random.Random(0))
        for sign in ("", "-"):
            world._numbers = [int("9" * self.digits)] * self.numbers
            world._steps = [int(f"{sign}{'9' * self._longest}")] * (self.numbers - 1)
            world._draft = world._steps[:-1] if self.draft != "none" else []
            yield world.opening()

    def replies(self) -> Iterable[str]:
        step, own = FUNCTIONS[self.function].says, int("9" * self.digits)
        for sign in (-1, 1):
            for i in (1, 2):
                asked = f"Step {self.numbers}: {step(sign * int('9' * self._longest), own, i)} = ?"
                yield f"Answer with one number.\n{asked}"
                yield f"No, that is too large.\n{asked}"
                yield f"Right.\n{asked}"

    @property
    def _longest(self) -> int:
        """Digits of the largest number of a trace: that of a sum, with the noise of every step."""
        return len(str(self.numbers * (10**self.digits + 9) + 100))

    def world(self, chance: random.Random) -> Traces:
        return Traces(chance, self)
