"""The cheapest change of a config with which its run fits into the memory that there is.

Changes have a price: what they cost in speed, as a share of a step's time, by rule of thumb. Combinations are tried in
the order of their price and the plan is made anew for each; the first that fits is named. A change of what is learned
(the optimizer, an adapter) is dearer than any that costs time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import product
from typing import Any

from rlft.config import Config
from rlft.config_rollout import Local
from rlft.memory import Footprint, Room

LEARNED = 10.0  # the price of learning something else
LEARNING = ("learner.optimizer", "adapter.r")  # the keys that do
Change = tuple[float, dict[str, Any]]  # price, and keys with their new values
NONE: Change = (0.0, {})


def cheapest(
    config: Config, predicted: Callable[[Config], Footprint], room: Room, cache: float = 0.0, cpu: bool = True
) -> tuple[dict[str, Any], Footprint] | None:
    """Keys with new values, and the footprint then; None where no combination fits.

    cache: GiB of keys and values that one sequence needs; no change leaves less. cpu: malloc decides what is kept.
    """
    axes = [*_axes(config, cache, cpu)]
    same = [[change for change in axis if change[0] < LEARNED] for axis in axes]
    for some in (same, axes):  # every plan takes time: those that learn something else only where all others fail
        least = _keys([max(axis, key=lambda change: change[0]) for axis in some])
        if not least or room.lacks(predicted(changed(config, least))):
            continue
        for choice in sorted(product(*some), key=lambda changes: sum(price for price, _ in changes)):
            keys = _keys(choice)
            footprint = predicted(changed(config, keys)) if keys else None
            if footprint is not None and not room.lacks(footprint):
                return keys, footprint
    return None


def _keys(changes: Iterable[Change]) -> dict[str, Any]:
    return {key: value for _, change in changes for key, value in change.items()}


def changed(config: Config, keys: Mapping[str, Any]) -> Config:
    """The config with other values at dotted keys. Raises pydantic's error where they do not go together."""
    plain = config.model_dump(mode="json")
    for key, value in keys.items():
        *path, leaf = key.split(".")
        block = plain
        for part in path:
            block = block[part]
        block[leaf] = value
    made = Config.model_validate(plain)
    made.from_environment.update(config.from_environment)  # what came from there is never written out
    return made


def written(keys: Mapping[str, Any]) -> str:
    """As overrides on a command line."""
    return " ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items())


def _axes(config: Config, cache: float, cpu: bool) -> Iterator[list[Change]]:
    """Each thing that can be made smaller: as it is, then the ways to change it."""
    yield [NONE, *_halved("learner.micro_tokens", config.learner.micro_tokens, 3, 128, 0.04)]
    yield [NONE, *([(0.25, {"memory.keep": False})] if config.memory.keep and cpu else [])]
    yield [NONE, *([] if config.model.gradient_checkpointing else [(0.33, {"model.gradient_checkpointing": True})])]
    engine = config.rollout.engine
    if isinstance(engine, Local):
        yield [NONE, *_halved("rollout.engine.max_sequences", engine.max_sequences, 3, 4, 0.3)]
    else:
        smaller = [gb for gb in (0.5, 0.25) if max(cache, 1e-9) <= gb < (engine.cache_gb or 1.0)]
        yield [NONE, *((0.02 * 2**n, {"rollout.engine.cache_gb": gb}) for n, gb in enumerate(smaller))]
        shares = [share for share in (0.3, 0.2) if share < (engine.memory_fraction or 0.4)]  # of a GPU
        yield [NONE, *((0.1 * 2**n, {"rollout.engine.memory_fraction": share}) for n, share in enumerate(shares))]
    full = config.adapter.type == "none"
    smaller = [] if not full or config.learner.optimizer != "adamw" else [(LEARNED, {"learner.optimizer": "adafactor"})]
    yield [NONE, *smaller]
    yield [NONE, *_ranks(config)]


def _halved(key: str, value: int, times: int, least: int, price: float) -> list[Change]:
    """Half of it, a quarter and so on; each costs more than twice what the one before does."""
    sizes = [value >> n for n in range(1, times + 1)]
    return [(price * (2**n - 1), {key: size}) for n, size in enumerate(sizes, 1) if size >= least]


def _ranks(config: Config) -> list[Change]:
    """A smaller rank, where there is one to speak of."""
    rank = (config.adapter.model_extra or {}).get("r")
    if config.adapter.type != "lora" or not isinstance(rank, int):
        return []
    return [(LEARNED + 1 + n, {"adapter.r": r}) for n, r in enumerate((rank // 2, rank // 4)) if r >= 4]
