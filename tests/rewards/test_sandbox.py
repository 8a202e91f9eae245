"""Programs under test, and programs that attack whoever tests them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlft.sandbox import forge
from rlft.sandbox.programs import Limits, Printed, SandboxError, Verdict, parts, run
from tests.rewards import hostile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
TESTS = ["assert answer(2, 3) == 5", "assert abs(answer(2, 3) - 5) < 1e-6", "assert math.isclose(answer(2, 3), 5)"]
SHORT = Limits(seconds=1, wall=1.5, memory=128)
ATTACKED = Limits(seconds=1, wall=1, memory=128)


class Host:
    """What must not be read, changed, reached or ended from inside."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / "canary.txt"
        self.canary.write_text("CANARY of a file")
        self.server = socket.create_server(("127.0.0.1", 0))
        self.reached: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()
        self.neighbour = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    def fill(self, program: str) -> str:
        places = {"canary": self.canary, "pid": self.neighbour.pid, "port": self.server.getsockname()[1]}
        for place, value in places.items():
            program = program.replace("{" + place + "}", str(value))
        return program

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.reached.append(connection.recv(100))

    def is_well(self) -> bool:
        whole = self.canary.read_text() == "CANARY of a file" and os.listdir(self.canary.parent) == ["canary.txt"]
        return whole and not self.reached and self.neighbour.poll() is None


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory):
    made = Host(tmp_path_factory.mktemp("host"))
    yield made
    made.neighbour.kill()
    made.neighbour.wait()
    made.server.close()


@pytest.fixture(scope="module")
def attacks(host: Host) -> dict[str, tuple[Verdict, Verdict, float]]:
    """The verdicts on every hostile program, as functions and as scripts, and the seconds both took, four at a time."""

    def attack(program: str) -> tuple[Verdict, Verdict, float]:
        start = time.monotonic()
        program = host.fill(program)
        # Twice, so that one that leaves something behind for the next test is seen.
        as_functions = run(program, TESTS, ATTACKED)
        as_script = run(program, [Printed("2 3", "5")] * 2, ATTACKED)
        return as_functions, as_script, time.monotonic() - start

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setenv("RLFT_CANARY", "CANARY of the environment")
        return dict(zip(hostile.ALL, pool.map(attack, hostile.ALL.values()), strict=True))


def test_there_are_at_least_60_of_them():
    assert len(hostile.ALL) >= 60


@pytest.mark.parametrize("name", hostile.ALL)
def test_hostile(name: str, attacks: dict[str, tuple[Verdict, Verdict, float]], host: Host):
    as_functions, as_script, seconds = attacks[name]
    assert (as_functions.passed, as_script.passed) == (0, 0), "it passed"
    assert seconds < 5 * (1 + 4) + 10, "it took longer than five tests may"
    outcomes = (*as_functions.outcomes, *as_script.outcomes)
    assert not any("CANARY" in outcome.said + outcome.error for outcome in outcomes), "it got hold of something"
    assert host.is_well()


def descendants() -> dict[int, int]:
    """The processes below this one, by their numbers, and their parents'."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    rows = {int(pid): int(parent) for pid, parent in map(str.split, listed.splitlines())}
    below = {os.getpid(): 0}
    while more := {pid: parent for pid, parent in rows.items() if parent in below and pid not in below}:
        below |= more
    return below


def test_the_attacks_leave_nothing_behind(attacks: dict[str, tuple[Verdict, Verdict, float]]):
    """Left are the processes that wait for the next job, each with one that reads it."""
    time.sleep(0.2)  # for the last job's process to be followed by the next one
    waiting = [one.process.pid for idle in forge._idle.values() for one in idle.queue]
    assert waiting
    parents = list(descendants().values())
    assert [parents.count(pid) for pid in waiting] == [1] * len(waiting)
    readers = {pid for pid, parent in descendants().items() if parent in waiting}
    assert not [parent for parent in parents if parent in readers]
    # The machine still does what it did, and an honest program still passes.
    assert run("def answer(a, b):\n    return a + b", ["assert answer(2, 3) == 5"]).passed == 1


def test_while_a_program_runs_it_is_seen():
    """Which shows that the test before this one looks in the right place."""
    before = len(descendants())
    thread = threading.Thread(target=run, args=("import time\ntime.sleep(9)", ["assert 1"], SHORT))
    thread.start()
    time.sleep(0.7)
    assert len(descendants()) > before
    thread.join()
    time.sleep(0.2)
    assert len(descendants()) <= before + 2  # one more that waits, where none did


def test_the_walls_are_told():
    walls = run("x = 1", ["assert x == 1"]).walls
    assert walls[-1] == "rlimits"
    if os.path.exists("/proc/self/ns/user") and os.getuid() == 0:
        assert {"namespaces", "own files", "seccomp"} <= set(walls)


STACK = """
import math
from dataclasses import dataclass
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
@dataclass
class Point:
    x: int
    y: int
    def __add__(self, other): return Point(self.x + other.x, self.y + other.y)
def sort(items): items.sort()
def fill(table): table['a'] = 1
def apply(f, x): return f(f(x))
def count(n):
    for i in range(n): yield i
def fail(): raise KeyError('no such thing')
LIMIT = (1, [2.5, None], {'k': {3}})
def copy(x): return [x, x]
def sum(a, b): return 'two'
class Queue:
    def push(self, x): return f'pushed {x}'
queue = Queue()
"""


@pytest.mark.parametrize(
    "test",
    [
        "s = Stack()\ns.push(4)\ns.push('b')\nassert len(s) == 2\nassert s.pop() == 'b'\nassert s.items == [4]",
        "assert Point(1, 2) + Point(3, 4) == Point(4, 6)\nassert (Point(1, 2) + Point(1, 1)).x == 2",
        "x = [3, 1, 2]\nsort(x)\nassert x == [1, 2, 3]",
        "t = {}\nfill(t)\nassert t == {'a': 1}",
        "assert apply(lambda v: v * 3, 2) == 18",
        "assert list(count(4)) == [0, 1, 2, 3]\nassert sum(count(5)) == 10",
        "assert LIMIT == (1, [2.5, None], {'k': {3}})",
        "assert math.isclose(LIMIT[1][0], 2.5)",
        "try:\n    fail()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "def check(candidate):\n    assert candidate([1]) is None\ncheck(sort)",
        # Names of builtins and of standard modules that the program gives to something of its own.
        "assert copy(3) == [3, 3]",
        "from solution import sum\nassert sum(2, 3) == 'two'",
        "import solution\nassert solution.sum(2, 3) == 'two'",
        "assert queue.push(4) == 'pushed 4'",
    ],
)
def test_a_test_uses_the_program_as_if_it_were_here(test: str):
    verdict = run(STACK, [test])
    assert verdict.passed == 1, verdict.outcomes


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(): return 2", "wrong"),
        ("def f(): return 1 / 0", "error"),
        ("def f(:", "compile"),
        ("def f():\n    while True: pass", "timeout"),
        ("def f(): return [0] * (1 << 30)", "memory"),
        ("def f():\n    while True: print('x' * 9999)", "output"),
    ],
)
def test_the_reason_is_told(program: str, reason: str):
    verdict = run(program, ["assert f() == 1", "assert True"], SHORT)
    assert (verdict.reason, verdict.failed) == (reason, 2 if reason == "compile" else 1)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("print(int(input()) + 1)", None),
        ("print(int(input()) + 1, end='  \\n\\n')", None),
        ("print(int(input()))", "wrong"),
        ("print(3)\nraise ValueError", "error"),
        ("import sys\nprint(3)\nsys.exit(1)", "error"),
        ("print(3)\nimport sys\nsys.exit()", None),
        ("print(3", "compile"),
        ("x = [0] * (1 << 30)", "memory"),
    ],
)
def test_a_script_is_judged_by_what_it_prints(said: str, reason: str | None):
    assert run(said, [Printed("2\n", "3")], SHORT).reason == reason


def test_numbers_may_be_near():
    near = Printed("", "0.3333 yes\n1000000", tolerance=1e-3)
    assert near.equals("0.333 yes \n1000001\n")
    assert not near.equals("0.32 yes\n1000000")
    assert not near.equals("0.333 no\n1000000")
    assert not near.equals("nan yes\n1000000")


def test_large_input_and_output_pass():
    text = "\n".join(map(str, range(100_000)))
    assert run("import sys\nfor line in sys.stdin: print(line, end='')", [Printed(text, text)]).passed == 1


def test_many_tests_are_run_in_several_jobs():
    verdict = run("def f(x): return x * 2", [f"assert f({i}) == {2 * i if i != 130 else 0}" for i in range(140)])
    assert (verdict.passed, verdict.failed) == (139, 1)
    assert not verdict.outcomes[130].passed


def test_a_builtin_stays_pythons_own():
    assert run("def abs(x): return 0", ["assert abs(-3) == 3", "assert abs(-3) == 0"]).passed == 1


def test_sets_have_the_same_order_in_every_process():
    tests = [Printed("", run("print({'a', 'b', 'c', 'd'}, hash('x'))", [Printed("", "")]).outcomes[0].said)]
    with ThreadPoolExecutor(3) as pool:  # a process of its own for each
        verdicts = pool.map(lambda _: run("print({'a', 'b', 'c', 'd'}, hash('x'))", tests), range(3))
    assert [verdict.passed for verdict in verdicts] == [1, 1, 1]


def test_a_process_that_was_ended_while_it_waited_is_replaced():
    assert run("x = 1", ["assert x == 1"], through=["env"]).passed == 1
    idle = forge._idle[("env",)]
    one = idle.queue[0]
    os.killpg(one.process.pid, 9)
    one.process.wait()
    assert run("x = 1", ["assert x == 1"], through=["env"]).passed == 1


FEWER = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]  # no namespaces can be made


@pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="takes rights away that only root has")
def test_without_namespaces_the_other_walls_hold(host: Host):
    def attack(program: str) -> list[Verdict]:
        program = host.fill(program)
        return [run(program, TESTS[:1], SHORT, FEWER), run(program, [Printed("2 3", "5")], SHORT, FEWER)]

    programs = [program for name, program in hostile.ALL.items() if not name.startswith("resources")]
    with ThreadPoolExecutor(2) as pool:
        verdicts = [verdict for pair in pool.map(attack, programs) for verdict in pair]
    assert {verdict.walls for verdict in verdicts} == {("seccomp", "landlock", "rlimits")}
    assert sum(verdict.passed for verdict in verdicts) == 0
    assert not [o for verdict in verdicts for o in verdict.outcomes if "CANARY" in o.said + o.error]
    assert host.is_well()


def test_no_test_is_no_verdict():
    with pytest.raises(ValueError, match="no test"):
        run("x = 1", [])


def test_a_sandbox_that_does_not_start_is_an_error_and_no_verdict():
    with pytest.raises(SandboxError, match="did not start"):
        run("x = 1", ["assert x == 1"], through=["false"])
    with pytest.raises(SandboxError, match="did not start"):
        run("x = 1", ["assert x == 1"], through=["no-such-command"])


def test_it_runs_through_another_command():
    assert run("x = 1", ["assert x == 1"], through=["env", "A=B"]).passed == 1
    shown = run("import os\nprint(os.environ)", [Printed("", "")], through=["env", "A=CANARY"]).outcomes[0].said
    assert "HOME" in shown
    assert "CANARY" not in shown


def test_seccomp_alone_forbids_signals_to_others_and_new_processes():
    """The walls overlap, so that the hostile programs do not show whether this one stands. Numbers are of x86-64."""
    program = (
        "from jail import kernel, seccomp\nimport os, ctypes\nkernel.no_new_privileges()\nseccomp.restrict()\n"
        "os.kill(os.getpid(), 0)\n"
        "for call in (lambda: os.kill(os.getppid(), 0), lambda: os.kill(-1, 0), os.fork, os.setsid,\n"
        "             *(lambda n=n: kernel.syscall(n) for n in (57, 58) if seccomp.kernel.MACHINE == 'x86_64')):\n"
        "    try:\n        call()\n    except PermissionError:\n        continue\n    os._exit(7)\n"
    )
    boot = forge.BOOT.partition("from jail.start")[0] + f"exec({program!r})"
    done = subprocess.run([sys.executable, "-c", boot, str(forge.JAIL)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_parts_of_a_program():
    found = parts("import os.path\nfor i in range(3):\n    print(os.path.join('a', 'b'))")
    assert found is not None
    assert found["nodes"]["For"] == 1
    assert found["calls"] == {"range": 1, "print": 1, "os.path.join": 1}
    assert found["imports"] == {"os.path": 1}
    assert parts("for for") is None
    assert parts("(" * 100_000) is None
