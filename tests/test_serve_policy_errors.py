"""`rlft serve-policy` with clients that ask for what is not there, ask wrongly, or leave: errors as OpenAI has them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError

from rlft.chat import Chat
from rlft.settings import validate
from tests.served import HI, Served, Watched
from tests.test_serve_policy import plain, rows

pytestmark = pytest.mark.usefixtures("one_thread")

Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


@pytest.fixture
def serve(tiny_model: Path, chat: Chat, tmp_path: Path) -> Serve:
    """serve(record=, own=, most=, idle=) -> a service on an engine of its own."""
    config = validate(plain(tiny_model, tmp_path))
    return lambda **knobs: Served(Watched(tiny_model, chat), chat, config, **knobs)


def asked(served: Served, function: Callable[[AsyncOpenAI], Any], key: str = "one") -> Any:
    async def run() -> Any:
        async with served.client(key) as client:
            return await function(client)

    return asyncio.run(run())


def says(**more: Any) -> Callable[[AsyncOpenAI], Any]:
    """One request, with more than its messages."""

    async def once(client: AsyncOpenAI) -> Any:
        return await client.chat.completions.create(**({"model": "policy", "messages": HI} | more))

    return once


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/gpt-4o", 404),
        ("GET", "/", 404),
    ],
)
def test_what_is_not_there_is_said_in_openais_form(serve: Serve, method: str, path: str, status: int) -> None:
    async def strays(client: AsyncOpenAI) -> Any:
        return await client._client.request(method, f"http://test{path}", json={} if method == "POST" else None)

    answer = asked(serve(), strays)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, "invalid_request_error")
    assert "there is no" in error["message"]


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": 2, "stream": True}, "n", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "tools", "unsupported_parameter"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0]", None),
        ({"messages": [{"role": "user", "content": "x" * 900}]}, "messages", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_had_leaves_the_episode_as_it_was(
    serve: Serve, tmp_path: Path, more: dict[str, Any], param: str, code: str | None
) -> None:
    async def twice(client: AsyncOpenAI) -> Any:
        with pytest.raises(BadRequestError) as refused:
            await says(**more)(client)
        await says()(client)
        return refused.value

    error = asked(serve(record=tmp_path), twice)
    assert (error.param, error.code) == (param, code)
    (row,) = rows(tmp_path)
    assert (len(row["samples"]), row["prompt"]) == (1, HI), "nothing of the refused request is recorded"


def test_another_model_and_more_tokens_than_there_is_room_for_are_answered(serve: Serve) -> None:
    served = serve(most=400)
    said = asked(served, says(model="gpt-4o", max_tokens=10**9))
    assert (said.model, said.choices[0].finish_reason in ("stop", "length")) == ("gpt-4o", True)
    assert served.engine.samplings[0].max_tokens + len(served.engine.prompts[0]) == 400, "what the context leaves"


def test_wrong_keys_are_told_wherever_they_are_used(serve: Serve) -> None:
    async def lists(client: AsyncOpenAI) -> list[str]:
        return [model.id for model in (await client.models.list()).data]

    async def retrieves(client: AsyncOpenAI) -> str:
        return (await client.models.retrieve("policy")).id

    for function in (lists, retrieves, says()):
        with pytest.raises(AuthenticationError) as refused:
            asked(serve(own="secret"), function, key="wrong")
        assert refused.value.code == "invalid_api_key"
    assert asked(serve(own="secret"), lists, key="secret:mine") == ["policy"]
    assert asked(serve(own="secret"), retrieves, key="secret") == "policy"

    async def another(client: AsyncOpenAI) -> None:
        await client.models.retrieve("gpt-4o")

    with pytest.raises(NotFoundError) as missing:
        asked(serve(), another)
    assert missing.value.code == "model_not_found"


def test_bearer_may_be_written_as_one_likes(serve: Serve, tmp_path: Path) -> None:
    async def small(client: AsyncOpenAI) -> None:
        await says(extra_headers={"Authorization": "bearer  low"})(client)

    asked(serve(record=tmp_path), small)
    assert rows(tmp_path)[0]["episode"] == "low"


def test_a_body_that_would_keep_others_waiting_is_refused(serve: Serve) -> None:
    with pytest.raises(APIStatusError, match="4194304 bytes") as refused:
        asked(serve(), says(messages=[{"role": "user", "content": "x" * 2**22}]))
    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")


def test_two_agents_with_one_key_are_one_episode_whose_conversations_do_not_mix(serve: Serve, tmp_path: Path) -> None:
    async def both(client: AsyncOpenAI) -> None:
        async def one(name: str) -> None:
            messages: list[Any] = [{"role": "user", "content": name}]
            for _ in range(3):
                said = await client.chat.completions.create(model="policy", messages=messages)
                messages += [said.choices[0].message.model_dump(), {"role": "user", "content": f"{name} again"}]

        await asyncio.gather(one("north"), one("south"))

    served = serve(record=tmp_path)
    asked(served, both, key="shared")
    (row,) = rows(tmp_path)
    texts = [served.chat.decode(sample["tokens"]) for sample in row["samples"]]
    assert sorted(("north" in text, "south" in text) for text in texts) == [(False, True), (True, False)]
    assert len(served.engine.prompts) == 6


def test_a_key_whose_first_request_was_refused_is_good_later(serve: Serve, tmp_path: Path) -> None:
    served = serve(record=tmp_path, idle=0.1)

    async def late(client: AsyncOpenAI) -> None:
        with pytest.raises(BadRequestError):
            await says(n=2)(client)
        with pytest.raises(APIStatusError, match="409"):
            await client.post("/episodes/current/reward", body={"reward": 1}, cast_to=object)
        await asyncio.sleep(0.4)
        assert not served.visits._there, "nothing is kept of it"
        await says()(client)

    asked(served, late)
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_is_left_of_clients_that_hang_up(serve: Serve, tmp_path: Path, recorded: bool) -> None:
    """Before the answer is there; where nothing is recorded, the engine stops at once."""
    served = serve(record=tmp_path if recorded else None, idle=0.2)
    served.engine.pause = 0.5 if recorded else 60.0
    body = {"messages": HI, "stream": True}

    async def run() -> tuple[int, int]:
        async with served.port() as url, httpx.AsyncClient(timeout=0.2) as hasty:
            before = len(asyncio.all_tasks())
            for i in range(8):
                own = {"Authorization": f"Bearer {i}"}
                with pytest.raises(httpx.TimeoutException):
                    await hasty.post(f"{url}/chat/completions", json=body, headers=own)
            for _ in range(100):
                await asyncio.sleep(0.1)
                if not served.engine.open and not served.visits._there:
                    break
            return before, len(asyncio.all_tasks())

    before, after = asyncio.run(run())
    assert served.engine.prompts, "some had begun"
    assert (served.engine.open, served.visits._there) == (0, {})
    assert after <= before + 1, "the service, and the engine's own loop"


def test_a_client_that_leaves_a_stream_may_go_on(serve: Serve, tmp_path: Path) -> None:
    served = serve(record=tmp_path)

    async def run() -> None:
        async with served.port() as url, AsyncOpenAI(base_url=url, api_key="one", max_retries=0) as client:
            stream = await client.chat.completions.create(model="policy", messages=HI, stream=True)
            async for _ in stream:
                break
            await stream.close()
            await client.chat.completions.create(model="policy", messages=HI)

    asyncio.run(run())
    (row,) = rows(tmp_path)
    assert len(row["samples"]) == 2, "both answers were sampled, and the second is no other's repetition"
    assert json.dumps(row)
