"""TRL's side of a comparison: its trainers on a spec, as a user of it would set them up on a CPU, in this process.

Recorded rollouts reach GRPOTrainer through its `rollout_func`, SFT and DPO are given token ids. Nothing of rlft is
imported before torch, so that neither its threads nor its malloc are set otherwise. With `live` GRPOTrainer samples
by itself, from `live["prompts"]`, and `live["reward"]` is a function `module:name` of a completion's text, its token
ids and the prompt's answer.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.spec import Outcome, Spec, forget_peak, mark

trl: Any = importlib.import_module("trl")  # not in the lock, so nothing is known of its types
SAMPLED: list[int] = []  # tokens of each live step
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Watch(TrainerCallback):
    """Seconds and trained tokens (by TRL's own masks) per optimizer step, and the gradient of the last one."""

    def __init__(self, keep: bool) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.gradient: dict[str, torch.Tensor] = {}
        self._keep = keep
        self._begun = 0.0

    def counting(self, trainer: Any) -> None:
        """Count what each micro-batch's loss is made of, from the trainer's own masks."""
        plain = trainer.compute_loss

        def counted(model: Any, inputs: Any, *given: Any, **more: Any) -> Any:
            mask = inputs["completion_mask"] if "completion_mask" in inputs else inputs["labels"] != -100
            self.tokens[-1] += int(mask.sum())
            return plain(model, inputs, *given, **more)

        trainer.compute_loss = counted

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.tokens.append(0)
        self._begun = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        if self._keep:
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            self.gradient = {name: grad.detach().clone().contiguous() for name, grad in found.items()}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def settings(spec: Spec, rows: int, folder: str) -> dict[str, Any]:
    """What the trainers have in common. rows: per optimizer step."""
    micro = min(spec.micro, rows)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": rows // micro,
        "learning_rate": spec.lr,
        "lr_scheduler_type": "constant",
        "max_steps": spec.live["steps"] if spec.live else len(spec.steps),
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def policy(path: str) -> Any:
    """SmolLM2 in float32 with the adapter that rlft begins with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return peft.get_peft_model(model, peft.LoraConfig(**ADAPTER))


def grpo(spec: Spec, model: Any, tokenizer: Any, folder: str) -> Any:
    """GRPOTrainer, sampling or on what was recorded."""
    live, size = spec.live, 8
    steps = live["prompts"] if live else [[row.prompt for row in step[::size]] for step in spec.steps]
    prompts = [prompt if live else str(prompt) for step in steps for prompt in step]
    arguments = trl.GRPOConfig(
        **settings(spec, size * len(steps[0]), folder),
        num_generations=size,
        generation_batch_size=size * len(steps[0]),
        max_completion_length=live["max_tokens"] if live else 4096,
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        shuffle_dataset=False,
    )
    played = iter(spec.steps)

    def recorded(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        step = next(played)
        said = {"completion_ids": [row.said for row in step], "logprobs": None, "verdict": [row.score for row in step]}
        return {"prompt_ids": [row.prompt for row in step], **said}

    def verdicts(verdict: list[float], **_: Any) -> list[float]:
        return verdict

    def judged(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        SAMPLED.append(sum(map(len, completion_ids)))
        return [score(*one) for one in zip(completions, completion_ids, answer, strict=True)]

    columns: dict[str, list[Any]] = {"prompt": prompts}
    if live:
        module, _, name = live["reward"].partition(":")
        score = getattr(importlib.import_module(module), name)
        columns["answer"] = [answer for step in live["answers"] for answer in step]
    return trl.GRPOTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        reward_funcs=judged if live else verdicts,
        processing_class=tokenizer,
        rollout_func=None if live else recorded,
    )


def sft(spec: Spec, model: Any, tokenizer: Any, folder: str) -> Any:
    """SFTTrainer: the mean over the tokens that were said."""
    rows = [row for step in spec.steps for row in step]
    arguments = trl.SFTConfig(**settings(spec, len(spec.steps[0]), folder), max_length=None)
    arguments.train_sampling_strategy = "sequential"
    columns = {
        "input_ids": [row.prompt + row.said for row in rows],
        "labels": [[-100] * len(row.prompt) + row.said for row in rows],
    }
    return trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer
    )


class Pairs(trl.DPOTrainer):
    """DPOTrainer on token ids."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def dpo(spec: Spec, model: Any, tokenizer: Any, folder: str) -> Any:
    """DPOTrainer: sigmoid, beta 0.1, the reference is the model without the adapter."""
    pairs = [tuple(step[i : i + 2]) for step in spec.steps for i in range(0, len(step), 2)]
    arguments = trl.DPOConfig(**settings(spec, len(spec.steps[0]) // 2, folder), max_length=None, beta=0.1)
    arguments.train_sampling_strategy = "sequential"
    columns = {
        "prompt_ids": [a.prompt for a, _ in pairs],
        "chosen_ids": [a.said for a, _ in pairs],
        "rejected_ids": [b.said for _, b in pairs],
    }
    return Pairs(model=model, args=arguments, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer)


TRAINERS = {"grpo": grpo, "sft": sft, "dpo": dpo}


def main() -> None:
    """SPEC ANSWER MODEL [--gradient]"""
    given, answer, path = sys.argv[1:4]
    spec = Spec.read(Path(given))
    before = forget_peak()
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[spec.kind](spec, policy(path), tokenizer, folder)
        watch = Watch("--gradient" in sys.argv)
        trainer.add_callback(watch)
        watch.counting(trainer)
        trainer.train()
    if watch.gradient:
        save_file(watch.gradient, f"{answer}.gradient")
    outcome = Outcome(watch.seconds, watch.tokens, mark() - before, f"{answer}.gradient", {"sampled": SAMPLED})
    Path(answer).write_text(json.dumps(vars(outcome)))


if __name__ == "__main__":
    main()
