"""The settings that decide how much memory and time a run takes, checked, under the names of the training settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from veneer.advise.device import usual_device
from veneer.core.registry import near
from veneer.errors import ConfigError

__all__ = ["CHOICES", "FLOAT_BYTES", "Plan"]

FLOAT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CHOICES = {
    "task": ("causal_lm", "sequence_classification", "token_classification", "seq2seq", "image_classification"),
    "method": ("lora", "full", "freeze"),
    "precision": ("fp32", "bf16", "fp16"),
    "quant": ("none", "nf4", "int8", "fp8"),
    "recompute": ("none", "gate_up", "middle", "input", "offload", "tiled", "full"),
    "attention": ("sdpa", "eager"),
    "loss": ("chunked", "plain"),
    "combine": ("add", "dora"),
    "device": ("cpu", "cuda"),
    "mode": ("train", "infer"),
    "optimizer": ("adamw", "adamw8bit", "adamw_host", "lora_fa", "sgd"),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings that decide how much memory a run takes, under the names of the training settings."""

    task: str | None = None
    labels: int = 2
    method: str = "lora"
    r: int = 16
    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    layers: int | Sequence[int] | None = None
    dropout: float = 0.0
    combine: str = "add"
    precision: str = "auto"  # bf16 on a GPU, fp32 on a CPU
    quant: str = "none"
    batch_size: int = 1
    max_len: int = 2048
    accumulate: bool = False  # several micro-batches to a step: gradients live through all of them
    recompute: str = "none"  # gate_up, middle and tiled are for fused blocks; full says input
    fused: bool = False  # blocks run as kernels/block.py has them
    stay: int = 0  # of offload and tiled: inputs that stay on the GPU, since the host has no room for them
    weights: int | None = None  # bytes of the base, where it is loaded already
    attention: str = "sdpa"
    loss: str = "chunked"
    padded: bool | None = None  # rows of unequal length; None: when there are several
    optimizer: str = "adamw"
    device: str = field(default_factory=usual_device)
    mode: str = "train"

    def __post_init__(self) -> None:
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16" if self.device == "cuda" else "fp32")
        problems = [p for name, known in CHOICES.items() if (p := _choice_problem(name, getattr(self, name), known))]
        for name in ("r", "batch_size", "max_len", "labels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name}={value!r} must be a whole number of at least 1")
        if self.recompute in ("gate_up", "middle", "tiled") and not self.fused:
            problems.append(f"recompute={self.recompute!r} is for fused blocks: say fused=True, or recompute='input'")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout={self.dropout!r} must be at least 0 and below 1")
        if problems:
            raise ConfigError("memory cannot be estimated for these settings", problems=problems)

    @property
    def width(self) -> int:
        return FLOAT_BYTES[self.precision]

    @property
    def level(self) -> str:
        """What is kept, by the name that kernels/block.py has for it."""
        return "input" if self.recompute == "full" else self.recompute

    @property
    def has_padding(self) -> bool:
        return self.batch_size > 1 if self.padded is None else self.padded


def _choice_problem(name: str, value: object, known: Sequence[str]) -> str | None:
    if value in known or (name == "task" and value is None):
        return None
    return f"{name}={value!r} is none of {', '.join(known)}.{near(str(value), known)}"
