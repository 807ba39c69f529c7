"""The law for weights that are read and not called: packed attention projections and stacks of experts; and for parts
of a fused matrix."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import veneer
from veneer import LoRA
from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.init import CHANGES_BASE, INITS, NEEDS
from veneer.core.mixing import convert
from veneer.core.model import adapter_of, parameters, sites
from veneer.errors import ConfigError, StateError, TargetError


class Attention(nn.Module):
    def __init__(self, separate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6 if separate else None)
        self.separate = separate

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x[..., :6] if self.separate else x, x, need_weights=False)[0]


def mixtral(implementation: str = "eager") -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    config._experts_implementation = implementation
    return MixtralForCausalLM(config).eval()


IDS = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
CASES = {
    "packed": (lambda: Attention(False), ["attn.in_proj_weight", "out_proj"], X),
    "separate": (lambda: Attention(True), ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"], X),
    "experts": (mixtral, ["gate_up_proj", "down_proj", "q_proj"], IDS),
    "experts-grouped": (lambda: mixtral("grouped_mm"), ["gate_up_proj", "down_proj"], IDS),
}


def run(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def spread(model: nn.Module, name: str | None = None) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(model, name).values():
            p.add_(torch.randn_like(p) * 0.3)


STACKED = [d for d in DELTAS if DELTAS[d].takes_stacks]


STARTS = [i for i in INITS if i not in (*NEEDS, *CHANGES_BASE)]  # no input to look at; and tests/core/test_loftq.py


@pytest.mark.parametrize("case,combine,init", list(itertools.product(CASES, COMBINES, STARTS)))
def test_read_weights_obey_the_law(case: str, combine: str, init: str) -> None:
    build, targets, x = CASES[case]
    model = build()
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    y0 = run(model.requires_grad_(False), x)
    veneer.attach(model, LoRA(rank=2, alpha=4, targets=targets, combine=combine, init=init))
    torch.testing.assert_close(run(model, x), y0)
    assert [k for k in model.state_dict() if ".lora." not in k] == keys
    spread(model)
    y = run(model, x)
    assert not torch.allclose(y, y0, atol=1e-3)
    y.square().sum().backward()
    veneer.check_alive(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin, x), y) and torch.equal(run(copy.deepcopy(model), x), y)
    veneer.merge(model)
    torch.testing.assert_close(run(model, x), y, rtol=1e-4, atol=1e-5)
    veneer.unmerge(model)
    with veneer.disabled(model):
        assert torch.equal(run(model, x), y0)
    veneer.detach(model)
    assert [type(m) for m in model.modules()] == types and torch.equal(run(model, x), y0)


def test_each_expert_has_factors_of_its_own_and_a_gradient() -> None:
    model = mixtral()
    veneer.attach(model, LoRA(rank=2, targets=["gate_up_proj"]))
    delta = adapter_of(sites(model)["model.layers.0.mlp.experts.gate_up_proj"]).delta
    assert delta.A.shape == (4, 2, 16) and delta.B.shape == (4, 48, 2)
    spread(model)
    run(model, IDS).square().sum().backward()
    assert all(float(delta.B.grad[e].abs().sum()) > 0 for e in range(4))


def test_experts_and_grouped_product_agree() -> None:
    outputs = []
    for implementation in ("eager", "grouped_mm"):
        model = mixtral(implementation)
        veneer.attach(model, LoRA(rank=2, targets=["gate_up_proj", "down_proj"]))
        spread(model)
        outputs.append(run(model, IDS))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_several_adapters_on_read_weights() -> None:
    model = Attention(False)
    for name in ("a", "b"):
        veneer.attach(model, LoRA(rank=2, targets=["in_proj_weight"]), name)
        spread(model, name)
    veneer.activate(model, {"a": 0.5, "b": -1.0})
    mixed = model(X)
    veneer.merge(model, {"a": 0.5, "b": -1.0})
    torch.testing.assert_close(model(X), mixed)
    veneer.unmerge(model)
    with pytest.raises(StateError, match="row by row"), veneer.routed(model, ["a", "b"]):
        model(X)
    convert(model, "a", "c")
    veneer.activate(model, "a")
    wanted = model(X)
    veneer.activate(model, "c")
    torch.testing.assert_close(model(X), wanted)
    veneer.detach(model, "a")
    assert torch.allclose(model(X), wanted, atol=1e-6)


@pytest.mark.parametrize("delta", [d for d in DELTAS if not DELTAS[d].takes_stacks])
def test_deltas_that_cannot_hold_a_stack_say_so(delta: str) -> None:
    with pytest.raises(TargetError, match="stack"):
        veneer.attach(mixtral(), LoRA(rank=2, delta=delta, targets=["gate_up_proj"]))


def test_a_fused_matrix_is_adapted_in_its_parts_only() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 24))
    y0 = layer(X)
    spec = LoRA(rank=2, targets=["0"], delta="fused", options={"parts": [(0, 8), [(16, 20), (22, 24)]]})
    veneer.attach(layer, spec)
    spread(layer)
    change = (layer(X) - y0).abs().sum((0, 1))
    assert (change[:8] > 0).all() and (change[8:16] == 0).all()
    assert (change[16:20] > 0).all() and (change[20:22] == 0).all() and (change[22:] > 0).all()
    y = layer(X)
    y.sum().backward()
    veneer.check_alive(layer)
    veneer.merge(layer)
    torch.testing.assert_close(layer(X), y)
    for parts in ([], [(0, 8), (4, 12)], [(0, 99)]):
        with pytest.raises(ConfigError):
            veneer.attach(
                nn.Sequential(nn.Linear(8, 24)), LoRA(rank=2, targets=["0"], delta="fused", options={"parts": parts})
            )


def test_minimal_refuses_a_fused_layout_that_it_does_not_know() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

    with pytest.raises(TargetError, match="how Odd orders them is not known"):
        veneer.attach(Odd(), LoRA(rank=2, targets="minimal"))


def test_interleaved_heads_are_told_apart() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    from veneer.core.fused import fused_parts

    config = GPTNeoXConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8
    )
    model = GPTNeoXForCausalLM(config)
    name = "gpt_neox.layers.0.attention.query_key_value"
    parts = fused_parts(model, name, model.get_submodule(name))
    assert parts["q"] == [(0, 4), (12, 16), (24, 28), (36, 40)] and parts["v"][0] == (8, 12)


def test_minimal_on_gpt2_adapts_q_and_v_inside_the_fused_weight() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 23, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    seen = {}
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda m, a, y: seen.update(y=y.detach()))
    model(IDS)
    before = seen["y"]
    veneer.attach(model, LoRA(rank=2, targets="minimal"))
    spread(model)
    model(IDS)
    change = (seen["y"] - before).abs().sum((0, 1))
    assert (change[:16] > 0).all() and (change[16:32] == 0).all() and (change[32:] > 0).all()
