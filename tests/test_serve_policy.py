"""`rlft serve-policy`: a run's policy behind OpenAI's API; what is recorded there is learned from as it was said."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from openai import APIStatusError, AsyncOpenAI, OpenAI
from rich.console import Console
from transformers import AutoModelForCausalLM

from rlft.after import export
from rlft.chat import Chat
from rlft.config import Config
from rlft.material import material
from rlft.session import begin
from rlft.settings import load, validate
from rlft.terminal import Terminal
from rlft.types import Completion, InputError, RunError
from tests.served import HI, Served, Watched

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
QUIET = Terminal(Console(quiet=True))


def plain(model: Path, folder: Path) -> dict[str, Any]:
    return {
        "name": "served",
        "out": str(folder / "run"),
        "steps": 1,
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": {"type": "generated", "limit": 2}},
        "reward": {"type": "format", "pattern": "[a-m].*"},
        "algorithm": {"type": "grpo"},
        "learner": {"lr": 0.02},
        "rollout": {
            "engine": {"type": "local"}, "tasks_per_step": 1, "group_size": 4,
            "sampling": {"max_tokens": 8, "temperature": 1.5},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("served")
    assert begin(validate(plain(tiny_model, folder)), QUIET) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


@pytest.fixture
def engine(tiny_model: Path, chat: Chat) -> Watched:
    return Watched(tiny_model, chat)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Config:
    return validate(plain(tiny_model, tmp_path))


Asking = Callable[[AsyncOpenAI], Any]


@pytest.fixture
def asking(engine: Watched, chat: Chat, config: Config) -> Callable[..., Any]:
    """asking(function, key=, record=, own=) -> what the function of a client returns; own: the key of the service."""

    def ask(function: Asking, key: str = "one", record: Path | None = None, own: str = "", most: int = 8) -> Any:
        async def run() -> Any:
            async with Served(engine, chat, config, record, own, most).client(key) as client:
                return await function(client)

        return asyncio.run(run())

    return ask


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


async def twice(client: AsyncOpenAI) -> None:
    """Two turns, paid in between and at the end."""
    messages = list(HI)
    for amount, done in ((0.25, False), (0.5, True)):
        said = await client.chat.completions.create(model="m", messages=messages)
        messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "Go on."}]
        await client.post("/episodes/current/reward", body={"reward": amount, "done": done}, cast_to=object)


def test_an_episode_is_recorded_token_by_token(asking: Callable[..., Any], engine: Watched, tmp_path: Path) -> None:
    asking(twice, key="episode-7", record=tmp_path)
    (row,) = rows(tmp_path)
    (sample,) = row["samples"]
    assert (row["episode"], row["score"]) == ("episode-7", 0.75)
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
    first, second = engine.prompts
    assert sample["tokens"][: len(second)] == second
    assert second[: len(first)] == first
    chosen = [i for i, own in enumerate(sample["mask"]) if own]
    assert chosen[0] == len(first)
    assert chosen[-1] == len(sample["tokens"]) - 1
    assert all((value is None) != own for value, own in zip(sample["logprobs"], sample["mask"], strict=True))
    assert {s.temperature for s in engine.samplings} == {1.0}


def test_keys_are_episodes_and_those_that_are_left_open_end_with_the_service(
    asking: Callable[..., Any], tmp_path: Path
) -> None:
    async def several(client: AsyncOpenAI) -> None:
        async def one(name: str) -> None:
            own = client.with_options(api_key=name)
            await own.chat.completions.create(model="m", messages=[{"role": "user", "content": f"I am {name}"}])

        await asyncio.gather(*(one(f"key-{i}") for i in range(5)))

    asking(several, record=tmp_path)
    found = {row["episode"]: row["prompt"][0]["content"] for row in rows(tmp_path)}
    assert found == {f"key-{i}": f"I am key-{i}" for i in range(5)}


def test_without_a_record_the_client_says_how_it_is_sampled(asking: Callable[..., Any], engine: Watched) -> None:
    async def greedy(client: AsyncOpenAI) -> list[str]:
        wish: Any = {"temperature": 0, "max_tokens": 5, "top_p": 0.5, "extra_body": {"top_k": 3}}
        said = [await client.chat.completions.create(model="m", messages=HI, **wish) for _ in range(2)]
        return [str(one.choices[0].message.content) for one in said]

    first, second = asking(greedy, most=100)
    assert first == second
    asked = engine.samplings[0]
    assert (asked.temperature, asked.max_tokens, asked.top_p, asked.top_k) == (0, 5, 0.5, 3)


def test_a_service_with_a_key_refuses_others(asking: Callable[..., Any], tmp_path: Path) -> None:
    async def once(client: AsyncOpenAI) -> None:
        await client.chat.completions.create(model="m", messages=HI)

    asking(once, key="secret:mine", own="secret", record=tmp_path)
    assert rows(tmp_path)[0]["episode"] == "mine"
    for key in ("wrong", "secre", "secrets:mine", "wrong:mine"):
        with pytest.raises(APIStatusError) as refused:
            asking(once, key=key, own="secret", record=tmp_path)
        assert refused.value.status_code == 401
    assert len(rows(tmp_path)) == 1


async def once(client: AsyncOpenAI) -> str:
    return str((await client.chat.completions.create(model="m", messages=HI)).choices[0].message.content)


def test_a_secret_may_hold_colons(asking: Callable[..., Any], tmp_path: Path) -> None:
    asking(once, key="a:b:e1", own="a:b", record=tmp_path)
    asking(once, key="a:b", own="a:b", record=tmp_path)
    assert [row["episode"] for row in rows(tmp_path)] == ["e1", "request-1"]
    for key in ("a", "a:", "a:c:e1", "a:bb"):
        with pytest.raises(APIStatusError, match="401"):
            asking(once, key=key, own="a:b", record=tmp_path)


def test_a_service_that_comes_again_says_something_else(asking: Callable[..., Any], tmp_path: Path) -> None:
    answers = {asking(once, key=f"e{i}", record=tmp_path) for i in range(3)}
    assert (len(rows(tmp_path)), len(answers)) == (3, 3)


def test_a_failure_of_the_engine_is_told(
    asking: Callable[..., Any], engine: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def breaks(*_: Any) -> Completion:
        raise RuntimeError("no luck")

    monkeypatch.setattr(engine, "generate", breaks)
    for record in (None, tmp_path):
        with pytest.raises(APIStatusError, match="RuntimeError: no luck") as refused:
            asking(once, record=record)
        assert refused.value.status_code == 500


def test_an_episode_that_cannot_be_written_ends_the_record(asking: Callable[..., Any], tmp_path: Path) -> None:
    async def then_more(client: AsyncOpenAI) -> None:
        (tmp_path / "episodes.jsonl").mkdir()
        await twice(client)
        await asyncio.sleep(0.3)  # it ends after it was paid
        with pytest.raises(APIStatusError, match="the episode one could not be written") as refused:
            await once(client.with_options(api_key="another"))
        assert (refused.value.status_code, refused.value.code) == (500, "record_lost")

    with pytest.raises(RunError, match="the episode one could not be written"):
        asking(then_more, record=tmp_path)
    with pytest.raises(InputError, match="move it away"):
        asking(once, record=tmp_path)


def test_a_full_disk_leaves_no_half_of_a_line(asking: Callable[..., Any], tmp_path: Path) -> None:
    asking(once, key="first", record=tmp_path)
    size = (tmp_path / "episodes.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(RunError, match="the episode second could not be written"):
            asking(once, key="second", record=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["episode"] for row in rows(tmp_path)] == ["first"]


@pytest.mark.parametrize("body", [{"reward": True}, {"reward": 10**400}, {"metrics": {"\ud800": 1}}])
def test_what_is_no_reward_is_refused(asking: Callable[..., Any], tmp_path: Path, body: dict[str, Any]) -> None:
    async def pays(client: AsyncOpenAI) -> None:
        await once(client)
        content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        await client.post("/episodes/current/reward", content=content, options={"headers": headers}, cast_to=object)

    with pytest.raises(APIStatusError) as refused:
        asking(pays, record=tmp_path)
    assert refused.value.status_code == 400
    assert rows(tmp_path)[0]["score"] == 0


def test_what_does_not_fit_the_context_is_refused(asking: Callable[..., Any], tmp_path: Path) -> None:
    async def long(client: AsyncOpenAI) -> None:
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 500}])

    with pytest.raises(APIStatusError) as refused:
        asking(long, record=tmp_path)
    assert (refused.value.status_code, refused.value.code) == (400, "context_length_exceeded")
    assert "and the context is 400" in str(refused.value)
    assert not (tmp_path / "episodes.jsonl").exists()


@pytest.mark.slow
def test_the_program_serves_a_runs_policy_whose_record_is_trained_on(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlft.cli", "serve-policy", str(trained), "model.device=cpu", "--port", "0"]
    program = subprocess.Popen(
        [*command, "--record", str(tmp_path / "kept")], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert program.stdout is not None
        line = next(line for line in program.stdout if "serving" in line)
        (url,) = re.findall(r"http://\S+:\d+", line)
        client = OpenAI(base_url=f"{url}/v1", api_key="episode-1")
        assert [model.id for model in client.models.list()] == ["policy"]
        messages = list(HI)
        for _ in range(2):
            said = client.chat.completions.create(model="policy", messages=messages)
            messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "Go on."}]
        client.post("/episodes/current/reward", body={"reward": 1}, cast_to=object)  # Ctrl-C ends the episode
    finally:
        program.send_signal(signal.SIGINT)
        assert program.wait(60) == 0
    (row,) = rows(tmp_path / "kept")
    (sample,) = row["samples"]
    export(trained, tmp_path / "merged", merged=True, step=None)
    again = logprobs(tmp_path / "merged", sample["tokens"], temperature=1.5)
    for i, value in enumerate(sample["logprobs"]):
        assert value is None or value == pytest.approx(again[i], abs=1e-3), "the trained weights said this"
    assert learned(trained, tmp_path, row) == 0


def logprobs(model: Path, tokens: list[int], temperature: float) -> list[float]:
    """Of each token behind those before it; 0 for the first."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        values = (loaded(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)
    return [0.0, *(float(values[i - 1, token]) for i, token in enumerate(tokens) if i)]


def learned(trained: Path, folder: Path, row: dict[str, Any]) -> int:
    """The exit code of a run that imitates what was recorded; checks that its tokens are those that were sampled."""
    own = load(trained / "config.yaml").model_dump()
    config = validate(
        {
            "name": "imitates",
            "out": str(folder / "imitates"),
            "steps": 1,
            "model": {"path": own["model"]["path"], "device": "cpu"},
            "data": {"train": str(folder / "kept" / "episodes.jsonl")},
            "algorithm": {"type": "sft"},
            "rollout": {"tasks_per_step": 1},
        }
    )
    ((trajectory,),) = material(config).groups
    (kept,) = trajectory.samples
    (sample,) = row["samples"]
    assert (kept.tokens, kept.mask, kept.version, trajectory.score) == (sample["tokens"], sample["mask"], -1, 1.0)
    edges = [a != b for a, b in zip(kept.mask, kept.mask[1:], strict=False)]
    assert sum(edges) == 3, "both answers are learned from: not chosen, chosen, not chosen, chosen"
    return begin(config, QUIET)


def test_an_answer_without_text_is_learned_from_too(tiny_model: Path, tmp_path: Path) -> None:
    row = {
        "prompt": HI,
        "completion": "",
        "score": 0.5,
        "samples": [{"tokens": [5, 6, 2], "mask": [False, False, True]}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    config = plain(tiny_model, tmp_path) | {"data": {"train": str(tmp_path / "rows.jsonl")}}
    ((one,),) = material(validate(config | {"algorithm": {"type": "sft"}, "reward": None})).groups
    assert (one.samples[0].tokens, one.samples[0].mask, one.score) == ([5, 6, 2], [False, False, True], 0.5)


def test_samples_that_are_none_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = {"prompt": "Hi", "completion": "Ho", "score": 1.0}
    for samples, said in (
        ([{"tokens": [5, 6], "mask": [True]}], "mask of their length"),
        ([{"tokens": [5, 900], "mask": [False, True]}], "another model said them"),
    ):
        (tmp_path / "rows.jsonl").write_text(json.dumps(base | {"samples": samples}) + "\n")
        config = plain(tiny_model, tmp_path) | {"data": {"train": str(tmp_path / "rows.jsonl")}}
        config |= {"algorithm": {"type": "sft"}, "reward": None}
        with pytest.raises(InputError, match=said):
            material(validate(yaml.safe_load(yaml.safe_dump(config))))
