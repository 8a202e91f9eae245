"""A world of a rule file, and the loop of AgentRefine (Fu et al. 2025, arXiv:2501.01702): error, feedback, correction.

Whatever fails is answered with what is wrong: the action is not known, its parameter is not, or a condition does not
hold, in the words of the file. The episode goes on, so that the next answer can be the right one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Literal

from pydantic import Field

from rlft.envs.base import Env
from rlft.envs.own.play import Move, WorldKnobs
from rlft.envs.own.rulefile import PLACE, Rule, Searched, State, Step, Value, World, done, plain, read, refusal, won
from rlft.types import Task

LINE = 300  # characters of an answer's last line that are read


class Rules:
    """One beginning and one goal. It reports the answers that failed (`errors`), those of them that the next answer put
    right (`corrected`), and how many actions the shortest way takes (`difficulty`).
    """

    def __init__(self, chance: random.Random, searched: Searched, phrases: Mapping[str, Step], turns: int) -> None:
        start, goal = chance.randrange(len(searched.starts)), chance.randrange(len(searched.world.goals))
        self._world, self._phrases, self._turns = searched.world, phrases, turns
        self._state: State = dict(searched.starts[start])
        self._goal = searched.world.goals[goal]
        self._difficulty = float(len(searched.ways[start, goal]))
        self._errors, self._corrected, self._failed = 0, 0, False

    def opening(self) -> str:
        """The world, what can be said, the goal, and what is seen."""
        return opened(self._world, self._goal.tells, self._turns, seen(self._world, self._state))

    def move(self, text: str) -> Move:
        """What an action changes, or why it does not."""
        said = plain(last_line(text))
        step = spoken(said, self._phrases)
        if step is None:
            return self._erred(unknown(said, self._world), fit=False)
        refused = refusal(step, self._state)
        if refused is not None:
            return self._erred(refused)
        self._state = done(step, self._state)
        self._corrected += self._failed
        self._failed = False
        over = True if won(self._goal, self._state) else None
        return self._moved(step.fill(step.rule.tells), won=over)

    def _erred(self, said: str, fit: bool = True) -> Move:
        self._errors += 1
        self._failed = True
        return self._moved(said, fit=fit)

    def _moved(self, said: str, won: bool | None = None, fit: bool = True) -> Move:
        metrics = {"errors": self._errors, "corrected": self._corrected, "difficulty": self._difficulty}
        return Move(f"{said}\n{seen(self._world, self._state)}", won=won, fit=fit, metrics=metrics)


def last_line(text: str) -> str:
    """The last line that says something, without a leading `Action:`."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"^\s*action\s*:", "", lines[-1][-LINE:], flags=re.IGNORECASE) if lines else ""


def spoken(said: str, phrases: Mapping[str, Step]) -> Step | None:
    """The action that stands in a line, the last and then the longest one if there are several."""
    places = ((f" {said} ".rfind(f" {phrase} "), len(phrase), phrase) for phrase in phrases)
    at, _, phrase = max(places)
    return phrases[phrase] if at >= 0 else None


def unknown(said: str, world: World) -> str:
    """What is wrong with a line in which there is no action: its parameter, or all of it."""
    for rule in world.actions:
        verb, _, rest = rule.say.partition(" {")
        if rest and f" {plain(verb)} " in f" {said} ":
            return parameters(rule, world)
    return forms(world)


def parameters(rule: Rule, world: World) -> str:
    """What an action's parameters may be."""
    kinds = dict.fromkeys(PLACE.findall(rule.say))
    each = "; ".join(f"{{{kind}}} is one of {', '.join(world.kinds[kind])}" for kind in kinds)
    return f"Say it as `{rule.say}`, where {each}."


def forms(world: World) -> str:
    """Every form of an action."""
    return f"That is no action. You can say: {'; '.join(rule.say for rule in world.actions)}."


def opened(world: World, goal: str, turns: int, sight: str) -> str:
    """The question that opens an episode."""
    kinds = dict.fromkeys(kind for rule in world.actions for kind in PLACE.findall(rule.say))
    things = "".join(f"\n{{{kind}}}: {', '.join(world.kinds[kind])}" for kind in kinds)
    return (
        f"{world.intro}\nYou can say: {'; '.join(rule.say for rule in world.actions)}.{things}\nGoal: {goal} You have "
        f"{turns} actions. Answer with one action on the last line.\n{sight}"
    )


def seen(world: World, state: Mapping[str, Value]) -> str:
    """Where the agent is, where it can go, and what is there and with it."""
    here = state.get(f"{world.agent}.at")
    ways = state.get(f"{here}.next", ())
    lines = [f"You are at {here}." if here is not None else ""]
    lines += [f"Next to it: {', '.join(ways)}." if isinstance(ways, tuple) and ways else ""]
    things = [thing for thing in sorted(world.things) if f"{thing}.at" in state and thing != world.agent]
    for says, place in (("You see", here), ("You have", world.agent)):
        found = [described(thing, state) for thing in things if state[f"{thing}.at"] == place]
        lines.append(f"{says}: {', '.join(found) or 'nothing'}.")
    return " ".join(line for line in lines if line)


def described(thing: str, state: Mapping[str, Value]) -> str:
    """A thing, with what else holds of it."""
    facts = {fact.partition(".")[2]: value for fact, value in state.items() if fact.startswith(f"{thing}.")}
    words = {True: "yes", False: "no"}
    shown = [
        f"{name}: {words[value] if isinstance(value, bool) else value}"
        for name, value in facts.items()
        if name not in ("at", "next")
    ]
    return f"{thing} ({', '.join(shown)})" if shown else thing


def widest(world: World) -> str:
    """More than can ever be seen at once."""
    values = [value for value in (*world.state.values(), *sum(world.vary.values(), ())) if isinstance(value, str)]
    assigned = [line.partition(" = ")[2] for rule in world.actions for line in rule.does]
    longest = max((*values, *assigned, *world.things), key=len)
    ways = max((value for value in world.state.values() if isinstance(value, tuple)), key=len, default=())
    state = dict.fromkeys(world.state, longest)
    things = [described(thing, state) for thing in sorted(world.things)]
    return (
        f"You are at {longest}. Next to it: {', '.join([longest] * len(ways))}. You see: {', '.join(things)}. "
        "You have: nothing."
    )


class RulesConfig(WorldKnobs):
    """Play a world of a rule file."""

    type: Literal["rules"] = "rules"
    path: str = Field(description="a rule file (YAML)")
    turns: int = Field(default=20, ge=1, description="the most actions; no goal may take more")

    @property
    def answers(self) -> int:
        return self.turns

    @cached_property
    def searched(self) -> Searched:
        """The file, read and searched once. Raises InputError."""
        return read(self.path, self.turns)

    @cached_property
    def phrases(self) -> dict[str, Step]:
        """Every action by its words."""
        return {plain(said): step for said, step in self.searched.world.steps.items()}

    def openings(self) -> Iterable[str]:
        world = self.searched.world
        for goal in world.goals:
            yield opened(world, goal.tells, self.turns, widest(world))

    def replies(self) -> Iterable[str]:
        world = self.searched.world
        said = {forms(world), *(parameters(rule, world) for rule in world.actions)}
        for step in world.steps.values():
            said |= {step.fill(text) for text in (step.rule.tells, *step.rule.needs.values())}
        sight = widest(world)
        for text in sorted(said):
            yield f"{text}\n{sight}"

    def world(self, chance: random.Random) -> Rules:
        return Rules(chance, self.searched, self.phrases, self.turns)

    def build(self) -> Callable[[Task], Env]:
        _ = self.searched  # an error in the file is told before anything is played
        return super().build()
