"""The memory plan: exact where things can be counted, monotone where not, and near what a real run takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlft.afford import changed, cheapest
from rlft.config import Config
from rlft.fits import judged
from rlft.footprint import Asked, Live, Rehearsal, Shape, adapted
from rlft.forecast import ARRIVING, SHARD, Forecast, count, optimizer_bytes
from rlft.forward import passed
from rlft.heap import Heap
from rlft.kernels import score
from rlft.learner import Schedule
from rlft.material import material
from rlft.memory import Footprint, Process, Room, Term
from rlft.packing import Layout
from rlft.schedule import make_optimizer
from rlft.session import begin, write_config
from rlft.settings import dump, load, validate
from rlft.terminal import Terminal
from rlft.types import InputError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128}
KINDS = {
    "llama": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "mistral": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": GPT2,
}
LORA = {"type": "lora", "r": 4, "target_modules": "all-linear"}
ADAPTERS = {"lora": LORA, "dora": {**LORA, "use_dora": True}, "vera": {"type": "vera", "r": 8}, "none": None}


def config_of(kind: str, **more: Any) -> Any:
    """A small model's config."""
    return AutoConfig.for_model(kind, **{**KINDS[kind], **more})


def real(config: Any, settings: Any) -> Any:
    """The same model with numbers."""
    return adapted(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), settings)


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["lora", "dora", "none"])
def test_weights_adapter_and_gradients_are_counted_as_they_are(kind: str, adapter: str) -> None:
    config, settings = config_of(kind), ADAPTERS[adapter]
    n = count(config, settings, torch.float32, cpu=True)
    plain, model = real(config, None), real(config, settings)
    assert n.weights == size(plain.parameters())
    assert n.adapter == size(model.parameters()) - size(plain.parameters())
    learned = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    assert n.trained == size(p.grad for p in learned)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_optimizer_is_counted_as_it_is(name: str, adapter: str) -> None:
    config, settings = config_of("llama"), ADAPTERS[adapter]
    learned = [p for p in real(config, settings).parameters() if p.requires_grad]
    for p in learned:
        p.grad = torch.ones_like(p)
    optimizer = make_optimizer(learned, Schedule(lr=1e-3, steps=2, optimizer=name))
    with Live(iter([*learned, *(p.grad for p in learned if p.grad is not None)])) as live:
        optimizer.step()
        optimizer.step()
    state, scratch = optimizer_bytes(name, count(config, settings, torch.float32, cpu=True))
    steps = 64 * len(learned)  # a number for each parameter
    held = sum(size(v for v in kept.values() if torch.is_tensor(v)) for kept in optimizer.state.values())
    assert abs(state - held) <= steps
    assert state + 0.5 * scratch - steps <= live.peak <= state + 1.1 * scratch + steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_rehearsal_sees_what_a_real_pass_holds(kind: str, masked: bool, adapter: str) -> None:
    """The same tracker around the same pass with numbers: six layers against two and four of them without."""
    config, shape = config_of(kind), Shape(2, 32, 20, masked)
    model = real(config, ADAPTERS[adapter])
    model.config.use_cache = False
    model.train()
    ids = torch.zeros(2, 32, dtype=torch.long)
    seen = torch.ones(2, 1, 32, 32, dtype=torch.bool) if masked else None
    picks = torch.zeros(20, dtype=torch.long)
    layout = Layout(ids, torch.arange(32).expand(2, -1), seen, ids, ids)
    with Live(iter([*model.parameters(), *model.buffers(), ids, layout.positions])) as live:
        hidden, logits = passed(model, layout, picks, True)
        assert logits is not None
        logprobs, _ = score(logits, picks, 1.0)
        del logits, hidden
        logprobs.sum().backward()
    rehearsal = Rehearsal(config, ADAPTERS[adapter], CPU, torch.float32)
    assert rehearsal.alive(shape, Asked()) == pytest.approx(live.peak, rel=0.03)


def test_more_tokens_take_no_less_and_recomputed_layers_take_less() -> None:
    config = config_of("llama")
    plain, recomputed = (Rehearsal(config, LORA, CPU, torch.float32, again) for again in (False, True))
    peaks = [plain.peak(Shape(n, 64, 8 * n, True), Asked()) for n in (1, 4, 8)]
    assert peaks == sorted(set(peaks))
    assert recomputed.peak(Shape(8, 64, 64, True), Asked()) < 0.6 * peaks[-1]
    assert plain.peak(Shape(8, 64, 64, True), Asked(gradient=False)) < 0.5 * peaks[-1]
    assert plain.peak(Shape(8, 64, 64, True), Asked(head=1, second=True)) > 1.5 * peaks[-1]
    large = Rehearsal(config_of("llama", vocab_size=4096, num_hidden_layers=1), LORA, CPU, torch.float32)
    shape = Shape(2, 64, 120, True)
    assert large.alive(shape, Asked(distributions=True)) > large.alive(shape, Asked()) + 2 * 120 * 4096 * 4


def test_a_heap_reuses_what_fits_and_loses_what_does_not() -> None:
    heap = Heap()
    first, stays = heap.take(1000), heap.take(1000)
    top = heap.top
    heap.give(first)
    heap.take(1000)  # by its alignment longer than the hole
    assert heap.top > top
    top = heap.top
    heap.take(800)
    assert heap.top == top
    heap.give(stays)
    heap.take(10_000)
    assert heap.top >= top + 10_000 - 2000


def test_the_peak_is_the_largest_phase_not_the_sum() -> None:
    one = Process("run", (Term("w", 10), Term("a", 5, ("learn",)), Term("k", 3, ("generate",))))
    assert (one.peak, one.phase, one.at("generate")) == (15, "learn", 13)
    both = Footprint((one, Process("engine", (Term("e", 7),))), shared=2)
    assert both.peak == 15 + 7 + 2
    assert Room(None).lacks(both) is False
    assert Room(23).lacks(both)
    assert not Room(23).lacks(both, 1.15)
    assert Room(100, shared=1).lacks(both)


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer with a model whose activations are larger than a process's modules."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(
        tiny_model, hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests before this one left in the process is no part of a run."""
    monkeypatch.setattr("rlft.forecast.resident", lambda: 500 * 2**20)


def a_run(model: Path, folder: Path, **changes: Any) -> Config:
    """8 demonstrations of some 400 tokens, learned in one micro-batch. No engine."""
    rows = folder / "said.jsonl"
    said = [{"prompt": f"Say {i}", "completion": "one two " * (95 + i)} for i in range(8)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in said))
    given: dict[str, Any] = {
        "name": "memory",
        "steps": 1,
        "out": str(folder / "run"),
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 8, "target_modules": "all-linear"},
        "data": {"train": str(rows)},
        "algorithm": {"type": "sft"},
        "learner": {"micro_tokens": 8192},
    }
    return validate(given | changes)


@pytest.mark.slow
def test_the_cheapest_change_makes_it_fit_and_nothing_cheaper_does(wide_model: Path, tmp_path: Path) -> None:
    config = a_run(wide_model, tmp_path)
    forecast = Forecast(material(config))
    now = forecast.footprint(config)
    halved = forecast.footprint(changed(config, {"learner.micro_tokens": 1024}))
    room = Room((now.peak + halved.peak) // 2)
    found = cheapest(config, forecast.footprint, room)
    assert found is not None
    keys, after = found
    assert set(keys) == {"learner.micro_tokens"}
    assert after.peak <= (room.memory or 0) < now.peak
    assert forecast.footprint(changed(config, keys)).peak == after.peak
    twice = changed(config, {key: 2 * value for key, value in keys.items()})
    assert room.lacks(forecast.footprint(twice)) or twice.learner.micro_tokens == 8192
    assert cheapest(config, forecast.footprint, Room(1)) is None


@pytest.mark.slow
def test_a_run_is_refused_warned_of_or_let_alone(wide_model: Path, tmp_path: Path) -> None:
    config = a_run(wide_model, tmp_path)
    strict, peak = {"memory.check": "refuse"}, judged(material(config)).footprint.peak / 1e9
    with pytest.raises(InputError, match=r"memory: at most .* does not fit.*learner\.micro_tokens=") as refused:
        begin(changed(config, {**strict, "memory.limit": peak / 1.2}), Terminal())
    assert "memory.check=warn" in str(refused.value)
    assert not (tmp_path / "run").exists()
    said: list[str] = []

    class Listening(Terminal):
        def say(self, text: str) -> None:
            said.append(text)

    assert begin(changed(config, {**strict, "memory.limit": peak / 1.05}), Listening()) == 0  # within the margin
    assert sum("memory: at most" in text for text in said) == 1
    off = {"memory.limit": peak / 1.2, "memory.check": "off", "out": str(tmp_path / "off")}
    said.clear()
    assert begin(changed(config, off), Listening()) == 0
    assert not any("memory" in text for text in said)
    made = {"memory.limit": peak / 1.2, "memory.check": "adapt", "out": str(tmp_path / "adapted")}
    assert begin(changed(config, made), Listening()) == 0
    assert any("that change is made" in text for text in said)
    taken = load(tmp_path / "adapted" / "config.yaml", [])
    assert taken.learner.micro_tokens < config.learner.micro_tokens
    assert judged(material(taken)).fits


def test_a_change_keeps_what_came_from_the_environment_unwritten(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own_model"
    shutil.copytree(wide_model, own)  # a path of its own: what once came from the environment is hidden for good
    monkeypatch.setenv("RLFT_TEST_MODEL", str(own))
    written = dump(a_run(wide_model, tmp_path)).replace(str(wide_model), "${oc.env:RLFT_TEST_MODEL}")
    (tmp_path / "run.yaml").write_text(written)
    config = load(tmp_path / "run.yaml", [])
    assert config.model.path == str(own)
    assert "${oc.env:RLFT_TEST_MODEL}" in dump(changed(config, {"learner.micro_tokens": 512}))


PROGRAM = (
    "import sys; from pathlib import Path; from rlft.session import begin; from rlft.settings import *\n"
    "from rlft.terminal import Terminal\n"
    "status = lambda: Path('/proc/self/status').read_text().split('VmHWM:')[1]\n"
    "peak = lambda: 1024 * int(status().split()[0])\n"
    "read = load(Path(sys.argv[1]), sys.argv[2:]); begin(read, Terminal()); print('PEAK', peak())\n"
)


def peak_of(folder: Path, *overrides: str) -> int:
    """Bytes at the high-water mark of a run by the folder's config, in a process of its own."""
    given = [str(folder / "config.yaml"), *overrides]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *given], capture_output=True, text=True, check=True)
    return int(done.stdout.rsplit("PEAK ", 1)[1].split()[0])


@pytest.mark.slow
def test_real_runs_take_about_what_was_predicted_and_learn_the_same_kept_or_given_back(
    wide_model: Path, tmp_path: Path
) -> None:
    """A large micro-batch against a small one, whose mark its imports may set; and another malloc wastes otherwise."""
    config = a_run(wide_model, tmp_path)
    write_config(tmp_path, config)
    forecast = Forecast(material(config))
    measured, large, adapters = {}, {}, {}
    for keep, band in ((True, 0.5), (False, 0.4)):
        predicted, peaks = [], []
        for tokens in (8192, 512):
            changes = {"memory.keep": keep, "learner.micro_tokens": tokens}
            predicted.append(forecast.activations(changed(config, changes))[0])
            out = tmp_path / f"{keep}-{tokens}"
            peaks.append(peak_of(tmp_path, f"memory.keep={keep}", f"learner.micro_tokens={tokens}", f"out={out}"))
            (saved,) = out.glob("checkpoints/step-000001/**/adapter_model.safetensors")
            adapters[keep, tokens] = saved.read_bytes()
        measured[keep], large[keep] = peaks[0] - peaks[1], peaks[0]
        assert measured[keep] == pytest.approx(predicted[0] - predicted[1], rel=band), (keep, predicted, peaks)
    assert large[False] < large[True] - 0.1 * measured[True]
    assert adapters[True, 8192] == adapters[False, 8192]


def test_a_worker_has_its_own_process_whatever_the_engine_is_and_adapters_need_no_room_for_all_weights(
    tmp_path: Path,
) -> None:
    """Several agents are always sent as adapters; merged weights go through shared memory."""
    plain = load(ROOT / "configs/cory.yaml", ["model.path=tiny-random", "model.device=cpu", f"out={tmp_path}/run"])
    local = {"agents.count": 1, "rollout.engine": {"type": "local", "place": "worker"}}
    found = {}
    for name, changes in {
        "local": local,
        "merged": {"agents.count": 1, "rollout.engine.place": "worker"},
        "several": {"rollout.engine.place": "worker"},
    }.items():
        config = changed(plain, changes)
        found[name] = Forecast(material(config)).footprint(config, rough=True)
    assert all(len(footprint.processes) == 2 for footprint in found.values())
    assert found["merged"].shared == found["local"].shared > 0
    assert found["several"].shared == 0
    sent = {name: {t.name: t.bytes for t in f.processes[1].terms}[ARRIVING] for name, f in found.items()}
    assert SHARD < sent["several"] < sent["merged"]
    assert sent["local"] == SHARD
