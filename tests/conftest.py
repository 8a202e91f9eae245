"""Shared by all tests: tiny models made on the spot, and random recorded groups."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import rlft  # noqa: F401  (first: it says how torch's threads wait, and torch reads that when it is loaded)

# isort: split
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlft.types import NAN, Group, Sample, Task, Trajectory

VOCAB = 300
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MakeGroups = Callable[..., list[Group]]


def _save_tokenizer(folder: Path) -> None:
    """Byte-level BPE with ChatML; ids 0 to 2 are pad, start and end of turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["user assistant system tool", "What is 12 + 34? The answer is 46.", "one two three four five six seven"]
    tokenizer.train_from_iterator(texts * 8, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def _save_model(folder: Path, tied: bool) -> Path:
    """A Llama of two layers in float32, its log-probs far from uniform. head_dim 32, so that vLLM runs it too."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 0.1M parameters and a tokenizer with a ChatML template."""
    return _save_model(tmp_path_factory.mktemp("tiny") / "model", tied=False)


@pytest.fixture(scope="session")
def tiny_tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one matrix for input and output embeddings."""
    return _save_model(tmp_path_factory.mktemp("tiny-tied") / "model", tied=True)


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
def make_groups() -> MakeGroups:
    """make_groups(count, size, seed, longest, sampled) -> random groups."""
    return _make_groups
