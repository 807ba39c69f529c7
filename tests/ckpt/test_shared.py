"""Files that people share: kohya's, diffusers' and PEFT's layout, to and fro, against models and against diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer import LoRA
from veneer.ckpt.layers import LAYOUTS, Layer
from veneer.ckpt.shared import gather, known_of, load_shared, read_shared, save_shared, write_shared
from veneer.ckpt.unets import KNOWN, known_model, original_names, spellings
from veneer.errors import CheckpointError, ConfigError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
WITH_CONV = [*ATTENTION, "conv1", "conv2", "conv_shortcut", "proj_in", "time_emb_proj", "downsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"targets": ATTENTION},
    "locon": {"targets": WITH_CONV},
    "dora": {"targets": WITH_CONV, "combine": "dora"},
    "rslora": {"targets": ATTENTION, "scaling": "rslora"},
    "ranks": {"targets": WITH_CONV, "overrides": {"to_k": {"rank": 2, "alpha": 3.0}, "conv1": {"rank": 3}}},
    "adalora": {"targets": ATTENTION, "delta": "adalora"},
    "loha": {"targets": WITH_CONV, "delta": "loha"},
    "loha_cores": {"targets": WITH_CONV, "delta": "loha", "options": {"effective_conv": True}},
    "lokr": {"targets": WITH_CONV, "delta": "lokr", "rank": 2},
    "lokr_whole": {"targets": ATTENTION, "delta": "lokr", "rank": 400},
    "lokr_both": {"targets": ATTENTION, "delta": "lokr", "rank": 1, "options": {"decompose_both": True, "factor": 4}},
}
LACKS = {("diffusers", "loha"), ("diffusers", "loha_cores")}


def unet(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DConditionModel(**config | changes).eval()


def clip(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=2,
    )
    return transformers.CLIPTextModel(config).eval()


def pipeline() -> Any:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip(),
        tokenizer=None,
        unet=unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def out(model: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    if hasattr(model, "encoder"):
        return model(torch.arange(3, 11)[None]).last_hidden_state
    x, context = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 5, 32, generator=g)
    return model(x, torch.tensor([3, 40]), context).sample


@torch.no_grad()
def moved(model: nn.Module, name: str = "default", seed: int = 7, dtype: torch.dtype | None = None) -> None:
    """Values as after training: nothing is zero."""
    g = torch.Generator().manual_seed(seed)
    for parameter in veneer.core.model.parameters(model, name).values():  # type: ignore[attr-defined]
        parameter += 0.1 * torch.randn(parameter.shape, generator=g).to(parameter)


def attached(model: nn.Module, method: str, dtype: torch.dtype | None = None, **more: Any) -> nn.Module:
    spec = LoRA(**{"rank": 4, "alpha": 6.0, **METHODS[method], **more})
    veneer.attach(model, spec, dtype=dtype)
    moved(model)
    return model


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_written_is_read_again(method: str, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensor for tensor, with the same scale; and attached again it is the same function."""
    model = attached(unet(), method, dtype)
    path = tmp_path / ("folder" if layout == "peft" else "file.safetensors")
    if (layout, method) in LACKS:
        with pytest.raises(CheckpointError, match="diffusers reads no LOHA"):
            save_shared(model, path, layout)
        return
    before = gather(model)
    save_shared(model, path, layout, metadata={"ss_tag": "x"})
    again = read_shared(path, known_of({"unet": model}))
    assert again.metadata["ss_tag"] == "x" and not again.coverage.unknown
    assert sum(again.coverage.used.values()) == again.coverage.keys
    assert_same(before.parts["unet"], again.parts["unet"])
    fresh = unet()
    load_shared(fresh, path)
    close = 1e-4 if dtype == torch.float32 else 0.05  # products of 16-bit factors; the factors themselves are equal
    torch.testing.assert_close(out(fresh), out(model), rtol=close, atol=close)
    assert (out(fresh) - out(unet())).abs().max() > 1e-3


def assert_same(one: dict[str, Layer], other: dict[str, Layer]) -> None:
    assert one.keys() == other.keys()
    for module, layer in one.items():
        assert layer.tensors.keys() == other[module].tensors.keys(), module
        assert layer.scale == pytest.approx(other[module].scale), module
        for key, value in layer.tensors.items():
            found = other[module].tensors[key]
            assert found.dtype == value.dtype and torch.equal(found, value), (module, key)


@pytest.mark.parametrize("word", KNOWN)
def test_kohyas_names_of_the_models_that_everybody_has_are_one_to_one(word: str) -> None:
    known = known_model(word)
    for part, modules in known.items():
        read, written = spellings(part, modules, known)
        assert len(set(written.values())) == len(modules)
        assert {read[name] for name in written.values()} == set(modules)
    if word == "sdxl":
        original = original_names(known["unet"])
        leaves = [name for name, shape in known["unet"].items() if shape is not None]
        assert set(leaves) <= original.keys() and len({original[name] for name in leaves}) == len(leaves)


KNOWN_PAIRS = [
    ("sd1", "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj", None),
    ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "down_blocks.1.attentions.0"),
    ("sdxl", "lora_unet_input_blocks_8_1_transformer_blocks_9_attn2_to_out_0", "down_blocks.2.attentions.1"),
    ("sdxl", "lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
    ("sdxl", "lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
    ("sdxl", "lora_unet_middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
    ("sdxl", "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q", "up_blocks.0.attentions.0"),
    ("sdxl", "lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ("sdxl", "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2", "up_blocks.1.attentions.2"),
    ("sdxl", "lora_unet_output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
    ("sdxl", "lora_unet_label_emb_0_2", "add_embedding.linear_2"),
]


@pytest.mark.parametrize(("word", "spelled", "module"), KNOWN_PAIRS)
def test_names_as_they_are_in_the_wild(word: str, spelled: str, module: str | None) -> None:
    read, written = spellings("unet", known_model(word)["unet"])
    assert written[read[spelled]] == spelled
    assert module is None or read[spelled].startswith(module)


# ---------------------------------------------------------------- diffusers reads what we write, and the other way


def both(tmp_path: Path, layout: str, method: str = "lora") -> tuple[Any, Path]:
    pipe = pipeline()
    attached(pipe.unet, method)
    attached(pipe.text_encoder, "lora", targets=TEXT)
    path = tmp_path / "shared.safetensors"
    save_shared(pipe, path, layout)
    return pipe, path


@pytest.mark.parametrize(
    ("layout", "method"),
    [("kohya", "lora"), ("diffusers", "lora"), ("diffusers", "locon"), ("diffusers", "dora"), ("diffusers", "ranks")],
)
def test_diffusers_loads_what_we_write(layout: str, method: str, tmp_path: Path) -> None:
    ours, path = both(tmp_path, layout, method)
    theirs = pipeline()
    theirs.load_lora_weights(str(path))
    torch.testing.assert_close(out(theirs.unet), out(ours.unet), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out(theirs.text_encoder), out(ours.text_encoder), rtol=1e-4, atol=1e-5)


def test_diffusers_loads_our_lokr(tmp_path: Path) -> None:
    ours = attached(unet(), "lokr", targets=ATTENTION)
    save_shared(ours, tmp_path / "a.safetensors", "diffusers")
    theirs = unet()  # the pipelines of Stable Diffusion look for "lora" in every key
    theirs.load_lora_adapter(str(tmp_path / "a.safetensors"), prefix="unet", use_safetensors=True)
    torch.testing.assert_close(out(theirs), out(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["peft", "old", "oldest"])
def test_we_load_what_diffusers_writes(style: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    theirs, states = pipeline(), {}
    configs = {}
    for part, targets in (("unet", ATTENTION[:4]), ("text_encoder", TEXT[:4])):
        model = getattr(theirs, part)
        alpha = 6 if style == "peft" else 4
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, init_lora_weights=False, target_modules=targets))
        states[part] = get_peft_model_state_dict(model)
        configs[part] = model.peft_config["default"].to_dict()
        if style != "peft":
            states[part] = convert_state_dict_to_diffusers(states[part])
    if style == "oldest":
        states["unet"] = {
            k.replace(".to_out.0.lora.", ".processor.to_out_lora.")
            .replace(".to_q.lora.", ".processor.to_q_lora.")
            .replace(".to_k.lora.", ".processor.to_k_lora.")
            .replace(".to_v.lora.", ".processor.to_v_lora."): v
            for k, v in states["unet"].items()
        }
    metadata = {f"{part}_lora_adapter_metadata": config for part, config in configs.items()} if style == "peft" else {}
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        **metadata,
    )
    ours = pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = load_shared(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert set(done.sites) == {"unet", "text_encoder"}
    torch.testing.assert_close(out(ours.unet), out(theirs.unet), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out(ours.text_encoder), out(theirs.text_encoder), rtol=1e-4, atol=1e-5)


def sd3() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()


def flux() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


@torch.no_grad()
def dit_out(model: nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    context = torch.randn(1, 7, 32, generator=g)
    if hasattr(model, "single_transformer_blocks"):
        ids = torch.zeros(16, 3), torch.zeros(7, 3)
        return model(
            torch.randn(1, 16, 4, generator=g),
            context,
            torch.randn(1, 32, generator=g),
            torch.tensor([0.3]),
            img_ids=ids[0],
            txt_ids=ids[1],
        ).sample
    return model(
        torch.randn(1, 4, 8, 8, generator=g), context, torch.randn(1, 64, generator=g), torch.tensor([3])
    ).sample


@pytest.mark.parametrize("build", [sd3, flux])
@pytest.mark.parametrize("layout", ["kohya", "diffusers", "peft"])
def test_transformers_of_images(build: Any, layout: str, tmp_path: Path) -> None:
    model = attached(build(), "lora", targets=["to_q", "to_k", "to_v", "to_out.0", "add_k_proj"])
    path = tmp_path / ("folder" if layout == "peft" else "file.safetensors")
    save_shared(model, path, layout)
    fresh = build()
    load_shared(fresh, path)
    torch.testing.assert_close(dit_out(fresh), dit_out(model), rtol=1e-4, atol=1e-5)
    if layout == "diffusers":
        theirs = build()
        theirs.load_lora_adapter(str(path), prefix="transformer", use_safetensors=True)
        torch.testing.assert_close(dit_out(theirs), dit_out(model), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- one file, several models; wrong files


def test_one_file_onto_a_pipeline_and_nothing_on_an_error(tmp_path: Path) -> None:
    ours, path = both(tmp_path, "kohya")
    fresh = pipeline()
    done = load_shared(fresh, path, "style")
    assert set(done.sites) == {"unet", "text_encoder"} and "of 0" not in str(done)
    torch.testing.assert_close(out(fresh.unet), out(ours.unet), rtol=1e-4, atol=1e-5)
    other = {"unet": unet(), "text_encoder": clip()}
    other["text_encoder"].encoder.layers[1].mlp.fc1 = nn.Linear(32, 65)
    other["text_encoder"].encoder.layers[1].mlp.fc2 = nn.Linear(65, 32)
    with pytest.raises(CheckpointError, match="65"):
        load_shared(other, path)
    assert not veneer.adapters(other["unet"]) and not veneer.adapters(other["text_encoder"])


def test_an_adapter_for_another_unet_says_which_shapes_differ(tmp_path: Path) -> None:
    model = attached(unet(), "lora")
    save_shared(model, tmp_path / "a.safetensors", "kohya")
    other = unet(cross_attention_dim=48)
    with pytest.raises(CheckpointError) as caught:
        load_shared(other, tmp_path / "a.safetensors")
    text = str(caught.value)
    assert "attn2.to_k: A is [4, 32], needs [4, 48]" in text and "attn1" not in text
    assert not veneer.adapters(other)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_unknown_keys_are_listed_and_refused_unless_told(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_shared(attached(unet(), "lora"), path, layout)
    odd = {"lora_unet_no_such_block_to_q.lora_down.weight": torch.zeros(4, 8), "bundle_emb.cat": torch.zeros(2)}
    tensors = load_file(path)
    lone = next(key for key in tensors if "lora_up" in key or "lora_B" in key)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**{k: v for k, v in tensors.items() if k != lone}, **odd}, path, metadata)
    with pytest.raises(CheckpointError, match="mean nothing here") as caught:
        load_shared(unet(), path)
    assert len(caught.value.problems) >= 3 and set(odd) <= set(caught.value.problems)
    fresh = unet()
    with pytest.warns(UserWarning, match=r"left out: bundle_emb\.cat"):
        done = load_shared(fresh, path, allow_unknown=True)
    assert len(done.coverage.unknown) == len(caught.value.problems)


def test_parts_that_are_not_there(tmp_path: Path) -> None:
    _, path = both(tmp_path, "diffusers")
    with pytest.raises(CheckpointError, match="parts that"):
        load_shared(unet(), path)
    with pytest.warns(UserWarning, match="text_encoder"):
        assert set(load_shared(unet(), path, partial=True).sites) == {"unet"}


def test_a_core_between_the_factors_is_served(tmp_path: Path) -> None:
    """LoCon's CP form: down and up are 1 x 1, the kernel is in the middle."""
    g = torch.Generator().manual_seed(0)
    base, model = unet(), unet()
    name = "down_blocks_0_resnets_0_conv1"
    down, mid, up = (torch.randn(*s, generator=g) for s in ((4, 8, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)))
    keys = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_{name}.{key}": value for key, value in keys.items()}, tmp_path / "a.safetensors")
    load_shared(model, tmp_path / "a.safetensors")
    change = torch.einsum("op,pqhw,qi->oihw", up[..., 0, 0], mid, down[..., 0, 0]) * 2 / 4
    base.down_blocks[0].resnets[0].conv1.weight.data += change
    torch.testing.assert_close(out(model), out(base), rtol=1e-4, atol=1e-5)


def test_no_alpha_means_a_scale_of_one_and_linear_takes_one_by_one(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    a, b = torch.randn(4, 8, generator=g), torch.randn(8, 4, generator=g)
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, tmp_path / "a.safetensors")
    base, model = unet(), unet()
    load_shared(model, tmp_path / "a.safetensors")
    base.down_blocks[0].attentions[0].proj_in.weight.data += (b @ a)[..., None, None]
    torch.testing.assert_close(out(model), out(base), rtol=1e-4, atol=1e-5)


def test_magnitudes_of_columns_and_mixed_methods_are_refused(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {f"{name}.lora_down.weight": torch.ones(4, 8), f"{name}.lora_up.weight": torch.ones(8, 4)}
    save_file({**lora, f"{name}.dora_scale": torch.ones(1, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="mean nothing"):
        load_shared(unet(), tmp_path / "a.safetensors")
    other = name.replace("to_q", "to_k")
    ones = {f"{other}.hada_w{i}_{k}": torch.ones(*s) for i in (1, 2) for k, s in (("a", (8, 4)), ("b", (4, 8)))}
    save_file({**lora, **ones}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="mixes LOHA and LORA"):
        load_shared(unet(), tmp_path / "b.safetensors")


def test_what_no_layout_can_hold_is_refused(tmp_path: Path) -> None:
    model = unet()
    veneer.attach(model, LoRA(rank=4, targets=ATTENTION, modules_to_save=["conv_out"]))
    with pytest.raises(CheckpointError, match="no place for these"):
        save_shared(model, tmp_path / "a.safetensors", "kohya")
    (tmp_path / "x.safetensors").write_bytes(b"")
    save_file({"a.b": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="No layout"):
        load_shared(unet(), tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="none of"):
        load_shared(object(), tmp_path / "x.safetensors")


# ---------------------------------------------------------------- files alone


def sd1_file(path: Path) -> dict[str, torch.Tensor]:
    """A LoRA as kohya's trainer writes it for SD 1.x, small in rank alone."""
    g, known = torch.Generator().manual_seed(0), known_model("sd1")
    tensors = {}
    for module, shape in known["unet"].items():
        if shape is not None and module.endswith(("attn2.to_k", "attn1.to_out.0", "proj_in")):
            name = "lora_unet_" + module.replace(".", "_")
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, *shape[1:], generator=g).half()
            tensors[f"{name}.lora_up.weight"] = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=g).half()
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    te = "lora_te_text_model_encoder_layers_11_mlp_fc1"
    tensors |= {f"{te}.lora_down.weight": torch.ones(2, 768), f"{te}.lora_up.weight": torch.ones(3072, 2)}
    tensors[f"{te}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, {"ss_base_model_version": "sd_v1", "ss_network_dim": "2"})
    return tensors


@pytest.mark.parametrize("through", ["diffusers", "peft"])
def test_a_file_goes_round_without_a_model(through: str, tmp_path: Path) -> None:
    first = sd1_file(tmp_path / "a.safetensors")
    middle, last = tmp_path / ("b.safetensors" if through == "diffusers" else "b"), tmp_path / "c.safetensors"
    write_shared(read_shared(tmp_path / "a.safetensors"), middle, through)
    write_shared(read_shared(middle), last, "kohya")
    again = load_file(last)
    assert again.keys() == first.keys()
    for key, value in first.items():
        assert torch.equal(again[key].to(value), value), key
    with safe_open(last, "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"


def test_every_layout_is_told_from_the_others(tmp_path: Path) -> None:
    model = attached(unet(), "lora")
    for layout in LAYOUTS:
        save_shared(model, tmp_path / f"{layout}.safetensors", layout)
        assert [n for n, one in LAYOUTS.items() if one.recognises(load_file(tmp_path / f"{layout}.safetensors"))] == [
            layout
        ]
        assert read_shared(tmp_path / f"{layout}.safetensors", known_of(model)).coverage.layout == layout


def test_diffusers_words_are_whole(tmp_path: Path) -> None:
    _, path = both(tmp_path, "diffusers", "ranks")
    with safe_open(path, "pt") as file:
        words = json.loads(file.metadata()["lora_adapter_metadata"])
    assert words["unet.rank_pattern"] and words["text_encoder.r"] == 4 and "unet.target_modules" in words
