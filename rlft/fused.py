"""A linear layer and its LoRA adapter as one operation: x W^T + s (x A^T) B^T, with a backward written by hand.

PEFT's own forward makes the adapter's output, scales it and adds it, three passes over matrices as large as the layer's
output, and as many in the backward. Here the thin products are added in place to the wide ones, and only x and
x A^T are kept for the backward. The sums are the same up to rounding (tests/test_fused.py, against PEFT in float64).
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from rlft.kernels import product, thin


class FusedLinear(Linear):
    """PEFT's LoRA layer; whatever is not one plain adapter on a plain frozen layer goes the way it always went."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See peft.tuners.lora.layer.Linear."""
        name = None if args or kwargs else self._alone(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        said = _Adapted.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, self.scaling[name])
        return said.view(*x.shape[:-1], said.shape[-1])

    def _alone(self, x: Tensor) -> str | None:
        """The one adapter that is on, where it and its layer are plain and of the dtype of x."""
        names = self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return None
        name = names[0]
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        dropped = isinstance(self.lora_dropout[name], nn.Dropout) and self.training
        if dropped or name in self.lora_variant or b.bias is not None or type(base) is not nn.Linear:
            return None
        watched = any(part._forward_hooks or part._forward_pre_hooks for part in (base, a, b))
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        alike = x.dtype == base.weight.dtype == a.weight.dtype == b.weight.dtype
        return name if alike and not watched and not trained and not torch.is_autocast_enabled(x.device.type) else None


def fuse(model: nn.Module) -> None:
    """Turn every LoRA layer of PEFT's in the model into a fused one, in place; its parameters stay the same objects."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear


class _Adapted(torch.autograd.Function):
    """Of matrices: x [n, i], weight [o, i], a [r, i], b [o, r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = thin(x, a)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return product(x, weight, bias).addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        grad = grads[0]
        to_low = thin(grad, b.t()).mul_(ctx.scaling)
        to_x = product(grad, weight.t()).addmm_(to_low, a) if ctx.needs_input_grad[0] else None
        to_a = thin(to_low.t(), x.t()) if ctx.needs_input_grad[3] else None
        to_b = thin(low.t(), grad.t()).t().mul(ctx.scaling) if ctx.needs_input_grad[4] else None
        return to_x, None, None, to_a, to_b, None
