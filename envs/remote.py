"""Environments that `rlft serve-env` plays on another machine: same messages, rewards and failures as if they ran here.

Every call of a session has a number, and the server answers a number it has seen as it did before. So each may be sent
again where a connection broke, and no move is made twice.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from rlft.envs import wire
from rlft.envs.base import Action, Env
from rlft.envs.custom import Told
from rlft.threads import Threads
from rlft.types import InputError, Message, Task, Turn

if TYPE_CHECKING:
    import httpx

LATER = {429, 502, 503, 504}  # what a server or a proxy before it says that is full, or starts
REFUSED = {401: "`env.api_key_env`", 403: "`env.api_key_env`", 404: "`env.url`", 405: "`env.url`"}
SHOWN = 500  # characters of a server's answer in a message
LONGEST = 30.0  # seconds between two tries


class RemoteConfig(Told):
    """An environment on another machine, served there by `rlft serve-env`."""

    type: Literal["remote"] = "remote"
    url: str = Field(
        pattern=r"^https?://[^@/]+(/[^@]*)?$", description="the server's address, such as http://host:8081"
    )
    api_key_env: str | None = Field(
        default=None, pattern=r"^[A-Z_][A-Z0-9_]*$", description="name of the environment variable that holds the key"
    )
    timeout: float = Field(
        default=120.0, gt=0, allow_inf_nan=False, description="seconds without an answer after which a call is repeated"
    )
    retries: int = Field(default=5, ge=0, description="further tries of a call that the server did not answer")
    backoff: float = Field(
        default=1.0, ge=0, allow_inf_nan=False, description="seconds before the second try; each next wait is doubled"
    )
    concurrent: int = Field(default=256, ge=1, description="calls under way at once")

    @field_validator("url")
    @classmethod
    def _bare(cls, url: str) -> str:
        return url.rstrip("/")

    def build(self) -> Callable[[Task], Env]:
        return partial(Remote, Line(self), Threads(self.concurrent))


class Line:
    """The way to the server. Raises InputError where the environment lacks the key."""

    def __init__(self, knobs: RemoteConfig) -> None:
        key = os.environ.get(knobs.api_key_env or "", "")
        if knobs.api_key_env is not None and not key:
            raise InputError(
                f"env.api_key_env: the environment variable {knobs.api_key_env} is not set; export it, or remove "
                "api_key_env if the server asks for no key"
            )
        import httpx

        self._errors = httpx.TransportError
        self._knobs = knobs
        self._client = httpx.Client(
            base_url=knobs.url,
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=knobs.timeout,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    def ask(self, path: str, body: bytes, retries: int | None = None) -> Any:
        """In a thread: what the server answers. Raises what the environment raised there, and ConnectionError after
        the last try; InputError where no call can succeed (key or address refused).
        """
        left = self._knobs.retries if retries is None else retries
        wait = self._knobs.backoff
        while True:
            try:
                return self._once(path, body)
            except ConnectionError:
                if left == 0:
                    raise
            time.sleep(wait)
            left, wait = left - 1, min(2 * wait, LONGEST)

    def _once(self, path: str, body: bytes) -> Any:
        try:
            answer = self._client.post(path, content=body)
        except self._errors as error:
            raise ConnectionError(f"{self._knobs.url} cannot be reached ({type(error).__name__}: {error})") from error
        if answer.status_code == 200:
            return answer.json()
        if answer.status_code in LATER:
            raise ConnectionError(f"{self._knobs.url} answered {answer.status_code}: {answer.text[:SHOWN]}")
        raise self._refused(answer)

    def _refused(self, answer: httpx.Response) -> Exception:
        status, said = answer.status_code, answer.text[:SHOWN]
        if status in REFUSED:
            return InputError(f"{self._knobs.url} answered {status}: {said}. Check {REFUSED[status]}")
        try:
            return wire.meant(answer.json())
        except (ValueError, KeyError, TypeError):
            return RuntimeError(f"{self._knobs.url} answered {status}: {said}")


class Remote:
    """One episode, which is a session there."""

    tools: tuple[Any, ...] = ()

    def __init__(self, line: Line, threads: Threads, task: Task) -> None:
        self._line = line
        self._threads = threads
        self._task = task
        self._session = secrets.token_hex(16)  # not from the generators that a run resumes
        self._number = 0
        self._opened = False

    async def reset(self) -> tuple[Message, ...]:
        """Open a session, and ask for the messages that open the episode."""
        about = wire.task(self._task)
        self._opened = True
        answer = await self._ask("/open", {"task": about})
        self.tools = tuple(answer["tools"])
        return tuple(answer["messages"])

    async def step(self, action: Action) -> Turn:
        """The reply to one action."""
        self._number += 1
        return wire.read_turn(await self._ask("/step", {"number": self._number, "action": vars(action)}))

    async def close(self) -> None:
        """Close the session. One that cannot be closed is dropped there after a while."""
        if self._opened:
            await self._ask("/close", {}, retries=1)

    async def _ask(self, path: str, more: dict[str, Any], **how: int) -> Any:
        body = json.dumps({"session": self._session} | more).encode()
        return await self._threads.run(lambda sent: self._line.ask(path, sent, **how), body, math.inf)
