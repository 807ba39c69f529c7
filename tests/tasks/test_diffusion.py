"""Pictures from words: four families of pipelines at toy size learn, are proved, resumed, painted with and shared."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import FAMILIES, MAKERS, folder_of
from torch import nn

import veneer
from veneer.ckpt.shared import parts_of
from veneer.data.captions import Canvas
from veneer.data.dataset import load
from veneer.data.types import Captioned
from veneer.errors import ConfigError, DataError, VeneerError
from veneer.kernels import fuse as home
from veneer.tasks.diffusion import Diffusion
from veneer.tasks.pipelines import FAMILIES as KNOWN
from veneer.tasks.pipelines import Flux, Pipeline
from veneer.train import fast
from veneer.train.ema import Average, decay_at
from veneer.train.fast import Way
from veneer.train.run import Run
from veneer.train.settings import KEYS, Reads, resolve

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

COLOURS = ("red", "green", "blue")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TINY: dict[str, Any] = {
    "task": "diffusion", "r": 2, "lr": 1e-2, "batch_size": 3, "steps": 2, "resolution": 16, "sample_steps": 2,
    "sample_prompts": "a photo of red dot|a blue bar", "sample_every": 0, "save_every": 1,
}  # fmt: skip


PLAIN: dict[str, Any] = {}  # what happens without a setting: once for all tests that have the rest in common


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six pictures of two shapes, with a text beside each."""
    folder, source = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(6):
        pixels = source.integers(0, 80, (16, 30 if i % 3 == 2 else 16, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of {COLOURS[i % 3]} dot")
    return str(folder)


@pytest.fixture(autouse=True)
def proofs_of_the_adapter_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs, and hold in the tests whose names say so."""
    if "proved" not in request.node.name:
        monkeypatch.setattr("veneer.prove.run._of_adapter", lambda *_: [])


@pytest.fixture
def run_of(tmp_path: Path, pipelines: Path, photos: str) -> Callable[..., Run]:
    count = iter(range(100))

    def run(family: str = "sd", data: Any = None, *, model: Any = None, **settings: Any) -> Run:
        base = folder_of(family, pipelines) if model is None else model
        merged = {**TINY, "out": str(tmp_path / f"run{next(count)}"), **settings}
        return veneer.train(base, photos if data is None else data, **{k: v for k, v in merged.items() if v is not ...})

    return run


def learned(run: Run, where: str = "last") -> bytes:
    return (run.path("checkpoints", where) / "adapter_model.safetensors").read_bytes()


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in run.metrics("loss")]


def strip(run: Run, step: int) -> Any:
    return np.asarray(Image.open(run.path("samples", f"{step:06d}.png")))


def paint(pipe: Any, prompt: str = "a photo of red dot", seed: int = 0) -> Any:
    pipe.set_progress_bar_config(disable=True)
    size = {"width": 16, "height": 16, "num_inference_steps": 2, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **size).images[0]


def as_bytes(picture: Any) -> Any:
    return (picture.clip(0, 1) * 255).round().astype("uint8")


def opened(family: str, pipelines: Path) -> Any:
    return Pipeline(folder_of(family, pipelines))


def loaded(family: str, pipelines: Path) -> Any:
    held = opened(family, pipelines)
    held.load(torch.float32, torch.device("cpu"))
    return held.pipe


def task_of(family: str, pipelines: Path, **settings: Any) -> Diffusion:
    """The task as a run makes it, with its models."""
    task = Diffusion(opened(family, pipelines))
    reads = Reads(resolve(mapping={**TINY, **settings}))
    task.configure(reads, lambda *_, **__: None)
    task.load(torch.float32, torch.device("cpu"))
    return task


# ---------------------------------------------------------------- the four families


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_learns_is_proved_and_paints_the_same_when_loaded(
    family: str, run_of: Callable[..., Run], pipelines: Path, tmp_path: Path
) -> None:
    run = run_of(family)
    assert run.status == "done" and run.proof["passed"] and not run.proof["left_out"]  # type: ignore[index]
    assert len(losses(run)) == 2 and all(np.isfinite(losses(run)))
    told = json.loads((run.adapter / "task.json").read_text())
    assert told["task"] == "diffusion" and told["resolution"] == 16
    assert [event["step"] for event in run.events("pictures")] == [0, 2]
    before, after = strip(run, 0), strip(run, 2)
    assert before.shape == (16, 34, 3) and not np.array_equal(before, after)

    pipe = loaded(family, pipelines)
    assert np.array_equal(as_bytes(paint(pipe)), before[:, :16])
    veneer.load_shared(pipe, run.adapter)
    assert np.array_equal(as_bytes(paint(pipe)), after[:, :16])
    (part,) = (model for model in parts_of(pipe).values() if veneer.core.model.adapters(model))  # type: ignore[attr-defined]
    veneer.activate(part, None)
    assert np.array_equal(as_bytes(paint(pipe)), before[:, :16])

    report = (veneer_report(run)).read_text()
    assert report.count("data:image/png;base64,") == 2 and "a blue bar" in report and "img-src data:" in report


def veneer_report(run: Run) -> Path:
    from veneer.app.report import write_report

    return write_report(run.folder)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_a_run_learned_is_exported_and_loaded_by_diffusers(
    layout: str, run_of: Callable[..., Run], pipelines: Path, tmp_path: Path, capsys: Any
) -> None:
    from veneer.app.cli import main

    run = run_of("sd", text_encoders=True, convolutions=True)
    file = tmp_path / f"{layout}.safetensors"
    assert main(["export", str(run.folder), "--to", layout, "--out", str(file)]) == 0
    theirs, ours = loaded("sd", pipelines), loaded("sd", pipelines)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_lora_weights(str(file))
    veneer.load_shared(ours, file)
    assert np.abs(paint(theirs) - paint(ours)).max() < 1e-4
    assert np.abs(paint(ours) - paint(loaded("sd", pipelines))).max() > 1e-3
    assert np.array_equal(as_bytes(paint(ours)), strip(run, 2)[:, :16])


def test_flux_takes_patches_apart_as_the_pipeline_does() -> None:
    latents = torch.arange(2 * 4 * 6 * 8.0).view(2, 4, 6, 8)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    answer = type("Output", (), {"sample": packed})()
    assert torch.equal(Flux().answer(answer, latents), latents)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_are_what_the_pipeline_decodes(family: str, pipelines: Path) -> None:
    """The scaled mean, unscaled as the pipeline does it, is the VAE's own."""
    held = opened(family, pipelines)
    held.load(torch.float32, torch.device("cpu"))
    pixels = torch.rand(3, 16, 24) * 2 - 1
    mean, deviation = held.moments(pixels)
    vae = held.pipe.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    own = vae.encode(pixels[None]).latent_dist
    assert torch.allclose(mean / vae.config.scaling_factor + shift, own.mean[0], atol=1e-5)
    assert torch.allclose(deviation / vae.config.scaling_factor, own.std[0], atol=1e-5)


def test_every_family_has_a_test() -> None:
    assert {type(MAKERS[name]()).__name__ for name in ("sd3", "flux")} == {"StableDiffusion3Pipeline", "FluxPipeline"}
    assert len(FAMILIES) == len(KNOWN) + 1  # a UNet is of two families


# ---------------------------------------------------------------- laws of a run


def test_a_resumed_run_is_the_uninterrupted_one(run_of: Callable[..., Run]) -> None:
    more = {"steps": 4, "ema": 0.5, "caption_dropout": 0.3, "noise_offset": 0.1, "sample_every": 2}
    whole = run_of(**more)

    def stop(event: dict[str, Any]) -> str | None:
        return "stop" if event["event"] == "step" and event["step"] == 2 else None

    parted = run_of(**more, report=stop)
    assert parted.status == "stopped"
    again = veneer.train(resume=str(parted.folder))
    assert again.status == "done" and losses(again) == losses(whole) and learned(again) == learned(whole)
    assert all(np.array_equal(strip(again, step), strip(whole, step)) for step in (0, 2, 4))


@pytest.mark.parametrize(
    "change", [{"cache": "none"}, {"cache": "latents"}, {"sample_every": 1}, {"sample_prompts": "a red bar"}], ids=str
)
def test_what_only_saves_time_or_shows_changes_nothing(run_of: Callable[..., Run], change: dict[str, Any]) -> None:
    more = {"caption_dropout": 0.3, "noise_offset": 0.1}
    if "saved" not in PLAIN:
        PLAIN["saved"] = learned(run_of(**more))
    assert learned(run_of(**more, **change)) == PLAIN["saved"]


def test_how_a_batch_is_cut_changes_nothing_that_is_drawn(pipelines: Path, photos: str) -> None:
    task = task_of("sd", pipelines)
    examples = load(photos, kinds=(Captioned,)).examples
    samples = task.encode(examples).samples
    model = task.pipeline.denoiser

    def summed(rows: int) -> float:
        torch.manual_seed(3)
        with torch.no_grad():
            return float(sum(task.loss(model, batch) for batch in task.batches(samples, rows)))

    assert summed(6) == pytest.approx(summed(1), rel=1e-5) and summed(4) == pytest.approx(summed(2), rel=1e-5)


def test_the_loss_is_that_of_the_mixture_by_hand(pipelines: Path, photos: str) -> None:
    """One picture, drawn by hand through diffusers' scheduler and UNet."""
    task = task_of("sd", pipelines, min_snr=5.0)
    (sample,) = task.encode(load(photos, kinds=(Captioned,)).examples[:1]).samples
    (batch,) = task.batches([sample], 1)
    torch.manual_seed(0)
    draw = task.draw(batch.inputs["canvases"][0])
    torch.manual_seed(0)
    found = task.loss(task.pipeline.denoiser, batch)
    pipe = task.pipeline.pipe
    step = draw.time.long()[None]
    mixture = pipe.scheduler.add_noise(draw.clean[None], draw.noise[None], step)
    text = pipe.encode_prompt(["a photo of red dot"], "cpu", 1, False)[0]
    answer = pipe.unet(mixture, step, text).sample
    snr = diffusers.training_utils.compute_snr(pipe.scheduler, step)
    wanted = (answer - draw.noise[None]).square().mean() * snr.clamp(max=5) / snr
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)


def test_held_out_pictures_have_the_same_loss_each_time(
    run_of: Callable[..., Run], pipelines: Path, photos: str
) -> None:
    run = run_of(val=2, eval_every=1)
    found = [row["val_loss"] for row in run.metrics("val_loss")]
    assert len(found) == 3 and len(set(found)) == 3
    task = task_of("sd", pipelines)
    samples = task.encode(load(photos, kinds=(Captioned,)).examples).samples
    judged = [float(task.evaluate(task.pipeline.denoiser, task.batches(samples, rows))["val_loss"]) for rows in (6, 2)]
    assert judged[0] == pytest.approx(judged[1], rel=1e-5)


def test_the_average_is_what_it_says() -> None:
    value = nn.Parameter(torch.zeros(3))
    average = Average({"a": value}, 0.9)
    held = torch.zeros(3)
    for step in range(1, 30):
        with torch.no_grad():
            value += torch.randn(3)
        average.update(step)
        held = decay_at(step, 0.9) * held + (1 - decay_at(step, 0.9)) * value.detach()
    own = value.detach().clone()
    with average.acting():
        assert torch.allclose(value.detach(), held, atol=1e-5)
    assert torch.equal(value.detach(), own)
    other = Average({"a": value}, 0.9)
    other.load_state_dict(average.state_dict())
    assert torch.equal(other.held["a"], average.held["a"])


def test_a_run_saves_its_average(run_of: Callable[..., Run]) -> None:
    from safetensors.torch import load_file

    plain, averaged = run_of(), run_of(ema=0.5)
    assert losses(plain) == losses(averaged) and averaged.status == "done"  # what is trained is not the average
    name = "adapter_model.safetensors"
    one, two = load_file(plain.last / name), load_file(averaged.last / name)
    state = torch.load(averaged.last / "state.pt", weights_only=True)
    raw = {name: value for name, value in state["parameters"].items() if name.endswith("delta.B")}
    assert any(not torch.equal(one[key], two[key]) for key in one)
    held = [torch.equal(value, state["average"][name]) for name, value in raw.items()]
    assert not any(held)


# ---------------------------------------------------------------- what else learns


@pytest.mark.parametrize("family", FAMILIES)
def test_text_encoders_learn_and_are_saved_as_a_part(family: str, run_of: Callable[..., Run], pipelines: Path) -> None:
    run = run_of(family, text_encoders=True)
    assert run.proof["passed"]  # type: ignore[index]
    pipe = loaded(family, pipelines)
    found = veneer.load_shared(pipe, run.adapter)
    texts = ("text_encoder", "text_encoder_2") if family in ("sdxl", "sd3") else ("text_encoder",)
    assert set(found.sites) == {"unet" if family in ("sd", "sdxl") else "transformer", *texts}
    left = {name for name in found.sites["text_encoder"] if "layers.1." in name}
    assert bool(left) == (family != "sdxl")  # XL reads its first encoder at the last block but one
    assert np.array_equal(as_bytes(paint(pipe)), strip(run, 2)[:, :16])


def test_convolutions_and_presets(pipelines: Path) -> None:
    pipeline = opened("sd", pipelines)
    pipeline.load(torch.float32, torch.device("cpu"))
    unet = pipeline.denoiser
    attention = set(pipeline.targets(unet, "attention", False))
    assert len(attention) == 32 and all(".attn" in name for name in attention)
    more = set(pipeline.targets(unet, "attention", True)) - attention
    assert more and all(isinstance(unet.get_submodule(name), nn.Conv2d) for name in more)
    assert not set(pipeline.targets(unet, "all-linear", True)) & {"conv_in", "conv_out"}
    assert pipeline.targets(unet, r".*attn1\.to_q", False) == r".*attn1\.to_q"
    with pytest.raises(ConfigError, match="expression"):
        pipeline.targets(unet, r".*attn1\.to_q", True)
    last = task_of("sd3", pipelines)
    chosen = last.pipeline.targets(last.pipeline.denoiser, "attention", False)
    assert "transformer_blocks.0.attn.add_q_proj" in chosen
    assert last.idle(last.pipeline.denoiser) == ("transformer_blocks.1.attn.add_q_proj",)


def test_pictures_of_the_class_join_the_samples(run_of: Callable[..., Run], tmp_path: Path, photos: str) -> None:
    run = run_of(prior_prompt="a dot", prior_images=2, prior_weight=0.5)
    made = sorted(run.path("prior").glob("*.png"))
    assert len(made) == 2 and run.proof["passed"]  # type: ignore[index]
    assert run.metrics("loss")[-1]["epoch"] == pytest.approx(2 / 4)  # 6 + 6 pictures, 3 to a step
    taken = run_of(prior=str(run.path("prior")), prior_prompt="a dot", prior_weight=0.5)
    assert learned(taken) == learned(run)
    assert learned(run_of(prior=str(run.path("prior")), prior_prompt="a dot")) != learned(run)


def test_a_pipeline_in_memory_is_adapted_in_place(run_of: Callable[..., Run], pipelines: Path) -> None:
    pipe = loaded("sd", pipelines)
    first = paint(pipe)
    run = run_of(model=pipe)
    assert run.proof["passed"] and not np.array_equal(paint(pipe), first)  # type: ignore[index]
    with veneer.disabled(pipe.unet):
        assert np.array_equal(paint(pipe), first)


def test_bf16_recomputing_and_a_packed_base_are_proved(run_of: Callable[..., Run]) -> None:
    assert run_of("sdxl", precision="bf16").proof["passed"]  # type: ignore[index]
    assert learned(run_of(recompute="full")) == learned(run_of())
    packed = run_of("flux", quant="nf4")
    assert packed.status == "done" and packed.proof["passed"]  # type: ignore[index]


# ---------------------------------------------------------------- settings and errors

CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "resolution": (24, {}),
    "buckets": (False, {}),
    "captions": ("a photo of sks", {}),
    "trigger": ("sks", {"captions": "a [trigger]"}),
    "caption_dropout": (1.0, {}),
    "text_encoders": (True, {}),
    "convolutions": (True, {}),
    "prediction": ("flow", {}),
    "times": ("uniform", {"family": "sd3"}),
    "min_snr": (0.001, {}),
    "noise_offset": (0.5, {}),
    "sample_prompts": (["blue bar"], {}),
    "sample_every": (1, {"steps": 2}),
    "sample_steps": (3, {}),
    "sample_guidance": (1.0, {}),
}
ELSEWHERE = {"prior", "prior_prompt", "prior_images", "prior_weight", "cache"}  # have tests of their own above


def test_every_setting_of_pictures_has_a_test() -> None:
    assert {*CHANGES, *ELSEWHERE} == {name for name, key in KEYS.items() if key.group == "pictures"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes_what_happens(name: str, run_of: Callable[..., Run]) -> None:
    value, common = CHANGES[name]

    def outcome(**more: Any) -> Any:
        try:
            run = run_of(**{"steps": 1, **common, **more})
        except VeneerError as error:
            return error.what
        assert run.proof["passed"]  # type: ignore[index]
        pictures = {file.name: file.read_bytes() for file in run.path("samples").glob("*.png")}
        return losses(run), pictures, sorted((run.last / "adapter_config.json").read_text().split())

    trigger = {"trigger": "red"} if name == "trigger" else {}
    key = str({**common, **trigger})
    if key not in PLAIN:
        PLAIN[key] = outcome(**trigger)
    assert outcome(**{name: value}) != PLAIN[key]


def test_what_cannot_be_is_refused_before_weights_are_read(
    run_of: Callable[..., Run], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "load", lambda *_: pytest.fail("weights were read"))
    for said, more in {
        "no multiple of 4": {"resolution": 18},
        "trains adapters only": {"method": "full"},
        "has no effect without prior": {"prior_weight": 0.5},
        "is for epsilon": {"prediction": "v_prediction"},
        "eval_every need": {"eval_every": 1},
        "no convolutions": {"convolutions": True, "family": "flux"},
        "cannot be loaded as a pipeline": {"model": str(tiny_folder)},
        "needs a whole pipeline": {"model": nn.Linear(2, 2)},
        "no such file": {"model": "nowhere/at/all"},
    }.items():
        with pytest.raises(ConfigError) as caught:
            run_of(**more)
        assert said in str(caught.value) or said == "no such file", (said, str(caught.value))
    with pytest.raises(DataError, match="cannot use rows"):
        run_of(data=[{"prompt": "a", "completion": "b"}] * 4)


def test_an_inpainting_model_is_refused(pipelines: Path) -> None:
    pipe = loaded("sd", pipelines)
    pipe.unet.register_to_config(in_channels=9)
    with pytest.raises(ConfigError, match="takes 9 channels"):
        Pipeline(pipe)


def test_a_canvas_tells_sdxl_where_it_was_cut(pipelines: Path, photos: str) -> None:
    task = task_of("sdxl", pipelines)
    (sample,) = task.encode(load(photos, kinds=(Captioned,)).examples[2:3]).samples
    canvas = sample.pixels
    assert isinstance(canvas, Canvas) and canvas.original == (30, 16)
    (batch,) = task.batches([sample], 1)
    told = task.asked(batch)["added_cond_kwargs"]["time_ids"]
    left, top = canvas.crop
    assert told.tolist() == [[16, 30, top, left, canvas.size[1], canvas.size[0]]]


@pytest.mark.parametrize(
    "family,settings,said",
    [
        ("sd", {"buckets": False}, None),
        ("sd", {}, "pictures come in 2 sizes"),
        ("sdxl", {"buckets": False, "text_encoders": True}, "recorded blocks have no gradient of the text"),
        ("sd", {"buckets": False, "convolutions": True}, None),
    ],
)
def test_a_denoiser_is_fused_where_its_blocks_can_be_recorded(
    pipelines: Path, photos: str, family: str, settings: dict[str, Any], said: str | None
) -> None:
    task = task_of(family, pipelines, **settings)
    samples = task.encode(load(photos, kinds=(Captioned,)).examples).samples
    for device in ("cuda", "cpu"):
        way = Way.__new__(Way)
        way.settings = task.settings
        way.job = SimpleNamespace(task=task, train=samples, device=torch.device(device))  # type: ignore[assignment]
        wanted, why = way._best()
        reason = "there is no GPU" if device == "cpu" else said
        assert wanted == (reason is None)
        assert (reason or "recorded as CUDA graphs") in why
        way.is_ours, way.level = True, "none"
        assert way._graphs_rule(1, lambda _: 0.0)[0] == ("on" if reason is None else "off")
        way.is_ours = False
        assert way._graphs_rule(1, lambda _: 0.0)[0] == "off"


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_large_blocks_are_fused_and_not_recorded(pipelines: Path, photos: str, family: str) -> None:
    for device, fused in (("cuda", True), ("cpu", False)):
        task = task_of(family, pipelines, buckets=False)
        way = Way.__new__(Way)
        way.settings, way.is_ours, way.level = task.settings, True, "none"
        samples = task.encode(load(photos, kinds=(Captioned,)).examples).samples
        way.job = SimpleNamespace(task=task, train=samples, device=torch.device(device))  # type: ignore[assignment]
        wanted, why = way._best()
        assert wanted is fused and ("keep less" if fused else "there is no GPU") in why
        assert way._graphs_rule(1, lambda _: 0.0)[0] == "off"


def test_what_was_chosen_is_said(run_of: Callable[..., Run]) -> None:
    heard: list[Any] = []
    run = run_of(report=lambda event: heard.append(event))
    assert run.config().settings.fuse == "off"
    assert any(
        "fuse off: fused blocks of a denoiser are faster only as CUDA graphs" in e.get("text", "") for e in heard
    )


@pytest.fixture(params=[pytest.param("cuda", marks=[gpu, pytest.mark.gpu]), "cpu"])
def recording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that records, or its stand-in."""
    if request.param == "cpu":
        request.getfixturevalue("graphs_on_cpu")
        monkeypatch.setattr(fast, "RECORDING", ("cpu",))
        monkeypatch.setattr(fast, "set_graphs", lambda *args: home.set_graphs(*args) and None)


@pytest.mark.parametrize(
    "family,more", [("sd", {"convolutions": True}), ("flux", {"graphs": "on"}), ("sd3", {"graphs": "on"})]
)
def test_a_run_on_recorded_blocks_learns_what_one_on_plain_blocks_does(
    run_of: Callable[..., Run], recording: None, family: str, more: dict[str, Any]
) -> None:
    heard: list[Any] = []
    same = {"buckets": False, "steps": 6, "precision": "fp32", "sample_every": 3, "batch_size": 3} | more
    run = run_of(family, report=lambda event: heard.append(event.get("text", "")), **same)
    assert (run.config().settings.fuse, run.config().settings.graphs) == ("on", "on")
    assert any("recorded as CUDA graphs" in text for text in heard), heard
    assert not any("slower" in text for text in heard), heard
    plain = run_of(family, fuse="off", **same)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-3)
