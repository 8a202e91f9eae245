"""An environment behind an OpenEnv server (github.com/meta-pytorch/OpenEnv), each episode a session of its own.

It is spoken to by the server's WebSocket, as the library's GenericEnvClient does, so nothing of the environment need be
installed here. The answer becomes the action: as one of its fields, or, where it is JSON, the whole of it. What the
server refuses is told to the policy, and costs a turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from pydantic import Field

from rlft.envs.base import Action
from rlft.envs.worlds.base import LibraryKnobs, library, opened, said, seed_of
from rlft.types import Message, Task, Turn

REFUSED = "VALIDATION_ERROR"
LARGEST = 100 << 20  # bytes of a message, as the library's client has it


class OpenEnv:
    """One session."""

    def __init__(self, task: Task, knobs: OpenEnvConfig) -> None:
        self._task = task
        self._knobs = knobs
        self._socket: Any = None
        self._left = knobs.turns
        self._total = 0.0
        self._malformed = 0

    async def reset(self) -> tuple[Message, ...]:
        """What the server's reset with the task's seed observes."""
        client = library("websockets.asyncio.client", "openenv")
        self._socket = await client.connect(socket_of(self._knobs.url), max_size=LARGEST)
        told = await self._ask("reset", {"seed": seed_of(self._task), **self._knobs.options})
        if told["type"] == "error":
            raise RuntimeError(f"{self._knobs.url} does not reset with {self._knobs.options}: {told['data']}")
        return opened(self._task, self._shown(told["data"]))

    async def step(self, action: Action) -> Turn:
        """What it observes after the action, and what that paid."""
        self._left -= 1
        made = self._action(action.text)
        told = await self._ask("step", made) if isinstance(made, dict) else None
        if told is not None and told["type"] == "error" and told["data"].get("code") != REFUSED:
            raise RuntimeError(f"{self._knobs.url}: {told['data']}")
        if told is None or told["type"] == "error":
            self._malformed += 1
            reason = made if told is None else _reason(told["data"])
            return Turn((said(str(reason)),), done=self._left <= 0, metrics=self._metrics(0.0))
        data = told["data"]
        reward = float(data.get("reward") or 0.0)
        self._total += reward
        done = bool(data.get("done"))
        metrics = self._metrics(reward if done else 0.0)
        return Turn((said(self._shown(data)),), reward, done or self._left <= 0, metrics=metrics)

    async def close(self) -> None:
        """End the session."""
        if self._socket is not None:
            await self._socket.close()

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
        await self._socket.send(json.dumps({"type": kind, "data": dict(data)}))
        return json.loads(await self._socket.recv())

    def _action(self, text: str) -> dict[str, Any] | str:
        """The action, or why the answer is none."""
        if self._knobs.answer == "field":
            return {**self._knobs.action, self._knobs.field: text.strip()}
        start, end = text.find("{"), text.rfind("}")
        try:
            made = json.loads(text[start : end + 1])
        except (ValueError, RecursionError) as error:
            return f"The answer has to be one JSON object: {error}"
        return {**self._knobs.action, **made} if isinstance(made, dict) else "The answer has to be one JSON object."

    def _shown(self, data: Mapping[str, Any]) -> str:
        """The observation's field that is to be shown, or all of it."""
        observation = data.get("observation") or {}
        whole = self._knobs.show is None or self._knobs.show not in observation
        return json.dumps(observation, ensure_ascii=False) if whole else str(observation[self._knobs.show])

    def _metrics(self, last: float) -> dict[str, float]:
        return {"success": float(last > 0), "return": self._total, "malformed": float(self._malformed)}


class OpenEnvConfig(LibraryKnobs):
    """An environment behind an OpenEnv server."""

    type: Literal["openenv"] = "openenv"
    url: str = Field(pattern=r"^(https?|wss?)://", description="the server's address")
    options: dict[str, Any] = Field(default_factory=dict, description="what its reset is given beside the seed")
    answer: Literal["field", "json"] = Field(
        default="field",
        description="the action: one field of it is the answer, or the answer is JSON, and all of it",
    )
    field: str = Field(default="message", min_length=1, description="the action's field that holds the answer")
    action: dict[str, Any] = Field(default_factory=dict, description="the action's other fields")
    show: str | None = Field(
        default=None, description="the observation's field that is shown; none: all of it, as JSON"
    )

    def build(self) -> Callable[[Task], Any]:
        library("websockets.asyncio.client", "openenv")
        return partial(OpenEnv, knobs=self)


def socket_of(url: str) -> str:
    """The address of the server's WebSocket."""
    return "ws" + url.removeprefix("http").removeprefix("ws").rstrip("/") + "/ws"


def _reason(error: Mapping[str, Any]) -> str:
    """What the server said is wrong with an action."""
    listed = error.get("errors") or []
    places = [f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg', '')}" for one in listed]
    return f"{error.get('message', 'The action was refused')}. {'; '.join(places)}".strip()
