"""What the two 8-bit storages share: rounding row by row, and whether this device multiplies in 8 bits."""

from __future__ import annotations

import weakref

import torch
from jaxtyping import Float
from torch import Tensor

from veneer.quant.storage import Recipe, say_once, use_kernels

__all__ = ["LARGEST", "multiplies", "quantize_plain", "quantize_rows", "turned"]

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINY = 1e-12  # a row of zeros gets this scale


def quantize_rows(
    x: Float[Tensor, "t n"], dtype: torch.dtype, columns: Float[Tensor, " n"] | None = None
) -> tuple[Tensor, Float[Tensor, " t"]]:
    """x (times `columns`, where given) as 8-bit codes and one scale for each row: x ~ codes * scale."""
    if torch.compiler.is_compiling() or not use_kernels(x) or x.dtype == torch.float64:
        return quantize_plain(x, dtype, columns)
    from veneer.quant.cuda import quantize_rows_kernel

    if columns is not None or x.is_inference():
        return quantize_rows_kernel(x, dtype, columns)
    state = x._version, dtype
    if _last.x is None or _last.x() is not x or _last.state != state:
        _last.x, _last.state, _last.found = weakref.ref(x), state, quantize_rows_kernel(x, dtype)
    return _last.found  # type: ignore[return-value]


class Last:
    """What was rounded last: q, k and v read one input, gate and up another."""

    x: weakref.ref[Tensor] | None = None
    state: tuple[int, torch.dtype] | None = None
    found: tuple[Tensor, Tensor] | None = None


_last = Last()


def turned(codes: Tensor) -> Tensor:
    """The transpose in memory of its own: both products are quickest when each matrix lies along the summed axis."""
    if not codes.is_cuda:
        return codes.T
    if not torch.compiler.is_compiling() and use_kernels(codes):
        from veneer.quant.cuda import turn

        return turn(codes)
    return codes.T.contiguous()


def quantize_plain(x: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference; under torch.compile this very code, which the compiler fuses with what made x."""
    wide = x.float() if columns is None else x.float() * columns
    scale = (wide.abs().amax(dim=1) / LARGEST[dtype]).clamp_min(TINY)
    scaled = wide * (1 / scale)[:, None]
    if dtype == torch.int8:
        scaled = scaled.round()
    limit = LARGEST[dtype]
    return scaled.clamp(-limit, limit).to(dtype), scale


def multiplies(x: Tensor, shape: tuple[int, int], kind: str, recipe: Recipe) -> bool:
    """Whether the product is formed in 8 bits here; where not, why is said once."""
    if not recipe.dynamic or not x.shape[0]:
        return False
    reason = _against(x.device, kind) or _shape_against(shape, x, kind)
    if reason is not None:
        say_once(f"{kind}: {reason}, so weights are unpacked for each product; slower, and inputs stay unrounded")
    return reason is None


def _against(device: torch.device, kind: str) -> str | None:
    if device.type == "cuda":
        need = {"int8": (8, 0), "fp8": (8, 9)}[kind]
        have = torch.cuda.get_device_capability(device)
        return None if have >= need else f"{torch.cuda.get_device_name(device)} has no {kind} products"
    if kind == "int8" and device.type == "cpu":
        fast = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX")
        return None if fast else "this processor has no fast 8-bit products"
    return f"{device.type} has no {kind} products"


def _shape_against(shape: tuple[int, int], x: Tensor, kind: str) -> str | None:
    step = {"int8": 8, "fp8": 16}[kind]
    if x.is_cuda and (shape[0] % step or shape[1] % step):
        return f"a matrix of {shape[0]} x {shape[1]} is no multiple of {step}"
    return None
