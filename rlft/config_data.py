"""The part of a run's config that says what is trained on and what is held out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rlft.curriculum.catalog import CurriculumConfig, Uniform
from rlft.peek import columns
from rlft.reasoning import check
from rlft.types import InputError
from rlft.wording import PLACE

HELD_OUT = 10**9  # where the seeds of held-out episodes begin
RECORDED_ROLES = ("completion", "completions", "chosen")


class Block(BaseModel):
    """A closed block: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class File(Block):
    """Rows from a file (JSONL or Parquet) or the hub."""

    type: Literal["file"] = "file"
    path: str = Field(description="a .jsonl, .json or .parquet file, or a datasets hub id")
    subset: str | None = Field(default=None, description="the hub data set's configuration")
    split: str | None = Field(default=None, description="the hub data set's split; default train, and test for eval")
    limit: int | None = Field(default=None, ge=1, description="only the first so many rows")


class Generated(Block):
    """Sums made on the spot; whole unordered pairs are held out."""

    type: Literal["generated"] = "generated"
    digits: int = Field(default=1, ge=1, le=3, description="of each number")
    split: Literal["train", "eval"] = Field(default="train", description="side of the held-out pairs; under eval: eval")
    holdout: float = Field(default=0.2, gt=0, lt=1, description="share of unordered pairs that is held out")
    seed: int = Field(default=0, description="chooses the held-out pairs")
    limit: int | None = Field(default=None, ge=1, description="only so many rows, after shuffling by the seed")


class Templates(Block):
    """Problems made of templates: a text with places for numbers, and a formula that gives the answer."""

    type: Literal["template"] = "template"
    path: str = Field(description="a .yaml, .json or .jsonl file of templates")
    count: int = Field(default=1000, ge=1, description="how many problems; the templates take turns")
    split: Literal["train", "eval", "perturb"] = Field(
        default="train",
        description="side of the held-out numbers, or numbers beyond those of training; under eval: eval",
    )
    holdout: float = Field(default=0.2, gt=0, lt=1, description="share of the numbers that is held out")
    seed: int = Field(default=0, description="chooses which of the numbers")


class Seeds(Block):
    """Episodes of an environment that makes its own beginning of a number, the row's `seed`."""

    type: Literal["seeds"] = "seeds"
    count: int = Field(default=1000, ge=1, description="how many")
    split: Literal["train", "eval"] = Field(
        default="train", description="train counts from 0, eval from 1000000000; under eval: eval"
    )
    start: int = Field(default=0, ge=0, description="the first of them, counted from there")
    prompt: str = Field(default="Begin.", min_length=1, description="for environments that do not open themselves")

    @model_validator(mode="after")
    def _apart(self) -> Seeds:
        if self.split == "train" and self.start + self.count > HELD_OUT:
            raise ValueError(f"start: seeds from {HELD_OUT} on are held out; begin lower")
        return self


class ReasoningGym(Block):
    """Questions of a reasoning-gym dataset, or of several."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    dataset: str = Field(min_length=1, description="its name there, such as chain_sum; composite: several at once")
    options: dict[str, Any] = Field(
        default_factory=dict, description="the dataset's own; for composite {datasets: [{name, weight, config}]}"
    )
    count: int = Field(default=1000, ge=1, description="the most questions; no question stands there twice")
    split: Literal["train", "eval"] = Field(
        default="train", description="side of the held-out questions; under eval: eval"
    )
    holdout: float = Field(default=0.2, ge=0.001, le=0.999, description="share of the questions that is held out")
    seed: int = Field(default=0, ge=0, description="the first of those that questions are drawn with")

    @model_validator(mode="after")
    def _known(self) -> ReasoningGym:
        try:
            check(self.dataset, self.options)
        except InputError as error:
            raise ValueError(str(error)) from error
        return self


Rows = Annotated[File | Generated | Templates | Seeds | ReasoningGym, Field(discriminator="type")]


class Direction(Block):
    """Which way each task's answers are to go, among the reward's components; it stands in the prompt."""

    components: tuple[str, ...] = Field(min_length=2, description="the reward's components, as they are logged")
    arc: tuple[float, float] | None = Field(
        default=None,
        description="of two components: least and largest angle in degrees, from the first towards the second; none: "
        "any direction without a negative weight",
    )
    text: str = Field(
        default="Your response should maximize weighted rating = {rating}",
        description="what the system message says; {rating} is the weighted sum in words",
    )

    @model_validator(mode="after")
    def _fits(self) -> Direction:
        if len(set(self.components)) < len(self.components):
            raise ValueError("components: a name stands there twice; name each once")
        if self.arc is not None and (len(self.components) != 2 or self.arc[0] > self.arc[1]):
            raise ValueError("arc: it is [least, largest] angle between two components; leave it out for more of them")
        if "{rating}" not in self.text:
            raise ValueError(
                "text: without {rating} the prompt does not say the direction; write it where that belongs"
            )
        return self


class Data(Block):
    """What is trained on and what is held out. A plain string stands for {type: file, path: ...}."""

    train: Rows
    eval: Rows | None = None
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="role: column. Roles: prompt, messages, completion, completions, scores, ranks, labels, chosen, "
        "rejected, objectives, objectives/<name>, user, direction; any other name is passed to the reward. Columns "
        "that are not named keep their own name.",
    )
    prompt: str = Field(
        default=PLACE, description="what the policy is asked: {prompt} is the row's prompt, its last user message"
    )
    system: str | None = Field(default=None, min_length=1, description="a system message for every prompt")
    direction: Direction | None = Field(
        default=None, description="a direction among the reward's components for each task, for a `directed` reward"
    )
    curriculum: CurriculumConfig = Field(default=Uniform(), description="which tasks a step draws")

    @property
    def own(self) -> frozenset[str]:
        """The roles that the training data have: named in `columns`, or under a column's own name."""
        have = columns(self.train.path) if isinstance(self.train, File) else frozenset()
        return frozenset(self.columns) | (have - set(self.columns.values()))

    @property
    def answered(self) -> set[str]:
        """The roles of recorded answers that the training data have: named in `columns`, or under their own name."""
        return {role for role in RECORDED_ROLES if role in self.own}

    @model_validator(mode="after")
    def _one_share(self) -> Data:
        shares = {
            kind: {side.holdout for side in (self.train, self.eval) if isinstance(side, kind)}
            for kind in (Templates, ReasoningGym)
        }
        if any(len(each) > 1 for each in shares.values()):
            raise ValueError("train and eval hold out different shares (`holdout`), so that problems would be in both")
        sums = {(side.holdout, side.seed) for side in (self.train, self.eval) if isinstance(side, Generated)}
        if len(sums) > 1:
            raise ValueError("train and eval have another `holdout` or `seed`, so that sums would be in both")
        return self

    @field_validator("prompt")
    @classmethod
    def _with_a_place(cls, value: str) -> str:
        if PLACE not in value:
            raise ValueError(f"prompt: without {PLACE} every task would ask the same; write it where the row's goes")
        return value

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _plain(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, str):
            return {"type": "file", "path": value}
        if isinstance(value, dict) and value.get("type") in ("generated", "template", "seeds", "reasoning_gym"):
            return {"split": field.field_name, **value}
        return {"type": "file", **value} if isinstance(value, dict) and "type" not in value else value
