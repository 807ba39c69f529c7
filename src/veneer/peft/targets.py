"""Which layers are adapted when a LoraConfig does not say: PEFT's choice for each architecture.

Nearly all of them are the query and value projections, under whatever name the architecture gives them.
"""

from __future__ import annotations

from torch import nn

from veneer.core.registry import near
from veneer.errors import ConfigError

__all__ = ["default_targets"]

TARGETS: dict[tuple[str, ...], str] = {  # target modules -> model types (config.model_type)
    ("q_proj", "v_proj"): "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
    "stablelm",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("q", "v"): "t5 mt5",
    ("query_key_value",): "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("qkv_proj",): "codegen",
    ("c_proj", "c_attn"): "btlm",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
BY_TYPE = {kind: set(targets) for targets, kinds in TARGETS.items() for kind in kinds.split()}
OTHERWISE = {  # method -> model type -> target modules, where PEFT's choice differs from LoRA's
    "VERA": {"phi": "q_proj v_proj"},
    "ADALORA": {
        "t5": "q k v o wi wo",
        "mt5": "q k v o wi_0 wi_1 wo",
        **dict.fromkeys(("bart", "opt"), "q_proj k_proj v_proj out_proj fc1 fc2"),
        "roberta": "query key value dense",
        "deberta-v2": "query_proj key_proj value_proj dense",
    },
}
PATTERNS = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}  # its vision tower has the same names


def default_targets(model: nn.Module, method: str = "LORA") -> set[str] | str:
    """The target modules for this model's architecture; a method may have a choice of its own."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in OTHERWISE.get(method, {}):
        return set(OTHERWISE[method][kind].split())
    if kind in PATTERNS:
        return PATTERNS[kind]
    if kind in BY_TYPE:
        return set(BY_TYPE[kind])
    raise ConfigError(
        f"no target_modules given, and there is no default for model type {kind!r}."
        f"{near(kind, BY_TYPE) if kind else ''}",
        where=type(model).__name__,
        fix="target_modules='all-linear' adapts every linear layer but the head; or a list of name endings",
    )
