"""A served policy in this process: the application of `rlft serve-policy` on a real engine, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import AsyncOpenAI

from rlft.chat import Chat
from rlft.config import Config
from rlft.engine.local import LocalEngine
from rlft.envs.agent_endpoint import application
from rlft.listening import listening
from rlft.player import Player
from rlft.serve_policy import Service, Visits
from rlft.types import Completion, Sampling

HI: Any = [{"role": "user", "content": "Hi"}]


class Watched:
    """A real engine, and how it was asked. open: requests that wait for their answers. pause: seconds before each."""

    def __init__(self, model: Path, chat: Chat) -> None:
        self.inner = LocalEngine(model, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer)
        self.samplings: list[Sampling] = []
        self.prompts: list[list[int]] = []
        self.version = 0
        self.open = 0
        self.pause = 0.0

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        self.samplings.append(sampling)
        self.prompts.append(list(prompt))
        self.open += 1
        try:
            await asyncio.sleep(self.pause)
            return await self.inner.generate(prompt, sampling)
        finally:
            self.open -= 1


@dataclass
class Served:
    """What it takes to serve. own: the key of the service. most: tokens of an answer. idle: seconds."""

    engine: Watched
    chat: Chat
    config: Config
    record: Path | None = None
    own: str = ""
    most: int = 8
    idle: float = 600.0
    visits: Visits = field(init=False)

    def __post_init__(self) -> None:
        def player(env: Any) -> Player:
            return Player(self.engine, self.chat, env, Sampling(max_tokens=self.most), 400)  # type: ignore[arg-type]

        self.visits = Visits(player, self.config, "", Service(Path(), record=self.record, idle=self.idle), self.own)

    @contextlib.asynccontextmanager
    async def client(self, key: str) -> AsyncIterator[AsyncOpenAI]:
        """One that asks without a network."""
        async with self.visits as visits:
            transport = httpx.ASGITransport(application(visits.find))
            http: Any = httpx.AsyncClient(transport=transport, base_url="http://test/v1")
            async with AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http, max_retries=0) as client:
                yield client

    @contextlib.asynccontextmanager
    async def port(self) -> AsyncIterator[str]:
        """The address of one that is reached over a port, where clients can hang up."""
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def about(url: str) -> list[str]:
            address.set_result(url)
            return []

        async with self.visits as visits:
            app = application(visits.find)
            serving = asyncio.ensure_future(listening(app, "127.0.0.1", 0, False, lambda _: None, about))
            try:
                yield f"{await address}/v1"
            finally:
                serving.cancel()
                await asyncio.wait({serving})
