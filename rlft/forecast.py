"""From a config to the memory that its run will need: every term of memory.py, process by process.

Counts of weights, adapter and trained parameters are those of the real model class and of PEFT's adapter, on the meta
device. Constants that had to be measured stand at the top; docs/memory.md says on what, and how well they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from rlft.build import served_model
from rlft.config import Config
from rlft.config_rollout import Local, Vllm
from rlft.footprint import Asked, Rehearsal, Shape, adapted, bare, shallow
from rlft.forward import REACH
from rlft.machine import resident
from rlft.material import Material
from rlft.memory import MODULES, Footprint, Process, Term
from rlft.models import locate
from rlft.packing import Ways, apart, trunk_of
from rlft.rewards.judge import base_of, checkpoint
from rlft.segments import may
from rlft.workload import Step, longest_step, prompts_of, recorded_steps, shapes

MB = 2**20
GROWTH = 112 * MB  # modules, kernels and buffers that a run loads as it goes on, and malloc's spare end
VLLM_MODULES = 140 * MB  # vLLM's modules beside torch's and ours
VLLM_GROWTH = 60 * MB
WORKER = 592 * MB  # a worker's Python with all its modules
SHARD = 64 * MB  # of weights on the way to a worker
ARRIVING = "weights that arrive"
CONTEXT = 500 * MB  # of CUDA, per process
FRACTION = 0.4  # of a GPU: vLLM's share unless the config says otherwise
PREFILL = 4096  # tokens that vLLM computes at once on a CPU
UNCHANGED = (None, True, False, "gaussian", "orthogonal", "eva")  # inits that leave the base as it is


@dataclass(frozen=True)
class Counts:
    """Sizes of a policy in bytes, where nothing else is said.

    trained: all that the optimizer moves, and so its gradients; numbers: how many those are, widest: in the largest of
    them; edges: rows and columns of its matrices, for adafactor. tied: an embedding that is the vocabulary's head too.
    largest: numbers of the largest weight. changed: weights that a sync sends. second: a second adapter like the first.
    """

    weights: int
    adapter: int
    trained: int
    numbers: int
    tied: int
    largest: int
    widest: int
    changed: int
    second: int
    edges: int


def count(config: Any, settings: dict[str, Any] | None, dtype: torch.dtype, cpu: bool, remote: bool = False) -> Counts:
    """Everything that can be counted on a model without storage."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = bare(config, remote).to(dtype)
    if settings is None and cpu:
        base = base.float()  # as the policy does
    weights = _bytes(base.parameters())
    largest = max(p.numel() for p in base.parameters())
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    tied = _bytes([ends[0].weight]) if ends[1] is not None and ends[0].weight is ends[1].weight else 0
    before = {id(p) for p in base.parameters()}
    model = adapted(base, settings)
    learned = [p for p in model.parameters() if p.requires_grad]
    trunk = trunk_of(model)
    below = {id(p) for p in trunk.parameters()} if trunk is not None else set()
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    touched = [p for layer in layers for p in layer.parameters(recurse=False)] or learned
    return Counts(
        weights,
        _bytes(p for p in model.parameters() if id(p) not in before),
        _bytes(learned),
        sum(p.numel() for p in learned),
        tied,
        largest,
        max((p.numel() for p in learned), default=0),
        sum(p.numel() * dtype.itemsize for p in touched),
        _bytes(p for p in learned if id(p) in below),
        sum(sum(p.shape[-2:]) if p.ndim > 1 else p.numel() for p in learned),
    )


def _bytes(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


class Forecast:
    """The memory of a config and of variants of it, which share what was measured once. stuff: of the first one."""

    def __init__(self, stuff: Material) -> None:
        from transformers import AutoConfig

        self._stuff = stuff
        self._remote = stuff.config.model.trust_remote_code
        self._model = AutoConfig.from_pretrained(stuff.model, trust_remote_code=self._remote)
        self._text = self._model.get_text_config()
        self.device, self._dtype = served_model(stuff)
        self._cpu = self.device.type == "cpu"
        self._modules = resident()  # now, before anything is planned
        self._counts: dict[str, Counts] = {}
        self._rehearsals: dict[str, Rehearsal] = {}

    def footprint(self, config: Config, rough: bool = False) -> Footprint:
        """The processes of a run by this config, which may differ from the first in sizes but not in its data.

        rough: activations are guessed, and high, instead of rehearsed, which takes seconds.
        """
        counts = self.counts(config)
        terms = [*self._learner(config, counts, rough)]
        engine, shared = [*self._engine(config, counts)], 0
        if self._stuff.needs_engine and config.rollout.engine.place == "worker":
            if self._cpu and not self._hot(config):
                shared = counts.changed
            start = Term(MODULES, WORKER if self._cpu else CONTEXT)
            return Footprint(
                (Process("learner", tuple(terms)), Process("engine", (start, *engine))), shared, not self._cpu
            )
        return Footprint((Process("run", (*terms, *engine)),), 0, not self._cpu)

    def counts(self, config: Config) -> Counts:
        """See Counts."""
        settings = config.adapter.settings()
        key = repr(settings)
        if key not in self._counts:
            self._counts[key] = count(self._model, settings, self._dtype, self._cpu, self._remote)
        return self._counts[key]

    def _learner(self, config: Config, n: Counts, rough: bool) -> Iterator[Term]:
        """Everything but the engine."""
        modules = (
            VLLM_MODULES if isinstance(config.rollout.engine, Vllm) and config.rollout.engine.place == "here" else 0
        )
        modules = modules if self._stuff.needs_engine else 0
        yield Term(MODULES, self._modules + modules if self._cpu else CONTEXT)
        if self._cpu:
            yield Term("loaded as it goes on", GROWTH)
        yield Term("weights", n.weights)
        if n.adapter and config.parity.check != "off":
            yield Term("adapter of the step before", config.agents.count * n.trained)
        agents = config.agents.count  # each with values and an optimizer of its own
        if n.adapter:
            yield Term("adapter" if agents == 1 else "adapters", n.adapter + (agents - 1) * n.trained)
        if config.agents.past:
            yield Term("past adapters", config.agents.past * n.trained)
        yield from self._others(config, n)
        second = n.second if self._stuff.algorithm.owned.adapter else 0
        if second:
            yield Term("second adapter", agents * second)
        state, scratch = optimizer_bytes(config.learner.optimizer, n, second)
        gradients = n.trained + second
        yield Term("optimizer", agents * state, ("generate", "learn", "sync"))
        activations, parts = self.activations(config, rough)
        # With one micro-batch the rehearsal has seen the gradients come; with more they are there from the start.
        learning = activations + (gradients if parts > 1 else 0)
        yield Term("gradients", gradients, ("learn",))
        yield Term("activations", max(learning - gradients, scratch), ("learn",))
        if self._cpu:
            yield Term("fingerprints of the base", 16 * n.largest, ("load",))

    def _others(self, config: Config, n: Counts) -> Iterator[Term]:
        """Models beside the policy."""
        measured = "ref_logprobs" in self._stuff.algorithm.needs
        settings = config.adapter.settings()
        if config.reference.every:
            wide = 1 if config.reference.mix == 1 else max(1, 4 * n.numbers // max(n.trained, 1))
            yield Term("moving reference", config.agents.count * n.trained * wide)
        elif settings is not None and settings["type"] == "saved":
            yield Term("adapter as it was", n.trained)
        elif measured and (settings is None or settings.get("init_lora_weights") not in UNCHANGED):
            yield Term("frozen reference", n.weights)
        if config.teacher is not None:
            yield Term("teacher", self._other_model(locate(config.teacher.path), self._dtype))
        for path, base in (*_reward_models(config.reward), *_reward_models(config.eval.verifier)):
            folder = locate(base or base_of(checkpoint(Path(path))))
            yield Term("reward model", self._other_model(folder, torch.float32 if self._cpu else torch.bfloat16))

    def _other_model(self, folder: Path, dtype: torch.dtype) -> int:
        from transformers import AutoConfig

        other = AutoConfig.from_pretrained(folder, trust_remote_code=self._remote)
        return _bytes(bare(other, self._remote).to(dtype).parameters())

    def _engine(self, config: Config, n: Counts) -> Iterator[Term]:
        """What samples."""
        block = config.rollout.engine
        if not self._stuff.needs_engine:
            return
        weights = sum(p.numel() for p in bare(self._model, self._remote).parameters()) * self._dtype.itemsize
        if isinstance(block, Local):
            yield Term("engine's weights", weights + (config.agents.served - 1) * n.changed)
            yield Term("keys and values", self._open(config, block.max_sequences), ("generate",))
            if block.place == "worker":
                yield Term(ARRIVING, SHARD, ("load", "sync"))
            return
        if not self._cpu:
            total = torch.cuda.get_device_properties(self.device).total_memory if torch.cuda.is_available() else 0
            share = int((block.memory_fraction or FRACTION) * total)
            yield Term("engine (weights, keys and values)", max(share, weights + int((block.cache_gb or 0) * 2**30)))
            return
        yield Term("vLLM", VLLM_GROWTH)
        yield Term("engine's weights", weights + n.tied)  # the head's kernel has a packed copy of its own
        yield Term("keys and values", int((block.cache_gb or 1.0) * 2**30))
        wide = self._text.hidden_size + getattr(self._text, "intermediate_size", 4 * self._text.hidden_size)
        scored = 4 * min(block.max_sequences, self._sequences(config)) * self._text.vocab_size * 4
        yield Term("sampling", PREFILL * wide * 4 * 2 + scored, ("generate",))
        sent = n.trained if self._hot(config) else n.changed
        yield Term(ARRIVING, sent + (SHARD if block.place == "worker" else 0), ("load", "sync"))

    def _hot(self, config: Config) -> bool:
        """On a CPU, adapters are sent in place of merged weights: asked for, or since the engine serves several."""
        several = config.agents.served > 1 or any(draw.reference for draw in self._stuff.algorithm.draws)
        return isinstance(config.rollout.engine, Vllm) and (several or config.sync.type == "adapter")

    def _sequences(self, config: Config) -> int:
        """How many are open at once."""
        rows = config.rollout.tasks_per_step * config.rollout.group_size if config.online else 0
        return max(rows, len(self._stuff.held_out), 1)

    def _open(self, config: Config, limit: int) -> int:
        """Keys, values and logits of the sequences that transformers advances together."""
        count = min(limit, self._sequences(config))
        long = max(self._prompts, default=0) + config.rollout.sampling.max_tokens * max(
            env.answers for env in config.envs
        )
        one = cache_bytes(self._text, self._dtype)
        layer = one // int(self._text.num_hidden_layers)
        return count * (long * (one + 2 * layer) + 12 * self._text.vocab_size)

    @cached_property
    def _prompts(self) -> list[int]:
        return prompts_of(self._stuff)

    @cached_property
    def _recorded(self) -> list[Step]:
        return recorded_steps(self._stuff)

    @cached_property
    def _ways(self) -> Ways:
        """How rows may be laid out, as far as a config says so; the learner measures it."""
        packs, shares = apart(self._model, shares=False), apart(self._model, shares=True)
        return Ways(packs, shares, shares and may(trunk_of(bare(shallow(self._model, 1), self._remote))))

    def activations(self, config: Config, rough: bool = False) -> tuple[int, int]:
        """Bytes of the largest micro-batch, and how many micro-batches an optimizer step has."""
        algorithm, learner = self._stuff.algorithm, config.learner
        step = longest_step(config, algorithm, self._prompts, self._recorded)
        unit = algorithm.micro or algorithm.unit
        one = -(-len(step.whole) // learner.minibatches // unit) * unit
        soft = config.adapter.type in ("prompt_tuning", "prefix_tuning", "p_tuning", "multitask_prompt_tuning", "cpt")
        ways = Ways() if soft or learner.packing == "off" else self._ways
        reach = REACH * self._text.hidden_size
        made, parts = shapes(ways, reach, step.head(one), unit, learner.micro_tokens)
        if rough:
            return max(self._guess(shape, config) for shape in made), parts
        rehearsal = self._rehearsal(config)
        owned = algorithm.owned
        asked = Asked(
            vocabulary=algorithm.vocabulary,
            head=owned.head,
            detached=owned.detached,
            second=owned.adapter,
            held=parts > 1,
            distributions=algorithm.distributions,
        )
        kept = config.memory.keep
        found = [rehearsal.peak(shape, asked, kept) for shape in made]
        if any(need.endswith("logprobs") or need == "now_entropy" for need in algorithm.needs):
            first = shapes(ways, reach, step, 1, learner.micro_tokens)[0][0]
            if first not in made:  # else it took more with gradients
                found.append(rehearsal.peak(first, Asked(gradient=False), kept))
        return max(found), parts

    def _guess(self, shape: Shape, config: Config) -> int:
        """Three times what a layer of a Llama with LoRA keeps, and as much for the logits."""
        text, gradients = self._text, self.counts(config).trained
        inside = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        token = int(text.num_hidden_layers) * 4 * (40 * text.hidden_size + 8 * inside + shape.width)
        return 2 * shape.tokens * token + 8 * 4 * shape.chosen * text.vocab_size + 2 * gradients

    def cache_least(self) -> float:
        """GiB of keys and values for the longest sequence, as vLLM demands."""
        return self._stuff.context * cache_bytes(self._text, self._dtype) / 2**30

    def _rehearsal(self, config: Config) -> Rehearsal:
        settings, recomputed = config.adapter.settings(), config.model.gradient_checkpointing
        key = f"{settings} {recomputed}"
        if key not in self._rehearsals:
            given = (self._model, settings, self.device, self._dtype, recomputed, self._remote)
            self._rehearsals[key] = Rehearsal(*given)
        return self._rehearsals[key]


def optimizer_bytes(name: str, n: Counts, second: int = 0) -> tuple[int, int]:
    """What an optimizer keeps, and what its step needs for a moment: adamw two moments and one more copy."""
    trained = n.trained + second
    size = trained // max(n.numbers + second // 4, 1) if n.trained else 4
    if name == "adamw":
        return 2 * trained, trained
    if name == "adafactor":
        return n.edges * 4, 2 * n.widest * size
    return 0, 0


def cache_bytes(text: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values per token."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(width) * dtype.itemsize


def _reward_models(reward: Any) -> Iterator[tuple[str, str | None]]:
    """Path and base of every reward model in a reward."""
    if reward is None:
        return
    if reward.type == "model":
        yield reward.path, reward.base
    for part in reward.inside:
        yield from _reward_models(part)
