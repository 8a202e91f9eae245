"""A parity mismatch taken apart: the failing tokens, and what a hypothesis needs and gives. See causes.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft.batch import Batch
from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.learner import Learner
from rlft.parity import Bounds, Mismatch
from rlft.types import Group, Sampling

TOKENS = 256  # that are scored anew: enough to tell causes apart, and their logits fit where a micro-batch's do
FAR = 20.0  # nats: the gap of a token that could not have been drawn


@dataclass(frozen=True)
class Trial:
    """One hypothesis and the gaps that remain under it, nats, one per token.

    rounding: what may remain where the hypothesis is right, but the engine's kernels round otherwise in its dtype.
    known: the engine says so itself, and only the size of the gaps has to fit.
    """

    what: str
    gap: Float[Tensor, " n"]
    rounding: Bounds | None = None
    known: bool = False


@dataclass(frozen=True)
class Cause:
    """What may be wrong. tries: the hypotheses, none where it cannot be tried here. fix: what to do about it."""

    name: str
    tries: Callable[[Case], Awaitable[list[Trial]]]
    fix: str


@dataclass(frozen=True)
class Case:
    """The failing tokens and all that the hypotheses need. groups: what the batch was made of.

    sampling: what the engine was told. chats: other ways to render a prompt, by name. previous: the trained values of
    the version before.
    """

    learner: Learner
    batch: Batch
    bounds: Bounds
    groups: Sequence[Group] = ()
    engine: Engine | None = None
    sampling: Sampling = field(default_factory=Sampling)
    chat: Chat | None = None
    chats: Callable[[], dict[str, Chat]] = dict

    @classmethod
    def of(cls, found: Mismatch, learner: Learner, **more: object) -> Case:
        """The rows of the newest version that differ most, as many as can be scored at once."""
        batch = found.batch
        known = batch.mask & ~batch.logprobs.isnan() & (batch.version == batch.version.max())[:, None]
        batch = batch.with_(mask=known).rows(known.any(1).nonzero().flatten())
        size = (batch.logprobs - learner.logprobs(batch)).abs().nan_to_num(FAR, FAR).where(batch.mask, 0.0)
        order = (size.sum(1) / batch.mask.sum(1)).argsort(descending=True)
        fits = batch.lengths[order].cumsum(0) <= learner.schedule.micro_tokens
        fits[0] = True
        batch = batch.rows(order[fits].sort().values)
        count = batch.mask.flatten().cumsum(0).view(batch.mask.shape)
        batch = batch.with_(mask=batch.mask & (count <= TOKENS))
        batch = batch.rows(batch.mask.any(1).nonzero().flatten())
        return cls(learner, batch, found.bounds, **more)  # type: ignore[arg-type]

    @cached_property
    def said(self) -> Float[Tensor, " n"]:
        """What the engine reported."""
        return self.batch.logprobs[self.batch.mask]

    @cached_property
    def gap(self) -> Float[Tensor, " n"]:
        """As it stands."""
        return self.said - self.score()

    @cached_property
    def tokens(self) -> Int[Tensor, " n"]:
        """The chosen tokens."""
        return self.batch.tokens[self.batch.mask]

    @cached_property
    def logits(self) -> Float[Tensor, "n v"]:
        """The learner's, at the sampling temperature."""
        model = self.learner.policy.model.eval()
        with torch.no_grad():
            made = self.learner.forward(self.batch.to(self.learner.policy.device), model=model, logits=True).logits
        assert made is not None
        return made.float().cpu()

    @cached_property
    def logprobs(self) -> Float[Tensor, "n v"]:
        """The learner's whole distributions."""
        return self.logits.log_softmax(-1)

    def score(self, batch: Batch | None = None) -> Float[Tensor, " n"]:
        """The learner's log-probs of chosen tokens, with the weights that are in place now."""
        batch = batch or self.batch
        return self.learner.logprobs(batch)[batch.mask]

    def taken(self, logprobs: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        """Each chosen token's entry."""
        return logprobs.gather(1, self.tokens[: len(logprobs), None]).squeeze(1)
