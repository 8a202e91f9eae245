"""Where groups come from: every row once an epoch, and the same rows after a resume."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.single_turn import SingleTurn
from rlft.rollout import Player
from rlft.source import Deck, Recorded, Rollouts, Source
from rlft.types import Group, Reward, Sampling, Task, Trajectory

SIZE = 7


async def _zero(group: Group) -> Sequence[float | None]:
    return [0.0] * len(group)


@pytest.fixture(scope="module")
def player(tiny_model: Path) -> Player:
    engine = LocalEngine(tiny_model, torch.float32, torch.device("cpu"))
    return Player(engine, Chat(tiny_model), SingleTurn, Sampling(1.0, 3), 100)


def _tasks() -> list[Task]:
    return [Task(f"row-{i}", ({"role": "user", "content": f"What is {i}?"},)) for i in range(SIZE)]


def _rollouts(player: Player, seed: int, reward: Reward = _zero) -> Rollouts:
    return Rollouts(_tasks(), player, reward, tasks_per_step=3, group_size=2, seed=seed)


def _recorded(player: Player, seed: int) -> Recorded:
    return Recorded([(Trajectory(task, task.messages, []),) for task in _tasks()], groups_per_step=3, seed=seed)


Make = Callable[[Player, int], Source]
both = pytest.mark.parametrize("make", [_rollouts, _recorded])


def _next(source: Source, steps: int) -> list[list[Group]]:
    async def draw() -> list[list[Group]]:
        return [await source.next() for _ in range(steps)]

    return asyncio.run(draw())


def _rows(steps: list[list[Group]]) -> list[str]:
    return [group[0].task.id for groups in steps for group in groups]


def _tokens(steps: list[list[Group]]) -> list[list[int]]:
    return [s.tokens for groups in steps for group in groups for t in group for s in t.samples]


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_deck_deals_every_row_once_an_epoch(size: int) -> None:
    deck = Deck(size, seed=3)
    epochs = [[deck.at(e * size + i) for i in range(size)] for e in range(4)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 4:
        assert len({tuple(epoch) for epoch in epochs}) == 4, "every epoch has an order of its own"
        assert epochs[0] != [Deck(size, seed=4).at(i) for i in range(size)]


def test_a_deck_depends_on_the_position_alone() -> None:
    there = [Deck(5, 0).at(i) for i in range(23)]
    deck = Deck(5, 0)
    assert [deck.at(i) for i in reversed(range(23))] == there[::-1]


@both
def test_every_row_comes_once_an_epoch(make: Make, player: Player) -> None:
    """Steps of three over seven rows: epochs and steps do not line up, and no row is dropped for it (trap 34)."""
    rows = _rows(_next(make(player, 0), 14))
    assert len(rows) == 42
    for epoch in range(6):
        assert sorted(rows[epoch * SIZE : (epoch + 1) * SIZE]) == [f"row-{i}" for i in range(SIZE)]


@both
@pytest.mark.parametrize("done", [0, 1, 4])
def test_trap_37_a_resumed_source_goes_on_where_it_was(make: Make, player: Player, done: int) -> None:
    """Rows, and for rollouts the very tokens."""
    whole = _next(make(player, 5), 7)
    first = make(player, 5)
    _next(first, done)
    resumed = make(player, 5)
    resumed.load_state_dict(first.state_dict())
    rest = _next(resumed, 7 - done)
    assert _rows(rest) == _rows(whole[done:])
    assert _tokens(rest) == _tokens(whole[done:])


@both
def test_another_seed_gives_another_order(make: Make, player: Player) -> None:
    assert _rows(_next(make(player, 0), 2)) != _rows(_next(make(player, 1), 2))


def test_a_step_that_failed_is_drawn_again(player: Player) -> None:
    """Its rows are not lost; the state moves on only once a step is complete."""
    broken = True

    async def reward(group: Group) -> Sequence[float | None]:
        if broken:
            raise ValueError("the judge is away")
        return [1.0] * len(group)

    source = _rollouts(player, 5, reward)
    with pytest.raises(ValueError, match="the judge is away"):
        _next(source, 1)
    broken = False
    assert _tokens(_next(source, 2)) == _tokens(_next(_rollouts(player, 5), 2))


def test_rollouts_draw_new_samples_every_epoch(player: Player) -> None:
    """The same row later is played with other seeds."""
    steps = _next(_rollouts(player, 0), 7)
    first, later = (
        {g[0].task.id: [t.samples[0].tokens for t in g] for g in groups}
        for groups in ([g for s in steps for g in s][:SIZE], [g for s in steps for g in s][SIZE : 2 * SIZE])
    )
    assert first.keys() == later.keys()
    assert sum(first[row] == later[row] for row in first) < 2


def test_rollouts_tell_what_they_did(player: Player) -> None:
    source = _rollouts(player, 0)
    (groups,) = _next(source, 1)
    assert source.online
    assert source.metrics["tokens/generated"] == sum(t.length for g in groups for t in g)
    assert source.metrics["time/generate"] > 0
    assert [len(g) for g in groups] == [2, 2, 2]


def test_recorded_groups_are_offline(player: Player) -> None:
    assert not _recorded(player, 0).online
