"""AutoPeftModelFor...: a saved adapter together with the base that its config names."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from veneer.errors import CheckpointError, ConfigError
from veneer.peft.config import AnyConfig, PeftConfig
from veneer.peft.model import KINDS, PeftModel, task_of

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

TRUSTED = ("transformers", "diffusers")  # an adapter's file may name a class to import; only from these


class AutoPeftModel:
    """Loads the base that an adapter was trained on, then the adapter."""

    task: ClassVar[str | None] = None
    auto_class: ClassVar[str | None] = None  # of transformers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is not built but loaded: {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AnyConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """kwargs go to the base's own from_pretrained (dtype, device_map, trust_remote_code ...)."""
        where = str(pretrained_model_name_or_path)
        found = PeftConfig.from_pretrained(where, revision=revision) if revision else PeftConfig.from_pretrained(where)
        if not found.base_model_name_or_path:
            raise CheckpointError(
                "The adapter does not say which base it belongs to.",
                where,
                "load the base yourself and call PeftModel.from_pretrained(base, folder)",
            )
        kind = cls._base_class(found, where, import_allowlist or list(TRUSTED))
        base = kind.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        _fit_vocabulary(base, Path(where), kwargs)
        peft = KINDS[cls.task] if cls.task else PeftModel
        return peft.from_pretrained(base, where, adapter_name, is_trainable, config, revision=revision)

    @classmethod
    def _base_class(cls, config: AnyConfig, where: str, allowed: list[str]) -> Any:
        task = task_of(config)
        if cls.auto_class is not None:
            if task is not None and task != cls.task:
                raise ConfigError(
                    f"this adapter is for {task}, not for {cls.task}", where, fix=f"use {_auto_name(task)} instead"
                )
            return getattr(import_module("transformers"), cls.auto_class)
        if task is not None:
            raise ConfigError(f"this adapter is for {task}", where, fix=f"use {_auto_name(task)} instead")
        named = config.auto_mapping or {}
        library, name = named.get("parent_library", ""), named.get("base_model_class", "")
        if library.partition(".")[0] not in {entry.partition(".")[0] for entry in allowed}:
            raise ConfigError(
                f"the adapter asks to import {name or 'nothing'} from {library or 'nowhere'}, which is not trusted",
                where,
                fix=f"import_allowlist=[{library!r}] if you trust it, or load the base yourself",
            )
        return getattr(import_module(library), name)


def _auto_name(task: str) -> str:
    return next(c.__name__ for c in AutoPeftModel.__subclasses__() if c.task == task)


def _fit_vocabulary(base: Any, folder: Path, kwargs: dict[str, Any]) -> None:
    """A tokenizer saved beside the adapter may know more tokens than the base has rows for."""
    if not (folder / "tokenizer_config.json").is_file() or not hasattr(base, "get_input_embeddings"):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=kwargs.get("trust_remote_code", False))
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    task, auto_class = "CAUSAL_LM", "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task, auto_class = "SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task, auto_class = "SEQ_CLS", "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task, auto_class = "TOKEN_CLS", "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task, auto_class = "QUESTION_ANS", "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task, auto_class = "FEATURE_EXTRACTION", "AutoModel"
