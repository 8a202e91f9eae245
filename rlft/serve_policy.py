"""A policy behind OpenAI's API: `rlft serve-policy` serves that of a run, or that of a config before training.

With a folder to record to, whoever asks is played as an agent is in a run: a key is an episode, the run's sampling
holds, and each episode is a line of `episodes.jsonl`, token by token, which `rlft train` learns from as it was sampled.
Without one, every request is answered for itself, as it asks to be sampled.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlft.after import chosen, of_one_agent
from rlft.build import Parts, assemble
from rlft.checkpoint import disk_errors, load_trained
from rlft.config import Config
from rlft.envs.agent import AgentConfig, AgentEnv, reading
from rlft.envs.agent_chat import Answer, Asked, Refused
from rlft.envs.agent_endpoint import OVER, Desk, application
from rlft.envs.agent_start import Seat
from rlft.envs.base import Env
from rlft.listening import key_of, listening, refuse_lacking
from rlft.material import Material, material
from rlft.player import Player, derive_seed
from rlft.session import of_run
from rlft.settings import load
from rlft.types import InputError, RunError, Sampling, Task, Trajectory

CONTEXT = 4096  # tokens, where neither the config nor the model has less
FILE = "episodes.jsonl"
LONG = "and the context is"  # what `rlft.player` says of an opening that does not fit


@dataclass(frozen=True)
class Service:
    """What is served, and how. step, agent: of a run's checkpoints. record: a folder. idle: seconds."""

    path: Path
    overrides: Sequence[str] = ()
    step: int | None = None
    agent: int = 0
    record: Path | None = None
    idle: float = 600.0


def serve(service: Service, host: str, port: int, key_env: str | None, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. port 0 takes a free one. Raises InputError and RunError.

    key_env: the environment variable with the key that requests must bring; None: anybody who reaches the port is
    answered. say: is told where.
    """
    refuse_lacking("serve-policy")
    key = key_of(key_env)
    is_run = service.path.is_dir()
    config = of_run(service.path, list(service.overrides)) if is_run else load(service.path, service.overrides)
    folder = chosen(service.path, service.step, service.agent) if is_run else None
    stuff = _answering(material(_roomy(of_one_agent(config))))

    async def run() -> None:
        async with _engine(stuff, folder) as parts:
            visits = Visits(
                _player(parts, service.record is not None),
                stuff.config,
                stuff.chat.template,
                service,
                key,
                say,
            )
            async with visits:
                await listening(application(visits.find), host, port, key_env is None, say, _about(service))

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())


def _about(service: Service) -> Callable[[str], list[str]]:
    def about(url: str) -> list[str]:
        lines = [f"serving the policy of {service.path} on {url}; Ctrl-C ends it"]
        lines.append(f"for an agent:  OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY=episode-1")
        return [*lines, *([f"episodes go to {service.record / FILE}"] if service.record else [])]

    return about


def _roomy(config: Config) -> Config:
    """With a context for conversations of any kind, unless it says one."""
    engine = config.rollout.engine
    if engine.context is not None:
        return config
    roomy = engine.model_copy(update={"context": CONTEXT})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"engine": roomy})})


def _answering(stuff: Material) -> Material:
    """With something to be answered, so that an engine is started also where the run only learned from records."""
    return stuff if stuff.needs_engine else replace(stuff, held_out=[group[0].task for group in stuff.groups[:2]])


@contextlib.asynccontextmanager
async def _engine(stuff: Material, folder: Path | None) -> AsyncIterator[Parts]:
    """The engine with the weights of a checkpoint, or those before training."""
    parts = assemble(stuff, None)
    try:
        if folder is not None:
            load_trained(folder, parts.learner)
        await parts.serve(0)
        yield parts
    finally:
        await parts.close()


def _player(parts: Parts, recorded: bool) -> Callable[[Callable[[Task], Env]], Player]:
    """Makes the player of an environment. recorded: the config's sampling holds; else the client may ask for any."""
    stuff, draw = parts.material, parts.material.config.rollout.sampling
    engine = parts.engine
    assert engine is not None
    most = draw.max_tokens if recorded else stuff.context
    sampling = Sampling(draw.temperature, most, stop=draw.stop)
    return lambda env: Player(engine, stuff.chat, env, sampling, stuff.context)


class Obliging(AgentEnv):
    """Samples as the client asks, for nothing is learned from it."""

    def narrow(self, sampling: Sampling) -> Sampling:
        """See `rlft.player.Client`; what is not said is neutral, and the temperature 1."""
        wanted = self.asked.wanted
        drawn = {name: wanted[name] for name in ("top_p", "top_k", "min_p") if name in wanted}
        return replace(super().narrow(sampling), temperature=wanted.get("temperature", 1.0), **drawn)


@dataclass
class Visit:
    """The episode of whoever holds a key. It is the endpoint and the agent of its environment, see `AgentEnv`.

    once: it ends with its first answer. seen: when it was heard of last. failed: why there is no answer, if it failed.
    """

    name: str
    once: bool
    play: Callable[[Visit, Asked], Any]
    over: asyncio.Event = field(default_factory=asyncio.Event)
    seen: float = field(default_factory=time.monotonic)
    waiting: int = 0
    failed: Refused | None = None
    _desk: asyncio.Future[Desk] | None = None
    playing: asyncio.Task[None] | None = None

    async def ask(self, asked: Asked) -> Answer:
        """See `rlft.envs.agent_endpoint.Host`."""
        if self.playing is None:
            self._desk = asyncio.get_running_loop().create_future()
            self.playing = asyncio.ensure_future(self.play(self, asked))
        desk, playing = self._desk, self.playing
        assert desk is not None
        assert playing is not None
        either: list[asyncio.Future[Any]] = [desk, playing]
        self.waiting += 1
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not desk.done():
                raise Refused(OVER, 410, code="episode_over")
            return await desk.result().ask(asked)
        except Refused as refused:
            if refused.code != "episode_over":
                raise
            await asyncio.wait({playing})  # which knows why it is over
            raise self.failed or refused from None
        except asyncio.CancelledError:  # the client has left
            if self.once:
                playing.cancel()
            raise
        finally:
            self.waiting -= 1
            self.seen = time.monotonic()
            if self.once:
                self.over.set()

    def pay(self, reward: float, metrics: Mapping[str, float], done: bool) -> None:
        """See `rlft.envs.agent_endpoint.Host`."""
        if self._desk is None or not self._desk.done():
            raise Refused("nothing was asked yet with this key, so that there is nothing to pay for", 409)
        self._desk.result().pay(reward, metrics)
        self.seen = time.monotonic()
        if done:
            self.over.set()

    def open(self, desk: Desk) -> tuple[str, str]:
        """The environment is there."""
        assert self._desk is not None
        self._desk.set_result(desk)
        return "", self.name

    def close(self, key: str) -> None:
        """The environment is gone."""

    async def slot(self) -> asyncio.Semaphore:
        """See `Start.slot`."""
        return asyncio.Semaphore()

    async def run(self, task: Task, seat: Seat) -> None:
        """Until it is over."""
        await self.over.wait()


class Visits:
    """The episodes that are under way, by key; they are written down as they end."""

    def __init__(
        self,
        player: Callable[[Callable[[Task], Env]], Player],
        config: Config,
        template: str,
        service: Service,
        key: str,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """key: that all are to begin with, or "". say: is told when the record is lost."""
        env = config.env
        self._player = player
        self._format = reading(env.format if isinstance(env, AgentConfig) else "auto", template)
        self._seed = config.seed
        self._record = service.record
        self._idle = service.idle
        self._key = key
        self._say = say
        self._lost = ""
        self._before = 0
        self._there: dict[str, Visit] = {}
        self._number = 0
        self._sweeping: asyncio.Task[None] | None = None

    def find(self, key: str) -> Visit:
        """The episode of a key. Raises Refused where it does not begin with the key that is asked for."""
        name = self._name(key)
        if self._lost:
            raise Refused(self._lost, 500, code="record_lost")
        if self._record is None or not name:
            return Visit(name, True, self._play)
        return self._there.setdefault(name, Visit(name, False, self._play))

    def _name(self, key: str) -> str:
        """What is left of a key behind SECRET or SECRET:, where there is one. Raises Refused."""
        begun, rest = key[: len(self._key)], key[len(self._key) :]
        if not hmac.compare_digest(begun.encode(), self._key.encode()) or (self._key and rest[:1] not in ("", ":")):
            raise Refused("the key is missing or wrong", 401, code="invalid_api_key")
        return rest[1:] if self._key else rest

    async def _play(self, visit: Visit, asked: Asked) -> None:
        """One episode, to its end; then it is written down. It raises nothing: what fails is told to those who ask."""
        self._number += 1
        number, kind = self._number, Obliging if self._record is None else AgentEnv
        task = Task(visit.name or f"request-{number}", asked.messages)

        def env(own: Task) -> Env:
            return kind(visit, visit, self._format, None, own)  # type: ignore[arg-type]

        try:
            seed = derive_seed(self._seed, "served", self._before, number)
            played = await self._player(env).play(task, seed)
        except Exception as error:
            visit.failed = Refused(f"the service failed: {type(error).__name__}: {error}", 500)
            self._say(f"{task.id}: {visit.failed}")
            return
        finally:
            self._there.pop(visit.name, None)
        visit.failed = _reason(played)
        if self._record is not None and played.said:
            self._keep(self._record / FILE, played)

    def _keep(self, path: Path, played: Trajectory) -> None:
        """Write it down; from where that fails on, nobody is answered, since it would not be recorded."""
        try:
            write(path, played)
        except (OSError, ValueError) as error:
            why = f"the episode {played.task.id} could not be written to {path}: {error}"
            self._lost = self._lost or f"{why}; nothing more is recorded, see to it and start the service again"
            self._say(why)

    async def __aenter__(self) -> Visits:
        if self._record is not None:
            with disk_errors(self._record):
                self._record.mkdir(parents=True, exist_ok=True)
            self._before = _recorded(self._record / FILE)
        self._sweeping = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweeping:
            self._sweeping.cancel()
        ending = asyncio.ensure_future(self._end(list(self._there.values())))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:  # Ctrl-C cancels this too; a second one does not wait
            await ending
            if not self._lost:
                raise
        if self._lost:
            raise RunError(self._lost)

    async def _sweep(self) -> None:
        """For ever: end those that are not heard of any more."""
        while True:
            await asyncio.sleep(min(self._idle / 4, 10.0))
            before = time.monotonic() - self._idle
            await self._end([one for one in self._there.values() if one.seen < before and not one.waiting])

    async def _end(self, visits: Sequence[Visit]) -> None:
        for visit in visits:
            visit.over.set()
            if visit.playing is None:  # all that was asked was refused
                self._there.pop(visit.name, None)
        playing = {visit.playing for visit in visits if visit.playing}
        if playing:
            await asyncio.wait(playing)


def _recorded(path: Path) -> int:
    """How many episodes are there from services before, whose seeds are not to come again. Raises InputError."""
    if not path.exists():
        return 0
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError as error:
        raise InputError(f"--record: {path}: {error.strerror}; move it away, or record to another folder") from error


def _reason(played: Trajectory) -> Refused | None:
    """Why an episode failed, as its client is told; None where it did not."""
    if not played.failed:
        return None
    said = played.failures[0].said
    if not played.said and LONG in said:
        return Refused(said.partition(": ")[2], 400, "messages", "context_length_exceeded")
    return Refused(f"the episode failed: {said}", 500)


def write(path: Path, played: Trajectory) -> None:
    """Add an episode as one line, which recorded data are read from; what was paid is its score."""
    last = played.said[-1]
    score = sum(sum(sample.rewards) for sample in played.samples)
    samples = [
        {"tokens": one.tokens, "mask": one.mask, "logprobs": [None if math.isnan(x) else x for x in one.logprobs]}
        for one in played.samples
    ]
    row = {
        "prompt": [dict(message) for message in last.messages[:-1]],
        "completion": last.text,
        "score": score,
        "samples": samples,
        "episode": played.task.id,
        "finish": played.finish,
        "metrics": played.metrics,
    }
    line = json.dumps(row, ensure_ascii=False) + "\n"
    size = path.stat().st_size if path.is_file() else 0
    try:
        with disk_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)  # half a line is no row
        raise
