"""Where groups come from: every row once an epoch, and the same rows after a resume."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.single_turn import SingleTurn
from rlft.player import Player
from rlft.source import Deck, Recorded, Refilled, Rollouts, Source, Still
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


# --- sampling on ------------------------------------------------------------------------------------------------------


async def _coin(group: Group) -> Sequence[float | None]:
    """Depends on what was sampled: some groups agree, some do not."""
    return [float(sum(t.samples[0].tokens) % 2) for t in group]


def _differing(groups: Sequence[Group]) -> list[Group]:
    return [g for g in groups if len({t.score for t in g}) > 1]


class _Listed(Still):
    """A source that gives what it is told, `step` groups at a time."""

    online = True

    def __init__(self, scores: Sequence[Sequence[float]], step: int) -> None:
        self._scores = scores
        self._step = step
        self.at = 0
        self.metrics: dict[str, float] = {}
        self.selected: list[Group] | None = None

    async def next(self) -> list[Group]:
        here = range(self.at, self.at + self._step)
        self.at += self._step
        self.metrics = {"time/generate": 0.5, "tokens/generated": 2.0 * self._step}
        return [
            tuple(Trajectory(Task(f"t{i}", ()), (), [], score=s) for s in self._scores[i % len(self._scores)])
            for i in here
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["position"]


GOOD, BAD = (0.0, 1.0), (1.0, 1.0)


def _refilled(player: Player, seed: int) -> Refilled:
    return Refilled(_rollouts(player, seed, _coin), _differing, n=3, rounds=4)


def test_refilled_samples_on_until_a_step_is_full() -> None:
    source = Refilled(_Listed([BAD, BAD, GOOD], 3), _differing, n=2, rounds=10)
    (groups,) = _next(source, 1)
    assert source.selected is not None
    assert [g[0].task.id for g in source.selected] == ["t2", "t5"]
    assert sorted(g[0].task.id for g in groups) == [f"t{i}" for i in range(6)], "what was refused is on record"
    assert source.metrics["rollout/refills"] == 1
    assert source.metrics["rollout/kept"] == pytest.approx(1 / 3)
    assert source.metrics["time/generate"] == 1.0, "of both rounds"
    assert source.metrics["tokens/generated"] == 12.0


def test_a_step_that_is_full_at_once_is_not_sampled_again() -> None:
    inner = _Listed([GOOD], 3)
    source = Refilled(inner, _differing, n=3, rounds=10)
    _next(source, 2)
    assert inner.at == 6
    assert source.metrics["rollout/refills"] == 0


def test_what_is_kept_beyond_a_step_waits_for_the_next() -> None:
    """Each kept group is trained on exactly once, in the order in which it was drawn."""
    source = Refilled(_Listed([GOOD, BAD, GOOD, GOOD, BAD], 4), _differing, n=3, rounds=10)
    trained, seen = [], []
    for _ in range(6):
        (groups,) = _next(source, 1)
        assert source.selected is not None
        trained += [g[0].task.id for g in source.selected]
        seen += [g[0].task.id for g in groups]
    good = [f"t{i}" for i in range(100) if i % 5 in (0, 2, 3)]
    assert trained == good[: len(trained)]
    assert len(trained) == 18
    assert len(seen) == len(set(seen)), "nothing is on record twice"


def test_trap_34_exhaustion_keeps_the_accepted_groups() -> None:
    source = Refilled(_Listed([BAD, BAD, GOOD], 3), _differing, n=5, rounds=2)
    (groups,) = _next(source, 1)
    assert source.selected is not None
    assert [g[0].task.id for g in source.selected] == ["t2", "t5"]
    assert len(groups) == 6
    never = Refilled(_Listed([BAD], 3), _differing, n=5, rounds=2)
    (groups,) = _next(never, 1)
    assert never.selected == []
    assert len(groups) == 6, "the step is still a step"
    assert never.metrics["rollout/kept"] == 0.0


def test_what_a_group_is_cut_to_is_trained_on_and_the_whole_group_recorded() -> None:
    def first_of(groups: Sequence[Group]) -> list[Group]:
        return [g[:1] for g in groups if g[0].score]

    source = Refilled(_Listed([(1.0, 0.5), (0.0, 1.0)], 2), first_of, n=1, rounds=3)
    (groups,) = _next(source, 1)
    assert source.selected == [groups[0][:1]]
    assert [len(g) for g in groups] == [2, 2]


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_trap_37_a_resumed_refilled_source_goes_on_where_it_was(player: Player, done: int) -> None:
    """Through JSON, as a checkpoint has it; waiting groups come back token by token."""

    def draw(source: Refilled, steps: int) -> list[tuple]:
        seen = []
        for _ in range(steps):
            _next(source, 1)
            assert source.selected is not None
            rows = [(t.task.id, t.task.messages, t.messages, t.score, t.finish) for g in source.selected for t in g]
            samples = [repr(vars(s)) for g in source.selected for t in g for s in t.samples]
            seen.append((rows, samples, source.metrics["rollout/kept"], source.metrics["rollout/waiting"]))
        return seen

    whole = draw(_refilled(player, 5), 5)
    first = _refilled(player, 5)
    draw(first, done)
    resumed = _refilled(player, 5)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert draw(resumed, 5 - done) == whole[done:]
    assert any(waiting for *_, waiting in whole), "otherwise this proves little"


def test_a_refilled_step_that_failed_is_drawn_again_from_its_first_round() -> None:
    inner = _Listed([BAD, BAD, GOOD], 3)
    source = Refilled(inner, _differing, n=2, rounds=10)
    draw, calls = inner.next, 0

    async def brittle() -> list[Group]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("the judge is away")
        return await draw()

    inner.next = brittle  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the judge is away"):
        _next(source, 1)
    assert inner.at == 0
    _next(source, 1)
    assert source.selected is not None
    assert [g[0].task.id for g in source.selected] == ["t2", "t5"]


def test_a_checkpoint_without_waiting_groups_is_read() -> None:
    source = Refilled(_Listed([GOOD], 3), _differing, n=3, rounds=1)
    source.load_state_dict({"position": 6})
    _next(source, 1)
    assert source.selected is not None
    assert source.selected[0][0].task.id == "t6"


def test_a_plain_source_has_selected_nothing(player: Player) -> None:
    assert _rollouts(player, 0).selected is None
    assert _recorded(player, 0).selected is None


def test_what_waits_keeps_what_a_filter_or_reward_may_read() -> None:
    info = {"answer": "4", "level": 2, "tags": ["a"], "none": None, "image": b"\x00", "nan": float("nan")}
    one = Trajectory(
        Task("t", (), info), (), [], score=1.0, targets=(0.5, 1.0), user=2, paid={"turns": [(0, 1, 0.5)]}, sampled=9
    )
    source = Refilled(_Listed([GOOD], 3), _differing, n=3, rounds=1)
    source._waiting = [(one,)]
    state = json.loads(json.dumps(source.state_dict()))
    source.load_state_dict(state)
    ((read,),) = source._waiting
    assert read.task.info == {"answer": "4", "level": 2, "tags": ["a"], "none": None}
    assert replace(read, task=one.task) == one
