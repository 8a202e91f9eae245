"""What one does with a run besides training it: evaluate, talk to it, export it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlft.build import assemble, make_policy
from rlft.chat import Chat
from rlft.checkpoint import Checkpoints, disk_errors, load_trained, of_agent
from rlft.config import Config
from rlft.interval import told
from rlft.learner import Learner, Schedule
from rlft.material import Material, material
from rlft.models import locate
from rlft.policy import Policy
from rlft.session import of_run
from rlft.settings import load
from rlft.types import InputError


def evaluate(path: Path, overrides: Sequence[str], step: int | None, agent: int = 0) -> str:
    """Held-out metrics of a config's model, or of a run's policy; as lines of text."""
    is_run = path.is_dir()
    config = of_run(path, list(overrides)) if is_run else load(path, overrides)
    if config.data.eval is None:
        raise InputError("data.eval: there are no held-out tasks to evaluate on")
    folder = chosen(path, step, agent) if is_run else None
    metrics = asyncio.run(_evaluate(material(of_one_agent(config)), folder))
    ends = {f"{name}_{end}" for name in metrics for end in ("low", "high") if f"{name}_{end}" in metrics}
    shown = {k: told(metrics, k) if f"{k}_low" in ends else f"{v:.4f}" for k, v in metrics.items() if k not in ends}
    width = max(map(len, shown))
    return "\n".join(f"{name:{width}}  {value}" for name, value in shown.items())


async def _evaluate(stuff: Material, folder: Path | None) -> dict[str, float]:
    parts = assemble(stuff, None)
    try:
        if folder is not None:
            load_trained(folder, parts.learner)
        assert parts.evaluation is not None
        await parts.serve(0)
        return (await parts.evaluation(0))[0]
    finally:
        await parts.close()


def export(run: Path, to: Path, merged: bool, step: int | None, agent: int = 0) -> str:
    """Write the adapter, or the merged model, with the tokenizer; says what loads it."""
    config = of_run(run)
    folder = chosen(run, step, agent)
    if to.exists() and any(to.iterdir()):
        raise InputError(f"--to: {to} is not empty; choose a new folder")
    policy = _policy(config, folder)
    whole = merged or not policy.is_peft
    try:
        with disk_errors(to):
            policy.save_merged(to) if whole else policy.save_adapter(to)
            chat = Chat(policy.path, config.model.chat_template, config.model.trust_remote_code)
            chat.tokenizer.save_pretrained(str(to))
    except BaseException:
        shutil.rmtree(to, ignore_errors=True)
        raise
    what, how = ("merged model", "AutoModelForCausalLM.from_pretrained or vllm.LLM") if whole else (
        "adapter", "PeftModel.from_pretrained or a vLLM LoRARequest")  # fmt: skip
    return f"{what} of {folder.relative_to(run / 'checkpoints')} in {to}; load it with {how}"


def sample(run: str, prompt: str | None, temperature: float, max_tokens: int, agent: int = 0) -> None:
    """Answer one prompt, or ask for prompts until an empty line; of a run, base and tuned side by side."""
    folder = Path(run)
    tuned = (folder / "config.yaml").is_file()
    if tuned:
        config = of_run(folder)
        policy = _policy(config, chosen(folder, None, agent))
        chat = Chat(policy.path, config.model.chat_template, config.model.trust_remote_code)
    else:
        policy = Policy(locate(run), {"type": "lora", "target_modules": "all-linear"})
        chat = Chat(policy.path)
    console = Console()
    while True:
        asked = prompt if prompt is not None else console.input("[bold]prompt (empty to end)[/bold]: ")
        if not asked.strip():
            return
        table = Table(show_header=True)
        answers = [_answer(policy, chat, asked, temperature, max_tokens, base=True)]
        table.add_column("base", overflow="fold")
        if tuned:
            table.add_column("tuned", overflow="fold")
            answers.append(_answer(policy, chat, asked, temperature, max_tokens, base=False))
        table.add_row(*[answer.replace("[", r"\[") for answer in answers])
        console.print(table)
        if prompt is not None:
            return


@torch.inference_mode()
def _answer(policy: Policy, chat: Chat, text: str, temperature: float, max_tokens: int, base: bool) -> str:
    tokens = torch.tensor([chat.prompt([{"role": "user", "content": text}])], device=policy.device)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    settings: dict[str, Any] = {"max_new_tokens": max_tokens, "attention_mask": torch.ones_like(tokens), **drawn}

    def generate(model: Any) -> Any:
        return model.eval().generate(input_ids=tokens, use_cache=True, **settings)

    if base:
        with policy.reference() as model:
            out = generate(model)
    else:
        out = generate(policy.model)
    return chat.decode(out[0, tokens.shape[1] :].tolist())


def of_one_agent(config: Config) -> Config:
    """With one agent, which plays every role."""
    return config.model_copy(update={"agents": config.agents.model_copy(update={"count": 1, "past": 0})})


def chosen(run: Path, step: int | None, agent: int = 0) -> Path:
    """The folder of an agent in a run's checkpoint; the newest where no step is named."""
    checkpoints = Checkpoints(run / "checkpoints", 1)
    have = checkpoints.steps()
    if not have:
        raise InputError(f"{run} has no checkpoint yet")
    if step is not None and step not in have:
        raise InputError(f"--step: {run} has checkpoints of steps {', '.join(map(str, have))}, not of {step}")
    folder = of_agent(checkpoints.path(have[-1] if step is None else step), agent)
    if not folder.is_dir():
        raise InputError(f"--agent: {run} has no agent {agent}; its agents are counted from 0")
    return folder


def _policy(config: Config, folder: Path) -> Policy:
    """The policy of a run as one of its checkpoints holds it."""
    policy = make_policy(config, locate(config.model.path))
    load_trained(folder, Learner(policy, Schedule(lr=1.0, steps=1)))
    return policy
