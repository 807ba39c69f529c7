"""PeftModel: the methods PEFT's users know, on the model itself.

PEFT wraps a model; here the model's class changes in place, as `veneer.core.host` does with a layer's. The object that
comes back from `get_peft_model` is the one that went in. It is a PeftModel *and* still what it was, so everything that
asks for a LlamaForCausalLM or a PreTrainedModel (the Trainer, pipelines, `generate`) gets one, and its keys keep their
names. `merge_and_unload` and `unload` give its own class back.

    isinstance(model, PeftModel)           yes
    isinstance(model, PreTrainedModel)     yes, if it was
    type(model).__name__                   as before: transformers looks classes up by this name
    model.base_model.model                 the model itself, for scripts that reach through PEFT's wrappers
    model.forward                          untouched, so whoever inspects its signature sees the model's own

Where PEFT and the core differ, PEFT's habits are kept here and only here: an adapter that is set becomes trainable and
the others are frozen; adding or loading an adapter does not activate it; deleting the active one activates another.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.ckpt.config import parse
from veneer.ckpt.contents import keep_words, kept_words
from veneer.core.init import NEEDS
from veneer.core.model import (
    activate,
    active_of,
    adapter_of,
    adapters,
    attach,
    detach,
    disabled,
    elements,
    is_merged,
    merge,
    parameters,
    routed,
    sites,
    spec_of,
    tensors,
    unmerge,
)
from veneer.core.op import op_of
from veneer.errors import ConfigError, StateError
from veneer.peft import adalora, files, held, live, states, status, weighted
from veneer.peft.config import AnyConfig, LoraConfig, PeftConfig, TaskType, spec_for
from veneer.peft.tuner import LoraModel
from veneer.quant.model import round_trip

__all__ = [
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
    "task_of",
]

BASE = "__base__"  # in adapter_names: this row runs without an adapter


class PeftModel(nn.Module):
    """A model with adapters. Build one with get_peft_model, PeftModel.from_pretrained, or by calling the class."""

    task: ClassVar[str | None] = None
    peft_config: dict[str, AnyConfig]

    def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        own = vars(cls).get("original")
        if own is not None:  # `type(model)(config)`: whoever asks for another one of these wants the plain model
            return own(model, *args, **kwargs)
        return _build(cls, model, *args, **kwargs)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: __new__ returns a model that exists already."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (kind_of(self), original_class(type(self))), self.__dict__

    # --- running ---

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """adapter_names: one adapter for each row of the batch, "__base__" for none."""
        if adapter_names is not None:
            with self._rows(adapter_names, args, kwargs):
                return super().__call__(*args, **kwargs)
        output = super().__call__(*args, **kwargs)
        return adalora.penalised(self, output) if self.peft_type == "ADALORA" else output

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with self._rows(adapter_names, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _rows(self, names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        batch = next((len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim), len(names))
        if len(names) != batch:
            raise ConfigError(
                f"{len(names)} adapter_names for a batch of {batch}", fix=f"one name for each row; {BASE!r} for none"
            )
        with routed(self, [None if name == BASE else name for name in names]):
            yield

    # --- which adapters there are, and which act ---

    @property
    def active_adapters(self) -> list[str]:
        paused = vars(self).get("_paused")
        if paused is not None:
            return list(paused[0])
        if is_merged(self):
            return held.merged_names(self)
        return list(active_of(self).names) if adapters(self) else []

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AnyConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str:
        """The method of the active adapter; of the first one there is, where none is active."""
        name = next(iter((*self.active_adapters, *self.peft_config)), None)
        return str(self.peft_config[name].peft_type) if name in self.peft_config else "LORA"

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names given as modules_to_save, over all adapters."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model(self) -> Any:
        return LoraModel(self)

    def get_base_model(self) -> Any:
        """The model itself: nothing is wrapped around it."""
        return self

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter (or several, whose changes then add up) active and trainable, and freeze all others."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if is_merged(self):
            warnings.warn("the merged adapters are unmerged first, because another one is set", stacklevel=2)
            unmerge(self)
        paused = vars(self).pop("_paused", None)
        activate(self, names)
        for name in adapters(self):
            if name in names or held.is_trained(self, name):  # the cost does not grow with how many adapters are loaded
                self.set_requires_grad(name, name in names and not inference_mode)
        if paused is not None:
            self.disable_adapter_layers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for parameter in parameters(self, name).values():
                parameter.requires_grad_(requires_grad)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AnyConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """A new adapter beside the others. It stays frozen and idle until set_adapter."""
        with _same_active(self):
            _attach(self, adapter_name, peft_config, autocast_adapter_dtype)
        if len(adapters(self)) > 1:
            self.set_requires_grad(adapter_name, False)

    def delete_adapter(self, adapter_name: str) -> None:
        was_active = adapter_name in self.active_adapters
        detach(self, adapter_name)
        del self.peft_config[adapter_name]
        vars(self).get("_allocators", {}).pop(adapter_name, None)
        left = adapters(self)
        if was_active and left and not active_of(self).names:
            warnings.warn(f"{adapter_name!r} was active; {left[0]!r} is active now", stacklevel=2)
            activate(self, left[0])

    # --- the base alone ---

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base, for the length of the block. What was merged is merged again afterwards."""
        merged = held.merged_mixture(self)
        if merged is not None:
            unmerge(self)
        try:
            with disabled(self):
                yield
        finally:
            if merged is not None:
                merge(self, merged)

    def disable_adapter_layers(self) -> None:
        """The base, until enable_adapter_layers."""
        if "_paused" not in vars(self):
            active = active_of(self)
            vars(self)["_paused"] = active.names, active.mix
            active.change(())

    def enable_adapter_layers(self) -> None:
        paused = vars(self).pop("_paused", None)
        if paused is not None:
            active_of(self).change(*paused)

    disable_adapters, enable_adapters = disable_adapter_layers, enable_adapter_layers  # transformers' names for them

    # --- merging ---

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write W + dW into the weights; unmerge_adapter restores them exactly.

        safe_merge changes nothing: an adapter that holds NaN is never merged.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of names, got {adapter_names!r}")
        already = held.merged_names(self)
        wanted = list(adapter_names) if adapter_names is not None else self.active_adapters
        new = [name for name in wanted if name not in already]
        if already and not new:
            warnings.warn("all of these adapters are merged already", stacklevel=2)
            return
        if already:
            unmerge(self)
        if already or adapter_names is not None:
            merge(self, [*already, *new])
        else:
            merge(self)  # with the weights of the active mixture, if it has some

    def unmerge_adapter(self) -> None:
        if is_merged(self):
            unmerge(self)
        else:
            warnings.warn("nothing is merged, so there is nothing to unmerge", stacklevel=2)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        untie: bool = False,
    ) -> Any:
        """The plain model with W + dW for its weights. It is the same object, with its own class again.

        untie: give an adapted layer whose weight another one shares (an embedding tied to the head) its own weight.
        """
        if is_merged(self) and adapter_names is not None and set(adapter_names) != set(held.merged_names(self)):
            unmerge(self)
        if not is_merged(self):
            merge(self, adapter_names, keep_base=False, untie=untie)
        return self.unload()

    def unload(self) -> Any:
        """The plain model without its adapters (or with what is merged), with its own class again."""
        if adapters(self):
            detach(self)
        vars(self).pop("_paused", None)
        return release(self)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> Any:
        """A new adapter, idle and frozen, that does what others do together, mixed on dW. Returns what the mix lost."""
        if adapter_name in self.peft_config:
            return None
        report = weighted.add(self, adapters, weights, adapter_name, combination_type, **options)
        self.set_requires_grad(adapter_name, False)
        self.peft_config[adapter_name] = held.config_of(self, adapter_name, task_of(self.peft_config[adapters[0]]))
        return report

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA: after each optimiser's step, share the ranks out again by what the gradients say."""
        adalora.update_and_allocate(self, global_step)

    # --- counting and looking ---

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) as PEFT counts them: the trained change of a bias stands for the bias itself."""
        own = [name for name in adapters(self) if spec_of(self, name).bias != "lora"]  # that is a bias of its own
        changes = sum(v.numel() for n in own for (_, key), v in tensors(self, n).items() if key == "bias")
        return sum(p.numel() for p in self.parameters() if p.requires_grad), elements(self) - changes

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        return status.get_model_status(self)

    # --- files ---

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """The adapters alone, in PEFT's layout: "default" into the folder, each other one into a folder of its name.

        path_initial_model_for_weight_conversion is not needed: a PiSSA or OLoRA adapter is always saved as a plain
        LoRA of twice the rank, right on the unchanged base.
        """
        files.save_pretrained(
            self,
            Path(save_directory),
            selected_adapters,
            safe_serialization=safe_serialization,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            state_dict=kwargs.get("state_dict"),
        )

    @classmethod
    def from_pretrained(cls, model: Any, model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Put a saved adapter on `model`, in place, for inference (is_trainable=True: to train on).

        model_id: an adapter's folder or hub id. adapter_name, is_trainable, config, autocast_adapter_dtype and
        low_cpu_mem_usage as in PEFT; revision and subfolder say where in the hub or folder.
        """
        own = vars(cls).get("original")
        if own is not None and not isinstance(model, nn.Module):  # type(model).from_pretrained("a base model")
            return own.from_pretrained(model, *([] if model_id is None else [model_id]), *args, **kwargs)
        return _load_new(cls, model, model_id, *args, **kwargs)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a saved adapter beside the others, idle until set_adapter; into it, if one of that name is there."""
        states.refuse_options(key_mapping=key_mapping, ephemeral_gpu_offload=ephemeral_gpu_offload)
        if adapter_name in adapters(self):
            result = files.load_into(self, model_id, adapter_name, **kwargs)
        else:
            with _same_active(self):
                config = files.load_new(self, model_id, adapter_name, is_trainable, autocast_adapter_dtype, **kwargs)
            self.peft_config[adapter_name] = config
            result = held.nothing_amiss()
        if not is_trainable and self.training:
            self.eval()
        return result

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As ever; but a state that holds adapters alone (a Trainer's checkpoint) must hold all of them."""
        if state_dict and all(live.is_live_key(key) for key in state_dict):
            return live.load_live(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)


class PeftModelForCausalLM(PeftModel):
    task = "CAUSAL_LM"


class PeftModelForSeq2SeqLM(PeftModel):
    task = "SEQ_2_SEQ_LM"


class PeftModelForSequenceClassification(PeftModel):
    task = "SEQ_CLS"


class PeftModelForTokenClassification(PeftModel):
    task = "TOKEN_CLS"


class PeftModelForQuestionAnswering(PeftModel):
    task = "QUESTION_ANS"


class PeftModelForFeatureExtraction(PeftModel):
    task = "FEATURE_EXTRACTION"


KINDS: dict[str | None, type[PeftModel]] = {kind.task: kind for kind in PeftModel.__subclasses__()}


# ---------------------------------------------------------------- the class change


@cache
def peft_class(kind: type[PeftModel], base: type[nn.Module]) -> type[PeftModel]:
    """`base` with the methods of `kind`, under the name of `base`."""
    space = {"__module__": base.__module__, "__qualname__": base.__qualname__, "original": base}
    return type(base.__name__, (kind, base), space)


def original_class(kind: type[nn.Module]) -> type[nn.Module]:
    return vars(kind).get("original", kind)


def kind_of(model: nn.Module) -> type[PeftModel]:
    """Which of the classes above the model is."""
    return type(model).__mro__[1]  # type: ignore[return-value]


def _rebuild(kind: type[PeftModel], base: type[nn.Module]) -> Any:
    made = peft_class(kind, base)
    return object.__new__(made)


def adopt(model: Any, kind: type[PeftModel] = PeftModel) -> Any:
    """Give a model PEFT's methods, in place. Adapters that `veneer.attach` put on it get configs that say the same."""
    if not isinstance(model, PeftModel):
        model.__class__ = peft_class(kind, type(model))
        vars(model)["peft_config"] = {name: held.config_of(model, name, kind.task) for name in adapters(model)}
        vars(model)["_hf_peft_config_loaded"] = True  # transformers' own flag: there are adapters to train
    return model


def release(model: Any) -> Any:
    """Give the model its own class back."""
    if isinstance(model, PeftModel):
        for name in ("peft_config", "_hf_peft_config_loaded", "_allocators"):
            vars(model).pop(name, None)
        model.__class__ = original_class(type(model))
    return model


# ---------------------------------------------------------------- making one


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    data: Iterable[Any] | None = None,
) -> Any:
    """Put a new adapter on `model` and give it PEFT's methods. The model changes in place and is what is returned.

    peft_config: a config of veneer.peft. data: a few batches for inits that look at them (eva, corda, lora_ga),
    where PEFT has a function of its own to call for each.
    """
    config = _checked(peft_config)
    if mixed:
        raise ConfigError("mixed=True mixes methods, and there is one method here", fix="leave it out")
    config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    config.revision = revision or config.revision
    return KINDS.get(task_of(config), PeftModel)(model, config, adapter_name, autocast_adapter_dtype, data=data)


def _build(
    kind: type[PeftModel],
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    data: Iterable[Any] | None = None,
) -> Any:
    config = _checked(peft_config)
    if kind.task is not None and config.task_type is None:
        config.task_type = kind.task
    _attach(model, adapter_name, config, autocast_adapter_dtype, data)
    model = adopt(model, kind)
    vars(model)["peft_config"][adapter_name] = config
    return _ready_for_checkpointing(model)


def inject_adapter_in_model(
    peft_config: AnyConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Put a new adapter on `model` and leave its class alone."""
    if state_dict is not None:
        raise ConfigError(
            "targets cannot be read off a state_dict", fix="veneer.load(model, folder) finds the targets in the file"
        )
    config = _checked(peft_config)
    _attach(model, adapter_name, config, autocast=False)
    vars(model).setdefault("peft_config", {})[adapter_name] = config
    return model


def _checked(config: Any) -> AnyConfig:
    if not isinstance(config, AnyConfig):
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise ConfigError(f"a config of ours is needed, not {kind}", fix="from veneer.peft import LoraConfig")
    return config


def task_of(config: PeftConfig) -> str | None:
    return config.task_type.value if isinstance(config.task_type, TaskType) else config.task_type


def _attach(model: nn.Module, name: str, config: AnyConfig, autocast: bool, data: Iterable[Any] | None = None) -> None:
    """The new adapter, active; trainable unless the config is for inference."""
    spec = spec_for(_checked(config), model)
    if spec.init in NEEDS and data is None:
        raise ConfigError(f"init {spec.init!r} looks at data", fix="get_peft_model(model, config, data=a few batches)")
    dtype = None if autocast else _dtype(model)
    quantised = {"round_trip": round_trip} if spec.init == "loftq" else {}  # NF4, and as often as it helps
    attach(model, spec, name, dtype=dtype, trainable=not config.inference_mode, data=data, **quantised)
    if getattr(config, "init_lora_weights", getattr(config, "init_weights", True)) is False:
        _randomise(model, name)
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
        keep_words(model, name, spec_of(model, name), kept_words(parse(config.to_dict())))
    elif (overrides := spec_of(model, name).overrides) != spec.overrides:  # EVA has shared the ranks out again
        config.rank_pattern = {p: f["rank"] for p, f in overrides.items() if "rank" in f}  # type: ignore[misc]
        config.alpha_pattern = {p: f["alpha"] for p, f in overrides.items() if "alpha" in f}  # type: ignore[misc]
    if isinstance(model, PeftModel):
        model.peft_config[name] = config


def _dtype(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


@torch.no_grad()
def _randomise(model: nn.Module, name: str) -> None:
    """init_lora_weights=False: nothing starts at zero. For debugging, as in PEFT."""
    for layer in sites(model, name).values():
        delta: Any = adapter_of(layer, name).delta
        for value in delta.parameters() if delta is not None else ():
            if op_of(layer).looks_up and not value.any():
                value.normal_()
            elif not value.any():
                value.uniform_(-1, 1).div_(value.shape[-1] ** 0.5)


def _ready_for_checkpointing(model: Any) -> Any:
    """With gradient checkpointing and a frozen embedding, the inputs must require gradients, or nothing learns."""
    if getattr(model, "is_activation_checkpointing", False) and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    return model


def _load_new(
    kind: type[PeftModel],
    model: nn.Module,
    model_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    config: AnyConfig | None = None,
    autocast_adapter_dtype: bool = True,
    ephemeral_gpu_offload: bool = False,
    low_cpu_mem_usage: bool = False,
    key_mapping: dict[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    states.refuse_options(key_mapping=key_mapping, ephemeral_gpu_offload=ephemeral_gpu_offload)
    if adapter_name in adapters(model):
        raise StateError(f"there is already an adapter named {adapter_name!r}", fix="give another adapter_name")
    found = files.load_new(model, model_id, adapter_name, is_trainable, autocast_adapter_dtype, **kwargs)
    config = config or found
    config.inference_mode = not is_trainable
    model = adopt(model, KINDS.get(task_of(config), PeftModel) if kind is PeftModel else kind)
    model.peft_config[adapter_name] = config
    _ready_for_checkpointing(model)
    return model if is_trainable else model.eval()


@contextmanager
def _same_active(model: nn.Module) -> Iterator[None]:
    """What was active before the block is active after it."""
    if not adapters(model):
        yield
        return
    active = active_of(model)
    before = active.names, active.mix
    try:
        yield
    finally:
        active.change(*before)
