"""The data that flows through the loop: tasks, samples, trajectories, groups. Standard library only.

One way only: prompts -> rollout -> rewards -> advantages -> loss -> optimizer step -> weight sync. A task is played
into trajectories; the trajectories of one task form a group; a reward judges a group at once, so that it may compare.
A preference pair is a group of two with scores 1 and 0, a demonstration a group of one.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Message = Mapping[str, Any]  # {"role": "user" | "assistant" | "system" | "tool", "content": str, ...}
NAN = math.nan
WORLD = "(env)"  # stands for the environment where failures name a reward; no component is called so
ROUNDING = 1e-6  # totals this close are equal: they are sums of 0.1s, and float32 in a batch


class InputError(Exception):
    """What the user gave is wrong: a config key, a file, a row. The message names it, the reason and the fix."""


class RunError(Exception):
    """The run cannot go on: a proof failed, rewards fail, a disk is full. The message says what to do next."""


class EngineLost(RunError):
    """The process that an engine lives in died, or stopped answering.

    recover: starts another, and brings the weights into it that the lost one served; it raises RunError where that is
    not to be had any more. None where nobody would.
    """

    recover: Callable[[], Awaitable[None]] | None = None


def least(level: float) -> float:
    """The lowest total that reaches `level`, but for rounding, which is relative to levels beyond 1."""
    return level - ROUNDING * max(1.0, abs(level))


def finite(value: object) -> bool:
    """Whether it is a number, and not True or False, that a float can hold."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:
        return False


@dataclass(frozen=True)
class Task:
    """One thing to do: the prompt as chat messages, and what its grader needs.

    `id` names the row it came from; `info` holds every other column of that row (`answer`, ...).
    """

    id: str
    messages: tuple[Message, ...]
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Sample:
    """One token sequence that the learner can train on. All lists have the length of `tokens`.

    mask: True where the policy chose the token. logprobs: of the policy that sampled it, at the sampling
    temperature; NaN where nobody sampled. rewards: the environment's, at the last token of the turn that earned it.
    version: of the weights that sampled it; -1 in recorded data. agent: whose policy that was, where there are several.
    role: that of the environment's which speaks in it, or which spoke first where several do.
    """

    tokens: list[int]
    mask: list[bool]
    logprobs: list[float]
    rewards: list[float]
    version: int
    agent: int = 0
    role: int = 0

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.mask), len(self.logprobs), len(self.rewards)}
        if len(lengths) != 1:
            raise ValueError(f"tokens, mask, logprobs and rewards of a sample differ in length: {sorted(lengths)}")


@dataclass(frozen=True)
class Said:
    """One turn of the policy.

    messages: the conversation up to this answer, which is the last of them. sample: in which of the trajectory's
    samples the answer stands; end: the index of its last token there. finish: how the engine ended it.
    """

    messages: tuple[Message, ...]
    sample: int
    end: int
    finish: str = "stop"

    @property
    def text(self) -> str:
        """The answer."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Failure:
    """Why a reward has no score for a trajectory that it should have judged. reward: the component's name.

    kind: `raised`, `timeout`, `count` (not one verdict for each), `nan`, or `value` (no finite number). trace: the end
    of the traceback.
    """

    reward: str
    kind: str
    said: str
    trace: str = ""


@dataclass
class Trajectory:
    """What one play of a task left behind.

    messages: the whole conversation, the prompt's first. samples: usually one; several where the environment
    rewrote the history. score: the reward's verdict, None while there is none. metrics: numbers to log; a reward's
    components stand here as `reward/<component>`. finish: the engine's own reason ("stop", "length"), never guessed.
    drawn: 0 for the group's own samples, else the number of the algorithm's Draw. targets, user: what the algorithm's
    `select` sets, see `Batch`.
    said: the policy's turns, as the player saw them. paid: per reward that pays on the way, what it has put into the
    samples' rewards: the sample, the token, how much.
    sampled: how many tokens the engine returned for it; 0 in what was written down.
    failures: of the rewards that judged it last, and of its environment. cut: the limit that ended it, `answer` (the
    tokens of one), `context`, `turns`, `tokens` or `seconds`, or `failed` where its environment did; else empty.
    """

    task: Task
    messages: tuple[Message, ...]
    samples: list[Sample]
    score: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    finish: str = "stop"
    drawn: int = 0
    targets: tuple[float, ...] = ()
    user: int = 0
    said: tuple[Said, ...] = ()
    paid: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    sampled: int = 0
    failures: list[Failure] = field(default_factory=list)
    cut: str = ""

    @property
    def failed(self) -> bool:
        """Its environment failed, so that no reward can judge it."""
        return any(failure.reward == WORLD for failure in self.failures)

    @property
    def turns(self) -> tuple[Said, ...]:
        """What the policy said turn by turn; what was recorded is one turn, which ends with the last chosen token."""
        if self.said or not self.samples:
            return self.said
        mask = self.samples[-1].mask
        end = max((i for i, chosen in enumerate(mask) if chosen), default=len(mask) - 1)
        return (Said(self.messages, len(self.samples) - 1, end),)

    @property
    def completion(self) -> str:
        """The text of the last assistant message; empty if there is none."""
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                return str(message["content"])
        return ""

    @property
    def length(self) -> int:
        """How many tokens the policy chose."""
        return sum(sum(sample.mask) for sample in self.samples)

    @property
    def total(self) -> float | None:
        """The score plus what the environment paid on the way; None while there is no score."""
        if self.score is None:
            return None
        return self.score + sum(sum(sample.rewards) for sample in self.samples)


Group = tuple[Trajectory, ...]


@dataclass(frozen=True)
class Draw:
    """Further members of a group, beside the policy's own samples of the task as it stands.

    `Trajectory.drawn` tells them by their number in `Algorithm.draws`. count: how many. temperature: None is the run's,
    0 greedy. reference: the policy that training started from draws them. recorded: the task's column with an answer
    that somebody wrote down; nothing is sampled.
    below: only for tasks whose own scores stay below it, by their `measure`; None: for every task.
    hint: the last message of the prompt as the policy is shown it, with {prompt} and the task's columns filled in; what
    is kept has the task's own prompt. go_on: text that is put after one of the group's own answers, which the policy
    goes on from; at: a regular expression for the place in that answer, its end where nothing matches; learned: the
    text counts as chosen by the policy, so that it is imitated too.
    branch: they go as the group's own episodes do up to a place, then on by themselves: to the beginning of the "turn"
    that the policy expected least, or to the "token". The environment is played anew, and must reply as it did.
    Log-probs of what the learner's policy did not draw, as the learner would, from what is kept, are NaN.
    """

    count: int = 1
    temperature: float | None = None
    reference: bool = False
    recorded: str = ""
    below: float | None = None
    measure: Literal["best", "mean"] = "best"
    hint: str = ""
    go_on: str = ""
    at: str = ""
    learned: bool = False
    branch: Literal["", "turn", "token"] = ""


@runtime_checkable
class Reward(Protocol):
    """Judges the trajectories of one task. None means "no score", which is not zero: the trajectory is not trained on.

    A crash is never counted as a zero: it is no score, and stands in `trajectory.failures`. Components are written to
    `trajectory.metrics["reward/<name>"]`.
    """

    async def __call__(self, group: Group) -> Sequence[float | None]: ...


class Explorer(Protocol):
    """Lets the policy that is being trained go on from inside an answer; see `rlft.explore`."""

    def ends(self, trajectory: Trajectory, blocks: int) -> tuple[int, list[int]]:
        """Where the last answer begins in its sample, and where each of at most `blocks` blocks ends."""
        ...

    async def go_on(self, trajectory: Trajectory, end: int, text: str, count: int, most: int) -> list[Trajectory]:
        """`count` answers that begin as the last one up to token `end`, then say `text`, then what the policy says."""
        ...


# What a reward may ask while it judges samples for training; None elsewhere, where nothing is sampled for it.
exploring: ContextVar[Explorer | None] = ContextVar("exploring", default=None)
# The step that what a reward judges is for; None where there is no run.
stepping: ContextVar[int | None] = ContextVar("stepping", default=None)


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """What is judged inside is for this step of a run."""
    before = stepping.set(step)
    try:
        yield
    finally:
        stepping.reset(before)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy. seed fixes this one request.

    reference: by the policy before training, which only an engine with a hot-loaded adapter still has. agent: by whose
    policy, where there are several.
    """

    temperature: float = 1.0
    max_tokens: int = 128
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    reference: bool = False
    agent: int = 0


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one prompt; tokens include the end-of-turn token when the policy chose one.

    logprobs: of each token under the distribution it was drawn from. finish: "stop" or "length".
    version: of the weights that drew all of it; 0 for the policy before training (`Sampling.reference`).
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str
    version: int


@dataclass(frozen=True)
class Turn:
    """The environment's reply: new messages to show the policy, the reward of its last move, whether it is over.

    rewrite: `messages` are not appended but replace the whole history, and a new sample begins; also after an answer
    that was cut off at the limit, which otherwise ends the episode. role: whose turn it is now; role 0 opens. Where
    another agent plays the new role, the history must be rewritten, since a sample is of one policy; so too where roles
    are rivals (`EnvKnobs.rivals`). pays: beside `reward`, what each role has earned, which goes to that role's last
    answer; one that never spoke earns nothing. said: how the last answer stands in the conversation from now on, with
    its tool calls read out, say; its tokens stay as they are. metrics: numbers of the episode so far by name, logged as
    env/<name>; a later one replaces an earlier one. Where roles are rivals, "1/won" is role 1's `won`, and no other's.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = True
    rewrite: bool = False
    role: int = 0
    said: Message | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    pays: Mapping[int, float] = field(default_factory=dict)
