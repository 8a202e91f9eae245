"""Checkpoints: whole or not there. Written under a temporary name, synced to the disk, then renamed.

Nothing is pickled: tensors are safetensors, the rest is JSON. `checkpoints/step-n` holds version n and all it takes
to go on as if nothing had happened: trained parameters, optimizer, scheduler, random states, the source's position.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import rlft.chance as chance
from rlft.agents import Agents, Trainee, learners
from rlft.allocation import allocator
from rlft.learner import Learner
from rlft.past import Past
from rlft.source import Source
from rlft.types import InputError
from rlft.whole import WRITING, remove

NAME = re.compile(r"step-(\d{6,})")
PAST = "past.safetensors"


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by a number that grows with quality."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self.best: tuple[float, int] | None = None
        newest = self.latest()
        if newest is not None:
            found = read_state(self.path(newest)).get("best")
            self.best = (float(found[0]), int(found[1])) if found else None

    def path(self, step: int) -> Path:
        """The folder of one checkpoint, whether it is there or not."""
        return self._folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self._folder.iterdir() if (m := NAME.fullmatch(p.name)))

    def latest(self) -> int | None:
        """The newest step with a checkpoint."""
        return max(self.steps(), default=None)

    def improved(self, step: int, value: float | None) -> bool:
        """Note a quality; True where it is the best so far."""
        if value is None or (self.best is not None and value <= self.best[0]):
            return False
        self.best = (value, step)
        return True

    def save(self, step: int, trainee: Trainee, source: Source) -> Path:
        """Write version `step`. On any failure nothing is left but what was there before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(f"{WRITING}*"):  # by a process that was killed
            shutil.rmtree(left)
        scratch = self._folder / f"{WRITING}{step:06d}-{os.getpid()}"
        try:
            scratch.mkdir()
            with disk_errors(scratch):
                write(scratch, step, trainee, source, self.best)
            _flush(scratch)
            target = self.path(step)
            if target.exists():
                remove(target)
            os.replace(scratch, target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._prune()
        return self.path(step)

    def _prune(self) -> None:
        kept = set(self.steps()[-self._keep :]) | ({self.best[1]} if self.best else set())
        for step in self.steps():
            if step not in kept:
                remove(self.path(step))


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """safetensors hides what the disk said in a text of its own; raise it as the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def of_agent(folder: Path, agent: int) -> Path:
    """Where in a checkpoint's folder an agent's part stands, which is a checkpoint itself; agent 0's is the folder."""
    return folder / f"agent-{agent}" if agent else folder


def write(folder: Path, step: int, trainee: Trainee, source: Source, best: tuple[float, int] | None) -> None:
    """Everything of one checkpoint into an empty folder."""
    if isinstance(trainee, Agents):
        trainee.each(lambda agent: _write(of_agent(folder, agent), step, trainee.learners[agent], source, best))
        if trainee.past is not None:
            save_file(trainee.past.state_dict(), folder / PAST)
    else:
        _write(folder, step, trainee, source, best)


def _write(folder: Path, step: int, learner: Learner, source: Source, best: tuple[float, int] | None) -> None:
    folder.mkdir(exist_ok=True)
    if learner.policy.is_peft:
        learner.policy.save_adapter(folder / "adapter")
    save_file({n: p.detach().cpu().contiguous() for n, p in learner.trained().items()}, folder / "trained.safetensors")
    tensors, numbers = _split(learner.optimizer.state_dict()["state"], learner.names)
    save_file(tensors, folder / "optimizer.safetensors")
    if learner.reference is not None:
        moving = {name: value.cpu().contiguous() for name, value in learner.reference.values.items()}
        save_file(moving, folder / "reference.safetensors")
    tensors, ranks = allocation(learner)
    if tensors:
        save_file(tensors, folder / "allocation.safetensors")
    save_file({**chance.states(), "learner": learner.generator.get_state()}, folder / "random.safetensors")
    state = {
        "step": step,
        "source": source.state_dict(),
        "optimizer": numbers,
        "scheduler": {k: v for k, v in learner.scheduler.state_dict().items() if _plain(v)},
        "best": best,
        "remembered": learner.remembered,
        "ranks": ranks,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))


def restore(folder: Path, trainee: Trainee, source: Source | None) -> int:
    """Bring learners and source to where the checkpoint was taken; returns its step. Raises InputError."""
    own = [of_agent(folder, agent) for agent in range(len(learners(trainee)))]
    if not own[-1].is_dir() or of_agent(folder, len(own)).exists():
        raise InputError(
            f"agents.count: {folder} is not of {len(own)} agent{'s' * (len(own) > 1)}; resume with as many as the run "
            "began with"
        )
    if source is not None:  # without one nothing is played
        _restore_past(folder, trainee.past if isinstance(trainee, Agents) else None)
    if isinstance(trainee, Agents):
        return trainee.each(lambda agent: _restore(own[agent], trainee.learners[agent], source))[0]
    return _restore(folder, trainee, source)


def _restore_past(folder: Path, past: Past | None) -> None:
    """The opponents of a policy that plays against its past."""
    there = (folder / PAST).is_file()
    if past is not None and there:
        past.load_state_dict(load_file(folder / PAST), int(read_state(folder)["step"]))
    elif past is not None or there:
        raise InputError(
            f"agents.past: {folder} was written {'with' if there else 'without'} past versions of the policy; resume "
            "with the agents.past that the run began with"
        )


def _restore(folder: Path, learner: Learner, source: Source | None) -> int:
    state = read_state(folder)
    load_trained(folder, learner)
    saved = load_file(folder / "optimizer.safetensors")
    current = learner.optimizer.state_dict()
    current["state"] = _join(saved, state["optimizer"], learner.names)
    learner.optimizer.load_state_dict(current)
    _restore_rates(learner, state["scheduler"])
    learner.remembered = {**learner.remembered, **state.get("remembered", {})}
    _restore_reference(folder, learner)
    _restore_allocation(folder, learner, state.get("ranks"))
    random_states = load_file(folder / "random.safetensors")
    chance.put(random_states)
    learner.generator.set_state(random_states["learner"])
    if source is not None:
        source.load_state_dict(state["source"])
    learner.version = int(state["step"])
    return learner.version


def restore_policy(folder: Path, learner: Learner) -> None:
    """The policy, and a reference that follows it, for an algorithm that owns other things than the run's own."""
    load_trained(folder, learner, owned=False)
    if learner.reference is not None:
        _restore_reference(folder, learner)


def _restore_reference(folder: Path, learner: Learner) -> None:
    """Where a moving reference has got to; one that begins to move now is still the policy before training."""
    path = folder / "reference.safetensors"
    if not path.is_file():
        return
    if learner.reference is None:
        raise InputError(
            f"reference.every: the reference in {folder} has followed the policy, and with 0 it would be the policy "
            "before training again; resume with the reference.every that the run began with"
        )
    learner.reference.load(load_file(path))


def allocation(learner: Learner) -> tuple[dict[str, Tensor], dict[str, list[bool]]]:
    """What an adapter that moves its ranks (AdaLoRA) goes by: importances, averaged over the steps, and ranks now.

    PEFT keeps them beside the model, in the allocator and in the adapter's config. Empty for every other adapter.
    """
    moving = allocator(learner.policy.model)
    if moving is None:
        return {}, {}
    averages = {"importance": moving.exp_avg_ipt, "uncertainty": moving.exp_avg_unc}
    tensors = {
        f"{kind}|{n}": t.detach().cpu().contiguous() for kind, found in averages.items() for n, t in found.items()
    }
    return tensors, dict(moving.peft_config.rank_pattern or {})


def _restore_allocation(folder: Path, learner: Learner, ranks: Mapping[str, list[bool]] | None) -> None:
    moving, path = allocator(learner.policy.model), folder / "allocation.safetensors"
    if moving is None:
        return
    moving.reset_ipt()
    moving.peft_config.rank_pattern = dict(ranks or {}) or None
    for key, tensor in (load_file(path) if path.is_file() else {}).items():
        kind, _, name = key.partition("|")
        averages = {"importance": moving.exp_avg_ipt, "uncertainty": moving.exp_avg_unc}[kind]
        averages[name] = tensor.to(learner.policy.device)
        moving.ipt[name] = torch.zeros_like(averages[name])  # PEFT computes it anew, but begins at 0 without it


def _restore_rates(learner: Learner, saved: Mapping[str, Any]) -> None:
    """Go on at the same point of the schedule; the rate itself is this config's, so that it may be changed."""
    scheduler: Any = learner.scheduler
    place = {key: value for key, value in saved.items() if key not in ("base_lrs", "_last_lr")}
    scheduler.load_state_dict(scheduler.state_dict() | place)
    rates = [
        base * shape(scheduler.last_epoch) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(learner.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def load_trained(folder: Path, learner: Learner, owned: bool = True) -> None:
    """The trained parameters alone. Raises InputError where they are not those of this policy.

    What an algorithm owned is left out where the learner was made without one, as for sampling and export, and with
    `owned` False.
    """
    own = {name: p for name, p in learner.trained().items() if owned or not name.startswith("own.")}
    saved = load_file(folder / "trained.safetensors")
    if not any(name.startswith("own.") for name in own):
        saved = {name: tensor for name, tensor in saved.items() if not name.startswith("own.")}
    if set(saved) != set(own) or any(saved[n].shape != p.shape for n, p in own.items()):
        raise InputError(
            f"{folder}: its parameters are not those of this config's model and adapter; "
            "resume with the model and adapter that the run began with"
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint. Raises InputError where it is not one."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: this is not a checkpoint: {error}") from error


def _split(state: Mapping[Any, Mapping[str, Any]], names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and numbers, both under `parameter|field`."""
    flat = {f"{names[i]}|{field}": value for i, fields in state.items() for field, value in fields.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in flat.items() if not isinstance(value, Tensor)}


def _join(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], names: list[str]) -> dict[int, dict[str, Any]]:
    index = {name: i for i, name in enumerate(names)}
    if lost := {key.rpartition("|")[0] for key in tensors} - set(index):
        raise InputError(f"the checkpoint's optimizer has {min(lost)}, this run has not: resume with its algorithm")
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        name, _, field = key.rpartition("|")
        state.setdefault(index[name], {})[field] = value
    return state


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool | list | type(None)) and not (
        isinstance(value, list) and any(not isinstance(v, int | float) for v in value)
    )


def _flush(folder: Path) -> None:
    """Force every file to the disk, so that the rename never outruns the data."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
