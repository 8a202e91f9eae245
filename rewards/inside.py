"""What rewards that hold other rewards share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field, model_validator

from rlft.rewards.base import Config
from rlft.types import Group, Trajectory

if TYPE_CHECKING:
    from rlft.rewards.catalog import RewardConfig

# Logged as reward/<name> or eval/<name> for every run, and below a component by the rewards that hold others.
TAKEN = ("mean", "std", "missing", "failed", "failures", "accuracy", "reward", "tasks", "tokens_mean", "truncated")
TAKEN += ("accuracy_low", "accuracy_high", "clusters", "unanswered", "undecided")
TAKEN += ("verifier_mean", "verifier_missing", "verifier_negative")
TAKEN_BELOW = ("asked", "factor")


def _term_name(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"'{name}' cannot name a term, being logged as reward/<name>: use letters, digits, - and _")
    if name in (*TAKEN, *TAKEN_BELOW):
        raise ValueError(f"'{name}' cannot name a term: that name is logged for every run. Choose another name.")
    return name


TermName = Annotated[str, AfterValidator(_term_name)]


class Holding(Config):
    """A reward of whole answers that holds others, none of which pays past it."""

    @property
    def directed(self) -> bool:
        return any(part.directed for part in self.inside)

    @model_validator(mode="after")
    def _of_answers(self) -> Holding:
        paying = [part.type for part in self.inside if part.pays]
        if paying:
            raise ValueError(
                f"'{paying[0]}' pays on the way, past this reward; name one of whole answers inside, and put "
                f"'{paying[0]}' around this reward or beside it"
            )
        return self


class Terms(Holding):
    """A reward over terms that have names.

    Its own value is no component at the top of a run, where it is the score itself, as that of a `weighted` is none.
    """

    terms: dict[TermName, RewardConfig] = Field(
        min_length=1, description="Any rewards by a name of your choice, logged as those of a `weighted` are."
    )

    def prefix(self, name: str | None) -> str:
        """What stands before a term's name where the reward is called `name`."""
        return f"{name}/" if name else ""

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        return [(self.prefix(name) + key, term) for key, term in self.terms.items()]

    def components(self, name: str | None = None) -> list[str]:
        inner = [part for key, term in self.terms.items() for part in term.components(self.prefix(name) + key)]
        return [name, *inner] if name else inner


def unknown_terms(key: str, names: Sequence[str], terms: Sequence[str]) -> None:
    """Raises ValueError where one of the names is that of no term. key: where they stand."""
    unknown = [name for name in names if name not in terms]
    if unknown:
        raise ValueError(f"{key}: there is no term '{unknown[0]}'; there is {', '.join(terms)}")


def bare(reward: Config) -> Config:
    """The reward without its weight: its verdicts themselves, to be held against a threshold."""
    return reward.model_copy(update={"weight": 1.0})


def forget(group: Group, components: Sequence[str]) -> None:
    """Take back what an earlier judgement wrote under these names, for those that are not judged by them this time."""
    for trajectory in group:
        for component in components:
            for key in [key for key in trajectory.metrics if _below(key, f"reward/{component}")]:
                del trajectory.metrics[key]
        trajectory.failures = [failure for failure in trajectory.failures if failure.reward not in components]


def _below(key: str, component: str) -> bool:
    return key == component or key.startswith(f"{component}/")


def picked(group: Group, places: Sequence[int]) -> tuple[Trajectory, ...]:
    """The trajectories at these places."""
    return tuple(group[place] for place in places)
