"""Where a step goes: one step of a session is watched, by phase and by operator (`profile: true`).

The second step, since the first one also warms up; the first where there is no other. Its trace opens in a browser, at
ui.perfetto.dev or chrome://tracing; phases are spans in it, among torch's operators.
"""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from rlft.spans import PREFIX, span
from rlft.trainer import Run
from rlft.types import Group
from rlft.whole import replacing

WATCHED, SHOWN = 2, 3  # the step of the session, and operators per phase


@dataclass
class Profile:
    """Watches one step. steps: how many the session has."""

    folder: Path
    steps: int
    say: Callable[[str], None]
    _step: int = 0
    _number: int = 0
    _profiler: Any = None

    def begin(self, step: int) -> None:
        """A step of the session begins."""
        self._step += 1
        if self._step == min(WATCHED, self.steps):
            self._number = step
            self._profiler = profile(activities=[ProfilerActivity.CPU, *_cuda()])
            self._profiler.__enter__()

    @property
    def watching(self) -> bool:
        """The step in hand is the one."""
        return self._profiler is not None

    def end(self) -> None:
        """It has ended: write and tell, if it was the one."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        path = self.folder / "profile" / f"step-{self._number:06d}.json.gz"
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as scratch:
            plain = scratch.with_suffix(".plain")
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(scratch, "wb", 3) as into:
                shutil.copyfileobj(source, into)
            plain.unlink()
        self.say(told(self._number, path, _events(profiler)))


@dataclass
class ProfiledRun(Run):
    """A run whose second step is watched."""

    profile: Profile | None = field(default=None)

    async def draw(self) -> list[Group]:
        """See Run."""
        assert self.profile is not None
        self.profile.begin((self.complete or 0) + 1)
        with span("sample and score"):
            return await super().draw()

    async def apart(self, update: Callable[[], dict[str, float]]) -> dict[str, float]:
        """See Run; in this thread while it is watched, since the profiler sees no other: that step overlaps nothing."""
        assert self.profile is not None
        return update() if self.profile.watching else await super().apart(update)

    async def learn(self, chosen: list[Group]) -> dict[str, float]:
        """See Run."""
        with span("learn"):
            return await super().learn(chosen)


def watched_sync(
    profile: Profile, sync: Callable[[int], Awaitable[dict[str, float]]]
) -> Callable[[int], Awaitable[dict[str, float]]]:
    """The sync with which a step ends."""

    async def synced(version: int) -> dict[str, float]:
        with span("sync"):
            metrics = await sync(version)
        profile.end()
        return metrics

    return synced


def told(step: int, path: Path, events: list[Any]) -> str:
    """Seconds by phase, parts of a phase indented, each with the operators that took most of it."""
    spans = [e for e in events if e.name.startswith(PREFIX)]
    whole = sum(_seconds(e) for e in spans if not _inside(e, spans))
    lines = [f"where step {step} went, {whole:.2f} s under watch; {path} opens at ui.perfetto.dev"]
    totals: dict[str, float] = {}
    depths: dict[str, int] = {}
    busiest: dict[str, Counter[str]] = {}
    for one in spans:
        name = one.name.removeprefix(PREFIX)
        totals[name] = totals.get(name, 0.0) + _seconds(one)
        depths[name] = len([o for o in spans if o is not one and _holds(o, one)])
        busiest.setdefault(name, Counter())
    for event, holders in _held([e for e in events if not e.name.startswith(PREFIX)], spans):
        for name in {o.name.removeprefix(PREFIX) for o in holders}:
            busiest[name][event.name] += event.self_cpu_time_total
    for name, seconds in totals.items():
        most = ", ".join(f"{op} {us / 1e6:.2f}" for op, us in busiest[name].most_common(SHOWN))
        lines.append(f"  {'  ' * depths[name] + name:22} {seconds:7.2f} s  {100 * seconds / whole:3.0f}%   {most}")
    return "\n".join(lines)


def _seconds(event: Any) -> float:
    return event.time_range.elapsed_us() / 1e6


def _holds(outer: Any, inner: Any) -> bool:
    return outer.time_range.start <= inner.time_range.start and inner.time_range.end <= outer.time_range.end


def _held(events: list[Any], spans: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Each event with the spans that hold it, in one pass over time: a step has some 100,000 events."""
    coming, begun = sorted(spans, key=_start, reverse=True), list[Any]()
    for event in sorted(events, key=_start):
        while coming and _start(coming[-1]) <= _start(event):
            begun.append(coming.pop())
        begun = [one for one in begun if one.time_range.end >= _start(event)]
        yield event, [one for one in begun if _holds(one, event)]


def _start(event: Any) -> float:
    return float(event.time_range.start)


def _inside(event: Any, others: list[Any]) -> bool:
    return any(other is not event and _holds(other, event) for other in others)


def _events(profiler: Any) -> list[Any]:
    return [e for e in profiler.events() if e.device_type.name == "CPU"]


def _cuda() -> list[ProfilerActivity]:
    import torch

    return [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
