"""One call as the policy writes it: `mail.send(to="ann", subject="hi", text="See you")`. Read, never evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD = re.compile(r"(?<![\w.])([a-z]+)\.([a-z]+)\(")
ARGUMENT = re.compile(
    r"""\s*(?:(?P<name>[a-z]+)\s*=\s*)?
    (?:"(?P<double>(?:[^"\\\n]|\\.)*)" | '(?P<single>(?:[^'\\\n]|\\.)*)' | (?P<number>-?[0-9]{1,9})(?![\w.]))
    \s*(?P<end>[,)])""",
    re.VERBOSE,
)
EMPTY = re.compile(r"\s*\)")
LONGEST = 600  # characters of one call
HOW = 'Write one call, such as mail.list() or apis.help("mail").'

Value = str | int


@dataclass(frozen=True)
class Call:
    """An app's function, and what it is called with: by position, and by name."""

    app: str
    function: str
    values: tuple[Value, ...]
    named: dict[str, Value]


class Unreadable(ValueError):
    """A text in which there is no call, with what is wrong."""


def call_in(text: str) -> Call:
    """The last call in a text. Raises Unreadable."""
    heads = list(HEAD.finditer(text))
    if not heads:
        raise Unreadable(f"There is no call in your answer. {HOW}")
    app, function = heads[-1].groups()
    rest = text[heads[-1].end() :][:LONGEST]
    if EMPTY.match(rest):
        return Call(app, function, (), {})
    values: list[Value] = []
    named: dict[str, Value] = {}
    at, end = 0, ","
    while end == ",":
        found = ARGUMENT.match(rest, at)
        if not found:
            place = len(values) + len(named) + 1
            raise Unreadable(f'Argument {place} of {app}.{function} does not read: write name="text" or name=number.')
        at, end = found.end(), found["end"]
        _keep(found, values, named)
    return Call(app, function, tuple(values), named)


def _keep(found: re.Match[str], values: list[Value], named: dict[str, Value]) -> None:
    text = found["double"] if found["double"] is not None else found["single"]
    value: Value = int(found["number"]) if text is None else re.sub(r"\\(.)", r"\1", text)
    name = found["name"]
    if name is None and named:
        raise Unreadable("An argument without a name stands after one with a name: name them all.")
    if name is None:
        values.append(value)
    elif name in named:
        raise Unreadable(f"The argument {name} stands there twice.")
    else:
        named[name] = value
