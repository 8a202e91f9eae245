"""Every reward there is, as one union told apart by `type`. The union is the registry: a run's `reward:` block is
validated against it, and each member is its own knobs. User code enters through the member `custom`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from rlft.rewards.base import Config, scored
from rlft.rewards.choice import Choice, Matching
from rlft.rewards.code import Code, Program, Syntax
from rlft.rewards.combine import total
from rlft.rewards.combined import First, Gated, Normalised, Routed, Scheduled, Sequence
from rlft.rewards.custom import Custom
from rlft.rewards.directed import along
from rlft.rewards.inside import TermName
from rlft.rewards.instructions import Instructions
from rlft.rewards.judges.judge import LlmJudge
from rlft.rewards.language import Language
from rlft.rewards.layout import Repetition, Tags
from rlft.rewards.lengths import Cosine, Overlong, RelativeLength
from rlft.rewards.match import Exact, Number
from rlft.rewards.math import Math
from rlft.rewards.model import Model
from rlft.rewards.outcome import Outcome
from rlft.rewards.progress import by_block, less_what_was_paid
from rlft.rewards.reasoning_gym import ReasoningGym
from rlft.rewards.schema import JsonSchema
from rlft.rewards.script import Script
from rlft.rewards.served.classifier import ServedModel
from rlft.rewards.served.remote import Remote
from rlft.rewards.shape import Format, Length
from rlft.rewards.text import Bleu, Chrf, Fuzzy, Rouge
from rlft.rewards.text_length import TextLength
from rlft.rewards.thinking import Thinking
from rlft.rewards.turns import turn_by_turn
from rlft.types import Reward


class Weighted(Config):
    """The sum of weight times value over named terms. It has no value where any term has none."""

    type: Literal["weighted"] = "weighted"
    terms: dict[TermName, RewardConfig] = Field(
        min_length=1,
        description="Any rewards by a name of your choice, each with its `weight`. Each is logged as reward/<name>, "
        "the terms of a term as reward/<name>/<its name>.",
    )

    def build(self, name: str | None = None) -> Reward:
        prefix = f"{name}/" if name else ""
        terms = [term.build(prefix + key) for key, term in self.terms.items()]
        # At the top the sum is the score itself and no component; as a term of another sum it has a name.
        return scored(total(terms), name or self.type, self.weight, record=name is not None)

    def components(self, name: str | None = None) -> list[str]:
        terms = [
            inner for key, term in self.terms.items() for inner in term.components(f"{name}/{key}" if name else key)
        ]
        return [name, *terms] if name else terms

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        return [(f"{name}/{key}" if name else key, term) for key, term in self.terms.items()]

    @property
    def by_turn(self) -> bool:
        return any(term.by_turn for term in self.terms.values())

    @property
    def pays(self) -> bool:
        return any(term.pays for term in self.terms.values())

    @property
    def directed(self) -> bool:
        return any(term.directed for term in self.terms.values())

    @model_validator(mode="after")
    def _pays_in_full(self) -> Weighted:
        if self.pays and self.weight != 1:
            raise ValueError("a term pays on the way, past this sum; put the weight on that term, and leave this at 1")
        return self


class PerTurn(Config):
    """Judges every turn by another reward, and pays each verdict where its turn ends."""

    type: Literal["per_turn"] = "per_turn"
    of: RewardConfig = Field(description="Any reward; it judges the trajectory as it stood after each turn.")
    pay: Literal["sum", "improvement", "last"] = Field(
        default="sum",
        description="What a turn is paid: its verdict; its verdict less that of the turn before; or nothing before the "
        "last turn. The total is the sum of the verdicts, or for the other two the last one.",
    )

    def build(self, name: str | None = None) -> Reward:
        return turn_by_turn(self.of.build(name), name or self.type, self.components(name), self.pay, self.weight)

    def judged(self, size: int, turns: int, sampling: bool) -> list[tuple[Config, int, int]]:
        return [(one, shown, groups * turns) for one, shown, groups in self.of.judged(size, turns, sampling)]

    def components(self, name: str | None = None) -> list[str]:
        last = self.of.components(name)
        return [*last, *(f"{component}/first" for component in last)]

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        return [(name, self.of)]

    @property
    def by_turn(self) -> bool:
        return True

    @property
    def directed(self) -> bool:
        return self.of.directed

    @model_validator(mode="after")
    def _once(self) -> PerTurn:
        if self.of.pays:
            raise ValueError("of: what is paid on the way already cannot be judged so again; name the inner reward")
        return self


class Progress(Config):
    """Another reward's verdict, and what every block of the answer gains in the chance of it, paid where it ends."""

    type: Literal["progress"] = "progress"
    of: RewardConfig = Field(description="Any reward; its mean over samples from a place is the chance of success.")
    blocks: int = Field(default=4, ge=2, description="Blocks of an answer at most, of nearly the same length.")
    samples: int = Field(default=2, ge=1, description="Answers sampled from the end of each block but the last.")
    tokens: int = Field(default=16, ge=1, description="Tokens of each at most.")
    force: str = Field(default=" The answer is", description="Said there first, so that the policy answers at once.")
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="What a gain is multiplied by.")

    def build(self, name: str | None = None) -> Reward:
        name = name or self.type
        knobs = (self.blocks, self.samples, self.tokens, self.force, self.scale)
        judged = scored(by_block(self.of.build(f"{name}/of"), name, self.weight, *knobs), name, self.weight)
        return less_what_was_paid(judged, name)

    def components(self, name: str | None = None) -> list[str]:
        name = name or self.type
        return [name, *self.of.components(f"{name}/of")]

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        return [(f"{name or self.type}/of", self.of)]

    @property
    def pays(self) -> bool:
        return True

    @property
    def directed(self) -> bool:
        return self.of.directed

    @property
    def explored(self) -> int:
        return self.blocks * self.samples * self.tokens

    def judged(self, size: int, turns: int, sampling: bool) -> list[tuple[Config, int, int]]:
        went_on = self.of.judged(self.samples, turns, sampling) if sampling else []
        beside = [(one, shown, groups * size * self.blocks) for one, shown, groups in went_on]
        return self.of.judged(size, turns, sampling) + beside

    @model_validator(mode="after")
    def _of_answers(self) -> Progress:
        if self.of.pays:
            raise ValueError("of: what is paid on the way already cannot be judged so again; name the inner reward")
        return self


class Directed(Config):
    """The components of another reward, each times its part in the direction that the task asks for."""

    type: Literal["directed"] = "directed"
    of: RewardConfig = Field(description="A reward with several components; their own weights do not matter here.")
    scales: dict[str, float] = Field(
        default_factory=dict,
        description="By component, what its value is multiplied by before the direction, so that all are on one scale.",
    )

    def build(self, name: str | None = None) -> Reward:
        judge = along(self.of.build(name), self.scales)
        return scored(judge, name or self.type, self.weight, record=name is not None)

    def components(self, name: str | None = None) -> list[str]:
        return self.of.components(name)

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        return [(name, self.of)]

    @property
    def directed(self) -> bool:
        return True

    @model_validator(mode="after")
    def _of_answers(self) -> Directed:
        if self.of.pays:
            raise ValueError("of: what is paid on the way goes past the direction; name a reward of whole answers")
        return self


RewardConfig = Annotated[
    Exact
    | Number
    | Math
    | Choice
    | Matching
    | Code
    | Program
    | Syntax
    | Format
    | Length
    | Overlong
    | Cosine
    | RelativeLength
    | Thinking
    | Tags
    | Repetition
    | Script
    | Instructions
    | JsonSchema
    | Language
    | TextLength
    | Bleu
    | Chrf
    | Rouge
    | Fuzzy
    | Model
    | ServedModel
    | LlmJudge
    | Remote
    | Outcome
    | ReasoningGym
    | Weighted
    | Gated
    | Sequence
    | First
    | Routed
    | Scheduled
    | Normalised
    | Directed
    | PerTurn
    | Progress
    | Custom,
    Field(discriminator="type"),
]
for holding in (
    *(Weighted, Gated, Sequence, First, Routed, Scheduled, Normalised),
    *(Directed, PerTurn, Progress, Cosine, RelativeLength),
):
    holding.model_rebuild()


def types() -> dict[str, type[Config]]:
    """Every config class by its `type`, in the order of the catalog. The docstring's first line says what it does."""
    members = get_args(get_args(RewardConfig)[0])
    return {member.model_fields["type"].default: member for member in members}


def names() -> list[str]:
    """The values that `type` may take."""
    return list(types())
