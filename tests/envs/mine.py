"""Tools that the tests name in their configs."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from rlft.types import Task


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second one,
            which may be negative.
    """
    return a + b


async def slowly(word: str, seconds: float = 0.0) -> str:
    """Say a word again.

    Args:
        word: What to say.
        seconds: How long to wait first.
    """
    await asyncio.sleep(seconds)
    return word


def sleep(seconds: float) -> float:
    """Sleep.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return seconds


def paint(colour: Literal["red", "blue"], layers: list[int], note: str | None = None) -> dict[str, object]:
    """Paint a wall.

    Args:
        colour: Of the paint.
        layers: The thickness of each.
        note: Anything else.
    """
    return {"colour": colour, "layers": layers, "note": note}


def hint(task: Task) -> str:
    """Tell a hint for the task."""
    return f"It is not {task.info['answer']}."


def fails() -> str:
    """Fail."""
    raise KeyError("nothing there")


class Box:
    """A box that belongs to one episode."""

    open_boxes = 0

    def __init__(self, task: Task) -> None:
        self.things = [str(task.info.get("first", "key"))]
        Box.open_boxes += 1

    def put(self, thing: str) -> str:
        """Put a thing into the box.

        Args:
            thing: Its name.
        """
        before = list(self.things)
        time.sleep(0.02)  # so that calls beside each other would lose things
        self.things = [*before, thing]
        return f"{len(self.things)} things"

    async def look(self) -> list[str]:
        """See what is in the box."""
        return self.things

    def _metrics(self) -> dict[str, float]:
        return {"things": float(len(self.things))}

    def _close(self) -> None:
        Box.open_boxes -= 1


def untyped(a, b: int) -> int:  # type: ignore[no-untyped-def]
    """Add."""
    return a + b


def undocumented(a: int) -> int:
    return a


def spread(*numbers: int) -> int:
    """Add."""
    return sum(numbers)
