"""Programs and repairs, on the real sandbox."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from rlft.envs.base import Action
from rlft.envs.own.code import CodeConfig, report
from rlft.sandbox.cases import program_in
from rlft.sandbox.programs import Printed, run
from rlft.types import InputError, Task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
QUESTION = ({"role": "user", "content": "Write f, which doubles a number."},)
TESTS = ["assert f(2) == 4", "assert f(0) == 0, 'zero'", "assert f(-3) == -6"]
RIGHT = "Like this:\n```python\ndef f(x):\n    return 2 * x\n```\n"
SQUARE = "```python\ndef f(x):\n    return x * x\n```"
SUM = "def f(x):\n    return x + 2"


def episode(knobs: CodeConfig, *said: str, tests: Any = TESTS) -> tuple[list[str], list[Any]]:
    """What was shown, and the turns."""

    async def play() -> tuple[list[str], list[Any]]:
        env = knobs.build()(Task("t", QUESTION, {"tests": tests}))
        assert await env.reset() == QUESTION
        turns = [await env.step(Action(text, "stop")) for text in said]
        await env.close()
        return [message["content"] for turn in turns for message in turn.messages], turns

    return asyncio.run(play())


def test_the_failing_test_is_shown_and_a_repair_wins() -> None:
    shown, turns = episode(CodeConfig(), SUM, SQUARE, RIGHT)
    assert [turn.done for turn in turns] == [False, False, True]
    first, second = (text.splitlines() for text in shown)
    assert first[:2] == ["1 of 3 tests pass. Test 2 fails: wrong.", "assert f(0) == 0, 'zero'"]
    assert "zero" in first[2]
    assert second[:2] == ["2 of 3 tests pass. Test 3 fails: wrong.", "assert f(-3) == -6"]
    assert first[-1] == second[-1] == "Repair the program, and write the whole of it again."
    assert turns[1].metrics == {"success": 0, "passed": pytest.approx(2 / 3), "first": 0, "repairs": 1}
    assert turns[2].metrics == {"success": 1, "passed": 1, "first": 0, "repairs": 2}


def test_a_right_program_ends_at_once_and_a_wrong_one_with_the_repairs() -> None:
    _, (only,) = episode(CodeConfig(), RIGHT)
    assert (only.done, only.metrics) == (True, {"success": 1, "passed": 1, "first": 1, "repairs": 0})
    shown, turns = episode(CodeConfig(repairs=1), "I cannot.", "", tests=TESTS[:1])
    assert [turn.done for turn in turns] == [False, True]
    assert shown[0].startswith("0 of 1 tests pass. Test 1 fails: ")
    assert turns[1].metrics["success"] == 0


def test_what_is_printed_is_shown_beside_what_was_expected() -> None:
    tests: list[Any] = [{"input": "4", "output": "8"}]
    (shown,), _ = episode(CodeConfig(repairs=1), "print(int(input()) + 1)", tests=tests)
    assert "Input:\n4\nExpected:\n8\nPrinted:\n5" in shown
    (shown,), _ = episode(CodeConfig(repairs=1, show="reason"), "print(int(input()) + 1)", tests=tests)
    assert "8" not in shown


@pytest.mark.parametrize("said", [
    "while True: pass", "x = [0] * 10**10", "import os; os._exit(0)", "print('x' * 10**7)", "\x00", "\ud800",
    "(" * 5000, "def f(x): raise SystemExit", "```python\n", "é = 1",
])  # fmt: skip
def test_no_program_ends_more_than_its_answer(said: str) -> None:
    knobs = CodeConfig(seconds=0.5, repairs=1, longest=200)
    shown, turns = episode(knobs, said, RIGHT, tests=TESTS[:1])
    assert [turn.metrics["success"] for turn in turns] == [0, 1]
    for count in (len, lambda text: len(text.split())):
        assert sum(map(count, shown)) <= knobs.room(0, count)


def test_a_row_without_tests_is_told() -> None:
    for tests in (None, [], [3], [""], {"inputs": ["1"], "outputs": []}):
        with pytest.raises(InputError, match="column 'tests'"):
            episode(CodeConfig(), RIGHT, tests=tests)
    with pytest.raises(ValidationError, match=r"it has no \{report\}"):
        CodeConfig(message="Again.")


def test_the_report_is_of_the_first_that_fails() -> None:
    tests = [Printed("1", "1"), Printed("2", "3")]
    assert report(run(program_in("print(input())"), tests), tests, whole=True) == (
        "1 of 2 tests pass. Test 2 fails: wrong.\nInput:\n2\nExpected:\n3\nPrinted:\n2"
    )
