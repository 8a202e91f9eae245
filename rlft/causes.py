"""Why the engine's log-probs are not the learner's: each known cause is tried, and the one that explains the gap named.

A cause is a hypothesis that can be computed: were it true, the learner would find the engine's log-probs by doing the
same. So the failing tokens are scored anew under each of them (another temperature, a truncated distribution, another
dtype, ...), and the gap that remains says how much is explained. Where the fault lies in the engine's memory the engine
is asked again. A new cause is one function and one entry in CAUSES.

That these are the usual faults is what others report: log-probs before temperature and a softmax in half precision
(ServiceNow, "vLLM V0 to V1: Correctness Before Corrections in RL", 2026), truncated sampling, stale weights and
prefixes. Engines that monitor the gap correct for it, or leave the search to the reader.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlft.batch import Batch
from rlft.case import FAR, Case, Cause, Trial
from rlft.engine.base import Engine
from rlft.learner import Learner
from rlft.parity import BOUNDS, Bounds, Figures, Mismatch
from rlft.policy import unwrapped
from rlft.swap import Swap
from rlft.types import NAN, Group, InputError, Message, RunError, Sample, Task, Trajectory

FITTED = 128  # of them a number is fitted to
AGAIN = 8  # prompts that the engine is asked again, so many tokens each
AGAIN_TOKENS = 16
FACTOR = 3.0  # a cause explains what it makes so many times smaller, if nothing makes it smaller still
SHARED = 0.85  # of the gap remains at most where both sides round alike in part; were they unlike, it would grow
LISTED = 6  # hypotheses in the message where none explains the gap


async def temperature(case: Case) -> list[Trial]:
    """The one at which the learner's log-probs are nearest to the engine's: a coarse search, then a fine one."""
    own = case.sampling.temperature or 1.0
    some = case.logprobs[:FITTED]

    def remains(tau: float, logprobs: Tensor) -> Tensor:
        return case.said[: len(logprobs)] - case.taken((logprobs * (own / tau)).log_softmax(-1))

    def size(tau: float) -> float:
        return float(remains(tau, some).abs().clamp(max=FAR).mean())

    grid = [own * 10 ** (i / 16) for i in range(-16, 17)]
    best = min([1.0, *grid], key=size)
    width = 10 ** (1 / 16)
    for _ in range(10):
        width = width**0.5
        best = min([best, *(best * width**i for i in (-2, -1, 1, 2))], key=size)
    what = f"the engine's log-probs are those of temperature {best:.3g}, the learner's of {own:.3g}"
    return [Trial(what, remains(best, case.logprobs))]


async def truncation(case: Case) -> list[Trial]:
    """top-k, top-p and min-p, each with the value that fits best: what is kept shares what the rest had."""
    ordered = case.logprobs.sort(descending=True).values
    mass = ordered.exp().cumsum(1)
    chosen = case.taken(case.logprobs)
    rank = (case.logprobs > chosen[:, None]).sum(1)

    def remains(count: Int[Tensor, " n"]) -> Tensor:
        """Where the likeliest `count` tokens of each distribution were kept."""
        kept = mass.gather(1, (count[:, None] - 1).clamp(min=0)).squeeze(1).log()
        return (case.said - (chosen - kept)).masked_fill(rank >= count, FAR)

    def size(count: Int[Tensor, " n"]) -> float:
        return float(remains(count).abs().clamp(max=FAR).mean())

    def by_k(k: float) -> Tensor:
        return torch.full_like(rank, int(k))

    def by_p(p: float) -> Tensor:
        return (mass - ordered.exp() < p).sum(1)

    def by_least(p: float) -> Tensor:
        return (ordered >= ordered[:, :1] + math.log(p)).sum(1)

    shares = [i / 20 for i in range(19, 0, -1)] + [0.96, 0.97, 0.98, 0.99, 0.995, 0.999]
    shares += [float(q) for q in (-case.gap).exp().clamp(0, 1).unique()[:16]]  # the largest share that all allow
    floors = [0.05, 0.1, 0.02, 0.01, 0.2, 0.3, 0.5] + [10 ** (-i / 16) for i in range(1, 64)]
    ways: list[tuple[str, Callable[[float], Tensor], Sequence[float]]] = [
        ("top_k", by_k, range(1, min(ordered.shape[1], 1024))),
        ("top_p", by_p, shares),
        ("min_p", by_least, floors),
    ]
    found = []
    for name, kept, values in ways:
        best = min(values, key=lambda value, kept=kept: size(kept(value)))
        what = f"the engine samples with {name} {best:.3g}, and the learner scores the whole distribution"
        found.append(Trial(what, remains(kept(best))))
    return found


async def dtype(case: Case) -> list[Trial]:
    """The merged weights, as they are sent, in another dtype."""
    policy = case.learner.policy
    found = []
    for other in (torch.float32, torch.bfloat16, torch.float16):
        if other != policy.dtype:
            name = str(other).removeprefix("torch.")
            with computed_in(case.learner, other):
                gap = case.said - case.score()
            what = f"the engine computes in {name}, the learner in {str(policy.dtype).removeprefix('torch.')}"
            rounding = max((BOUNDS[other], BOUNDS[policy.dtype]), key=lambda b: b.mean)
            found.append(Trial(what, gap, rounding, known=getattr(case.engine, "dtype", None) == other))
    return found


@contextmanager
def computed_in(learner: Learner, dtype: torch.dtype) -> Iterator[None]:
    """The policy's model as an engine holds it, without an adapter beside it, in a dtype."""
    policy = learner.policy
    merged: dict[str, Tensor] = dict(policy.merged())
    values: dict[str, Tensor] = {}
    for name, p in policy.model.named_parameters():
        own: Tensor = p.detach()
        if own.is_floating_point():
            values[name] = merged.get(unwrapped(name.removeprefix("base_model.model.")), own).to(dtype)
    with Swap(policy.model, values)(), _adapter_off(policy.model):
        yield


@contextmanager
def _adapter_off(model: nn.Module) -> Iterator[None]:
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():  # type: ignore[operator]
            yield
    else:
        yield


async def version(case: Case) -> list[Trial]:
    """Weights that the engine may still serve: those of the version before, the base alone, those before training."""
    policy, found = case.learner.policy, []
    previous = case.learner.gate.previous
    if previous:
        with Swap(policy.model, previous)():
            found.append(Trial("the engine serves the weights of the version before", case.said - case.score()))
    if policy.is_peft:
        with _adapter_off(policy.model):
            found.append(Trial("the engine serves the base model without the adapter", case.said - case.score()))
    if policy.reference_kind != "adapter off":
        with policy.reference() as model:
            scored = case.learner.logprobs(case.batch, model=model)[case.batch.mask]
        found.append(Trial("the engine serves the policy before training", case.said - scored))
    return found


async def prompts(case: Case) -> list[Trial]:
    """Other tokens before the answer: a beginning token more or less, the prompt rendered in another way."""
    found = []
    for what, prompt in _prompts(case):
        made = _told(case, prompt)
        if made is not None:
            found.append(Trial(f"the engine was shown the prompt {what}", case.said - case.score(made)))
    return found


Reprompt = Callable[[list[int], tuple[Message, ...] | None], list[int] | None]


def _prompts(case: Case) -> Iterator[tuple[str, Reprompt]]:
    """Ways to make another prompt of a row's tokens and messages."""
    yield "with its first token doubled", lambda ids, _: ids[:1] + ids
    yield "without its first token", lambda ids, _: ids[1:] or None
    if case.chat is None:
        return
    start = case.chat.tokenizer.bos_token_id
    for token in {start, case.chat.end} - {None}:
        yield f"with {case.chat.tokenizer.convert_ids_to_tokens(token)} before it", lambda ids, _, t=token: [t, *ids]
    yield "without the assistant's opening", _rendered(lambda m, c=case.chat: c.encode(c.render(m, prompt=False)))
    for name, chat in case.chats().items():
        yield f"rendered by {name}", _rendered(chat.prompt)


def _rendered(made: Callable[[tuple[Message, ...]], list[int]]) -> Reprompt:
    """From the messages, where they are known."""
    return lambda _, messages: made(messages) if messages else None


def _told(case: Case, prompt: Reprompt) -> Batch | None:
    """The batch with other prompts; None where it is the same or cannot be made for every row."""
    rows = []
    for i, (ids, mask) in enumerate(zip(case.batch.tokens.tolist(), case.batch.mask.tolist(), strict=True)):
        ids = ids[: int(case.batch.lengths[i])]
        first = mask.index(True)
        other = prompt(ids[:first], _asked(case, i, ids))
        if other is None:
            return None
        rows.append(_row(other + ids[first:], [False] * len(other) + mask[first : len(ids)]))
    made = Batch.of(rows)
    return None if made.tokens.shape == case.batch.tokens.shape and made.tokens.equal(case.batch.tokens) else made


def _asked(case: Case, row: int, tokens: list[int]) -> tuple[Message, ...] | None:
    """The messages that a row's prompt was made of."""
    scored = [t for group in case.groups for t in group if t.total is not None]
    index = int(case.batch.trajectory[row])
    if index >= len(scored):
        return None
    trajectory = scored[index]
    for turn in trajectory.turns:
        if trajectory.samples[turn.sample].tokens == tokens:
            return tuple(turn.messages[:-1])
    return None


def _row(tokens: list[int], mask: list[bool], logprobs: list[float] | None = None, version: int = 0) -> Group:
    sample = Sample(tokens, mask, logprobs or [NAN] * len(mask), [0.0] * len(mask), version)
    return (Trajectory(Task("parity", ()), (), [sample], score=0.0),)


async def vocabulary(case: Case) -> list[Trial]:
    """Ids that mean nothing to the tokenizer, counted by one side only."""
    found = []
    size = case.logprobs.shape[1]
    if case.chat is not None and case.chat.vocabulary < size:
        n = case.chat.vocabulary
        kept = case.logprobs[:, :n].logsumexp(1)
        what = f"the engine normalises over the tokenizer's {n} ids, the learner over all {size} of the model"
        found.append(Trial(what, case.said - (case.taken(case.logprobs) - kept)))
    for more in sorted({-size % multiple for multiple in (8, 32, 64, 128, 256, 512)} - {0}):
        extra = torch.log1p(more * (-case.logits.logsumexp(1)).exp())
        what = f"the engine normalises over {more} padding ids beyond the model's {size}"
        found.append(Trial(what, case.said - (case.taken(case.logprobs) - extra)))
    return found


async def prefix_cache(case: Case) -> list[Trial]:
    """The same prompts asked twice, the second time with nothing cached. Only where the first is wrong again."""
    if case.engine is None:
        return []
    wrong = await _again(case, case.engine)
    await case.engine.forget()
    if not Figures.of(wrong, case.bounds).over(case.bounds):
        return []
    what = "the engine's prefix cache is of other weights: the gaps of new answers shrink once it is emptied"
    return [Trial(what, await _again(case, case.engine))]


async def _again(case: Case, engine: Engine) -> Float[Tensor, " n"]:
    """The gaps of new answers to the prompts."""
    starts = {}
    for ids, mask in zip(case.batch.tokens.tolist(), case.batch.mask.tolist(), strict=True):
        starts[tuple(ids[: mask.index(True)])] = None
    asked = [list(prompt) for prompt in starts][:AGAIN]
    how = replace(case.sampling, max_tokens=AGAIN_TOKENS, stop=())
    answers = await asyncio.gather(*(engine.generate(p, replace(how, seed=i)) for i, p in enumerate(asked)))
    rows = []
    for prompt, answer in zip(asked, answers, strict=True):
        n, m = len(prompt), len(answer.tokens)
        rows.append(_row(prompt + answer.tokens, [False] * n + [True] * m, [NAN] * n + answer.logprobs))
    batch = Batch.of(rows)
    return batch.logprobs[batch.mask] - case.score(batch)


CAUSES = (
    Cause("temperature", temperature, "see that rollout.sampling.temperature reaches the engine, and that it reports "
          "log-probs after temperature (logprobs_mode: processed_logprobs); take out rollout.engine.options"),
    Cause("truncated distribution", truncation, "take the engine's own sampling defaults away (a generation_config.json"
          " beside the model, rollout.engine.options); rollout.sampling.top_k, top_p and min_p stay neutral"),
    Cause("dtype", dtype, "set model.dtype to the one that both can compute in, float32 on a CPU; take dtype and "
          "quantization out of rollout.engine.options"),
    Cause("adapter version", version, "the sync did not reach the engine: set sync.type=merged, and take out "
          "rollout.engine.options"),
    Cause("prompt tokens", prompts, "set model.chat_template to the template that the engine uses; send token ids, "
          "and let nothing be put before them"),
    Cause("padded vocabulary", vocabulary, "take a model whose vocabulary is not padded, or one whose padding neither "
          "side counts; take logit biases and allowed tokens out of rollout.engine.options"),
    Cause("prefix cache", prefix_cache, "set rollout.engine.options={enable_prefix_caching: false}, and report it: the "
          "cache held keys and values of older weights"),
)  # fmt: skip


async def diagnose(found: Mismatch, case: Case, causes: Sequence[Cause] = CAUSES) -> str:
    """The message of a mismatch: the cause, the gap before and after, the fix; or what each hypothesis leaves."""
    tried: list[tuple[Figures, Cause, Trial]] = []
    lines = [str(found)]
    for cause in causes:
        try:
            trials = await cause.tries(case)
        except (RuntimeError, ValueError, NotImplementedError, RunError, InputError) as error:  # the others still count
            lines.append(f"  {cause.name} could not be tried: {str(error).splitlines()[0]}")
            continue
        tried += [(Figures.of(trial.gap, case.bounds), cause, trial) for trial in trials]
    before = Figures.of(case.gap, case.bounds)
    tried.sort(key=lambda entry: entry[0].mean if math.isfinite(entry[0].mean) else math.inf)
    right = [entry for entry in tried if explains(entry[2], before, case.bounds)]
    if right:
        after, cause, trial = right[0]
        lines += [
            f"  Cause: {cause.name}. {trial.what[0].upper()}{trial.what[1:]}.",
            f"  So computed, the mean gap of {before.tokens} of the tokens falls from {before.mean:.2g} to "
            f"{after.mean:.2g}, the largest from {before.max:.2g} to {after.max:.2g}.",
            f"  Try: {cause.fix}.",
        ]
    else:
        lines.append(f"  None of the known causes explains it: the mean gap is {before.mean:.2g}, and if")
        lines += [f"    {trial.what}: {figures.mean:.2g}" for figures, _, trial in tried[:LISTED]]
    return "\n".join(
        [*lines, "  To go on all the same: parity.check=warn. Wider bounds: parity.mean, parity.max, parity.kl."]
    )


def explains(trial: Trial, before: Figures, bounds: Bounds) -> bool:
    """What remains is rounding, or a small part of what there was."""
    after = Figures.of(trial.gap, bounds)
    if after.mean * FACTOR <= before.mean or not after.over(bounds):
        return True
    other = trial.rounding
    if other is None or Figures.of(trial.gap, other).over(other):
        return False
    return trial.known or after.mean <= SHARED * before.mean
