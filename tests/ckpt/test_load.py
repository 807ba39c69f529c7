"""Whatever is wrong with an adapter is said in one message, and the model stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import batch, bert, convnet, gpt2, killed_at, llama, logits, spread
from safetensors.torch import load_file, save_file
from torch import nn

from veneer.ckpt.config import CONFIG
from veneer.ckpt.hub import WEIGHTS
from veneer.ckpt.layout import from_file, to_file
from veneer.ckpt.peft import load, save
from veneer.core.model import activate, adapters, attach, detach, merge, parameters, spec_of
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, StateError

PLAIN = LoRA(rank=4, alpha=8, targets=["q_proj", "v_proj"])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The folder of an adapter of `llama()`."""
    return saved(llama(), PLAIN, tmp_path / "adapter")


def saved(model: nn.Module, spec: LoRA, folder: Path, name: str = "default", seed: int = 7) -> Path:
    attach(model, spec, name)
    spread(list(parameters(model, name).values()), seed)
    return save(model, folder, name)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite the file by another hand than ours: without our note about the base."""
    save_file({k: v.contiguous() for k, v in edit(load_file(folder / WEIGHTS)).items()}, folder / WEIGHTS)


def refuse(model: nn.Module, folder: Path | str, *fragments: str, **options: Any) -> str:
    """`load` raises CheckpointError with all these fragments, and changes nothing."""
    kinds = {name: type(m) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        load(model, folder, **options)
    assert {name: type(m) for name, m in model.named_modules()} == kinds, "the model was changed"
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert adapters(model) == ()
    for fragment in fragments:
        assert fragment in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- damaged files


def cut(file: Path, by: int) -> None:
    file.write_bytes(file.read_bytes()[:-by])


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "truncated": (lambda f: cut(f / WEIGHTS, 7), ("7 bytes are missing at its end", "download or save it again")),
    "header cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:50]), ("damaged or incomplete",)),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), ("it has 0 bytes",)),
    "noise": (lambda f: (f / WEIGHTS).write_bytes(os.urandom(500)), ("damaged or incomplete",)),
    "header not JSON": (lambda f: (f / WEIGHTS).write_bytes(b"\x08" + bytes(7) + b"{nope]  "), ("not JSON",)),
    "header a list": (lambda f: (f / WEIGHTS).write_bytes(b"\x08" + bytes(7) + b"[1,2,3] "), ("not a JSON object",)),
    "longer": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"more"), ("4 bytes too many",)),
    "pickle": (lambda f: torch.save({}, f / WEIGHTS), ("This is a pickle",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), (f"There is no {WEIGHTS}",)),
    "no config": (lambda f: (f / CONFIG).unlink(), (f"There is no {CONFIG}", "rank and alpha are unknown")),
    "config cut": (lambda f: cut(f / CONFIG, 30), ("is not valid JSON",)),
    "config a list": (lambda f: (f / CONFIG).write_text("[]"), ("holds no JSON object",)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files(damage, adapter):
    harm, fragments = DAMAGE[damage]
    harm(adapter)
    refuse(llama(), adapter, *fragments)


def test_tampered_offsets_are_found_before_a_tensor_is_read(adapter):
    raw = (adapter / WEIGHTS).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    for change in ({"shape": [999, 32]}, {"data_offsets": [0, 1]}, {"dtype": "F99"}, {"data_offsets": [-8, 504]}):
        header = json.loads(raw[8 : 8 + size])
        name = next(key for key in header if key != "__metadata__")
        header[name] |= change
        text = json.dumps(header).encode()
        (adapter / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
        refuse(llama(), adapter, "damaged or incomplete")


def test_a_pickle_is_refused_with_the_way_to_convert_it(adapter):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    refuse(llama(), adapter, "is a pickle", "can run any code", "weights_only=True", WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused_unless_allowed(value, adapter):
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][0, 0] = value
        return tensors

    edit_tensors(adapter, spoil)
    refuse(llama(), adapter, "NaN or infinite", "layers.1.self_attn.q_proj.A", "allow_nan=True")
    load(llama(), adapter, allow_nan=True)


def test_large_finite_values_are_no_nan(tmp_path):
    model = llama().to(torch.float16)
    attach(model, PLAIN, dtype=torch.float16)
    for p in parameters(model).values():
        nn.init.constant_(p, 60000.0)
    load(llama(), save(model, tmp_path))


# ---------------------------------------------------------------- what does not belong together


def test_no_matching_key_is_an_error_that_shows_both_sides(adapter):
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace("self_attn", "inner.attn"): value for key, value in tensors.items()}

    edit_tensors(adapter, rename)
    refuse(llama(), adapter, "None of the 12 tensors", "inner.attn.q_proj", "here: model.embed_tokens")
    refuse(gpt2(), adapter, "None of the 12 tensors", "here: transformer.wte")


def test_keys_that_the_model_lacks_are_listed(adapter):
    refuse(
        llama(num_hidden_layers=2),
        adapter,
        "model.layers.2.self_attn.q_proj: in the file, but the model has no such module",
        "model.layers.2.self_attn.v_proj",
        allow_other_base=True,
    )


def test_layers_that_the_file_lacks_are_listed(adapter):
    edit_tensors(adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.0" not in k})
    message = refuse(llama(), adapter, "layers.0.self_attn.q_proj: targeted by the config, but not in the file")
    assert "partial=True" in message and "layers.1" not in message


def test_layers_that_the_config_does_not_target_are_listed(adapter):
    edit_config(adapter, target_modules=["q_proj"])
    refuse(llama(), adapter, "layers.0.self_attn.v_proj: in the file, but its config does not target it")


def test_half_an_adapter_of_a_layer_is_listed(adapter):
    edit_tensors(
        adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in k}
    )
    refuse(llama(), adapter, "layers.0.self_attn.q_proj: the file lacks B")
    edit_config(adapter, use_dora=True)
    refuse(llama(), adapter, "layers.1.self_attn.q_proj: the file lacks magnitude")


def test_a_magnitude_without_dora_in_the_config_is_no_detail(tmp_path):
    folder = saved(llama(), LoRA(rank=4, targets=["q_proj"], combine="dora"), tmp_path)
    edit_config(folder, use_dora=False)
    refuse(llama(), folder, "the file has magnitude, which its config does not announce")


def test_partial_takes_what_matches_and_says_what_not(adapter):
    expected = llama()
    load(expected, adapter)
    edit_tensors(adapter, lambda tensors: {k: v for k, v in tensors.items() if "layers.0" not in k})
    model = llama()
    with pytest.warns(UserWarning, match=r"left out: model.layers.0.self_attn.q_proj"):
        loaded = load(model, adapter, partial=True)
    assert len(loaded.sites) == 4 and all("layers.0" not in site for site in loaded.sites)
    assert len(loaded.notes) == 2


@pytest.mark.parametrize(
    ("net", "spec", "fragments"),
    [
        (
            lambda: llama(hidden_size=64),
            PLAIN,
            ("A is [4, 32], needs [4, 64]", "B is [32, 4], needs [64, 4]", "another size"),
        ),
        (
            lambda: llama(vocab_size=48),
            LoRA(rank=4, targets=["embed_tokens"]),
            ("embed_tokens: A is [4, 40], needs [4, 48]", "model.resize_token_embeddings(40)"),
        ),
        (
            lambda: llama(vocab_size=48),
            LoRA(rank=4, targets=["lm_head"]),
            ("lm_head: B is [40, 4], needs [48, 4]", "model.resize_token_embeddings(40)"),
        ),
        (
            lambda: llama(vocab_size=48),
            LoRA(rank=4, targets=["q_proj"], modules_to_save=["lm_head"]),
            ("lm_head: weight is [40, 32], needs [48, 32]", "another vocabulary"),
        ),
        (
            lambda: llama(hidden_size=64),
            LoRA(rank=4, targets=["q_proj"], combine="dora"),
            ("magnitude has 32 values, needs 64",),
        ),
    ],
    ids=["size", "vocabulary", "head", "whole head", "magnitude"],
)
def test_wrong_shapes_name_the_layer_both_shapes_and_the_cause(net, spec, fragments, tmp_path):
    refuse(net(), saved(llama(), spec, tmp_path), *fragments, allow_other_base=True)


def test_another_rank_than_the_config_says(adapter):
    edit_config(adapter, r=8)
    refuse(llama(), adapter, "A is [4, 32], needs [8, 32]", "the file has rank 4, its config says 8: r or rank_pattern")


def test_all_problems_come_at_once(adapter):
    edit_tensors(
        adapter, lambda t: {k: (v if "layers.1" not in k else v[:, :3]) for k, v in t.items() if "layers.0" not in k}
    )
    message = refuse(llama(), adapter, "layers.0.self_attn.q_proj: targeted", "layers.1.self_attn.q_proj: A is [4, 3]")
    assert message.count("\n  - ") == 4


def test_a_classifier_with_other_classes(tmp_path):
    folder = saved(bert(), LoRA(rank=4, targets=["query"], modules_to_save=["classifier"]), tmp_path)
    other = bert()
    other.classifier = nn.Linear(32, 5)
    refuse(other, folder, "classifier: weight is [3, 32], needs [5, 32]", "another number of classes")


def test_a_whole_module_that_the_file_lacks(tmp_path):
    folder = saved(bert(), LoRA(rank=4, targets=["query"], modules_to_save=["classifier"]), tmp_path)
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if not k.endswith("classifier.bias")})
    refuse(bert(), folder, "classifier: bias is missing in the file")


# ---------------------------------------------------------------- configs that mean something else


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"peft_type": "IA3"}, ("peft_type is 'IA3'", "by a vector", "convert_to_lora")),
        ({"layer_replication": [[0, 2]]}, ("layer_replication", "Way out: replicate the blocks")),
        ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens", "aLoRA")),
        ({"use_qalora": True}, ("use_qalora",)),
        ({"megatron_config": {"a": 1}, "use_bdlora": {"b": 1}}, ("megatron_config", "use_bdlora")),
        ({"init_lora_weights": "corda"}, ("'corda' changed the base", "path_initial_model_for_weight_conversion")),
        ({"init_lora_weights": "pissa_niter_4"}, ("'pissa_niter_4' changed the base",)),
        ({"init_lora_weights": "surprise"}, ("'surprise' is unknown",)),
        ({"r": 0}, ("rank=0 must be a whole number of at least 1",)),
        ({"target_modules": 5}, ("makes no sense",)),
        ({"rank_pattern": {"(": 3}}, ("is not a regular expression",)),
        ({"target_modules": "("}, ("is not a regular expression",)),
        ({"bias": "some"}, ("bias='some' is none of",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_cannot_be_followed_are_refused(change, fragments, adapter):
    edit_config(adapter, **change)
    refuse(llama(), adapter, *fragments)


def test_unset_and_harmless_keys_are_read_in_silence(adapter):
    edit_config(adapter, layer_replication=None, use_qalora=False, eva_config=None, peft_version="0.21.2", revision="x")
    load(llama(), adapter)


def test_unknown_keys_are_reported_kept_and_written_back(adapter, tmp_path):
    edit_config(adapter, flux_capacitor=1.21, nothing=None)
    model = llama()
    with pytest.warns(UserWarning, match=r"flux_capacitor=1.21 in adapter_config.json is not known"):
        load(model, adapter)
    save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["flux_capacitor"] == 1.21
    detach(model)
    attach(model, PLAIN)
    save(model, tmp_path / "other")
    assert "flux_capacitor" not in json.loads((tmp_path / "other" / CONFIG).read_text())


# ---------------------------------------------------------------- which base


def test_another_configuration_is_refused_with_what_differs_and_allowed_when_asked(adapter):
    other = llama(rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    message = refuse(other, adapter, "rms_norm_eps: 1e-06 in the adapter's base, 0.001 here", "allow_other_base=True")
    assert "rope_parameters.rope_theta: 10000.0 in the adapter's base, 500000.0 here" in message
    with pytest.warns(UserWarning, match="another base, as allowed: rms_norm_eps"):
        load(other, adapter, allow_other_base=True)


def test_other_weights_of_the_same_shape_are_refused(adapter):
    other = llama(seed=1)
    nn.init.uniform_(other.model.layers[0].input_layernorm.weight, 0.5, 1.5)
    refuse(other, adapter, "model.layers.0.input_layernorm.weight has other values here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_type_is_the_same_base(dtype, tmp_path):
    base = llama()
    nn.init.uniform_(base.model.norm.weight, 0.5, 1.5)
    folder = saved(copy.deepcopy(base), PLAIN, tmp_path)
    load(base.to(dtype), folder)


def test_id_revision_and_hash_travel_in_the_file(tmp_path):
    base = llama()
    base.config._name_or_path, base.config._commit_hash = "org/base", "0123abcd"
    base.name_or_path = "org/base"
    folder = saved(base, PLAIN, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0123abcd")
    loaded = load(llama(), folder)
    assert (loaded.base.id, loaded.base.revision) == ("org/base", "0123abcd") and len(loaded.base.config_hash) == 16


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda key: key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight"),
        lambda key: key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    ],
    ids=["no prefix", "compiled", "adapter's name", "magnitude with both", "magnitude.weight"],
)
def test_keys_as_other_versions_wrote_them(rename, tmp_path):
    model = llama()
    folder = saved(model, LoRA(rank=4, targets=["q_proj"], combine="dora"), tmp_path)
    edit_tensors(folder, lambda tensors: {rename(key): value for key, value in tensors.items()})
    again = llama()
    load(again, folder)
    torch.testing.assert_close(logits(again, batch("llama")), logits(model, batch("llama")))


def test_a_head_as_old_versions_wrote_it(tmp_path):
    model = bert()
    folder = saved(model, LoRA(rank=4, targets=["query"], modules_to_save=["classifier"]), tmp_path)

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {k.replace("classifier.", "classifier.modules_to_save."): v for k, v in tensors.items()}
        return moved | {"base_model.model.classifier.original_module.weight": torch.zeros(3, 32)}

    edit_tensors(folder, old)
    again = bert()
    load(again, folder)
    torch.testing.assert_close(logits(again, batch("bert")), logits(model, batch("bert")))


def test_an_adapter_of_the_body_fits_the_whole_model_and_says_so(tmp_path):
    model = llama()
    folder = saved(model.model, PLAIN, tmp_path)
    again = llama()
    with pytest.warns(UserWarning, match="'model.' was put before the file's names"):
        load(again, folder)
    torch.testing.assert_close(logits(again, batch("llama")), logits(model, batch("llama")))


def test_an_adapter_of_the_whole_model_fits_the_body(adapter):
    body, whole = llama().model, llama()
    load(whole, adapter)
    with pytest.warns(UserWarning, match="'model.' was cut off the file's names"):
        load(body, adapter)
    with torch.no_grad():
        expected = whole.model(batch("llama")).last_hidden_state
        torch.testing.assert_close(body(batch("llama")).last_hidden_state, expected)


def test_several_adapters_in_one_file_are_told_apart(adapter, tmp_path):
    def double(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        named = lambda key, name: key.replace(".weight", f".{name}.weight")  # noqa: E731
        return {named(k, "sql"): v for k, v in tensors.items()} | {named(k, "tone"): 2 * v for k, v in tensors.items()}

    model = llama()
    load(model, adapter)
    edit_tensors(adapter, double)
    refuse(llama(), adapter, "holds several adapters and none is called 'default'", "sql, tone")
    again = llama()
    load(again, adapter, "sql")
    torch.testing.assert_close(logits(again, batch("llama")), logits(model, batch("llama")))


# ---------------------------------------------------------------- where adapters are


def test_default_is_at_the_top_and_others_in_their_folder(tmp_path):
    model = llama()
    outputs = {}
    for seed, name in enumerate(("default", "sql", "tone")):
        saved(model, PLAIN, tmp_path, name, seed=seed)
        outputs[name] = logits(model, batch("llama"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS, "sql", "tone"]
    again = llama()
    for name in outputs:
        load(again, tmp_path, name)
    for name, expected in outputs.items():
        activate(again, name)
        torch.testing.assert_close(logits(again, batch("llama")), expected)


def test_any_name_may_be_given_to_the_one_adapter_of_a_folder(adapter, tmp_path):
    assert load(llama(), adapter, "whatever").name == "whatever"
    assert load(llama(), adapter / WEIGHTS, "whatever").path == adapter
    adapter.rename(tmp_path / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "adapter")
    assert load(llama(), tmp_path / "runs").path == tmp_path / "runs" / "adapter"


def test_places_without_an_adapter_say_what_is_there(tmp_path):
    saved(llama(), PLAIN, tmp_path / "many", "sql")
    refuse(llama(), tmp_path / "many", "no adapter 'default'", "name one of the adapters in it: sql")
    refuse(llama(), tmp_path / "manny", "There is no such folder", "Did you mean 'many'?")
    refuse(llama(), tmp_path, "an adapter is a folder with adapter_config.json")
    refuse(llama(), tmp_path / "deep" / "er", "a model id on a hub looks like organisation/name")


def test_offline_a_hub_id_that_is_not_cached_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refuse(llama(), "org/adapter", "'org/adapter' is neither a folder here nor an adapter in the download cache")


def test_a_hub_id_is_downloaded(adapter, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repository: str, file: str, subfolder: str | None = None, revision: str | None = None) -> str:
        asked.append((repository, file, subfolder, revision))
        if subfolder is not None:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(adapter / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    load(llama(), "org/adapter", "sql", revision="v2")
    assert asked == [
        ("org/adapter", CONFIG, "sql", "v2"),
        ("org/adapter", CONFIG, None, "v2"),
        ("org/adapter", WEIGHTS, None, "v2"),
    ]


# ---------------------------------------------------------------- what load promises


def test_a_loaded_adapter_is_frozen_or_trained_as_told(adapter):
    for trainable in (False, True):
        model = llama()
        load(model, adapter, trainable=trainable)
        assert {p.requires_grad for p in parameters(model).values()} == {trainable}


def test_values_arrive_bit_for_bit_and_no_narrower_than_the_base(tmp_path):
    for kept in (torch.float32, torch.bfloat16):
        for base in (torch.float32, torch.bfloat16):
            model = llama().to(base)
            attach(model, PLAIN, dtype=kept)
            spread(list(parameters(model).values()))
            save(model, tmp_path)
            again = llama().to(base)
            load(again, tmp_path)
            wide = torch.promote_types(kept, base)
            for name, p in parameters(again).items():
                assert p.dtype == wide and torch.equal(p, parameters(model)[name].to(wide))


def test_the_spec_comes_back_in_the_words_it_was_written_in(tmp_path):
    spec = LoRA(
        rank=4, alpha=8, targets=["q_proj", "up_proj"], dropout=0.1, combine="dora", scaling="rslora", bias="lora_only",
        modules_to_save=["lm_head"], layers=[0, 2], overrides={"up_proj": {"rank": 2}},
    )  # fmt: skip
    found = load(llama(), saved(llama(), spec, tmp_path)).spec
    assert found == dataclasses.replace(spec, tied="apart")  # a file says of each layer what it holds


def test_pissa_is_saved_as_a_plain_pair_of_twice_the_rank(tmp_path):
    folder = saved(llama(), LoRA(rank=4, alpha=6, targets=["q_proj"], init="pissa"), tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12, True)
    assert load(llama(), folder).spec.scale == 6 / 4


def test_a_second_adapter_of_the_same_name_is_refused(adapter):
    model = llama()
    load(model, adapter)
    with pytest.raises(StateError, match="already an adapter named 'default'"):
        load(model, adapter)


def test_a_merged_model_takes_no_adapter(adapter):
    model = llama()
    load(model, adapter)
    merge(model)
    with pytest.raises(StateError, match="merged"):
        load(model, adapter, "other")


def test_adapters_of_a_merged_model_are_saved_as_they_are(adapter, tmp_path):
    model = llama()
    load(model, adapter)
    merge(model)
    save(model, tmp_path / "again")
    assert all(
        torch.equal(v, load_file(adapter / WEIGHTS)[k]) for k, v in load_file(tmp_path / "again" / WEIGHTS).items()
    )


def test_a_nan_is_not_saved_and_the_old_file_stays(adapter):
    model, before = llama(), (adapter / WEIGHTS).read_bytes()
    load(model, adapter)
    next(iter(parameters(model).values())).data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        save(model, adapter)
    assert (adapter / WEIGHTS).read_bytes() == before


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_adapter(tmp_path):
    """Also beside other files: tokenizers and the adapters of other names stay."""
    model, folder = llama(), tmp_path / "a"
    attach(model, PLAIN)
    saved(model, PLAIN, folder, "sql")
    (folder / "tokenizer.json").write_text("{}")
    old = logits_after(model, folder, seed=1)
    spread(list(parameters(model, "default").values()), seed=2)
    new = logits(activated(model), batch("llama"))
    for step in range(1, 400):
        finished = not killed_at(step, lambda: save(model, folder))
        again = llama()
        load(again, folder)
        got = logits(again, batch("llama"))
        assert torch.allclose(got, old, atol=1e-5) or torch.allclose(got, new, atol=1e-5), f"killed at step {step}"
        assert (folder / "tokenizer.json").read_text() == "{}" and (folder / "sql" / WEIGHTS).exists()
        if finished:
            break
    assert step > 20 and torch.allclose(got, new, atol=1e-5)
    save(model, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def activated(model: nn.Module) -> nn.Module:
    activate(model, "default")
    return model


def logits_after(model: nn.Module, folder: Path, seed: int) -> torch.Tensor:
    spread(list(parameters(model, "default").values()), seed=seed)
    save(model, folder)
    return logits(activated(model), batch("llama"))


def test_a_full_disk_leaves_the_old_adapter(small_disk):
    model = llama(hidden_size=256, intermediate_size=512)
    attach(model, LoRA(rank=2, targets=["q_proj"]))
    save(model, small_disk / "a")
    before = (small_disk / "a" / WEIGHTS).read_bytes()
    detach(model)
    attach(model, LoRA(rank=128, targets="all-linear"))
    with pytest.raises(CheckpointError, match="The disk is full, so nothing was saved"):
        save(model, small_disk / "a")
    assert (small_disk / "a" / WEIGHTS).read_bytes() == before
    assert [p.name for p in small_disk.iterdir()] == ["a"]


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize(("groups", "rank"), [(2, 3), (4, 2), (8, 1)])
def test_groups_there_and_back(groups, rank):
    """What we write gives our own matrices back; the file's A is zero outside the blocks, and equal inside."""
    host = nn.Conv2d(8, 16, 3, groups=groups)
    a, b = torch.randn(rank, 8 // groups * 9), torch.randn(16, rank)
    file = to_file(host, {"A": a, "B": b})
    assert file["lora_A.weight"].shape == (rank * groups, 8, 3, 3) and file["lora_B.weight"].shape == (16, rank, 1, 1)
    pair = from_file(host, file["lora_A.weight"], file["lora_B.weight"])
    assert pair is not None and torch.equal(pair.a, a) and torch.equal(pair.b, b) and pair.shrunk == groups


def test_groups_with_blocks_of_their_own_are_padded():
    """A PEFT file whose A stays inside its groups is the same convolution here."""
    host, rank = nn.Conv2d(8, 16, 3, groups=2, padding=1), 6
    a = torch.zeros(rank, 8, 3, 3)
    a[:3, :4], a[3:, 4:] = torch.randn(3, 4, 3, 3), torch.randn(3, 4, 3, 3)
    b, x = torch.randn(16, 3, 1, 1), torch.randn(2, 8, 5, 5)
    pair = from_file(host, a, b)
    assert pair is not None and pair.shrunk == 1 and pair.b.shape == (16, 6)
    theirs = nn.functional.conv2d(nn.functional.conv2d(x, a, padding=1), b, groups=2)
    ours = nn.functional.conv2d(x, (pair.b @ pair.a).view(16, 4, 3, 3), groups=2, padding=1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_mixes_groups_is_refused(tmp_path):
    folder = saved(convnet(groups=4), LoRA(rank=2, targets=["body"]), tmp_path)

    def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: torch.randn_like(value) for key, value in tensors.items()}

    edit_tensors(folder, mix)
    refuse(convnet(groups=4), folder, "body: in this grouped convolution the adapter reads channels of other groups")


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"groups": 4}, "DoRA's norm of a grouped convolution"),
        ({"dilation": 2}, "on a dilated convolution"),
        ({"padding_mode": "circular"}, "pads with zeros inside the adapter"),
    ],
    ids=["groups", "dilation", "padding"],
)
def test_convolutions_that_peft_computes_otherwise_come_back_and_are_noted(options, note, tmp_path):
    model = convnet(**options)
    attach(model, LoRA(rank=2, targets=["body"], combine="dora"))
    spread(list(parameters(model).values()))
    with pytest.warns(UserWarning, match=note):
        save(model, tmp_path)
    again = convnet(**options)
    load(again, tmp_path)
    torch.testing.assert_close(logits(again, batch("conv2d")), logits(model, batch("conv2d")), atol=1e-5, rtol=1e-5)


def test_loading_takes_no_longer_for_the_adapters_that_are_there(adapter):
    """Counted in calls, not in seconds: what load itself walks through does not grow."""
    from veneer.ckpt.fit import plain_modules

    model = llama()
    before = len(plain_modules(model))
    for i in range(5):
        load(model, adapter, f"adapter{i}")
    assert len(plain_modules(model)) == before
    assert spec_of(model, "adapter4").rank == 4
