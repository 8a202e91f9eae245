"""Weight sync that proves itself: after every one the run knows what the engine serves.

merged: every weight that training can change is sent whole, with the rest of the engine's fused module it belongs to
(q and v without k would make vLLM rebuild the layer from nothing). adapter: the adapter is hot-loaded under a fresh
id, name and path, since vLLM caches by all three.

Two proofs. Accounting: every trained tensor has a receiver, a digest of each, read back from the copy that the engine
serves, equals what was sent, and the prefix cache holds nothing of older weights. Behaviour: a few tokens sampled at
the run's own settings have the log-probs that the learner gives them. A stale or missing tensor shows in the first, a
wrong temperature or base in the second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rlft.batch import Batch
from rlft.engine.base import Delta, Engine, Full, Mark
from rlft.lock import Scratch
from rlft.policy import Policy
from rlft.spans import span
from rlft.types import NAN, InputError, RunError, Sample, Sampling, Task, Trajectory

# The largest gap between the log-probs of engine and learner, per dtype. Measured: 1e-4 in float32 on a CPU
# (docs/lab-notes.md); half precision rounds logits of about 20 at 2^-8 relative.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.06}
# Through prefill and decoding. More would cost time and tell nothing: every weight is in every token's log-prob.
PROOF_PROMPTS, PROOF_WIDTH, PROOF_TOKENS = 1, 8, 2


class Scorer(Protocol):
    """What the behaviour proof asks of the learner."""

    def logprobs(self, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Report:
    """What a sync did. seconds, prove_seconds: wall clock. gap: the largest difference of log-probs in the proof."""

    version: int
    seconds: float
    prove_seconds: float
    gap: float


class Sync:
    """Brings a policy's weights into an engine. prompts: token ids that the behaviour proof samples from."""

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        scorer: Scorer,
        kind: Literal["merged", "adapter"],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        deterministic: bool = True,
    ) -> None:
        self._engine = engine
        self._scorer = scorer
        self._kind = kind
        self._deterministic = deterministic
        self._prompts = [list(p[:PROOF_WIDTH]) for p in prompts[:PROOF_PROMPTS]]
        self._sampling = replace(sampling, max_tokens=PROOF_TOKENS, stop=())
        self._units: dict[str, str] | None = None
        self._rest: dict[str, list[str]] = {}
        self._scratch: Scratch | None = None
        if kind == "adapter":
            refuse_hot_loading(policy)

    async def __call__(self, policy: Policy, version: int) -> Report:
        """Send, then prove. Raises RunError with the likeliest causes when a proof fails."""
        begun = time.perf_counter()
        with span("send"):
            marks = await self.send(policy, version)
        sent = time.perf_counter()
        with span("account"):
            wrong = await self.account(marks, version)
        with span("behave"):
            gap, strange = await self.behave(policy, version)
        if self._deterministic:
            await self._engine.forget()
        if wrong or strange:
            raise RunError(_diagnosis(version, wrong, strange))
        return Report(version, sent - begun, time.perf_counter() - sent, gap)

    async def send(self, policy: Policy, version: int) -> dict[str, Mark]:
        """Load the weights of `version` into the engine; returns a mark of every tensor that was sent."""
        marks: dict[str, Mark] = {}
        if self._kind == "adapter":
            await self._send_adapter(policy, version, marks)
        else:
            if self._units is None:
                self._units = await self._receivers(policy)
            stream = self._complete(policy, self._units)
            await self._engine.load_weights(Full(_marking(stream, marks, version)), version)
        return marks

    async def account(self, marks: dict[str, Mark], version: int) -> list[str]:
        """What the engine's own copy says against what was sent: a line per tensor that differs."""
        found = await self._engine.read_back(list(marks), version)
        wrong = [f"{name}: the engine has no such weight" for name in marks if name not in found]
        for name, digest in found.items():
            reason = marks[name].differs(digest)
            if reason:
                wrong.append(f"{name}: {reason}")
        stale = await self._engine.kept()
        if stale:
            wrong.append(f"the prefix cache holds {stale} blocks of keys and values made with older weights")
        return wrong

    async def behave(self, policy: Policy, version: int) -> tuple[float, list[str]]:
        """Sample a few tokens and compare their log-probs with the learner's: the largest gap, and what is strange."""
        seeds = (version * 1000 + i for i in range(len(self._prompts)))
        samplings = [replace(self._sampling, seed=seed) for seed in seeds]
        answers = await asyncio.gather(*map(self._engine.generate, self._prompts, samplings))
        rows = []
        for i, (prompt, drawn) in enumerate(zip(self._prompts, answers, strict=True)):
            if drawn.version != version:
                return NAN, [f"the engine answered with version {drawn.version}, not {version}"]
            n = len(prompt)
            mask = [False] * n + [True] * len(drawn.tokens)
            logprobs = [NAN] * n + drawn.logprobs
            sample = Sample(prompt + drawn.tokens, mask, logprobs, [0.0] * len(mask), version)
            rows.append((Trajectory(Task(f"proof-{i}", ()), (), [sample], score=0.0),))
        batch = Batch.of(rows)
        gaps = (self._scorer.logprobs(batch) - batch.logprobs)[batch.mask].abs()
        gap = float(gaps.max()) if torch.isfinite(gaps).all() else float("inf")
        bound = TOLERANCE[policy.dtype]
        if gap <= bound:
            return gap, []
        return gap, [f"log-probs of sampled tokens differ by up to {gap:.2g}; at most {bound:g} is rounding"]

    async def _receivers(self, policy: Policy) -> dict[str, str]:
        """The engine's unit behind every checkpoint name; every trained parameter must be behind one."""
        units = await self._engine.units(list(policy.plain()))
        changed = policy.targets()
        reached = {inside for name, names in changed.items() if name in units for inside in names}
        lost = [name for name, _ in policy.trainable() if name not in reached]
        if lost:
            raise InputError(
                f"sync: {len(lost)} trained parameters have no receiver in the engine, e.g. {lost[0]}. "
                "Choose other target_modules, or the local engine."
            )
        touched = {units[name] for name in changed if name in units}
        for name, unit in units.items():
            if unit in touched and name not in changed:
                self._rest.setdefault(unit, []).append(name)
        return units

    def _complete(self, policy: Policy, units: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
        """The changed weights, each followed by those of its unit that did not change."""
        plain = policy.plain() if self._rest else {}
        rest = dict(self._rest)
        for name, tensor in policy.merged():
            unit = units.get(name)
            if unit is not None:
                yield name, tensor
                yield from ((other, plain[other]) for other in rest.pop(unit, ()))

    async def _send_adapter(self, policy: Policy, version: int, marks: dict[str, Mark]) -> None:
        old, self._scratch = self._scratch, Scratch("rlft-adapter")
        try:
            policy.save_adapter(self._scratch.path)
            await self._engine.load_weights(Delta(self._scratch.path), version)
        finally:
            if old is not None:
                old.close()
        for name, tensor in adapter_tensors(policy):
            marks[name] = Mark.of(tensor, version)

    def close(self) -> None:
        """Remove the last adapter's folder."""
        if self._scratch is not None:
            self._scratch.close()


def adapter_rank(policy: Policy) -> int:
    """The largest rank of a LoRA adapter."""
    config = policy.model.peft_config[policy.model.active_adapter]
    return max([config.r, *config.rank_pattern.values()])


def adapter_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The adapter as vLLM holds it: cast, padded with zeros to the largest rank, B times its scaling."""
    rank = adapter_rank(policy)
    active = policy.model.active_adapter
    for path, module in policy.model.named_modules():
        if not hasattr(module, "lora_A") or active not in module.lora_A:
            continue
        name = path.removeprefix("base_model.model.")
        a = module.lora_A[active].weight.detach().to(policy.dtype)
        b = module.lora_B[active].weight.detach().to(policy.dtype) * module.scaling[active]
        yield f"{name}.lora_A.weight", torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
        yield f"{name}.lora_B.weight", torch.nn.functional.pad(b, (0, rank - b.shape[1]))


def refuse_hot_loading(policy: Policy) -> None:
    """Raise InputError for what `cold` has a reason against."""
    if reason := cold(policy):
        raise InputError(f"sync.type: adapter is not possible: {reason}. Use sync: {{type: merged}}.")


def cold(policy: Policy) -> str | None:
    """Why vLLM cannot hot-load this adapter, would serve it over the wrong base, or unproved; None where it can."""
    if not policy.is_peft:
        return "there is no adapter"
    active = policy.model.active_adapter
    config: Any = policy.model.peft_config[active]
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    embedded = any(active in getattr(module, "lora_embedding_A", ()) for module in policy.model.modules())
    reasons = {
        f"vLLM hot-loads LoRA only, not {kind}": kind != "lora",
        "this adapter's init changed the base, and the engine holds the unchanged one": policy.base_changed,
        "vLLM does not load DoRA": getattr(config, "use_dora", False),
        "vLLM does not load adapters with biases or modules_to_save": getattr(config, "bias", "none") != "none"
        or getattr(config, "modules_to_save", None),
        "no proof covers an adapted embedding; leave embed_tokens out of adapter.target_modules": embedded,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _marking(stream: Iterator[tuple[str, Tensor]], marks: dict[str, Mark], seed: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        marks[name] = Mark.of(tensor, seed)
        yield name, tensor


def _diagnosis(version: int, wrong: list[str], strange: list[str]) -> str:
    lines = [f"the weights of version {version} did not arrive in the engine as they were sent; the run stops here."]
    if wrong:
        lines += [f"  {line}" for line in wrong[:5]] + ([f"  ... and {len(wrong) - 5} more"] if len(wrong) > 5 else [])
        lines.append("  Likely: the engine still serves an older version, lost a tensor, or got part of a fused layer.")
    if strange:
        lines += [f"  {line}" for line in strange]
        lines.append(
            "  Likely: the engine serves an older version."
            if wrong
            else "  Every weight is right, so likely: another temperature or truncation in the engine, another base "
            "model under the adapter, or another dtype."
        )
    return "\n".join(lines)
