"""Curricula at work: learners of one number that get on faster, and a resume bit for bit."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlft.ahead import Ahead
from rlft.chat import Chat
from rlft.curriculum.catalog import AlpGmm, Band, Skills, Uniform
from rlft.engine.local import LocalEngine
from rlft.envs.single_turn import SingleTurn
from rlft.plan import describe
from rlft.player import Player
from rlft.session import begin, resume
from rlft.settings import load, validate
from rlft.source import Curriculum, Deck, Refilled, Rollouts
from rlft.terminal import Terminal
from rlft.types import Group, InputError, Sampling, Task
from tests.test_curriculum import made, tasks, teach

LEARNING = (
    Band(),
    Band(by=("level",), random=0.5),
    AlpGmm(columns=("difficulty",), every=12),
    AlpGmm(columns=("difficulty", "level"), every=12, criterion="bic"),
    Skills(),
)
learning = pytest.mark.parametrize("knobs", LEARNING, ids=lambda knobs: "-".join(map(str, knobs.model_dump().values())))


# --- learners of one number


def climbing(knobs: Any, seed: int, target: float = 9.0, most: int = 5000) -> int:
    """Draws until the ability is 9. Half of 300 tasks are of difficulty 0 to 10, half can never be solved (20 to 30).

    An answer is right with probability 1 / (1 + exp(3 (difficulty - ability))); a group of 8 of which a share s is
    right raises the ability by 0.05 * 4 s (1 - s), what its answers differ by.
    """
    levels = [10 * i / 150 if i < 150 else 10 + 10 * i / 150 for i in range(300)]
    given = tasks(*({"difficulty": d, "level": int(d)} for d in levels))
    curriculum, deck, dice = knobs.build(given, seed), Deck(300, seed), random.Random(seed)
    ability, drawn = 0.0, 0
    while ability < target and drawn < most:
        rows = curriculum.choose(drawn, 8) if curriculum else [deck.at(drawn + i) for i in range(8)]
        chances = [1 / (1 + math.exp(3 * (levels[row] - ability))) for row in rows]
        scores = [[float(dice.random() < chance) for _ in range(8)] for chance in chances]
        if curriculum:
            teach(curriculum, given, *zip(rows, scores, strict=True))
        ability += sum(0.2 * (s := sum(some) / 8) * (1 - s) for some in scores)
        drawn += 8
    return drawn


@pytest.fixture(scope="module")
def by_chance() -> list[int]:
    return [climbing(Uniform(), seed) for seed in range(3)]


@pytest.mark.parametrize(("knobs", "saved"), [
    (Band(), 0.3), (Band(by=("level",)), 0.75), (AlpGmm(columns=("difficulty",)), 0.1),
    (AlpGmm(columns=("difficulty",), every=100), 0.4),
], ids=["band", "band by level", "alp_gmm", "alp_gmm every 100"])  # fmt: skip
def test_a_target_is_reached_in_fewer_draws(knobs: Any, saved: float, by_chance: list[int]) -> None:
    """saved: the least share of the draws, in each of three runs."""
    taken = [climbing(knobs, seed) for seed in range(3)]
    assert max(by_chance) < 5000, "otherwise this proves little"
    assert all(own < (1 - saved) * even for own, even in zip(taken, by_chance, strict=True)), (taken, by_chance)


def practising(knobs: Any, seed: int, most: int = 8000) -> int:
    """Draws until each of ten skills is at 0.8; they begin at 0.6, but for one at 0.2, which 1 of 50 tasks needs.

    An answer is right with the product of its skills; a group of 8 of which a share s is right raises each by
    0.02 * 4 s (1 - s), at most to 1.
    """
    needs = [(0, i % 9 + 1) if i % 50 == 0 else (i % 9 + 1,) for i in range(300)]
    given = tasks(*({"skills": [f"s{skill}" for skill in some]} for some in needs))
    curriculum, deck, dice = knobs.build(given, seed), Deck(300, seed), random.Random(seed)
    level, drawn = [0.2] + [0.6] * 9, 0
    while min(level) < 0.8 and drawn < most:
        rows = curriculum.choose(drawn, 8) if curriculum else [deck.at(drawn + i) for i in range(8)]
        chances = [math.prod(level[skill] for skill in needs[row]) for row in rows]
        scores = [[float(dice.random() < chance) for _ in range(8)] for chance in chances]
        if curriculum:
            teach(curriculum, given, *zip(rows, scores, strict=True))
        for row, some in zip(rows, scores, strict=True):
            s = sum(some) / 8
            for skill in needs[row]:
                level[skill] = min(1.0, level[skill] + 0.08 * s * (1 - s))
        drawn += 8
    return drawn


def test_a_rare_missing_skill_is_practised() -> None:
    even, own = ([practising(knobs, seed) for seed in range(3)] for knobs in (Uniform(), Skills()))
    assert max(even) < 8000, "otherwise this proves little"
    assert all(a < 0.6 * b for a, b in zip(own, even, strict=True)), (own, even)


# --- the state


def some_tasks() -> list[Task]:
    return tasks(*({"difficulty": 1.5 * i, "level": i % 3, "skills": [f"s{i % 4}", f"s{i % 3}"]} for i in range(9)))


def results(rows: Sequence[int], step: int) -> list[list[float]]:
    """Made of the rows and the step, so that they are the same again."""
    return [[float((row * 7 + step * 3 + i) % 4 < 2) for i in range(3)] for row in rows]


@learning
def test_a_resumed_curriculum_is_the_whole_one(knobs: Any) -> None:
    given = some_tasks()

    def steps(curriculum: Curriculum, first: int, last: int) -> Iterator[tuple[list[int], dict[str, float], Any]]:
        for step in range(first, last):
            rows = curriculum.choose(4 * step, 4)
            teach(curriculum, given, *zip(rows, results(rows, step), strict=True))
            yield rows, curriculum.metrics(), json.dumps(curriculum.state_dict())

    whole = list(steps(made(knobs, given), 0, 20))
    for stop in (1, 3, 11):
        resumed = made(knobs, given)
        resumed.load_state_dict(json.loads(whole[stop - 1][2]))
        assert list(steps(resumed, stop, 20)) == whole[stop:]
    other = [rows for rows, _, _ in steps(made(knobs, given, seed=1), 0, 20)]
    assert other != [rows for rows, _, _ in whole], "the seed counts"


@learning
def test_a_state_is_a_picture_and_another_kind_is_passed_over(knobs: Any) -> None:
    given = some_tasks()
    curriculum = made(knobs, given)
    before = json.dumps(state := curriculum.state_dict())
    teach(curriculum, given, (0, [1.0]), (1, [0.0]))
    assert json.dumps(state) == before, "what was read does not change"
    assert json.dumps(curriculum.state_dict()) != before
    for strange in ({}, {"type": "another"}):
        fresh = made(knobs, given)
        fresh.load_state_dict(strange)
        assert json.dumps(fresh.state_dict()) == before
    with pytest.raises(InputError, match=r"the checkpoint knows of 9 tasks in .* cells, and data.train has 8 in"):
        made(knobs, given[:8]).load_state_dict(curriculum.state_dict())


@pytest.fixture(scope="module")
def player(tiny_model: Path) -> Player:
    engine = LocalEngine(tiny_model, torch.float32, torch.device("cpu"))
    return Player(engine, Chat(tiny_model), SingleTurn, Sampling(1.0, 3), 100)


async def odd(group: Group) -> list[float | None]:
    """Whether the first sampled token's id is odd: half of all groups of two agree."""
    return [float(t.samples[0].tokens[t.samples[0].mask.index(True)] % 2) for t in group]


def differing(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if len({t.score for t in group}) > 1]


def source(player: Player, knobs: Any, reward: Any = odd) -> Ahead:
    """Dynamic sampling, ahead."""
    given = some_tasks()
    inner = Rollouts(given, player, reward, 3, 2, 7, curriculum=made(knobs, given, 7))
    return Ahead(Refilled(inner, differing, 3, 4), 1)


async def drawn(source: Ahead, steps: int) -> list[Any]:
    """Tasks, tokens, and metrics that are no times."""
    seen = []
    for _ in range(steps):
        groups = await source.next()
        await source.settled()
        tokens = [[t.samples[0].tokens for t in group] for group in groups]
        metrics = {name: value for name, value in source.metrics.items() if not name.startswith("time/")}
        seen.append(([group[0].task.id for group in groups], tokens, metrics))
    return seen


@learning
def test_a_resumed_source_draws_the_same_tasks(player: Player, knobs: Any) -> None:
    async def both() -> None:
        whole = await drawn(source(player, knobs), 6)
        first, second = source(player, knobs), source(player, knobs)
        begun = await drawn(first, 2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + await drawn(second, 4) == whole
        assert any(metrics["rollout/refills"] for _, _, metrics in whole), "otherwise this proves little"
        assert all(0 < metrics["curriculum/seen"] <= 1 for _, _, metrics in whole), "rounds do not add up"
        assert all(metrics["tokens/generated"] >= 6 for _, _, metrics in whole), "but amounts do"

    asyncio.run(both())


def test_a_step_that_fails_in_a_later_round_taught_nothing(player: Player) -> None:
    calls = 0

    async def failing(group: Group) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second round
            raise ValueError("once")
        return [0.0 for _ in group]

    async def run() -> None:
        given = some_tasks()
        inner = Rollouts(given, player, failing, 3, 2, 7, curriculum=made(Band(), given, 7))
        refilled = Refilled(inner, differing, 3, 2)
        before = refilled.state_dict()
        with pytest.raises(ValueError, match="once"):
            await refilled.next()
        assert refilled.state_dict() == before
        await refilled.next()
        assert refilled.state_dict() != before

    asyncio.run(run())


# --- configs


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "rlft_curriculum_reward.py").write_text(
        "def odd(trajectory):\n"
        "    sample = trajectory.samples[0]\n"
        "    return float(sample.tokens[sample.mask.index(True)] % 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"prompt": f"Say {i}", "level": i % 3, "answer": "1"} for i in range(7)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "curriculum",
        "steps": 4,
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": str(tmp_path / "train.jsonl"), "curriculum": {"type": "band", "by": ["level"]}},
        "reward": {"type": "custom", "path": "rlft_curriculum_reward:odd"},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 3, "group_size": 2, "sampling": {"max_tokens": 3}},
        "algorithm": {"type": "dapo", "mask_truncated": False},
        "learner": {"lr": 1e-3},
        "checkpoint": {"every": 1, "keep": 4},
        "show": {"every": 0},
    }


@pytest.mark.parametrize(("change", "said"), [
    ({"reward": {"type": "custom", "path": "rlft_curriculum_reward:odd"}, "component": "right"},
     "data.curriculum.component: the reward has no component 'right'; it has custom"),
    ({"algorithm": {"type": "sft"}}, "data.curriculum: band chooses by how samples came out"),
    ({"algorithm": {"type": "on_policy_distillation"}, "teacher": {"path": "tiny-random"}, "reward": None},
     "data.curriculum: band chooses by scores, and there is no reward"),
    ({"low": 0.9}, "data.curriculum: low: the band ends below where it begins"),
    ({"hight": 0.9}, "hight"),
])  # fmt: skip
def test_configs_that_make_no_sense_are_refused(settings: dict[str, Any], change: dict[str, Any], said: str) -> None:
    own = {name: value for name, value in change.items() if name in ("component", "low", "hight")}
    settings["data"]["curriculum"] |= own
    with pytest.raises(InputError, match=said):
        validate(settings | {name: value for name, value in change.items() if name not in own})


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_whole_one(settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    quiet = Terminal(Console(quiet=True))
    assert "7 tasks to train on, chosen by band" in describe(load(config, []))

    def rows(run: Path) -> list[dict[str, float]]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [{name: row[name] for name in row if not name.startswith(("time/", "sync/sec"))} for row in lines]

    whole, part = tmp_path / "whole", tmp_path / "part"
    assert begin(load(config, [f"out={whole}"]), quiet) == 0
    assert begin(load(config, [f"out={part}", "steps=2"]), quiet) == 0
    assert resume(part, ["steps=4"], quiet) == 0
    assert rows(part) == rows(whole)
    names = {"curriculum/seen", "curriculum/success", "curriculum/in_band", "curriculum/entropy"}
    assert all(names <= row.keys() for row in rows(whole))
    ends = [load_file(run / "checkpoints/step-000004/trained.safetensors") for run in (whole, part)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    state = json.loads((whole / "checkpoints/step-000004/state.json").read_text())["source"]
    assert sum(state["curriculum"]["drawn"]) == state["position"]
    assert resume(part, ["steps=5", "data.curriculum={type: uniform}"], quiet) == 0, "another kind goes on from there"
    assert "curriculum/seen" not in rows(part)[-1]
