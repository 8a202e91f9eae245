"""The final answer in a text, as LaTeX that math-verify reads, and as a number where it is one.

A box is found by counting braces, so that nested ones end where they should, and the last box is the answer: a policy
that boxes a guess and then corrects itself is judged by the correction. Boxes that stand side by side, `\\boxed{1}` and
`\\boxed{2}`, are one answer of several parts. Everything here is one pass over the text, with nothing that could take
for ever; what could is left to `math_worker`.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from rlft.rewards.math_units import Unit, measured

Place = Literal["box", "tag", "bare", "prose"]

SMALL = Fraction(1, 1000)
LONGEST = 60  # characters of a number that is compared here; a longer one goes to math-verify
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
MARKED = re.compile(r"(?<!\\)\$|\\boxed|\\fbox|\\\(|\\\[")
FORMULA = re.compile(r"\${1,2}((?:(?!\\boxed)[^$])+)\${1,2}")
PRICE = re.compile(r"[-\s]*\\?\$\s*[\d.,]+\s*")
JOINING = re.compile(r"(?:^|[,;]|\band|\bor|^([-+*=_])\1{2,})(?:\s*[A-Za-z]\w*\s*=)?$")
FILLING = re.compile(r"\\(?:text|mbox|textrm)\b|\\quad|\\qquad|\\[()\[\],;! ]|[{}$~\s]")
BASED = re.compile(r"(\d[0-9A-F]{0,39})\s*_\s*\{?\s*(\d{1,2})\s*\}?")  # math-verify takes 10_2 for 10
NUMBER = re.compile(r"([+-]?)(?:(\d{1,3}(?:,\d{3})+|\d+)(\.\d*)?|(\.\d+))")
RATIO = re.compile(r"([+-]?)(?:\\[dtc]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(-?\d+)\s*\}|(\d+)\s*/\s*(\d+))")

SPACES = str.maketrans(dict.fromkeys("\u00a0\u2002\u2003\u2009\u202f", " ") | {"\u2212": "-"})
SIGNS = SPACES | str.maketrans({
    "\u2044": "/",
    "π": r"\pi ", "∞": r"\infty ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
    "°": r"^\circ ",
})  # fmt: skip
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|ln|log|exp"
# Where people write as a program would. Each pattern is replaced in this order.
PLAIN = [
    (re.compile(r"√\s*\{?(\d+|\w)\}?"), r"\\sqrt{\1}"),
    (re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!|~)\s*(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=[\d}])\s*(?:\\text\{\s*)?(?:percentage|percent|pct)\b(?:\s*\})?"), "%"),
    (re.compile(r"(?<!\\)%"), r"\\%"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"\^(-?\d{2,})"), r"^{\1}"),
    (re.compile(rf"(?<![\\A-Za-z])({FUNCTIONS})(?=\s*[(\\^_])"), r"\\\1"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\*"), r" \\cdot "),
]
FINAL = re.compile(r"final answer(?:\s++is)?+\s*+:?\s*+(?=[-\d.$\\(\[])", re.IGNORECASE)
SENTENCE = re.compile(r"(?<![a-z])[a-z]{3,}+\s++[a-z]{2}")
SHARE = re.compile(r"\s*+\$?\s*+(?:\\?%|percent|pct)", re.IGNORECASE)
SEVERAL = re.compile(r"\$?[-+]?[\d.]*\d\$?(?:\s*(?:,|;|\bor\b|\band\b)+\s*\$?[-+]?[\d.]*\d\$?)+")
MIXED = re.compile(r"([+-]?)(\d+) (\d+)\s*/\s*(\d+)|([+-]?)(\d+) ?\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")


@dataclass(frozen=True)
class Answer:
    """What a text ends on. place: where it was found. latex: what math-verify is to read: the whole text for `prose`,
    else the answer without its unit. whole: with it. number: its value, if it is a plain number. exact: it has no
    decimal point."""

    place: Place
    latex: str
    whole: str
    unit: Unit | None = None
    number: Fraction | None = None
    exact: bool = True
    percent: bool = False


@lru_cache(maxsize=1024)
def right_answer(text: str) -> Answer:
    """The answer that a task's column holds. What is in no box and between no signs is the answer as a whole."""
    marked = MARKED.search(text) and not PRICE.fullmatch(text)
    return said_answer(text) if marked else _answer("bare", text)


def said_answer(text: str, box_only: bool = False) -> Answer:
    """The answer that a completion ends on: the last box, else the last <answer> tag, else whatever prose says.

    A "final answer is" behind the last box counts instead of it, unless box_only.
    """
    boxed, end = last_box(text)
    if boxed is not None:
        later = None if box_only else FINAL.search(text, end)
        return (_several(text, later) or raw_answer(text[later.start() :])) if later else _answer("box", boxed)
    if match := FORMULA.fullmatch(text.strip()):
        return _answer("bare", match[1])
    held = tagged(text)
    if held is not None and not MARKED.search(held) and not SENTENCE.search(held):
        return _answer("tag", held)
    text = text if held is None else held
    later = FINAL.search(text)
    return (_several(text, later) if later else None) or raw_answer(text)


def tagged(text: str) -> str | None:
    """What the last <answer> tag holds that is closed; None where none is."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _several(text: str, later: re.Match[str]) -> Answer | None:
    """The numbers behind "final answer is", if they are several: math-verify would take the first."""
    several = SEVERAL.match(text, later.end())
    return _answer("bare", re.sub(r"\b(?:or|and)\b", ",", several[0])) if several else None


def raw_answer(text: str) -> Answer:
    """The text as it is, for math-verify to find an answer in."""
    text = text.translate(SPACES)
    return Answer("prose", text, text)


def last_box(text: str) -> tuple[str | None, int]:
    """What the last box holds, with those that are joined to it, and where it ends; None where there is no box.

    A box that is never closed counts only where no other is closed. A box in a box is the inner one.
    """
    ends, opened = _closings(text, "{}"), ""
    spans: list[tuple[int, int, str]] = []
    for start in BOX.finditer(text):
        end = ends.get(start.end() - 1)
        if end is None:
            opened = text[start.end() :]
        elif not spans or start.start() >= spans[-1][1]:
            spans.append((start.start(), end + 1, text[start.end() : end]))
    if not spans:
        return (opened, len(text)) if BOX.search(text) else (None, 0)
    spans = [span for span in spans if span[2].strip()] or spans[-1:]
    first = len(spans) - 1
    while first and _joined(text[spans[first - 1][1] : spans[first][0]]):
        first -= 1
    inside = ", ".join(_unboxed(held) for _, _, held in spans[first:])
    share = SHARE.match(text, spans[-1][1])
    inside += r"\%" if share and first == len(spans) - 1 and "%" not in inside else ""
    return inside, spans[-1][1]


def plain(latex: str) -> str:
    """The same in LaTeX, where it was written as a program or in signs of Unicode: 2*sqrt(3), x**2, 1e5, π/2."""
    text = re.sub(r"(?<!\\)\$", " ", latex).translate(SIGNS)
    for pattern, put in PLAIN:
        text = pattern.sub(put, text)
    text = _braced(text, r"(?<![\\A-Za-z])sqrt\s*\(", r"\sqrt{")
    text = _braced(text, r"\^\s*\(", "^{")
    return re.sub(r"\s+", " ", text).rstrip("\\. ").strip()


def close(gold: Fraction, said: Fraction, rounding: int) -> bool:
    """Equal when rounded to so many decimals; and a number so small that this drowns it, within a thousandth of it."""
    if round(gold, rounding) != round(said, rounding):
        return False
    return abs(gold) >= min(Fraction(10) ** (3 - rounding), SMALL) or abs(gold - said) <= abs(gold) / 1000


def _answer(place: Place, text: str) -> Answer:
    latex = plain(text)
    if match := BASED.fullmatch(latex):
        with contextlib.suppress(ValueError):  # no number of that base
            value = Fraction(int(match[1], int(match[2])))
            return Answer(place, latex, latex, Unit(f"base {match[2]}", Fraction(1)), value)
    bare, unit = measured(latex)
    percent = bare.endswith("\\%")
    bare = bare.removesuffix("\\%").rstrip()
    return Answer(place, bare, latex, unit, *_value(bare), percent)


def _value(text: str) -> tuple[Fraction | None, bool]:
    """The number that the text is, and whether it is written without a decimal point; None if it is none."""
    if len(text) > LONGEST:
        return None, True
    if match := NUMBER.fullmatch(text):
        sign, whole, part, small = match.groups()
        digits = (whole or "0").replace(",", "") + (part or small or "")
        return Fraction(f"{sign}{digits.rstrip('.')}"), not (part or small)
    if match := MIXED.fullmatch(text):
        sign, whole, above, below = (part for part in match.groups() if part is not None)
        if 0 < int(above) < int(below):
            return (int(whole) + Fraction(int(above), int(below))) * (-1 if sign == "-" else 1), True
    if match := RATIO.fullmatch(text):
        sign, *both = match.groups()
        above, below = (int(one) for one in both if one is not None)
        return (Fraction(above, below) * (-1 if sign == "-" else 1), True) if below else (None, True)
    return None, True


def _closings(text: str, pair: str) -> dict[int, int]:
    """Where each bracket of a kind closes that does, by where it opens. Behind a backslash it is none."""
    ends: dict[int, int] = {}
    waiting: list[int] = []
    for found in re.finditer(rf"\\.|[{re.escape(pair)}]", text, re.DOTALL):
        if found[0] == pair[0]:
            waiting.append(found.start())
        elif found[0] == pair[1] and waiting:
            ends[waiting.pop()] = found.start()
    return ends


def _joined(between: str) -> bool:
    """Whether two boxes with this between them are parts of one answer."""
    return len(between) < 60 and not re.search(r"[.!?]|\n\s*\n", between) and bool(JOINING.search(_bare(between)))


def _bare(between: str) -> str:
    return FILLING.sub(" ", between).rstrip("\\").strip()


def _unboxed(text: str) -> str:
    """Without a box around it, up to three of them."""
    for _ in range(3):
        inner = BOX.match(text.strip())
        if inner and text.strip().endswith("}"):
            text = text.strip()[inner.end() : -1]
    return text


def _braced(text: str, opening: str, put: str) -> str:
    """Braces in place of the round brackets behind a pattern, for those that are closed."""
    ends = _closings(text, "()")
    edits: dict[int, tuple[int, str]] = {}
    for match in re.finditer(opening, text):
        if (end := ends.get(match.end() - 1)) is not None:
            edits |= {match.start(): (match.end(), put), end: (end + 1, "}")}
    parts, position = [], 0
    for start, (end, new) in sorted(edits.items()):
        parts += [text[position:start], new]
        position = end
    return "".join([*parts, text[position:]])
