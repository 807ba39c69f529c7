"""What one block keeps for its backward pass, in bytes for each token.

Autograd keeps what a derivative reads. With a frozen base that is less than people expect (a frozen W needs W alone)
and with a stock model more than it need be (RMSNorm keeps an fp32 copy of its input):

    piece        keeps                                                     for what
    norm         its input (RMSNorm: as fp32), one or two numbers          its own derivative
    input        the input of a matrix that is trained or adapted, once    dA = s (g B)^T x, or dW = g^T x
    adapter      h = x A^T, r wide                                         dB = s g^T h
    attention    q, k, v, the output, log-sum-exp (fused)                  recomputes the scores
                 q, k, v, every score, dropped-out ones too (not fused)
    mlp          the activation's input, and both factors of act(g) * u
    dropout      its mask: a whole float an element on a CPU, one byte on a GPU

Fused blocks (kernels/block.py) keep what that file's table says, for each level of `recompute`: `kept_fused`.

Each row was read off torch.autograd.graph.saved_tensors_hooks on the models of transformers 5.23 with Veneer's
adapters; tests/advise/test_activations.py does it again. Tensors that two rows share are counted once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from veneer.advise.shapes import Block, Matrix

__all__ = ["Pass", "backward_workspace", "fused_workspace", "kept", "kept_fused", "kept_outside", "tiled_workspace"]

INSIDE = {  # inner tensors an activation keeps, in units of the MLP's width
    "relu": 0,  # its output, which the next matrix reads
    "gelu_new": 4,  # written out in Python in transformers
    "gelu_fast": 4,
    "quick_gelu": 2,
}


TILE = 4096  # kernels/tiled.py: tokens at a time
HEAD_GROUPS = 8  # the same: attention's heads, in so many parts
UNIT_ON_CPU = 8  # arrays as wide as the unit, at the highest moment of its backward pass


@dataclass(frozen=True, kw_only=True)
class Pass:
    """How a forward pass runs, as far as it decides what is kept."""

    tokens: int  # in a row
    width: int = 4  # bytes of an activation
    full: bool = False  # the base's own weights are trained
    ranks: Mapping[str, int] = field(default_factory=dict)  # matrix of the block -> rank of its adapter
    dropout: float = 0.0  # the adapters' own
    dora: bool = False
    attention: str = "sdpa"  # or "eager"
    padded: bool = False  # a mask goes with the batch
    gpu: bool = False

    @property
    def mask_width(self) -> int:
        """Bytes for each element that dropout remembers."""
        return 1 if self.gpu else self.width


def kept(block: Block, how: Pass) -> dict[str, float]:
    """Bytes kept for each token of one block, by piece."""
    return {
        "norm": _norms(block, how),
        "input": _inputs(block, how),
        "adapter": _adapters(block, how),
        "attention": _attention(block, how),
        "mlp": _mlp(block, how),
        "dropout": _dropout(block, how),
    }


def kept_fused(block: Block, how: Pass, level: str) -> float:
    """Bytes kept for each token by one fused block at a level of `recompute`."""
    entry = block.hidden * how.width
    if level == "offload" or (level == "tiled" and how.gpu):
        return 0.0  # the input is in the host's memory
    if level in ("input", "tiled"):
        return entry
    if level == "middle":
        return 2 * entry
    adapted = [(m, how.ranks[m.name]) for m in block.matrices if how.ranks.get(m.name)]
    thin = how.width * sum(rank for _, rank in adapted) + (sum(m.n for m, _ in adapted) if how.dropout else 0)
    rows = 2 * 4  # one number for each norm
    heads = block.heads + block.kv_heads if block.head_norms else 0  # normed by themselves, before they are turned
    attention = _attention(block, how) + heads * (block.head_dim * how.width + 4)
    gates = 2 * block.mid * how.width if level == "none" else 0
    masks = block.dropouts * block.hidden if block.dropout else 0
    return 2 * entry + thin + rows + attention + gates + masks + _outputs(adapted, how)


def _outputs(adapted: list[tuple[Matrix, int]], how: Pass) -> float:
    """Of layers with magnitudes what nobody else keeps: all that o and down gave, q, k and v where they have biases."""
    kept = [m for m, _ in adapted if m.reads in ("attention", "product") or (m.bias and m.reads == "x")]
    return how.width * sum(m.out for m in kept) if how.dora else 0.0


def _norms(block: Block, how: Pass) -> float:
    per_norm = block.hidden * 4 + 4 if block.norm == "rms" else block.hidden * how.width + 8
    if how.full and block.norm == "rms":
        per_norm += block.hidden * how.width  # what the gain multiplies
    if not block.head_norms:
        return block.norms * per_norm
    heads = block.heads + block.kv_heads
    per_head = block.head_dim * (4 + (how.width if how.full else 0)) + 4
    return block.norms * per_norm + heads * per_head


def _inputs(block: Block, how: Pass) -> float:
    """Matrices that read one tensor share one copy, unless each adapter drops out its own."""
    total, seen = 0.0, set()
    for matrix in block.matrices:
        adapted = bool(how.ranks.get(matrix.name))
        if adapted and how.dropout:
            total += matrix.n * (how.mask_width + how.width)
            adapted = False
        if (adapted or how.full) and matrix.reads not in seen and not _kept_anyway(block, matrix, how):
            seen.add(matrix.reads)
            total += matrix.n * how.width * _per_token(block, matrix)
    return total


def _kept_anyway(block: Block, matrix: Matrix, how: Pass) -> bool:
    """Fused attention keeps its output, relu keeps its output, and the encoder's output is kept once for all blocks."""
    if matrix.reads in ("attention", "cross"):
        return is_fused(block, how)
    if matrix.reads == "product":
        return block.activation == "relu" and not block.gated and not block.mid_dropout
    return matrix.reads == "encoder"


def _per_token(block: Block, matrix: Matrix) -> int:
    return min(matrix.copies, block.experts_per_token)


def _adapters(block: Block, how: Pass) -> float:
    adapted = [(m, how.ranks[m.name]) for m in block.matrices if how.ranks.get(m.name)]
    dora = sum(2 * m.out for m, _ in adapted) if how.dora else 0  # the direction and dW x, for the magnitude's gradient
    return how.width * (sum(rank for _, rank in adapted) + dora)


def is_fused(block: Block, how: Pass) -> bool:
    """Whether attention keeps no scores. On a CPU the fused kernel has no dropout."""
    return how.attention != "eager" and (how.gpu or not block.attention_dropout)


def _attention(block: Block, how: Pass) -> float:
    query, key = block.heads * block.head_dim, block.kv_heads * block.head_dim
    times = 2 if block.cross else 1
    if is_fused(block, how):
        keys = query if how.padded and key < query else key  # a mask makes transformers repeat k and v for every head
        mask = how.tokens * how.width if how.padded else 0
        return times * ((2 * query + 2 * keys) * how.width + block.heads * 4 + mask)
    scores = block.heads * how.tokens
    width = how.width if how.attention == "eager" else 4  # the unfused kernel computes in fp32
    remembered = 4 + (how.width if how.width < 4 and how.attention == "eager" else 0)
    if block.attention_dropout:
        remembered += (1 if how.gpu else width) + width
    return times * (3 * query * width + scores * remembered)


def _mlp(block: Block, how: Pass) -> float:
    inside = INSIDE.get(block.activation, 1)
    if block.gated:
        inside += 2
    elif block.activation == "relu":
        inside += 1
    dropped = block.mid * how.mask_width if block.mid_dropout else 0
    return block.mid * block.experts_per_token * inside * how.width + dropped


def _dropout(block: Block, how: Pass) -> float:
    return block.dropouts * block.hidden * how.mask_width if block.dropout else 0.0


def kept_outside(hidden: int, norm: str, head_dim: int, rope: bool, rows: int, how: Pass) -> float:
    """Bytes a token outside the blocks: the last norm, and the angles of rotary positions, made once for all rows."""
    width = how.width
    last = hidden * (4 + 2 * width * how.full) + 4 if norm == "rms" else hidden * width * (1 + how.full) + 8
    return last + (2 * head_dim * how.width / rows if rope else 0)


def backward_workspace(block: Block, how: Pass) -> float:
    """Bytes a token that live for a moment while the block's backward runs, beyond what is kept when it begins.

    The MLP goes first, with everything still there; what it kept is gone when attention's scores come back.
    """
    query, key = block.heads * block.head_dim, block.kv_heads * block.head_dim
    stream = 2 * block.hidden * how.width  # the gradient of the residual stream, and of the part being left
    mlp = block.mid * block.experts_per_token * how.width * (2 if block.gated else 1)
    scores = 0 if is_fused(block, how) else 2 * block.heads * how.tokens * 4
    freed = _mlp(block, how) + (block.mid * how.width if how.full or any(how.ranks.values()) else 0)
    attention = (2 * query + 2 * key) * how.width + max(0, scores - freed)
    fp32_norm = 2 * block.hidden * 4 if block.norm == "rms" and how.width < 4 else 0
    return stream + max(mlp, attention, fp32_norm)


def fused_workspace(block: Block, how: Pass, level: str) -> float:
    """The same of a fused block: what it computes again, and the gradients on their way.

    On a GPU the unit's gradients take two arrays as wide as it is. The plain pieces of a CPU form each step of the
    activation's derivative by itself.
    """
    query, key = block.heads * block.head_dim, block.kv_heads * block.head_dim
    again = kept_fused(block, how, "none") - kept_fused(block, how, level)
    stream = 3 * block.hidden * how.width
    unit = block.mid * (2 if how.gpu else UNIT_ON_CPU) * how.width
    attention = (2 * query + 4 * key) * how.width
    return again + stream + max(unit, attention)


def tiled_workspace(block: Block, how: Pass, tokens: int) -> float:
    """Bytes of scratch of a block in tiles (kernels/tiled.py): what is there for all tokens, and what for one tile.

    For all: the gradient that arrives and the one beside the attention, q, k and v, attention and its gradient. In
    attention's own backward pass, for a part of the heads: its gradients, d q in fp32, d k and d v for each head of q.
    """
    query, key = block.heads * block.head_dim, block.kv_heads * block.head_dim
    parts = next(n for n in range(min(block.kv_heads, HEAD_GROUPS), 0, -1) if block.kv_heads % n == 0)
    masks = sum(m.n for m in block.matrices if how.ranks.get(m.name)) if how.dropout else 0  # at most
    whole = (2 * block.hidden + 3 * query + 2 * key) * how.width + masks
    attention = ((3 * query + 2 * key) * how.width + 4 * query) / parts
    tile = fused_workspace(block, how, "input") + block.hidden * how.width
    return tokens * whole + max(tokens * attention, min(tokens, TILE) * tile)
