"""Environments that are played elsewhere: what a run sees is what it would see had it played them itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from rlft.envs import wire
from rlft.envs.base import Action
from rlft.envs.placed import placed
from rlft.serve_env import application, serve
from rlft.settings import load_env
from rlft.types import InputError, Task, Turn
from tests.envs.test_placed import ASK, WORLDS, episode, gone, knobs
from tests.rewards.scripted import Answer, serving

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def served(plain: dict[str, Any], **how: Any) -> Iterator[str]:
    """The address at which an environment is served, by the application that `rlft serve-env` runs."""
    server = uvicorn.Server(uvicorn.Config(application(knobs(**plain), **how), log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def remote(url: str, **more: Any) -> Any:
    return placed(knobs(type="remote", url=url, backoff=0.01, **more))


def health(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/health").json()


def own(name: str = "Plain", **more: Any) -> dict[str, Any]:
    return {"path": f"{WORLDS}:{name}", **more}


def where(turns: list[Turn]) -> list[Turn]:
    """The turns without what tells the process and the thread."""
    for turn in turns:
        for name in ("pid", "thread", "made"):
            turn.messages[0]["at"].pop(name)
    return turns


@pytest.mark.parametrize("name", ["Plain", "Async", "Mixed", "made"])
def test_a_served_environment_is_the_local_one(name: str) -> None:
    here = asyncio.run(episode(placed(knobs(**own(name))), "a", "b", "\u00e9\u20ac"))
    with served(own(name)) as url:
        there = asyncio.run(episode(remote(url), "a", "b", "\u00e9\u20ac"))
        about = health(url)
    assert where(there) == where(here)
    assert (about["env"], about["sessions"], about["opened"]) == ("custom", 0, 1)


def test_the_tools_travel_and_so_do_columns_of_numpy() -> None:
    async def opened(url: str) -> Any:
        env = remote(url)(Task("t", ASK, {"row": np.arange(3), "n": np.float32(0.5), "none": None}))
        await env.reset()
        await env.close()
        return env.tools

    with served(own()) as url:
        assert asyncio.run(opened(url)) == ({"name": "shout"},)
    plain = wire.task(Task("t", ASK, {"row": np.arange(3), "n": np.float32(0.5), "none": None}))
    assert plain["info"] == {"row": [0, 1, 2], "n": 0.5, "none": None}
    with pytest.raises(InputError, match="column 'odd' cannot be sent to the server of the environment"):
        wire.task(Task("t", ASK, {"odd": object()}))


def test_a_turn_is_the_same_after_its_journey() -> None:
    turn = Turn(
        ({"role": "tool", "content": "x"},), 0.25, True, True, 2, {"role": "assistant", "content": "y"}, {"a": 1.0}
    )
    assert wire.read_turn(json.loads(json.dumps(wire.turn(turn)))) == turn
    assert wire.read_turn(wire.turn(Turn())) == Turn()
    assert wire.turn(Turn(reward=np.float32(0.5)))["reward"] == 0.5  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no Turn"):
        wire.turn({"reward": 1.0})


def test_many_play_at_once() -> None:
    """48 episodes of 0.3 s would take 14 s one after another."""

    async def played(url: str) -> list[list[Turn]]:
        make = remote(url)
        return await asyncio.gather(*(episode(make, str(i)) for i in range(48)))

    with served(own(options={"sleep": 0.3})) as url:
        began = time.monotonic()
        turns = asyncio.run(played(url))
        assert time.monotonic() - began < 10
        assert health(url)["sessions"] == 0
    assert [turn.messages[0]["content"] for (turn,) in turns] == [f"{i}!" for i in range(48)]


@pytest.mark.parametrize(("does", "kind", "message"), [
    ("raise", Exception, "not in the parent"), ("refuse", InputError, "lacks its world"),
    ("crash", Exception, "ended with SIGSEGV"),
])  # fmt: skip
def test_what_it_raises_there_is_raised_here(does: str, kind: type[Exception], message: str) -> None:
    place = {"place": "process"} if does == "crash" else {}
    with served(own(**place)) as url:
        make = remote(url)
        with pytest.raises(kind, match=message) as caught:
            asyncio.run(episode(make, "a", does=does))
        assert "worlds.py" in "".join(caught.value.__notes__), "it says where"
        assert asyncio.run(episode(make, "a")), "others go on"
        assert health(url)["sessions"] == 0
    assert type(caught.value).__name__ == {"raise": "Odd", "refuse": "InputError", "crash": "Died"}[does]


def test_an_episode_that_hangs_is_closed_with_its_process() -> None:
    async def hanging(url: str) -> None:
        make = remote(url)
        (turn,) = await episode(make, "a")
        with pytest.raises(TimeoutError):
            await episode(make, "a", does="hang", call=0.5)
        assert gone(turn.messages[0]["at"]["pid"])
        assert await episode(make, "b")

    with served(own(place="process", processes=1)) as url:
        asyncio.run(hanging(url))
        assert health(url)["sessions"] == 0


def test_a_session_that_is_not_heard_of_is_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"

    async def left(url: str) -> None:
        env = remote(url)(Task("t", ASK, {"closed": str(closed)}))
        await env.reset()
        for _ in range(200):
            await asyncio.sleep(0.05)
            if closed.exists() and not health(url)["sessions"]:
                break
        with pytest.raises(Exception, match=r"no session .*was not heard of for 0.2 s") as caught:
            await env.step(Action("a", "stop"))
        assert type(caught.value).__name__ == "Gone"
        await env.close()

    with served(own(), idle=0.2) as url:
        asyncio.run(left(url))
    assert len(closed.read_text().splitlines()) == 1, "closed once"


def test_all_are_closed_where_the_server_ends(tmp_path: Path) -> None:
    closed = tmp_path / "closed"

    async def left(url: str) -> None:
        for _ in range(3):
            await remote(url)(Task("t", ASK, {"closed": str(closed)})).reset()

    with served(own()) as url:
        asyncio.run(left(url))
        assert not closed.exists()
    assert len(closed.read_text().splitlines()) == 3


def asked(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/{path}", json={"session": "s", **body})


def test_a_move_that_is_sent_again_is_made_once() -> None:
    """Also while it is being made; and one that is not the next is refused."""
    move = {"text": "a", "finish": "stop", "raw": "a"}
    with served(own(options={"sleep": 0.3})) as url:
        task = wire.task(Task("t", ASK))
        opened = [asked(url, "open", task=task).json() for _ in range(2)]
        assert opened[0] == opened[1]
        answers: list[Any] = []

        def step() -> None:
            answers.append(asked(url, "step", number=1, action=move).json())

        threads = [threading.Thread(target=step) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        step()
        assert answers == [answers[0]] * 4
        assert answers[0]["messages"][0]["at"]["steps"] == 1
        second = asked(url, "step", number=2, action=move).json()
        assert second["messages"][0]["at"]["steps"] == 2
        for number in (1, 4, 0):
            assert asked(url, "step", number=number, action=move).status_code == 410
        assert health(url)["opened"] == 1
        assert [asked(url, "close").status_code for _ in range(2)] == [200, 200]
        assert asked(url, "step", number=3, action=move).status_code == 410


def test_a_call_without_an_answer_is_sent_again() -> None:
    """The first two are refused or not answered in time; nothing but the third is an answer."""
    body = json.dumps({"messages": list(ASK), "tools": []}).encode()
    script = iter([Answer(b"later", 503), Answer(body, wait=0.6), Answer(body)])

    async def opened(url: str) -> Any:
        return await remote(url, timeout=0.3)(Task("t", ASK)).reset()

    with serving(lambda _: next(script)) as server:
        assert asyncio.run(opened(server.url)) == ASK
    sessions = {one.body["session"] for one in server.asked}
    assert len(server.asked) == 3
    assert len(sessions) == 1


def test_a_server_that_is_full_or_gone_fails_the_episode() -> None:
    async def second(url: str) -> None:
        first = remote(url)(Task("t", ASK))
        await first.reset()
        with pytest.raises(ConnectionError, match=r"answered 503: .*--sessions allows more"):
            await episode(remote(url, retries=1), "a")
        await first.close()
        await episode(remote(url, retries=1), "a")

    with served(own(), most=1) as url:
        asyncio.run(second(url))
    with pytest.raises(ConnectionError, match="cannot be reached"):
        asyncio.run(episode(remote(url, retries=1), "a"))


def test_the_key_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_KEY", "s3cret")
    with served(own(), key="s3cret") as url:
        assert asyncio.run(episode(remote(url, api_key_env="WORLD_KEY"), "a"))
        with pytest.raises(InputError, match=r"401.*key is missing or wrong.*Check `env\.api_key_env`") as caught:
            asyncio.run(episode(remote(url), "a"))
        assert "s3cret" not in str(caught.value)
    monkeypatch.delenv("WORLD_KEY")
    with pytest.raises(InputError, match=r"env\.api_key_env: the environment variable WORLD_KEY is not set"):
        remote(url, api_key_env="WORLD_KEY")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"session": "s", "task": {"id": "t"}}'])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with served(own()) as url:
        for path in ("open", "step"):
            assert httpx.post(f"{url}/{path}", content=body).status_code == 400
        assert health(url)["sessions"] == 0


@pytest.mark.parametrize("url", ["ftp://x", "http://user:pass@x", "x:80"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        knobs(type="remote", url=url)


def test_the_command_serves_and_says_how_to_use_it(tmp_path: Path) -> None:
    config = tmp_path / "world.yaml"
    config.write_text(f"env: {{type: custom, path: '{WORLDS}:Plain', most_answers: 3, most_said: 40}}\n")
    command = [sys.executable, "-m", "rlft.cli", "serve-env", str(config), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        first, second = (server.stdout.readline().strip() for _ in range(2))
        (url,) = re.findall(r"serving the environment 'custom' on (\S+); Ctrl-C ends it", first)
        said = f"in a run's config:  env: {{type: remote, url: '{url}', most_answers: 3, most_said: 40}}"
        assert second == said
        assert asyncio.run(episode(remote(url), "a"))
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(20)
        server.stdout.close()
    assert code == 0


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "world.yaml"
    config.write_text("reward: {type: number}\n")
    with pytest.raises(InputError, match="no `env:` block in it"):
        load_env(config)
    config.write_text("env: {type: custom, path: 'nowhere:X', place: process}\n")
    with pytest.raises(InputError, match=r"env\.path: nowhere:X cannot be had"):
        serve(config, (), "127.0.0.1", 0, None, 600.0, 10, print)
    config.write_text("env: {type: retry}\n")
    with pytest.raises(InputError, match="--key-env: the environment variable NO_SUCH_KEY is not set"):
        serve(config, (), "127.0.0.1", 0, "NO_SUCH_KEY", 600.0, 10, print)
