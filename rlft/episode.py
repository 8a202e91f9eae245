"""What one episode leaves behind, turn by turn: the tokens as they were sampled, and what was said between them."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from rlft.types import NAN, WORLD, Completion, Failure, Message, Said, Sample, Task, Trajectory, Turn

TRACE = 2000  # characters of a traceback that are kept, from its end


class WorldFailed(Exception):
    """An environment raised, hung, or replied what is no reply; its episode ends here, and no other."""


@dataclass
class Episode:
    """An episode on its way. sampled: tokens that the engine returned. shown: the tools that each sample shows. role:
    whose turn it is; spoken: whose each turn was.
    """

    task: Task
    messages: tuple[Message, ...] = ()
    samples: list[Sample] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    sampled: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)
    shown: list[Sequence[object]] = field(default_factory=list)
    role: int = 0
    spoken: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun

    def open(self, messages: tuple[Message, ...], tokens: list[int], agent: int, tools: Sequence[object] = ()) -> None:
        """A new sample that begins with these messages, whose tokens the policy goes on from."""
        self.messages = messages
        self.samples.append(opened(tokens, agent, self.role))
        self.shown.append(tools)

    def left(self, messages: tuple[Message, ...], tools: Sequence[object], agent: int) -> int | None:
        """The newest sample that ends with an answer which these messages go on from; None where there is none."""
        ends = {turn.sample: turn for turn in self.said}
        for i, turn in sorted(ends.items(), reverse=True):
            n, sample = len(turn.messages), self.samples[i]
            whole = turn.end == len(sample.tokens) - 1 and sample.agent == agent and self.shown[i] == tools
            if whole and n < len(messages) and messages[:n] == turn.messages:
                return i
        return None

    def talk(self, index: int) -> tuple[Message, ...]:
        """The conversation up to the last answer of a sample."""
        return next(turn.messages for turn in reversed(self.said) if turn.sample == index)

    def back(self, index: int) -> None:
        """Go on in a sample that was left. It becomes the last one, as the sample of the last answer always is."""
        order = [i for i in range(len(self.samples)) if i != index] + [index]
        self.messages = self.talk(index)
        self.samples = [self.samples[i] for i in order]
        self.shown = [self.shown[i] for i in order]
        self.said = [replace(turn, sample=order.index(turn.sample)) for turn in self.said]

    def answer(self, completion: Completion, text: str) -> None:
        """What the policy said."""
        sample = self.samples[-1]
        self.sampled += len(completion.tokens)
        append(sample, completion.tokens, completion.logprobs)
        sample.version = completion.version
        self.messages = (*self.messages, {"role": "assistant", "content": text})
        self.said.append(Said(self.messages, len(self.samples) - 1, len(sample.tokens) - 1, completion.finish))
        self.spoken.append(self.role)

    def pay(self, reply: Turn) -> None:
        """What the last answer earned, and the last of each role, and what the environment reports."""
        self.samples[-1].rewards[-1] += reply.reward
        last = dict(zip(self.spoken, self.said, strict=True))
        for role, amount in reply.pays.items():
            if role in last:
                self.samples[last[role].sample].rewards[last[role].end] += amount
        self.metrics |= {f"env/{name}": float(value) for name, value in reply.metrics.items()}

    def restate(self, message: Message) -> None:
        """The policy's last answer as the environment has read it: with its tool calls, say. The tokens stay."""
        self.messages = (*self.messages[:-1], message)
        self.said[-1] = replace(self.said[-1], messages=self.messages)

    def hear(self, messages: tuple[Message, ...], tokens: list[int]) -> None:
        """What somebody else said; tokens: those that it adds to the sample."""
        self.messages = (*self.messages, *messages)
        append(self.samples[-1], tokens, None)

    def end(self, finish: str, cut: str = "") -> Trajectory:
        """The whole of it. finish: of the last answer, as the engine gave it. cut: the limit that ended it, if any did.

        Whoever was cut did not finish: such an episode counts as truncated.
        """
        finish = "length" if cut else finish
        return Trajectory(
            self.task,
            self.messages,
            self.samples,
            metrics=self.metrics,
            finish=finish,
            said=tuple(self.said),
            sampled=self.sampled,
            cut=cut,
        )

    def fail(self, error: BaseException) -> Trajectory:
        """What there is of an episode whose world failed, which has no score."""
        kind = "timeout" if isinstance(error, TimeoutError) else "raised"
        trace = "".join(traceback.format_exception(error))[-TRACE:]
        trajectory = self.end("length", "failed")
        trajectory.failures.append(Failure(WORLD, kind, f"{type(error).__name__}: {error}", trace))
        return trajectory


def opened(prompt: list[int], agent: int = 0, role: int = 0) -> Sample:
    """A sample of which only the prompt is there."""
    n = len(prompt)
    return Sample(list(prompt), [False] * n, [NAN] * n, [0.0] * n, -1, agent, role)


def append(sample: Sample, tokens: list[int], logprobs: list[float] | None) -> None:
    """Add tokens: sampled ones with their log-probs, or ones that somebody else said."""
    sample.tokens += tokens
    sample.mask += [logprobs is not None] * len(tokens)
    sample.logprobs += logprobs if logprobs is not None else [NAN] * len(tokens)
    sample.rewards += [0.0] * len(tokens)
