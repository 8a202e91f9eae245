"""The named curricula. Each config *is* its knobs and builds one for the tasks of a run; the union is the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlft.types import Task

if TYPE_CHECKING:
    from rlft.source import Curriculum


class Knobs(BaseModel):
    """A closed block."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Asking(Knobs):
    """What every curriculum that learns has."""

    component: str | None = Field(
        default=None, description="the reward's component that tells how a task went; none: the whole score"
    )
    random: float = Field(default=0.2, ge=0, lt=1, description="share of the tasks that is drawn from all alike")


class Uniform(Knobs):
    """Every task once an epoch, in random order."""

    type: Literal["uniform"] = "uniform"

    def build(self, tasks: Sequence[Task], seed: int) -> Curriculum | None:
        """None: the source's own order."""
        return None


class Band(Asking):
    """Tasks that the policy solves sometimes are drawn more often."""

    type: Literal["band"] = "band"
    low: float = Field(default=0.2, ge=0, le=1, description="least success rate of the band")
    high: float = Field(default=0.8, ge=0, le=1, description="largest success rate of the band")
    rate: float = Field(default=0.3, gt=0, le=1, description="estimate <- (1 - rate) * estimate + rate * new result")
    start: float = Field(default=0.5, ge=0, le=1, description="the estimate before any result")
    level: float = Field(default=1.0, description="an answer from this value on is a success")
    by: tuple[str, ...] = Field(
        default=(), description="columns; tasks with the same values there share an estimate. None: each has its own"
    )

    @model_validator(mode="after")
    def _fits(self) -> Band:
        if self.low > self.high:
            raise ValueError(f"low: the band ends below where it begins ({self.high:g} < {self.low:g}); swap them")
        return self

    def build(self, tasks: Sequence[Task], seed: int) -> Curriculum:
        """The curriculum before its first task. Raises InputError for a column that the tasks do not have."""
        from rlft.curriculum import band

        return band.Band(tasks, seed, **self.model_dump(exclude={"type"}))


class AlpGmm(Asking):
    """Tasks of the difficulty at which results change most, by Gaussian mixtures."""

    type: Literal["alp_gmm"] = "alp_gmm"
    columns: tuple[str, ...] = Field(min_length=1, description="columns of numbers that say how difficult a task is")
    every: int = Field(default=250, ge=2, description="groups from one fit to the next, and as many are fitted to")
    gaussians: int = Field(default=10, ge=2, description="the most Gaussians of a mixture; it has at least 2")
    criterion: Literal["aic", "bic"] = Field(default="aic", description="what chooses how many")

    def build(self, tasks: Sequence[Task], seed: int) -> Curriculum:
        """The curriculum before its first task. Raises InputError for columns that are not of numbers."""
        from rlft.curriculum import alp_gmm

        return alp_gmm.AlpGmm(tasks, seed, **self.model_dump(exclude={"type"}))


class Skills(Asking):
    """Tasks that need the skills that failed answers lacked."""

    type: Literal["skills"] = "skills"
    column: str = Field(default="skills", description="its tasks' skills: a list, or text with commas between them")
    rate: float = Field(default=0.1, gt=0, le=1, description="missing <- (1 - rate) * missing + rate * new failures")
    level: float = Field(default=1.0, description="an answer below this value has failed")

    def build(self, tasks: Sequence[Task], seed: int) -> Curriculum:
        """The curriculum before its first task. Raises InputError where a task has no skill."""
        from rlft.curriculum import skills

        return skills.Skills(tasks, seed, **self.model_dump(exclude={"type", "column"}), labels=self.column)


CurriculumConfig = Annotated[Uniform | Band | AlpGmm | Skills, Field(discriminator="type")]
