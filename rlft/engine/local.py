"""transformers as the engine: slower, but runs any model, and is the reference that tests compare vLLM with.

Requests that are open at once are left-padded into one batch and advance together, with a cache of keys and values;
those of another agent wait for the next batch, for which its weights are put in place.
Each request draws from a generator of its own, seeded by its own seed, so a result depends on no neighbour.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlft.engine.base import Delta, Full, Weights, digest
from rlft.swap import Swap
from rlft.types import Completion, RunError, Sampling


class LocalEngine:
    """A second copy of the model, sampled with transformers.

    max_sequences: how many requests advance together. stop strings need the tokenizer.
    """

    def __init__(
        self,
        model: Path,
        dtype: torch.dtype,
        device: torch.device,
        max_sequences: int = 128,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        self._model = loaded.to(device).eval()
        self._model.requires_grad_(False)
        self._tokenizer = tokenizer
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends] if ends is not None else [])
        if tokenizer is not None and tokenizer.eos_token_id is not None:
            self._ends.add(tokenizer.eos_token_id)
        self._device = device
        self._limit = max_sequences
        self._waiting: list[tuple[list[int], Sampling, asyncio.Future[Completion]]] = []
        self._driver: asyncio.Task[None] | None = None
        self._agents: dict[int, Swap] = {}  # agent 0's weights are the model's own
        self._versions: dict[int, int] = {}
        self.version = -1
        self.dtype = dtype

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """See `Engine.generate`."""
        if sampling.agent and sampling.agent not in self._agents:
            raise RunError(f"the local engine has no weights of agent {sampling.agent} yet")
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(prompt), sampling, future))
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        await asyncio.sleep(0)
        while self._waiting:
            agent = self._waiting[0][1].agent
            now = [entry for entry in self._waiting if entry[1].agent == agent][: self._limit]
            taken = {id(entry) for entry in now}
            self._waiting = [entry for entry in self._waiting if id(entry) not in taken]
            now = [entry for entry in now if not entry[2].done()]
            try:
                with self._serving(agent):
                    done = self._sample([entry[0] for entry in now], [entry[1] for entry in now], agent)
            except Exception as error:
                failed = RunError(f"the local engine failed: {type(error).__name__}: {error}")
                for _, _, future in now + self._waiting:
                    if not future.done():
                        future.set_exception(failed)
                self._waiting = []
                return
            for (_, _, future), completion in zip(now, done, strict=True):
                if not future.done():
                    future.set_result(completion)
            await asyncio.sleep(0)

    @contextmanager
    def _serving(self, agent: int) -> Iterator[dict[str, Tensor]]:
        """The model's parameters, with this agent's weights in place."""
        with self._agents[agent]() if agent else nullcontext():
            yield dict(self._model.named_parameters())

    @torch.inference_mode()
    def _sample(self, prompts: list[list[int]], samplings: list[Sampling], agent: int) -> list[Completion]:
        if not prompts:
            return []
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        position = (seen.cumsum(1) - 1).clamp(min=0)
        generators = [_generator(s.seed) for s in samplings]
        drawn: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        finish: list[str | None] = [None] * len(prompts)
        cache = None
        while not all(finish):
            out = self._model(
                input_ids=ids, attention_mask=seen, position_ids=position, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            cache = out.past_key_values
            logits = out.logits[:, -1].float().cpu()
            picked = [0] * len(prompts)
            for i, sampling in enumerate(samplings):
                if finish[i] is None:
                    picked[i], logprob = _draw(logits[i], sampling, generators[i])
                    drawn[i].append(picked[i])
                    logprobs[i].append(logprob)
                    finish[i] = self._finished(drawn[i], sampling)
            ids = torch.tensor(picked, device=self._device)[:, None]
            seen = torch.cat([seen, torch.ones_like(ids)], 1)
            position = position[:, -1:] + 1
        return [
            Completion(tokens, values, reason or "stop", self._versions.get(agent, -1))
            for tokens, values, reason in zip(drawn, logprobs, finish, strict=True)
        ]

    def _finished(self, tokens: list[int], sampling: Sampling) -> str | None:
        if tokens[-1] in self._ends:
            return "stop"
        if sampling.stop and self._tokenizer is not None:
            text = self._tokenizer.decode(tokens)
            if any(stop in text for stop in sampling.stop):
                return "stop"
        return "length" if len(tokens) >= sampling.max_tokens else None

    async def load_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.load_weights`."""
        if isinstance(weights, Delta):
            raise RunError("the local engine takes merged weights only: set sync: {type: merged}")
        assert isinstance(weights, Full)
        own, values = dict(self._model.named_parameters()), {}
        with torch.no_grad():
            for name, tensor in weights.tensors:
                if name not in own:
                    raise RunError(f"the engine has no weight {name!r}")
                values[name] = own[name] if weights.agent == 0 else torch.empty_like(own[name])
                values[name].copy_(tensor)
        if weights.agent:
            self._agents[weights.agent] = Swap(self._model, values)
        self.version = self._versions[weights.agent] = version

    async def units(self, names: Sequence[str]) -> dict[str, str]:
        """See `Engine.units`: nothing is fused here."""
        own = dict(self._model.named_parameters())
        return {name: name for name in names if name in own}

    async def read_back(self, names: Sequence[str], seed: int, agent: int = 0) -> dict[str, Tensor]:
        """See `Engine.read_back`."""
        with self._serving(agent) as own:
            return {name: digest(own[name], seed) for name in names if name in own}

    async def forget(self) -> None:
        """Nothing is kept between calls."""

    async def kept(self) -> int:
        """See `Engine.kept`."""
        return 0

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._driver:
            self._driver.cancel()
        del self._model


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """One token and its log-prob under the distribution it was drawn from."""
    if sampling.temperature == 0:
        token = int(logits.argmax())
        return token, float(logits.log_softmax(-1)[token])
    logprobs = _truncate(logits / sampling.temperature, sampling).log_softmax(-1)
    noise = torch.empty_like(logprobs).exponential_(generator=generator)
    token = int((logprobs.exp() / noise).argmax())
    return token, float(logprobs[token])


def _truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """top-k, top-p and min-p, as vLLM applies them; the neutral values change nothing."""
    probabilities = logits.softmax(-1)
    keep = torch.ones_like(logits, dtype=torch.bool)
    if sampling.top_k > 0:
        keep &= logits >= logits.topk(min(sampling.top_k, len(logits))).values[-1]
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        inside = ordered.cumsum(0) - ordered < sampling.top_p
        keep &= torch.zeros_like(keep).scatter(0, index, inside)
    if sampling.min_p > 0:
        keep &= probabilities >= sampling.min_p * probabilities.max()
    return logits.masked_fill(~keep, float("-inf"))
