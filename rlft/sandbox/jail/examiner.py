"""The process that tests run in, apart from the program: it knows the right answers, the program's never do.

One process reads the tests and waits; each test gets a child of it. Names that the program defines are there as data
or handles. Builtins are Python's own, and so is a standard module whose attribute a test takes (`math.isclose`); what
the program calls so is had by `from solution import sum`. What else a test uses without importing it itself, it takes
from the program.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
import types
from typing import Any

from . import wire
from .remote import Peer
from .walls import Cell

NOTE = 2000  # characters of an error that are told


def wait_for_tests(
    source: int, commands: int, replies: int, pipes: list[tuple[int, int]], cell: Cell, limits: dict[str, Any]
) -> None:
    """Read the tests from `source`; for each number that comes by `commands`, run that one and tell its outcome."""
    tests = json.loads(wire.framed(source) or b"[]")
    os.close(source)
    nowhere = os.open(os.devnull, os.O_RDWR)
    while True:
        try:
            number = wire.receive(commands)
        except wire.Ended:
            return
        child = os.fork()
        if child == 0:
            _examine(tests[number], pipes[number], replies, nowhere, cell, limits)
        os.waitpid(child, 0)
        wire.send(replies, ["done"])


def _examine(test: str, pipe: tuple[int, int], replies: int, nowhere: int, cell: Cell, limits: dict[str, Any]) -> None:
    try:
        for standard in (0, 1, 2):
            os.dup2(nowhere, standard)
        keep_only([*pipe, replies])
        signal.alarm(int(limits["wall"]) + 2)  # which nobody here takes back
        cell.close(limits | {"memory": 512, "seconds": limits["wall"] + 2})
        peer = Peer(*pipe, frozenset({"call"}))
        tree = ast.parse(test, "test.py")
        names = _names(peer, peer.hear(), tree)
        exec(compile(tree, "test.py", "exec"), names)
        told = ["passed", ""]
    except wire.Ended as error:
        told = ["failed", str(error)]
    except BaseException as error:
        told = ["failed", _note(error)]
    wire.send(replies, told)
    os._exit(0)


def _names(peer: Peer, hello: Any, test: ast.AST) -> dict[str, Any]:
    """The names that a test finds: of what the program defines, and of the modules that it imported."""
    if hello[0] == "raised":
        raise RuntimeError(f"the program raised {hello[1]}: {hello[2]}")
    told = [(str(name), kind, value) for name, kind, value in hello[1] if not str(name).startswith("__")]
    solution = types.ModuleType("solution")
    vars(solution).update({name: peer.unpack(value) for name, kind, value in told if kind != "module"})
    sys.modules["solution"] = solution
    names = {name: value for name, value in vars(solution).items() if not hasattr(builtins, name)}
    names["__name__"] = "test"
    imported = {name: str(value) for name, kind, value in told if kind == "module"}
    taken = _attributes(test)
    for name, of in (imported | {name: name for name in taken if name in sys.stdlib_module_names}).items():
        module = _standard(of)
        if module is not None and any(hasattr(module, attribute) for attribute in taken.get(name, {"__name__"})):
            names[name] = module
    return names


def _attributes(test: ast.AST) -> dict[str, set[str]]:
    """What a test takes from names, as `isclose` from `math`."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.setdefault(node.value.id, set()).add(node.attr)
    return found


def _standard(name: str) -> types.ModuleType | None:
    if name.partition(".")[0] not in sys.stdlib_module_names:
        return None
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


def _note(error: BaseException) -> str:
    lines = traceback.extract_tb(error.__traceback__)
    place = next(
        (f" (line {frame.lineno} of the test)" for frame in reversed(lines) if frame.filename == "test.py"), ""
    )
    return f"{type(error).__name__}: {error}"[:NOTE] + place


def keep_only(files: list[int]) -> None:
    """Close every other file but the standard three."""
    last = 2
    for file in sorted(set(files)):
        if file > last:
            os.closerange(last + 1, file)
            last = file
    os.closerange(last + 1, os.sysconf("SC_OPEN_MAX"))
