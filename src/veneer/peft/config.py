"""LoraConfig and its relatives for AdaLoRA, VeRA, LoHa and LoKr: every field of PEFT's, and what each becomes here.

A field that Veneer serves is translated by `veneer.ckpt.config`, which reads the same words in files; one that it does
not serve is refused the moment it is set, with the way out. So a script either does what it says or stops at the line
that says it. Everything wrong with a config is reported at once.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from veneer.ckpt.atomic import atomic_write
from veneer.ckpt.config import CONFIG, REFUSED, TASK_HEADS, parse, read_config, selects
from veneer.ckpt.places import projection_overrides
from veneer.core.host import plain_modules
from veneer.core.init import INITS
from veneer.core.op import op_for
from veneer.core.registry import near
from veneer.core.select import ends_with
from veneer.core.spec import LoRA
from veneer.errors import CheckpointError, ConfigError, TargetError
from veneer.peft.targets import default_targets

__all__ = [
    "AdaLoraConfig",
    "AnyConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "VeraConfig",
    "get_peft_config",
    "spec_for",
]


class TaskType(enum.StrEnum):
    """What the model is for. It decides the class of the PeftModel and which new head is trained whole."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(enum.StrEnum):
    """The methods that Veneer has of PEFT's many."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    VERA = "VERA"
    LOHA = "LOHA"
    LOKR = "LOKR"


@dataclass
class LoraRuntimeConfig:
    """Where work is done at run time; nothing of it is saved."""

    ephemeral_gpu_offload: bool = False


@dataclass
class PeftConfig:
    """What all adapters' configs share. `PeftConfig.from_pretrained` gives the right subclass."""

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    unknown: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # keys of a file that nobody knows

    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False
    method: ClassVar[PeftType | None] = None

    def __post_init__(self) -> None:
        self.peft_type = self.peft_type or self.method
        problems = list(self._problems())
        if problems:
            raise ConfigError(f"this {type(self).__name__} cannot be served", problems=problems)

    def _problems(self) -> Iterator[str]:
        tasks = [task.value for task in TaskType]
        if self.task_type is not None and self.task_type not in tasks:
            yield f"task_type={self.task_type!r} is none of {', '.join(tasks)}.{near(str(self.task_type), tasks)}"
        if self.method is not None and self.peft_type != self.method:
            yield f"peft_type={_plain(self.peft_type)!r} is another method. Way out: its own config, or peft itself"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in adapter_config.json: plain words, lists instead of sets."""
        found = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self) if f.init}
        found.pop("runtime_config", None)
        return {**found, **self.unknown}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json into a folder. auto_mapping_dict, if given, is stored as auto_mapping."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.to_dict()
        if kwargs.get("auto_mapping_dict") is not None:
            config["auto_mapping"] = kwargs["auto_mapping_dict"]
        atomic_write(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> AnyConfig:
        """The config in an adapter's folder or hub repository. kwargs: what huggingface_hub.hf_hub_download takes."""
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if (folder / CONFIG).is_file():
            return cls.from_peft_type(**read_config(folder / CONFIG))
        return cls.from_peft_type(**read_config(_download(str(pretrained_model_name_or_path), subfolder, kwargs)))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> AnyConfig:
        """The config of its kind from the keys of a file. Keys that nobody knows are kept, saved again, and warned
        about."""
        kind = KINDS.get(str(_plain(kwargs.get("peft_type") or "LORA")), LoraConfig)
        known = {f.name for f in dataclasses.fields(kind) if f.init}
        unknown = {key: value for key, value in kwargs.items() if key not in known}
        config = kind(**{key: value for key, value in kwargs.items() if key in known})
        if any(unknown.values()):
            warnings.warn(f"{CONFIG} has keys that are not known here and have no effect: {unknown}", stacklevel=3)
        config.unknown = unknown
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        config = read_config(Path(path_json_file))
        config.pop("runtime_config", None)
        return config


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value


def _download(repo: str, subfolder: str | None, kwargs: Mapping[str, Any]) -> Path:
    """adapter_config.json of a hub repository."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, CONFIG, subfolder=subfolder, **kwargs))
    except Exception as error:  # whatever the hub, the network or the cache may raise
        raise CheckpointError(
            f"can't find {CONFIG!r}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            repo,
            "name an adapter's folder, or a hub id that can be reached from here",
        ) from error


@dataclass
class TargetsConfig(PeftConfig):
    """What the configs of all methods here do with the words that they share."""

    def __post_init__(self) -> None:
        own: Any = self
        own.target_modules = set(own.target_modules) if _is_names(own.target_modules) else own.target_modules
        if hasattr(self, "exclude_modules"):
            own.exclude_modules = set(own.exclude_modules) if _is_names(own.exclude_modules) else own.exclude_modules
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        own: Any = self
        yield from super()._problems()
        if isinstance(own.target_modules, str) and own.layers_to_transform is not None:
            yield "layers_to_transform needs target_modules as a list; a regular expression can name the layers itself"
        if own.layers_pattern and own.layers_to_transform is None:
            yield "layers_pattern says where the layers' numbers stand, so it needs layers_to_transform"
        try:
            parse({**self.to_dict(), **dict.fromkeys(REFUSED), **PLAIN_START, "peft_type": str(self.method)})
        except CheckpointError as error:
            yield from error.problems or [error.what]


@dataclass
class LoraConfig(TargetsConfig):
    """PEFT's LoraConfig. `r`, `lora_alpha`, `target_modules` and their like mean what they mean there."""

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # taken as a remark: each layer knows itself whether its weight is transposed
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, Any] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    runtime_config: Any = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    loftq_config: Any = field(default_factory=dict)
    # not served:
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"

    method: ClassVar[PeftType | None] = PeftType.LORA

    def __post_init__(self) -> None:
        if self.method == PeftType.LORA:
            self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)
        super().__post_init__()

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        yield from _unserved(self)
        if not self.inference_mode:  # else it describes a trained adapter, and where that began does not matter
            yield from _unserved_starts(self)


@dataclass
class AdaLoraConfig(LoraConfig):
    """PEFT's AdaLoraConfig: ranks that are shared out among the layers while training (arXiv:2303.10512).

    `model.update_and_allocate(step)` after each optimiser's step does it, as in PEFT. rank_pattern is what came of it.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, Any] | None = None

    method: ClassVar[PeftType | None] = PeftType.ADALORA

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.use_dora:
            yield "use_dora=True has no place in AdaLoRA. Way out: LoraConfig(use_dora=True)"
        if self.orth_reg_weight < 0:
            yield f"orth_reg_weight={self.orth_reg_weight} must be at least 0"
        if not self.total_step or self.total_step < 0:
            yield f"total_step={self.total_step!r} must be the number of training steps: the budget is planned over it"
        elif self.tinit >= self.total_step - self.tfinal:
            yield (
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} in which "
                "ranks could shrink"
            )


@dataclass
class VeraConfig(TargetsConfig):
    """PEFT's VeraConfig: one pair of random matrices for all layers, two vectors for each (arXiv:2310.11454)."""

    r: int = 256
    target_modules: list[str] | set[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    method: ClassVar[PeftType | None] = PeftType.VERA


@dataclass
class LycorisConfig(TargetsConfig):
    """What LoHa's and LoKr's configs share. Their two dropouts, of whole rows and whole layers, are not built."""

    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for key in ("rank_dropout", "module_dropout"):
            if getattr(self, key) and not self.inference_mode:
                yield f"{key}={getattr(self, key)} is not built. Way out: leave it out, or train with peft itself"


@dataclass
class LoHaConfig(LycorisConfig):
    """PEFT's LoHaConfig: the elementwise product of two low-rank matrices (arXiv:2108.06098)."""

    method: ClassVar[PeftType | None] = PeftType.LOHA


@dataclass
class LoKrConfig(LycorisConfig):
    """PEFT's LoKrConfig: a Kronecker product (arXiv:2309.14859)."""

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    method: ClassVar[PeftType | None] = PeftType.LOKR


AnyConfig = LoraConfig | AdaLoraConfig | VeraConfig | LoHaConfig | LoKrConfig
KINDS: dict[str, type[AnyConfig]] = {
    str(kind.method): kind for kind in (LoraConfig, AdaLoraConfig, VeraConfig, LoHaConfig, LoKrConfig)
}


def _is_names(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


# ---------------------------------------------------------------- what is refused, and what to do instead

PLAIN_START = {"init_lora_weights": True}
INIT_INSTEAD = "init_lora_weights='pissa' also starts from the base's weights; True starts as the paper does"
WITH_DATA = "init_lora_weights={0!r} alone, and get_peft_model(model, config, data=a few batches)"
STARTS = {  # settings of inits that look at data: they take it directly, with the paper's settings
    "eva_config": ("other settings of EVA than the paper's", WITH_DATA.format("eva")),
    "corda_config": ("other settings of CorDA than the paper's", WITH_DATA.format("corda")),
    "lora_ga_config": ("other settings of LoRA-GA than the paper's", WITH_DATA.format("lora_ga")),
}


def _unserved(config: LoraConfig) -> Iterator[str]:
    if config.lora_bias and config.bias != "none" and not config.inference_mode:
        yield f"lora_bias=True and bias={config.bias!r} would train two biases for one. Way out: one of them"
    for key, (why, fix) in REFUSED.items():
        if getattr(config, key):
            yield f"{key}={getattr(config, key)!r}: an adapter that {why} is not built. Way out: {fix}"
    if config.runtime_config.ephemeral_gpu_offload:
        yield "runtime_config: ephemeral_gpu_offload is not built. Way out: leave it out; nothing is saved by it here"


def _unserved_starts(config: LoraConfig) -> Iterator[str]:
    for key, (why, fix) in STARTS.items():
        if getattr(config, key):
            yield f"{key}={getattr(config, key)!r} asks for {why}, which is not built. Way out: {fix}"
    loftq = config.loftq_config if isinstance(config.loftq_config, dict) else vars(config.loftq_config or object)
    if config.init_lora_weights == "loftq" and loftq.get("loftq_bits", 4) != 4:
        yield f"loftq_config={loftq}: LoftQ is built for 4 bits (NF4). Way out: {{'loftq_bits': 4}}"
    if _init_name(config.init_lora_weights) is None:
        yield _wrong_init(config.init_lora_weights)


def _init_name(init: bool | str | None) -> str | None:
    """Our name for PEFT's init; None if there is none. False (both factors random) starts from kaiming as well."""
    if init is None or isinstance(init, bool):
        return "kaiming"
    if re.fullmatch(r"pissa_niter_\d+", init):
        return "pissa"  # a fast approximation of the same decomposition; here it is exact
    return init if init in INITS else None


def _wrong_init(init: object) -> str:
    known = ["True", "False", *sorted(INITS), "pissa_niter_<n>"]
    return f"init_lora_weights={init!r} is not built.{near(str(init), known)} Known: {', '.join(known)}. {INIT_INSTEAD}"


# ---------------------------------------------------------------- the same thing in the core's words


def spec_for(config: AnyConfig, model: nn.Module) -> LoRA:
    """The LoRA that `config` means on `model`: default targets by architecture, the task's head among modules_to_save.

    Like PEFT, completes the config itself: target_modules and modules_to_save say afterwards what was chosen.
    """
    config.__post_init__()  # fields may have been assigned since
    parameters = getattr(config, "target_parameters", None)
    if config.target_modules is None and not parameters:
        config.target_modules = default_targets(model, str(config.method))
    _add_task_head(config, model)
    spec = parse({**config.to_dict(), **PLAIN_START}).spec
    if config.layers_pattern:
        spec = dataclasses.replace(spec, targets=_in_layers(config, model), layers=None)
    if parameters:
        spec = dataclasses.replace(spec, targets=_with_parameters(spec, config))
    if not isinstance(config, LoraConfig):
        return spec
    spec = _with_attention(spec, config, model)
    if config.ensure_weight_tying:
        _refuse_tied_copies(config, model)
    if isinstance(config, AdaLoraConfig):
        return spec
    return dataclasses.replace(spec, init=_init_name(config.init_lora_weights) or "kaiming")


def _refuse_tied_copies(config: LoraConfig, model: nn.Module) -> None:
    """Modules that are trained whole are copies here, and a copy is tied to nothing."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = [n for names in owners.values() if len(names) > 1 for n in names]
    wrong = [n for n in shared if any(ends_with(n, saved) for saved in config.modules_to_save or ())]
    if wrong:
        raise ConfigError(
            "ensure_weight_tying: modules_to_save trains copies, and a copy is tied to nothing",
            problems=wrong,
            fix="target_modules with the embedding (one adapter for both), or trainable_token_indices",
        )


def _with_attention(spec: LoRA, config: LoraConfig, model: nn.Module) -> LoRA:
    """An nn.MultiheadAttention that is a target stands for its packed projections. PEFT counts the change of out_proj
    twice (veneer.ckpt.layout says how), and a script that was tuned with it gets the same here."""
    rule, modules = selects(config.to_dict()), plain_modules(model)
    attentions = [n for n, m in modules.items() if isinstance(m, nn.MultiheadAttention) and rule(n)]
    if not attentions:
        return spec
    apart = [n for n in attentions if modules[n]._parameters.get("in_proj_weight") is None]
    if apart:
        raise ConfigError(
            "PEFT adapts an attention as a whole only where its input projections are one matrix",
            problems=apart,
            fix="target_parameters=['q_proj_weight', ...]",
        )
    inside = tuple(f"{n}." for n in attentions)
    others = [n for n, m in modules.items() if rule(n) and op_for(type(m)) is not None and not n.startswith(inside)]
    parts = [f"{n}.{part}" for n in attentions for part in ("in_proj_weight", "out_proj")]
    exact = projection_overrides(spec, {part: part.rpartition(".")[0] for part in parts})
    bare = tuple(config.target_parameters or ())
    targets = (*others, *parts, *bare)
    return dataclasses.replace(spec, targets=targets, exclude=(), layers=None, overrides={**exact, **spec.overrides})


def _with_parameters(spec: LoRA, config: Any) -> tuple[str, ...]:
    """Bare parameters (stacks of experts) beside the layers; the core takes both by their names' endings."""
    if config.target_modules and isinstance(config.target_modules, str):
        raise ConfigError("target_parameters needs target_modules as a list", fix="name the layers, or leave them out")
    return (*(spec.targets if config.target_modules else ()), *(config.target_parameters or ()))


def _add_task_head(config: AnyConfig, model: nn.Module) -> None:
    """A classifier starts from random values, so it is trained whole with every adapter for its task."""
    named = list(config.modules_to_save or ())
    heads = TASK_HEADS.get(str(_plain(config.task_type)), ())
    names = [name for name, _ in model.named_modules()]
    present = [head for head in heads if head not in named and any(ends_with(name, head) for name in names)]
    config.modules_to_save = [*named, *present] or config.modules_to_save


def _in_layers(config: AnyConfig, model: nn.Module) -> list[str]:
    """The targets in the chosen blocks of the module list that layers_pattern names."""
    rule = selects(config.to_dict())
    found = [name for name, _ in model.named_modules() if name and rule(name)]
    if not found:
        raise TargetError(
            f"target_modules {sorted(config.target_modules or ())} are in no layer {config.layers_to_transform} "
            f"of {config.layers_pattern!r}",
            where=type(model).__name__,
            fix="layers_pattern is the name of the list of blocks, such as 'layers' or 'h'",
        )
    return found


def get_peft_config(config_dict: Mapping[str, Any]) -> AnyConfig:
    """A config from a mapping with a peft_type."""
    return PeftConfig.from_peft_type(**config_dict)
