"""Whether the completion is JSON that fits a JSON Schema, by the library jsonschema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NoReturn

from pydantic import Field, model_validator

from rlft.rewards.base import Config
from rlft.rewards.pooled import Verdict, library, pooled
from rlft.types import InputError, Reward, Task, Trajectory

OPENS, CLOSES = (re.compile(rf"[ \t]*```[ \t]*{kind}", re.IGNORECASE) for kind in (r"(?:json[ \t]*)?", ""))
DATA = ("const", "enum", "default", "examples")  # keys of a schema whose values are no schemas
NEEDED = "the reward `json_schema`"


class JsonSchema(Config):
    """1 if the completion is JSON that fits the schema, else 0. It may stand in a code fence.

    Logged under reward/<name>/: `parsed`, 1 if it is JSON at all, and `errors`, how many places do not fit.
    """

    type: Literal["json_schema"] = "json_schema"
    accept: dict[str, Any] | None = Field(default=None, description="The JSON Schema. Or name a `key`.")
    key: str | None = Field(default=None, description="Column of the task with the schema, as a mapping or JSON text.")
    where: Literal["whole", "anywhere"] = Field(
        default="whole",
        description="`whole`: nothing around the JSON or its fence. `anywhere`: the only fence counts, whatever is "
        "around it; where there is none, the whole.",
    )
    formats: bool = Field(default=False, description="Check `format` (date, email and others) too.")

    @model_validator(mode="after")
    def _one_schema(self) -> JsonSchema:
        if (self.accept is None) == (self.key is None):
            raise ValueError("set either `accept` (a JSON Schema) or `key` (the column that holds one)")
        return self

    def judge(self, name: str) -> Reward:
        own = None if self.accept is None else validator(self.accept, self.formats, "the reward's `accept`")

        def verdict(trajectory: Trajectory) -> Verdict:
            fits = own or self._of(trajectory.task)
            try:
                value = parsed(trajectory.completion, self.where)
            except (ValueError, RecursionError):
                return 0.0, {"parsed": 0.0}
            errors = _errors(fits, value)
            return float(not errors), {"parsed": 1.0, "errors": float(errors)}

        return pooled(verdict, name)

    def check(self, task: Task) -> None:
        if self.key is not None:
            self._of(task)

    def _of(self, task: Task) -> Any:
        where = f"task '{task.id}': column '{self.key}'"
        schema = task.info.get(str(self.key))
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise InputError(
                    f"{where} is not JSON: {error}. Repair that row, or set the reward's `key`."
                ) from error
        return validator(schema, self.formats, where)


def validator(schema: Any, formats: bool, where: str) -> Any:
    """What checks values by a schema, in the draft that its `$schema` names, else in the newest.

    It fetches nothing: a `$ref` to elsewhere is refused. Raises InputError, naming `where`, for what is no schema.
    """
    jsonschema, referencing = library("jsonschema", NEEDED), library("referencing", NEEDED)
    if not isinstance(schema, dict):
        kind = "is missing or empty" if schema is None else f"holds a {type(schema).__name__}"
        raise InputError(f"{where} {kind}, and should hold a JSON Schema, a mapping. Repair it, or set `key`.")
    made = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        made.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise InputError(
            f"{where} is no valid JSON Schema, at {error.json_path}: {error.message}. Repair it."
        ) from error
    _refuse_dangling(schema, where)
    return made(schema, registry=referencing.Registry(), format_checker=made.FORMAT_CHECKER if formats else None)


def _refuse_dangling(schema: dict[str, Any], where: str) -> None:
    """Raises InputError for a `$ref` that leads nowhere in the schema. One with an `$id` inside is left to itself, for
    what it refers to depends on where."""
    referencing, jsonschema = library("referencing", NEEDED), library("referencing.jsonschema", NEEDED)
    parts = list(_schemas(schema))
    if any("$id" in part for part in parts):
        return
    whole = referencing.Resource.from_contents(schema, default_specification=jsonschema.DRAFT202012)
    resolver = referencing.Registry().with_resource("", whole).resolver()
    for reference in (part["$ref"] for part in parts if isinstance(part.get("$ref"), str)):
        try:
            resolver.lookup(reference)
        except library("referencing.exceptions", NEEDED).Unresolvable as error:
            raise InputError(
                f"{where}: the JSON Schema refers to {reference!r}, which is not in it. Nothing is fetched: put it "
                "below `$defs`."
            ) from error


def _schemas(part: Any) -> Iterator[dict[str, Any]]:
    """The mappings in a schema, itself first, but for what is data in it."""
    if isinstance(part, dict):
        yield part
    for key, inside in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key not in DATA:
            yield from _schemas(inside)


def parsed(text: str, where: str) -> Any:
    """The JSON value in a text. Raises ValueError where there is none, or what Python alone takes for JSON, as NaN."""
    fences = _fenced(text)
    if len(fences) == 1 and (where == "anywhere" or len(fences[0]) == text.strip().count("\n") - 1):
        text = "\n".join(fences[0])
    return json.loads(text, parse_constant=_refuse)


def _fenced(text: str) -> list[list[str]]:
    """The lines of each code fence."""
    found: list[list[str]] = []
    inside: list[str] | None = None
    for line in text.split("\n"):
        if inside is None:
            inside = [] if OPENS.fullmatch(line) else None
        elif CLOSES.fullmatch(line):
            found.append(inside)
            inside = None
        else:
            inside.append(line)
    return found


def _errors(fits: Any, value: Any) -> int:
    referencing = library("referencing.exceptions", NEEDED)
    try:
        return sum(1 for _ in fits.iter_errors(value))
    except (RecursionError, OverflowError):  # deeper, or with larger numbers, than can be checked: it fits nothing
        return 1
    except referencing.Unresolvable as error:
        raise InputError(
            f"the JSON Schema refers to {error.ref!r}, which is not in it. Nothing is fetched: put it below `$defs`."
        ) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
