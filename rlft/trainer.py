"""The loop, whole, on one screen; it runs every algorithm and names none."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from rlft.agents import Trainee
from rlft.algorithms.base import Algorithm
from rlft.batch import Batch
from rlft.chance import put, states
from rlft.parity import Mismatch
from rlft.source import Source
from rlft.types import Group

T = TypeVar("T")
BESIDE = "rlft-learn"  # the name of a thread that learns


class Hooks(Protocol):
    """What happens around a step: evaluation, checkpoints, records. Never changes what is learned."""

    async def before(self, start: int) -> None:
        """Once, before the first step."""
        ...

    async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None:
        """After each step, when the engine serves version `step`. chosen: those of `groups` that were trained on."""
        ...

    async def finish(self, step: int, stopped: bool) -> None:
        """Once, after the last step, or after the one during which somebody asked to stop."""
        ...


async def refused(found: Mismatch, chosen: list[Group]) -> None:
    """A mismatch ends the run."""
    raise found


@dataclass
class Run:
    """What it takes to train. sync: brings the learner's weights of a version into the engine, and proves it.

    differs: what to do when the learner's log-probs are not the engine's, and nothing was learned from them yet. It
    raises, or opens the gate so that the run goes on. learning: is held while the learner's weights are changed.
    """

    steps: int
    source: Source
    algorithm: Algorithm
    learner: Trainee
    sync: Callable[[int], Awaitable[dict[str, float]]]
    hooks: Hooks
    differs: Callable[[Mismatch, list[Group]], Awaitable[None]] = refused
    learning: asyncio.Lock = field(default_factory=asyncio.Lock)
    stopping: bool = False
    complete: int | None = None  # the step that learner and source stand after; None in the middle of one
    _drawing: asyncio.Task[list[Group]] | None = field(default=None, repr=False)

    async def draw(self) -> list[Group]:
        """The source's next groups; empty when `stop` came while they were drawn."""
        before = states()
        self._drawing = asyncio.ensure_future(self.source.next())
        try:
            return await self._drawing
        except BaseException as error:  # what is drawn again is drawn by the same dice
            put(before)
            if self.stopping and isinstance(error, asyncio.CancelledError):
                return []
            raise
        finally:
            self._drawing = None

    async def learn(self, chosen: list[Group]) -> dict[str, float]:
        """Update the learner, in a thread of its own where the source goes on drawing; what to log."""
        update = partial(self.learner.update, Batch.of(chosen), self.algorithm)
        while True:
            try:
                async with self.learning:
                    return await self.apart(update) if self.source.overlaps else update()
            except Mismatch as found:
                await self.source.settled()
                await self.differs(found, chosen)

    async def apart(self, update: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The update's result, computed beside the event loop; a second Ctrl-C does not wait for it."""
        return await beside(update)

    async def settle(self) -> dict[str, float]:
        """Wait until nothing is sampled from the weights that are about to change; how long that took."""
        begun = time.perf_counter()
        await self.source.settled()
        return {"time/settle": time.perf_counter() - begun} if self.source.overlaps else {}

    def stop(self) -> None:
        """End after the step that is being learned; a step that is still being sampled is not begun."""
        self.stopping = True
        if self._drawing is not None:
            self._drawing.cancel()


def beside(work: Callable[[], T]) -> asyncio.Future[T]:
    """What `work()` gives, in a thread that ends with the process. asyncio's own are waited for, whatever happens."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[T] = loop.create_future()

    def tell(settle: Callable[[Any], None], what: Any) -> None:
        if not found.done():
            settle(what)

    def act() -> None:
        try:
            how, what = found.set_result, work()
        except BaseException as error:
            how, what = found.set_exception, error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, how, what)

    threading.Thread(target=copy_context().run, args=(act,), name=BESIDE, daemon=True).start()
    return found


def still_learning() -> bool:
    """A thread of `beside` runs on. Python cannot end in an orderly way under it, torch being inside."""
    return any(thread.name == BESIDE for thread in threading.enumerate())


async def train(run: Run, start: int = 0) -> None:
    """Steps `start + 1` to `run.steps`. Step n trains on samples of version n - 1 and makes version n; on older ones
    where the source draws ahead.
    """
    await run.sync(start)
    await run.hooks.before(start)
    step = run.complete = start
    while step < run.steps and not run.stopping:
        begun = time.perf_counter()
        groups = await run.draw()
        if not groups:
            break
        step, run.complete = step + 1, None
        drawn = time.perf_counter()
        algorithm = run.algorithm.at(run.learner.remembered)
        chosen = algorithm.select(groups) if run.source.selected is None else run.source.selected
        metrics = {**run.source.metrics, **await run.learn(chosen)}
        metrics["time/learn"] = time.perf_counter() - drawn
        metrics |= await run.settle()
        metrics |= await run.sync(step)
        metrics["time/step"] = time.perf_counter() - begun
        await run.hooks.after(step, groups, chosen, metrics)
        run.complete = step
    run.stopping = run.stopping and step < run.steps  # asked to stop in the last step, it is simply done
    await run.hooks.finish(step, run.stopping)
