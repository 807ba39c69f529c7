"""What PEFT's documentation shows of LoRA, as scripts: each runs under both imports and must give the same.

Every script takes the library as an argument and returns what a reader would look at. The only thing that differs
between the two runs is the module that the names come from.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import veneer.peft


@dataclass
class World:
    """What the scripts start from: a base and two trained adapters on disk."""

    folder: Path
    make: Callable[..., Any]
    run: Callable[..., torch.Tensor]
    tokens: torch.Tensor

    def base(self, kind: str = "llama", head: str | None = None) -> Any:
        return self.make(kind, head)


Script = Callable[[Any, World], dict[str, Any]]
SCRIPTS: list[Script] = []


def script(run: Script) -> Script:
    SCRIPTS.append(run)
    return run


@pytest.fixture
def world(
    tmp_path: Path, make_model: Callable[..., Any], run: Callable[..., torch.Tensor], tokens: torch.Tensor
) -> Iterator[World]:
    here = World(tmp_path, make_model, run, tokens)
    make_model("llama").save_pretrained(tmp_path / "base")
    make_model("t5").save_pretrained(tmp_path / "t5")
    for name, rank, targets in (("a", 4, ["q_proj", "v_proj"]), ("b", 2, ["q_proj", "up_proj"])):
        config = veneer.peft.LoraConfig(r=rank, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        model = veneer.peft.get_peft_model(make_model("llama"), config)
        generator = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / name)
    yield here


@pytest.mark.parametrize("run_script", SCRIPTS, ids=lambda s: s.__name__)
def test_the_script_gives_the_same_under_both_imports(run_script: Script, world: World, peft: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = run_script(veneer.peft, world), run_script(peft, world)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value, theirs[key], atol=1e-5), key
        else:
            assert value == theirs[key], key


# ---------------------------------------------------------------- the scripts


@script
def quick_tour(lib: Any, world: World) -> dict[str, Any]:
    config = lib.LoraConfig(
        task_type=lib.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = lib.get_peft_model(world.base("t5"), config)
    with redirect_stdout(io.StringIO()) as out:
        model.print_trainable_parameters()
    model.save_pretrained(world.folder / lib.__name__)
    loaded = lib.PeftModel.from_pretrained(world.base("t5"), world.folder / lib.__name__)
    return {
        "told": out.getvalue(),
        "type": str(model.active_peft_config.peft_type).rpartition(".")[-1],
        "targets": model.active_peft_config.target_modules,
        "kind": isinstance(loaded, lib.PeftModelForSeq2SeqLM),
        "training": loaded.training,
        "trainable": any(p.requires_grad for p in loaded.parameters()),
        "logits": world.run(loaded, world.tokens),
    }


@script
def inference_with_an_auto_class(lib: Any, world: World) -> dict[str, Any]:
    model = lib.AutoPeftModelForCausalLM.from_pretrained(str(world.folder / "a"))
    config = lib.PeftConfig.from_pretrained(str(world.folder / "a"))
    generated = model.generate(input_ids=world.tokens, max_new_tokens=6, do_sample=False)
    return {
        "logits": world.run(model, world.tokens),
        "generated": generated,
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "targets": set(config.target_modules),
        "inference": config.inference_mode,
    }


@script
def several_adapters(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", adapter_name="a")
    model.load_adapter(str(world.folder / "b"), adapter_name="b")
    seen: dict[str, Any] = {"loaded": list(model.peft_config), "active at first": model.active_adapter}
    seen["a"] = world.run(model, world.tokens)
    model.set_adapter("b")
    seen["b"], seen["now"] = world.run(model, world.tokens), model.active_adapters
    seen["trained"] = dict(model.get_model_status().requires_grad)
    with model.disable_adapter():
        seen["base"] = world.run(model, world.tokens)
    seen["b again"] = world.run(model, world.tokens)
    model.delete_adapter("b")
    seen["left"], seen["active at last"] = list(model.peft_config), model.active_adapter
    seen["a again"] = world.run(model, world.tokens)
    return seen


@script
def a_batch_with_an_adapter_for_each_row(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", adapter_name="a")
    model.load_adapter(str(world.folder / "b"), adapter_name="b")
    names = ["__base__", "b", "a"]
    return {
        "forward": world.run(model, world.tokens, adapter_names=names),
        "generated": model.generate(
            input_ids=world.tokens, adapter_names=names, max_new_tokens=5, min_new_tokens=5, do_sample=False
        ),
        "beams": model.generate(
            input_ids=world.tokens,
            adapter_names=names,
            max_new_tokens=4,
            min_new_tokens=4,
            num_beams=2,
            do_sample=False,
        ),
    }


@script
def merging(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    seen: dict[str, Any] = {"adapted": world.run(model, world.tokens)}
    model.merge_adapter()
    seen["merged"] = model.get_model_status().merged_adapters
    seen["while merged"] = world.run(model, world.tokens)
    model.unmerge_adapter()
    seen["unmerged"] = model.get_model_status().merged_adapters
    plain = model.merge_and_unload(safe_merge=True)
    plain.save_pretrained(world.folder / f"merged-{lib.__name__}")
    again = type(plain).from_pretrained(world.folder / f"merged-{lib.__name__}")
    seen["class"] = type(plain).__name__
    seen["keys"] = set(plain.state_dict())
    seen["from disk"] = world.run(again.eval(), world.tokens)
    return seen


@script
def unloading(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    plain = model.unload()
    return {"class": type(plain).__name__, "logits": world.run(plain, world.tokens), "keys": set(plain.state_dict())}


@script
def adding_adapters_up(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", adapter_name="a")
    model.load_adapter(str(world.folder / "b"), adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", combination_type="cat")
    model.set_adapter("sum")
    seen = {"cat": world.run(model, world.tokens), "names": list(model.peft_config)}
    model.add_weighted_adapter(["a"], [0.5], "part", combination_type="linear")
    model.set_adapter("part")
    seen["of one"] = world.run(model, world.tokens)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "cut", combination_type="svd", svd_rank=6)  # enough for both
    model.set_adapter("cut")
    seen["svd"] = world.run(model, world.tokens)
    return seen


@script
def state_dicts(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    state = lib.get_peft_model_state_dict(model)
    read = lib.load_peft_weights(str(world.folder / "a"), device="cpu")
    assert read.keys() == state.keys() and all(torch.equal(read[key], state[key]) for key in read)
    config = lib.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    other = lib.get_peft_model(world.base(), config).eval()
    result = lib.set_peft_model_state_dict(other, {key: value * 2 for key, value in state.items()})
    partial = lib.set_peft_model_state_dict(
        other, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": next(iter(state.values()))}
    )
    return {
        "keys": set(state),
        "unexpected": list(result.unexpected_keys),
        "unexpected in part": list(partial.unexpected_keys),
        "logits": world.run(other, world.tokens),
    }


@script
def injecting(lib: Any, world: World) -> dict[str, Any]:
    base = world.base()
    config = lib.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = lib.inject_adapter_in_model(config, base)
    state = lib.get_peft_model_state_dict(model)
    trained = {k: torch.full_like(v, 0.05) for k, v in state.items()}
    lib.set_peft_model_state_dict(model, trained)
    return {
        "same object": model is base,
        "class": type(model).__name__,
        "keys": set(state),
        "logits": world.run(model, world.tokens),
    }


@script
def before_training_on_a_quantised_base(lib: Any, world: World) -> dict[str, Any]:
    model = lib.prepare_model_for_kbit_training(world.base().to(torch.bfloat16))
    frozen = not any(p.requires_grad for p in model.parameters())
    model = lib.get_peft_model(model, lib.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    return {
        "frozen": frozen,
        "types": {p.dtype for p in model.parameters()},
        "counts": model.get_nb_trainable_parameters(),
    }


@script
def the_type_of_the_adapter(lib: Any, world: World) -> dict[str, Any]:
    seen = {}
    for cast in (True, False):
        base = world.base().to(torch.bfloat16)
        config = lib.LoraConfig(task_type="CAUSAL_LM")
        model = lib.get_peft_model(base, config, autocast_adapter_dtype=cast)
        seen[f"autocast {cast}"] = {p.dtype for p in model.parameters() if p.requires_grad}
    return seen


@script
def a_head_that_is_trained_with_the_adapter(lib: Any, world: World) -> dict[str, Any]:
    model = lib.get_peft_model(world.base("bert"), lib.LoraConfig(task_type=lib.TaskType.SEQ_CLS, r=4))
    return {
        "kind": isinstance(model, lib.PeftModelForSequenceClassification),
        "head": "classifier" in model.active_peft_config.modules_to_save,
        "counts": model.get_nb_trainable_parameters(),
        "heads in the file": {k for k in lib.get_peft_model_state_dict(model) if "classifier" in k},
    }


@script
def continuing_to_train(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", is_trainable=True)
    counts = model.get_nb_trainable_parameters()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(input_ids=world.tokens, labels=world.tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss), 4))
    return {"counts": counts, "losses": losses, "after": world.run(model, world.tokens)}


@script
def beginning_without_a_zero(lib: Any, world: World) -> dict[str, Any]:
    torch.manual_seed(0)
    config = lib.LoraConfig(init_lora_weights=False, r=8, target_modules=["gate_proj"])
    model = lib.get_peft_model(world.base(), config)
    b = [v for k, v in lib.get_peft_model_state_dict(model).items() if "lora_B" in k]
    bound = max(float(v.abs().max()) for v in b)
    return {"B is not zero": bound > 0, "within its bound": bound <= 8**-0.5}


@script
def what_the_model_says_of_itself(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", adapter_name="a")
    model.load_adapter(str(world.folder / "b"), adapter_name="b")
    status = asdict(model.get_model_status())
    layers = [asdict(layer) for layer in model.get_layer_status()]
    return {**{k: v for k, v in status.items() if k != "adapter_model_type"}, "layers": layers}


@script
def swapping(lib: Any, world: World) -> dict[str, Any]:
    swap = (
        lib.hotswap_adapter if lib is veneer.peft else __import__("peft.utils.hotswap", fromlist=["x"]).hotswap_adapter
    )
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    other = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora" in name:
                parameter.mul_(2)
    other.save_pretrained(world.folder / f"twice-{lib.__name__}")
    swap(model, str(world.folder / f"twice-{lib.__name__}"), adapter_name="default", torch_device="cpu")
    return {"logits": world.run(model, world.tokens), "active": model.active_adapter}


@script
def weakening_an_adapter(lib: Any, world: World) -> dict[str, Any]:
    helpers = lib if lib is veneer.peft else __import__("peft.helpers", fromlist=["rescale_adapter_scale"])
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    with helpers.rescale_adapter_scale(model, 0.25):
        weak = world.run(model, world.tokens)
    return {"weak": weak, "strong": world.run(model, world.tokens)}


@script
def through_the_wrappers(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a")
    return {
        "body": type(model.base_model.model).__name__,
        "blocks": len(model.base_model.model.model.layers),
        "base": type(model.get_base_model()).__name__,
        "tuner": type(model.base_model).__name__,
        "is one": isinstance(model.base_model, lib.LoraModel),
        "config": model.config.model_type,
        "device": str(model.device),
        "rank": model.base_model.peft_config["default"].r,
    }


@script
def new_tokens(lib: Any, world: World) -> dict[str, Any]:
    base = world.base()
    base.resize_token_embeddings(390, mean_resizing=False)
    with torch.no_grad():
        base.get_input_embeddings().weight[384:] = 0.5
        base.get_output_embeddings().weight[384:] = 0.25
    config = lib.LoraConfig(trainable_token_indices={"embed_tokens": [384, 385]}, target_modules=["q_proj"])
    model = lib.get_peft_model(base, config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tokens = torch.tensor([[384, 7, 385, 9]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    state = lib.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        "rows": state["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"],
        "counts": model.get_nb_trainable_parameters(),
        "keys": {key for key in state if "embed" in key or "head" in key},
    }


@script
def other_ranks_in_other_layers(lib: Any, world: World) -> dict[str, Any]:
    config = lib.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", use_rslora=True, exclude_modules=["down_proj"],
        rank_pattern={"^model.layers.0.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 4},
    )  # fmt: skip
    model = lib.get_peft_model(world.base(), config)
    shapes = {key: tuple(value.shape) for key, value in lib.get_peft_model_state_dict(model).items()}
    return {"shapes": shapes, "counts": model.get_nb_trainable_parameters()}


@script
def two_rates_for_two_factors(lib: Any, world: World) -> dict[str, Any]:
    create = lib if lib is veneer.peft else __import__("peft.optimizers", fromlist=["x"])
    config = lib.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"], bias="none")
    model = lib.get_peft_model(world.base(), config)
    optimizer = create.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=5e-5, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return {"sizes": sizes, "rates": [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]}


@script
def frozen_in_half_and_trained_in_full(lib: Any, world: World) -> dict[str, Any]:
    cast = lib if lib is veneer.peft else __import__("peft.utils.other", fromlist=["x"])
    model = lib.get_peft_model(world.base(), lib.LoraConfig(r=4, task_type="CAUSAL_LM"))
    cast.cast_mixed_precision_params(model, dtype=torch.bfloat16)
    return {"types": {(p.dtype, p.requires_grad) for p in model.parameters()}}


@script
def several_merged_at_once(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", adapter_name="a")
    model.load_adapter(str(world.folder / "b"), adapter_name="b")
    both = model.merge_and_unload(safe_merge=True, adapter_names=["a", "b"])
    return {"logits": world.run(both, world.tokens), "kind": type(both).__name__}


@script
def adapters_with_the_base_beside_them(lib: Any, world: World) -> dict[str, Any]:
    model = lib.PeftModel.from_pretrained(world.base(), world.folder / "a", adapter_name="a")
    model.add_adapter("fresh", lib.LoraConfig(r=4, target_modules=["k_proj"]))
    seen: dict[str, Any] = {"active": model.active_adapters, "all": sorted(model.peft_config)}
    model.set_adapter("fresh")
    seen["fresh is the base yet"] = world.run(model, world.tokens)
    seen["trained"] = dict(model.get_model_status().requires_grad)
    model.base_model.set_adapter(["a", "fresh"])
    seen["both"] = world.run(model, world.tokens)
    return seen
