"""Letters by script, counted by hand."""

from __future__ import annotations

import unicodedata
from typing import get_args

import pytest
from pydantic import ValidationError

from rlft.rewards.script import Name, letters
from rlft.types import Task, Trajectory

SCRIPT = {"type": "script"}


@pytest.mark.parametrize(("text", "found"), [
    ("Hello, world 12", {"latin": 10}),
    ("naïve cafe\u0301", {"latin": 9}),  # a combining accent is no letter
    ("答案是 12", {"han": 3}),
    ("我用 addition 来算", {"han": 4, "latin": 8}),
    ("是", {"han": 1}),
    ("Let x = π, then πr^2 is right", {"latin": 15}),  # π alone, and beside r, is a symbol
    (r"\frac{x}{y} равно \alpha", {"cyrillic": 5}),
    ("हिन्दी", {"devanagari": 3}),  # three consonants, without vowel signs
    ("ＡＢＣ ｱｲ", {"latin": 3, "katakana": 2}),
    ("10 kΩ, 5 µm, Δx, 2πr", {"latin": 4}),  # lone Greek letters beside others are symbols
    ("東京タワーへ", {"han": 2, "katakana": 3, "hiragana": 1}),
    ("한국어", {"hangul": 3}),
    ("3 + 4 = 7", {}),
    ("", {}),
])  # fmt: skip
def test_letters_are_counted_by_script(text, found):
    assert dict(letters(text)) == found


@pytest.mark.parametrize(("text", "value"), [
    ("It is twelve.", 1.0), ("12", 1.0), ("", 1.0), ("The answer 答案 is", 1 - 2 / 13), ("答案是十二", 0.0),
])  # fmt: skip
def test_an_answer_keeps_to_the_letters_of_its_question(play, judge, text, value):
    one = play(text)  # the question is in English
    assert judge(SCRIPT, one) == [pytest.approx(value)]
    assert one.metrics["reward/script/mixed"] == float(value < 1)


def test_scripts_may_be_named(play, judge):
    group = [play(text) for text in ("答案是十二", "十二 twelve")]
    assert judge({**SCRIPT, "scripts": ["han"]}, *group) == [1.0, 0.25]
    assert judge({**SCRIPT, "scripts": ["han", "latin"]}, *group) == [1.0, 1.0]
    with pytest.raises(ValidationError, match="scripts"):
        judge({**SCRIPT, "scripts": ["klingon"]}, play("x"))


def test_thinking_and_answer_are_read_apart(play, judge):
    """The tags are no words. Where nothing is closed, or something opened after it, all is thinking."""
    group = [
        play("<think>答案是 two</think><answer>The answer</answer>"),
        play("The answer 答案"),
        play("答<think>a b"),
    ]
    assert judge({**SCRIPT, "part": "thinking"}, *group) == [0.5, pytest.approx(9 / 11), 0.0]
    assert judge({**SCRIPT, "part": "answer"}, *group) == [1.0, 1.0, 1.0]
    assert judge(SCRIPT, group[0]) == [12 / 15]
    assert judge({**SCRIPT, "part": "thinking", "tag": "reason"}, play("<reason>答</reason>yes")) == [0.0]


def test_a_question_without_letters_asks_for_none(play, judge):
    one = play("十二 twelve")
    one.task = type(one.task)("t", ({"role": "user", "content": "7+5"},))
    assert judge(SCRIPT, one) == [1.0]


def test_the_names_are_those_that_letters_have():
    """Of the interpreter's own Unicode tables; a name that no letter has could never be met."""
    have = {script for char in map(chr, range(0x20000)) if unicodedata.category(char).startswith("L")
            for script in letters(char * 2)}  # fmt: skip
    assert set(get_args(Name)) <= have


@pytest.mark.parametrize(
    ("asked", "said"), [("これはなに", "テスト"), ("今日の飲み物は何ですか", "コーヒーです"), ("なに", "らーめん")]
)
def test_japanese_is_one_language_in_three_scripts(asked, said, judge):
    task = Task("t", ({"role": "user", "content": asked},))
    one = Trajectory(task, (*task.messages, {"role": "assistant", "content": said}), [])
    assert judge({"type": "script"}, one) == [1.0]
