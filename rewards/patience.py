"""An end to waiting for a process of ours that stands still.

What such a process may take is processor time, which the kernel limits. One that is stopped, or waits for a disk that
is gone, uses none of it, so a clock on the wall is needed beside that, and a long one: a busy machine is no fault.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patient(process: subprocess.Popen[Any], seconds: float, what: str) -> Iterator[None]:
    """Ends the process where the block, which writes to it or reads from it, takes longer than that.

    what: the process in words. Raises TimeoutError then; the block has read an end of file, or been refused the pipe.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    clock = threading.Timer(seconds, end)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()
    if late.is_set():
        raise TimeoutError(f"{what} stood still for {seconds:g} s and was ended")
