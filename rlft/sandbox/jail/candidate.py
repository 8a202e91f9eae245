"""The process that the program of a test runs in: as a script that prints, or as a module that the test uses."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import traceback
import types
from typing import Any

from . import wire
from .remote import OPERATIONS, Peer

ENDING = 1 << 12  # characters of an error that are told


def script(program: str) -> int:
    """Run it as `python program.py` would. Its exit code."""
    try:
        _run(program, "__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # wait for its threads, as an interpreter does at its end
    atexit._run_exitfuncs()
    with contextlib.suppress(AttributeError, ValueError):  # it may have closed it, or put something else there
        sys.stdout.flush()
    return code & 0xFF


def module(program: str, read: int, write: int) -> int:
    """Run it as an imported module, tell what it defines, and do what the test asks of that."""
    peer = Peer(read, write, frozenset(OPERATIONS))
    try:
        found = _run(program, "solution")
    except BaseException as error:
        wire.send(write, ["raised", type(error).__name__, str(error)[:ENDING]])
        return 1
    peer.tell(["defined", [_told(peer, name, value) for name, value in list(found.items()) if name[:2] != "__"]])
    peer.serve()
    return 0


def syntax(program: str) -> int:
    """Print what a program consists of, by the names of the syntax tree's nodes, and what it calls and imports."""
    import ast
    import json
    from collections import Counter

    tree = ast.parse(program)
    compile(tree, "solution.py", "exec")
    found = Counter(type(node).__name__ for node in ast.walk(tree))
    calls = Counter(ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    imports = Counter(
        alias.name if isinstance(node, ast.Import) else node.module or "."
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    )
    os.write(1, json.dumps({"nodes": found, "calls": calls, "imports": imports}).encode())
    return 0


def _run(program: str, name: str) -> dict[str, Any]:
    made = types.ModuleType(name)
    sys.modules[name] = made
    sys.argv = ["solution.py"]
    exec(compile(program, "solution.py", "exec"), made.__dict__)
    return made.__dict__


def _told(peer: Peer, name: str, value: Any) -> list[Any]:
    if isinstance(value, types.ModuleType):
        return [name, "module", value.__name__]
    return [name, "value", peer.pack(value)]
