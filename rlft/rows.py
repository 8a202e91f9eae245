"""Where rows come from: a file, a folder or the hub, sums made on the spot, problems of templates, reasoning-gym,
or bare seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlft.config_data import HELD_OUT, Generated, ReasoningGym, Rows, Seeds, Templates
from rlft.generated import sums
from rlft.reasoning import questions
from rlft.templates import problems, read_templates
from rlft.types import InputError

Row = Mapping[str, Any]
SHOWN = 5
MAIN = "main"  # the configuration of a hub data set that is meant where none is named, as in openai/gsm8k


def rows_of(rows: Rows, split: str) -> Sequence[Row]:
    """The rows that a config asks for. split: of the hub data set, where the config names none. Raises InputError."""
    if isinstance(rows, Generated):
        return sums(rows.digits, rows.split, rows.holdout, rows.seed)[: rows.limit]
    if isinstance(rows, Templates):
        return problems(read_templates(rows.path), rows.split, rows.count, rows.holdout, rows.seed)
    if isinstance(rows, Seeds):
        first = rows.start + (HELD_OUT if rows.split == "eval" else 0)
        return [{"prompt": rows.prompt, "seed": first + i} for i in range(rows.count)]
    if isinstance(rows, ReasoningGym):
        return questions(rows.dataset, rows.options, rows.split, rows.count, rows.holdout, rows.seed)
    return read(rows.path, rows.subset, rows.split or split, rows.limit)


def read(path: str, subset: str | None = None, split: str = "train", limit: int | None = None) -> list[Row]:
    """The rows of a .jsonl, .json or .parquet file, or of a data set of `datasets`: a folder, or a hub id.

    Raises InputError.
    """
    file = Path(path)
    if file.suffix in (".jsonl", ".json", ".parquet") or file.is_file():
        if not file.is_file():
            raise InputError(f"data: there is no file {path}")
        rows = _parquet(file) if file.suffix == ".parquet" else _json(file)
    else:
        rows = _hub(path, subset, split)
    if not rows:
        raise InputError(f"data: {path} holds no rows")
    return rows[:limit]


def _json(file: Path) -> list[Row]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {file} does not read as text: {error}") from error
    if file.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"data: {file} is not JSON: {error}") from error
    else:
        rows = []
        for i, line in enumerate(text.split("\n")):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise InputError(f"data: {file} line {i + 1} is not JSON: {error}") from error
    refuse([i for i, row in enumerate(rows) if not isinstance(row, dict)], "it is not a JSON object", str(file))
    return rows


def _parquet(file: Path) -> list[Row]:
    import pyarrow.parquet
    from pyarrow import ArrowException

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"data: {file} does not read as Parquet: {error}") from error


def _hub(name: str, subset: str | None, split: str) -> list[Row]:
    import datasets

    try:
        try:
            return list(datasets.load_dataset(name, subset, split=split))  # type: ignore[arg-type]
        except ValueError:  # several configurations, and none was named
            if subset is not None or MAIN not in datasets.get_dataset_config_names(name):
                raise
            return list(datasets.load_dataset(name, MAIN, split=split))  # type: ignore[arg-type]
    except Exception as error:  # the hub's client raises many kinds; all mean that the data cannot be had
        raise InputError(
            f"data: {name!r} is neither a file here nor a data set that the hub gives "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error


def refuse(where: Sequence[int], reason: str, name: str) -> None:
    """Raise InputError with the numbers of the first of these rows, counted from 1, if there are any."""
    if where:
        raise InputError(f"data: {name}: {len(where)} row(s) where {reason}: {first_few([i + 1 for i in where])}")


def first_few(rows: Sequence[object]) -> str:
    """The first few of the rows that a message is about."""
    return ", ".join(map(str, rows[:SHOWN])) + (" ..." if len(rows) > SHOWN else "")
