"""`model.base_model`, a name of two libraries.

For PEFT it is the LoraModel inside the PeftModel: `peft_model.base_model.model` is the model one began with, and most
of the PeftModel's methods can be called on it. For transformers, and for trainers built on it, it is the model's body:
they call it for hidden states. There is one object here, so this view of it answers both: PEFT's names (`model`,
`merge_and_unload`, `peft_config` ...) by the model, everything else by the body, and what the body lacks by the model.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from veneer.peft.config import LoraConfig

__all__ = ["LoraModel"]

ASKED_OF_THE_BODY = (  # what transformers' own methods pass on to it
    *("get_encoder", "set_encoder", "get_decoder", "set_decoder", "get_input_embeddings", "set_input_embeddings"),
    *("_tp_plan", "_pp_plan"),
)


class LoraModel:
    """An adapted model seen as PEFT's tuner and as transformers' body at once."""

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
        self.__dict__["model"] = model

    @property
    def body(self) -> Any:
        """What transformers means: the model without its head, or, where it has no such part, the model itself."""
        model = self.__dict__["model"]
        return getattr(model, getattr(model, "base_model_prefix", "") or "", model)

    def __getattr__(self, name: str) -> Any:
        if "model" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        model, body = self.__dict__["model"], self.body
        if body is model and name in ASKED_OF_THE_BODY:  # its answer would come back to this question
            raise AttributeError(name)
        is_pefts = any(name in vars(kind) for kind in type(model).__mro__ if kind.__module__ == "veneer.peft.model")
        return getattr(model, name) if is_pefts or not hasattr(body, name) else getattr(body, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.body, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

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
