"""For tests that kill runs: a process that has imported everything and forks one rlft after the other, in well under a
second each, and what of two runs must be the same.

As a program: `killing.py serve` is that process; `killing.py once NOTES ARGUMENTS` is one rlft that notes its phases.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REWARDS = '''
import random
import numpy as np


def small(trajectory):
    """The share of sampled tokens whose id is small."""
    said = [t for s in trajectory.samples for t, chosen in zip(s.tokens, s.mask) if chosen]
    return sum(token < 150 for token in said) / len(said)


def odd(trajectory):
    sample = trajectory.samples[0]
    return float(sample.tokens[sample.mask.index(True)] % 2)


def drawn(trajectory):
    """A judge who throws dice, with the process's own generators."""
    return random.gauss(0, 1) + np.random.randn() + random.random()
'''
WIDTH = 32  # bytes of the file in which a run notes its phase
UNKNOWN = "not noted"  # the phase of a program that is rlft itself
STOPWATCH = ("time/", "sync/seconds")  # what may differ between two runs: the clock
PHASES = ("evaluating", "syncing", "sampling", "learning", "recording")  # beside loading and saving


class Server:
    """Forks runs. Each is a session of its own, so that whatever it starts can be found.

    folder: for their log, temporary files and the module of rewards `rlft_killed_rewards`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "rlft_killed_rewards.py").write_text(REWARDS)
        self._log = folder / "log"
        paths = [str(Path(__file__).parent.parent), str(folder), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__, "serve"], env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(self, *arguments: object) -> Life:
        """rlft with these arguments, in a forked process."""
        pid = self._ask("start", str(self._notes()), str(self._log), *map(str, arguments))
        return Life(pid, lambda: self._ask("wait", pid), self.log)

    def program(self, *arguments: object, noting: bool = False) -> Life:
        """The same as a program of its own, which imports everything itself. noting: it says its phases too."""
        self._notes().write_bytes((b"" if noting else UNKNOWN.encode()).ljust(WIDTH, b"\0"))
        how = [__file__, "once", str(self._notes())] if noting else ["-m", "rlft.cli"]
        with open(self._log, "wb") as out:
            command = [sys.executable, *how, *map(str, arguments)]
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        return Life(process.pid, process.wait, self.log)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def phase(self) -> str:
        """What the newest run is doing, or was when it was killed."""
        return self._notes().read_bytes().rstrip(b"\0").decode() or "loading"

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def _notes(self) -> Path:
        return self._folder / "notes"

    def _ask(self, *words: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


class Life:
    """One process of a run."""

    def __init__(self, pid: int, end: Callable[[], int], log: Callable[[], str]) -> None:
        self.pid = pid
        self.end = end  # let it end: its exit code, or minus the signal
        self.log = log

    def alive(self) -> bool:
        """It has not ended."""
        return _runs(self.pid)

    def kill(self, when: Callable[[], bool], limit: float = 60.0) -> bool:
        """kill -9 when it is time; False where it ended before."""
        deadline = time.monotonic() + limit
        while not when():
            if not self.alive():
                break
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.end() == -signal.SIGKILL


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def family(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


# What must be the same.


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all of them whole, without the clock."""
    text = (run / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(STOPWATCH)}
        for line in text.splitlines()
    ]


def samples(run: Path, kind: str = "rollouts") -> dict[str, str]:
    """Every column of every file of samples, exactly."""
    import pyarrow.parquet as pq

    return {path.name: repr(pq.read_table(path).to_pylist()) for path in sorted((run / kind).glob("*"))}


def checkpoint(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same(run: Path, whole: Path) -> None:
    """Prompts, samples, metrics, checkpoints with all that is in them, and which files there are."""
    assert rows(run) == rows(whole)
    for kind in ("rollouts", "eval"):
        assert samples(run, kind) == samples(whole, kind)
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    for name in names:
        ours, theirs = (checkpoint(folder / "checkpoints" / name) for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        differ = [file for file in ours if ours[file] != theirs[file]]
        assert not differ, (name, differ)
    listed = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (run, whole)]
    assert listed[0] == listed[1]


# The other side.


def serve() -> None:
    """Answer lines until there are no more: `start` with a process id, `wait` with an exit code."""
    import rlft.cli
    import rlft.session  # noqa: F401  (everything that a run imports)

    for name in ("transformers.models.llama.modeling_llama", "peft", "pyarrow.parquet", "pandas"):
        __import__(name)
    import transformers

    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast
    for line in sys.stdin:
        what, *words = json.loads(line)
        if what == "wait":
            print(os.waitstatus_to_exitcode(os.waitpid(words[0], 0)[1]), flush=True)
            continue
        notes, log, *arguments = words
        Path(notes).write_bytes(b"\0" * WIDTH)
        if not (pid := os.fork()):
            os.setsid()
            with open(log, "wb") as out, open(os.devnull) as nothing:
                for mine, theirs in ((nothing, 0), (out, 1), (out, 2)):
                    os.dup2(mine.fileno(), theirs)
            _run(notes, arguments)
        print(pid, flush=True)


def _run(notes: str, arguments: Sequence[str]) -> None:
    import rlft.cli

    _note_phases(Path(notes))
    sys.argv = ["rlft", *arguments]
    code: Any = 1
    try:
        rlft.cli.main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _note_phases(file: Path) -> None:
    """Write down what the run is doing, where it stays when the run is killed; it changes nothing else."""
    from rlft.checkpoint import Checkpoints
    from rlft.evaluate import Evaluation
    from rlft.hooks import Around
    from rlft.learner import Learner
    from rlft.sync import Sync
    from rlft.track import Record
    from rlft.trainer import Run

    with file.open("r+b") as opened:
        board = mmap.mmap(opened.fileno(), WIDTH)
    places = [
        (Evaluation, "__call__", "evaluating"), (Sync, "__call__", "syncing"), (Run, "draw", "sampling"),
        (Learner, "update", "learning"), (Record, "trajectories", "recording"), (Record, "metrics", "recording"),
        (Checkpoints, "save", "saving"), (Around, "finish", "ending"),
    ]  # fmt: skip
    for kind, name, phase in places:
        setattr(kind, name, _noting(getattr(kind, name), phase, board))


@contextlib.contextmanager
def _noted(phase: str, board: mmap.mmap) -> Iterator[None]:
    before = board[:]
    board[:] = phase.encode().ljust(WIDTH, b"\0")
    yield
    board[:] = before


def _noting(function: Callable[..., Any], phase: str, board: mmap.mmap) -> Callable[..., Any]:
    @functools.wraps(function)
    async def waits(*arguments: Any, **named: Any) -> Any:
        with _noted(phase, board):
            return await function(*arguments, **named)

    @functools.wraps(function)
    def ends(*arguments: Any, **named: Any) -> Any:
        with _noted(phase, board):
            return function(*arguments, **named)

    return waits if inspect.iscoroutinefunction(function) else ends


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        _run(sys.argv[2], sys.argv[3:])
