"""System calls that a program may not make, as a filter the kernel runs before each (seccomp, in classic BPF).

A list of what is forbidden rather than of what is allowed, since an interpreter needs a few hundred and each system
another few; calls newer than this list do not exist for the program. Without a network: `socket` is forbidden whole.
Without other programs: `execve` too, and every `clone` that does not make a thread; one process is all there is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from . import kernel

# By machine: how the kernel calls it, then the numbers.
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LAST_KNOWN = 462  # mseal
X86, ARM = (
    {
        "fork": 57, "vfork": 58, "execve": 59, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "mount": 165,
        "umount2": 166, "pivot_root": 155, "chroot": 161, "unshare": 272, "setns": 308, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "add_key": 248, "request_key": 249, "keyctl": 250,
        "init_module": 175, "finit_module": 313, "delete_module": 176, "kexec_load": 246, "kexec_file_load": 320,
        "reboot": 169, "swapon": 167, "swapoff": 168, "quotactl": 179, "acct": 163, "settimeofday": 164,
        "clock_settime": 227, "clock_adjtime": 305, "adjtimex": 159, "sethostname": 170, "setdomainname": 171,
        "iopl": 172, "ioperm": 173, "modify_ldt": 154, "open_by_handle_at": 304, "name_to_handle_at": 303,
        "socket": 41, "memfd_create": 319, "shmget": 29, "shmat": 30, "msgget": 68, "semget": 64, "mq_open": 240,
        "personality": 135, "syslog": 103, "vhangup": 153, "fanotify_init": 300, "move_pages": 279,
        "migrate_pages": 256, "mbind": 237, "set_mempolicy": 238, "sched_setaffinity": 203,
        "sched_setscheduler": 144, "sched_setparam": 142, "setpriority": 141, "ioprio_set": 251, "execveat": 322,
        "sched_setattr": 314, "uselib": 134, "mknod": 133, "mknodat": 259,
    },
    {
        "execve": 221, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "mount": 40,
        "umount2": 39, "pivot_root": 41, "chroot": 51, "unshare": 97, "setns": 268, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "add_key": 217, "request_key": 218, "keyctl": 219,
        "init_module": 105, "finit_module": 273, "delete_module": 106, "kexec_load": 104, "kexec_file_load": 294,
        "reboot": 142, "swapon": 224, "swapoff": 225, "quotactl": 60, "acct": 89, "settimeofday": 170,
        "clock_settime": 112, "clock_adjtime": 266, "adjtimex": 171, "sethostname": 161, "setdomainname": 162,
        "open_by_handle_at": 265, "name_to_handle_at": 264, "socket": 198, "memfd_create": 279, "shmget": 194,
        "shmat": 196, "msgget": 186, "semget": 190, "mq_open": 180, "personality": 92, "syslog": 116,
        "vhangup": 58, "fanotify_init": 262, "move_pages": 239, "migrate_pages": 238, "mbind": 235,
        "set_mempolicy": 237, "sched_setaffinity": 122, "sched_setscheduler": 119, "sched_setparam": 118,
        "setpriority": 140, "ioprio_set": 30, "execveat": 281, "sched_setattr": 274, "mknodat": 33,
    },
)  # fmt: skip
# Numbers that both machines share: pidfd_send_signal, io_uring (3), open_tree, move_mount, fsopen, fsconfig, fsmount,
# fspick, pidfd_getfd, process_madvise, mount_setattr, quotactl_fd, memfd_secret, process_mrelease.
SHARED = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 443, 447, 448)
CLONE3 = 435
# With a condition on an argument: socketpair, clone, prlimit64, and the signals.
SOCKETPAIR, CLONE, PRLIMIT = {"x86_64": (53, 56, 302), "aarch64": (199, 220, 261)}.get(kernel.MACHINE, (0, 0, 0))
SIGNALS = {"x86_64": (62, 200, 234, 129, 297), "aarch64": (129, 130, 131, 138, 240)}.get(kernel.MACHINE, ())
GROUPS = {"x86_64": (109, 112), "aarch64": (154, 157)}.get(kernel.MACHINE, ())  # setpgid, setsid
NAMESPACES, THREAD = 0x7E020080, 0x00010000

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE, ABSENT, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000


def available() -> bool:
    """The kernel takes filters, and this list knows the machine's numbers."""
    try:
        kernel.prctl(21)  # PR_GET_SECCOMP
    except OSError:
        return False
    return kernel.MACHINE in ARCHITECTURE


def restrict() -> None:
    """For this process and all it starts, for good. It may signal itself alone and stays in its process group.

    Not even the processes of its own namespace may it signal: the one that examines it is among them.
    """
    program = _filter(os.getpid())
    steps = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HP", len(program) // 8, ctypes.addressof(steps))
    kernel.checked(kernel.libc.prctl(22, ctypes.c_ulong(2), ctypes.c_char_p(head), 0, 0))  # PR_SET_SECCOMP


def _filter(pid: int) -> bytes:
    forbidden = [*(X86 if kernel.MACHINE == "x86_64" else ARM).values(), *SHARED, *GROUPS]
    steps = [
        *_step(LOAD, 4),
        *_step(EQUAL, ARCHITECTURE[kernel.MACHINE], 1, 0),
        *_step(RETURN, KILL),
        *_step(LOAD, 0),
        *_step(AT_LEAST, LAST_KNOWN + 1, 0, 1),  # x86-64's other calling convention too, whose numbers are higher
        *_step(RETURN, ABSENT),
        *_when(CLONE3, ABSENT),  # whose flags a filter cannot see; libc then takes the old call
        *_argument(SOCKETPAIR, 0, EQUAL, 1, allow=True),
        *_argument(CLONE, 0, ANY_BIT, NAMESPACES, allow=False),
        *_argument(CLONE, 0, ANY_BIT, THREAD, allow=True),
        *_argument(PRLIMIT, 0, EQUAL, 0, allow=True),
    ]
    for number in forbidden:
        steps += _when(number, REFUSE)
    for number in SIGNALS:
        steps += _argument(number, 0, EQUAL, pid, allow=True)
    return b"".join([*steps, *_step(RETURN, ALLOW)])


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> list[bytes]:
    return [struct.pack("HBBI", code, yes, no, value)]


def _when(number: int, outcome: int) -> list[bytes]:
    return [*_step(EQUAL, number, 0, 1), *_step(RETURN, outcome)]


def _argument(number: int, which: int, test: int, value: int, allow: bool) -> list[bytes]:
    """Refuse this call where an argument's lower half passes the test (allow: where it does not)."""
    yes, no = (1, 0) if allow else (0, 1)
    return [
        *_step(EQUAL, number, 0, 4),
        *_step(LOAD, 16 + 8 * which),
        *_step(test, value, yes, no),
        *_step(RETURN, REFUSE),
        *_step(LOAD, 0),
    ]
