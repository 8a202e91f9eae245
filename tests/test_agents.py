"""Several agents on one base: each learns as if it were alone, and speaks with its own weights."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.toy import _learn
from rlft.after import evaluate, export
from rlft.agents import Agents, Syncs, together
from rlft.algorithms.base import Algorithm
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.algorithms.gae import gae
from rlft.batch import Batch
from rlft.build import assemble
from rlft.chat import Chat
from rlft.checkpoint import of_agent
from rlft.engine.base import Engine, Weights
from rlft.engine.local import LocalEngine
from rlft.engine.vllm import VllmEngine
from rlft.engine.worker import in_worker
from rlft.envs.base import Action
from rlft.learner import Learner, Schedule
from rlft.material import material
from rlft.plan import describe
from rlft.player import Cast, Player
from rlft.policy import Policy
from rlft.reference import Reference
from rlft.replay import replay
from rlft.session import begin, resume
from rlft.settings import load, validate
from rlft.swap import Swap
from rlft.sync import Sync
from rlft.terminal import Terminal
from rlft.types import NAN, Completion, Group, InputError, RunError, Sample, Sampling, Task, Trajectory, Turn

pytestmark = pytest.mark.usefixtures("one_thread")

LORA: dict[str, Any] = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
MakeGroups = Callable[..., list[Group]]


def named(**knobs: Any) -> Algorithm:
    return TypeAdapter(AlgorithmConfig).validate_python(knobs).build()


def test_roles_go_round_after_every_exchange() -> None:
    cast = Cast(2, 5)
    assert [cast.agent(0, version) for version in range(12)] == [0] * 5 + [1] * 5 + [0] * 2
    assert [cast.agent(1, version) for version in range(12)] == [1] * 5 + [0] * 5 + [1] * 2
    assert [Cast(3, 1).agent(2, version) for version in range(4)] == [2, 0, 1, 2]
    assert {Cast(2, 0).agent(1, version) for version in range(100)} == {1}
    assert {Cast().agent(role, version) for role in range(3) for version in range(9)} == {0}


# What each learns


class Norm(LlamaRMSNorm):
    """Without the cast to float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden_states * scale)


def in_double(model: Any) -> Any:
    model.double()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Norm
    return model


def double(batch: Batch) -> Batch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.double() if t.is_floating_point() else t for name, t in found.items()})


def in_roles(make_groups: MakeGroups, count: int = 3, size: int = 4) -> list[Group]:
    """Trajectories of two samples, agent 0's and agent 1's, after prompts of their own."""
    first, second = make_groups(count, size, seed=1), make_groups(count, size, seed=2)
    for one, other in zip((t for g in first for t in g), (t for g in second for t in g), strict=True):
        other.samples[0].agent = 1
        one.samples += other.samples
    return first


def agents_of(
    path: Path, algorithm: Algorithm, count: int = 2, moved: bool = True, recomputed: bool = False, **schedule: Any
) -> Agents:
    """In float64, every agent's adapter moved away from where it begins, each elsewhere."""
    policy = Policy(path, LORA, device="cpu", gradient_checkpointing=recomputed)
    in_double(policy.model)
    settings = Schedule(**{"lr": 1e-2, "steps": 20, **schedule})
    agents = Agents(policy, count, lambda: Learner(policy, settings, owned=algorithm.owned))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for learner in agents.learners if moved else ():
            learner.own.double()
            for p in learner.trained().values():
                p += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return agents


def values(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.trained().items()}


def logprobs(model: Any, sample: Sample) -> Tensor:
    """Of a sample's chosen tokens; one row, no padding."""
    tokens = torch.tensor([sample.tokens])
    scored = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    chosen = torch.tensor(sample.mask)[1:]
    return scored.gather(1, tokens[0, 1:, None])[chosen, 0]


def by_hand(model: Any, base: Any, groups: list[Group], agent: int, kl: float) -> Tensor:
    """GRPO's loss (arXiv:2402.03300, equation 3) of one model on one agent's samples, in loops."""
    rows = []
    for group in groups:
        scores = torch.tensor([t.total for t in group], dtype=torch.float64)
        spread = scores - scores.mean()
        advantages = spread / (scores.std() + 1e-4) if float(spread.abs().max()) > 0 else spread
        for trajectory, advantage in zip(group, advantages, strict=True):
            for sample in (s for s in trajectory.samples if s.agent == agent):
                now = logprobs(model, sample)
                with torch.no_grad():
                    reference = logprobs(base, sample)
                old = torch.tensor(sample.logprobs, dtype=torch.float32)[torch.tensor(sample.mask)].double()
                ratio = (now - old).exp()
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                away = (reference - now).exp() - (reference - now) - 1
                rows.append((kl * away - gain).mean())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_each_learns_as_two_whole_models_would(tiny_model: Path, make_groups: MakeGroups, recomputed: bool) -> None:
    """Against two full copies of the model under autograd and plain SGD, without rlft's learner, in float64."""
    algorithm, groups = named(type="grpo", kl=0.3), in_roles(make_groups)
    agents = agents_of(
        tiny_model, algorithm, recomputed=recomputed, optimizer="sgd", lr=0.1, max_grad_norm=0.0, micro_tokens=40
    )
    copies = []
    for agent in (0, 1):
        with agents.acting(agent):
            copies.append(copy.deepcopy(agents.learners[agent].policy.model))
    begun = [values(learner) for learner in agents.learners]
    base = in_double(AutoModelForCausalLM.from_pretrained(tiny_model))
    batch = double(Batch.of(groups))
    for _ in range(2):
        metrics = agents.update(batch, algorithm)
        for agent, model in enumerate(copies):
            loss = by_hand(model, base, groups, agent, kl=0.3)
            model.zero_grad()
            loss.backward()
            assert metrics[f"agent/{agent}/loss/total"] == pytest.approx(float(loss.detach()), rel=1e-9)
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
    for learner, model, start in zip(agents.learners, copies, begun, strict=True):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = values(learner)
        assert found.keys() == trained.keys()
        for name, p in trained.items():
            moved = (p.detach() - start[name]).abs().max()
            assert float(moved) > 0
            assert float((found[name] - p.detach()).abs().max()) <= 1e-6 * float(moved)


@pytest.mark.parametrize("knobs", [
    {"type": "grpo"}, {"type": "ppo"}, {"type": "ppo", "critic": "adapter", "kl": 0.1},
], ids=["grpo", "ppo", "critic on an adapter"])  # fmt: skip
def test_no_agent_notices_the_other(tiny_model: Path, make_groups: MakeGroups, knobs: dict[str, Any]) -> None:
    """Bit for bit: with the other's samples in the batch or without, gradients clipped, several optimizer steps."""
    algorithm, batch = named(**knobs), double(Batch.of(in_roles(make_groups)))

    def learned(rows: Tensor) -> tuple[Agents, dict[str, float]]:
        agents = agents_of(tiny_model, algorithm, epochs=2, minibatches=2, max_grad_norm=0.1)
        return agents, [agents.update(batch.rows(rows), algorithm) for _ in range(3)][-1]

    both, metrics = learned(torch.arange(len(batch)))
    start = agents_of(tiny_model, algorithm)
    for agent in (0, 1):
        alone, own = learned((batch.agent == agent).nonzero().flatten())
        found, wanted, begun = (values(one.learners[agent]) for one in (both, alone, start))
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert all(not torch.equal(found[name], begun[name]) for name in found)
        other = values(alone.learners[1 - agent])
        assert all(torch.equal(other[name], value) for name, value in values(start.learners[1 - agent]).items())
        assert own[f"agent/{1 - agent}/tokens/trained"] == 0
        assert {k: v for k, v in own.items() if k.startswith(f"agent/{agent}/") and not math.isnan(v)} == {
            k: v for k, v in metrics.items() if k.startswith(f"agent/{agent}/") and not math.isnan(v)
        }
    assert metrics["tokens/trained"] == sum(metrics[f"agent/{agent}/tokens/trained"] for agent in (0, 1))


def test_they_begin_as_one_and_leave_no_trace(tiny_model: Path, make_groups: MakeGroups) -> None:
    """Both begin as the base; after updates the model holds agent 0 again, also after one that failed."""
    agents = agents_of(tiny_model, named(type="grpo"), moved=False)
    first, second = agents.learners
    policy, batch = first.policy, double(Batch.of(in_roles(make_groups)))
    assert all(torch.equal(p, second.trained()[name]) for name, p in first.trained().items())
    assert not {id(p) for p in first.trained().values()} & {id(p) for p in second.trained().values()}
    for agent in (0, 1):
        with agents.acting(agent):
            seen = agents.learners[agent].logprobs(batch)
            assert torch.equal(seen[batch.mask], first.logprobs(batch, reference=True)[batch.mask])
    agents.update(batch, named(type="grpo"))

    def broken(outputs: Any, part: Batch) -> Any:
        if part.agent.all():
            raise RunError("no loss")
        return named(type="grpo").loss(outputs, part)

    with pytest.raises(RunError, match="no loss"):
        agents.update(batch, replace(named(type="grpo"), loss=broken))
    assert dict(policy.trainable()).keys() == first.trained().keys()
    assert all(p is first.trained()[name] for name, p in policy.trainable())


def test_an_episodes_total_is_every_agents(make_groups: MakeGroups) -> None:
    """Equation 4 of arXiv:2410.06101 from token to token: what the other was paid comes at one's end."""
    groups = in_roles(make_groups, 1, 2)
    for trajectory in groups[0]:
        trajectory.score = 0.25
        for sample, paid in zip(trajectory.samples, (1.0, 3.0), strict=True):
            sample.rewards[-1] = paid
    batch = Batch.of(groups)
    batch = batch.with_(values=torch.zeros_like(batch.logprobs))
    for agent, own in ((0, 1.0), (1, 3.0)):
        rows = batch.rows((batch.agent == agent).nonzero().flatten())
        assert rows.rewards.sum(1).tolist() == [own] * 2
        assert set(gae(rows, lam=1.0, whiten=False).returns[rows.mask].tolist()) == {4.25}


def test_references_are_their_own(tiny_model: Path, make_groups: MakeGroups, tmp_path: Path) -> None:
    """A saved adapter is where both begin and what both are measured from; one that follows, follows its own agent."""
    saved = Policy(tiny_model, {**LORA, "init_lora_weights": False}, device="cpu")
    saved.save_adapter(tmp_path)
    policy = Policy(tiny_model, {"type": "saved", "path": str(tmp_path)}, device="cpu")
    batch, algorithm = Batch.of(in_roles(make_groups)), named(type="grpo", kl=0.1)
    fixed = Agents(policy, 2, lambda: Learner(policy, Schedule(lr=1e-2, steps=9)))
    start = fixed.learners[0].logprobs(batch)[batch.mask]
    fixed.update(batch, algorithm)
    moving = Agents(policy, 2, lambda: Learner(policy, Schedule(lr=1e-2, steps=9), reference=Reference(policy, 1, 1.0)))
    assert moving.update(batch, algorithm)["reference/refreshed"] == 2
    for agents in (fixed, moving):
        for agent, learner in enumerate(agents.learners):
            with agents.acting(agent):
                now, first = (learner.logprobs(batch, reference=kind)[batch.mask] for kind in (False, True))
            assert not torch.equal(now, start)
            assert torch.equal(first, start if agents is fixed else now)


def test_a_skipped_step_is_one_agents(tiny_model: Path, make_groups: MakeGroups) -> None:
    """Scores that are no numbers for agent 1's rows: it stays, agent 0 learns."""
    agents = agents_of(tiny_model, named(type="grpo"))
    before, batch = [values(learner) for learner in agents.learners], double(Batch.of(in_roles(make_groups)))
    strange = batch.with_(scores=batch.scores.masked_fill(batch.agent == 1, torch.nan))
    metrics = agents.update(strange, named(type="grpo"))
    assert metrics["learner/skipped"] == metrics["agent/1/learner/skipped"] == 1
    assert [learner.stepper.skipped_in_a_row for learner in agents.learners] == [0, 1]
    moved = [any(not torch.equal(p, start[n]) for n, p in values(learner).items())
             for learner, start in zip(agents.learners, before, strict=True)]  # fmt: skip
    assert moved == [True, False]


def test_metrics_of_all() -> None:
    """Counts add up, of a maximum the largest counts, of all else the mean over those that have it."""
    first = {"loss/total": 1.0, "tokens/trained": 30.0, "parity/logprob_max": 1e-5, "kl/ref": 0.5}
    second = {"loss/total": 3.0, "tokens/trained": 10.0, "parity/logprob_max": 3e-5, "value/mean": NAN}
    found = together([first, second])
    assert math.isnan(found.pop("value/mean"))
    assert found == {"loss/total": 2.0, "tokens/trained": 40.0, "parity/logprob_max": 3e-5, "kl/ref": 0.5}


# What each says


PLACES = {"local": "merged", "here": "adapter", "worker": "adapter"}


@pytest.fixture(scope="module", params=PLACES)
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Engine]:
    settings: dict[str, Any] = {
        "model": tiny_model, "dtype": torch.float32, "context": 128, "max_sequences": 8, "cache_gb": 0.05,
        "lora_rank": 4, "agents": 2,
    }  # fmt: skip
    made: Any = {
        "local": lambda: LocalEngine(tiny_model, torch.float32, torch.device("cpu"), max_sequences=8),
        "here": lambda: VllmEngine(**settings),
        "worker": lambda: in_worker(VllmEngine, **settings),
    }[request.param]()
    made.kind = PLACES[request.param]
    yield made
    asyncio.run(made.close())


def two(tiny_model: Path) -> Agents:
    """In float32, far from the base and from each other."""
    policy = Policy(tiny_model, LORA, device="cpu", dtype="float32")
    agents = Agents(policy, 2, lambda: Learner(policy, Schedule(lr=1e-2, steps=1), temperature=0.7))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (p for learner in agents.learners for p in learner.trained().values()):
            p.copy_(0.2 * torch.randn(p.shape, generator=draw))
    return agents


def syncs_of(agents: Agents, engine: Any) -> Syncs:
    policy, prompt = agents.learners[0].policy, [7, 8, 9, 10, 11]
    sampling = Sampling(temperature=0.7)
    kind = engine.kind
    return Syncs(agents, engine, lambda seat, learner: Sync(policy, seat, learner, kind, [prompt], sampling))


def scored(agents: Agents, agent: int, prompts: list[list[int]], said: list[Completion]) -> float:
    """The largest gap between what the engine said and an agent's learner."""
    rows = [
        (Trajectory(Task("t", ()), (), [Sample(
            p + c.tokens, [False] * len(p) + [True] * len(c.tokens), [NAN] * len(p) + c.logprobs,
            [0.0] * (len(p) + len(c.tokens)), c.version,
        )], score=0.0),)
        for p, c in zip(prompts, said, strict=True)
    ]  # fmt: skip
    batch = Batch.of(rows)
    with agents.acting(agent):
        return float((agents.learners[agent].logprobs(batch) - batch.logprobs)[batch.mask].abs().max())


def test_requests_of_both_are_open_at_once_and_each_is_its_agents(engine: Engine, tiny_model: Path) -> None:
    """Traps 11, 22 and 23: over two versions, with the same prompts; more requests than slots."""
    agents = two(tiny_model)
    syncs, policy = syncs_of(agents, engine), agents.learners[0].policy
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 300, (5 + 3 * i,), generator=generator).tolist() for i in range(12)]

    async def ask() -> list[Completion]:
        open_ = [
            engine.generate(prompt, Sampling(temperature=0.7, max_tokens=8, seed=i, agent=agent))
            for i, prompt in enumerate(prompts)
            for agent in (0, 1)
        ]
        return list(await asyncio.gather(*open_))

    async def both() -> tuple[Any, list[Completion], Any, list[Completion]]:
        first, said = await syncs(policy, 3), await ask()
        with torch.no_grad():
            for p in agents.learners[1].trained().values():
                p.mul_(-0.5)
        return first, said, await syncs(policy, 4), await ask()

    try:
        first, before, second, after = asyncio.run(both())
    finally:
        syncs.close()
    assert max(first.gap, second.gap) < 1e-4
    assert {c.version for c in before} == {3}
    assert {c.version for c in after} == {4}
    for agent in (0, 1):
        assert scored(agents, agent, prompts, after[agent::2]) < 1e-4
        assert scored(agents, 1 - agent, prompts, after[agent::2]) > 0.1, "the test can tell them apart"
    assert [c.tokens for c in after[::2]] == [c.tokens for c in before[::2]], "agent 0 did not change"
    assert [c.tokens for c in after[1::2]] != [c.tokens for c in before[1::2]]


class Confused:
    """A real engine that takes everybody's weights for the other agent's."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.kind = inner.kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def load_weights(self, weights: Weights, version: int) -> None:
        await self.inner.load_weights(replace(weights, agent=0), version)


def test_weights_in_another_agents_place_are_noticed(engine: Engine, tiny_model: Path) -> None:
    agents = two(tiny_model)
    good = syncs_of(agents, engine)
    asyncio.run(good(agents.learners[0].policy, 10))
    with torch.no_grad():
        for p in agents.learners[1].trained().values():
            p.mul_(-0.5)
    syncs = syncs_of(agents, Confused(engine))
    with pytest.raises(RunError, match="did not arrive in the engine as they were sent"):
        asyncio.run(syncs(agents.learners[0].policy, 11))
    good.close()
    syncs.close()


def test_an_agent_without_weights_is_refused(engine: Engine) -> None:
    with pytest.raises(RunError, match="agent 5"):
        asyncio.run(engine.generate([7, 8], Sampling(agent=5)))


class Dialogue:
    """Two roles that speak in turn in one history, which no two policies can."""

    def __init__(self, rewrite: bool) -> None:
        self.rewrite = rewrite
        self.turns = 0

    async def reset(self) -> tuple[dict[str, str], ...]:
        return ({"role": "user", "content": "a"},)

    async def step(self, action: Action) -> Turn:
        self.turns += 1
        messages = ({"role": "user", "content": "b"},)
        return Turn(messages, done=self.turns == 3, rewrite=self.rewrite, role=self.turns % 2)

    async def close(self) -> None: ...


def test_a_history_of_two_agents_is_refused(tiny_model: Path) -> None:
    chat = Chat(tiny_model)
    local = LocalEngine(tiny_model, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer)
    local._agents[1] = two_of(local)
    sampling = Sampling(max_tokens=20, stop=("a", "e", "i", "o", "n", "r", "s", "t"))

    def play(rewrite: bool, cast: Cast) -> Trajectory:
        player = Player(local, chat, lambda _: Dialogue(rewrite), sampling, 500, cast)
        return asyncio.run(player.play(Task("t-1", ()), seed=4))

    assert [s.agent for s in play(True, Cast(2, 0)).samples] == [0, 1, 0]
    assert [s.agent for s in play(False, Cast()).samples] == [0], "one agent may play both roles in one sample"
    with pytest.raises(RunError, match=r"env: task t-1: role 1 is agent 1's.*Return Turn\(rewrite=True\)"):
        play(False, Cast(2, 0))


def two_of(local: LocalEngine) -> Any:
    """Agent 1 with agent 0's weights."""
    return Swap(local._model, {})


# Whole runs


PLAIN: dict[str, Any] = {
    "name": "two",
    "steps": 4,
    "model": {"path": "tiny-random", "device": "cpu"},
    "adapter": LORA,
    "data": {"train": {"type": "generated", "limit": 8}, "eval": {"type": "generated", "limit": 4}},
    "env": {"type": "pioneer_observer"},
    "agents": {"count": 2, "exchange": 1},
    "reward": {"type": "per_turn", "of": {"type": "format", "pattern": "[a-m]", "full": False}},
    "rollout": {
        "engine": {"type": "local"},
        "tasks_per_step": 4,
        "group_size": 4,
        "sampling": {"max_tokens": 10, "stop": ["a", "e", "i", "o", "u", "n", "r", "s", "t"]},
    },
    "algorithm": {"type": "grpo"},
    "learner": {"lr": 1e-2},
    "eval": {"accuracy": "format/first"},
    "checkpoint": {"every": 1, "keep": 9},
    "show": {"every": 0},
}


def trained(folder: Path, **changes: Any) -> Path:
    """A run into `folder`."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**PLAIN, **changes, "out": str(folder)}))
    assert begin(load(path), Terminal(Console(quiet=True))) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "whole")


def rows_of(run: Path, step: int, kind: str = "rollouts") -> list[dict[str, Any]]:
    return pq.read_table(run / f"{kind}/step-{step:06d}.parquet").to_pylist()


def test_a_run_exchanges_roles_and_what_is_learned_is_what_was_sampled(whole: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for step in range(1, 5):
        rows, line = rows_of(whole, step), lines[step]
        turned = (step - 1) % 2
        assert all(row["agent"] == (row["sample"] + turned) % 2 for row in rows)
        assert {row["version"] for row in rows} == {step - 1}
        assert max(line["sync/gap"], line["parity/logprob_max"]) < 1e-4
        for agent in (0, 1):
            own = [row for row in rows if row["agent"] == agent]
            paid = sum(sum(row["token_rewards"]) for row in own) / len(own)
            assert line[f"agent/{agent}/paid"] == pytest.approx(paid)
            assert line[f"agent/{agent}/score"] == pytest.approx(sum(row["score"] for row in own) / len(own))
            assert line[f"agent/{agent}/parity/logprob_max"] <= line["parity/logprob_max"]
        assert line["reward/format/first"] == pytest.approx(line[f"agent/{turned}/paid"])
    first, second = (load_file(of_agent(whole / "checkpoints/step-000004", k) / "trained.safetensors") for k in (0, 1))
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_one_agent_alone_is_evaluated(whole: Path) -> None:
    """As the authors do: agent 0 plays every role, whoever plays it in training."""
    for step in (0, 4):
        assert {row["agent"] for row in rows_of(whole, step, "eval")} == {0}
        assert {row["sample"] for row in rows_of(whole, step, "eval")} == {0, 1}


def test_a_resumed_run_is_the_uninterrupted_one(whole: Path, tmp_path: Path) -> None:
    """Bit for bit, roles exchanged before and after the stop; optimizer states of both, and random states too."""
    cut = trained(tmp_path / "cut", steps=2)
    assert resume(cut, ["steps=4"], Terminal(Console(quiet=True))) == 0
    ended = [run / "checkpoints/step-000004" for run in (whole, cut)]
    files = sorted(path.relative_to(ended[0]) for path in ended[0].rglob("*.safetensors"))
    assert len(files) == 8, "of each agent: adapter, trained, optimizer, random"
    for file in files:
        one, other = (load_file(folder / file) for folder in ended)
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    for step in (3, 4):
        assert [row["tokens"] for row in rows_of(whole, step)] == [row["tokens"] for row in rows_of(cut, step)]


def test_a_run_is_resumed_with_its_own_number_of_agents(whole: Path, tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", steps=1, agents={"count": 1})
    for run, count in ((whole, 1), (alone, 2)):
        with pytest.raises(InputError, match=rf"agents\.count: .* is not of {count} agent"):
            resume(run, [f"agents.count={count}", "steps=6"], Terminal(Console(quiet=True)))


def test_every_agent_is_exported_and_evaluated_on_its_own(whole: Path, tmp_path: Path) -> None:
    for agent in (0, 1):
        kept = load_file(of_agent(whole / "checkpoints/step-000004", agent) / "trained.safetensors")
        said = export(whole, tmp_path / f"{agent}", merged=False, step=None, agent=agent)
        assert "step-000004" in said
        policy = Policy(
            material(load(whole / "config.yaml")).model, {"type": "saved", "path": str(tmp_path / f"{agent}")}
        )
        assert all(torch.equal(p, kept[name]) for name, p in policy.trainable())
        assert "accuracy" in evaluate(whole, ["data.eval.limit=2"], None, agent)
    with pytest.raises(InputError, match=r"--agent: .* has no agent 2"):
        export(whole, tmp_path / "2", merged=False, step=None, agent=2)


def test_what_cannot_be_is_refused(whole: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(InputError, match=r"^agents\.count: ") as error:
            material(validate({**PLAIN, **changes}))
        return str(error.value)

    vllm = {**PLAIN["rollout"], "engine": {"type": "vllm"}}
    assert "has 1 role(s), so some of 2 would never speak" in refused(
        env={"type": "single_turn"}, reward={"type": "number"}, eval={}
    )
    assert "some of 3 would never speak" in refused(agents={"count": 3})
    assert "without an adapter" in refused(adapter={"type": "none"})
    ranks = {"type": "adalora", "target_r": 2, "tinit": 0, "tfinal": 1, "total_step": 4, "target_modules": "all-linear"}
    assert "adalora moves its ranks" in refused(adapter=ranks)
    assert "one set of merged weights" in refused(rollout=vllm, sync={"type": "merged"})
    assert "draws further members" in refused(algorithm={"type": "remax"})
    assert "units of 2" in refused(algorithm={"type": "dpo"})
    sft = {
        "algorithm": {"type": "sft"},
        "data": {"train": {"type": "generated", "limit": 4}, "columns": {"completion": "answer"}},
    }
    assert "learn from what they sample" in refused(**sft, eval={}, reward=None)
    with pytest.raises(
        InputError, match=r"agents\.count: vLLM serves several agents as hot-loaded adapters only, and "
    ):
        assemble(material(validate({**PLAIN, "rollout": vllm, "adapter": {**LORA, "use_dora": True}})), None)
    with pytest.raises(InputError, match=r"agents\.count: a step of several agents is not computed again"):
        replay(whole, [], None)


def test_the_plan_says_so() -> None:
    config = validate({**PLAIN, "agents": {"count": 2}, "rollout": {**PLAIN["rollout"], "engine": {"type": "vllm"}}})
    text = describe(config)
    assert "2 adapters on one base, trained apart; each takes the next one's role after every 5 steps" in text
    assert "adapter, after every step" in text
    assert "agents" not in describe(validate({**PLAIN, "agents": {"count": 1}}))


@pytest.mark.slow
def test_both_learn(tmp_path: Path) -> None:
    """The toy task, 30 steps with an exchange after every five: a mean above 0.95 of both leaves none below 0.9."""
    found = asyncio.run(_learn("cory_two", 0, tmp_path, None, None))
    assert found["before"] < 0.6
    assert found["after"] > 0.95


@pytest.mark.slow
def test_a_run_on_vllm(tmp_path: Path) -> None:
    """Adapters hot-loaded side by side through the whole loop."""
    rollout = {**PLAIN["rollout"], "engine": {"type": "vllm", "cache_gb": 0.05}}
    run = trained(tmp_path / "vllm", steps=3, rollout=rollout)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["parity/logprob_max"] for line in lines[1:]) < 1e-3
    assert max(line["sync/gap"] for line in lines[1:]) < 1e-3
    assert [rows_of(run, step)[0]["agent"] for step in (1, 2, 3)] == [0, 1, 0]
