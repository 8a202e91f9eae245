"""Arithmetic step by step: traces worked out by hand, both kinds of noise, and how an episode goes."""

from __future__ import annotations

import random
import re
from typing import Any, get_args

import pytest

from rlft.envs.own.traces import FUNCTIONS, Draft, Name, TracesConfig, drafted, trace
from tests.envs.playing import among, holds, played, wins


def solved(env: Any, heard: str) -> str:
    """Reads the step that is asked, and does it by Python."""
    asked = re.findall(r"^Step \d+: (.*) = \?$", heard, re.M)[-1]
    if larger := re.fullmatch(r"the larger of (-?\d+) and (-?\d+)", asked):
        return str(max(map(int, larger.groups())))
    return f"That is {eval(asked.replace('modulo', '%'))}."  # of digits and signs alone


@pytest.mark.parametrize(("function", "steps"), [
    ("sum", [10, 12, 20]), ("alternating", [-4, -2, -10]), ("maximum", [7, 7, 8]), ("modular", [21, 42, 36]),
])  # fmt: skip
def test_traces_by_hand(function: Name, steps: list[int]) -> None:
    assert trace(function, [3, 7, 2, 8]) == steps


def test_static_noise_stays_where_it_is_and_dynamic_noise_goes_on() -> None:
    numbers, once = [1, 2, 3, 4, 5, 6], iter([0, 5, 0, 0, 0])
    assert trace("sum", numbers, lambda value: value + next(once)) == [3, 11, 15, 20, 26]  # 5 more from there on
    right = [3, 6, 10, 15]
    for seed in range(50):
        static = drafted(random.Random(seed), TracesConfig(numbers=6, draft="static", noise=0.3), numbers)
        dynamic = drafted(random.Random(seed), TracesConfig(numbers=6, draft="dynamic", noise=0.3), numbers)
        wrong = [b - a for a, b in zip(right, static, strict=True)]
        assert all(abs(one) <= 9 for one in wrong)
        steps = [b - a for a, b in zip([1, *dynamic], dynamic, strict=False)]  # what each step added
        assert [step - number for step, number in zip(steps, numbers[1:], strict=False)] == wrong
    assert drafted(random.Random(0), TracesConfig(numbers=6, draft="clean"), numbers) == right


@pytest.mark.parametrize("draft", get_args(Draft))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_who_can_count_wins_without_a_mistake(function: Name, draft: Draft) -> None:
    knobs = TracesConfig(function=function, draft=draft, digits=2, numbers=5, mistakes=0)
    for seed in range(10):
        episode = played(knobs, solved, seed)
        assert episode.won
        assert episode.turns[-1].metrics == {"success": 1, "malformed": 0, "progress": 1, "difficulty": 8}


def test_mistakes_are_told_and_counted() -> None:
    said = iter(["", "100", "-100"])
    episode = played(TracesConfig(numbers=2, mistakes=2), lambda env, heard: next(said), 1)
    assert [heard.partition("\n")[0] for heard in episode.heard[1:]] == [
        "Answer with one number.",
        "No, that is too large.",
    ]
    assert not episode.won
    assert episode.turns[-1].metrics["malformed"] == 1
    assert wins(TracesConfig(), among(*map(str, range(40))), 100) < 0.1


@pytest.mark.parametrize("draft", get_args(Draft))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_holds_for_every_world(function: Name, draft: Draft) -> None:
    for numbers, digits in ((2, 1), (8, 3)):
        knobs = TracesConfig(function=function, draft=draft, numbers=numbers, digits=digits, noise=1.0)
        holds(knobs, ("3", "12"), seeds=5)
        heard = played(knobs, solved).heard
        assert sum(map(len, heard)) <= knobs.room(0, len)
