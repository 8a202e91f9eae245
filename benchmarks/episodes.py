"""How busy the engine is kept by many episodes whose worlds take their time: 256 at once, each reply after up to 1 s.

Without delays, with delays that are awaited, and with delays that hold a thread. The same episodes with the same
seeds, in turn, `--rounds` times, after one to warm up. busy: the share of the time in which the engine has a request;
idle: the other seconds. Other work on the machine makes that share larger, so `alone` is what it would be on a machine
of its own: with the processor's seconds without delays in place of those on the clock. pace: tokens a second, to those
without delays. `python -m benchmarks.episodes [--turns N] [--tokens N] [--engine local|vllm] [--model FOLDER]`; the
default model is a tiny one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.spec import table
from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.envs.placed import Threaded
from rlft.models import locate
from rlft.player import Limits, Player, derive_seed
from rlft.threads import Threads
from rlft.tiny import save
from rlft.types import Completion, Message, Sampling, Task, Turn

LONGEST = 1.0  # seconds


def delay(task: Task, turn: int) -> float:
    """Uniform up to LONGEST, and the same in every run."""
    return LONGEST * (derive_seed(task.id, turn) % 10**6) / 10**6


class Waits:
    """Asks again and again, each time with a new history."""

    def __init__(self, task: Task, turns: int, waits: bool) -> None:
        self.task, self.turns, self.waits, self.turn = task, turns, waits, 0

    async def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    async def step(self, action: Action) -> Turn:
        if self.waits:
            await asyncio.sleep(delay(self.task, self.turn))
        self.turn += 1
        return Turn(self.task.messages, done=self.turn == self.turns, rewrite=True)

    async def close(self) -> None: ...


class Blocks(Waits):
    """The same with plain methods."""

    def reset(self) -> tuple[Message, ...]:  # type: ignore[override]
        return self.task.messages

    def step(self, action: Action) -> Turn:  # type: ignore[override]
        return asyncio.run(super().step(action))

    def close(self) -> None: ...  # type: ignore[override]


class Timed:
    """An engine, and for how long it had a request."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.version = 0
        self._open = 0
        self._since = 0.0
        self.busy = 0.0
        self.tokens = 0

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        if self._open == 0:
            self._since = time.monotonic()
        self._open += 1
        try:
            said = await self._inner.generate(prompt, sampling)
        finally:
            self._open -= 1
            if self._open == 0:
                self.busy += time.monotonic() - self._since
        self.tokens += len(said.tokens)
        return said


def engine_of(kind: str, model: Path, chat: Chat, scratch: Path) -> Engine:
    """In this process, or vLLM in one of its own, as a run has it."""
    if kind == "local":
        return LocalEngine(model, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer)
    from rlft.engine.vllm import VllmEngine
    from rlft.engine.worker import in_worker

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    own = {"model": model, "dtype": dtype, "context": 512, "max_sequences": 256, "log": scratch / "engine.log"}
    return in_worker(VllmEngine, **own)


@dataclass(frozen=True)
class Round:
    """Seconds in all, with a request, and of the processor; tokens that were drawn."""

    seconds: float
    busy: float
    processor: float
    tokens: int


async def measure(engine: Engine, chat: Chat, make: Callable[[Task], Any], asked: Any) -> Round:
    """Play all episodes."""
    timed: Any = Timed(engine)
    one = Player(timed, chat, make, Sampling(max_tokens=asked.tokens), 512, limits=Limits(call=600))
    tasks = [Task(f"t{i}", ({"role": "user", "content": f"Say {i}."},)) for i in range(asked.episodes)]
    began, used = time.monotonic(), time.process_time()
    await asyncio.gather(*(one.play(task, derive_seed(task.id)) for task in tasks))
    return Round(time.monotonic() - began, timed.busy, time.process_time() - used, timed.tokens)


async def compare(asked: Any, scratch: Path) -> list[dict[str, Any]]:
    """A row for each way to wait."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    model = locate(asked.model) if asked.model else save(scratch / "model")
    chat = Chat(model)
    engine = engine_of(asked.engine, model, chat, scratch)
    ways: dict[str, Callable[[Task], Any]] = {
        "no delay": partial(Waits, turns=asked.turns, waits=False),
        "awaited": partial(Waits, turns=asked.turns, waits=True),
        "64 threads": partial(Threaded, partial(Blocks, turns=asked.turns, waits=True), Threads(64)),
        "256 threads": partial(Threaded, partial(Blocks, turns=asked.turns, waits=True), Threads(256)),
    }
    taken: dict[str, list[Round]] = {name: [] for name in ways}
    try:
        await measure(engine, chat, ways["no delay"], asked)
        for _ in range(asked.rounds):
            for name, make in ways.items():
                taken[name].append(await measure(engine, chat, make, asked))
    finally:
        await engine.close()
    rows: list[dict[str, Any]] = [{"delays": name} | figures(some) for name, some in taken.items()]
    first = statistics.median(one.processor for one in taken["no delay"])
    for row in rows:
        if asked.engine == "local":  # vLLM's processor time is another process's
            row["alone"] = first / (first + row["idle"])
        row["pace"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
    return rows


def figures(some: Sequence[Round]) -> dict[str, Any]:
    """Medians over the rounds."""
    of: dict[str, Callable[[Round], float]] = {
        "seconds": lambda one: one.seconds,
        "processor": lambda one: one.processor,
        "idle": lambda one: one.seconds - one.busy,
        "busy": lambda one: one.busy / one.seconds,
        "tokens_per_s": lambda one: one.tokens / one.seconds,
    }
    return {name: statistics.median(map(figure, some)) for name, figure in of.items()}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", choices=["local", "vllm"], default="local")
    parser.add_argument("--model")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = asyncio.run(compare(asked, Path(scratch)))
    title = f"{asked.episodes} episodes of {asked.turns} turns, {asked.engine} engine"
    print(json.dumps(rows) if asked.json else table(title, rows))


if __name__ == "__main__":
    main()
