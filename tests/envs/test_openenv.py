"""An environment behind the real OpenEnv server, against the library's own client."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlft.envs.worlds.openenv import socket_of
from tests.envs.libraries import ASKED, heard, played

pytest.importorskip("openenv.core.env_server.http_server")

SERVER = """
import random, sys, uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Guess(Action):
    number: int
    note: str = ""

class Told(Observation):
    said: str

class World(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True
    def reset(self, seed=None, episode_id=None, highest=9, **kwargs):
        self.secret, self.count = random.Random(seed).randint(1, highest), 0
        return Told(said=f"Guess from 1 to {highest}.")
    def step(self, action, timeout_s=None, **kwargs):
        self.count += 1
        right = action.number == self.secret
        said = "Right." if right else "Higher." if action.number < self.secret else "Lower."
        return Told(said=said + action.note, reward=1.0 if right else -0.1, done=right)
    @property
    def state(self):
        return State(step_count=self.count)

uvicorn.run(create_fastapi_app(World, Guess, Told, max_concurrent_envs=8), port=int(sys.argv[1]), log_level="error")
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = Path(tmp_path_factory.mktemp("openenv")) / "world.py"
    file.write_text(SERVER)
    server = subprocess.Popen([sys.executable, str(file), str(port)])
    for _ in range(600):
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def bare(url: str, seed: int, numbers: list[int]) -> list[Any]:
    """What the library's client gets."""
    from openenv.core.generic_client import GenericEnvClient  # pyright: ignore[reportMissingImports]

    async def play() -> list[Any]:
        async with GenericEnvClient(base_url=url) as env:
            told = [await env.reset(seed=seed, highest=20)]
            for number in numbers:
                told.append(await env.step({"number": number, "note": "!"}))
                if told[-1].done:
                    break
            return told

    return asyncio.run(play())


@pytest.mark.parametrize("seed", [0, 3])
def test_the_same_answers_get_what_the_librarys_client_gets(url: str, seed: int) -> None:
    told = bare(url, seed, list(range(1, 21)))
    opening, turns = played(
        [str(number) for number in range(1, 21)], seed, type="openenv", url=url, field="number", action={"note": "!"},
        options={"highest": 20}, show="said", turns=20,
    )  # fmt: skip
    assert opening == (ASKED[0], {"role": "user", "content": told[0].observation["said"]})
    assert [heard(turn) for turn in turns] == [one.observation["said"] for one in told[1:]]
    assert [turn.reward for turn in turns] == [one.reward for one in told[1:]]
    assert [turn.done for turn in turns] == [one.done for one in told[1:]]
    assert turns[-1].metrics["success"] == 1.0
    assert turns[-1].metrics["return"] == pytest.approx(1 - 0.1 * (len(turns) - 1))


def test_an_answer_may_be_the_whole_action_and_what_is_refused_is_told(url: str) -> None:
    said = ['I say {"number": 0}', "nothing", '{"number": "x"}', '{"number": 0}']
    _, turns = played(said, 1, type="openenv", url=url, answer="json", turns=4)
    assert heard(turns[0]) == '{"said": "Higher."}'
    assert heard(turns[1]).startswith("The answer has to be one JSON object: ")
    assert "number" in heard(turns[2])
    assert heard(turns[3]) == '{"said": "Higher."}'
    assert turns[-1].metrics == {"success": 0.0, "return": -0.2, "malformed": 2.0}
    assert turns[-1].done


def test_addresses() -> None:
    assert socket_of("http://a:1/") == "ws://a:1/ws"
    assert socket_of("https://a/b") == "wss://a/b/ws"
    assert socket_of("wss://a") == "wss://a/ws"
