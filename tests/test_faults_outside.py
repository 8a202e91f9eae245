"""Rewards that stand on something outside of the run, when that fails in its middle, for real: processes are killed or
stopped, a sandbox no longer starts, a server answers with errors, rubbish or nothing and goes away, a model's weights
turn to NaN and its folder is removed. And what a run is told that lacks them from the start.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import rlft.rewards.judge as reward_models
from rlft.config_data import ReasoningGym
from rlft.rewards import language, reasoning_gym, sentences
from rlft.rewards import math as maths
from rlft.rewards.code import Code, Program, Syntax
from rlft.rewards.math import Math
from rlft.rows import rows_of
from rlft.session import begin, resume
from rlft.terminal import Terminal
from rlft.types import InputError, RunError
from tests.faulty import Left, acting, children, config, fault_of, run, speaks, written
from tests.rewards.scripted import Answer, Asked, chat, scored, serving

Row = dict[str, Any]
pytestmark = pytest.mark.usefixtures("one_thread")
FIRST = {"type": "custom", "path": "tests.faulty:hooked", "per": "group"}


def after_the_hook(of: Row) -> Row:
    """A reward whose group is judged when the test has done what it does."""
    return {"type": "gated", "gate": FIRST, "of": of}


def send(word: str, what: int) -> Callable[[], None]:
    """Sends a signal to the children with a word in their command, of which there must be one, till they obey."""

    def strike() -> None:
        pids = children(word)
        assert pids, f"no process of {word}"
        for pid in pids:
            os.kill(pid, what)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)  # the judge finds it as it is

    return strike


# Processes.


def test_math_whose_process_is_killed_or_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle one is replaced and costs nothing. One that ends at work, or stands still, costs the answer before it."""
    faults = ["", "idle", "", "killed", "", "stopped", "", ""]
    written(tmp_path, faults, answer=[f"x+{i}" for i in range(2, 10)])  # other ones, or they would be remembered

    def says(info: Mapping[str, Any], place: int) -> str:
        if place and info["fault"] in ("killed", "stopped"):
            return ""  # no process is asked
        tower = info["fault"] == "killed"
        return r"\boxed{9^{9^{9^9}} + x}" if tower else rf"\boxed{{{info['answer'][2:]}+x}}"

    def stop() -> None:
        send("math_worker.py", signal.SIGSTOP)()
        monkeypatch.setattr(maths, "START", -49.0)  # of 60, so that this test waits a second and not a minute

    speaks(monkeypatch, Math, says)
    acts = {
        "idle": send("math_worker.py", signal.SIGKILL),
        "killed": soon(send("math_worker.py", signal.SIGKILL)),
        "stopped": stop,
        "": lambda: monkeypatch.setattr(maths, "START", 60.0),
    }
    with acting(acts):
        reward = after_the_hook({"type": "math", "workers": 1})
        left = run(config(tiny_model, tmp_path, reward, tasks=1))
    assert left.failed() == Counter({("gated/of", "raised", "killed"): 1, ("gated/of", "timeout", "stopped"): 1})
    left.whole(without={"killed": 1, "stopped": 1})
    said = {line["kind"]: line["said"] for line in left.lines}
    assert "ended with code -9" in said["raised"]
    assert "stood still for 1 s and was ended" in said["timeout"]
    assert left.scores("") + left.scores("idle") == [1.0] * 24, "every other answer is judged, and rightly"
    assert left.scores("killed") == left.scores("stopped") == [None, 0.0, 0.0, 0.0]


def test_scorers_of_reasoning_gym_that_are_killed_or_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with math; every task has one answer, which is right."""
    pytest.importorskip("reasoning_gym")
    faults = ["", "idle", "stopped", "", ""]
    sums = list(rows_of(ReasoningGym(dataset="chain_sum", count=len(faults)), "train"))
    written(tmp_path, faults, entry=[row["entry"] for row in sums], answer=[row["answer"] for row in sums])

    def stop() -> None:
        send("reasoning_gym_worker", signal.SIGSTOP)()
        monkeypatch.setattr(reasoning_gym, "STILL", -19.0)  # of 20: a second

    speaks(monkeypatch, reasoning_gym.ReasoningGym, lambda info, _: info["answer"])
    idle = send("reasoning_gym_worker", signal.SIGKILL)
    acts = {"idle": idle, "stopped": stop, "": lambda: monkeypatch.setattr(reasoning_gym, "STILL", 120.0)}
    changes: Row = {"group_size": 1, "algorithm": {"type": "reinforce"}}
    with acting(acts):
        left = run(config(tiny_model, tmp_path, after_the_hook({"type": "reasoning_gym"}), tasks=1, **changes))
    assert left.failed() == Counter({("gated/of", "timeout", "stopped"): 1})
    left.whole(without={"stopped": 1})
    assert left.scores("") + left.scores("idle") == [1.0] * 4


def soon(act: Callable[[], None]) -> Callable[[], None]:
    """The same a moment later, when the judge is at work."""

    def later() -> None:
        clock = threading.Timer(0.3, act)
        clock.daemon = True
        clock.start()

    return later


def test_a_sandbox_that_is_killed_and_one_that_no_longer_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting processes are replaced. A program that hangs is a wrong program. No sandbox is no verdict."""
    broken = tmp_path / "broken"
    through = tmp_path / "through"
    through.write_text(f'#!/bin/sh\n[ -e {broken} ] && echo "no room" >&2 && exit 7\nexec "$@"\n')
    through.chmod(0o755)
    written(tmp_path, ["", "killed", "hang", "broken", "mended", ""], tests="assert f() == 12", answer=12)
    says = lambda info, _: "while True: pass" if info["fault"] == "hang" else "def f():\n    return 12\nprint(f())"  # noqa: E731
    for kind in (Code, Program, Syntax):
        speaks(monkeypatch, kind, says)
    own = {"seconds": 0.3, "through": [str(through)], "workers": 1}
    terms = {kind: {"type": kind, **own} for kind in ("code", "program", "syntax")}

    def breaks() -> None:
        broken.touch()
        send("jail", signal.SIGKILL)()

    acts = {"killed": send("jail", signal.SIGKILL), "broken": breaks, "mended": broken.unlink}
    changes: Row = {"group_size": 2, "algorithm": {"type": "rloo"}}
    with acting(acts):
        reward = after_the_hook({"type": "weighted", "terms": terms})
        left = run(config(tiny_model, tmp_path, reward, tasks=1, **changes))
    assert left.failed() == Counter({(f"gated/of/{kind}", "raised", "broken"): 2 for kind in terms})
    left.whole(without={"broken": 2})
    assert all("SandboxError: the sandbox did not start, code 7: no room" in line["said"] for line in left.lines)
    assert left.scores("killed") == left.scores("mended") == [3.0, 3.0]
    assert left.scores("hang") == [1.0, 1.0], "valid syntax, but no program that ends"


# Servers.

SERVED = {"remote": "/score", "served_model": "/classify", "judge": "/chat/completions"}
ODD = {"error": "raised", "hang": "timeout", "nan": "raised", "count": "raised", "garbage": "raised"}


def plain(value: Any, status: int = 200, wait: float = 0.0) -> Answer:
    """A reply after which the connection is closed, so that a server that is gone is gone."""
    return Answer(json.dumps(value).encode(), status, {"Connection": "close"}, wait)


def right(path: str, asked: Asked, verdict: Any) -> Any:
    """What a server of that kind says where all is well, with this verdict."""
    if path == "/score":
        size = len(asked.body["groups"][0]["trajectories"])
        empty: list[Row] = [{} for _ in range(size)]
        judged = {"verdicts": [verdict] * size, "metrics": empty, "failures": [[] for _ in range(size)]}
        return {"terms": [], "groups": [judged]}
    if path == "/classify":
        return {"data": [{"probs": [verdict]}]}
    return json.loads(chat(scored(1 + 9 * verdict)).body)


def wrong_count(path: str, asked: Asked) -> Any:
    """Fewer verdicts than there are answers, or none where there is one."""
    said = right(path, asked, 0.5)
    if path == "/score":
        said["groups"][0]["verdicts"].pop()
    return said | ({"data": []} if path == "/classify" else {"choices": []} if path != "/score" else {})


def answered(asked: Asked) -> Answer:
    """By the task's fault, which the prompt ends on as `<kind>-<how>`; other kinds have their verdict."""
    kind, path = next((kind, path) for kind, path in SERVED.items() if asked.path.endswith(path))
    how = next((how for how in ODD if f"{kind}-{how}" in json.dumps(asked.body)), "")
    return {
        "": lambda: plain(right(path, asked, 0.5)),
        "error": lambda: plain({"error": "out of memory"}, status=500),
        "hang": lambda: plain(right(path, asked, 0.5), wait=4.0),
        "nan": lambda: plain(right(path, asked, float("nan"))),
        "count": lambda: plain(wrong_count(path, asked)),
        "garbage": lambda: Answer(b"<html>busy</html>", 200, {"Connection": "close"}),
    }[how]()


def served(url: str) -> dict[str, Row]:
    """A block of each kind of reward that asks a server."""
    how: Row = {"url": url, "timeout": 2.5, "retries": 1, "backoff": 0.01}
    return {
        "remote": {"type": "remote", **how},
        "served_model": {"type": "served_model", "model": "m", **how},
        "judge": {"type": "judge", "judges": {"one": {"model": "m", **how}}},
    }


def test_servers_that_fail_hang_say_nonsense_and_go_away(tiny_model: Path, tmp_path: Path) -> None:
    """Each fault is of one kind of reward and one task; in the end the server is shut down for all of them."""
    faults = [f"{kind}-{how}" for how in ODD for kind in SERVED]
    written(tmp_path, [*faults, "", "", "", "absent", "absent", "absent"])
    with serving(answered) as server:
        once = threading.Lock()

        def close() -> None:
            with once:  # whoever comes second waits until it is closed
                server.close()

        with acting({"absent": close}):
            reward = after_the_hook({"type": "weighted", "terms": served(server.url)})
            changes: Row = {"group_size": 2, "algorithm": {"type": "rloo"}}
            left = run(config(tiny_model, tmp_path, reward, tasks=3, **changes))
    expected = {(fault.partition("-")[0], ODD[fault.partition("-")[2]], fault): 2 for fault in faults}
    expected |= {(kind, "raised", "absent"): 6 for kind in SERVED}
    assert left.failed() == Counter({(f"gated/of/{kind}", *more): count for (kind, *more), count in expected.items()})
    left.whole(without=dict.fromkeys([*faults, "absent"], 2))
    assert left.scores("") == [1.5] * 6
    assert all("cannot be reached" in line["said"] for line in left.lines if fault_of(line) == "absent")
    # A group of `remote` is one request, of the others two; what may pass is tried twice: an error, and silence.
    groups = len(faults) + 3 + 2
    assert Counter(one.path for one in server.asked) == {
        f"/v1{path}": groups if kind == "remote" else 2 * groups for kind, path in SERVED.items()
    }


# A model.


def test_a_model_whose_weights_turn_to_nan_and_whose_folder_is_removed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward model that a run has trained just before."""
    (tmp_path / "judge").mkdir()
    pairs = tmp_path / "judge/train.jsonl"
    pairs.write_text((json.dumps({"prompt": "Say four", "chosen": "four", "rejected": "one"}) + "\n") * 4)
    learning: Row = {"algorithm": {"type": "reward_model"}, "data__columns": {}, "checkpoint__every": 1}
    made = config(tiny_model, pairs.parent, None, tasks=2, **learning)
    assert begin(made, Terminal(Console(quiet=True))) == 0
    trained = Path(made.out)
    loaded: list[Any] = []
    real = reward_models._load

    def load(*arguments: Any) -> Any:
        loaded.append(real(*arguments))
        return loaded[-1]

    def fill(value: float) -> Callable[[], Any]:
        return lambda: torch.nn.init.constant_(loaded[-1].head.weight, value)

    monkeypatch.setattr(reward_models, "_load", load)
    written(tmp_path, ["", "nan", "mended", ""])
    reward = after_the_hook({"type": "model", "path": str(trained), "device": "cpu"})
    with acting({"nan": fill(float("nan")), "mended": fill(0.5)}):
        left = run(config(tiny_model, tmp_path, reward, tasks=1, checkpoint__every=1))
    assert left.failed() == {("gated/of", "nan", "nan"): 4}
    left.whole(without={"nan": 4})
    shutil.rmtree(trained)
    with pytest.raises(InputError, match=r"reward `model`: .*judge/run is neither a run with checkpoints nor"):
        resume(left.folder, ["steps=5"], Terminal(Console(quiet=True)))
    assert Left.of(left.folder).metrics == left.metrics, "nothing was begun"


# What is not there from the start.

NO_SERVER = {"url": "http://127.0.0.1:9", "retries": 0, "timeout": 5.0}  # port 9 is `discard`, where nobody listens
MISSING: dict[str, tuple[Row, str]] = {  # what the block lacks, and what is said
    "model": (
        {"path": "no/such/run"},
        "reward `model`: no/such/run is neither a run with checkpoints nor a checkpoint",
    ),
    "custom": ({"path": "no_such_module:f"}, "importing 'no_such_module' failed .* Install the package"),
    "code": ({"through": ["no-such-command"]}, "through: there is no command 'no-such-command' here; install it"),
    "judge": (
        {"judges": {"one": {**NO_SERVER, "model": "m", "api_key_env": "NO_SUCH_KEY"}}},
        "api_key_env: the environment variable NO_SUCH_KEY is not set.* Set it",
    ),
    "remote": ({**NO_SERVER, "api_key_env": "NO_SUCH_KEY"}, "api_key_env: .* NO_SUCH_KEY is not set.* Set it"),
    "served_model": (
        {**NO_SERVER, "model": "m", "api_key_env": "NO_SUCH_KEY"},
        "api_key_env: .* NO_SUCH_KEY is not set.* Set it",
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_missed_before_the_run(name: str, tiny_model: Path, tmp_path: Path) -> None:
    block, said = MISSING[name]
    written(tmp_path, [""] * 2, tests="assert f() == 12")
    made = config(tiny_model, tmp_path, {"type": name, **block}, tasks=2)
    with pytest.raises(InputError, match=said):
        run(made)
    assert not (tmp_path / "run/metrics.jsonl").exists()


PACKAGES = {
    "math": "math_verify", "language": "py3langid.langid", "bleu": "sacrebleu.metrics.bleu",
    "rouge": "rouge_score.tokenize", "chrf": "sacrebleu.metrics.chrf", "fuzzy": "rapidfuzz.fuzz",
    "json_schema": "jsonschema", "text_length": "nltk", "remote": "httpx", "served_model": "httpx", "judge": "httpx",
}  # fmt: skip


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_a_package_that_is_not_installed_is_named_with_how_to_install_it(
    name: str, package: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, [""] * 2, answer="12")
    for held in (*vars(language).values(), *vars(sentences).values()):  # what another test may have left there
        getattr(held, "cache_clear", lambda: None)()
    needs = {"language": {"language": "en"}, "text_length": {"at_most": 9, "unit": "sentences"}}
    needs |= {"json_schema": {"accept": {"type": "object"}}, **served("http://127.0.0.1:9")}
    made = config(tiny_model, tmp_path, {"type": name, **needs.get(name, {})}, tasks=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None)
    for module in [*filter(lambda one: one.startswith(package.partition(".")[0]), sys.modules), package]:
        monkeypatch.setitem(sys.modules, module, None)  # which an import takes for one that is not there
    with pytest.raises(InputError, match=r"pip install"):
        run(made)
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("name", SERVED)
def test_a_server_that_was_never_there_ends_the_run_at_its_first_step(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    """It might have come back, so that is said when too many answers have no score, with nothing learned."""
    written(tmp_path, [""] * 2)
    made = config(tiny_model, tmp_path, served("http://127.0.0.1:9")[name], tasks=2, faults__reward=0.25)
    with pytest.raises(RunError, match=rf"8 of 8 .*'{name}'.*127.0.0.1:9.* cannot be reached .* go on with `rlft resu"):
        run(made)
    assert len((tmp_path / "run/failures.jsonl").read_text().splitlines()) == 8
    assert not (tmp_path / "run/metrics.jsonl").exists()
