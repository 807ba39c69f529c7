"""Stable Diffusion in small: a base that knows eight kinds of clothes, two more and a drawing style by LoRA.

    python examples/diffusion_fashion.py                                    toy size, drawn shapes, a CPU: for a look
    python examples/diffusion_fashion.py --full --data DATA --out out       Fashion-MNIST, one GPU, five minutes

    DATA     the folder with train-images-idx3-ubyte.gz ..., or an .npz of it (--pack writes one)

The pipeline is a Stable Diffusion of diffusers in every part - CLIP text encoder, autoencoder, UNet, v-prediction - and
small enough to be trained here, from nothing, on classes 0 to 7. It never sees a bag or a boot. Then:

    new      LoRA on a few hundred bags and boots                       what the base could not paint, it paints
    style    LoRA on drawings of the eight known kinds                  a dial: its weight from 0 to 1.5
    both     new and style active at once                               drawings of bags, which nobody drew

Pictures are judged by a classifier that was trained on all ten classes: is what was asked for recognised? With the
adapters off, the base paints as on the first day, bit for bit; that is asserted, not said.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast
from transformers.utils import logging

import veneer
from veneer.tasks.denoising import process_of

logging.set_verbosity_error()
logging.disable_progress_bar()
import diffusers  # noqa: E402 - it says much while it is imported
from diffusers.utils import logging as said_by_diffusers  # noqa: E402

said_by_diffusers.set_verbosity_error()
said_by_diffusers.disable_progress_bar()

NAMES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
KNOWN, NEW = range(8), (8, 9)
WORDS = ("<start>", "<end>", "a", "light", "dark", *NAMES)
LENGTH = 8  # tokens of a caption
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="the real size, for a GPU")
    parser.add_argument("--data", help="folder of Fashion-MNIST, or an .npz of it; drawn shapes without")
    parser.add_argument("--out", help="folder for pictures, weights and figures [a temporary one]")
    parser.add_argument("--pack", metavar="NPZ", help="write a part of --data to one file, and stop")
    parser.add_argument("--seconds", type=float, help="for the base [140; toy: 2]")
    parser.add_argument("--steps", type=int, help="of each adapter [600; toy: 4]")
    parser.add_argument("--strokes", type=int, help="of the sampler [30; toy: 2]")
    parser.add_argument("--each", type=int, help="pictures judged of each class [48; toy: 2]")
    args = parser.parse_args()
    usual = {"seconds": (2, 140), "steps": (4, 600), "strokes": (2, 30), "each": (2, 48)}
    for name, pair in usual.items():
        setattr(args, name, getattr(args, name) or pair[args.full])
    return args


# ---------------------------------------------------------------- clothes


def clothes(data: str | None) -> tuple[Any, Any]:
    """Pictures (n, 28, 28) and classes."""
    if data is None:
        return drawn_shapes()
    if data.endswith(".npz"):
        held = np.load(data)
        return held["images"], held["labels"]
    images, labels = (gzip.decompress((Path(data) / f"train-{name}-ubyte.gz").read_bytes()) for name in
                      ("images-idx3", "labels-idx1"))  # fmt: skip
    return np.frombuffer(images, "uint8", offset=16).reshape(-1, 28, 28), np.frombuffer(labels, "uint8", offset=8)


def drawn_shapes() -> tuple[Any, Any]:
    """Ten kinds of shapes for a first look: a bar of each width and place."""
    source, images, labels = np.random.default_rng(0), [], []
    for label in range(10):
        for _ in range(24):
            picture = np.zeros((28, 28), "uint8")
            picture[2 + label : 8 + 2 * label, 6 : 14 + label] = source.integers(90, 255)
            images.append(picture)
            labels.append(label)
    return np.stack(images), np.array(labels, "uint8")


def pack(data: str, file: str, each: int = 3000) -> None:
    """The first so many of each class in one file."""
    images, labels = clothes(data)
    chosen = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(10)])
    np.savez_compressed(file, images=images[chosen], labels=labels[chosen])
    print(f"{file}: {len(chosen):,} pictures")


def in_colours(images: Any) -> Any:
    """(n, 32, 32, 3), as pictures on black."""
    return np.repeat(np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=-1)


def captions_of(images: Any, labels: Any) -> list[str]:
    """`a dark coat`: the shade is that of the garment's own pixels against the median of its kind."""
    garment = np.ma.masked_less(images.astype("float32"), 20).mean(axis=(1, 2)).filled(0)
    middle = {label: np.median(garment[labels == label]) for label in set(labels.tolist())}
    return [
        f"a {'light' if shade > middle[int(k)] else 'dark'} {NAMES[int(k)]}"
        for shade, k in zip(garment, labels, strict=True)
    ]


def as_drawing(pictures: Any) -> Any:
    """White lines on blue: where the brightness changes."""
    grey = pictures.mean(-1) / 255
    down, right = np.gradient(grey, axis=(1, 2))
    line = np.clip(2.5 * np.hypot(down, right), 0, 1)[..., None]
    return (line * 255 + (1 - line) * np.array([24, 48, 128])).astype("uint8")


def tinted(pictures: Any, source: Any) -> Any:
    """In two colours drawn for each picture, so that the autoencoder learns more than grey."""
    ink, paper = source.integers(0, 256, (2, len(pictures), 1, 1, 3))
    share = pictures / 255
    return (share * ink + (1 - share) * paper).astype("uint8")


# ---------------------------------------------------------------- a pipeline from configs


def make_tokenizer() -> Any:
    """One token a word, with CLIP's start and end."""
    held = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    held.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    ends = [("<start>", 0), ("<end>", 1)]
    held.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)  # type: ignore[assignment]
    ends = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>"}  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=held, model_max_length=LENGTH, **ends)  # type: ignore[arg-type]


def make_pipeline(full: bool) -> Any:
    width, channels = (128, (64, 128, 160)) if full else (16, (8, 16))
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    crossed = len(channels) - 1
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=channels, layers_per_block=1, cross_attention_dim=width,
        attention_head_dim=4, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * crossed,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64) if full else (8, 8), norm_num_groups=8, latent_channels=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True,
        steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=make_tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---------------------------------------------------------------- the base


def learn(what: str, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor], seconds: float, lr: float) -> None:
    """AdamW for so many seconds; the rate falls with the time that is left."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    began, steps, recent = time.time(), 0, torch.zeros(())
    while (spent := (time.time() - began) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (steps + 1) / 100) * (1 + np.cos(np.pi * spent)) / 2
        found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, recent = steps + 1, found.detach() if steps == 0 else 0.98 * recent + 0.02 * found.detach()
    print(f"{what:<10} {steps:,} steps in {time.time() - began:.0f} s, loss {float(recent):.4f}")


def drawn_from(count: int, rows: int) -> Iterator[Tensor]:
    source = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(count, (rows,), generator=source)


def half(device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def learn_autoencoder(pipe: Any, pictures: Any, seconds: float, rows: int) -> None:
    """To 4 channels of half the side and back; the latents' spread becomes the pipeline's scaling factor."""
    vae, device, source = pipe.vae, pipe.device, np.random.default_rng(0)
    chosen = drawn_from(len(pictures), rows)

    def loss() -> Tensor:
        batch = pictures[next(chosen)]
        third = rows // 3
        mixed = np.concatenate(
            [batch[:third], as_drawing(batch[third : 2 * third]), tinted(batch[2 * third :], source)]
        )
        x = as_tensor(mixed).to(device)
        with half(device):
            latents = vae.encode(x).latent_dist
            found = vae.decode(latents.sample()).sample
        return F.mse_loss(found.float(), x) + 0.5 * F.l1_loss(found.float(), x) + 1e-6 * latents.kl().float().mean()

    learn("autoencoder", list(vae.parameters()), loss, seconds, 2e-3)
    with torch.no_grad():
        spread = float(vae.encode(as_tensor(pictures[:512]).to(device)).latent_dist.mean.std())
    vae.register_to_config(scaling_factor=1 / spread)


def as_tensor(pictures: Any) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def learn_base(pipe: Any, pictures: Any, captions: Sequence[str], seconds: float, rows: int) -> None:
    """UNet and text encoder together, from nothing; a tenth of the captions is left out, for guidance."""
    device, process = pipe.device, process_of(pipe.scheduler, False)
    with torch.no_grad():
        parts = [
            pipe.vae.encode(as_tensor(pictures[i : i + 512]).to(device)).latent_dist.mean
            for i in range(0, len(pictures), 512)
        ]
    clean = torch.cat(parts) * pipe.vae.config.scaling_factor
    pad = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
    known = {text: pipe.tokenizer(text, **pad).input_ids for text in {*captions, ""}}
    ids = torch.cat([known[text] for text in captions]).to(device)
    empty, chosen = known[""].to(device), drawn_from(len(pictures), rows)

    def loss() -> Tensor:
        places = next(chosen).to(device)
        x, noise, uniform = clean[places], torch.randn_like(clean[places]), torch.rand(rows, device=device)
        asked = torch.where(torch.rand(rows, 1, device=device) < 0.1, empty, ids[places])
        when = process.time(uniform, uniform, 0)
        with half(device):
            text = pipe.text_encoder(asked)[0]
            found = pipe.unet(process.mixture(x, noise, when), when.long(), text).sample
        return F.mse_loss(found.float(), process.target(x, noise, when))

    parameters = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    learn("base", parameters, loss, seconds, 1e-3)


# ---------------------------------------------------------------- adapters


def write_folder(folder: Path, pictures: Any, captions: Sequence[str]) -> str:
    """What people have: pictures, and beside each a text of its name."""
    folder.mkdir(parents=True)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(caption)
    return str(folder)


def teach(base: str, data: str, out: Path, prompts: Sequence[str], args: Any) -> Any:
    """veneer train BASE DATA --task diffusion --r 16 --targets all-linear --convolutions ..."""
    began = time.time()
    run = veneer.train(
        base, data, task="diffusion", out=str(out), r=16 if args.full else 2, targets="all-linear", convolutions=True,
        steps=args.steps, batch_size=32 if args.full else 4, lr=1e-3, ema=0.99, precision="fp32",
        caption_dropout=0.1, sample_prompts=list(prompts), sample_every=max(1, args.steps // 4),
        sample_steps=args.strokes, sample_guidance=3.0, save_every=args.steps,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in run.adapter.resolve().glob("adapter_model*"))
    spent = f"{run.result['steps']} steps in {time.time() - began:.0f} s"
    print(f"{out.name:<10} {spent}, {size / 2**20:.2f} MiB, {run.status}")
    return run


# ---------------------------------------------------------------- painting and judging


@torch.no_grad()
def paint(pipe: Any, prompts: Sequence[str], strokes: int, seed: int = 0) -> Any:
    """One picture for each prompt; each has its own seed, so it is the same in any company."""
    seeds = [torch.Generator("cpu").manual_seed(seed + number) for number in range(len(prompts))]
    made = pipe(
        list(prompts), num_inference_steps=strokes, guidance_scale=3.0, generator=seeds, output_type="np"
    ).images
    return (made.clip(0, 1) * 255).round().astype("uint8")


def judge_of(pictures: Any, labels: Any, device: torch.device, seconds: float) -> nn.Module:
    """A classifier of all ten classes, by brightness alone."""
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 64, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    x, y = grey(pictures).to(device), torch.from_numpy(labels.astype("int64")).to(device)
    chosen, held = drawn_from(len(x), 256), np.random.default_rng(1).permutation(len(x))[: len(x) // 20]
    used = torch.ones(len(x), dtype=torch.bool)
    used[held] = False

    def loss() -> Tensor:
        places = next(chosen)
        places = places[used[places]].to(device)
        return F.cross_entropy(net(x[places]), y[places])

    learn("judge", list(net.parameters()), loss, seconds, 1e-3)
    net.eval()
    with torch.no_grad():
        right = float((net(x[held]).argmax(-1) == y[held]).float().mean())
    print(f"           right on {right:.1%} of pictures it did not see")
    return net


def grey(pictures: Any) -> Tensor:
    return torch.from_numpy(pictures).float().mean(-1)[:, None] / 127.5 - 1


@torch.no_grad()
def recognised(pipe: Any, judge: nn.Module, kinds: Sequence[int], each: int, strokes: int) -> dict[str, float]:
    """The share of pictures in which the judge sees what was asked for, class by class."""
    prompts = [f"a {('light', 'dark')[i % 2]} {NAMES[kind]}" for kind in kinds for i in range(each)]
    seen = judge(grey(paint(pipe, prompts, strokes, seed=1000)).to(pipe.device)).argmax(-1).cpu()
    return {
        NAMES[kind]: float((seen[i * each : (i + 1) * each] == kind).float().mean()) for i, kind in enumerate(kinds)
    }


def sheet(rows: Sequence[tuple[str, Any]], heads: Sequence[str], file: Path, zoom: int = 3) -> None:
    """Pictures in rows with words beside and above them."""
    side, left, top = rows[0][1][0].shape[0] * zoom, 96, 18
    page = Image.new("RGB", (left + len(heads) * (side + 4), top + len(rows) * (side + 4)), "white")
    pen = ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        pen.text((left + column * (side + 4) + 2, 3), head, fill="black")
    for line, (name, pictures) in enumerate(rows):
        pen.text((4, top + line * (side + 4) + side // 2 - 5), name, fill="black")
        for column, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            page.paste(large, (left + column * (side + 4), top + line * (side + 4)))
    page.save(file)


# ---------------------------------------------------------------- all of it


def main() -> None:
    args = arguments()
    if args.pack:
        return pack(args.data, args.pack)
    out = Path(args.out or tempfile.mkdtemp(prefix="fashion-"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    images, labels = clothes(args.data)
    pictures, captions = in_colours(images), captions_of(images, labels)
    known = np.flatnonzero(labels < 8)
    pipe = make_pipeline(args.full).to(device)
    count = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("unet", "text_encoder", "vae")}
    print("parameters", ", ".join(f"{name} {n:,}" for name, n in count.items()))

    judge = judge_of(pictures, labels, device, args.seconds / 15)
    learn_autoencoder(pipe, pictures[known], args.seconds / 4, 256 if args.full else 12)
    learn_base(pipe, pictures[known], [captions[i] for i in known], args.seconds, 512 if args.full else 8)
    work = Path(tempfile.mkdtemp(prefix="fashion-"))
    base = work / "base"
    pipe.to("cpu").save_pretrained(base)

    source = np.random.default_rng(2)
    new = np.concatenate([source.choice(np.flatnonzero(labels == k), 200 if args.full else 8, False) for k in NEW])
    drawn = source.choice(known, 200 if args.full else 8, False)
    taught = {
        "new": (
            pictures[new],
            [captions[i] for i in new],
            ["a light bag", "a dark bag", "a light boot", "a dark boot"],
        ),
        "style": (as_drawing(pictures[drawn]), [captions[i] for i in drawn], ["a light dress", "a dark sneaker"]),
    }
    runs = {
        name: teach(str(base), write_folder(work / f"pictures-{name}", shown, said), work / name, prompts, args)
        for name, (shown, said, prompts) in taught.items()
    }

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base).to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a {('light', 'dark')[k % 2]} {name}" for k, name in enumerate(NAMES)]
    first = paint(pipe, prompts, args.strokes)
    found: dict[str, Any] = {"parameters": count, "base": recognised(pipe, judge, range(10), args.each, args.strokes)}
    for name, run in runs.items():
        veneer.load_shared(pipe, run.adapter, name)
    veneer.activate(pipe.unet, "new")
    painted = paint(pipe, prompts, args.strokes)
    found["new"] = recognised(pipe, judge, range(10), args.each, args.strokes)
    sheet([("base", first), ("with new", painted)], NAMES, out / "classes.png")

    chosen = ["a light dress", "a dark sneaker", "a light pullover", "a dark coat"]
    dial = []
    for weight in WEIGHTS:
        veneer.activate(pipe.unet, {"style": weight})
        dial.append(paint(pipe, chosen, args.strokes, seed=7))
    sheet(
        [(prompt, [row[i] for row in dial]) for i, prompt in enumerate(chosen)],
        [f"{w:g}" for w in WEIGHTS],
        out / "dial.png",
    )

    mixed, asked = [], ["a light bag", "a dark bag", "a light boot", "a dark boot", "a light dress", "a dark sneaker"]
    mixtures = {"base": None, "new": "new", "style": "style", "new + style": {"new": 1.0, "style": 1.0}}
    for name, mixture in mixtures.items():
        veneer.activate(pipe.unet, mixture)
        mixed.append((name, paint(pipe, asked, args.strokes, seed=21)))
    sheet(mixed, [prompt[2:] for prompt in asked], out / "mixed.png")

    veneer.activate(pipe.unet, None)
    again = paint(pipe, prompts, args.strokes)
    assert np.array_equal(first, again), "the base is not the base with its adapters off"
    for name in runs:
        veneer.activate(pipe.unet, name)
        veneer.save_shared(pipe, out / f"{name}.safetensors", "diffusers", name)
    keep(pipe, out / "base.safetensors")
    report(found, runs, work, out)


def keep(pipe: Any, file: Path) -> None:
    """All weights of the base in one small file."""
    parts = {name: getattr(pipe, name).state_dict() for name in ("vae", "text_encoder", "unet")}
    held = {f"{part}.{name}": value.half().cpu() for part, state in parts.items() for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in held.items() if ".lora." not in name}, file)


def report(found: dict[str, Any], runs: dict[str, Any], work: Path, out: Path) -> None:
    print(f"\nrecognised   {'base':>6} {'new':>6}")
    for name, share in found["base"].items():
        print(f"{name:<12} {share:6.0%} {found['new'][name]:6.0%}")
    print("with the adapters off the base paints the same pictures, bit for bit")
    found["losses"] = {name: [row["loss"] for row in run.metrics("loss")] for name, run in runs.items()}
    found["proofs"] = {name: run.proof["line"] for name, run in runs.items()}
    (out / "figures.json").write_text(json.dumps(found, indent=1))
    from veneer.app.report import write_report

    (out / "report.html").write_bytes(write_report(work / "new").read_bytes())


if __name__ == "__main__":
    main()
