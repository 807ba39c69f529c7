"""Biases in B, exclusions that exclude nothing, and experts without a token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import adapter_of, parameters, sites
from veneer.errors import ConfigError, StateError, TargetError


def spread(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(model).values():
            p.normal_(std=0.3)


def net(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4, bias=bias)).to(dtype)


# ---------------------------------------------------------------- a bias in B


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("combine", ["add", "dora"])
def test_b_may_have_a_bias_whether_or_not_the_layer_has_one(bias: bool, dtype: torch.dtype, combine: str) -> None:
    model, x = net(bias, dtype), torch.randn(3, 8).to(dtype)
    y0 = model(x).detach()
    veneer.attach(model, LoRA(rank=2, bias="lora", combine=combine))
    assert torch.equal(model(x), y0)
    spread(model)
    y = model(x)
    assert not torch.equal(y, y0)
    y.float().square().sum().backward()
    veneer.check_alive(model)
    assert all(p.grad is not None and p.grad.any() for p in parameters(model).values())
    with torch.no_grad():
        change = {i: adapter_of(model[i]).bias.clone() for i in (0, 2)}
        for i in (0, 2):
            adapter_of(model[i]).bias.zero_()
        without = model[0](x) + change[0].to(dtype)
        for i in (0, 2):
            adapter_of(model[i]).bias.copy_(change[i])
    torch.testing.assert_close(model[0](x), without, rtol=2e-2, atol=2e-2)
    if bias:
        veneer.merge(model)
        torch.testing.assert_close(model(x), y, rtol=5e-2, atol=5e-2)
        veneer.unmerge(model)
    else:
        with pytest.raises(StateError, match="no bias that the adapter's could be added to") as error:
            veneer.merge(model)
        assert len(error.value.problems) == 2 and "unmerged" in str(error.value)
    assert torch.equal(model(x), y)
    veneer.detach(model)
    assert torch.equal(model(x), y0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_bias_in_b_goes_through_a_file_as_peft_has_it(bias: bool, tmp_path: Path) -> None:
    import json

    model, x = net(bias), torch.randn(3, 8)
    veneer.attach(model, LoRA(rank=2, alpha=8, bias="lora"))
    spread(model)
    veneer.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_bias"] is True and config["bias"] == "none"
    other = net(bias)
    veneer.load(other, tmp_path)
    torch.testing.assert_close(other(x), model(x))


def test_a_bias_in_b_needs_a_b_and_an_output() -> None:
    with pytest.raises(ConfigError, match="has no such factor"):
        LoRA(bias="lora", delta="vera")
    with pytest.raises(TargetError, match="is added to an output"):
        veneer.attach(nn.Sequential(nn.Embedding(9, 4)), LoRA(rank=2, targets=["0"], bias="lora"))


# ---------------------------------------------------------------- exclusions


@pytest.mark.parametrize(
    "exclude,match",
    [
        (["dwon_proj"], "'dwon_proj' matches none of 2 adaptable layers. Near: down_proj"),
        (["down_proj", "qq"], "'qq' matches none"),
        (["block"], "It names modules that hold layers"),
        ("layers.9.*", "matches none"),
        ("(", "is not a regular expression"),
    ],
)
def test_an_exclusion_that_excludes_nothing_is_an_error(exclude: str | list[str], match: str) -> None:
    model = nn.ModuleDict({"block": nn.ModuleDict({"up_proj": nn.Linear(4, 4), "down_proj": nn.Linear(4, 4)})})
    with pytest.raises((TargetError, ConfigError)) as error:
        veneer.attach(model, LoRA(rank=2, exclude=exclude))
    assert match in str(error.value) and not veneer.adapters(model)
    report = veneer.attach(model, LoRA(rank=2, exclude=r"(.*\.)?block\.up.*"))
    assert report.sites == ("block.down_proj",)


# ---------------------------------------------------------------- experts


class Mixture(nn.Module):
    """A router and its experts; what is sent where is decided here, so that one may go without."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: Tensor, to: tuple[int, ...]) -> Tensor:
        share = self.gate(x).softmax(-1)
        return sum(share[:, i : i + 1] * self.experts[i]["up_proj"](x) for i in to)  # type: ignore[return-value]


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Mixture() for _ in range(2))

    def forward(self, x: Tensor, to: tuple[tuple[int, ...], ...]) -> Tensor:
        for layer, here in zip(self.layers, to, strict=True):
            x = x + layer(x, here)
        return x


def test_an_expert_without_a_token_is_said_and_a_dead_adapter_is_still_found() -> None:
    model, x = Stack(), torch.randn(5, 8)
    veneer.attach(model, LoRA(rank=2, targets=["up_proj"]))
    spread(model)
    model(x, ((0, 1), (0, 1, 2))).square().sum().backward()
    notes = veneer.check_alive(model)
    assert notes == ("layers.0.experts.2.up_proj got no gradient: its expert was sent no token of this batch",)

    model = Stack()
    veneer.attach(model, LoRA(rank=2, targets=["up_proj"]))
    spread(model)
    model.layers[1](x, (0, 1)).square().sum().backward()  # the first block never ran: no expert of it is alive
    with pytest.raises(StateError, match="3 adapters got no gradient") as error:
        veneer.check_alive(model)
    assert all("layers.0.experts" in problem for problem in error.value.problems)


@pytest.mark.parametrize("trainable", [True, False])
def test_an_adapter_that_is_dead_beside_a_live_one_is_found(trainable: bool) -> None:
    """Both stand on the same experts; where the live one got a gradient, or none is trained, nothing is excused."""
    model, x = Stack(), torch.randn(5, 8)
    for name in ("live", "dead"):
        veneer.attach(model, LoRA(rank=2, targets=["up_proj"]), name, trainable=name == "dead" or trainable)
    veneer.activate(model, ["live", "dead"])
    spread(model)
    model(x, ((0, 1, 2), (0, 1, 2))).square().sum().backward()
    dead = ("layers.0.experts.0.up_proj", "layers.1.experts.0.up_proj")
    for expert in range(3) if not trainable else (0,):
        for layer in range(2):
            for p in sites(model)[f"layers.{layer}.experts.{expert}.up_proj"].slots["dead"].parameters():  # type: ignore[union-attr, index]
                p.grad = None
    with pytest.raises(StateError) as error:
        veneer.check_alive(model)
    assert set(error.value.problems) >= {f"{site} (dead)" for site in dead}
    assert not any("(live)" in problem for problem in error.value.problems)


def test_a_block_is_no_expert() -> None:
    """Blocks stand in a ModuleList too, but there is no router beside them."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
    veneer.attach(model, LoRA(rank=2))
    spread(model)
    model["layers"][0](torch.randn(2, 8)).sum().backward()
    with pytest.raises(StateError, match="2 adapters got no gradient"):
        veneer.check_alive(model)
