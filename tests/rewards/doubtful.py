"""Rewards to put into others: some of the library, one that fails, and one that sometimes has nothing to say."""

from __future__ import annotations

from rlft.types import Trajectory

NUMBER = {"type": "number"}
BARE = {"type": "format", "pattern": r"-?\d+"}
SHORT = {"type": "length", "limit": 4}
FAILS = {"type": "custom", "path": "tests.rewards.doubtful:fails"}
UNSURE = {"type": "custom", "path": "tests.rewards.doubtful:unsure"}


def fails(trajectory: Trajectory) -> float:
    raise ValueError("no grader here")


def unsure(trajectory: Trajectory) -> float | None:
    return None if "?" in trajectory.completion else 0.25
