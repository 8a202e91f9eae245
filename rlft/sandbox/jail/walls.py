"""What closes a process in: namespaces and a root of its own, then rights, system calls, files and resources.

Each wall is put up where the system has it, and which ones stand is told, so that nobody takes a weaker cell for a
stronger one. Limits of resources stand always.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
from typing import Any

from . import kernel, landlock, seccomp

NOBODY = 65534
SCRATCH = "/scratch"
MEGABYTE = 1 << 20
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", os.path.join(sys.base_prefix, "lib"))
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Cell:
    """The walls around the programs of one job. home: a folder they may write in until there is a root."""

    def __init__(self, home: str) -> None:
        self.scratch = home
        self.walls: list[str] = []
        self._root = os.getuid() == 0

    def separate(self) -> None:
        """Leave the system's namespaces; the next process forked is the first of its own. Root needs no user's."""
        flags = kernel.NEW_NS | kernel.NEW_PID | kernel.NEW_NET | kernel.NEW_IPC | kernel.NEW_UTS
        user, group = os.getuid(), os.getgid()
        try:
            kernel.unshare(flags if self._root else flags | kernel.NEW_USER)
        except (OSError, AttributeError):
            return
        if not self._root:
            for name, line in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(line)
        self.walls.append("namespaces")

    def furnish(self, megabytes: int) -> None:
        """A root with the interpreter's files, read-only, a scratch folder of so many megabytes, and nothing else."""
        if "namespaces" not in self.walls:
            return
        home = self.scratch
        try:
            kernel.mount("none", "/", "", kernel.RECURSIVE | kernel.PRIVATE)
            kernel.mount("tmpfs", home, "tmpfs", kernel.NOSUID | kernel.NODEV, "size=1m,mode=755")
            for path in _shown():
                _show(path, home)
            os.mkdir(home + SCRATCH)
            kernel.read_only(home, recursive=False)
            kernel.mount("tmpfs", home + SCRATCH, "tmpfs", kernel.NOSUID | kernel.NODEV, _size(megabytes))
            kernel.pivot_root(home)
        except OSError:
            return
        self.scratch = SCRATCH
        self.walls.append("own files")

    def sweep(self) -> None:
        """Nothing of an earlier test is left in the scratch folder."""
        with os.scandir(self.scratch) as entries:
            for entry in list(entries):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)

    def close(self, limits: dict[str, Any]) -> None:
        """For this process, for good: no rights, few system calls, few files, so many resources."""
        os.chdir(self.scratch)
        os.environ.clear()
        os.environ.update({"HOME": self.scratch, "TMPDIR": self.scratch, "LANG": "C.UTF-8"})
        _limit(limits)
        if self._root:
            with contextlib.suppress(OSError):
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.drop_capabilities()
        kernel.undumpable()
        kernel.no_new_privileges()
        if landlock.abi():
            readable = [path for path in LIBRARIES if os.path.isdir(path)]
            devices = [path for path in DEVICES if os.path.exists(path)]
            landlock.restrict([*readable, *devices], [self.scratch, *devices[:1]])
        if seccomp.available():
            seccomp.restrict()

    def standing(self) -> list[str]:
        """The walls of a process that is closed in, by name."""
        kinds = (("seccomp", seccomp.available()), ("landlock", bool(landlock.abi())), ("rlimits", True))
        return [*self.walls, *(name for name, there in kinds if there)]


def _limit(limits: dict[str, Any]) -> None:
    seconds = int(-(-limits["seconds"] // 1))
    memory = limits["memory"] * MEGABYTE
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, seconds, seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, limits["disk"] * MEGABYTE, limits["disk"] * MEGABYTE),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_NPROC, 256, 256),
    ):
        with contextlib.suppress(ValueError, OSError):  # some systems know no such limit, or have a lower one
            resource.setrlimit(kind, (soft, hard))


def _size(megabytes: int) -> str:
    return f"size={megabytes}m,nr_inodes=4096,mode=777"


def _shown() -> list[str]:
    return [path for path in (*LIBRARIES, *DEVICES) if os.path.exists(path)]


def _show(path: str, root: str) -> None:
    """The same path under the new root, read-only; where it is a link, the same link and what it leads to."""
    target = root + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kernel.mount(path, target, "", kernel.BIND | kernel.RECURSIVE)
    kernel.read_only(target, devices=path in DEVICES)
