"""A layer and its adapter as one operation: PEFT's numbers and gradients, and PEFT's way wherever it is not plain."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from rlft.fused import FusedLinear, fuse
from rlft.policy import Policy

LORA = {"type": "lora", "r": 3, "lora_alpha": 5, "target_modules": "all-linear"}


class Two(nn.Module):
    """Two layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(80, 96), nn.Linear(96, 70, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def pair(dtype: torch.dtype, **settings: Any) -> tuple[Any, Any]:
    """PEFT's model and the same fused, the adapter moved."""
    torch.manual_seed(0)
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["one", "two"], **settings}
    plain = get_peft_model(Two(), LoraConfig(**given)).to(dtype)
    with torch.no_grad():
        for p in plain.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    fused = copy.deepcopy(plain)
    fuse(fused)
    return plain, fused


def passed(model: Any, x: Tensor, weigh: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What it says, and the gradients of a weighted sum of it, the inputs' among them."""
    x = x.clone().requires_grad_()
    said = model(x)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((said * weigh).sum(), [x, *named.values()])
    return said.detach(), dict(zip(["x", *named], found, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 1, 4)])
def test_it_is_pefts_layer(dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    plain, fused = pair(dtype)
    assert type(fused.base_model.model.one) is FusedLinear
    x, weigh = torch.randn(*shape, 80, dtype=dtype), torch.randn(*shape, 70, dtype=dtype)
    (wanted, slopes), (found, gradients) = passed(plain, x, weigh), passed(fused, x, weigh)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert float(slope.abs().max()) > 0
        assert float((gradients[name] - slope).abs().max()) <= tolerance * float(slope.abs().max()), name


def test_the_formula_by_hand() -> None:
    _, fused = pair(torch.float64)
    layer = fused.base_model.model.one
    x = torch.randn(4, 80, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = x @ (layer.base_layer.weight + 5 / 3 * b @ a).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


def _off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merged(model: Any) -> None:
    model.merge_adapter()


def _second(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["one"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def _hooked(model: Any) -> None:
    model.base_model.model.one.lora_B["default"].register_forward_hook(lambda *given: given[2] * 2)


def _trained(model: Any) -> None:
    model.base_model.model.one.base_layer.weight.requires_grad_()


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, _off),
        ({}, _merged),
        ({}, _second),
        ({}, _hooked),
        ({}, _trained),
        ({"use_dora": True}, None),
        ({"lora_bias": True, "target_modules": ["one"]}, None),
        ({"use_rslora": True}, None),
    ],
)
def test_what_is_not_plain_goes_pefts_way(settings: dict[str, Any], change: Any) -> None:
    plain, fused = pair(torch.float64, **settings)
    for model in (plain, fused):
        if change is not None:
            torch.manual_seed(1)
            change(model)
            model.double()
    x = torch.randn(5, 80, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


def test_dropout_drops() -> None:
    plain, fused = pair(torch.float64, lora_dropout=0.5)
    x = torch.randn(5, 80, dtype=torch.float64)
    for training in (True, False):
        found = []
        for model in (plain, fused):
            model.train(training)
            torch.manual_seed(3)
            found.append(model(x))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_half_precision_goes_pefts_way() -> None:
    """PEFT keeps the adapter in float32 over a base in bfloat16."""
    plain, fused = pair(torch.float64)
    for model in (plain, fused):
        model.float()
        for name, part in model.named_modules():
            if name.endswith("base_layer"):
                part.to(torch.bfloat16)
    x = torch.randn(5, 80).bfloat16()
    assert torch.equal(fused(x), plain(x))


def test_the_policys_layers_are_fused_and_merge_as_before(tiny_model: Path) -> None:
    policy = Policy(tiny_model, LORA, device="cpu")
    layers = [module for module in policy.model.modules() if isinstance(module, Linear)]
    assert layers
    assert all(type(layer) is FusedLinear for layer in layers)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(torch.randn_like(p) * 0.1)
    name, merged = next(policy.merged())
    layer: Any = policy.causal_lm.get_submodule(name.removesuffix(".weight"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(merged, layer.base_layer.weight + 5 / 3 * b @ a, rtol=1e-5, atol=1e-6)
