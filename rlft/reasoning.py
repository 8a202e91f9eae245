"""Questions of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760): over a hundred generators with scorers.

Which side a question is on is decided by its text alone, so that none is in training and held out, whatever the seeds
and sizes. Generators run in a process whose hashes are fixed: some walk over sets, and would ask something else each
time. A question keeps the library's own entry, exact to its tuples, from which its scorer is asked later.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any, Literal

from rlft.types import InputError

INSTALL = "pip install 'rlft[worlds]'"
COMPOSITE = "composite"
CHUNK = 500  # questions of one dataset object, the library's own default; some refuse more
TRIES = 100  # questions of a side looked at, for each that is wanted
REPEATS = 1000  # so many in a row that were there before: there are no others
TUPLE, PAIRS = "__tuple__", "__pairs__"

Kept = dict[str, Any]


def library() -> Any:
    """reasoning-gym. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise InputError(f"reasoning_gym needs a package that is not installed ({error}): {INSTALL}") from error


def check(dataset: str, options: Mapping[str, Any]) -> None:
    """Raises InputError where there is no such dataset, or it refuses the options."""
    library()
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    parts = _parts(options) if dataset == COMPOSITE else []
    for name in (dataset, *(part["name"] for part in parts)):
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3) or sorted(known)
            raise InputError(
                f"reasoning_gym: there is no dataset {name!r}. Near it: {', '.join(near[:3])}; all {len(known)} are "
                'listed by python -c "import reasoning_gym.factory as f; print(*f.DATASETS)"'
            )
    for name, given in [(part["name"], part["config"]) for part in parts] or [(dataset, options)]:
        try:
            made(name, given, 0, 1)
        except Exception as error:  # each dataset has its own ways to refuse
            allowed = sorted({field.name for field in fields(known[name][1])} - {"seed", "size"})
            raise InputError(
                f"reasoning_gym: {name} refuses the options {dict(given)}: {error}. It has {', '.join(allowed)}"
            ) from error


def made(dataset: str, options: Mapping[str, Any], seed: int, size: int) -> Any:
    """The library's dataset."""
    if dataset != COMPOSITE:
        return library().create_dataset(dataset, seed=seed, size=size, **options)
    spec = importlib.import_module("reasoning_gym.composite").DatasetSpec
    return library().create_dataset(
        COMPOSITE, seed=seed, size=size, datasets=[spec(**part) for part in _parts(options)]
    )


def questions(
    dataset: str, options: Mapping[str, Any], side: Literal["train", "eval"], count: int, holdout: float, seed: int
) -> list[Kept]:
    """At most `count` different questions of one side, as rows: prompt, answer, and what the scorer needs as `entry`.

    Fewer where the dataset has no more. Raises InputError.
    """
    asked = {"dataset": dataset, "options": options, "side": side, "count": count, "holdout": holdout, "seed": seed}
    told = subprocess.run(
        [sys.executable, "-P", "-m", "rlft.reasoning"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=surroundings(),
    )
    if told.returncode:
        last = told.stderr.strip().splitlines()[-1:] or [f"it ended with code {told.returncode}"]
        raise InputError(f"reasoning_gym: {dataset} made no questions: {last[0]}")
    rows = json.loads(told.stdout)
    if not rows:
        raise InputError(f"reasoning_gym: {dataset} has no question on the side {side!r}; change `holdout` or options")
    return rows


def surroundings() -> dict[str, str]:
    """The environment variables of a process that finds the same packages, and in which hashes are always the same."""
    return os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def held_out(question: str, share: float) -> bool:
    """Whether a question is held out, by its text alone."""
    number = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big")
    return number < share * 2**64


def pack(value: Any) -> Any:
    """A value as JSON has it, tuples and keys that are no text included."""
    if isinstance(value, tuple):
        return {TUPLE: [pack(one) for one in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: pack(one) for key, one in value.items()}
        return {PAIRS: [[pack(key), pack(one)] for key, one in value.items()]}
    return [pack(one) for one in value] if isinstance(value, list) else value


def unpack(value: Any) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE}:
        return tuple(unpack(one) for one in value[TUPLE])
    if value.keys() == {PAIRS}:
        return {unpack(key): unpack(one) for key, one in value[PAIRS]}
    return {key: unpack(one) for key, one in value.items()}


def _parts(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The datasets of a composite. Raises InputError."""
    parts = options.get("datasets")
    if set(options) != {"datasets"} or not isinstance(parts, list) or not parts:
        raise InputError(
            "reasoning_gym: composite needs its parts and nothing else: options: {datasets: [{name: chain_sum, "
            "weight: 1, config: {}}]}"
        )
    for part in parts:
        if not isinstance(part, dict) or "name" not in part or not set(part) <= {"name", "weight", "config"}:
            raise InputError(f"reasoning_gym: a part of composite has name, weight and config, not {part!r}")
    return [{"weight": 1.0, "config": {}} | part for part in parts]


def _rows(
    dataset: str, options: Mapping[str, Any], side: str, count: int, holdout: float, seed: int
) -> list[dict[str, Any]]:
    found: dict[str, Kept] = {}
    seen: set[str] = set()
    repeats = 0  # in a row
    most = math.ceil(TRIES * count / (holdout if side == "eval" else 1 - holdout))
    for entry in islice(_entries(dataset, options, seed), most):
        text = entry["question"]
        repeats = repeats + 1 if text in seen else 0
        seen.add(text)
        if held_out(text, holdout) == (side == "eval"):
            found.setdefault(text, entry)
        if len(found) == count or repeats == REPEATS:
            break
    return [
        {
            "prompt": entry["question"],
            "answer": entry["answer"],
            "entry": json.dumps({"dataset": dataset, "options": options, "entry": pack(entry)}, default=_plain),
        }
        for entry in found.values()
    ]


def _entries(dataset: str, options: Mapping[str, Any], seed: int) -> Iterator[Kept]:
    """Item i of a dataset is drawn with seed + i, so each chunk goes on where the one before it ended."""
    while True:
        one = made(dataset, options, seed, CHUNK)
        yield from (one[i] for i in range(CHUNK))
        seed += CHUNK


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    return value.item()


def _main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a generator prints is no row
    json.dump(_rows(**json.load(sys.stdin)), replies)
    replies.close()


if __name__ == "__main__":
    _main()
