"""Trajectories and verdicts as JSON, for graders that live elsewhere.

What a reward may look at travels: the task with its columns, the conversation, the tokens and who chose them, turns,
finish. Log-probs do not. Verdicts come back with everything that judging writes to a trajectory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlft.types import NAN, Failure, Group, InputError, Said, Sample, Task, Trajectory

NAME = "served"  # of the reward on the server, in the names of metrics and failures


def write(group: Group) -> dict[str, Any]:
    """A group as plain values. Raises InputError where a column of its task is nothing that JSON has."""
    task = group[0].task
    about = {"id": task.id, "messages": [dict(message) for message in task.messages]}
    info = {str(name): _plain(value, task, str(name)) for name, value in task.info.items()}
    return {"task": about | {"info": info}, "trajectories": [_written(trajectory) for trajectory in group]}


def read(plain: Mapping[str, Any]) -> Group:
    """A group from plain values; log-probs are NaN. Raises KeyError, TypeError or ValueError where it is none."""
    about = plain["task"]
    task = Task(str(about["id"]), tuple(about["messages"]), dict(about["info"]))
    return tuple(_read(task, one) for one in plain["trajectories"])


def judgement(group: Group, verdicts: Sequence[float | None]) -> dict[str, Any]:
    """What judging gave: verdicts, and what it wrote to the trajectories."""
    return {
        "verdicts": list(verdicts),
        "metrics": [{key: value for key, value in t.metrics.items() if key.startswith("reward/")} for t in group],
        "failures": [[vars(failure) for failure in t.failures] for t in group],
    }


def _written(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "messages": [dict(message) for message in trajectory.messages],
        "samples": [
            {
                "tokens": s.tokens,
                "mask": list(map(int, s.mask)),
                "rewards": s.rewards,
                "version": s.version,
                "agent": s.agent,
            }
            for s in trajectory.samples
        ],
        "metrics": {key: value for key, value in trajectory.metrics.items() if not key.startswith("reward/")},
        "finish": trajectory.finish,
        "drawn": trajectory.drawn,
        "user": trajectory.user,
        "said": [_turn(turn, trajectory) for turn in trajectory.said],
    }


def _turn(turn: Said, trajectory: Trajectory) -> dict[str, Any]:
    """A turn's conversation is usually the beginning of the whole one, and then only its length travels."""
    count = len(turn.messages)
    begins = tuple(trajectory.messages[:count]) == tuple(turn.messages)
    return {"messages": count if begins else [dict(m) for m in turn.messages], "sample": turn.sample, "end": turn.end}


def _read(task: Task, plain: Mapping[str, Any]) -> Trajectory:
    messages = tuple(plain["messages"])
    samples = [
        Sample(
            s["tokens"], [bool(x) for x in s["mask"]], [NAN] * len(s["tokens"]), s["rewards"], s["version"], s["agent"]
        )
        for s in plain["samples"]
    ]
    said = []
    for turn in plain["said"]:
        upto = turn["messages"]
        said.append(Said(messages[:upto] if isinstance(upto, int) else tuple(upto), turn["sample"], turn["end"]))
    own = {"finish": plain["finish"], "drawn": plain["drawn"], "user": plain["user"], "metrics": dict(plain["metrics"])}
    return Trajectory(task, messages, samples, said=tuple(said), **own)


def failures(plain: Sequence[Mapping[str, Any]], name: str) -> list[Failure]:
    """Failures as they came, under the client's name. Raises TypeError or KeyError where they are none."""
    return [Failure(renamed(str(one["reward"]), name) or NAME, one["kind"], one["said"], one["trace"]) for one in plain]


def renamed(component: str, name: str) -> str:
    """A component of the server's reward, called `served` or `served/...`, under the client's name; "" is the top."""
    below = component.removeprefix(NAME).removeprefix("/")
    return "/".join(filter(None, (name, below)))


def _plain(value: Any, task: Task, column: str) -> Any:
    """A column's value as JSON has it: arrays and numbers of NumPy become lists and numbers."""
    try:
        return json.loads(json.dumps(value, default=lambda odd: odd.tolist()))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"task '{task.id}': column '{column}' holds a {type(value).__name__}, which cannot be sent to the server "
            f"of the reward ({error}). Turn it into text or numbers in the data, or judge in the run's own process."
        ) from error
