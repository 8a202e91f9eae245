"""The learner: knows the model, no algorithm. It fills the batch fields an algorithm needs and takes optimizer steps.

A batch is credited, cut into `epochs` x `minibatches` optimizer steps, weighed, and only then cut into micro-batches
by a budget of tokens, so that the gradients do not depend on how it was cut. Rows that cannot move the weights (no
advantage, and no term that acts without one) are dropped before the forward pass; they stay in the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer

from rlft.algorithms.base import Algorithm, Metrics, Need, Outputs, mean, merge, peak
from rlft.batch import Batch
from rlft.kernels import FastLinear, score
from rlft.policy import Policy
from rlft.prefix import Split, owners, prompt_lengths, split
from rlft.types import RunError


@dataclass(frozen=True)
class Schedule:
    """How the learner steps. micro_tokens: padded tokens per forward pass. steps: of the run, for the scheduler."""

    lr: float
    steps: int
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    scheduler: str = "constant"
    warmup_steps: int = 0
    epochs: int = 1
    minibatches: int = 1
    micro_tokens: int = 2048
    max_grad_norm: float = 1.0


class Learner:
    """Takes optimizer steps on a policy.

    temperature: what the rollouts were sampled at; logits are divided by it. dropout: leave it on where the model or
    the adapter has any; off for samples of the policy, whose log-probs would be those of another one.
    """

    def __init__(
        self, policy: Policy, schedule: Schedule, temperature: float = 1.0, seed: int = 0, dropout: bool = True
    ) -> None:
        self.policy = policy
        self.schedule = schedule
        self._temperature = temperature
        self._dropout = dropout
        recomputed = getattr(policy.causal_lm, "is_gradient_checkpointing", False)
        self._products = nullcontext if recomputed else FastLinear  # a layer is recomputed outside of the mode
        self._shares = _can_share(policy)
        self._named = list(policy.trainable())
        self._parameters = [p for _, p in self._named]
        self.optimizer = _optimizer(self._parameters, schedule)
        total = schedule.steps * schedule.epochs * schedule.minibatches
        warm = schedule.scheduler == "constant" and schedule.warmup_steps > 0
        name = "constant_with_warmup" if warm else schedule.scheduler
        self.scheduler = get_scheduler(name, self.optimizer, schedule.warmup_steps, max(total, 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.credited: Batch | None = None  # the last update's batch with its advantages, for the record

    @property
    def names(self) -> list[str]:
        """The trained parameters' names in the optimizer's order."""
        return [name for name, _ in self._named]

    def weights(self) -> Policy:
        """What a sync reads the new weights from."""
        return self.policy

    def fill(self, batch: Batch, needs: tuple[Need, ...]) -> Batch:
        """The batch with the fields in `needs`, by forward passes without gradients.

        When the batch is one optimizer step and somebody sampled it, the rollout's log-probs stand for the old ones.
        """
        single = self.schedule.epochs * self.schedule.minibatches == 1
        if "old_logprobs" in needs:
            sampled = bool(torch.isfinite(batch.logprobs[batch.mask]).all())
            old = batch.logprobs if single and sampled else self.logprobs(batch)
            batch = batch.with_(old_logprobs=old)
        if "ref_logprobs" in needs:
            batch = batch.with_(ref_logprobs=self.logprobs(batch, reference=True))
        return batch

    def update(self, batch: Batch, algorithm: Algorithm) -> dict[str, float]:
        """One pass over the batch: credit, weigh, and every optimizer step. Returns what to log."""
        self.credited = None
        if not len(batch) or not batch.mask.any():
            rate = float(self.scheduler.get_last_lr()[0])
            self._step_schedule(self.schedule.epochs * self.schedule.minibatches)
            return {"tokens/trained": 0.0, "learner/lr": rate}
        batch = self.credited = algorithm.credit(self.fill(batch, algorithm.needs))
        losses, norms, parts, trained, rate = [], [], [], 0, 0.0
        first = True
        for step in self._cut(batch, algorithm.unit):
            loss, metrics, tokens = self._accumulate(algorithm.weigh(step), algorithm, parity=first)
            rate = float(self.scheduler.get_last_lr()[0])
            norms.append(self._optimize(loss))
            losses.append(loss)
            parts += metrics
            trained += tokens
            first = False
        self._step_schedule(self.schedule.epochs * self.schedule.minibatches - len(norms))
        return {
            "loss/total": sum(losses) / len(losses),
            "loss/grad_norm": sum(norms) / len(norms),
            "tokens/trained": float(trained),
            "learner/lr": rate,
            "advantage/zero_groups": _zero_groups(batch),
            **{name: stat.value for name, stat in merge(parts).items()},
        }

    def gradients(self, batch: Batch, algorithm: Algorithm) -> dict[str, Tensor]:
        """The gradient of the whole batch as one optimizer step, which is not taken."""
        batch = algorithm.weigh(algorithm.credit(self.fill(batch, algorithm.needs)))
        self._accumulate(batch, algorithm, parity=False)
        found = {name: p.grad.clone() for name, p in self._named if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def logprobs(self, batch: Batch, reference: bool = False) -> Float[Tensor, "b t"]:
        """Log-probs of the chosen tokens under the policy or its reference; NaN elsewhere."""
        filled = torch.full_like(batch.logprobs, torch.nan)
        with FastLinear(), self.policy.reference() if reference else nullcontext(self.policy.model) as model:
            model.eval()
            for rows in self._micro(batch, unit=1):
                part = batch.rows(rows)
                out = self.forward(part.to(self.policy.device), model=model)
                place = batch.mask[rows].nonzero(as_tuple=True)
                filled[rows[place[0]], place[1]] = out.logprobs.to(filled)[part.mask]
        return filled

    def forward(self, batch: Batch, model: Any = None) -> Outputs:
        """Log-probs at the sampling temperature, in at least float32, aligned with tokens. The one shift is here.

        Logits are made only for columns in which some row has a chosen token next; a prompt that rows share is
        computed once.
        """
        model = model or self.policy.model
        parts = split(batch) if self._shares else None
        if parts is None:
            columns = batch.mask[:, 1:].any(0).nonzero().flatten()
            logits = model(
                input_ids=batch.tokens,
                attention_mask=batch.valid.long(),
                position_ids=(batch.valid.long().cumsum(1) - 1).clamp(min=0),
                logits_to_keep=columns,
                use_cache=False,
            ).logits
            chosen = batch.mask[:, columns + 1]
            logprobs, entropy = score(logits[chosen], batch.tokens[:, columns + 1][chosen], self._temperature)
        else:
            logprobs, entropy = self._shared(parts, model)
        empty = torch.zeros(batch.tokens.shape, dtype=logprobs.dtype, device=logprobs.device)
        return Outputs(empty.masked_scatter(batch.mask, logprobs), empty.masked_scatter(batch.mask, entropy))

    def _shared(self, parts: Split, model: Any) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the chosen tokens, row by row: prompts first, then the rest over their cache."""
        seen = parts.seen.long()
        first = model(
            input_ids=parts.prompts,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=self.policy.causal_lm.config),
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

    def _cut(self, batch: Batch, unit: int) -> Iterator[Batch]:
        """The optimizer steps of a batch: whole in order when there is one a pass, else shuffled anew every epoch."""
        count = self.schedule.minibatches
        for _ in range(self.schedule.epochs):
            if count == 1:
                yield batch
                continue
            units = torch.randperm(len(batch) // unit, generator=self.generator)
            for part in units.tensor_split(count):
                if len(part):
                    yield batch.rows((part[:, None] * unit + torch.arange(unit)).flatten().sort().values)

    def _micro(self, batch: Batch, unit: int) -> Iterator[Tensor]:
        """Row numbers of micro-batches of at most `micro_tokens` padded tokens; a group and like lengths together.

        A prompt that is shared is counted once.
        """
        whole, prompts = batch.lengths.tolist(), prompt_lengths(batch).tolist()
        groups, owner = batch.group.tolist(), owners(batch)
        longest: dict[int, int] = {}
        for group, length in zip(groups, whole, strict=True):
            longest[group] = max(longest.get(group, 0), length)
        starts = range(0, len(batch), unit)
        part: list[int] = []
        for start in sorted(starts, key=lambda i: (-longest[groups[i]], groups[i], -max(whole[i : i + unit]))):
            longer = part + list(range(start, start + unit))
            if part and self._cost(longer, whole, prompts, owner) > self.schedule.micro_tokens:
                yield torch.tensor(part)
                longer = longer[len(part) :]
            part = longer
        if part:
            yield torch.tensor(part)

    def _cost(self, rows: list[int], whole: list[int], prompts: list[int], owners: list[int]) -> int:
        """Padded tokens of a forward pass over these rows, at most."""
        if not self._shares:
            return len(rows) * max(whole[i] for i in rows)
        rest = max(whole[i] - prompts[i] for i in rows)
        return len(rows) * rest + len({owners[i] for i in rows}) * max(prompts[i] for i in rows)

    def _accumulate(self, batch: Batch, algorithm: Algorithm, parity: bool) -> tuple[float, list[Metrics], int]:
        """Add up the gradient of one optimizer step over its micro-batches."""
        kept = batch if algorithm.dense else batch.rows(_moves(batch, algorithm.unit))
        self.policy.model.train()
        if not self._dropout:
            _still(self.policy.model)
        total, parts, trained = 0.0, [], 0
        for rows in self._micro(kept, algorithm.unit):
            part = kept.rows(rows).to(self.policy.device)
            if not part.mask.any():
                continue
            with self._products():
                outputs = self.forward(part)
                loss, metrics = algorithm.loss(outputs, part)
                loss.backward()
            total += float(loss.detach())
            parts.append({**metrics, **(_parity(outputs, part) if parity else {})})
            trained += int(part.mask.sum())
        return total, parts, trained

    def _optimize(self, loss: float) -> float:
        """Clip, step, and refuse to go on from a gradient that is not finite. Returns the norm before clipping."""
        grads = [p for p in self._parameters if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(grads, self.schedule.max_grad_norm or math.inf)) if grads else 0.0
        if not (math.isfinite(norm) and math.isfinite(loss)):
            self.optimizer.zero_grad(set_to_none=True)
            raise RunError(
                f"the loss is {loss} and the gradient's norm {norm}: nothing was updated. "
                "Lower learner.lr, or resume from the last checkpoint with another setting."
            )
        if grads:
            self.optimizer.step()
            self.policy.stepped(self.scheduler.last_epoch + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self._step_schedule(1)
        return norm

    def _step_schedule(self, times: int) -> None:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns when a step without data had no optimizer.step
            for _ in range(times):
                self.scheduler.step()


def _optimizer(parameters: list[torch.nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, foreach=True
        )
    if schedule.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay)


def _still(model: torch.nn.Module) -> None:
    """No dropout anywhere, whoever put it there; only layers that recompute themselves have to know of training."""
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)


def _can_share(policy: Policy) -> bool:
    """A prompt's keys and values can be kept and expanded: full attention only, nothing recomputed in the backward."""
    config = policy.causal_lm.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    recomputed = getattr(policy.causal_lm, "is_gradient_checkpointing", False)
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return kinds == {"full_attention"} and not windowed and not recomputed and not policy.prompts_learned


def _moves(batch: Batch, unit: int) -> Tensor:
    """The rows whose weighted advantage is not zero everywhere, a unit kept whole."""
    share = torch.where(batch.mask, batch.advantages * batch.weights, 0.0)
    moving = (share != 0).any(1).view(-1, unit).any(1)
    return moving.repeat_interleave(unit).nonzero().flatten()


def _parity(outputs: Outputs, batch: Batch) -> Metrics:
    """How far the learner's log-probs are from the rollout's, before the first step on them."""
    known = batch.mask & torch.isfinite(batch.logprobs)
    if not known.any():
        return {}
    gap = (outputs.logprobs.detach() - batch.logprobs).abs()
    return {"parity/logprob_max": peak(gap, known), "parity/logprob_mean": mean(gap, known)}


def _zero_groups(batch: Batch) -> float:
    """The share of groups whose advantages are all zero: nothing can be learned from them."""
    moved = torch.where(batch.mask, batch.advantages, 0.0).ne(0).any(1)
    groups = batch.group.unique()
    return float(sum(not bool(moved[batch.group == g].any()) for g in groups)) / len(groups)
