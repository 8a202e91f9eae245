"""Files that a process may touch, by Landlock: a kernel's way for a process without rights to give up more of them.

https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from . import kernel

CREATE, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
MAKE_CHAR, MAKE_SOCK, MAKE_BLOCK, EXECUTE = 1 << 6, 1 << 9, 1 << 11, 1 << 0


def abi() -> int:
    """The version that the kernel speaks, 0 where it has none."""
    try:
        return kernel.syscall(CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """For this process and all it starts, for good: read these, write those, and no TCP, no signals to others.

    Paths are files or folders with all that is in them. Needs `no_new_privileges`. What the kernel's version does not
    know is left out.
    """
    version = abi()
    handled = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    fields = [handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0]
    attributes = struct.pack("QQQ", *fields)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    rules = kernel.syscall(CREATE, attributes, len(attributes), 0)
    inside = handled & ~(EXECUTE | MAKE_CHAR | MAKE_BLOCK | MAKE_SOCK)
    for path in readable:
        _add(rules, path, READ_FILE | READ_DIR)
    for path in writable:
        _add(rules, path, inside)
    kernel.syscall(RESTRICT_SELF, rules, 0)
    os.close(rules)


def _add(rules: int, path: str, access: int) -> None:
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not os.path.isdir(path):
        access &= WRITE_FILE | READ_FILE | TRUNCATE
    kernel.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", access, place), 0)
    os.close(place)
