"""Against PEFT itself: the same config and the same values give the same logits, counts, keys and merges."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import veneer.peft

Run = Callable[..., torch.Tensor]

LM = {"task_type": "CAUSAL_LM"}
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "defaults": ("llama", None, {}),
    "rank and alpha": ("llama", None, {**LM, "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}),
    "seed 003": (
        "llama",
        None,
        {**LM, "r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "bias": "none",
         "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"]},
    ),
    "rslora": ("llama", None, {**LM, "use_rslora": True, "target_modules": "all-linear"}),
    "dora": ("llama", None, {**LM, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "regex": ("llama", None, {**LM, "target_modules": r".*\.1\..*(q|k)_proj"}),
    "excluded": ("llama", None, {**LM, "target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "one block": ("llama", None, {**LM, "target_modules": ["q_proj"], "layers_to_transform": 1}),
    "named blocks": (
        "llama", None,
        {**LM, "target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "patterns": (
        "llama",
        None,
        {**LM, "target_modules": ["q_proj", "v_proj"], 
         "rank_pattern": {"v_proj": 2, "^model.layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "head and embedding whole": ("llama", None, {**LM, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding": ("llama", None, {**LM, "target_modules": ["embed_tokens", "q_proj"]}),
    "bias of adapted layers": ("qwen2", None, {**LM, "bias": "lora_only"}),
    "gpt-2": ("gpt2", None, {**LM, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt-2 by default": ("gpt2", None, LM),
    "all biases": ("bert", None, {"bias": "all"}),  # with a head to train, PEFT saves some under names of its wrappers
    "sequence classification": ("bert", None, {"task_type": "SEQ_CLS", "r": 4}),
    "token classification": ("bert", "token", {"task_type": "TOKEN_CLS", "target_modules": ["query", "dense"]}),
    "seq2seq": ("t5", None, {"task_type": "SEQ_2_SEQ_LM", "inference_mode": False, "lora_alpha": 32}),
    "seq2seq dora": ("t5", None, {"task_type": "SEQ_2_SEQ_LM", "use_dora": True, "target_modules": ["q", "wo"]}),
}  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, twins: Callable[..., tuple[Any, Any]]) -> tuple[Any, Any]:
    kind, head, config = CASES[request.param]
    return twins(kind, head, **config)


def test_logits(pair: tuple[Any, Any], tokens: torch.Tensor, run: Run) -> None:
    theirs, ours = pair
    assert torch.allclose(run(theirs, tokens), run(ours, tokens), atol=1e-5)
    with ours.disable_adapter():
        base = run(ours, tokens)
    assert not torch.allclose(run(ours, tokens), base, atol=1e-3)
    if ours.active_peft_config.bias == "none":  # PEFT trains biases in the base itself, so there its base is gone
        with theirs.disable_adapter():
            assert torch.allclose(run(theirs, tokens), base, atol=1e-6)


def test_counts_and_the_line_that_tells_them(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    lines = []
    for model in pair:
        with redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        lines.append(out.getvalue())
    assert lines[0] == lines[1]


def test_keys_of_the_state_dict(pair: tuple[Any, Any], peft: ModuleType) -> None:
    theirs, ours = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = peft.get_peft_model_state_dict(theirs)
    found = veneer.peft.get_peft_model_state_dict(ours)
    base = {k for k in wanted if k.endswith("base_layer.weight")}  # an adapted embedding's own weight: not ours to save
    assert found.keys() == wanted.keys() - base
    for key, value in found.items():
        assert torch.allclose(value, wanted[key], atol=1e-6), key


def test_merge(pair: tuple[Any, Any], tokens: torch.Tensor, run: Run) -> None:
    theirs, ours = pair
    adapted = run(ours, tokens)
    ours.merge_adapter()
    merged = run(ours, tokens)
    assert torch.allclose(merged, adapted, atol=1e-5)
    ours.unmerge_adapter()
    assert torch.equal(run(ours, tokens), adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = theirs.merge_and_unload()
    own = ours.merge_and_unload()
    assert torch.allclose(run(plain, tokens), run(own, tokens), atol=1e-5)
    assert own is ours and not isinstance(own, veneer.peft.PeftModel)
    for key, value in plain.state_dict().items():
        assert torch.allclose(own.state_dict()[key], value, atol=1e-5), key


def test_each_loads_what_the_other_saved(
    pair: tuple[Any, Any], peft: ModuleType, tokens: torch.Tensor, run: Run, tmp_path: Path
) -> None:
    theirs, ours = pair
    before = run(ours, tokens)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
        base = theirs.unload()
        if theirs.peft_config["default"].bias == "none":  # else PEFT has changed the base
            again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
            assert torch.allclose(run(again, tokens), before, atol=1e-5)
    own = ours.unload()
    loaded = veneer.peft.PeftModel.from_pretrained(own, tmp_path / "theirs")
    assert torch.allclose(run(loaded, tokens), before, atol=1e-5)
    assert type(loaded).__mro__[1] is type(ours).__mro__[1] or type(loaded).__mro__[1].__name__.startswith("PeftModel")


def test_stacks_of_experts(peft: ModuleType, tokens: torch.Tensor, run: Run) -> None:
    """target_parameters: adapters on bare parameters, one matrix for each expert."""
    import transformers

    def base() -> Any:
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.MixtralForCausalLM(config).eval()

    words: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    words["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base(), peft.LoraConfig(**words)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(theirs).items()}
        wanted = run(theirs, tokens)
    ours = veneer.peft.get_peft_model(base(), veneer.peft.LoraConfig(**words)).eval()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    result = veneer.peft.set_peft_model_state_dict(ours, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert torch.allclose(run(ours, tokens), wanted, atol=1e-5)
    assert torch.allclose(run(ours.merge_and_unload(), tokens), wanted, atol=1e-5)
