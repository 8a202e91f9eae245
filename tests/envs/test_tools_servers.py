"""Tools of real MCP servers: a process for each episode, and one over HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.envs.tools.base import Broken, Failed
from rlft.envs.tools.calling import ToolsConfig
from rlft.envs.tools.servers import Server as ServerConfig
from rlft.envs.tools.servers import ServerKit
from rlft.player import Player
from rlft.types import InputError, Sampling, Turn
from tests.envs.test_tools import TASK, called, play, told

pytest.importorskip("mcp")
SHOP = str(Path(__file__).with_name("shop.py"))
Server = dict[str, Any]


def knobs(*servers: Server, **more: Any) -> ToolsConfig:
    return ToolsConfig.model_validate({"servers": servers, "format": "hermes", **more})


def shop(**more: Any) -> Server:
    return {"command": [sys.executable, SHOP], "seconds": 60, **more}


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_server_s_tools_are_called_and_its_state_is_the_episode_s() -> None:
    calls = [called("buy", thing="apple", count=2), called("buy", thing="apple"), called("buy", thing="pear")]
    wrong = called("buy", count=1) + called("buy", thing=["apple"]) + called("number")
    *turns, last = play(knobs(shop(environment={"SHOP_APPLES": "9"})), *calls, wrong)
    assert [told(turn) for turn in turns[:2]] == [["7 left"], ["6 left"]]
    assert told(turns[2])[0].startswith("Error: ")
    assert "there is no pear" in told(turns[2])[0]
    missing, invalid, number = told(last)
    assert missing == "Error: buy: 'thing' is missing. It takes: buy(thing: string, count?: integer)"
    assert "valid string" in invalid
    assert last.metrics == {"calls": 6, "call_errors": 1, "call_failures": 2, "answered": 0}
    assert gone(int(number)), "the server is still there after the episode"


def test_a_server_sees_none_of_this_process_s_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_APPLES", "50")
    (turn,) = play(knobs(shop()), called("buy", thing="apple"))
    assert told(turn) == ["2 left"]


def test_the_tools_stand_in_the_prompt() -> None:
    async def opened() -> Any:
        env: Any = knobs(shop(), tools=["tests.envs.mine:add"]).build()(TASK)
        try:
            await env.reset()
            return env.tools
        finally:
            await env.close()

    tools = asyncio.run(opened())
    assert [tool["function"]["name"] for tool in tools] == ["add", "buy", "wait", "number", "burn"]
    buy = tools[1]["function"]
    assert buy["description"] == "Buy some of a thing."
    assert buy["parameters"]["required"] == ["thing"]
    assert buy["parameters"]["properties"]["count"]["type"] == "integer"


def test_a_server_that_dies_costs_its_own_episode(tiny_model: Path, engine: LocalEngine) -> None:
    make = knobs(shop()).build()

    class Burning:
        """Whatever the policy says, the first answer burns the shop down."""

        def __init__(self, task: Any) -> None:
            self._inner: Any = make(task)
            self.reset, self.close = self._inner.reset, self._inner.close

        async def step(self, action: Action) -> Turn:
            return await self._inner.step(Action(called("burn"), "stop", called("burn")))

    player = Player(engine, Chat(tiny_model), Burning, Sampling(max_tokens=5), 600)  # type: ignore[arg-type]
    played = asyncio.run(player.play(TASK, 1))
    assert played.failed
    assert "is gone" in played.failures[0].said
    assert "env/unclosed" not in played.metrics


def test_a_call_that_takes_too_long_is_told(address: str) -> None:
    (turn,) = play(knobs({"url": address, "seconds": 2}), called("wait", seconds=4))
    assert told(turn) == ["Error: wait took longer than 2 s"]
    assert turn.metrics["call_failures"] == 1


def test_arguments_that_cannot_be_sent_are_refused_and_the_server_stays() -> None:
    deep: Any = "apple"
    for _ in range(500):
        deep = [deep]
    wrong = [called("buy", thing=thing) for thing in ("\ud800", deep, float("nan"))]
    turns = play(knobs(shop()), *wrong, called("buy", thing="apple"))
    assert [reason in told(turn)[0] for turn, reason in zip(turns, ("surrogate", "deep", "finite"), strict=False)] == (
        [True] * 3
    )
    assert turns[2].metrics["call_errors"] == 3
    assert told(turns[3]) == ["2 left"]


def test_what_cannot_be_written_is_no_end_of_the_server() -> None:
    class Client:
        async def call_tool(self, name: str, arguments: Any) -> Any:
            raise ValueError("no JSON")

    kit = ServerKit(ServerConfig(url="http://x"))
    kit._client = Client()
    with pytest.raises(Failed, match="buy: no JSON"):
        asyncio.run(kit._call("buy", {}))


def test_a_command_that_is_no_server_breaks_the_episode() -> None:
    with pytest.raises(Broken, match=r"does not answer|did not start"):
        play(knobs({"command": [sys.executable, "-c", "print('hello')"], "seconds": 20}))


@pytest.mark.parametrize(("server", "reason"), [
    ({}, "either a `command` that starts it, or a `url`"),
    ({"command": ["x"], "url": "http://x"}, "either a `command` that starts it, or a `url`"),
])  # fmt: skip
def test_a_server_needs_one_way_to_be_reached(server: Server, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        knobs(server)


def test_a_command_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="there is no command 'nothing-of-the-kind'"):
        knobs({"command": ["nothing-of-the-kind"]}).build()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, SHOP],
        env=os.environ | {"SHOP_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    process.wait()


def test_a_server_over_http_is_shared_by_its_episodes(address: str) -> None:
    made = knobs({"url": address, "seconds": 60})
    (first,) = play(made, called("buy", thing="apple"))
    (second,) = play(made, called("buy", thing="apple"))
    assert (told(first), told(second)) == (["2 left"], ["1 left"])


def test_nobody_at_the_address_breaks_the_episode() -> None:
    with pytest.raises(Broken, match="does not answer"):
        play(knobs({"url": "http://127.0.0.1:9/mcp"}))


def test_two_tools_of_one_name_break_the_episode(address: str) -> None:
    with pytest.raises(Broken, match="two tools are called 'buy'"):
        play(knobs({"url": address}, {"url": address}))
