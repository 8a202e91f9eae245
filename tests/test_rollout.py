"""Episodes played with a real engine: what is trained on is, token by token, what was sampled."""

from __future__ import annotations

import asyncio
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action, Env
from rlft.envs.single_turn import SingleTurn
from rlft.learner import Learner, Schedule
from rlft.player import Player, derive_seed
from rlft.policy import Policy
from rlft.rollout import rollout
from rlft.sync import Sync
from rlft.types import Completion, Group, InputError, Message, RunError, Sampling, Task, Turn

pytestmark = pytest.mark.usefixtures("one_thread")

OPENING: Message = {"role": "user", "content": "What is 12 + 34?"}
TASK = Task("task-1", (OPENING,))


@dataclass
class Recording:
    """A real engine, and what went in and came out."""

    inner: Engine
    version: int = -1
    prompts: list[list[int]] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    samplings: list[Sampling] = field(default_factory=list)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        self.completions.append(await self.inner.generate(prompt, sampling))
        return self.completions[-1]


@dataclass
class Quiz:
    """Asks `turns` questions, pays 0.5 for every answer, and remembers what was done to it."""

    task: Task
    turns: int = 3
    reply: str = "And one more?"
    fails_at: str = ""
    rewrite: bool = False
    seen: list[Action] = field(default_factory=list)
    closed: int = 0

    async def reset(self) -> tuple[Message, ...]:
        if self.fails_at == "reset":
            raise OSError("no world today")
        return self.task.messages

    async def step(self, action: Action) -> Turn:
        if self.fails_at == "step":
            raise OSError("the world broke")
        self.seen.append(action)
        new: Message = {"role": "user", "content": self.reply}
        return Turn((new,), reward=0.5, done=len(self.seen) == self.turns, rewrite=self.rewrite)

    async def close(self) -> None:
        self.closed += 1


def _player(engine: Engine, chat: Chat, env: Callable[[Task], Env], context: int = 400, tokens: int = 60) -> Player:
    return Player(engine, chat, env, Sampling(temperature=1.0, max_tokens=tokens), context)


def _play(engine: Any, chat: Chat, env: Env, seed: int, **settings: int):
    return asyncio.run(_player(engine, chat, lambda task: env, **settings).play(TASK, seed))


def _seeds(engine: Engine, chat: Chat, wanted: Callable[[Quiz], bool], turns: int = 3) -> tuple[int, Quiz]:
    """A seed with which an episode of `turns` turns goes as wanted."""
    for seed in range(400):
        env = Quiz(TASK, turns)
        _play(engine, chat, env, seed)
        if wanted(env):
            return seed, env
    raise AssertionError("no such episode")


def test_traps_1_and_3_what_is_trained_on_is_what_was_sampled(engine: LocalEngine, chat: Chat) -> None:
    """Ids, mask and log-probs of a play of three turns; nothing that was sampled is ever encoded again."""
    drifted = 0
    for seed in range(30):
        recorded, env = Recording(engine), Quiz(TASK)
        trajectory = _play(recorded, chat, env, seed)
        (sample,) = trajectory.samples
        n = len(recorded.prompts[0])
        assert recorded.prompts[0] == sample.tokens[:n] == chat.prompt((OPENING,))
        assert not any(sample.mask[:n])
        place = n
        for i, completion in enumerate(recorded.completions):
            assert recorded.prompts[i] == sample.tokens[:place], "the engine continued what is trained on"
            end = place + len(completion.tokens)
            assert sample.tokens[place:end] == completion.tokens
            assert sample.logprobs[place:end] == completion.logprobs
            assert all(sample.mask[place:end])
            assert sample.rewards[end - 1] == 0.5
            drifted += chat.encode(chat.decode(completion.tokens)) != [t for t in completion.tokens if t > 2]
            place = len(recorded.prompts[i + 1]) if i + 1 < len(recorded.completions) else end
            assert not any(sample.mask[end:place]), "the environment's tokens"
            assert all(math.isnan(x) for x in sample.logprobs[end:place])
        assert place == len(sample.tokens)
        assert trajectory.length == sum(len(c.tokens) for c in recorded.completions)
        assert sum(sample.rewards) == 0.5 * len(env.seen)
        assert env.closed == 1
    assert drifted > 10, "encoding again would have changed the tokens, so this test means something"


def test_the_text_between_the_turns_is_the_templates(engine: LocalEngine, chat: Chat) -> None:
    seed, env = _seeds(engine, chat, lambda e: [a.finish for a in e.seen] == ["stop"] * 3)
    recorded = Recording(engine)
    trajectory = _play(recorded, chat, Quiz(TASK), seed)
    more: Message = {"role": "user", "content": "And one more?"}

    def conversation(texts: list[str]) -> tuple[Message, ...]:
        one, two, three = ({"role": "assistant", "content": text} for text in texts)
        return (OPENING, one, more, two, more, three)

    assert trajectory.messages == conversation([action.text for action in env.seen])
    assert (trajectory.finish, trajectory.completion) == ("stop", env.seen[2].text)
    raw = [_text(chat, c.tokens[:-1]) for c in recorded.completions]  # this model samples other special tokens too
    assert _text(chat, trajectory.samples[0].tokens) + "\n" == chat.render(conversation(raw), prompt=False)


def _text(chat: Chat, tokens: list[int]) -> str:
    return chat.tokenizer.decode(tokens, skip_special_tokens=False)


def test_trap_4_a_cut_answer_ends_the_episode_as_length(engine: LocalEngine, chat: Chat) -> None:
    """And an answer whose very last allowed token is the end of turn is finished, not cut."""
    cut = _play(engine, chat, env := Quiz(TASK), 0, tokens=2)
    assert (cut.finish, len(env.seen), env.seen[0].finish, cut.length) == ("length", 1, "length", 2)
    seed, env = _seeds(engine, chat, lambda e: e.seen[0].finish == "stop", turns=1)
    whole = _play(engine, chat, Quiz(TASK, 1), seed)
    exact = _play(engine, chat, Quiz(TASK, 1), seed, tokens=whole.length)
    assert exact.finish == "stop"
    assert exact.samples[0].tokens == whole.samples[0].tokens


def test_trap_5_a_reply_that_does_not_fit_is_left_out_whole(engine: LocalEngine, chat: Chat) -> None:
    seed, _ = _seeds(engine, chat, lambda e: e.seen[0].finish == "stop")
    free = _play(engine, chat, Quiz(TASK, 1), seed)
    long = Quiz(TASK, reply="one two three " * 200)
    trajectory = _play(engine, chat, long, seed)
    assert trajectory.finish == "length"
    assert len(long.seen) == 1
    assert trajectory.samples[0].tokens == free.samples[0].tokens
    assert len(trajectory.messages) == 2
    assert trajectory.samples[0].rewards[-1] == 0.5, "the answer itself was paid"


@pytest.mark.parametrize("room", [1, 5, 30])
def test_no_sample_grows_beyond_the_context(room: int, engine: LocalEngine, chat: Chat) -> None:
    context = len(chat.prompt((OPENING,))) + room
    for seed in range(20):
        recorded = Recording(engine)
        trajectory = _play(recorded, chat, Quiz(TASK, 50), seed, context=context)
        assert len(trajectory.samples[0].tokens) <= context
        assert recorded.samplings[0].max_tokens == room
        assert trajectory.finish == "length" or len(trajectory.messages) == 2


def test_a_rewritten_history_begins_a_new_sample(engine: LocalEngine, chat: Chat) -> None:
    """Both samples are trained on; the first is as it was sampled, though nobody shows it any more."""
    seed, _ = _seeds(engine, chat, lambda e: e.seen[0].finish == "stop")
    recorded = Recording(engine)
    trajectory = _play(recorded, chat, Quiz(TASK, 2, reply="Summary: go on.", rewrite=True), seed)
    fresh: Message = {"role": "user", "content": "Summary: go on."}
    assert [s.tokens for s in trajectory.samples] == [
        p + c.tokens for p, c in zip(recorded.prompts, recorded.completions, strict=True)
    ]
    assert recorded.prompts[1] == chat.prompt((fresh,))
    assert trajectory.messages[0] == fresh
    assert [sum(s.rewards) for s in trajectory.samples] == [0.5, 0.5]


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_environment_is_closed_whatever_happens(where: str, engine: LocalEngine, chat: Chat) -> None:
    env = Quiz(TASK, fails_at=where)
    (failure,) = _play(engine, chat, env, 0).failures
    assert failure.said.startswith("OSError: ")
    assert env.closed == 1


def test_a_template_that_rewrites_history_stops_a_second_turn(
    engine: LocalEngine, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    chat = Chat(tiny_model, str(file))
    seed, _ = _seeds(engine, chat, lambda e: e.seen[0].finish == "stop", turns=1)
    env = Quiz(TASK, 2)
    with pytest.raises(InputError, match="rewrites what was said before"):
        _play(engine, chat, env, seed)
    assert env.closed == 1


def test_trap_35_a_token_beyond_the_tokenizer(tiny_model: Path, chat: Chat, tmp_path: Path) -> None:
    """A model whose vocabulary is padded to 512, and whose padding has probability."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(512, mean_resizing=False)
    model.save_pretrained(tmp_path)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    player = _player(LocalEngine(tmp_path, torch.float32, torch.device("cpu")), chat, SingleTurn)

    async def play() -> None:
        for seed in range(50):
            await player.play(TASK, seed)

    with pytest.raises(RunError, match=r"task task-1: the engine sampled token \d+, but the tokenizer ends at 300"):
        asyncio.run(play())


def test_trap_38_every_sample_carries_the_learners_version(tiny_model: Path, chat: Chat) -> None:
    policy = Policy(tiny_model, {"type": "lora", "r": 2, "target_modules": "all-linear"}, device="cpu", dtype="float32")
    learner = Learner(policy, Schedule(lr=1e-3, steps=1))
    engine = LocalEngine(tiny_model, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer)
    sync = Sync(policy, engine, learner, "merged", [chat.prompt((OPENING,))], Sampling())
    tasks = [TASK, Task("task-2", (OPENING,))]

    async def play(version: int) -> list[Group]:
        await sync(policy, version)
        player = _player(engine, chat, SingleTurn, tokens=8)
        return (await rollout(player, _lengths, tasks, 3, seed=version))[0]

    for version in (0, 1, 2):
        groups = asyncio.run(play(version))
        assert {s.version for g in groups for t in g for s in t.samples} == {version}


async def _lengths(group: Group) -> Sequence[float | None]:
    return [float(t.length) for t in group]


def test_a_rollout_is_grouped_scored_and_repeatable(engine: LocalEngine, chat: Chat) -> None:
    tasks = [Task(f"task-{i}", ({"role": "user", "content": f"What is {i} + {i}?"},)) for i in range(3)]
    player = _player(engine, chat, SingleTurn, tokens=20)
    groups, clock = asyncio.run(rollout(player, _lengths, tasks, 4, seed=5))
    assert [[t.task.id for t in g] for g in groups] == [[f"task-{i}"] * 4 for i in range(3)]
    assert all(t.score == t.length for g in groups for t in g)
    assert len({tuple(t.samples[0].tokens) for g in groups for t in g}) > 10, "samples of a group differ"
    assert clock.generate > 0
    again, _ = asyncio.run(rollout(player, _lengths, tasks, 4, seed=5))
    other, _ = asyncio.run(rollout(player, _lengths, tasks, 4, seed=6))

    def tokens(groups: list[Group]) -> list[list[int]]:
        return [t.samples[0].tokens for g in groups for t in g]

    assert tokens(again) == tokens(groups)
    assert sum(a == b for a, b in zip(tokens(other), tokens(groups), strict=True)) < 3


def test_a_task_twice_in_a_step_is_played_twice(engine: LocalEngine, chat: Chat) -> None:
    """A deck may deal the same row again; its samples must be new ones."""
    player = _player(engine, chat, SingleTurn, tokens=20)
    groups, _ = asyncio.run(rollout(player, _lengths, [TASK, TASK], 4, seed=5))
    assert [t.samples[0].tokens for t in groups[0]] != [t.samples[0].tokens for t in groups[1]]


def test_a_reward_that_raises_ends_the_other_episodes(engine: LocalEngine, chat: Chat) -> None:
    """Trap 32: a crash is never a zero. The task that is still played is cancelled, and its world closed."""

    class Waiting(Quiz):
        async def step(self, action: Action) -> Turn:
            await asyncio.sleep(3600)
            raise AssertionError("unreachable")

    worlds = {"task-1": Quiz(TASK, 1), "task-2": Waiting(Task("task-2", (OPENING,)))}

    async def raises(group: Group) -> Sequence[float | None]:
        raise ValueError(f"no idea about {group[0].task.id}")

    player = _player(engine, chat, lambda task: worlds[task.id])

    async def play() -> list[int]:
        tasks = [worlds["task-1"].task, worlds["task-2"].task]
        with pytest.raises(ValueError, match="no idea about task-1"):
            await asyncio.wait_for(rollout(player, raises, tasks, 1, seed=0), 30)
        return [world.closed for world in worlds.values()]

    assert asyncio.run(play()) == [1, 1]


def test_a_seed_is_a_pinned_function_of_its_parts() -> None:
    """Resuming on another machine, or another day, draws the same samples."""
    assert derive_seed(0, "rollout", 12, "task-3", 1) == 2531067459526499546
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), ("ab", "c"), ("a", "bc"), (None,)]
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= derive_seed(i) < 2**63 for i in range(1000))
