"""Going on from inside an answer: where blocks end, what is said there, and what every block gains for the verdict."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from rlft.algorithms import credit
from rlft.batch import Batch
from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.single_turn import SingleTurn
from rlft.explore import Continuations, explorable
from rlft.plan import describe
from rlft.player import Player
from rlft.rewards.catalog import RewardConfig
from rlft.rewards.progress import by_block
from rlft.settings import validate
from rlft.source import Rollouts
from rlft.types import Group, RunError, Sampling, Task, Trajectory, exploring

TASK = Task("t", ({"role": "user", "content": "Count to three."},), {"answer": "3"})
FORCE = " so"


@pytest.fixture(scope="module")
def player(tiny_model: Path) -> Player:
    engine = LocalEngine(tiny_model, torch.float32, torch.device("cpu"))
    return Player(engine, Chat(tiny_model), SingleTurn, Sampling(1.0, 12), 100)


def played(player: Player, count: int = 2) -> Group:
    async def play() -> Group:
        return tuple([await player.play(TASK, seed) for seed in range(count)])

    return asyncio.run(play())


def told(player: Player, reward, group: Group) -> Sequence[float | None]:
    async def judge() -> Sequence[float | None]:
        with explorable(player, 5):
            return await reward(group)

    return asyncio.run(judge())


async def odd(group: Group) -> list[float | None]:
    """Depends on what is sampled, about half of all answers."""
    return [float(sum(t.samples[0].tokens) % 2) for t in group]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 40])
def test_blocks_cover_the_answer_without_a_gap(player: Player, blocks: int) -> None:
    for trajectory in played(player):
        start, ends = Continuations(player).ends(trajectory, blocks)
        mask = trajectory.samples[0].mask
        assert start == mask.index(True)
        assert ends[-1] == len(mask)
        assert sorted(set(ends)) == ends
        assert start < ends[0]
        assert len(ends) <= min(blocks, sum(mask))


def test_what_goes_on_begins_as_the_answer_did_and_is_the_same_every_time(player: Player) -> None:
    one, _ = played(player)
    explorer = Continuations(player)
    start, (end, *_) = explorer.ends(one, 3)
    said, again = (asyncio.run(explorer.go_on(one, end, FORCE, 3, 4)) for _ in range(2))
    begun = one.samples[0].tokens[:end] + player.chat.encode(FORCE)
    for trajectory in said:
        (sample,) = trajectory.samples
        assert sample.tokens[: len(begun)] == begun
        assert sum(sample.mask) == trajectory.sampled + end - start
        assert trajectory.sampled <= 4
        assert trajectory.completion == player.chat.decode(sample.tokens[start:])
    assert [t.samples[0].tokens for t in said] == [t.samples[0].tokens for t in again]
    assert len({tuple(t.samples[0].tokens) for t in said}) > 1, "each has a seed of its own"
    assert asyncio.run(explorer.go_on(one, end, FORCE, 3, 0)) == []


def test_the_gains_add_up_to_the_verdict_less_the_chance_before_the_first_block(player: Player) -> None:
    """Worked out from the continuations themselves."""
    group = played(player, 3)
    explorer, sizes = Continuations(player, 5), (3, 4, 5)
    reward = by_block(odd, "p", 0.5, *sizes, FORCE, 2.0)
    verdicts = told(player, reward, group)
    assert list(verdicts) == asyncio.run(odd(group))
    for trajectory, verdict in zip(group, verdicts, strict=True):
        start, ends = explorer.ends(trajectory, 3)
        chances = []
        for end in (start, *ends[:-1]):
            said = asyncio.run(explorer.go_on(trajectory, end, FORCE, 4, 5))
            values = asyncio.run(odd(tuple(said)))
            chances.append(sum(v for v in values if v is not None) / len(values))
        chances.append(verdict)
        for end, before, after in zip(ends, chances, chances[1:], strict=False):
            assert trajectory.samples[0].rewards[end - 1] == pytest.approx(after - before)  # 0.5 * 2.0 = 1
        assert sum(trajectory.samples[0].rewards) == pytest.approx(verdict - chances[0])
        assert trajectory.metrics["reward/p/start"] == chances[0]
        assert trajectory.metrics["reward/p/block_1"] == chances[1] - chances[0]
        assert len(set(chances)) > 1, "otherwise this proves little"
    assert group[0].metrics["reward/p/tokens"] > group[1].metrics["reward/p/tokens"] > 0, "the start is asked for once"


def test_judged_again_it_pays_once_and_where_nothing_can_be_sampled_nothing(player: Player) -> None:
    group = played(player)
    reward = by_block(odd, "p", 1.0, 2, 2, 4, FORCE, 1.0)
    told(player, reward, group)
    once = [list(t.samples[0].rewards) for t in group]
    told(player, reward, group)
    assert [t.samples[0].rewards for t in group] == once
    assert any(any(rewards) for rewards in once)
    assert exploring.get() is None
    asyncio.run(reward(group))
    assert not any(any(t.samples[0].rewards) for t in group)


def test_without_a_verdict_nothing_is_asked_or_paid(player: Player) -> None:
    async def never(group: Group) -> list[float | None]:
        return [None] * len(group)

    group = played(player)
    assert told(player, by_block(never, "p", 1.0, 2, 2, 4, FORCE, 1.0), group) == [None, None]
    assert "reward/p/tokens" not in group[0].metrics


def test_a_run_pays_it_and_evaluation_does_not(player: Player) -> None:
    config = TypeAdapter(RewardConfig).validate_python({"type": "progress", "of": {"type": "number"}, "blocks": 2})
    source = Rollouts([TASK], player, config.build(), 1, 2, seed=0)
    ((one, two),) = asyncio.run(source.next())
    assert all("reward/progress/tokens" in t.metrics and "reward/progress/of" in t.metrics for t in (one, two))
    assert config.components() == ["progress", "progress/of"]
    for trajectory in (one, two):
        assert trajectory.total == pytest.approx(trajectory.metrics["reward/progress"]), "payments move credit alone"
    assert exploring.get() is None


@pytest.mark.slow
def test_a_reward_that_is_cancelled_or_fails_leaves_nothing_running(player: Player) -> None:
    calls = 0

    async def broken(group: Group) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RunError("the judge is gone")
        if calls > 1:
            await asyncio.sleep(30)
        return [1.0] * len(group)

    async def judge() -> int:
        with explorable(player, 5), pytest.raises(RunError, match="the judge is gone"):
            await by_block(broken, "p", 1.0, 3, 1, 2, FORCE, 1.0)(group)
        return len(asyncio.all_tasks())

    group = played(player)
    assert asyncio.run(judge()) == 1


def test_a_chance_without_a_verdict_is_said_and_pays_nothing(player: Player) -> None:
    async def partly(group: Group) -> list[float | None]:
        """No verdict on what goes on, which says so."""
        return [None if t.completion.count(FORCE) else 1.0 for t in group]

    group = played(player, 1)
    assert told(player, by_block(partly, "p", 1.0, 2, 2, 4, FORCE, 1.0), group) == [1.0]
    assert group[0].metrics["reward/p/unknown"] == 1.0
    assert not any(group[0].samples[0].rewards)


def test_what_is_paid_on_the_way_is_not_cut_in_blocks_again() -> None:
    with pytest.raises(ValidationError, match="paid on the way already"):
        TypeAdapter(RewardConfig).validate_python(
            {"type": "progress", "of": {"type": "per_turn", "of": {"type": "number"}}}
        )


def test_what_is_still_to_come_is_added_to_an_advantage() -> None:
    def one(score: float, paid: Sequence[float]) -> Trajectory:
        from rlft.types import Sample

        sample = Sample([1, 2, 3, 4], [False, True, True, True], [0.0] * 4, [0.0, *paid], 0)
        return Trajectory(TASK, (), [sample], score=score)

    batch = Batch.of([(one(1.0, (0.25, 0.0, 0.5)), one(0.0, (0.0, -0.5, 0.0)))])
    plain = credit.centred(batch).advantages[:, 1:]
    found = credit.to_go(batch, credit.centred, 2.0).advantages
    assert torch.allclose(found[:, 1:] - plain, 2 * torch.tensor([[0.75, 0.5, 0.5], [-0.5, -0.5, 0.0]]))
    assert found[:, 0].tolist() == [0.0, 0.0]


def test_the_page_shows_a_reward_that_works_and_the_plan_says_what_it_costs(tiny_model: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "rewards-progress.md").read_text()
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    settings = {
        "name": "p",
        "steps": 1,
        "model": {"path": str(tiny_model)},
        "data": {"train": {"type": "generated"}},
        "rollout": {"tasks_per_step": 3, "group_size": 2, "engine": {"type": "local"}},
        **shown,
    }
    lines = describe(validate(settings))
    assert f"at most {3 * 2 * 4 * 2 * 16} further tokens sampled a step to find out (128 beside each answer)" in lines
