"""One training session: open the run's folder, build, train until the end or Ctrl-C, close everything."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import rlft.chance as chance
from rlft.agents import Agents, Seat, learners
from rlft.build import Parts, assemble
from rlft.case import Case
from rlft.causes import diagnose
from rlft.chat import Chat
from rlft.checkpoint import Checkpoints, restore
from rlft.config import Config
from rlft.environment import FILE as ENVIRONMENT
from rlft.environment import note
from rlft.faults import Faults
from rlft.fits import fitted
from rlft.hooks import Around, run_folder
from rlft.lock import FILE as LOCK
from rlft.lock import refuse_in_use, sole_writer
from rlft.material import Material, material
from rlft.parity import Gate, Mismatch, bounds_of
from rlft.profiling import Profile, ProfiledRun, watched_sync
from rlft.settings import dump, load, shown
from rlft.terminal import Terminal
from rlft.track import Record, trackers
from rlft.trainer import Run, train
from rlft.types import Group, InputError, RunError, Sampling
from rlft.whole import replacing, scraps, sweep

STOPPED = 130


def begin(config: Config, terminal: Terminal) -> int:
    """Train from the start in a new folder. Returns the exit code."""
    stuff = fitted(material(config), terminal.say)
    folder = run_folder(config.out, config.name)
    refuse_in_use(folder)
    _refuse_occupied(folder)
    try:
        with sole_writer(folder, terminal.say):
            _refuse_occupied(folder)  # another may have been faster
            return _first_session(stuff, folder, terminal)
    except InputError:
        with contextlib.suppress(OSError):  # something is in it
            folder.rmdir()
        raise


def _first_session(stuff: Material, folder: Path, terminal: Terminal) -> int:
    sweep(folder)
    write_config(folder, stuff.config)
    try:
        return _run(_session(stuff, folder, None, terminal))
    except InputError:  # the run did not begin: its name is free again
        if not (folder / "metrics.jsonl").exists():
            for name in ("config.yaml", "engine.log", ENVIRONMENT):
                (folder / name).unlink(missing_ok=True)
        raise


def resume(folder: Path, overrides: list[str], terminal: Terminal) -> int:
    """Go on from the newest checkpoint, or from the start where there is none yet."""
    config = of_run(folder, overrides)
    with sole_writer(folder, terminal.say):
        sweep(folder)
        return _further_session(config, folder, terminal)


def _further_session(config: Config, folder: Path, terminal: Terminal) -> int:
    newest = Checkpoints(folder / "checkpoints", config.checkpoint.keep).latest()
    if newest is not None and newest >= config.steps:
        terminal.say(f"{folder} is finished: step {newest} of {config.steps}. Train longer with steps=...")
        return 0
    stuff = fitted(material(config), terminal.say)
    return _run(_session(stuff, folder, newest, terminal))


def _refuse_occupied(folder: Path) -> None:
    """A folder with anything in it is never written to by a new run; what a kill left of one is nothing."""
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    inside -= {LOCK, *(path.name for path in scraps(folder))}
    if inside & {"config.yaml", "metrics.jsonl", "rollouts", "checkpoints", "engine.log"}:
        raise InputError(
            f"out: {folder} already holds a run. Go on with it: rlft resume {folder}; or choose another: out=..."
        )
    if folder.is_file() or inside:
        raise InputError(f"out: {folder} is in use by something else; choose another: out=...")


def of_run(folder: Path, overrides: list[str] | None = None) -> Config:
    """The config of a run. Raises InputError where the folder is not one."""
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder} is not a run: there is no config.yaml in it")
    return load(folder / "config.yaml", overrides or [])


def write_config(folder: Path, config: Config) -> None:
    """The resolved config, whole or not at all."""
    with replacing(folder / "config.yaml") as scratch:
        scratch.write_text(dump(config))


def _run(session: Coroutine[Any, Any, int]) -> int:
    """asyncio.run; but a Ctrl-C while the event loop is being made waits until it can be closed again."""
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with asyncio.Runner() as runner:
            runner.get_loop()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            return runner.run(session)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        session.close()


async def _session(stuff: Material, folder: Path, newest: int | None, terminal: Terminal) -> int:
    config = stuff.config
    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's own would wait until all is loaded
    kept = trackers(config.track, config.name, folder, shown(config))
    faults = Faults(folder, config.faults, terminal.say)
    record = Record(folder, kept, faults.untracked)
    parts: Parts | None = None
    try:
        with terminal.busy("loading the policy and starting the engine"):
            parts = assemble(stuff, folder / "engine.log", faults)
        chance.begin(config.seed)
        checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
        start = 0
        if newest is not None:
            start = restore(checkpoints.path(newest), parts.trainee, parts.source)
            terminal.say(f"resuming {folder} after step {start}")
        record.cut(start)
        write_config(folder, config)  # only now: overrides that the checkpoint does not fit must not stay
        note(folder, config, start)
        around = Around(parts, record, checkpoints, terminal)
        run = _made(parts, around, start, folder, terminal)
        run.differs = _gated(parts, terminal)
        try:
            with _interruptible(run.stop, terminal):
                await train(run, start)
        except (RunError, InputError) as error:
            if run.complete is not None:  # it failed between steps: nothing that was learned is lost
                around.keep(run.complete)
            if isinstance(error, InputError) and run.complete in (None, start):
                raise  # bad input that showed before anything was learned
            raise RunError(str(error)) from error
        return STOPPED if run.stopping else 0
    finally:
        terminal.end()
        record.close()
        if parts is not None:
            await parts.close()


def _made(parts: Parts, around: Around, start: int, folder: Path, terminal: Terminal) -> Run:
    """The run, watched where the config asks for it."""
    config = parts.material.config
    given = (config.steps, parts.source, parts.material.algorithm, parts.trainee)
    if not config.profile:
        return Run(*given, _sync(parts), around, learning=parts.learning)
    watch = Profile(folder, config.steps - start, terminal.say)
    return ProfiledRun(*given, watched_sync(watch, _sync(parts)), around, learning=parts.learning, profile=watch)


def _sync(parts: Parts) -> Callable:
    """Every step where the next one samples from it; else only when something is evaluated."""

    async def nothing(version: int) -> dict[str, float]:
        return {}

    return parts.serve if parts.source.online else nothing


def _gated(parts: Parts, terminal: Terminal) -> Callable[[Mismatch, list[Group]], Awaitable[None]]:
    """Close the gates; where engine and learner disagree, find the cause, then stop, or warn once and open them."""
    stuff, trainee = parts.material, parts.trainee
    draw, block = stuff.config.rollout.sampling, stuff.config.parity
    for learner in learners(trainee):
        learner.gate = Gate(bounds_of(parts.policy.dtype, **block.bounds), block.check, block.every)

    def chats() -> dict[str, Chat]:
        ways = {"the model's own template": "auto", "no template": "none"}
        return {name: Chat(stuff.model, way, stuff.config.model.trust_remote_code) for name, way in ways.items()}

    async def differs(found: Mismatch, chosen: list[Group]) -> None:
        several = isinstance(trainee, Agents)
        engine = parts.engine and (Seat(parts.engine, found.agent) if several else parts.engine)
        acting = trainee.acting(found.agent) if isinstance(trainee, Agents) else contextlib.nullcontext()
        with terminal.busy("engine and learner disagree: looking for the cause"), chance.undisturbed(), acting:
            more = {"engine": engine, "sampling": Sampling(draw.temperature, draw.max_tokens), "groups": chosen}
            case = Case.of(found, learners(trainee)[found.agent], chat=stuff.chat, chats=chats, **more)
            text = await diagnose(found, case)
        if block.check == "stop":
            raise RunError(text)
        for learner in learners(trainee):
            learner.gate.check = "off"
        terminal.say(text)

    return differs


@contextmanager
def _interruptible(stop: Callable[[], None], terminal: Terminal) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends after the current step, the second at once."""
    loop = asyncio.get_running_loop()

    def ask(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        terminal.say("stopping: what is being learned is finished and kept; Ctrl-C again stops at once")
        loop.call_soon_threadsafe(stop)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
