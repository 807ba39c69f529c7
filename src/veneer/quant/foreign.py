"""Layers that others packed: how their weights are read, and how bitsandbytes' become ours.

    bitsandbytes   Linear4bit, Linear8bitLt as transformers makes them      read; `adopt` makes NF4 and INT8 ours
    torchao        plain layers around a tensor subclass                    read
    gptqmodel      GPTQ and AWQ layers                                      read

A `register_` function is called when core/weight.py first meets a type of that package, so whoever has none of these
packages never pays for them. Their layers run their own forward under an adapter; none is ever written.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.host import Hosted, adapted_class, original_class, plain_modules
from veneer.core.weight import dense, is_packed, read_weight
from veneer.errors import CheckpointError, TargetError
from veneer.quant.layer import packed_class, put_parts
from veneer.quant.storage import Parts, Recipe

__all__ = ["adopt", "register_bitsandbytes", "register_gptqmodel", "register_torchao"]


def adopt(model: nn.Module) -> tuple[str, ...]:
    """Turn the layers that bitsandbytes packed into ours, in place and bit for bit; returns their names.

    What stays the same: names, weights, adapters that lie on top. What changes: our kernels run, the state dict has our
    keys, dequantize works. FP4 has no place here and is left.
    """
    found = {n: m for n, m in plain_modules(model).items() if _is_bnb(m)}
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no layer from bitsandbytes", fix="veneer.quantize packs plain ones"
        )
    plans = {name: _ours(layer) for name, layer in found.items()}
    refused = [f"{name}: {plan}" for name, plan in plans.items() if isinstance(plan, str)]
    if len(refused) == len(plans):
        raise TargetError("none of the layers from bitsandbytes can be taken over", problems=refused)
    for name, plan in plans.items():
        if not isinstance(plan, str):
            _take_over(found[name], *plan)
    return tuple(name for name, plan in plans.items() if not isinstance(plan, str))


def _is_bnb(layer: nn.Module) -> bool:
    return original_class(type(layer)).__module__.startswith("bitsandbytes.")


Plan = tuple[Recipe, Parts, torch.dtype, torch.dtype | None]


def _ours(layer: Any) -> Plan | str:
    """Recipe, parts, type and compute type that make the same layer of ours; or why there is none."""
    weight = layer._parameters["weight"]
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state
        if state is None:
            return "not packed yet; move it to its device first"
        if state.quant_type != "nf4" or weight.dtype != torch.uint8:
            return f"{state.quant_type} in {weight.dtype}; only nf4 in bytes can be taken over"
        codes, state = _in_order(weight)
        return Recipe("nf4", state.blocksize, state.nested), _parts(codes, state), state.dtype, layer.compute_dtype
    if type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8:
        recipe = Recipe("int8", outliers=layer.state.threshold or None, rotate=False)
        return recipe, (weight.data, _row_scales(layer) / 127), torch.float16, None
    return f"{type(layer).__name__} with {type(weight).__name__} in {weight.dtype} has no counterpart here"


def _parts(codes: Tensor, state: Any) -> Parts:
    out, n = state.shape
    codes = codes.reshape(out, -1) if n % 2 == 0 else codes.reshape(-1, 1)
    if not state.nested:
        return codes, state.absmax
    return codes, state.absmax, state.state2.absmax, state.offset.to(torch.float32)


def _take_over(layer: Any, recipe: Recipe, parts: Parts, dtype: torch.dtype, compute: torch.dtype | None) -> None:
    for name in ("state", "index", "quant_state", "quant_storage", "compute_type_is_set", "source_cls",
                 "support_avx512bf16_for_cpu"):  # fmt: skip
        vars(layer).pop(name, None)
    layer._load_state_dict_pre_hooks.clear()  # what rearranged INT8 weights of old files
    kind = packed_class(nn.Linear)
    layer.__class__ = adapted_class(type(layer).__mro__[1], kind) if isinstance(layer, Hosted) else kind
    layer.recipe, layer.compute_dtype = recipe, compute
    layer.weight_shape, layer.weight_dtype = torch.Size((layer.out_features, layer.in_features)), dtype
    put_parts(layer, (nn.Parameter(parts[0], requires_grad=False), *parts[1:]))


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def _in_order(weight: Any) -> tuple[Tensor, Any]:
    """Codes and state of a 4-bit weight, back in order where a CPU layer has rearranged them for its own product."""
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        return weight.data, weight.quant_state
    from copy import deepcopy

    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    return _convert_weight_packed_for_cpu_inverse(weight.data, deepcopy(weight.quant_state))


def _row_scales(layer: Any) -> Tensor:
    """The largest size in each row: with the weight until the first forward, with the layer's state afterwards."""
    scales = layer.state.SCB if layer.state.SCB is not None else layer._parameters["weight"].SCB
    if scales is None:
        raise CheckpointError("an 8-bit layer has no scales (SCB)", fix="load the model again; its file is incomplete")
    return scales


@cache
def register_bitsandbytes() -> None:
    import bitsandbytes as bnb

    @dense.register(bnb.nn.Params4bit)
    def _(w: bnb.nn.Params4bit) -> Tensor:
        if w.quant_state is None:
            return w.data  # not packed yet
        codes, state = _in_order(w)
        return bnb.functional.dequantize_4bit(codes, state)

    @read_weight.register(bnb.nn.Linear8bitLt)
    def _(host: bnb.nn.Linear8bitLt) -> Tensor:
        weight = host._parameters["weight"]
        if weight.dtype != torch.int8:  # pyright: ignore[reportOptionalMemberAccess]
            return weight.data  # pyright: ignore[reportOptionalMemberAccess]
        return (weight.data.float() * (_row_scales(host) / 127)[:, None]).to(torch.float16)  # type: ignore[union-attr]

    @is_packed.register(bnb.nn.Linear8bitLt)
    def _(host: bnb.nn.Linear8bitLt) -> str | None:
        return "bitsandbytes int8" if host._parameters["weight"].dtype == torch.int8 else None  # type: ignore[union-attr]

    @is_packed.register(bnb.nn.Linear4bit)
    def _(host: bnb.nn.Linear4bit) -> str | None:
        state = host._parameters["weight"].quant_state  # type: ignore[union-attr]
        return None if state is None else f"bitsandbytes {state.quant_type}"


# --- torchao ---------------------------------------------------------------------------------------------------------


@cache
def register_torchao() -> None:
    from torchao.utils import TorchAOBaseTensor

    @dense.register(TorchAOBaseTensor)
    def _(w: TorchAOBaseTensor) -> Tensor:
        return w.dequantize()

    nf4: Any = next((kind for kind in map(_nf4_tensor, NF4_HOMES) if kind is not None), None)
    if nf4 is not None:  # older than that class, and no child of it

        @dense.register(nf4)
        def _(w: Any) -> Tensor:
            return w.get_original_weight()


NF4_HOMES = "torchao.quantization", "torchao.dtypes"  # now, and before


def _nf4_tensor(home: str) -> type | None:
    try:
        return getattr(import_module(home), "NF4Tensor", None)
    except ImportError:
        return None


# --- GPTQ and AWQ ----------------------------------------------------------------------------------------------------


@cache
def register_gptqmodel() -> None:
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear

    @read_weight.register(BaseQuantLinear)
    def _(host: BaseQuantLinear) -> Tensor:
        if hasattr(host, "awq_weight_dequantize"):
            w = host.awq_weight_dequantize(host.scales.device, host.scales.dtype)
        elif hasattr(host, "dequantize_weight"):
            w = host.dequantize_weight()
        else:
            raise TargetError(
                f"{type(host).__name__} does not give its weights back",
                fix="load the model with gptqmodel's torch backend, or from its unpacked checkpoint",
            )
        return w.T[: host.out_features, : host.in_features]

    @is_packed.register(BaseQuantLinear)
    def _(host: BaseQuantLinear) -> str | None:
        return f"gptqmodel, {host.bits} bits"
