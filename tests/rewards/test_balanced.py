"""Weights that change over the steps, and terms on their own scale: numbers worked out by hand."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlft.rewards.catalog import RewardConfig
from rlft.types import InputError, Trajectory, at_step, stepping
from tests.rewards.doubtful import BARE, FAILS, NUMBER, SHORT, UNSURE


def scores(plain: dict[str, Any], step: int, *group: Trajectory) -> list[Any]:
    reward: Any = TypeAdapter(RewardConfig).validate_python(plain)
    with at_step(step):
        return list(asyncio.run(reward.build()(group)))


RISING = {
    "type": "scheduled",
    "points": {"bare": {4: 1.0, 14: 0.0}, "right": {0: 0.0, 10: 2.0, 20: 2.0, 30: 1.0}},
    "terms": {"right": NUMBER, "bare": {**BARE, "weight": 0.5}, "short": SHORT},
}


@pytest.mark.parametrize(("step", "right", "bare"), [
    (0, 0.0, 1.0), (1, 0.2, 1.0), (4, 0.8, 1.0), (5, 1.0, 0.9), (10, 2.0, 0.4), (14, 2.0, 0.0), (20, 2.0, 0.0),
    (25, 1.5, 0.0), (30, 1.0, 0.0), (1000, 1.0, 0.0),
])  # fmt: skip
def test_weights_go_along_lines_between_the_points(play, step, right, bare):
    one = play("12", chosen=1, answer=12)
    assert scores(RISING, step, one) == [pytest.approx(right + 0.5 * bare + 0.75)]
    assert one.metrics["reward/right/factor"] == pytest.approx(right)
    assert one.metrics["reward/bare/factor"] == pytest.approx(bare)
    assert one.metrics["reward/short/factor"] == 1.0
    assert (one.metrics["reward/right"], one.metrics["reward/bare"]) == (1.0, 1.0)
    assert stepping.get() is None


def test_a_term_that_does_not_count_yet_has_no_say(play):
    config = {"type": "scheduled", "points": {"new": {5: 0.0, 6: 1.0}}, "terms": {"right": NUMBER, "new": FAILS}}
    assert scores(config, 5, play("12", answer=12)) == [1.0]
    assert scores(config, 6, play("12", answer=12)) == [None]


def test_a_schedule_without_a_run_says_so(play, judge):
    with pytest.raises(InputError, match="weighs by the step of a run"):
        judge(RISING, play("12", answer=12))


def test_each_term_is_normalised_by_itself(play, judge):
    """Values 1, 1, 0, 0 and 0.75, 0.5, 0.25, 0: stds sqrt(1/3) and sqrt(0.3125/3)."""
    config = {"type": "normalised", "epsilon": 1e-12, "terms": {"right": NUMBER, "short": {**SHORT, "weight": 0.5}}}
    texts = ("12", "12", "13", "13")
    group = [play(text, chosen=n, answer=12) for n, text in enumerate(texts, 1)]
    a, b = math.sqrt(1 / 3), math.sqrt(0.3125 / 3)
    wanted = [
        0.5 / a + 0.5 * 0.375 / b,
        0.5 / a + 0.5 * 0.125 / b,
        -0.5 / a - 0.5 * 0.125 / b,
        -0.5 / a - 0.5 * 0.375 / b,
    ]
    found = judge(config, *group)
    assert found == pytest.approx(wanted)
    assert math.fsum(found) == pytest.approx(0.0)
    assert [t.metrics["reward/short"] for t in group] == [0.75, 0.5, 0.25, 0.0]
    rescaled = {**config, "terms": {"right": {"type": "weighted", "terms": {"n": {**NUMBER, "weight": 100.0}}},
                                    "short": {**SHORT, "weight": 0.5}}}  # fmt: skip
    assert judge(rescaled, *group) == pytest.approx(wanted), "the scale of a term's values does not matter"


def test_mixtures_that_sum_alike_are_told_apart(play, judge):
    """The paper's case: (0, 2) beside (0, 1), which grpo over the sum cannot tell apart."""

    def apart(*verdicts: tuple[int, int]) -> float:
        group = [play("12" if a else "x", chosen=1 if b else 9, answer=12) for a, b in verdicts]
        config = {"type": "normalised", "terms": {"right": NUMBER, "short": {"type": "length", "free": 4, "limit": 5}}}
        low, high = judge(config, *group)
        return high - low

    assert apart((0, 0), (1, 1)) == pytest.approx(2 * apart((0, 0), (1, 0)), rel=1e-6)


def test_no_spread_is_no_signal_and_one_alone_has_its_sum(play, judge):
    config = {"type": "normalised", "terms": {"right": {**NUMBER, "weight": 2.0}, "bare": BARE}}
    same = [play("12", answer=12) for _ in range(3)]
    assert judge(config, *same) == [0.0, 0.0, 0.0]
    assert judge(config, play("12", answer=12)) == [3.0]


def test_one_without_a_value_is_left_out_of_the_mean(play, judge):
    config = {"type": "normalised", "epsilon": 1e-12, "terms": {"sure": UNSURE, "right": NUMBER}}
    group = [play(text, answer=12) for text in ("12", "13", "12?")]
    up = math.sqrt(2) / 2  # of two values; "right" is 1, 0, 1: mean 2/3, std sqrt(1/3)
    high, low, none = judge(config, *group)
    assert none is None
    assert (high, low) == (pytest.approx((1 / 3) / math.sqrt(1 / 3)), pytest.approx((-2 / 3) / math.sqrt(1 / 3)))
    two = {"type": "normalised", "epsilon": 1e-12, "terms": {"right": NUMBER}}
    assert judge(two, *group[:2]) == [pytest.approx(up), pytest.approx(-up)]
