"""What hangs on any module inside a fused block of a denoiser, or takes its place, is done: it looks at each call.

Over kinds of blocks x how a module is changed x every module of the block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import veneer
from veneer import LoRA
from veneer.core.host import plain_modules
from veneer.core.model import parameters
from veneer.kernels import fuse as home
from veneer.kernels.fuse import FusedModule, fuse

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention import BasicTransformerBlock  # noqa: E402
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402
from diffusers.models.transformers.transformer_flux import (  # noqa: E402
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.upsampling import Upsample2D  # noqa: E402


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Case:
    """A block, what it is called with, and which of its modules nothing is asked of in such a call."""

    def __init__(self, block: Any, *inputs: Tensor, targets: tuple[str, ...] = (), **named: Any) -> None:
        self.block, self.inputs, self.named = block, inputs, named
        for p in block.requires_grad_(False).parameters():
            if p.ndim == 1:
                nn.init.normal_(p, 0.5, 0.3)
        if targets:
            veneer.attach(block, LoRA(rank=2, targets=list(targets)))
            for p in parameters(block).values():
                nn.init.normal_(p, std=0.2)

    def outcome(self) -> list[Tensor]:
        x = self.inputs[0].clone().requires_grad_()
        found = self.block(x, *self.inputs[1:], **self.named)
        ys = list(found) if isinstance(found, tuple) else [found]
        trained = [p for p in self.block.parameters() if p.requires_grad]
        ds = torch.autograd.grad(ys, [x, *trained], [torch.cos(y.detach()) for y in ys], allow_unused=True)
        return [*(y.detach() for y in ys), *(d for d in ds if d is not None)]


def transformer_block() -> Case:
    block = BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)
    return Case(block, rand(2, 9, 8), targets=("to_q", "net.2"), encoder_hidden_states=rand(2, 5, 6))


def residual_block() -> Case:
    return Case(ResnetBlock2D(in_channels=8, out_channels=4, temb_channels=6, groups=2), rand(2, 8, 4, 4), rand(2, 6))


def sampler() -> Case:
    return Case(Upsample2D(4, use_conv=True), rand(2, 4, 4, 4))


def streams() -> Case:
    return Case(FluxTransformerBlock(16, 2, 8), rand(2, 9, 16), rand(2, 5, 16), rand(2, 16), targets=("to_q", "net.2"))


def single() -> Case:
    block = FluxSingleTransformerBlock(16, 2, 8)
    return Case(block, rand(2, 9, 16), rand(2, 5, 16), rand(2, 16), targets=("to_q", "proj_out"))


CASES: dict[str, Callable[[], Case]] = {
    each.__name__: each for each in (transformer_block, residual_block, sampler, streams, single)
}
Undo = Callable[[], Any]
Change = Callable[[nn.Module, str, nn.Module, list[int]], Undo]


def hooked(holder: nn.Module, key: str, module: nn.Module, seen: list[int]) -> Undo:
    return module.register_forward_hook(lambda *_: seen.append(0)).remove


def hooked_on_the_way_back(holder: nn.Module, key: str, module: nn.Module, seen: list[int]) -> Undo:
    return module.register_full_backward_hook(lambda *_: seen.append(0)).remove


def with_a_forward(holder: nn.Module, key: str, module: nn.Module, seen: list[int]) -> Undo:
    own = module.forward
    module.forward = lambda *args, **kwargs: seen.append(0) or own(*args, **kwargs)
    return lambda: delattr(module, "forward")


def replaced(holder: nn.Module, key: str, module: nn.Module, seen: list[int]) -> Undo:
    class Another(nn.Module):
        def __getattr__(self, name: str) -> Any:  # what else a block asks of it
            return getattr(module, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(0)
            return module(*args, **kwargs)

    holder._modules[key] = Another()
    return lambda: holder._modules.__setitem__(key, module)


CHANGES: list[Change] = [hooked, hooked_on_the_way_back, with_a_forward, replaced]


@pytest.fixture(autouse=True)
def may_say_so() -> Any:
    home._said.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(run plainly|no inputs require gradients)")
        yield


def called(case: Case) -> list[str]:
    """The names of the modules that the block's own forward calls."""
    names = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: names.append(name))
        for name, module in plain_modules(case.block).items()
        if name
    ]
    case.outcome()
    for hook in hooks:
        hook.remove()
    return sorted(set(names))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_module_inside_is_seen_at_the_next_call(kind: str, change: Change) -> None:
    plain, case = CASES[kind](), CASES[kind]()
    fuse(case.block, verbose=False)
    assert isinstance(case.block, FusedModule)
    case.outcome()
    for name in called(CASES[kind]()):
        counts = []
        for each in (plain, case):
            seen: list[int] = []
            holder, _, key = name.rpartition(".")
            undo = change(each.block.get_submodule(holder), key, each.block.get_submodule(name), seen)
            each.outcome()
            undo()
            counts.append(len(seen))
        assert counts[0] == counts[1], name
        assert counts[0] or change is hooked_on_the_way_back, name  # what frozen layers make of the time


class Twice(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize("kind", CASES)
def test_parametrizations_are_seen(kind: str) -> None:
    """On every weight and every bias, one after the other: the same numbers as without fuse."""
    places = [
        (n, t)
        for n, m in plain_modules(CASES[kind]().block).items()
        for t in m._parameters
        if m._parameters[t] is not None
    ]
    for name, tensor in places:
        outcomes = []
        for is_fused in (False, True):
            torch.manual_seed(0)
            case = CASES[kind]()
            if is_fused:
                fuse(case.block, verbose=False)
                case.outcome()
            parametrize.register_parametrization(case.block.get_submodule(name), tensor, Twice())
            outcomes.append(case.outcome())
        assert all(torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in zip(*outcomes, strict=True)), (name, tensor)


@pytest.mark.parametrize("kind", CASES)
def test_a_hook_on_every_module_is_seen(kind: str) -> None:
    case, seen = CASES[kind](), []
    fuse(case.block, verbose=False)
    case.outcome()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        case.outcome()
    finally:
        hook.remove()
    assert len(set(map(id, seen))) > len(called(CASES[kind]()))  # all of them, and the block itself
