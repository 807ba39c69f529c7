"""Pictures from words: LoRA on the denoiser of a diffusers pipeline, and on its text encoders where that is wanted.

    picture --VAE--> mean, deviation --draw--> latents x --noise n, time t--> mixture --denoiser, words--> answer
                                                                            loss = w(t) mean (answer - target)^2

Each picture counts once, whatever its size. All that is random about one - latents, noise, time, whether it goes
without words - is drawn picture by picture on the CPU, in the order of the batch: neither the cutting into
micro-batches nor what is cached changes it. Held-out pictures have noise and times of their own, always the same, so
that their loss can be compared from step to step.

What a VAE and frozen text encoders say does not change, so it is computed once and kept; they then wait in the CPU's
memory until pictures are painted. Only the mean and the deviation of latents are kept: the draw is made anew each time.

Prior preservation (DreamBooth, arXiv:2208.12242): as many pictures of the class as of the subject join the samples,
each with `prior_weight`. Where there are none, the base paints them before the training, into the run's folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veneer.core.model import disabled
from veneer.core.spec import LoRA
from veneer.data.batch import Batch, Mould
from veneer.data.captions import Canvas, buckets, encode_captioned, place_trigger
from veneer.data.dataset import load
from veneer.data.encode import Encodings
from veneer.data.types import Captioned, Encoded, LossOn
from veneer.errors import ConfigError
from veneer.extras import need
from veneer.tasks.base import TASKS, Judged, Painted, Task
from veneer.tasks.denoising import Process, process_of
from veneer.tasks.pipelines import Pipeline, WithText

__all__ = ["Diffusion", "Draw"]

SAMPLED, PROMPTS = 5, 4  # times in a run that pictures are painted, and how many, when nobody says
TIMES = 4  # at which the loss of a held-out picture is taken
Tell = Callable[..., Any]


class Draw(NamedTuple):
    """One picture at one time: its latents, what they are mixed with, and when. On the CPU, in fp32."""

    canvas: Canvas
    clean: Float[Tensor, "channels height width"]
    noise: Float[Tensor, "channels height width"]
    time: Float[Tensor, ""]
    words: str


@TASKS.register("diffusion")
class Diffusion(Task):
    name = "diffusion"
    kinds = (Captioned,)
    paints = True
    holds_out = False
    settings: Any
    process: Process

    @property
    def pipeline(self) -> Pipeline:
        return cast(Pipeline, self.tokenizer)

    @classmethod
    def open(cls, source: Any) -> Pipeline:
        return Pipeline(source)

    def configure(self, settings: Any, tell: Tell) -> None:
        """What follows from the settings and the pipeline's files; contradictions are said before anything is read."""
        pipeline = self.pipeline
        self.settings = settings
        told = {"prediction": settings.prediction, "times": settings.times, "min_snr": settings.min_snr}
        self.process = process_of(pipeline.scheduler, pipeline.family.is_transformer, **told)
        if settings.resolution is None:
            settings.settle("resolution", pipeline.side, "the size that the model was made for")
        if settings.resolved.origins["targets"].how == "default":
            settings.settle("targets", "attention", "the attention layers, as is usual for pictures")
        if settings.convolutions and pipeline.family.is_transformer:
            raise ConfigError(f"{pipeline.family.name} has no convolutions to adapt", "convolutions", "leave it out")
        if settings.text_encoders and not pipeline.texts:
            raise ConfigError("the pipeline has no CLIP text encoder to train", "text_encoders", "leave it out")
        if settings.text_encoders and settings.cache in ("all", "texts"):
            left = "latents" if settings.cache == "all" else "none"
            settings.settle("cache", left, "the text encoders learn, so what they say changes")
        side: Any = settings.resolution
        self.sizes = buckets(side, pipeline.step, square=not settings.buckets)
        self.dropped, self.offset = settings.caption_dropout, settings.noise_offset
        self.kept: dict[str, Tensor] = {}  # moments of pictures
        self.said: dict[str, dict[str, Tensor]] = {}  # embeddings of captions
        self.prompts: tuple[str, ...] = ()
        self.look = {"num_inference_steps": settings.sample_steps}
        if settings.sample_guidance is not None:
            self.look["guidance_scale"] = settings.sample_guidance
        said = {"epsilon": "the noise", "v_prediction": "v", "sample": "the picture", "flow": "the flow"}
        tell(
            "note", text=f"{pipeline.family.name}: the model predicts {said[self.process.kind]}, as its scheduler says"
        )

    def encode(
        self, examples: Sequence[Any], *, skip_bad: bool = False, report: Callable[[int, int], None] | None = None,
        max_len: int | None = None, overlong: str = "drop", loss_on: LossOn = "assistant",
    ) -> Encodings:  # fmt: skip
        """No picture is too long, so `max_len` and `overlong` decide nothing."""
        words = {"captions": self.settings.captions, "trigger": self.settings.trigger}
        return encode_captioned(examples, self.sizes, skip_bad=skip_bad, report=report, **words)

    def collate(self, samples: Sequence[Encoded], *, by_samples: bool = False, mould: Mould | None = None) -> Batch:
        """Pictures may differ in size, so they become tensors only where the model is asked, shape by shape."""
        canvases = tuple(cast(Canvas, sample.pixels) for sample in samples)
        weights = torch.tensor([canvas.weight for canvas in canvases])
        places, segments = tuple(s.where for s in samples), tuple(s.segments for s in samples)
        return Batch({"canvases": canvases}, weights, len(samples), segments, places)

    # ---------------------------------------------------------------- the model

    def empty(self, source: str, dtype: torch.dtype) -> nn.Module | str:
        if self.settings.text_encoders:
            return "text encoders that learn are asked through their pipeline"
        return self.pipeline.pretend(dtype)

    def rehearsed(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The loss, of latents and words that are of the right shape."""
        pipeline, draws = self.pipeline, []
        for canvas in batch.inputs["canvases"]:
            width, height = (side // pipeline.factor for side in canvas.size)
            clean = torch.zeros(pipeline.channels, height, width)
            draws.append(Draw(canvas, clean, torch.zeros_like(clean), torch.tensor(500.0), canvas.caption))
            self.said[canvas.caption] = dict(pipeline.unsaid)
        return self.summed(model, draws)

    def beside(self, device: str) -> int:
        """What was asked all that it will be waits in the CPU's memory."""
        rests = {"all": ("vae", "text"), "latents": ("vae",), "texts": ("text",), "none": ()}[self.settings.cache]
        rests = rests if device == "cuda" else ()
        return sum(count for part, count in self.pipeline.others().items() if not (rests and part.startswith(rests)))

    def load(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        pipeline = self.pipeline
        pipeline.load(dtype, device)
        return WithText(pipeline, pipeline.texts) if self.settings.text_encoders else pipeline.denoiser

    def filed(self, model: nn.Module, source: str) -> tuple[nn.Module, str]:
        return self.pipeline.denoiser, str(Path(source) / self.pipeline.part)

    def idle(self, model: nn.Module) -> tuple[str, ...]:
        return self.pipeline.idle(model)

    def unlike(self, samples: Sequence[Encoded]) -> str | None:
        if self.settings.text_encoders:
            return "the text encoders learn, and recorded blocks have no gradient of the text"
        sizes = {cast(Canvas, sample.pixels).size for sample in samples}
        return f"pictures come in {len(sizes)} sizes (buckets: no makes them one)" if len(sizes) > 1 else None

    def better_fused(self) -> str | None:
        """Transformers are few large blocks; a UNet is thousands of small kernels (benchmarks/sdxl_gpu.py)."""
        return f"blocks of {self.pipeline.family.name} keep less" if self.pipeline.family.is_transformer else None

    def aim(self, model: nn.Module, spec: LoRA) -> LoRA:
        asked = spec.targets if isinstance(spec.targets, str) else tuple(spec.targets)
        found = self.pipeline.targets(model, asked, self.settings.convolutions)
        return dataclasses.replace(spec, targets=found)

    def gather(
        self, model: nn.Module, train: list[Encoded], val: Sequence[Encoded], folder: Path, tell: Tell
    ) -> list[Encoded]:
        """The samples with those of the class, and everything about them that never changes."""
        self.prompts = self._prompts(train)
        samples = train + self._prior(model, train, folder, tell)
        self._fill([cast(Canvas, each.pixels) for each in (*samples, *val)], tell)
        return samples

    def _prompts(self, train: Sequence[Encoded]) -> tuple[str, ...]:
        asked: tuple[str, ...] = self.settings.sample_prompts
        if len(asked) == 1 and asked[0].endswith(".txt"):
            path = Path(asked[0]).expanduser()
            if not path.is_file():
                raise ConfigError(
                    "there is no such file", str(path), "give a file of prompts, one a line, or the prompts"
                )
            asked = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        captions = dict.fromkeys(cast(Canvas, sample.pixels).caption for sample in train)
        chosen = asked or tuple(captions)[:PROMPTS]
        return tuple(place_trigger(prompt, self.settings.trigger) for prompt in chosen)

    def _prior(self, model: nn.Module, train: Sequence[Encoded], folder: Path, tell: Tell) -> list[Encoded]:
        """Pictures of the class, as many as there are of the subject."""
        settings = self.settings
        where, prompt = settings.prior, settings.prior_prompt
        count, weight = settings.prior_images, settings.prior_weight
        if where is None and prompt is None:
            return []
        if where is None:
            where = self._painted_prior(model, folder / "prior", prompt, count, tell)
        examples = cast("Sequence[Captioned]", load(where, kinds=(Captioned,)).examples)
        found = encode_captioned(examples, self.sizes, captions=prompt or "auto", weight=weight)
        tell("data", text=f"class: {found}")
        return list(islice(cycle(found.samples), len(train)))

    def _painted_prior(self, model: nn.Module, folder: Path, prompt: str, count: int, tell: Tell) -> str:
        """Pictures that the untouched base paints; those that a stopped run left are kept."""
        folder.mkdir(exist_ok=True)
        for number in range(count):
            path = folder / f"{number:04d}.png"
            if not path.exists():
                tell("doing", text=f"the base paints picture {number + 1} of {count} of its class")
                with disabled(model):
                    (picture,) = self._paint([prompt], [self.settings.seed + 10_000 + number])
                self._write(picture, path)
        return str(folder)

    @staticmethod
    def _write(picture: Any, path: Path) -> None:
        half = path.with_name(f".{path.name}")
        need("PIL.Image", extra="diffusion", use="write pictures").fromarray(picture).save(half, format="PNG")
        half.replace(path)

    # ---------------------------------------------------------------- what never changes

    def _fill(self, canvases: Sequence[Canvas], tell: Tell) -> None:
        cache, distinct = self.settings.cache, {_key(canvas): canvas for canvas in canvases}
        if cache in ("all", "latents"):
            for number, (key, canvas) in enumerate(distinct.items(), 1):
                tell("doing", text=f"encoding picture {number:,} of {len(distinct):,}")
                self.kept[key] = self.moments(canvas)
            self.pipeline.rest(["vae"])
        if cache in ("all", "texts"):
            captions = dict.fromkeys([*(canvas.caption for canvas in canvases), *[""] * bool(self.dropped)])
            tell("doing", text=f"encoding {len(captions):,} captions")
            for caption in captions:
                self.said[caption] = {name: value.cpu() for name, value in self._words([caption]).items()}
            self.pipeline.rest([part for part in self.pipeline.models if part.startswith("text_encoder")])
        held = sum(t.nbytes for t in (*self.kept.values(), *(t for said in self.said.values() for t in said.values())))
        if held:
            tell(
                "note", text=f"kept: {len(self.kept):,} latents and {len(self.said):,} captions, {held / 2**20:.1f} MiB"
            )

    def moments(self, canvas: Canvas) -> Tensor:
        """(mean or deviation, channels, height, width), on the CPU."""
        known = self.kept.get(_key(canvas))
        return self.pipeline.moments(torch.as_tensor(canvas())).cpu() if known is None else known

    @torch.no_grad()
    def _words(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """One caption at a time, so that what is kept is what would be said in any batch."""
        found = [self.said.get(caption) or self.pipeline.words([caption]) for caption in captions]
        device = self.pipeline.device
        return {name: torch.cat([each[name].to(device) for each in found]) for name in found[0]}

    # ---------------------------------------------------------------- the loss

    def draw(self, canvas: Canvas, source: torch.Generator | None = None) -> Draw:
        """From `source`, or from PyTorch's own random state. As much is drawn whatever the settings are."""
        mean, deviation = self.moments(canvas)
        spread, noise = (torch.randn(mean.shape, generator=source) for _ in range(2))
        shift = torch.randn(mean.shape[0], 1, 1, generator=source)
        uniform, normal, drop = (f((), generator=source) for f in (torch.rand, torch.randn, torch.rand))
        time = self.process.time(uniform, normal, mean.shape[1] * mean.shape[2] // 4)
        words = "" if float(drop) < self.dropped else canvas.caption
        return Draw(canvas, mean + deviation * spread, noise + self.offset * shift, time, words)

    def loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        return self.summed(model, [self.draw(canvas) for canvas in batch.inputs["canvases"]])

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """The mean over a few times that lie evenly, with noise that belongs to the picture."""
        losses = [
            self.summed(model, [_fixed(self, canvas, i) for canvas in batch.inputs["canvases"]]) for i in range(TIMES)
        ]
        return Judged(torch.stack(losses).mean())

    def summed(self, model: nn.Module, draws: Sequence[Draw]) -> Float[Tensor, ""]:
        losses = [self._of_group(model, group) for group in _by_shape(draws)]
        return torch.stack(losses).sum()

    def _of_group(self, model: nn.Module, draws: Sequence[Draw]) -> Float[Tensor, ""]:
        clean, noise, time = self._stacked(draws)
        mixture = self.process.mixture(clean, noise, time)
        output = model(**self.inputs(mixture, time, draws))
        answer = self.pipeline.family.answer(output, mixture).float()
        apart = (answer - self.process.target(clean, noise, time)).square().flatten(1).mean(1)
        weights = torch.tensor([draw.canvas.weight for draw in draws]).to(apart)
        return (apart * weights * self.process.weight(time)).sum()

    def _stacked(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        device = self.pipeline.device
        columns = ([draw.clean for draw in draws], [draw.noise for draw in draws], [draw.time for draw in draws])
        clean, noise, time = (torch.stack(column).to(device) for column in columns)
        return clean, noise, time

    def inputs(self, mixture: Tensor, time: Tensor, draws: Sequence[Draw]) -> dict[str, Any]:
        """What the model takes."""
        noisy, sizes = (
            mixture.to(self.pipeline.dtype),
            torch.tensor([_sizes(draw.canvas) for draw in draws]).to(mixture),
        )
        captions = [draw.words for draw in draws]
        if self.settings.text_encoders:
            return {"noisy": noisy, "time": time, "sizes": sizes, "prompts": captions}
        words = self._words(captions)
        return self.pipeline.family.inputs(self.pipeline.denoiser, noisy, time, words, sizes)

    def asked(self, batch: Batch) -> dict[str, Any]:
        """The first pictures of one shape, at times of their own."""
        draws = [_fixed(self, canvas, i % TIMES) for i, canvas in enumerate(batch.inputs["canvases"])]
        group = next(_by_shape(draws))
        clean, noise, time = self._stacked(group)
        return self.inputs(self.process.mixture(clean, noise, time), time, group)

    # ---------------------------------------------------------------- pictures

    def paint_every(self, steps: int) -> int:
        if self.settings.sample_every is None:
            self.settings.settle("sample_every", max(1, steps // SAMPLED), f"about {SAMPLED} times in the run")
        every: Any = self.settings.sample_every
        return every

    def painted(self, model: nn.Module) -> Painted:
        """The prompts of the run, each with its own seed."""
        seeds = [self.settings.seed + number for number in range(len(self.prompts))]
        return Painted(self.prompts, self._paint(self.prompts, seeds))

    def _paint(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        side = self.settings.resolution
        return self.pipeline.paint(prompts, seeds, (side, side), **self.look)

    # ---------------------------------------------------------------- what is said of it

    def told(self) -> dict[str, Any]:
        return {
            "family": self.pipeline.family.name,
            "trigger": self.settings.trigger,
            "resolution": self.settings.resolution,
        }

    def use(self, base: str, run: str) -> str:
        return (
            f'pipeline = DiffusionPipeline.from_pretrained("{base}")\n'
            f'veneer.load_shared(pipeline, "{run}/adapter")\n'
            f"# or for others: veneer export {run} --to diffusers --out {run}.safetensors"
        )


def _key(canvas: Canvas) -> str:
    return f"{canvas.example.id} {canvas.size}"


def _sizes(canvas: Canvas) -> tuple[int, ...]:
    """What SDXL is told of a picture: its own height and width, where it was cut, the height and width it has now."""
    (width, height), (left, top), (now_width, now_height) = canvas.original, canvas.crop, canvas.size
    return height, width, top, left, now_height, now_width


def _fixed(task: Diffusion, canvas: Canvas, which: int) -> Draw:
    """A draw that depends on nothing but the picture: the same noise, at the `which`-th of TIMES times."""
    source = torch.Generator().manual_seed(int(canvas.example.id[:12], 16) + which)
    draw = task.draw(canvas, source)
    at = torch.tensor((which + 0.5) / TIMES)
    tokens = draw.clean.shape[1] * draw.clean.shape[2] // 4
    return draw._replace(time=task.process.time(at, torch.special.ndtri(at), tokens), words=canvas.caption)


def _by_shape(draws: Iterable[Draw]) -> Iterator[list[Draw]]:
    found: dict[tuple[int, ...], list[Draw]] = {}
    for draw in draws:
        found.setdefault(tuple(draw.clean.shape), []).append(draw)
    yield from found.values()
