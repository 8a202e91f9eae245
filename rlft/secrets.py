"""Secrets stay in the environment: a config says `${oc.env:NAME}`, and that name is all that is ever written.

Text that a config takes from the environment is put back as its name in config.yaml and in what trackers are given, and
is taken out of messages. Numbers are not secrets; they are written as they are, so that a run can be told from its
config. A secret that is written out in a config is refused, since a run keeps its config.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlft.types import InputError

Path = tuple[str | int, ...]
FROM = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")
NAMES = re.compile(r"(^|_)(api_?key|client_secret|secret_key|password|passwd|(hf|api|auth|access|bearer)_token)$", re.I)
COLUMNS = ("data", "columns")  # whose values are names of columns
SHORTEST = 8  # of a value that is taken out of messages; a shorter one may be any word

_seen: dict[str, str] = {}  # the value of each, and how its config writes it


def named(plain: Any, path: Path = ()) -> dict[Path, str]:
    """Where a config that is not resolved yet takes text from the environment, and how it is written there."""
    return {where: text for where, text in _leaves(plain, path) if isinstance(text, str) and FROM.search(text)}


def remember(names: Mapping[Path, str], resolved: Any) -> None:
    """From now on `hidden` takes these values out."""
    for path, text in names.items():
        known = {at(resolved, path): text}
        known |= {os.environ.get(name): f"${{oc.env:{name}}}" for name in FROM.findall(text)}  # inside a longer text
        kept = {value: said for value, said in known.items() if isinstance(value, str) and len(value) >= SHORTEST}
        _seen.update(kept)


def hidden(text: str) -> str:
    """The text with every value that a config took from the environment as the config writes it."""
    for value in sorted(_seen, key=len, reverse=True):
        text = text.replace(value, _seen[value])
    return text


def veiled(plain: Any, names: Mapping[Path, str], escape: bool = False, path: Path = ()) -> Any:
    """A config's values with the names in the place of text from the environment, wherever another key repeats it.

    escape: what looks like a reference and is none is written so that it is read as it stands.
    """
    if isinstance(plain, dict):
        return {key: veiled(value, names, escape, (*path, key)) for key, value in plain.items()}
    if isinstance(plain, list):
        return [veiled(value, names, escape, (*path, i)) for i, value in enumerate(plain)]
    if not isinstance(plain, str):
        return plain
    return names[path] if path in names else hidden(escaped(plain) if escape else plain)


def escaped(text: str) -> str:
    """The text as a config writes it, in which `${` begins a reference."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def refuse_written(plain: Any) -> None:
    """Raise InputError where a secret stands in a config that is not resolved yet."""
    for path, text in _leaves(plain, ()):
        name = str(path[-1]) if path else ""
        if isinstance(text, str) and text and "${" not in text and NAMES.search(name) and path[:2] != COLUMNS:
            key = ".".join(map(str, path))
            raise InputError(
                f"{key}: a secret does not belong into a config, which every run keeps and sends to its trackers; set "
                f"it in the environment and write {key}='${{oc.env:{name.upper()}}}'"
            )


def _leaves(plain: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    inside = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else None
    if inside is None:
        yield path, plain
        return
    for key, value in inside:
        yield from _leaves(value, (*path, key))


def at(plain: Any, path: Path) -> Any:
    """What stands at a path; None where there is nothing."""
    for part in path:
        try:
            plain = plain[part]
        except (KeyError, IndexError, TypeError):
            return None
    return plain
