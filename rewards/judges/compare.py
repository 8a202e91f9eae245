"""Answers of one task held against each other: which are compared, and what the outcomes are worth. No judge here.

A judge that prefers what it reads first, as many do (arXiv:2306.05685), gains nothing here: each pair is asked in both
orders and a contradiction is a tie; rankings are asked in several orders, every second one the reverse of the last.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations

Pair = tuple[int, int]


def pairs(count: int, opponents: int | None, draw: random.Random) -> list[Pair]:
    """Which of `count` answers meet: all, or each about so many others, drawn so that all meet equally many.

    The answers stand in a circle in random order, and each meets its next neighbours on both sides; for an odd number
    also the one across, or where there is none, one more neighbour than asked.
    """
    if opponents is None or opponents >= count - 1:
        return list(combinations(range(count), 2))
    circle = draw.sample(range(count), count)
    across = opponents % 2 == 1 and count % 2 == 0
    steps = [*range(1, opponents // 2 + 1)]
    if across:
        steps.append(count // 2)
    elif opponents % 2:
        steps.append(opponents // 2 + 1)
    met = {tuple(sorted((circle[i], circle[(i + step) % count]))) for step in steps for i in range(count)}
    return sorted((a, b) for a, b in met)


def settled(forth: int, back: int) -> tuple[float, bool]:
    """What a pair's first answer earns, and whether the judge contradicts itself.

    forth: 1, -1 or 0, as the judge prefers the first, the second or neither; back: the same with the places changed, so
    that 1 is for what had been second. Only what holds in both orders counts; else it is a tie, 0.5.
    """
    agreed = forth == -back
    return (0.5 + forth / 2 if agreed else 0.5), forth == back != 0


def shares(count: int, earned: Mapping[Pair, float | None]) -> list[float | None]:
    """The mean of what each answer earned in its pairs: its win rate, a tie being half a win.

    earned: by the first answer of each pair; None where there is no verdict. An answer with verdicts on fewer than half
    of its pairs has no share.
    """
    own: list[list[float | None]] = [[] for _ in range(count)]
    for (a, b), value in earned.items():
        own[a].append(value)
        own[b].append(None if value is None else 1 - value)
    return [_mean(values) for values in own]


def orders(count: int, rounds: int, draw: random.Random) -> list[list[int]]:
    """The orders in which the answers are shown, one for each round: shuffled, and each of those once in reverse."""
    found: list[list[int]] = []
    for i in range(rounds):
        found.append(found[-1][::-1] if i % 2 else draw.sample(range(count), count))
    return found


def standings(count: int, rankings: Sequence[Sequence[int] | None]) -> list[float | None]:
    """The mean place of each answer over the rounds, as the share of the others that stand below it.

    rankings: answers, the best first; None where there is no verdict.
    """
    places: list[list[float | None]] = [[] for _ in range(count)]
    for ranking in rankings:
        for place in range(count):
            answer = place if ranking is None else ranking[place]
            places[answer].append(None if ranking is None else (count - 1 - place) / (count - 1))
    return [_mean(values) for values in places]


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there, if they are at least half."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and 2 * len(there) >= len(values) else None
