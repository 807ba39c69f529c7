"""`model.base_model`: what stands there for PEFT's LoraModel.

PEFT puts two objects around a model, and scripts reach through them: `peft_model.base_model.model` is the model they
began with, and `peft_model.base_model` answers most of the PeftModel's calls as well. Here there is one object, so this
is a view of it. transformers has a property of the same name - the body without the head - and asks it a few questions
of its own; those it answers as transformers means them.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from veneer.peft.config import LoraConfig

__all__ = ["LoraModel"]

ASKED_BY_TRANSFORMERS = (
    *("get_encoder", "set_encoder", "get_decoder", "set_decoder", "get_input_embeddings", "set_input_embeddings"),
    *("_tp_plan", "_pp_plan"),
)


class LoraModel:
    """The adapted model seen as PEFT's tuner. `.model` is the model; every other attribute is the model's own."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | dict[str, LoraConfig] | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        if config is not None:
            from veneer.peft.model import get_peft_model

            configs = config if isinstance(config, dict) else {adapter_name: config}
            for name, one in configs.items():
                model = get_peft_model(model, one, name)
        self.model: Any = model

    @property
    def body(self) -> nn.Module:
        """What transformers means by base_model: the model without its head, or the model itself."""
        return getattr(self.model, getattr(self.model, "base_model_prefix", ""), self.model)

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise AttributeError(name)
        if name not in ASKED_BY_TRANSFORMERS:
            return getattr(self.model, name)
        if self.body is self.model:  # its answer would come back to this question
            raise AttributeError(name)
        return getattr(self.body, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return other is self.body or (isinstance(other, LoraModel) and other.model is self.model)

    def __hash__(self) -> int:
        return id(self.model)

    def __repr__(self) -> str:
        return f"LoraModel(\n  (model): {self.model!r}\n)"

    def __dir__(self) -> list[str]:
        with suppress(AttributeError):
            return sorted({*object.__dir__(self), *dir(self.model)})
        return list(object.__dir__(self))
