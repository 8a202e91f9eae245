"""Programs in completions, and what they are worth."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from rlft.rewards.catalog import RewardConfig
from rlft.sandbox.cases import program_in
from rlft.types import InputError, Trajectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
PAGE = (Path(__file__).parents[2] / "docs/rewards-code.md").read_text()
EXAMPLES = [yaml.safe_load(block)["reward"] for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
ADD = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


def scores(plain: dict[str, Any], *group: Trajectory) -> list[float | None]:
    reward: Any = TypeAdapter(RewardConfig).validate_python(plain)
    return list(asyncio.run(reward.build()(group)))


def test_the_first_example(play):
    half = "def add(a, b):\n    return 3"
    group = [play(text, tests=TESTS) for text in (ADD, half, "x = eval('1')", "def add(a, b:")]
    assert scores(EXAMPLES[0], *group) == pytest.approx([1.1, 0.6, 0.0, 0.0])
    assert group[0].metrics["reward/right/all"] == 1.0
    assert (group[1].metrics["reward/right/passed"], group[1].metrics["reward/right/wrong"]) == (0.5, 1.0)
    assert group[2].metrics["reward/right/error"] == 1.0
    assert (group[3].metrics["reward/right/compile"], group[3].metrics["reward/solves/compiles"]) == (1.0, 0.0)


def test_the_row_of_the_page_is_read(play):
    [block] = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    assert scores({"type": "code"}, play(ADD, tests=json.loads(block)["tests"])) == [1.0]


def test_the_program_of_the_page_prints_what_it_says(capsys):
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(block, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["1 1 wrong", "1"]
    assert "rlimits" in lines[2]


@pytest.mark.parametrize(
    "tests",
    [
        [{"input": "1 2", "output": "3"}, {"input": "2 2", "output": 5}],
        {"inputs": ["1 2", ["2 2"]], "outputs": ["3\n", ["5"]]},
        '{"inputs": ["1 2", "2 2"], "outputs": ["3", "5"]}',
    ],
)
def test_scripts_and_the_forms_of_their_tests(tests: Any, play):
    script = "a, b = map(int, input().split())\nprint(a + b)"
    assert scores({"type": "code"}, play(script, tests=tests)) == [0.5]
    assert scores({"type": "code", "whole": True}, play(script, tests=tests)) == [0.0]


@pytest.mark.parametrize("info", [{}, {"tests": []}, {"tests": 3}, {"tests": [{"input": "1"}]}, {"tests": ""}])
def test_a_row_without_tests_is_named(info: dict[str, Any], play):
    with pytest.raises(InputError, match=r"column 'tests'.*Give a list"):
        scores({"type": "code"}, play(ADD, **info))
    reward: Any = TypeAdapter(RewardConfig).validate_python({"type": "weighted", "terms": {"a": {"type": "code"}}})
    with pytest.raises(InputError, match=r"column 'tests'.*Give a list"):  # before the run begins
        reward.check(play(ADD, **info).task)
    reward.check(play(ADD, tests=TESTS).task)


def test_a_program_of_thought(play):
    group = [
        play(text, answer=12) for text in ("print(3)\nprint(7 + 5)", "print('12.0')", "print(13)", "12", "while 1: 0")
    ]
    assert scores(EXAMPLES[1] | {"seconds": 0.5}, *group) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [one.metrics["reward/program/printed"] for one in group] == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert group[4].metrics["reward/program/timeout"] == 1.0


SLOW = "def add(a, b):\n    for _ in range({}):\n        pass\n    return a + b"


def test_a_faster_program_gets_more(play):
    """Ten times the work takes more than twice the time, whatever the machine: the lowest value. None takes no time."""
    info = {"tests": TESTS, "solution": SLOW.format(2_000_000)}
    fast, slow, wrong = (play(text, **info) for text in (SLOW.format(10), SLOW.format(20_000_000), "x = 1"))
    best, worst, none = scores(EXAMPLES[2], fast, slow, wrong)
    assert best is not None
    assert 1.25 < best <= 1.5
    assert (worst, none) == (0.5, 0.0)
    assert "reward/code/time" not in wrong.metrics


def test_a_reference_that_fails_its_tests_is_named(play):
    with pytest.raises(InputError, match=r"'solution' fails 1 of the row's 2 tests \(wrong\)"):
        scores(EXAMPLES[2], play(ADD, tests=TESTS, solution="def add(a, b): return 3"))
    with pytest.raises(InputError, match="'solution' holds no program"):
        scores(EXAMPLES[2], play(ADD, tests=TESTS))


def test_speed_needs_a_reference():
    with pytest.raises(ValidationError, match="set `reference`"):
        TypeAdapter(RewardConfig).validate_python({"type": "code", "speed": 1.0})


def test_the_parts_that_are_asked_for(play):
    config = {"type": "syntax", "nodes": {"FunctionDef": 2}, "calls": ["helper"], "absent": ["os", "Lambda"]}
    good = "def helper(): pass\ndef main(): helper()"
    texts = (
        good,
        "def main(): helper()",
        good.replace(" helper()", " 1"),
        "import os\n" + good,
        good + "\nlambda: 1",
        "",
    )
    assert scores(config, *map(play, texts)) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    with pytest.raises(ValidationError, match="no 'Function'"):
        TypeAdapter(RewardConfig).validate_python({"type": "syntax", "nodes": {"Function": 1}})


def test_a_sandbox_that_fails_is_a_failure_and_no_zero(play):
    one = play(ADD, tests=TESTS)
    assert scores({"type": "code", "through": ["false"]}, one) == [None]
    assert one.failures[0].kind == "raised"
    assert "SandboxError" in one.failures[0].said


def test_a_command_that_is_not_there_is_named():
    with pytest.raises(InputError, match="no command 'no-such-command'"):
        TypeAdapter(RewardConfig).validate_python({"type": "code", "through": ["no-such-command"]}).build()


def test_a_flood_of_digits_is_read_from_its_end(play):
    flood = play("print('1,' * 400_000, '12')", answer=12)
    assert scores({"type": "program"}, flood) == [1.0]


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\na\n```", "a"),
        ("```\na\n```\nor\n```py\nb\nc\n```\n", "b\nc"),
        ("first\n```python\na", "a"),
        ("a = 1", "a = 1"),
        ("```python\n```", ""),
    ],
)
def test_where_the_program_is(completion: str, program: str):
    assert program_in(completion).strip() == program
