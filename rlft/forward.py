"""The forward pass: log-probs, entropies and what a head says, aligned with the tokens of a batch.

The one shift of a causal model is here: the logits at token i - 1 are those of token i. How the rows are laid out for
it, see packing; the vocabulary's head sees only what stands before a chosen token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlft.algorithms.base import Outputs
from rlft.batch import Batch
from rlft.head import plain_head, spoken, untrained, with_hidden
from rlft.kernels import score
from rlft.packing import Layout, Rows, Ways, packed, padded, trunk_of, ways_of
from rlft.policy import Policy
from rlft.prefix import Split, split
from rlft.types import InputError

REACH = 2.0  # attention over so many times the hidden size costs as much as the rest (measured on a CPU: 1.8 to 2.4)


class Forward:
    """One pass over a batch. head: a linear layer on the last hidden state, if the algorithm has one.

    detached: the head's gradient ends there. Only the policy's own model has the head, not a reference or a teacher.
    packing: auto (rows are packed where the model keeps them apart), on (or refused) or off (rows are padded, a
    shared prompt is kept as keys and values). Raises InputError.
    """

    def __init__(
        self, policy: Policy, temperature: float, head: Any = None, detached: bool = False, packing: str = "off"
    ) -> None:
        self._policy = policy
        self._temperature = temperature
        self._head = head
        self._detached = detached
        self._packing = packing
        self._reach = REACH * policy.causal_lm.config.get_text_config().hidden_size
        self._exact: WeakKeyDictionary[nn.Module, Ways] = WeakKeyDictionary()
        self._heads: WeakKeyDictionary[nn.Module, nn.Linear | None] = WeakKeyDictionary()
        self.shares = can_share(policy) and head is None
        if packing == "on" and not self.packs():
            raise InputError(
                "learner.packing: rows that are packed come out of this model otherwise than alone: its layers do not "
                "keep them apart, or the adapter adds tokens. Set learner.packing=auto, which pads where it must."
            )

    def packs(self, model: Any = None) -> bool:
        """Rows of this model (the policy's by default) are packed; measured at the first call."""
        return self._measured(model or self._policy.model).packs

    def _measured(self, model: nn.Module) -> Ways:
        """How this model's rows may be laid out."""
        trunk = None if self._packing == "off" or self._policy.prompts_learned else trunk_of(model)
        if trunk is None:
            return Ways()
        if trunk not in self._exact:
            self._exact[trunk] = ways_of(trunk)
        return self._exact[trunk]

    def _plain(self, model: nn.Module) -> nn.Linear | None:
        """The head for the vocabulary, where log-probs may be made from it without a matrix of logits; measured."""
        trunk = None if self._policy.prompts_learned else trunk_of(model)
        if trunk is None:
            return None
        if trunk not in self._heads:
            self._heads[trunk] = plain_head(model, trunk)
        head = self._heads[trunk]
        return head if head is not None and untrained(head) else None

    def computed(self, batch: Batch) -> Callable[[Sequence[int]], int]:
        """A function that says how many tokens the policy computes, padding included, for some rows of the batch."""
        rows = Rows.of(batch)
        ways = self._measured(self._policy.model)
        if ways.packs:
            return lambda some: ways.plan(rows, some, self._reach).tokens
        if not self.shares:
            return lambda some: len(some) * max(rows.whole[i] for i in some)

        def cached(some: Sequence[int]) -> int:
            rest = max(rows.whole[i] - rows.prompts[i] for i in some)
            return len(some) * rest + len({rows.owner[i] for i in some}) * max(rows.prompts[i] for i in some)

        return cached

    def __call__(
        self, batch: Batch, model: Any = None, logits: bool = False, vocabulary: bool = True, residual: float = 0.0
    ) -> Outputs:
        """Log-probs at the sampling temperature, in at least float32.

        A prompt that rows share is computed once. logits: keep those of the chosen tokens. vocabulary: False where
        only the head is asked for; log-probs and entropies of the chosen tokens are NaN then. residual: see
        `Algorithm.residual`.
        """
        model = model or self._policy.model
        ways = self._measured(model)
        parts = split(batch) if self.shares and not ways.packs and not logits and not residual else None
        if parts is not None:
            logprobs, entropy = self._shared(parts, model)
            return Outputs(_onto(batch.mask, logprobs), _onto(batch.mask, entropy))
        if ways.packs and len(batch):
            rows = Rows.of(batch)
            layout = packed(batch.tokens, batch.valid, rows, ways.plan(rows, range(len(batch)), self._reach))
        else:
            layout = padded(batch.tokens, batch.valid)
        if residual and batch.mask.any():
            layout = _expected(model, layout, batch.mask, residual)
        return self._outputs(batch, layout, model, logits, vocabulary)

    def _outputs(self, batch: Batch, layout: Layout, model: Any, logits: bool, vocabulary: bool) -> Outputs:
        headed = self._head is not None and model is self._policy.model
        row, column = batch.mask.nonzero(as_tuple=True)
        picks, targets = layout.cell[row, column - 1], batch.tokens[batch.mask]
        head = self._plain(model) if vocabulary and not logits and len(picks) else None
        hidden, picked, said = heard(model, layout, picks, targets, self._temperature, head, vocabulary or not headed)
        outputs = Outputs(_onto(batch.mask, said[0]), _onto(batch.mask, said[1]))
        if logits and picked is not None:
            made = picked.to(torch.promote_types(picked.dtype, torch.float32))
            outputs = replace(outputs, logits=made / self._temperature)
        if headed and hidden is not None:
            scores = self._scores(hidden, layout, batch)
            outputs = replace(outputs, scores=scores, values=values_of(scores, batch.mask))
        return outputs

    def _scores(self, hidden: Tensor, layout: Layout, batch: Batch) -> Tensor:
        """What the head says at every token; what the trunk has at padding, NaN included, reaches no gradient."""
        used = layout.used[:, None]
        seen = torch.where(used, hidden.detach() if self._detached else hidden, 0.0)
        said = self._head(seen.to(self._head.weight.dtype))
        return torch.where(batch.valid[:, :, None], said[layout.cell], 0.0)

    def _shared(self, parts: Split, model: Any) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the chosen tokens, row by row: prompts first, then the rest over their cache."""
        seen = parts.seen.long()
        first = model(
            input_ids=parts.prompts,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=self._policy.causal_lm.config),
            logits_to_keep=1,
            use_cache=True,
        )
        scored = [score(first.logits[:, -1][parts.owner], parts.rest[:, 0], self._temperature)]
        places = [torch.arange(len(parts.rest), device=seen.device) * parts.rest.shape[1]]
        columns = parts.mask[:, 1:].any(0).nonzero().flatten()
        if len(columns):
            cache = first.past_key_values
            cache.batch_select_indices(parts.owner)
            steps = torch.arange(parts.rest.shape[1] - 1, device=seen.device)
            later = model(
                input_ids=parts.rest[:, :-1],
                attention_mask=torch.cat([seen[parts.owner], parts.valid[:, :-1].long()], 1),
                position_ids=parts.starts[:, None] + steps,
                past_key_values=cache,
                logits_to_keep=columns,
                use_cache=True,
            ).logits
            chosen = parts.mask[:, columns + 1]
            row, column = chosen.nonzero(as_tuple=True)
            scored.append(score(later[chosen], parts.rest[:, columns + 1][chosen], self._temperature))
            places.append(row * parts.rest.shape[1] + columns[column] + 1)
        order = torch.cat(places).argsort()
        logprobs, entropies = zip(*scored, strict=True)
        return torch.cat(logprobs)[order], torch.cat(entropies)[order]


@torch.no_grad()
def _expected(model: Any, layout: Layout, mask: Tensor, share: float) -> Layout:
    """The layout with `share` of the model's own greedy guess in the embedding of every chosen token."""
    row, column = mask.nonzero(as_tuple=True)
    _, guesses = passed(model, layout, layout.cell[row, column - 1], vocabulary=True)
    assert guesses is not None
    embed = model.get_input_embeddings()
    embedded = embed(layout.tokens)
    flat, chosen = embedded.flatten(0, 1), layout.cell[row, column]
    flat[chosen] = torch.lerp(flat[chosen], embed(guesses.argmax(-1)).to(flat.dtype), share)
    return replace(layout, embedded=flat.view_as(embedded).detach())


def values_of(scores: Tensor, mask: Tensor) -> Tensor:
    """The head's first output before each chosen token, [b, t]; 0 elsewhere."""
    return torch.where(mask, nn.functional.pad(scores[:, :-1, 0], (1, 0)), 0.0)


def can_share(policy: Policy) -> bool:
    """A prompt's keys and values can be kept and expanded: full attention only, nothing recomputed in the backward."""
    config = policy.causal_lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    recomputed = getattr(policy.causal_lm, "is_gradient_checkpointing", False)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    plain = kinds == {"full_attention"} and not windowed and not getattr(policy.causal_lm, "_is_stateful", False)
    return plain and not recomputed and not policy.prompts_learned


def _onto(mask: Tensor, values: Tensor) -> Tensor:
    """One value per chosen token at its place, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def heard(
    model: Any, layout: Layout, picks: Tensor, targets: Tensor, temperature: float, head: Any, vocabulary: bool
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor]]:
    """The last hidden states and the logits at `picks`, where they are made; the targets' log-probs and entropies.

    head: a plain one, with which no logits are made. vocabulary: False where nobody asks for these; they are NaN then.
    """
    if head is not None:
        trunk: Any = trunk_of(model)
        hidden = trunk(**layout.given)[0].flatten(0, 1)
        return hidden, None, spoken(hidden.index_select(0, picks), head, targets, temperature)
    hidden, picked = passed(model, layout, picks, vocabulary)
    if picked is None:
        unknown = torch.full((len(picks),), torch.nan, device=picks.device)
        return hidden, None, (unknown, unknown)
    return hidden, picked, score(picked, targets, temperature)


def passed(model: Any, layout: Layout, picks: Tensor, vocabulary: bool) -> tuple[Tensor | None, Tensor | None]:
    """The last hidden state of every cell, and the logits at the picked ones; None for what is not there."""
    trunk = trunk_of(model)
    if trunk is None:
        return None, _by_columns(model, layout, picks)
    if not vocabulary:
        return trunk(**layout.given)[0].flatten(0, 1), None
    kept: list[Tensor] = []
    with _picking(trunk, picks, kept):
        made = model(**layout.given).logits
    return kept[0], made.flatten(0, 1)


def _by_columns(model: Any, layout: Layout, picks: Tensor) -> Tensor:
    """Logits of a model that takes columns only: made wherever some row has a pick, then picked."""
    width = layout.tokens.shape[1]
    columns, place = (picks % width).unique(return_inverse=True)
    return model(**layout.given, logits_to_keep=columns).logits[picks // width, place]


@contextmanager
def _picking(trunk: nn.Module, picks: Tensor, kept: list[Tensor]) -> Iterator[None]:
    """Let only some cells of the last hidden state, as one row, go on to the head; keep them all in `kept`."""

    def pick(_: Any, __: Any, out: Any) -> Any:
        kept.append(out[0].flatten(0, 1))
        return with_hidden(out, kept[0].index_select(0, picks)[None])

    hook = trunk.register_forward_hook(pick)
    try:
        yield
    finally:
        hook.remove()
