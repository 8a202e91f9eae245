"""Rewards that are judged elsewhere: what a run sees is what it would see had it judged itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from pydantic import TypeAdapter

from rlft.rewards.catalog import RewardConfig
from rlft.rewards.served import wire
from rlft.serve_reward import application, serve
from rlft.settings import load_reward
from rlft.types import Failure, Group, InputError, RunError, Said, Sample, Task, Trajectory
from tests.rewards.scripted import Answer, serving

ROOT = Path(__file__).parents[2]
GRADERS = """
import time

def broken(trajectory):
    if "raise" in trajectory.completion:
        raise ValueError("the grader fell over")
    if "nan" in trajectory.completion:
        return float("nan")
    if "hang" in trajectory.completion:
        time.sleep(5)
    return None if "none" in trajectory.completion else float(trajectory.length)

def few(group):
    return [1.0]

def over(trajectory):
    from rlft.types import RunError
    raise RunError("the licence has run out")
"""


@contextlib.contextmanager
def served(plain: dict[str, Any], key: str = "") -> Iterator[str]:
    """The address at which a reward is served, by the application that `rlft serve-reward` runs."""
    app = application(TypeAdapter(RewardConfig).validate_python(plain), key)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def judged(plain: dict[str, Any], group: Group, name: str | None = None) -> list[float | None]:
    return list(asyncio.run(TypeAdapter(RewardConfig).validate_python(plain).build(name)(group)))  # type: ignore[arg-type]


def left_on(group: Group) -> list[Any]:
    """All that judging left on the trajectories, but for the traces, which tell where it was."""
    return [(t.metrics, [(f.reward, f.kind, f.said, bool(f.trace)) for f in t.failures]) for t in group]


@pytest.fixture
def graders(tmp_path, monkeypatch) -> str:
    """The name of a module with rewards that fail, new for each test."""
    name = f"graders_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


SAID = {
    "number": ["12", "it is 13", "", "7+5=12", "12.0"],
    "math": [r"\boxed{12}", r"$\frac{24}{2}$", r"\boxed{9^{9^{9^9}}}", "no idea", r"\boxed{x^2}"],
}
SUM = {
    "type": "weighted",
    "terms": {
        "right": {"type": "number", "weight": 2.0},
        "style": {"type": "weighted", "terms": {"bare": {"type": "format", "pattern": r"\d+"}}},
    },
}


@pytest.mark.parametrize("kind", SAID)
@pytest.mark.parametrize("name", [None, "far"])
def test_a_served_reward_is_the_local_one(kind, name, play):
    """math's timeout too, which has no score there either."""
    plain = {"type": kind, "weight": 0.5} | ({"seconds": 1.0} if kind == "math" else {})
    here, there = (tuple(play(text, answer="12") for text in SAID[kind]) for _ in range(2))
    expected = judged(plain, here, name or "remote")
    with served(plain) as url:
        assert judged({"type": "remote", "url": url}, there, name) == expected
        assert judged({"type": "remote", "url": url, "weight": 2.0}, there, name) == [
            None if value is None else 2 * value for value in expected
        ]
    assert left_on(there) == left_on(here)
    assert any(expected)


@pytest.mark.parametrize("name", [None, "far"])
def test_the_terms_of_a_served_sum_are_those_of_a_local_one(name, play):
    here, there = (tuple(play(text, answer="12") for text in ("12", "13", "it is 12")) for _ in range(2))
    with served(SUM) as url:
        plain = {"type": "remote", "url": url, "terms": httpx.get(f"{url}/health").json()["terms"]}
        assert plain["terms"] == ["right", "style", "style/bare"]
        assert judged(plain, there, name) == judged(SUM, here, name) == [3.0, 1.0, 2.0]
    assert left_on(there) == left_on(here)
    local, remote = (TypeAdapter(RewardConfig).validate_python(one) for one in (SUM, plain))
    assert remote.components(name) == local.components(name)


def test_terms_that_are_not_the_server_s_are_refused(play):
    with served(SUM) as url, pytest.raises(InputError, match="make them the same"):
        judged({"type": "remote", "url": url, "terms": ["right"]}, (play("12", answer="12"),))


def test_failures_there_are_failures_here(graders, play):
    """Raised, hung, NaN, none at all, and a wrong count: kind and message as if it ran here, and never a zero."""
    broken = {"type": "custom", "path": f"{graders}:broken", "seconds": 0.3}
    few = {"type": "custom", "path": f"{graders}:few", "per": "group"}
    for plain in (broken, few, {"type": "weighted", "terms": {"a": broken, "b": few, "c": {"type": "number"}}}):
        here, there = (tuple(play(t, answer="1") for t in ("raise", "nan", "hang", "none", "1")) for _ in range(2))
        expected = judged(plain, here, "far")
        with served(plain) as url:
            assert judged({"type": "remote", "url": url}, there, "far") == expected
        assert left_on(there) == left_on(here)
        assert any(t.failures for t in there)


def test_judging_again_leaves_nothing_of_the_first_time(graders, play):
    group = (play("raise"),)
    with served({"type": "custom", "path": f"{graders}:broken"}) as url:
        for _ in range(2):
            assert judged({"type": "remote", "url": url}, group) == [None]
            assert len(group[0].failures) == 1


@pytest.mark.parametrize(("function", "kind", "said"), [("over", RunError, "the licence has run out")])
def test_what_means_the_run_there_means_it_here(function, kind, said, graders, play):
    with served({"type": "custom", "path": f"{graders}:{function}"}) as url, pytest.raises(kind, match=said):
        judged({"type": "remote", "url": url}, (play("x"),))
    with served({"type": "number"}) as url, pytest.raises(InputError, match="column 'answer' is missing"):
        judged({"type": "remote", "url": url}, (play("x"),))


@pytest.mark.parametrize(
    "said",
    [
        b"[]",
        b'{"groups": []}',
        b'{"terms": [], "groups": [{"verdicts": [1.0, 1.0], "metrics": [{}], "failures": [[]]}]}',
        b'{"terms": [], "groups": [{"verdicts": [NaN], "metrics": [{}], "failures": [[]]}]}',
        b'{"terms": [], "groups": [{"verdicts": [true], "metrics": [{}], "failures": [[]]}]}',
        b'{"terms": [], "groups": [{"verdicts": ["1"], "metrics": [{}], "failures": [[]]}]}',
    ],
)
def test_a_server_that_is_no_reward_s_is_a_failure(said, play):
    with serving(lambda _: Answer(said)) as server:
        one = play("x")
        assert judged({"type": "remote", "url": server.url}, (one,)) == [None]
        assert [failure.reward for failure in one.failures] == ["remote"]
        assert one.metrics == {"reward/missing": 1.0}


def test_a_server_that_is_down_is_a_failure(play):
    with served({"type": "number"}) as url:
        pass
    one = play("x")
    assert judged({"type": "remote", "url": url, "retries": 1, "backoff": 0.01}, (one,), "far") == [None]
    assert one.failures[0].reward == "far"
    assert "cannot be reached" in one.failures[0].said


def test_the_key_is_asked_for(play, monkeypatch):
    with served({"type": "number"}, key="sk-right") as url:
        plain = {"type": "remote", "url": url, "api_key_env": "GRADER_KEY"}
        monkeypatch.setenv("GRADER_KEY", "sk-right")
        assert judged(plain, (play("12", answer="12"),)) == [1.0]
        monkeypatch.setenv("GRADER_KEY", "sk-wrong")
        with pytest.raises(InputError, match="missing or wrong"):
            judged(plain, (play("12", answer="12"),))
        with pytest.raises(InputError, match="missing or wrong"):
            judged({"type": "remote", "url": url}, (play("12", answer="12"),))


def test_a_request_that_is_none_is_answered(play):
    with served({"type": "number"}) as url:
        for body in (b"{", b"[]", b'{"groups": [{}]}', b'{"groups": [{"task": 1, "trajectories": []}]}'):
            answer = httpx.post(f"{url}/score", content=body)
            assert (answer.status_code, answer.json()["error"]) == (400, "request")
        two = [wire.write((play("12", answer="12"), play("13", answer="12"))), wire.write((play("5", answer="5"),))]
        found = httpx.post(f"{url}/score", json={"groups": two}).json()["groups"]
        assert [one["verdicts"] for one in found] == [[1.0, 0.0], [1.0]]
        assert httpx.get(f"{url}/health").json()["judged"] == 2


def test_what_a_reward_may_look_at_comes_back_as_it_was():
    prompt = {"role": "user", "content": "?"}
    talk = (prompt, {"role": "assistant", "content": "a"}, prompt, {"role": "assistant", "content": "b"})
    sample = Sample([1, 2, 3], [False, True, True], [0.0, -0.5, -0.5], [0.0, 0.25, 0.0], version=3, agent=1)
    said = (Said(talk[:2], 0, 1), Said(({"role": "user", "content": "rewritten"}, talk[3]), 0, 2))
    info = {"answer": 12, "many": [1.5, None, {"x": True}], "odd": float("inf")}
    one = Trajectory(Task("t", (prompt,), info), talk, [sample], finish="length", drawn=2, user=1, said=said)
    one.metrics |= {"turns": 2.0, "reward/other": 1.0}
    (back,) = wire.read(json.loads(json.dumps(wire.write((one,)))))
    assert (back.task, back.messages, back.said) == (one.task, one.messages, one.said)
    assert (back.finish, back.drawn, back.user, back.metrics) == ("length", 2, 1, {"turns": 2.0})
    for own in ("tokens", "mask", "rewards", "version", "agent"):
        assert getattr(back.samples[0], own) == getattr(sample, own)
    assert all(x != x for x in back.samples[0].logprobs)
    assert wire.failures([vars(Failure("served/a", "nan", "x", "y"))], "far") == [Failure("far/a", "nan", "x", "y")]


def test_columns_of_arrays_are_sent_and_those_that_are_no_data_are_named(play):
    group = (play("x", answer=np.float64(1.5), many=np.arange(3)),)
    assert wire.write(group)["task"]["info"] == {"answer": 1.5, "many": [0, 1, 2]}
    with pytest.raises(InputError, match="column 'raw' holds a bytes"):
        wire.write((play("x", raw=b"1"),))


def test_what_pays_on_the_way_is_not_served():
    inner = {"type": "per_turn", "of": {"type": "number"}}
    for plain in (inner, {"type": "weighted", "terms": {"a": inner}}, {"type": "directed", "of": SUM}):
        with pytest.raises(InputError, match="around `type: remote`"):
            application(TypeAdapter(RewardConfig).validate_python(plain))


def test_a_classifier_s_output_is_the_value_and_anything_else_a_failure(play):
    """Against vLLM itself: tests/rewards/test_served_by_vllm.py."""
    plain: dict[str, Any] = {"type": "served_model", "model": "m", "output": 1}
    for said, value in (("[0.25, -1.5]", -1.5), ("[0.25]", None), ("[0, NaN]", None), ('[0, "x"]', None)):
        with serving(lambda _, said=said: Answer(f'{{"data": [{{"probs": {said}}}]}}'.encode())) as server:
            one = play("12")
            assert judged(plain | {"url": server.url.removesuffix("/v1")}, (one,)) == [value]
            assert len(one.failures) == (value is None)
            (asked,) = server.asked
    assert asked.path == "/classify"
    assert asked.body["messages"] == [dict(message) for message in one.messages]
    assert (asked.body["use_activation"], asked.body["add_generation_prompt"]) == (False, False)


def test_turns_may_be_judged_elsewhere(play):
    with served({"type": "number"}) as url:
        one = play("12", chosen=2, answer="12")
        assert judged({"type": "per_turn", "of": {"type": "remote", "url": url}}, (one,)) == [0.0]
        assert sum(one.samples[0].rewards) == 1.0


def test_the_command_serves_a_config(tmp_path, play):
    """In a process of its own, as a user starts it; Ctrl-C ends it with 0."""
    (tmp_path / "grade.yaml").write_text("reward:\n  type: number\n  tolerance: 0.1\n")
    command = [sys.executable, "-m", "rlft.cli", "serve-reward", str(tmp_path / "grade.yaml"), "reward.tolerance=0.5"]
    process = subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        (url,) = re.findall(r"http://127.0.0.1:\d+", line)
        assert "'number'" in line
        assert judged({"type": "remote", "url": url}, tuple(play(t, answer="12") for t in ("12.4", "12.6"))) == [
            1.0,
            0.0,
        ]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


def test_the_command_says_what_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "none.yaml"
    path.write_text("name: x\n")
    with pytest.raises(InputError, match="no `reward:` block"):
        load_reward(path)
    path.write_text("reward: {type: nmber}\n")
    with pytest.raises(InputError, match="did you mean 'number'"):
        load_reward(path)
    path.write_text("reward: {type: number}\n")
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(InputError, match="NO_KEY is not set"):
        serve(path, [], "127.0.0.1", 0, "NO_KEY", print)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="choose another port"):
        serve(path, [], "127.0.0.1", taken.getsockname()[1], None, print)


def test_graders_elsewhere_work_at_the_same_time(graders, play):
    """Eight groups of answers that each hang for 0.3 s: their judging overlaps."""
    with served({"type": "custom", "path": f"{graders}:broken", "seconds": 0.3}) as url:
        reward = TypeAdapter(RewardConfig).validate_python({"type": "remote", "url": url}).build()

        async def all_of_them() -> None:
            await asyncio.gather(*(reward((play("hang"),)) for _ in range(8)))

        begun = time.monotonic()
        asyncio.run(all_of_them())
        assert time.monotonic() - begun < 1.2
