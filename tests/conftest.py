"""Shared by all tests: tiny models made on the spot, and random recorded groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import rlft  # noqa: F401  (first: it says how torch's threads wait, and torch reads that when it is loaded)

# isort: split
import pytest
import torch

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.tiny import VOCAB, save
from rlft.types import NAN, Group, Sample, Task, Trajectory
from tests.killing import Server

MakeGroups = Callable[..., list[Group]]
Watching = Callable[[Any], AbstractContextManager[list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 0.1M parameters and a tokenizer with a ChatML template."""
    return save(tmp_path_factory.mktemp("tiny") / "model", tied=False)


@pytest.fixture(scope="session")
def chat(tiny_model: Path) -> Chat:
    """Its template and tokenizer."""
    return Chat(tiny_model)


@pytest.fixture(scope="session")
def engine(tiny_model: Path, chat: Chat) -> LocalEngine:
    """A real engine over it, in this process."""
    return LocalEngine(tiny_model, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer)


@pytest.fixture(scope="session")
def tiny_tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one matrix for input and output embeddings."""
    return save(tmp_path_factory.mktemp("tiny-tied") / "model", tied=True)


def _make_groups(count: int = 3, size: int = 4, seed: int = 0, longest: int = 9, sampled: bool = True) -> list[Group]:
    """Random trajectories of one sample each, a prompt of 2 to 4 tokens per group, scores 0, 0.5 or 1.

    longest: the most tokens of a completion. sampled: with random log-probs, else NaN as in recorded data.
    """
    draw = random.Random(seed)

    def speak(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(length)]

    def play(g: int, prompt: list[int]) -> Trajectory:
        before, said = len(prompt), draw.randint(1, longest)
        mask = [False] * before + [True] * said
        logprobs = [NAN] * before + [-draw.expovariate(0.5) if sampled else NAN for _ in range(said)]
        sample = Sample(prompt + speak(said), mask, logprobs, [0.0] * len(mask), version=0 if sampled else -1)
        return Trajectory(Task(f"task-{g}", ()), (), [sample], score=draw.choice([0.0, 0.5, 1.0]))

    prompts = [speak(draw.randint(2, 4)) for _ in range(count)]
    return [tuple(play(g, prompt) for _ in range(size)) for g, prompt in enumerate(prompts)]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Runs that can be killed, each in a process of its own."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules whose models are so small that they are fastest on one thread, and on busy cores by far."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@contextmanager
def _watched(policy: Any) -> Iterator[list[dict[str, Any]]]:
    from rlft.packing import trunk_of

    read: list[dict[str, Any]] = []
    trunk: Any = trunk_of(policy.model)
    hook = trunk.register_forward_pre_hook(lambda _, __, given: read.append(given), with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def watched() -> Watching:
    """While a block runs, what the policy's trunk is given, call by call."""
    return _watched


@pytest.fixture(scope="session")
def make_groups() -> MakeGroups:
    """make_groups(count, size, seed, longest, sampled) -> random groups."""
    return _make_groups


@pytest.fixture
def gsm8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set laid out as openai/gsm8k on the hub, with rows of its form, in the folder that the test runs in."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    folder, parts = Path("openai/gsm8k"), ""
    for name in ("main", "socratic"):
        (folder / name).mkdir(parents=True)
        rows = {
            "question": [f"{name}: Ann has {n} apples and buys 5 more. How many has she?" for n in range(1, 9)],
            "answer": [f"She has {n} + 5 = <<{n}+5={n + 5}>>{n + 5} apples.\n#### {n + 5}" for n in range(1, 9)],
        }
        pq.write_table(pa.table(rows), folder / name / "train.parquet")
        parts += f"- config_name: {name}\n  data_files: [{{split: train, path: {name}/train.parquet}}]\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    return str(folder)
