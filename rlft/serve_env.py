"""Environments as a service: `rlft serve-env CONFIG` plays for runs elsewhere, whose environment is `type: remote`.

    POST /open    {"session", "task"}: the messages and tools that open an episode
    POST /step    {"session", "number", "action"}: the turn; number 1 is the first, and one that was answered is
                  answered again as it was
    POST /close   {"session"}
    GET  /health  the kind of environment, and how many sessions there are and were

The session's name is the client's. What an environment raises is answered with 422 and the error. A session that is
not heard of for a while is closed, for its run may be gone. What the config says is all that can be played.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rlft
from rlft.envs import wire
from rlft.envs.base import Env, EnvKnobs
from rlft.envs.placed import placed
from rlft.listening import admitted, key_of, listen, refuse_lacking
from rlft.settings import load_env

MALFORMED = (ValueError, KeyError, TypeError, AttributeError)
CLOSING = 60.0  # seconds that closing one may take when all end


class Gone(Exception):
    """A session that is not there, or a number that is not its next."""


class Full(Exception):
    """There are as many sessions as there may be."""


STATUS = {Gone: 410, Full: 503}  # of what else is raised: 422


def serve(
    path: Path,
    overrides: Sequence[str],
    host: str,
    port: int,
    key_env: str | None,
    idle: float,
    most: int,
    say: Callable[[str], None],
) -> None:
    """Serve the `env:` block of a config until Ctrl-C. port 0 takes a free one. Raises InputError.

    key_env: the environment variable with the key that requests must bring; None: anybody who reaches the port is
    answered. idle: seconds. most: sessions at once. say: is told where.
    """
    knobs = load_env(path, overrides)
    app = application(knobs, key_of(key_env), idle, most)

    def about(url: str) -> list[str]:
        told = "".join(f", {name}: {value}" for name, value in _told(knobs).items())
        first = f"serving the environment '{_kind(knobs)}' on {url}; Ctrl-C ends it"
        return [first, f"in a run's config:  env: {{type: remote, url: '{url}'{told}}}"]

    listen(app, host, port, key_env is None, say, about)


def _kind(knobs: EnvKnobs) -> str:
    return type(knobs).model_fields["type"].default


def _told(knobs: EnvKnobs) -> dict[str, int]:
    """What a run has to be told. A character is a token at most, but for rare letters."""
    told = {"most_answers": knobs.answers, "most_said": knobs.room(0, len), "roles": knobs.speaking}
    return {name: value for name, value in told.items() if value != (0 if name == "most_said" else 1)}


@dataclass
class Session:
    """An episode. number: of its last call, 0 is the opening. answer: what came of it, or will. seen: last heard of."""

    env: Env
    number: int = -1
    answer: asyncio.Task[Any] | None = None
    seen: float = field(default_factory=time.monotonic)

    async def asked(self, number: int, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer to this number: it is made once, however often it is asked for. Raises Gone."""
        self.seen = time.monotonic()
        if number == self.number + 1 and (self.answer is None or self.answer.done()):
            self.number, self.answer = number, asyncio.ensure_future(call())
        answer = self.answer
        if number != self.number or answer is None:
            raise Gone(f"call {number} of a session that is at {self.number}")
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            if answer.cancelled():
                raise Gone("the session was closed meanwhile") from None
            raise

    async def close(self) -> None:
        """Whatever it is doing."""
        if self.answer is not None and not self.answer.done():
            self.answer.cancel()
            await asyncio.wait({self.answer})
        await self.env.close()


class Sessions:
    """Those that are open. opened: how many there were."""

    def __init__(self, make: Callable[[Any], Env], idle: float, most: int) -> None:
        self._make = make
        self._idle = idle
        self._most = most
        self._open: dict[str, Session] = {}
        self.opened = 0

    def __len__(self) -> int:
        return len(self._open)

    def open(self, plain: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        """Its first messages and tools. Raises Full."""
        name, task = str(plain["session"]), wire.read_task(plain["task"])
        if name not in self._open:
            if len(self) >= self._most:
                raise Full("there are as many sessions as there may be; --sessions allows more")
            self._open[name] = Session(self._make(task))
            self.opened += 1
        session = self._open[name]

        async def reset() -> dict[str, Any]:
            messages = list(await session.env.reset())
            return wire.plain({"messages": messages, "tools": list(getattr(session.env, "tools", ()))})

        return session.asked(0, reset)

    def step(self, plain: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        """The next turn. Raises Gone."""
        name, number, action = str(plain["session"]), int(plain["number"]), wire.read_action(plain["action"])
        session = self._open.get(name)
        if session is None:
            raise Gone(
                f"no session {name}: it was closed, was not heard of for {self._idle:g} s, or is older than I am"
            )

        async def step() -> dict[str, Any]:
            return wire.turn(await session.env.step(action))

        return session.asked(number, step)

    async def close(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Close it, unless it is closed."""
        if session := self._open.pop(str(plain["session"]), None):
            await session.close()
        return {}

    async def sweep(self) -> None:
        """For ever: close what is not heard of any more."""
        while True:
            await asyncio.sleep(min(self._idle / 4, 10.0))
            before = time.monotonic() - self._idle
            await self._end([name for name, session in self._open.items() if session.seen < before])

    async def end(self) -> None:
        """Close all."""
        await self._end(list(self._open))

    async def _end(self, names: list[str]) -> None:
        closing = [asyncio.wait_for(self.close({"session": name}), CLOSING) for name in names]
        await asyncio.gather(*closing, return_exceptions=True)


def application(knobs: EnvKnobs, key: str = "", idle: float = 600.0, most: int = 1024) -> Any:
    """The service as an ASGI application. key: what requests must bring; "" is none. Raises InputError."""
    refuse_lacking("serve-env")
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    knobs.build()  # refuses what it cannot find, also where it is built in other processes
    sessions = Sessions(placed(knobs), idle, most)

    def reply(status: int, plain: Any, **headers: str) -> Response:
        return Response(json.dumps(plain), status, headers, media_type="application/json")

    async def health(_: Any) -> Response:
        about = {"env": _kind(knobs), "sessions": len(sessions), "opened": sessions.opened}
        return reply(200, {"status": "ok", **about, "version": rlft.__version__})

    def answering(call: Callable[[dict[str, Any]], Awaitable[Any]]) -> Callable[[Any], Awaitable[Response]]:
        async def answer(request: Any) -> Response:
            if not admitted(request, key):
                return reply(401, {"error": "key", "said": "the key is missing or wrong"})
            body = await request.body()
            try:
                try:
                    asked = call(json.loads(body))
                except MALFORMED as error:
                    return reply(400, {"error": "request", "said": f"{type(error).__name__}: {error}"})
                return reply(200, await asked)
            except Exception as error:
                return reply(STATUS.get(type(error), 422), wire.failure(error))

        return answer

    @contextlib.asynccontextmanager
    async def life(_: Any) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(sessions.sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            await sessions.end()

    calls = {"/open": sessions.open, "/step": sessions.step, "/close": sessions.close}
    routes = [Route(path, answering(call), methods=["POST"]) for path, call in calls.items()]
    return Starlette(routes=[Route("/health", health), *routes], lifespan=life)
