"""Asking an environment: in time, and with an answer that is one. Whatever goes wrong is the environment's failure, and
costs its episode; only InputError and RunError mean the run.
"""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import Awaitable, Mapping
from numbers import Integral
from typing import Any, Protocol, TypeVar, runtime_checkable

from rlft.chat import Tool
from rlft.envs.base import Env
from rlft.episode import WorldFailed
from rlft.types import InputError, Message, RunError, Turn, finite

T = TypeVar("T")


@runtime_checkable
class Waiting(Protocol):
    """An environment that waits for a place to run before its first call, which counts towards no limit."""

    async def ready(self) -> None:
        """It has what it needs."""
        ...


@runtime_checkable
class Timed(Protocol):
    """An environment whose calls wait for a place each, so that it keeps their limit itself."""

    def within(self, seconds: float | None) -> None:
        """How long each call may take, once it has a place."""
        ...


async def answered(answer: Awaitable[T], seconds: float | None) -> T:
    """What the environment answers within so many seconds. Raises WorldFailed."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await answer
    except (InputError, RunError):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise WorldFailed from RuntimeError(f"it was cancelled from inside: {error!r}")
    except TimeoutError as error:
        raise WorldFailed from (TimeoutError(f"it took longer than {seconds:g} s") if limit.expired() else error)
    except (Exception, SystemExit) as error:
        raise WorldFailed from error


async def ready(env: Env, seconds: float | None) -> float | None:
    """Wait until it has a place to run, if it needs one; the limit that is left to keep for its calls."""
    if isinstance(env, Waiting):
        await answered(_place(env), None)
    if not isinstance(env, Timed):
        return seconds
    env.within(seconds)
    return None


async def _place(env: Waiting) -> None:
    await env.ready()


def opened_by(messages: Any) -> tuple[Message, ...]:
    """The messages with which it opened, if they are some. Raises WorldFailed."""
    if not isinstance(messages, list | tuple) or not messages or not _are_messages(messages):
        raise WorldFailed from TypeError(f"reset returned {reprlib.repr(messages)}, which are no messages")
    return tuple(messages)


def replied(turn: Any) -> Turn:
    """What it replied, if that is a reply. Raises WorldFailed."""
    if not isinstance(turn, Turn):
        raise WorldFailed from TypeError(f"step returned {reprlib.repr(turn)}, which is no Turn")
    faults = {
        "reward": not _counts(turn.reward),
        "metrics": not isinstance(turn.metrics, Mapping) or not all(map(_counts, turn.metrics.values())),
        "pays": not isinstance(turn.pays, Mapping) or not all(map(_paid, turn.pays.items())),
        "messages": not isinstance(turn.messages, list | tuple) or not _are_messages(turn.messages),
        "said": turn.said is not None and not _are_messages([turn.said]),
    }
    wrong = next((name for name, fault in faults.items() if fault), None)
    if wrong is None and turn.rewrite and not turn.done and not turn.messages:
        wrong = "messages"  # nothing would be left to answer
    if wrong is not None:
        held = reprlib.repr(getattr(turn, wrong))
        wanted = {
            "reward": "a finite number",
            "metrics": "finite numbers by name",
            "pays": "finite numbers by role",
            "said": "a message",
        }
        raise WorldFailed from TypeError(
            f"step returned a Turn whose {wrong} is {held}, not {wanted.get(wrong, 'messages')}"
        )
    return turn


def tools_of(env: Env) -> tuple[Tool, ...]:
    """The tools that the chat template is to show, as JSON schemas."""
    return tuple(getattr(env, "tools", ()) or ())


def _are_messages(messages: Any) -> bool:
    return all(isinstance(one, Mapping) and one.get("role") and one.get("content") is not None for one in messages)


def _paid(entry: tuple[Any, Any]) -> bool:
    return isinstance(entry[0], Integral) and not isinstance(entry[0], bool) and _counts(entry[1])


def _counts(value: Any) -> bool:
    return isinstance(value, bool) or finite(value)
