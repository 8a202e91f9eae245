"""A world as a rule file: things and what holds of them, actions with what they need and do, and goals.

The idea of AgentRefine (Fu et al. 2025, arXiv:2501.01702), whose environments are scripts that a language model writes:
locations, objects, actions with their parameters, and a message for each way to fail. Here a person writes the file,
and it is searched before it is played: every goal can be reached from every beginning.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from rlft.types import InputError

NAME = r"[a-z][a-z0-9_]*"
TERM = rf"(?:\{{{NAME}\}}|{NAME}|[0-9]+)(?:\.{NAME})*"
SIMPLE = re.compile(rf"({TERM}) (=|!=|in) ({TERM})")
PLACE = re.compile(rf"\{{({NAME})\}}")
STARTS = 64  # ways to begin that are searched
REACH = 20_000  # states of one search
SAID = 1000  # different actions, with every choice of their parameters

Name = Annotated[str, StringConstraints(pattern=rf"^{NAME}$")]
Fact = Annotated[str, StringConstraints(pattern=rf"^{NAME}\.{NAME}$")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=300)]
Value = bool | int | str | tuple[str, ...]
State = dict[str, Value]


class Block(BaseModel):
    """A closed part of a rule file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(Block):
    """An action: how it is said, conditions with the message of each that fails, assignments, and what is told then."""

    say: Annotated[str, StringConstraints(pattern=rf"^{NAME}( ({NAME}|\{{{NAME}\}}))*$")]
    needs: dict[str, Text] = Field(default_factory=dict)
    does: tuple[str, ...] = Field(min_length=1)
    tells: Text


class Goal(Block):
    """What is to be true at once, and how the policy is told."""

    tells: Text
    needs: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """An action with its parameters filled in."""

    rule: Rule
    values: tuple[tuple[str, str], ...]

    def fill(self, text: str) -> str:
        """The text with this step's things in place of {kind}."""
        return filled(text, dict(self.values))


class World(Block):
    """A rule file. kinds: names of things. state: what holds at the beginning. vary: what may hold instead."""

    intro: Text
    agent: Name
    kinds: dict[Name, tuple[Name, ...]]
    state: dict[Fact, Value]
    vary: dict[Fact, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(default_factory=dict)
    actions: tuple[Rule, ...] = Field(min_length=1)
    goals: tuple[Goal, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _known(self) -> World:
        things = self.things
        for fact in (*self.state, *self.vary):
            if fact.partition(".")[0] not in things:
                raise ValueError(f"state: {fact} is of a thing that `kinds` does not name")
        for fact in self.vary:
            if fact not in self.state:
                raise ValueError(f"vary: {fact} does not stand in `state`; give it a first value there")
        for rule in self.actions:
            for kind in PLACE.findall(rule.say):
                if kind not in self.kinds:
                    raise ValueError(f"actions: '{rule.say}' names the kind {kind}, which `kinds` does not have")
        if len(list(itertools.islice(self.each(), SAID + 1))) > SAID:
            raise ValueError(f"actions: with their parameters they are more than {SAID}; name fewer things or kinds")
        if twice := repeated(plain(said) for said, _ in self.each()):
            raise ValueError(f"actions: '{twice}' can be said for two of them; word one of them otherwise")
        if len(list(itertools.islice(self.starts(), STARTS + 1))) > STARTS:
            raise ValueError(f"vary: it makes more than {STARTS} ways to begin, too many to search; vary less")
        return self

    @cached_property
    def things(self) -> frozenset[str]:
        """Every name of a thing, the agent's among them."""
        return frozenset(itertools.chain([self.agent], *self.kinds.values()))

    @cached_property
    def steps(self) -> dict[str, Step]:
        """Every action with every choice of its parameters, by what is said."""
        return dict(self.each())

    def each(self) -> Iterator[tuple[str, Step]]:
        """The same one by one, also what is said for two of them."""
        for rule in self.actions:
            kinds = list(dict.fromkeys(PLACE.findall(rule.say)))
            for chosen in itertools.product(*(self.kinds[kind] for kind in kinds)):
                step = Step(rule, tuple(zip(kinds, chosen, strict=True)))
                yield step.fill(rule.say), step

    def starts(self) -> Iterator[State]:
        """Every way to begin."""
        for chosen in itertools.product(*self.vary.values()):
            yield {**self.state, **dict(zip(self.vary, chosen, strict=True))}


def plain(text: str) -> str:
    """The words of what is said in small letters, without articles; the parts of a name count as words."""
    return " ".join(word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in ("the", "a", "an"))


def repeated(texts: Iterable[str]) -> str | None:
    """The first text that stands there twice, if any."""
    seen: set[str] = set()
    return next((text for text in texts if text in seen or seen.add(text)), None)


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with values in place of {kind}."""
    return PLACE.sub(lambda found: values.get(found[1], found[0]), text)


def holds(condition: str, state: State) -> bool:
    """Whether a condition holds. "A or B": one of them. Raises InputError where it says nothing that can be true."""
    return any(_holds(part.strip(), state) for part in condition.split(" or "))


def _holds(condition: str, state: State) -> bool:
    found = SIMPLE.fullmatch(condition)
    if not found:
        raise InputError(f"'{condition}' is no condition; write `a.b = c`, `a.b != c`, or `c in a.b`, joined by ` or `")
    left, right = value(found[1], state), value(found[3], state)
    if found[2] == "in":
        return isinstance(right, tuple) and left in right
    return (left == right) == (found[2] == "=")


def value(term: str, state: State) -> Value:
    """What a term stands for: a name, a number, true or false, or what holds of a thing: `you.at`, `you.at.next`.

    Raises InputError where nothing is known of it.
    """
    first, *rest = term.split(".")
    plain: dict[str, Value] = {"true": True, "false": False}
    now = plain.get(first, int(first) if first.isdecimal() else first)
    for name in rest:
        if f"{now}.{name}" not in state:
            raise InputError(f"nothing is known of {now}.{name}, which {term} asks for; give it a value in `state`")
        now = state[f"{now}.{name}"]
    return now


def done(step: Step, state: State) -> State:
    """The state after an action whose conditions hold. Raises InputError where it assigns to nothing known."""
    after = dict(state)
    for line in step.rule.does:
        target, _, term = step.fill(line).partition(" = ")
        if target not in state or not re.fullmatch(TERM, term):
            raise InputError(f"'{line}' assigns to nothing in `state`; write `thing.fact = value`")
        after[target] = value(term, state)  # of what held before, whatever the order of the lines
    return after


def refusal(step: Step, state: State) -> str | None:
    """The message of the first condition that fails, if any."""
    needs = step.rule.needs.items()
    return next((step.fill(said) for condition, said in needs if not holds(step.fill(condition), state)), None)


def won(goal: Goal, state: State) -> bool:
    """Everything that the goal needs holds."""
    return all(holds(condition, state) for condition in goal.needs)


Key = tuple[Value, ...]
Moves = dict[Key, list[tuple[str, Key]]]


def moves(world: World, key: Key) -> list[tuple[str, Key]]:
    """What can be said in a state, with the state that it leads to. Raises InputError where a rule cannot be read."""
    state = dict(zip(world.state, key, strict=True))
    open_ = ((said, step) for said, step in world.steps.items() if refusal(step, state) is None)
    return [(said, tuple(done(step, state).values())) for said, step in open_]


def ways(world: World, start: State, known: Moves, reach: int = REACH) -> list[list[str] | None]:
    """A shortest way to each goal as what is said, None where there is none. known: moves that were worked out before.

    Breadth-first, over every state that can be reached, so that no rule fails later on. Raises InputError where one
    does, and where there are more than `reach` states.
    """
    first: Key = tuple(start[fact] for fact in world.state)
    found: list[list[str] | None] = [None for _ in world.goals]
    seen: dict[Key, tuple[Key, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        key = queue.popleft()
        state = dict(zip(world.state, key, strict=True))
        for i, goal in enumerate(world.goals):
            if found[i] is None and won(goal, state):
                found[i] = _back(seen, key)
        if key not in known:
            known[key] = moves(world, key)
        for said, after in known[key]:
            if after not in seen:
                seen[after] = key, said
                queue.append(after)
        if len(seen) > reach:
            raise InputError(f"it has more than {reach} states, too many to search; leave some of it out")
    return found


def _back(seen: Mapping[Key, tuple[Key, str] | None], key: Key) -> list[str]:
    said: list[str] = []
    while (before := seen[key]) is not None:
        key = before[0]
        said.append(before[1])
    return said[::-1]


@dataclass(frozen=True)
class Searched:
    """A world whose goals can all be reached. ways: a shortest way for each beginning and goal."""

    world: World
    starts: tuple[State, ...]
    ways: dict[tuple[int, int], list[str]]


def read(path: str, longest: int | None = None) -> Searched:
    """A rule file that was searched. longest: the most actions of a way. Raises InputError."""
    try:
        parsed = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        world = World.model_validate(parsed)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"env.path: {path} does not read as YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"env.path: {path}: {where}: {first['msg']}") from error
    try:
        return _searched(world, longest)
    except InputError as error:
        raise InputError(f"env.path: {path}: {error}") from error


def _searched(world: World, longest: int | None) -> Searched:
    starts, every, known = tuple(world.starts()), {}, Moves()
    for i, start in enumerate(starts):
        for k, found in enumerate(ways(world, start, known)):
            begun = ", ".join(f"{fact} = {start[fact]}" for fact in world.vary) or "the state given"
            goal = f"the goal '{world.goals[k].tells}'"
            if not found:
                reason = "is reached before anything is done" if found == [] else "cannot be reached"
                raise InputError(f"{goal} {reason} from {begun}; change the rules or the goal")
            if longest is not None and len(found) > longest:
                raise InputError(f"{goal} takes {len(found)} actions from {begun}; set env.turns to as many at least")
            every[i, k] = found
    return Searched(world, starts, every)
