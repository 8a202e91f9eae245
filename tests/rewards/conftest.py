"""A trajectory from a line of text, and a reward's verdict on some of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlft.rewards.catalog import RewardConfig
from rlft.types import Sample, Task, Trajectory

PROMPT = {"role": "user", "content": "What is 7+5?"}


def _play(text: str, chosen: int = 3, **info: Any) -> Trajectory:
    """A completion after a prompt of two tokens. chosen: how many tokens the policy chose."""
    mask = [False] * 2 + [True] * chosen
    sample = Sample(list(range(len(mask))), mask, [0.0] * len(mask), [0.0] * len(mask), version=0)
    messages = (PROMPT, {"role": "assistant", "content": text})
    return Trajectory(Task("row-7", (PROMPT,), info), messages, [sample])


def _judge(config: dict[str, Any], *group: Trajectory) -> list[float | None]:
    reward = TypeAdapter(RewardConfig).validate_python(config).build()
    return list(asyncio.run(reward(group)))


@pytest.fixture
def play():
    return _play


@pytest.fixture
def judge():
    return _judge
