"""LoraConfig: all of PEFT's fields with PEFT's defaults; what is not served says so, with a way out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import veneer.peft
from veneer.core.model import sites
from veneer.errors import CheckpointError, ConfigError, TargetError
from veneer.peft import LoraConfig, PeftConfig, TaskType, get_peft_config, get_peft_model
from veneer.peft.config import spec_for
from veneer.peft.targets import BY_TYPE, PATTERNS, default_targets

CONFIGS = {"LoraConfig": {}, "AdaLoraConfig": {"total_step": 9}, "VeraConfig": {}, "LoHaConfig": {}, "LoKrConfig": {}}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_pefts_with_its_default(name: str, peft: ModuleType) -> None:
    theirs, ours = getattr(peft, name), getattr(veneer.peft, name)
    fields = [{f.name for f in dataclasses.fields(kind) if f.init} for kind in (theirs, ours)]
    assert fields[0] == fields[1]
    a, b = theirs(**CONFIGS[name]).to_dict(), ours(**CONFIGS[name]).to_dict()
    same = {key for key in a if key != "peft_version"}
    assert {key: a[key] for key in same} == {key: b[key] for key in same}


SERVED: dict[str, Any] = {  # every field of LoraConfig that is served, with a value that asks for something
    "task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": {"parent_library": "x"}, "peft_version": "0.1",
    "base_model_name_or_path": "org/base", "revision": "main", "inference_mode": True, "r": 3, "lora_alpha": 5,
    "target_modules": ["q_proj"], "exclude_modules": ["v_proj"], "lora_dropout": 0.1, "fan_in_fan_out": True,
    "bias": "all", "use_rslora": True, "modules_to_save": ["lm_head"], "init_lora_weights": "olora",
    "layers_to_transform": [1], "layers_pattern": "layers", "rank_pattern": {"q": 2}, "alpha_pattern": {"q": 3},
    "use_dora": True, "target_parameters": ["experts.w"], "trainable_token_indices": [1, 2],
    "ensure_weight_tying": True, "lora_bias": True, "loftq_config": {"loftq_bits": 4},
    "runtime_config": {"ephemeral_gpu_offload": False},
    "qalora_group_size": 8, "megatron_core": "megatron.core",  # settings of what is refused: nothing by themselves
}  # fmt: skip


def test_every_field_is_served_or_refused(peft: ModuleType) -> None:
    """A field that a new PEFT invents must be put into one of the two tables, or this fails."""
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.init}
    assert fields == SERVED.keys() | {f for f in REFUSED if f not in SERVED}
    for name, value in SERVED.items():
        needs = {"layers_pattern": {"layers_to_transform": [0]}, "layers_to_transform": {"target_modules": ["q"]}}
        assert getattr(LoraConfig(**{name: value, **needs.get(name, {})}), name) is not None


def test_default_targets_are_pefts(peft: ModuleType) -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    assert BY_TYPE.keys() | PATTERNS.keys() == theirs.keys()
    assert all(BY_TYPE.get(kind, PATTERNS.get(kind)) in (targets, set(targets)) for kind, targets in theirs.items())
    from peft.utils import constants

    for method in ("ADALORA", "VERA", "LOHA", "LOKR"):
        for kind, targets in getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING").items():
            model: Any = torch.nn.Module()
            model.config = SimpleNamespace(model_type=kind)
            assert default_targets(model, method) in (targets, set(targets)), (method, kind)


REFUSED: dict[str, Any] = {
    "eva_config": {"rho": 2.0},
    "corda_config": {},
    "lora_ga_config": {"stable_gamma": 16},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [(0, 2), (1, 2)],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1.0},
    "megatron_config": {"hidden_size": 8},
    "peft_type": "ADALORA",
    "init_lora_weights": "pisa",
    "task_type": "CAUSAL",
    "bias": "some",
    "r": 0,
    "lora_alpha": -1,
    "lora_dropout": 1.5,
}


@pytest.mark.parametrize("field", [f for f in REFUSED if REFUSED[f] != {}])
def test_what_is_not_served_is_refused_where_it_is_said(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**{field: REFUSED[field]})
    assert caught.value.problems
    alias = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    assert any(alias.get(field, field) in problem for problem in caught.value.problems)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(r=0, init_lora_weights="pisa", use_qalora=True, task_type="CAUSAL_LM ")
    text = str(caught.value)
    assert "Did you mean 'pissa'?" in text and "use_qalora" in text and "rank=0" in text
    assert "Did you mean 'CAUSAL_LM'?" in text


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva"])
def test_starts_that_are_served(init: bool | str) -> None:
    assert LoraConfig(init_lora_weights=init).init_lora_weights == init


def test_words_become_the_cores(make_model: Callable[..., Any]) -> None:
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.1, use_rslora=True, use_dora=True, init_lora_weights="pissa_niter_2",
        target_modules=["q_proj", "v_proj"], exclude_modules="x.*", layers_to_transform=1, bias="lora_only",
        rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}, modules_to_save=["lm_head"],
    )  # fmt: skip
    spec = spec_for(config, make_model("llama"))
    assert (spec.rank, spec.alpha, spec.dropout, spec.scaling, spec.combine) == (4, 6, 0.1, "rslora", "dora")
    assert (spec.init, spec.layers, spec.bias, spec.exclude) == ("pissa", (1,), "lora_only", "x.*")
    assert set(spec.targets) == {"q_proj", "v_proj"} and spec.modules_to_save == ("lm_head",)
    assert spec.at("model.layers.1.self_attn.v_proj").rank == 2


def test_starts_that_look_at_data(make_model: Callable[..., Any], tokens: torch.Tensor) -> None:
    config = LoraConfig(r=4, init_lora_weights="eva", target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="looks at data") as caught:
        get_peft_model(make_model("llama"), config)
    assert "data=a few batches" in str(caught.value)
    model = get_peft_model(make_model("llama"), config, data=[{"input_ids": tokens}])
    shared = {layer.slots["default"].delta.rank for layer in sites(model).values()}
    assert len(shared) > 1 and set(config.rank_pattern.values()) == shared  # EVA gives more to layers that need more


def test_loftq_starts_nearest_to_the_base_that_will_be(make_model: Callable[..., Any], tokens: torch.Tensor) -> None:
    """The base becomes what 4 bits make of it, and the adapter starts at what that loses."""
    base = make_model("llama")
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    words: dict[str, Any] = {"r": 8, "target_modules": ["q_proj"], "init_lora_weights": "loftq"}
    model = get_peft_model(base, LoraConfig(**words, loftq_config={"loftq_bits": 4}))
    layer = model.model.layers[0].self_attn.q_proj
    cut, change = layer._parameters["weight"].detach(), layer.slots["default"].delta.weight().detach()
    assert 0 < float((cut + change - weight).norm()) < float((cut - weight).norm())
    with pytest.raises(ConfigError, match="built for 4 bits"):
        LoraConfig(**words, loftq_config={"loftq_bits": 2})


def test_bare_parameters_need_a_list_beside_them(make_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="needs target_modules as a list"):
        spec_for(LoraConfig(target_modules="q.*", target_parameters=["x.w"]), make_model("llama"))
    spec = spec_for(LoraConfig(target_parameters=["experts.gate_up_proj"]), make_model("llama"))
    assert spec.targets == ("experts.gate_up_proj",)


def test_fields_assigned_later_count(make_model: Callable[..., Any]) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config.r = 2
    assert get_peft_model(make_model("llama"), config).get_nb_trainable_parameters()[0] == 2 * 2 * (32 + 32)
    config.use_qalora = True
    with pytest.raises(ConfigError, match="use_qalora"):
        spec_for(config, make_model("llama"))


def test_an_unknown_architecture_needs_targets(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    model.config.model_type = "lama"
    with pytest.raises(ConfigError, match=r"no default for model type 'lama'. Did you mean 'llama'"):
        get_peft_model(model, LoraConfig())


def test_a_misspelt_target_is_an_error_even_beside_right_ones(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    with pytest.raises(TargetError) as caught:
        get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_prj"]))
    assert "v_prj" in str(caught.value) and "v_proj" in str(caught.value)
    assert not veneer.adapters(model) and type(model).__mro__[1].__name__ != "PeftModel"


def test_read_and_write_are_inverse(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["b", "a"], task_type=TaskType.CAUSAL_LM, rank_pattern={"a": 2})
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert again == config
    assert isinstance(again, LoraConfig)


def test_a_file_of_a_newer_version(tmp_path: Path) -> None:
    """Unknown keys are said, kept and written back; where training began does not matter any more."""
    LoraConfig(target_modules=["q"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "new_thing": 7, "inference_mode": True,
                                "init_lora_weights": "eva", "eva_config": {"rho": 1.0}}))  # fmt: skip
    with pytest.warns(UserWarning, match="new_thing"):
        config = PeftConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["new_thing"] == 7


def test_an_adapter_of_another_method(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ConfigError, match="peft_type='IA3'"):
        PeftConfig.from_pretrained(tmp_path)


def test_no_adapter_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path / "missing")
    assert not veneer.peft.check_if_peft_model(str(tmp_path))


def test_get_peft_config() -> None:
    config = get_peft_config({"peft_type": "LORA", "r": 4, "task_type": "SEQ_CLS"})
    assert isinstance(config, LoraConfig) and config.r == 4


def test_names_that_are_not_served_say_so() -> None:
    with pytest.raises(ImportError, match="IA3Config"):
        from veneer.peft import IA3Config  # noqa: F401
    with pytest.raises(AttributeError, match="Did you mean 'LoraConfig'"):
        _ = veneer.peft.LoraConfg


def test_importing_the_names_is_cheap() -> None:
    import subprocess
    import sys

    code = "import veneer, sys; veneer.peft; assert 'torch' not in sys.modules and 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    code = "from veneer.peft import LoraConfig, PeftModel, get_peft_model; import sys; assert 'peft' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
