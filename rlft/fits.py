"""Whether a run fits into memory: `rlft plan` says it, `train` and `resume` check it before a weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlft.afford import LEARNING, changed, cheapest, written
from rlft.config import Config
from rlft.forecast import Forecast
from rlft.machine import available, shared_memory
from rlft.material import Material, material
from rlft.memory import GB, Footprint, Room, size
from rlft.types import InputError

MARGIN = 1.15  # only what is more than this above is refused: a prediction errs, see docs/memory.md


@dataclass(frozen=True)
class Verdict:
    """What a run needs, and what there is (limited: by the config). keys, after: the cheapest change, and what it needs
    then."""

    footprint: Footprint
    room: Room
    limited: bool = False
    keys: dict[str, Any] | None = None
    after: Footprint | None = None

    @property
    def fits(self) -> bool:
        """By the prediction as it is."""
        return not self.room.lacks(self.footprint)

    @property
    def hopeless(self) -> bool:
        """It would hardly fit even if the prediction were too high."""
        return self.room.lacks(self.footprint, MARGIN)

    @property
    def harmless(self) -> bool:
        """There is a change with which it fits, and the same is learned with it."""
        return self.keys is not None and not set(LEARNING) & set(self.keys)

    @property
    def said(self) -> str:
        """The verdict in words."""
        where = (
            "memory.limit allows" if self.limited else "the GPU has" if self.footprint.gpu else "this machine has free"
        )
        if self.room.memory is None:
            return f"at most {size(self.footprint.peak)}; how much there is, this system does not say"
        text = f"at most {size(self.footprint.peak)} of {size(self.room.memory)} that {where}"
        if self.room.shared is not None and self.footprint.shared > self.room.shared:
            text += f", {size(self.footprint.shared)} of {size(self.room.shared)} in /dev/shm"
        if self.fits:
            return f"{text}: it fits"
        if self.keys is None or self.after is None:
            return f"{text}: it does not fit, nor with any change that was tried; take a smaller model"
        return f"{text}: it does not fit. The cheapest change: {written(self.keys)} ({size(self.after.peak)})"


def judged(stuff: Material, rough: bool = False) -> Verdict:
    """The prediction for a config, with a change if one is needed.

    rough: where twice a high guess fits, that will do. Raises what the model's own code raises on unusual input.
    """
    forecast, config = Forecast(stuff), stuff.config
    room, limited = _room(config, forecast), config.memory.limit is not None
    if rough:
        guess = forecast.footprint(config, rough=True)
        if not room.lacks(guess, 0.5):
            return Verdict(guess, room, limited)
    footprint = forecast.footprint(config)
    if not room.lacks(footprint):
        return Verdict(footprint, room, limited)
    found = cheapest(config, forecast.footprint, room, forecast.cache_least(), not footprint.gpu)
    return Verdict(footprint, room, limited, *(found or (None, None)))


def _room(config: Config, forecast: Forecast) -> Room:
    limit = config.memory.limit
    there = int(limit * GB) if limit else available(forecast.device)
    return Room(there, shared_memory() if forecast.device.type == "cpu" else None)


def described(stuff: Material) -> list[str]:
    """For `rlft plan`: the verdict, then a line for each process."""
    try:
        verdict = judged(stuff)
    except Exception as error:  # a model's own code may do anything to a tensor without numbers; the plan goes on
        return [f"not predicted: this model cannot be run without numbers ({type(error).__name__}: {_first(error)})"]
    return [verdict.said, *verdict.footprint.lines]


def fitted(stuff: Material, say: Callable[[str], None]) -> Material:
    """Before a run: the material as it is, after a warning where it will not fit, or with the cheapest change made.

    As `memory.check` says. Raises InputError where that is to refuse.
    """
    wish = stuff.config.memory.check
    if wish == "off":
        return stuff
    try:
        verdict = judged(stuff, rough=True)
    except Exception:  # no prediction is no reason to stop a run; `rlft plan` says why there is none
        return stuff
    if verdict.fits:
        return stuff
    if wish == "refuse" and verdict.hopeless:
        raise InputError(f"memory: {verdict.said}. To try it all the same: memory.check=warn")
    say(f"memory: {verdict.said}")
    if wish != "adapt" or not verdict.harmless or verdict.keys is None:
        return stuff
    say("memory: that change is made, and written into the run's config")
    return material(changed(stuff.config, verdict.keys))


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
