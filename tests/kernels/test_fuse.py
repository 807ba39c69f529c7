"""The law of the fast path: fused and plain models have one loss and one gradient, over

    builds x what is adapted x how (LoRA, DoRA, VeRA, biases ..) x dropout (the same masks) x which adapters act
    x storage of the base x what is kept x dtype

in a choice of cases in which any two values meet (any three, among the slow tests); and over how rows are given. All
adapter parameters are moved first. A module that cannot run fused runs plainly, and says so.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

import veneer
from veneer import LoRA
from veneer.core.model import parameters
from veneer.errors import ConfigError, StateError
from veneer.kernels import fuse as fuse_module
from veneer.kernels import fuse as home
from veneer.kernels.block import LEVELS
from veneer.kernels.fuse import FusedBlock, FusedModule, fuse, is_fused, set_recompute, unfuse
from veneer.quant import eight
from veneer.quant.layer import unrounded
from veneer.tasks.cross_entropy import chunked_cross_entropy

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention"]
DROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
BUILDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=8),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=5, layer_types=LAYERS),
    "phi3": lambda: Phi3Config(**SIZES),
    "phi": lambda: PhiConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=97, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}
WHOLE = tuple(BUILDS)  # builds whose blocks are taken
RESIDUAL = ("gpt2", "phi", "phi3")  # that may drop out of what is added to their residual stream
NEAR = 1e-9  # in fp64, relative to each gradient; what is measured lies below 1e-11


def model_of(
    build: str, dtype: torch.dtype = torch.float64, seed: int = 0, residual: float = 0.0, **spec: Any
) -> nn.Module:
    torch.manual_seed(seed)
    attention, config = "eager" if build == "gemma2" else "sdpa", BUILDS[build]()
    if build in RESIDUAL:
        config.resid_pdrop = residual
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for p in model.parameters():
        if p.ndim == 1:  # biases start at zero and gains at one; what is forgotten must show
            nn.init.normal_(p, 0.5, 0.3)
    veneer.attach(model, LoRA(rank=4, alpha=6, **({"targets": "all-linear"} | spec)))
    return spread(model, seed + 1)


def spread(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter moved: a magnitude by a fifth of itself, all others by a fifth."""
    torch.manual_seed(seed)
    for name, p in parameters(model).items():
        move = torch.randn_like(p) / 5
        p.data = p.data * (1 + move) if name.endswith("magnitude") else move
    return model.train()


class Exactly(TorchFunctionMode):
    """fp64 stays fp64 where transformers asks for fp32, in norms and softmax: so rounded, the plain way alone is off by
    up to 5e-5 of a gradient, and a fault of that size in the fused one could not be seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func is Tensor.to:
                args = [torch.float64 if each is torch.float32 else each for each in args]
            if kwargs.get("dtype") is torch.float32:
                kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


def outcome(model: nn.Module, rows: int = 2, **inputs: Any) -> dict[str, Tensor]:
    """The loss and all gradients, from a fixed place in the random numbers; of a model in fp64, exact ones."""
    with Exactly():
        return _outcome(model, rows, **inputs)


def _outcome(model: nn.Module, rows: int, **inputs: Any) -> dict[str, Tensor]:
    torch.manual_seed(2)
    for p in model.parameters():
        p.grad = None
    ids = torch.randint(3, 97, (rows, 11))
    torch.manual_seed(3)
    hidden = model.base_model(input_ids=ids, use_cache=False, **inputs)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = model.get_output_embeddings()  # type: ignore[operator]
    loss = chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], head, rows=7)
    back(loss)
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def back(loss: Tensor) -> None:
    """loss.backward(), which would turn Exactly off; some of the forward pass is computed again in it."""
    engine: Any = torch.autograd.Variable._execution_engine
    one = torch.ones_like(loss)
    engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def agree(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert len(wanted) > 1
    for name, value in wanted.items():
        off = (got[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-12)
        assert off <= NEAR, f"{name} is off by {off:.2g}"


@pytest.fixture(autouse=True)
def may_say_so() -> Any:
    """What runs plainly says so; the tests here that are about it look."""
    home._said.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*run plainly")
        yield


def said() -> str:
    """Why something ran plainly, since this test began."""
    return " ".join(why for _, why in home._said)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("level", LEVELS)
def test_fused_and_plain_are_one(build: str, level: str) -> None:
    model = model_of(build)
    wanted = outcome(model)
    report = fuse(model, level, verbose=False)
    assert (report.replaced["blocks"] == 2) == (build in WHOLE), str(report)
    agree(outcome(model), wanted)


@pytest.mark.parametrize("build", WHOLE)
def test_in_half_precision_fused_is_as_near_the_truth_as_plain(build: str) -> None:
    """Which of two ways of rounding comes nearer is a draw, in single cases by a factor of 5; on the average of many it
    must not be known which is which."""
    ratios = [
        ratio
        for seed in range(3)
        for combine in ("add", "dora")
        for ratio in further(model_of(build, torch.bfloat16, seed, combine=combine))
    ]
    assert math.exp(statistics.fmean(map(math.log, ratios))) <= 1.4, ratios


@pytest.mark.parametrize("build", ["llama-biased", "qwen2", "phi", "gpt2"])
def test_in_half_precision_magnitudes_are_no_further_from_the_truth_for_a_bias(build: str) -> None:
    """Those of q and k apart: what they learn by cancels, and plain ones are off by half and more, too."""
    ratios: dict[str, list[float]] = {}
    for seed in range(3):
        model = model_of(build, torch.bfloat16, seed, combine="dora")
        exact, plain = outcome(copy.deepcopy(model).double()), outcome(model)
        assert fuse(model, verbose=False).replaced["blocks"] == 2
        fused = outcome(model)
        for name in (n for n in exact if "magnitude" in n and not any(each in n for each in ("q_proj", "k_proj"))):
            off, other = (distance({name: got[name]}, {name: exact[name]}) for got in (fused, plain))
            ratios.setdefault(name.split(".")[-5], []).append(off / other)
    means = {kind: math.exp(statistics.fmean(map(math.log, found))) for kind, found in ratios.items()}
    assert len(means) >= 3 and max(means.values()) <= 1.1, means


def further(model: nn.Module) -> list[float]:
    """By how much fused gradients are further from exact ones than plain ones are, keeping all and next to nothing."""
    exact = outcome(copy.deepcopy(model).double())
    plain = distance(outcome(model), exact)
    fuse(model, verbose=False)
    fused = [distance(outcome(model), exact)]
    set_recompute(model, "input")
    return [off / plain for off in (*fused, distance(outcome(model), exact))]


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all gradients together, relative to their size."""
    assert got.keys() == wanted.keys()
    gradients = {name: w.double() for name, w in wanted.items() if name != "loss"}
    off = sum(float((got[n].double() - w).square().sum()) for n, w in gradients.items())
    return (off / sum(float(w.square().sum()) for w in gradients.values())) ** 0.5


# ------------------------------------------------------------------ the law

PARTS: dict[str, Any] = {
    "all": "all-linear",
    "q and v": r".*\.(q_proj|v_proj|qkv_proj|c_attn)",
    "k and gate": r".*\.(k_proj|qkv_proj|gate_proj|c_attn|c_fc|fc1)",
    "mlp": r".*\.mlp\.\w+",
    "last block": r".*\.1\..*(o_proj|dense|c_proj|up_proj|fc2)",
    "head": r"lm_head|.*\.(o_proj|dense|c_proj)",
    "embedding": r".*(embed_tokens|wte|down_proj|fc2)|.*\.mlp\.c_proj",
}
SECOND = r".*\.(q_proj|qkv_proj|c_attn|up_proj|gate_up_proj|fc1|c_fc|down_proj|fc2)"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"combine": "dora"},
    "vera": {"delta": "vera"},
    "lora-fa": {"delta": "lora_fa"},
    "biases": {"bias": "all"},
    "dora and biases": {"combine": "dora", "bias": "all"},
}


def adapters_one(model: nn.Module) -> Any:
    return nullcontext()


def adapters_two(model: nn.Module) -> Any:
    veneer.attach(model, LoRA(rank=3, alpha=9, targets=SECOND), name="second")
    spread(model)
    veneer.activate(model, {"default": 0.7, "second": -1.3})
    return nullcontext()


def adapters_routed(model: nn.Module) -> Any:
    adapters_two(model)
    return veneer.routed(model, ["second", "default"])


def adapters_frozen_beside(model: nn.Module) -> Any:
    """One adapter trained, one beside it as it is."""
    adapters_two(model)
    for name, p in model.named_parameters():
        p.requires_grad_(".second." in name)
    return nullcontext()


ACTING = {
    "one": adapters_one,
    "sum": adapters_two,
    "routed": adapters_routed,
    "one of two trained": adapters_frozen_beside,
}
AXES: dict[str, list[str]] = {
    "build": list(BUILDS),
    "parts": list(PARTS),
    "method": list(METHODS),
    "dropout": ["", "dropout", "everywhere"],  # of adapters; and of the residual stream, where a build has that
    "acting": list(ACTING),
    "storage": ["dense", "nf4", "int8", "fp8"],
    "level": list(LEVELS),
    "dtype": ["float64", "bfloat16"],
}


def covering(strength: int) -> list[tuple[str, ...]]:
    """Cases in which any `strength` axes meet in every combination of their values: each the best of some."""
    draw, places = random.Random(strength - 2), list(itertools.combinations(range(len(AXES)), strength))
    values = list(AXES.values())
    every = ((at, each) for at in places for each in itertools.product(*(values[i] for i in at)))
    left = dict.fromkeys(sorted(every))  # in one order, whatever the hash of a string is in this process
    chosen: list[tuple[str, ...]] = []
    while left:
        at, each = next(iter(left))
        drawn = []
        for _ in range(30):
            case = [draw.choice(axis) for axis in values]
            for i, value in zip(at, each, strict=True):
                case[i] = value
            drawn.append(tuple(case))
        met = [{(at, tuple(case[i] for i in at)) for at in places} & left.keys() for case in drawn]
        best = max(range(len(drawn)), key=lambda i: len(met[i]))
        chosen.append(drawn[best])
        for one in met[best]:
            del left[one]
    return chosen


def holds(build: str, parts: str, method: str, dropout: str, acting: str, storage: str, level: str, dtype: str) -> None:
    routed, dora = acting == "routed", "dora" in method
    if routed and parts in ("head", "embedding"):
        parts = "all"  # a head reads tokens without their rows, and it may be tied
    if dtype == "bfloat16":
        dropout = ""  # there is nothing to compare with: fp64 draws other masks
    tied = "apart" if dora else "together"  # DoRA scales rows, which are columns of the other
    spec = {"targets": PARTS[parts], "dropout": 0.3 if dropout else 0.0, "tied": tied} | METHODS[method]
    if routed and "bias" in spec:
        spec["bias"] = "lora_only"  # and not the head's
    model = model_of(build, getattr(torch, dtype), residual=0.2 if dropout == "everywhere" else 0.0, **spec)
    if storage != "dense":
        veneer.quantize(model, storage)
    with ACTING[acting](model), unrounded(model):
        model.to(getattr(torch, dtype))  # adapters beside a packed base come in fp32
        exact = outcome(copy.deepcopy(model).double()) if dtype == "bfloat16" else {}
        wanted = outcome(model)
        fuse(model, level, verbose=False)
        got = outcome(model)
    if exact:
        assert distance(got, exact) <= 10 * distance(wanted, exact)  # both are a draw; their mean is told above
    else:
        agree(got, wanted)
    may_be_plain = acting != "one" and (dora or dropout or (routed and "bias" in spec))
    assert not said() or may_be_plain, said()


PAIRS = covering(2)


@pytest.mark.parametrize("case", PAIRS, ids=[", ".join(filter(None, case)) for case in PAIRS])
def test_the_law(case: tuple[str, ...]) -> None:
    holds(*case)


@pytest.mark.slow
def test_the_law_in_every_triple() -> None:
    wrong = {}
    for case in covering(3):
        home._said.clear()
        try:
            holds(*case)
        except (AssertionError, RuntimeError, ValueError) as error:
            wrong[case] = str(error).splitlines()[0]
    assert not wrong


FUSED_SPECS: dict[str, dict[str, Any]] = {
    "dora": {"combine": "dora"},
    "dora dropout": {"combine": "dora", "dropout": 0.3},
    "dora on some": {"combine": "dora", "targets": r".*\.(k|qkv|o|up|gate_up)_proj"},
    "dora on others": {"combine": "dora", "targets": r".*\.(v|qkv|down)_proj"},
    "dora rslora pissa": {"combine": "dora", "scaling": "rslora", "init": "pissa"},
    "dora vera": {"combine": "dora", "delta": "vera"},
    "dora biases": {"combine": "dora", "bias": "all"},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only", "targets": r".*\.(q|o|down|gate|gate_up)_proj"},
    "bias in B": {"bias": "lora"},
    "pissa": {"init": "pissa"},
    "vera": {"delta": "vera"},
    "adalora": {"delta": "adalora"},
    "lora-fa": {"delta": "lora_fa"},
    "lora-xs": {"delta": "lora_xs"},
    "blocks": {"delta": "block", "options": {"blocks": 2}},
    "dora on the head": {"combine": "dora", "targets": ["lm_head", "o_proj", "down_proj"]},
    "rslora": {"scaling": "rslora"},
}


@pytest.mark.parametrize("spec", FUSED_SPECS)
@pytest.mark.parametrize("build,level", [("llama-biased", "none"), ("phi3", "input")])
def test_the_law_over_deltas_and_rules(spec: str, build: str, level: str) -> None:
    model = model_of(build, **FUSED_SPECS[spec])
    wanted = outcome(model)
    fuse(model, level, verbose=False)
    agree(outcome(model), wanted)
    assert not said()


SPECS: dict[str, dict[str, Any]] = {
    "loha": {"delta": "loha"},
    "trained norms": {"modules_to_save": ["input_layernorm", "norm"]},
    "trained head": {"modules_to_save": ["lm_head"]},
    "adapted head": {"targets": ["lm_head", "q_proj", "down_proj"]},
    "adapted embedding": {"targets": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("level", LEVELS)
def test_the_law_over_kinds_of_adapters(spec: str, level: str) -> None:
    model = model_of("llama", **SPECS[spec])
    wanted = outcome(model)
    fuse(model, level, verbose=False)
    agree(outcome(model), wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_packed_and_single_rows(level: str, attention: str) -> None:
    model = model_of("llama")
    model.set_attn_implementation(attention)  # type: ignore[operator]
    padded = torch.ones(2, 11, dtype=torch.long)
    padded[0, 6:] = 0
    packed = torch.tensor([[*range(4), *range(7)], [*range(11)]])
    ways: list[dict[str, Any]] = [{"rows": 1}, {"attention_mask": padded}, {"position_ids": packed}]
    wanted = [outcome(model, **way) for way in ways]
    fuse(model, level, verbose=False)
    for way, value in zip(ways, wanted, strict=True):
        agree(outcome(model, **way), value)


@pytest.mark.parametrize("build", BUILDS)
def test_padding_is_seen_however_a_model_hands_it_on(build: str) -> None:
    """GPT-2 gives its blocks the mask by its place."""
    model = model_of(build)
    padded = torch.ones(2, 11, dtype=torch.long)
    padded[0, 6:] = 0
    wanted = outcome(model, attention_mask=padded)
    assert not torch.equal(wanted["loss"], outcome(model)["loss"])
    fuse(model, verbose=False)
    agree(outcome(model, attention_mask=padded), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_attention_that_drops_out_draws_the_same_masks(level: str) -> None:
    model = model_of("llama", dropout=0.2)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    wanted = outcome(model)
    fuse(model, level, verbose=False)
    agree(outcome(model), wanted)


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_transposes_that_are_kept_change_nothing(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_KERNELS", "emulate")
    model = model_of("llama", torch.float32)
    veneer.quantize(model, storage)
    kept = copy.deepcopy(model)
    fuse(model, verbose=False)
    made: list[int] = []
    turn = eight.turn
    monkeypatch.setattr(eight, "turn", lambda *codes: made.append(len(codes)) or turn(*codes))
    report = fuse(kept, turned=True, verbose=False)
    assert report.turned == 14 and "both layouts kept" in str(report)
    agree(outcome(kept), outcome(model))
    once = len(made)
    agree(outcome(kept), outcome(model))
    assert len(made) == once * 3 // 2  # the second time only for the other model
    for each in (model, kept):  # a weight that is replaced is turned anew
        layer = each.model.layers[0].mlp.up_proj
        layer.weight.data = layer.weight.data.roll(1, 0)
    agree(outcome(kept), outcome(model))
    weight = kept.model.layers[1].self_attn.o_proj.weight
    assert weight in eight._kept
    unfuse(kept)
    assert weight not in eight._kept


# ------------------------------------------------------------------ around it


def test_generation_and_evaluation_run_as_before() -> None:
    model = model_of("llama").eval()
    ids = torch.randint(3, 97, (2, 5))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        written = model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        fuse(model, verbose=False)
        assert torch.equal(model(input_ids=ids).logits, wanted)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), written)  # type: ignore[operator]


@pytest.mark.parametrize("level", ["none", "gate_up"])
def test_a_cache_that_training_fills_unasked_is_filled_by_fused_blocks_too(level: str) -> None:
    plain = model_of("llama")
    fused = copy.deepcopy(plain)
    fuse(fused, level, verbose=False)
    ids = torch.arange(3, 15)[None]
    with Exactly():
        outs = [model(input_ids=ids, labels=ids, use_cache=True) for model in (plain, fused)]
    for out, model in zip(outs, (plain, fused), strict=True):
        out.loss.backward()
        assert out.past_key_values.get_seq_length() == 12, model
    for one, other in zip(outs[0].past_key_values.layers, outs[1].past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=NEAR, atol=NEAR)
    for one, other in zip(parameters(plain).values(), parameters(fused).values(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=NEAR, atol=NEAR)
    fuse_module._said.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        set_recompute(fused, "input")
        fused(input_ids=ids, use_cache=True)
    assert any("cannot be filled twice" in str(each.message) for each in said)


@pytest.mark.parametrize("level", LEVELS)
def test_what_a_block_or_a_norm_gives_may_be_written_into(level: str) -> None:
    """Models add to the output of a block in its own memory (features of pictures at early layers)."""
    found = []
    model = model_of("llama")
    fuse(model, level, verbose=False)
    for in_place in (True, False):
        model.zero_grad()
        torch.manual_seed(0)
        x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
        with Exactly():
            y = model.model.layers[0](x, position_embeddings=model.model.rotary_emb(x, torch.arange(7)[None]))
            y = y.add_(1) if in_place else y + 1
            y = model.model.norm(y)
            y = y.mul_(2) if in_place else y * 2
            back(y.square().sum())
        found.append([x.grad, *(p.grad for p in parameters(model).values() if p.grad is not None)])
    assert len(found[0]) == 15 and all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_unfuse_gives_every_class_back() -> None:
    model = model_of("qwen3")
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    fuse(model, verbose=False)
    assert is_fused(model)
    assert list(model.state_dict()) == keys
    with pytest.raises(StateError, match="fused already"):
        fuse(model)
    unfuse(model)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before


def test_classes_of_the_library_stay_as_they_are() -> None:
    from transformers.models.llama import modeling_llama as library

    before = {name: dict(vars(kind)) for name, kind in vars(library).items() if isinstance(kind, type)}
    fuse(model_of("llama"), verbose=False)
    assert all(dict(vars(getattr(library, name))) == held for name, held in before.items())


def test_adapters_may_come_and_go_on_a_fused_model() -> None:
    model = model_of("llama")
    wanted = outcome(model)
    veneer.detach(model)
    fuse(model, verbose=False)
    veneer.attach(model, LoRA(rank=4, alpha=6, targets="all-linear"))
    agree(outcome(spread(model)), wanted)


def test_a_fused_model_is_copied_and_pickled_fused() -> None:
    model = model_of("llama")
    wanted = outcome(model)
    fuse(model, verbose=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_fused(twin)
        agree(outcome(twin), wanted)
        assert all(p.grad is not None for p in parameters(twin).values())


def test_transformers_own_checkpointing_goes_around_a_fused_block() -> None:
    model = model_of("llama")
    wanted = outcome(model)
    fuse(model, verbose=False)
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    agree(outcome(model), wanted)


def test_a_hook_is_not_passed_by() -> None:
    model = model_of("llama")
    seen: list[int] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(0))  # type: ignore[union-attr]
    wanted = outcome(model)
    fuse(model, verbose=False)
    seen.clear()
    with pytest.warns(UserWarning, match=r"layers\.0.*run plainly, and slower: a hook hangs on it"):
        home._said.clear()
        agree(outcome(model), wanted)
    assert seen


@pytest.mark.parametrize("build", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("how", ["a hook", "a forward on the instance"])
def test_what_hangs_on_any_module_of_a_block_is_done(build: str, how: str) -> None:
    """A fused block calls none of them, so it has to look at all of them."""
    model = model_of(build)
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    names = [n for n, m in layers[0].named_children()] + ["mlp." + n for n, _ in layers[0].mlp.named_children()]
    fuse(model, verbose=False)
    for name in names:
        inside, seen = layers[0].get_submodule(name), []
        if how == "a hook":
            undo = inside.register_forward_hook(lambda *_, seen=seen: seen.append(0)).remove
        else:
            own = inside.forward
            inside.forward = lambda *args, own=own, seen=seen, **kwargs: seen.append(0) or own(*args, **kwargs)
            undo = lambda inside=inside: delattr(inside, "forward")  # noqa: E731
        outcome(model)
        undo()
        assert seen, name


class Odd(nn.Module):
    """Looks like a block of Llama and does something else."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            setattr(self, name, child)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        own = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        return hidden_states + 0.5 * own + self.mlp(self.post_attention_layernorm(hidden_states))


def test_a_block_that_only_looks_the_part_is_left_alone_and_named() -> None:
    model = model_of("llama")
    model.model.layers[1] = Odd(model.model.layers[1])  # type: ignore[union-attr, operator, index]
    wanted = outcome(model)
    report = fuse(model, verbose=False)
    assert report.replaced["blocks"] == 1
    assert "gives something else" in report.skipped["model.layers.1"]
    assert "plain: model.layers.1: its own forward gives something else" in str(report)
    agree(outcome(model), wanted)


@pytest.mark.parametrize("build", ["llama", "gpt2", "phi", "gemma3"])
@pytest.mark.parametrize("level", ["none", "input"])
def test_one_row_of_one_token_is_learned_from_and_a_batch_of_nothing_is_named(build: str, level: str) -> None:
    model, ids = model_of(build), torch.tensor([[5]])

    def gradients(ids: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        with Exactly():
            back(model.base_model(input_ids=ids, use_cache=False)[0].square().sum())
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(ids)
    fuse(model, level, verbose=False)
    got = gradients(ids)
    size = max(float(w.norm()) for w in wanted.values())  # q and k of a single token learn nothing
    assert all(float((got[n] - w).norm()) <= NEAR * size for n, w in wanted.items()) and not said()
    with pytest.raises(StateError, match=r"a batch of nothing: its input is of shape \(0, 3, 32\)") as told:
        next(m for m in model.modules() if isinstance(m, FusedBlock))(torch.zeros(0, 3, 32, dtype=torch.float64))
    assert "leave such a batch out" in str(told.value) and "layers.0" in str(told.value).replace("h.0", "layers.0")


@pytest.mark.parametrize("spec", [{}, {"dropout": 0.3}, {"combine": "dora"}], ids=str)
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
def test_units_and_norms_that_nothing_reaches_give_nothing(shape: tuple[int, ...], spec: dict[str, Any]) -> None:
    """An expert to which no token is sent."""
    layer = model_of("llama", torch.float32, **spec).model.layers[0]  # type: ignore[union-attr]
    net = nn.Sequential(layer.input_layernorm, layer.mlp).train()
    assert fuse(net, verbose=False).replaced == {"gated units": 1, "norms": 1}
    x = torch.zeros(shape, requires_grad=True)
    y = net(x)
    y.sum().backward()
    learned = [p.grad for p in net.parameters() if p.grad is not None]
    assert y.shape == x.grad.shape == shape and learned and not any(bool(g.any()) for g in learned) and not said()  # type: ignore[union-attr]


def test_a_model_of_no_known_build_is_said_to_run_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    report = fuse(nn.Sequential(nn.Linear(2, 2)))
    assert not report.replaced
    assert "plain: Sequential: no part of it is of a build that is known" in capsys.readouterr().out


@pytest.mark.parametrize("build", RESIDUAL)
@pytest.mark.parametrize("level", LEVELS)
def test_blocks_drop_out_of_their_residual_stream_as_plain_ones_do(build: str, level: str) -> None:
    """Also where p is set later, all of it, or where an adapter and the attention drop out besides."""
    model = model_of(build, dropout=0.3, residual=0.25)
    report = fuse(model, level, verbose=False)
    assert report.replaced["blocks"] == 2 and not report.skipped
    drops = [m for n, m in model.named_modules() if isinstance(m, nn.Dropout) and ("resid" in n or "mlp" in n)]
    for p in (0.25, 0.0, 0.6, 1.0):
        for drop in drops:
            drop.p = p
        fused = outcome(model)
        unfuse(model)
        agree(fused, outcome(model))
        fuse(model, level, verbose=False)
    assert not said() and [drop.p for drop in drops] == [1.0] * len(drops)


def test_dropout_in_a_place_that_is_not_known_runs_plainly() -> None:
    model = model_of("llama")
    for block in model.model.layers:  # type: ignore[union-attr]
        block.self_attn.sneaky = nn.Dropout(0.0)
    fuse(model, verbose=False)
    wanted = outcome(model)
    assert not said()
    for block in model.model.layers:  # type: ignore[union-attr]
        block.self_attn.sneaky.p = 0.1
    agree(outcome(model), wanted)
    assert "drops out in a place that is not known" in said()


def test_an_unknown_level_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="none, gate_up, middle, input"):
        fuse(model_of("llama"), "half")
    with pytest.raises(ConfigError, match="none, gate_up, middle, input"):
        set_recompute(model_of("llama"), "half")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("combine", ["add", "dora"])
def test_what_is_kept_is_what_the_level_says(level: str, combine: str) -> None:
    """In numbers for each token of a block, against what block.py's table says, with a little for the thin products."""
    model = model_of("llama", torch.float32, combine=combine)
    fuse(model, level, verbose=False)
    held: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        model.base_model(input_ids=torch.randint(3, 97, (2, 512)), use_cache=False)
    wanted = {"none": 32 * 2 + 32 + 16 * 2 + 32 + 96, "gate_up": 32 * 2 + 32 + 16 * 2 + 32, "middle": 64, "input": 32}
    wanted["tiled"] = wanted["input"]
    if combine == "dora" and level in ("none", "gate_up"):
        wanted[level] += 2 * 32  # what o and down gave
    per_token = sum(held.values()) / 4 / 1024 / 2
    assert per_token <= wanted[level] + 32 / 2 + 60  # the last norm's input, positions, h and factors
    assert not [m for m in model.modules() if isinstance(m, FusedModule) and m.fused.recompute != level]
