"""Where an agent reaches the policy: OpenAI's chat completions on a port of this machine, a desk for each episode.

    POST /v1/chat/completions            whose key it is says which episode it belongs to
    GET  /v1/models                      the one model there is; requests may name any
    POST /v1/episodes/current/reward     {"reward": number, "metrics": {name: number}}: pays the last answer

The server has a thread and an event loop of its own, so that it listens while an engine samples in the other one. A
request waits at its episode's desk until the policy has spoken; one whose client is gone is not answered.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlft.envs.agent_chat import Answer, Asked, Refused, pieces, read, refuse_unwritable, whole
from rlft.listening import refuse_lacking
from rlft.types import InputError, finite

MODEL = "policy"
SERVED = {"id": MODEL, "object": "model", "created": 0, "owned_by": "rlft"}
NO_MODEL = "model_not_found"
LONGEST = 2**22  # bytes of a request
OURS = "rlft-"  # how keys begin
OVER = "this episode is over: it reached a limit of the run, such as its context, or the agent has returned"


@dataclass
class Pending:
    """A request that waits for its answer."""

    asked: Asked
    answer: concurrent.futures.Future[Answer] = field(default_factory=concurrent.futures.Future)

    def give(self, answer: Answer) -> bool:
        """Whether somebody waits for it still."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_result(answer)
            return True
        return False

    def refuse(self, error: Exception) -> None:
        """Say why there is no answer."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_exception(error)


def paid(plain: Any) -> tuple[float, dict[str, float]]:
    """What a verdict of the agent says: a number, or {"reward", "metrics"}. Raises TypeError."""
    verdict = plain if isinstance(plain, Mapping) else {"reward": plain}
    if verdict and set(verdict) <= {"reward", "metrics"}:
        reward, metrics = verdict.get("reward", 0.0), verdict.get("metrics") or {}
        numbers = [reward, *(metrics.values() if isinstance(metrics, Mapping) else [None])]
        if all(map(finite, numbers)):
            return float(reward), {str(name): float(value) for name, value in metrics.items()}
    raise TypeError(f'{plain!r:.200} is neither a number nor {{"reward": number, "metrics": {{name: number}}}}')


class Host(Protocol):
    """Who answers the holders of one key."""

    async def ask(self, asked: Asked) -> Answer:
        """Raises Refused."""
        ...

    def pay(self, reward: float, metrics: Mapping[str, float], done: bool) -> None:
        """Raises Refused."""
        ...


class Desk:
    """One episode's. arrived: its requests in their order. Made on the event loop of the episode, asked on another."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[Pending] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._waiting: list[Pending] = []
        self._reward = 0.0
        self._metrics: dict[str, float] = {}
        self._closed = False

    async def ask(self, asked: Asked) -> Answer:
        """See `Host.ask`."""
        pending = Pending(asked)
        with self._lock:
            self._refuse_closed()
            self._waiting = [one for one in self._waiting if not one.answer.done()] + [pending]
            try:
                self._loop.call_soon_threadsafe(self.arrived.put_nowait, pending)
            except RuntimeError as error:  # the loop is closed
                raise Refused(OVER, 410, code="episode_over") from error
        return await asyncio.wrap_future(pending.answer)

    def pay(self, reward: float, metrics: Mapping[str, float], done: bool = False) -> None:
        """See `Host.pay`. done: does not matter, the agent's end is the episode's."""
        with self._lock:
            self._refuse_closed()
            self._reward += reward
            self._metrics |= metrics

    def take(self) -> tuple[float, dict[str, float]]:
        """What was paid since this was asked last, and the numbers so far."""
        with self._lock:
            reward, self._reward = self._reward, 0.0
            return reward, dict(self._metrics)

    def close(self) -> None:
        """Whoever waits, or comes later, is told that the episode is over."""
        with self._lock:
            self._closed = True
            for pending in self._waiting:
                pending.refuse(Refused(OVER, 410, code="episode_over"))

    def _refuse_closed(self) -> None:
        if self._closed:
            raise Refused(OVER, 410, code="episode_over")


class Endpoint:
    """Listens from the first episode on, until nobody has it any more. Raises InputError where the port is taken."""

    def __init__(self, host: str, port: int) -> None:
        refuse_lacking("env.type=agent")
        self._host = host
        self._port = port
        self._hosts: dict[str, Host] = {}
        self._lock = threading.Lock()
        self._url = ""

    def open(self, host: Host) -> tuple[str, str]:
        """The address and the key under which the host is asked."""
        with self._lock:
            if not self._url:
                self._url = self._listen()
        key = OURS + secrets.token_hex(16)  # not from the generators that a run resumes
        self._hosts[key] = host
        return self._url, key

    def close(self, key: str) -> None:
        """The key is no longer good."""
        self._hosts.pop(key, None)

    def find(self, key: str) -> Host:
        """Who answers this key. Raises Refused."""
        host = self._hosts.get(key)
        if host is None and key.startswith(OURS):
            raise Refused(OVER, 410, code="episode_over")
        if host is None:
            said = "the key is no episode's: OPENAI_API_KEY is to be the one that the agent was given"
            raise Refused(said, 401, code="invalid_api_key")
        return host

    def _listen(self) -> str:
        import uvicorn

        try:
            listening = socket.create_server((self._host, self._port), backlog=1024)
        except OSError as error:
            raise InputError(f"env.port: {self._host}:{self._port}: {error.strerror}; choose another, or 0") from error
        own = weakref.ref(self)

        def find(key: str) -> Host:
            there = own()
            if there is None:
                raise Refused(OVER, 410, code="episode_over")
            return there.find(key)

        server = uvicorn.Server(
            uvicorn.Config(
                application(find), log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=60
            )
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True, name="rlft-agents")
        thread.start()
        weakref.finalize(self, setattr, server, "should_exit", True)
        return f"http://{self._host}:{listening.getsockname()[1]}/v1"


def application(find: Callable[[str], Host]) -> Any:
    """The service as an ASGI application. find: who answers a key; it raises Refused."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    numbered = iter(range(1, 2**62))

    async def completions(request: Request) -> Response:
        host, asked = find(_key_of(request)), read(await _body(request))
        answer = await _unless_gone(host.ask(asked), request)
        name, created = f"chatcmpl-{next(numbered)}", int(time.time())
        if asked.streamed:
            return StreamingResponse(pieces(answer, asked, name, created), media_type="text/event-stream")
        return JSONResponse(whole(answer, asked, name, created))

    async def models(request: Request) -> Response:
        find(_key_of(request))
        return JSONResponse({"object": "list", "data": [SERVED]})

    async def model(request: Request) -> Response:
        find(_key_of(request))
        if (name := request.path_params["name"]) != MODEL:
            raise Refused(f"there is no model {name!r:.200}; the one there is is {MODEL!r}", 404, "model", NO_MODEL)
        return JSONResponse(SERVED)

    async def reward(request: Request) -> Response:
        host = find(_key_of(request))
        host.pay(*_payment(await _body(request)))
        return JSONResponse({})

    async def refused(request: Request, error: Exception) -> Response:
        told = error if isinstance(error, Refused) else _unforeseen(request, error)
        return JSONResponse(told.body, told.status)

    routes = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/episodes/current/reward", reward, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers=dict.fromkeys((Refused, HTTPException, Exception), refused))


def _key_of(request: Any) -> str:
    """What stands behind Bearer, however that is written; all of it where it is left out."""
    given = request.headers.get("authorization", "").strip()
    kind, _, rest = given.partition(" ")
    return rest.strip() if kind.lower() == "bearer" else given


async def _body(request: Any) -> bytes:
    """Raises Refused where it is too long: what is encoded for minutes keeps all others waiting."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST:
            raise Refused(f"the body has more than {LONGEST} bytes; send a shorter history", 413, code="body_too_large")
    return bytes(body)


def _payment(body: bytes) -> tuple[float, dict[str, float], bool]:
    """What is paid, and whether that ends the episode. Raises Refused."""
    try:
        plain = json.loads(body)
        done = bool(plain.pop("done", False)) if isinstance(plain, dict) else False
        amount, metrics = paid(plain) if plain or not done else (0.0, {})
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(str(error)) from error
    refuse_unwritable(list(metrics), "metrics")
    return amount, metrics, done


def _unforeseen(request: Any, error: Exception) -> Refused:
    """An address or a method that is not there, or a fault of ours."""
    status = getattr(error, "status_code", 500)
    if status >= 500:
        return Refused(f"the service failed: {type(error).__name__}: {error}", status)
    asked = f"{request.method} {request.url.path}"
    return Refused(f"there is no {asked}; policies are asked by POST /v1/chat/completions", status)


async def _unless_gone(answering: Awaitable[Answer], request: Any) -> Answer:
    """The answer; where the client leaves, the request is taken back. Raises what the host raises."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(answering), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refused("the client is gone", 499)
        return answer.result()
    finally:
        left.cancel()
        answer.cancel()
