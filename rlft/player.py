"""Playing one episode: the engine speaks, the environment answers, and what was sampled is kept token by token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.envs.base import Action, Env
from rlft.types import NAN, Message, RunError, Said, Sample, Sampling, Task, Trajectory, Turn


def derive_seed(*parts: object) -> int:
    """63 bits that depend on every part and on their order."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Opening:
    """Another beginning of an episode: what the engine is shown, and what is kept in its place.

    said: tokens of the first answer that are there already, which the policy goes on from.
    """

    shown: list[int]
    kept: Sample
    said: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cast:
    """Which of several agents plays a role: after every `exchange` steps (0: never) each takes the next one's."""

    agents: int = 1
    exchange: int = 0

    def agent(self, role: int, version: int) -> int:
        """In episodes that the weights of `version` play, which are those of step version + 1."""
        return (role + (version // self.exchange if self.exchange else 0)) % self.agents


@dataclass(frozen=True)
class Player:
    """What it takes to play an episode. context: the most tokens of one sample. cast: who plays which role."""

    engine: Engine
    chat: Chat
    env: Callable[[Task], Env]
    sampling: Sampling
    context: int
    cast: Cast = Cast()

    async def opening(self, task: Task) -> tuple[Message, ...]:
        """The messages with which the environment opens an episode of the task."""
        env = self.env(task)
        try:
            return tuple(await env.reset())
        finally:
            await env.close()

    async def play(self, task: Task, seed: int, opening: Opening | None = None) -> Trajectory:
        """One episode, from the environment's opening, or another, to its end or the engine's limit."""
        env = self.env(task)
        try:
            played = await self._play(env, task, seed, opening)
        finally:
            await env.close()
        return played if opening is None else _kept(played, opening)

    async def _play(self, env: Env, task: Task, seed: int, opening: Opening | None) -> Trajectory:
        messages = tuple(await env.reset())
        version = self.engine.version
        samples = [opened(opening.shown if opening else self.chat.prompt(messages), self.cast.agent(0, version))]
        turns: list[Said] = []
        sampled = 0
        for turn in range(1_000_000):
            sample = samples[-1]
            room = self.context - len(sample.tokens)
            sampling = replace(
                self.sampling,
                seed=derive_seed(seed, turn) if self.sampling.seed is None else self.sampling.seed,
                max_tokens=max(1, min(self.sampling.max_tokens, room)),
                agent=sample.agent,
            )
            completion = await self.engine.generate(sample.tokens, sampling)
            self._check(completion.tokens, task)
            sampled += len(completion.tokens)
            append(sample, completion.tokens, completion.logprobs)
            sample.version = completion.version
            begun = list(opening.said) if opening and turn == 0 else []
            text = self.chat.decode(begun + completion.tokens)
            messages = (*messages, {"role": "assistant", "content": text})
            turns.append(Said(messages, len(samples) - 1, len(sample.tokens) - 1))
            reply = await env.step(Action(text, completion.finish))
            sample.rewards[-1] += reply.reward
            if reply.done or (completion.finish == "length" and not reply.rewrite):
                return Trajectory(task, messages, samples, finish=completion.finish, said=tuple(turns), sampled=sampled)
            agent = self._next(reply, sample, version, task)
            longer = (*messages, *reply.messages)
            if reply.rewrite:
                longer = tuple(reply.messages)
                added, used = self.chat.prompt(longer), 0
            else:
                added, used = self.chat.suffix(messages, longer, sample.tokens[-1]), len(sample.tokens)
            if used + len(added) >= self.context:
                return Trajectory(task, messages, samples, finish="length", said=tuple(turns), sampled=sampled)
            if reply.rewrite:
                samples.append(opened(added, agent))
            else:
                append(sample, added, None)
            messages = longer
        raise AssertionError("unreachable")

    def _next(self, reply: Turn, sample: Sample, version: int, task: Task) -> int:
        """The agent whose turn it is. Raises RunError where it would go on in another's sample."""
        agent = self.cast.agent(reply.role, version)
        if agent != sample.agent and not reply.rewrite:
            raise RunError(
                f"env: task {task.id}: role {reply.role} is agent {agent}'s, but the history is {sample.agent}'s, and "
                "a sample is of one policy. Return Turn(rewrite=True) with all that the next role is shown, or set "
                "agents.count=1"
            )
        return agent

    def _check(self, tokens: list[int], task: Task) -> None:
        if tokens and max(tokens) >= self.chat.vocabulary:
            raise RunError(
                f"task {task.id}: the engine sampled token {max(tokens)}, but the tokenizer ends at "
                f"{self.chat.vocabulary}: the model's vocabulary is padded, and its padding has probability."
            )


def opened(prompt: list[int], agent: int = 0) -> Sample:
    """A sample of which only the prompt is there."""
    n = len(prompt)
    return Sample(list(prompt), [False] * n, [NAN] * n, [0.0] * n, -1, agent)


def append(sample: Sample, tokens: list[int], logprobs: list[float] | None) -> None:
    """Add tokens: sampled ones with their log-probs, or ones that somebody else said."""
    sample.tokens += tokens
    sample.mask += [logprobs is not None] * len(tokens)
    sample.logprobs += logprobs if logprobs is not None else [NAN] * len(tokens)
    sample.rewards += [0.0] * len(tokens)


def _kept(played: Trajectory, opening: Opening) -> Trajectory:
    """The first sample as if the episode had begun with what is kept."""
    first, n = played.samples[0], len(opening.shown)
    fields = ("tokens", "mask", "logprobs", "rewards")
    lists = {name: [*getattr(opening.kept, name), *getattr(first, name)[n:]] for name in fields}
    moved = len(opening.kept.tokens) - n
    said = tuple(turn if turn.sample else replace(turn, end=turn.end + moved) for turn in played.said)
    kept = Sample(**lists, version=first.version, agent=first.agent)
    return replace(played, samples=[kept, *played.samples[1:]], said=said)
