"""Letters and pairs, read from what people write."""

from __future__ import annotations

import time

import pytest

from rlft.rewards.choice import chosen, pairs
from rlft.types import InputError

CAPITALS = {"A": "Paris", "B": "Rome", "C": "Berlin", "D": "Madrid"}


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("(B)", "B"),
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B) Rome", "B"),
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        (r"I first thought \boxed{A}. Then it must be \boxed{C}.", "C"),
        ("<answer>B</answer>", "B"),
        ("The answer is (C)", "C"),
        ("So the answer is B.", "B"),
        ("the answer is c", "C"),
        ("Answer: D", "D"),
        ("**Answer:** B", "B"),
        ("**Answer: (A)**", "A"),
        (r"The answer is $\text{B}$.", "B"),
        ("The correct option is D because the others are not.", "D"),
        ("The answer is A because (B) and (C) are wrong.", "A"),
        ("The answer is A. No, the answer is D.", "D"),
        ("I would go with (B) here", "B"),
        ("not (A), rather (C)", "C"),
        ("Let me weigh them.\n\nC", "C"),
        ("Let me weigh them.\n\n**C.**", "C"),
        ("A. Because B is not valid", "A"),
        ("Відповідь: B", "B"),
        ("", ""),
        ("I cannot tell.", ""),
        ("The answer is Considered unknown", ""),
        ("The answer is A train.", ""),  # an article
        ("A train leaves at noon", ""),
        ("The answer is (E)", ""),  # not among the four
        (r"\boxed{}", ""),
        (r"\boxed{A or B}", ""),
        ("(E)", ""),
    ],
)
def test_one_letter(text, letters):
    assert chosen(text, "ABCD", {}) == set(letters)


@pytest.mark.parametrize(
    ("text", "letters"),
    [("Rome", "B"), (r"\boxed{rome}", "B"), ("B. Rome", "B"), ("<answer> Rome. </answer>", "B"), ("London", "")],
)
def test_the_text_of_an_option(text, letters):
    assert chosen(text, "ABCD", CAPITALS) == set(letters)


def test_a_text_that_two_options_have_is_no_choice():
    assert chosen("Rome", "ABCD", CAPITALS | {"C": "Rome"}) == set()


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("A, C", "AC"),
        ("AC", "AC"),
        (r"\boxed{C, A}", "AC"),
        ("The answers are A and C.", "AC"),
        ("The answer is ACD", "ACD"),
        ("Answer: A", "A"),
        ("The answer is (A), (C)", "AC"),
        ("AA", ""),  # no set of letters
    ],
)
def test_several_letters(text, letters):
    assert chosen(text, "ABCD", {}, several=True) == set(letters)


@pytest.mark.parametrize(
    ("options", "info", "said", "value"),
    [
        ({}, {"answer": "B"}, "(B)", 1.0),
        ({}, {"answer": "(B)"}, "The answer is B.", 1.0),
        ({}, {"answer": "B"}, "The answer is C.", 0.0),
        ({}, {"answer": "B"}, "no idea", 0.0),
        ({}, {"answer": "A, C"}, "The answers are C and A.", 1.0),
        ({}, {"answer": ["A", "C"]}, "A", 0.0),
        ({"partial": True}, {"answer": "AC"}, "A", 0.8),  # of five letters four are judged rightly
        ({"partial": True}, {"answer": "AC"}, "", 0.0),
        ({"partial": True, "letters": "ABCD"}, {"answer": "AC"}, "B, D", 0.0),
        ({"options": "choices"}, {"answer": "B", "choices": ["Paris", "Rome"]}, "Rome", 1.0),
        ({"options": "choices"}, {"answer": "Rome", "choices": ["Paris", "Rome"]}, "(B)", 1.0),
        ({"options": "choices"}, {"answer": "B", "choices": {"A": "Paris", "B": "Rome"}}, "Paris", 0.0),
        ({"letters": "АБВГД"}, {"answer": "В"}, "Відповідь: В", 1.0),
    ],
)
def test_choice(play, judge, options, info, said, value):
    assert judge({"type": "choice"} | options, play(said, **info)) == [pytest.approx(value)]


def test_a_guess_of_everything_gains_nothing(play, judge):
    """Naming all letters is no way round: with one right letter it is none, with two it is wrong."""
    assert judge({"type": "choice"}, play("A, B, C, D, E", answer="B")) == [0.0]
    assert judge({"type": "choice"}, play("A, B, C, D, E", answer="A, B")) == [0.0]
    assert judge({"type": "matching"}, play("1-A, 1-B, 1-C, 2-A", answer="1-B, 2-A")) == [0.5]


@pytest.mark.parametrize(
    ("config", "info", "said"),
    [
        ({"type": "choice"}, {"answer": "Rome"}, "none of the letters"),
        ({"type": "choice"}, {"answer": "F"}, "none of the letters"),
        ({"type": "choice"}, {}, "is missing"),
        ({"type": "choice", "options": "choices"}, {"answer": "A"}, "not the options"),
        ({"type": "choice", "options": "choices"}, {"answer": "A", "choices": list("abcdef")}, "not the options"),
        ({"type": "matching"}, {"answer": "BCA"}, "no pair"),
        ({"type": "matching"}, {}, "is missing"),
    ],
)
def test_a_row_that_cannot_be_judged_stops_the_run_by_its_name(play, judge, config, info, said):
    with pytest.raises(InputError, match=rf"(?s)task 'row-7'.*{said}"):
        judge(config, play("A", **info))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1-C, 2-A", {"1": "C", "2": "A"}),
        ("1 - В\n2 - Д", {"1": "В", "2": "Д"}),
        ("1) C; 2) A", {"1": "C", "2": "A"}),
        (r"\boxed{1 \to C, 2 \to A}", {"1": "C", "2": "A"}),
        ("(1)-(C) and (2)-(A)", {"1": "C", "2": "A"}),
        ("1C 2A", {"1": "C", "2": "A"}),
        ("1: c\n2: a", {"1": "C", "2": "A"}),
        ("First 1-B. No: 1-C, 2-A", {"1": "C", "2": "A"}),
        ("1. A train leaves. 2. A bus.", {}),
        ("3-C", {}),  # nobody asked for a third
        ("x1-C", {}),
    ],
)
def test_pairs(text, found):
    assert pairs(text, {"1", "2"}) == found


@pytest.mark.parametrize(
    ("partial", "info", "said", "value"),
    [
        (True, "1-C, 2-A, 3-B, 4-D", "1-C, 2-A, 3-D, 4-B", 0.5),
        (False, "1-C, 2-A, 3-B, 4-D", "1-C, 2-A, 3-D, 4-B", 0.0),
        (False, "1-C, 2-A", "2-A, 1-C", 1.0),
        (True, {"1": "C", 2: "A"}, "1-C", 0.5),
        (True, "1-C, 2-A", "I do not know", 0.0),
    ],
)
def test_matching(play, judge, partial, info, said, value):
    one = play(said, answer=info)
    assert judge({"type": "matching", "partial": partial}, one) == [value]
    assert one.metrics["reward/matching/unread"] == float("-" not in said)


@pytest.mark.parametrize(
    "text",
    [
        "Answer: A, B, C, D, E",
        "The answer is A or B",
        "The answer is A and B.",
        r"\boxed{A) Paris B) Rome}",
        r"\boxed{A. B. C. D.}",
        "Options A and C are wrong",
        "Option A is incorrect",
    ],
)
def test_a_list_or_a_denial_chooses_nothing(text):
    assert chosen(text, "ABCDE", {}) == set()


@pytest.mark.parametrize(
    "text",
    [
        "The answer is B. Options A, C and D are incorrect.",
        "Option B is correct.",
        "B is the correct answer.",
        "The correct answer is letter B.",
        "Therefore, B.",
        "Answer: `B`",
        'Answer: "B"',
        r"The answer is $\mathbf{B}$.",
        "The answer is Rome.",
        "Answer: Rome",
        r"\boxed{\text{Rome}}",
    ],
)
def test_other_ways_to_choose_b(text):
    assert chosen(text, "ABCDE", {"A": "Paris", "B": "Rome"}) == {"B"}


@pytest.mark.parametrize("text", ["Answer: A; C", "Answers: both A and C"])
def test_other_ways_to_choose_two(text):
    assert chosen(text, "ABCDE", {}, several=True) == {"A", "C"}


def test_one_right_letter_has_no_parts(play, judge):
    config = {"type": "choice", "partial": True}
    assert judge(config, *(play(f"Answer: {letter}", answer="B") for letter in "ABC")) == [0.0, 1.0, 0.0]


def test_degenerate_texts_are_read_at_once():
    begun = time.process_time()
    for text in ("x" + "\n" * 50_000 + "x", "<answer>" * 50_000, "answer " * 20_000, "A. " * 20_000):
        chosen(text, "ABCDE", {"A": "Paris", "B": "Rome"})
    assert time.process_time() - begun < 5
