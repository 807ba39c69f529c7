"""Every setting of a training run, in one table.

The table is the class `Settings`: one field per key, with its reader, its help and its unit beside it. The command
line, `veneer check`, the page that shows a form, the documentation and the YAML reader are all made from it, so a key
cannot exist in one of them and not in another. Two rules keep it honest:

    a key that somebody sets is either used by the run or refused      (`only_for`, and proof P0 at the end of a run)
    a value always knows where it came from                            default < file < call < flag; rule: worked out

A text's run is decided by at most 48 keys, and a picture's has two dozen of its own (the group "pictures"); the few in
the group "run" only say where and how it is kept.
This module imports nothing heavy: `veneer --help` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from veneer.core.registry import near
from veneer.errors import ConfigError
from veneer.train import parse
from veneer.train.aliases import ALIASES, DEFERRED, NOT_NEEDED, VARIANTS
from veneer.train.parse import Reader, number, one_of, optional, whole

__all__ = ["KEYS", "Key", "Origin", "Reads", "Resolved", "Settings", "explain", "resolve"]

Kind = Literal["text", "path", "number", "whole", "choice", "flag", "names", "mapping"]


@dataclass(frozen=True)
class Key:
    """What is known of one setting besides its value."""

    name: str
    default: Any
    help: str
    kind: Kind
    read: Reader
    group: str
    unit: str
    choices: tuple[str, ...]
    only_for: Mapping[str, tuple[str, ...]]  # e.g. {"method": ("lora",)}: the key means nothing elsewhere
    rule: str  # how a value is found when nobody gives one

    @property
    def aliases(self) -> tuple[str, ...]:
        return _aliases_of().get(self.name, ())

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def key(default: Any, kind: Kind, read: Reader, help: str, *, group: str, unit: str = "", rule: str = "",
        choices: tuple[str, ...] = (), only_for: Mapping[str, tuple[str, ...]] | None = None) -> Any:  # fmt: skip
    """One row of the table: a dataclass field that carries its `Key`."""
    about = {"kind": kind, "read": read, "help": help, "group": group, "unit": unit, "rule": rule, "choices": choices}
    about |= {"default": default, "only_for": only_for or {}}
    return field(default_factory=dict, metadata=about) if default == {} else field(default=default, metadata=about)


def choice(default: str, choices: str, help: str, *, also: Mapping[Any, str] | None = None, **more: Any) -> Any:
    words = tuple(choices.split())
    return key(default, "choice", one_of(*words, also=also), help, choices=words, **more)


LORA = {"method": ("lora",)}
TEXT = {"task": ("causal_lm", "image_text")}
PACKED = {"task": ("causal_lm",)}
PICTURES = {"task": ("diffusion",)}
of_adapter = partial(key, group="method", only_for=LORA)
of_data = partial(key, group="data")
of_text = partial(key, group="data", only_for=TEXT)
of_training = partial(key, group="training")
of_run = partial(key, group="run")
of_pictures = partial(key, group="pictures", only_for=PICTURES)

TASKS = {
    **dict.fromkeys(["sft", "clm", "text_generation"], "causal_lm"),
    **dict.fromkeys(["classification", "text_classification", "seq_cls"], "sequence_classification"),
    **dict.fromkeys(["ner", "token_cls"], "token_classification"),
    **dict.fromkeys(["image", "images", "vision", "image_cls"], "image_classification"),
    **dict.fromkeys(["image_text_to_text", "vision_language", "vlm", "multimodal"], "image_text"),
    **dict.fromkeys(["detection", "boxes", "object"], "object_detection"),
    **dict.fromkeys(["text_to_image", "dreambooth", "stable_diffusion", "sdxl", "sd3", "flux"], "diffusion"),
    **dict.fromkeys(["text2text", "seq_2_seq_lm"], "seq2seq"),
}

OPTIMIZERS = {
    **dict.fromkeys(["adamw_torch", "adamw_torch_fused", "adamw_hf", "adam", "adamw_apex_fused"], "adamw"),
    **dict.fromkeys(["adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "adam8bit", "adamw_torch_8bit"], "adamw8bit"),
    **dict.fromkeys(["paged_adamw", "paged_adamw_32bit", "adamw_offload"], "adamw_host"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One field per key. `resolve` makes one and reads, checks and remembers origins; `Settings(r=8)` trusts you."""

    # The subject
    model: str | None = key(
        None, "path", optional(parse.text), "The base model: a folder or a hub id.", group="subject"
    )
    data: str | tuple[str, ...] | None = key(
        None, "path", optional(parse.paths), "Training data: a file, a folder, a hub id, or several.", group="subject"
    )

    # The method
    task: str = choice(
        "causal_lm",
        "causal_lm sequence_classification token_classification seq2seq image_classification object_detection "
        "image_text diffusion",
        "What is learned: answers (causal_lm), a label per text, word or image, text from text, boxes on images, "
        "answers about images, or pictures.",
        also=TASKS, group="method",
    )  # fmt: skip
    method: str = choice(
        "lora", "lora full freeze",
        "How: low-rank adapters, all weights, or all weights of the last layers only.", group="method",
    )  # fmt: skip
    r: int = of_adapter(16, "whole", whole(1), "Rank of the adapters.")
    alpha: float | None = of_adapter(
        None,
        "number",
        optional(number(0)),
        "Strength of the adapters: dW is alpha / r times B A.",
        rule="twice the rank",
    )
    dropout: float = of_adapter(
        0.0, "number", number(0, 0.95), "Share of the adapters' input that is dropped while training."
    )
    targets: str | tuple[str, ...] = of_adapter(
        "all-linear", "names", parse.targets,
        "Layers to adapt: minimal (q, v), attention (q, k, v, o), all-linear, language or vision (one tower), a "
        "regular expression, or name endings.",
    )  # fmt: skip
    exclude: tuple[str, ...] = of_adapter((), "names", parse.names, "Layers to leave alone among the targets.")
    modules_to_save: tuple[str, ...] = of_adapter(
        (), "names", parse.names,
        "Modules trained in full and saved with the adapter. A new classification head is added by itself.",
    )  # fmt: skip
    token_rows: tuple[int, ...] | dict[str, tuple[int, ...]] = of_adapter(  # noqa: RUF009 - see above
        (), "text", parse.token_rows,
        "Tokens whose rows of the embedding are trained too, and nothing else of it: 32000-32007, or [32000, 32001].",
    )  # fmt: skip
    tied: str = choice(
        "refuse", "refuse together apart",
        "A target whose weight another layer shares (embedding, head): refuse it, adapt both together, or it apart.",
        group="method", only_for=LORA,
    )  # fmt: skip
    layers: int | tuple[int, ...] | None = key(
        None, "text", parse.layers,
        "Which layers: the last so many, or a list such as 0-7,12; with method freeze 0 is the head alone.",
        rule="all of them; with method freeze the last 2", group="method", only_for={"method": ("lora", "freeze")},
    )  # fmt: skip
    delta: str = of_adapter(
        "lora", "text", parse.text,
        "What is learned per layer: lora, adalora, vera, lora_fa, lora_xs, loha, lokr, block.",
    )  # fmt: skip
    options: dict[str, Any] = of_adapter(  # noqa: RUF009 - the field is made with a factory
        {}, "mapping", parse.options, "What only this delta or init knows: factor=8 (lokr), target_rank=4 (adalora)."
    )
    combine: str = choice(
        "add", "add dora", "How dW joins W: added, or as DoRA's magnitude and direction.", group="method", only_for=LORA
    )
    init: str = of_adapter(
        "kaiming", "text", parse.text,
        "Where A and B start: kaiming, gaussian, orthogonal, pissa, olora; by the data: eva, corda, lora_ga; "
        "by what packing the base lost: loftq.",
    )  # fmt: skip
    scaling: str = choice(
        "lora",
        "lora rslora constant",
        "What dW is scaled by: alpha / r (lora), alpha / sqrt(r) (rslora) or alpha itself (constant).",
        group="method",
        only_for=LORA,
    )
    overrides: dict[str, dict[str, Any]] = of_adapter(  # noqa: RUF009 - the field is made with a factory
        {}, "mapping", parse.overrides, "Pattern -> rank, alpha or dropout that differ there: {q_proj: {rank: 4}}."
    )
    bias: str = choice(
        "none", "none lora lora_only all",
        "Which bias vectors train: none, one inside B (lora), those of the adapted layers, or all.",
        group="method", only_for=LORA,
    )  # fmt: skip
    quant: str = choice("none", "none nf4 int8 fp8", "How the frozen base is stored.", group="method", only_for=LORA)
    quant_rows: int = key(
        32, "whole", whole(0),
        "Training rows that nf4 and fp8 look at before they pack: weights are rounded so that their products are near.",
        unit="rows", group="method", only_for={"method": ("lora",), "quant": ("nf4", "fp8")},
    )  # fmt: skip
    quant_rotate: str = choice(
        "auto", "auto on off",
        "Turn weights and inputs alike before they are rounded to 8 bits. auto is on; off is some per cent faster.",
        group="method", only_for={"method": ("lora",), "quant": ("int8", "fp8")},
    )  # fmt: skip

    # The data
    val: float | int | str | None = of_data(
        None, "text", parse.share_rows_or_path,
        "Held-out data: a share below 1, a number of rows, a file, or 0 for none.",
        rule="what the data brings for this, else 5 % of it and at most 200 rows",
    )  # fmt: skip
    columns: dict[str, str] = of_data(  # noqa: RUF009 - the field is made with a factory
        {}, "mapping", parse.mapping, "Our column names -> yours, where they differ: prompt=question,completion=answer."
    )
    skip_bad: bool = of_data(
        False, "flag", parse.flag, "Leave out rows that cannot be read, with a count, instead of stopping."
    )
    max_len: int = of_data(
        2048, "whole", whole(8), "Longest sample.", unit="tokens", rule="lowered to what the model can take"
    )
    overlong: str = choice("drop", "drop truncate split error", "What happens to longer samples.", group="data")
    packing: str = choice(
        "auto", "auto on off", "Several samples in one row, none of which can see another.",
        also={True: "on", False: "off"}, rule="on where the model can keep samples apart",
        group="data", only_for=PACKED,
    )  # fmt: skip
    loss_on: str = choice(
        "assistant", "assistant completions last all",
        "Which tokens are trained: the assistant's turns, the completion, the last turn, or everything.",
        group="data", only_for=TEXT,
    )  # fmt: skip
    template: str | None = of_text(
        None, "text", optional(parse.text), "Chat template: a name, or a .jinja file.", rule="the tokenizer's own"
    )
    augment: str = choice(
        "none", "none flip crop",
        "Another view of a training picture each time: its mirror image half of the time, or a piece of it as well.",
        group="data", only_for={"task": ("image_classification",)},
    )  # fmt: skip
    system: str | None = of_text(None, "text", optional(parse.text), "System prompt for rows that have none.")

    # The training
    lr: float | str = of_training(
        "auto", "number", parse.auto_or(number(1e-12, 10)), "Peak learning rate.",
        rule="from the size of the model, the method and the rank; the reason is printed",
    )  # fmt: skip
    optimizer: str = choice(
        "adamw", "adamw adamw8bit adamw_host lora_fa",
        "AdamW; with moments of one byte (adamw8bit) or in host memory (adamw_host); or on the best gradient for delta "
        "lora_fa's frozen A (lora_fa).",
        also=OPTIMIZERS, group="training",
    )  # fmt: skip
    lora_plus_ratio: float = key(
        1.0, "number", number(0.01, 1000), "LoRA+: how many times faster B learns than A (16 is usual).",
        group="training", only_for=LORA,
    )  # fmt: skip
    schedule: str = choice(
        "cosine", "cosine linear constant", "How the learning rate falls after the warm-up.", group="training"
    )
    warmup: float = of_training(
        0.03, "number", number(0), "Warm-up: a share of all steps below 1, else steps.", unit="share or steps"
    )
    epochs: float = of_training(
        3.0, "number", number(0.001), "Passes over the data, unless steps is given.", unit="passes"
    )
    steps: int | None = of_training(
        None, "whole", optional(whole(1)), "Optimiser steps.", unit="steps", rule="from epochs"
    )
    batch_size: int = of_training(
        8,
        "whole",
        whole(1),
        "Rows in memory at once. Halved when memory runs out; the global batch stays.",
        unit="rows",
    )
    global_batch: int | None = of_training(
        None, "whole", optional(whole(1)), "Rows per optimiser step.", unit="rows", rule="batch_size"
    )
    weight_decay: float = of_training(0.0, "number", number(0, 1), "AdamW's decay of trained matrices.")
    clip: float = of_training(1.0, "number", number(0), "Largest norm of the gradient; 0 for no limit.")
    eval_every: int | None = of_training(
        None, "whole", optional(whole(0)), "Evaluate every so many steps; 0 only at the end.", unit="steps",
        rule="ten times a run",
    )  # fmt: skip
    patience: int = of_training(
        0, "whole", whole(0), "Stop after so many evaluations without a better loss; 0 never.", unit="evaluations"
    )
    seed: int = of_training(0, "whole", whole(0), "Two runs with one seed on one machine give the same adapter.")
    precision: str = choice(
        "auto", "auto fp32 bf16", "Type of the base and of its arithmetic; what is trained stays in fp32.",
        also={"float32": "fp32", "32": "fp32", "bfloat16": "bf16"},
        rule="bf16 where the device is fast at it, else fp32", group="training",
    )  # fmt: skip
    recompute: str = choice(
        "auto", "auto none gate_up middle input offload tiled",
        "What is computed twice instead of kept: none, parts of a block, all but its input, that on the host too, or "
        "that and blocks a few thousand tokens at a time, for very long rows.",
        also={True: "input", False: "none", "full": "input", "unsloth": "input"}, group="training",
        rule="the first that fits, by the memory model; the longest batch is tried before the first step",
    )  # fmt: skip
    fuse: str = choice(
        "auto", "auto off on", "Run decoder blocks as functions written by hand: faster on a GPU, and less is kept.",
        also={True: "on", False: "off"}, group="training",
        rule="on where a low-rank adapter is trained on blocks that are known and gain by it; not narrow ones on a CPU",
    )  # fmt: skip

    ema: float = of_training(
        0.0, "number", number(0, 0.99999), "Decay of a moving average of what is trained, which is then saved; 0: no.",
    )  # fmt: skip

    # Pictures: what only the task diffusion has
    resolution: int | None = of_pictures(
        None, "whole", optional(whole(8)), "Side of a square picture, and the root of every bucket's area.",
        unit="pixels", rule="what the model was made for",
    )  # fmt: skip
    buckets: bool = of_pictures(
        True, "flag", parse.flag, "Pictures keep their proportions, in buckets of one area; no: all are cut square."
    )
    captions: str = of_pictures(
        "auto", "text", parse.text,
        "Where words come from: auto, files (x.txt, tables), folders (their names), none; or one text for all.",
    )  # fmt: skip
    trigger: str | None = of_pictures(
        None, "text", optional(parse.text), "The word that stands for [trigger] in captions and prompts."
    )
    caption_dropout: float = of_pictures(
        0.0, "number", number(0, 1), "Share of pictures that are trained without words, for guidance."
    )
    text_encoders: bool = of_pictures(
        False, "flag", parse.flag, "Adapt the CLIP text encoders too, and train them beside the denoiser."
    )
    convolutions: bool = of_pictures(
        False, "flag", parse.flag, "Adapt the UNet's convolutions too (LoCon), besides what targets says."
    )
    prediction: str = choice(
        "auto", "auto epsilon v_prediction sample flow",
        "What the model is known to predict; anything but what its scheduler says is refused.",
        group="pictures", only_for=PICTURES, rule="the pipeline's scheduler says",
    )  # fmt: skip
    times: str = choice(
        "auto", "auto uniform logit_normal", "How times are drawn; steps of noise always evenly.",
        group="pictures", only_for=PICTURES, rule="logit_normal for flow matching",
    )  # fmt: skip
    min_snr: float = of_pictures(
        0.0, "number", number(0), "Min-SNR weighting, its gamma: 5 is usual, 0 for none; not for flow matching."
    )
    noise_offset: float = of_pictures(
        0.0,
        "number",
        number(0, 1),
        "Noise that is the same in a whole channel: dark and bright pictures (0.05 to 0.1).",
    )
    prior: str | None = of_pictures(
        None, "path", optional(parse.text), "Pictures of the class, so that it is not forgotten (DreamBooth)."
    )
    prior_prompt: str | None = of_pictures(
        None, "text", optional(parse.text),
        "Words for the pictures of the class; without prior, the base paints them first.",
    )  # fmt: skip
    prior_images: int = of_pictures(100, "whole", whole(1), "How many pictures of the class the base paints.")
    prior_weight: float = of_pictures(1.0, "number", number(0), "How much a picture of the class counts.")
    cache: str = choice(
        "all", "all latents texts none", "What is computed once and kept in memory: pictures as latents, captions as "
        "embeddings.", also={True: "all", False: "none"}, group="pictures", only_for=PICTURES,
    )  # fmt: skip
    sample_prompts: tuple[str, ...] = of_pictures(
        (), "names", parse.prompts, "Prompts painted during the run: a list, texts parted by |, or a .txt file.",
        rule="the first four captions",
    )  # fmt: skip
    sample_every: int | None = of_pictures(
        None, "whole", optional(whole(0)), "Paint every so many steps, always with the same seeds; 0 only at the ends.",
        unit="steps", rule="five times a run",
    )  # fmt: skip
    sample_steps: int = of_pictures(25, "whole", whole(1), "Denoising steps of such a picture.", unit="steps")
    sample_guidance: float | None = of_pictures(
        None, "number", optional(number(0)), "Its guidance scale.", rule="the pipeline's own"
    )

    # How the run is kept: none of these changes what is learned
    graphs: str = choice(
        "auto", "auto off on",
        "Record fused blocks as CUDA graphs: no waiting for Python. Batches of words are filled up to one shape.",
        also={True: "on", False: "off"}, group="run",
        rule="on on a GPU where pictures have one size, and where filling batches up costs next to nothing",
    )  # fmt: skip
    save_every: int | None = of_run(
        None, "whole", optional(whole(1)), "Checkpoint every so many steps.", unit="steps",
        rule="at each evaluation, and at least every 100",
    )  # fmt: skip
    out: str | None = of_run(None, "path", optional(parse.text), "Folder of this run.", rule="runs/<name>")
    name: str | None = of_run(
        None, "text", optional(parse.text), "Name of this run.", rule="from the data and the date"
    )
    resume: str | None = of_run(None, "path", optional(parse.folder), "Go on with a run: its folder, or last.")
    yes: bool = of_run(
        False, "flag", parse.flag, "Go on where you would be asked, as when much of the data is over-long."
    )


def _keys() -> dict[str, Key]:
    return {each.name: Key(name=each.name, **each.metadata) for each in dataclasses.fields(Settings)}


KEYS: dict[str, Key] = _keys()
TAKE_MAPPINGS = ("rank_pattern", "alpha_pattern", "token_rows", "trainable_token_indices")
FOLLOWED = {"grad_accum": "global_batch", "scale": "alpha"}  # deferred keys -> what they become


class Origin(NamedTuple):
    """Where a value came from: `how` is default, file, call, flag or rule; `note` is the place or the reason."""

    how: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.how}: {self.note}" if self.note else self.how


class Resolved(NamedTuple):
    settings: Settings
    origins: dict[str, Origin]
    notices: list[str]

    def settled(self, name: str, value: Any, reason: str) -> Resolved:
        """The same, with a value that a rule worked out and the reason for it."""
        return Resolved(
            dataclasses.replace(self.settings, **{name: value}),
            {**self.origins, name: Origin("rule", reason)},
            self.notices,
        )


class Reads:
    """The settings, as the rules settle them one by one. What was read is remembered: a key that is given and read by
    nobody would have no effect, and proof P0 says so."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved
        self.consumed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.resolved.settings, name)
        self.consumed.add(name)
        return value

    def settle(self, name: str, value: Any, reason: str) -> None:
        self.resolved = self.resolved.settled(name, value, reason)

    @property
    def given(self) -> dict[str, str]:
        """The keys that somebody set, and where; but not those that mean nothing here and have their default."""
        settings, origins = self.resolved.settings, self.resolved.origins.items()
        said = {name: str(origin) for name, origin in origins if origin.how in ("file", "call", "flag")}
        return {name: where for name, where in said.items() if applies(KEYS[name], settings)}


class Given(NamedTuple):
    value: Any
    origin: Origin
    rank: int  # a later source wins over an earlier one


def applies(key: Key, settings: Settings) -> bool:
    """Whether a key means anything with these settings."""
    return all(getattr(settings, other) in allowed for other, allowed in key.only_for.items())


def resolve(
    file: str | Path | None = None, mapping: Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None
) -> Resolved:
    """Settings from a YAML file, a mapping (a Python call) and flags; later ones win. All problems are raised at once.

    >>> resolve(mapping={"lora_r": "8", "train-on-inputs": True}).notices
    ["'lora_r' is called 'r' here", "'train_on_inputs' is read as loss_on: all"]
    """
    given: dict[str, Given] = {}
    problems: list[str] = []
    notices: list[str] = []
    sources = [_from_file(file, problems), _from_mapping(mapping, "call"), _from_mapping(flags, "flag")]
    for rank, rows in enumerate(sources):
        found: dict[str, Given] = {}
        for name, value, origin in rows:
            for own, each in _canonical(name, value, origin, problems, notices).items():
                if own in found and found[own].value != each:
                    problems.append(f"{_at(origin)}{own!r} is said twice: {found[own].value!r} and {each!r}")
                found[own] = Given(each, origin, rank)
        given |= found
    _finish_deferred(given, problems)
    _one_length(given, notices)
    settings = Settings(**{name: each.value for name, each in given.items()}) if not problems else None
    problems += _contradictions(settings, given) if settings else []
    if problems or settings is None:
        place = str(file) if file else None
        raise ConfigError(_headline(problems), where=place, fix="see `veneer train --help`", problems=problems)
    origins = {name: given[name].origin if name in given else Origin("default") for name in KEYS}
    return _rules(Resolved(settings, origins, notices))


def explain(name: str) -> str:
    """All there is to say about one key, under any of its names."""
    own = name.replace("-", "_").lstrip("_")
    if own not in KEYS:
        own = FOLLOWED.get(own) or next(iter(_targets_of(own)), own)
    if own not in KEYS:
        raise ConfigError(f"no setting named {name!r}.{near(own, [*KEYS, *ALIASES])}")
    it = KEYS[own]
    rows = {
        "flag": it.flag,
        "kind": f"{it.kind}{f' ({it.unit})' if it.unit else ''}",
        "choices": ", ".join(it.choices),
        "default": "not set" if it.default in (None, (), {}) else str(it.default),
        "when not set": it.rule,
        "only for": "; ".join(f"{other} {' or '.join(values)}" for other, values in it.only_for.items()),
        "also called": ", ".join(it.aliases),
    }
    return "\n".join([f"{own}: {it.help}", *(f"  {label:<13} {value}" for label, value in rows.items() if value)])


# ------------------------------------------------------------------ from names to keys


def _canonical(name: str, value: Any, origin: Origin, problems: list[str], notices: list[str]) -> dict[str, Any]:
    """Our keys and checked values for one foreign or own key. Problems and notices are added to the lists."""
    if name == "method" and str(value).lower() in VARIANTS:
        found = {"method": "lora", **VARIANTS[str(value).lower()]}
        notices.append(_notice(name, value, found))
        return found
    if name in NOT_NEEDED:
        notices.append(f"{name!r} is not needed: {NOT_NEEDED[name]}")
        return {}
    try:
        if name in KEYS or name in DEFERRED:
            return {name: KEYS[name].read(value) if name in KEYS else DEFERRED[name](value)}
        if name in ALIASES:
            found = {own: _reader(own)(inner) for own, inner in ALIASES[name](value).items()}
            notices.append(_notice(name, value, found))
            return found
    except ValueError as error:
        problems.append(f"{_at(origin)}{name}: {error}")
        return {}
    problems.append(f"{_at(origin)}{_unknown(name)}")
    return {}


def _reader(own: str) -> Reader:
    return KEYS[own].read if own in KEYS else DEFERRED[own]


def _notice(name: str, value: Any, found: dict[str, Any]) -> str:
    if len(found) == 1:
        own = next(iter(found))
        if own in _targets_of(name) and ALIASES[name](value) == {own: value}:
            return f"{name!r} is called {own!r} here"
    said = ", ".join(f"{own}: {_shown(inner)}" for own, inner in found.items())
    return f"{name!r} is read as {said}" if said else f"{name!r} = {value} says what is so anyway"


def _unknown(name: str) -> str:
    *section, last = name.split(".")
    if section and (last in KEYS or last in ALIASES):
        return f"unknown section {'.'.join(section)!r}: settings are flat here, write {last!r} at the top level"
    if section:
        return f"unknown section {'.'.join(section)!r} with {last!r}: settings are flat here.{near(last, KEYS)}"
    meant = near(name, KEYS) or near(name, ALIASES)
    return f"unknown setting {name!r}.{meant}"


def _finish_deferred(given: dict[str, Given], problems: list[str]) -> None:
    """`grad_accum` needs batch_size, `scale` needs r; each gives way to the key it stands for in a later source."""
    for name, factor in [("grad_accum", "batch_size"), ("scale", "r")]:
        own = FOLLOWED[name]
        if name not in given:
            continue
        said = given.pop(name)
        times = given[factor].value if factor in given else KEYS[factor].default
        if own in given and given[own].rank == said.rank and given[own].value != said.value * times:
            problems.append(
                f"{name} {said.value:g} x {factor} {times} is not {own} {given[own].value:g}: say one of them"
            )
        elif own not in given or given[own].rank < said.rank:
            note = f"{said.origin.note}, {name} {said.value:g} x {factor} {times}".strip(", ")
            given[own] = Given(_reader(own)(said.value * times), Origin(said.origin.how, note), said.rank)


def _one_length(given: dict[str, Given], notices: list[str]) -> None:
    """steps and epochs both say how long: the later source wins, and within one source steps does."""
    if "steps" not in given or "epochs" not in given or given["steps"].value is None:
        return
    if given["steps"].rank >= given["epochs"].rank:
        if given["epochs"].value != KEYS["epochs"].default:
            notices.append(f"steps: {given['steps'].value} counts, and epochs: {given['epochs'].value:g} does not")
        given.pop("epochs")
    else:
        given.pop("steps")


def _contradictions(settings: Settings, given: dict[str, Given]) -> list[str]:
    """Settings that would be read by nobody, and pairs that cannot both hold."""
    found = []
    for name, (value, origin, _) in given.items():
        if value != KEYS[name].default and not applies(KEYS[name], settings):
            now = ", ".join(f"{other}: {getattr(settings, other)}" for other in KEYS[name].only_for)
            meant = " and ".join(" or ".join(allowed) for allowed in KEYS[name].only_for.values())
            found.append(f"{_at(origin)}{name} has no effect with {now}; it is for {meant}. Leave it out")
    if settings.method == "freeze" and not isinstance(settings.layers, (int, type(None))):
        found.append("layers: with method freeze say how many of the last layers train, as a number")
    if settings.init == "loftq" and settings.quant == "none":
        found.append("init: loftq starts from what packing the base loses. Say how it is packed, quant: nf4")
    if settings.task == "diffusion" and settings.method != "lora":
        found.append(f"method {settings.method}: the task diffusion trains adapters only")
    if settings.task == "diffusion" and settings.init == "loftq":
        found.append("init: loftq reads the base's files as it packs them, and a pipeline is packed when it is loaded")
    for name in ("prior_images", "prior_weight"):
        if name in given and settings.task == "diffusion" and not (settings.prior or settings.prior_prompt):
            found.append(f"{name} has no effect without prior or prior_prompt. Leave it out")
    if "prior_images" in given and settings.prior:
        found.append("prior_images has no effect with prior, whose pictures are taken. Leave it out")
    if settings.optimizer == "lora_fa" and settings.delta != "lora_fa":
        found.append(f"optimizer lora_fa is for delta lora_fa, whose A is frozen, not for {settings.delta}")
    if settings.global_batch is not None and settings.global_batch < settings.batch_size and "batch_size" in given:
        found.append(f"global_batch {settings.global_batch} is smaller than batch_size {settings.batch_size}")
    for name in ("patience", "eval_every"):
        if settings.val == 0 and getattr(settings, name):
            found.append(f"{name} has no effect with val: 0, which leaves nothing to evaluate on. Leave it out")
    return found


def _rules(found: Resolved) -> Resolved:
    """The values that follow from other settings alone. Those that need the model or the data are settled later."""
    settings = found.settings
    if settings.alpha is None and settings.method == "lora" and settings.scaling == "constant":
        found = found.settled("alpha", 2.0, "2, the scale that twice the rank gives elsewhere")
    elif settings.alpha is None and settings.method == "lora":
        found = found.settled("alpha", 2.0 * settings.r, f"2 x r = {2 * settings.r}")
    if settings.global_batch is None:
        found = found.settled("global_batch", settings.batch_size, "one batch per step")
    elif settings.global_batch < settings.batch_size:
        found = found.settled("batch_size", settings.global_batch, "no more rows than a step has")
    if settings.layers is None and settings.method == "freeze":
        found = found.settled("layers", 2, "the last 2, as none were named")
    return found


# ------------------------------------------------------------------ the sources


Row = tuple[str, Any, Origin]


def _from_mapping(given: Mapping[str, Any] | None, how: str) -> list[Row]:
    rows: list[Row] = []
    for name, value in (given or {}).items():
        own = name.lstrip("-").replace("-", "_")
        rows += _flat(own, value, Origin(how, name if how == "flag" else ""))
    return rows


def _flat(name: str, value: Any, origin: Origin) -> list[Row]:
    """A nested section as dotted keys, unless the key takes a mapping."""
    takes_mapping = (name in KEYS and KEYS[name].kind == "mapping") or name in TAKE_MAPPINGS
    if takes_mapping or not isinstance(value, Mapping):
        return [(name, value, origin)]
    return [row for inner, each in value.items() for row in _flat(f"{name}.{inner}", each, origin)]


def _from_file(file: str | Path | None, problems: list[str]) -> list[Row]:
    if file is None:
        return []
    import yaml

    path = Path(file)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings: {error}", where=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', error)}", where=where) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("a settings file is a list of `key: value` lines", where=f"{path}:{root.start_mark.line + 1}")
    loader = yaml.SafeLoader("")
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        name, line = str(key_node.value).replace("-", "_"), key_node.start_mark.line + 1
        if name in seen:
            problems.append(f"{path.name}:{line}: {name!r} stands here a second time; first on line {seen[name]}")
            continue
        seen[name] = line
        value = loader.construct_object(value_node, deep=True)
        rows += _flat(name, value, Origin("file", f"{path.name}:{line}"))
    return rows


# ------------------------------------------------------------------ words


@cache
def _aliases_of() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for alias in ALIASES:
        for own in _targets_of(alias):
            found.setdefault(own, []).append(alias)
    return {own: tuple(names) for own, names in found.items()}


@cache
def _targets_of(alias: str) -> tuple[str, ...]:
    """Which of our keys an alias sets, found by trying the values people write."""
    for sample in (True, 1, 0.5, "lora", "assistant", "nf4", {"x": 1}):
        try:
            if found := ALIASES.get(alias, lambda _: {})(sample):
                return tuple(FOLLOWED.get(own, own) for own in found)
        except ValueError:
            continue
    return ()


def _headline(problems: list[str]) -> str:
    return "1 setting is wrong" if len(problems) == 1 else f"{len(problems)} settings are wrong"


def _at(origin: Origin) -> str:
    return f"{origin.note}: " if origin.how == "file" and origin.note else ""


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) and all(isinstance(part, str) for part in value) else str(value)
