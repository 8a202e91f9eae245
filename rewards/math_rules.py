"""What two answers must share to be equal, and what can be said of that without algebra.

Plain numbers are compared here, exactly or to so many decimals; units are told apart here; and what is left over goes
to math-verify as pairs of formulas, any of which may be equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from rlft.rewards.base import final
from rlft.rewards.math_text import Answer, close, raw_answer, right_answer, said_answer

Pairs = list[tuple[str, str]]
SPACED = re.compile(r"(?![-+]?\d{1,3}(?: \d{3})+$)[-+]?[\d.]+(?: [-+]?[\d.]+)+")  # math-verify takes the sum
PRIORITY = {"prefer": 0, "only": 0, "ignore": -1}  # of boxes, for math-verify


@dataclass(frozen=True)
class Rules:
    """The options of the reward `math` that say what is read and what is equal; see there."""

    extract: tuple[str, ...] = ("latex", "expression")
    boxed: Literal["prefer", "only", "ignore"] = "prefer"
    strict: bool = True
    rounding: int = 6
    units: Literal["agree", "ignore", "require"] = "agree"
    percent: Literal["either", "value"] = "either"
    relations: bool = False

    def options(self) -> dict[str, Any]:
        """What the worker needs to know."""
        same = {"strict": self.strict, "rounding": self.rounding, "percent": self.percent, "sets": self.relations}
        return {"extract": list(self.extract), "boxed": PRIORITY[self.boxed], **same}

    def said(self, completion: str) -> Answer:
        """The answer in a completion."""
        if "latex" not in self.extract or self.boxed == "ignore":
            return raw_answer(completion)
        return said_answer(completion, box_only=self.boxed == "only")

    def right(self, gold: str) -> Answer:
        """The answer that a task holds: alone, in a box, or behind the `####` of a worked solution."""
        gold = final(gold)
        return right_answer(gold) if "latex" in self.extract else raw_answer(gold)

    def decide(self, right: Answer, said: Answer) -> str | Pairs:
        """`equal`, `different`, `nothing` (none was said), `unreadable` (none is right), or what math-verify is to
        compare."""
        if not right.latex.strip():
            return "unreadable"
        if not said.latex.strip() or (self.boxed == "only" and said.place != "box"):
            return "nothing"
        if self._apart(right, said) or (SPACED.fullmatch(said.latex) and said.latex != right.latex):
            return "different"
        scale = said.unit.size / right.unit.size if self.units != "ignore" and right.unit and said.unit else Fraction(1)
        if right.number is not None and said.number is not None:
            scaled = replace(said, number=said.number * scale, exact=said.exact and scale == 1)
            return "equal" if self._same(right, scaled) else "different"
        if right.latex == said.latex and right.percent == said.percent and scale == 1 and re.search(r"\d", said.latex):
            return "equal"
        return _pairs(right, said, scale)

    def _apart(self, right: Answer, said: Answer) -> bool:
        """Whether the units alone make them different."""
        if self.units == "ignore" or right.unit is None:
            return False
        if said.unit is None:
            return self.units == "require"
        return right.unit.kind != said.unit.kind

    def _same(self, right: Answer, said: Answer) -> bool:
        """Whether two numbers are equal; what has no decimal point is exact."""
        assert right.number is not None
        assert said.number is not None
        shares = {(right.number, said.number)}
        if right.percent != said.percent:
            worth = tuple(
                answer.number / 100 if answer.percent else answer.number
                for answer in (right, said)
                if answer.number is not None
            )
            shares = {worth} if self.percent == "value" else {worth, *shares}
        exact = right.exact and said.exact
        return any(gold == other if exact else close(gold, other, self.rounding) for gold, other in shares)


def _pairs(right: Answer, said: Answer, scale: Fraction) -> Pairs:
    """Formulas to compare. Where one names a unit and the other none, it may have been none: 3 m is three times m."""
    if said.place == "prose" or right.place == "prose":
        return [(_formula(right), _formula(said))]
    if scale != 1:
        scaled = rf"\frac{{{scale.numerator}}}{{{scale.denominator}}} \cdot ({said.latex})"
        return [(_formula(right), _formula(replace(said, latex=scaled)))]
    pairs = [(_formula(right), _formula(said))]
    if (right.unit is None) != (said.unit is None):
        pairs.append((f"${right.whole}$", f"${said.whole}$"))
    return pairs


def _formula(answer: Answer) -> str:
    """As math-verify reads it. A percent sign it knows behind a formula, not in one (latex2sympy2_extended 1.11)."""
    if answer.place == "prose":
        return answer.whole
    return f"${answer.latex}$" + " percent" * answer.percent
