"""A walk on a grid to a goal, with walls that are told only where one stands next to them.

The goal is always in reach: it is drawn among the cells that breadth-first search finds within half of the turns.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from rlft.envs.own.play import Move, WorldKnobs, last_word

Cell = tuple[int, int]
WAYS: dict[str, Cell] = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}


def distances(start: Cell, size: int, walls: set[Cell]) -> dict[Cell, int]:
    """Steps from a cell to every cell in reach."""
    found, queue = {start: 0}, deque([start])
    while queue:
        cell = queue.popleft()
        for way in WAYS:
            there = towards(cell, way)
            if inside(there, size) and there not in walls and there not in found:
                found[there] = found[cell] + 1
                queue.append(there)
    return found


def towards(cell: Cell, way: str) -> Cell:
    """The next cell."""
    return cell[0] + WAYS[way][0], cell[1] + WAYS[way][1]


def inside(cell: Cell, size: int) -> bool:
    """It lies on the grid."""
    return 0 <= cell[0] < size and 0 <= cell[1] < size


class Walk:
    """One grid. x grows eastwards and y northwards, both from 0."""

    def __init__(self, chance: random.Random, size: int, walls: float, turns: int) -> None:
        self._size, self._turns = size, turns
        cells = [(x, y) for x in range(size) for y in range(size)]
        self._at = chance.choice(cells)
        self._walls = {cell for cell in cells if cell != self._at and chance.random() < walls}
        steps = distances(self._at, size, self._walls)
        far = max(1, turns // 2)
        goals = sorted(cell for cell, n in steps.items() if 0 < n <= far)
        if not goals:  # walled in: open one side
            goals = [next(cell for cell in (towards(self._at, way) for way in WAYS) if inside(cell, size))]
            self._walls.discard(goals[0])
        self._goal = chance.choice(goals)

    def opening(self) -> str:
        """The rules, and what is seen."""
        return (
            f"You stand on a grid of {self._size} by {self._size} cells. North is one more y, east one more x. Reach "
            f"the goal in at most {self._turns} steps. Answer with one word: north, east, south or west.\n"
            + self._seen()
        )

    def move(self, text: str) -> Move:
        """One step, where there is no wall."""
        way = last_word(text, WAYS)
        if way is None:
            return Move(f"Answer with one word: north, east, south or west. {self._seen()}", fit=False)
        there = towards(self._at, way)
        if not self._free(there):
            return Move(f"There is a wall. {self._seen()}")
        self._at = there
        return Move(won=True) if there == self._goal else Move(self._seen())

    def _free(self, cell: Cell) -> bool:
        return inside(cell, self._size) and cell not in self._walls

    def _seen(self) -> str:
        blocked = [way for way in WAYS if not self._free(towards(self._at, way))]
        return f"You: x={self._at[0]}, y={self._at[1]}. Goal: x={self._goal[0]}, y={self._goal[1]}. Walls: " + (
            ", ".join(blocked) + "." if blocked else "none."
        )


class WalkConfig(WorldKnobs):
    """Walk on a grid to a goal."""

    type: Literal["walk"] = "walk"
    size: int = Field(default=5, ge=2, le=50, description="cells of a side")
    walls: float = Field(default=0.2, ge=0, le=0.6, description="share of the cells that are walls")
    turns: int = Field(default=8, ge=1, description="the most steps; the goal is at most half as far")

    @property
    def answers(self) -> int:
        return self.turns

    def openings(self) -> Iterable[str]:
        for seen in self._seen():
            yield self.world(random.Random(0)).opening().partition("\n")[0] + f"\n{seen}"

    def replies(self) -> Iterable[str]:
        for seen in self._seen():
            yield f"Answer with one word: north, east, south or west. {seen}"
            yield f"There is a wall. {seen}"

    def _seen(self) -> Iterable[str]:
        far = self.size - 1
        for walls in ("north, east, south, west", "none"):
            yield f"You: x={far}, y={far}. Goal: x={far}, y={far}. Walls: {walls}."

    def world(self, chance: random.Random) -> Walk:
        return Walk(chance, self.size, self.walls, self.turns)
