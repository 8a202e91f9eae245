"""Small formulas over numbers, worked out exactly and without `eval`: a + b*c, comb(n, 2), a > b and a % 2 == 0.

Only what is listed here can stand in one; everything else is refused when it is read. Numbers are fractions, so that
0.1 + 0.2 is 0.3, and none may grow past what a problem for people needs.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

BITS = 512  # of a numerator or a denominator
LONGEST = 500  # characters


class Refused(ValueError):
    """A formula that cannot be read, or not be worked out for these numbers."""


def _whole(*values: Fraction) -> list[int]:
    if any(value.denominator != 1 for value in values):
        raise Refused("it needs whole numbers")
    return [int(value) for value in values]


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    (power,) = _whole(exponent)
    if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > BITS:
        raise Refused("a power of it is too large")
    return Fraction(base) ** power


def _of_whole(work: Callable[..., int], most: int = 10**9) -> Callable[..., Fraction]:
    def worked(*values: Fraction) -> Fraction:
        numbers = _whole(*values)
        if any(abs(number) > most for number in numbers):
            raise Refused(f"a number in it is beyond {most}")
        return Fraction(work(*numbers))

    return worked


BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
CALLS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "floor": math.floor,
    "ceil": math.ceil,
    "gcd": _of_whole(math.gcd),
    "lcm": _of_whole(math.lcm),
    "comb": _of_whole(math.comb, most=200),
    "perm": _of_whole(math.perm, most=50),
    "factorial": _of_whole(math.factorial, most=50),
}


class Formula:
    """One that has been read. names: of the numbers that it needs. imported: functions that Python has in `math`.

    Raises Refused where it holds anything that is not in the tables above.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > LONGEST:
            raise Refused(f"{text[:40]!r}... is longer than {LONGEST} characters")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise Refused(f"{text!r} is no formula: {error}") from error
        self.names: set[str] = set()
        self.imported: set[str] = set()
        self._check(self._tree)

    def __call__(self, numbers: Mapping[str, Fraction]) -> Any:
        """Its value, a Fraction or a bool. Raises Refused where there is none."""
        try:
            value = self._value(self._tree, numbers)
        except (ArithmeticError, ValueError, TypeError) as error:
            raise Refused(f"{self.text!r} cannot be worked out: {error}") from error
        return value if isinstance(value, bool) else Fraction(value)

    def _check(self, node: ast.AST) -> None:
        match node:
            case ast.Constant(value=value) if type(value) in (int, float):
                return
            case ast.Name(id=name):
                self.names.add(name)
                return
            case ast.BinOp(op=op) if type(op) in BINARY:
                below = [node.left, node.right]
            case ast.UnaryOp(op=op) if type(op) in UNARY:
                below = [node.operand]
            case ast.BoolOp():
                below = node.values
            case ast.Compare(ops=ops) if all(type(op) in COMPARED for op in ops):
                below = [node.left, *node.comparators]
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in CALLS:
                self.imported |= {name} & set(dir(math))
                below = node.args
            case _:
                raise Refused(f"{self.text!r} holds {ast.unparse(node)!r}, which a formula may not")
        for one in below:
            self._check(one)

    def _value(self, node: ast.AST, numbers: Mapping[str, Fraction]) -> Any:
        match node:
            case ast.Constant(value=value):
                return Fraction(str(value))
            case ast.Name(id=name):
                return numbers[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _bounded(BINARY[type(op)](self._value(left, numbers), self._value(right, numbers)))
            case ast.UnaryOp(op=op, operand=operand):
                return UNARY[type(op)](self._value(operand, numbers))
            case ast.BoolOp(op=op, values=values):
                decide = all if isinstance(op, ast.And) else any
                return decide(self._value(value, numbers) for value in values)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                values = [self._value(one, numbers) for one in (left, *comparators)]
                return all(COMPARED[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
            case ast.Call(func=ast.Name(id=name), args=args):
                return _bounded(CALLS[name](*(self._value(one, numbers) for one in args)))
        raise Refused(f"{self.text!r} cannot be worked out")


def _bounded(value: Any) -> Any:
    number = Fraction(value)
    if max(number.numerator.bit_length(), number.denominator.bit_length()) > BITS:
        raise Refused("a number in it is too large")
    return number


def written(value: Fraction) -> str:
    """A whole number, a decimal where it ends, else a fraction: 12, 3.75, 2/3."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = next(n for n in range(1, BITS) if (value * 10**n).denominator == 1)
    digits = str(abs(int(value * 10**places))).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"
