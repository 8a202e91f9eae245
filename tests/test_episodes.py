"""Limits and failures of single episodes: what ends one, what is kept of it, and that no other is touched."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.envs.placed import Threaded
from rlft.episode import Episode
from rlft.player import Limits, Player
from rlft.rollout import rollout
from rlft.source import read, written
from rlft.threads import Threads
from rlft.types import WORLD, Group, InputError, Message, Sampling, Task, Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = Task("task-1", ({"role": "user", "content": "What is 12 + 34?"},))
FREE = Limits()
MORE: Message = {"role": "user", "content": "And one more?"}


@dataclass
class Endless:
    """Asks on and on, pays 0.5 an answer, and does at its `at`-th step what it is told to."""

    task: Task
    at: int = 0
    does: Callable[[], Any] = lambda: None
    seen: list[Action] = field(default_factory=list)
    closed: int = 0

    async def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    async def step(self, action: Action) -> Turn:
        self.seen.append(action)
        told = self.does() if len(self.seen) == self.at else None
        told = await told if asyncio.iscoroutine(told) else told
        return told or Turn((MORE,), 0.5, done=False, metrics={"asked": len(self.seen)})

    async def close(self) -> None:
        self.closed += 1


def player(engine: LocalEngine, chat: Chat, env: Any, limits: Limits = FREE, context: int = 900) -> Player:
    return Player(
        engine, chat, lambda task: env, Sampling(max_tokens=200, stop=("e", "a", "s")), context, limits=limits
    )


def play(engine: LocalEngine, chat: Chat, env: Any, **limits: Any) -> Trajectory:
    return asyncio.run(player(engine, chat, env, Limits(**limits)).play(TASK, 3))


def test_turns_are_limited_and_the_last_answer_was_heard(engine: LocalEngine, chat: Chat) -> None:
    env = Endless(TASK)
    trajectory = play(engine, chat, env, turns=3)
    assert (trajectory.cut, trajectory.finish, len(env.seen), env.closed) == ("turns", "length", 3, 1)
    assert trajectory.metrics == {"env/asked": 3.0}
    (sample,) = trajectory.samples
    assert sum(sample.rewards) == 1.5
    assert sample.mask[-1], "nothing is asked that nobody answers"


def test_tokens_are_limited_over_all_turns(engine: LocalEngine, chat: Chat) -> None:
    """The answer that reaches the limit is cut there; one that ends before it leaves the next what is left."""
    free = play(engine, chat, Endless(TASK), turns=6)
    first, second = (said.end for said in free.said[:2])
    lengths = [sum(free.samples[0].mask[: end + 1]) for end in (first, second)]
    for most in (lengths[1] - 1, lengths[1], lengths[1] + 1):
        env = Endless(TASK)
        trajectory = play(engine, chat, env, tokens=most)
        assert (trajectory.cut, trajectory.length) == ("tokens", most)
        assert env.seen[-1].finish == ("stop" if most == lengths[1] else "length")


def test_time_is_looked_at_before_each_turn(engine: LocalEngine, chat: Chat) -> None:
    env = Endless(TASK, 2, lambda: asyncio.sleep(0.3))
    trajectory = play(engine, chat, env, seconds=0.29)
    assert trajectory.cut == "seconds"
    assert 1 <= len(env.seen) <= 2


def test_an_end_is_told_apart_from_a_cut(engine: LocalEngine, chat: Chat) -> None:
    ended = play(engine, chat, Endless(TASK, 2, lambda: Turn(metrics={"success": 1})), turns=2)
    assert (ended.cut, ended.finish, ended.metrics["env/success"]) == ("", "stop", 1.0)
    short = asyncio.run(player(engine, chat, Endless(TASK), context=90).play(TASK, 3))
    assert short.cut == "context"
    whole = replace(player(engine, chat, Endless(TASK)), sampling=Sampling(max_tokens=2))
    assert asyncio.run(whole.play(TASK, 3)).cut == "answer"


def _raise() -> None:
    raise OSError("the world broke")


FAULTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "raises": (_raise, "raised", "OSError: the world broke"),
    "hangs": (lambda: asyncio.sleep(60), "timeout", "TimeoutError: it took longer than 0.3 s"),
    "replies nothing": (lambda: "well", "raised", "TypeError: step returned 'well', which is no Turn"),
    "pays nan": (lambda: Turn(reward=float("nan")), "raised", "whose reward is nan, not a finite number"),
    "pays too much": (lambda: Turn(reward=10**400), "raised", "not a finite number"),
    "reports text": (lambda: odd(metrics={"a": "b"}), "raised", "whose metrics is {'a': 'b'}, not finite numbers"),
    "reports none": (lambda: odd(metrics=None), "raised", "not finite numbers by name"),
    "forgot a comma": (
        lambda: odd(messages=({"role": "user", "content": "Well?"}), done=False),
        "raised",
        "not messages",
    ),
    "says text": (lambda: odd(messages="Well?", done=False), "raised", "not messages"),
    "says nothing": (lambda: odd(messages=({"role": "user", "content": None},), done=False), "raised", "not messages"),
    "leaves nothing": (lambda: Turn(rewrite=True, done=False), "raised", "not messages"),
    "restates text": (lambda: odd(said="Well.", done=False), "raised", "not a message"),
    "exits": (sys.exit, "raised", "SystemExit"),
    "is cancelled inside": (lambda: cancelled(), "raised", "cancelled from inside"),
}


def odd(**changes: Any) -> Turn:
    """A turn with what its types forbid."""
    return Turn(**changes)


async def cancelled() -> None:
    other = asyncio.ensure_future(asyncio.sleep(9))
    other.cancel()
    await other


@pytest.mark.parametrize("fault", FAULTS)
def test_a_world_that_fails_ends_its_episode_and_no_other(fault: str, engine: LocalEngine, chat: Chat) -> None:
    """The third of four episodes fails in its second step; the others are what they are without it."""
    does, kind, said = FAULTS[fault]

    def played(fails: bool) -> tuple[Group, list[Endless]]:
        worlds = [Endless(TASK, at=2 if fails and i == 2 else 0, does=does) for i in range(4)]
        left = iter(worlds)
        one = replace(player(engine, chat, None, Limits(turns=3, call=0.3)), env=lambda task: next(left))
        judged: list[Group] = []

        async def reward(group: Group) -> list[float]:
            judged.append(group)
            return [1.0] * len(group)

        groups, _ = asyncio.run(rollout(one, reward, [TASK], 4, 5))
        assert [len(group) for group in judged] == [3 if fails else 4], "what failed is shown to no reward"
        return groups[0], worlds

    group, worlds = played(True)
    undisturbed, _ = played(False)
    assert [world.closed for world in worlds] == [1] * 4
    failed = group[2]
    assert (failed.score, failed.total, failed.cut, failed.failed) == (None, None, "failed", True)
    (failure,) = failed.failures
    assert (failure.reward, failure.kind) == (WORLD, kind)
    assert said in failure.said
    assert len(failed.said) == 2, "what was said until then is kept"
    assert failed.samples[0].tokens == undisturbed[2].samples[0].tokens[: len(failed.samples[0].tokens)]
    for i in (0, 1, 3):
        assert [sample.tokens for sample in group[i].samples] == [s.tokens for s in undisturbed[i].samples]
        assert group[i].score == 1.0
    assert vars(read(written(failed)).failures[0]) == vars(failure)
    assert read(written(failed)).cut == "failed"


class Unborn:
    def __init__(self, task: Task) -> None:
        raise OSError("no world today")


class Silent(Endless):
    async def reset(self) -> tuple[Message, ...]:
        return ()


class Forgetful(Endless):
    async def reset(self) -> Any:
        pass


class Unclosed(Endless):
    async def close(self) -> None:
        raise OSError("it does not close")


def test_a_world_that_never_opens_leaves_the_prompt(engine: LocalEngine, chat: Chat) -> None:
    for make, said in ((Unborn, "no world today"), (Silent, "which are no messages"), (Forgetful, "no messages")):
        one = replace(player(engine, chat, None), env=make)
        trajectory = asyncio.run(one.play(TASK, 0))
        assert said in trajectory.failures[0].said
        assert trajectory.samples[0].tokens == chat.prompt(TASK.messages)
        assert not any(trajectory.samples[0].mask)
        assert trajectory.score is None


def test_a_world_that_does_not_close_is_counted(engine: LocalEngine, chat: Chat) -> None:
    trajectory = play(engine, chat, Unclosed(TASK), turns=2)
    assert (trajectory.metrics["env/unclosed"], trajectory.failures) == (1.0, [])


def test_what_means_the_run_ends_it(engine: LocalEngine, chat: Chat) -> None:
    def refuses() -> None:
        raise InputError("env.options: such a world there is not")

    env = Endless(TASK, 1, refuses)
    with pytest.raises(InputError, match="such a world"):
        play(engine, chat, env)
    assert env.closed == 1


def test_a_history_that_the_template_changes_is_split_if_asked(
    engine: LocalEngine, tiny_model: Path, tmp_path: Path
) -> None:
    """Every turn is a sample of its own, whose prompt is the history as the template then writes it."""
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    chat = Chat(tiny_model, str(file))
    with pytest.raises(InputError, match=r"rollout\.episode\.history=split"):
        play(engine, chat, Endless(TASK), turns=3)
    trajectory = play(engine, chat, Endless(TASK), turns=3, split=True)
    assert [said.sample for said in trajectory.said] == [0, 1, 2]
    for said, sample in zip(trajectory.said, trajectory.samples, strict=True):
        prompt = chat.prompt(said.messages[:-1])
        assert sample.tokens[: len(prompt)] == prompt
        assert all(sample.mask[len(prompt) :])
        assert sample.rewards[-1] == 0.5


def test_an_episode_counts_its_time() -> None:
    episode = Episode(TASK)
    time.sleep(0.01)
    assert 0.01 <= episode.seconds < 60


def test_a_cancelled_play_ends_and_closes_its_world(engine: LocalEngine, chat: Chat) -> None:
    """Even where the cancellation comes as a step returns."""

    async def cancels() -> None:
        playing = asyncio.ensure_future(player(engine, chat, env, Limits(call=5)).play(TASK, 3))
        env.does = lambda: playing.cancel() and None
        with pytest.raises(asyncio.CancelledError):
            await playing

    env = Endless(TASK, at=1)
    asyncio.run(cancels())
    assert (len(env.seen), env.closed) == (1, 1)


def test_a_wait_for_a_thread_is_no_time_of_the_world(engine: LocalEngine, chat: Chat) -> None:
    """Eight slow worlds on two threads: each call takes 0.1 s, and the last waits for 0.4 s."""

    class Slow:
        def __init__(self, task: Task) -> None:
            self.task = task

        def reset(self) -> tuple[Message, ...]:
            return self.task.messages

        def step(self, action: Action) -> Turn:
            time.sleep(0.1)
            return Turn()

        def close(self) -> None:
            pass

    def played(seconds: float) -> list[Trajectory]:
        make = partial(Threaded, Slow, Threads(2))
        one = replace(player(engine, chat, None, Limits(call=seconds)), env=make, sampling=Sampling(max_tokens=2))

        async def all_of_them() -> list[Trajectory]:
            return await asyncio.gather(*(one.play(TASK, seed) for seed in range(8)))

        return asyncio.run(all_of_them())

    assert not any(t.failures for t in played(0.35))
    assert all("longer than 0.05 s" in t.failures[0].said for t in played(0.05))
