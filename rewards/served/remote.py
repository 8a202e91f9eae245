"""A reward that is judged elsewhere, by `rlft serve-reward`: same verdicts, metrics and failures as if it ran here.

A grader that fails there is the failure that it would have been here, and so is a server that does not answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from rlft.rewards.base import Config, scored
from rlft.rewards.judges.line import Line, Refused, Server
from rlft.rewards.served import wire
from rlft.types import Failure, Group, InputError, Reward, RunError

ERRORS: dict[str, type[Exception]] = {"InputError": InputError, "RunError": RunError}
Judged = tuple[float | None, dict[str, float], list[Failure]]


class Remote(Config, Server):
    """What a reward on another machine says, served there by `rlft serve-reward`."""

    type: Literal["remote"] = "remote"
    terms: list[str] = Field(
        default_factory=list,
        description="Where the server's reward is a sum: the names of its terms, as the server prints them. Then they "
        "are logged, and may be named in eval.accuracy, as those of a sum in this config.",
    )

    def build(self, name: str | None = None) -> Reward:
        line = self.line()
        known = [name or self.type, *self.components(name)]

        async def reward(group: Group) -> list[float | None]:
            if not group:
                return []
            for trajectory in group:  # of an earlier judgement
                trajectory.failures = [failure for failure in trajectory.failures if failure.reward not in known]
                for component in known:
                    trajectory.metrics.pop(f"reward/{component}", None)
            try:
                judged = await self._judged(line, group, name)
            except (InputError, RunError):
                raise
            except Exception as error:
                return list(await scored(_failing(error), name or self.type)(group))
            for trajectory, (_, metrics, failures) in zip(group, judged, strict=True):
                trajectory.metrics.update(metrics)
                trajectory.failures.extend(failures)
            return [None if verdict is None else self.weight * verdict for verdict, _, _ in judged]

        return reward

    def components(self, name: str | None = None) -> list[str]:
        if not self.terms:
            return super().components(name)
        return [name, *(f"{name}/{term}" for term in self.terms)] if name else list(self.terms)

    async def _judged(self, line: Line, group: Group, name: str | None) -> list[Judged]:
        """What the server says of each trajectory, in this run's names."""
        body = json.dumps({"groups": [wire.write(group)]}).encode()
        try:
            answer = await line.post("score", body)
        except Refused as refused:
            raise _meant(refused) from refused
        if self.terms and self.terms != answer["terms"]:
            raise InputError(
                f"terms: the reward at {self.url} has the terms [{', '.join(answer['terms'])}], and this config names "
                f"[{', '.join(self.terms)}]; make them the same"
            )
        (said,) = answer["groups"]
        own = "" if self.terms and not name else name or self.type
        rows = zip(group, said["verdicts"], said["metrics"], said["failures"], strict=True)
        return [
            (_verdict(verdict), _metrics(metrics, own), wire.failures(failed, own))
            for _, verdict, metrics, failed in rows
        ]


def _verdict(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"the server's verdict is {value!r}, not a finite number or null")
    return float(value)


def _metrics(plain: Mapping[str, float], name: str) -> dict[str, float]:
    """Those of the server under this run's names. At the top a sum is the score itself and no component."""
    found: dict[str, float] = {}
    for key, value in plain.items():
        component = key.removeprefix("reward/")
        if component.partition("/")[0] == wire.NAME:
            component = wire.renamed(component, name)
        if component:
            found[f"reward/{component}"] = float(value)
    return found


def _meant(refused: Refused) -> Exception:
    """What the server's error is here: one that means the run, or a failure of this group."""
    try:
        said = json.loads(refused.body)
        return ERRORS[said["error"]](f"the reward's server: {said['said']}")
    except (ValueError, KeyError, TypeError):
        return refused


def _failing(error: Exception) -> Reward:
    async def judge(group: Group) -> Sequence[float | None]:
        raise error

    return judge
