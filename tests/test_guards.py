"""Signs of a reward that is gamed or says nothing, by numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from rlft.guards import WINDOW, Guards, signs
from rlft.types import Group, Sample, Task, Trajectory


def play(score: float | None, length: int = 2, text: str = "", task: str = "a", **parts: float) -> Trajectory:
    mask = [False] + [True] * length
    sample = Sample([7] * len(mask), mask, [math.nan] * len(mask), [0.0] * len(mask), 0)
    asked = ({"role": "user", "content": task},)
    metrics = {f"reward/{name}": value for name, value in parts.items()}
    messages = (*asked, {"role": "assistant", "content": text or f"{task}{score}{length}"})
    return Trajectory(Task(task, asked), messages, [sample], score, metrics)


def test_flat_groups_are_those_with_equal_scores():
    groups: list[Group] = [
        (play(1.0), play(1.0)),
        (play(0.0), play(1.0)),
        (play(0.0), play(0.0), play(None)),
        (play(1.0),),  # alone, so it says nothing
        (play(None), play(1.0)),
    ]
    assert signs(groups, [])["guard/flat"] == pytest.approx(2 / 3)


def test_length_is_correlated_within_groups():
    """Within each group the score falls by 1 per token; between them it rises. (2, 1), (4, -1) less their means."""
    groups: list[Group] = [(play(i, 10 * i + 2), play(i - 2.0, 10 * i + 4)) for i in range(1, 5)]
    assert signs(groups, [])["guard/length"] == pytest.approx(-1.0)
    mixed: list[Group] = [(play(1, 1), play(0, 2), play(1, 3)) for _ in range(3)]
    # x: -1, 0, 1; y: 1/3, -2/3, 1/3: nothing in common
    assert signs(mixed, [])["guard/length"] == pytest.approx(0.0, abs=1e-12)


def test_no_correlation_of_what_does_not_vary_or_is_too_few():
    assert "guard/length" not in signs([(play(0, 2), play(1, 2))] * 8, [])
    assert "guard/length" not in signs([(play(0, 2), play(1, 3))], [])
    assert signs([], ["x"]) == {}
    assert signs([(play(None), play(None))], ["x"]) == {}


def test_components_that_contradict_each_other():
    """x: 0 1, y: 1 0 in three groups, 0 1 in one: correlation (-3 + 1) / 4."""
    against = (play(1, a=0, b=1, c=1), play(1, a=1, b=0, c=1))
    along = (play(1, a=0, b=0, c=0), play(1, a=1, b=1, c=1))
    found = signs([against, against, against, along], ["a", "b", "c"])
    assert found["guard/conflict/a:b"] == pytest.approx(-0.5)
    assert "guard/conflict/b:c" not in found  # together, if at all


def test_a_short_text_that_scores_high_everywhere():
    gamed = [(play(1.0, text=" ok ", task=f"{i}"), play(0.0, task=f"{i}")) for i in range(4)]
    assert signs(gamed, [])["guard/same"] == pytest.approx(0.5)
    rare = [(play(1.0, text="ok", task=f"{i % 2}"), play(0.0, task=f"{i % 2}")) for i in range(4)]
    assert signs(rare, [])["guard/same"] == 0.0
    low = [(play(0.0, text="ok", task=f"{i}"), play(1.0, task=f"{i}")) for i in range(4)]
    assert signs(low, [])["guard/same"] == 0.0
    long = [(play(1.0, text="ok" * 50, task=f"{i}"), play(0.0, task=f"{i}")) for i in range(4)]
    assert signs(long, [])["guard/same"] == 0.0


def test_what_was_recorded_by_others_does_not_count():
    recorded = play(1.0)
    recorded.drawn = True
    assert signs([(recorded, play(1.0))], []) == {"guard/same": 0.0}


@pytest.mark.parametrize(
    ("name", "bad", "fine", "says"),
    [
        ("guard/flat", 0.96, 0.94, "equal scores"),
        ("guard/length", 0.85, 0.75, "longer answers get more"),
        ("guard/length", -0.85, -0.75, "shorter answers get more"),
        ("guard/conflict/a:b", -0.6, -0.4, "'a' fell where 'b' rose"),
        ("guard/conflict/sum/a:b", -0.6, -0.4, "'sum/a' fell where 'b' rose"),
        ("guard/same", 0.3, 0.1, "one short text"),
    ],
)
def test_a_sign_that_stays_is_said_once(name: str, bad: float, fine: float, says: str):
    guards = Guards()
    assert [guards.warnings({name: fine}) for _ in range(2 * WINDOW)] == [[]] * (2 * WINDOW)
    said = [guards.warnings({name: bad}) for _ in range(3 * WINDOW)]
    [text] = [text for some in said for text in some]
    assert says in text


def test_a_sign_with_a_gap_is_not_said():
    guards = Guards()
    for step in range(20):
        assert guards.warnings({} if step % WINDOW == 0 else {"guard/flat": 1.0}) == []
