"""The law of the fast path on diffusion models: fused and plain have one output and one gradient, over

    builds x what is kept x where adapters are x dropout x dtype x what is asked for beside

All adapter parameters are moved first, and so are norms and biases. What cannot run fused runs plainly, and says so.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoisers import adapted, agree, distance, gone_through, shifted, spread
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import parameters
from veneer.kernels import fuse as home
from veneer.kernels import image_fuse, image_pieces
from veneer.kernels.block import LEVELS
from veneer.kernels.fuse import fuse, is_fused, unfuse
from veneer.kernels.graphs import Unfit

diffusers = pytest.importorskip("diffusers")

SIZES: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 12,
    "attention_head_dim": 4, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
BUILDS: dict[str, dict[str, Any]] = {
    "sd1": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    "sdxl": {"use_linear_projection": True, "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4),
             "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 30},
}  # fmt: skip
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS: dict[str, Any] = {
    "attention": ATTENTION,
    "queries": ["to_q"],
    "everything linear": [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj"],
    "unit": ["ff.net.0.proj", "ff.net.2"],
    "convolutions": ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv"],
    "one block": r".*mid_block.*attn2\.to_v",
}


def unet(build: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return shifted(diffusers.UNet2DConditionModel(**SIZES | BUILDS[build]).to(dtype))


def model_of(build: str, dtype: torch.dtype = torch.float64, targets: Any = ATTENTION, **spec: Any) -> nn.Module:
    return adapted(unet(build, dtype), targets, **spec)


def inputs(model: Any, side: int = 8) -> dict[str, Any]:
    g = torch.Generator().manual_seed(5)
    dtype = model.dtype
    found: dict[str, Any] = {
        "sample": torch.randn(2, 4, side, side, generator=g).to(dtype),
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=g).to(dtype),
    }
    if model.config.addition_embed_type:
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, 6, generator=g).to(dtype),
            "time_ids": torch.arange(12.0).view(2, 6),
        }
    return found


def outcome(model: Any, text: bool = False, **more: Any) -> dict[str, Tensor]:
    """`text`: with the gradient of the text."""
    given = inputs(model) | more
    if text:
        given["encoder_hidden_states"].requires_grad_()
    return gone_through(model, given)


@pytest.fixture(autouse=True)
def may_say_so() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*run plainly")
        yield


TAKEN = {"ways in and out of them": 4, "residual blocks": 8, "samplers": 2}
EACH = [(build, targets, "none") for build in BUILDS for targets in TARGETS]
EACH += [("sdxl", "everything linear", level) for level in LEVELS[1:]]


@pytest.mark.parametrize("build,targets,level", EACH)
def test_fused_and_plain_are_one(build: str, targets: str, level: str) -> None:
    model = model_of(build, targets=TARGETS[targets])
    wanted = outcome(model)
    report = fuse(model, level, verbose=False)
    assert not report.skipped, str(report)
    assert report.replaced == TAKEN | {"transformer blocks": {"sd1": 4, "sdxl": 8}[build]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run plainly")
        agree(outcome(model), wanted)


def test_adapters_on_convolutions_of_every_kind() -> None:
    """Some of a block's convolutions, several adapters with weights, DoRA, routed rows; on samplers, too."""
    model = model_of("sd1", targets=["conv1", "to_q"], combine="dora")
    veneer.attach(model, LoRA(rank=2, alpha=5, targets=["conv2", "conv_shortcut", "conv"]), name="second")
    spread(model)
    for acting in ({"default": 0.7, "second": -1.3}, "second"):
        veneer.activate(model, acting)
        wanted = outcome(model)
        fuse(model, verbose=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*run plainly")
            agree(outcome(model), wanted)
        unfuse(model)
    with veneer.routed(model, ["second", "default"]):
        wanted = outcome(model)
        fuse(model, verbose=False)
        agree(outcome(model), wanted)


def test_of_adapted_residual_blocks_less_is_kept() -> None:
    model = model_of("sd1", torch.float32, ["conv1", "conv2"])
    plain = kept_bytes(model)
    fuse(model, verbose=False)
    assert kept_bytes(model) < 0.8 * plain


@pytest.mark.parametrize("level", ["none", "middle"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_texts_gradient_and_the_same_masks(dropout: float, level: str) -> None:
    targets = [t for t in TARGETS["everything linear"] if t != "proj_in"]  # reads an image turned round in memory, and
    model = model_of("sdxl", targets=targets, dropout=dropout)  # masks are drawn as memory lies
    wanted = outcome(model, text=True)
    fuse(model, level, verbose=False)
    agree(outcome(model, text=True), wanted)


@pytest.mark.parametrize("level", ["none", "gate_up", "middle"])
def test_dora_and_trained_biases(level: str) -> None:
    model = model_of("sd1", targets=TARGETS["everything linear"], combine="dora", bias="all")
    wanted = outcome(model, text=True)
    report = fuse(model, level, verbose=False)
    assert not report.skipped
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Image.*run plainly")
        agree(outcome(model, text=True), wanted)


@pytest.mark.parametrize("build", BUILDS)
def test_in_half_precision_fused_is_as_near_the_truth_as_plain(build: str) -> None:
    model = model_of(build, torch.bfloat16, TARGETS["everything linear"])
    exact = outcome(copy.deepcopy(model).double())
    plain = distance(outcome(model), exact)
    fuse(model, verbose=False)
    assert distance(outcome(model), exact) <= 1.2 * plain + 1e-3


ACTING: dict[str, Callable[[nn.Module], Any]] = {
    "two": lambda model: veneer.activate(model, {"default": 0.7, "second": -1.3}),
    "frozen beside": lambda model: [p.requires_grad_(".second." in n) for n, p in model.named_parameters()],
}


@pytest.mark.parametrize("acting", ACTING)
def test_several_adapters(acting: str) -> None:
    model = model_of("sd1", targets=TARGETS["everything linear"])
    veneer.attach(model, LoRA(rank=2, alpha=5, targets=["to_q", "to_v", "ff.net.2"]), name="second")
    spread(model)
    ACTING[acting](model)
    wanted = outcome(model)
    fuse(model, verbose=False)
    agree(outcome(model), wanted)


def test_a_block_that_was_laid_bare_once_is_looked_at_again() -> None:
    model = model_of("sd1", targets=TARGETS["everything linear"])
    plain = copy.deepcopy(model)
    fuse(model, verbose=False)
    outcome(model)
    for change in (
        lambda m: veneer.attach(m, LoRA(rank=2, alpha=5, targets=["to_q", "ff.net.2"]), name="second"),
        lambda m: veneer.activate(m, ["default", "second"]),
        lambda m: [p.requires_grad_(".second." in n) for n, p in m.named_parameters()],
        lambda m: veneer.activate(m, {"default": 0.7, "second": -1.3}),
        lambda m: veneer.activate(m, {"default": 0.2, "second": 0.4}),
        lambda m: veneer.detach(m, "second"),
        lambda m: [setattr(p, "data", p.data.clone().mul_(0.5)) for p in parameters(m).values()],
        lambda m: [p.requires_grad_(True) for p in parameters(m).values()],
    ):
        for one in (model, plain):
            torch.manual_seed(8)
            change(one)
        if any(p.requires_grad for p in plain.parameters()):
            agree(outcome(model), outcome(plain))


def test_what_a_gpu_would_record_is_the_whole_way_through_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs that are recorded, run as they are: images as memory lies go in and come out."""
    seen: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = []

    def once(recorder: Any, module: Any, x: Tensor, settings: Any, tensors: dict[str, Tensor], run: Any) -> Tensor:
        seen.append((type(module).__name__, tuple(x.shape), tuple(tensors)))
        assert x.is_contiguous()
        return run(x, **tensors)

    model = model_of("sdxl", targets=TARGETS["attention"])
    wanted = outcome(model)
    fuse(model, graphs=True, verbose=False)
    monkeypatch.setattr(image_fuse, "replayed", once)
    agree(outcome(model), wanted)
    stages = [shape for name, shape, tensors in seen if name == "FusedTransformer2DModel" and tensors == ("text",)]
    assert stages == [(2, 4, 4, 16)] * 4
    assert [tensors for name, _, tensors in seen if name == "FusedResnetBlock2D"] == [("time",)] * 6  # after an adapter
    seen.clear()
    outcome(model, text=True)  # whose gradient is asked for
    hooked(model)
    with pytest.raises(Unfit, match="a hook hangs on it"):
        outcome(model)


def masked(model: nn.Module) -> dict[str, Any]:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    return {"encoder_attention_mask": mask}


def checkpointed(model: Any) -> dict[str, Any]:
    model.enable_gradient_checkpointing()
    return {}


def hooked(model: Any) -> dict[str, Any]:
    model.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.register_forward_hook(lambda *_: None)
    model.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: None)
    return {}


def trained_norms(model: Any) -> dict[str, Any]:
    model.mid_block.attentions[0].transformer_blocks[0].norm2.requires_grad_(True)
    model.mid_block.resnets[1].norm1.requires_grad_(True)
    model.mid_block.attentions[0].norm.requires_grad_(True)
    return {}


def other_processor(model: Any) -> dict[str, Any]:
    from diffusers.models.attention_processor import SlicedAttnProcessor

    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1))
    return {}


@pytest.mark.parametrize(
    "change,said",
    [
        (masked, "a mask is given"),
        (checkpointed, None),
        (hooked, "a hook hangs on it"),
        (trained_norms, "a norm is trained"),
        (other_processor, "its attention is run by SlicedAttnProcessor"),
    ],
)
def test_what_cannot_run_fused_runs_plainly_and_is_named(change: Callable[[Any], Any], said: str | None) -> None:
    model = model_of("sd1")
    fuse(model, verbose=False)
    more = change(model)
    home._said.clear()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        got = outcome(model, **more)
    wanted = outcome(unfuse(model), **more)
    agree(got, wanted)
    texts = [str(one.message) for one in heard]
    assert said is None or any(f"run plainly, and slower: {said}" in text for text in texts), texts


@pytest.mark.parametrize("spec", [{"combine": "dora"}, {"delta": "loha"}])
def test_other_methods_run_plainly(spec: dict[str, Any]) -> None:
    model = model_of("sd1", **spec)
    wanted = outcome(model)
    fuse(model, verbose=False)
    agree(outcome(model), wanted)


def test_blocks_of_another_build_are_left_alone_and_named() -> None:
    model: Any = model_of("sd1")
    model.down_blocks[0].attentions[0].transformer_blocks[0].ff.net[0].gelu = torch.tanh
    model.mid_block.resnets[0].output_scale_factor = 2.0
    wanted = outcome(model)
    report = fuse(model, verbose=False)
    assert "gives something else" in report.skipped["down_blocks.0.attentions.0.transformer_blocks.0"]
    assert "scales its output" in report.skipped["mid_block.resnets.0"]
    agree(outcome(model), wanted)


def test_sampling_is_bit_for_bit_as_before_and_classes_come_back() -> None:
    model = model_of("sdxl").eval()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    with torch.no_grad():
        wanted = model(**inputs(model)).sample
        fuse(model, verbose=False)
        assert is_fused(model) and list(model.state_dict()) == keys
        assert torch.equal(model(**inputs(model)).sample, wanted)
    unfuse(model)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before


def kept_bytes(model: Any) -> int:
    """What autograd holds between the passes, beside the model itself."""
    held: dict[int, int] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def count(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        model(**inputs(model, 32))
    return sum(held.values())


def test_fused_keeps_three_fifths_of_what_autograd_keeps_and_less_if_asked() -> None:
    model = model_of("sdxl", torch.float32)
    plain = kept_bytes(model)
    fuse(model, verbose=False)
    none = kept_bytes(model)
    home.set_recompute(model, "gate_up")
    less = kept_bytes(model)
    assert none <= 0.62 * plain and less <= 0.65 * none, (plain, none, less)


# ------------------------------------------------------------------ the pieces


def close(mine: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    off = (mine.float() - plain.float()).norm() / plain.float().norm().clamp_min(1e-9)
    return bool(off < (1e-5 if dtype in (torch.float32, torch.float64) else 1e-2))


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_against_autograd(act: bool, shifted: bool) -> None:
    torch.manual_seed(0)
    x, g, plus = (torch.randn(2, 7, 12, dtype=torch.float64) + 1 for _ in range(3))
    w, b, shift = torch.randn(12).double(), torch.randn(12).double(), torch.randn(2, 12).double()
    x.requires_grad_()
    moved = x + shift[:, None] if shifted else x
    y = nn.functional.group_norm(moved.transpose(1, 2), 3, w, b, 1e-3).transpose(1, 2)
    y = nn.functional.silu(y) if act else y
    (dx,) = torch.autograd.grad(y, x, g)
    found, stats = image_pieces.group_norm(x.detach(), w, b, 3, 1e-3, act, shift if shifted else None)
    torch.testing.assert_close(found, y.detach())
    back = image_pieces.group_norm_back(g, x.detach(), w, 3, act, stats, plus)
    torch.testing.assert_close(back, dx + plus)


def test_layer_norm_against_autograd() -> None:
    torch.manual_seed(0)
    x, g, plus = (torch.randn(5, 12, dtype=torch.float64) + 1 for _ in range(3))
    w, b = torch.randn(2, 12).double()
    x.requires_grad_()
    y = nn.functional.layer_norm(x, (12,), w, b, 1e-3)
    (dx,) = torch.autograd.grad(y, x, g)
    found, stats = image_pieces.layer_norm(x.detach(), w, b, 1e-3)
    torch.testing.assert_close(found, y.detach())
    torch.testing.assert_close(image_pieces.layer_norm(x.detach(), w, b, 1e-3, stats)[0], y.detach())
    torch.testing.assert_close(image_pieces.layer_norm_back(g, x.detach(), stats, w, plus), dx + plus)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_do_what_the_pieces_say(dtype: torch.dtype) -> None:
    from veneer.kernels import cuda_image

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    both = (cuda_image, image_pieces)
    x, g, plus, w, b = rand(70, 640), rand(70, 640), rand(70, 640), rand(640), rand(640)
    (y, s), (y2, s2) = (k.layer_norm(x, w, b, 1e-5) for k in both)
    assert close(y, y2, dtype) and close(cuda_image.layer_norm(x, w, b, 1e-5, s2)[0], y2, dtype)
    for more in (None, plus):
        assert close(*(k.layer_norm_back(g, x, s, w, more) for k, s in zip(both, (s, s2), strict=True)), dtype)
    for n, p, c, groups in ((2, 50, 48, 4), (1, 7, 80, 8), (2, 1000, 320, 32)):
        x, g, plus, w, b = rand(n, p, c) + 0.5, rand(n, p, c), rand(n, p, c), rand(c), rand(c)
        for act, shift in itertools.product((False, True), (None, rand(n, c))):
            (y, s), (y2, s2) = (k.group_norm(x, w, b, groups, 1e-5, act, shift) for k in both)
            assert close(y, y2, dtype) and all(close(m, o, torch.float32) for m, o in zip(s, s2, strict=True))
            for more in (None, plus):
                assert close(*(k.group_norm_back(g, x, w, groups, act, s2, more) for k in both), dtype)
        for beside, bias in itertools.product((None, plus), (None, b)):
            assert close(*(k.add_channels(x.clone(), beside, bias) for k in both), dtype)
