"""Environments of verifiers, played by given answers here and by the library used bare."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rlft.envs.base import Action
from rlft.envs.placed import placed
from rlft.envs.worlds.verifiers import HELD_OUT
from rlft.types import InputError, Message, Task, Turn
from tests.envs.libraries import ASKED, knobs_of
from tests.envs.test_runs import finished, run

vf = pytest.importorskip("verifiers")
pytest.importorskip("renderers")

HERE = "tests.envs.dojo:"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 3}}\n</tool_call>'


def plain(message: Any) -> tuple[str, str, Any]:
    """Who says what, and calls what."""
    given = message if isinstance(message, dict) else message.model_dump()
    calls = []
    for one in given.get("tool_calls") or ():
        called = json.loads(one) if isinstance(one, str) else one
        own = called.get("function", called)
        calls.append(
            (own["name"], json.loads(own["arguments"]) if isinstance(own["arguments"], str) else own["arguments"])
        )
    return given["role"], str(given.get("content") or ""), calls


def played(name: str, answers: list[str], seed: int = 3, **more: Any) -> tuple[list[Any], float, dict[str, float]]:
    """The dialogue through rlft, what it paid, and the last metrics."""

    async def play() -> tuple[list[Message], list[Turn]]:
        make = placed(knobs_of(type="verifiers", path=HERE + name, format="hermes", **more))
        env = make(Task("row", ASKED, {"seed": seed}))
        try:
            heard, turns = list(await env.reset()), []
            for text in answers:
                turns.append(await asyncio.wait_for(env.step(Action(text, "stop", text)), 60))
                heard += [turns[-1].said, *turns[-1].messages]  # type: ignore[list-item]
                if turns[-1].done:
                    break
            return heard, turns
        finally:
            await env.close()

    heard, turns = asyncio.run(play())
    assert turns[-1].done
    return list(map(plain, heard)), sum(turn.reward for turn in turns), dict(turns[-1].metrics)


def bare(
    name: str, answers: list[str], row: int = 3, held_out: bool = False
) -> tuple[list[Any], float, dict[str, float]]:
    """The same by the library alone: its rollout and rubric, with a client of its own kind that gives the answers."""
    from verifiers.clients import Client  # pyright: ignore[reportMissingImports]
    from verifiers.types import Response, ResponseMessage, ToolCall  # pyright: ignore[reportMissingImports]

    from tests.envs import dojo

    left = iter(answers)

    class Given(Client):
        """Answers as it is told to."""

        def setup_client(self, config: Any) -> Any: ...
        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: Any) -> Any:
            return messages, {}

        async def get_native_response(self, *_: Any, **__: Any) -> str:
            return next(left)

        async def raise_from_native_response(self, response: Any) -> None: ...
        async def from_native_response(self, response: str) -> Any:
            calls = None
            if response == CALL:
                calls = [ToolCall(id="1", name="add", arguments='{"a": 3, "b": 3}')]
            message = ResponseMessage(
                content=None if calls else response, tool_calls=calls, finish_reason="stop", is_truncated=False
            )
            return Response(id="1", created=0, model="m", message=message)

        async def close(self) -> None: ...

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    env = getattr(dojo, name)()
    signal.signal(signal.SIGINT, handlers[0])
    signal.signal(signal.SIGTERM, handlers[1])
    rows = env.get_eval_dataset() if held_out else env.get_dataset()
    told = asyncio.run(env.run_rollout(dict(rows[row]), Given(None), "m", {}))
    return [plain(one) for one in [*told["prompt"], *told["completion"]]], told["reward"], told["metrics"]


@pytest.mark.parametrize(("name", "answers", "reward"), [
    ("single", ["It is 6."], 1 + 0.25 * 0.92), ("single", ["I do not know"], 0.25 * 0.87),
    ("guess", ["1", "what?", "9", "6"], None), ("guess", ["2", "3", "4", "5"], None), ("guess", ["6"], None),
    ("tools", [CALL, "It is 6."], None), ("tools", ["No idea."], None),
])  # fmt: skip
def test_the_dialogue_and_the_verdict_are_the_librarys(name: str, answers: list[str], reward: float | None) -> None:
    heard, paid, metrics = played(name, answers)
    told, own, numbers = bare(name, answers)
    assert heard == told
    assert paid == pytest.approx(own)
    assert reward is None or paid == pytest.approx(reward)
    assert {key: metrics[key] for key in numbers} == pytest.approx(numbers)
    assert metrics["error"] == 0.0


def test_a_tool_is_called_by_the_library() -> None:
    heard, _, metrics = played("tools", [CALL, "It is 6."])
    assert [role for role, *_ in heard] == ["user", "assistant", "tool", "assistant"]
    assert heard[1][2] == [("add", {"a": 3, "b": 3})]
    assert heard[2][1] == "6"
    assert metrics["total_tool_calls"] == metrics["add_calls"] == 1.0


def test_held_out_tasks_are_rows_that_nobody_trains_on() -> None:
    heard, paid, _ = played("single", ["100"], seed=HELD_OUT + 5)
    assert (heard, paid) == bare("single", ["100"], 0, held_out=True)[:2]
    shown = {played("guess", ["1", "1", "1", "1"], seed=seed, holdout=0.2)[0][0][1] for seed in range(9)}
    kept = {played("guess", ["1", "1", "1", "1"], seed=HELD_OUT + i, holdout=0.2)[0][0][1] for i in range(3)}
    assert kept == {"What is 8 + 8?", "What is 9 + 9?"}
    assert len(shown) == 8
    assert not shown & kept


def test_options_reach_the_loader_and_the_runs_signals_stay() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    heard, *_ = played("single", ["6"], options={"system": "Be brief."})
    assert heard[0] == ("system", "Be brief.", [])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_world_that_fails_is_no_zero() -> None:
    with pytest.raises(RuntimeError, match="InfraError: no world today"):
        played("broken", ["6"])


@pytest.mark.parametrize(("given", "message"), [
    ({}, "either id=an installed environment, or path"),
    ({"id": "no-such-env"}, "cannot load no-such-env with {}: ValueError: Could not import"),
    ({"path": HERE + "single", "options": {"sistem": "x"}}, "cannot load .*TypeError.*sistem"),
    ({"path": HERE + "grouped"}, "judges groups"),
    ({"path": HERE + "nothing"}, "is int, no environment that plays one rollout"),
])  # fmt: skip
def test_what_cannot_be_played_is_refused_before_the_run(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        placed(knobs_of(type="verifiers", **given))


def test_a_run_trains_in_it(tiny_model: Path, tmp_path: Path) -> None:
    settings = run(tiny_model, tmp_path)
    settings |= {
        "env": {"type": "verifiers", "path": HERE + "guess", "turns": 4, "most_said": 60},
        "data": {"train": {"type": "seeds", "count": 4}},
        "reward": {"type": "outcome", "weight": 0},
    }
    from rlft.settings import validate

    lines, rows = finished(validate(settings))
    assert lines[-1]["env/num_turns"] == 4.0, "noise never guesses right"
    assert any(row["score"] > 0 for row in rows), "brevity is paid"
    assert lines[-1]["parity/logprob_max"] < 1e-3
