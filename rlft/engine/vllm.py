"""vLLM, on a GPU and on a CPU, driven step by step inside the event loop: continuous batching of whatever is open.

Settings that were measured, and why: `processed_logprobs` (the default reports them before temperature); on a CPU
blocks of 32 tokens, so that short shared prompts hit the prefix cache (the default of 128 never does on a prompt of
43; sampling was twice as fast), no chunked prefill (a chunked prompt with a seed of its own raises "CPU Generator
does not use offset"), and no inductor for vLLM's small kernels (the first request compiles them for up to 10 s, and
fails where there is no C++ compiler).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft.engine.base import Delta, Full, Weights, digest, probe
from rlft.engine.quiet import hushed, quiet
from rlft.engine.scan import scan_plain_objects
from rlft.engine.without import without_effect
from rlft.types import Completion, InputError, RunError, Sampling

FIXED = {
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": True,
    "distributed_executor_backend": "uni",
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
}
SHARDS = {"q": 0, "k": 1, "v": 2}
BLOCK = 32


class VllmEngine:
    """One vLLM engine in this process.

    context: the most tokens of prompt and completion together. lora_rank: serve adapters of at most this rank
    (0: merged weights only). agents: how many adapters at once. reference: besides them, the policy before training.
    log: the file that gets vLLM's own messages. options: any vLLM engine argument.
    """

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        context: int,
        max_sequences: int = 128,
        cache_gb: float | None = None,
        memory_fraction: float | None = None,
        lora_rank: int = 0,
        agents: int = 1,
        reference: bool = False,
        seed: int = 0,
        log: Path | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        quiet(log)
        cpu = not torch.cuda.is_available()
        context = min(context, _longest(model, bool((options or {}).get("trust_remote_code"))))
        settings: dict[str, Any] = {
            "model": str(model),
            "dtype": str(dtype).removeprefix("torch."),
            "seed": seed,
            "max_model_len": context,
            "max_num_seqs": max_sequences,
            **(_on_cpu(context, cache_gb or 1.0) if cpu else _on_gpu(cache_gb, memory_fraction)),
            **FIXED,
        }
        if lora_rank:
            settings |= {"enable_lora": True, "max_loras": agents + reference, "max_lora_rank": _rank_step(lora_rank)}
        try:
            with hushed(log):
                self._llm = _start(settings | (options or {}), cpu)
        except TypeError as error:
            raise InputError(f"rollout.engine.options: vLLM does not know one of them: {error}") from error
        except Exception as error:  # vLLM raises whatever its parts raise; its message must reach the user
            raise RunError(_why(error, log)) from error
        self.dtype: torch.dtype = self._llm.model_config.dtype  # an option may have changed it
        self.version = -1
        self._rank = lora_rank
        self._reference = reference
        self._agents = agents
        self._adapters: dict[int, Any] = {}  # by agent; none: merged weights
        self._versions: dict[int, int] = {}
        self._before: Any = None  # stands for no adapter
        self._places: dict[str, tuple[str, Any] | None] = {}
        self._ids = itertools.count()
        self._open: dict[str, tuple[asyncio.Future[Completion], int]] = {}
        self._driver: asyncio.Task[None] | None = None
        self._log = log

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """See `Engine.generate`."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed if sampling.temperature > 0 else None,
            stop=list(sampling.stop) or None,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        adapter = self._before if sampling.reference else self._adapters.get(sampling.agent)
        if sampling.agent and adapter is None:
            raise RunError(f"vLLM has no adapter of agent {sampling.agent} yet")
        if sampling.reference and adapter is None:
            raise RunError("this engine was not started to keep the policy before training, or has no adapter yet")
        name = str(next(self._ids))
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        try:
            key = self._llm.add_request(name, {"prompt_token_ids": list(prompt)}, params, lora_request=adapter)
        except (ValueError, VLLMValidationError) as error:
            raise InputError(f"rollout: vLLM refuses a prompt of {len(prompt)} tokens: {error}") from error
        self._open[name] = (future, 0 if sampling.reference else self._versions.get(sampling.agent, self.version))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        try:
            return await future
        except asyncio.CancelledError:
            if self._open.pop(name, None):
                self._llm.abort_request([key], internal=True)
            raise

    async def _drive(self) -> None:
        """Step the engine until nothing is open; between steps, others have their turn."""
        while self._open:
            try:
                outputs = self._llm.step()
            except Exception as error:  # see __init__
                for future, _ in self._open.values():
                    if not future.done():
                        future.set_exception(RunError(_why(error, self._log)))
                self._open.clear()
                return
            for output in outputs:
                entry = self._open.pop(output.request_id, None)
                if output.finished and entry and not entry[0].done():
                    entry[0].set_result(_completion(output.outputs[0], entry[1]))
            await asyncio.sleep(0)

    async def load_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.load_weights`."""
        if self._open:
            raise RunError(f"weights of version {version} came while {len(self._open)} requests were open")
        if isinstance(weights, Full):
            names: list[str] = []
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _noting(weights.tensors, names)})
            self._pack_tied(names)
        else:
            self._load_adapter(weights, version)
        await self.forget()
        self.version = self._versions[weights.agent] = version

    def _pack_tied(self, names: list[str]) -> None:
        """Pack a head again whose weight is an embedding that was reloaded: reload_weights leaves its old packing."""
        loaded = {id(self._parameter(name)) for name in names}
        for key, modules in self._kernels().items():
            for module in modules:
                if key in loaded and module.weight.numel():
                    module.quant_method.process_weights_after_loading(module)

    def _load_adapter(self, weights: Delta, version: int) -> None:
        agent = weights.agent
        if agent in self._adapters:
            self._llm.remove_lora(self._adapters.pop(agent).lora_int_id)
        number = version * self._agents + agent + 2
        self._adapters[agent] = self._added(f"policy-{agent}-{version}", number, weights.folder)
        if self._reference and self._before is None:
            with without_effect(weights.folder) as empty:
                self._before = self._added("before-training", 1, empty)

    def _added(self, name: str, number: int, folder: Path) -> Any:
        """An adapter in service, as requests name it."""
        from vllm.lora.request import LoRARequest

        fresh = LoRARequest(name, number, str(folder))
        try:
            self._llm.add_lora(fresh)
        except Exception as error:  # see __init__
            raise RunError(f"vLLM does not load this adapter: {error}. Use sync: {{type: merged}}.") from error
        return fresh

    async def units(self, names: Sequence[str]) -> dict[str, str]:
        """See `Engine.units`: `reload_weights` rebuilds whole layers, so weight and bias belong together too."""
        found = {}
        for name in names:
            place = self._place(name)
            if place is not None:
                found[name] = place[0].rpartition(".")[0]
        return found

    async def read_back(self, names: Sequence[str], seed: int, agent: int = 0) -> dict[str, Tensor]:
        """See `Engine.read_back`. Names with `.lora_A.` or `.lora_B.` are read from the adapter in service."""
        with torch.no_grad():
            adapters = {name: self._read_adapter(name, seed, agent) for name in names if ".lora_" in name}
            plain: dict[str, Tensor] = {}
            whole: dict[str, list[Tensor]] = {}
            kernels = self._kernels()
            for name in names:
                place = None if name in adapters else self._place(name)
                if place is None:
                    continue
                target, shard = place
                if target not in whole:
                    whole[target] = self._read(target, seed, kernels)
                span = self._span(target, shard)
                plain[name] = torch.cat([copy[span] for copy in whole[target]])
        return plain | {name: value for name, value in adapters.items() if value is not None}

    async def forget(self) -> None:
        """See `Engine.forget`."""
        if not self._llm.reset_prefix_cache():
            raise RunError("vLLM kept its prefix cache, since requests are still open")

    async def kept(self) -> int:
        """See `Engine.kept`."""
        manager = self._llm.engine_core.engine_core.scheduler.kv_cache_manager
        return len(manager.block_pool.cached_block_hash_to_block)

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._driver:
            self._driver.cancel()
        self._llm.engine_core.shutdown()

    @property
    def _runner(self) -> Any:
        return self._llm.model_executor.driver_worker.worker.model_runner

    @property
    def _model(self) -> Any:
        return self._runner.model

    def _place(self, name: str) -> tuple[str, Any] | None:
        """The engine's parameter behind a checkpoint name and the shard in it; None if there is no receiver."""
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> tuple[str, Any] | None:
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        mapped = mapper._map_name_with_shard(name) if mapper else (name, None)
        if mapped is None:
            return None
        target, shard = mapped
        if shard is None and target == name:
            for fused, parts in getattr(self._model, "packed_modules_mapping", {}).items():
                for i, part in enumerate(parts):
                    if len(parts) > 1 and f".{part}." in name:
                        target, shard = name.replace(f".{part}.", f".{fused}."), i
        path, _, leaf = target.rpartition(".")
        module = self._module(path)
        return (target, shard) if module is not None and getattr(module, leaf, None) is not None else None

    def _module(self, path: str) -> Any:
        try:
            module = self._model.get_submodule(path)
        except AttributeError:
            return None
        return getattr(module, "base_layer", module)

    def _parameter(self, name: str) -> Tensor | None:
        """The engine's parameter behind a checkpoint name."""
        place = self._place(name)
        if place is None:
            return None
        path, _, leaf = place[0].rpartition(".")
        return getattr(self._module(path), leaf)

    def _kernels(self) -> dict[int, list[Any]]:
        """The modules that multiply by a packed copy of a weight, under the id of the weight; tied ones share it."""
        found: dict[int, list[Any]] = {}
        for module in self._model.modules():
            if hasattr(module, "cpu_linear"):
                found.setdefault(id(module.weight), []).append(module)
        return found

    def _read(self, target: str, seed: int, kernels: dict[int, list[Any]]) -> list[Tensor]:
        """Digests of every copy of a whole parameter: where it stands, and through the kernels it is packed for."""
        path, _, leaf = target.rpartition(".")
        weight = getattr(self._module(path), leaf)
        plain = [digest(weight, seed)] if weight.numel() else []
        return plain + [self._multiplied(module, seed) for module in kernels.get(id(weight), [])]

    def _multiplied(self, module: Any, seed: int) -> Tensor:
        """The digest of a packed weight: what its kernel makes of the probe's columns."""
        width = module.input_size if hasattr(module, "input_size") else module.embedding_dim
        columns = probe(width, seed).T.contiguous().to(self._runner.model_config.dtype)
        bias, module.bias = getattr(module, "bias", None), None
        try:
            return module.quant_method.apply(module, columns).T.float().cpu()
        finally:
            module.bias = bias

    def _span(self, target: str, shard: Any) -> slice:
        """The rows of a parameter that one of its parts fills; an embedding is padded beyond its last row."""
        module = self._module(target.rpartition(".")[0])
        if shard is None:
            return slice(getattr(module, "org_vocab_size", None))
        index = SHARDS[shard] if shard in SHARDS else int(shard)
        return slice(sum(module.output_sizes[:index]), sum(module.output_sizes[: index + 1]))

    def _read_adapter(self, name: str, seed: int, agent: int) -> Tensor | None:
        """The digest of one adapter matrix, from the buffers that the kernels read; B comes with the scaling in it."""
        path, _, kind = name.removesuffix(".weight").rpartition(".")
        place = self._place(f"{path}.weight")
        manager = self._runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(self._adapters[agent].lora_int_id)
        module = manager.modules.get(place[0].removesuffix(".weight")) if place else None
        if place is None or module is None:
            return None
        index = 0 if place[1] is None else SHARDS.get(place[1], place[1])
        if kind == "lora_A":
            return digest(module.lora_a_stacked[index][slot, 0, : self._rank], seed)
        return digest(module.lora_b_stacked[index][slot, 0, :, : self._rank], seed)


def _start(settings: dict[str, Any], cpu: bool) -> Any:
    from vllm.platforms import current_platform

    if cpu:  # before the modules that read it are imported
        type(current_platform).simple_compile_backend = "eager"
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    scan_plain_objects()
    return LLMEngine.from_engine_args(EngineArgs(**settings))


def _noting(tensors: Iterable[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        names.append(name)
        yield name, tensor


def _completion(output: Any, version: int) -> Completion:
    tokens = list(output.token_ids)
    logprobs = list(output.logprobs.logprobs)
    if len(tokens) != len(logprobs):
        raise RunError(f"vLLM returned {len(tokens)} tokens with {len(logprobs)} log-probs")
    return Completion(tokens, logprobs, str(output.finish_reason), version)


def _on_cpu(context: int, cache_gb: float) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        "block_size": BLOCK,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, 4096),
        "kv_cache_memory_bytes": int(cache_gb * 2**30),
    }


def _on_gpu(cache_gb: float | None, memory_fraction: float | None) -> dict[str, Any]:
    cache = {"kv_cache_memory_bytes": int(cache_gb * 2**30)} if cache_gb else {}
    return cache | ({"gpu_memory_utilization": memory_fraction} if memory_fraction else {})


def _longest(model: Path, remote: bool) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=remote)
    return int(getattr(config.get_text_config(), "max_position_embeddings", 2**31))


def _rank_step(rank: int) -> int:
    """The smallest rank limit of vLLM's list that holds `rank`."""
    return next((step for step in (8, 16, 32, 64, 128, 256, 320, 512) if step >= rank), rank)


def _why(error: Exception, log: Path | None) -> str:
    where = f" Its own log is {log}." if log else ""
    return f"vLLM failed: {type(error).__name__}: {str(error).strip() or 'no message'}.{where}"
