"""PEFT's names for LoRA and its relatives, over Veneer's core: change the import line of a script, and it runs.

    from veneer.peft import LoraConfig, PeftModel, get_peft_model

The files are PEFT's, both ways. Names that PEFT has and Veneer has not say so when they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from veneer.core.registry import near

_HOME = {
    **dict.fromkeys(
        (
            "AdaLoraConfig",
            "LoHaConfig",
            "LoKrConfig",
            "LoraConfig",
            "LoraRuntimeConfig",
            "PeftConfig",
            "PeftType",
            "TaskType",
            "VeraConfig",
            "get_peft_config",
        ),
        "veneer.peft.config",
    ),
    **dict.fromkeys(
        (
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "adopt",
            "get_peft_model",
            "inject_adapter_in_model",
            "release",
        ),
        "veneer.peft.model",
    ),
    "LoraModel": "veneer.peft.tuner",
    **dict.fromkeys(
        ("get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"), "veneer.peft.states"
    ),
    "hotswap_adapter": "veneer.peft.files",
    **dict.fromkeys(
        ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"), "veneer.peft.status"
    ),
    **dict.fromkeys(
        (
            "cast_mixed_precision_params",
            "check_if_peft_model",
            "prepare_model_for_kbit_training",
            "rescale_adapter_scale",
        ),
        "veneer.peft.helpers",
    ),
    "create_loraplus_optimizer": "veneer.peft.optimizers",
    **dict.fromkeys(
        (
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ),
        "veneer.peft.auto",
    ),
}

__all__ = [
    "AdaLoraConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "VeraConfig",
    "adopt",
    "cast_mixed_precision_params",
    "check_if_peft_model",
    "create_loraplus_optimizer",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "release",
    "rescale_adapter_scale",
    "set_peft_model_state_dict",
]

if TYPE_CHECKING:
    from veneer.peft.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from veneer.peft.config import (
        AdaLoraConfig,
        LoHaConfig,
        LoKrConfig,
        LoraConfig,
        LoraRuntimeConfig,
        PeftConfig,
        PeftType,
        TaskType,
        VeraConfig,
        get_peft_config,
    )
    from veneer.peft.files import hotswap_adapter
    from veneer.peft.helpers import (
        cast_mixed_precision_params,
        check_if_peft_model,
        prepare_model_for_kbit_training,
        rescale_adapter_scale,
    )
    from veneer.peft.model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        adopt,
        get_peft_model,
        inject_adapter_in_model,
        release,
    )
    from veneer.peft.optimizers import create_loraplus_optimizer
    from veneer.peft.states import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from veneer.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
    from veneer.peft.tuner import LoraModel


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name.startswith("_"):
        raise AttributeError(name)
    served = "LoRA, AdaLoRA, VeRA, LoHa and LoKr"
    raise AttributeError(f"veneer.peft has no {name!r}: of PEFT's methods it serves {served}.{near(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
