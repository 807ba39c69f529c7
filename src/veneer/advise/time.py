"""How long, roughly: FLOPs per token from the shapes, over what the device does in a second.

    GFLOP a token, Llama-3.1-8B, r = 16 on all linears     2,048 tokens     4,096 tokens
    linears forward / head forward                          13.96 / 1.05     13.96 / 1.05
    attention forward / backward                             0.54 / 1.34      1.07 / 2.68
    LoRA forward + backward                                        0.25             0.25
    step without recomputation                                     32.1             34.0
    step with it                                                   46.7             49.1
    full fine-tuning without                                       46.9             48.8

A frozen weight costs two products (forward, gradient of the input), a trained one three. Of the device's own matrix
speed - measured here by `probe`, or given - a training step reaches a share: EFFICIENCY. The answer is a range, because
that share is the part nobody knows before the first step.
"""

from __future__ import annotations

import time as clock
from dataclasses import asdict, dataclass
from typing import Any

from veneer.advise.peak import ranks, trained_base
from veneer.advise.plan import Plan
from veneer.advise.shapes import Shapes, shapes_of
from veneer.core.registry import near
from veneer.errors import ConfigError

__all__ = ["DEVICES", "Duration", "estimate_time", "flops_per_token", "probe"]

EFFICIENCY = 0.45  # PEFT reached 46 % of the card's own matrix speed on an 8 B model, the best sketch 65 % (H100, bf16)
SPREAD = 1.7  # the range is the estimate divided and multiplied by this
DEVICES = {  # dense bf16 TFLOP/s; h100 was measured (8192^3 product), the others are the makers' figures
    "h100": 780,
    "a100": 312,
    "l40s": 362,
    "l4": 121,
    "a10g": 70,
    "rtx4090": 165,
    "rtx3090": 71,
    "t4": 65,
}


@dataclass(frozen=True)
class Duration:
    """Seconds of training, as a range, and what it costs where a price was given."""

    seconds: float
    shortest: float
    longest: float
    tokens_per_second: float
    flops_per_token: float
    device_flops: float
    cost: float | None = None

    def __str__(self) -> str:
        price = "" if self.cost is None else f", about {self.cost:.2f}"
        span = f"{_span(self.shortest)} to {_span(self.longest)}"
        return f"{span} at about {self.tokens_per_second:,.0f} tokens/s{price}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def flops_per_token(shapes: Shapes, plan: Plan) -> float:
    """Floating-point operations of one training step for one token.

    >>> round(flops_per_token(shapes_of("8B"), Plan(device="cuda", max_len=2048)) / 1e9, 1)
    32.1
    >>> round(flops_per_token(shapes_of("8B"), Plan(device="cuda", max_len=2048, recompute="full")) / 1e9, 1)
    46.7
    >>> round(flops_per_token(shapes_of("8B"), Plan(device="cuda", max_len=2048, method="full")) / 1e9, 1)
    46.9
    """
    head = 2 * shapes.head.out * shapes.head.n if shapes.head else 0
    linears = 2 * shapes.active_parameters - head
    tokens = shapes.tokens_fixed or plan.max_len
    attention = sum(b.count * 4 * tokens * b.heads * b.head_dim * (0.5 if b.causal else 1) for b in shapes.blocks)
    if plan.mode == "infer":
        return linears + head + attention
    matrices = {name: m for name, m, *_ in shapes.linears()}
    adapters = 6 * sum(r * (matrices[n].out + matrices[n].n) for n, r in ranks(shapes, plan).items())
    again = _again(shapes, plan, linears, attention + adapters / 3)
    trained = trained_base(shapes, plan) / shapes.parameters
    return (2 + trained) * (linears + head) + 3.5 * attention + adapters + again


def _again(shapes: Shapes, plan: Plan, linears: float, rest: float) -> float:
    """What recomputing adds for a token. A fused block never computes its last product again."""
    if plan.level == "none":
        return 0
    entries = sum(2 * b.count * b.mid * b.hidden * b.experts_per_token * (2 if b.gated else 1) for b in shapes.blocks)
    if plan.level == "gate_up":
        return entries
    last = sum(2 * b.count * b.mid * b.hidden * b.experts_per_token for b in shapes.blocks) if plan.fused else 0
    return linears + rest - last


def estimate_time(
    model: Any,
    tokens: float,
    *,
    epochs: float = 1.0,
    device: str | None = None,
    device_flops: float | None = None,
    cost_per_hour: float | None = None,
    efficiency: float = EFFICIENCY,
    **settings: Any,
) -> Duration:
    """Time to train on `tokens` tokens, `epochs` times. The device is a name from DEVICES, a speed in FLOP/s, or this
    machine, which is then measured for a second (needs torch). `settings` are those of estimate_memory.

    >>> estimate_time("8B", 10e6, device="h100").tokens_per_second > 5000
    True
    """
    if not tokens > 0 or not epochs > 0:
        raise ConfigError(f"no time for {tokens!r} tokens x {epochs!r} epochs", fix="give numbers above zero")
    plan = Plan(**settings)
    speed = device_flops or (_known(device) if device else probe())
    each = flops_per_token(shapes_of(model, plan.task, plan.labels), plan)
    rate = speed * efficiency / each
    seconds = tokens * epochs / rate
    cost = None if cost_per_hour is None else seconds / 3600 * cost_per_hour
    return Duration(seconds, seconds / SPREAD, seconds * SPREAD, rate, each, speed, cost)


def _known(device: str) -> float:
    key = device.lower().replace(" ", "").replace("-", "")
    if key not in DEVICES:
        raise ConfigError(
            f"the speed of {device!r} is not known.{near(key, DEVICES)}",
            fix=f"give device_flops, or one of {', '.join(DEVICES)}",
        )
    return DEVICES[key] * 1e12


def probe(seconds: float = 1.0, size: int | None = None) -> float:
    """FLOP/s of this machine's matrix product in the type that training would use: bf16 on a GPU, fp32 on a CPU."""
    import torch

    gpu = torch.cuda.is_available()
    size = size or (8192 if gpu else 1024)
    dtype, place = (torch.bfloat16, "cuda") if gpu else (torch.float32, "cpu")
    a, b = (torch.randn(size, size, dtype=dtype, device=place) for _ in range(2))
    wait = torch.cuda.synchronize if gpu else lambda: None
    torch.mm(a, b)
    wait()
    start, done = clock.perf_counter(), 0
    while (spent := clock.perf_counter() - start) < seconds:
        torch.mm(a, b)
        wait()
        done += 1
    return 2 * size**3 * done / spent


def _span(seconds: float) -> str:
    """
    >>> _span(42), _span(600), _span(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
