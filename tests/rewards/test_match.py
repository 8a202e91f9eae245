"""Exact text and numbers."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlft.rewards.match import Number, numbers_in
from rlft.types import InputError, Sample, Task, Trajectory


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7+5=12", ["7", "5", "12"]),
        ("The answer is 1,234.", ["1234"]),
        ("-3", ["-3"]),
        ("12.", ["12"]),
        ("no number here", []),
        ("", []),
        ("7-5", ["7", "5"]),
        ("7 - 5", ["7", "5"]),
        ("7 -5", ["7", "-5"]),
        ("x=-3", ["-3"]),
        ("(-3)", ["-3"]),
        ("(2)-3", ["2", "3"]),
        ("+3", ["3"]),
        ("\u22123", ["-3"]),  # minus sign
        ("\u20133", ["-3"]),  # en dash
        ("3\u20135", ["3", "5"]),  # a range
        ("50%", ["50"]),
        ("$1,234,567.89", ["1234567.89"]),
        ("-$3", ["-3"]),
        ("$-3", ["-3"]),
        ("1\u202f234", ["1234"]),
        ("1,2,3", ["1", "2", "3"]),
        ("1,2345", ["1", "2345"]),
        ("12345,678", ["12345", "678"]),
        (".5", ["0.5"]),
        ("-.5", ["-0.5"]),
        ("007", ["7"]),
        ("version 1.2.3", ["1.2"]),
        ("x1.5", []),
        ("2.5e-3", ["0.0025"]),
        ("1E5", ["100000"]),
        ("2\u00d710^5", ["2", "10"]),
        ("12 cm^2", ["12"]),
        ("x^{-2} is 9", ["9"]),
        ("12 g of H2O", ["12"]),
        ("12km, the 3rd", ["12", "3"]),
        ("答案是12。", ["12"]),
        ("答案是-12", ["-12"]),
        ("\uff11\uff12", ["12"]),  # full-width digits
        ("12:30", ["12", "30"]),
        ("\\boxed{12}", ["12"]),
        ("**12**", ["12"]),
        ("9" * 60, ["9" * 60]),
    ],
)
def test_numbers_that_stand_in_a_text(text, found):
    assert numbers_in(text) == [Decimal(number) for number in found]


@pytest.mark.parametrize(
    ("which", "text", "value"),
    [
        ("last", "7+5=12", 1.0),
        ("first", "7+5=12", 0.0),
        ("first", "12=7+5", 1.0),
        ("only", "It is 12.", 1.0),
        ("only", "12 or 12", 0.0),
        ("only", "none", 0.0),
        ("last", "none", 0.0),
        ("last", "12.0", 1.0),
        ("last", "-12", 0.0),
        ("last", "12.0001", 0.0),
        ("last", "112", 0.0),
        ("last", "1e9999", 0.0),
    ],
)
def test_which_number_counts(play, judge, which, text, value):
    assert judge({"type": "number", "which": which}, play(text, answer="12")) == [value]


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        (3, "3.0"),
        (3.0, "3"),
        ("3.0", "3"),
        ("1,234", "1234"),
        ("$18", "18 dollars"),
        ("50%", "50 percent"),
        (" 12. ", "12"),
        ("\u22123", "-3"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (10**40 + 1, "1" + "0" * 39 + "1"),
        ("48+24 = <<48+24=72>>72 clips.\n#### 72", "72"),  # as GSM8K writes it
        ("#### 1,080\n", "1080"),
    ],
)
def test_the_right_number_may_be_written_in_many_ways(play, judge, gold, text):
    assert judge({"type": "number"}, play(text, answer=gold)) == [1.0]


def test_a_long_integer_that_differs_in_its_last_digit_is_wrong(play, judge):
    assert judge({"type": "number"}, play("1" + "0" * 40, answer=10**40 + 1)) == [0.0]


def test_tolerance_is_absolute_and_its_edge_is_inside(play, judge):
    group = [play(text, answer="0.3") for text in ("0.1", "0.5", "0.09999", "0.51", "-0.3")]
    assert judge({"type": "number", "tolerance": 0.2}, *group) == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({}, "is missing"),
        ({"solution": "12"}, "there is: solution"),
        ({"answer": None}, "is empty"),
        ({"answer": "  "}, "is empty"),
        ({"answer": float("nan")}, "is empty"),
        ({"answer": True}, "holds a bool"),
        ({"answer": ["12"]}, "holds a list"),
        ({"answer": "a dozen"}, "not a number"),
        ({"answer": "1/2"}, "type: math"),
        ({"answer": "7 5"}, "not a number"),
        ({"answer": float("inf")}, "not a number"),
    ],
)
def test_an_answer_that_is_no_number_names_task_and_column(play, judge, info, reason):
    with pytest.raises(InputError, match=reason) as caught:
        judge({"type": "number"}, play("12", **info))
    assert "task 'row-7'" in str(caught.value)
    assert "column 'answer'" in str(caught.value)


def test_key_chooses_the_column(play, judge):
    assert judge({"type": "number", "key": "sum"}, play("12", answer="13", sum=12)) == [1.0]


@given(st.integers(), st.sampled_from(["{}", "{:,}", "It is {:,}.", "7+5=\n{}", "x={},", "**{}**", "${:,}%"]))
def test_every_integer_is_accepted_as_python_writes_it(n, template):
    task = Task("t", (), {"answer": n})
    play = Trajectory(task, ({"role": "assistant", "content": template.format(n)},), [Sample([], [], [], [], 0)])
    assert asyncio.run(Number().build()((play,))) == [1.0]
    wrong = Trajectory(Task("t", (), {"answer": n + 1}), play.messages, play.samples)
    assert asyncio.run(Number().build()((wrong,))) == [0.0]


@pytest.mark.parametrize("text", ["1,234" * 20_000, "1 " * 50_000, "9" * 100_000, "1,222," * 20_000, "-" * 100_000])
def test_reading_a_long_completion_takes_linear_time(text):
    start = time.process_time()
    numbers_in(text)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("options", "text", "value"),
    [
        ({}, "Yes", 1.0),
        ({}, " Yes\n", 1.0),
        ({}, "yes", 0.0),
        ({}, "Yes.", 0.0),
        ({"ignore_case": True}, "YES", 1.0),
        ({"strip": False}, "Yes\n", 0.0),
        ({"strip": False}, "Yes", 1.0),
    ],
)
def test_exact(play, judge, options, text, value):
    assert judge({"type": "exact", **options}, play(text, answer="Yes")) == [value]


def test_exact_compares_a_number_as_text(play, judge):
    assert judge({"type": "exact"}, play("12", answer=12), play("12.0", answer=12)) == [1.0, 0.0]
    with pytest.raises(InputError, match="is empty"):
        judge({"type": "exact"}, play("", answer=""))


def test_an_empty_completion_is_wrong_and_not_an_error(play, judge):
    for kind in ("exact", "number", "math"):
        assert judge({"type": kind}, play("", answer="12")) == [0.0]
