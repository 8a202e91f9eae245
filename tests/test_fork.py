"""Episodes that branch off from others: the same up to the fork, token by token, and at the place least expected."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlft.algorithms import catalog
from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.fork import branch
from rlft.player import Limits, Player
from rlft.rollout import rollout
from rlft.types import Draw, Group, Message, Said, Sample, Sampling, Task, Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = Task("task-1", ({"role": "user", "content": "What is 12 + 34?"},))
MADE = itertools.count()


@dataclass
class Echo:
    """Repeats the first letters of every answer, three times; a moody one says something else each time it is made."""

    task: Task
    moody: bool = False
    seen: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mood = str(next(MADE)) if self.moody else ""

    async def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    async def step(self, action: Action) -> Turn:
        self.seen.append(action)
        said = f"{self.mood}You said {action.text[:4]!r}."
        return Turn(({"role": "user", "content": said},), len(self.seen) / 8, done=len(self.seen) == 4)

    async def close(self) -> None:
        pass


def played(engine: LocalEngine, chat: Chat, draw: Draw, moody: bool = False) -> Group:
    sampling = Sampling(max_tokens=200, stop=("e", "a", "s"))
    player = Player(engine, chat, lambda task: Echo(task, moody), sampling, 3000, limits=Limits())

    async def reward(group: Group) -> list[float]:
        return [0.0] * len(group)

    return asyncio.run(rollout(player, reward, [TASK], 2, 3, [draw]))[0][0]


@pytest.mark.parametrize("where", ["turn", "token"])
def test_a_branch_is_its_episode_up_to_the_fork(where: Any, engine: LocalEngine, chat: Chat) -> None:
    """Tokens, masks, log-probs and pay; what comes then is its own, and the environment answered it."""
    own, others = (group := played(engine, chat, Draw(count=4, branch=where)))[:2], group[2:]
    assert [t.drawn for t in group] == [0, 0, 1, 1, 1, 1]
    for i, other in enumerate(others):
        earlier = own[i % 2]
        fork = branch(earlier, where, i // 2)
        assert fork is not None
        assert fork.begins(other)
        a, b = earlier.samples[0], other.samples[0]
        for name in ("tokens", "mask"):
            assert getattr(a, name)[: fork.end] == getattr(b, name)[: fork.end]
        both = [j for j in range(fork.end) if a.mask[j]]
        assert [a.logprobs[j] for j in both] == [b.logprobs[j] for j in both]
        assert b.mask[fork.end], "the policy goes on from there"
        assert a.tokens != b.tokens
        assert len(other.said) == 4
        for one, (said, after) in enumerate(itertools.pairwise(other.said), 1):
            assert after.messages[-2]["content"] == f"You said {said.text[:4]!r}.", one
        assert sum(b.rewards) == pytest.approx(1.25)


def test_a_world_that_replies_otherwise_gives_no_branch(engine: LocalEngine, chat: Chat) -> None:
    assert len(played(engine, chat, Draw(count=4, branch="turn"), moody=True)) == 2


class Broken(Echo):
    """Fails whenever it is made again, once two of it were."""

    async def step(self, action: Action) -> Turn:
        if int(self.mood) >= 2:
            raise OSError("it broke")
        return await super().step(action)


def test_a_branch_whose_world_fails_is_kept_as_a_failure(engine: LocalEngine, chat: Chat) -> None:
    made = itertools.count()
    sampling = Sampling(max_tokens=200, stop=("e", "a", "s"))

    def make(task: Task) -> Broken:
        world = Broken(task)
        world.mood = str(next(made))
        return world

    async def reward(group: Group) -> list[float]:
        return [0.0] * len(group)

    player = Player(engine, chat, make, sampling, 3000, limits=Limits())
    group = asyncio.run(rollout(player, reward, [TASK], 2, 3, [Draw(count=2, branch="turn")]))[0][0]
    assert [t.failed for t in group] == [False, False, True, True]


def test_the_place_is_the_least_expected_one() -> None:
    """By hand: three turns of two tokens each."""
    mask = [False, True, True] * 3
    logprobs = [float("nan"), -5.0, -0.1, float("nan"), -1.0, -2.0, float("nan"), -0.5, -4.0]
    sample = Sample(list(range(9)), mask, logprobs, [0.0] * 9, 0)
    said = tuple(Said(({"role": "assistant", "content": ""},) * n, 0, 3 * n - 1) for n in (1, 2, 3))
    one = Trajectory(TASK, (), [sample], said=said)
    turns = [branch(one, "turn", rank) for rank in range(3)]
    assert [fork and fork.end for fork in turns] == [7, 4, None], "means 2.25 and 1.5; the first turn is no branch"
    assert turns[0] is not None
    assert [c.tokens for c in turns[0].rehearsed.turns] == [[1, 2], [4, 5]]
    assert turns[0].rehearsed.begun is None
    tokens = [branch(one, "token", rank) for rank in range(6)]
    assert [fork and fork.end for fork in tokens] == [8, 5, 4, 7, 2, None], "not the first token of the episode"
    assert tokens[0] is not None
    begun = tokens[0].rehearsed.begun
    assert begun is not None
    assert (begun.tokens, begun.logprobs) == ([7], [-0.5])
    shorter = replace(one, samples=[Sample([0, 1, 2, 3, 9], [False, True, True, False, True], [0.0] * 5, [0.0] * 5, 0)])
    assert not turns[0].begins(shorter)


def test_step_dpo_learns_from_the_fork_on(engine: LocalEngine, chat: Chat) -> None:
    knobs = {"type": "step_dpo", "branches": 2}
    algorithm = TypeAdapter(catalog.AlgorithmConfig).validate_python(knobs).build()
    group = played(engine, chat, algorithm.draws[0])
    for i, trajectory in enumerate(group):
        trajectory.score = float(i)
    (chosen, rejected), *_ = algorithm.select([group])
    fork = branch(group[1], "turn", 0)
    assert fork is not None
    assert sum(chosen.samples[0].mask[: fork.end]) == sum(rejected.samples[0].mask[: fork.end]) == 0
    assert chosen.samples[0].tokens[: fork.end] == rejected.samples[0].tokens[: fork.end]
