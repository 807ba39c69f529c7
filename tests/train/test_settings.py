"""The schema: what it takes, what it refuses and in which words, and that it knows where every value came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer.errors import ConfigError
from veneer.train.aliases import ALIASES, NOT_NEEDED
from veneer.train.settings import KEYS, Settings, explain, resolve


def problems(**given: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(mapping=given)
    return caught.value.problems


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


# ---------------------------------------------------------------- the table itself


def test_few_keys_decide_what_a_run_produces() -> None:
    assert sum(key.group not in ("subject", "run", "pictures") for key in KEYS.values()) <= 49
    assert sum(key.group == "pictures" for key in KEYS.values()) <= 24


def test_the_defaults_pass_their_own_readers() -> None:
    for key in KEYS.values():
        assert key.read(key.default) == key.default, key.name
        assert not key.choices or key.default in key.choices


def test_resolving_nothing_gives_the_defaults_and_two_rules() -> None:
    settings, origins, notices = resolve()
    changed = {name for name, key in KEYS.items() if getattr(settings, name) != key.default}
    assert changed == {"alpha", "global_batch"} == {name for name, origin in origins.items() if origin.how == "rule"}
    assert settings.alpha == 32.0 and settings.global_batch == settings.batch_size and not notices


def test_every_key_explains_itself_in_whole_sentences() -> None:
    for name, key in KEYS.items():
        assert key.help.endswith((".", "}.")) and key.help[0].isupper(), name
        assert explain(name).startswith(f"{name}: {key.help}")


def test_every_alias_leads_to_a_key_and_is_listed_there() -> None:
    listed = {alias for key in KEYS.values() for alias in key.aliases}
    assert listed == set(ALIASES) - {"fp16"}  # which is only there to say what to write instead
    assert not set(ALIASES) & set(KEYS) and not set(NOT_NEEDED) & (set(KEYS) | set(ALIASES))


@pytest.mark.parametrize(
    "key,registry",
    [("delta", "DELTAS"), ("combine", "COMBINES"), ("init", "INITS"), ("scaling", "SCALINGS")],
)
def test_choices_are_known_to_the_core(key: str, registry: str) -> None:
    from veneer.core import combine, delta, init, spec

    known = {**vars(combine), **vars(delta), **vars(init), **vars(spec)}[registry]
    assert {KEYS[key].default, *KEYS[key].choices} <= set(known)


def test_tasks_are_those_that_are_registered() -> None:
    from veneer.tasks.base import TASKS

    assert set(KEYS["task"].choices) == set(TASKS) and all(kind.name == name for name, kind in TASKS.items())


def test_no_heavy_import() -> None:
    code = (
        "import sys, veneer.train.settings; print([m for m in ('torch', 'transformers', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- sources and origins


def test_flags_win_over_the_call_and_the_call_over_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "r: 4\nlr: 1e-4\nseed: 7\n")
    settings, origins, _ = resolve(path, {"r": 8, "lr": 2e-4}, {"--lr": "3e-4"})
    assert (settings.r, settings.lr, settings.seed) == (8, 3e-4, 7)
    assert [str(origins[name]) for name in ("r", "lr", "seed")] == ["call", "flag: --lr", "file: config.yaml:3"]


def test_yaml_1_1_numbers_are_read_by_the_schema(tmp_path: Path) -> None:
    settings = resolve(written(tmp_path, "lr: 1e-4\nmax_len: 1e3\npacking: no\nseed: '3'\n")).settings
    assert (settings.lr, settings.max_len, settings.packing, settings.seed) == (1e-4, 1000, "off", 3)


def test_dashes_are_underscores_everywhere(tmp_path: Path) -> None:
    assert resolve(written(tmp_path, "max-len: 64\n"), {"batch-size": 2}, {"--global-batch": "4"}).settings == (
        resolve(mapping={"max_len": 64, "batch_size": 2, "global_batch": 4}).settings
    )


def test_alpha_follows_the_rank_unless_it_is_given() -> None:
    assert resolve(mapping={"r": 4}).settings.alpha == 8
    assert str(resolve(mapping={"r": 4}).origins["alpha"]) == "rule: 2 x r = 8"
    assert resolve(mapping={"r": 4, "alpha": 4}).settings.alpha == 4


def test_a_later_source_says_steps_or_epochs_anew(tmp_path: Path) -> None:
    path = written(tmp_path, "steps: 100\n")
    settings = resolve(path, flags={"epochs": "2"}).settings
    assert settings.steps is None and settings.epochs == 2
    both = resolve(mapping={"steps": 3, "epochs": 1})
    assert both.settings.steps == 3 and both.notices == ["steps: 3 counts, and epochs: 1 does not"]


# ---------------------------------------------------------------- what other tools write

EQUAL = [
    ({"lora_r": 8}, {"r": 8}),
    ({"network_dim": "8", "network_alpha": "4"}, {"r": 8, "alpha": 4}),
    ({"lora_target": "all"}, {"targets": "all-linear"}),
    ({"target_modules": ["q_proj", "v_proj"]}, {"targets": "q_proj,v_proj"}),
    ({"lora_target_linear": True}, {"targets": "all-linear"}),
    ({"use_dora": True, "use_rslora": "true"}, {"combine": "dora", "scaling": "rslora"}),
    ({"variant": "pissa"}, {"init": "pissa"}),
    ({"variant": "lora+"}, {"lora_plus_ratio": 16}),
    ({"init_lora_weights": True}, {"init": "kaiming"}),
    ({"train_on_inputs": False}, {"loss_on": "assistant"}),
    ({"train_on_prompt": True}, {"loss_on": "all"}),
    ({"mask_prompt": True}, {"loss_on": "completions"}),
    ({"mask_prompt": False}, {"loss_on": "all"}),
    ({"assistant_only_loss": True}, {"loss_on": "assistant"}),
    ({"mask_history": True}, {"loss_on": "last"}),
    ({"roles_to_train": ["assistant"]}, {"loss_on": "assistant"}),
    ({"load_in_4bit": True}, {"quant": "nf4"}),
    ({"load_in_8bit": False}, {}),
    ({"quantization_bit": 8}, {"quant": "int8"}),
    ({"quantize": "bnb.nf4"}, {"quant": "nf4"}),
    ({"adapter": "qlora"}, {"method": "lora", "quant": "nf4"}),
    ({"finetuning_type": "full"}, {"method": "full"}),
    ({"num_layers": 16}, {"layers": 16}),
    ({"layers_to_transform": 3}, {"layers": [3]}),
    ({"rank_pattern": {"q_proj": 4}}, {"overrides": {"q_proj": {"rank": 4}}}),
    ({"learning_rate": "2e-4", "lr_scheduler_type": "linear"}, {"lr": 2e-4, "schedule": "linear"}),
    ({"warmup_ratio": 0.1}, {"warmup": 0.1}),
    ({"warmup_steps": 10}, {"warmup": 10}),
    ({"max_steps": -1, "num_train_epochs": 2}, {"epochs": 2}),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, {"batch_size": 2, "global_batch": 16}),
    ({"lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.1}}, {"r": 4, "alpha": 80, "dropout": 0.1}),
    ({"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, {"data": "a.jsonl"}),
    ({"data": {"json_path": "a.json"}}, {"data": "a.json"}),
    ({"train": {"lr": 1e-3}}, {"lr": 1e-3}),
    ({"val_set_size": 0.1, "cutoff_len": 512, "sample_packing": True}, {"val": 0.1, "max_len": 512, "packing": "on"}),
    ({"gradient_checkpointing": "unsloth", "bf16": True}, {"recompute": "input", "precision": "bf16"}),
    ({"bf16": "auto", "fp16": False}, {}),
    ({"task": "sft"}, {"task": "causal_lm"}),
    ({"task": "text-classification"}, {"task": "sequence_classification"}),
]


@pytest.mark.parametrize("theirs,ours", EQUAL, ids=lambda given: ",".join(given) or "nothing")
def test_aliases_mean_what_they_mean_elsewhere(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    read = resolve(mapping=theirs)
    assert read.settings == resolve(mapping=ours).settings
    foreign = [name for name, value in theirs.items() if name not in KEYS or isinstance(value, dict)]
    assert len(read.notices) >= len(foreign) - (theirs.get("task") is not None)


def test_a_notice_is_one_line_with_both_names() -> None:
    notices = resolve(mapping={"lora_r": 8, "train_on_inputs": False, "logging_steps": 5}).notices
    assert notices == [
        "'lora_r' is called 'r' here",
        "'train_on_inputs' is read as loss_on: assistant",
        "'logging_steps' is not needed: every step is logged",
    ]


def test_grad_accum_gives_way_to_a_later_global_batch(tmp_path: Path) -> None:
    path = written(tmp_path, "micro_batch_size: 2\ngradient_accumulation_steps: 4\n")
    assert resolve(path).settings.global_batch == 8
    assert resolve(path, flags={"global_batch": "16"}).settings.global_batch == 16
    assert problems(batch_size=2, grad_accum=4, global_batch=9) == [
        "grad_accum 4 x batch_size 2 is not global_batch 9: say one of them"
    ]


# ---------------------------------------------------------------- what is refused


def test_all_problems_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "lerning_rate: 1\nr: many\nr: 4\noptim:\n  name: adam\nschedule: cosinus\nval: -1\n")
    with pytest.raises(ConfigError) as caught:
        resolve(path)
    assert caught.value.problems == [
        "config.yaml:3: 'r' stands here a second time; first on line 2",
        "config.yaml:1: unknown setting 'lerning_rate'. Did you mean 'learning_rate'?",
        "config.yaml:2: r: expected a number, got 'many' (str)",
        "config.yaml:4: unknown section 'optim': settings are flat here, write 'name' at the top level",
        "config.yaml:6: schedule: 'cosinus' (str) is not one of cosine, linear, constant. Did you mean 'cosine'?",
        "config.yaml:7: val: expected a share below 1, a number of rows or a file, got -1 (int)",
    ]
    assert "6 settings are wrong" in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "given,said",
    [
        ({"lrr": 1}, "Did you mean 'lr'?"),
        ({"dropout": 1.5}, "expected a number from 0 to 0.95, got 1.5 (float)"),
        ({"r": 2.5}, "expected a whole number, got 2.5 (float)"),
        ({"r": True}, "expected a number, got True (bool)"),
        ({"lr": "fast"}, "expected a number, got 'fast' (str)"),
        ({"yes": "maybe"}, "expected true or false"),
        ({"targets": []}, "expected a preset, a pattern or a list of names"),
        ({"layers": "7-3"}, "runs backwards"),
        ({"overrides": {"q_proj": {"lr": 1}}}, "what can differ is rank, alpha, dropout"),
        ({"fp16": True}, "precision is bf16 or fp32"),
        ({"roles_to_train": ["user"]}, "only assistant turns or all turns"),
        ({"lora_r": 4, "r": 8}, "'r' is said twice: 4 and 8"),
        ({"method": "full", "r": 8}, "r has no effect with method: full; it is for lora"),
        ({"task": "ner", "packing": "on"}, "packing has no effect with task: token_classification"),
        ({"patience": 2, "val": 0}, "patience has no effect with val: 0"),
        ({"method": "freeze", "layers": [1, 2]}, "say how many of the last layers train"),
        ({"batch_size": 8, "global_batch": 4}, "global_batch 4 is smaller than batch_size 8"),
    ],
)
def test_wrong_values_are_named_with_the_rule_they_break(given: dict[str, Any], said: str) -> None:
    assert any(said in problem for problem in problems(**given)), problems(**given)


def test_a_file_that_is_no_settings_file(tmp_path: Path) -> None:
    for text, said in [("- a\n- b\n", "list of `key: value`"), ("a: [1\n", "not valid YAML")]:
        with pytest.raises(ConfigError, match=said):
            resolve(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot read"):
        resolve(tmp_path / "missing.yaml")
    assert resolve(written(tmp_path, "# nothing\n")).settings == resolve().settings


def test_explain_knows_every_name_and_helps_with_wrong_ones() -> None:
    assert explain("--learning-rate").startswith("lr: ")
    assert explain("grad_accum").startswith("global_batch: ")
    with pytest.raises(ConfigError, match="Did you mean 'schedule'"):
        explain("shedule")


def test_settings_are_frozen_and_keyword_only() -> None:
    with pytest.raises(AttributeError):
        Settings().r = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings("model")  # type: ignore[misc]
