"""Runs in whose middle a reward fails, and what they leave on disk: shared by the tests of rewards' faults."""

from __future__ import annotations

import io
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rlft.faults import FILE
from rlft.rewards.base import Config
from rlft.session import begin
from rlft.settings import validate
from rlft.source import Deck
from rlft.terminal import Terminal
from rlft.types import Group, Reward, Trajectory

Row = dict[str, Any]
KINDS = {"raise": "raised", "hang": "timeout", "nan": "nan", "inf": "value", "text": "value"}  # `none` is no failure
SEED = 0
SECOND = 1  # the trajectory of a group that a fault is about
released = threading.Event()  # lets go of the threads that hang
hooks: dict[str, Callable[[], Any]] = {}  # what a test wants done where a task with that fault is judged
_calls: defaultdict[str, Counter[str]] = defaultdict(Counter)


def low(trajectory: Trajectory) -> float:
    """A verdict on what a tiny model says."""
    said = [t for s in trajectory.samples for t, chosen in zip(s.tokens, s.mask, strict=True) if chosen]
    return sum(token < 100 for token in said) / len(said)


def breaks(trajectory: Trajectory, run: str, base: float = 0.0) -> Any:
    """A `custom` reward that fails on the second answer to a task, in the way that the task's column `fault` says.

    `later`: it fails on all but the first four, which are the group's own. base: added to every verdict.
    """
    number = _calls[run][trajectory.task.id]
    _calls[run][trajectory.task.id] += 1
    fault = trajectory.task.info.get("fault")
    if fault == "later" and number > 3:
        raise ValueError("the grader fell over")
    if number != SECOND or not fault:
        return base + low(trajectory)
    if fault == "raise":
        raise ValueError("the grader fell over")
    if fault == "hang":
        released.wait(600)
    return {"nan": float("nan"), "inf": float("inf"), "text": "good", "none": None}.get(fault, base + low(trajectory))


def hooked(group: Group) -> list[float]:
    """A `custom` reward per group that lets a test do something just before other rewards are asked."""
    act = hooks.get(str(group[0].task.info.get("fault")))
    if act is not None:
        act()
    return [1.0] * len(group)


def grader(run: str, seconds: float = 0.6, **options: Any) -> Row:
    """The block of a reward by `breaks`. run: any name, new for each run, under which calls are counted."""
    own = {"type": "custom", "path": "tests.faulty:breaks", "threads": 1, "seconds": seconds}
    return own | {"options": {"run": run, **options}}


@dataclass
class Left:
    """What a run left. played: the trajectories, step by step; lines: of failures.jsonl; metrics: by step."""

    folder: Path
    said: str
    lines: list[Row] = field(default_factory=list)
    metrics: dict[int, Row] = field(default_factory=dict)
    played: dict[int, list[Row]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, said: str = "") -> Left:
        left = cls(folder, said)
        if (folder / FILE).is_file():
            left.lines = [json.loads(line) for line in (folder / FILE).read_text().splitlines()]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        left.metrics = {row["step"]: row for row in rows if row["step"]}  # the row of step 0 is an evaluation's
        for step in left.metrics:
            left.played[step] = pq.read_table(folder / f"rollouts/step-{step:06d}.parquet").to_pylist()
        return left

    def failed(self) -> Counter[tuple[str, str, str]]:
        """(component, kind, the task's fault) of each line."""
        return Counter((line["reward"], line["kind"], fault_of(line)) for line in self.lines)

    def scores(self, fault: str) -> list[float | None]:
        """Of all answers to the tasks with a fault, in the order in which they were drawn."""
        return [row["score"] for rows in self.played.values() for row in rows if fault_of(row) == fault]

    def whole(self, without: Mapping[str, int]) -> None:
        """Every step says of itself what its trajectories are, and what has no score counts nowhere.

        without: by fault, how many trajectories of each task with it must have no score; all others have one.
        """
        for step, rows in self.played.items():
            metrics, lines = self.metrics[step], [line for line in self.lines if line["step"] == step]
            scores = [row["score"] for row in rows if row["score"] is not None]
            missing = sum(without.get(fault_of(row), 0) for row in rows) / self._size(rows)
            assert len(rows) - len(scores) == missing
            assert metrics["reward/missing"] == pytest.approx(missing / len(rows))
            # A line for each component that failed; counted are trajectories, once for each kind of failure.
            kinds = {(line["prompt"], line["completion"], line["kind"]) for line in lines}
            failing = {(prompt, completion) for prompt, completion, _ in kinds}
            assert round(metrics.get("reward/failed", 0) * len(rows)) == len(failing)
            for kind, count in Counter(kind for *_, kind in kinds).items():
                assert metrics[f"reward/failures/{kind}"] == count
            if scores:
                assert metrics["reward/mean"] == pytest.approx(sum(scores) / len(scores)), "no failure is a zero"
            for row in rows:
                assert (row["advantage"] is None) == (row["score"] is None), "out of the loss"
            for line in lines:
                assert any((line["task_id"], line["completion"]) == (row["task_id"], row["completion"]) for row in rows)

    @staticmethod
    def _size(rows: Sequence[Row]) -> int:
        return max(Counter(row["task_id"] for row in rows).values())


def fault_of(row: Row) -> str:
    """The fault of a task, which its prompt ends on: see `written`."""
    return " ".join(row["prompt"].split()[2:])


def written(folder: Path, faults: Sequence[str], **columns: Any) -> Path:
    """A file with a task for each fault, whose prompt ends on it; a run draws them in the order given here.

    columns: a value for all tasks, or a list with each one's.
    """
    path, deck = folder / "train.jsonl", Deck(len(faults), SEED)
    lines = [""] * len(faults)
    for i, fault in enumerate(faults):
        own = {key: value[i] if isinstance(value, list) else value for key, value in columns.items()}
        lines[deck.at(i)] = json.dumps({"ask": f"Say {i} {fault}".strip(), "fault": fault} | own) + "\n"
    path.write_text("".join(lines))
    return path


def config(model: Path, folder: Path, reward: Row | None, tasks: int, **changes: Any) -> Any:
    """A run over all tasks of the file that `written` left in the folder, `tasks` of them a step.

    changes: keys of the config, with two underscores for each dot; group_size: trajectories of each task.
    """
    count = len((folder / "train.jsonl").read_text().splitlines())
    plain: Row = {
        "name": "faulty",
        "steps": count // tasks,
        "seed": SEED,
        "out": str(folder / "run"),
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": str(folder / "train.jsonl"), "columns": {"prompt": "ask"}},
        "reward": reward,
        "faults": {"reward": 1.0},
        "rollout": {
            "engine": {"type": "local"},
            "tasks_per_step": tasks,
            "group_size": changes.pop("group_size", 4),
            "sampling": {"max_tokens": 6},
        },
        "algorithm": {"type": "grpo"},
        "checkpoint": {"every": 0},
        "show": {"every": 0},
    }
    for dotted, value in changes.items():
        *path, leaf = dotted.split("__")
        block: Any = plain
        for part in path:
            block = block.setdefault(part, {})
        block[leaf] = value
    return validate(plain)


def run(made: Any) -> Left:
    """Train to the end, which must be a good one."""
    said = io.StringIO()
    assert begin(made, Terminal(Console(file=said, width=500))) == 0
    return Left.of(Path(made.out), said.getvalue())


def speaks(patch: pytest.MonkeyPatch, kind: type[Config], text: Callable[[Mapping[str, Any], int], str]) -> None:
    """Put words into the mouth of a model that has none: the real judge of a kind reads them in a real run.

    text: from the task's columns and the trajectory's place in its group, what was said.
    """
    plain = kind.judge

    def judge(self: Config, name: str) -> Reward:
        inner = plain(self, name)

        async def judged(group: Group) -> Sequence[Any]:
            return await inner(tuple(_saying(t, text(t.task.info, i)) for i, t in enumerate(group)))

        return judged

    patch.setattr(kind, "judge", judge)


def _saying(trajectory: Trajectory, text: str) -> Trajectory:
    return replace(trajectory, messages=(*trajectory.task.messages, {"role": "assistant", "content": text}))


def children(word: str) -> list[int]:
    """Processes of this one whose command has a word in it, and that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if word in command and parent == str(os.getpid()):
                found.append(int(folder.name))
    return found


@contextmanager
def acting(acts: Mapping[str, Callable[[], Any]]) -> Iterator[None]:
    """While the block runs, what `hooked` does where a task with that fault comes."""
    hooks.update(acts)
    try:
        yield
    finally:
        hooks.clear()
