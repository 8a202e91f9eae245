"""The parity gate: seven faults are planted between real engines and the learner, and each is called by its name."""

from __future__ import annotations

import asyncio
import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlft.agents import Seat
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.batch import Batch
from rlft.case import Case
from rlft.causes import diagnose
from rlft.chat import Chat
from rlft.config import Config
from rlft.engine.base import Full, Weights
from rlft.engine.local import LocalEngine
from rlft.engine.restart import Restarting
from rlft.engine.vllm import VllmEngine
from rlft.engine.worker import in_worker
from rlft.learner import Learner, Schedule
from rlft.parity import Bounds, Figures, Gate, Mismatch, bounds_of, gaps
from rlft.policy import Policy
from rlft.session import begin, resume
from rlft.settings import validate
from rlft.sync import Sync
from rlft.terminal import Terminal
from rlft.types import NAN, Completion, Group, RunError, Sample, Sampling, Task, Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
HOW = Sampling(temperature=0.7, max_tokens=12)
QUESTIONS = ["What is 12 + 34? Say it slowly.", "Count from four to seven and tell me what comes after."]
POLICY_GRADIENT = TypeAdapter(AlgorithmConfig).validate_python({"type": "grpo"}).build()


@pytest.fixture(scope="module")
def padded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 20 rows of vocabulary that its tokenizer knows nothing of, and that have probability."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(320)
        torch.nn.init.normal_(model.lm_head.weight.data[300:], std=0.2)
    model.save_pretrained(folder)
    return folder


Engines = Callable[..., Any]


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """engines(kind, model, dtype): a real engine with the weights on disk; one of each is kept."""
    made: dict[tuple[str, Path, torch.dtype], Any] = {}

    def engine(kind: str, model: Path, dtype: torch.dtype = torch.float32) -> Any:
        if (kind, model, dtype) not in made:
            here = VllmEngine(model, dtype, 256, 16, cache_gb=0.05) if kind == "vllm" else None
            made[kind, model, dtype] = here or LocalEngine(model, dtype, torch.device("cpu"))
        found = made[kind, model, dtype]
        asyncio.run(found.load_weights(Full(load_file(model / "model.safetensors").items()), -1))
        return found

    yield engine
    for engine_ in made.values():
        asyncio.run(engine_.close())


class Faulty:
    """A real engine with a fault planted before it. Everything else is passed on."""

    def __init__(self, engine: Any) -> None:
        self.inner = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass
class Scene:
    """A learner with a gate, an engine, and the conversations that are sampled."""

    learner: Learner
    engine: Any
    chat: Chat

    async def sample(self, version: int, tasks: int = 2, size: int = 4, tokens: int = HOW.max_tokens) -> list[Group]:
        """Groups whose scores differ, so that every row teaches something."""
        groups = []
        for t in range(tasks):
            messages = ({"role": "user", "content": QUESTIONS[t % len(QUESTIONS)]},)
            prompt = self.chat.prompt(messages)
            seeds = [version * 1000 + t * 10 + i for i in range(size)]
            how = [replace(HOW, seed=seed, max_tokens=tokens) for seed in seeds]
            answers = await asyncio.gather(*(self.engine.generate(prompt, one) for one in how))
            group = []
            for i, answer in enumerate(answers):
                n, m = len(prompt), len(answer.tokens)
                logprobs = [NAN] * n + answer.logprobs
                sample = Sample(prompt + answer.tokens, [False] * n + [True] * m, logprobs, [0.0] * (n + m), version)
                said = (*messages, {"role": "assistant", "content": self.chat.decode(answer.tokens)})
                group.append(Trajectory(Task(str(t), messages), said, [sample], score=float(i % 2)))
            groups.append(tuple(group))
        return groups

    async def send(self, version: int) -> None:
        """The weights, unproved."""
        policy = self.learner.policy
        await Sync(policy, self.engine, self.learner, "merged", [[5, 6]], HOW).send(policy, version)

    async def explained(self, found: Mismatch, groups: list[Group]) -> str:
        """The diagnosis."""
        return await diagnose(found, self.case(found, groups))

    def case(self, found: Mismatch, groups: list[Group]) -> Case:
        ways = {"no template": Chat(self.learner.policy.path, "none")}
        more = {"engine": self.engine, "sampling": HOW, "chat": self.chat, "chats": lambda: ways}
        return Case.of(found, self.learner, groups=groups, **more)


def scene(model: Path, engine: Any, adapter: Any = LORA, dtype: str = "float32", check: Any = "stop") -> Scene:
    policy = Policy(model, adapter, device="cpu", dtype=dtype)
    learner = Learner(policy, Schedule(lr=3e-3, steps=200), HOW.temperature, dropout=False)
    learner.gate = Gate(bounds_of(policy.dtype), check)
    return Scene(learner, engine, Chat(model))


def shake(policy: Policy, scale: float = 0.1) -> None:
    """A random step on everything that is trained: an adapter begins with no effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(torch.randn(p.shape, generator=generator) * scale)


Fault = Callable[[Any], AbstractContextManager[Any]]


async def diagnosed(stage: Scene, fault: Fault) -> str:
    """A healthy step, then one whose rollout has the fault: what the run would stop with, having learned nothing."""
    learner, policy = stage.learner, stage.learner.policy
    shake(policy)
    await stage.send(0)
    learner.update(Batch.of(await stage.sample(0)), POLICY_GRADIENT)
    shake(policy)
    healthy = stage.engine
    with fault(healthy) as stage.engine:
        await stage.send(1)
        groups = await stage.sample(1)
        before = {name: p.detach().clone() for name, p in learner.trained().items()}
        with pytest.raises(Mismatch) as stopped:
            learner.update(Batch.of(groups), POLICY_GRADIENT)
        text = await stage.explained(stopped.value, groups)
    for name, p in learner.trained().items():
        assert torch.equal(p, before[name]), "nothing is learned from wrong log-probs"
        assert p.grad is None
    return text


def sampling(**changes: Any) -> Fault:
    """The engine samples otherwise than it is told."""

    class Other(Faulty):
        async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
            return await self.inner.generate(prompt, replace(sampling, **changes))

    return lambda engine: nullcontext(Other(engine))


def shown(change: Callable[[list[int]], list[int]]) -> Fault:
    """The engine is shown another prompt."""

    class Other(Faulty):
        async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
            return await self.inner.generate(change(list(prompt)), sampling)

    return lambda engine: nullcontext(Other(engine))


def stale(engine: Any) -> AbstractContextManager[Any]:
    """Takes the new version's number, not its weights."""

    class Stale(Faulty):
        async def load_weights(self, weights: Weights, version: int) -> None:
            assert isinstance(weights, Full)
            list(weights.tensors)
            self.inner.version = version

    return nullcontext(Stale(engine))


def of_the_base(model: Path) -> Fault:
    """Every version is the base."""

    class Base(Faulty):
        async def load_weights(self, weights: Weights, version: int) -> None:
            await self.inner.load_weights(Full(load_file(model / "model.safetensors").items()), version)

    return lambda engine: nullcontext(Base(engine))


@contextmanager
def raw(engine: VllmEngine) -> Iterator[VllmEngine]:
    """vLLM's own default: log-probs before temperature."""
    sampler = engine._runner.sampler
    for part in (sampler, sampler.topk_topp_sampler):
        part.logprobs_mode = "raw_logprobs"
    try:
        yield engine
    finally:
        for part in (sampler, sampler.topk_topp_sampler):
            part.logprobs_mode = "processed_logprobs"


def kept_prefixes(engine: VllmEngine) -> AbstractContextManager[Any]:
    """New weights leave the prefix cache as it was; only who asks for an empty one gets it."""

    class Keeping(Faulty):
        async def load_weights(self, weights: Weights, version: int) -> None:
            reset, engine._llm.reset_prefix_cache = engine._llm.reset_prefix_cache, lambda: True  # type: ignore
            try:
                await self.inner.load_weights(weights, version)
            finally:
                engine._llm.reset_prefix_cache = reset  # type: ignore[method-assign]

    return nullcontext(Keeping(engine))


@contextmanager
def without_padding(engine: LocalEngine) -> Iterator[LocalEngine]:
    """Only ids that the tokenizer knows are ever sampled."""

    def cut(_: Any, __: Any, out: Any) -> Any:
        out.logits[..., 300:] = -math.inf
        return out

    hook = engine._model.register_forward_hook(cut)
    try:
        yield engine
    finally:
        hook.remove()


def plain(prompt: list[int], model: Path) -> list[int]:
    """The prompt without its template."""
    text = Chat(model).tokenizer.decode(prompt)
    body = text.partition("user\n")[2].partition("<|im_end|>")[0]
    return Chat(model, "none").encode(body)


# What is planted, and the cause that must be named. The engines take their faults in turn.
FAULTS: dict[str, tuple[str, Fault, str]] = {
    "hotter": ("local", sampling(temperature=1.0), "temperature"),
    "colder": ("local", sampling(temperature=0.5), "temperature"),
    "hotter, vLLM": ("vllm", sampling(temperature=1.0), "temperature"),
    "log-probs before temperature, vLLM": ("vllm", raw, "temperature"),
    "top-k": ("local", sampling(top_k=5), "truncated distribution"),
    "top-p": ("local", sampling(top_p=0.8), "truncated distribution"),
    "min-p": ("local", sampling(min_p=0.1), "truncated distribution"),
    "top-k, vLLM": ("vllm", sampling(top_k=5), "truncated distribution"),
    "top-p, vLLM": ("vllm", sampling(top_p=0.8), "truncated distribution"),
    "stale weights": ("local", stale, "adapter version"),
    "stale weights, vLLM": ("vllm", stale, "adapter version"),
    "a token put before": ("local", shown(lambda ids: [2, *ids]), "prompt tokens"),
    "the first token doubled, vLLM": ("vllm", shown(lambda ids: [ids[0], *ids]), "prompt tokens"),
    "the first token lost": ("local", shown(lambda ids: ids[1:]), "prompt tokens"),
    "prefixes of older weights, vLLM": ("vllm", kept_prefixes, "prefix cache"),
}


@pytest.mark.parametrize("planted", FAULTS)
def test_a_planted_fault_is_called_by_its_name(planted: str, tiny_model: Path, engines: Engines) -> None:
    kind, fault, cause = FAULTS[planted]
    text = asyncio.run(diagnosed(scene(tiny_model, engines(kind, tiny_model)), fault))
    assert f"Cause: {cause}." in text, text


@pytest.mark.parametrize("kind", ["local", "vllm"])
def test_an_engine_of_another_dtype_is_called_by_its_name(kind: str, tiny_model: Path, engines: Engines) -> None:
    other = engines(kind, tiny_model, torch.bfloat16)
    text = asyncio.run(diagnosed(scene(tiny_model, engines("local", tiny_model)), lambda _: nullcontext(other)))
    assert "Cause: dtype." in text, text


def test_the_dtype_of_an_engine_is_known_through_what_stands_before_it(tiny_model: Path, engines: Engines) -> None:
    inner = engines("local", tiny_model, torch.bfloat16)
    assert Seat(Restarting(lambda: inner, 1, print), 0).dtype == torch.bfloat16
    worker = in_worker(LocalEngine, model=tiny_model, dtype=torch.bfloat16, device=torch.device("cpu"))
    try:
        assert worker.dtype == torch.bfloat16
    finally:
        asyncio.run(worker.close())


def test_an_adapter_that_never_arrives(tiny_model: Path, engines: Engines) -> None:
    stage = scene(tiny_model, engines("local", tiny_model))
    text = asyncio.run(diagnosed(stage, of_the_base(tiny_model)))
    assert "Cause: adapter version. The engine serves the base model without the adapter." in text, text


def test_another_template(tiny_model: Path, engines: Engines) -> None:
    stage = scene(tiny_model, engines("local", tiny_model))
    text = asyncio.run(diagnosed(stage, shown(lambda ids: plain(ids, tiny_model))))
    assert "Cause: prompt tokens. The engine was shown the prompt rendered by no template." in text, text


def test_a_padded_vocabulary(padded_model: Path, engines: Engines) -> None:
    text = asyncio.run(diagnosed(scene(padded_model, engines("local", padded_model)), without_padding))
    assert "Cause: padded vocabulary." in text, text


def test_the_four_figures_by_hand() -> None:
    gap = torch.tensor([0.3, -0.1, 0.0, 0.05])
    found = Figures.of(gap, Bounds(max=0.2, mean=0.02, kl=0.1))
    assert (found.max, found.mean) == pytest.approx((0.3, 0.1125))
    parts = (math.exp(-0.3) - 1 + 0.3, math.exp(0.1) - 1 - 0.1, 0.0, math.exp(-0.05) - 1 + 0.05)
    assert found.kl == pytest.approx(sum(parts) / 4, rel=1e-5)
    assert found.outliers == 0.25  # above 10 times the mean's bound
    over = found.over(Bounds(max=0.2, mean=0.02, kl=0.1))
    assert [line.split()[0] for line in over] == ["mean", "max"]  # one token in a few is no share of outliers
    assert Figures(math.nan, math.nan, math.nan, 1.0, 4).over(Bounds(1.0, 1.0, 1.0)), "what is no number is no parity"


def rows(gap: float, version: int = 0, seen: int = 4) -> Batch:
    """Two answers of four tokens, of which the first `seen` have log-probs, all of them wrong by `gap`."""
    group = []
    for score in (0.0, 1.0):
        logprobs = [NAN, NAN, *[-5.0 - gap] * seen, *[NAN] * (4 - seen)]
        mask = [False, False, True, True, True, True]
        sample = Sample([5, 6, 7, 8, 9, 10], mask, logprobs, [0.0] * 6, version)
        group.append(Trajectory(Task("t", ()), (), [sample], score=score))
    return Batch.of([tuple(group)])


def test_what_is_due_and_what_is_not(tiny_model: Path) -> None:
    """The first step with log-probs of this version is always held, then every so many."""
    learner = Learner(Policy(tiny_model, LORA, device="cpu"), Schedule(lr=1e-4, steps=20))
    learner.gate = Gate(bounds_of(torch.float32), "stop", every=2)
    update = learner.update
    wrong = rows(1.0)
    assert "parity/kl" not in update(rows(1.0, seen=0), POLICY_GRADIENT), "nobody sampled them"
    older = update(wrong, POLICY_GRADIENT)
    assert older["parity/stale_logprob_mean"] > 1, "of an older version: the weights moved on"
    assert "parity/outliers" not in older

    def current(right: bool) -> Batch:
        version = learner.scheduler.last_epoch
        batch = rows(1.0, version)
        return batch.with_(logprobs=learner.logprobs(batch)) if right else batch

    with pytest.raises(Mismatch, match="over 8 tokens"):
        update(current(right=False), POLICY_GRADIENT)
    update(current(right=True), POLICY_GRADIENT)
    assert update(current(right=False), POLICY_GRADIENT)["parity/logprob_mean"] > 1, "not due"
    with pytest.raises(Mismatch):
        update(current(right=False), POLICY_GRADIENT)
    learner.gate = Gate(bounds_of(torch.float32, mean=99.0, max=99.0, kl=1e9), "stop")
    update(current(right=False), POLICY_GRADIENT)  # the config's own bounds


def test_a_head_alone_has_no_parity(tiny_model: Path) -> None:
    algorithm = TypeAdapter(AlgorithmConfig).validate_python({"type": "reward_model"}).build()
    policy = Policy(tiny_model, LORA, device="cpu")
    learner = Learner(policy, Schedule(lr=1e-4, steps=20), owned=algorithm.owned)
    learner.gate = Gate(bounds_of(torch.float32), "stop")
    assert not any(name.startswith("parity") for name in learner.update(rows(1.0), algorithm))
    assert gaps(None, rows(1.0), None, bounds_of(torch.float32)) == {}  # type: ignore[arg-type]


def test_nothing_known_explains_it(tiny_model: Path, engines: Engines) -> None:
    """Noise on what the engine reports is none of the seven, and is not taken for one."""

    class Noisy(Faulty):
        async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
            found = await self.inner.generate(prompt, sampling)
            draw = torch.Generator().manual_seed(sampling.seed or 0)
            noise = torch.randn(len(found.tokens), generator=draw) * 0.1
            return replace(found, logprobs=[a + float(b) for a, b in zip(found.logprobs, noise, strict=True)])

    stage = scene(tiny_model, engines("local", tiny_model))
    text = asyncio.run(diagnosed(stage, lambda engine: nullcontext(Noisy(engine))))
    assert "None of the known causes explains it" in text, text


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("local", "float32"), ("local", "bfloat16"), ("vllm", "float32")])
def test_no_false_alarm_in_200_steps(kind: str, dtype: str, tiny_model: Path, engines: Engines) -> None:
    stage = scene(tiny_model, engines(kind, tiny_model, getattr(torch, dtype)), dtype=dtype)
    learner, seen = stage.learner, []
    probe = Batch.of(asyncio.run(stage.sample(0)))
    start = learner.logprobs(probe)

    async def run() -> None:
        for version in range(200):
            await stage.send(version)
            batch = Batch.of(await stage.sample(version, size=2, tokens=6))
            seen.append(learner.update(batch, POLICY_GRADIENT)["parity/logprob_mean"])

    asyncio.run(run())
    assert len(seen) == 200
    assert float((learner.logprobs(probe) - start).abs().nanmean()) > 0.3, "the weights really move"


# --- whole runs -------------------------------------------------------------------------------------------------------


def toy(folder: Path, model: Path, **parity: Any) -> Config:
    """A run of three steps that scores by chance."""
    folder.mkdir()
    (folder / "judge.py").write_text("def low(t):\n    return sum(map(ord, t.completion)) % 7 / 7\n")
    tasks = [{"prompt": f"{question} {i}"} for i, question in enumerate(QUESTIONS * 2)]
    (folder / "train.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return validate({
        "name": "toy", "steps": 3, "out": str(folder / "run"), "model": {"path": str(model), "device": "cpu"},
        "adapter": LORA, "data": {"train": str(folder / "train.jsonl")},
        "reward": {"type": "custom", "path": "judge:low"}, "show": {"every": 0}, "learner": {"lr": 1e-3},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 4, "sampling": {"max_tokens": 8}},
        "algorithm": {"type": "grpo"}, "checkpoint": {"every": 1}, "parity": parity,
    })  # fmt: skip


@pytest.fixture
def hot_after_proofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """From the version in the list on, an engine that samples hotter than it is told, except in a sync's proof."""
    since = [0]
    inner = LocalEngine.generate

    async def generate(self: LocalEngine, prompt: Sequence[int], sampling: Sampling) -> Completion:
        hot = sampling.max_tokens > 2 and self.version >= since[0]
        return await inner(self, prompt, replace(sampling, temperature=1.6) if hot else sampling)

    monkeypatch.setattr(LocalEngine, "generate", generate)
    monkeypatch.syspath_prepend(tmp_path / "toy")
    yield since
    sys.modules.pop("judge", None)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "toy" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_run_stops_before_it_learns_from_the_wrong_policy(
    tiny_model: Path, tmp_path: Path, hot_after_proofs: list[int]
) -> None:
    hot_after_proofs[0] = 1
    config = toy(tmp_path / "toy", tiny_model)
    with pytest.raises(RunError) as stopped:
        begin(config, Terminal(Console(quiet=True)))
    text = str(stopped.value)
    assert "Cause: temperature. The engine's log-probs are those of temperature 1.6, the learner's of 1." in text
    assert "rollout.sampling.temperature" in text
    assert [row["step"] for row in steps_of(tmp_path)] == [1], "the healthy step is kept, the other one was not taken"
    assert (tmp_path / "toy/run/checkpoints/step-000001").is_dir()
    assert steps_of(tmp_path)[0]["parity/outliers"] == 0.0
    assert 0 <= steps_of(tmp_path)[0]["parity/kl"] < 1e-6


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_that_is_resumed_with_other_epochs_is_held_all_the_same(
    tiny_model: Path, tmp_path: Path, hot_after_proofs: list[int], before: int, after: int
) -> None:
    """The learner knows its version, however many optimizer steps each update took."""
    hot_after_proofs[0] = 3
    config = toy(tmp_path / "toy", tiny_model)
    learner = config.learner.model_copy(update={"epochs": before})
    assert begin(config.model_copy(update={"learner": learner}), Terminal(Console(quiet=True))) == 0
    with pytest.raises(RunError, match="Cause: temperature"):
        resume(tmp_path / "toy/run", ["steps=5", f"learner.epochs={after}"], Terminal(Console(quiet=True)))
    assert [row["step"] for row in steps_of(tmp_path)] == [1, 2, 3]


def test_a_run_that_only_warns_learns_as_one_that_does_not_look(
    tiny_model: Path, tmp_path: Path, hot_after_proofs: list[int]
) -> None:
    found, said = [], []
    for check in ("warn", "off"):
        shutil.rmtree(tmp_path / "toy", ignore_errors=True)
        config = toy(tmp_path / "toy", tiny_model, check=check)
        out = io.StringIO()
        assert begin(config, Terminal(Console(file=out, width=400))) == 0
        said.append(out.getvalue().count("Cause: temperature."))
        assert [row["parity/logprob_mean"] > 0.05 for row in steps_of(tmp_path)] == [True] * 3
        found.append(load_file(tmp_path / "toy/run/checkpoints/step-000003/trained.safetensors"))
    assert said == [1, 0], "once, not at every step"
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())
