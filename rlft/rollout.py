"""Playing tasks: the engine speaks, the environment answers, and what was sampled is kept token by token.

All episodes of a step are open at once, so the engine batches across them. Each draws from a seed that is a function
of (run seed, step, task, sample, turn), so a result does not depend on how requests happened to be batched.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.envs.base import Action, Env
from rlft.types import NAN, Group, Reward, RunError, Sample, Sampling, Task, Trajectory


def derive_seed(*parts: object) -> int:
    """63 bits that depend on every part and on their order."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Player:
    """What it takes to play an episode. context: the most tokens of one sample."""

    engine: Engine
    chat: Chat
    env: Callable[[Task], Env]
    sampling: Sampling
    context: int

    async def play(self, task: Task, seed: int) -> Trajectory:
        """One episode, from the environment's opening to its end or the engine's limit."""
        env = self.env(task)
        try:
            return await self._play(env, task, seed)
        finally:
            await env.close()

    async def _play(self, env: Env, task: Task, seed: int) -> Trajectory:
        messages = tuple(await env.reset())
        samples = [_opened(self.chat.prompt(messages))]
        for turn in range(1_000_000):
            sample = samples[-1]
            room = self.context - len(sample.tokens)
            sampling = replace(
                self.sampling,
                seed=derive_seed(seed, turn) if self.sampling.seed is None else self.sampling.seed,
                max_tokens=max(1, min(self.sampling.max_tokens, room)),
            )
            completion = await self.engine.generate(sample.tokens, sampling)
            self._check(completion.tokens, task)
            _append(sample, completion.tokens, completion.logprobs)
            sample.version = completion.version
            text = self.chat.decode(completion.tokens)
            messages = (*messages, {"role": "assistant", "content": text})
            reply = await env.step(Action(text, completion.finish))
            sample.rewards[-1] += reply.reward
            if reply.done or completion.finish == "length":
                return Trajectory(task, messages, samples, finish=completion.finish)
            longer = (*messages, *reply.messages)
            if reply.rewrite:
                longer = tuple(reply.messages)
                added, used = self.chat.prompt(longer), 0
            else:
                added, used = self.chat.suffix(messages, longer, sample.tokens[-1]), len(sample.tokens)
            if used + len(added) >= self.context:
                return Trajectory(task, messages, samples, finish="length")
            if reply.rewrite:
                samples.append(_opened(added))
            else:
                _append(sample, added, None)
            messages = longer
        raise AssertionError("unreachable")

    def _check(self, tokens: list[int], task: Task) -> None:
        if tokens and max(tokens) >= self.chat.vocabulary:
            raise RunError(
                f"task {task.id}: the engine sampled token {max(tokens)}, but the tokenizer ends at "
                f"{self.chat.vocabulary}: the model's vocabulary is padded, and its padding has probability."
            )


def _opened(prompt: list[int]) -> Sample:
    n = len(prompt)
    return Sample(list(prompt), [False] * n, [NAN] * n, [0.0] * n, -1)


def _append(sample: Sample, tokens: list[int], logprobs: list[float] | None) -> None:
    """Add tokens: sampled ones with their log-probs, or ones that somebody else said."""
    sample.tokens += tokens
    sample.mask += [logprobs is not None] * len(tokens)
    sample.logprobs += logprobs if logprobs is not None else [NAN] * len(tokens)
    sample.rewards += [0.0] * len(tokens)


@dataclass
class Clock:
    """Seconds: generate until the last episode ended, reward from there on, reward_hidden while others generated."""

    generate: float = 0.0
    reward: float = 0.0
    reward_hidden: float = 0.0


async def rollout(
    player: Player, reward: Reward, tasks: Sequence[Task], group_size: int, seed: int
) -> tuple[list[Group], Clock]:
    """Play every task `group_size` times and score each group as soon as it is complete, in the tasks' order."""
    begun = time.perf_counter()
    ended = begun
    busy = 0.0

    async def one(index: int, task: Task) -> Group:
        nonlocal ended, busy
        seeds = [derive_seed(seed, index, task.id, i) for i in range(group_size)]
        group = tuple(await _all([player.play(task, s) for s in seeds]))
        ended = now = time.perf_counter()
        for trajectory, score in zip(group, await reward(group), strict=True):
            trajectory.score = score
        busy += time.perf_counter() - now
        return group

    groups = await _all([one(i, task) for i, task in enumerate(tasks)])
    shown = time.perf_counter() - ended
    return groups, Clock(ended - begun, shown, max(0.0, busy - shown))


async def _all(coroutines: list) -> list:
    """gather, but the first failure ends the others before it is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
