"""What a storage of frozen weights is.

    storage   bits a weight   what is stored for a matrix (rows, cols)
    nf4       4.127           4-bit quantiles of a normal; an 8-bit scale for 64, an fp32 scale for 64 x 256
    int8      8 + 32/cols     whole numbers; an fp32 scale for each row
    fp8       8 + 32/cols     e4m3 floats; an fp32 scale for each row

A storage sees matrices only. `layer.py` turns the weight of any layer kind into one: rows are output channels (of an
embedding: tokens), so one scale for each row is one scale for each result of a product. A storage that multiplies in
its own type overrides `product` and `product_back`; the ones here take the matrix apart first and are the reference.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from veneer.core.registry import Registry
from veneer.errors import ConfigError
from veneer.quant.inputs import Inputs

__all__ = [
    "EIGHT", "NEAREST", "STORAGES", "Parts", "Recipe", "Rounding", "Storage", "say_once", "storage_of", "use_kernels",
]  # fmt: skip

Parts = tuple[Tensor, ...]
"""The tensors that a packed matrix is made of, the codes first."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes' kernels take


EIGHT = ("int8", "fp8")
CONCERNS = {"block": ("nf4",), "double": ("nf4",), "dynamic": EIGHT, "rotate": EIGHT, "outliers": EIGHT}


class Recipe(NamedTuple):
    """How one matrix is stored and multiplied.

    block, double: nf4 only; weights to a scale, and whether the scales are packed in 8 bits, too.
    dynamic: int8 and fp8 only; inputs are rounded to 8 bits row by row and multiplied in 8 bits. Otherwise the matrix
    is unpacked for each product, which is slower and leaves the inputs as they are.
    rotate: int8 and fp8 only; W and its inputs are turned alike before they are rounded, so that no column stands out.
    None is what the storage does by itself.
    outliers: int8 and fp8 only, in place of rotate; input columns with a value of at least this size are multiplied in
    the input's own type.
    """

    kind: str
    block: int = 64
    double: bool = True
    dynamic: bool = True
    outliers: float | None = None
    rotate: bool | None = None

    def checked(self) -> Recipe:
        storage_of(self)
        problems = []
        if self.block not in BLOCKS:
            problems.append(f"block={self.block!r} is none of {', '.join(map(str, BLOCKS))}")
        usual = Recipe(
            self.kind, rotate=self.rotate if self.rotate is False else None
        )  # False is what others do anyway
        for option, kinds in CONCERNS.items():
            if self.kind not in kinds and getattr(self, option) != getattr(usual, option):
                problems.append(f"{option}={getattr(self, option)!r} is for {' and '.join(kinds)}, not for {self.kind}")
        if self.outliers is not None and not self.outliers > 0:
            problems.append(f"outliers={self.outliers!r} must be above 0")
        if problems:
            raise ConfigError("the base cannot be stored like this", problems=problems)
        return self if self.rotate is not None else self._replace(rotate=storage_of(self).rotates)


class Rounding(NamedTuple):
    """How a matrix was rounded: each weight to its nearest code, or (`weighed`) so that its products are near, for the
    inputs that are given where they are known."""

    weighed: bool = False
    inputs: Inputs | None = None


NEAREST = Rounding()


class Storage(ABC):
    """One way to hold a frozen matrix. All methods get the recipe and the parts; nothing is kept here."""

    names: ClassVar[tuple[str, ...]]  # of the parts after the codes, as the layer's buffers are called
    rotates: ClassVar[bool] = False  # unless the recipe says otherwise
    weighs: ClassVar[bool] = False  # whether `pack` makes use of what is known of inputs

    def part_names(self, recipe: Recipe) -> tuple[str, ...]:
        return self.names

    @abstractmethod
    def pack(self, w: Float[Tensor, "rows cols"], recipe: Recipe, inputs: Inputs | None = None) -> Parts:
        """inputs: what is known of those that W will meet; it is then rounded so that their products are near."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, int], dtype: torch.dtype, recipe: Recipe) -> Tensor: ...

    @abstractmethod
    def rows(
        self, parts: Parts, shape: tuple[int, int], index: Int[Tensor, " n"], dtype: torch.dtype, recipe: Recipe
    ) -> Float[Tensor, "n cols"]:
        """Some rows of the matrix: what an embedding looks up."""

    @abstractmethod
    def off_by(
        self,
        w: Float[Tensor, "n cols"],
        parts: Parts,
        shape: tuple[int, int],
        index: Int[Tensor, " n"],
        recipe: Recipe,
        rounding: Rounding = NEAREST,
    ) -> Float[Tensor, " n"]:
        """How far these rows of the packed matrix are from w, 1 being the most that rounding and its scales leave.

        Written from the format alone: it is what a proof holds `pack` against."""

    def rounds_to(self, recipe: Recipe, device: torch.device) -> torch.dtype | None:
        """The type to which a product rounds its input, row by row; whoever makes the input may do it in passing."""
        return None

    def rounds_back(
        self, gs: Sequence[Tensor], stored: Sequence[tuple[Parts, tuple[int, int]]], recipe: Recipe
    ) -> tuple[torch.dtype, tuple[Tensor, ...]] | None:
        """To which type `products_back` rounds the gs, side by side, and what it multiplies their columns by before."""
        return None

    def product(self, x: Float[Tensor, "t cols"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        """x W^T."""
        return F.linear(x, self.unpack(parts, shape, x.dtype, recipe))

    def product_back(self, g: Float[Tensor, "t rows"], parts: Parts, shape: tuple[int, int], recipe: Recipe) -> Tensor:
        """g W: how a gradient passes through."""
        return g @ self.unpack(parts, shape, g.dtype, recipe)

    def products_back(
        self, gs: Sequence[Tensor], stored: Sequence[tuple[Parts, tuple[int, int]]], recipe: Recipe
    ) -> Tensor:
        """The sum of g W over layers that read one input."""
        total, *others = (self.product_back(g, *each, recipe) for g, each in zip(gs, stored, strict=True))
        for other in others:
            total.add_(other)
        return total


STORAGES: Registry[Storage] = Registry("storage")


def storage_of(recipe: Recipe) -> Storage:
    return STORAGES[recipe.kind]


def use_kernels(x: Tensor) -> bool:
    """Whether cuda.py's kernels run for x. VENEER_KERNELS=plain keeps a GPU on the references (emulate: see
    eight.py); inside torch.compile the compiler writes its own."""
    if not x.is_cuda or os.environ.get("VENEER_KERNELS") == "plain":
        return False
    if find_spec("triton") is None:
        say_once("quant: Triton is not installed, so packed weights are handled by plain PyTorch; slower")
        return False
    return True


_said: set[str] = set()


@torch.compiler.disable
def say_once(message: str) -> None:
    """A slower path was taken; each reason is told once in a process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
