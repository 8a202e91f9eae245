"""The learner: knows the model, no algorithm. It fills the batch fields an algorithm needs and takes optimizer steps.

A batch is credited, cut into `epochs` x `minibatches` optimizer steps, weighed, and only then cut into micro-batches
by a budget of tokens, so that the gradients do not depend on how it was cut. Rows that cannot move the weights (no
advantage, and no term that acts without one) are dropped before the forward pass; they stay in the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rlft.algorithms.base import Algorithm, Metrics, Need, Outputs, Owned, mean_score, merge
from rlft.batch import Batch, place
from rlft.forward import Forward
from rlft.kernels import FastLinear
from rlft.own import SecondAdapter, own_parameters
from rlft.packing import cut
from rlft.parity import Gate, Mismatch, bounds_of, gaps
from rlft.policy import Policy
from rlft.ranks import add_gradients, filled, gather, share, world
from rlft.reference import Reference
from rlft.schedule import Schedule
from rlft.spans import span
from rlft.stepper import Skipped, Stepper
from rlft.types import NAN

NOTHING = Owned()


class Learner:
    """Takes optimizer steps on a policy.

    temperature: what the rollouts were sampled at; logits are divided by it. dropout: leave it on where the model or
    the adapter has any; off for samples of the policy, whose log-probs would be those of another one.
    owned: what the algorithm has beside the policy. teacher: a frozen model to learn from. reference: one that follows
    the policy; without it, the policy before training. gate: of parity with the engine; it is open to begin with.
    """

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        temperature: float = 1.0,
        seed: int = 0,
        dropout: bool = True,
        owned: Owned = NOTHING,
        teacher: Any = None,
        reference: Reference | None = None,
    ) -> None:
        self.policy = policy
        self.schedule = schedule
        self._dropout = dropout
        recomputed = getattr(policy.causal_lm, "is_gradient_checkpointing", False)
        self._products = nullcontext if recomputed else FastLinear  # a layer is recomputed outside of the mode
        self.owned = owned
        self.remembered = dict(owned.remembered)
        self.own = own_parameters(owned, policy)
        self.teacher = teacher
        self.reference = reference
        self.gate = Gate(bounds_of(policy.dtype))
        head = self.own["head"] if owned.head else None
        headed = Forward(policy, temperature, head, owned.detached, schedule.packing)
        self.second = SecondAdapter(policy, self.own["adapter"], headed) if owned.adapter else None
        self.forward = Forward(policy, temperature, packing=schedule.packing) if owned.adapter else headed
        self._computed = headed.computed
        own = [(f"own.{name}", p) for name, p in self.own.named_parameters()]
        self.stepper = Stepper(policy, own, schedule, owned.adapter, owned.alone, reference)
        self.optimizer, self.scheduler = self.stepper.optimizer, self.stepper.scheduler
        self.version = 0  # updates so far: the version of the weights, whatever optimizer steps an update takes
        self.skipped: list[Skipped] = []  # the last update's optimizer steps that were not taken
        self.generator = torch.Generator().manual_seed(seed)
        self.credited: Batch | None = None  # the last update's batch with its advantages, for the record

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """What the optimizer moves, by name, in its order: the policy's, and under `own.` the algorithm's."""
        return dict(self.stepper.named)

    @property
    def names(self) -> list[str]:
        """The trained parameters' names in the optimizer's order."""
        return [name for name, _ in self.stepper.named]

    def weights(self) -> Policy:
        """What a sync reads the new weights from."""
        return self.policy

    def fill(self, batch: Batch, needs: tuple[Need, ...]) -> Batch:
        """The batch with the fields in `needs`, by forward passes without gradients.

        When the batch is one optimizer step, the rollout's log-probs stand for the old ones of the rows that have them.
        """
        fresh = "fresh_logprobs" in needs or self.schedule.epochs * self.schedule.minibatches > 1
        if "fresh_logprobs" in needs or "old_logprobs" in needs:
            batch = batch.with_(old_logprobs=self._old(batch, fresh))
        if "ref_logprobs" in needs:
            batch = batch.with_(ref_logprobs=self.logprobs(batch, reference=True))
        if "teacher_logprobs" in needs:
            batch = batch.with_(teacher_logprobs=self.logprobs(batch, model=self.teacher))
        if "values" in needs:
            values, bootstrap = self.values(batch)
            batch = batch.with_(values=values, bootstrap=bootstrap)
        return batch

    def update(self, batch: Batch, algorithm: Algorithm) -> dict[str, float]:
        """One pass over the batch: credit, weigh, and every optimizer step. Returns what to log."""
        self.credited, self.skipped = None, []
        algorithm = algorithm.at(self.remembered)
        if not len(batch) or not batch.mask.any():
            rate = self.stepper.rate
            self.stepper.pass_over(self.schedule.epochs * self.schedule.minibatches)
            self.version += 1
            return {"tokens/trained": 0.0, "learner/lr": rate, **self._refreshed()}
        batch = self.credited = algorithm.credit(self.fill(batch, algorithm.needs))
        losses, norms, parts, trained, rate, count = [], [], [], 0, 0.0, 0
        fresh = newest = self._newest(batch, algorithm)
        shuffling = self.generator.get_state()
        for step in map(partial(self._prepared, algorithm=algorithm), self._cut(batch, algorithm.unit)):
            loss, metrics, tokens = self._accumulate(step, algorithm, newest)
            if math.isfinite(loss):
                self._hold(metrics, step, newest, shuffling)
            rate, count, newest = self.stepper.rate, count + 1, None
            with span("optimizer"):
                taken = self.stepper.take(loss)
            if taken.skipped:
                rows = self._unsound(step, algorithm)
                self.skipped.append(Skipped(step, loss, taken.norm, taken.unsound, rows))
                continue
            norms.append(taken.norm)
            losses.append(loss)
            parts += metrics
            seen = {name: stat.value for name, stat in merge(metrics).items()} | {"score/mean": mean_score(step)}
            self.remembered = dict(algorithm.remember(self.remembered, seen))
            trained += tokens
        self.stepper.pass_over(self.schedule.epochs * self.schedule.minibatches - count)
        self.version += 1
        parts = parts or ([] if self.skipped else [self._glance(batch, algorithm, fresh)])
        return {
            "loss/total": sum(losses) / len(losses) if losses else NAN,
            "loss/grad_norm": sum(norms) / len(norms) if norms else NAN,
            "tokens/trained": float(trained),
            "learner/lr": rate,
            "advantage/zero_groups": _zero_groups(batch),
            **self._refreshed(),
            **({"learner/skipped": float(len(self.skipped))} if self.skipped else {}),
            **{name: stat.value for name, stat in merge(parts).items()},
        }

    def _hold(self, parts: list[Metrics], step: Batch, newest: int | None, shuffling: Tensor) -> None:
        """The parity gate before the first optimizer step; where it raises, the same update can be begun again."""
        if newest is None or newest > int(step.version.max()):
            return
        try:
            self.gate(merge(parts), step)
        except Mismatch:
            self.stepper.forget()
            self.generator.set_state(shuffling)
            raise
        self.gate.passed(self.policy)

    def gradients(self, batch: Batch, algorithm: Algorithm) -> dict[str, Tensor]:
        """The gradient of the whole batch as one optimizer step, which is not taken."""
        algorithm = algorithm.at(self.remembered)
        batch = algorithm.credit(self.fill(batch, algorithm.needs))
        self._accumulate(self._prepared(batch, algorithm), algorithm, None)
        found = {name: p.grad.clone() for name, p in self.stepper.named if p.grad is not None}
        self.stepper.forget()
        return found

    @torch.no_grad()
    def logprobs(self, batch: Batch, reference: bool = False, model: Any = None) -> Float[Tensor, "b t"]:
        """Log-probs of the chosen tokens under the policy, its reference or another model; NaN elsewhere."""
        first = self.reference.model if self.reference is not None else self.policy.reference
        with first() if reference else nullcontext(model or self.policy.model) as used:
            return self._seen(batch, used, lambda out: out.logprobs)

    @torch.no_grad()
    def entropies(self, batch: Batch) -> Float[Tensor, "b t"]:
        """The entropy in nats of the policy's distribution of each chosen token; NaN elsewhere."""
        return self._seen(batch, self.policy.model, lambda out: out.entropy)

    @torch.no_grad()
    def values(self, batch: Batch) -> tuple[Float[Tensor, "b t"], Float[Tensor, " b"]]:
        """The head's value before each chosen token, and after the last token of truncated rows (else 0)."""
        values, after = torch.full_like(batch.logprobs, torch.nan), torch.zeros_like(batch.scores)

        def keep(rows: Tensor, mask: Tensor, out: Outputs) -> None:
            assert out.values is not None
            assert out.scores is not None
            place(values, rows, batch.mask[rows], out.values[mask])
            part = batch.rows(rows).valid
            last = part.shape[1] - 1 - part.flip(1).int().argmax(1)
            after[rows] = out.scores[torch.arange(len(rows)), last, 0].to(after)

        with FastLinear():
            self._each(batch, self.policy.model, self.second or partial(self.forward, vocabulary=False), keep)
        after = self._everyones(after, batch)
        return self._everyones(values, batch), torch.where(batch.truncated, after, 0.0)

    def _old(self, batch: Batch, fresh: bool) -> Float[Tensor, "b t"]:
        """Before the batch's first step: the rollout's where it has them and not `fresh`, else by a forward pass."""
        unknown = batch.mask & ~torch.isfinite(batch.logprobs)
        rows = (unknown | fresh).any(1).nonzero().flatten()
        if not len(rows):
            return batch.logprobs
        part, old = batch.rows(rows), torch.where(batch.mask, batch.logprobs, torch.nan)
        place(old, rows, batch.mask[rows], self.logprobs(part)[part.mask])
        return old

    def _seen(self, batch: Batch, model: Any, what: Callable[[Outputs], Tensor]) -> Float[Tensor, "b t"]:
        """One number per chosen token; NaN elsewhere."""
        found = torch.full_like(batch.logprobs, torch.nan)

        def keep(rows: Tensor, mask: Tensor, out: Outputs) -> None:
            place(found, rows, batch.mask[rows], what(out)[mask])

        with FastLinear():
            self._each(batch, model, partial(self.forward, model=model), keep)
        return self._everyones(found, batch)

    def _each(
        self,
        batch: Batch,
        model: Any,
        forward: Callable[[Batch], Outputs],
        keep: Callable[[Tensor, Tensor, Outputs], None],
    ) -> None:
        """A forward pass over every micro-batch of this rank."""
        if model.training:
            model.eval()
        for rows in share(self._micro(batch, unit=1)):
            part = batch.rows(rows)
            keep(rows, part.mask, forward(part.to(self.policy.device)))

    def _everyones(self, values: Tensor, batch: Batch) -> Tensor:
        """The rows that other ranks computed too."""
        if world() == 1:
            return values
        mine = list(share(self._micro(batch, unit=1)))
        return filled(values, torch.cat(mine) if mine else torch.zeros(0, dtype=torch.long))

    def _prepared(self, step: Batch, algorithm: Algorithm) -> Batch:
        """One optimizer step, weighed, with its statistics."""
        if "now_logprobs" in algorithm.needs:
            step = step.with_(now_logprobs=self.logprobs(step))
        if "now_entropy" in algorithm.needs:
            step = step.with_(now_entropy=self.entropies(step))
        return algorithm.prepare(algorithm.weigh(step))

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
        """Row numbers of micro-batches of at most `micro_tokens` computed tokens."""
        whole, groups = batch.lengths.tolist(), batch.group.tolist()
        return map(torch.tensor, cut(whole, groups, unit, self._computed(batch), self.schedule.micro_tokens))

    @torch.no_grad()
    def _glance(self, batch: Batch, algorithm: Algorithm, newest: int | None) -> Metrics:
        """The metrics of one micro-batch of a batch in which nothing moves the weights, so that the log has no gap."""
        step = self._prepared(batch, algorithm)
        rows = next(self._micro(step, algorithm.micro or algorithm.unit))
        part = step.rows(rows).to(self.policy.device)
        if not part.mask.any():
            return {}
        with self._products():
            outputs = self._outputs(part, algorithm)
            metrics = algorithm.loss(outputs, part)[1]
        return {**metrics, **gaps(outputs, part, newest, self.gate.bounds)}

    def _accumulate(self, batch: Batch, algorithm: Algorithm, newest: int | None) -> tuple[float, list[Metrics], int]:
        """Add up the gradient of one optimizer step over its micro-batches.

        newest: the version of rows that parity is measured on; None: it is not measured.
        """
        unit = algorithm.micro or algorithm.unit
        kept = batch if algorithm.dense else batch.rows(_moves(batch, unit))
        self.policy.model.train()
        if not self._dropout:
            _still(self.policy.model)
        total, parts, trained = 0.0, [], 0
        for rows in share(self._micro(kept, unit)):
            part = kept.rows(rows).to(self.policy.device)
            if not part.mask.any():
                continue
            loss, metrics, outputs = self._backward(part, algorithm)
            total += loss
            parts.append({**metrics, **gaps(outputs, part, newest, self.gate.bounds)})
            trained += int(part.mask.sum())
        if self.stepper.alone:
            for _, p in self.policy.trainable():
                p.grad = None
        add_gradients(self.stepper.parameters)
        everyone = gather((total, parts, trained))
        return sum(one[0] for one in everyone), [m for one in everyone for m in one[1]], sum(one[2] for one in everyone)

    def _backward(self, part: Batch, algorithm: Algorithm) -> tuple[float, Metrics, Outputs]:
        """Add the gradient of a micro-batch; its loss, metrics and forward pass."""
        with self._products():
            with span("forward"):
                outputs = self._outputs(part, algorithm)
                loss, metrics = algorithm.loss(outputs, part)
            with span("backward"):
                if loss.requires_grad:
                    loss.backward()
                if self.second is not None:
                    self.second.backward()
        return float(loss.detach()), metrics, outputs

    def _unsound(self, step: Batch, algorithm: Algorithm) -> tuple[int, ...]:
        """The rows of a prepared optimizer step whose loss or gradient is not finite even alone, a unit kept whole."""
        unit, found = algorithm.micro or algorithm.unit, []
        with torch.random.fork_rng():
            for rows in torch.arange(len(step)).split(unit):
                part = step.rows(rows).to(self.policy.device)
                loss = self._backward(part, algorithm)[0] if part.mask.any() else 0.0
                if not math.isfinite(loss) or self.stepper.unsound():
                    found += rows.tolist()
                self.stepper.forget()
        return tuple(found)

    def _outputs(self, part: Batch, algorithm: Algorithm) -> Outputs:
        """The forward pass of a micro-batch with everything that the loss asks for."""
        wants = {"logits": algorithm.distributions, "vocabulary": algorithm.vocabulary, "residual": algorithm.residual}
        outputs = self.forward(part, **wants)
        if algorithm.distributions and self.teacher is not None:
            with torch.no_grad():
                other = self.forward(part, model=self.teacher, logits=True).logits
            outputs = replace(outputs, teacher_logits=other)
        if self.second is not None:
            said = self.second(part)
            outputs = replace(outputs, scores=said.scores, values=said.values)
        numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.remembered.items()}
        learned = {name: p for name, p in self.own.named_parameters() if name in self.owned.learned}
        return replace(outputs, scalars={**numbers, **learned})

    def _newest(self, batch: Batch, algorithm: Algorithm) -> int | None:
        """The version of rows that parity is measured on, the learner's own unless rows are said to be newer; None
        where no log-probs are made.
        """
        return max(int(batch.version.max()), self.version) if algorithm.vocabulary else None

    def _refreshed(self) -> dict[str, float]:
        return {} if self.reference is None else self.reference.metrics()


def _still(model: torch.nn.Module) -> None:
    """No dropout anywhere, whoever put it there; only layers that recompute themselves have to know of training."""
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)


def _moves(batch: Batch, unit: int) -> Tensor:
    """The rows whose weighted advantage is not zero everywhere, a unit kept whole."""
    share = torch.where(batch.mask, batch.advantages * batch.weights, 0.0)
    moving = (share != 0).any(1).view(-1, unit).any(1)
    return moving.repeat_interleave(unit).nonzero().flatten()


def _zero_groups(batch: Batch) -> float:
    """The share of groups whose advantages are all zero: nothing can be learned from them."""
    moved = torch.where(batch.mask, batch.advantages, 0.0).ne(0).any(1)
    groups = batch.group.unique()
    return float(sum(not bool(moved[batch.group == g].any()) for g in groups)) / len(groups)
