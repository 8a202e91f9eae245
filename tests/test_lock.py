"""One writer per run: a second one is refused, a dead one never is in the way, and nothing of it stays."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

import rlft.chance as chance
from rlft.doctor import _run
from rlft.lock import FILE, Scratch, refuse_in_use, sole_writer
from rlft.session import begin, resume
from rlft.settings import load
from rlft.terminal import Terminal
from rlft.types import InputError
from rlft.whole import remove, replacing, scraps, sweep

HOLD = """
import os, sys, time
from pathlib import Path
from rlft.lock import Scratch, sole_writer
with sole_writer(Path(sys.argv[1]), print):
    {child}
    print(os.getpid(), flush=True)
    time.sleep(600)
"""
CHILDREN = {
    "none": "",
    "forked": "r, w = os.pipe(); os.fork() or (os.write(w, b'.'), time.sleep(600)); os.read(r, 1)",
    "spawned": "import multiprocessing as m; m.get_context('spawn').Process(target=time.sleep, args=(600,)).start()",
    "executed": "import subprocess; subprocess.Popen(['sleep', '600'])",
}


@contextmanager
def holder(folder: Path, child: str = "none") -> Iterator[int]:
    """A process that holds the folder's lock, in a session of its own; its id."""
    script = folder.with_suffix(".py")
    script.write_text(HOLD.format(child=CHILDREN[child]).replace("\nwith", "\nif __name__ == '__main__':\n  with"))
    held = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert held.stdout is not None
        yield int(held.stdout.readline())
    finally:
        os.killpg(held.pid, signal.SIGKILL)
        held.wait()


def silent(text: str) -> None:
    raise AssertionError(text)


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with holder(folder) as pid:
        for attempt in (lambda: sole_writer(folder, silent).__enter__(), lambda: refuse_in_use(folder)):
            with pytest.raises(InputError, match=rf"process {pid} on {socket.gethostname()}, since 20") as refused:
                attempt()
            assert f"rlft resume {folder}" in str(refused.value)
            assert "out=" in str(refused.value)
        assert json.loads((folder / FILE).read_text())["process"] == pid, "asking changes nothing"


@pytest.mark.parametrize("child", CHILDREN)
def test_kill_9_releases_it_whoever_lives_on(tmp_path: Path, child: str) -> None:
    """Neither a forked, nor a spawned, nor an executed child holds the lock of its dead parent."""
    folder = tmp_path / "run"
    with holder(folder, child) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if child != "none":
            os.killpg(pid, 0)  # the child is alive
        with sole_writer(folder, silent):
            assert json.loads((folder / FILE).read_text())["process"] == os.getpid()
    assert not (folder / FILE).exists()


def test_a_lock_that_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the one before removed it, locked after: another process would lock the new file."""
    flock, calls = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / FILE).unlink()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_writer(tmp_path, silent):
        assert len(calls) == 2
        with pytest.raises(InputError, match="is being written"):
            refuse_in_use(tmp_path)


def test_a_file_system_without_locks_is_said_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    with sole_writer(tmp_path, said.append), Scratch("rlft-test", tmp_path) as scratch:
        assert scratch.is_dir()
    assert said == [f"the file system of {tmp_path} keeps no locks; see to it that no other rlft writes there"]
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_of_a_dead_process_is_removed_by_the_next(tmp_path: Path) -> None:
    code = "import sys, os, signal; from pathlib import Path; from rlft.lock import Scratch\n"
    code += "print(Scratch('rlft-test', Path(sys.argv[1])).path, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    dead = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    left = Path(dead.stdout.strip())
    (left / "weights").write_text("much")
    living = Scratch("rlft-test", tmp_path)
    assert not left.exists()
    with Scratch("rlft-test", tmp_path) as other:
        assert living.path.is_dir(), "of a process that lives"
        assert other != living.path
    living.close()
    assert not list(tmp_path.iterdir())


# In a run.


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"ask": f"Say {i}", "gold": "one"}) + "\n" for i in range(4))
    )
    settings = {
        "name": "locked",
        "steps": 1,
        "out": str(tmp_path / "run"),
        "model": {"path": "tiny-random", "device": "cpu"},
        "adapter": {"type": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(tmp_path / "train.jsonl"), "columns": {"prompt": "ask", "completion": "gold"}},
        "rollout": {"tasks_per_step": 2},
        "algorithm": {"type": "sft"},
        "learner": {"lr": 1e-3},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def quiet() -> Terminal:
    return Terminal(Console(quiet=True))


def test_train_and_resume_are_refused_while_another_writes(config: Path) -> None:
    run = config.with_name("run")
    with holder(run) as pid:
        with pytest.raises(InputError, match=f"out: {run} is being written by process {pid}"):
            begin(load(config), quiet())
        assert [path.name for path in run.iterdir()] == [FILE], "nothing was touched"
        (run / "config.yaml").write_text(config.read_text())
        with pytest.raises(InputError, match=f"process {pid}") as refused:
            resume(run, [], quiet())
        assert _run(run) == (True, f"{run} is being trained", str(refused.value)), "doctor says so too"
        (run / "config.yaml").unlink()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert (run / FILE).is_file()
        assert begin(load(config), quiet()) == 0, "what a dead process left is no run"
    assert not (run / FILE).exists()
    with pytest.raises(InputError, match="already holds a run"):
        begin(load(config), quiet())


def test_a_run_that_was_killed_before_it_began_is_begun_or_resumed(config: Path) -> None:
    run = config.with_name("run")
    run.mkdir()
    (run / ".config.yaml.writing-123").write_text("half")
    (run / FILE).touch()
    assert begin(load(config), quiet()) == 0
    assert not scraps(run)
    killed = config.with_name("killed")
    killed.mkdir()
    (killed / "config.yaml").write_text(config.read_text())
    with pytest.raises(InputError, match=f"already holds a run. Go on with it: rlft resume {killed}"):
        begin(load(config, [f"out={killed}"]), quiet())
    assert resume(killed, [], quiet()) == 0
    assert (killed / "checkpoints/step-000001").is_dir()


def test_what_a_kill_left_half_written_is_swept(config: Path) -> None:
    run = config.with_name("run")
    assert begin(load(config), quiet()) == 0
    whole = sorted(run.rglob("*"))
    (run / "checkpoints/.writing-000002-7/adapter").mkdir(parents=True)
    (run / "checkpoints/.removing-step-000000").mkdir()
    for name in (".metrics.jsonl.writing-7", "rollouts/.step-000002.parquet.writing-7", ".environment.json.writing-7"):
        (run / name).write_text("half")
    assert len(scraps(run)) == 5
    assert resume(run, [], quiet()) == 0, "it is finished, and swept all the same"
    assert sorted(run.rglob("*")) == whole


def test_a_folder_is_removed_by_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle leaves half a checkpoint under no checkpoint's name."""
    (tmp_path / "checkpoints/step-000001/adapter").mkdir(parents=True)
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: None)
    remove(tmp_path / "checkpoints/step-000001")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".removing-step-000001"]
    monkeypatch.undo()
    sweep(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def half() -> None:
        with replacing(path) as scratch:
            scratch.write_text("hal")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "before")]
    with replacing(path) as scratch:
        scratch.write_text("after")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "after")]


# Random states.


def drawn() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), float(torch.rand(()))]


@pytest.mark.parametrize("odd", [0, 1], ids=["", "half of a pair of Gaussians waits"])
def test_random_states_come_back(odd: int) -> None:
    chance.begin(3)
    for _ in range(odd):
        drawn_half = random.gauss(0, 1) + np.random.randn()
        assert drawn_half
    kept = chance.states()
    first = [drawn() for _ in range(3)]
    chance.put(kept)
    with chance.undisturbed():
        drawn()
    assert [drawn() for _ in range(3)] == first
    chance.begin(3)
    again = random.random()
    chance.begin(4)
    assert random.random() != again
