"""A real engine over a tiny model, and the recording of what went in and came out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.engine.local import LocalEngine
from rlft.envs.base import Env
from rlft.player import Player
from rlft.types import Completion, Sampling, Task, Trajectory


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """In every module here."""


@dataclass
class Recording:
    """A real engine, and what went in and came out."""

    inner: Engine
    version: int = -1
    prompts: list[list[int]] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        self.prompts.append(list(prompt))
        self.completions.append(await self.inner.generate(prompt, sampling))
        return self.completions[-1]


class Played:
    """One episode: the trajectory, and what the engine was asked and answered."""

    def __init__(self, chat: Chat, engine: Engine, env: Callable[[Task], Env], task: Task, seed: int, **room: int):
        self.engine = Recording(engine)
        sampling = Sampling(max_tokens=room.get("tokens", 60), stop=("e", "a", "s"))
        player = Player(self.engine, chat, env, sampling, room.get("context", 600))  # type: ignore[arg-type]
        self.trajectory: Trajectory = asyncio.run(player.play(task, seed))


@pytest.fixture(scope="session")
def play(chat: Chat, engine: LocalEngine) -> Callable[..., Played]:
    """play(env, task, seed, tokens=, context=) -> one episode."""

    def played(env: Callable[[Task], Env], task: Task, seed: int, **room: int) -> Played:
        return Played(chat, engine, env, task, seed, **room)

    return played
