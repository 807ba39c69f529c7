"""The law of the fast path on image transformers: fused and plain have one output and one gradient, over

    builds x what is kept x where adapters are x storages, methods, dropout, several adapters x dtype

All adapter parameters are moved first, and so are norms and biases. What cannot run fused runs plainly, and says so.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoisers import adapted, agree, distance, gone_through, shifted, spread
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.kernels import fuse as home
from veneer.kernels.even import even_gradients
from veneer.kernels.fuse import fuse, is_fused, set_recompute, unfuse
from veneer.kernels.parts import quickest
from veneer.kernels.pieces import rotate

diffusers = pytest.importorskip("diffusers")

WORDS, PLACES, TEXT = 5, 16, 12
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TARGETS: dict[str, Any] = {
    "attention": ATTENTION,
    "queries": ["to_q", "add_v_proj"],
    "units": r".*(net\.0\.proj|net\.2|proj_mlp|blocks\.\d\.proj_out)",
    "everything in blocks": r".*blocks.*(to_.|add_._proj|to_out\.0|to_add_out|net\.0\.proj|net\.2|proj_mlp|proj_out)",
    "one block": r"(transformer_blocks\.1|single_transformer_blocks\.0)\.attn\.to_v",
}


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=TEXT, pooled_projection_dim=6, out_channels=4,
        pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, pooled_projection_dim=6, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def qwen() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


BUILDS: dict[str, Callable[[], Any]] = {"flux": flux, "sd3": sd3, "qwen": qwen}
TAKEN: dict[str, dict[str, int]] = {
    "flux": {"blocks of two streams": 2, "blocks of one stream": 2},
    "sd3": {"blocks of two streams": 2},
    "qwen": {"blocks of two streams": 2},
}


def transformer(build: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return shifted(BUILDS[build]().to(dtype))


def model_of(build: str, dtype: torch.dtype = torch.float64, targets: Any = ATTENTION, **spec: Any) -> nn.Module:
    return adapted(transformer(build, dtype), targets, **spec)


def inputs(model: Any) -> dict[str, Any]:
    g, dtype, kind = torch.Generator().manual_seed(5), model.dtype, type(model).__name__

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    text = {"encoder_hidden_states": rand(2, WORDS, TEXT), "timestep": torch.tensor([0.3, 0.7]).to(dtype)}
    if kind.startswith("SD3"):
        return {"hidden_states": rand(2, 4, 4, 4), "pooled_projections": rand(2, 6), **text}
    text["hidden_states"] = rand(2, PLACES, 4)
    if kind.startswith("Flux"):
        ids = torch.stack([torch.zeros(PLACES), torch.arange(PLACES) // 4, torch.arange(PLACES) % 4], 1)
        return {**text, "pooled_projections": rand(2, 6), "img_ids": ids, "txt_ids": torch.zeros(WORDS, 3)}
    return {**text, "encoder_hidden_states_mask": None, "img_shapes": [[(1, 4, 4)]] * 2}


def outcome(model: Any, **more: Any) -> dict[str, Tensor]:
    return gone_through(model, inputs(model) | more)


@pytest.fixture(autouse=True)
def nothing_runs_plainly() -> Any:
    home._said.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*run plainly")
        yield


EACH = [("flux", targets, "none") for targets in TARGETS]
EACH += [(build, targets, "none") for build in ("sd3", "qwen") for targets in ("queries", "everything in blocks")]
EACH += [(build, "everything in blocks", level) for build in BUILDS for level in ("gate_up", "input")]


@pytest.mark.parametrize("build,targets,level", EACH)
def test_fused_and_plain_are_one(build: str, targets: str, level: str) -> None:
    model = model_of(build, targets=TARGETS[targets])
    wanted = outcome(model)
    report = fuse(model, level, verbose=False)
    assert not report.skipped, str(report)
    assert {kind: n for kind, n in report.replaced.items() if kind.startswith("blocks")} == TAKEN[build]
    agree(outcome(model), wanted)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_on_packed_bases(build: str, storage: str) -> None:
    """Blocks whose width fills no group of the storage's are packed by it all the same."""
    model = transformer(build, torch.float32)
    veneer.quantize(model, storage)
    veneer.attach(model, LoRA(rank=3, alpha=6, targets=TARGETS["everything in blocks"]))
    spread(model)
    wanted = outcome(model)
    report = fuse(model, verbose=False)
    assert not report.skipped, str(report)
    agree(outcome(model), wanted, 1e-4 if storage == "nf4" else 3e-2)  # 8-bit products round their inputs


SPECS: dict[str, dict[str, Any]] = {
    "dora": {"combine": "dora"},
    "biases": {"bias": "lora_only"},
    "dora and biases": {"combine": "dora", "bias": "lora_only"},
    "vera": {"delta": "vera"},
}


@pytest.mark.parametrize(
    "build,level,spec",
    [("flux", "none", spec) for spec in SPECS]
    + [(build, "input", "dora and biases") for build in BUILDS]
    + [("sd3", "none", "vera")],
)
def test_other_methods(build: str, level: str, spec: str) -> None:
    model = model_of(build, targets=TARGETS["everything in blocks"], **SPECS[spec])
    wanted = outcome(model)
    report = fuse(model, level, verbose=False)
    assert not report.skipped, str(report)
    agree(outcome(model), wanted)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("level", ["none", "input"])
def test_the_same_masks(build: str, level: str) -> None:
    """Where layers are called in one order; a whole block's are not."""
    model = model_of(build, targets=["to_q", "to_k", "to_v", "add_q_proj"], dropout=0.3)
    wanted = outcome(model)
    fuse(model, level, verbose=False)
    agree(outcome(model), wanted)


@pytest.mark.parametrize("build", BUILDS)
def test_what_is_computed_again_drops_the_same(build: str) -> None:
    model = model_of(build, targets=TARGETS["everything in blocks"], dropout=0.3)
    fuse(model, verbose=False)
    wanted = outcome(model)
    set_recompute(model, "input")
    agree(outcome(model), wanted)


@pytest.mark.parametrize("build", BUILDS)
def test_several_adapters_and_rows_that_are_routed(build: str) -> None:
    model = model_of(build, targets=TARGETS["everything in blocks"])
    veneer.attach(model, LoRA(rank=2, alpha=5, targets=["to_q", "to_v", "net.2"]), name="second")
    spread(model)
    veneer.activate(model, {"default": 0.7, "second": -1.3})
    wanted = outcome(model)
    with veneer.routed(model, ["second", "default"]):
        routed = outcome(model)
    fuse(model, verbose=False)
    agree(outcome(model), wanted)
    with veneer.routed(model, ["second", "default"]):
        agree(outcome(model), routed)


@pytest.mark.parametrize("build", BUILDS)
def test_in_half_precision_fused_is_as_near_the_truth_as_plain(build: str) -> None:
    model = model_of(build, torch.bfloat16, TARGETS["everything in blocks"])
    exact = outcome(copy.deepcopy(model).double())
    plain = distance(outcome(model), exact)
    fuse(model, verbose=False)
    assert distance(outcome(model), exact) <= 1.2 * plain + 1e-3


def test_words_that_are_masked() -> None:
    model, mask = model_of("qwen"), torch.ones(2, WORDS, dtype=torch.bool)
    mask[0, 3:] = False
    wanted = outcome(model, encoder_hidden_states_mask=mask)
    fuse(model, verbose=False)
    agree(outcome(model, encoder_hidden_states_mask=mask), wanted)


@pytest.mark.parametrize("build", BUILDS)
def test_what_is_kept_is_less(build: str) -> None:
    """Bytes that wait for the backward pass, of the blocks' inputs and of what they made of them."""

    def kept(model: Any) -> int:
        seen: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(**inputs(model)).sample
        del y
        return sum(seen.values())

    model = model_of(build, torch.float32, TARGETS["everything in blocks"])
    plain = kept(model)
    fuse(model, verbose=False)
    fused = kept(model)
    set_recompute(model, "input")
    assert kept(model) < 0.6 * fused < 0.48 * plain


def trained_times(model: Any) -> Any:
    veneer.attach(model, LoRA(rank=2, targets=r".*blocks\.0\.(norm1\.linear|img_mod\.1|norm\.linear)"), name="times")
    veneer.activate(model, ["default", "times"])
    spread(model)


def hooked(model: Any) -> Any:
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)


def hooked_unit(model: Any) -> Any:
    block = model.transformer_blocks[0]
    getattr(block, "ff", getattr(block, "img_mlp", None)).register_forward_hook(lambda *_: None)


def other_processor(model: Any) -> Any:
    class Mine(type(model.transformer_blocks[0].attn.processor)):
        pass

    model.transformer_blocks[0].attn.processor = Mine()


CHANGES: list[tuple[Callable[[Any], Any], str]] = [
    (trained_times, "what the time scales by is learned"),
    (hooked, "a hook hangs on it"),
    (hooked_unit, "a hook hangs on it"),
    (other_processor, "its attention is run by Mine"),
]


@pytest.mark.parametrize("build", ["flux", "qwen"])
@pytest.mark.parametrize("change,said", CHANGES)
def test_what_cannot_run_fused_runs_plainly_and_is_named(build: str, change: Callable[[Any], Any], said: str) -> None:
    model = model_of(build)
    fuse(model, verbose=False)
    change(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        got = outcome(model)
    texts = [str(one.message) for one in heard]
    assert any(f"run plainly, and slower: {said}" in text for text in texts), texts
    agree(got, outcome(unfuse(model)))


def test_blocks_of_another_build_are_left_alone_and_named() -> None:
    model: Any = model_of("flux")
    model.transformer_blocks[0].norm2.eps = 0.5  # known, and taken
    model.transformer_blocks[1].ff.net[0].gelu = torch.tanh
    wanted = outcome(model)
    report = fuse(model, verbose=False)
    assert list(report.skipped) == ["transformer_blocks.1"]
    assert "gives something else" in report.skipped["transformer_blocks.1"]
    agree(outcome(model), wanted)
    two: Any = diffusers.SD3Transformer2DModel(**sd3().config | {"dual_attention_layers": (0,)}).requires_grad_(False)
    report = fuse(two, verbose=False)
    assert report.skipped == {"transformer_blocks.0": "it has a second attention"}


@pytest.mark.parametrize("build", BUILDS)
def test_sampling_is_bit_for_bit_as_before_and_classes_come_back(build: str) -> None:
    model = model_of(build).eval()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    with torch.no_grad():
        wanted = model(**inputs(model)).sample
        fuse(model, verbose=False)
        assert is_fused(model)
        assert torch.equal(model(**inputs(model)).sample, wanted)
    unfuse(model)
    assert {name: (type(m), set(vars(m))) for name, m in model.named_modules()} == before


def test_neighbours_are_turned_as_the_library_does_it_and_back() -> None:
    from diffusers.models.embeddings import apply_rotary_emb

    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    angle = torch.randn(5, 4).repeat_interleave(2, dim=-1)
    y = apply_rotary_emb(x, (angle.cos(), angle.sin()), sequence_dim=1)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    turn = angle.cos(), angle.sin()
    torch.testing.assert_close(rotate(x.detach(), *turn, torch.empty_like(x), pairs=True), y.detach())
    torch.testing.assert_close(rotate(g, *turn, torch.empty_like(g), back=True, pairs=True), dx)


def layouts(model: Any, monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The strides of all gradients that reach an attention's output."""
    own, seen = torch.nn.functional.scaled_dot_product_attention, set()

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        o = own(*args, **kwargs)
        o.register_hook(lambda g: seen.add(g.stride()))
        return o

    with monkeypatch.context() as changed:
        changed.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        outcome(model)
    return seen


def test_gradients_of_attention_lie_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN reads the second as the first lies (even.py); FLUX by itself has two kinds."""
    model = model_of("flux")
    wanted = outcome(model)
    assert len(layouts(model, monkeypatch)) == 2
    with even_gradients(model) as count:
        assert count == 2 and len(layouts(model, monkeypatch)) == 1
        agree(outcome(model), wanted, 1e-12)
    assert len(layouts(model, monkeypatch)) == 2  # and all is as it was
    for level in ("none", "input"):
        fuse(model, level, verbose=False)
        with even_gradients(model) as count:
            assert count == 0 and len(layouts(model, monkeypatch)) == 1
        unfuse(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_quickest_attention_with_a_mask_has_a_plainest_gradient_too() -> None:
    """Of rows whose scores are all far below zero, with half a tile of keys at the end."""
    places = 192
    q, k, v = (torch.randn(1, places, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    q[..., 0], k[..., 0] = 1.0, -1000.0  # every score is about -125
    q.requires_grad_()
    mask = torch.ones(1, 1, places, places, dtype=torch.bool, device="cuda").tril()
    with quickest(q, mask):
        o = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    o.sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["plain", "fused"])
def test_gradients_by_the_quickest_attention_are_those_by_the_plainest(way: str) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.manual_seed(0)
    model: Any = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=TEXT, pooled_projection_dim=6, axes_dims_rope=(16, 24, 24),
    ).bfloat16()  # fmt: skip
    veneer.attach(model, LoRA(rank=4, targets=ATTENTION))
    spread(model).cuda()
    given = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs(model).items()}
    with sdpa_kernel([SDPBackend.MATH]):
        wanted = outcome(model, **given)
    if way == "fused":
        fuse(model, verbose=False)
    with even_gradients(model):
        got = outcome(model, **given)
    assert distance(got, wanted) < 5e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_do_what_the_pieces_say(dtype: torch.dtype) -> None:
    from veneer.kernels import cuda, cuda_image, image_pieces, pieces

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    def close(got: Tensor, wanted: Tensor) -> bool:
        near = 2e-2 if dtype == torch.bfloat16 else 1e-4
        return bool((got - wanted).float().norm() <= near * wanted.float().norm())

    x, g, plus, rows = rand(6 * 50, 640), rand(6 * 50, 640), rand(6 * 50, 640), rand(6, 3 * 640)
    gain, shift, _ = rows.chunk(3, dim=1)  # as they lie in what the time is turned into
    (y, s), (y2, s2) = (k.layer_norm(x, gain, shift, 1e-6) for k in (cuda_image, image_pieces))
    assert close(y, y2)
    for more in (None, plus):
        both = [k.layer_norm_back(g, x, s, gain, more) for k, s in ((cuda_image, s), (image_pieces, s2))]
        assert close(*both)
    q, angle = rand(2, 70, 3, 128), torch.randn(70, 64, device="cuda").repeat_interleave(2, dim=-1)
    for back in (False, True):
        turned = [
            k.rotate(q, angle.cos(), angle.sin(), torch.empty_like(q), back=back, pairs=True) for k in (cuda, pieces)
        ]
        assert close(*turned)
