"""The interpreter that keeps its state: what a piece may take, and both environments that use it."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rlft.envs.base import Action
from rlft.envs.tools.calling import ToolsConfig
from rlft.envs.tools.programs import PythonConfig
from rlft.sandbox.interpreter import Interpreter, Limits
from rlft.sandbox.programs import SandboxError
from rlft.types import InputError, Turn
from tests.envs.test_tools import TASK, called, play, told

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
SHORT = Limits(seconds=0.5, wall=1.0, memory=128, output=1000)


@pytest.fixture
def interpreter() -> Iterator[Interpreter]:
    made = Interpreter(SHORT)
    yield made
    made.close()


@pytest.mark.parametrize(("piece", "text"), [
    ("6 * 7", "42\n"),
    ("x = 1", ""),
    ("print('a')\n'b'", "a\n'b'\n"),
    ("None", ""),
    ("for i in range(2):\n    print(i)", "0\n1\n"),
    ("import sys; print('wrong', file=sys.stderr)", "wrong\n"),
    ("raise SystemExit(3)", ""),
])  # fmt: skip
def test_what_a_piece_says(interpreter: Interpreter, piece: str, text: str) -> None:
    said = interpreter.run(piece)
    assert (said.text, said.raised, said.reason, said.lost) == (text, False, "", False)


def test_names_stay_from_piece_to_piece(interpreter: Interpreter) -> None:
    pieces = [
        "import math",
        "def f(x):\n    return math.sqrt(x) + n",
        "n = 1",
        "f(9)",
        "open('notes', 'w').write('hm')",
    ]
    for piece in pieces:
        assert not interpreter.run(piece).raised
    assert interpreter.run("n += 1; f(9), open('notes').read()").text == "(5.0, 'hm')\n"


def test_an_error_is_told_as_python_tells_it_and_costs_nothing_else(interpreter: Interpreter) -> None:
    interpreter.run("x = 4")
    said = interpreter.run("y = x\ny / 0")
    assert said.raised
    assert said.text == (
        'Traceback (most recent call last):\n  File "program.py", line 2, in <module>\n'
        "ZeroDivisionError: division by zero\n"
    )
    assert interpreter.run("def f(:").text.endswith("SyntaxError: invalid syntax\n")
    assert interpreter.run("x + y").text == "8\n"


@pytest.mark.parametrize(("piece", "reason", "most"), [
    ("while True: pass", "timeout", 0.9),  # processor time
    ("import time; time.sleep(60)", "timeout", 1.6),  # on the clock
    ("while True: print('x' * 99)", "output", 1.0),
])  # fmt: skip
def test_a_piece_that_goes_too_far_is_interrupted_and_the_state_stays(
    interpreter: Interpreter, piece: str, reason: str, most: float
) -> None:
    interpreter.run("x = 5")
    start = time.monotonic()
    said = interpreter.run(piece)
    assert (said.reason, said.lost) == (reason, False)
    assert time.monotonic() - start < most + 1.5  # for a machine with other work
    assert len(said.text) <= 1000
    assert interpreter.run("x").text == "5\n"


def test_one_that_does_not_heed_it_is_ended_and_begins_anew(interpreter: Interpreter) -> None:
    interpreter.run("x = 5")
    said = interpreter.run("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass")
    assert (said.reason, said.lost) == ("timeout", True)
    after = interpreter.run("'x' in globals()")
    assert (after.text, after.fresh) == ("False\n", True)


def test_memory_is_limited_and_the_state_stays(interpreter: Interpreter) -> None:
    interpreter.run("x = 5")
    assert "MemoryError" in interpreter.run("b = bytearray(10 ** 9)").text
    assert interpreter.run("x").text == "5\n"


@pytest.mark.parametrize("piece", ["import os; os._exit(0)", "import ctypes; ctypes.string_at(0)"])
def test_a_process_that_ends_is_followed_by_another(interpreter: Interpreter, piece: str) -> None:
    interpreter.run("x = 5")
    assert interpreter.run(piece).lost
    assert interpreter.run("'x' in globals()").text == "False\n"


def test_the_walls_stand(interpreter: Interpreter) -> None:
    interpreter.run("import os, socket, subprocess")
    for piece in ("socket.socket()", "subprocess.run(['ls'])", "os.fork()", "open('/etc/passwd')", "os.kill(1, 9)"):
        said = interpreter.run(piece)
        assert said.raised, piece
        assert not said.lost
    assert interpreter.run("os.environ.get('PATH')").text == ""
    assert "rlimits" in interpreter.walls


def test_two_interpreters_see_nothing_of_each_other() -> None:
    one, other = Interpreter(SHORT), Interpreter(SHORT)
    one.run("secret = 'abc'; open('file', 'w').write(secret)")
    assert other.run("import os; 'secret' in globals(), os.listdir()").text == "(False, [])\n"
    one.close()
    after = Interpreter(SHORT)  # by the process that the first one used
    assert after.run("import os; 'secret' in globals(), os.listdir()").text == "(False, [])\n"
    other.close()
    after.close()


def test_nothing_runs_between_the_pieces(interpreter: Interpreter) -> None:
    """A thread that goes on would take time from whoever generates."""
    interpreter.run("import threading\nn = 0\ndef count():\n    global n\n    while True: n += 1")
    interpreter.run("threading.Thread(target=count, daemon=True).start()")
    before = int(interpreter.run("n").text)
    time.sleep(0.5)
    after = int(interpreter.run("n").text)
    alone = int(interpreter.run("import time\nm = n\ntime.sleep(0.3)\nn - m").text)
    assert after - before < alone / 2


def test_closing_ends_a_piece_that_runs() -> None:
    made = Interpreter(Limits(seconds=30))
    made.run("x = 1")
    threading.Timer(0.3, made.close).start()
    start = time.monotonic()
    with pytest.raises(SandboxError, match="closed"):
        made.run("import time; time.sleep(30)")
    assert time.monotonic() - start < 5
    made.close()
    with pytest.raises(SandboxError, match="closed"):
        made.run("x")


def test_many_episodes_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def episode(number: int) -> str:
        made = Interpreter(SHORT)
        try:
            made.run(f"x = {number}")
            return made.run("x * 2").text
        finally:
            made.close()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        list(pool.map(episode, range(8)))  # the processes that wait for more are there now
        gc.collect()
        files = len(os.listdir("/proc/self/fd"))
        assert list(pool.map(episode, range(60))) == [f"{2 * i}\n" for i in range(60)]
        assert len(os.listdir("/proc/self/fd")) <= files
        assert len(os.listdir(folder)) <= 4  # no more than were open at once


def knobs(**more: Any) -> PythonConfig:
    return PythonConfig.model_validate({"seconds": 0.5, **more})


def block(code: str) -> str:
    return f"Let me compute.\n```python\n{code}\n```\n"


def test_the_blocks_of_an_answer_run_and_are_shown() -> None:
    first, second, last = play(knobs(), block("x = 2 + 3"), block("x * 2") + block("x * 3"), "It is 15.")
    assert told(first) == ["```output\n[nothing was printed]\n```\n"]
    assert told(second) == ["```output\n10\n15\n```\n"]
    assert (last.done, last.messages) == (True, ())
    assert last.metrics == {"python_calls": 3, "python_errors": 0}


def test_blocks_of_other_languages_and_open_ones_do_not_run() -> None:
    (turn,) = play(knobs(), "```\nx = 1\n```\n```bash\nls\n```\n```python\nx = 2\n")
    assert turn.done
    assert turn.metrics["python_calls"] == 0


def test_an_answer_that_was_cut_off_runs_nothing() -> None:
    (turn,) = play(knobs(), block("x = 1"), finish="length")
    assert turn.metrics["python_calls"] == 0


def test_what_went_wrong_is_shown_and_counted() -> None:
    (turn,) = play(knobs(), block("1 / 0") + block("while True: pass") + block("import os; os._exit(1)"))
    shown = told(turn)[0]
    assert "ZeroDivisionError" in shown
    assert "[it took too long and was stopped]" in shown
    assert "[the interpreter ended, and what was defined is gone]" in shown
    assert turn.metrics == {"python_calls": 3, "python_errors": 3}


def test_output_is_cut_and_the_last_answer_s_code_ends_the_episode() -> None:
    first, last = play(knobs(longest=20, most_answers=2), block("print('a' * 50)"), block("1"))
    assert told(first) == ["```output\n" + "a" * 20 + "\n[30 more characters were left out]\n```\n"]
    assert last.done
    (many,) = play(knobs(longest=20), block("print('a' * 50)") * 30)
    assert told(many) == ["```output\n" + "a" * 20 + "\n[1509 more characters were left out]\n```\n"]


def test_hints_suggest_code() -> None:
    hints = [{"text": "Check it with Python."}, {"text": "Sure?"}]
    turns = play(knobs(hints=hints), "It is 15.", block("5 * 3"), "It is 15.", "Yes.")
    assert [told(turn) for turn in turns] == [["Check it with Python."], ["```output\n15\n```\n"], ["Sure?"], []]
    assert [turn.done for turn in turns] == [False, False, False, True]


def test_the_instructions_stand_in_front() -> None:
    async def opened() -> Any:
        env = knobs(instructions="Use Python.").build()(TASK)
        return await env.reset()

    assert asyncio.run(opened()) == ({"role": "user", "content": "Use Python.\n\nWhat is 2 + 3?"},)


def test_a_message_that_shows_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="so that nothing would be shown"):
        knobs(message="```output```")
    with pytest.raises(InputError, match="no command 'nothing-of-the-kind'"):
        knobs(through=["nothing-of-the-kind"]).build()


def test_the_interpreter_as_a_tool() -> None:
    made = ToolsConfig.model_validate({"python": {"seconds": 0.5}, "format": "hermes"})
    two = called("python", code="x = 6") + called("python", code="```python\nx * 7\n```")
    first, wrong = play(made, two, called("python", program="1"))
    assert told(first) == ["[nothing was printed]", "42"]
    assert told(wrong) == ["Error: python: it takes one argument, 'code', a text. It takes: python(code: string)"]
    assert wrong.metrics["python_calls"] == 2
    assert (wrong.metrics["calls"], wrong.metrics["call_errors"]) == (3, 1)


def test_many_episodes_at_once_in_real_time() -> None:
    """24 episodes of three pieces each, all open together."""

    async def episode(make: Any, number: int) -> Turn:
        env = make(TASK)
        await env.reset()
        try:
            for code in (f"x = {number}", "x += 1"):
                await env.step(Action(block(code), "stop"))
            return await env.step(Action(block("x"), "stop"))
        finally:
            await env.close()

    async def all_of_them() -> list[Turn]:
        make = knobs(seconds=5, most_answers=5).build()
        return await asyncio.gather(*(episode(make, i) for i in range(24)))

    turns = asyncio.run(all_of_them())
    assert [told(turn) for turn in turns] == [[f"```output\n{i + 1}\n```\n"] for i in range(24)]
