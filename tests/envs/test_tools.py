"""Functions and classes as tools: their schemas, what a call may say, and how calls run in an episode."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils.chat_template_utils import get_json_schema

from rlft.envs.base import Action, EnvKnobs
from rlft.envs.tools.base import Refused, cut
from rlft.envs.tools.calling import ToolsConfig
from rlft.envs.tools.functions import described
from rlft.envs.tools.hints import Hint, Hints
from rlft.types import InputError, Task, Turn
from tests.envs import mine

MINE = "tests.envs.mine"
TASK = Task("t", ({"role": "user", "content": "What is 2 + 3?"},), {"answer": 5})
Knobs = dict[str, Any]


def config(*tools: str, **knobs: Any) -> ToolsConfig:
    return ToolsConfig.model_validate({"tools": [f"{MINE}:{name}" for name in tools], **knobs})


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(knobs: EnvKnobs, *answers: str, finish: str = "stop", task: Task = TASK) -> list[Turn]:
    """The replies to these answers, one after another."""

    async def episode() -> list[Turn]:
        env = knobs.build()(task)
        try:
            await env.reset()
            return [await env.step(Action(answer, finish, answer)) for answer in answers]
        finally:
            await env.close()

    return asyncio.run(episode())


def told(turn: Turn) -> list[str]:
    return [message["content"] for message in turn.messages]


@pytest.mark.parametrize("function", [mine.add, mine.sleep])
def test_schemas_are_those_of_transformers(function: Callable[..., Any]) -> None:
    theirs = get_json_schema(function)
    theirs["function"].pop("return", None)
    assert described(function, "f").schema == theirs


def test_schemas_of_types_that_transformers_writes_in_another_way() -> None:
    parameters = described(mine.paint, "f").schema["function"]["parameters"]
    assert parameters["required"] == ["colour", "layers"]
    assert parameters["properties"]["colour"] == {
        "type": "string", "enum": ["red", "blue"], "description": "Of the paint.",
    }  # fmt: skip
    assert parameters["properties"]["layers"] == {
        "type": "array", "items": {"type": "integer"}, "description": "The thickness of each.",
    }  # fmt: skip
    assert parameters["properties"]["note"] == {
        "anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "description": "Anything else.",
    }  # fmt: skip


def test_an_argument_that_is_called_title_keeps_its_place() -> None:
    def book(title: str) -> str:
        """Find a book."""
        return title

    assert described(book, "f").schema["function"]["parameters"]["properties"] == {"title": {"type": "string"}}


@pytest.mark.parametrize(("name", "reason"), [
    ("untyped", "'a' has no type hint"),
    ("undocumented", "no docstring"),
    ("spread", "'numbers' has no name of its own"),
    ("nothing", "cannot be had"),
])  # fmt: skip
def test_a_function_that_is_no_tool_is_refused(name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        config(name).build()


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="two tools are called 'add'"):
        config("add", "add").build()


def test_no_tool_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="there is no tool"):
        config().build()


@pytest.mark.parametrize(("call", "error"), [
    (called("add", a=1), "Error: add: 'b' is missing. It takes: add(a: integer, b: integer)"),
    (called("add", a=1, b=2, c=3), "Error: add: 'c' is not an argument of it. It takes: add(a: integer, b: integer)"),
    (called("add", a=1, b="2"), "Error: add: 'b' should be a valid integer. It takes: add(a: integer, b: integer)"),
    (called("plus", a=1, b=2), "Error: there is no tool 'plus'. There are: add, paint."),
    (called("paint", colour="red", layers=[1, "x"]),
     "Error: paint: 'layers.1' should be a valid integer. It takes: paint(colour: string, layers: array, note?: any)"),
    ('<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>',
     'Error: the "arguments" of add are no object with one value for each'),
])  # fmt: skip
def test_a_call_that_is_wrong_is_told_why(call: str, error: str) -> None:
    (turn,) = play(config("add", "paint", format="hermes"), call)
    assert told(turn) == [error]
    assert not turn.done
    assert turn.metrics == {"calls": 1, "call_errors": 1, "call_failures": 0, "answered": 0}


def test_numbers_that_are_none_and_arguments_without_end_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    nan, inf, nested = play(
        config("sleep", format="hermes"),
        called("sleep", seconds=math.nan),
        called("sleep", seconds=math.inf),
        called("sleep", seconds=deep),
    )
    for turn in (nan, inf):
        assert "'seconds' should be a finite number" in told(turn)[0]
    assert nested.metrics["call_errors"] == 3
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(Refused, match="nested too deeply"):
        described(mine.sleep, "f").read({"seconds": deep})


@pytest.mark.parametrize("call", ['<tool_call>{"name": "add"', "<tool_call>add(1, 2)</tool_call>"])
def test_a_call_that_cannot_be_read_is_told_why(call: str) -> None:
    (turn,) = play(config("add", format="hermes"), call)
    assert turn.messages[0]["role"] == "user"  # there is no call that a tool could answer
    assert "Error: the call is no JSON: Expecting" in told(turn)[0]
    assert turn.said is None
    assert turn.metrics["call_errors"] == 1


def test_what_a_tool_raises_is_told_and_counted_apart() -> None:
    (turn,) = play(config("fails", format="hermes"), called("fails"))
    assert told(turn) == ["Error: fails: KeyError: 'nothing there'"]
    assert (turn.metrics["call_errors"], turn.metrics["call_failures"]) == (0, 1)


@pytest.mark.parametrize("name", ["sleep", "slowly"])
def test_a_tool_that_takes_too_long_is_left(name: str) -> None:
    given = {"seconds": 5} | ({"word": "x"} if name == "slowly" else {})
    start = time.monotonic()
    (turn,) = play(config(name, format="hermes", seconds=0.2), called(name, **given))
    assert "TimeoutError: the call took longer than 0.2 s" in told(turn)[0]
    assert turn.metrics["call_failures"] == 1
    assert time.monotonic() - start < 3


def test_the_calls_of_one_answer_run_beside_each_other_and_are_told_in_order() -> None:
    answer = "\n".join([called("sleep", seconds=0.4), called("slowly", word="b", seconds=0.4), called("add", a=1, b=2)])
    start = time.monotonic()
    (turn,) = play(config("add", "sleep", "slowly", format="hermes"), f"Let me see.\n{answer}")
    assert time.monotonic() - start < 0.75
    assert told(turn) == ["0.4", "b", "3"]
    assert [message["role"] for message in turn.messages] == ["tool"] * 3
    assert turn.said is not None
    assert turn.said["content"] == "Let me see."
    assert [call["function"] for call in turn.said["tool_calls"]] == [
        {"name": "sleep", "arguments": {"seconds": 0.4}},
        {"name": "slowly", "arguments": {"word": "b", "seconds": 0.4}},
        {"name": "add", "arguments": {"a": 1, "b": 2}},
    ]


def test_an_object_belongs_to_its_episode_and_its_calls_keep_their_order() -> None:
    knobs = config("Box", format="hermes")
    puts = "".join(called("put", thing=str(i)) for i in range(4))
    first, second = play(knobs, puts, called("look"))
    assert told(first) == ["2 things", "3 things", "4 things", "5 things"]
    assert json.loads(told(second)[0]) == ["key", "0", "1", "2", "3"]
    assert second.metrics["things"] == 5
    (again,) = play(knobs, called("look"), task=Task("u", TASK.messages, {"first": "coin"}))
    assert json.loads(told(again)[0]) == ["coin"]
    assert mine.Box.open_boxes == 0


def test_a_tool_may_see_the_task_which_is_no_argument() -> None:
    assert described(mine.hint, "f").schema["function"]["parameters"]["properties"] == {}
    (turn,) = play(config("hint", format="hermes"), called("hint"))
    assert told(turn) == ["It is not 5."]


def test_results_are_cut_with_a_note_and_share_the_room() -> None:
    assert cut("abcdef", 4) == "abcd\n[2 more characters were left out]"
    assert cut("abcd", 4) == "abcd"
    word = "x" * 100
    (turn,) = play(config("slowly", format="hermes", longest=80), called("slowly", word=word) * 2)
    assert told(turn) == ["x" * 40 + "\n[60 more characters were left out]"] * 2


def test_an_answer_without_a_call_ends_the_episode() -> None:
    first, last = play(config("add", format="hermes"), called("add", a=2, b=3), "It is 5.")
    assert (first.done, last.done, last.messages) == (False, True, ())
    assert last.metrics == {"calls": 1, "call_errors": 0, "call_failures": 0, "answered": 1}


def test_the_last_answer_s_calls_run_and_the_episode_ends() -> None:
    *_, last = play(config("Box", format="hermes", most_answers=2), called("put", thing="a"), called("put", thing="b"))
    assert last.done
    assert last.metrics["things"] == 3
    assert last.metrics["answered"] == 0


def test_calls_beyond_the_most_are_not_run() -> None:
    (turn,) = play(config("Box", format="hermes", most_calls=1), called("put", thing="a") * 2)
    assert told(turn)[0] == "2 things"
    assert told(turn)[1].startswith("Error: only 1 calls of one answer are run")
    assert turn.metrics["things"] == 2


def test_hundreds_of_calls_are_answered_within_the_room() -> None:
    knobs = config("slowly", format="hermes", longest=80)
    (turn,) = play(knobs, called("slowly", word="x" * 50) * 400)
    assert len(turn.messages) == 5  # one for all that are too many
    assert sum(len(text.partition("\n[")[0]) for text in told(turn)) <= 80
    assert (turn.metrics["calls"], turn.metrics["call_errors"]) == (400, 396)
    assert turn.said is not None
    assert len(turn.said["tool_calls"]) == 400


def test_an_answer_that_was_cut_off_runs_nothing() -> None:
    (turn,) = play(config("Box", format="hermes"), called("put", thing="a"), finish="length")
    assert turn.metrics["calls"] == 0
    assert turn.metrics["things"] == 1


def test_hints_take_the_place_of_the_end_once_each() -> None:
    hints = [{"text": "Use a tool.", "at": r"Wait[,.]?"}, {"text": "Are you sure?"}]
    turns = play(config("add", format="hermes", hints=hints), "It is 5.", "Wait, ", "It is 5.")
    assert [told(turn) for turn in turns] == [["Are you sure?"], ["Use a tool."], []]
    assert [turn.done for turn in turns] == [False, False, True]


def test_a_hint_s_expression_is_one_where_it_is_used() -> None:
    for wrong in ("(?i)wait", "a)|(b", "("):
        with pytest.raises(ValueError, match="is no regular expression"):
            Hint(text="H", at=wrong)
    assert Hints([Hint(text="H", at="(?i:wait)")]).next("WAIT \n") == "H"


def test_a_hint_is_not_said_behind_a_call() -> None:
    first, second = play(config("add", format="hermes", hints=[{"text": "H"}]), called("add", a=1, b=1), "2")
    assert told(first) == ["2"]
    assert told(second) == ["H"]


def test_plain_text_is_told_the_tools_and_how_to_call_them() -> None:
    async def opened() -> Any:
        env: Any = config("add", format="plain").build()(TASK)
        return await env.reset(), env.tools

    (message,), tools = asyncio.run(opened())
    assert tools == ()
    assert message["content"].endswith("\n\nWhat is 2 + 3?")
    assert json.dumps(described(mine.add, "f").schema["function"]) in message["content"]
    (turn,) = play(config("add", format="plain"), 'Hm. <call>{"name": "add", "arguments": {"a": 2, "b": 3}}</call>')
    assert turn.messages == ({"role": "user", "content": "\n<result>\n5\n</result>\n"},)
    assert turn.said is None


def test_a_tool_s_input_error_means_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        """Say what is missing."""
        raise InputError("a key is missing")

    monkeypatch.setattr(mine, "fails", missing)
    with pytest.raises(InputError, match="a key is missing"):
        play(config("fails", format="hermes"), called("missing"))


def test_the_room_holds_what_is_shown() -> None:
    knobs = config("slowly", format="hermes", longest=80, most_answers=3, hints=[{"text": "h" * 500}])
    most = knobs.room(10, len)
    turns = play(knobs, called("slowly", word="x" * 1000) * 4, "No.", "No.")
    assert (
        sum(len(text) for turn in turns for text in told(turn)) + len(json.dumps(described(mine.slowly, "f").schema))
        <= most
    )
