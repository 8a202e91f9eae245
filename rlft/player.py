"""Playing one episode: the engine speaks, the environment answers, and what was sampled is kept token by token."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, runtime_checkable

from rlft.asking import answered, opened_by, ready, replied, tools_of
from rlft.chat import Chat, Rewritten, Tool
from rlft.earlier import PLAYED, Earlier
from rlft.engine.base import Engine
from rlft.envs.base import Action, Env
from rlft.episode import Episode, WorldFailed
from rlft.types import Completion, Message, RunError, Sample, Sampling, Task, Trajectory, Turn


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
class Rehearsed:
    """What the policy says first: turns of an earlier episode of the task, then the beginning of one."""

    turns: tuple[Completion, ...]
    begun: Completion | None = None


@dataclass(frozen=True)
class Cast:
    """Which of several agents plays a role: after every `exchange` steps (0: never) each takes the next one's.

    earlier: the one agent that there is also plays against versions of itself, which are the agents from 1 on.
    """

    agents: int = 1
    exchange: int = 0
    earlier: Earlier | None = None

    def agent(self, role: int, version: int) -> int:
        """In episodes that the weights of `version` play, which are those of step version + 1."""
        return (role + (version // self.exchange if self.exchange else 0)) % self.agents

    def seated(self, seed: int, version: int) -> Callable[[int], int]:
        """Which agent plays each role of one episode. seed: the episode's."""
        if self.earlier is None or (met := self.earlier.opponent(seed, version)) is None:
            return partial(self.agent, version=version)
        own, other = met[0], self.agents + self.earlier.slot(met[1])
        return lambda role: 0 if role == own else other

    def noted(self, seed: int, version: int) -> dict[str, float]:
        """What an episode's metrics say of who plays."""
        met = self.earlier and self.earlier.opponent(seed, version)
        return {PLAYED: float(met[1])} if met else {}


@dataclass(frozen=True)
class Limits:
    """What one episode may take; None is no limit. turns, tokens: of the policy. seconds: wall-clock time, looked at
    before each turn. call: seconds of one call of the environment, which has failed after that.

    split: where the chat template changes what was said before, the history is a new sample, instead of an error.
    """

    turns: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    call: float | None = None
    split: bool = False

    def reached(self, episode: Episode) -> str:
        """The limit that leaves no further turn, if any."""
        spent = {"turns": len(episode.said), "tokens": episode.sampled, "seconds": episode.seconds}
        return next((name for name, used in spent.items() if used >= (getattr(self, name) or math.inf)), "")


@runtime_checkable
class Client(Protocol):
    """An environment in which somebody else asks the policy, who may want less of an answer, and counts its tokens."""

    def narrow(self, sampling: Sampling) -> Sampling:
        """How the next answer is sampled: with fewer tokens, or with more texts that end it, and no other change."""
        ...

    def sampled(self, prompt: int, completion: Completion) -> None:
        """Told what was sampled behind so many tokens, before `step`."""
        ...


@dataclass(frozen=True)
class Player:
    """What it takes to play an episode. context: the most tokens of one sample. cast: who plays which role.

    rivals: the roles are paid each for itself, see `EnvKnobs.rivals`.
    """

    engine: Engine
    chat: Chat
    env: Callable[[Task], Env]
    sampling: Sampling
    context: int
    cast: Cast = Cast()
    limits: Limits = Limits()
    rivals: bool = False

    async def opening(self, task: Task) -> tuple[tuple[Message, ...], tuple[Tool, ...]]:
        """The messages and tools with which the environment opens an episode of the task. Raises WorldFailed."""
        env = None
        try:
            env = await answered(self._made(task), self.limits.call)
            call = await ready(env, self.limits.call)
            return opened_by(await answered(env.reset(), call)), tools_of(env)
        finally:
            await self._close(env)

    async def play(
        self, task: Task, seed: int, opening: Opening | None = None, rehearsed: Rehearsed | None = None
    ) -> Trajectory:
        """One episode, from the environment's opening, or another, to its end or a limit.

        rehearsed: what is said first. Where the environment fails, it is what was played until then, with a failure and
        without a score.
        """
        episode, env, failure = Episode(task), None, None
        try:
            env = await answered(self._made(task), self.limits.call)
            call = await ready(env, self.limits.call)
            episode = Episode(task)  # whose time begins now
            played = await self._play(env, call, episode, seed, opening, rehearsed)
        except WorldFailed as error:
            failure = error.__cause__ or error
        finally:
            unclosed = await self._close(env)
        if failure is not None:
            played = self.failed(episode, failure)
        if unclosed:
            played.metrics["env/unclosed"] = 1.0
        return played if opening is None or failure is not None else _kept(played, opening)

    def failed(self, episode: Episode, failure: BaseException) -> Trajectory:
        """What there is of an episode whose environment failed."""
        if not episode.samples:
            episode.open(episode.task.messages, self.chat.prompt(episode.task.messages), 0)
        return episode.fail(failure)

    async def _play(
        self,
        env: Env,
        call: float | None,
        episode: Episode,
        seed: int,
        opening: Opening | None,
        rehearsed: Rehearsed | None,
    ) -> Trajectory:
        """call: seconds that each call of the environment may take."""
        messages = opened_by(await answered(env.reset(), call))
        seated = self.cast.seated(seed, self.engine.version)
        episode.metrics |= self.cast.noted(seed, self.engine.version)
        shown = opening.shown if opening else self.chat.prompt(messages, tools_of(env))
        if len(shown) >= self.context:
            raise WorldFailed from ValueError(f"it opens with {len(shown)} tokens, and the context is {self.context}")
        episode.open(messages, shown, seated(0), tools_of(env))
        while True:
            action, cut = await self._speak(env, episode, seed, opening, rehearsed)
            reply = replied(await answered(env.step(action), call))
            if reply.said is not None:
                episode.restate(reply.said)
            episode.pay(reply)
            if reply.done:
                return episode.end(action.finish)
            cut = "" if reply.rewrite else cut
            if cut := cut or self.limits.reached(episode) or self._hear(env, episode, reply, seated):
                return episode.end(action.finish, cut)

    async def _speak(
        self, env: Env, episode: Episode, seed: int, opening: Opening | None, rehearsed: Rehearsed | None
    ) -> tuple[Action, str]:
        """One turn of the policy, and the limit that cut it, if any."""
        sample, turn = episode.samples[-1], len(episode.said)
        room = {"answer": self.sampling.max_tokens, "context": max(1, self.context - len(sample.tokens))}
        if self.limits.tokens is not None:
            room["tokens"] = self.limits.tokens - episode.sampled
        least = min(room, key=room.__getitem__)
        sampling = replace(
            self.sampling,
            seed=derive_seed(seed, turn) if self.sampling.seed is None else self.sampling.seed,
            max_tokens=room[least],
            agent=sample.agent,
        )
        client = env if isinstance(env, Client) else None
        sampling = client.narrow(sampling) if client else sampling
        completion = await self._said(sample.tokens, sampling, turn, rehearsed)
        if client:
            client.sampled(len(sample.tokens), completion)
        self._check(completion.tokens, episode.task)
        tokens = [*(opening.said if opening and turn == 0 else ()), *completion.tokens]
        episode.answer(completion, self.chat.decode(tokens))
        action = Action(self.chat.decode(tokens), completion.finish, self.chat.decode(tokens, special=True))
        least = least if sampling.max_tokens == room[least] else "answer"
        return action, least if completion.finish == "length" else ""

    async def _said(self, prompt: list[int], sampling: Sampling, turn: int, rehearsed: Rehearsed | None) -> Completion:
        """What the policy says in a turn: as rehearsed, or from there on, or by itself."""
        if rehearsed and turn < len(rehearsed.turns):
            return rehearsed.turns[turn]
        begun = rehearsed.begun if rehearsed and turn == len(rehearsed.turns) else None
        if begun is None:
            return await self.engine.generate(prompt, sampling)
        left = replace(sampling, max_tokens=max(1, sampling.max_tokens - len(begun.tokens)))
        rest = await self.engine.generate([*prompt, *begun.tokens], left)
        return replace(rest, tokens=begun.tokens + rest.tokens, logprobs=begun.logprobs + rest.logprobs)

    def _hear(self, env: Env, episode: Episode, reply: Turn, seated: Callable[[int], int]) -> str:
        """The reply becomes part of the history, or is left out whole where it does not fit: "context"."""
        tools, last = tools_of(env), len(episode.samples) - 1
        episode.role = reply.role
        agent = self._next(reply, episode.samples[-1], seated(reply.role), episode.task)
        before: tuple[Message, ...] | None = episode.messages
        after = (*before, *reply.messages)
        if reply.rewrite:
            before, after = None, tuple(reply.messages)
            if isinstance(env, Client) and (found := episode.left(after, tools, agent)) is not None:
                before, last = episode.talk(found), found
        tokens = episode.samples[last].tokens
        added = None if before is None else self._suffix(before, after, tokens[-1], tools)
        shown = self.chat.prompt(after, tools) if before is None or added is None else [*tokens, *added]
        if len(shown) >= self.context:
            return "context"
        if before is None or added is None:
            episode.open(after, shown, agent, tools)
        else:
            if last < len(episode.samples) - 1:
                episode.back(last)
            episode.hear(after[len(before) :], added)
        return ""

    def _suffix(
        self, before: tuple[Message, ...], after: tuple[Message, ...], last: int, tools: tuple[Tool, ...]
    ) -> list[int] | None:
        """The tokens to append; None where the template changes what was said, and the history is to be split."""
        try:
            return self.chat.suffix(before, after, last, tools)
        except Rewritten:
            if self.limits.split:
                return None
            raise

    def _next(self, reply: Turn, sample: Sample, agent: int, task: Task) -> int:
        """The agent whose turn it is. Raises RunError where it would go on in another's sample."""
        if reply.rewrite or (agent == sample.agent and not (self.rivals and reply.role != sample.role)):
            return agent
        own = "a rival's" if agent == sample.agent else f"agent {sample.agent}'s"
        raise RunError(
            f"env: task {task.id}: role {reply.role} is agent {agent}'s, but the history is {own}, and a sample is of "
            "one policy in one role. Return Turn(rewrite=True) with all that the next role is shown"
            + ("" if agent == sample.agent else ", or set agents.count=1")
        )

    async def _made(self, task: Task) -> Env:
        return self.env(task)

    async def _close(self, env: Env | None) -> bool:
        """Close it, whatever happened; whether that failed."""
        try:
            if env is not None:
                await answered(env.close(), self.limits.call)
        except WorldFailed:
            return True
        return False

    def _check(self, tokens: list[int], task: Task) -> None:
        if tokens and max(tokens) >= self.chat.vocabulary:
            raise RunError(
                f"task {task.id}: the engine sampled token {max(tokens)}, but the tokenizer ends at "
                f"{self.chat.vocabulary}: the model's vocabulary is padded, and its padding has probability."
            )


def _kept(played: Trajectory, opening: Opening) -> Trajectory:
    """The first sample as if the episode had begun with what is kept."""
    index, n = played.said[0].sample if played.said else 0, len(opening.shown)
    first = played.samples[index]
    fields = ("tokens", "mask", "logprobs", "rewards")
    lists = {name: [*getattr(opening.kept, name), *getattr(first, name)[n:]] for name in fields}
    moved = len(opening.kept.tokens) - n
    said = tuple(replace(turn, end=turn.end + moved) if turn.sample == index else turn for turn in played.said)
    kept = Sample(**lists, version=first.version, agent=first.agent, role=first.role)
    return replace(played, samples=[*played.samples[:index], kept, *played.samples[index + 1 :]], said=said)
