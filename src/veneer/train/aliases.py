"""What other tools call the same setting.

People arrive with a YAML file from LLaMA-Factory, Axolotl, mlx-lm, litgpt, TRL or kohya, or with one of their flags in
their fingers. Each word here is read as ours, once, with a one-line notice, so that nobody has to translate and
nobody wonders which name counts. An alias is a function from the foreign value to our keys and values, because many
are not mere other names: `train_on_inputs: false` is `loss_on: assistant`, `load_in_4bit: true` is `quant: nf4`.

Two of them need another setting to mean anything: `grad_accum` counts micro-batches, `scale` is alpha / r. They pass
through as keys of their own and `settings.resolve` finishes them when everything else is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from veneer.train.parse import flag, mapping, names, number, one_of, overrides, whole

__all__ = ["ALIASES", "DEFERRED", "NOT_NEEDED", "VARIANTS"]

Alias = Callable[[Any], dict[str, Any]]

DEFERRED = {"grad_accum": whole(1), "scale": number(0)}  # finished when batch_size and r are known


def switch(on: dict[str, Any], off: dict[str, Any] | None = None) -> Alias:
    """A yes-or-no setting that stands for one of ours."""
    return lambda value: dict(on if flag(value) else off or {})


def words(**table: dict[str, Any]) -> Alias:
    """A word that stands for one of ours."""
    return lambda value: dict(table[one_of(*table)(value)])


def renamed(key: str) -> Alias:
    return lambda value: {key: value}


def _warmup_steps(value: Any) -> dict[str, Any]:
    return {"warmup": whole()(value)}


def _warmup_ratio(value: Any) -> dict[str, Any]:
    return {"warmup": number(0, 0.99)(value)}


def _steps(value: Any) -> dict[str, Any]:
    return {} if whole(-1)(value) == -1 else {"steps": value}  # -1 is how transformers writes "count by epochs"


def _roles(value: Any) -> dict[str, Any]:
    roles = frozenset(names(value))
    known: dict[frozenset[str], str] = {frozenset(["all"]): "all"}
    known |= dict.fromkeys(map(frozenset, (["assistant"], ["gpt"], ["assistant", "gpt"])), "assistant")
    if roles not in known:
        raise ValueError(f"only assistant turns or all turns can be trained, not {sorted(roles)}")
    return {"loss_on": known[roles]}


def _quantised(value: Any) -> dict[str, Any]:
    table = dict.fromkeys(["bnb.nf4", "bnb.nf4_dq", "bnb.fp4", "nf4", "4", "4bit"], "nf4")
    table |= dict.fromkeys(["bnb.int8", "int8", "8", "8bit"], "int8") | {"fp8": "fp8"}
    read = one_of("nf4", "int8", "fp8", "none", also={**table, False: "none"})
    return {"quant": read(str(value).removesuffix("-training"))}


def _layers_to_transform(value: Any) -> dict[str, Any]:
    return {"layers": [value] if isinstance(value, int) else value}  # PEFT: a bare number is that one layer


def _last_layers(value: Any) -> dict[str, Any]:
    return {} if whole(-1)(value) == -1 else {"layers": value}


def _field_of_overrides(field: str) -> Alias:
    return lambda value: {"overrides": overrides({name: {field: inner} for name, inner in mapping(value).items()})}


def _init_lora_weights(value: Any) -> dict[str, Any]:
    if str(value).lower() in ("true", "default"):
        return {"init": "kaiming"}
    return {"init": str(value).removesuffix("_niter_16").removesuffix("_niter_4")}


def _bf16(value: Any) -> dict[str, Any]:
    return {} if value == "auto" or not flag(value) else {"precision": "bf16"}


def _fp16(value: Any) -> dict[str, Any]:
    if value != "auto" and flag(value):
        raise ValueError("fp16 overflows where bf16 does not; precision is bf16 or fp32")
    return {}


def _ema(value: Any) -> dict[str, Any]:
    """A decay, or yes and no: then diffusers' decay."""
    if str(value).lower() in ("true", "yes", "on", "false", "no", "off"):
        return {"ema": 0.9999 if flag(value) else 0}
    return {"ema": value}


ASSISTANT, ALL, COMPLETIONS, LAST = ({"loss_on": word} for word in ("assistant", "all", "completions", "last"))

VARIANTS: Mapping[str, dict[str, Any]] = {  # what people call a method, as our settings
    "dora": {"combine": "dora"},
    "rslora": {"scaling": "rslora"},
    **{name: {"init": name} for name in ("pissa", "olora")},
    **{name: {"delta": name} for name in ("adalora", "vera", "loha", "lokr", "lora_fa", "lora_xs")},
    **{name: {"delta": name.replace("-", "_")} for name in ("lora-fa", "lora-xs")},
    "lora+": {"lora_plus_ratio": 16},
}

ALIASES: dict[str, Alias] = {
    **dict.fromkeys(
        ["base_model", "model_name_or_path", "checkpoint_dir", "base", "pretrained_model_name_or_path", "name_or_path"],
        renamed("model"),
    ),
    **dict.fromkeys(
        [
            "dataset",
            "datasets",
            "dataset_name",
            "train",
            "data.json_path",
            "folder_path",
            "train_data_dir",
            "instance_data_dir",
        ],
        renamed("data"),
    ),
    **dict.fromkeys(
        ["lora_r", "lora_rank", "rank", "network_dim", "linear", "lora_parameters.rank", "network.linear"], renamed("r")
    ),
    **dict.fromkeys(["lora_alpha", "network_alpha", "linear_alpha", "network.linear_alpha"], renamed("alpha")),
    **dict.fromkeys(["lora_dropout", "network_dropout", "lora_parameters.dropout"], renamed("dropout")),
    **dict.fromkeys(["lora_scale", "lora_parameters.scale"], renamed("scale")),
    **dict.fromkeys(
        ["target_modules", "lora_target_modules", "lora_target", "lora_parameters.keys", "keys"], renamed("targets")
    ),
    "lora_target_linear": switch({"targets": "all-linear"}),
    "exclude_modules": renamed("exclude"),
    **dict.fromkeys(["lora_modules_to_save", "additional_target"], renamed("modules_to_save")),
    "layers_to_transform": _layers_to_transform,
    **dict.fromkeys(["num_layers", "lora_layers", "freeze_trainable_layers"], _last_layers),
    "rank_pattern": _field_of_overrides("rank"),
    "alpha_pattern": _field_of_overrides("alpha"),
    "lora_bias": switch({"bias": "lora"}),
    **dict.fromkeys(["use_dora", "peft_use_dora"], switch({"combine": "dora"}, {"combine": "add"})),
    **dict.fromkeys(["use_rslora", "peft_use_rslora"], switch({"scaling": "rslora"}, {"scaling": "lora"})),
    "pissa_init": switch({"init": "pissa"}, {"init": "kaiming"}),
    "init_lora_weights": _init_lora_weights,
    "variant": words(lora={"delta": "lora", "combine": "add"}, **VARIANTS),
    "trainable_token_indices": renamed("token_rows"),
    "ensure_weight_tying": switch({"tied": "together"}, {"tied": "apart"}),
    **dict.fromkeys(["optim", "optimizer_type"], renamed("optimizer")),
    **dict.fromkeys(["loraplus_lr_ratio", "lora_plus"], renamed("lora_plus_ratio")),
    **dict.fromkeys(
        ["finetuning_type", "fine_tune_type"],
        words(
            lora={"method": "lora"},
            dora={"method": "lora", "combine": "dora"},
            full={"method": "full"},
            freeze={"method": "freeze"},
        ),
    ),
    "adapter": words(lora={"method": "lora"}, qlora={"method": "lora", "quant": "nf4"}, none={"method": "full"}),
    "use_peft": switch({"method": "lora"}, {"method": "full"}),
    "load_in_4bit": switch({"quant": "nf4"}),
    "load_in_8bit": switch({"quant": "int8"}),
    **dict.fromkeys(["quantization_bit", "quantize", "quantization"], _quantised),
    **dict.fromkeys(["learning_rate", "unet_lr", "train.lr"], renamed("lr")),
    **dict.fromkeys(["scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule"], renamed("schedule")),
    "warmup_ratio": _warmup_ratio,
    **dict.fromkeys(["warmup_steps", "lr_warmup_steps"], _warmup_steps),
    **dict.fromkeys(["num_train_epochs", "num_epochs", "max_train_epochs"], renamed("epochs")),
    **dict.fromkeys(["max_steps", "iters", "max_train_steps"], _steps),
    **dict.fromkeys(
        ["per_device_train_batch_size", "micro_batch_size", "train_batch_size", "batch"], renamed("batch_size")
    ),
    **dict.fromkeys(["gradient_accumulation_steps", "grad_accumulation_steps"], renamed("grad_accum")),
    "global_batch_size": renamed("global_batch"),
    **dict.fromkeys(["cutoff_len", "sequence_len", "max_length", "max_seq_length", "max_seq_len"], renamed("max_len")),
    **dict.fromkeys(["sample_packing", "packed", "neat_packing"], renamed("packing")),
    **dict.fromkeys(["train_on_inputs", "train_on_prompt"], switch(ALL, ASSISTANT)),
    **dict.fromkeys(["completion_only_loss", "train_on_completions", "mask_prompt"], switch(COMPLETIONS, ALL)),
    "assistant_only_loss": switch(ASSISTANT, ALL),
    "mask_history": switch(LAST, ASSISTANT),
    "roles_to_train": _roles,
    **dict.fromkeys(["chat_template", "chat_template_name"], renamed("template")),
    **dict.fromkeys(["system_prompt", "default_system"], renamed("system")),
    **dict.fromkeys(["val_size", "val_set_size", "val_split", "val_split_fraction", "eval_dataset"], renamed("val")),
    **dict.fromkeys(["eval_steps", "steps_per_eval"], renamed("eval_every")),
    **dict.fromkeys(["save_steps"], renamed("save_every")),
    "early_stopping_patience": renamed("patience"),
    **dict.fromkeys(["random_seed", "train_seed"], renamed("seed")),
    "dtype": renamed("precision"),
    "bf16": _bf16,
    "fp16": _fp16,
    "fp32": switch({"precision": "fp32"}),
    **dict.fromkeys(["gradient_checkpointing", "grad_checkpoint", "activation_checkpointing"], renamed("recompute")),
    **dict.fromkeys(["max_grad_norm", "grad_clip", "gradient_clip_val"], renamed("clip")),
    **dict.fromkeys(["output_dir", "out_dir", "adapter_path", "training_folder"], renamed("out")),
    **dict.fromkeys(["run_name", "output_name"], renamed("name")),
    **dict.fromkeys(["resume_from_checkpoint", "resume_adapter_file"], renamed("resume")),
    **dict.fromkeys(["use_ema", "ema_decay"], _ema),
    **dict.fromkeys(["enable_bucket", "bucket"], renamed("buckets")),
    "center_crop": switch({"buckets": False}),
    "instance_prompt": renamed("captions"),
    "trigger_word": renamed("trigger"),
    "caption_dropout_rate": renamed("caption_dropout"),
    "train_text_encoder": renamed("text_encoders"),
    **dict.fromkeys(["v_parameterization", "v_pred"], switch({"prediction": "v_prediction"})),
    **dict.fromkeys(["min_snr_gamma", "snr_gamma"], renamed("min_snr")),
    **dict.fromkeys(["class_data_dir", "reg_data_dir"], renamed("prior")),
    "class_prompt": renamed("prior_prompt"),
    "num_class_images": renamed("prior_images"),
    "prior_loss_weight": renamed("prior_weight"),
    **dict.fromkeys(["validation_prompt", "validation_prompts", "sample.prompts"], renamed("sample_prompts")),
    **dict.fromkeys(["sample_every_n_steps", "sample.sample_every", "validation_steps"], renamed("sample_every")),
    "sample.sample_steps": renamed("sample_steps"),
    "sample.guidance_scale": renamed("sample_guidance"),
}

NOT_NEEDED: Mapping[str, str] = {
    **dict.fromkeys(["logging_steps", "steps_per_report", "logging_first_step"], "every step is logged"),
    "save_total_limit": "the best and the last checkpoint are kept",
    "load_best_model_at_end": "the best checkpoint is always kept, and is what the run's adapter points at",
    **dict.fromkeys(["eval_strategy", "evaluation_strategy"], "eval_every decides"),
    "save_strategy": "save_every decides",
    **dict.fromkeys(["do_train", "do_eval", "stage"], "the command and the task decide"),
    "overwrite_output_dir": "a run never overwrites another; resume goes on with one",
    "overwrite_cache": "nothing is cached between runs",
    "plot_loss": "report.html holds the curves",
    "remove_unused_columns": "only the columns of the detected format are read",
    **dict.fromkeys(["flash_attention", "flash_attn", "attn_implementation"], "PyTorch's own attention is used"),
    **dict.fromkeys(["task_type", "model_type", "tokenizer_type", "is_llama_derived_model"], "read from the model"),
    **dict.fromkeys(["preprocessing_num_workers", "dataloader_num_workers"], "reading is fast enough in one process"),
    **dict.fromkeys(["group_by_length", "ddp_timeout", "local_rank"], "it would change nothing here"),
}
