"""The svd mix of two adapters, beside PEFT's: time, and the error of both against the exact sum.

    python benchmarks/mixing.py [--layers 1] [--width 1024] [--json FILE]

Rank 16 on all seven linears of a Llama, mixed 0.7 to 0.3 into rank 16. PEFT forms every dW and takes its whole SVD,
with all columns of U and V by default; here the stacked factors are turned by QR and only the small core between them
is taken apart. PEFT's default needs about a minute for 16 layers, so both mix the same few layers in turn, and ours is
run on 16, too. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import veneer
from core import TARGETS, fill, llama, peft_config, ratio
from veneer import LoRA
from veneer.core.model import adapter_of, sites

WEIGHTS = {"a": 0.7, "b": 0.3}


def mine(layers: int, width: int) -> Any:
    model = llama(layers, width)
    for name in WEIGHTS:
        veneer.attach(model, LoRA(rank=16, alpha=32, targets=TARGETS), name, trainable=False)
    fill(model)
    return model


def peers(layers: int, width: int) -> Any:
    from peft import get_peft_model

    model = get_peft_model(llama(layers, width), peft_config(), "a")
    model.add_adapter("b", peft_config())
    return model


def same_values(model: Any, peer: Any) -> None:
    """Give PEFT's adapters the values of ours."""
    for site in sites(model):
        layer = peer.base_model.model.get_submodule(site)
        for name in WEIGHTS:
            delta = adapter_of(sites(model)[site], name).delta
            layer.lora_A[name].weight.data.copy_(delta.A)
            layer.lora_B[name].weight.data.copy_(delta.B)


def mix_peers(peer: Any, into: str, **more: Any) -> None:
    names, weights = [*WEIGHTS], [*WEIGHTS.values()]
    peer.add_weighted_adapter(names, weights, into, combination_type="svd", svd_rank=16, **more)


def worst_error(model: Any, change: Callable[[str], Tensor]) -> float:
    """The largest |dW - wanted| / |wanted| of a layer."""
    found = []
    for site, layer in sites(model, "a").items():
        wanted = sum(w * adapter_of(layer, n).delta.weight() for n, w in WEIGHTS.items())  # type: ignore[union-attr]
        found.append(float((change(site) - wanted).norm() / wanted.norm()))  # type: ignore[union-attr]
    return max(found)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(layers: int, width: int, count: int) -> dict[str, float]:
    model, peer = mine(layers, width), peers(layers, width)
    same_values(model, peer)
    times: dict[str, list[float]] = {"veneer": [], "peft": [], "peft, thin": []}
    for i in range(count):
        times["veneer"].append(timed(lambda i=i: veneer.combine(model, WEIGHTS, f"m{i}", "svd", rank=16)))
        times["peft"].append(timed(lambda i=i: mix_peers(peer, f"m{i}")))
        times["peft, thin"].append(timed(lambda i=i: mix_peers(peer, f"t{i}", svd_full_matrices=False)))
    large = mine(16, width)
    whole = timed(lambda: veneer.combine(large, WEIGHTS, "m", "svd", rank=16))
    layer = peer.base_model.model.get_submodule
    return {
        "veneer s": statistics.median(times["veneer"]),
        "peft s": statistics.median(times["peft"]),
        "peft / veneer": ratio(times["peft"], times["veneer"]),
        "peft without full matrices / veneer": ratio(times["peft, thin"], times["veneer"]),
        "veneer, 16 layers, s": whole,
        "veneer error": worst_error(model, lambda site: adapter_of(sites(model)[site], "m0").delta.weight()),  # type: ignore[union-attr]
        "peft error": worst_error(model, lambda site: layer(site).get_delta_weight("m0")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=1, help="layers that both mix")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--count", type=int, default=3, help="rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.layers, args.width, args.count)
    print(*(f"  {key:38} {value:10.4g}" for key, value in found.items()), sep="\n", flush=True)
    if args.json:
        import peft

        about = {"torch": torch.__version__, "peft": peft.__version__, "layers": args.layers, "width": args.width}
        args.json.write_text(json.dumps({"about": about | {"command": sys.argv}, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
