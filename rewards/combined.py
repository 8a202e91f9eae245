"""Several rewards as one, where a sum of constant weights is not enough: who is asked, and what counts how much."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from rlft.rewards.balanced import normalised, scheduled
from rlft.rewards.base import Config, scored
from rlft.rewards.conditional import Part, first_verdict, gated, routed, staged
from rlft.rewards.inside import Holding, Terms, bare, unknown_terms
from rlft.types import InputError, Reward, Task, Trajectory

if TYPE_CHECKING:
    from rlft.rewards.catalog import RewardConfig

Step = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(allow_inf_nan=False)]


class Gated(Holding):
    """Another reward's verdict where a gate is passed, else a fixed value; what does not pass is not judged by it."""

    type: Literal["gated"] = "gated"
    gate: RewardConfig = Field(description="The reward that is asked first. Its own weight does not matter.")
    of: RewardConfig = Field(description="The reward that is asked about what passes, as one group.")
    at_least: float = Field(default=1.0, allow_inf_nan=False, description="The gate's verdict that passes.")
    otherwise: float = Field(default=0.0, allow_inf_nan=False, description="The value of what does not pass.")

    def judge(self, name: str) -> Reward:
        then = Part(self.of.build(f"{name}/of"), f"{name}/of", self.of.components(f"{name}/of"), 1.0, self.at_least)
        return gated(bare(self.gate).build(f"{name}/gate"), then, self.otherwise)

    def components(self, name: str | None = None) -> list[str]:
        name = name or self.type
        return [name, *self.of.components(f"{name}/of"), *self.gate.components(f"{name}/gate")]

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        name = name or self.type
        return [(f"{name}/gate", self.gate), (f"{name}/of", self.of)]


class Sequence(Terms):
    """The sum of weight times value over terms asked one after the other, until one is not passed."""

    type: Literal["sequence"] = "sequence"
    at_least: dict[str, Factor] = Field(
        default_factory=dict,
        description="By term, the verdict that passes on to the next, 1 unless given. What does not pass is not shown "
        "to later terms, and its sum ends there.",
    )

    def build(self, name: str | None = None) -> Reward:
        stages = [
            Part(bare(term).build(own), own, term.components(own), term.weight, self.at_least.get(key, 1.0))
            for key, term in self.terms.items()
            for own in [self.prefix(name) + key]
        ]
        return scored(staged(stages), name or self.type, self.weight, record=name is not None)

    def components(self, name: str | None = None) -> list[str]:
        """What the last term says comes first: the cheap checks before it are not what is meant by correct."""
        keys = list(self.terms)
        parts = {key: self.terms[key].components(self.prefix(name) + key) for key in [keys[-1], *keys[:-1]]}
        return [*([name] if name else []), *(part for parts in parts.values() for part in parts)]

    @model_validator(mode="after")
    def _known(self) -> Sequence:
        unknown_terms("at_least", list(self.at_least), list(self.terms))
        return self


class Named(Terms):
    """A reward whose verdict is that of one of its terms, and has a name for all of them."""

    def prefix(self, name: str | None) -> str:
        return super().prefix(name or self.type)

    def components(self, name: str | None = None) -> list[str]:
        return super().components(name or self.type)


class First(Named):
    """The weighted verdict of the first term that has one; later terms are asked only where those before have none."""

    type: Literal["first"] = "first"

    def judge(self, name: str) -> Reward:
        return first_verdict(
            [
                Part(bare(term).build(own), own, term.components(own), term.weight)
                for key, term in self.terms.items()
                for own in [self.prefix(name) + key]
            ]
        )


class Routed(Named):
    """The weighted verdict of the term that a column of the task names."""

    type: Literal["routed"] = "routed"
    column: str = Field(min_length=1, description="Column of the task that says which term judges it.")
    routes: dict[str, str] = Field(
        default_factory=dict,
        description="By value of the column, the term for it. A value that is not listed is the name of a term itself.",
    )
    default: str | None = Field(default=None, description="The term for all other values; none: they are refused.")

    def judge(self, name: str) -> Reward:
        parts = {
            key: Part(term.build(own), own, term.components(own))
            for key, term in self.terms.items()
            for own in [self.prefix(name) + key]
        }
        return routed(parts, self.route)

    def route(self, task: Task) -> str:
        """The name of the term for a task. Raises InputError where it has no such column, or nothing known in it."""
        if self.column not in task.info:
            there = ", ".join(map(str, task.info)) or "no column at all"
            raise InputError(
                f"task '{task.id}': column '{self.column}' is missing (there is: {there}), and it says which reward "
                "judges the row. Set the reward's `column` to one that there is, or repair that row"
            )
        value = task.info[self.column]
        said = str(value).lower() if isinstance(value, bool) else str(value)
        key = self.routes.get(said, said)
        if key in self.terms:
            return key
        if self.default is None:
            known = ", ".join({**self.routes, **self.terms})
            raise InputError(
                f"task '{task.id}': column '{self.column}' holds {value!r}, which names no term of the reward; it has "
                f"{known}. Add a route or a term for it, set `default`, or repair that row"
            )
        return self.default

    def shown(self, task: Task) -> list[Config]:
        return [self.terms[self.route(task)]]

    def said(self, trajectory: Trajectory) -> tuple[str, Hashable] | None:
        """The answer as the term reads it that judges the task, and that term's name."""
        key = self.route(trajectory.task)
        said = self._of(key).said(trajectory)
        return None if said is None else (key, said)

    def same(self) -> Callable[[Any, Any], Awaitable[bool | None]]:
        ways = {key: self._of(key).same() for key in self.terms}

        async def same(one: tuple[str, Any], other: tuple[str, Any]) -> bool | None:
            return one[0] == other[0] and await ways[one[0]](one[1], other[1])

        return same

    def _of(self, key: str) -> Config:
        """The reward that reads the answers which a term judges."""
        return self.terms[key].reader(self.terms[key].components(key)[0], key)

    @model_validator(mode="after")
    def _known(self) -> Routed:
        unknown_terms("routes", list(self.routes.values()), list(self.terms))
        unknown_terms("default", [self.default] if self.default is not None else [], list(self.terms))
        return self


class Scheduled(Terms):
    """The sum of weight times value over terms whose weights change over the steps of the run."""

    type: Literal["scheduled"] = "scheduled"
    points: dict[str, dict[Step, Factor]] = Field(
        min_length=1,
        description="By term, by what its weight is multiplied at which steps; on a line between two of them, and "
        "constant before the first and after the last. A term without points has its weight at every step.",
    )

    def build(self, name: str | None = None) -> Reward:
        before = self.prefix(name)
        terms = {before + key: term.build(before + key) for key, term in self.terms.items()}
        judge = scheduled(terms, {before + key: points for key, points in self.points.items()})
        return scored(judge, name or self.type, self.weight, record=name is not None)

    @property
    def by_step(self) -> bool:
        return True

    @model_validator(mode="after")
    def _known(self) -> Scheduled:
        unknown_terms("points", list(self.points), list(self.terms))
        empty = [key for key, points in self.points.items() if not points]
        if empty:
            raise ValueError(f"points.{empty[0]}: give at least one step with its factor, such as {{0: 0.0, 100: 1.0}}")
        return self


class Normalised(Terms):
    """The sum over terms of weight times how far a value stands from its group's mean, in standard deviations."""

    type: Literal["normalised"] = "normalised"
    epsilon: float = Field(
        default=1e-4, gt=0, allow_inf_nan=False, description="Added to each standard deviation, as in `grpo`."
    )

    def build(self, name: str | None = None) -> Reward:
        before = self.prefix(name)
        terms = [bare(term).build(before + key) for key, term in self.terms.items()]
        judge = normalised(terms, [term.weight for term in self.terms.values()], self.epsilon)
        return scored(judge, name or self.type, self.weight, record=name is not None)
