"""One object, not a wrapper: what the class change gives, and what it takes back."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import veneer
from veneer.errors import CheckpointError, ConfigError, StateError
from veneer.peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    inject_adapter_in_model,
    rescale_adapter_scale,
    set_peft_model_state_dict,
)
from veneer.peft.model import adopt, release

CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def moved(model: Any, scale: float = 0.2) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return moved(get_peft_model(make_model("llama"), LoraConfig(**CONFIG)))


# ---------------------------------------------------------------- one object


def test_it_is_still_what_it_was(make_model: Callable[..., Any]) -> None:
    base = make_model("llama")
    kind, keys, signature = type(base), set(base.state_dict()), inspect.signature(base.forward)
    model = get_peft_model(base, LoraConfig(**CONFIG))
    assert model is base
    assert isinstance(model, PeftModelForCausalLM) and isinstance(model, PeftModel)
    assert isinstance(model, kind) and isinstance(model, transformers.PreTrainedModel)
    assert type(model).__name__ == kind.__name__
    assert {k for k in model.state_dict() if ".lora." not in k} == keys
    assert inspect.signature(model.forward) == signature
    assert model.unload() is base and type(base) is kind
    assert not {"peft_config", "_hf_peft_config_loaded"} & vars(base).keys()
    assert all(p.requires_grad for p in base.parameters())


def test_calling_the_class(make_model: Callable[..., Any]) -> None:
    base = make_model("llama")
    model = PeftModelForCausalLM(base, LoraConfig(r=2), adapter_name="mine")
    assert model is base and model.active_adapter == "mine"
    assert model.peft_config["mine"].task_type == "CAUSAL_LM"
    view = LoraModel(make_model("llama"), LoraConfig(r=2), "mine")
    assert view.active_adapter == "mine" and isinstance(view.model, PeftModel)


def test_its_class_makes_plain_models(model: Any, tmp_path: Path, make_model: Callable[..., Any]) -> None:
    """type(model)(config) and type(model).from_pretrained(folder): whoever asks means the base."""
    plain = type(model)(model.config)
    assert not isinstance(plain, PeftModel) and isinstance(plain, transformers.LlamaForCausalLM)
    make_model("llama").save_pretrained(tmp_path)
    assert not isinstance(type(model).from_pretrained(tmp_path), PeftModel)


def test_copies_and_pickles(model: Any, tokens: torch.Tensor, run: Any, tmp_path: Path) -> None:
    before = run(model, tokens)
    twin = copy.deepcopy(model)
    assert isinstance(twin, PeftModelForCausalLM) and twin.peft_config is not model.peft_config
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(run(model, tokens), before)
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, PeftModelForCausalLM) and torch.equal(run(again, tokens), before)
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(run(loaded, tokens), before)


def test_any_module_will_do(tokens: torch.Tensor) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["2"], r=2))
    assert model is net and isinstance(model, nn.Sequential)
    model.print_trainable_parameters()
    assert model.get_nb_trainable_parameters()[0] == 2 * (4 + 8) + 8 * 2 + 2
    assert model(torch.ones(3, 4)).shape == (3, 2)


def test_pipelines_take_it(model: Any, tiny_tokenizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tiny_tokenizer, device="cpu")
        told = pipe("tar -x", max_new_tokens=4, do_sample=False)
    assert told[0]["generated_text"].startswith("tar -x")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "qwen2"])
def test_transformers_own_questions_get_its_own_answers(kind: str, make_model: Callable[..., Any]) -> None:
    """base_model is a name of both libraries; what transformers asks through it must not change."""
    plain, model = make_model(kind), make_model(kind)
    get_peft_model(model, LoraConfig(r=2))
    for ask in ("get_input_embeddings", "get_output_embeddings", "get_encoder", "get_decoder"):
        expected, found = getattr(plain, ask)(), getattr(model, ask)()
        name = next((n for n, m in plain.named_modules() if m is expected), None)
        assert next((n for n, m in model.named_modules() if m is found), None) == name, ask
    assert model.base_model.model is model


def test_base_model_called_is_the_body(make_model: Callable[..., Any], tokens: torch.Tensor) -> None:
    """As trainers call it that fuse the head with the loss; adapters act inside it."""
    plain, model = make_model("llama"), get_peft_model(make_model("llama"), LoraConfig(**CONFIG))
    moved(model)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(input_ids=tokens).logits)
        assert not torch.allclose(hidden, plain.base_model(input_ids=tokens).last_hidden_state)
    model.base_model.mark = 1
    assert model.model.mark == 1 and "LlamaForCausalLM" in repr(model.base_model)
    assert model.base_model.merge_and_unload() is model


def test_generate_without_and_with_rows(model: Any, tokens: torch.Tensor, run: Any) -> None:
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    adapted = model.generate(input_ids=tokens, **options)
    with model.disable_adapter():
        base = model.generate(input_ids=tokens, **options)
    mixed = model.generate(input_ids=tokens, adapter_names=["default", "__base__", "default"], **options)
    assert torch.equal(mixed[0], adapted[0]) and torch.equal(mixed[1], base[1]) and torch.equal(mixed[2], adapted[2])
    with pytest.raises(ConfigError, match="2 adapter_names for a batch of 3"):
        run(model, tokens, adapter_names=["default", "__base__"])
    with pytest.raises(StateError, match="no adapter named 'defalt'"):
        run(model, tokens, adapter_names=["defalt"] * 3)


# ---------------------------------------------------------------- PEFT's habits


def test_who_is_active_and_who_is_trained(model: Any) -> None:
    def trained() -> set[str]:
        return {n for n in model.peft_config if any(p.requires_grad for p in veneer_parameters(model, n))}

    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    assert model.active_adapters == ["default"] and trained() == {"default"}
    model.set_adapter("second")
    assert model.active_adapter == "second" and trained() == {"second"}
    model.set_adapter(["default", "second"])
    assert model.active_adapter == ["default", "second"] and trained() == {"default", "second"}
    model.set_adapter("default", inference_mode=True)
    assert trained() == set()
    model.set_requires_grad("second")
    assert trained() == {"second"}
    with pytest.raises(StateError, match="Did you mean 'second'"):
        model.set_adapter("secnd")
    with pytest.raises(StateError, match="already an adapter named 'second'"):
        model.add_adapter("second", LoraConfig(r=2))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("second")
    assert list(model.peft_config) == ["default"] == model.active_adapters


def veneer_parameters(model: Any, name: str) -> list[nn.Parameter]:
    from veneer.core.model import parameters

    return list(parameters(model, name).values())


def test_two_at_once_add_up(model: Any, tokens: torch.Tensor, run: Any) -> None:
    """PEFT's set_adapter(["a", "b"]) raises; here it is the sum of dW, as merging both shows."""
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model.set_adapter(["default", "second"])
    moved(model)
    both = run(model, tokens)
    plain = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(run(plain, tokens), both, atol=1e-5)


def test_disabling_for_longer(model: Any, tokens: torch.Tensor, run: Any, make_model: Callable[..., Any]) -> None:
    base, adapted = run(make_model("llama"), tokens), run(model, tokens)
    model.base_model.disable_adapter_layers()
    assert torch.equal(run(model, tokens), base)
    assert model.active_adapters == ["default"] and model.get_model_status().enabled is False
    model.add_adapter("second", LoraConfig(r=2))
    model.set_adapter("default")
    assert torch.equal(run(model, tokens), base)
    model.base_model.enable_adapter_layers()
    assert torch.equal(run(model, tokens), adapted)


def test_a_merged_model(
    model: Any, tokens: torch.Tensor, run: Any, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    base, adapted = run(make_model("llama"), tokens), run(model, tokens)
    with pytest.warns(UserWarning, match="nothing to unmerge"):
        model.unmerge_adapter()
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()
    merged = run(model, tokens)
    assert torch.allclose(merged, adapted, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(run(model, tokens), base)
    assert torch.equal(run(model, tokens), merged) and model.active_adapters == ["default"]
    model.save_pretrained(tmp_path)  # the adapter, not twice of it
    model.unmerge_adapter()
    assert torch.equal(run(model, tokens), adapted)
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    assert torch.allclose(run(again, tokens), adapted, atol=1e-6)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerged first"):
        model.set_adapter("default")
    assert torch.equal(run(model, tokens), adapted)
    with pytest.raises(TypeError, match="list"):
        model.merge_adapter("default")


def test_a_broken_adapter_is_never_merged(model: Any) -> None:
    with torch.no_grad():
        veneer_parameters(model, "default")[0][0, 0] = float("nan")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(StateError, match="NaN"):
        model.merge_and_unload()
    assert isinstance(model, PeftModel)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if ".lora." not in k)


def test_tied_weights_are_not_merged_behind_your_back(
    make_model: Callable[..., Any], tokens: torch.Tensor, run: Any
) -> None:
    model = moved(get_peft_model(make_model("qwen2"), LoraConfig(r=2, target_modules=["lm_head"])))
    before = run(model, tokens)
    with pytest.raises(StateError, match="tied"):
        model.merge_and_unload()
    plain = model.merge_and_unload(untie=True)
    assert torch.allclose(run(plain, tokens), before, atol=1e-5)


def test_failing_leaves_things_as_they_were(make_model: Callable[..., Any], tmp_path: Path) -> None:
    base = make_model("llama")
    kind = type(base)
    for attempt in (
        lambda: get_peft_model(base, LoraConfig(target_modules=["nothing"])),
        lambda: get_peft_model(base, LoraConfig(r=1000, target_modules=["q_proj"])),
        lambda: get_peft_model(base, LoraConfig(**CONFIG), adapter_name="a.b"),
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: get_peft_model(base, LoraConfig(**CONFIG), mixed=True),
    ):
        with pytest.raises(ValueError):
            attempt()
        assert type(base) is kind and not veneer.adapters(base)
        assert all(p.requires_grad for p in base.parameters())


def test_a_config_of_peft_itself_is_told_apart(peft: Any, make_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"from veneer\.peft import LoraConfig"):
        get_peft_model(make_model("llama"), peft.LoraConfig(r=2))


def test_status_of_plain_models(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    with pytest.raises(StateError, match="no adapter"):
        get_layer_status(model)
    inject_adapter_in_model(LoraConfig(r=2), model)
    assert get_model_status(model).available_adapters == ["default"]
    assert get_layer_status(model)[0].module_type == "lora.Linear"
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    assert get_model_status(model).requires_grad == {"default": "irregular"}


def test_rescaling_comes_back(model: Any, tokens: torch.Tensor, run: Any) -> None:
    before = run(model, tokens)
    with pytest.raises(RuntimeError), rescale_adapter_scale(model, 0.0):
        with model.disable_adapter():
            base = run(model, tokens)
        assert torch.allclose(run(model, tokens), base, atol=1e-6)
        raise RuntimeError
    assert torch.equal(run(model, tokens), before)


# ---------------------------------------------------------------- files


def test_several_adapters_in_one_folder(
    model: Any, tokens: torch.Tensor, run: Any, tmp_path: Path, make_model: Any
) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"]))
    model.set_adapter("second")
    moved(model)
    wanted = run(model, tokens)
    model.save_pretrained(tmp_path / "all")
    assert (tmp_path / "all" / "second" / "adapter_config.json").is_file()
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path / "all" / "second", adapter_name="it")
    assert torch.allclose(run(again, tokens), wanted, atol=1e-6)
    third = PeftModel.from_pretrained(make_model("llama"), tmp_path / "one", subfolder="second")
    assert torch.allclose(run(third, tokens), wanted, atol=1e-6)
    with pytest.raises(StateError, match="selected_adapters"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["thrd"])
    assert not (tmp_path / "none").exists()


def test_loading_into_a_live_adapter_keeps_its_parameters(
    model: Any, tmp_path: Path, tokens: torch.Tensor, run: Any
) -> None:
    wanted = run(model, tokens)
    model.save_pretrained(tmp_path)
    parameters = veneer_parameters(model, "default")
    moved(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(run(model, tokens), wanted)
    assert all(a is b for a, b in zip(parameters, veneer_parameters(model, "default"), strict=True))


def test_other_alpha_is_another_adapter(
    model: Any, tmp_path: Path, make_model: Callable[..., Any], tokens: torch.Tensor, run: Any
) -> None:
    """Loading into a live adapter keeps its scale, so a file with another one is refused; hotswap takes it over."""
    other = moved(get_peft_model(make_model("llama"), LoraConfig(**{**CONFIG, "lora_alpha": 20})))
    other.save_pretrained(tmp_path / "alpha")
    before, wanted = run(model, tokens), run(other, tokens)
    with pytest.raises(CheckpointError, match="scaled otherwise"):
        model.load_adapter(tmp_path / "alpha", "default")
    assert torch.equal(run(model, tokens), before)
    parameters = veneer_parameters(model, "default")
    hotswap_adapter(model, tmp_path / "alpha")
    assert torch.allclose(run(model, tokens), wanted, atol=1e-6)
    assert all(a is b for a, b in zip(parameters, veneer_parameters(model, "default"), strict=True))
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path / "again")
    assert torch.allclose(run(again, tokens), wanted, atol=1e-6)


def test_swapping_in_another_shape(model: Any, tmp_path: Path, make_model: Callable[..., Any], tokens: torch.Tensor,
                                   run: Any) -> None:  # fmt: skip
    other = moved(
        get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    )
    other.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(StateError, match="merged"):
        hotswap_adapter(model, tmp_path)
    model.unmerge_adapter()
    hotswap_adapter(model, tmp_path)
    assert torch.allclose(run(model, tokens), run(other, tokens), atol=1e-6)
    assert model.active_adapters == ["default"] and model.peft_config["default"].r == 2
    before = run(model, tokens)
    with pytest.raises(CheckpointError):
        hotswap_adapter(model, tmp_path / "missing")
    assert torch.equal(run(model, tokens), before)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_take_from_the_base(init: str, make_model: Callable[..., Any], tokens: torch.Tensor, run: Any,
                                       tmp_path: Path) -> None:  # fmt: skip
    """Saved as a plain LoRA of twice the rank, right on the unchanged base; and back into the live adapter exactly."""
    model = moved(get_peft_model(make_model("llama"), LoraConfig(**{**CONFIG, "init_lora_weights": init})), 0.05)
    wanted = run(model, tokens)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="not needed")
    again = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    assert again.peft_config["default"].r == 8
    assert torch.allclose(run(again, tokens), wanted, atol=1e-5)
    moved(model, 0.05)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.allclose(run(model, tokens), wanted, atol=1e-6)


def test_what_cannot_be_saved_or_loaded_says_so(model: Any, tmp_path: Path, make_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    state = {key: value + 1 for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="other values"):
        model.save_pretrained(tmp_path / "x", state_dict=state)
    model.save_pretrained(tmp_path / "x", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not (tmp_path / "rank1").exists()
    with pytest.raises(ConfigError, match="key_mapping"):
        model.load_adapter(tmp_path / "x", "other", key_mapping={"a": "b"})
    with pytest.raises(ConfigError, match="ignore_mismatched_sizes"):
        model.load_adapter(tmp_path / "x", "other", ignore_mismatched_sizes=True)
    with pytest.raises(CheckpointError, match="none of the 1 keys"):
        set_peft_model_state_dict(model, {"something.else": torch.ones(1)})
    with pytest.raises(CheckpointError, match="base"):
        PeftModel.from_pretrained(make_model("qwen2"), tmp_path / "x")


def test_a_resized_vocabulary_is_saved_with_the_adapter(make_model: Callable[..., Any], tmp_path: Path,
                                                        tokens: torch.Tensor, run: Any) -> None:  # fmt: skip
    make_model("llama").save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(390, mean_resizing=False)
    model = moved(get_peft_model(base, LoraConfig(**CONFIG)).eval())
    with pytest.warns(UserWarning, match="vocabulary was resized"):
        model.save_pretrained(tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(390, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.allclose(run(loaded, tokens), run(model, tokens), atol=1e-6)


def test_auto_classes(
    model: Any, make_model: Callable[..., Any], tmp_path: Path, run: Any, tokens: torch.Tensor
) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", adapter_name="mine")
    assert torch.allclose(run(loaded, tokens), run(model, tokens), atol=1e-6)
    with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="not built but loaded"):
        AutoPeftModel()


def test_an_auto_mapping_imports_only_what_is_trusted(make_model: Callable[..., Any], tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, base_model_name_or_path=str(tmp_path / "base"), target_modules=["q_proj"])
    config.auto_mapping = {"base_model_class": "system", "parent_library": "os"}
    config.save_pretrained(tmp_path / "bad")
    with pytest.raises(ConfigError, match="not trusted"):
        AutoPeftModel.from_pretrained(tmp_path / "bad")


# ---------------------------------------------------------------- beside veneer.attach


def test_methods_for_an_attached_model(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama")
    kind = type(model)
    veneer.attach(model, veneer.LoRA(rank=4, alpha=6, targets=["q_proj"], combine="dora", scaling="rslora"), "mine")
    assert adopt(model) is model
    config = model.peft_config["mine"]
    assert (config.r, config.lora_alpha, config.use_dora, config.use_rslora) == (4, 6, True, True)
    assert config.target_modules == {"q_proj"}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
    release(model)
    assert type(model) is kind and veneer.adapters(model) == ("mine",)


def test_the_core_and_peft_see_the_same_state(model: Any, tokens: torch.Tensor, run: Any) -> None:
    adapted = run(model, tokens)
    with veneer.disabled(model):
        base = run(model, tokens)
        assert model.active_adapters == []
    veneer.activate(model, None)
    assert torch.equal(run(model, tokens), base)
    veneer.activate(model, "default")
    assert torch.equal(run(model, tokens), adapted)
    veneer.attach(model, veneer.LoRA(rank=2, targets=["o_proj"]), "more")
    assert len(get_peft_model_state_dict(model, adapter_name="more")) == 4
