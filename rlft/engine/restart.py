"""An engine in a worker that is started again when it is lost: a fresh process, and the weights brought into it anew.

The calls that were open end with EngineLost, whose `recover` does this; who made them does its work again, see
`rlft.recover`. Nothing is asked again request by request: what a request returns may depend, to the last bit, on those
it was batched with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlft.engine.base import Weights
from rlft.engine.worker import WorkerEngine
from rlft.types import Completion, EngineLost, RunError, Sampling


async def _nothing() -> None:
    pass


class Restarting:
    """Passes every call on to the worker of the moment.

    make: starts one. allowed: how often another may be started. note: is told why. refill: brings the weights into a
    fresh one; whoever connects the engine sets it.
    """

    def __init__(self, make: Callable[[], WorkerEngine], allowed: int, note: Callable[[str], None]) -> None:
        self._make = make
        self._allowed = allowed
        self._note = note
        self.refill: Callable[[], Awaitable[Any]] = _nothing
        self.restarts = 0
        self.worker = make()
        self.version = self.worker.version

    @property
    def dtype(self) -> torch.dtype | None:
        """What it computes in, where it says so."""
        return getattr(self.worker, "dtype", None)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """See `Engine.generate`."""
        return await self._through(self.worker.generate(prompt, sampling))

    async def load_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.load_weights`."""
        await self._through(self.worker.load_weights(weights, version))
        self.version = version

    async def units(self, names: Sequence[str]) -> dict[str, str]:
        """See `Engine.units`."""
        return await self._through(self.worker.units(names))

    async def read_back(self, names: Sequence[str], seed: int, agent: int = 0) -> dict[str, Tensor]:
        """See `Engine.read_back`."""
        return await self._through(self.worker.read_back(names, seed, agent))

    async def forget(self) -> None:
        """See `Engine.forget`."""
        await self._through(self.worker.forget())

    async def kept(self) -> int:
        """See `Engine.kept`."""
        return await self._through(self.worker.kept())

    async def close(self) -> None:
        """See `Engine.close`."""
        await self.worker.close()

    async def _through(self, call: Awaitable[Any]) -> Any:
        worker = self.worker
        try:
            return await call
        except EngineLost as lost:
            lost.recover = partial(self._again, worker, lost)
            raise

    async def _again(self, worker: WorkerEngine, lost: EngineLost) -> None:
        if worker is not self.worker:  # another call that was open has seen to it
            return
        await worker.close()
        if self.restarts >= self._allowed:
            raise RunError(
                f"{lost} It has been started again {self.restarts} times, and faults.restarts allows no more."
            ) from lost
        self.restarts += 1
        self._note(str(lost))
        self.worker = self._make()
        self.version = self.worker.version
        await self.refill()
