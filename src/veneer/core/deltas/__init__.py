"""The variants of dW, one to a file; importing this package registers them all."""

from veneer.core.deltas import adalora, block, fused, loha, lokr, lora_fa, lora_xs, tokens, vera

__all__ = ["adalora", "block", "fused", "loha", "lokr", "lora_fa", "lora_xs", "tokens", "vera"]
