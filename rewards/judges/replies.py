"""Reading a judge's reply, strictly: it has the form that was asked for, or there is no verdict.

A judge that rambles, quotes the answer it judges, or gives 11 of 10 has failed; a number taken from somewhere in its
words would be a reward that the policy can write itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlft.rewards.judges.endpoint import Reply, Unreadable

FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.S)
PLACES = {"first": 1, "second": -1, "tie": 0}


def score(low: float, high: float, pattern: str | None) -> Callable[[Reply], float]:
    """Reads a number from low to high, and gives it on a scale from 0 to 1.

    From the key `score` of a JSON object; or by the first group of a regular expression, all of whose matches agree.
    """

    def read(reply: Reply) -> float:
        value = _number(_object(reply).get("score"), reply) if pattern is None else _matched(pattern, reply)
        if not low <= value <= high:
            raise Unreadable(f"the score {value:g} is not from {low:g} to {high:g}: {_shown(reply)}")
        return (value - low) / (high - low)

    return read


def better(reply: Reply) -> int:
    """Reads which of two answers is better: 1 the first, -1 the second, 0 neither."""
    said = _object(reply).get("better")
    if not isinstance(said, str) or said not in PLACES:
        raise Unreadable(f"`better` is none of {', '.join(PLACES)}: {_shown(reply)}")
    return PLACES[said]


def ranking(count: int) -> Callable[[Reply], list[int]]:
    """Reads an order of the answers 1 to count, the best first; gives them counted from 0."""

    def read(reply: Reply) -> list[int]:
        said = _object(reply).get("ranking")
        listed = said if isinstance(said, list) else []
        numbers = [number for number in listed if type(number) is int]
        if sorted(numbers) != list(range(1, count + 1)) or len(listed) != count:
            raise Unreadable(f"`ranking` does not name each of 1 to {count} once: {_shown(reply)}")
        return [number - 1 for number in numbers]

    return read


def expected(choices: Mapping[str, float], mass: float) -> Callable[[Reply], float]:
    """Reads the expected value over a few words from the log-probs of the token in whose place one of them stands.

    It is the last token that is such a word, so that a judge may reason before; else the first. The words' share of
    the probability must reach `mass`. Yes and no: generative verifiers (arXiv:2408.15240); grades: G-Eval
    (arXiv:2303.16634).
    """
    values = {word.strip().lower(): value for word, value in choices.items()}

    def read(reply: Reply) -> float:
        if not reply.tokens:
            raise Unreadable("the reply has no log-probs: the server does not give them, or gave no token")
        places = [top for token, top in reply.tokens if token.strip().lower() in values] or [reply.tokens[0][1]]
        shares = dict.fromkeys(values, 0.0)
        for token, logprob in places[-1]:
            word = token.strip().lower()
            if word in shares:
                shares[word] += math.exp(logprob)
        total = math.fsum(shares.values())
        if total < mass or not total:
            raise Unreadable(
                f"{', '.join(values)} have a share of {total:.3g} of the probability, less than `mass`: {_shown(reply)}"
            )
        return math.fsum(values[word] * share for word, share in shares.items()) / total

    return read


def _object(reply: Reply) -> dict[str, Any]:
    """The JSON object that the reply consists of, but for reasoning in tags before it and a code fence around it."""
    text = reply.text.rpartition("</think>")[2].strip()
    fenced = FENCE.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        cut = " It was cut off at max_tokens." if reply.finish == "length" else ""
        raise Unreadable(f"the reply is no JSON object ({error}).{cut} {_shown(reply)}") from error
    if not isinstance(found, dict):
        raise Unreadable(f"the reply is no JSON object: {_shown(reply)}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _number(value: Any, reply: Reply) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unreadable(f"`score` is no number: {_shown(reply)}")
    return float(value)


def _matched(pattern: str, reply: Reply) -> float:
    found = {match[1] for match in re.finditer(pattern, reply.text.rpartition("</think>")[2])}
    if len(found) != 1:
        raise Unreadable(f"`pattern` finds {len(found)} different scores: {_shown(reply)}")
    try:
        return float(found.pop())
    except (TypeError, ValueError) as error:
        raise Unreadable(f"`pattern` finds no number ({error}): {_shown(reply)}") from error


def _shown(reply: Reply) -> str:
    return repr(reply.text if len(reply.text) <= 300 else f"{reply.text[:140]} ... {reply.text[-140:]}")
