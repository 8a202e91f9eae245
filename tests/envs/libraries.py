"""An episode of a world of another library, played by given answers through the place where a run plays it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlft.envs.base import Action
from rlft.envs.catalog import EnvConfig
from rlft.envs.placed import placed
from rlft.types import Message, Task, Turn

ASKED = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Begin."})


def knobs_of(**given: Any) -> Any:
    """The validated config."""
    return TypeAdapter(EnvConfig).validate_python(given)


def played(answers: Sequence[str], seed: int | None = 0, **given: Any) -> tuple[tuple[Message, ...], list[Turn]]:
    """The opening, and the turn that each answer got, until the episode is over."""

    async def play() -> tuple[tuple[Message, ...], list[Turn]]:
        env = placed(knobs_of(**given))(Task("row", ASKED, {} if seed is None else {"seed": seed}))
        try:
            opening, turns = await env.reset(), []
            for text in answers:
                turns.append(await env.step(Action(text, "stop")))
                if turns[-1].done:
                    break
            return opening, turns
        finally:
            await env.close()

    return asyncio.run(play())


def heard(turn: Turn) -> str:
    """What the world said."""
    return "\n".join(str(message["content"]) for message in turn.messages)


def skip_without(text: str) -> None:
    """Skip the test where a config names a world whose library is not there; `make worlds` installs them."""
    for name in ("reasoning_gym", "gymnasium", "textworld", "textarena", "verifiers"):
        if f"type: {name}" in text:
            pytest.importorskip(name)
