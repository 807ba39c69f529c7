"""The same model twice: once under PEFT, once under veneer.peft, with the same values in both adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

Run = Callable[..., torch.Tensor]


@pytest.fixture
def peft() -> ModuleType:
    """PEFT itself. Its own remarks are not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@torch.no_grad()
def spread(model: nn.Module, scale: float = 0.1) -> None:
    """Move everything that is trained away from its start: with B = 0 all laws hold."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)) % 1000 + parameter.numel())
            move = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(move.to(parameter))


@pytest.fixture
def twins(peft: ModuleType, make_model: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """twins("llama", r=4, ...): (PEFT's model, ours), same base, same config, same moved values."""

    def make(
        kind: str = "llama", head: str | None = None, method: str = "LoraConfig", **config: Any
    ) -> tuple[Any, Any]:
        import veneer.peft

        models = []
        for library in (peft, veneer.peft):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if library is peft else "error")
                base = make_model(kind, head)
                models.append(library.get_peft_model(base, getattr(library, method)(**config)).eval())
        theirs, ours = models
        spread(theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(theirs).items()}
        result = veneer.peft.set_peft_model_state_dict(ours, state)
        assert result.missing_keys == [] and result.unexpected_keys == []
        return theirs, ours

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(7, 380, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def run() -> Run:
    """Logits of whatever model it is."""

    def logits(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        extra = {"decoder_input_ids": tokens} if getattr(model.config, "is_encoder_decoder", False) else {}
        with torch.no_grad():
            return model(input_ids=tokens, **extra, **kwargs).logits

    return logits
