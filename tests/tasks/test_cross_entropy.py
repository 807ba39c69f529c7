"""The loss without logits equals the loss with them, values and gradients, whatever has been done to the head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from veneer.core.model import attach, parameters
from veneer.core.spec import LoRA
from veneer.data.types import IGNORE
from veneer.tasks.cross_entropy import chunked_cross_entropy, head_split, plain_cross_entropy


class Tail(nn.Module):
    """A head by name, so that adapters can find it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


HEADS: dict[str, Callable[[Tail], object]] = {
    "frozen": lambda net: net.requires_grad_(False),
    "adapted": lambda net: attach(net, LoRA(rank=2, targets=["head"])),
    "dora": lambda net: attach(net, LoRA(rank=2, targets=["head"], combine="dora", bias="lora_only")),
    "saved": lambda net: attach(net, LoRA(targets=(), modules_to_save=["head"])),
    "whole": lambda net: net.requires_grad_(True),
}


def labels(*shape: int) -> Tensor:
    found = torch.randint(0, 50, shape)
    found[torch.rand(shape) < 0.4] = IGNORE
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_chunked_is_plain(head: str, rows: int) -> None:
    net = Tail()
    HEADS[head](net)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    y, found = labels(3, 11), []
    for loss_of in (plain_cross_entropy, None):
        hidden = torch.randn(3, 11, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        net.zero_grad()
        loss = plain_cross_entropy(net.head(hidden), y) if loss_of else chunked_cross_entropy(hidden, y, net.head, rows)
        (loss / 17).backward()
        found.append([loss.detach(), hidden.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    for plain, chunked in zip(*found, strict=True):
        assert torch.allclose(plain, chunked, rtol=1e-4, atol=1e-5)
    assert all(gradient.any() for gradient in found[1])


def test_nothing_to_train_costs_nothing() -> None:
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.full((2, 3), IGNORE), nn.Linear(8, 50))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_evaluation_takes_no_gradient() -> None:
    hidden, y, head = torch.randn(4, 5, 8), labels(4, 5), nn.Linear(8, 50)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, y, head, 3)
    assert loss.grad_fn is None and torch.allclose(loss, plain_cross_entropy(head(hidden), y), rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_causal_models_split_into_body_and_head(kind: str, make_model: Callable[..., nn.Module]) -> None:
    model = make_model(kind)
    model.train()
    split = head_split(model, {"input_ids": torch.randint(0, 384, (2, 9))})
    assert split.body is not None and split.head is model.get_output_embeddings(), split.why
    assert model.training


def test_a_model_that_scales_its_logits_is_found_out(make_model: Callable[..., nn.Module]) -> None:
    model = make_model("llama")
    inner = model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        out = inner(*args, **kwargs)
        out.logits = out.logits / 3
        return out

    model.forward = scaled
    split = head_split(model, {"input_ids": torch.randint(0, 384, (2, 9))})
    assert split.body is None and "changes its logits" in split.why


def test_a_module_that_names_no_head_is_run_the_plain_way() -> None:
    assert "does not say" in head_split(nn.Linear(3, 3), {}).why


@pytest.mark.parametrize("tied", ["apart", "together"])
def test_an_adapted_tied_head_gets_its_gradient(make_model: Callable[..., nn.Module], tied: str) -> None:
    model = make_model("qwen2")
    attach(model, LoRA(rank=2, targets=["q_proj", "lm_head"], tied=tied))
    ids = torch.randint(0, 384, (2, 9))
    split = head_split(model, {"input_ids": ids})
    hidden = split.body(input_ids=ids)[0]
    chunked_cross_entropy(hidden[:, :-1], ids[:, 1:], split.head, 4).backward()
    got = {name: p.grad.clone() for name, p in parameters(model).items()}
    model.zero_grad()
    plain_cross_entropy(model(input_ids=ids).logits[:, :-1], ids[:, 1:]).backward()
    for name, parameter in parameters(model).items():
        assert torch.allclose(parameter.grad, got[name], rtol=1e-4, atol=1e-5), name
