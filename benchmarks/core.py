"""What the core costs, beside PEFT and beside LoRA written by hand, in one process.

    python benchmarks/core.py [--quick] [--json FILE]

On a CPU only ratios count: all candidates of a row run in turn, round after round, and each ratio is the median of the
ratios within a round, so a machine that slows down slows all of them. One thread.

    row                what is compared                                                    aim
    layer              one 32 x 32 adapted Linear, forward                                 at most 1.3 x by hand
    attach             all linears of a Llama-3.1-8B shape on the meta device              at least 5 x faster than PEFT
    save, load         16 layers x 1024, seven targets, from a warm file                   load at least 5 x faster
    activate           switching between two adapters on the same model                    at least 20 x faster
    growth             load and activate with 2 and with 40 adapters on the model          flat
    merge              peak extra memory while merging a model                             one layer
    step               forward and backward, 16 layers x 1024, 256 tokens                  at most 1.04 x frozen
                       (floor: the frozen model and the products with A and B alone)
    saved              bytes kept for the backward pass, 4 layers                          no more than by hand
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import LoRA

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPEC = LoRA(rank=16, alpha=32, targets=TARGETS)


def llama(layers: int, width: int, **more: Any) -> LlamaForCausalLM:
    fields = {"intermediate_size": width * 11 // 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    fields |= {"vocab_size": 1000, "hidden_size": width, "num_hidden_layers": layers, "use_cache": False}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(fields | more))).eval()


def llama_8b() -> LlamaForCausalLM:
    with torch.device("meta"):
        return llama(
            32, 4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
        )


def peft_config(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**({"r": 16, "lora_alpha": 32, "target_modules": TARGETS} | more))


class Handwritten(nn.Module):
    """LoRA as everybody writes it first."""

    def __init__(self, base: nn.Linear, rank: int = 16, alpha: float = 32) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(rank, base.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scale


def rounds(candidates: dict[str, Callable[[], object]], count: int, inner: int = 1) -> dict[str, list[float]]:
    """Seconds per call of each candidate, in turn, `count` times; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(count + 1):
        for name, call in candidates.items():
            gc.disable()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            took = (time.perf_counter() - start) / inner
            gc.enable()
            if i:
                seconds[name].append(took)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def setups(candidates: dict[str, Callable[[], Callable[[], object]]], count: int) -> dict[str, list[float]]:
    """Like rounds, for calls that use up what they work on: each candidate first makes its call, unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(count + 1):
        for name, prepare in candidates.items():
            call = prepare()
            gc.collect()
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# --- the rows -------------------------------------------------------------------------------------------------------


def layer(quick: bool) -> dict[str, float]:
    from peft import get_peft_model

    x = torch.randn(4, 32)
    plain = nn.Linear(32, 32).requires_grad_(False)
    hand = Handwritten(nn.Linear(32, 32).requires_grad_(False))
    ours, theirs = (nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
    veneer.attach(ours, LoRA(rank=16, alpha=32, targets=["0"]))
    theirs = get_peft_model(theirs, peft_config(target_modules=["0"])).base_model.model
    ours, theirs = ours[0], theirs[0]
    candidates = {"plain": plain, "by hand": hand, "veneer": ours, "peft": theirs}
    calls = {name: (lambda m=m: m(x)) for name, m in candidates.items()}
    seconds = rounds(calls, 10 if quick else 40, 500)
    with torch.no_grad():
        frozen = rounds(calls, 10 if quick else 40, 500)
    result = {f"{n} us": 1e6 * statistics.median(s) for n, s in seconds.items()}
    result["veneer / by hand"] = ratio(seconds["veneer"], seconds["by hand"])
    result["peft / by hand"] = ratio(seconds["peft"], seconds["by hand"])
    result["veneer / by hand, no grad"] = ratio(frozen["veneer"], frozen["by hand"])
    return result


def attach(quick: bool) -> dict[str, float]:
    from peft import get_peft_model

    def ours() -> Callable[[], object]:
        model = llama_8b()
        return lambda: veneer.attach(model, SPEC)

    def theirs() -> Callable[[], object]:
        model = llama_8b()
        return lambda: get_peft_model(model, peft_config())

    seconds = setups({"veneer": ours, "peft": theirs}, 3 if quick else 7)
    result = {f"{n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()}
    return result | {"peft / veneer": ratio(seconds["peft"], seconds["veneer"])}


def files(quick: bool) -> dict[str, float]:
    from peft import PeftModel, get_peft_model

    base, count = llama(16, 1024), 3 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        peft_model = get_peft_model(copy.deepcopy(base), peft_config())
        ours = copy.deepcopy(base)
        veneer.attach(ours, SPEC)
        saving = rounds(
            {
                "veneer": lambda: veneer.save(ours, f"{folder}/veneer"),
                "peft": lambda: peft_model.save_pretrained(f"{folder}/peft"),
            },
            count,
        )

        def load_ours() -> Callable[[], object]:
            model = copy.deepcopy(base)
            return lambda: veneer.load(model, f"{folder}/peft")

        def load_theirs() -> Callable[[], object]:
            model = copy.deepcopy(base)
            return lambda: PeftModel.from_pretrained(model, f"{folder}/peft")

        loading = setups({"veneer": load_ours, "peft": load_theirs}, count)
    result = {f"save {n} ms": 1e3 * statistics.median(s) for n, s in saving.items()}
    result |= {f"load {n} ms": 1e3 * statistics.median(s) for n, s in loading.items()}
    return result | {
        "save: peft / veneer": ratio(saving["peft"], saving["veneer"]),
        "load: peft / veneer": ratio(loading["peft"], loading["veneer"]),
    }


def activate(quick: bool) -> dict[str, float]:
    from peft import get_peft_model

    ours, theirs = llama(16, 256), get_peft_model(llama(16, 256), peft_config(), "a")
    theirs.add_adapter("b", peft_config())
    for name in ("a", "b"):
        veneer.attach(ours, SPEC, name)

    def both(call: Callable[[str], object]) -> Callable[[], object]:
        return lambda: (call("a"), call("b"))

    seconds = rounds(
        {"veneer": both(lambda n: veneer.activate(ours, n)), "peft": both(lambda n: theirs.set_adapter(n))},
        5 if quick else 15,
        5,
    )
    result = {f"{n} us": 5e5 * statistics.median(s) for n, s in seconds.items()}
    return result | {"peft / veneer": ratio(seconds["peft"], seconds["veneer"])}


def growth(quick: bool) -> dict[str, float]:
    """The cost of one more adapter, and of a switch, with 2 and with 40 on the model."""
    model, many = llama(16, 256), 20 if quick else 40
    with tempfile.TemporaryDirectory() as folder:
        veneer.attach(model, SPEC)
        veneer.save(model, folder)
        load, switch = [], []
        for i in range(1, many):
            start = time.perf_counter()
            veneer.load(model, folder, name=f"a{i}")
            load.append(time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(100):
                veneer.activate(model, "default")
            switch.append((time.perf_counter() - start) / 100)
    early, late = slice(1, 6), slice(many - 6, many - 1)
    return {
        f"load with {many} / with 5": statistics.median(load[late]) / statistics.median(load[early]),
        f"activate with {many} / with 5": statistics.median(switch[late]) / statistics.median(switch[early]),
    }


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The highest sum of bytes of tensors made by torch inside the block and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.seen:
                self._watch(t, args)
        return out

    def _watch(self, t: Tensor, args: Any) -> None:
        import weakref

        storage = t.untyped_storage()
        inputs = {a.untyped_storage()._cdata for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor)}
        if storage._cdata in inputs:
            return
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def merge(quick: bool) -> dict[str, float]:
    from peft import get_peft_model

    result: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = llama(4 if quick else 8, 1024).to(dtype)
        largest = max(p.numel() * p.element_size() for p in base.parameters())
        ours = copy.deepcopy(base)
        veneer.attach(ours, SPEC)
        fill(ours)
        with Peak() as mine:
            veneer.merge(ours, keep_base=False)
        theirs = get_peft_model(copy.deepcopy(base), peft_config())
        fill(theirs)
        with Peak() as other:
            theirs.merge_and_unload()
        name = str(dtype).removeprefix("torch.")
        result |= {
            f"{name} largest layer MiB": largest / 2**20,
            f"{name} veneer peak extra MiB": mine.peak / 2**20,
            f"{name} peft peak extra MiB": other.peak / 2**20,
        }
    base = llama(4, 1024)
    seconds = setups({"veneer": lambda: _merge_ours(base), "peft": lambda: _merge_theirs(base)}, 3 if quick else 7)
    return result | {"time: peft / veneer": ratio(seconds["peft"], seconds["veneer"])}


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_(std=0.02)


def _merge_ours(base: nn.Module) -> Callable[[], object]:
    model = copy.deepcopy(base)
    veneer.attach(model, SPEC)
    return lambda: (veneer.merge(model, keep_base=False), veneer.detach(model))


def _merge_theirs(base: nn.Module) -> Callable[[], object]:
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(base), peft_config())
    return lambda: model.merge_and_unload()


def by_hand(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, Handwritten(module))
    return model


def variants(layers: int, width: int) -> dict[str, nn.Module]:
    from peft import get_peft_model

    ours, frozen = llama(layers, width), llama(layers, width).requires_grad_(False)
    veneer.attach(ours, SPEC)
    dora = llama(layers, width)
    veneer.attach(dora, LoRA(rank=16, alpha=32, targets=TARGETS, combine="dora"))
    return {
        "frozen": frozen,
        "veneer": ours,
        "peft": get_peft_model(llama(layers, width), peft_config()),
        "by hand": by_hand(llama(layers, width)),
        "veneer dora": dora,
        "peft dora": get_peft_model(llama(layers, width), peft_config(use_dora=True)),
    }


def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).logits.square().mean()


def step(quick: bool) -> dict[str, float]:
    layers = 2 if quick else 16
    x = torch.randn(1, 256, 1024, requires_grad=True)
    models = variants(layers, 1024)
    calls = {name: (lambda m=m: forward(m, x).backward()) for name, m in models.items()}
    seconds = rounds(calls | {"thin": thin_products(models["frozen"], x.shape[1])}, 7 if quick else 9)
    result = {f"{n} ms": 1e3 * statistics.median(s) for n, s in seconds.items()}
    result |= {f"{n} / frozen": ratio(s, seconds["frozen"]) for n, s in seconds.items() if n != "frozen"}
    return result | {"floor / frozen": 1 + result.pop("thin / frozen")}


def thin_products(model: nn.Module, rows: int, rank: int = 16) -> Callable[[], None]:
    """What no implementation can leave out: the six products with A and B of each adapted layer, and nothing else.

    Two forward (S = X A^T, Y += S B^T) and four backward (dS = dY B, dA = dS^T X, dB = dY^T S, dX += dS A), all on
    buffers that exist already.
    """
    work = []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            x, y = torch.randn(rows, m.in_features), torch.randn(rows, m.out_features)
            work.append((x, y, torch.randn(rank, m.in_features), torch.randn(m.out_features, rank)))

    def products() -> None:
        for x, y, A, B in work:
            S = F.linear(x, A)
            y.addmm_(S, B.T, alpha=1e-6)
            dS = y @ B
            _ = dS.T @ x, y.T @ S
            x.addmm_(dS, A, alpha=1e-6)

    return products


def saved(quick: bool) -> dict[str, float]:
    """Bytes that autograd keeps between forward and backward, parameters not counted."""
    result = {}
    for name, model in variants(4, 1024).items():
        model = model.to(torch.bfloat16)
        held: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(t: Tensor, held: dict[int, int] = held, own: set[int] = own) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return t

        x = torch.randn(1, 256, 1024, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = forward(model, x)
        result[f"{name} MiB"] = sum(held.values()) / 2**20
        del loss
    return result


ROWS = {f.__name__: f for f in (layer, attach, files, activate, growth, merge, step, saved)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller models")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="only these rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.rows or ROWS:
        results[name] = ROWS[name](args.quick)
        print(f"{name}", *(f"  {key:32} {value:10.3f}" for key, value in results[name].items()), sep="\n", flush=True)
    if args.json:
        import transformers

        import peft

        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        args.json.write_text(json.dumps({"command": sys.argv, "versions": versions, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
