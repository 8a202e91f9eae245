"""A run in words, before any weight is loaded: data, objective, what is synced, how many tokens a step."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from rlft.algorithms.catalog import entries
from rlft.build import served_model
from rlft.config import Config
from rlft.config_rollout import Local
from rlft.envs.catalog import entries as envs
from rlft.fits import described
from rlft.footprint import adapted, bare
from rlft.judging import lines as judging
from rlft.material import Material, material
from rlft.rewards.catalog import types
from rlft.types import InputError


def describe(config: Config) -> str:
    """The plan as text. Raises InputError for anything that `train` would refuse before it loads a model."""
    stuff = material(config)
    total, trained, layers = _parameters(stuff)
    device, dtype = served_model(stuff)
    name = str(dtype).removeprefix("torch.")
    adapter = f"{config.adapter.type} on {layers} layers" if config.adapter.type != "none" else "full fine-tuning"
    lines: dict[str, str | list[str]] = {
        "run": f"{config.name}: {config.steps} steps, seed {config.seed}, into {config.out or f'runs/{config.name}'}",
        "policy": f"{config.model.path}, {total / 1e6:.0f}M parameters in {name} on {device.type}; {adapter}: "
        f"{trained / 1e6:.2f}M trained ({100 * trained / total:.1f}%)",
        "data": _data(stuff),
        "reward": _reward(config),
        **_judges(stuff),
        "rollouts": _rollouts(stuff),
        **_agents(config),
        "algorithm": f"{config.algorithm.type}: minimise {stuff.algorithm.formula or 'a loss of your own'}",
        "extra passes": _passes(stuff),
        "learner": f"{config.learner.optimizer}, lr {config.learner.lr:g} ({config.learner.scheduler}), "
        f"{config.learner.epochs * config.learner.minibatches} optimizer step(s) per batch, "
        f"gradients clipped at {config.learner.max_grad_norm:g}",
        "sync": _sync(stuff, device),
        "evaluation": _evaluation(stuff),
        "memory": described(stuff),
        "kept": f"checkpoints every {config.checkpoint.every} steps, the newest {config.checkpoint.keep} and the best; "
        "metrics.jsonl and rollouts in Parquet" + (f"; {', '.join(config.track)}" if config.track else ""),
    }
    width = max(map(len, lines))
    parts = ((key, [said] if isinstance(said, str) else said) for key, said in lines.items())
    return "\n".join(f"{key if n == 0 else '':{width}}  {text}" for key, texts in parts for n, text in enumerate(texts))


def catalog(what: str) -> dict[str, str]:
    """Names and first lines of what there is to choose from. Raises InputError for an unknown kind."""
    kinds: dict[str, dict[str, Any]] = {
        "algorithms": dict(entries()),
        "rewards": dict(types()),
        "envs": dict(envs()),
        "engines": {kind.model_fields["type"].default: kind for kind in _engines()},
    }
    if what not in kinds:
        raise InputError(f"list: there is no kind {what!r}; it is one of {', '.join(kinds)}")
    return {name: (kind.__doc__ or "").strip().splitlines()[0] for name, kind in kinds[what].items()}


def _engines() -> list[Any]:
    from rlft.config_rollout import Vllm

    return [Vllm, Local]


def _parameters(stuff: Material) -> tuple[int, int, int]:
    """All, trained, and adapted layers, counted on a model without storage."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoConfig

    remote = stuff.config.model.trust_remote_code
    model = bare(AutoConfig.from_pretrained(stuff.model, trust_remote_code=remote), remote)
    total = sum(p.numel() for p in model.parameters())
    wrapped = adapted(model, stuff.config.adapter.settings())
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return total, trained, sum(isinstance(m, BaseTunerLayer) for m in wrapped.modules())


def _data(stuff: Material) -> str:
    if stuff.config.online:
        text = f"{len(stuff.tasks)} tasks to train on"
        kind = stuff.config.data.curriculum.type
        text += f", chosen by {kind}" if kind != "uniform" else ""
    else:
        tokens = [sum(s.mask) for g in stuff.groups for t in g for s in t.samples]
        text = f"{len(stuff.groups)} recorded groups, {statistics.mean(tokens):.0f} tokens to learn in each sample"
    return text + (f", {len(stuff.held_out)} held out" if stuff.held_out else "")


def _reward(config: Config) -> str:
    if config.reward is None:
        return "none: every score is 0" if config.online else "none: the data say what is good"
    said = f"{config.reward.type}: " + ", ".join(config.reward.components())
    rollout, more = config.rollout, config.reward.explored
    if not more or not config.online:
        return said
    answers = rollout.tasks_per_step * rollout.group_size
    return f"{said}; at most {answers * more} further tokens sampled a step to find out ({more} beside each answer)"


def _judges(stuff: Material) -> dict[str, list[str]]:
    """Nothing where no model is asked over HTTP."""
    said = judging(stuff)
    return {"judges": said} if said else {}


def _rollouts(stuff: Material) -> str:
    config, rollout = stuff.config, stuff.config.rollout
    if not config.online:
        return f"none: {rollout.tasks_per_step} recorded groups a step"
    prompts = [len(stuff.chat.prompt(task.messages)) for task in stuff.tasks[:256]]
    draws = stuff.algorithm.draws
    written = sum(draw.count for draw in draws if draw.recorded)
    drawn = sum(draw.count for draw in draws) - written
    more = [f"{n} {what}" for n, what in ((drawn, "drawn further"), (written, "written down")) if n]
    further = f", and for each task at most {' and '.join(more)}" if more else ""
    samples = rollout.tasks_per_step * (rollout.group_size + drawn)
    several = f", up to {config.env.answers} answers each ({config.env.type})" if config.env.several else ""
    where = rollout.engine.type + (f", place {rollout.engine.place}" if not isinstance(rollout.engine, Local) else "")
    return (
        f"{rollout.tasks_per_step} tasks x {rollout.group_size} samples a step at temperature "
        f"{rollout.sampling.temperature:g} ({where}){several}{further}: at most "
        f"{samples * config.env.answers * rollout.sampling.max_tokens} tokens sampled, "
        f"prompts of {statistics.mean(prompts):.0f} tokens on average, context {stuff.context}"
    )


def _agents(config: Config) -> dict[str, str]:
    """Nothing where there is one."""
    count, exchange, past = config.agents.count, config.agents.exchange, config.agents.past
    if past:
        share, every = config.agents.against, config.agents.every
        text = f"in a share of {share:g} of the episodes it plays one role, and a version of the past all others"
        return {"agents": f"one policy, and {past} of its past, one more after every {every} steps; {text}"}
    turns = f"each takes the next one's role after every {exchange} steps" if exchange else "each keeps its role"
    return {"agents": f"{count} adapters on one base, trained apart; {turns}"} if count > 1 else {}


def _passes(stuff: Material) -> str:
    """The forward passes without gradients; one optimizer step a batch takes the old log-probs from the rollout.

    What is drawn further may have none, and then its rows are computed.
    """
    learner = stuff.config.learner
    free = learner.epochs * learner.minibatches == 1 and stuff.config.online
    rest = ["old_logprobs of further answers that have none"] if stuff.algorithm.draws else []
    passes = {"old_logprobs": rest} if free else {}
    paid = [text for need in stuff.algorithm.needs for text in passes.get(need, [need])]
    moving = stuff.config.reference
    follows = f"; the reference takes up {moving.mix:g} of the policy every {moving.every} optimizer step(s)"
    return (", ".join(paid) or "none") + (follows if moving.every else "")


def _sync(stuff: Material, device: torch.device) -> str:
    config = stuff.config
    if not config.online and config.data.eval is None:
        return "none: nothing is sampled"
    several = config.agents.served > 1 and not isinstance(config.rollout.engine, Local)
    kind = "adapter" if several or any(draw.reference for draw in stuff.algorithm.draws) else config.sync.type
    if kind == "auto":
        kind = "merged" if device.type == "cpu" or isinstance(config.rollout.engine, Local) else "adapter if possible"
    what = {"merged": "every changed weight, merged, with its fused neighbours", "adapter": "the adapter"}
    when = "after every step" if config.online else "before every evaluation"
    return f"{kind}, {when}: {what.get(kind, 'the adapter, else merged weights')}; proved by read-back and by sampling"


def _evaluation(stuff: Material) -> str:
    if not stuff.held_out or stuff.config.reward is None:
        return "none"
    block = stuff.config.eval
    component = block.accuracy or stuff.config.reward.components()[0]
    every = f", every {block.every} steps" if block.every else ""
    more = f", pass@{block.samples} and majority@{block.samples}" if block.samples > 1 else ""
    more += f", chosen by a verifier ({block.verifier.type})" if block.verifier else ""
    more += f", played in {block.env.type}" if block.env else ""
    return f"before, after{every}: share of {len(stuff.held_out)} tasks with {component} = 1, greedy{more}"
