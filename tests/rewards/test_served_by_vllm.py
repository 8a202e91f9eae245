"""Judges and reward models served by vLLM, as a user starts them; what they say is held against transformers."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlft.rewards.catalog import RewardConfig
from rlft.rewards.judges import briefs
from rlft.serve_judge import block, command
from rlft.types import InputError

ROOT = Path(__file__).parents[2]
PROMPT = "What is 7+5?"


@contextmanager
def vllm(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of `rlft serve-judge`, once it answers."""
    pytest.importorskip("vllm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve-judge", str(model), "--port", str(port), "--max-tokens", "512", *options]
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "rlft.cli", *words], stdout=file, stderr=file, cwd=ROOT)
    try:
        until = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < until:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def judged(plain: dict[str, Any], *group: Any) -> list[float | None]:
    return list(asyncio.run(TypeAdapter(RewardConfig).validate_python(plain).build()(group)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_local_judge_by_one_command(tiny_model, tmp_path, play):
    """Its probability of a word is that of transformers. Its replies are nonsense, and that is a failure."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with vllm(tiny_model, tmp_path / "log") as url:
        local = {"url": f"{url}/v1", "model": str(tiny_model), "max_tokens": 16}
        plain: dict[str, Any] = {"type": "judge", "judges": {"local": local}, "template": "Is {answer} right?"}
        garbage = play("12")
        assert judged(plain, garbage) == [None]
        assert "Unreadable" in garbage.failures[0].said
        assert garbage.metrics["reward/judge/tokens_in"] > 0
        local["max_tokens"] = 1
        for answer in ("12", "It is 13."):
            likely = _likely(model, tokenizer, answer)
            first, second = list(likely)[:2]
            plain |= {"mode": "yes_probability", "mass": 0.0, "choices": {first: 1.0, second: 0.0}}
            (value,) = judged(plain, play(answer))
            assert value == pytest.approx(likely[first] / (likely[first] + likely[second]), abs=1e-3)


def _likely(model: Any, tokenizer: Any, answer: str) -> dict[str, float]:
    """By transformers: probabilities of the first words of a reply, the likeliest first, of the 20 likeliest tokens."""
    about = {"question": PROMPT, "rubric": "The answer is correct, complete and clear.", "count": 1}
    text = briefs.fill("Is {answer} right?", about | {"low": "1", "high": "10"}, {"answer": answer})
    said = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        top = torch.softmax(model(ids["input_ids"]).logits[0, -1], -1).topk(20)
    found: dict[str, float] = {}
    for share, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        word = tokenizer.decode([token]).strip().lower()
        if word.isascii() and word.isprintable() and word:
            found[word] = found.get(word, 0.0) + share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [False, True])
def test_a_sequence_classifier(activation, reward_server, play):
    """Its raw output is that of transformers, and its probability the logistic function of that."""
    folder, url = reward_server
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    group = [play("12"), play("It is 13, I think.")]
    plain = {"type": "served_model", "url": url, "model": str(folder), "activation": activation}
    expected = []
    for one in group:
        ids = tokenizer.apply_chat_template(list(one.messages), return_tensors="pt", return_dict=True)
        with torch.no_grad():
            (logit,) = model(ids["input_ids"]).logits[0]
        expected.append(float(torch.sigmoid(logit) if activation else logit))
    assert judged(plain, *group) == pytest.approx(expected, abs=1e-3)
    assert abs(expected[0] - expected[1]) > 0.01


@pytest.mark.slow
def test_an_output_that_it_does_not_have_is_a_failure(reward_server, play):
    folder, url = reward_server
    one = play("12")
    assert judged({"type": "served_model", "url": url, "model": str(folder), "output": 1}, one) == [None]
    assert "output 1 is not in" in one.failures[0].said


@pytest.fixture(scope="module")
def reward_server(tiny_model, tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A tiny random reward model, and where vLLM serves it."""
    folder = tmp_path_factory.mktemp("classifier") / "model"
    config: Any = LlamaConfig.from_pretrained(tiny_model)
    config.num_labels = 1
    with torch.random.fork_rng():
        torch.manual_seed(3)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    with vllm(folder, folder.parent / "log", "--runner", "pooling") as url:
        yield folder, url


def test_the_command_and_the_lines_that_it_prints(tiny_model):
    words = command(str(tiny_model), "127.0.0.1", 8000, 512, ["--seed", "1"])
    assert words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert words[-2:] == ["--seed", "1"]
    plain = yaml.safe_load(block("some/model", "127.0.0.1", 8000))["reward"]
    reward: Any = TypeAdapter(RewardConfig).validate_python(plain)
    assert reward.judges["local"].url == "http://127.0.0.1:8000/v1"
    plain = yaml.safe_load(block("some/model", "127.0.0.1", 8000, ["--runner", "pooling"]))["reward"]
    assert TypeAdapter(RewardConfig).validate_python(plain).type == "served_model"
    with pytest.raises(InputError, match=r"no config\.json"):
        command("./no-such-model", "127.0.0.1", 8000, 512)
