"""The few Linux system calls that Python has no function for, through ctypes. Each raises OSError where it fails."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
NOSUID, NODEV, NOEXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MACHINE = platform.machine()
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(MACHINE, -1)
MOUNT_SETATTR = 442
DETACH = 2

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> int:
    """The result of a call into libc. Raises OSError where it is -1."""
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """A system call by its number."""
    sent = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    return checked(libc.syscall(ctypes.c_long(number), *sent))


def prctl(option: int, *arguments: int) -> int:
    """A process's own settings."""
    return checked(libc.prctl(option, *(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4])))


def die_with_parent() -> None:
    """SIGKILL for this process when its parent ends."""
    prctl(1, 9)


def undumpable() -> None:
    """Nobody of the same user may look into this process or its folder in /proc."""
    prctl(4, 0)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    prctl(36, 1)


def no_new_privileges() -> None:
    """Set-uid files give nothing any more."""
    prctl(38, 1)


def drop_capabilities() -> None:
    """Give up every capability for good."""
    checked(libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)))


def unshare(flags: int) -> None:
    """Leave the namespaces named by the flags for new ones."""
    checked(libc.unshare(flags))


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """As mount(2)."""
    texts = (source.encode(), target.encode(), kind.encode() or None)
    checked(libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None))


def unmount(target: str) -> None:
    """Take a mount away, at once where it is not in use and later where it is."""
    checked(libc.umount2(target.encode(), DETACH))


def read_only(path: str, recursive: bool = True, devices: bool = False) -> None:
    """Make a mount, and all below it, read-only, without set-uid files and (unless devices) device files."""
    attributes = struct.pack("QQQQ", 1 | NOSUID | (0 if devices else NODEV), 0, 0, 0)
    syscall(MOUNT_SETATTR, -100, path.encode(), 0x8000 if recursive else 0, attributes, len(attributes))


def pivot_root(path: str) -> None:
    """Make a mount the root of this mount namespace, and let go of the old one."""
    os.chdir(path)
    syscall(PIVOT_ROOT, b".", b".")
    unmount(".")
    os.chdir("/")
