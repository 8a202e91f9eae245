"""Format and length."""

from __future__ import annotations

import pytest
from pydantic import ValidationError


@pytest.mark.parametrize(
    ("options", "text", "value"),
    [
        ({"pattern": r"-?\d+"}, "12", 1.0),
        ({"pattern": r"-?\d+"}, " 12\n", 1.0),
        ({"pattern": r"-?\d+"}, "12.", 0.0),
        ({"pattern": r"-?\d+", "full": False}, "It is 12.", 1.0),
        ({"pattern": r"-?\d+", "full": False}, "none", 0.0),
        ({"pattern": r"<a>.*</a>"}, "<a>1\n2</a>", 0.0),
        ({"pattern": r"(?s)<a>.*</a>"}, "<a>1\n2</a>", 1.0),
        ({"pattern": r"yes|no"}, "nope", 0.0),  # fullmatch, not match
    ],
)
def test_format(play, judge, options, text, value):
    assert judge({"type": "format", **options}, play(text)) == [value]


def test_a_pattern_that_would_take_for_ever_is_a_failure_and_takes_nothing_from_others(play, judge):
    """As many ways to cut the letters as the 81st Fibonacci number, 4·10^16, and none of them matches."""
    group = [play("a" * 80 + "b"), play("aa")]
    assert judge({"type": "format", "pattern": "(a|aa)+", "seconds": 0.2}, *group) == [None, 1.0]
    assert [[failure.kind for failure in one.failures] for one in group] == [["timeout"], []]


def test_an_invalid_pattern_is_refused_with_its_place(play, judge):
    with pytest.raises(ValidationError, match=r"not a valid regular expression: missing \), unterminated") as caught:
        judge({"type": "format", "pattern": "(12"}, play("12"))
    assert caught.value.errors()[0]["loc"] == ("format", "pattern")


def test_length_is_one_up_to_free_and_falls_to_zero_at_limit(play, judge):
    group = [play("x", chosen=n) for n in (0, 10, 15, 20, 30, 50)]
    # 20 tokens between free and limit: 15 is a quarter of the way down, 20 half
    assert judge({"type": "length", "free": 10, "limit": 30}, *group) == [1.0, 1.0, 0.75, 0.5, 0.0, 0.0]


def test_length_without_free_falls_from_the_first_token_on(play, judge):
    assert judge({"type": "length", "limit": 4}, *[play("x", chosen=n) for n in (0, 1, 4)]) == [1.0, 0.75, 0.0]


@pytest.mark.parametrize(("free", "limit"), [(10, 10), (10, 5), (0, 0)])
def test_a_limit_not_above_free_is_refused(play, judge, free, limit):
    with pytest.raises(ValidationError, match="must be larger than free") as caught:
        judge({"type": "length", "free": free, "limit": limit}, play("x"))
    assert caught.value.errors()[0]["loc"] == ("length", "limit")
