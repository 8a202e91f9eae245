"""Problems made of templates: a text with places for numbers, and a formula that gives the answer.

Zhang et al. 2024 (InfinityMATH, arXiv:2408.07089) take the numbers out of problems, keep a program that does not depend
on them, and put other numbers in: problems without end, each with an answer that is right by construction, and test
sets that ask the same with other numbers (GSM8K+, MATH+). Which numbers are trained on is decided by the numbers alone,
together with the prompt that they stand in, so that no problem is on both sides under another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import string
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from rlft.formula import Formula, Refused, written
from rlft.types import InputError

Split = Literal["train", "eval", "perturb"]
ANSWER = "answer"  # in a solution, the place of the answer
TRIES = 2000  # numbers drawn for one problem at most, before a template is taken to have no more
Range = tuple[float, float] | tuple[float, float, float]


class Template(BaseModel):
    """One kind of problem, as it stands in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="by which it is told from the others")
    prompt: str = Field(min_length=1, description="the problem, with {a} where the number a goes")
    numbers: dict[str, Range] = Field(min_length=1, description="by name: least, greatest and step (1) of a number")
    beyond: dict[str, Range] = Field(
        default_factory=dict,
        description="of the split `perturb`; those not named lie past `numbers`, over as wide a range",
    )
    words: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=dict, description="by name: words of which one is drawn"
    )
    where: list[str] = Field(default_factory=list, description="formulas that must be true of the numbers")
    answer: str = Field(description="a formula that gives the answer")
    derived: dict[str, str] = Field(
        default_factory=dict, description="by name: formulas of what the solution says on the way to the answer"
    )
    solution: str | None = Field(
        default=None, description="the worked solution, with places for numbers, words, `derived` and {answer}"
    )

    @model_validator(mode="after")
    def _fits(self) -> Template:
        wanted = _places("prompt", self.prompt)
        known = set(self.numbers) | set(self.words)
        if wanted - known:
            raise ValueError(f"prompt: nothing fills {sorted(wanted - known)}; add them to numbers or words")
        if set(self.numbers) - wanted:
            raise ValueError(f"numbers: the prompt does not say {sorted(set(self.numbers) - wanted)}; put them into it")
        if set(self.numbers) & set(self.words):
            raise ValueError("words: a number has that name; rename it")
        if set(self.beyond) - set(self.numbers):
            raise ValueError("beyond: names a number that is none; add it to numbers")
        for formula in map(Formula, (self.answer, *self.where)):
            if formula.names - set(self.numbers):
                raise ValueError(f"{formula.text!r}: there is no number {sorted(formula.names - set(self.numbers))}")
        for name, span in (*self.numbers.items(), *self.beyond.items()):
            if not all(map(math.isfinite, span)) or span[0] > span[1] or (len(span) == 3 and span[2] <= 0):
                raise ValueError(f"{name}: it is [least, greatest] or [least, greatest, step above 0], not {span}")
        return self

    @model_validator(mode="after")
    def _solved(self) -> Template:
        known = set(self.numbers)
        for name, formula in self.derived.items():
            if name in {*known, *self.words, ANSWER}:
                raise ValueError(f"derived: {name} has another meaning already; rename it")
            if unknown := Formula(formula).names - known:
                raise ValueError(f"derived: {name}: there is no {sorted(unknown)}, among the numbers or before it")
            known.add(name)
        if self.solution and ANSWER in {*self.numbers, *self.words}:
            raise ValueError(f"{ANSWER}: in a solution that is the answer itself; give the number or word another name")
        unfilled = _places("solution", self.solution or "") - known - set(self.words) - {ANSWER}
        if unfilled:
            raise ValueError(f"solution: nothing fills {sorted(unfilled)}; add them to derived")
        return self


def _places(key: str, text: str) -> set[str]:
    """The names of the places in a text. Raises ValueError where one is more than a name, or a brace is left open."""
    try:
        places = [place for place in string.Formatter().parse(text) if place[1] is not None]
    except ValueError as error:
        raise ValueError(f"{key}: {error}; write {{{{ and }}}} for braces that are no place") from error
    if any(spec or conversion or not str(name).isidentifier() for _, name, spec, conversion in places):
        raise ValueError(
            f"{key}: a place is a name and nothing else, as in {{a}}, since numbers are written out in full; write "
            "{{ and }} for other braces"
        )
    return {str(name) for _, name, _, _ in places}


def read_templates(path: str) -> list[Template]:
    """The templates of a .yaml, .json or .jsonl file. Raises InputError."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"data: there is no file {path}; `path` names a file of templates")
    try:
        text = file.read_text(encoding="utf-8")
        held = [json.loads(line) for line in text.split("\n") if line.strip()] if file.suffix == ".jsonl" else None
        templates = TypeAdapter(list[Template]).validate_python(yaml.safe_load(text) if held is None else held)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{path}: template {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if len({template.name for template in templates}) < len(templates) or not templates:
        raise InputError(f"{path}: it must hold at least one template, and no two of one name; rename them")
    return templates


def problems(
    templates: Sequence[Template], split: Split, count: int, holdout: float, seed: int
) -> list[dict[str, str]]:
    """So many rows of `prompt`, `answer`, `template` (its name), `program` (Python that prints the answer), `solution`.

    Templates take turns, and one that has no more numbers is passed over. No numbers stand there twice. split: `train`
    and `eval` part the numbers of the templates, `eval` with a share `holdout` of them; `perturb` lies beyond them.
    Raises InputError where no template has more.
    """
    waiting = deque(_drawn(template, split, holdout, seed) for template in templates)
    rows: list[dict[str, str]] = []
    while waiting and len(rows) < count:
        drawn = waiting.popleft()
        if (row := next(drawn, None)) is not None:
            rows.append(row)
            waiting.append(drawn)
    if len(rows) < count:
        raise InputError(
            f"the templates have {len(rows)} problems for the split '{split}', and {count} are asked for. Lower "
            f"`count`, widen their numbers, or loosen `where`: what it leaves must be found within {TRIES} draws."
        )
    return rows


def _drawn(template: Template, split: Split, holdout: float, seed: int) -> Iterator[dict[str, str]]:
    draw = random.Random(f"{seed}:{split}:{template.name}")
    formula, conditions = Formula(template.answer), [Formula(text) for text in template.where]
    derived = {name: Formula(text) for name, text in template.derived.items()}
    spans = {name: _span(template, name, split) for name in template.numbers}
    seen: set[tuple[Fraction, ...]] = set()
    while True:
        for _ in range(TRIES):
            numbers = {name: span.draw(draw) for name, span in spans.items()}
            key = tuple(numbers.values())
            if key in seen or not _belongs(template, numbers, split, holdout):
                continue
            answer = _answer(template, formula, conditions, numbers)
            if answer is not None:
                break
        else:
            return
        seen.add(key)
        known = dict(numbers)
        for name, on_the_way in derived.items():
            known[name] = _worked_out(template, on_the_way, known)
        yield _row(template, formula, known, answer, draw)


def _belongs(template: Template, numbers: dict[str, Fraction], split: Split, holdout: float) -> bool:
    """Whether these numbers are of this split; which it is depends on the prompt, the numbers and the share alone."""
    if split == "perturb":
        return not all(value in _span(template, name, "train") for name, value in numbers.items())
    shown = ",".join(f"{name}={value}" for name, value in sorted(numbers.items()))
    digest = hashlib.sha256(f"{template.prompt}:{shown}".encode()).digest()
    held_out = int.from_bytes(digest[:8], "big") < holdout * 2**64
    return held_out == (split == "eval")


def _answer(
    template: Template, formula: Formula, conditions: Sequence[Formula], numbers: dict[str, Fraction]
) -> Fraction | None:
    """The answer, or None where a condition is not met. Raises InputError where a formula cannot be worked out."""
    with _told(template, numbers):
        if not all(condition(numbers) for condition in conditions):
            return None
    return _worked_out(template, formula, numbers)


def _worked_out(template: Template, formula: Formula, numbers: dict[str, Fraction]) -> Fraction:
    with _told(template, numbers):
        value = formula(numbers)
    if isinstance(value, bool):
        raise InputError(
            f"template '{template.name}': {formula.text!r} is true or false, where a number is wanted. Compare in "
            "`where`."
        )
    return Fraction(value)


@contextlib.contextmanager
def _told(template: Template, numbers: dict[str, Fraction]) -> Iterator[None]:
    """A formula that cannot be worked out is refused with its template and numbers."""
    try:
        yield
    except Refused as error:
        told = ", ".join(f"{name}={written(value)}" for name, value in numbers.items())
        raise InputError(
            f"template '{template.name}': with {told}: {error}. Exclude such numbers by `where`."
        ) from error


class _Span(NamedTuple):
    """The values that a number may take."""

    least: Fraction
    step: Fraction
    count: int

    def draw(self, dice: random.Random) -> Fraction:
        return self.least + dice.randrange(self.count) * self.step

    def __contains__(self, value: object) -> bool:
        place = (value - self.least) / self.step if isinstance(value, Fraction) else Fraction(-1)
        return place.denominator == 1 and 0 <= place < self.count


def _span(template: Template, name: str, split: Split) -> _Span:
    least, greatest, step = _exact(template.numbers[name])
    if split == "perturb":
        if name in template.beyond:
            least, greatest, step = _exact(template.beyond[name])
        else:
            least, greatest = greatest + step, greatest + step + (greatest - least)
    return _Span(least, step, int((greatest - least) / step) + 1)


def _exact(span: Range) -> tuple[Fraction, Fraction, Fraction]:
    least, greatest, *step = (Fraction(str(bound)) for bound in span)
    return least, greatest, step[0] if step else Fraction(1)


def _row(
    template: Template, formula: Formula, known: dict[str, Fraction], answer: Fraction, draw: random.Random
) -> dict[str, str]:
    """known: the numbers, and what is derived from them."""
    words = {name: draw.choice(some) for name, some in template.words.items()}
    shown = {name: written(value) for name, value in known.items()}
    needed = ", ".join(sorted(formula.imported))
    given = f"from math import {needed}\n" * bool(needed)
    given += "".join(f"{name} = {value}\n" for name, value in shown.items() if name in formula.names)
    row = {
        "prompt": template.prompt.format(**shown, **words),
        "answer": written(answer),
        "template": template.name,
        "program": f"{given}print({formula.text.strip()})\n",
    }
    if template.solution is not None:
        row["solution"] = template.solution.format(**shown, **words, answer=row["answer"])
    return row
