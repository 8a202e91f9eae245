"""Worlds of rule files: the loader, what an action does, the loop of error and correction, and the shipped files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlft.envs.own.rulefile import Moves, World, done, holds, plain, read, refusal, value, ways, won
from rlft.envs.own.rules import RulesConfig, spoken
from rlft.types import InputError
from tests.envs import playing
from tests.envs.playing import among, played, wins

FILES = sorted(Path("configs/data/worlds").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "intro": "Two rooms.",
    "agent": "you",
    "kinds": {"room": ["left", "right"], "box": ["red_box"]},
    "state": {"you.at": "left", "left.next": ["right"], "right.next": ["left"], "red_box.at": "right", "red_box.n": 0},
    "actions": [
        {
            "say": "go {room}",
            "needs": {"{room} in you.at.next": "No way."},
            "does": ["you.at = {room}"],
            "tells": "Ok.",
        },
        {
            "say": "take {box}",
            "needs": {"{box}.at = you.at": "{box} is not here."},
            "does": ["{box}.at = you", "{box}.n = 1"],
            "tells": "You have {box}.",
        },
    ],
    "goals": [{"tells": "Get the box.", "needs": ["red_box.at = you", "you.at = left"]}],
}


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """small(**changes) -> a rule file."""

    def write(**changes: Any) -> str:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**SMALL, **changes}))
        return str(path)

    return write


def solver(knobs: RulesConfig) -> Any:
    """Says the shortest way that the search found."""
    said: list[str] = []
    known: Moves = {}

    def say(env: Any, heard: str) -> str:
        if not said:
            world = env._world
            start = next(start for start in knobs.searched.starts if start == world._state)
            every = ways(knobs.searched.world, start, known)
            said.extend(every[knobs.searched.world.goals.index(world._goal)] or [])
        return said.pop(0)

    return say


def test_the_shortest_way_is_that_by_hand(small: Any) -> None:
    searched = read(small())
    assert searched.ways == {(0, 0): ["go right", "take red_box", "go left"]}


def test_conditions_by_hand() -> None:
    state: Any = {"you.at": "left", "left.next": ("right",), "lamp.lit": False, "lamp.n": 3}
    told = {
        "you.at = left": True, "you.at != left": False, "right in you.at.next": True, "left in you.at.next": False,
        "lamp.lit = false": True, "lamp.n = 3": True, "lamp.n != 3 or lamp.lit = false": True, "left in lamp.n": False,
    }  # fmt: skip
    assert {condition: holds(condition, state) for condition in told} == told
    assert value("you.at.next", state) == ("right",)
    for wrong in ("you.at", "you.at == left", "you.at = door.at", "import os"):
        with pytest.raises(InputError):
            holds(wrong, state)


def test_what_an_action_does_and_when_it_is_refused() -> None:
    world = World.model_validate(SMALL)
    state = next(world.starts())
    take = world.steps["take red_box"]
    assert refusal(take, state) == "red_box is not here."
    after = done(world.steps["go right"], state)
    assert (after["you.at"], state["you.at"]) == ("right", "left")
    assert refusal(take, after) is None
    assert not won(world.goals[0], after)
    assert done(take, after) == {**after, "red_box.at": "you", "red_box.n": 1}


@pytest.mark.parametrize(("changes", "message"), [
    ({"goals": [{"tells": "Fly.", "needs": ["you.at = moon"]}]}, "'Fly.' cannot be reached from the state given"),
    ({"goals": [{"tells": "Stay.", "needs": ["you.at = left"]}]}, "is reached before anything is done"),
    ({"goals": [{"tells": "?", "needs": ["door.at = left"]}]}, "nothing is known of door.at"),
    ({"state": {**SMALL["state"], "moon.at": "left"}}, "moon.at is of a thing that `kinds` does not name"),
    ({"vary": {"red_box.x": ["left"]}}, "red_box.x does not stand in `state`"),
    ({"vary": {"red_box.n": list(range(65))}}, "more than 64 ways to begin"),
    ({"actions": [{"say": "go {planet}", "does": ["you.at = left"], "tells": "."}]}, "names the kind planet"),
    ({"actions": [{"say": "go", "does": ["you.mood = left"], "tells": "."}]}, "assigns to nothing in `state`"),
    ({"actions": [*SMALL["actions"], {**SMALL["actions"][1], "say": "go the left"}]}, "'go left' can be said for two"),
    ({"kinds": {"room": ["left", "right"], "box": ["red_box", *(f"b_{i}" for i in range(999))]}}, "are more than 1000"),
    ({"agents": 2}, "Extra inputs are not permitted"),
    ({"vary": {"red_box.at": ["right", "nowhere"]}}, "'Get the box.' cannot be reached from red_box.at = nowhere"),
])  # fmt: skip
def test_a_wrong_file_is_refused(small: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        RulesConfig(path=small(**changes)).build()


def test_a_rule_that_would_fail_late_is_found(small: Any) -> None:
    """Only with the box in hand is the broken condition looked at, and after that the goal is reached."""
    late = {
        "say": "open",
        "needs": {"red_box.at != you or key.at = you": "No."},
        "does": ["red_box.n = 2"],
        "tells": ".",
    }
    with pytest.raises(InputError, match=r"nothing is known of key\.at"):
        read(small(actions=[*SMALL["actions"], late]))


def test_a_goal_that_takes_longer_than_the_turns_is_refused(small: Any, tmp_path: Path) -> None:
    RulesConfig(path=small(), turns=3).build()
    with pytest.raises(InputError, match=r"takes 3 actions .* set env.turns"):
        RulesConfig(path=small(), turns=2).build()
    for path in (str(tmp_path / "none.yaml"), str(tmp_path)):
        with pytest.raises(InputError, match="does not read as YAML"):
            RulesConfig(path=path).build()


def test_too_many_states_are_refused() -> None:
    many = [{"say": f"put {b} {a}", "does": [f"{b}.at = {a}"], "tells": "."} for a in "pqrstuvw" for b in "pqrstuvw"]
    world = World.model_validate({
        "intro": ".", "agent": "you", "kinds": {"k": list("pqrstuvw")}, "actions": many,
        "state": {f"{a}.at": "p" for a in "pqrstuvw"}, "goals": [{"tells": ".", "needs": ["p.at = z"]}],
    })  # fmt: skip
    with pytest.raises(InputError, match="more than 50 states"):
        ways(world, next(world.starts()), {}, reach=50)


def test_error_feedback_and_correction(small: Any) -> None:
    said = iter(["Hm.", "take the bag", "take red box", "Thought: it is there.\nAction: Go RIGHT!", "go right"])
    episode = played(RulesConfig(path=small(), turns=5), lambda env, heard: next(said))
    sight = "You are at left. Next to it: right. You see: nothing. You have: nothing."
    there = "You are at right. Next to it: left. You see: red_box (n: 0). You have: nothing."
    assert episode.heard == [
        "Two rooms.\nYou can say: go {room}; take {box}.\n{room}: left, right\n{box}: red_box\nGoal: Get the box. You "
        f"have 5 actions. Answer with one action on the last line.\n{sight}",
        f"That is no action. You can say: go {{room}}; take {{box}}.\n{sight}",
        f"Say it as `take {{box}}`, where {{box}} is one of red_box.\n{sight}",
        f"red_box is not here.\n{sight}",
        f"Ok.\n{there}",
    ]
    told = {"success": 0, "malformed": 2, "errors": 4, "corrected": 1, "difficulty": 3}
    assert episode.turns[-1].metrics == told


def test_the_last_action_of_a_line_is_taken() -> None:
    world = World.model_validate(SMALL)
    phrases = {plain(said): step for said, step in world.steps.items()}
    for said, meant in {"I go left, no, go right": "right", "forgo left": None, "go_left": "left"}.items():
        step = spoken(plain(said), phrases)
        assert (dict(step.values)["room"] if step else None) == meant


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_shipped_files_are_won_by_the_way_found_and_not_by_chance(path: Path) -> None:
    knobs = RulesConfig(path=str(path))
    seen = set()
    for seed in range(30):
        episode = played(knobs, solver(knobs), seed)
        assert episode.won
        assert len(episode.turns) == episode.turns[-1].metrics["difficulty"]
        seen.add(episode.heard[0])
    assert len(seen) > 5
    assert wins(knobs, among(*knobs.searched.world.steps), 60) < 0.1
    playing.holds(knobs, tuple(knobs.searched.world.steps))


def test_two_worlds_are_shipped() -> None:
    assert [path.stem for path in FILES] == ["greenhouse", "study"]


def test_the_file_on_the_page_is_played(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yml\n(.*?)```", Path("docs/envs-own.md").read_text(), re.S)
    path = tmp_path / "page.yaml"
    path.write_text(text)
    knobs = RulesConfig(path=str(path), turns=4)
    lengths = set()
    for seed in range(20):
        episode = played(knobs, solver(knobs), seed)
        assert episode.won
        lengths.add(len(episode.turns))
    assert lengths == {2}  # take, go; or go, take
