"""An adapter that belongs to the algorithm: it reads the policy's base, and neither learns anything from the other."""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlft.algorithms.base import Algorithm, Owned
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.batch import Batch
from rlft.checkpoint import Checkpoints, load_trained, restore
from rlft.engine.local import LocalEngine
from rlft.learner import Learner
from rlft.policy import Policy
from rlft.schedule import Schedule
from rlft.session import begin, resume
from rlft.settings import load, validate
from rlft.source import Recorded
from rlft.sync import Sync
from rlft.terminal import Terminal
from rlft.types import Group, InputError, Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

MakeGroups = Callable[..., list[Group]]
LORA: dict[str, Any] = {"type": "lora", "r": 4, "target_modules": "all-linear"}
HUGE = 1_000_000


class Norm(LlamaRMSNorm):
    """RMSNorm in the dtype of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean + self.variance_epsilon)


def named(**knobs: Any) -> Algorithm:
    return TypeAdapter(AlgorithmConfig).validate_python(knobs).build()


PPO = named(type="ppo", critic="adapter")


def learner_of(
    path: Path, algorithm: Algorithm = PPO, adapter: dict[str, Any] | None = LORA, seed: int = 0, **options: Any
) -> Learner:
    policy = Policy(path, adapter, device="cpu", seed=seed, gradient_checkpointing=options.pop("recomputed", False))
    schedule = Schedule(**{"lr": 1e-2, "steps": 20, "micro_tokens": HUGE, **options})
    return Learner(policy, schedule, owned=algorithm.owned)


def exact(path: Path, algorithm: Algorithm = PPO, moved: bool = True, **options: Any) -> Learner:
    """In float64, both adapters and the head moved away from where they begin, each elsewhere."""
    learner = learner_of(path, algorithm, **options)
    learner.policy.model.double()
    learner.own.double()
    for module in learner.policy.model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Norm
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in learner.trained().values() if moved else ():
            p += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return learner


def in_double(batch: Batch) -> Batch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.double() if t.is_floating_point() else t for name, t in found.items()})


@pytest.fixture
def batch(make_groups: MakeGroups) -> Batch:
    groups = make_groups(3, 3, seed=1)
    for n, trajectory in enumerate(t for group in groups for t in group):
        trajectory.finish = "length" if n % 2 else "stop"
    return Batch.of(groups)


def by_peft(learner: Learner) -> tuple[Any, Any]:
    """The same second adapter the way PEFT holds several: a model with it active, and the head."""
    model = copy.deepcopy(learner.policy.model)
    model.add_adapter("second", model.peft_config["default"])
    model.double()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in learner.own.get_submodule("adapter").named_parameters():
            weights[name.replace("/", ".").replace(".default.", ".second.")].copy_(value)
    model.set_adapter("second")
    return model, copy.deepcopy(learner.own.get_submodule("head"))


def test_values_and_their_gradient_are_those_of_a_second_adapter_of_peft_s(tiny_model: Path, batch: Batch) -> None:
    """Row by row without padding, in float64; the loss is a weighted sum of all scores."""
    learner, batch = exact(tiny_model), in_double(batch)
    assert learner.second is not None
    model, head = by_peft(learner)
    outputs = learner.second(batch)
    assert outputs.scores is not None
    assert outputs.values is not None
    weights = torch.randn(outputs.scores.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for i, (tokens, valid) in enumerate(zip(batch.tokens, batch.valid, strict=True)):
        wanted = head(model(input_ids=tokens[valid][None], output_hidden_states=True).hidden_states[-1][0])
        torch.testing.assert_close(outputs.scores[i][valid], wanted, rtol=1e-9, atol=1e-9)
        before = torch.cat([torch.zeros(1, dtype=torch.float64), wanted[:-1, 0]])[batch.mask[i][valid]]
        torch.testing.assert_close(outputs.values[i][batch.mask[i]], before, rtol=1e-9, atol=1e-9)
        total = total + (weights[i][valid] * wanted).sum()
    total.backward()
    (weights * torch.where(batch.valid[:, :, None], outputs.scores, 0.0)).sum().backward()
    learner.second.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if ".second." in n and p.grad is not None}
    for name, p in learner.own.get_submodule("adapter").named_parameters():
        gradient = expected[name.replace("/", ".").replace(".default.", ".second.")]
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-9)
    assert not any(p.grad is not None for _, p in learner.policy.trainable())
    values, after = learner.values(batch)
    torch.testing.assert_close(values[batch.mask], outputs.values[batch.mask].detach(), rtol=1e-9, atol=1e-9)
    assert after[batch.truncated].all()


@pytest.mark.parametrize("adapter", [LORA, {**LORA, "init_lora_weights": False}, {**LORA, "use_dora": True}])
def test_trap_31_the_first_values_are_zero(tiny_model: Path, batch: Batch, adapter: dict[str, Any]) -> None:
    """And the second adapter is a copy of the first, so that nothing is drawn for it."""
    learner = learner_of(tiny_model, adapter=adapter)
    values, after = learner.values(batch)
    assert not values[batch.mask].any()
    assert not after.any()
    own = {n.replace("/", "."): p for n, p in learner.own.get_submodule("adapter").named_parameters()}
    trained = dict(learner.policy.trainable())
    assert {n for n in trained if "lm_head" not in n} == set(own)
    assert all(torch.equal(p, trained[n]) and p is not trained[n] for n, p in own.items())


def test_the_policys_gradient_is_that_without_a_critic_on_it(tiny_model: Path, batch: Batch) -> None:
    """Against a head whose error ends at the head. Both adapters are still equal, so values and advantages are too."""

    def gradients(algorithm: Algorithm) -> dict[str, Tensor]:
        learner = exact(tiny_model, algorithm, moved=False, adapter={**LORA, "init_lora_weights": False})
        torch.nn.init.normal_(learner.own.get_parameter("head.weight"), 0, 0.1, torch.Generator().manual_seed(0))
        return learner.gradients(in_double(batch), algorithm)

    found, wanted = gradients(PPO), gradients(named(type="ppo", detach=True))
    for name, gradient in wanted.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_neither_moves_the_other_not_even_by_clipping(tiny_model: Path, batch: Batch) -> None:
    """Bit for bit, with gradients far beyond the norm they are clipped to: the policy at any weight of the critic's
    error (values, and so advantages, differ only after one update), the critic at any term of the policy's.
    """

    def after(updates: int, **knobs: Any) -> dict[str, Tensor]:
        algorithm = named(type="ppo", critic="adapter", cliprange_value=None, **knobs)
        learner = exact(tiny_model, algorithm, optimizer="sgd", max_grad_norm=1e-3)
        for _ in range(updates):
            learner.update(in_double(batch), algorithm)
        return {name: p.detach() for name, p in learner.trained().items()}

    def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[bool]:
        """For the policy's parameters (False) and the owned ones (True), which are all equal."""
        differ = {name.startswith("own.") for name, p in found.items() if not torch.equal(p, wanted[name])}
        return {False, True} - differ

    assert same(after(1), after(1, value_coefficient=1e4)) == {False}
    assert same(after(3), after(3, entropy=1e3)) == {True}


@pytest.mark.parametrize("budget", [1, 40])
@pytest.mark.parametrize("packing", ["auto", "off"])
def test_trap_07_gradients_do_not_depend_on_the_cut(tiny_model: Path, batch: Batch, budget: int, packing: str) -> None:
    wanted = exact(tiny_model, packing="off").gradients(in_double(batch), PPO)
    found = exact(tiny_model, micro_tokens=budget, packing=packing).gradients(in_double(batch), PPO)
    assert wanted.keys() == found.keys()
    assert any(name.startswith("own.adapter.") for name in wanted)
    for name, gradient in wanted.items():
        assert gradient.any(), name
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


def test_trap_26_layers_that_are_recomputed_read_the_adapter_they_belong_to(tiny_model: Path, batch: Batch) -> None:
    """The two adapters are far apart, so a layer recomputed with the other one would show."""
    wanted = exact(tiny_model).gradients(in_double(batch), PPO)
    found = exact(tiny_model, recomputed=True).gradients(in_double(batch), PPO)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


def test_warming_up_moves_only_what_is_owned(tiny_model: Path, batch: Batch) -> None:
    algorithm = named(type="ppo", critic="adapter", critic_warmup=3)
    learner = learner_of(tiny_model, algorithm)
    start = {name: p.detach().clone() for name, p in learner.trained().items()}
    for _ in range(3):
        learner.update(batch, algorithm)
    for name, p in learner.trained().items():
        assert torch.equal(p, start[name]) is not name.startswith("own."), name
    assert learner.values(batch)[0][batch.mask].any()
    learner.update(batch, algorithm)
    assert any(not torch.equal(p, start[name]) for name, p in learner.policy.trainable())


def test_the_policy_is_what_it_is_without_it(tiny_model: Path, tmp_path: Path, batch: Batch) -> None:
    """What is trained, sent, saved and measured from names no second adapter, however far that has gone."""
    learner, bare = learner_of(tiny_model), Policy(tiny_model, LORA, device="cpu")
    policy, reference = learner.policy, learner.logprobs(batch, reference=True)
    for _ in range(3):
        learner.update(batch, PPO)
    assert [n for n, _ in policy.trainable()] == [n for n, _ in bare.trainable()]
    assert policy.targets() == bare.targets()
    assert [n for n, _ in policy.merged()] == [n for n, _ in bare.merged()]
    assert policy.plain().keys() == bare.plain().keys()
    assert list(policy.model.peft_config) == ["default"]
    assert torch.equal(learner.logprobs(batch, reference=True)[batch.mask], reference[batch.mask])
    policy.save_adapter(tmp_path)
    assert [p.name for p in tmp_path.rglob("*.safetensors")] == ["adapter_model.safetensors"]
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(list(bare.trainable()))


def test_a_sync_sends_and_proves_the_policy(tiny_model: Path, batch: Batch) -> None:
    learner = learner_of(tiny_model)
    engine = LocalEngine(tiny_model, torch.float32, torch.device("cpu"))
    sync = Sync(learner.policy, engine, learner, "merged", [[5, 6, 7]], Sampling(1.0, 4))
    for version in range(3):
        assert asyncio.run(sync(learner.policy, version)).gap < 1e-4
        learner.update(batch, PPO)
    sent = asyncio.run(sync.send(learner.policy, 3))
    assert set(sent) >= set(learner.policy.targets())
    assert asyncio.run(sync.account(sent, 3)) == []


def test_it_goes_on_after_a_resume_as_if_nothing_had_happened(
    tiny_model: Path, tmp_path: Path, make_groups: MakeGroups, batch: Batch
) -> None:
    first, source = learner_of(tiny_model), Recorded(make_groups(2, 3), 2, 0)
    for _ in range(3):
        first.update(batch, PPO)
    kept = Checkpoints(tmp_path, 1).save(3, first, source)
    expected = [first.update(batch, PPO) for _ in range(2)]
    second = learner_of(tiny_model, seed=1)
    restore(kept, second, source)
    assert [second.update(batch, PPO) for _ in range(2)] == expected
    assert all(torch.equal(p, second.trained()[name]) for name, p in first.trained().items())
    saved = load_file(kept / "trained.safetensors")
    assert sum(name.startswith("own.adapter.") for name in saved) == len(
        list(first.own.get_submodule("adapter").parameters())
    )
    load_trained(kept, learner_of(tiny_model, named(type="grpo")))
    with pytest.raises(InputError, match="its parameters are not those"):
        load_trained(kept, learner_of(tiny_model, named(type="ppo")))


def test_a_saved_adapter_has_a_second_one_too(tiny_model: Path, tmp_path: Path, batch: Batch) -> None:
    """It begins where the saved one does, and the reference is still the saved one."""
    learner_of(tiny_model, adapter={**LORA, "init_lora_weights": False}).policy.save_adapter(tmp_path)
    learner = learner_of(tiny_model, adapter={"type": "saved", "path": str(tmp_path)})
    start = learner.logprobs(batch)
    for _ in range(2):
        learner.update(batch, PPO)
    assert torch.equal(learner.logprobs(batch, reference=True)[batch.mask], start[batch.mask])
    assert learner.values(batch)[0][batch.mask].any()


PLAIN: dict[str, Any] = {
    "name": "second",
    "steps": 3,
    "model": {"path": "tiny-random", "device": "cpu"},
    "adapter": LORA,
    "data": {"train": {"type": "generated", "limit": 8}},
    "reward": {"type": "length", "limit": 8},
    "rollout": {
        "engine": {"type": "local"},
        "tasks_per_step": 2,
        "group_size": 2,
        "sampling": {"max_tokens": 6},
    },
    "algorithm": {"type": "ppo", "critic": "adapter"},
    "learner": {"lr": 1e-2},
    "checkpoint": {"every": 1, "keep": 5},
    "show": {"every": 0},
}


def test_what_cannot_be_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.type: ppo as it is set wants a second adapter"):
        validate({**PLAIN, "adapter": {"type": "none"}})
    with pytest.raises(InputError, match=r"algorithm\.detach: .* set detach=false"):
        validate({**PLAIN, "algorithm": {"type": "ppo", "critic": "adapter", "detach": True}})
    with pytest.raises(ValidationError):
        named(type="ppo", critic="model")
    with pytest.raises(InputError, match=r"adapter\.type: a second adapter needs a first one"):
        learner_of(tiny_model, adapter=None)
    with pytest.raises(InputError, match=r"adapter\.target_modules: nothing below the vocabulary's head"):
        learner_of(tiny_model, adapter={"type": "lora", "target_modules": ["lm_head"]})
    assert Owned().adapter is False
    assert named(type="ppo").owned.adapter is False


def test_a_run_proves_its_syncs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Three steps, and two resumed to three, with the local engine."""

    def run(folder: str, steps: int) -> Path:
        path = tmp_path / f"{folder}.yaml"
        path.write_text(yaml.safe_dump({**PLAIN, "steps": steps, "out": str(tmp_path / folder)}))
        assert begin(load(path), Terminal(Console(quiet=True))) == 0
        return tmp_path / folder

    whole, cut = run("whole", 3), run("cut", 2)
    assert resume(cut, ["steps=3"], Terminal(Console(quiet=True))) == 0
    for name in ("trained", "optimizer", "random"):
        one, other = (load_file(run / f"checkpoints/step-000003/{name}.safetensors") for run in (whole, cut))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sync/gap"] < 1e-3 for row in rows if row["step"])
    assert all(math.isfinite(row["value/loss"]) for row in rows if row["step"])
