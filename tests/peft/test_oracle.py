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

import veneer.errors
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
    "bias in B": ("qwen2", None, {**LM, "lora_bias": True, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}),
    "rows": ("llama", None, {**LM, "trainable_token_indices": [9, 3]}),
    "rows alone, by name": ("llama", None, {**LM, "trainable_token_indices": {"lm_head": [1], "embed_tokens": [2]}}),
    "seq2seq": ("t5", None, {"task_type": "SEQ_2_SEQ_LM", "inference_mode": False, "lora_alpha": 32}),
    "seq2seq dora": ("t5", None, {"task_type": "SEQ_2_SEQ_LM", "use_dora": True, "target_modules": ["q", "wo"]}),
}  # fmt: skip


METHODS: dict[str, dict[str, Any]] = {  # the config's class and its words, on a llama
    "adalora": {"method": "AdaLoraConfig", "init_r": 4, "lora_alpha": 9, "total_step": 10},
    "vera": {"method": "VeraConfig", "r": 64, "target_modules": ["q_proj", "down_proj"]},
    "vera, by key": {"method": "VeraConfig", "r": 8, "save_projection": False, "projection_prng_key": 5},
    "loha": {"method": "LoHaConfig", "r": 3, "alpha": 5, "modules_to_save": ["lm_head"]},
    "lokr": {"method": "LoKrConfig", "r": 2, "alpha": 5, "decompose_factor": 4, "decompose_both": True},
}
CASES |= {name: ("llama", None, {**LM, **words}) for name, words in METHODS.items()}


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
    if getattr(ours.active_peft_config, "bias", "none") == "none":  # else PEFT trains the base's own
        with theirs.disable_adapter():
            assert torch.allclose(run(theirs, tokens), base, atol=1e-6)


def test_counts_and_the_line_that_tells_them(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    trained, total = theirs.get_nb_trainable_parameters()
    if ours.peft_type == "ADALORA":  # PEFT counts a parameter for each layer that holds the rank as a number
        assert ours.get_nb_trainable_parameters() == (trained, total - len(ours.get_layer_status()))
        return
    assert ours.get_nb_trainable_parameters() == (trained, total)
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
        if getattr(theirs.peft_config["default"], "bias", "none") == "none":  # else PEFT has changed the base
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


def test_an_attention_with_packed_projections_is_one_target(peft: ModuleType, tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = torch.nn.MultiheadAttention(16, 4, batch_first=True)
            self.out = torch.nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.attn(x, x, x, need_weights=False)[0])

    def base() -> Any:
        torch.manual_seed(0)
        return Net().eval()

    words: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["attn", "out"], "rank_pattern": {"attn": 3}}
    x = torch.randn(2, 5, 16)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base(), peft.LoraConfig(**words)).eval()
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(theirs).items()}
        wanted = theirs(x)
    ours = veneer.peft.get_peft_model(base(), veneer.peft.LoraConfig(**words)).eval()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    result = veneer.peft.set_peft_model_state_dict(ours, state)
    assert result.missing_keys == [] and result.unexpected_keys == []
    with torch.no_grad():
        assert torch.allclose(ours(x), wanted, atol=1e-5)
    again = veneer.peft.get_peft_model_state_dict(ours)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("name", [name for name in METHODS if "modules_to_save" not in METHODS[name]])
def test_layers_say_what_they_are_as_pefts_do(name: str, twins: Callable[..., tuple[Any, Any]]) -> None:
    theirs, ours = twins("llama", **LM, **METHODS[name])
    told = [[(layer.name, layer.module_type) for layer in model.get_layer_status()] for model in (theirs, ours)]
    assert told[0] == told[1]
    assert ours.get_model_status().peft_types == {"default": theirs.get_model_status().peft_types["default"]}


ADALORA: dict[str, Any] = {"init_r": 4, "target_r": 2, "total_step": 12, "tinit": 2, "tfinal": 3, "lora_alpha": 8}


def test_adaloras_loss_keeps_the_directions_apart_as_pefts_does(
    twins: Callable[..., tuple[Any, Any]], tokens: torch.Tensor
) -> None:
    theirs, ours = twins("llama", method="AdaLoraConfig", task_type="CAUSAL_LM", **ADALORA)
    for model in (theirs, ours):
        model.set_adapter("default")
    losses = [model(input_ids=tokens, labels=tokens).loss for model in (theirs, ours)]
    assert torch.allclose(losses[0], losses[1], atol=1e-5)
    ours.peft_config["default"].orth_reg_weight = 0.0
    assert not torch.allclose(ours(input_ids=tokens, labels=tokens).loss, losses[1], atol=1e-3)


@pytest.mark.parametrize("through", ["model", "base_model"])
def test_adalora_trains_to_its_budget_and_peft_reads_it(
    through: str, make_model: Callable[..., Any], peft: ModuleType, tokens: torch.Tensor, run: Run, tmp_path: Path
) -> None:
    words = {**ADALORA, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    model = veneer.peft.get_peft_model(make_model("llama"), veneer.peft.AdaLoraConfig(**words))
    place = model if through == "model" else model.base_model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(12):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        place.update_and_allocate(step)
        optimizer.zero_grad()
    left = [sum(mask) for mask in model.peft_config["default"].rank_pattern.values()]
    assert sum(left) == 2 * len(left) and len(set(left)) > 1
    model.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    assert theirs.peft_config["default"].target_r == 2 and theirs.peft_config["default"].tfinal == 3
    assert torch.allclose(run(theirs, tokens), run(model, tokens), atol=1e-5)
    with pytest.raises(veneer.errors.StateError, match="no AdaLoRA adapter is active"):
        model.set_adapter("default", inference_mode=True)
        model.update_and_allocate(0)
