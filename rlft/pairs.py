"""Recorded data from the policy's own scored samples: preference pairs, labelled answers, scored answers.

Of a run, what it sampled while it trained; of a config, what its model says before any training. Nothing is made up:
an answer's score is the one that the config's reward gave it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlft.build import assemble
from rlft.checkpoint import disk_errors
from rlft.material import Material, material
from rlft.session import of_run
from rlft.settings import load
from rlft.types import ROUNDING, Group, InputError, RunError, Task, least
from rlft.whole import replacing


@dataclass(frozen=True)
class Answered:
    """One task with its answers and their scores. cut: how many more were cut off at the limit of tokens."""

    task: Task
    answers: Sequence[tuple[str, float]]
    cut: int = 0


Row = dict[str, Any]


def pairs(one: Answered, margin: float) -> list[Row]:
    """The best against the worst answer, if their scores are at least `margin` apart; the earlier wins a tie."""
    best, worst = max(one.answers, key=lambda a: a[1]), min(one.answers, key=lambda a: a[1])
    if not _apart(best[1], worst[1], margin):
        return []
    said = {"chosen": best[0], "rejected": worst[0], "chosen_score": best[1], "rejected_score": worst[1]}
    return [_prompt(one.task) | said]


def labels(one: Answered, margin: float) -> list[Row]:
    """Every answer with whether it is good: the best score of its task, and at least `margin` above the worst."""
    scores = [score for _, score in one.answers]
    if not _apart(max(scores), min(scores), margin):
        return []
    good = least(max(scores))
    return [_prompt(one.task) | {"completion": said, "label": score >= good} for said, score in one.answers]


def scored(one: Answered, margin: float) -> list[Row]:
    """All answers of a task with their scores."""
    return [_prompt(one.task) | {"completions": [a for a, _ in one.answers], "scores": [s for _, s in one.answers]}]


KINDS: dict[str, Callable[[Answered, float], list[Row]]] = {"pairs": pairs, "labels": labels, "scored": scored}


def write(path: Path, to: Path, overrides: Sequence[str], kind: str, margin: float, steps: int) -> str:
    """Write JSONL to `to`; says how much came of how much. Raises InputError and RunError."""
    if kind not in KINDS:
        raise InputError(f"--kind: there is no kind {kind!r}; it is one of {', '.join(KINDS)}")
    if to.exists():
        raise InputError(f"--to: {to} exists already; choose a new file")
    found = list(_recorded(path) if path.is_dir() else asyncio.run(_sampled(load(path, overrides), steps)))
    answered = [one for one in found if one.answers]
    if not answered and (cut := sum(one.cut for one in found)):
        raise RunError(
            f"no {kind}: all {cut} answers were cut off, and a part of an answer is no example; "
            "raise rollout.sampling.max_tokens"
        )
    kept = [one for one in answered if all(said.strip() for said, _ in one.answers)]
    rows = [row for one in kept for row in KINDS[kind](one, margin)]
    if not rows:
        raise RunError(
            f"no {kind}: of {len(answered)} groups none has scores that differ by {margin:g} or more. Sample hotter, "
            "sample more per task (rollout.group_size), or lower --margin."
        )
    to.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(to), replacing(to) as scratch:
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return f"{len(rows)} rows of {kind} from {len(answered)} groups in {to}"


def _apart(best: float, worst: float, margin: float) -> bool:
    return best - worst >= max(least(margin), ROUNDING)


def _prompt(task: Task) -> Row:
    """A single user message as text, else the messages."""
    messages = [dict(m) for m in task.messages]
    plain = len(messages) == 1 and messages[0]["role"] == "user"
    return {"prompt": messages[0]["content"] if plain else messages, "task_id": task.id}


async def _sampled(config: Any, steps: int) -> list[Answered]:
    """What the config's model answers before training."""
    stuff = material(config)
    if not config.online:
        raise InputError("algorithm.type: pairs are made of samples; give a config that samples, or a run of one")
    parts = await asyncio.to_thread(assemble, stuff, None)
    try:
        await parts.serve(0)
        groups: list[Group] = []
        for step in range(steps):
            groups += await parts.source.next()
            print(f"\rsampled {step + 1} of {steps} steps", end="", flush=True)
        print()
    finally:
        await parts.close()
    return [Answered(group[0].task, _said(group), sum(_cut(t.drawn, t.finish) for t in group)) for group in groups]


def _cut(drawn: int | None, finish: str) -> bool:
    """The policy's own answer that did not end."""
    return not drawn and finish == "length"


def _said(group: Group) -> list[tuple[str, float]]:
    """The policy's own answers; not those of others beside them, nor what it said to another prompt."""
    own = [t for t in group if not t.drawn]
    return [(t.completion, t.total) for t in own if t.total is not None and t.finish != "length"]


def _recorded(run: Path) -> Iterable[Answered]:
    """What a run sampled, read from its rollouts."""
    stuff: Material = material(of_run(run))
    tasks = {task.id: task for task in stuff.tasks}
    files = sorted((run / "rollouts").glob("step-*.parquet"))
    if not files or not tasks:
        raise InputError(f"{run} has sampled nothing; run it first, or give a config that samples")
    for file in files:
        groups: dict[int, dict[int, Row]] = {}
        for row in pq.read_table(file).to_pylist():
            groups.setdefault(row["group"], {})[row["trajectory"]] = row
        for group in groups.values():
            own = [r for r in group.values() if not r.get("drawn")]
            rows = [r for r in own if r["score"] is not None and r["finish"] != "length"]
            task = tasks.get(own[0]["task_id"]) if own else None
            if task is not None:
                cut = sum(_cut(None, r["finish"]) for r in own)
                yield Answered(task, [(r["completion"], r["score"]) for r in rows], cut)
