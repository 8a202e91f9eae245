"""How much memory this machine has left for a run: what the kernel counts as available, under its group's limit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available(device: torch.device) -> int | None:
    """Bytes that a run may take, this process's own included; of a GPU all it has. None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [size for size in (_free(), *(_group(*names) for names in CGROUPS)) if size is not None]
    return min(found) + resident() if found else None


def resident() -> int:
    """Bytes of this process that are in memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def shared_memory() -> int | None:
    """Bytes free in /dev/shm; None where there is none."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    """What a container's limit leaves; files that were read and can be dropped do not count as used."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # "max": no limit
        return None
    return most - used + int(stats.get(cache, 0)) if most < 2**60 else None
