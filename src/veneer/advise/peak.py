"""What a training step holds, moment by moment.

Some things are there all the time (weights, adapter, optimiser states), others come and go, so the peak is the largest
of a few moments and not the sum of everything:

    loss         every block's activations, and the logits of one chunk with their gradient
    backward i   the activations of blocks 0..i, the gradients of those behind it, one block's own scratch
    step         all gradients, no activations

Full fine-tuning peaks at the step or late in the backward, LoRA at the loss; recomputation trades the sum over blocks
for one block's worth at a time. What one block keeps is in activations.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from veneer.advise.activations import (
    TILE,
    Pass,
    backward_workspace,
    fused_workspace,
    kept,
    kept_fused,
    kept_outside,
    tiled_workspace,
)
from veneer.advise.plan import Plan
from veneer.advise.shapes import Block, Shapes
from veneer.core.registry import near
from veneer.errors import TargetError

__all__ = [
    "PARTS",
    "Moments",
    "adapter_bytes",
    "host_inputs",
    "moments",
    "ranks",
    "trained_base",
    "weight_bytes",
]

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "loss", "workspace")

PACKED_BITS = {"int8": 8.0, "fp8": 8.0, "nf4": 4.127}  # nf4: 4 bits, an fp8 scale for 64, an fp32 scale for 64 * 256
CHUNK_ROWS = 2048  # train/loss.py: tokens whose logits exist at a time
LOGIT_BYTES = 12  # cross entropy in fp32: log-probabilities, the gradient that reaches them, the gradient of the logits
IN_FLIGHT = {"offload": 3, "tiled": 1}  # inputs of blocks on the GPU at a time while they live on the host
CUBLAS_BYTES = 72 * 2**20  # workspaces that torch allocates for it on first use (H100: 62 to 97 MiB measured)

OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adamw_host": 0, "lora_fa": 8, "sgd": 0}


# Parts that are always there ----------------------------------------------------------------------------------------


def adapter_bytes(
    matrices: Sequence[tuple[int, int]], r: int, *, param: int = 4, grad: int = 4, moments: int = 8
) -> int:
    """Bytes to train one adapter: parameters, gradients and Adam's two moments.

    >>> layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    >>> adapter_bytes(layer * 32, r=16) / 2**30  # every projection of Llama-3-8B, GiB
    0.625
    """
    return sum(r * (out + n) for out, n in matrices) * (param + grad + moments)


def weight_bytes(shapes: Shapes, plan: Plan) -> int:
    """Bytes of the base as it is stored."""
    if plan.weights is not None:
        return plan.weights
    if plan.quant == "none" or plan.method != "lora":
        return shapes.parameters * plan.width
    scales = (
        0 if plan.quant == "nf4" else 4 * sum(b.count * m.copies * m.out for b in shapes.blocks for m in b.matrices)
    )
    packed = shapes.packable * PACKED_BITS[plan.quant] / 8 + scales
    return int(packed + (shapes.parameters - shapes.packable) * plan.width)


def host_inputs(shapes: Shapes, plan: Plan) -> tuple[int, int]:
    """How many inputs (of the blocks and the last norm) go to the host with offload and tiled, and bytes of each."""
    if plan.recompute not in IN_FLIGHT or plan.device != "cuda" or plan.mode != "train":
        return 0, 0
    tokens = plan.batch_size * (shapes.tokens_fixed or plan.max_len)
    count = sum(block.count for block in shapes.blocks) + 1
    return max(0, count - plan.stay), tokens * shapes.hidden * plan.width


def trained_base(shapes: Shapes, plan: Plan) -> int:
    """Parameters of the base that are trained: none, all, or the last blocks of each stack and a new head."""
    if plan.method == "full":
        return shapes.parameters
    if plan.method == "lora":
        return 0
    blocks = sum(len(_chosen(block, plan)) * block.parameters for block in shapes.blocks)
    return blocks + sum(m.parameters for m in shapes.tail if _is_new(m.name))


def _chosen(block: Block, plan: Plan) -> set[int]:
    """Indices in one stack that `layers` names: a number is that many from the end, None all (two under freeze)."""
    chosen = 2 if plan.layers is None and plan.method == "freeze" else plan.layers
    if chosen is None:
        return set(range(block.count))
    if isinstance(chosen, int):
        return set(range(max(0, block.count - chosen), block.count))
    return {i % block.count for i in chosen if -block.count <= i < block.count}


def _is_new(name: str) -> bool:
    """A task's head: made new for the task, so it is always trained whole."""
    return name.split(".")[0] in ("classifier", "score", "pre_classifier")


def ranks(shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Full name of every adapted layer -> its rank. Raises TargetError for targets that match nothing."""
    if plan.method != "lora":
        return {}
    rows = shapes.linears()
    whole = set(_saved_whole(shapes, plan))
    names = [name for name, *_ in rows if name not in whole]
    wanted = _matching(names, plan.targets, "targets")
    if plan.exclude:
        wanted = wanted - _matching(names, plan.exclude, "exclude")
    return {
        name: min(plan.r, matrix.out, matrix.n)
        for name, matrix, block, i in rows
        if name in wanted and (plan.layers is None or (block is not None and i in _chosen(block, plan)))
    }


def _matching(names: Sequence[str], patterns: str | Sequence[str], what: str) -> set[str]:
    """The names that targets or exclude mean: a preset, a regular expression for whole names, or name endings."""
    if patterns == "all-linear":
        return set(names)
    from veneer.core.select import PRESETS, TOWERS, ends_with  # imports torch, so only where a pattern needs it

    if isinstance(patterns, str) and patterns in TOWERS:
        return {n for n in names if set(TOWERS[patterns]).intersection(n.split("."))}

    preset = PRESETS.get(patterns) if isinstance(patterns, str) else None
    if isinstance(patterns, str) and preset is None:
        found = {patterns: {n for n in names if re.fullmatch(patterns, n)}}
    else:
        endings = preset or tuple(patterns)
        found = {e: {n for n in names if ends_with(n, e)} for e in endings}
    together = set().union(*found.values())
    missing = [] if preset and together else [pattern for pattern, hits in found.items() if not hits]
    if missing and what == "targets":
        tails = {n.rsplit(".", 1)[-1] for n in names}
        raise TargetError(
            f"{what} match none of {len(names)} linear layers",
            problems=[f"{m!r} matches none.{near(m.rsplit('.', 1)[-1], tails)}" for m in missing],
            fix=f"there are: {', '.join(sorted(tails))}",
        )
    return together


def _saved_whole(shapes: Shapes, plan: Plan) -> dict[str, int]:
    """Modules trained whole beside the adapter -> parameters. A classifier is new, so it always is."""
    known = {m.name: m.parameters for m in shapes.tail}
    if shapes.head is not None:
        known |= {"lm_head": shapes.head.parameters, "embed_tokens": shapes.embeddings}
    new = [n for n in known if _is_new(n)]
    asked = [n for n in known for ending in plan.modules_to_save if n == ending or n.endswith("." + ending)]
    return {name: known[name] for name in (*new, *asked)}


# The moments --------------------------------------------------------------------------------------------------------


@dataclass
class _Layer:
    """One block's share of a step, in bytes."""

    kept: float
    again: float  # what its backward pass computes again before it begins
    workspace: float
    gradients: float


@dataclass(frozen=True)
class Moments:
    """Bytes by part at every moment, and how many parameters are trained."""

    parts: dict[str, dict[str, float]]
    trainable: int


@dataclass(frozen=True)
class Trained:
    """What is trained: factors are fp32, weights have the base's type and, where that is narrower, an fp32 master."""

    factors: int
    weights: int
    width: int  # of the weights

    @property
    def total(self) -> int:
        return self.factors + self.weights

    @property
    def masters(self) -> int:
        """Bytes."""
        return 4 * self.weights if self.width < 4 else 0

    @property
    def fresh_gradients(self) -> int:
        """Bytes as backward leaves them. A master's gradient takes its place afterwards, in fp32."""
        return 4 * self.factors + self.width * self.weights


def moments(shapes: Shapes, plan: Plan) -> Moments:
    found = ranks(shapes, plan)
    factors = _factors(shapes, plan, found)
    whole = sum(_saved_whole(shapes, plan).values()) if plan.method == "lora" else 0  # in copies of the adapter's own
    trained = Trained(factors, whole + trained_base(shapes, plan), plan.width)
    always: dict[str, float] = {"weights": weight_bytes(shapes, plan), "adapter": 4 * factors + plan.width * whole}
    if plan.mode == "infer":
        return Moments({"prefill": _with_libraries(plan, always | _inference(shapes, plan))}, 0)
    apart = plan.optimizer == "adamw_host" and plan.device == "cpu"  # the host's memory is this memory
    always["optimizer"] = trained.total * OPTIMIZER_BYTES["adamw" if apart else plan.optimizer] + trained.masters
    held = _training(shapes, plan, found, always, trained)
    return Moments({name: _with_libraries(plan, parts) for name, parts in held.items()}, trained.total)


def _factors(shapes: Shapes, plan: Plan, found: Mapping[str, int]) -> int:
    """Parameters of A and B, and of DoRA's magnitudes."""
    adapted = [(m, found[name]) for name, m, *_ in shapes.linears() if name in found]
    magnitudes = sum(m.out for m, _ in adapted) if plan.combine == "dora" else 0
    return sum(rank * (m.out + m.n) for m, rank in adapted) + magnitudes


def _with_libraries(plan: Plan, parts: dict[str, float]) -> dict[str, float]:
    own = CUBLAS_BYTES if plan.device == "cuda" else 0
    return parts | {"workspace": parts.get("workspace", 0) + own}


def _training(
    shapes: Shapes, plan: Plan, found: Mapping[str, int], always: dict[str, float], trained: Trained
) -> dict[str, dict[str, float]]:
    tokens = plan.batch_size * (shapes.tokens_fixed or plan.max_len)
    layers = _layers(shapes, plan, found, tokens)
    casts, outside = _casts(shapes, plan, found), _outside(shapes, plan, tokens)
    held = 4 * trained.total if plan.accumulate else 0  # gradients of the micro-batches before
    beside = 4 * _largest(shapes) if plan.accumulate and plan.method != "lora" else 0  # one more, before it is added
    keeps = [layer.kept for layer in layers]
    flight = IN_FLIGHT.get(plan.recompute, 0) + plan.stay if plan.device == "cuda" else 0
    ring = flight * tokens * shapes.hidden * plan.width
    made, loss = _loss(shapes, plan, tokens)
    at_loss = {"gradients": held + made, "activations": sum(keeps) + casts + outside + ring, "loss": loss}
    every = {"loss": always | at_loss}
    done = trained.fresh_gradients - sum(layer.gradients for layer in layers)  # head, embedding, tail: first to come
    for i in reversed(range(len(layers))):
        every[f"backward of block {i}"] = always | {
            "gradients": held + done if trained.masters else max(held, done),
            "activations": sum(keeps[: i + 1]) + layers[i].again + casts + ring,
            "workspace": layers[i].workspace + beside,
        }
        done += layers[i].gradients
    return every | {"step": always | {"gradients": 4 * trained.total}}


def _layers(shapes: Shapes, plan: Plan, found: Mapping[str, int], tokens: int) -> list[_Layer]:
    """Blocks in order. Below the first one that learns, no gradient flows and nothing is kept."""
    layers, cache, reached = [], {}, False
    for block in shapes.blocks:
        for i in range(block.count):
            own = tuple((m.name, found.get(f"{block.path.format(i)}.{m.name}", 0)) for m in block.matrices)
            full = plan.method == "full" or (plan.method == "freeze" and i in _chosen(block, plan))
            learns = full or any(rank for _, rank in own)
            key = (id(block), own, full, reached)
            if key not in cache:
                cache[key] = _layer(block, dict(own), full, learns or reached, reached, plan, shapes, tokens)
            layers.append(cache[key])
            reached = reached or learns
    return layers


def _layer(
    block: Block, own: dict[str, int], full: bool, flows: bool, reached: bool, plan: Plan, shapes: Shapes, tokens: int
) -> _Layer:
    if not flows:
        return _Layer(0, 0, 0, 0)
    how = Pass(
        tokens=shapes.tokens_fixed or plan.max_len,
        width=plan.width,
        full=full,
        ranks=own,
        dropout=plan.dropout,
        dora=plan.combine == "dora",
        attention=plan.attention,
        padded=plan.has_padding and shapes.tokens_fixed is None,
        gpu=plan.device == "cuda",
    )
    trained = block.parameters if full else sum(r * (m.out + m.n) for m in block.matrices if (r := own[m.name]))
    unpacked = max(m.out * m.n for m in block.matrices) * plan.width if plan.quant != "none" else 0
    gradients = (plan.width if full else 4) * trained
    if plan.fused:
        per_token, again = kept_fused(block, how, plan.level), 0.0
        workspace = _fused_workspace(block, how, plan, tokens)
    else:
        per_token, again, workspace = _plain(block, how, plan, reached)
        workspace *= tokens
    return _Layer(per_token * tokens, again * tokens, workspace + unpacked, gradients)


def _fused_workspace(block: Block, how: Pass, plan: Plan, tokens: int) -> float:
    if plan.level != "tiled" or tokens <= TILE:
        return fused_workspace(block, how, "input" if plan.level == "tiled" else plan.level) * tokens
    opened = block.parameters * plan.width if plan.quant == "nf4" else 0  # for all tiles
    return tiled_workspace(block, how, tokens) + opened


def _plain(block: Block, how: Pass, plan: Plan, reached: bool) -> tuple[float, float, float]:
    """Bytes a token: what autograd keeps of a stock block, what comes back in its backward pass, and its scratch."""
    per_token = sum(kept(block, how).values())
    if not reached and not how.full and block.pre_norm:  # nothing before it learns: its first norm needs no derivative
        per_token -= block.hidden * (4 if block.norm == "rms" else how.width)
    workspace = backward_workspace(block, how)
    if plan.level == "none":
        return per_token, 0, workspace
    return (0 if plan.level == "offload" else block.hidden * how.width), per_token, workspace


def _outside(shapes: Shapes, plan: Plan, tokens: int) -> float:
    block = shapes.blocks[-1]
    how = Pass(tokens=plan.max_len, width=plan.width, full=plan.method == "full")
    per_token = kept_outside(shapes.hidden, block.norm, block.head_dim, block.rope, plan.batch_size, how)
    if plan.fused and block.norm == "rms":
        per_token -= shapes.hidden * (4 - plan.width)  # the last norm keeps its input as it is
    encoder = kept_outside(shapes.hidden, block.norm, block.head_dim, False, 1, how) if block.cross else 0
    return (per_token + encoder + (shapes.hidden * plan.width if block.cross else 0)) * tokens


def _casts(shapes: Shapes, plan: Plan, found: Mapping[str, int]) -> int:
    """Adapters are kept in fp32 and multiply in the activations' type: a rounded copy lives until backward."""
    if plan.width == 4 and not plan.fused:  # fused blocks gather and scale them
        return 0
    return plan.width * sum(found[n] * (m.out + m.n) for n, m, *_ in shapes.linears() if n in found)


def _largest(shapes: Shapes) -> int:
    return max(m.out * m.n for b in shapes.blocks for m in b.matrices)


def _loss(shapes: Shapes, plan: Plan, tokens: int) -> tuple[float, float]:
    """Bytes of gradients that exist by the time of the loss, and of what the loss itself holds at its highest."""
    if shapes.head is None or shapes.task not in ("causal_lm", "seq2seq"):
        return 0, tokens * shapes.hidden * plan.width
    if plan.loss == "plain" or shapes.task == "seq2seq":
        return 0, tokens * shapes.vocab * LOGIT_BYTES
    rows = min(CHUNK_ROWS, tokens)
    hidden = 3 * tokens * shapes.hidden * plan.width  # the last norm's output, the trained rows of it, their gradient
    logits = rows * shapes.vocab * LOGIT_BYTES
    if plan.method != "full" and "lm_head" not in plan.modules_to_save:  # kernels/loss.py: in the logits' own memory
        hidden = 2 * tokens * shapes.hidden * plan.width  # rows are taken as their turn comes
        return 0, hidden + (rows * shapes.vocab * plan.width if plan.device == "cuda" else logits)
    # The head's gradient is summed over chunks; a chunk's share is made when only the logits' gradient is left.
    head = plan.width * shapes.head.out * shapes.head.n
    return head, hidden + max(logits, rows * shapes.vocab * 4 + head)


def _inference(shapes: Shapes, plan: Plan) -> dict[str, float]:
    """A prefill of batch_size x max_len tokens with its cache of keys and values; logits of the last token alone."""
    tokens = plan.batch_size * (shapes.tokens_fixed or plan.max_len)
    cache = sum(2 * b.count * b.kv_heads * b.head_dim * plan.width for b in shapes.blocks if b.causal) * tokens
    widest = max(b.mid * (3 if b.gated else 2) + 2 * b.hidden for b in shapes.blocks)
    logits = plan.batch_size * shapes.vocab * (plan.width + 4)
    return {"activations": cache, "loss": logits, "workspace": widest * plan.width * tokens}
