"""Both kinds of sync into real engines, and what each proof detects; the table stands in docs/sync.md."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlft.engine.base import COLUMNS, Full, Mark, Weights, digest
from rlft.engine.local import LocalEngine
from rlft.engine.vllm import VllmEngine
from rlft.engine.without import without_effect
from rlft.learner import Learner, Schedule
from rlft.models import DEFAULT, locate
from rlft.policy import Policy, fingerprint
from rlft.sync import Sync, adapter_rank, refuse_hot_loading
from rlft.types import Completion, InputError, RunError, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPERATURE = 0.7
ALL_LINEAR = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
Q_AND_V = ALL_LINEAR | {"target_modules": ["q_proj", "v_proj"]}
DOCS = Path(__file__).parents[1] / "docs" / "sync.md"


class Vllm:
    """vLLM engines in this process, one for each kind that was asked for."""

    def __init__(self) -> None:
        self._engines: dict[tuple[Path, torch.dtype, int], VllmEngine] = {}

    def __call__(self, model: Path, dtype: torch.dtype = torch.float32, lora_rank: int = 0) -> VllmEngine:
        """An engine that serves `model` as it is on disk."""
        kind = (model, dtype, lora_rank)
        if kind not in self._engines:
            self._engines[kind] = VllmEngine(model, dtype, 256, 16, cache_gb=0.05, lora_rank=lora_rank)
        if not lora_rank:
            weights = Full(load_file(model / "model.safetensors").items())
            asyncio.run(self._engines[kind].load_weights(weights, -1))
        for cache in self._engines[kind]._runner.kv_caches:
            cache.zero_()  # NaN that a fault left in a free slot is masked by 0, and 0 times NaN is NaN
        return self._engines[kind]

    def close(self) -> None:
        for engine in self._engines.values():
            asyncio.run(engine.close())


@pytest.fixture(scope="module")
def vllm() -> Iterator[Vllm]:
    pool = Vllm()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def biased_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 whose q, k and v have biases: they share a layer of the engine with the weights."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    shutil.copytree(tiny_model, folder)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=2,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Qwen2ForCausalLM(config)
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(p, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix of its base replaced."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _policy(model: Path, adapter: dict[str, Any] | None = ALL_LINEAR, dtype: str = "float32") -> Policy:
    return Policy(model, adapter, device="cpu", dtype=dtype)


def _move(policy: Policy, scale: float, seed: int) -> None:
    """A random step on everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(torch.randn(p.shape, generator=generator) * scale)


LONG = torch.randint(6, 300, (60,), generator=torch.Generator().manual_seed(1)).tolist()  # over a cache block


def _sync(policy: Policy, engine: Any, kind: Any = "merged", temperature: float = TEMPERATURE) -> Sync:
    learner = Learner(policy, Schedule(lr=1e-3, steps=1), temperature=temperature)
    return Sync(policy, engine, learner, kind, [LONG], Sampling(temperature=temperature, max_tokens=99))


class Faulty:
    """A real engine with a fault planted between it and the sync. Everything else is passed on."""

    def __init__(self, engine: Any) -> None:
        self.inner = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Stale(Faulty):
    """Takes the new version's number, not its weights."""

    async def load_weights(self, weights: Weights, version: int) -> None:
        if version == 0:
            await self.inner.load_weights(weights, version)
        elif isinstance(weights, Full):
            list(weights.tensors)
        self.inner.version = self.inner._versions[0] = version


class OtherTemperature(Faulty):
    """Samples hotter than it is told."""

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        return await self.inner.generate(prompt, replace(sampling, temperature=1.0))


class Truncating(Faulty):
    """Samples from the likeliest few only."""

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        return await self.inner.generate(prompt, replace(sampling, top_k=3))


class OffByOne(Faulty):
    """Says that it serves the version before."""

    async def load_weights(self, weights: Weights, version: int) -> None:
        await self.inner.load_weights(weights, version - 1)


class Changing(Faulty):
    """Changes what is sent on its way."""

    def change(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        raise NotImplementedError

    async def load_weights(self, weights: Weights, version: int) -> None:
        assert isinstance(weights, Full)
        stream = (pair for name, tensor in weights.tensors for pair in self.change(name, tensor))
        await self.inner.load_weights(Full(stream), version)


class Missing(Changing):
    """One tensor never arrives."""

    def change(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [] if name == "model.layers.1.self_attn.o_proj.weight" else [(name, tensor)]


class HalfSent(Changing):
    """Part of a fused module never arrives, and vLLM rebuilds the layer in memory that nobody has written to.

    That memory may by chance be a freed copy of the very weights that were sent, and then nothing is wrong. Torch's
    deterministic mode fills it with NaN, so that the fault is the same every time.
    """

    async def load_weights(self, weights: Weights, version: int) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            await super().load_weights(weights, version)
        finally:
            torch.use_deterministic_algorithms(False)


class WithoutK(HalfSent):
    """q and v arrive, k does not."""

    def change(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [] if "layers.0.self_attn.k_proj" in name else [(name, tensor)]


class WithoutUp(HalfSent):
    """gate arrives, up does not."""

    def change(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return [] if "layers.0.mlp.up_proj" in name else [(name, tensor)]


class Swapped(Changing):
    """gate and up change places: shapes and sums over the model are right."""

    def change(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        return [(next((name.replace(a, b) for a, b in swap.items() if a in name), name), tensor)]


class Corrupted(Changing):
    """One element of one tensor is off by a little."""

    def change(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor = tensor.clone()
            tensor[5, 7] += 1e-3
        return [(name, tensor)]


@contextmanager
def _kept_prefixes(engine: VllmEngine) -> Iterator[VllmEngine]:
    """The prefix cache says it forgets, and does not."""
    kept, engine._llm.reset_prefix_cache = engine._llm.reset_prefix_cache, lambda: True  # type: ignore[method-assign]
    try:
        yield engine
    finally:
        engine._llm.reset_prefix_cache = kept  # type: ignore[method-assign]
        engine._llm.reset_prefix_cache()


@contextmanager
def _stale_head(engine: VllmEngine) -> Iterator[VllmEngine]:
    """vLLM as it is: a reloaded embedding, and beside it the old packing of the head that is tied to it."""
    engine._pack_tied = lambda names: None  # type: ignore[method-assign]
    try:
        yield engine
    finally:
        del engine._pack_tied


class Uncast(Policy):
    """A policy that forgets the cast to the engine's dtype."""

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        kept, self.dtype = self.dtype, torch.float32
        try:
            yield from super().merged()
        finally:
            self.dtype = kept


@dataclass
class Setting:
    """What a fault needs: models by name, the pool of engines."""

    models: dict[str, Path]
    vllm: Vllm


@pytest.fixture
def setting(tiny_model: Path, tiny_tied_model: Path, biased_model: Path, other_base: Path, vllm: Vllm) -> Setting:
    return Setting(
        {"untied": tiny_model, "tied": tiny_tied_model, "biased": biased_model, "other base": other_base}, vllm
    )


Seen = tuple[bool, bool]


async def _second(policy: Policy, engine: Any, kind: str = "merged") -> Seen:
    """Version 0 and 1 with the fault in place from the start: whether accounting and behaviour see it at version 1."""
    sync = _sync(policy, engine, kind)
    try:
        for version in (0, 1):
            _move(policy, 0.1, version)
            marks = await sync.send(policy, version)
            wrong = await sync.account(marks, version)
            _, strange = await sync.behave(policy, version)
            await engine.forget()
            await engine.generate(LONG, Sampling(max_tokens=1))  # the run's own work, which fills the prefix cache
    finally:
        sync.close()
    return bool(wrong), bool(strange)


def _through(fault: type[Faulty]) -> Callable[[Setting], Coroutine[Any, Any, Seen]]:
    def plant(s: Setting) -> Coroutine[Any, Any, Seen]:
        return _second(_policy(s.models["untied"]), fault(s.vllm(s.models["untied"])))

    return plant


async def _in_context(policy: Policy, engine: VllmEngine, fault: Callable[[VllmEngine], Any]) -> Seen:
    with fault(engine):
        return await _second(policy, engine)


# What is planted, how, and whether accounting and behaviour see it. In an order that starts few engines.
FAULTS: dict[str, tuple[Callable[[Setting], Coroutine[Any, Any, Seen]], bool, bool]] = {
    "nothing": (_through(Faulty), False, False),
    "stale version: the load is ignored": (_through(Stale), True, True),
    "version stamp off by one": (_through(OffByOne), False, True),
    "one tensor missing": (_through(Missing), True, True),
    "half of a fused module: q and v without k": (_through(WithoutK), True, True),
    "half of a fused module: gate without up": (_through(WithoutUp), True, True),
    "gate and up swapped": (_through(Swapped), True, True),
    "one element off by 0.001": (_through(Corrupted), True, False),
    "another temperature in the engine": (_through(OtherTemperature), False, True),
    "top-k in the engine": (_through(Truncating), False, True),
    "prefix cache not reset": (
        lambda s: _in_context(_policy(s.models["untied"]), s.vllm(s.models["untied"]), _kept_prefixes),
        True,
        False,
    ),
    "tied head left as it was packed": (
        lambda s: _in_context(_policy(s.models["tied"], None), s.vllm(s.models["tied"]), _stale_head),
        True,
        True,
    ),
    "cast to the engine's dtype forgotten": (
        lambda s: _second(
            Uncast(s.models["untied"], ALL_LINEAR, "cpu", "bfloat16"), s.vllm(s.models["untied"], torch.bfloat16)
        ),
        True,
        False,
    ),
    "adapter, nothing": (
        lambda s: _second(_policy(s.models["untied"]), s.vllm(s.models["untied"], lora_rank=4), "adapter"),
        False,
        False,
    ),
    "adapter: stale version": (
        lambda s: _second(_policy(s.models["untied"]), Stale(s.vllm(s.models["untied"], lora_rank=4)), "adapter"),
        True,
        True,
    ),
    "adapter over the wrong base": (
        lambda s: _second(_policy(s.models["untied"]), s.vllm(s.models["other base"], lora_rank=4), "adapter"),
        False,
        True,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_proof_sees_what_it_should(fault: str, setting: Setting) -> None:
    plant, accounting, behaviour = FAULTS[fault]
    seen = asyncio.run(plant(setting))
    print(f"{fault}: accounting {seen[0]}, behaviour {seen[1]}")
    assert seen == (accounting, behaviour)


def test_the_table_in_the_docs_is_the_measured_one() -> None:
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in DOCS.read_text().splitlines()]
    said = {row[0]: (row[1], row[2]) for row in rows if len(row) == 3 and {row[1], row[2]} <= {"sees it", "-"}}
    words = {True: "sees it", False: "-"}
    assert said == {name: (words[a], words[b]) for name, (_, a, b) in FAULTS.items() if not name.endswith("nothing")}


def test_a_failed_proof_stops_the_run_and_names_causes(setting: Setting) -> None:
    def failure(fault: type[Faulty]) -> str:
        policy = _policy(setting.models["untied"])
        sync = _sync(policy, fault(setting.vllm(setting.models["untied"])))
        for version in (0, 1):
            _move(policy, 0.1, version)
            try:
                asyncio.run(sync(policy, version))
            except RunError as stopped:
                return str(stopped)
        return "nothing was noticed"

    lost = failure(WithoutK)
    assert "the weights of version 0 did not arrive" in lost
    assert "model.layers.0.self_attn.k_proj.weight: it holds values that are not finite" in lost
    assert "got part of a fused layer" in lost
    stale = failure(Stale)
    assert "version 1" in stale
    assert "still serves an older version" in stale
    assert "... and 9 more" in stale
    hot = failure(OtherTemperature)
    assert "Every weight is right, so likely: another temperature" in hot
    assert "engine answered with version -1, not 0" in failure(OffByOne)


HEALTHY: dict[str, tuple[str, dict[str, Any] | None, str, str]] = {
    "LoRA on every linear layer": ("untied", ALL_LINEAR, "merged", "float32"),
    "LoRA on q and v only (trap 41)": ("untied", Q_AND_V, "merged", "float32"),
    "full fine-tuning": ("untied", None, "merged", "float32"),
    "LoRA on the head": ("untied", Q_AND_V | {"target_modules": ["v_proj", "lm_head"]}, "merged", "float32"),
    "full fine-tuning, tied": ("tied", None, "merged", "float32"),
    "LoRA, tied": ("tied", ALL_LINEAR, "merged", "float32"),
    "LoRA on q and v, with biases": ("biased", Q_AND_V, "merged", "float32"),
    "full fine-tuning, with biases": ("biased", None, "merged", "float32"),
    "LoRA, bfloat16": ("untied", ALL_LINEAR, "merged", "bfloat16"),
    "full fine-tuning, bfloat16": ("untied", None, "merged", "bfloat16"),
    "adapter": ("untied", ALL_LINEAR, "adapter", "float32"),
    "adapter on q and v only": ("untied", Q_AND_V, "adapter", "float32"),
}
UPDATES = 20


@pytest.mark.slow
@pytest.mark.parametrize("case", HEALTHY)
def test_healthy_syncs_never_alarm(case: str, setting: Setting) -> None:
    """Twenty random updates, small and large; the base stays what it was to the bit (trap 20)."""
    name, adapter, kind, dtype = HEALTHY[case]
    model = setting.models[name]
    policy = _policy(model, adapter, dtype)
    engine = setting.vllm(model, policy.dtype, lora_rank=4 if kind == "adapter" else 0)
    sync = _sync(policy, engine, kind)
    before = {n: m for n, m in fingerprint(policy.model).items() if adapter and "lora_" not in n}
    try:
        for version in range(UPDATES):
            _move(policy, (0.001, 0.02)[version % 2], version)
            report = asyncio.run(sync(policy, version))
            assert report.version == version
            assert engine.version == version
            assert report.gap < (1e-4 if dtype == "float32" else 0.25)
    finally:
        sync.close()
    after = fingerprint(policy.model)
    assert before == {n: after[n] for n in before}


OTHER_ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": ALL_LINEAR | {"use_dora": True},
    "rslora, ranks by pattern": ALL_LINEAR | {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "pissa": ALL_LINEAR | {"init_lora_weights": "pissa"},
    "loha": {"type": "loha", "r": 4, "target_modules": ["q_proj", "up_proj"]},
    "lokr": {"type": "lokr", "r": 4, "target_modules": ["k_proj", "down_proj"]},
    "oft": {"type": "oft", "oft_block_size": 4, "r": 0, "target_modules": ["q_proj", "o_proj"]},
    "ia3": {"type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "vera": {"type": "vera", "r": 4, "target_modules": ["q_proj", "o_proj"]},
    "adalora": {"type": "adalora", "total_step": 100, "target_modules": ["q_proj", "v_proj"]},
    "modules_to_save": Q_AND_V | {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_merged_serves_what_peft_can_merge(kind: str, setting: Setting) -> None:
    policy = _policy(setting.models["untied"], OTHER_ADAPTERS[kind])
    sync = _sync(policy, setting.vllm(setting.models["untied"]))
    for version in range(3):
        _move(policy, 0.05, version)
        assert asyncio.run(sync(policy, version)).gap < 1e-4


def test_trap_22_every_version_has_an_id_a_name_and_a_path_of_its_own(setting: Setting) -> None:
    """The canary: its log-probs are the learner's (the sync proves it), and those of no version before."""
    model = setting.models["untied"]
    policy = _policy(model)
    engine = setting.vllm(model, lora_rank=4)
    sync = _sync(policy, engine, "adapter")
    served, drawn = [], []
    try:
        for version in range(4):
            _move(policy, 0.2, version)
            asyncio.run(sync(policy, version))
            served.append(engine._adapters[0])
            assert sync._scratch is not None
            assert (sync._scratch.path / "adapter_model.safetensors").is_file()
            drawn.append(asyncio.run(engine.generate(LONG, Sampling(0.0, 8))).logprobs)
        for field in ("lora_int_id", "lora_name", "lora_path"):
            assert len({getattr(request, field) for request in served}) == 4
        assert all(abs(a[0] - b[0]) > 1e-3 for i, a in enumerate(drawn) for b in drawn[:i])
        assert engine._llm.list_loras() == {served[-1].lora_int_id}, "old adapters are gone"
        assert not any(Path(request.lora_path).exists() for request in served[:-1]), "and so are their folders"
    finally:
        sync.close()
    assert not Path(served[-1].lora_path).exists()


def test_a_load_that_fails_leaves_no_folder_behind(setting: Setting) -> None:
    class Full(Faulty):
        """Takes one adapter and has no room for the next."""

        async def load_weights(self, weights: Weights, version: int) -> None:
            if version:
                raise RunError("no room")
            await self.inner.load_weights(weights, version)

    policy = _policy(setting.models["untied"])
    sync = _sync(policy, Full(setting.vllm(setting.models["untied"], lora_rank=4)), "adapter")
    made = []
    for version in (0, 1):
        with suppress(RunError):
            asyncio.run(sync.send(policy, version))
        made.append(sync._scratch and sync._scratch.path)
    assert len(set(made)) == 2
    sync.close()
    assert not any(folder is None or folder.exists() for folder in made)


def test_an_adapter_of_mixed_ranks(setting: Setting) -> None:
    """vLLM pads to the largest rank; the accounting pads too."""
    mixed = ALL_LINEAR | {"rank_pattern": {"q_proj": 2, "gate_proj": 3}, "alpha_pattern": {"down_proj": 32}}
    policy = _policy(setting.models["untied"], mixed)
    assert adapter_rank(policy) == 4
    sync = _sync(policy, setting.vllm(setting.models["untied"], lora_rank=4), "adapter")
    try:
        for version in range(2):
            _move(policy, 0.2, version)
            assert asyncio.run(sync(policy, version)).gap < 1e-4
    finally:
        sync.close()


def test_trap_24_every_trained_tensor_has_a_receiver(setting: Setting) -> None:
    model = setting.models["untied"]
    engine = setting.vllm(model)
    for adapter in (ALL_LINEAR, Q_AND_V, None):
        policy = _policy(model, adapter)
        marks = asyncio.run(_sync(policy, engine).send(policy, 0))
        assert set(policy.targets()) <= set(marks)
        found = asyncio.run(engine.read_back(list(marks), 0))
        assert set(found) == set(marks)
    policy = _policy(model, Q_AND_V)
    assert set(asyncio.run(_sync(policy, engine).send(policy, 0))) == {
        f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qkv"
    }, "k was not trained, and is sent with q and v"
    biased = setting.models["biased"]
    policy = _policy(biased, Q_AND_V)
    assert set(asyncio.run(_sync(policy, setting.vllm(biased)).send(policy, 0))) == {
        f"model.layers.{i}.self_attn.{part}_proj.{leaf}"
        for i in (0, 1)
        for part in "qkv"
        for leaf in ("weight", "bias")
    }


def test_trained_parameters_without_a_receiver_are_refused(setting: Setting) -> None:
    class Deaf(Faulty):
        """Knows no head."""

        async def units(self, names: Sequence[str]) -> dict[str, str]:
            return await self.inner.units([name for name in names if "lm_head" not in name])

    policy = _policy(setting.models["untied"], None)
    sync = _sync(policy, Deaf(setting.vllm(setting.models["untied"])))
    with pytest.raises(InputError, match=r"1 trained parameters have no receiver in the engine, e.g. lm_head.weight"):
        asyncio.run(sync(policy, 0))


def test_the_local_engine_syncs_too(tiny_tied_model: Path) -> None:
    policy = _policy(tiny_tied_model, None)
    sync = _sync(policy, LocalEngine(tiny_tied_model, torch.float32, torch.device("cpu")))
    for version in range(3):
        _move(policy, 0.05, version)
        assert asyncio.run(sync(policy, version)).gap < 1e-4


def test_an_update_too_small_for_the_logprobs_is_seen_by_accounting(setting: Setting) -> None:
    """Behaviour is blind to a late step of training at a low learning rate; accounting judges whether weights moved."""

    policy = _policy(setting.models["untied"])
    sync = _sync(policy, Stale(setting.vllm(setting.models["untied"])))

    async def play() -> Seen:
        _move(policy, 0.1, 0)
        await sync.send(policy, 0)
        _move(policy, 1e-6, 1)
        marks = await sync.send(policy, 1)
        return bool(await sync.account(marks, 1)), bool((await sync.behave(policy, 1))[1])

    assert asyncio.run(play()) == (True, False)


class TestMark:
    def test_an_equal_tensor_passes_and_each_kind_of_difference_is_named(self) -> None:
        torch.manual_seed(0)
        sent = torch.randn(6, 50)
        mark = Mark.of(sent, 3)
        assert mark.differs(digest(sent.clone(), 3)) is None
        assert "its digest has the shape (5, 5)" in str(mark.differs(digest(sent[:5], 3)))
        assert "not finite" in str(mark.differs(digest(sent / 0, 3)))
        assert mark.differs(digest(sent.roll(1, 0), 3)) == "6 of 6 rows are not the ones sent"
        assert mark.differs(digest(sent + 1e-7, 3)) == "6 of 6 rows are not the ones sent"

    def test_a_column_outside_the_exact_ones_is_covered_by_the_product(self) -> None:
        torch.manual_seed(0)
        sent = torch.randn(6, 50)
        exact = set(digest(torch.eye(50), 3)[:, :COLUMNS].argmax(0).tolist())
        other = sent.clone()
        other[2, next(i for i in range(50) if i not in exact)] += 1e-3
        assert Mark.of(sent, 3).differs(digest(other, 3)) == "1 of 6 rows do not add up to what was sent"

    def test_rounding_passes(self) -> None:
        """A kernel sums in another order, and rounds once in half precision."""
        torch.manual_seed(0)
        for dtype in (torch.float32, torch.bfloat16):
            sent = torch.randn(64, 2000).to(dtype)
            mark = Mark.of(sent, 3)
            kernel = digest(sent, 3)
            kernel[:, COLUMNS] = (sent.flip(1).double() @ _signs(2000, 3).flip(0)).to(dtype).float()
            assert mark.differs(kernel) is None

    def test_every_copy_counts(self) -> None:
        sent = torch.arange(12.0).reshape(3, 4)
        good, bad = digest(sent, 3), digest(sent + 1, 3)
        assert Mark.of(sent, 3).differs(torch.cat([good, good])) is None
        assert str(Mark.of(sent, 3).differs(torch.cat([good, bad]))).startswith("copy 2: 3 of 3 rows")

    def test_vectors_are_compared_whole(self) -> None:
        sent = torch.tensor([1.0, 2.0])
        assert Mark.of(sent, 0).differs(digest(sent, 0)) is None
        assert (
            Mark.of(sent, 0).differs(digest(torch.tensor([1.0, 2.0000002]), 0)) == "1 of 2 rows are not the ones sent"
        )


def _signs(width: int, seed: int) -> Tensor:
    return digest(torch.eye(width), seed)[:, COLUMNS].double()


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (None, "there is no adapter"),
        (ALL_LINEAR | {"use_dora": True}, "vLLM does not load DoRA"),
        (ALL_LINEAR | {"bias": "all"}, "vLLM does not load adapters with biases or modules_to_save"),
        (ALL_LINEAR | {"modules_to_save": ["lm_head"]}, "vLLM does not load adapters with biases or modules_to_save"),
        (ALL_LINEAR | {"target_modules": ["q_proj", "embed_tokens"]}, "no proof covers an adapted embedding"),
        (ALL_LINEAR | {"init_lora_weights": "pissa"}, "this adapter's init changed the base"),
        ({"type": "ia3", "target_modules": ["k_proj"], "feedforward_modules": []}, "vLLM hot-loads LoRA only, not ia3"),
    ],
)
def test_adapters_that_cannot_be_hot_loaded(adapter: dict[str, Any] | None, reason: str, tiny_model: Path) -> None:
    """Trap 42: PiSSA is refused for what it did to the base, not for its name."""
    policy = _policy(tiny_model, adapter)
    with pytest.raises(InputError, match=rf"^sync.type: adapter is not possible: {reason}.*Use sync: {{type: merged}}"):
        refuse_hot_loading(policy)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_an_adapter_without_effect_says_what_the_base_says(
    targets: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    policy = _policy(tiny_model, ALL_LINEAR | {"target_modules": targets})
    _move(policy, 0.3, seed=1)
    policy.save_adapter(tmp_path)
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad(), policy.reference() as base:
        before = base(input_ids=tokens).logits
    with without_effect(tmp_path) as empty:
        policy.model.load_adapter(str(empty), adapter_name="none")
    policy.model.set_adapter("none")
    with torch.no_grad():
        assert torch.equal(policy.model(input_ids=tokens).logits, before)


def test_a_plain_lora_may_be_hot_loaded(tiny_model: Path) -> None:
    refuse_hot_loading(_policy(tiny_model))


@pytest.mark.slow
def test_the_default_model(vllm: Vllm) -> None:
    """One real model: rounding over 30 layers and 49152 tokens stays within a fiftieth of the tolerance."""
    model = locate(DEFAULT)
    policy = _policy(model, ALL_LINEAR | {"r": 16})
    sync = _sync(policy, vllm(model), temperature=1.0)
    gaps = []
    for version in range(3):
        _move(policy, 0.01, version)
        gaps.append(asyncio.run(sync(policy, version)).gap)
    assert max(gaps) < 1e-4
