"""The policy: a causal language model of transformers with any PEFT adapter, or none for full fine-tuning.

The reference of a KL term is the same model with the adapter switched off, so no second model is held; where an already
trained adapter is trained on, it is the same model with the adapter as it was. Neither will do where the adapter's init
changed the base (PiSSA, OLoRA, LoftQ, ...), nor without an adapter. Which it is, is measured, not looked up: the base
is fingerprinted before and after wrapping. Then a frozen copy serves as the reference, and adapter hot-loading is
refused. A reference that follows the policy is in reference.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from rlft.allocation import stepped, uncut
from rlft.fused import fuse
from rlft.models import refuse_pickled
from rlft.swap import Swap
from rlft.types import InputError


def device_of(name: str) -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; `auto` is bfloat16 on a GPU and float32 on a CPU, which emulates bfloat16."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


class Policy:
    """The trained model, its reference, and the weights an engine has to receive.

    model: the wrapped model. base_changed: the adapter's init moved the base. reference_kind: "adapter off",
    "adapter as it was" or "frozen copy".
    """

    def __init__(
        self,
        path: Path,
        adapter: dict[str, Any] | None,
        device: str = "auto",
        dtype: str = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
        self.path = path
        self.device = device_of(device)
        self.dtype = dtype_of(dtype, self.device)
        self._remote = trust_remote_code
        torch.manual_seed(seed)
        base = self.load(self.path)
        before = fingerprint(base)
        self.model, trained_before = self._wrap(base, adapter)
        now = self._base_now()
        self.base_changed = any(now.get(name, mark) != mark for name, mark in before.items())
        self._refuse_unreachable(before.keys())
        self.model.to(self.device)
        self.reference_kind = "frozen copy" if self.base_changed or not adapter else "adapter off"
        self._frozen: Any = None
        self._start: Swap | None = None
        if trained_before:
            self.reference_kind = "adapter as it was"
            self._start = Swap(self.model, {n: p.detach().clone() for n, p in self.trainable()})
        if gradient_checkpointing:
            inner = self.causal_lm
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            inner.enable_input_require_grads()
        if not any(True for _ in self.trainable()):
            raise InputError("adapter: nothing in the model is trainable with these settings")

    @property
    def is_peft(self) -> bool:
        """There is an adapter."""
        return isinstance(self.model, PeftModel)

    @property
    def prompts_learned(self) -> bool:
        """The adapter prepends virtual tokens, so positions and masks are not those of the text alone."""
        config = self.model.active_peft_config if isinstance(self.model, PeftModel) else None
        return config is not None and config.is_prompt_learning

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapter layers in place."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer moves, in a fixed order."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def stepped(self, step: int) -> None:
        """Tell an adapter that adapts itself (AdaLoRA's ranks) that the optimizer took its step number `step`."""
        stepped(self.model, step)

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The model the policy started from, for as long as the block runs."""
        if self.reference_kind == "adapter off":
            assert isinstance(self.model, PeftModel)
            with self.model.disable_adapter():
                yield self.model
        elif self._start is not None:
            with self._start() as model:
                yield model
        else:
            yield self.frozen()

    def frozen(self) -> nn.Module:
        """A second model with the weights that the policy was built from; loaded at the first call."""
        if self._frozen is None:
            twin = self.load(self.path)
            if not self.is_peft:
                twin.to(self.causal_lm.dtype)
            self._frozen = twin.to(self.device).eval().requires_grad_(False)
        return self._frozen

    def targets(self) -> dict[str, tuple[str, ...]]:
        """The checkpoint name of every weight that training can change, with the trainable names behind it."""
        if not self.is_peft:
            return {name: (name,) for name, _ in self.trainable()}
        return {f"{path}.{leaf}": inside for path, module, inside in self._adapted() for leaf, _ in _base_of(module)}

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of `targets`: base plus delta by the tuner's own merge, cast to the model's dtype.

        The merge runs in float32 on a copy of one module at a time; the base is never mutated.
        """
        if not self.is_peft:
            yield from ((name, p.detach().to(self.dtype)) for name, p in self.trainable())
            return
        for path, module, _ in self._adapted():
            for leaf, tensor in _merge(module):
                yield f"{path}.{leaf}", tensor.to(self.dtype)

    def _adapted(self) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
        """The outermost adapted modules: checkpoint path, module, the trainable names in it."""
        inside_of = ""
        for name, module in self.model.named_modules():
            if inside_of and name.startswith(inside_of):
                continue
            if _adapts(module):
                inside_of = name + "."
                trained = tuple(f"{name}.{n}" for n, p in module.named_parameters() if p.requires_grad)
                if trained:
                    yield name.removeprefix("base_model.model."), module, trained

    def plain(self) -> dict[str, Tensor]:
        """The base's weights under their checkpoint names, adapter parameters left out."""
        adapted = [m for m in self.model.modules() if _adapts(m)]
        inner = {
            id(p)
            for m in adapted
            for n, p in m.named_parameters()
            if "base_layer." not in n and "original_module." not in n
        }
        names = ((n, p) for n, p in self.causal_lm.named_parameters() if id(p) not in inner)
        return {unwrapped(name): p.detach() for name, p in names}

    def save_adapter(self, folder: Path) -> None:
        """The adapter in PEFT's format; without an adapter the whole model, both as safetensors."""
        with uncut(self.model):
            self.model.save_pretrained(str(folder), safe_serialization=True)
        if self.is_peft:
            _sort_sets(folder / "adapter_config.json", self.model.peft_config[self.model.active_adapter])

    def save_merged(self, folder: Path) -> None:
        """The model with the adapter merged in, as transformers and vLLM load it."""
        model = self.load(self.path)
        state = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.merged():
                state[name].copy_(tensor)
        model.save_pretrained(str(folder), safe_serialization=True)

    def load(self, path: Path) -> Any:
        """A model of transformers in this policy's dtype. Raises InputError."""
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=self.dtype, trust_remote_code=self._remote, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: {path} does not load as a causal language model: {error}") from error
        model.config.use_cache = False
        return model

    def _wrap(self, base: Any, adapter: dict[str, Any] | None) -> tuple[Any, bool]:
        if adapter is None:
            return base.float() if self.device.type == "cpu" else base, False
        saved = adapter["type"] == "saved"
        try:
            if saved:
                refuse_pickled(Path(adapter["path"]), "adapter.path")
                model = PeftModel.from_pretrained(base, adapter["path"], is_trainable=True)
            else:
                model = get_peft_model(base, peft_config(adapter))
        except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
            what = f"the adapter in {adapter['path']}" if saved else "these settings"
            raise InputError(f"adapter: PEFT refuses {what} for this model: {error}") from error
        _refuse_tied(model)
        fuse(model)
        return model, saved

    def _refuse_unreachable(self, checkpoint: Collection[str]) -> None:
        """Trained parameters that become part of no weight of the checkpoint could not be sent to an engine."""
        reached = {inside for name, names in self.targets().items() if name in checkpoint for inside in names}
        lost = [name for name, _ in self.trainable() if name not in reached]
        if lost:
            raise InputError(
                f"adapter.type: it trains {lost[0]}, which cannot be merged into a weight of the model, so no engine "
                "could serve it. Choose an adapter that changes weights, such as lora."
            )

    def _base_now(self) -> dict[str, tuple[float, float]]:
        """Fingerprints of the wrapped base under its names before wrapping."""
        return {unwrapped(name.removeprefix("base_model.model.")): m for name, m in fingerprint(self.model).items()}


def peft_config(adapter: dict[str, Any]) -> Any:
    """The PEFT config that `adapter` (`type` and any field of that config) describes; an unknown field is refused."""
    import difflib

    kinds = {
        str(kind.value if hasattr(kind, "value") else kind).lower(): c
        for kind, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    settings = {key: value for key, value in adapter.items() if key != "type"}
    kind = str(adapter["type"]).lower()
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f". It is one of: {', '.join(sorted(kinds))}, saved, none"
        raise InputError(f"adapter.type: there is no adapter {kind!r}{hint}")
    known = set(kinds[kind].__dataclass_fields__)
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"adapter.{key}: {kinds[kind].__name__} of PEFT has no such field{hint}")
    hints = get_type_hints(kinds[kind])
    for key, value in settings.items():
        _refuse_kind(f"adapter.{key}", hints.get(key, Any), value)
    try:
        return kinds[kind](task_type="CAUSAL_LM", **settings)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"adapter: {error}") from error


def _refuse_kind(key: str, hint: Any, value: Any) -> None:
    """PEFT takes anything until a layer is made. Its hints name fewer words than it knows, and integers for numbers."""
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        mistakes = error.errors()
        if not {"literal_error", "int_from_float"} & {e["type"] for e in mistakes} or not isinstance(
            value, str | float
        ):
            raise InputError(f"{key}: {mistakes[0]['msg']} (it is {value!r})") from error
    except PydanticSchemaGenerationError:  # a class that pydantic knows nothing of
        pass


_WRAPPERS = {"base_layer", "original_module", "token_adapter"}


def unwrapped(name: str) -> str:
    """A parameter's name without the wrappers that PEFT puts around its module, nested ones included."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two numbers per parameter that change when its bits do, within the reach of float64 sums."""
    marks = {}
    for name, p in model.named_parameters():
        flat = p.detach().flatten().double()
        ramp = torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=flat.device)
        marks[name] = (float(flat.sum()), float(flat @ ramp))
    return marks


@torch.no_grad()
def _merge(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of one adapted module with the adapter merged in, float32, on a copy."""
    try:
        twin: Any = _float_twin(module)
        if hasattr(twin, "unload_and_optionally_merge_module"):
            twin = twin.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            twin.merge()
    except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        kind = type(module).__name__
        raise InputError(f"adapter: {kind} cannot be merged ({error}), so sync: merged cannot serve it") from error
    yield from _base_of(twin)


def _float_twin(module: Any) -> Any:
    """A copy of a module in float32, all tensors its own. Five times faster than deepcopy, which follows every hook."""
    twin = object.__new__(type(module))
    for key, value in vars(module).items():
        if key == "_modules":
            value = {name: part if part is None else _float_twin(part) for name, part in value.items()}
        elif key in ("_parameters", "_buffers"):
            value = {name: part if part is None else _float_copy(part) for name, part in value.items()}
        elif isinstance(value, dict | list | set):
            value = value.copy()
        vars(twin)[key] = value
    return twin


def _float_copy(tensor: Tensor) -> Tensor:
    fresh = tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
    return nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh


def _adapts(module: nn.Module) -> bool:
    """PEFT put this module around one of the base's."""
    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _base_of(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights of an adapted module that the engine knows: the wrapped layer's, or the trained copy's."""
    if hasattr(module, "modules_to_save"):
        return module.modules_to_save[module.active_adapters[0]].named_parameters()
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.named_parameters()


def _refuse_tied(model: PeftModel) -> None:
    """Adapters on tied embeddings: merging would change input and output at once, so the engine would disagree."""
    inner: Any = model.get_base_model()
    if not getattr(inner.config, "tie_word_embeddings", False):
        return
    ends = {"input": inner.get_input_embeddings(), "output": inner.get_output_embeddings()}
    for end, module in ends.items():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise InputError(
                f"adapter: it adapts the {end} embeddings, which this model ties to the other end; the engine holds "
                "one copy for both. Leave embed_tokens and lm_head out of target_modules and modules_to_save."
            )


def _sort_sets(file: Path, config: Any) -> None:
    """PEFT writes sets, such as target_modules, in an order that differs from process to process."""
    written = json.loads(file.read_text())
    ordered = {name: sorted(written[name]) for name, value in vars(config).items() if isinstance(value, set)}
    file.write_text(json.dumps(written | ordered, indent=2, sort_keys=True))
