"""The engine of a config: which kind, in this process or in one of its own, and started again when that one is lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlft.config_rollout import Local, Vllm
from rlft.engine.base import Engine
from rlft.engine.local import LocalEngine
from rlft.engine.restart import Restarting
from rlft.engine.vllm import VllmEngine
from rlft.engine.worker import WorkerEngine
from rlft.faults import Faults
from rlft.policy import Policy
from rlft.sync import adapter_rank
from rlft.types import InputError

if TYPE_CHECKING:
    from rlft.material import Material


def start_engine(stuff: Material, policy: Policy, kind: str, log: Path | None, faults: Faults) -> Engine:
    """The engine of the config, serving the policy's model before training. kind: how weights reach it."""
    block = stuff.config.rollout.engine
    if isinstance(block, Local):
        remote = stuff.config.model.trust_remote_code
        limit = block.max_sequences
        make: Callable[[], Engine] = partial(
            LocalEngine, stuff.model, policy.dtype, policy.device, limit, stuff.chat.tokenizer, remote
        )
    else:
        make = partial(VllmEngine, **_settings(block, stuff, policy, kind, log))
    if block.place == "here":
        return make()

    def note(said: str) -> None:
        faults.note("engine", f"{said.partition('. ')[0]}: another is started", said=said)

    return Restarting(lambda: WorkerEngine(make, log, block.patience), stuff.config.faults.restarts, note)


def _settings(block: Vllm, stuff: Material, policy: Policy, kind: str, log: Path | None) -> dict[str, Any]:
    """What vLLM is started with."""
    return {
        "model": stuff.model,
        "dtype": policy.dtype,
        "context": stuff.context,
        "max_sequences": block.max_sequences,
        "cache_gb": block.cache_gb,
        "memory_fraction": block.memory_fraction or (0.4 if policy.device.type == "cuda" else None),
        "lora_rank": adapter_rank(policy) if kind == "adapter" else 0,
        "agents": stuff.config.agents.served,
        "reference": any(draw.reference for draw in stuff.algorithm.draws),
        "seed": stuff.config.seed,
        "log": log,
        "options": {"trust_remote_code": stuff.config.model.trust_remote_code, **block.options},
    }


def refuse_options(block: Vllm) -> None:
    """Options that would break what the run proves."""
    kept = {"logprobs_mode", "model", "dtype", "tensor_parallel_size", "pipeline_parallel_size", "quantization"}
    kept |= {"data_parallel_size", "max_model_len", "max_num_seqs", "seed", "enable_lora", "max_lora_rank"}
    for name in block.options:
        if name in kept and block.options[name] not in (None, 1):
            raise InputError(
                f"rollout.engine.options.{name}: rlft sets this itself, since its proofs of each sync depend on it"
            )
