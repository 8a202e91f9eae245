"""Where the learner's time and memory go: matrix products on a CPU, and the softmax over the vocabulary.

float32 products on a CPU go to oneDNN in place of MKL, which leaves AVX-512 unused on AMD processors.

Measured on two cores of an AMD EPYC, 3500 x 576 by 576 x 1536: 475 against 210 GFLOP/s, forward and backward alike.
Everything else (a GPU, another dtype, a build without oneDNN) goes the way it always went.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

THIN = 64  # below it, a matrix of an adapter: oneDNN's set-up costs more than the product (40 us of 50)
WORTH = 2**21  # multiplications from which that is no longer so
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX, ARENAS = -1, -2, -3, -4, -8  # of mallopt(3)
MAPPED = 2**17  # bytes from which a tensor is mapped by itself where memory is given back


def keep_memory() -> None:
    """Let malloc keep what it has: glibc maps every large tensor anew, and each of its pages faults in again.

    A learning step of the demo had 440,000 page faults, a quarter of its CPU time; afterwards it has none. The heap
    then has holes that no later tensor fits into, see heap.py. One heap for all threads: one's own would end at 64 MiB.
    """
    _set_malloc({ARENAS: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 64 * 2**20})


def give_memory_back() -> None:
    """Map every larger tensor by itself, so that what it had goes back to the system when it is freed.

    The process then takes what is alive and little more. By itself glibc would raise the threshold as tensors come.
    """
    _set_malloc({ARENAS: 1, MMAP_THRESHOLD: MAPPED, MMAP_MAX: 2**16, TRIM_THRESHOLD: 64 * 2**20, TOP_PAD: 2**20})


def _set_malloc(options: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in options.items():
        mallopt(option, value)


class FastLinear(TorchFunctionMode):
    """While it is entered, `torch.nn.functional.linear` is computed by oneDNN where that can be."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and not kwargs and _fits(*args):
            return _linear(*args)
        return func(*args, **kwargs)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return _plain(x, weight) and min(weight.shape) >= THIN and (bias is None or bias.dtype == torch.float32)


def _plain(x: Tensor, weight: Tensor) -> bool:
    alike = x.dtype == weight.dtype == torch.float32 and weight.ndim == 2 and x.numel() > 0
    return AVAILABLE and x.device.type == "cpu" and alike


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias for matrices, by oneDNN where that can be."""
    if _fits(a, b, bias):
        return _product(a, b, bias)
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


def thin(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T where one of them has few rows, such as an adapter's; twice as fast by oneDNN once a is long enough.

    Measured with 16 rows: 2048 x 1536 by 1536 x 16 in 0.29 against 0.64 ms, 16 x 2048 by 2048 x 1536 in 0.38 against
    0.97 ms. The few rows are best a's: 1536 x 2048 by 2048 x 16 takes three times as long as without.
    """
    return _product(a, b) if a.shape[0] * b.numel() >= WORTH and _plain(a, b) else a @ b.t()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The shapes are put right out here: what a Function returns must not be a view where a layer adds to it in place
    (AdaLoRA's do)."""
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """Of matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        to_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        to_weight = _product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None
        to_bias = grad.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias


def score(logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets at a temperature, and each distribution's entropy in nats.

    In at least float32, a block of rows at a time: no second matrix of the size of `logits` lives in the forward pass,
    and one, the gradient, in the backward.
    """
    return _Score.apply(logits, targets, temperature)


ROWS = 32  # of 49,152 words 6 MB, which stay in a cache
NEVER = -1e4  # the logarithm of a probability that is 0, also in float64; of a word that is ruled out too


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        parts = zip(logits.split(ROWS), targets.split(ROWS), strict=True)
        found = [softened(block, target, temperature)[:3] for block, target in parts]
        logprobs, entropy, norms = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.save_for_backward(logits, targets, norms, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, norms, entropies = ctx.saved_tensors
        if grads[0] is None and grads[1] is None:
            return None, None, None
        out = torch.empty_like(logits)
        to_chosen = torch.zeros_like(norms) if grads[0] is None else grads[0]
        parts = (tensor.split(ROWS) for tensor in (logits, targets, norms, to_chosen, out))
        for i, (block, target, norm, grad, into) in enumerate(zip(*parts, strict=True)):
            share = (grad / ctx.temperature)[:, None]
            logged = scaled(block, ctx.temperature) - norm[:, None]
            if grads[1] is None:
                change = logged.exp_().mul_(-share)
            else:
                rows = slice(i * ROWS, i * ROWS + len(block))
                change = logged.exp() * -share
                change += entropy_slope(logged, entropies[rows]) * (grads[1][rows] / ctx.temperature)[:, None]
            into.copy_(change.scatter_add_(1, target[:, None], share))
        return out, None, None


def softened(block: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of some rows of logits: the targets' log-probs, entropies, the logarithms of the norms, and the probabilities as
    odds [n, v] and their sums [n]."""
    logits = scaled(block, temperature)
    most = logits.amax(-1, keepdim=True)
    below = (logits - most).clamp_(min=NEVER)
    odds = below.exp()
    total = odds.sum(-1)
    rest = total.log()
    norm = most[:, 0] + rest
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - norm
    return logprobs, rest - torch.linalg.vecdot(odds, below) / total, norm, odds, total


def entropy_slope(logged: Tensor, entropies: Tensor) -> Tensor:
    """dH / dz = - p (log p + H), from log-probs [n, v] and entropies [n]."""
    soft = logged.exp()
    return -soft * (logged.masked_fill(soft == 0, 0.0) + entropies[:, None])


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """In at least float32, at a temperature; the tensor itself where that changes nothing."""
    wide = _wide(logits)
    return wide if temperature == 1 else wide / temperature


def _wide(logits: Tensor) -> Tensor:
    """In float64 as it is, else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()
