"""What an environment is: it opens with messages, answers each action with a turn, and is used once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlft.types import Message, Turn


@dataclass(frozen=True)
class Action:
    """What the policy said, and how the engine stopped it ("stop" or "length")."""

    text: str
    finish: str


class Env(Protocol):
    """One episode of one task."""

    async def reset(self) -> tuple[Message, ...]:
        """The messages that open the episode."""
        ...

    async def step(self, action: Action) -> Turn:
        """The reply to one action."""
        ...

    async def close(self) -> None:
        """Called once, whatever happened."""
        ...
