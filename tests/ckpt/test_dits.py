"""Kohya's names for FLUX and SD 3: one layer there is several modules here. Against diffusers' own converters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import LoRA
from veneer.ckpt.dits import released_names
from veneer.ckpt.shared import gather, known_of, load_shared, read_shared, save_shared, write_shared
from veneer.ckpt.unets import known_model, shapes_of
from veneer.errors import CheckpointError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

BOTH = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"targets": BOTH},
    "everything": {"targets": "all-linear"},
    "queries": {"targets": ["to_q", "proj_mlp", "norm_out.linear"]},
    "ranks": {"targets": BOTH, "overrides": {"to_k": {"rank": 2, "alpha": 3.0}}},
    "dora": {"targets": BOTH, "combine": "dora"},
    "loha": {"targets": BOTH, "delta": "loha"},
}


def flux(width: int = 32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=width // 16,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def sd3(width: int = 32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=width // 8,
        caption_projection_dim=width, joint_attention_dim=24, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


BUILDS: dict[str, Callable[..., nn.Module]] = {"flux": flux, "sd3": sd3}


@torch.no_grad()
def out(model: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    context, pooled = torch.randn(1, 7, 24, generator=g), torch.randn(1, 20, generator=g)
    if hasattr(model, "single_transformer_blocks"):
        x, ids = torch.randn(1, 16, 4, generator=g), (torch.zeros(16, 3), torch.zeros(7, 3))
        more = {"img_ids": ids[0], "txt_ids": ids[1], "guidance": torch.tensor([3.0])}
        return model(x, context, pooled, torch.tensor([0.3]), **more).sample
    return model(torch.randn(1, 4, 8, 8, generator=g), context, pooled, torch.tensor([3])).sample


def attached(model: nn.Module, method: str = "lora", **more: Any) -> nn.Module:
    spec = {"rank": 4, "alpha": 6.0, **METHODS[method], **more}
    if isinstance(spec["targets"], list) and not hasattr(model, "single_transformer_blocks"):
        spec["targets"] = [target for target in spec["targets"] if target != "proj_mlp"]
    veneer.attach(model, LoRA(**spec))
    torch.manual_seed(7)
    with torch.no_grad():
        for p in veneer.core.model.parameters(model, "default").values():  # type: ignore[attr-defined]
            p += 0.1 * torch.randn_like(p)
    return model


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the names, against diffusers' converters of weights


def released(build: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """A checkpoint as it was released, with random weights, of this model's shapes."""
    g, found = torch.Generator().manual_seed(3), {}
    shapes = shapes_of(model)
    for name, shares in released_names(shapes).items():
        rows, (_, *inner) = sum(shapes[s.module][0] for s in shares), shapes[shares[0].module]
        found[f"{name}.weight"] = 0.3 * torch.randn(rows, *inner, generator=g)
        found[f"{name}.bias"] = torch.randn(rows, generator=g)
    for i in range(2):
        if build == "flux":
            places = [*(f"double_blocks.{i}.{side}_attn" for side in ("img", "txt")), f"single_blocks.{i}"]
            found |= {f"{place}.norm.{k}_norm.scale": torch.ones(16) for place in places for k in ("query", "key")}
        else:
            sides = ("x_block.attn", "context_block.attn", *(["x_block.attn2"] if i == 0 else []))
            found |= {f"joint_blocks.{i}.{s}.ln_{k}.weight": torch.ones(8) for s in sides for k in "qk"}
    return found if build == "flux" else found | {"pos_embed": model.pos_embed.pos_embed}


def converted(build: str, model: nn.Module, checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' own conversion. FLUX's width stands in its source."""
    from diffusers.loaders import single_file_utils

    name = f"convert_{build}_transformer_checkpoint_to_diffusers"
    source = inspect.getsource(getattr(single_file_utils, name)).replace("inner_dim = 3072", "inner_dim = 32")
    space = dict(vars(single_file_utils))
    exec(source, space)
    return space[name](dict(checkpoint))


@pytest.mark.parametrize("build", BUILDS)
def test_every_layer_of_a_kohya_file_finds_its_modules(build: str, tmp_path: Path) -> None:
    model = BUILDS[build]()
    base = released(build, model)
    model.load_state_dict(converted(build, model, base))
    g, tensors, changed = torch.Generator().manual_seed(4), {}, dict(base)
    for key in (k for k in base if k.endswith(".weight") and base[k].ndim == 2):
        a, b = (0.3 * torch.randn(*s, generator=g) for s in ((2, base[key].shape[1]), (base[key].shape[0], 2)))
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(3.0)}
        changed[key] = base[key] + 1.5 * b @ a
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "2"})
    done = load_shared(model, tmp_path / "a.safetensors")
    assert str(done.coverage).startswith(f"{len(tensors)} of {len(tensors)} keys (kohya: transformer {len(tensors)}")
    assert done.metadata["ss_network_dim"] == "2"
    wanted = BUILDS[build]()
    wanted.load_state_dict(converted(build, model, changed))
    same(out(model), out(wanted))


# ---------------------------------------------------------------- laws


EACH = [(method, build, torch.float32) for method in METHODS for build in BUILDS]


@pytest.mark.parametrize("method,build,dtype", [*EACH, ("lora", "flux", torch.bfloat16)])
def test_what_is_written_is_read_again(method: str, build: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = attached(BUILDS[build](), method).to(dtype)
    save_shared(model, tmp_path / "a.safetensors", "kohya", metadata={"ss_tag": "x"})
    keys = load_file(tmp_path / "a.safetensors")
    released = r"lora_unet_((double|single|joint)_blocks|\w+_in|\w*embedder|final_layer)"
    assert all(re.match(released, key) for key in keys)
    again = read_shared(tmp_path / "a.safetensors", known_of({"transformer": model}))
    assert again.metadata["ss_tag"] == "x" and not again.coverage.unknown
    before = gather(model).parts["transformer"]
    assert before.keys() == again.parts["transformer"].keys()
    for module, layer in again.parts["transformer"].items():
        if method != "ranks" or not module.endswith("to_k"):  # another scale than its siblings' is written into A
            assert layer.scale == pytest.approx(before[module].scale) or method == "ranks"
            assert layer.tensors.keys() == before[module].tensors.keys()
            assert method == "ranks" or all(torch.equal(v, before[module].tensors[k]) for k, v in layer.tensors.items())
    fresh = BUILDS[build]().to(dtype)
    load_shared(fresh, tmp_path / "a.safetensors")
    if dtype == torch.float32:
        same(out(fresh), out(model))
        assert (out(fresh) - out(BUILDS[build]())).abs().max() > 1e-3


def pipeline() -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(1)
    clip = transformers.CLIPTextModel(config).eval()
    t5 = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=diffusers.AutoencoderKL(block_out_channels=(32,)),
        text_encoder=clip, tokenizer=None, text_encoder_2=transformers.T5EncoderModel(t5).eval(), tokenizer_2=None,
        transformer=flux(),
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("method", ["lora", "queries", "ranks"])
def test_diffusers_loads_what_we_write(method: str, layout: str, tmp_path: Path, monkeypatch: Any) -> None:
    from diffusers.loaders import lora_conversion_utils, lora_pipeline

    ours, theirs = pipeline(), pipeline()
    targets = [t for t in METHODS[method]["targets"] if t != "norm_out.linear"]  # which diffusers reads and loses
    attached(ours.transformer, method, targets=targets)
    attached(ours.text_encoder, targets=["fc1", "fc2"] if layout == "kohya" else ["q_proj", "fc1"])
    save_shared(ours, tmp_path / "a.safetensors", layout)  # of CLIP's attention diffusers loses kohya's keys, for FLUX
    name, space = "_convert_kohya_flux_lora_to_diffusers", dict(vars(lora_conversion_utils))
    source = inspect.getsource(getattr(lora_conversion_utils, name))
    exec(source.replace("dims=[3072, 3072, 3072, 12288]", "dims=[32, 32, 32, 128]"), space)  # a tiny model's widths
    monkeypatch.setattr(lora_pipeline, name, space[name])
    theirs.load_lora_weights(str(tmp_path / "a.safetensors"))
    same(out(theirs.transformer), out(ours.transformer))
    ids = torch.arange(3, 11)[None]
    same(theirs.text_encoder(ids).last_hidden_state, ours.text_encoder(ids).last_hidden_state)


def test_text_encoders_have_the_numbers_that_files_give_them(tmp_path: Path) -> None:
    ours, fresh = pipeline(), pipeline()
    attached(ours.transformer)
    attached(ours.text_encoder, targets=["q_proj"])
    attached(ours.text_encoder_2, targets=["q", "wo"])
    save_shared(ours, tmp_path / "a.safetensors", "kohya")
    keys = load_file(tmp_path / "a.safetensors")
    assert {key[:9] for key in keys} == {"lora_unet", "lora_te1_", "lora_te3_"}
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha" in keys
    done = load_shared(fresh, tmp_path / "a.safetensors")
    assert set(done.sites) == {"transformer", "text_encoder", "text_encoder_2"}
    ids = torch.arange(3, 11)[None]
    same(fresh.text_encoder_2(ids).last_hidden_state, ours.text_encoder_2(ids).last_hidden_state)


def test_joined_layers_of_separate_adapters_are_taken_apart_again(tmp_path: Path) -> None:
    """A joined layer trained as one keeps its one A; one put together from three gives three of their own rank."""
    model = flux()
    g, name = torch.Generator().manual_seed(0), "lora_unet_double_blocks_0_img_attn_qkv"
    a, b = torch.randn(6, 32, generator=g), torch.randn(96, 6, generator=g)
    apart = torch.block_diag(*(b[32 * i : 32 * i + 32, 2 * i : 2 * i + 2] for i in range(3)))
    for up, rank, count in ((b, 6, 3), (apart, 2, 3), (apart * (torch.arange(96) < 32)[:, None], 2, 1), (b * 0, 6, 3)):
        first = {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}
        save_file(first, tmp_path / "a.safetensors")
        shared = read_shared(tmp_path / "a.safetensors", known_of(model))
        layers = shared.parts["transformer"]
        assert len(layers) == count and {layer.rank for layer in layers.values()} == {rank}
        assert all(layer.scale == 0.5 for layer in layers.values())
        write_shared(shared, tmp_path / "b.safetensors", "kohya", known_of(model))
        again = load_file(tmp_path / "b.safetensors")
        r = len(again[f"{name}.lora_down.weight"])
        change = again[f"{name}.lora_up.weight"] @ again[f"{name}.lora_down.weight"] * again[f"{name}.alpha"] / r
        same(change, 0.5 * up @ a)
        assert count == 1 or all(torch.equal(again[key], value) for key, value in first.items())


# ---------------------------------------------------------------- files alone, and wrong ones


@pytest.mark.parametrize("word,first", [
    ("flux", "lora_unet_single_blocks_37_linear1"),
    ("sd3", "lora_unet_joint_blocks_23_x_block_attn_qkv"),
    ("sd3.5-large", "lora_unet_joint_blocks_36_context_block_mlp_fc1"),
    ("sd3.5-medium", "lora_unet_joint_blocks_12_x_block_attn2_qkv"),
])  # fmt: skip
def test_a_file_goes_round_without_a_model(word: str, first: str, tmp_path: Path) -> None:
    shapes = known_model(word)["transformer"]
    shares = next(own for name, own in released_names(shapes).items() if first.endswith(name.replace(".", "_")))
    rows, inner = sum(shapes[s.module][0] for s in shares), shapes[shares[0].module][1]
    te = "lora_te3_encoder_block_1_layer_0_SelfAttention_k"
    tensors = {f"{first}.lora_down.weight": torch.ones(2, inner), f"{first}.lora_up.weight": torch.ones(rows, 2)}
    tensors |= {f"{te}.lora_down.weight": torch.ones(2, 64), f"{te}.lora_up.weight": torch.ones(48, 2)}
    tensors |= {f"{name}.alpha": torch.tensor(1.0) for name in (first, te)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": word})
    write_shared(read_shared(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "diffusers")
    assert any(key.startswith(f"transformer.{shares[0].module}.") for key in load_file(tmp_path / "b.safetensors"))
    write_shared(read_shared(tmp_path / "b.safetensors"), tmp_path / "c.safetensors", "kohya")
    again = load_file(tmp_path / "c.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("build", BUILDS)
def test_an_adapter_for_another_width_says_which_shapes_differ(build: str, tmp_path: Path) -> None:
    save_shared(attached(BUILDS[build](), "everything"), tmp_path / "a.safetensors", "kohya")
    other = BUILDS[build](width=48)
    with pytest.raises(CheckpointError) as caught:
        load_shared(other, tmp_path / "a.safetensors")
    assert re.search(r"attn.to_q: A is \[12?, 32\], needs \[\d+, 48\]", str(caught.value)), str(caught.value)
    assert not veneer.adapters(other)


def test_unknown_names_are_listed_and_refused_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_shared(attached(flux()), path, "kohya")
    odd = "lora_unet_double_blocks_7_img_attn_qkv"
    save_file({**load_file(path), f"{odd}.lora_down.weight": torch.ones(2, 32)}, path)
    with pytest.raises(CheckpointError, match=odd):
        load_shared(flux(), path)
    with pytest.warns(UserWarning, match=odd):
        assert load_shared(flux(), path, allow_unknown=True).coverage.unknown == [f"{odd}.lora_down.weight"]


def test_what_cannot_be_joined_is_refused_and_named(tmp_path: Path) -> None:
    model = attached(flux(), delta="lokr", rank=2)
    with pytest.raises(CheckpointError, match=r"attn_qkv is one layer.*cannot be joined") as caught:
        save_shared(model, tmp_path / "a.safetensors", "kohya")
    assert "attn.to_q: lokr" in str(caught.value)
    half = attached(flux(), "dora", targets=["to_q"])
    with pytest.raises(CheckpointError, match="cannot be joined"):
        save_shared(half, tmp_path / "a.safetensors", "kohya")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file({f"{name}.lokr_w1": torch.ones(4, 4), f"{name}.lokr_w2": torch.ones(24, 8)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="mean nothing here"):
        load_shared(flux(), tmp_path / "b.safetensors")
