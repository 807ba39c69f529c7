"""What the two 8-bit storages share: W as 8-bit codes and one fp32 scale a row, multiplied as such both ways.

    forward    y = (x_q W_q^T) s_x s_w        x_q: each row of x rounded to 8 bits as it comes
    backward   dx = ((g s_w)_q W_q) s_g       the scales of W's rows are folded into g, so the same codes serve

Language models have columns of x that are twenty times larger than the rest. A row has one scale for all its values, so
such a column takes the others' codes, or, in floats, drowns their sum in its own rounding error. With `rotate` x and W
are turned alike before they are rounded, each 64 neighbouring columns by a Hadamard matrix H (after QuaRot,
arXiv:2404.00456): x W^T = (x H)(W H)^T, and in x H a large value is spread over 64 equal ones. H is its own inverse, so
dx is turned back by it; nothing is measured or stored. With `outliers` such columns are multiplied apart instead, in
x's own type (LLM.int8(), arXiv:2208.07339, section 3.2).

Where something is known of the inputs (inputs.py), codes are chosen column by column, each making up for the errors of
those before it (rounding.py); the scales are the same, and so is all that is done with the codes.

int8.py and fp8.py say what a code is and which instruction multiplies. A device without the instruction unpacks W for
each product and leaves inputs unrounded, or, with VENEER_KERNELS=emulate, rounds them all the same and multiplies the
rounded numbers in fp32: the reference, and what quality is measured with where there is no such hardware.
"""

from __future__ import annotations

import os
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from veneer.quant.inputs import Inputs
from veneer.quant.rounding import off_in_turn, plan_rounding, round_in_turn
from veneer.quant.storage import NEAREST, Parts, Recipe, Rounding, Storage, say_once, use_kernels

__all__ = [
    "LARGEST", "RowScaled", "forget", "keep_turned", "quantize_plain", "quantize_rows", "remember",
    "remembered", "rotated",
]  # fmt: skip

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINY = 1e-12  # a row of zeros gets this scale
LAST_PLACE, SCALE_OFF = 2**-10, 2**-7  # what turning in TF32, or a scale kept in fp16, may add: shares of the largest
WIDTHS = (64, 16, 4)  # of H: powers of 4, whose entries +-1/8, +-1/4 and +-1/2 are exact in every type


class RowScaled(Storage):
    names = ("weight_scale",)
    kind: ClassVar[str]
    code: ClassVar[torch.dtype]
    held: ClassVar[torch.dtype]  # what the codes are kept as

    @abstractmethod
    def multiply(
        self, a: Tensor, rows: Tensor, b: Tensor, columns: Tensor | None, dtype: torch.dtype
    ) -> Float[Tensor, "t m"]:
        """Codes (t, n) times codes (n, m), times the scale of each row and, where given, of each column."""

    def pack(self, w: Tensor, recipe: Recipe, inputs: Inputs | None = None) -> Parts:
        width = self.width(w.shape[1], recipe)
        if inputs is None:
            codes, scale = quantize_rows(w.float(), self.code, width=width)
        else:
            codes, scale = in_turn(rotated(w.float(), width), self.code, turned_alike(inputs, width))
        return codes.view(self.held), scale

    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> Tensor:
        w = parts[0].view(self.code).to(torch.float32) * parts[1][:, None]
        return rotated(w, self.width(shape[1], recipe)).to(dtype)

    def rows(
        self, parts: Parts, shape: tuple[int, int], index: Int[Tensor, " n"], dtype: torch.dtype, recipe: Recipe
    ) -> Tensor:
        return self.unpack((parts[0][index], parts[1][index]), (len(index), shape[1]), dtype, recipe)

    @abstractmethod
    def step(self, q: Tensor, scale: Tensor) -> Tensor:
        """The most by which a number may lie from q, the nearest that there is a code for."""

    def off_by(
        self,
        w: Float[Tensor, "n cols"],
        parts: Parts,
        shape: tuple[int, int],
        index: Int[Tensor, " n"],
        recipe: Recipe,
        rounding: Rounding = NEAREST,
    ) -> Float[Tensor, " n"]:
        """In the turned columns, where codes are chosen. A row's largest size has the largest code."""
        width = self.width(shape[1], recipe)
        w, scale = rotated(w.float(), width), parts[1][index][:, None]
        q, largest = parts[0][index].view(self.code).float() * scale, w.abs().amax(dim=1, keepdim=True)
        allowed = (self.step(q, scale) + LAST_PLACE * largest).clamp_min(TINY)
        if rounding.weighed:
            inputs = None if rounding.inputs is None else turned_alike(rounding.inputs, width)
            off = off_in_turn(w, q, allowed, inputs)
        else:
            off = ((w - q).abs() / allowed).amax(dim=1)
        wanted = (largest / LARGEST[self.code]).clamp_min(TINY)
        return torch.maximum(off, ((wanted - scale).abs() / (SCALE_OFF * wanted))[:, 0])

    def product(self, x: Float[Tensor, "t cols"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        if (multiply := self._way(x, shape, recipe)) is None:
            return super().product(x, parts, shape, recipe)
        codes, scale = parts
        large = x.new_empty(0) if recipe.outliers is None else (x.abs() >= recipe.outliers).any(dim=0).nonzero()[:, 0]
        rest = x.index_fill(1, large, 0) if len(large) else x
        x_q, s = quantize_rows(rest, self.code, width=self.width(shape[1], recipe))
        y = multiply(x_q, s, codes.view(self.code).T, scale, x.dtype)
        if not len(large):
            return y
        apart = self.unpack((codes[:, large], scale), (shape[0], len(large)), x.dtype, recipe)
        return y.addmm_(x[:, large], apart.T)

    def product_back(self, g: Float[Tensor, "t rows"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        if (multiply := self._way(g, shape, recipe)) is None:
            return super().product_back(g, parts, shape, recipe)
        codes, scale = parts
        g_q, s = quantize_rows(g, self.code, scale)
        dx = multiply(g_q, s, turned(codes).view(self.code).T, None, g.dtype)
        return rotated(dx, self.width(shape[1], recipe))

    def width(self, cols: int, recipe: Recipe) -> int:
        """How many neighbouring columns are turned together; 1 for none."""
        return next((w for w in WIDTHS if cols % w == 0), 1) if self.turns(recipe) else 1

    def turns(self, recipe: Recipe) -> bool:
        wanted = self.rotates if recipe.rotate is None else recipe.rotate
        return wanted and recipe.outliers is None

    def products_back(
        self, gs: Sequence[Tensor], stored: Sequence[tuple[Parts, tuple[int, int]]], recipe: Recipe
    ) -> Tensor:
        """All at once: with their gradients side by side, and W under W, the sum is one product."""
        ways = [self._way(g, shape, recipe) for g, (_, shape) in zip(gs, stored, strict=True)]
        if len(gs) == 1 or (multiply := ways[0]) is None or None in ways:
            return super().products_back(gs, stored, recipe)
        g_q, s = quantize_beside(gs, self.code, [scale for (_, scale), _ in stored])
        forget()  # nothing else reads these codes, and they are large
        codes = turned(*(codes for (codes, _), _ in stored))
        dx = multiply(g_q, s, codes.view(self.code).T, None, gs[0].dtype)
        return rotated(dx, self.width(stored[0][1][1], recipe))

    def rounds_to(self, recipe: Recipe, device: torch.device) -> torch.dtype | None:
        as_it_is = recipe.dynamic and recipe.outliers is None and not self.turns(recipe)
        return self.code if as_it_is and _against(device, self.kind) is None else None

    def rounds_back(
        self, gs: Sequence[Tensor], stored: Sequence[tuple[Parts, tuple[int, int]]], recipe: Recipe
    ) -> tuple[torch.dtype, tuple[Tensor, ...]] | None:
        if not use_kernels(gs[0]) or any(self._way(gs[0], shape, recipe) != self.multiply for _, shape in stored):
            return None
        return self.code, tuple(scale for (_, scale), _ in stored)

    def _way(self, x: Tensor, shape: tuple[int, int], recipe: Recipe) -> Multiply | None:
        """How 8-bit products are formed here; None where W is unpacked instead, and why is said once."""
        if not recipe.dynamic or not x.shape[0]:
            return None
        reason = _against(x.device, self.kind) or _shape_against(shape, x, self.kind)
        if reason is None:
            return self.multiply
        if os.environ.get("VENEER_KERNELS") == "emulate":
            return multiply_plain
        why = f"{self.kind}: {reason}, so weights are unpacked for each product; slower, and inputs stay unrounded"
        say_once(why)
        return None


Multiply = Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


def multiply_plain(a: Tensor, rows: Tensor, b: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The reference: the same rounded numbers, multiplied in fp32."""
    y = (a.float() @ b.float()) * rows[:, None]
    return (y if columns is None else y * columns).to(dtype)


@cache
def hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "width width"]:
    """Of size 1, and H -> [[H, H], [H, -H]]; symmetric, and by its scale orthogonal."""
    h = torch.ones(1, 1, device="cpu")
    while len(h) < width:
        h = torch.cat([torch.cat([h, h], dim=1), torch.cat([h, -h], dim=1)])
    return (h * width**-0.5).to(device, dtype)


def rotated(x: Float[Tensor, "*t n"], width: int) -> Float[Tensor, "*t n"]:
    """Each `width` neighbouring columns times H; done twice it is x again."""
    if width == 1:
        return x
    return (x.unflatten(-1, (-1, width)) @ hadamard(width, x.dtype, x.device)).flatten(-2)


def in_turn(w: Float[Tensor, "rows cols"], dtype: torch.dtype, inputs: Inputs) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """W as 8-bit codes such that its products with these inputs are near, and a scale for each row."""
    scale, values = _scales(w, dtype), code_values(dtype, w.device)
    index = round_in_turn(w, scale, w.shape[1], values, plan_rounding(inputs))
    return values[index.int()].to(dtype), scale


def turned_alike(inputs: Inputs, width: int) -> Inputs:
    """What is known of x as known of x H: H^T (D + V^T V) H, whose diagonal has the mean of D over each `width`."""
    if width == 1 or inputs.directions is None:
        return inputs if width == 1 else Inputs(_spread(inputs.energy, width))
    v = inputs.directions.double()
    turned = rotated(v, width)
    rest = (inputs.energy.double() - v.square().sum(0)).clamp_min(0)
    return Inputs(_spread(rest, width) + turned.square().sum(0), turned)


def _spread(energy: Float[Tensor, " n"], width: int) -> Float[Tensor, " n"]:
    return energy.view(-1, width).mean(1).repeat_interleave(width)


@cache
def code_values(dtype: torch.dtype, device: torch.device) -> Float[Tensor, " codes"]:
    """The numbers that codes stand for, from the least to the largest."""
    if dtype == torch.int8:
        return torch.arange(-127.0, 128.0, device=device)
    every = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).float()
    return every[every.isfinite()].unique().to(device)  # one zero, no NaN


def quantize_rows(
    x: Float[Tensor, "t n"], dtype: torch.dtype, columns: Float[Tensor, " n"] | None = None, width: int = 1
) -> tuple[Tensor, Float[Tensor, " t"]]:
    """x (rotated by `width`, and times `columns`, where given) as 8-bit codes and a scale for each row."""
    if torch.compiler.is_compiling() or not use_kernels(x) or x.dtype == torch.float64:
        return quantize_plain(rotated(x, width), dtype, columns)
    from veneer.quant.cuda import quantize_rows_kernel

    if columns is not None or x.is_inference():
        return quantize_rows_kernel(rotated(x, width), dtype, columns)
    if (known := remembered([x], dtype, width)) is not None:
        return known
    found = quantize_rows_kernel(rotated(x, width), dtype)
    remember([x], *found, width)
    return found


def quantize_beside(
    xs: Sequence[Float[Tensor, "t _"]], dtype: torch.dtype, columns: Sequence[Float[Tensor, " _"]]
) -> tuple[Tensor, Float[Tensor, " t"]]:
    """Several matrices times their `columns`, as if they lay side by side: one row of codes and one scale for all."""
    if torch.compiler.is_compiling() or not use_kernels(xs[0]) or xs[0].dtype == torch.float64 or len(xs) > 3:
        return quantize_plain(torch.cat(list(xs), dim=1), dtype, torch.cat(list(columns)))
    if (known := remembered(xs, dtype, of=columns)) is not None:
        return known
    from veneer.quant.cuda import quantize_beside_kernel

    return quantize_beside_kernel(xs, dtype, columns)


def remember(
    xs: Sequence[Tensor], codes: Tensor, scale: Tensor, width: int = 1, of: Sequence[Tensor] | None = None
) -> None:
    """Whoever made `xs` (times `of`, side by side) rounded them in the same pass: products that read them next find it
    done."""
    _last.held = [(weakref.ref(x), x._version) for x in xs]
    _last.state, _last.found = (codes.dtype, width, _places(of)), (codes, scale)


def remembered(
    xs: Sequence[Tensor], dtype: torch.dtype, width: int = 1, of: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """What these were rounded to, if they were the last and are as they were."""
    same = len(xs) == len(_last.held) and all(
        held() is x and version == x._version for x, (held, version) in zip(xs, _last.held, strict=True)
    )
    return _last.found if same and _last.state == (dtype, width, _places(of)) else None


def _places(of: Sequence[Tensor] | None) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in of or ())


def forget() -> None:
    """A graph is about to be recorded, or was: what was rounded outside of it is not there when it is replayed."""
    _last.held, _last.state, _last.found = [], None, None


class Last:
    """What was rounded last: q, k and v read one input, gate and up another."""

    held: Sequence[tuple[weakref.ref[Tensor], int]] = ()
    state: tuple[torch.dtype, int, tuple[int, ...]] | None = None
    found: tuple[Tensor, Tensor] | None = None


_last = Last()


class Turned(NamedTuple):
    """A transpose that is kept, and what it was made of."""

    made_of: tuple[tuple[int, int], ...]  # place and version of each
    codes: Tensor


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # codes -> Turned, or None where none was needed yet


def keep_turned(codes: Tensor, keep: bool = True) -> None:
    """From now on the transpose that begins with these codes is kept when it is made: as many bytes again."""
    if keep:
        _kept.setdefault(codes, None)
    else:
        _kept.pop(codes, None)


def turned(*codes: Tensor) -> Tensor:
    """The transpose of several side by side, as long as they are as they were from memory where it is kept."""
    if codes[0] not in _kept:
        return turn(*codes)
    made_of = tuple((each.data_ptr(), each._version) for each in codes)
    if (kept := _kept[codes[0]]) is not None and kept.made_of == made_of:
        return kept.codes
    made = turn(*codes)
    if not (made.is_cuda and torch.cuda.is_current_stream_capturing()):  # a graph's memory is not ours to keep
        _kept[codes[0]] = Turned(made_of, made)
    return made


def turn(*codes: Tensor) -> Tensor:
    """The transpose, on a GPU in memory of its own, of several side by side: products are quickest when each matrix
    lies along the summed axis."""
    if codes[0].is_cuda and not torch.compiler.is_compiling() and use_kernels(codes[0]):
        from veneer.quant import cuda

        return cuda.turn(*codes)
    if len(codes) > 1:
        return torch.cat([each.T for each in codes], dim=1)
    return codes[0].T.contiguous() if codes[0].is_cuda else codes[0].T


def quantize_plain(x: Tensor, dtype: torch.dtype, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference; under torch.compile this very code, which the compiler fuses with what made x."""
    wide = x.float() if columns is None else x.float() * columns
    scale = _scales(wide, dtype)
    scaled = wide * (1 / scale)[:, None]
    if dtype == torch.int8:
        scaled = scaled.round()
    limit = LARGEST[dtype]
    return scaled.clamp(-limit, limit).to(dtype), scale


def _scales(wide: Tensor, dtype: torch.dtype) -> Float[Tensor, " rows"]:
    return (wide.abs().amax(dim=1) / LARGEST[dtype]).clamp_min(TINY)


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
