"""How a server is asked: limits, further tries, answers kept on disk, and a key that is written nowhere."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlft.rewards.catalog import RewardConfig
from rlft.types import Group, InputError
from tests.rewards.scripted import Answer, chat, scored, serving, texts

SECRET = "sk-live-7f3b9a1c55d0"
ROOT = Path(__file__).parents[2]


def config(server: Any, name: str = "one", **more: Any) -> dict[str, Any]:
    return {"type": "judge", "judges": {name: server.judge(**more)}}


def built(plain: dict[str, Any], name: str | None = None) -> Any:
    return TypeAdapter(RewardConfig).validate_python(plain).build(name)


def judged(reward: Any, *groups: Group) -> list[list[float | None]]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(reward, groups))

    return asyncio.run(all_of_them())


def failing(*statuses: int, **headers: str) -> Any:
    """Answers with these statuses first, and then with a score."""
    left = list(statuses)
    return lambda _: Answer(b'{"error": "later"}', left.pop(0), headers) if left else chat(scored(10))


def test_requests_of_all_groups_are_under_way_at_once_up_to_the_limit(play):
    """60 requests of 50 ms, one after another 3 s."""
    with serving(lambda _: '{"better": "tie"}', wait=0.05) as server:
        reward = built(config(server) | {"mode": "pairwise"})
        groups = [tuple(play(f"{g} {i}") for i in range(4)) for g in range(5)]
        begun = time.monotonic()
        judged(reward, *groups)
        assert time.monotonic() - begun < 1.5
        assert len(server.asked) == 60
        assert 8 <= server.most <= 16


def test_the_limit_of_concurrent_requests_holds_over_rewards_and_loops(play):
    """Two rewards with one address, key and limits share them; asyncio.run makes a loop of its own each time."""
    with serving(lambda _: scored(10), wait=0.05) as server:
        rewards = [built(config(server, concurrent=3) | {"rubric": rubric}) for rubric in "ab"]

        async def both() -> None:
            await asyncio.gather(*(reward(tuple(play(f"{i}") for i in range(8))) for reward in rewards))

        asyncio.run(both())
        asyncio.run(both())
        assert len(server.asked) == 32
        assert server.most == 3


def test_requests_a_minute_are_spaced(play):
    with serving(lambda _: scored(10)) as server:
        judged(built(config(server, per_minute=300)), tuple(play(f"{i}") for i in range(6)))
        times = [one.at for one in server.asked]
    assert times[-1] - times[0] > 0.8
    assert all(after - before > 0.05 for before, after in pairwise(times))


def test_a_run_s_own_loop_may_be_busy_while_requests_are_under_way(play):
    """What the loop does in one piece, as sampling on a CPU, holds up nothing: the answers are there when it ends."""
    with serving(lambda _: scored(10), wait=0.2) as server:
        reward = built(config(server))

        async def overlapped() -> float:
            asking = asyncio.create_task(reward(tuple(play(f"{i}") for i in range(4))))
            await asyncio.sleep(0.05)
            time.sleep(0.5)
            begun = time.monotonic()
            await asking
            return time.monotonic() - begun

        assert asyncio.run(overlapped()) < 0.15


@pytest.mark.parametrize("statuses", [(500,), (429, 503, 529), (408, 502)])
def test_what_may_pass_is_tried_again(statuses, play):
    with serving(failing(*statuses)) as server:
        kept = random.getstate()
        assert judged(built(config(server)), (play("x"),)) == [[1.0]]
        assert random.getstate() == kept  # the run's chance is its own
        assert len(server.asked) == len(statuses) + 1


def test_tries_end_and_the_failure_says_what_the_server_said(play):
    with serving(lambda _: Answer(b"overloaded", 503)) as server:
        one = play("x")
        assert judged(built(config(server, retries=2)), (one,)) == [[None]]
        assert len(server.asked) == 3
    assert "status 503: overloaded" in one.failures[0].said


def test_waits_double(play):
    with serving(lambda _: Answer(b"", 500)) as server:
        judged(built(config(server, retries=3, backoff=0.1)), (play("x"),))
        times = [one.at for one in server.asked]
    gaps = [after - before for before, after in pairwise(times)]
    for gap, longest in zip(gaps, (0.1, 0.2, 0.4), strict=True):
        assert longest / 2 - 0.01 <= gap <= longest + 0.5


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_cannot_pass_is_not_tried_again(status, play):
    with serving(lambda _: Answer(b"too long", status)) as server:
        one = play("x")
        assert judged(built(config(server)), (one,)) == [[None]]
        assert len(server.asked) == 1
    assert "too long" in one.failures[0].said


@pytest.mark.parametrize(("status", "names"), [(401, "api_key_env"), (403, "api_key_env"), (404, "model")])
def test_what_no_request_can_mend_stops_the_run(status, names, play):
    with serving(lambda _: Answer(b"no", status)) as server, pytest.raises(InputError, match=names):
        judged(built(config(server)), (play("x"),))


@pytest.mark.parametrize("form", ["seconds", "date", "milliseconds"])
def test_retry_after_holds_for_every_request_on_the_line(form, play):
    def header() -> dict[str, str]:
        if form == "date":
            return {"Retry-After": email.utils.formatdate(time.time() + 2, usegmt=True)}
        return {"Retry-After": "1"} if form == "seconds" else {"retry-after-ms": "1000"}

    first: list[float] = []

    def script(asked: Any) -> Answer:
        if not first:
            first.append(asked.at)
            return Answer(b"", 429, header())
        return chat(scored(10))

    with serving(script) as server:
        reward = built(config(server, concurrent=1))
        assert judged(reward, (play("x"), play("y"), play("z"))) == [[1.0] * 3]
        assert len(server.asked) == 4
        assert min(one.at for one in server.asked[1:]) - first[0] >= 0.95


def test_a_server_that_asks_for_too_long_a_wait_has_failed(play):
    with serving(lambda _: Answer(b"tomorrow", 429, {"Retry-After": "86400"})) as server:
        one = play("x")
        assert judged(built(config(server, longest_wait=2)), (one,)) == [[None]]
        assert len(server.asked) == 1


@pytest.mark.parametrize("late", [Answer(b"{}", wait=4.0), Answer(b"{}" * 50, drip=0.05)], ids=["silent", "dripping"])
def test_an_answer_that_does_not_come_in_time_is_a_timeout(late, play):
    with serving(lambda _: late) as server:
        one = play("x")
        begun = time.monotonic()
        assert judged(built(config(server, timeout=0.3, retries=1)), (one,)) == [[None]]
        assert time.monotonic() - begun < 2
        assert len(server.asked) == 2
    assert one.failures[0].kind == "timeout"


def test_nobody_at_the_address_is_a_failure(play):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    one = play("x")
    judges = {"one": {"url": f"http://127.0.0.1:{port}/v1", "model": "m", "retries": 1, "backoff": 0.01}}
    assert judged(built({"type": "judge", "judges": judges}), (one,)) == [[None]]
    assert "cannot be reached" in one.failures[0].said


ASK = """
import asyncio, json, sys
from pydantic import TypeAdapter
from rlft.rewards.catalog import RewardConfig
from rlft.types import Sample, Task, Trajectory

def play(text):
    ask = {"role": "user", "content": "?"}
    return Trajectory(Task("t", (ask,)), (ask, {"role": "assistant", "content": text}), [])

reward = TypeAdapter(RewardConfig).validate_python(json.loads(sys.argv[1])).build()
group = tuple(play(f"answer {i}") for i in range(8))
print(json.dumps([asyncio.run(reward(group)), group[0].metrics["reward/judge/cached"]]))
"""


def test_answers_are_kept_on_disk_for_every_process(play, tmp_path):
    """Each request of a judge that never says the same twice: three processes at once, and one after them."""
    count = iter(range(1, 1000))
    path = tmp_path / "kept" / "answers.sqlite"
    with serving(lambda _: scored(next(count) / 100)) as server:
        plain = config(server) | {"low": 0, "cache": str(path)}
        command = [sys.executable, "-c", ASK, json.dumps(plain)]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
        found = [json.loads(process.communicate(timeout=60)[0])[0] for process in started]
        asked = len(server.asked)
        assert 8 <= asked <= 24
        again = json.loads(subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, timeout=60, check=True).stdout)
        assert len(server.asked) == asked
    assert found[0] == found[1] == found[2] == again[0]  # whoever was first, all have the same
    assert again[1] == 1.0


@pytest.mark.parametrize("change", [{"rubric": "other"}, {"low": 0}, {"system": "Be strict."}])
@pytest.mark.parametrize("other", [{}, {"model": "n"}, {"temperature": 1.0}, {"extra": {"seed": 1}}])
def test_another_request_is_another_answer(change, other, play, tmp_path):
    with serving(lambda _: scored(10)) as server:
        plain = {"cache": str(tmp_path / "kept")}
        for _ in range(2):
            judged(built(config(server) | plain), (play("x"),))
        assert len(server.asked) == 1
        judged(built(config(server, **other) | plain | change), (play("x"),))
        judged(built(config(server, **other) | plain), (play("x"),))
        assert len(server.asked) == (3 if other else 2)


def test_what_cannot_be_read_is_not_kept(play, tmp_path):
    said = iter(["hm", scored(10)])
    with serving(lambda _: next(said)) as server:
        reward = built(config(server) | {"cache": str(tmp_path / "kept")})
        assert [judged(reward, (play("x"),)) for _ in range(3)] == [[[None]], [[1.0]], [[1.0]]]
        assert len(server.asked) == 2


def test_a_cache_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("no database, and long enough to be seen as none")
    plain = {"type": "judge", "judges": {"one": {"url": "http://x/v1", "model": "m"}}}
    for path in ("file", "file/below"):
        with pytest.raises(InputError, match="cache: "):
            built(plain | {"cache": str(tmp_path / path)})


def test_the_key_is_sent_and_written_nowhere(play, tmp_path, monkeypatch, caplog):
    """Not where a server repeats it, nor in logs at their most talkative, nor in what is kept."""
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    caplog.set_level(logging.DEBUG)

    def script(asked: Any) -> Answer:
        said = texts(asked.prompt)[0]
        repeated = f"your key is {asked.headers['Authorization']}".encode()
        return {"refused": Answer(repeated, 400), "no JSON": Answer(repeated)}.get(said, chat(scored(10)))

    with serving(script) as server:
        group = (play("good"), play("refused"), play("no JSON"))
        plain = config(server, api_key_env="JUDGE_KEY") | {"cache": str(tmp_path / "kept")}
        assert judged(built(plain), group) == [[1.0, None, None]]
        assert {one.headers["Authorization"] for one in server.asked} == {f"Bearer {SECRET}"}
    said = [failure.said + failure.trace for one in group for failure in one.failures]
    assert len(said) == 2
    assert all("$JUDGE_KEY" in text and SECRET not in text for text in said)
    assert SECRET not in caplog.text
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET not in repr(TypeAdapter(RewardConfig).validate_python(plain))


def test_a_key_that_is_not_there_is_named_and_one_that_is_written_out_is_refused_unseen(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    judge = {"url": "http://x/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    with pytest.raises(InputError, match="export JUDGE_KEY="):
        built({"type": "judge", "judges": {"one": judge}})
    with pytest.raises(ValidationError) as refused:
        built({"type": "judge", "judges": {"one": judge | {"api_key_env": SECRET}}})
    assert all(SECRET not in str(error["msg"]) for error in refused.value.errors())


@pytest.mark.slow
def test_a_run_with_a_judge(tmp_path, monkeypatch):
    """Costs and failures in its files, the key in none of them; and a judge that is down ends it."""
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(4)))
    turn = iter(range(10**6))

    def script(asked: Any) -> Any:
        number = next(turn)
        return Answer(asked.headers["Authorization"].encode(), 400) if number == 3 else scored(1 + number % 10)

    with serving(script) as server:
        plain = {
            "name": "judged",
            "steps": 2,
            "out": str(tmp_path / "run"),
            "model": {"path": "tiny-random"},
            "adapter": {"type": "lora", "r": 2, "target_modules": "all-linear"},
            "data": {"train": "rows.jsonl"},
            "reward": config(server, api_key_env="JUDGE_KEY", price_in=1.0) | {"cache": str(tmp_path / "kept")},
            "rollout": {"engine": {"type": "local"}, "tasks_per_step": 4, "group_size": 2},
            "algorithm": {"type": "grpo"},
            "faults": {"reward": 0.3},
        }  # fmt: skip
        (tmp_path / "judged.yaml").write_text(json.dumps(plain))
        command = [sys.executable, "-m", "rlft.cli", "train", str(tmp_path / "judged.yaml")]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
        assert ran.returncode == 0, ran.stderr
        asked = len(server.asked)
    resume = [sys.executable, "-m", "rlft.cli", "resume", str(tmp_path / "run"), "steps=3"]
    down = subprocess.run(resume, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), check=False)
    assert down.returncode == 1
    assert "cannot be reached" in down.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("reward/failed", 0) for row in rows] == [1 / 8, 0]
    assert sum(row["reward/judge/requests"] for row in rows) * 8 == asked - 1  # replies that are paid for
    assert sum(row["reward/judge/cost"] for row in rows) * 8 == pytest.approx((asked - 1) * 100 / 1e6)
    fault, *_ = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert "$JUDGE_KEY" in fault["said"]
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert SECRET not in ran.stdout + ran.stderr + down.stdout + down.stderr
