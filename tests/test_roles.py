"""Roles that are paid each for itself: what belongs to whom, what is compared with what, and what is refused."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from rlft.algorithms.credit import group_relative
from rlft.batch import Batch
from rlft.build import assemble
from rlft.chat import Chat
from rlft.config import Faults as Bounds
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.envs.wire import read_turn
from rlft.envs.wire import turn as written
from rlft.faults import Faults
from rlft.material import material
from rlft.player import Limits, Player
from rlft.rewards.catalog import RewardConfig
from rlft.roles import by_role, restricted
from rlft.rollout import rollout
from rlft.settings import validate
from rlft.sync import Sync
from rlft.types import Group, InputError, Message, RunError, Sampling, Task, Trajectory, Turn
from tests.test_rollout import Recording

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = {"train": {"type": "seeds", "count": 8}}
BOTH = {**ALONE, "eval": {"type": "seeds", "count": 4}}
TASK = Task("duel", ({"role": "user", "content": "Begin."},))


class Duel:
    """Two roles in turn, two answers each; role 1 is paid for each of its own on the way, and one wins 3 at the end."""

    def __init__(self, task: Task, winner: int = 1, rewrite: bool = True, breaks: bool = False) -> None:
        self.said = 0
        self.winner, self.rewrite, self.breaks = winner, rewrite, breaks

    async def reset(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": "You are 0."},)

    async def step(self, action: Action) -> Turn:
        self.said += 1
        if self.breaks and self.said == 2:
            raise OSError("the world broke")
        if self.said == 4:
            own = {"0/won": float(self.winner == 0), "1/won": float(self.winner == 1), "moves": 4.0}
            return Turn(pays={self.winner: 3.0, 1 - self.winner: -3.0, 7: 9.0}, metrics=own)
        role = self.said % 2
        told: Message = {"role": "user", "content": f"You are {role}, move {self.said}."}
        return Turn((told,), reward=0.25 * (1 - role), done=False, rewrite=self.rewrite, role=role)

    async def close(self) -> None: ...


async def unscored(group: Group) -> list[float]:
    return [0.0 for _ in group]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_model: Path, chat: Chat) -> Recording:
    return Recording(LocalEngine(tiny_model, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer))


def player(engine: Any, chat: Chat, limits: Limits, **knobs: Any) -> Player:
    sampling = Sampling(max_tokens=6, seed=None)
    return Player(engine, chat, lambda task: Duel(task, **knobs), sampling, 400, limits=limits, rivals=True)


def played(engine: Recording, chat: Chat, turns: int = 4, count: int = 3, **knobs: Any) -> list[Group]:
    groups, _ = asyncio.run(rollout(player(engine, chat, Limits(turns=turns), **knobs), unscored, [TASK], count, 5))
    return groups


def test_each_role_is_a_trajectory_with_its_own_pay(engine: Recording, chat: Chat) -> None:
    """Tokens are the engine's, each in the part of who said them; role 7, that never spoke, is paid nothing."""
    engine.completions.clear()
    groups = played(engine, chat)
    assert [len(group) for group in groups] == [3, 3]
    for role, group in enumerate(groups):
        for one in group:
            assert [sample.role for sample in one.samples] == [role, role]
            assert [turn.sample for turn in one.said] == [0, 1]
            assert [turn.messages[0]["content"] for turn in one.said] == [
                "You are 0." if (role, i) == (0, 0) else f"You are {role}, move {2 * i + role}." for i in range(2)
            ]
            # step() pays role 1's first answer 0.25 where role 0 is next: as `reward`, for the last move
            assert one.total == pytest.approx({0: -3.0, 1: 3.25}[role])
            assert one.metrics == {"env/won": float(role), "env/moves": 4.0}
            assert one.messages == one.said[-1].messages
    chosen = [[t for t, m in zip(s.tokens, s.mask, strict=True) if m] for g in groups for t_ in g for s in t_.samples]
    assert sorted(chosen) == sorted(c.tokens for c in engine.completions)
    assert sum(t.sampled for group in groups for t in group) == sum(len(c.tokens) for c in engine.completions)


def test_pay_goes_to_the_last_answer_of_a_role_also_inside_a_history(engine: Any, chat: Chat) -> None:
    """Roles that share one history: role 0's last answer is the third of four, not the end of the sample."""
    letters = Sampling(max_tokens=200, stop=tuple("aeiou "))
    shared = Player(engine, chat, lambda task: Duel(task, rewrite=False), letters, 2000)
    played = asyncio.run(shared.play(TASK, 5))
    assert [turn.sample for turn in played.said] == [0, 0, 0, 0]
    assert [played.samples[0].rewards[turn.end] for turn in played.said] == [0.0, 0.25, -3.0, 3.0]


def test_a_role_is_compared_with_itself(engine: Recording, chat: Chat) -> None:
    """Where role 1 wins every game nobody learns; where games differ, the advantages are those of each role alone."""
    same = group_relative(Batch.of(played(engine, chat)))
    assert torch.all(same.advantages[same.mask] == 0)
    first = by_role(asyncio.run(_episodes(engine, chat, winners=(0, 1, 1))))
    for group in first:
        for one in group:
            one.score = 0.0
    batch = group_relative(Batch.of(first))
    assert batch.group.unique().tolist() == [0, 1]
    for role, paid in ((0, [3.0, -3.0, -3.0]), (1, [-2.75, 3.25, 3.25])):
        each = torch.tensor(paid, dtype=torch.float64)
        wanted = (each - each.mean()) / (each.std() + 1e-4)
        for i in range(3):
            rows = (batch.group == role) & (batch.trajectory == 3 * role + i)
            found = batch.advantages[rows][batch.mask[rows]]
            assert torch.allclose(found.double(), wanted[i].expand(len(found)), atol=1e-6)


async def _episodes(engine: Any, chat: Chat, winners: tuple[int, ...]) -> list[Trajectory]:
    limits = Limits(turns=4)
    return [await player(engine, chat, limits, winner=winner).play(TASK, i) for i, winner in enumerate(winners)]


def test_a_failed_episode_stays_whole_and_a_short_one_has_one_role(engine: Recording, chat: Chat) -> None:
    (failed,) = played(engine, chat, count=2, breaks=True)
    assert [one.failed for one in failed] == [True, True]
    (only,) = played(engine, chat, turns=1, count=2)
    assert [(one.cut, one.finish, len(one.samples)) for one in only] == [("turns", "length", 1)] * 2


def test_a_rival_in_the_others_history_is_refused(engine: Any, chat: Chat) -> None:
    letters = Sampling(max_tokens=60, stop=tuple("aeiou "))
    same = Player(engine, chat, lambda task: Duel(task, rewrite=False), letters, 400, rivals=True)
    with pytest.raises(RunError, match=r"role 1 is agent 0's, but the history is a rival's.*rewrite=True"):
        asyncio.run(rollout(same, unscored, [TASK], 1, 5))


def test_pays_travel() -> None:
    own = Turn(pays={0: 1.0, 1: -1.0}, metrics={"0/won": 1.0})
    assert read_turn(written(own)) == own


@pytest.mark.parametrize("pays", [{0: math.nan}, {"0": 1.0}, [1.0], {0: "x"}])
def test_pay_that_is_none_costs_the_episode(pays: Any, engine: Any, chat: Chat) -> None:
    class Odd(Duel):
        async def step(self, action: Action) -> Turn:
            return Turn(pays=pays)

    odd = Player(engine, chat, Odd, Sampling(max_tokens=4), 400, rivals=True)
    (group,), _ = asyncio.run(rollout(odd, unscored, [TASK], 1, 0))
    assert "pays" in group[0].failures[0].said
    assert "finite numbers by role" in group[0].failures[0].said


def config(tiny_model: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "rivals",
        "out": str(tmp_path / "run"),
        "steps": 2,
        "model": {"path": str(tiny_model)},
        "data": {"train": {"type": "seeds", "count": 8}, "eval": {"type": "seeds", "count": 4}},
        "env": {"type": "nim"},
        "eval": {"accuracy": "outcome", "env": {"type": "nim", "opponent": "random"}},
        "reward": {"type": "outcome", "weight": 0},
        "rollout": {"tasks_per_step": 2, "group_size": 4, "engine": {"type": "local"}, "sampling": {"max_tokens": 4}},
        "algorithm": {"type": "grpo"},
        **more,
    }


def test_the_held_out_play_another_environment(tiny_model: Path, tmp_path: Path) -> None:
    parts = assemble(material(validate(config(tiny_model, tmp_path))), None)
    try:
        assert parts.evaluation is not None
        assert not parts.evaluation.player.rivals
        asyncio.run(_served(parts))
        groups = asyncio.run(parts.source.next())
        assert {sample.role for group in groups for t in group for sample in t.samples} <= {0, 1}
        assert all(len({sample.role for t in group for sample in t.samples}) == 1 for group in groups)
        metrics, evaluated = asyncio.run(parts.evaluation(0))
        assert len(evaluated) == 4 == metrics["eval/tasks"]
        assert all("env/success" in t.metrics and "env/0/success" not in t.metrics for (t,) in evaluated)
    finally:
        asyncio.run(parts.close())


async def _served(parts: Any) -> None:
    assert isinstance(parts.sync, Sync)
    await parts.serve(0)


@pytest.mark.parametrize(("more", "message"), [
    ({"algorithm": {"type": "dpo"}}, r"algorithm\.type: dpo compares answers to one prompt"),
    ({"data": BOTH}, r"eval\.env: in nim the policy's roles are rivals"),
    ({"eval": {"env": {"type": "nim", "opponent": "best"}}}, r"eval\.env: there are no held-out tasks"),
    (
        {"data": BOTH, "eval": {"env": {"type": "custom", "path": "nowhere:X"}}},
        r"eval\.env: env\.path: nowhere:X",
    ),
    ({"env": {"type": "custom", "path": "a:b", "paid_apart": True}}, r"env\.paid_apart: there is one role"),
    ({"algorithm": {"type": "step_dpo"}}, r"algorithm\.type: step_dpo"),
    ({"data": {"train": {"type": "seeds"}, "curriculum": {"type": "band"}}}, r"data\.curriculum\.type: band chooses"),
])  # fmt: skip
def test_what_rivals_cannot_learn_by_is_refused(
    more: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        material(validate(config(tiny_model, tmp_path, **{"data": ALONE, "eval": {}, **more})))


def test_a_reward_of_every_turn_pays_each_role_its_own(engine: Recording, chat: Chat) -> None:
    """`per_turn` takes back what it paid before: of each part its own, so that judging twice is judging once."""
    turn = {"type": "per_turn", "of": {"type": "format", "pattern": "(?s).*"}}
    reward = TypeAdapter(RewardConfig).validate_python(turn).build()  # type: ignore[attr-defined]
    for group, total in zip(by_role(asyncio.run(_episodes(engine, chat, winners=(1, 1)))), (-1.0, 5.25), strict=True):
        for _ in range(2):
            for one, verdict in zip(group, asyncio.run(reward(group)), strict=True):
                one.score = verdict
            assert [one.total for one in group] == [pytest.approx(total)] * 2


def test_failures_are_counted_by_episodes_not_by_parts(engine: Recording, chat: Chat) -> None:
    """One failed of three is a third, though there are five trajectories."""
    good, (broken,) = played(engine, chat, count=2), played(engine, chat, count=1, breaks=True)
    Faults(None, Bounds(env=0.34)).sampled([*good, broken])
    with pytest.raises(RunError, match="failed on 1 of 3"):
        Faults(None, Bounds(env=0.3)).sampled([*good, broken])


def test_what_was_paid_goes_with_the_samples_that_stay(engine: Recording, chat: Chat) -> None:
    (episode,) = asyncio.run(_episodes(engine, chat, winners=(1,)))
    episode.paid = {"per_turn": [(0, 5, 0.5), (1, 6, 1.0), (3, 7, 2.0)]}
    assert restricted(episode, lambda sample: sample.role == 1).paid == {"per_turn": [(0, 6, 1.0), (1, 7, 2.0)]}
