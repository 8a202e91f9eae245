"""From a YAML file and `key=value` overrides to a validated Config, with errors that a newcomer can act on.

A message names the key, the reason and the nearest valid name. Relative paths resolve against the config's folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from rlft.config import Config
from rlft.envs.base import EnvKnobs
from rlft.envs.catalog import EnvConfig
from rlft.rewards.base import Config as Reward
from rlft.rewards.catalog import RewardConfig
from rlft.secrets import Path as Place
from rlft.secrets import at, hidden, named, refuse_written, remember, veiled
from rlft.types import InputError

M = TypeVar("M", bound=BaseModel)
DATA = ("data.train", "data.eval", "data.train.path", "data.eval.path")
PATHS = ("model.path", "model.chat_template", *DATA, "env.corpus.file", "adapter.path", "teacher.path")


class Judging(BaseModel):
    """The part of a config that judges; the others are not looked at."""

    reward: RewardConfig


class Playing(BaseModel):
    """The part of a config in which episodes are played."""

    env: EnvConfig


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config in `path` with `overrides` applied. Raises InputError."""
    plain, names = _ready(path, overrides)
    config = validate(plain)
    config.from_environment.update(names)
    return config


def load_reward(path: Path, overrides: Sequence[str] = ()) -> Reward:
    """The `reward:` block of the config in `path`, which need hold nothing else. Raises InputError."""
    return _validated(Judging, _served(path, overrides, "reward")).reward


def load_env(path: Path, overrides: Sequence[str] = ()) -> EnvKnobs:
    """The `env:` block of the config in `path`, which need hold nothing else. Raises InputError."""
    return _validated(Playing, _served(path, overrides, "env")).env


def _served(path: Path, overrides: Sequence[str], block: str) -> dict[str, Any]:
    plain, _ = _ready(path, overrides)
    if plain.get(block) is None:
        raise InputError(f"{path}: there is no `{block}:` block in it, and nothing else is served")
    return plain


def _ready(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[Place, str]]:
    """The values in a file with the overrides, references resolved and paths whole; and what to write for them.

    A path that is whole now is written whole: it is no secret, and read from elsewhere.
    """
    plain = _read(path, overrides)
    refuse_written(plain)
    names = named(plain)
    plain = _resolved(plain, path)
    remember(names, plain)
    found = {where: at(plain, where) for where in names}
    _anchor(plain, path.resolve().parent)
    return plain, {w: text for w, text in names.items() if at(plain, w) == found[w]}


def _read(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What stands in a file, with the overrides, and with references as they are written."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"{path}: there is no such config file{hint}")
    try:
        read = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: this is not readable as YAML: {error}") from error
    if not isinstance(read, dict):
        raise InputError(f"{path}: a config is a mapping of keys to values, this is {type(read).__name__}")
    plain: dict[str, Any] = {str(key): value for key, value in read.items()}
    for override in overrides:
        plain = _override(plain, override)
    return plain


def validate(plain: Mapping[str, Any]) -> Config:
    """The Config that a mapping describes. Raises InputError with one line per mistake."""
    return _validated(Config, plain)


def _validated(kind: type[M], plain: Mapping[str, Any]) -> M:
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise InputError(hidden("\n".join(dict.fromkeys(_explain(e, plain) for e in error.errors())))) from error


def dump(config: Config) -> str:
    """The resolved config as YAML, defaults filled in; `load` of it gives the same config."""
    plain = veiled(config.model_dump(mode="json"), config.from_environment, escape=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def shown(config: Config) -> dict[str, Any]:
    """The resolved config as plain values; text from the environment is the name of its variable."""
    return veiled(config.model_dump(mode="json"), config.from_environment)


def _resolved(plain: dict[str, Any], path: Path) -> dict[str, Any]:
    """With what `${...}` stands for."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise InputError(
            f"{path}: a ${{...}} in it stands for nothing (write \\${{ for the characters themselves): {error}"
        ) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _override(plain: dict[str, Any], text: str) -> dict[str, Any]:
    """Apply one key=value. Changing the `type` of a block drops what the old type had set."""
    key, equals, _ = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{text!r}: an override has the form key=value, such as learner.lr=1e-5")
    try:
        change = OmegaConf.from_dotlist([text])
        _drop_other_type(plain, change, key.strip().split("."))
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(plain), change))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{text!r}: this override does not fit the config: {error}") from error
    assert isinstance(merged, dict)
    return {str(k): v for k, v in merged.items()}


def _drop_other_type(plain: dict[str, Any], change: Any, path: list[str]) -> None:
    """Empty the block that `change` gives another type, be it by block.type=... or by block={type: ..., ...}."""
    if path[-1] == "type":
        path = path[:-1]
    given, block = at(OmegaConf.to_container(change), tuple(path)), at(plain, tuple(path))
    if not path or not all(isinstance(x, dict) for x in (given, block)):
        return
    if "type" in given and block.get("type") != given["type"]:
        parent = plain
        for part in path[:-1]:
            parent = parent[part]
        parent[path[-1]] = {}


def _anchor(plain: dict[str, Any], folder: Path) -> None:
    """Make relative paths of files that stand beside the config absolute."""
    for dotted in PATHS:
        *path, leaf = dotted.split(".")
        block: Any = plain
        for part in path:
            block = block.get(part) if isinstance(block, dict) else None
        _resolve(block, leaf, folder)
    for block in _blocks(plain.get("reward")):
        for leaf in ("path", "base"):
            _resolve(block, leaf, folder)


def _resolve(block: Any, leaf: str, folder: Path) -> None:
    """Make one path absolute: beside the config, else from here, else left as it is (a hub id, module:function)."""
    value = block.get(leaf) if isinstance(block, dict) else None
    for where in (folder, Path()):
        if isinstance(value, str) and (where / value).exists():
            block[leaf] = str((where / value).resolve())
            break


def _blocks(block: Any) -> Iterator[dict[str, Any]]:
    """A reward's block and those of the rewards inside it; what a user's own function is given is not looked into."""
    if isinstance(block, dict):
        yield block
        for name, inside in block.items():
            if name != "options":
                yield from _blocks(inside)


def _explain(error: Any, plain: Mapping[str, Any]) -> str:
    """One pydantic error as "key: reason; did you mean ...?"."""
    key = ".".join(_path(error["loc"], plain))
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields(error["loc"][:-1])
        return f"{key}: there is no such key{_nearest(str(error['loc'][-1]), known)}"
    if kind == "union_tag_invalid":
        known = [name.strip().strip("'") for name in context["expected_tags"].split(",")]
        return f"{key}.type: there is no {key} {context['tag']!r}{_nearest(context['tag'], known)}"
    if kind == "union_tag_not_found":
        return f"{key}.type: say which {key} it is"
    if kind == "missing":
        return f"{key}: it is required and missing"
    message = str(context.get("error") or error["msg"])
    if not key or message.partition(":")[0].partition(".")[0] in Config.model_fields:
        return message
    given = error.get("input")
    shown = f" (it is {given!r})" if isinstance(given, str | int | float | bool) and kind != "value_error" else ""
    return f"{key}: {message}{shown}"


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    listed = ", ".join(known)
    return f"; did you mean {near[0]!r}? It is one of: {listed}" if near else f"; it is one of: {listed}"


def _path(loc: Sequence[Any], plain: Any) -> Iterator[str]:
    """The location without the union tags that pydantic puts in."""
    for i, part in enumerate(loc):
        tag = isinstance(plain, Mapping) and part not in plain and (plain.get("type") == part or part in ("file",))
        if tag and i:
            continue
        yield str(part)
        if isinstance(plain, Mapping):
            plain = plain.get(part)
        elif isinstance(plain, list | tuple) and isinstance(part, int) and part < len(plain):
            plain = plain[part]


def _fields(loc: Sequence[Any]) -> list[str]:
    """The keys of the block at a location."""
    kinds: list[type[BaseModel]] = [Config]
    for part in loc:
        below = [m for k in kinds if str(part) in k.model_fields for m in _models(k.model_fields[str(part)].annotation)]
        tagged = [k for k in kinds if "type" in k.model_fields and k.model_fields["type"].default == part]
        kinds = below or tagged or kinds
    return sorted({name for kind in kinds for name in kind.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]
