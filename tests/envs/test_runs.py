"""Whole runs in worlds of several turns: the ready configs with a tiny model, and an environment of the user's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rlft.envs.catalog import entries, names
from rlft.material import material
from rlft.plan import catalog, describe
from rlft.session import begin
from rlft.settings import load, validate
from rlft.terminal import Terminal
from rlft.types import InputError

ROOT = Path(__file__).parents[2]
SMALL = (
    "steps=2", "model.device=cpu", "rollout.engine={type: local}", "rollout.tasks_per_step=2", "rollout.group_size=4",
    "rollout.sampling={max_tokens: 12, stop: [a, e, i, o, u, n, r, s, t]}", "eval.every=0", "data.eval.limit=4",
)  # fmt: skip


ACCURACY = {"rise": "format", "cory": "format/first"}


def finished(config: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of metrics.jsonl, and the rows of the first step's rollouts."""
    assert begin(config, Terminal(Console(quiet=True))) == 0
    run = Path(config.out)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, pq.read_table(run / "rollouts/step-000001.parquet").to_pylist()


@pytest.mark.parametrize("name", ["rise", "cory"])
def test_the_ready_configs_run(name: str, tiny_model: Path, tmp_path: Path) -> None:
    judge = "reward.of={type: format, pattern: '[a-m]', full: false}"  # what a random model satisfies now and then
    own = [f"model.path={tiny_model}", f"out={tmp_path / 'run'}", judge, f"eval.accuracy={ACCURACY[name]}"]
    config = load(ROOT / f"configs/{name}.yaml", [*SMALL, *own])
    lines, rows = finished(config)
    before, first, second, *_ = lines
    for line in (first, second):
        assert line["reward/missing"] == 0
        assert {"reward/format", "reward/format/first", "loss/total"} <= line.keys()
        assert line["parity/logprob_max"] < 1e-3, "what is trained on is what was sampled"
    assert before["eval/accuracy"] == before[f"eval/{ACCURACY[name]}"]
    if name == "cory":
        assert [row["sample"] for row in rows] == [0, 1] * 8
        assert all(a["score"] == b["score"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    else:
        runs = [re.findall("1+", "".join("01"[chosen] for chosen in row["mask"])) for row in rows]
        assert max(map(len, runs)) == 3, "some episode had all its turns"
    assert f"up to {config.env.answers} answers each ({config.env.type})" in describe(config)


def test_a_sample_is_listed_with_its_own_answer(tiny_model: Path, tmp_path: Path) -> None:
    config = load(
        ROOT / "configs/cory.yaml", [*SMALL, f"model.path={tiny_model}", f"out={tmp_path / 'run'}", "steps=1"]
    )
    _, rows = finished(config)
    chat = material(config).chat
    for row in rows:
        said = [token for token, chosen in zip(row["tokens"], row["mask"], strict=True) if chosen]
        assert chat.decode(said) == row["completion"]


OWN = '''
from rlft.types import Turn


class Echo:
    """Pays for every answer, and asks for more."""

    def __init__(self, task, turns=2, word="more"):
        self.task, self.left, self.word = task, turns, word

    async def reset(self):
        return self.task.messages

    async def step(self, action):
        self.left -= 1
        return Turn(({"role": "user", "content": self.word},), reward=0.5, done=self.left == 0)

    async def close(self):
        pass


nothing = 3
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_envs.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)


def run(tiny_model: Path, tmp_path: Path, **env: Any) -> dict[str, Any]:
    return {
        "name": "own", "steps": 1, "out": str(tmp_path / "run"), "model": {"path": str(tiny_model), "device": "cpu"},
        "data": {"train": {"type": "generated"}}, "env": {"type": "custom", **env},
        "reward": {"type": "length", "limit": 9}, "algorithm": {"type": "rise"},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 4,
                    "sampling": {"max_tokens": 12, "stop": ["a", "e", "i", "o", "u", "n", "r", "s", "t"]}},
    }  # fmt: skip


@pytest.mark.usefixtures("own")
def test_an_environment_of_ones_own_trains(tiny_model: Path, tmp_path: Path) -> None:
    """It pays for itself, so the reward need not judge turn by turn; its options reach it."""
    settings = run(tiny_model, tmp_path, path="my_envs:Echo", options={"turns": 3, "word": "again"}, most_answers=3)
    _, rows = finished(validate(settings))
    turns = [len(re.findall("1+", "".join("01"[chosen] for chosen in row["mask"]))) for row in rows]
    assert max(turns) == 3
    for row, count in zip(rows, turns, strict=True):
        assert row["score"] == pytest.approx(0.5 * count + dict(row["rewards"])["length"])


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("env", "message"), [
    ({"path": "my_envs:Ecko"}, r"env\.path: my_envs:Ecko cannot be had: AttributeError"),
    ({"path": "my_elsewhere:Echo"}, r"env\.path: my_elsewhere:Echo cannot be had: ModuleNotFoundError"),
    ({"path": "my_envs:nothing"}, r"env\.path: my_envs:nothing is int, nothing that can be called"),
    ({"path": "my_envs:Echo", "options": {"turn": 3}}, r"env\.options: my_envs:Echo cannot be called .*'turn'"),
])  # fmt: skip
def test_one_that_cannot_be_made_is_refused_before_a_model_is_loaded(
    env: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        material(validate(run(tiny_model, tmp_path, **env)))


def test_the_catalog_is_what_is_listed() -> None:
    plain = ["agent", "single_turn", "retry", "pioneer_observer", "custom", "remote", "tools", "python"]
    own = ["guess", "bulls", "walk", "numberline", "blackjack", "nim", "traces", "rules", "apps", "code"]
    assert (
        list(catalog("envs"))
        == names()
        == [*plain, *own, "gymnasium", "textworld", "textarena", "openenv", "verifiers"]
    )
    for kind in entries().values():
        assert kind.__doc__
        assert all(field.description for name, field in kind.model_fields.items() if name != "type")
