"""A reward held against cases whose answers are known: `rlft audit CONFIG CASES`.

Each row of the cases has a completion, what the reward compares with, and what its verdict should be. What comes out
is how often it is right, each way, and every case where it is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from rlft.rewards.base import Config
from rlft.rows import read
from rlft.settings import load_reward
from rlft.types import InputError, Sample, Task, Trajectory

YES = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SHOWN = 200  # characters of a completion in the table of mistakes


@dataclass(frozen=True)
class Case:
    """One row. good: the verdict should be at least the threshold; None where the row does not say."""

    row: int
    trajectory: Trajectory
    good: bool | None


@dataclass(frozen=True)
class Audit:
    """Cases with their verdicts, None where there was no score, and the seconds it took."""

    cases: list[Case]
    verdicts: list[float | None]
    threshold: float
    seconds: float

    def count(self, good: bool | None, said: bool | None) -> int:
        """How many cases were labelled so, and judged so; None: no label, or no score."""
        return len(self.where(good, said))

    def where(self, good: bool | None, said: bool | None) -> list[int]:
        """Their places."""
        return [i for i, case in enumerate(self.cases) if (case.good, self.said(i)) == (good, said)]

    def said(self, i: int) -> bool | None:
        """Whether a case passed; None where it has no score."""
        verdict = self.verdicts[i]
        return None if verdict is None else verdict >= self.threshold

    @property
    def mistakes(self) -> list[int]:
        """The places of cases that passed and should not have, that did not and should have, or that have no score."""
        return sorted(
            [*self.where(False, True), *self.where(True, False), *self.where(True, None), *self.where(False, None)]
        )


def audit(config: Path, overrides: Sequence[str], file: Path, label: str, threshold: float) -> Audit:
    """Judge all cases. label: the column that says what is right. Raises InputError."""
    reward = load_reward(config, overrides)
    if reward.by_turn or reward.directed or reward.pays:
        raise InputError(
            "reward: what pays on the way, or by a direction, has no one verdict; audit the reward inside it"
        )
    cases = read_cases(file, label)
    for case in cases:
        reward.check(case.trajectory.task)
    begun = time.perf_counter()
    verdicts = asyncio.run(_judge(reward, cases))
    return Audit(cases, verdicts, threshold, time.perf_counter() - begun)


def read_cases(file: Path, label: str) -> list[Case]:
    """Rows of a file (JSON lines or parquet). `completion` is judged; `prompt` may be left out; the label is true,
    false, or a number that is 0 or not. Raises InputError."""
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    return [_case(number, row, label, file) for number, row in enumerate(read(str(file)), 1)]


def _case(number: int, row: Mapping[str, Any], label: str, file: Path) -> Case:
    said = row.get("completion")
    if not isinstance(said, str):
        raise InputError(f"{file}, row {number}: `completion` is missing or no text, and that is what is judged")
    prompt = row.get("prompt") or ""
    asked = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else tuple(prompt)
    info = {key: value for key, value in row.items() if key not in ("prompt", "completion", label)}
    tokens = len(said.split())  # for rewards that go by length: there is no tokenizer here
    mask = [False] + [True] * tokens
    sample = Sample([0] * len(mask), mask, [0.0] * len(mask), [0.0] * len(mask), version=0)
    messages = (*asked, {"role": "assistant", "content": said})
    return Case(
        number, Trajectory(Task(f"row-{number}", asked, info), messages, [sample]), _good(row, label, file, number)
    )


def _good(row: Mapping[str, Any], label: str, file: Path, number: int) -> bool | None:
    value = row.get(label)
    if value is None:
        return None
    good = value if isinstance(value, bool) else YES.get(str(value).lower())
    if good is None:
        raise InputError(
            f"{file}, row {number}: `{label}` holds {value!r}; say true or false, or name the column with --label"
        )
    return good


async def _judge(reward: Config, cases: Sequence[Case]) -> list[float | None]:
    """Cases of one prompt in a row are a group, as they would be in a run."""
    judge = reward.build()
    groups = [list(some) for _, some in groupby(cases, lambda case: (case.trajectory.task.messages, _info(case)))]
    found: list[float | None] = []
    for some in track(groups, "judging", console=Console(stderr=True), disable=not Console(stderr=True).is_terminal):
        found += await judge(tuple(case.trajectory for case in some))
    return found


def _info(case: Case) -> str:
    return repr(case.trajectory.task.info)


def show(done: Audit, console: Console, most: int) -> None:
    """The confusion matrix, the rates, and up to `most` of the mistakes."""
    table = Table("", "passed", "did not pass", "no score", title=f"verdicts of {done.threshold:g} and more pass")
    for good, name in ((True, "should pass"), (False, "should not"), (None, "no label")):
        counts = [done.count(good, said) for said in (True, False, None)]
        if any(counts):
            table.add_row(name, *map(str, counts))
    console.print(table)
    right, wrong = ([done.count(good, said) for said in (True, False, None)] for good in (True, False))
    console.print(f"false accepts {_share(wrong[0], sum(wrong))}, false rejects {_share(right[1], sum(right))}, "
                  f"no score {_share(done.verdicts.count(None), len(done.verdicts))}, "
                  f"{len(done.cases) / max(done.seconds, 1e-9):.0f} cases/s")  # fmt: skip
    if not done.mistakes:
        return
    listed = Table("row", "should be", "verdict", "completion, its end", title="mistakes")
    for i in done.mistakes[:most]:
        case, verdict = done.cases[i], done.verdicts[i]
        failures = "; ".join(failure.said for failure in case.trajectory.failures)
        said = "no score" + f": {failures}" * bool(failures) if verdict is None else f"{verdict:g}"
        listed.add_row(str(case.row), str(case.good).lower(), said, Text(case.trajectory.completion[-SHOWN:]))
    console.print(listed)
    if len(done.mistakes) > most:
        console.print(f"and {len(done.mistakes) - most} more; --most shows them")


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.1%})" if whole else "0 of 0"
