"""What one micro-batch of learning holds in memory, by doing it without memory.

The model is built on the meta device and run under torch's FakeTensorMode: every operator, the learner's own kernels
and the backward pass included, computes shapes and no numbers. A dispatch mode sees each tensor appear and go, so the
peak of what is alive at once is exact for any architecture, adapter and dtype, recomputed layers included; torch's
MemTracker works alike. What malloc wastes on a CPU is played in heap.py. What an operator needs inside itself is not
seen. Every layer adds as much as the one before, so two shallow models give a deep one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, masking_utils

from rlft.forward import heard, passed
from rlft.head import altered, untrained
from rlft.heap import Heap
from rlft.kernels import FastLinear
from rlft.packing import Layout, trunk_of
from rlft.segments import NAME, Stretch, may, segments


@dataclass(frozen=True)
class Shape:
    """A micro-batch: sequences x width computed tokens, of which `chosen` get logits. masked: rows stand end to end or
    padded, so attention takes a mask of width x width. stretches: of attention by segments, in place of a mask."""

    sequences: int
    width: int
    chosen: int
    masked: bool
    stretches: tuple[Stretch, ...] = ()

    @property
    def tokens(self) -> int:
        """Computed tokens."""
        return self.sequences * self.width


@dataclass(frozen=True)
class Asked:
    """What a pass has to give, see Algorithm. gradient: a backward pass follows. head: how many outputs; second: they
    are read in a pass of their own. distributions: of a teacher too. held: gradients are there from an earlier pass."""

    gradient: bool = True
    vocabulary: bool = True
    head: int = 0
    detached: bool = False
    second: bool = False
    held: bool = False
    distributions: bool = False


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside it and are alive; `known` ones were there before."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.heap, self.calm = Heap(), Heap(crowded=False)
        self._sizes: dict[int, int] = {}
        self._places: dict[int, tuple[int, int]] = {}
        for tensor in known:
            self._sizes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # asks for a device
            return out
        for tensor in tree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._places[key] = self.heap.take(storage.nbytes()), self.calm.take(storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        if key in self._places:
            for heap, place in zip((self.heap, self.calm), self._places.pop(key), strict=True):
                heap.give(place)


def bare(config: Any, remote: bool = False) -> Any:
    """The model of a transformers config, without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=remote, attn_implementation="sdpa")


def shallow(config: Any, layers: int) -> Any:
    """The same config with so many layers."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = list(kinds[:layers])
    return cut


def adapted(model: Any, settings: dict[str, Any] | None) -> Any:
    """A bare model with an adapter around it, as the policy has one."""
    if settings is None:
        return model
    from peft import PeftConfig, get_peft_model

    from rlft.fused import fuse
    from rlft.policy import peft_config

    if settings["type"] == "saved":
        found = PeftConfig.from_pretrained(settings["path"])
    else:  # PEFT's plain init: one that reads the base's weights cannot run without them
        found = peft_config({k: v for k, v in settings.items() if k != "init_lora_weights"})
    made = get_peft_model(model, found)
    fuse(made)
    return made


class Rehearsal:
    """Bytes that micro-batches of a policy take, by its transformers config and its adapter's settings."""

    def __init__(
        self,
        config: Any,
        settings: dict[str, Any] | None,
        device: torch.device,
        dtype: torch.dtype,
        recomputed: bool = False,
        remote: bool = False,
    ) -> None:
        self._config = config
        self._settings = settings
        self._device = device
        self._dtype = dtype
        self._recomputed = recomputed
        self._remote = remote
        self._known: dict[tuple[Shape, Asked], tuple[int, int]] = {}

    def peak(self, shape: Shape, asked: Asked, kept: bool = True) -> int:
        """What one forward (and backward) pass adds: where a CPU's heap is kept how far it grows, else the bytes alive.

        Weights are not in it, the gradients that it makes are.
        """
        return self._both(shape, asked)[kept and self._device.type == "cpu"]

    def alive(self, shape: Shape, asked: Asked) -> int:
        """The most bytes alive at once."""
        return self._both(shape, asked)[0]

    def _both(self, shape: Shape, asked: Asked) -> tuple[int, int]:
        if (shape, asked) not in self._known:
            self._known[shape, asked] = self._deep(shape, asked)
        return self._known[shape, asked]

    def _deep(self, shape: Shape, asked: Asked) -> tuple[int, int]:
        whole = int(self._config.get_text_config().num_hidden_layers)
        period = _period(self._config)
        uneven = {"layers_to_transform", "rank_pattern", "path", "layer_replication"} & set(self._settings or ())
        if whole <= 8 * period or uneven:
            return self._shallow(shape, asked, whole)
        few, some, more = (self._shallow(shape, asked, n * period) for n in (2, 4, 8))
        if not _straight(few[0], some[0], more[0]):
            return self._shallow(shape, asked, whole)
        alive, heap = (b + (b - a) * (whole - 8 * period) // (4 * period) for a, b in zip(some, more, strict=True))
        return alive, heap

    def _shallow(self, shape: Shape, asked: Asked, layers: int) -> tuple[int, int]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = self._model(layers, mode)
        learned = [p for p in model.parameters() if p.requires_grad]
        with mode:
            held = [torch.empty_like(p) for p in learned if asked.held]
        for p, grad in zip(learned, held, strict=False):
            p.grad = grad
        known = iter([*model.parameters(), *model.buffers(), *held])
        with mode, torch.set_grad_enabled(asked.gradient), Live(known) as live:
            live.heap.crowded = asked.gradient  # without, no node is made
            said = self._forward(model, shape, asked)
            if asked.gradient:
                live.heap.crowded = False
                sum(part.float().sum() for part in said).backward()  # type: ignore[union-attr]
            del said
            for p in learned:
                p.grad = None
        # Where layers are recomputed, a run lay between a crowded heap and a calm one: see docs/memory.md.
        top = (live.heap.top + live.calm.top) // 2 if self._recomputed and asked.gradient else live.heap.top
        return live.peak, top

    def _model(self, layers: int, mode: FakeTensorMode) -> Any:
        """On the device it will be on, without storage."""
        config = (
            shallow(self._config, layers)
            if layers != self._config.get_text_config().num_hidden_layers
            else self._config
        )
        model = adapted(bare(config, self._remote).to(self._dtype), self._settings)
        with mode:
            _materialize(model, self._device)
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            inner.config.use_cache = False
            if may(trunk_of(inner)):
                inner.set_attn_implementation(NAME)
            if self._recomputed:
                inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                inner.enable_input_require_grads()
            model.train()
        return model

    def _forward(self, model: Any, shape: Shape, asked: Asked) -> list[Tensor]:
        products = nullcontext() if self._recomputed and asked.gradient else FastLinear()
        ids = torch.zeros(shape.sequences, shape.width, dtype=torch.long, device=self._device)
        seen = torch.ones(shape.sequences, 1, shape.width, shape.width, dtype=torch.bool, device=self._device)
        parts = segments(shape.stretches, shape.width, self._device) if shape.stretches else None
        mask = seen[:, :, :1, :1] if parts else seen if shape.masked else None
        layout = Layout(ids, ids.clone(), mask, ids, ids, segments=parts)
        picks = torch.zeros(shape.chosen, dtype=torch.long, device=self._device)
        with products, _causal():
            plain = asked.vocabulary and not asked.distributions and shape.chosen
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            head = inner.get_output_embeddings()
            plain = plain and untrained(head) and not altered(inner.config.get_text_config())
            fused = head if plain and trunk_of(model) is not None else None
            hidden, logits, pair = heard(model, layout, picks, picks, 1.0, fused, asked.vocabulary)
            said = [] if hidden is None or not asked.head else [self._headed(hidden, asked)]
            said += self._also(logits, pair, asked)
            del logits
            if asked.second:
                hidden = passed(model, layout, picks, False)[0]
                if hidden is not None:
                    said.append(self._headed(hidden, asked))
        return said

    def _headed(self, hidden: Tensor, asked: Asked) -> Tensor:
        weight = torch.zeros(asked.head, hidden.shape[-1], device=self._device, requires_grad=True)
        seen = torch.where(
            torch.ones_like(hidden[:, :1], dtype=torch.bool), hidden.detach() if asked.detached else hidden, 0.0
        )
        return nn.functional.linear(seen.to(weight.dtype), weight)

    def _also(self, logits: Tensor | None, pair: tuple[Tensor, Tensor], asked: Asked) -> list[Tensor]:
        if logits is None or not asked.distributions:
            return [pair[0]] if asked.vocabulary else []
        own, other = logits.float() / 1.5, logits.detach().float() / 1.5  # the other is the teacher's
        mine, theirs = own.log_softmax(-1), other.log_softmax(-1)
        return [pair[0], (theirs.exp() * (theirs - mine)).sum(-1)]


def _period(config: Any) -> int:
    """After so many layers their kinds repeat."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def _straight(few: int, some: int, more: int) -> bool:
    """Whether the most bytes of two, four and eight periods of layers lie on a line that rises.

    Of few layers the most may be where the head is; of all of them it is elsewhere, and grows otherwise.
    """
    slope = some - few
    return slope > 0 and abs(more - some - 2 * slope) <= 0.02 * (more - few)


def _materialize(model: nn.Module, device: torch.device) -> None:
    """Fake tensors in the place of meta ones, tied ones still tied."""
    made: dict[int, Any] = {}
    for part in model.modules():
        for store in (part._parameters, part._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    fresh = torch.empty(old.shape, dtype=old.dtype, device=device)
                    made[id(old)] = nn.Parameter(fresh, old.requires_grad) if isinstance(old, nn.Parameter) else fresh
                store[name] = made[id(old)]


@contextmanager
def _causal() -> Iterator[None]:
    """Let transformers take a layout without a mask for plainly causal: a fake position cannot be looked at."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
