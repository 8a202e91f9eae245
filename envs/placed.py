"""Where an environment runs. What is not async would hold up every other episode, so it runs in threads; what may
crash or never come back runs in processes of its own, which can be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

from pydantic import Field

from rlft.envs.base import Action, Env, EnvKnobs
from rlft.threads import Threads
from rlft.types import Message, Task, Turn

THREADS = 64  # of an environment that has no knob for them
PREPARATION = 600.0  # seconds that one may take


class Placed(EnvKnobs):
    """The knobs of environments that hold code which may block, hang or crash."""

    place: Literal["here", "process"] = Field(
        default="here",
        description="process: each episode is played in another process, so that a crash or an endless loop costs it "
        "alone",
    )
    threads: int = Field(default=64, ge=1, description="calls of methods that are not async, under way at once")
    processes: int = Field(
        default=32, ge=1, description="with place: process, episodes that are played at once; others wait"
    )

    def prepare(self, task: Task) -> None:
        """Slow work before an episode opens, such as compiling its game. Nothing, where a class does not say otherwise.

        It is done in this process, wherever the episode is played, by at most one thread for two cores; the wait for it
        counts towards no limit of a call. What it raises fails the episode; nothing kills it, so it must end.
        """

    @property
    def prepares(self) -> bool:
        """There is such work."""
        return type(self).prepare is not Placed.prepare


class Preparing:
    """Prepares episodes, a few at a time. Those of one task wait for the first of them, and take no thread for it."""

    def __init__(self, knobs: Placed) -> None:
        self._work = knobs.prepare
        self._threads = Threads(max(1, (os.cpu_count() or 1) // 2))
        # By loop and task; each goes with the last that waits for it.
        self._locks: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, task: Task) -> None:
        """Once this task's is done."""
        lock = self._locks.setdefault((id(asyncio.get_running_loop()), task.id), asyncio.Lock())
        async with lock:
            await self._threads.run(self._work, task, PREPARATION)


def placed(knobs: EnvKnobs, tokenizer: Any = None, template: str = "", prepare: bool = True) -> Callable[[Task], Env]:
    """What makes the environments of a config, each where it is to run. Raises InputError.

    A class with async methods is used as it is. Everything else is called in threads, its making included. tokenizer,
    template: of the model that plays, for environments that read its tool calls. prepare: tasks are prepared here.
    """
    if isinstance(knobs, Placed) and knobs.place == "process":
        from rlft.envs.process import Apart, Pool

        return partial(Apart, Pool(knobs, knobs.processes))
    make = knobs.build_for(tokenizer, template)
    preparing = Preparing(knobs) if prepare and isinstance(knobs, Placed) and knobs.prepares else None
    if _is_async(make) and preparing is None:
        return make
    threads = Threads(knobs.threads if isinstance(knobs, Placed) else THREADS)
    return partial(Threaded, make, threads, prepare=preparing)


def _is_async(make: Any) -> bool:
    """Whether it is a class all of whose methods are async: its making is quick then, or it is its own fault."""
    while isinstance(make, partial):
        make = make.func
    methods = (getattr(make, name, None) for name in ("reset", "step", "close"))
    return inspect.isclass(make) and all(map(inspect.iscoroutinefunction, methods))


class Threaded:
    """An environment whose plain methods are called in threads; async ones stay on the event loop."""

    def __init__(
        self, make: Callable[[Task], Any], threads: Threads, task: Task, prepare: Preparing | None = None
    ) -> None:
        self._make = make
        self._threads = threads
        self._task = task
        self._prepare = prepare
        self._env: Any = None
        self._closed = False
        self._lock = threading.Lock()
        self._seconds: float | None = None

    def within(self, seconds: float | None) -> None:
        """How long each call may take once it has a thread: the wait for one counts towards no limit."""
        self._seconds = seconds

    async def ready(self) -> None:
        """Prepare its task, once."""
        prepare, self._prepare = self._prepare, None
        if prepare is not None:
            await prepare(self._task)

    @property
    def tools(self) -> tuple[Any, ...]:
        """Those of the environment."""
        return tuple(getattr(self._env, "tools", ()) or ())

    async def reset(self) -> tuple[Message, ...]:
        """Make it, and ask for the messages that open the episode."""
        await self.ready()
        await self._threads.run(self._open, self._task, self._limit)
        return await self._ask("reset")

    async def step(self, action: Action) -> Turn:
        """The reply to one action."""
        return await self._ask("step", action)

    async def close(self) -> None:
        """Close it, if it was made. One that is still being made is closed once it is."""
        with self._lock:
            self._closed = True
        if self._env is not None:
            await self._ask("close")

    async def _ask(self, name: str, *given: Any) -> Any:
        method = getattr(self._env, name)
        if inspect.iscoroutinefunction(method):
            return await asyncio.wait_for(method(*given), self._seconds)
        answer = await self._threads.run(lambda own: method(*own), given, self._limit)
        return await asyncio.wait_for(answer, self._seconds) if inspect.isawaitable(answer) else answer

    @property
    def _limit(self) -> float:
        return math.inf if self._seconds is None else self._seconds

    def _open(self, task: Task) -> None:
        """In a thread. It may take so long that nobody waits any more; then only this thread can close what it made."""
        env = self._make(task)
        with self._lock:
            if not self._closed:
                self._env = env
                return
        with contextlib.suppress(Exception):
            answer = env.close()
            if inspect.iscoroutine(answer):
                asyncio.run(answer)
