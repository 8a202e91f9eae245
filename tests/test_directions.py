"""Prompts with a direction, the reward that follows it, and the run that learns from both."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlft.build import assemble
from rlft.directions import directed, drawn, rating
from rlft.material import material
from rlft.rewards.catalog import RewardConfig
from rlft.settings import validate
from rlft.types import InputError, Sample, Task, Trajectory

AXES = ("helpfulness", "verbosity")
TEXT = "Maximize {rating}"
USER = {"role": "user", "content": "Hi"}


def ask(**info: Any) -> Task:
    return Task("row:1", (USER,), info)


def test_a_direction_is_a_unit_vector_within_the_arc() -> None:
    seen = []
    for seed in range(200):
        way = drawn(AXES, (-45.0, 30.0), str(seed))
        assert math.hypot(*way.values()) == pytest.approx(1.0)
        seen.append(math.degrees(math.atan2(way["verbosity"], way["helpfulness"])))
    assert -45.0 <= min(seen) < -40.0
    assert 25.0 < max(seen) <= 30.0
    assert drawn(AXES, (90.0, 90.0), "x") == pytest.approx({"helpfulness": 0.0, "verbosity": 1.0})


def test_without_an_arc_no_weight_is_negative() -> None:
    ways = [drawn(("a", "b", "c"), None, str(seed)) for seed in range(300)]
    assert all(math.hypot(*way.values()) == pytest.approx(1.0) and min(way.values()) >= 0 for way in ways)
    means = [sum(way[name] for way in ways) / len(ways) for name in "abc"]
    assert means == pytest.approx([0.5] * 3, abs=0.06), "the mean of a coordinate on the eighth of a sphere is 1/2"


def test_trap_37_directions_are_a_function_of_seed_and_task() -> None:
    """Whatever the order of the tasks, and again after a resume."""
    tasks = [Task(f"train:{i}", (USER,)) for i in range(5)]
    found = {t.id: t.info["direction"] for t in directed(tasks, AXES, (-45, 45), TEXT, 3)}
    again = {t.id: t.info["direction"] for t in directed(tasks[::-1], AXES, (-45, 45), TEXT, 3)}
    other = {t.id: t.info["direction"] for t in directed(tasks, AXES, (-45, 45), TEXT, 4)}
    assert found == again
    assert len({json.dumps(way) for way in [*found.values(), *other.values()]}) == 10


def test_the_system_message_says_it_in_percent() -> None:
    assert rating({"helpfulness": math.cos(math.radians(-15)), "verbosity": math.sin(math.radians(-15))}) == (
        "helpfulness*97 + verbosity*-26"
    )
    assert rating({"rm/helpfulness": 1.0, "rm/brevity": 0.0}) == "helpfulness*100 + brevity*0"
    (plain,) = directed([ask(answer="12")], AXES, (0, 0), TEXT, 0)
    assert plain.messages == ({"role": "system", "content": "Maximize helpfulness*100 + verbosity*0"}, USER)
    assert plain.info == {"answer": "12", "direction": {"helpfulness": 1.0, "verbosity": 0.0}}
    (said,) = directed([Task("t", ({"role": "system", "content": "Be kind."}, USER))], AXES, (0, 0), TEXT, 0)
    assert said.messages[0]["content"] == "Be kind.\nMaximize helpfulness*100 + verbosity*0"


def test_a_task_has_one_direction() -> None:
    with pytest.raises(InputError, match="has a column 'direction' already"):
        directed([ask(direction={})], AXES, None, TEXT, 0)


# --- the reward -------------------------------------------------------------------------------------------------------


def answer(text: str, **info: Any) -> Trajectory:
    sample = Sample([1, 2, 3], [False, True, True], [0.0] * 3, [0.0] * 3, 0)
    return Trajectory(ask(**info), (USER, {"role": "assistant", "content": text}), [sample])


def judged(group: list[Trajectory], **knobs: Any) -> list[float | None]:
    config = {"type": "directed", "of": {"type": "weighted", "terms": TERMS}, **knobs}
    return list(asyncio.run(TypeAdapter(RewardConfig).validate_python(config).build()(tuple(group))))


TERMS: dict[str, Any] = {
    "right": {"type": "exact", "weight": 5.0},
    "digits": {"type": "format", "pattern": r"\d+"},
}


def test_the_score_is_the_dot_product_with_the_direction() -> None:
    way = {"right": 0.8, "digits": -0.6}
    group = [answer(text, answer="12", direction=way) for text in ("12", "13", "no")]
    assert judged(group) == pytest.approx([0.2, -0.6, 0.0])
    assert [t.metrics["reward/right"] for t in group] == [1.0, 0.0, 0.0]
    assert judged(group, scales={"digits": 10.0}, weight=2.0) == pytest.approx([2 * (0.8 - 6), -12.0, 0.0])


def test_trap_32_a_component_without_a_value_leaves_no_score() -> None:
    group = [answer("12", answer="12", direction={"right": 1.0, "clear": 1.0})]
    assert judged(group) == [None]


@pytest.mark.parametrize("way", [None, {}, "up", {"right": "much"}])
def test_a_task_without_a_direction_stops_the_run(way: Any) -> None:
    info = {} if way is None else {"direction": way}
    with pytest.raises(InputError, match=r"row:1.*Set data\.direction"):
        judged([answer("12", answer="12", **info)])


def test_as_a_term_it_is_logged_with_its_components() -> None:
    config: Any = TypeAdapter(RewardConfig).validate_python(
        {"type": "weighted", "terms": {"way": {"type": "directed", "of": {"type": "weighted", "terms": TERMS}}}}
    )
    assert config.directed
    assert config.components() == ["way", "way/right", "way/digits"]
    one = answer("12", answer="12", direction={"way/right": 0.6, "way/digits": 0.8})
    assert list(asyncio.run(config.build()((one,)))) == pytest.approx([1.4])
    assert one.metrics["reward/way"] == pytest.approx(1.4)


# --- the run ----------------------------------------------------------------------------------------------------------


def settings(folder: Path, model: str = "tiny-random", **changes: Any) -> dict[str, Any]:
    rows = folder / "tasks.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}", "answer": str(i)}) + "\n" for i in range(6)))
    found: dict[str, Any] = {
        "name": "directed",
        "steps": 1,
        "model": {"path": model},
        "adapter": {"type": "lora", "r": 2, "target_modules": "all-linear"},
        "data": {"train": str(rows), "direction": {"components": ["right", "digits"], "arc": [-45, 45]}},
        "reward": {"type": "directed", "of": {"type": "weighted", "terms": TERMS}},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 4, "sampling": {"max_tokens": 4}},
        "algorithm": {"type": "dpa"},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        block = found
        for part in path:
            block = block[part]
        block[last] = value
    return found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__direction": None}, "data.direction: algorithm.type needs a direction in every task"),
        ({"data__direction": None, "algorithm": {"type": "grpo"}}, "data.direction: reward.type needs a direction"),
        ({"reward": {"type": "weighted", "terms": TERMS}}, "what nothing rewards; use a reward of type directed"),
        ({"data__direction__components": ["right", "short"]}, "no component 'short'; it has right, digits"),
        ({"data__direction__components": ["right", "right"]}, "a name stands there twice"),
        ({"data__direction__components": ["right"]}, "at least 2"),
        ({"data__direction__arc": [45, -45]}, "least, largest"),
        ({"data__direction__components": ["a", "b", "c"]}, "between two components"),
        ({"data__direction__text": "Be good"}, "without {rating}"),
        ({"rollout__group_size": 1}, "rollout.group_size"),
        ({"data__columns": {"completion": "answer"}, "algorithm": {"type": "raft"}}, "given to other prompts"),
        ({"algorithm": {"type": "reward_model", "loss": "regression", "objectives": ["kind"]}}, "no component 'kind'"),
    ],
)
def test_bad_combinations_are_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as caught:
        validate(settings(tmp_path, **changes))
    assert said in str(caught.value)


def test_a_column_of_directions_will_do(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "answer": "1", "direction": {"right": 1.0}}) + "\n")
    config = validate(settings(tmp_path, data__direction=None, data__train=str(rows)))
    assert material(config).tasks[0].info["direction"] == {"right": 1.0}


def test_a_column_of_directions_that_nothing_rewards_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "own.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "answer": "1", "direction": {"right": 1.0}}) + "\n")
    changes = {"data__direction": None, "data__train": str(rows), "reward": {"type": "weighted", "terms": TERMS}}
    with pytest.raises(InputError, match=r"reward\.type: dpa needs a score along each task's.*type: directed"):
        validate(settings(tmp_path, **changes))
    assert validate(settings(tmp_path, **changes, algorithm={"type": "raft"})).algorithm.type == "raft"


def test_the_sampled_prompt_names_the_direction_that_is_scored(tmp_path: Path) -> None:
    """Both sides of the same number, in training and held-out tasks, which have directions of their own."""
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "Say 9", "answer": "9"}) + "\n")
    stuff = material(validate(settings(tmp_path, data__eval=str(held))))
    for task in stuff.tasks + stuff.held_out:
        said = stuff.chat.decode(stuff.chat.prompt(task.messages))
        assert f"weighted rating = {rating(task.info['direction'])}" in said
    ways = [json.dumps(task.info["direction"]) for task in stuff.tasks + stuff.held_out]
    assert len(set(ways)) == 7


def test_groups_are_scored_along_their_direction(tmp_path: Path) -> None:
    parts = assemble(material(validate(settings(tmp_path))), None)

    async def play() -> list[Any]:
        await parts.serve(0)
        groups = await parts.source.next()
        await parts.close()
        return groups

    for group in asyncio.run(play()):
        way = group[0].task.info["direction"]
        for trajectory in group:
            wanted = sum(way[name] * trajectory.metrics[f"reward/{name}"] for name in way)
            assert trajectory.score == pytest.approx(wanted)


def test_the_best_along_the_direction_is_imitated(tmp_path: Path) -> None:
    algorithm = validate(settings(tmp_path, algorithm={"type": "dpa", "k": 2})).algorithm.build()
    group = tuple(answer("x") for _ in range(4))
    for trajectory, score in zip(group, (-3.0, -1.0, -2.0, -4.0), strict=True):
        trajectory.score = score
    (kept,) = algorithm.select([group])
    assert sorted(t.score or 0.0 for t in kept) == [-2.0, -1.0], "whatever the score, as it may be negative all along"
