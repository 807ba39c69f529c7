"""What a model is made of, read from its config.json alone: no weight is read and nothing is built.

    Shapes            the whole model: blocks, embeddings, the head that makes logits, a task's head
      Block           one kind of transformer block, repeated `count` times under names like "model.layers.{}"
        Matrix        one weight (out, in), and which of the block's tensors it multiplies

Every number that `advise` gives - bytes, FLOPs, adapter parameters - is a sum over these. A model family is one
function in FAMILIES that turns config keys into Shapes; the tests hold each to the parameter count and the names of the
model that transformers builds on the meta device. A family that is not there is taken for Llama-like, and `assumed`
says so. No torch here: `veneer recommend` answers before torch would have been imported.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from veneer.errors import ConfigError

__all__ = ["FAMILIES", "Block", "Matrix", "Shapes", "bytes_of", "shapes_of"]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class Matrix:
    """A weight (out, n). `reads` names the tensor it multiplies: matrices that read the same one share its copy."""

    name: str
    out: int
    n: int
    reads: str
    bias: bool = False
    copies: int = 1  # experts: that many weights of this shape
    adaptable: bool = True  # fused experts and routers are no Linear: nothing is attached to them

    @property
    def parameters(self) -> int:
        return self.copies * self.out * (self.n + self.bias)


@dataclass(frozen=True, kw_only=True)
class Block:
    path: str  # "model.layers.{}"
    count: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mid: int  # width inside the MLP
    matrices: tuple[Matrix, ...]
    norm: str = "rms"  # or "layer"
    pre_norm: bool = True  # the norm comes before attention and MLP; in BERT and BART after them
    norms: int = 2  # over the hidden width
    head_norms: int = 0  # Qwen3's norms of q and k: parameters beside the others, two activations more
    gated: bool = True  # act(gate) * up, against act(up)
    activation: str = "silu"
    rope: bool = True
    causal: bool = True
    cross: bool = False  # a decoder block that also attends to the encoder
    dropout: float = 0.0  # the base's own, active in training
    dropouts: int = 2  # how often it acts on the hidden width in one block
    attention_dropout: float = 0.0
    experts_per_token: int = 1  # how many of the copies run for one token
    mid_dropout: float = 0.0  # inside the MLP, as in T5
    other: int = 0  # parameters of a block that are in no matrix and no norm

    @property
    def parameters(self) -> int:
        """Of one block."""
        width = self.hidden * (1 if self.norm == "rms" else 2)
        return (
            sum(m.parameters for m in self.matrices) + self.norms * width + self.head_norms * self.head_dim + self.other
        )


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A model as sums need it."""

    family: str
    task: str  # "causal_lm", "seq2seq", "sequence_classification" or "token_classification"
    blocks: tuple[Block, ...]
    hidden: int
    embeddings: int  # parameters that are looked up: tokens, positions, types
    vocab: int = 0  # width of the logits; 0: the model makes none
    head: Matrix | None = None  # makes the logits; its weight is the embedding's when tied
    tied: bool = False
    tail: tuple[Matrix, ...] = ()  # outside the blocks: poolers, projections, a classifier
    other: int = 0  # final norms, class tokens
    tokens_fixed: int | None = None  # an image model's sequence length is a fact, not a choice
    assumed: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return sum(b.count for b in self.blocks)

    @property
    def parameters(self) -> int:
        head = self.head.parameters - (self.vocab * self.head.n if self.tied else 0) if self.head else 0
        outside = self.embeddings + head + sum(m.parameters for m in self.tail) + self.other
        return outside + sum(b.count * b.parameters for b in self.blocks)

    @property
    def packable(self) -> int:
        """Parameters that a quantised storage packs: the blocks' matrices, without biases. Head and embedding stay."""
        return sum(b.count * m.copies * m.out * m.n for b in self.blocks for m in b.matrices)

    @property
    def active_parameters(self) -> int:
        """Parameters that multiply one token: all matrices, of experts those that run, and the head."""
        head = self.head.out * self.head.n if self.head else 0
        return head + sum(b.count * m.out * m.n * _runs(b, m) for b in self.blocks for m in b.matrices)

    def linears(self) -> tuple[tuple[str, Matrix, Block | None, int], ...]:
        """Every linear layer but the head: (full name, matrix, block, index of the block)."""
        return self._linears

    @cached_property
    def _linears(self) -> tuple[tuple[str, Matrix, Block | None, int], ...]:
        return tuple(self._named())

    def _named(self) -> Iterator[tuple[str, Matrix, Block | None, int]]:
        for block in self.blocks:
            for i in range(block.count):
                for matrix in block.matrices:
                    if matrix.adaptable:
                        yield f"{block.path.format(i)}.{matrix.name}", matrix, block, i
        for matrix in self.tail:
            yield matrix.name, matrix, None, -1


def _runs(block: Block, matrix: Matrix) -> int:
    return min(matrix.copies, block.experts_per_token)


# Finding the config ------------------------------------------------------------------------------------------------


def shapes_of(model: Any, task: str | None = None, labels: int = 2) -> Shapes:
    """Shapes of a folder, config.json, hub id, config object or mapping, model, or a size such as "8B" or 8e9.

    >>> shapes_of("8B").parameters / 1e9
    8.030261248
    """
    if isinstance(model, Shapes):
        return model
    if isinstance(model, (int, float)) and not isinstance(model, bool):
        return _typical(float(model), f"{model:g} parameters")
    if isinstance(model, Mapping):
        return _from_config(dict(model), "the given mapping", task, labels)
    if isinstance(model, (str, Path)):
        return _from_name(str(model), task, labels)
    config: Any = model if hasattr(model, "to_dict") else getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        task = task or _task_of_class(type(model).__name__ if config is not model else "")
        return _from_config(config.to_dict(), type(model).__name__, task, labels)
    raise ConfigError(
        f"cannot read shapes from {type(model).__name__}",
        fix="give a folder with config.json, a config, a transformers model, or a size such as '8B'",
    )


def _from_name(name: str, task: str | None, labels: int) -> Shapes:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MB])", name.strip(), re.IGNORECASE)
    if size:
        return _typical(float(size[1]) * {"m": 1e6, "b": 1e9}[size[2].lower()], name)
    path = find_config(name)
    if path is not None:
        return _from_config(_read_json(path), str(path), task, labels)
    inside = re.search(r"(\d+(?:\.\d+)?)(M|B)(?![a-z0-9])", name.rsplit("/", 1)[-1], re.IGNORECASE)
    if inside is None or Path(name).exists() or name.startswith((".", "/")):
        raise ConfigError(
            f"no config.json for {name!r}",
            where=name,
            fix="give a folder that holds config.json, a hub id that is in the local cache, or a size such as '8B'",
        )
    found = _typical(float(inside[1]) * {"m": 1e6, "b": 1e9}[inside[2].lower()], inside[0])
    return replace(
        found, assumed=(f"no config.json of {name!r} on this machine: its size is read from the name", *found.assumed)
    )


def find_config(name: str) -> Path | None:
    """config.json of a folder, or of a hub id that is in the local cache. Nothing is downloaded."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if (path / "config.json").is_file():
        return path / "config.json"
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return None
    found = sorted(_hub_cache().glob(f"models--{name.replace('/', '--')}/snapshots/*/config.json"), key=_written)
    return found[-1] if found else None


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _hub_cache() -> Path:
    from os import environ

    home = Path(environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"config.json cannot be read: {error}", where=str(path)) from None
    if not isinstance(found, dict):
        raise ConfigError(f"config.json holds a {type(found).__name__}, not a mapping", where=str(path))
    return found


def _task_of_class(name: str) -> str | None:
    endings = {
        "ForSequenceClassification": "sequence_classification",
        "ForImageClassification": "sequence_classification",
        "ForTokenClassification": "token_classification",
        "ForCausalLM": "causal_lm",
        "LMHeadModel": "causal_lm",
        "ForConditionalGeneration": "seq2seq",
    }
    return next((task for ending, task in endings.items() if name.endswith(ending)), None)


# Reading keys ------------------------------------------------------------------------------------------------------

ALIASES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "model_dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    "mid": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "hidden_dim", "encoder_ffn_dim"),
    "vocab": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts"),
}


class Keys:
    """A config's keys, with every missing one named at once."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def __call__(self, name: str, default: Any = ...) -> Any:
        for key in ALIASES.get(name, (name,)):
            if self.config.get(key) is not None:
                return self._checked(key, self.config[key], default)
        if default is ...:
            raise ConfigError(
                f"the config has no {' or '.join(ALIASES.get(name, (name,)))}",
                where=self.where,
                fix="is this the config.json of a transformer? A size such as '8B' works without one",
            )
        return default

    def _checked(self, key: str, value: Any, default: Any) -> Any:
        counts = default is ... or (isinstance(default, int) and not isinstance(default, bool))
        if counts and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{key} must be a whole number, not {value!r}", where=self.where)
        return value


def _from_config(config: dict[str, Any], where: str, task: str | None, labels: int) -> Shapes:
    notes: tuple[str, ...] = ()
    if isinstance(config.get("text_config"), dict) and "hidden_size" not in config:
        config = {**config["text_config"], "architectures": config.get("architectures")}
        notes = ("only the text part is counted, not the towers for images or sound",)
    name = str(config.get("model_type", "")) or "unknown"
    if task is None:
        task = next((t for a in config.get("architectures") or () if (t := _task_of_class(a))), None)
    labels = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else labels
    family = FAMILIES.get(name)
    if family is None:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f" (near: {near[0]})" if near else ""
        notes += (f"architecture {name!r} is not known{hint}: taken for Llama-like blocks with the config's sizes",)
        family = FAMILIES["llama"]
    found = family(Keys(config, where), task, labels)
    return replace(found, family=name, assumed=notes + found.assumed)


# Families ----------------------------------------------------------------------------------------------------------

Family = Callable[[Keys, "str | None", int], Shapes]
FAMILIES: dict[str, Family] = {}


def family(*names: str, **options: Any) -> Callable[[Callable[..., Shapes]], Callable[..., Shapes]]:
    def add(build: Callable[..., Shapes]) -> Callable[..., Shapes]:
        for name in names:
            FAMILIES[name] = lambda keys, task, labels: build(keys, task, labels, **options)
        return build

    return add


@family("llama", "granite", tied=False)
@family("mistral", tied=False)
@family("qwen2", tied=False, qkv_bias=True)
@family("qwen3", tied=False, head_dim=128, head_norms=2)
@family("smollm3", tied=True)
@family("gemma", tied=True, head_dim=256, activation="gelu")
@family("gemma2", tied=True, head_dim=256, activation="gelu", norms=4)
@family("gemma3_text", tied=True, head_dim=256, activation="gelu", norms=4, head_norms=2)
@family("phi3", tied=False, fused=True)
@family("starcoder2", tied=True, gated=False, norm="layer", bias_key="use_bias")
@family("mixtral", tied=False, experts=True)
@family("qwen3_moe", tied=False, experts=True, mid_key="moe_intermediate_size", head_norms=2)
def _llama_like(
    keys: Keys,
    task: str | None,
    labels: int,
    *,
    tied: bool,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    head_norms: int = 0,
    norms: int = 2,
    norm: str = "rms",
    activation: str = "silu",
    gated: bool = True,
    fused: bool = False,
    bias_key: str | None = None,
    experts: bool = False,
    mid_key: str = "mid",
) -> Shapes:
    """Pre-norm blocks with rotary positions: q, k, v, o and a gated MLP, or experts in its place."""
    hidden, heads = keys("hidden"), keys("heads")
    kv_heads, mid = keys("num_key_value_heads", heads), keys(mid_key)
    dim = keys("head_dim", head_dim or hidden // heads)
    bias = bool(keys(bias_key, True)) if bias_key else False
    qkv_bias = bias or bool(keys("attention_bias", qkv_bias))
    q, kv = heads * dim, kv_heads * dim
    if fused:
        attention = [Matrix("self_attn.qkv_proj", q + 2 * kv, hidden, "x", qkv_bias)]
    else:
        attention = [
            Matrix(f"self_attn.{n}_proj", w, hidden, "x", qkv_bias) for n, w in zip("qkv", (q, kv, kv), strict=True)
        ]
    o_bias = bias or (qkv_bias and bool(keys("attention_bias", False)))
    attention.append(Matrix("self_attn.o_proj", hidden, q, "attention", o_bias))
    mlp_bias = bias or bool(keys("mlp_bias", False))
    count = keys("experts") if experts else 1
    block = Block(
        path="model.layers.{}",
        count=keys("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        mid=mid,
        matrices=(*attention, *_mlp(hidden, mid, mlp_bias, gated, fused, count)),
        norm=norm,
        norms=norms,
        head_norms=head_norms,
        gated=gated,
        activation=activation,
        attention_dropout=float(keys("attention_dropout", 0.0)),
        experts_per_token=keys("num_experts_per_tok", 2) if experts else 1,
    )
    final = hidden * (1 if norm == "rms" else 2)
    return _decoder(keys, task, labels, block, tied=bool(keys("tie_word_embeddings", tied)), final=final)


def _mlp(hidden: int, mid: int, bias: bool, gated: bool, fused: bool, experts: int) -> tuple[Matrix, ...]:
    if experts > 1:
        return (
            Matrix("mlp.gate", experts, hidden, "router", adaptable=False),
            Matrix("mlp.experts.gate_up_proj", 2 * mid, hidden, "y", copies=experts, adaptable=False),
            Matrix("mlp.experts.down_proj", hidden, mid, "product", copies=experts, adaptable=False),
        )
    if fused:
        return Matrix("mlp.gate_up_proj", 2 * mid, hidden, "y"), Matrix("mlp.down_proj", hidden, mid, "product")
    if not gated:
        return Matrix("mlp.c_fc", mid, hidden, "y", bias), Matrix("mlp.c_proj", hidden, mid, "product", bias)
    return (
        Matrix("mlp.gate_proj", mid, hidden, "y", bias),
        Matrix("mlp.up_proj", mid, hidden, "y", bias),
        Matrix("mlp.down_proj", hidden, mid, "product", bias),
    )


@family("gpt2")
def _gpt2(keys: Keys, task: str | None, labels: int) -> Shapes:
    hidden, heads = keys("hidden"), keys("heads")
    mid = keys("mid", 4 * hidden)
    block = Block(
        path="transformer.h.{}",
        count=keys("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mid=mid,
        matrices=(
            Matrix("attn.c_attn", 3 * hidden, hidden, "x", True),
            Matrix("attn.c_proj", hidden, hidden, "attention", True),
            Matrix("mlp.c_fc", mid, hidden, "y", True),
            Matrix("mlp.c_proj", hidden, mid, "product", True),
        ),
        norm="layer",
        gated=False,
        activation=str(keys("activation_function", "gelu_new")),
        rope=False,
        dropout=float(keys("resid_pdrop", 0.1)),
        attention_dropout=float(keys("attn_pdrop", 0.1)),
    )
    positions = keys("n_positions", 1024) * hidden
    tied = bool(keys("tie_word_embeddings", True))
    return _decoder(keys, task, labels, block, tied=tied, final=2 * hidden, positions=positions)


@family("gpt_neox")
def _gpt_neox(keys: Keys, task: str | None, labels: int) -> Shapes:
    hidden, heads, mid = keys("hidden"), keys("heads"), keys("mid")
    bias = bool(keys("attention_bias", True))
    block = Block(
        path="gpt_neox.layers.{}",
        count=keys("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mid=mid,
        matrices=(
            Matrix("attention.query_key_value", 3 * hidden, hidden, "x", bias),
            Matrix("attention.dense", hidden, hidden, "attention", bias),
            Matrix("mlp.dense_h_to_4h", mid, hidden, "y", True),
            Matrix("mlp.dense_4h_to_h", hidden, mid, "product", True),
        ),
        norm="layer",
        gated=False,
        activation=str(keys("hidden_act", "gelu")),
        dropout=float(keys("hidden_dropout", 0.0)),
        attention_dropout=float(keys("attention_dropout", 0.0)),
    )
    return _decoder(keys, task, labels, block, tied=bool(keys("tie_word_embeddings", False)), final=2 * hidden)


@family("opt")
def _opt(keys: Keys, task: str | None, labels: int) -> Shapes:
    hidden = keys("hidden")
    block = _bart_block(keys, "model.decoder.layers.{}", keys("layers"), keys("heads"), keys("mid"), causal=True)
    block = replace(block, activation=str(keys("activation_function", "relu")), pre_norm=True)
    width = keys("word_embed_proj_dim", hidden)
    positions = (keys("max_position_embeddings", 2048) + 2) * hidden
    tied = bool(keys("tie_word_embeddings", True))
    found = _decoder(keys, task, labels, block, tied=tied, final=2 * hidden, positions=positions, width=width)
    if width == hidden:
        return found
    ends = (
        Matrix("model.decoder.project_in", hidden, width, "e"),
        Matrix("model.decoder.project_out", width, hidden, "z"),
    )
    return replace(found, tail=(*found.tail, *ends))


def _decoder(
    keys: Keys,
    task: str | None,
    labels: int,
    block: Block,
    *,
    tied: bool,
    final: int,
    positions: int = 0,
    width: int | None = None,
) -> Shapes:
    """Token embedding, blocks, a last norm, and a head over the vocabulary or over a task's labels."""
    hidden, vocab = block.hidden, keys("vocab")
    width = width or hidden
    task = task or "causal_lm"
    common = {
        "family": "",
        "blocks": (block,),
        "hidden": hidden,
        "embeddings": vocab * width + positions,
        "other": final,
    }
    if task == "causal_lm":
        head = Matrix("lm_head", vocab, width, "z")
        return Shapes(task=task, vocab=vocab, head=head, tied=tied, **common)
    # transformers calls a decoder's classifier "score" but for GPT-2's over tokens
    name = "classifier" if task == "token_classification" and block.path.startswith("transformer.h") else "score"
    return Shapes(task=task, tail=(Matrix(name, labels, hidden, "z", task != "sequence_classification"),), **common)


@family("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2")
def _bert(keys: Keys, task: str | None, labels: int) -> Shapes:
    """Post-norm encoders. `electra` may embed narrower than it computes."""
    hidden, heads, mid, kind = keys("hidden"), keys("heads"), keys("mid"), str(keys.config.get("model_type"))
    prefix = {"xlm-roberta": "roberta", "camembert": "roberta", "deberta-v2": "deberta"}.get(kind, kind)
    attention = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value"}
    block = Block(
        path=f"{prefix}.encoder.layer.{{}}",
        count=keys("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mid=mid,
        matrices=(
            *(Matrix(name, hidden, hidden, "x", True) for name in attention.values()),
            Matrix("attention.output.dense", hidden, hidden, "attention", True),
            Matrix("intermediate.dense", mid, hidden, "y", True),
            Matrix("output.dense", hidden, mid, "product", True),
        ),
        norm="layer",
        pre_norm=False,
        gated=False,
        activation=str(keys("hidden_act", "gelu")),
        rope=False,
        causal=False,
        dropout=float(keys("hidden_dropout_prob", 0.1)),
        attention_dropout=float(keys("attention_probs_dropout_prob", 0.1)),
    )
    width = keys("embedding_size", hidden) if kind == "electra" else hidden
    rows = keys("vocab") + keys("max_position_embeddings", 512) + keys("type_vocab_size", 2)
    tail: tuple[Matrix, ...] = ()
    if width != hidden:
        tail += (Matrix(f"{prefix}.embeddings_project", hidden, width, "e", True),)
    if task != "token_classification":
        dense = f"{prefix}.pooler.dense" if kind == "bert" else "classifier.dense"
        tail += (Matrix(dense, hidden, hidden, "pooled", True),)
    classifier = "classifier" if kind == "bert" or task == "token_classification" else "classifier.out_proj"
    tail += (Matrix(classifier, labels, hidden, "z", True),)
    notes = ("deberta's relative positions are not counted",) if kind == "deberta-v2" else ()
    return Shapes(
        family=kind,
        task=task if task in ("sequence_classification", "token_classification") else "sequence_classification",
        blocks=(block,),
        hidden=hidden,
        embeddings=rows * width,
        tail=tail,
        other=2 * width,
        assumed=notes,
    )


@family("distilbert")
def _distilbert(keys: Keys, task: str | None, labels: int) -> Shapes:
    hidden, heads, mid = keys("hidden"), keys("heads"), keys("mid")
    block = Block(
        path="distilbert.transformer.layer.{}",
        count=keys("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mid=mid,
        matrices=(
            *(Matrix(f"attention.{n}_lin", hidden, hidden, "x", True) for n in "qkv"),
            Matrix("attention.out_lin", hidden, hidden, "attention", True),
            Matrix("ffn.lin1", mid, hidden, "y", True),
            Matrix("ffn.lin2", hidden, mid, "product", True),
        ),
        norm="layer",
        pre_norm=False,
        gated=False,
        activation=str(keys("activation", "gelu")),
        rope=False,
        causal=False,
        dropout=float(keys("dropout", 0.1)),
        dropouts=1,
        attention_dropout=float(keys("attention_dropout", 0.1)),
    )
    token = task == "token_classification"
    tail = () if token else (Matrix("pre_classifier", hidden, hidden, "pooled", True),)
    return Shapes(
        family="distilbert",
        task="token_classification" if token else "sequence_classification",
        blocks=(block,),
        hidden=hidden,
        embeddings=(keys("vocab") + keys("max_position_embeddings", 512)) * hidden,
        tail=(*tail, Matrix("classifier", labels, hidden, "z", True)),
        other=2 * hidden,
    )


@family("vit", "deit", layers="vit.layers.{}", tail_width=1)
@family("dinov2", layers="dinov2.encoder.layer.{}", tail_width=2, scales=True)
def _vit(keys: Keys, task: str | None, labels: int, *, layers: str, tail_width: int, scales: bool = False) -> Shapes:
    hidden, heads, image, patch = keys("hidden"), keys("heads"), keys("image_size", 224), keys("patch_size", 16)
    mid = keys("mid", hidden * keys("mlp_ratio", 4))
    bias = bool(keys("qkv_bias", True))
    block = Block(
        path=layers,
        count=keys("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mid=mid,
        matrices=(
            *(Matrix(f"attention.{n}_proj", hidden, hidden, "x", bias) for n in "qkv"),
            Matrix("attention.o_proj", hidden, hidden, "attention", True),
            Matrix("mlp.fc1", mid, hidden, "y", True),
            Matrix("mlp.fc2", hidden, mid, "product", True),
        ),
        norm="layer",
        gated=False,
        activation=str(keys("hidden_act", "gelu")),
        rope=False,
        causal=False,
        dropout=float(keys("hidden_dropout_prob", 0.0)),
        attention_dropout=float(keys("attention_probs_dropout_prob", 0.0)),
        other=2 * hidden if scales else 0,
    )
    tokens = (image // patch) ** 2 + 1
    projection = hidden * (keys("num_channels", 3) * patch * patch + 1)
    return Shapes(
        family="vit",
        task="sequence_classification",
        blocks=(block,),
        hidden=hidden,
        embeddings=(tokens + 1 + scales) * hidden + projection,
        tail=(Matrix("classifier", labels, tail_width * hidden, "z", True),),
        other=2 * hidden,
        tokens_fixed=tokens,
    )


@family("t5", "mt5")
def _t5(keys: Keys, task: str | None, labels: int) -> Shapes:
    hidden, heads, dim, mid = keys("hidden"), keys("heads"), keys("d_kv", 64), keys("mid")
    gated = "gated" in str(keys("feed_forward_proj", "relu"))
    inner = heads * dim

    def attention(name: str, reads: str) -> tuple[Matrix, ...]:
        sources = (reads, "encoder", "encoder") if reads == "c" else (reads,) * 3
        qkv = tuple(Matrix(f"{name}.{n}", inner, hidden, source) for n, source in zip("qkv", sources, strict=True))
        return (*qkv, Matrix(f"{name}.o", hidden, inner, "attention" if reads == "x" else "cross"))

    def block(side: str, count: int, cross: bool) -> Block:
        mlp = f"layer.{1 + cross}.DenseReluDense"
        into = ("wi_0", "wi_1") if gated else ("wi",)
        return Block(
            path=f"{side}.block.{{}}",
            count=count,
            hidden=hidden,
            heads=heads,
            kv_heads=heads,
            head_dim=dim,
            mid=mid,
            matrices=(
                *attention("layer.0.SelfAttention", "x"),
                *(attention("layer.1.EncDecAttention", "c") if cross else ()),
                *(Matrix(f"{mlp}.{n}", mid, hidden, "y") for n in into),
                Matrix(f"{mlp}.wo", hidden, mid, "product"),
            ),
            norms=3 if cross else 2,
            gated=gated,
            activation=str(keys("feed_forward_proj", "relu")).removeprefix("gated-"),
            rope=False,
            causal=cross,
            cross=cross,
            dropouts=3 if cross else 2,
            dropout=float(keys("dropout_rate", 0.1)),
            attention_dropout=float(keys("dropout_rate", 0.1)),
            mid_dropout=float(keys("dropout_rate", 0.1)),
        )

    layers, vocab = keys("layers"), keys("vocab")
    decoder_layers = keys("num_decoder_layers", layers)
    bias = 2 * keys("relative_attention_num_buckets", 32) * heads
    return Shapes(
        family="t5",
        task="seq2seq",
        blocks=(block("encoder", layers, False), block("decoder", decoder_layers, True)),
        hidden=hidden,
        embeddings=vocab * hidden + bias,
        vocab=vocab,
        head=Matrix("lm_head", vocab, hidden, "z"),
        tied=bool(keys("tie_word_embeddings", True)),
        other=2 * hidden,
    )


def _bart_block(
    keys: Keys, path: str, count: int, heads: int, mid: int, *, causal: bool = False, cross: bool = False
) -> Block:
    hidden = keys("hidden")

    def attention(name: str, reads: str) -> tuple[Matrix, ...]:
        sources = ("encoder", "encoder", reads) if reads == "c" else (reads,) * 3
        qkv = (Matrix(f"{name}.{n}_proj", hidden, hidden, s, True) for n, s in zip("kvq", sources, strict=True))
        return (*qkv, Matrix(f"{name}.out_proj", hidden, hidden, "attention" if reads == "x" else "cross", True))

    return Block(
        path=path,
        count=count,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        mid=mid,
        matrices=(
            *attention("self_attn", "x"),
            *(attention("encoder_attn", "c") if cross else ()),
            Matrix("fc1", mid, hidden, "y", True),
            Matrix("fc2", hidden, mid, "product", True),
        ),
        norm="layer",
        pre_norm=False,
        norms=3 if cross else 2,
        gated=False,
        activation=str(keys("activation_function", "gelu")),
        rope=False,
        causal=causal,
        cross=cross,
        dropouts=3 if cross else 2,
        dropout=float(keys("dropout", 0.1)),
        attention_dropout=float(keys("attention_dropout", 0.0)),
    )


@family("bart", "mbart")
def _bart(keys: Keys, task: str | None, labels: int) -> Shapes:
    hidden, vocab, mbart = keys("hidden"), keys("vocab"), keys.config.get("model_type") == "mbart"
    encoder = _bart_block(keys, "model.encoder.layers.{}", keys("encoder_layers"), keys("heads"), keys("mid"))
    decoder = _bart_block(
        keys,
        "model.decoder.layers.{}",
        keys("decoder_layers"),
        keys("decoder_attention_heads", keys("heads")),
        keys("decoder_ffn_dim", keys("mid")),
        causal=True,
        cross=True,
    )
    positions = 2 * (keys("max_position_embeddings", 1024) + 2) * hidden
    return Shapes(
        family="bart",
        task="seq2seq",
        blocks=(encoder, decoder),
        hidden=hidden,
        embeddings=vocab * hidden + positions,
        vocab=vocab,
        head=Matrix("lm_head", vocab, hidden, "z"),
        tied=bool(keys("tie_word_embeddings", True)),
        other=(8 if mbart else 4) * hidden,
    )


# Without a config --------------------------------------------------------------------------------------------------

TYPICAL = (  # name, hidden, layers, heads, kv heads, MLP width, vocabulary, tied: the models people mean by a size
    ("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, True),
    ("Qwen2.5-0.5B", 896, 24, 14, 2, 4864, 151936, True),
    ("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, True),
    ("Llama-3.2-3B", 3072, 28, 24, 8, 8192, 128256, True),
    ("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000, False),
    ("Llama-3.1-8B", 4096, 32, 32, 8, 14336, 128256, False),
    ("Llama-2-13B", 5120, 40, 40, 40, 13824, 32000, False),
    ("Qwen2.5-32B", 5120, 64, 40, 8, 27648, 152064, False),
    ("Llama-33B", 6656, 60, 52, 52, 17920, 32000, False),
    ("Llama-65B", 8192, 80, 64, 64, 22016, 32000, False),
    ("Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256, False),
    ("Llama-3.1-405B", 16384, 126, 128, 8, 53248, 128256, False),
)


def _typical(parameters: float, said: str) -> Shapes:
    """The known model nearest in size. Its shape stands in for one that nobody has named yet."""
    if not math.isfinite(parameters) or parameters < 1e6:
        raise ConfigError(f"a model of {parameters:g} parameters?", fix="give a size such as '135M' or '8B'")
    known = [(row[0], typical(row[0])) for row in TYPICAL]
    name, found = min(known, key=lambda row: abs(math.log(row[1].parameters / parameters)))
    return replace(found, assumed=(f"{said}: taken to be shaped like {name}",))


def typical(name: str) -> Shapes:
    """The shapes of one of TYPICAL by name."""
    row = next(r for r in TYPICAL if r[0] == name)
    _, hidden, layers, heads, kv_heads, mid, vocab, tied = row
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mid,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }
    return _from_config(config, name, "causal_lm", 2)


# Sizes people write ------------------------------------------------------------------------------------------------


def bytes_of(size: str | int | float) -> int:
    """Bytes from what a person writes: "24GB" is 24e9, "24GiB" is 24 * 2**30, "24" is GiB as cards are sold.

    >>> bytes_of("24GB"), bytes_of("1.5 GiB"), bytes_of(2**20)
    (24000000000, 1610612736, 1048576)
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        found = float(size)
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b?)", str(size).strip().lower())
        if match is None:
            raise ConfigError(f"{size!r} is not an amount of memory", fix="write it as 24GB, 24GiB or 25769803776")
        unit = match[2] or ("" if match[3] else "gi")
        found = float(match[1]) * UNITS[unit]
    if not math.isfinite(found) or found <= 0:
        raise ConfigError(f"{size!r} is not an amount of memory: it must be above zero", fix="write it as 24GB")
    return int(found)
