"""Every engine, in this process and in one of its own, samples from the distribution that the learner computes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlft.batch import Batch
from rlft.engine.base import Delta, Engine, Full, Mark
from rlft.engine.local import LocalEngine
from rlft.engine.vllm import VllmEngine
from rlft.engine.worker import WorkerEngine, in_worker
from rlft.learner import Learner, Schedule
from rlft.policy import Policy
from rlft.sync import Sync, adapter_tensors
from rlft.types import NAN, Completion, InputError, RunError, Sample, Sampling, Task, Trajectory

CONTEXT = 128
TEMPERATURE = 0.7
VERSION = 7
SECOND_END = 5  # an end-of-turn id beside the tokenizer's
LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PLACES = ["local", "here-merged", "here-adapter", "worker-merged", "worker-adapter"]


@dataclass
class Rig:
    """An engine that serves `policy`, whose adapter is far from zero, and the learner of that policy."""

    engine: Engine
    policy: Policy
    learner: Learner
    model: Path
    place: str


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are fastest on one thread, and on busy cores by far."""
    kept, environment = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # workers inherit it
    yield
    torch.set_num_threads(kept)
    if environment is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = environment


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with two end-of-turn ids."""
    folder = tmp_path_factory.mktemp("two-ends") / "model"
    shutil.copytree(tiny_model, folder)
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, SECOND_END]}))
    return folder


@pytest.fixture(scope="module", params=PLACES)
def rig(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    place: str = request.param
    policy = Policy(model, LORA, device="cpu", dtype="float32")
    _move(policy, 0.2)
    learner = Learner(policy, Schedule(lr=1e-3, steps=1), temperature=TEMPERATURE)
    kind = "adapter" if place.endswith("adapter") else "merged"
    engine: Engine
    if place == "local":
        tokenizer = _tokenizer(model)
        engine = LocalEngine(model, torch.float32, torch.device("cpu"), max_sequences=24, tokenizer=tokenizer)
    else:
        settings = {
            "model": model,
            "dtype": torch.float32,
            "context": CONTEXT,
            "max_sequences": 24,
            "cache_gb": 0.05,
            "lora_rank": 4 if kind == "adapter" else 0,
            "log": tmp_path_factory.mktemp("log") / "engine.log",
        }
        engine = VllmEngine(**settings) if place.startswith("here") else in_worker(VllmEngine, **settings)
    sync = Sync(policy, engine, learner, kind, _prompts(2), Sampling(temperature=TEMPERATURE))
    try:
        asyncio.run(sync.send(policy, VERSION))
        yield Rig(engine, policy, learner, model, place)
    finally:
        asyncio.run(engine.close())
        sync.close()
    if isinstance(engine, WorkerEngine):
        assert not _alive(_pid(engine)), "close() left the engine's process behind"


def _tokenizer(model: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def _move(policy: Policy, scale: float, seed: int = 0) -> None:
    """Random values in place of the adapter's, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)


def _prompts(count: int, shortest: int = 3, longest: int = 50) -> list[list[int]]:
    """Random prompts of every length between; ids above the special ones."""
    generator = torch.Generator().manual_seed(1)
    lengths = [shortest + i * (longest - shortest) // max(count - 1, 1) for i in range(count)]
    return [torch.randint(6, 300, (n,), generator=generator).tolist() for n in lengths]


async def _ask(engine: Engine, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> list[Completion]:
    return await asyncio.gather(*map(engine.generate, prompts, samplings))


def _pid(engine: WorkerEngine) -> int:
    assert engine._process.pid is not None
    return engine._process.pid


def _alive(pid: int) -> bool:
    """The process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait(seconds: float, done) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.05)
    return done()


def _gap(learner: Learner, prompts: Sequence[list[int]], completions: Sequence[Completion]) -> float:
    """The largest difference between the engine's log-probs and the learner's."""
    groups = []
    for prompt, c in zip(prompts, completions, strict=True):
        n = len(prompt)
        mask = [False] * n + [True] * len(c.tokens)
        sample = Sample(prompt + c.tokens, mask, [NAN] * n + c.logprobs, [0.0] * len(mask), c.version)
        groups.append((Trajectory(Task("t", ()), (), [sample], score=0.0),))
    batch = Batch.of(groups)
    return float((learner.logprobs(batch) - batch.logprobs)[batch.mask].abs().max())


def test_64_open_requests_agree_with_the_learner(rig: Rig) -> None:
    """Trap 11: processed log-probs at the temperature; more requests than slots, of every length, all open at once."""
    prompts = _prompts(64)
    samplings = [Sampling(temperature=TEMPERATURE, max_tokens=4 + i % 20, seed=i) for i in range(64)]
    done = asyncio.run(_ask(rig.engine, prompts, samplings))
    assert _gap(rig.learner, prompts, done) < 1e-4
    assert {c.version for c in done} == {VERSION}
    for completion, sampling in zip(done, samplings, strict=True):
        ended = completion.tokens[-1] in (2, SECOND_END)
        assert completion.finish == ("stop" if ended else "length")
        assert ended or len(completion.tokens) == sampling.max_tokens
        assert not {2, SECOND_END} & set(completion.tokens[:-1])
    assert {c.finish for c in done} == {"stop", "length"}, "the test wants both"


def test_the_adapter_matters(rig: Rig) -> None:
    """The canary of the test above: the base's log-probs are other ones."""
    prompts = _prompts(8)
    done = asyncio.run(_ask(rig.engine, prompts, [Sampling(TEMPERATURE, 8, seed=i) for i in range(8)]))
    base = Learner(Policy(rig.model, LORA, device="cpu", dtype="float32"), Schedule(lr=1e-3, steps=1), TEMPERATURE)
    assert _gap(base, prompts, done) > 0.1


def test_greedy_is_that_of_transformers(rig: Rig, tmp_path: Path) -> None:
    rig.policy.save_merged(tmp_path)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = _prompts(4, 5, 40)
    done = asyncio.run(_ask(rig.engine, prompts, [Sampling(temperature=0.0, max_tokens=12)] * 4))
    for prompt, completion in zip(prompts, done, strict=True):
        ids = torch.tensor([prompt])
        told = merged.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=[2, SECOND_END]
        )
        assert completion.tokens == told[0, len(prompt) :].tolist()


def test_a_seed_fixes_its_request_alone(rig: Rig) -> None:
    """Alone, among others and in the other order: the same tokens. vLLM promises it for equal calls; here it holds."""
    prompts, count = _prompts(12), 12
    samplings = [Sampling(temperature=1.0, max_tokens=16, seed=100 + i) for i in range(count)]
    first = asyncio.run(_ask(rig.engine, prompts, samplings))
    again = asyncio.run(_ask(rig.engine, prompts, samplings))
    turned = asyncio.run(_ask(rig.engine, prompts[::-1], samplings[::-1]))[::-1]
    alone = [asyncio.run(_ask(rig.engine, [p], [s]))[0] for p, s in zip(prompts, samplings, strict=True)]
    other = asyncio.run(_ask(rig.engine, prompts, [Sampling(1.0, 16, seed=900 + i) for i in range(count)]))
    assert [c.tokens for c in again] == [c.tokens for c in first]
    assert [c.tokens for c in turned] == [c.tokens for c in first]
    assert [c.tokens for c in alone] == [c.tokens for c in first]
    assert sum(a.tokens == b.tokens for a, b in zip(other, first, strict=True)) < count // 2


def test_equal_prompts_with_other_seeds_differ(rig: Rig) -> None:
    prompt = _prompts(1, 40, 40)[0]
    done = asyncio.run(_ask(rig.engine, [prompt] * 8, [Sampling(1.0, 12, seed=i) for i in range(8)]))
    assert len({tuple(c.tokens) for c in done}) > 4


def test_a_stop_string_is_a_stop(rig: Rig) -> None:
    """Trap 4: the reason is the engine's; the last token is none of the ends."""
    prompt = _prompts(1, 20, 20)[0]
    tokenizer = _tokenizer(rig.model)
    for seed in range(50):
        free = asyncio.run(_ask(rig.engine, [prompt], [Sampling(1.0, 16, seed=seed)]))[0]
        texts = [tokenizer.decode([t]) for t in free.tokens]
        fresh = [i for i in range(2, len(texts) - 1) if texts[i].isalpha() and texts[i] not in "".join(texts[:i])]
        if fresh:
            break
    cut = asyncio.run(_ask(rig.engine, [prompt], [Sampling(1.0, 16, seed=seed, stop=(texts[fresh[0]],))]))[0]
    assert (cut.finish, cut.tokens) == ("stop", free.tokens[: fresh[0] + 1])


def test_a_cancelled_request_leaves_nothing_open(rig: Rig) -> None:
    """Among others that go on, and as the last one."""
    prompts = _prompts(4)
    samplings = [Sampling(1.0, 40, seed=i) for i in range(4)]

    async def play() -> list[Completion]:
        begun = [asyncio.ensure_future(rig.engine.generate(p, s)) for p, s in zip(prompts, samplings, strict=True)]
        await asyncio.sleep(0.02)
        begun[0].cancel()
        begun[2].cancel()
        rest = await asyncio.gather(begun[1], begun[3])
        last = [asyncio.ensure_future(rig.engine.generate(p, Sampling(1.0, 60, seed=9))) for p in prompts]
        await asyncio.sleep(0.02)
        for call in last:
            call.cancel()
        await asyncio.gather(begun[0], begun[2], *last, return_exceptions=True)
        await rig.engine.forget()  # vLLM refuses while blocks are in use
        return [*rest, *await _ask(rig.engine, prompts, samplings)]

    one, three, *whole = asyncio.run(play())
    assert [one.tokens, three.tokens] == [whole[1].tokens, whole[3].tokens]


def test_trap_23_the_prefix_cache_forgets_old_weights(rig: Rig) -> None:
    """One prompt of several cache blocks, before and after an update."""
    prompt = _prompts(1, 90, 90)[0]
    kind = "adapter" if rig.place.endswith("adapter") else "merged"
    sync = Sync(rig.policy, rig.engine, rig.learner, kind, [], Sampling())

    async def serve(version: int) -> float:
        await sync.send(rig.policy, version)
        done = await _ask(rig.engine, [prompt], [Sampling(TEMPERATURE, 8, seed=3)])
        assert done[0].version == version
        return _gap(rig.learner, [prompt], done)

    try:
        for version, seed in ((VERSION + 1, 5), (VERSION + 2, 6), (VERSION, 0)):  # back to what the other tests know
            _move(rig.policy, 0.2, seed)
            assert asyncio.run(serve(version)) < 1e-4
    finally:
        sync.close()


def test_both_proofs_reach_every_place(rig: Rig) -> None:
    """Through the pipe of a worker too: silent after a sync, and each alarmed once the policy has moved on."""
    kind = "adapter" if rig.place.endswith("adapter") else "merged"
    sync = Sync(rig.policy, rig.engine, rig.learner, kind, _prompts(2, 40), Sampling(temperature=TEMPERATURE))
    version = VERSION + 3

    async def play() -> tuple[list[str], list[str]]:
        assert (await sync(rig.policy, version)).gap < 1e-4
        _move(rig.policy, 0.2, 9)
        sent = adapter_tensors(rig.policy) if kind == "adapter" else rig.policy.merged()
        marks = {name: Mark.of(tensor, version) for name, tensor in sent}
        wrong, (_, strange) = await sync.account(marks, version), await sync.behave(rig.policy, version)
        _move(rig.policy, 0.2, 0)  # back to what the other tests know
        await sync.send(rig.policy, VERSION)
        assert len(wrong) == len(marks)
        return wrong, strange

    try:
        wrong, strange = asyncio.run(play())
        assert "rows are not the ones sent" in wrong[0]
        assert "log-probs of sampled tokens differ" in strange[0]
    finally:
        sync.close()


def test_what_does_not_fit_is_refused(rig: Rig) -> None:
    if rig.place == "local":
        with pytest.raises(RunError, match="merged weights only"):
            asyncio.run(rig.engine.load_weights(Delta(Path("nowhere")), 9))
    else:
        with pytest.raises(InputError, match="vLLM refuses a prompt of 200 tokens"):
            asyncio.run(_ask(rig.engine, [list(range(10, 110)) * 2], [Sampling(max_tokens=4)]))


def test_weights_are_refused_while_requests_are_open(rig: Rig) -> None:
    if rig.place == "local":
        pytest.skip("transformers answers a batch without a pause, so nothing is ever half-way")

    async def play() -> str:
        begun = asyncio.ensure_future(rig.engine.generate(_prompts(1)[0], Sampling(1.0, 100, seed=11)))
        await asyncio.sleep(0.02)
        with pytest.raises(RunError) as refused:
            await rig.engine.load_weights(Full([]), 99)
        await begun
        return str(refused.value)

    assert "while 1 requests were open" in asyncio.run(play())


@pytest.mark.slow
def test_the_engine_keeps_the_terminal_clean(model: Path) -> None:
    """Start, sampling and end of vLLM in this process: not a line on either stream."""
    code = f"""
import asyncio, torch
from pathlib import Path
from rlft.engine.vllm import VllmEngine
from rlft.types import Sampling
async def main():
    engine = VllmEngine(Path({str(model)!r}), torch.float32, 64, 8, cache_gb=0.02)
    await engine.generate([7, 8, 9], Sampling(1.0, 4, seed=1))
    await engine.close()
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_killed_worker_ends_every_open_call(model: Path) -> None:
    engine = in_worker(LocalEngine, model=model, dtype=torch.float32, device=torch.device("cpu"))

    async def play() -> list[BaseException | Completion]:
        await engine.generate([7, 8], Sampling(1.0, 2, seed=1))
        os.kill(_pid(engine), signal.SIGSTOP)  # so that none of the calls is answered before the end
        begun = [asyncio.ensure_future(engine.generate([7, 8, 9], Sampling(1.0, 100, seed=i))) for i in range(4)]
        await asyncio.sleep(0.1)
        os.kill(_pid(engine), signal.SIGKILL)
        ended = await asyncio.wait_for(asyncio.gather(*begun, return_exceptions=True), 20)
        with pytest.raises(RunError, match="ended"):
            await engine.generate([7], Sampling())
        await engine.close()
        return ended

    ended = asyncio.run(play())
    assert len(ended) == 4
    for error in ended:
        assert isinstance(error, RunError)
        assert "the engine's process ended (exit code -9). Resume the run" in str(error)
    assert not _alive(_pid(engine))


def test_what_goes_wrong_at_start_reaches_the_caller(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the engine did not start: OSError: .*nothing-here"):
        in_worker(LocalEngine, model=tmp_path / "nothing-here", dtype=torch.float32, device=torch.device("cpu"))


def test_a_worker_ends_with_its_parent(model: Path) -> None:
    """Killed, the parent can tell nobody; the worker notices that the pipe is closed."""
    code = f"""
import torch
from pathlib import Path
from rlft.engine.local import LocalEngine
from rlft.engine.worker import in_worker
if __name__ == "__main__":
    engine = in_worker(LocalEngine, model=Path({str(model)!r}), dtype=torch.float32, device=torch.device("cpu"))
    print(engine._process.pid, flush=True)
    import time; time.sleep(600)
"""
    script = model.parent / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert _alive(worker)
        parent.kill()
        parent.wait()
        assert _wait(20, lambda: not _alive(worker))
    finally:
        parent.kill()


def test_options_that_vllm_does_not_know(model: Path) -> None:
    with pytest.raises(InputError, match=r"rollout.engine.options: .*'warp_drive'"):
        VllmEngine(model, torch.float32, CONTEXT, options={"warp_drive": True})
