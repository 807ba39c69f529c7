"""Loading through transformers with packed weights, tensor by tensor.

The model is built on the meta device and its layers are packed there, without values. As each weight is read from its
(sharded) file it goes to the device in full, is packed, and is gone: beside the packed model only one tensor is ever
held whole. What is packed can be saved with `save_pretrained` and loads as it is, without packing again.

    model = AutoModelForCausalLM.from_pretrained(where, quantization_config=VeneerConfig("nf4"), device_map="cuda")

transformers knows the method "veneer" once this module is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from veneer.core.host import plain_modules
from veneer.core.leaf import Leaf
from veneer.core.select import output_head
from veneer.errors import CheckpointError
from veneer.quant.inputs import load_inputs
from veneer.quant.layer import Packed, pack_layer, put_parts, to_matrix
from veneer.quant.model import choose, packed_stacks, quantize
from veneer.quant.stack import PackedStack
from veneer.quant.storage import Recipe, storage_of

__all__ = ["VeneerConfig", "VeneerQuantizer", "note_packing"]


@register_quantization_config("veneer")
class VeneerConfig(QuantizationConfigMixin):
    """The arguments of `veneer.quantize`; in a saved model also the names of the packed layers, with their types.

    energies: in place of data, a file of what was seen of it (`quant.model.save_energies`), for a model that is packed
    while it is read.
    """

    def __init__(
        self,
        kind: str = "nf4",
        *,
        targets: str | Sequence[str] = "all-linear",
        exclude: str | Sequence[str] = (),
        embedding: bool = False,
        head: bool = False,
        block: int = 64,
        double: bool = True,
        dynamic: bool = True,
        outliers: float | None = None,
        rotate: bool | None = None,
        compute_dtype: str | None = None,
        whole: Sequence[str] = (),
        layers: Mapping[str, str] | None = None,
        energies: str | None = None,
        quant_method: str = "veneer",
        **_: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.kind, self.block, self.double, self.dynamic, self.outliers = kind, block, double, dynamic, outliers
        self.rotate = False if rotate is None and layers is not None else rotate  # saved before there was a choice
        self.targets, self.exclude, self.embedding, self.head = targets, exclude, embedding, head
        self.compute_dtype = compute_dtype
        self.whole, self.layers, self.energies = whole, layers, energies
        self.recipe  # noqa: B018 - an error now is better than one in the middle of reading

    @property
    def recipe(self) -> Recipe:
        return Recipe(self.kind, self.block, self.double, self.dynamic, self.outliers, self.rotate).checked()

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "energies"}  # a place on this machine

    @property
    def options(self) -> dict[str, Any]:
        """What `quantize` takes beside the layers."""
        compute = None if self.compute_dtype is None else getattr(torch, self.compute_dtype)
        return {**self.recipe._asdict(), "compute_dtype": compute}


def note_packing(model: Any, whole: Sequence[str] = (), energies: str | None = None) -> None:
    """Write into the model's configuration how its layers are packed, so that a saved folder loads as it is."""
    packed = {n: m for n, m in plain_modules(model).items() if isinstance(m, Packed)}
    stacks = {full: owner._parameters[name] for owner, name, full in packed_stacks(model)}
    recipes = {m.recipe for m in (*packed.values(), *stacks.values())}  # type: ignore[union-attr]
    vars(model.config).pop("quantization_config", None)
    if isinstance(vars(model).get("hf_quantizer"), VeneerQuantizer):
        del model.hf_quantizer
    if len(recipes) != 1:  # nothing is packed, or in several ways, and transformers' files hold one
        return
    computes = {layer.compute_dtype for layer in packed.values()} - {None}
    compute = str(computes.pop()).removeprefix("torch.") if computes else None
    layers = {name: str(layer.weight_dtype).removeprefix("torch.") for name, layer in packed.items()}
    config = VeneerConfig(
        **recipes.pop()._asdict(), compute_dtype=compute, layers=layers, whole=whole, energies=energies
    )
    model.config.quantization_config = config
    if stacks:  # transformers asks it whether the model can be saved
        model.hf_quantizer = VeneerQuantizer(config)
        model.hf_quantizer.stacks = set(stacks)


class Pack(ConversionOps):
    """One weight as it comes from the file -> the parts of its layer."""

    def __init__(self, quantizer: VeneerQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **_: Any) -> dict[str, Tensor]:
        assert model is not None
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            w = value[0] if isinstance(value, list) else value
            if not w.is_floating_point() or w.dtype.itemsize < 2:
                self.hf_quantizer.problems.append(f"{name} came as {w.dtype}, not as the numbers to be packed")
                w = w.float()
            if not bool(torch.isfinite(w).all()):
                self.hf_quantizer.problems.append(f"{name} holds NaN or infinite values")
            if name in self.hf_quantizer.stacks:
                recipe = self.hf_quantizer.quantization_config.recipe
                result[name] = nn.Parameter(PackedStack.pack(w, recipe), requires_grad=False)
                continue
            prefix = name.rpartition(".")[0]
            layer = model.get_submodule(prefix)
            assert isinstance(layer, Packed)
            inputs = self.hf_quantizer.inputs.get(prefix)
            codes, *rest = storage_of(layer.recipe).pack(to_matrix(layer, w), layer.recipe, inputs)
            layer.weight_dtype, layer.weighed = w.dtype, inputs is not None
            names = storage_of(layer.recipe).part_names(layer.recipe)
            result[name] = nn.Parameter(codes, requires_grad=False)
            result |= {f"{prefix}.{part}": tensor for part, tensor in zip(names, rest, strict=True)}
        return result


@register_quantizer("veneer")
class VeneerQuantizer(HfQuantizer):
    requires_calibration = False
    quantization_config: VeneerConfig

    def __init__(self, quantization_config: VeneerConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.problems: list[str] = []  # told together when all is read
        self.stacks: set[str] = set()  # parameters that are stacks of matrices
        told = quantization_config.energies
        self.inputs = {} if told is None else load_inputs(told)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized:
            for name, dtype in (config.layers or {}).items():
                layer = model.get_submodule(name)
                layer.weight.data = layer.weight.data.to(getattr(torch, dtype))
                pack_layer(layer, config.recipe, config.options["compute_dtype"], None)
                layer.weighed = None
            head = output_head(model)
            if isinstance(head, Packed) and getattr(model.config, "tie_word_embeddings", False):
                name = next(n for n, m in model.named_modules() if m is head)  # its parts are the embedding's
                known = model._keys_to_ignore_on_load_missing or []
                model._keys_to_ignore_on_load_missing = [*known, rf"^{re.escape(name)}\.weight_\w+$"]
            return
        chosen, _left = choose(model, config.targets, config.exclude, False, False, config.whole)
        self.stacks = {name for name, layer in chosen.items() if isinstance(layer, Leaf)}
        for layer in (layer for name, layer in chosen.items() if name not in self.stacks):
            dtype = layer.weight.dtype
            pack_layer(layer, config.recipe, config.options["compute_dtype"], None)
            layer.weight.data = layer.weight.data.to(dtype)  # what is read is cast to it before it is packed

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        if self.problems:
            where = getattr(model.config, "name_or_path", None)
            raise CheckpointError("the weights cannot be packed", where, "download them again", problems=self.problems)
        if not self.pre_quantized and (config.embedding or config.head):  # whole until here, since they may be tied
            quantize(model, targets=(), embedding=config.embedding, head=config.head, **config.options)
        share_parts(model)
        note_packing(model, config.whole, config.energies)
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        if param_name in self.stacks:
            return True
        layer, _dot, name = param_name.rpartition(".")
        module = model.get_submodule(layer)
        return not self.pre_quantized and isinstance(module, Packed) and name in module_parts(module)

    def get_quantize_ops(self) -> Pack:
        return Pack(self)

    def is_serializable(self) -> bool:
        return not self.stacks  # safetensors holds no stack as one tensor

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def module_parts(layer: Packed) -> tuple[str, ...]:
    return "weight", *storage_of(layer.recipe).part_names(layer.recipe)


def share_parts(model: nn.Module) -> None:
    """Layers that share their codes (transformers ties those) share the other parts, too."""
    first: dict[int, Packed] = {}
    for layer in plain_modules(model).values():
        if isinstance(layer, Packed):
            twin = first.setdefault(id(layer._parameters["weight"]), layer)
            if twin is not layer:
                put_parts(layer, twin.parts)
                layer.weighed = twin.weighed
