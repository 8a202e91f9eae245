"""Rewards for lengths: values worked out by hand at the ends and in the middle, monotonic, never NaN."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from rlft.algorithms import credit
from rlft.batch import Batch
from rlft.rewards.thinking import Thinking
from rlft.types import InputError, Said, Sample, Task, Trajectory

NUMBER = {"type": "number"}
COSINE = {"type": "cosine", "of": NUMBER, "limit": 100}
HALF = 0.5 * math.sqrt(0.5)  # a quarter of the way along half a cosine


@pytest.mark.parametrize(("text", "values"), [
    ("12", [2.0, 1.5 + HALF, 1.5, 1.5 - HALF, -1.0, -1.0]),
    ("13", [-1.0, -0.5 - HALF, -0.5, -0.5 + HALF, -1.0, -1.0]),
])  # fmt: skip
def test_cosine_at_the_ends_and_in_the_middle(play, judge, text, values):
    group = [play(text, chosen=n, answer=12) for n in (0, 25, 50, 75, 100, 1000)]
    assert judge(COSINE, *group) == pytest.approx(values)
    assert {t.metrics["reward/cosine/right"] for t in group} == {float(text == "12")}


def test_cosine_falls_for_right_answers_and_rises_for_wrong_ones_to_nearly_its_ends(play, judge):
    right, wrong = (judge(COSINE, *(play(t, chosen=n, answer=12) for n in range(100))) for t in ("12", "13"))
    assert all(a > b for a, b in pairwise(right))
    assert all(a < b for a, b in pairwise(wrong))
    assert min(right) == pytest.approx(1.0, abs=1e-3)
    assert max(wrong) == pytest.approx(0.0, abs=1e-3)
    assert min(right) > max(wrong)


def test_cosine_takes_its_values_and_threshold_from_the_config(play, judge):
    of = {"type": "length", "limit": 4, "weight": 9.0}  # 0.5 for 2 tokens, whatever its weight
    config = {"type": "cosine", "of": of, "limit": 4, "right_short": 8.0, "right_long": 4.0, "beyond": -3.0}
    one = play("x", chosen=2)
    assert judge({**config, "at_least": 0.5}, one) == [6.0]
    assert one.metrics["reward/cosine/of"] == 0.5
    assert judge(config, one) == [-0.5]
    assert judge(config, play("x", chosen=4)) == [-3.0]


RELATIVE = {"type": "relative_length", "of": NUMBER}


def test_relative_length_is_by_the_shortest_and_the_longest_of_the_group(play, judge):
    group = [
        play(text, chosen=n, answer=12) for text, n in (("12", 10), ("12", 30), ("13", 10), ("13", 50), ("12", 50))
    ]
    assert judge(RELATIVE, *group) == [0.5, 0.0, 0.0, -0.5, -0.5]
    assert [t.metrics["reward/relative_length/right"] for t in group] == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_relative_length_says_nothing_where_all_are_equally_long_or_one_is_alone(play, judge):
    assert judge(RELATIVE, *(play(text, chosen=5, answer=12) for text in ("12", "13"))) == [0.0, 0.0]
    assert judge(RELATIVE, play("12", answer=12)) == [0.0]


@pytest.mark.parametrize("config", [COSINE, RELATIVE], ids=["cosine", "relative_length"])
def test_without_a_verdict_there_is_no_score(play, judge, config, tmp_path, monkeypatch):
    (tmp_path / "my_failing.py").write_text("def grade(t):\n    raise ValueError('no')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    one = play("12", answer=12)
    judge(config, one)
    assert judge({**config, "of": {"type": "custom", "path": "my_failing:grade"}}, one) == [None]
    assert [failure.reward for failure in one.failures] == [f"{config['type']}/of"]
    assert f"reward/{config['type']}/right" not in one.metrics


def test_overlong_by_hand(play, judge):
    group = [play("x", chosen=n) for n in (0, 60, 70, 80, 100, 101, 1000)]
    values = [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert judge({"type": "overlong", "limit": 100, "margin": 40}, *group) == values
    assert [t.metrics["reward/overlong/over"] for t in group] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("limit", "margin"), [(10, 4), (8, 8), (5, 1)])
def test_overlong_is_the_formula_that_the_algorithm_has(play, judge, limit, margin):
    group = [play("x", chosen=n) for n in range(1, 13)]
    for trajectory in group:
        trajectory.score = 0.0
    batch = Batch.of([tuple(group)])
    seen: list[torch.Tensor] = []

    def watch(given: Batch) -> Batch:
        seen.append(given.scores)
        return credit.raw(given)

    credit.overlong(batch, watch, limit=limit, buffer=margin)
    config = {"type": "overlong", "limit": limit, "margin": margin}
    assert judge(config, *group) == pytest.approx(seen[0].tolist())


def test_a_margin_above_the_limit_is_refused(play, judge):
    with pytest.raises(ValidationError, match=r"margin \(5\) must not be larger than limit \(4\)"):
        judge({"type": "overlong", "limit": 4, "margin": 5}, play("x"))


# --- thinking ---------------------------------------------------------------------------------------------------------

WORDS = {"type": "thinking", "unit": "words", "scale": 0.1}


def thought(words: int) -> str:
    return f"<think>{'so ' * words}</think>\n\nThe answer is 12."


@pytest.mark.parametrize(("words", "exact", "most"), [
    (0, -1.0, 1.0), (5, -0.5, 1.0), (6, -0.4, 0.9), (9, -0.1, 0.6), (10, 0.0, 0.5), (11, -0.1, 0.4), (15, -0.5, 0.0),
    (40, -3.0, 0.0),
])  # fmt: skip
def test_thinking_is_held_against_its_budget(play, judge, words, exact, most):
    one = play(thought(words))
    assert judge({**WORDS, "budget": 10}, one) == [pytest.approx(exact)]
    assert judge({**WORDS, "budget": 10, "mode": "most"}, one) == [pytest.approx(most)]
    assert one.metrics["reward/thinking/length"] == words
    assert one.metrics["reward/thinking/over"] == words - 10


def test_the_papers_rewards_are_a_sum_and_a_gate(play, judge):
    """LCPO-Exact: I - a |n_gold - n|; LCPO-Max: I * clip(a (n_gold - n) + 0.5, 0, 1)."""
    budget = {**WORDS, "budget": 10}
    right, wrong = (play(thought(8), answer=answer) for answer in (12, 13))
    exact = {"type": "weighted", "terms": {"right": NUMBER, "budget": budget}}
    assert judge(exact, right) + judge(exact, wrong) == pytest.approx([0.8, -0.2])
    most = {"type": "gated", "gate": NUMBER, "of": {**budget, "mode": "most"}}
    assert judge(most, right) + judge(most, wrong) == pytest.approx([0.7, 0.0])


@pytest.mark.parametrize(("text", "found"), [
    ("<think>a b</think> c", "a b"),
    ("Well. <think>a b</think> c <think>d</think> e", "Well. a b c d"),
    ("<think>a b", "a b"),  # cut off: all of it is thinking
    ("a b</think> c", "a b"),  # the prompt had opened it
    ("a b", "a b"),  # no tag, no saving
    ("<think>a</think> b <think> c d", "a b  c d"),
    ("</think><think>a b", "a b"),
    ("", ""),
])  # fmt: skip
def test_what_counts_as_thinking(text, found):
    assert Thinking(budget=1).thought(text) == found


def test_no_way_of_writing_the_tags_hides_thinking(play, judge):
    """500 words cost the same inside the tags, without them, in a second block, and after a tag that is not closed."""
    long = "so " * 500
    texts = (f"<think>{long}</think>12", f"{long}12", f"<think>a</think>b<think>{long}</think>12",
             f"<think>a</think>b<think>{long}12", f"{long}<think>a</think>12")  # fmt: skip
    assert judge({**WORDS, "budget": 10, "mode": "most"}, *map(play, texts)) == [0.0] * 5


def test_blanks_are_no_tokens_to_hide_among(play, judge):
    padded = play("<think>" + "x" * 285 + "</think>" + " " * 3000, chosen=300)
    judge({"type": "thinking", "budget": 10}, padded)
    assert padded.metrics["reward/thinking/length"] == 285.0


def test_tokens_are_those_of_the_last_answer_by_the_share_of_characters(play, judge):
    """20 tokens for 40 characters, 25 of them thinking, in the second turn; the first turn's do not count."""
    text = "<think>" + "x" * 25 + "</think>"
    assert len(text) == 40
    history = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "hm"})
    second = (*history, {"role": "user", "content": "?"}, {"role": "assistant", "content": text})
    mask = [False] * 3 + [True] * 7 + [False] * 2 + [True] * 20 + [False]  # the template's own last token
    sample = Sample([1] * 33, mask, [0.0] * 33, [0.0] * 33, version=0)
    one = Trajectory(Task("t", ()), second, [sample], said=(Said(history, 0, 9), Said(second, 0, 31)))
    assert judge({"type": "thinking", "budget": 10, "scale": 0.5}, one) == [-1.25]
    assert one.metrics["reward/thinking/length"] == 12.5
    assert judge({"type": "thinking", "budget": 10, "unit": "characters", "scale": 0.5}, one) == [-7.5]


def test_a_budget_may_stand_in_the_row(play, judge):
    config = {**WORDS, "column": "words"}
    assert judge(config, play(thought(4), words=6)) == [pytest.approx(-0.2)]
    for wrong in (None, "6", 0, -1, True, math.nan, math.inf):
        with pytest.raises(InputError, match=r"row-7.*column 'words' holds .* not a budget above 0"):
            judge(config, play(thought(4), words=wrong))
    with pytest.raises(InputError, match="column 'words' holds None"):
        judge(config, play(thought(4)))
    with pytest.raises(InputError, match="column 'words' holds None"):  # before the run begins
        Thinking(column="words").check(play(thought(4)).task)


@pytest.mark.parametrize("config", [{}, {"budget": 3, "column": "words"}])
def test_one_budget_and_no_more(play, judge, config):
    with pytest.raises(ValidationError, match="set either budget"):
        judge({"type": "thinking", **config}, play("x"))


@pytest.mark.parametrize("config", [
    COSINE, RELATIVE, {"type": "overlong", "limit": 4, "margin": 4}, {"type": "thinking", "budget": 3},
    {"type": "thinking", "budget": 3, "mode": "most"}, {"type": "tags"}, {"type": "repetition"},
    {"type": "repetition", "unit": "words"}, {"type": "script"},
], ids=lambda config: config["type"])  # fmt: skip
def test_nothing_said_has_a_finite_value(play, judge, config):
    empty = play("", chosen=0, answer=12)
    bare = Trajectory(Task("t", (), {"answer": 12}), (), [])
    for group in ([empty], [empty, empty], [empty, play("12", answer=12)], [bare], [bare, empty]):
        for value in judge(config, *group):
            assert value is not None
            assert math.isfinite(value)
            assert math.copysign(1, value) == 1 or value < 0, "no minus zero"
