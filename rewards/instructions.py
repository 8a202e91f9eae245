"""Whether the completion follows instructions that a program can check: IFEval's (see `ifeval`), in the columns of the
published data set (`instruction_id_list`, `kwargs`) or as a list in the config.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlft.rewards.base import Config
from rlft.rewards.ifeval import Check, check, loosely, strictly
from rlft.rewards.pooled import Verdict, pooled
from rlft.types import InputError, Reward, Task, Trajectory

Named = list[tuple[str, Check]]


class Constraint(BaseModel):
    """One instruction of the config's own list: its kind and, beside it, the keywords of that kind."""

    model_config = ConfigDict(extra="allow")
    kind: str

    @property
    def keywords(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})

    @model_validator(mode="after")
    def _exists(self) -> Constraint:
        check(self.kind, self.keywords)
        return self


class Instructions(Config):
    """1 if the completion follows all of the task's verifiable instructions, or the share of them that it follows.

    Logged under reward/<name>/, whatever the value is: `strict` and `loose`, the share followed by each measure;
    `all_strict` and `all_loose`, 1 if all are; and for each kind, by its name after the colon (such as `no_comma`), the
    share of those of that kind by the measure chosen.
    """

    type: Literal["instructions"] = "instructions"
    constraints: list[Constraint] | None = Field(
        default=None,
        min_length=1,
        description="Instructions for every task, as {kind: 'length_constraints:number_words', relation: at least, "
        "num_words: 50}, in place of the columns.",
    )
    ids: str = Field(default="instruction_id_list", description="Column with the list of kinds.")
    kwargs: str = Field(default="kwargs", description="Column with the list of their keywords, one mapping for each.")
    mode: Literal["strict", "loose"] = Field(
        default="strict",
        description="`loose`: following without the first line, the last, or asterisks will do, as the paper has it.",
    )
    value: Literal["all", "fraction"] = Field(default="all", description="All of them or nothing, or the share.")

    def judge(self, name: str) -> Reward:
        own = [(one.kind, check(one.kind, one.keywords)) for one in self.constraints or ()]

        def verdict(trajectory: Trajectory) -> Verdict:
            asked = own or _asked(trajectory.task, self.ids, self.kwargs)
            text = trajectory.completion
            strict = [strictly(follows, text) for _, follows in asked]
            loose = [done or loosely(follows, text) for (_, follows), done in zip(asked, strict, strict=True)]
            chosen = strict if self.mode == "strict" else loose
            kinds: dict[str, list[bool]] = defaultdict(list)
            for (kind, _), done in zip(asked, chosen, strict=True):
                kinds[kind.partition(":")[2]].append(done)
            logged = {kind: fmean(done) for kind, done in kinds.items()}
            logged |= {"strict": fmean(strict), "loose": fmean(loose)}
            logged |= {"all_strict": float(all(strict)), "all_loose": float(all(loose))}
            return float(all(chosen)) if self.value == "all" else fmean(chosen), logged

        return pooled(verdict, name)

    def check(self, task: Task) -> None:
        if not self.constraints:
            _asked(task, self.ids, self.kwargs)


def _asked(task: Task, ids: str, kwargs: str) -> Named:
    """What the task's columns ask for. Raises InputError where they do not say it."""
    kinds, keywords = (_list(task, column) for column in (ids, kwargs))
    if len(kinds) != len(keywords):
        raise InputError(
            f"task '{task.id}': column '{ids}' lists {len(kinds)} instructions and column '{kwargs}' the keywords of "
            f"{len(keywords)}. Repair that row: one mapping for each, an empty one where there are none."
        )
    try:
        return [(str(kind), check(str(kind), _mapping(some))) for kind, some in zip(kinds, keywords, strict=True)]
    except ValueError as error:
        raise InputError(
            f"task '{task.id}': {error}. Repair the columns '{ids}' and '{kwargs}' of that row."
        ) from error


def _list(task: Task, column: str) -> Sequence[Any]:
    value = task.info.get(column)
    if isinstance(value, list | tuple) and value:
        return value
    reason = f"holds a {type(value).__name__}" if column in task.info else "is missing"
    if isinstance(value, list | tuple):
        reason = "is an empty list"
    raise InputError(
        f"task '{task.id}': column '{column}' {reason}; the reward `instructions` needs a list there. Set its `ids` "
        "and `kwargs` to the columns with the kinds and their keywords, or give it `constraints` of its own."
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"the keywords of an instruction are {value!r}, not a mapping")
    return value
