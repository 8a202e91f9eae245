"""Tags with partial credit, and repetition: values worked out by hand."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlft.types import Said, Sample, Task, Trajectory

TAGS = {"type": "tags"}


@pytest.mark.parametrize(("text", "fifths"), [
    ("<think>a</think><answer>b</answer>", 5),
    ("\n<think>\na\nb\n</think>\n\n<answer>\nb\n</answer>\n", 5),
    ("<think>a</think><answer>b", 3),
    ("<think>a", 1),
    ("b", 0),
    ("", 0),
    ("Well: <think>a</think><answer>b</answer>", 4),
    ("<think>a</think> so <answer>b</answer>", 4),
    ("<think>a</think><answer>b</answer> Bye.", 4),
    ("<answer>b</answer><think>a</think>", 4),
    ("<think>a<answer>b</think>c</answer>", 4),
    ("<think>a<answer>b</answer></think>", 4),
    ("</think>a<think></answer>b<answer>", 4),
    ("<think></think><answer></answer>", 4),
    ("<think> </think><answer>b</answer>", 4),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 2),
    ("<think>a<think>b</think><answer>b</answer>", 3),
    ("<THINK>a</THINK><answer>b</answer>", 2),
])  # fmt: skip
def test_each_tag_and_the_whole_layout_count_a_fifth(play, judge, text, fifths):
    one = play(text)
    assert judge(TAGS, one) == [fifths / 5]
    assert one.metrics["reward/tags/whole"] == float(fifths == 5)
    assert judge({**TAGS, "partial": False}, one) == [float(fifths == 5)]


@pytest.mark.parametrize(("text", "value"), [
    ("a</think><answer>b</answer>", 1.0),
    ("a</think><answer>b", 0.5),
    ("<think>a</think><answer>b</answer>", 0.75),  # the prompt had said the first one
    ("</think><answer>b</answer>", 0.75),
    ("", 0.0),
])  # fmt: skip
def test_a_tag_that_the_prompt_opened_is_not_said_again(play, judge, text, value):
    assert judge({**TAGS, "opened": True}, play(text)) == [value]


def test_other_tags(play, judge):
    config = {**TAGS, "tags": ["plan", "code", "check"]}
    assert judge(config, play("<plan>a</plan><code>b</code><check>c</check>")) == [1.0]
    assert judge(config, play("<plan>a</plan><code>b</code>")) == [4 / 7]
    assert judge({**TAGS, "tags": ["a"]}, play("<a>b</a>")) == [1.0]
    for wrong, said in ((["a", "a"], "'a' stands there twice"), ([], "at least 1"), (["a b"], "match pattern")):
        with pytest.raises(ValidationError, match=said):
            judge({**TAGS, "tags": wrong}, play("x"))


def test_a_long_answer_without_its_end_takes_no_time(play, judge):
    assert judge(TAGS, play("<think>" + "a " * 500_000)) == [0.2]


def spoken(*turns: list[int]) -> Trajectory:
    """Turns of these tokens in one sample, a token of the prompt before each."""
    tokens, mask, said = [], [], []
    history: tuple = ()
    for turn in turns:
        tokens += [0, *turn]
        mask += [False, *[True] * len(turn)]
        text = " ".join(f"w{token}" for token in turn)
        history = (*history, {"role": "user", "content": "?"}, {"role": "assistant", "content": text})
        said.append(Said(history, 0, len(tokens) - 1))
    zeros = [0.0] * len(tokens)
    return Trajectory(Task("t", ()), history, [Sample(tokens, mask, zeros, list(zeros), 0)], said=tuple(said))


@pytest.mark.parametrize(("turns", "n", "repeated"), [
    ([[1, 2, 3, 4]], 2, 0.0),  # 12 23 34
    ([[1, 2, 1, 2]], 2, 1 / 3),  # 12 21 12
    ([[1, 1, 1, 1, 1]], 2, 0.75),  # 11, four times
    ([[1, 2, 3], [1, 2, 3]], 2, 0.5),  # again in the next turn; 3 0 1 is no run of its own
    ([[1, 2], [3, 1]], 2, 0.0),
    ([[5, 5, 5]], 1, 2 / 3),
    ([[1, 2]], 4, 0.0),  # too short for one
    ([[7] * 1000], 4, 1 - 1 / 997),
])  # fmt: skip
@pytest.mark.parametrize("unit", ["tokens", "words"])
def test_the_share_of_ngrams_that_were_there_before(judge, turns, n, repeated, unit):
    one = spoken(*turns)
    assert judge({"type": "repetition", "n": n, "unit": unit}, one) == [pytest.approx(-repeated)]
    assert one.metrics["reward/repetition/repeated"] == pytest.approx(repeated)


def test_some_repetition_may_be_free(judge):
    config = {"type": "repetition", "n": 2, "free": 0.5}
    assert judge(config, spoken([1, 2, 1, 2])) == [0.0]
    assert judge(config, spoken([1, 1, 1, 1, 1])) == [-0.5]  # 0.25 of 0.5


def test_words_are_told_apart_whatever_their_case(judge, play):
    assert judge({"type": "repetition", "n": 1, "unit": "words"}, play("So so\tSO what")) == [-0.5]


def test_more_repetition_is_never_better(judge):
    values = judge({"type": "repetition", "n": 2}, *(spoken([1, 2, 3, 4, 5, *[1, 2] * n]) for n in range(12)))
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.0
    assert -1 < values[-1] < -0.5
