"""A checkpoint is whole or not there, gives back all it was taken from, and the right ones are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import rlft.checkpoint as checkpoint
from rlft.algorithms import credit, select, weigh
from rlft.algorithms.base import Algorithm, Metrics, Outputs, Owned, masked_sum, mean
from rlft.algorithms.losses import policy as losses
from rlft.batch import Batch
from rlft.checkpoint import Checkpoints, load_trained, read_state, restore
from rlft.learner import Learner, Schedule
from rlft.policy import Policy
from rlft.source import Recorded
from rlft.types import Group, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

GRPO = Algorithm(
    select=select.everything, credit=credit.group_relative, weigh=weigh.by_token,
    loss=partial(losses.clipped, low=0.2, high=0.2), needs=("old_logprobs",),
)  # fmt: skip
LORA = {"type": "lora", "r": 2, "target_modules": ["q_proj", "v_proj"]}
# Masks at optimizer steps 3 and later by importances averaged since step 1; from step 8 on by the ranks decided then.
ADALORA = {
    "type": "adalora", "init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": 12,
    "beta1": 0.98, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


@dataclass
class Training:
    """A learner, its source, and a batch to step on."""

    learner: Learner
    source: Recorded
    batch: Batch

    def steps(self, count: int) -> list[float]:
        return [self.learner.update(self.batch, GRPO)["loss/grad_norm"] for _ in range(count)]

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.learner.policy.trainable()}


@pytest.fixture
def begin(tiny_model: Path, make_groups: Callable[..., list[Group]]) -> Callable[..., Training]:
    def make(adapter: dict | None = LORA, optimizer: str = "adamw", seed: int = 0) -> Training:
        groups = make_groups(4, 4)
        schedule = Schedule(lr=1e-2, steps=8, optimizer=optimizer, scheduler="cosine", warmup_steps=2, minibatches=2)
        learner = Learner(Policy(tiny_model, adapter, device="cpu", seed=seed), schedule, seed=seed)
        return Training(learner, Recorded(groups, 3, seed), Batch.of(groups))

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "full"])
def test_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, begin: Callable[..., Training], adapter: dict | None, optimizer: str
) -> None:
    first = begin(adapter, optimizer)
    first.steps(3)
    drawn = [first.source._deck.at(i) for i in range(9)]
    first.source._position = 5
    kept = Checkpoints(tmp_path, 2).save(3, first.learner, first.source)
    torch_state = torch.get_rng_state()
    expected = first.steps(2)

    second = begin(adapter, optimizer, seed=1)
    second.source = Recorded(second.source._groups, 3, 0)
    torch.manual_seed(5)
    assert restore(kept, second.learner, second.source) == 3
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert second.steps(2) == expected
    assert all(torch.equal(value, first.values()[name]) for name, value in second.values().items())
    assert second.learner.scheduler.get_last_lr() == first.learner.scheduler.get_last_lr()
    assert [second.source._deck.at(i) for i in range(9)] == drawn
    assert second.source._position == 5


@pytest.mark.parametrize("stop", [1, 5], ids=["while ranks move", "when they are decided"])
def test_an_adapter_that_moves_its_ranks_goes_on_too(tmp_path: Path, begin: Callable[..., Training], stop: int) -> None:
    first = begin(ADALORA)
    first.steps(stop)
    kept = Checkpoints(tmp_path, 2).save(stop, first.learner, first.source)
    expected = first.steps(2)
    assert any(float((value == 0).float().mean()) > 0.5 for name, value in first.values().items() if "lora_E" in name)
    second = begin(ADALORA, seed=1)
    restore(kept, second.learner, second.source)
    assert second.steps(2) == expected
    assert all(torch.equal(value, first.values()[name]) for name, value in second.values().items())
    forgetful = begin(ADALORA, seed=1)
    restore(kept, forgetful.learner, forgetful.source)
    allocator = forgetful.learner.policy.model.base_model.rankallocator
    allocator.reset_ipt()
    allocator.peft_config.rank_pattern = {name: [True] * 4 for name in allocator.peft_config.rank_pattern or {}}
    forgetful.steps(2)
    values = forgetful.values()
    assert any(not torch.equal(value, values[name]) for name, value in first.values().items()), "this proves something"


@pytest.mark.parametrize("stop", [2, 3, 5], ids=["while ranks move", "between", "when they are decided"])
def test_the_adapter_in_a_checkpoint_is_the_policy_while_its_ranks_move(
    tmp_path: Path, tiny_model: Path, begin: Callable[..., Training], stop: int
) -> None:
    """Every third step masks; in between the optimizer revives what is masked."""
    training = begin(ADALORA | {"deltaT": 3})
    training.steps(stop)
    pattern = dict(training.learner.policy.model.base_model.rankallocator.peft_config.rank_pattern or {})
    kept = Checkpoints(tmp_path, 2).save(stop, training.learner, training.source)
    assert dict(training.learner.policy.model.base_model.rankallocator.peft_config.rank_pattern or {}) == pattern
    saved = Learner(Policy(tiny_model, {"type": "saved", "path": str(kept / "adapter")}, device="cpu"), Schedule(0, 1))
    found, wanted = (one.logprobs(training.batch)[training.batch.mask] for one in (saved, training.learner))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("empty", [8, (1, 2, 3, 4, 5, 6, 7, 8)], ids=["the deciding step", "all up to it"])
@pytest.mark.parametrize("resumed", [False, True])
def test_ranks_are_decided_at_the_next_step_that_has_a_gradient(
    tmp_path: Path, make_groups: Callable[..., list[Group]], tiny_model: Path, empty: Any, resumed: bool
) -> None:
    groups = make_groups(4, 4)
    same = Batch.of([tuple(replace(t, score=1.0) for t in group) for group in groups])
    policy = Policy(tiny_model, ADALORA | {"deltaT": 20}, device="cpu")
    learner = Learner(policy, Schedule(lr=1e-2, steps=12))
    for step in range(1, 11):
        learner.update(same if step in (empty if isinstance(empty, tuple) else (empty,)) else Batch.of(groups), GRPO)
        if resumed and step == 8:
            source = Recorded(groups, 3, 0)
            kept = Checkpoints(tmp_path, 2).save(step, learner, source)
            policy = Policy(tiny_model, ADALORA | {"deltaT": 20}, device="cpu", seed=1)
            learner = Learner(policy, Schedule(lr=1e-2, steps=12))
            restore(kept, learner, source)
    diagonals = [p for name, p in policy.trainable() if "lora_E" in name]
    assert sum(int((p != 0).sum()) for p in diagonals) == len(diagonals)


@pytest.mark.parametrize("lost", ["optimizer.safetensors", "state.json", "random.safetensors"])
def test_each_part_of_a_checkpoint_counts(tmp_path: Path, begin: Callable[..., Training], lost: str) -> None:
    """The comparison above fails when one part is of another time: with it, resuming is not bit-exact."""
    first = begin()
    checkpoints = Checkpoints(tmp_path, 5)
    early = checkpoints.save(0, first.learner, first.source) if lost != "optimizer.safetensors" else None
    first.steps(1)
    early = early or checkpoints.save(1, first.learner, first.source)
    first.steps(2)
    kept = checkpoints.save(3, first.learner, first.source)
    (kept / lost).write_bytes((early / lost).read_bytes())
    expected = first.steps(2)
    second = begin(seed=1)
    restore(kept, second.learner, second.source)
    assert second.steps(2) != expected


def test_a_checkpoint_holds_the_adapter_in_peft_s_format(tmp_path: Path, begin: Callable[..., Training]) -> None:
    training = begin()
    kept = Checkpoints(tmp_path, 1).save(1, training.learner, training.source)
    assert {p.name for p in (kept / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not [p for p in kept.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")], "nothing is pickled"


def test_the_adapter_s_config_is_the_same_from_process_to_process(
    tmp_path: Path, begin: Callable[..., Training]
) -> None:
    """PEFT holds the targets as a set, whose order is another in every process."""
    training = begin({**LORA, "target_modules": "all-linear"})
    kept = Checkpoints(tmp_path, 1).save(1, training.learner, training.source)
    targets = json.loads((kept / "adapter/adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    assert len(targets) == 14


def test_the_newest_and_the_best_stay(tmp_path: Path, begin: Callable[..., Training]) -> None:
    training = begin()
    checkpoints = Checkpoints(tmp_path, 2)
    for step, accuracy in enumerate([0.1, 0.5, 0.5, None, 0.2, 0.3], 1):
        assert checkpoints.improved(step, accuracy) == (step in (1, 2)), "a tie is no improvement"
        checkpoints.save(step, training.learner, training.source)
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.latest() == 6
    again = Checkpoints(tmp_path, 2)
    assert again.best == (0.5, 2), "a resumed run knows the best"
    assert not again.improved(7, 0.4)
    assert again.improved(8, 0.6)
    again.save(8, training.learner, training.source)
    assert again.steps() == [6, 8]


def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, begin: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = begin()
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, training.learner, training.source)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(step, training.learner, training.source)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    """What a kill leaves behind has another name, so that it is never taken for a checkpoint."""
    (tmp_path / ".writing-000007-123").mkdir()
    (tmp_path / "step-7").mkdir()
    assert Checkpoints(tmp_path, 1).latest() is None
    assert Checkpoints(tmp_path / "none", 1).steps() == []


def test_what_an_earlier_kill_left_is_cleared_by_the_next_save(tmp_path: Path, begin: Callable[..., Training]) -> None:
    training = begin()
    (tmp_path / ".writing-000007-123").mkdir()
    Checkpoints(tmp_path, 1).save(8, training.learner, training.source)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000008"]


def test_the_parameters_of_another_policy_are_refused(tmp_path: Path, begin: Callable[..., Training]) -> None:
    first = begin()
    kept = Checkpoints(tmp_path, 1).save(1, first.learner, first.source)
    for adapter in ({**LORA, "r": 4}, {**LORA, "target_modules": ["q_proj"]}, None):
        other = begin(adapter)
        before = other.values()
        with pytest.raises(InputError, match="its parameters are not those"):
            load_trained(kept, other.learner)
        assert all(torch.equal(value, before[name]) for name, value in other.values().items())


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is not a checkpoint"):
        read_state(tmp_path)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(InputError, match="this is not a checkpoint"):
        read_state(tmp_path)


def test_the_state_is_readable(tmp_path: Path, begin: Callable[..., Training]) -> None:
    training = begin()
    state = json.loads((Checkpoints(tmp_path, 1).save(4, training.learner, training.source) / "state.json").read_text())
    assert state["step"] == 4
    assert state["source"] == {"position": 0}


def test_a_resumed_run_takes_the_rate_of_its_config_at_the_same_point(
    tmp_path: Path, begin: Callable[..., Training]
) -> None:
    first = begin()
    first.steps(2)
    kept = Checkpoints(tmp_path, 2).save(2, first.learner, first.source)
    same, slower = begin(), begin()
    slower.learner.schedule = replace(slower.learner.schedule, lr=1e-3)
    slower.learner.scheduler.base_lrs = [1e-3]
    for training in (same, slower):
        restore(kept, training.learner, training.source)
    rate = first.learner.optimizer.param_groups[0]["lr"]
    assert same.learner.optimizer.param_groups[0]["lr"] == rate
    assert slower.learner.optimizer.param_groups[0]["lr"] == pytest.approx(rate / 10)
    assert slower.learner.scheduler.last_epoch == first.learner.scheduler.last_epoch


# --- what an algorithm owns -------------------------------------------------------------------------------------------

OWNED = Owned(head=2, alone=3, learned={"log_z": 0.5}, remembered={"mean": 0.25, "steps": 0.0})


def owning() -> Algorithm:
    """Its loss reads the head and every number; it remembers a running mean."""

    def loss(outputs: Outputs, batch: Batch) -> tuple[torch.Tensor, Metrics]:
        assert outputs.scores is not None
        numbers = outputs.scalars
        error = (outputs.scores.sum(-1) - numbers["log_z"] - numbers["mean"]) ** 2
        found = masked_sum(error, batch) - masked_sum(outputs.logprobs, batch)
        return found, {"policy/error": mean(error, batch.mask)}

    def remember(numbers: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        return {"mean": 0.9 * numbers["mean"] + 0.1 * metrics["policy/error"], "steps": numbers["steps"] + 1}

    return Algorithm(
        select.everything, credit.uniform, weigh.by_token, loss, dense=True, owned=OWNED, remember=remember
    )


def learner_with(model: Path, owned: Owned, seed: int = 0) -> Learner:
    return Learner(Policy(model, LORA, device="cpu", seed=seed), Schedule(lr=1e-2, steps=8), seed=seed, owned=owned)


def test_head_learned_and_remembered_numbers_survive(
    tmp_path: Path, tiny_model: Path, make_groups: Callable[..., list[Group]]
) -> None:
    """And how long the policy still stands still: saved after two of three such steps."""
    groups, algorithm = make_groups(2, 3), owning()
    batch, source = Batch.of(groups), Recorded(groups, 2, 0)
    first = learner_with(tiny_model, OWNED)
    for _ in range(2):
        first.update(batch, algorithm)
    kept = Checkpoints(tmp_path, 1).save(2, first, source)
    remembered = dict(first.remembered)
    assert remembered["steps"] == 2
    assert remembered["mean"] != 0.25
    expected = [first.update(batch, algorithm) for _ in range(3)]

    second = learner_with(tiny_model, OWNED, seed=1)
    restore(kept, second, source)
    assert second.remembered == remembered
    assert float(second.own.get_parameter("log_z").detach()) != 0.5
    assert second.own.get_parameter("head.weight").detach().any()
    assert [second.update(batch, algorithm) for _ in range(3)] == expected
    for name, p in first.trained().items():
        assert torch.equal(p, second.trained()[name]), name
    assert second.remembered == first.remembered


def test_the_policy_alone_can_be_had_from_such_a_checkpoint(
    tmp_path: Path, tiny_model: Path, make_groups: Callable[..., list[Group]]
) -> None:
    """Sampling and export need no head; going on training does."""
    groups = make_groups(2, 3)
    first, source = learner_with(tiny_model, OWNED), Recorded(groups, 2, 0)
    for _ in range(4):
        first.update(Batch.of(groups), owning())
    kept = Checkpoints(tmp_path, 1).save(4, first, source)
    plain = learner_with(tiny_model, Owned(), seed=1)
    load_trained(kept, plain)
    for name, p in plain.trained().items():
        assert torch.equal(p, first.trained()[name]), name
    with pytest.raises(InputError, match=r"own\.head\.bias"):
        restore(kept, plain, source)
    with pytest.raises(InputError, match="its parameters are not those"):
        load_trained(kept, learner_with(tiny_model, Owned(head=1)))
