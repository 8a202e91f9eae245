"""Rewards that compare the completion with the right answer as text, or as a number that stands in the text.

Numbers are decimals and compared exactly, so that 0.1 is 0.1 and an integer of any length equals itself. They are
read, not worked out: "3/4" holds a 3 and a 4. What has to be worked out is for the `math` reward.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Literal

from pydantic import Field

from rlft.rewards.base import KEY_HELP, Config, answer, each, final
from rlft.types import InputError, Reward, Task, Trajectory

MINUS = "-\u2212\u2013\ufe63\uff0d"  # the hyphen first, lest a character class take it for a range
CURRENCY = "$€£¥₹"
# A sign after a digit, a letter or a closing bracket is an operator: "7-5" holds 7 and 5.
# A digit after a Latin letter belongs to a word: "H2O" holds no number. Other scripts write no space before numbers.
NUMBER = re.compile(
    rf"""
    (?: (?<![\dA-Za-z_)\]}}]) (?P<sign>[{MINUS}+]) [{CURRENCY}]? )?
    (?<![\dA-Za-z_]) (?<!\d\.)
    (?P<digits>
        (?!0) \d{{1,3}} (?: [,\u00a0\u2009\u202f] \d{{3}} )+ (?!\d) (?: \.\d+ )?    # 1,234.5 and the narrow spaces
      | \d+ (?: \.\d+ )?
      | \.\d+
    )
    (?: [eE] (?P<power>[{MINUS}+]?\d{{1,4}}) (?![\dA-Za-z_]) )?
    """,
    re.VERBOSE,
)
EXPONENT = re.compile(rf"\^\{{?[{MINUS}+]?\d+\}}?")  # the 2 of "12 cm^2" is not the answer


class Exact(Config):
    """1 if the completion is the right answer, character for character, else 0."""

    type: Literal["exact"] = "exact"
    key: str = Field(default="answer", description=KEY_HELP)
    strip: bool = Field(default=True, description="Leave out white space at both texts' ends.")
    ignore_case: bool = Field(default=False, description="Take capital and small letters as equal.")

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> float:
            gold = answer(trajectory.task, self.key)
            return float(self._compared(gold) == self._compared(trajectory.completion))

        return each(verdict)

    def said(self, trajectory: Trajectory) -> str | None:
        return self._compared(trajectory.completion) or None

    def _compared(self, text: str) -> str:
        """What counts of a text."""
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class Number(Config):
    """1 if the last number in the completion (or the first, or the only one) is the right one, else 0."""

    type: Literal["number"] = "number"
    key: str = Field(default="answer", description=KEY_HELP)
    which: Literal["last", "first", "only"] = Field(
        default="last", description="Which number of the completion counts. `only`: with two or more the value is 0."
    )
    tolerance: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Largest absolute difference that still counts as equal."
    )

    def judge(self, name: str) -> Reward:
        tolerance = Decimal(repr(self.tolerance))

        def verdict(trajectory: Trajectory) -> float:
            gold = right_number(trajectory.task, self.key)
            said = self.said(trajectory)
            return float(said is not None and abs(said - gold) <= tolerance)

        return each(verdict)

    def said(self, trajectory: Trajectory) -> Decimal | None:
        found = numbers_in(trajectory.completion)
        if not found or (self.which == "only" and len(found) > 1):
            return None
        return found[0] if self.which == "first" else found[-1]

    def same(self) -> Callable[[Decimal, Decimal], Awaitable[bool]]:
        tolerance = Decimal(repr(self.tolerance))

        async def same(one: Decimal, other: Decimal) -> bool:
            return abs(one - other) <= tolerance

        return same


def numbers_in(text: str) -> list[Decimal]:
    """The numbers that stand in a text, in order.

    Signs (also typographic ones), decimals, thousands separators (comma, narrow or no-break space) and powers like
    2e-3 are read; currency and percent signs are not part of the value: "50%" is 50.
    """
    return [_decimal(match) for match in NUMBER.finditer(EXPONENT.sub(" ", text))]


def right_number(task: Task, key: str) -> Decimal:
    """The task's answer as a number, alone or behind the `####` of a worked solution.

    Raises InputError where it is missing or is not one number and nothing else.
    """
    text = answer(task, key)
    match = NUMBER.fullmatch(final(text).strip().lstrip(CURRENCY).rstrip(f". %{CURRENCY}"))
    if match is None:
        raise InputError(
            f"task '{task.id}': column '{key}' holds {text!r}, which is not a number. Repair that row, set the "
            "reward's `key` to the column that holds the number, or use `type: math` for fractions and formulas."
        )
    return _decimal(match)


def _decimal(match: re.Match[str]) -> Decimal:
    sign = "-" if match["sign"] and match["sign"] in MINUS else ""
    power = re.sub(f"[{MINUS}]", "-", match["power"] or "0")
    digits = re.sub(r"[^\d.]", "", match["digits"])
    return Decimal(f"{sign}{digits}e{power}")
