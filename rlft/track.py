"""What a run leaves to be read: metrics.jsonl, trajectories in Parquet, and any tracker that accelerate knows."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlft.types import Group, InputError, Message, Said, Sample, Task, Trajectory
from rlft.whole import replacing

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("trajectory", pa.int64()),
        ("sample", pa.int64()),
        ("task_id", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.bool_())),
        ("logprobs", pa.list_(pa.float32())),
        ("rewards", pa.map_(pa.string(), pa.float64())),
        ("score", pa.float64()),
        ("advantage", pa.float64()),
        ("finish", pa.string()),
        ("version", pa.int64()),
        ("drawn", pa.int64()),
        ("agent", pa.int64()),
        ("role", pa.int64()),
        ("token_rewards", pa.list_(pa.float64())),
        ("episode", pa.string()),
    ]
)


def summary(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths of the policy's own samples; a component is averaged over those that have it."""
    trajectories = [t for group in groups for t in group if not t.drawn]
    scores = [t.total for t in trajectories if t.total is not None]
    n = max(len(trajectories), 1)
    mean = sum(scores) / len(scores) if scores else math.nan
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores)) if scores else math.nan
    metrics = {"reward/mean": mean, "reward/std": spread, "reward/missing": (n - len(scores)) / n}
    kinds = Counter(kind for t in trajectories for kind in {failure.kind for failure in t.failures})
    if kinds:
        metrics["reward/failed"] = sum(bool(t.failures) for t in trajectories) / n
        metrics |= {f"reward/failures/{kind}": float(count) for kind, count in sorted(kinds.items())}
    for name in sorted({key for t in trajectories for key in t.metrics} - {"reward/missing", "advantage/mean"}):
        values = [t.metrics[name] for t in trajectories if name in t.metrics]
        metrics[name] = sum(values) / len(values)
    metrics["completion/tokens_mean"] = sum(t.length for t in trajectories) / n
    metrics["completion/truncated"] = sum(t.finish == "length" for t in trajectories) / n
    return metrics | _of_episodes(trajectories) | _by_agent(trajectories)


def _of_episodes(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Turns of an episode, and the share that each limit cut, where there are several turns."""
    turns = [len(t.said) for t in trajectories if t.said]
    if max(turns, default=0) < 2 and not any(t.failed for t in trajectories):
        return {}
    cuts = Counter(t.cut for t in trajectories if t.cut)
    shares = {f"env/cut/{limit}": count / len(trajectories) for limit, count in sorted(cuts.items())}
    return {"env/turns": sum(turns) / max(len(turns), 1), **shares}


def _by_agent(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Where several agents spoke: the mean total of the episodes each spoke in, and what its own turns were paid."""
    spoken: dict[int, dict[int, list[Sample]]] = {}
    for i, trajectory in enumerate(trajectories):
        for sample in trajectory.samples:
            spoken.setdefault(sample.agent, {}).setdefault(i, []).append(sample)
    metrics: dict[str, float] = {}
    for agent, episodes in sorted(spoken.items()) if len(spoken) > 1 else ():
        scores = [score for i in episodes if (score := trajectories[i].total) is not None]
        paid = sum(sum(sample.rewards) for samples in episodes.values() for sample in samples)
        metrics[f"agent/{agent}/score"] = sum(scores) / len(scores) if scores else math.nan
        metrics[f"agent/{agent}/paid"] = paid / len(episodes)
    return metrics


class Record:
    """Writes into a run's folder: whole lines, whole files. lost: is told which tracker failed, and why."""

    def __init__(
        self, folder: Path, trackers: Sequence[Any] = (), lost: Callable[[str, str], None] = lambda name, why: None
    ) -> None:
        self.folder = folder
        self._trackers = list(trackers)
        self._lost = lost

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl. A line that cannot be written whole is not written."""
        row = {"step": step} | {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        append_line(self.folder / "metrics.jsonl", json.dumps(row))
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        self._tell(lambda tracker: tracker.log(finite, step=step))

    def cut(self, step: int) -> None:
        """Drop what was recorded after `step`, whose steps will be taken again, and half a line that a kill left.

        A run that begins again at step 0 measures that step again too. metrics.jsonl is replaced as a whole.
        """
        for path in [*self.folder.glob("rollouts/step-*.parquet"), *self.folder.glob("eval/step-*.parquet")]:
            if not step or int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and step and json.loads(line)["step"] <= step]
        with replacing(path) as scratch, scratch.open("wb") as file:
            file.write(b"".join(kept))
            file.flush()
            os.fsync(file.fileno())

    def trajectories(self, kind: str, step: int, groups: Sequence[Group]) -> None:
        """`<kind>/step-n.parquet`, one row per sample."""
        rows = [row for g, group in enumerate(groups) for row in _rows(step, g, group)]
        path = self.folder / kind / f"step-{step:06d}.parquet"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as scratch:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), scratch)

    def scores(self, kind: str, step: int) -> dict[str, float]:
        """The scores in `<kind>/step-n.parquet` by task; empty where there is no such file."""
        path = self.folder / kind / f"step-{step:06d}.parquet"
        if not path.is_file():
            return {}
        rows = pq.read_table(path, columns=["task_id", "score"]).to_pylist()
        return {row["task_id"]: row["score"] for row in rows if row["score"] is not None}

    def close(self) -> None:
        """Let the trackers finish."""
        self._tell(lambda tracker: tracker.finish())

    def _tell(self, what: Callable[[Any], Any]) -> None:
        """To every tracker. One that fails, whatever its library raises, is told nothing more and costs no run."""
        for tracker in tuple(self._trackers):
            try:
                what(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                self._lost(str(getattr(tracker, "name", type(tracker).__name__)), f"{type(error).__name__}: {error}")


def append_line(path: Path, line: str) -> None:
    """Append a whole line or nothing."""
    data = line.encode() + b"\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(28, "No space left on device", str(path))
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def trackers(names: Sequence[str], project: str, folder: Path, config: dict[str, Any]) -> list[Any]:
    """accelerate's trackers by name; wandb without a login runs offline. Raises InputError for a missing package."""
    if not names:
        return []
    import accelerate
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import LoggerType

    accelerate.PartialState()  # the trackers ask it whether this is the main process
    if "wandb" in names and not os.environ.get("WANDB_MODE") and not _logged_in():
        os.environ["WANDB_MODE"] = "offline"
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DIR", str(folder))
    made = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS[str(LoggerType(name))]
        try:
            made.append(kind(project, logging_dir=str(folder)) if kind.requires_logging_directory else kind(project))
            made[-1].start() if hasattr(made[-1], "start") else None
            made[-1].store_init_configuration(_flat(config))
        except (ImportError, NameError, AttributeError) as error:
            raise InputError(
                f"track: {name} is not installed ({error}). Install it: pip install {name.replace('_', '-')}"
            ) from error
    return made


def _logged_in() -> bool:
    netrc = Path.home() / ".netrc"
    return bool(os.environ.get("WANDB_API_KEY")) or (netrc.is_file() and "wandb" in netrc.read_text(errors="ignore"))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys with plain values, which every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | bool) else str(value)
    return flat


def _rows(step: int, g: int, group: Group) -> list[dict[str, Any]]:
    rows = []
    for i, trajectory in enumerate(group):
        last = {turn.sample: turn.text for turn in trajectory.said}
        for j, sample in enumerate(trajectory.samples):
            rows.append(
                {
                    "step": step,
                    "group": g,
                    "trajectory": i,
                    "sample": j,
                    "task_id": trajectory.task.id,
                    "prompt": prompt_of(trajectory.task),
                    "completion": last.get(j, trajectory.completion),
                    "tokens": sample.tokens,
                    "mask": sample.mask,
                    "logprobs": sample.logprobs,
                    "rewards": [(k[7:], v) for k, v in trajectory.metrics.items() if k.startswith("reward/")],
                    "score": trajectory.total,
                    "advantage": trajectory.metrics.get("advantage/mean"),
                    "finish": trajectory.finish,
                    "version": sample.version,
                    "drawn": trajectory.drawn,
                    "agent": sample.agent,
                    "role": sample.role,
                    "token_rewards": sample.rewards,
                    "episode": _episode(trajectory) if j == 0 else None,
                }
            )
    return rows


def _sample(row: Mapping[str, Any]) -> Sample:
    lists = (row["tokens"], row["mask"], row["logprobs"], row["token_rewards"])
    return Sample(*lists, row["version"], row["agent"], row["role"])


def _episode(trajectory: Trajectory) -> str:
    """What of a trajectory no other column holds, as JSON; a turn's messages as their number where that tells all."""

    def short(messages: Sequence[Message]) -> int | list[Message]:
        prefix = trajectory.messages[: len(messages)] == tuple(messages)
        return len(messages) if prefix else [dict(message) for message in messages]

    return json.dumps(
        {
            "messages": [dict(message) for message in trajectory.messages],
            "said": [[short(turn.messages), turn.sample, turn.end, turn.finish] for turn in trajectory.said],
            "paid": trajectory.paid,
            "verdict": trajectory.score,
        },
        ensure_ascii=False,
        default=str,
    )


def read_groups(file: Path, tasks: Mapping[str, Task]) -> list[Group]:
    """The groups that `Record.trajectories` wrote, as they were: tokens, rewards, turns, scores.

    tasks: by id, as the config's data gives them. Raises InputError where they are not those that were played, and for
    a file without the columns that it takes. `advantage/mean` stands in the metrics of what was trained on.
    """
    table = pq.read_table(file)
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise InputError(f"{file}: there is no column {missing[0]!r}; it was written by an earlier version of rlft")
    plays: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for row in table.to_pylist():
        plays.setdefault(row["group"], {}).setdefault(row["trajectory"], []).append(row)
    return [tuple(_trajectory(file, rows, tasks) for rows in group.values()) for group in plays.values()]


def _trajectory(file: Path, rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task]) -> Trajectory:
    first = rows[0]
    task = tasks.get(first["task_id"])
    if task is None or prompt_of(task) != first["prompt"]:
        what = "is gone from" if task is None else "has another prompt in"
        raise InputError(f"{file}: task {first['task_id']} {what} data.train, which has changed since the run")
    episode = json.loads(first["episode"])
    messages = tuple(episode["messages"])

    def long(short: int | list[Message]) -> tuple[Message, ...]:
        return messages[:short] if isinstance(short, int) else tuple(short)

    metrics = {f"reward/{name}": value for name, value in first["rewards"]}
    if first["advantage"] is not None:
        metrics["advantage/mean"] = first["advantage"]
    return Trajectory(
        task,
        messages,
        [_sample(row) for row in rows],
        episode["verdict"],
        metrics,
        first["finish"],
        first["drawn"],
        said=tuple(Said(long(short), *place) for short, *place in episode["said"]),
        paid={name: [(i, j, amount) for i, j, amount in some] for name, some in episode["paid"].items()},
    )


def prompt_of(task: Task) -> str:
    """The prompt as one text, as it is recorded."""
    return "\n".join(str(message["content"]) for message in task.messages)
