"""What rounding the base to NF4 does to a model, apart from what training then makes of it.

    python benchmarks/rounding.py [--steps 30] [--seed 0] [--trained] [--more]

SmolLM2-135M-Instruct and the demo's data, fp32, on a CPU. An adapter is trained on the whole base and then asked on
the base in each rounding: the held-out loss, and how far the answers' distributions are from the whole base's (KL, in
nats a token). Inputs are seen through the whole base. --trained: also an adapter trained on each base, in the same
order from the same start: the demo's loop without its evaluations and proofs. --more: also with blocks half as long,
and with the layers whole that lose most.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

import veneer
from veneer import LoRA
from veneer.app.demo import SETTINGS
from veneer.assets import data_file, model_folder
from veneer.core.model import parameters
from veneer.data.loader import Loader
from veneer.train.prepare import by_length, encode_rows, make_task, read_data
from veneer.train.schedule import rate_factor, warmup_steps
from veneer.train.settings import Reads, resolve


def quiet(*_: Any, **__: Any) -> None: ...


def train(model: nn.Module, task: Any, rows: list[Any], steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    veneer.attach(model, LoRA(rank=SETTINGS["r"], alpha=SETTINGS["alpha"]))
    values, warm = list(parameters(model).values()), warmup_steps(SETTINGS["warmup"], steps)
    optimizer = torch.optim.AdamW(values, weight_decay=0.0)
    model.train()
    for step, drawn in zip(range(steps), Loader(rows, SETTINGS["batch_size"], seed=seed).steps(steps), strict=False):
        for batch in task.batches(drawn.samples, SETTINGS["batch_size"]):
            (task.loss(model, batch) / batch.trained_tokens).backward()
        nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.param_groups[0]["lr"] = SETTINGS["lr"] * rate_factor(step, steps, warm, "cosine")
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def answers(model: nn.Module, task: Any, rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of all tokens wherever one is trained, and those tokens."""
    model.eval()
    found = []
    for batch in task.batches(rows, 8):
        asked = task.asked(batch)
        logits = model(**{key: value for key, value in asked.items() if key != "labels"}).logits[:, :-1]
        wanted = batch.labels[:, 1:]
        found.append((F.log_softmax(logits[wanted != -100], -1), wanted[wanted != -100]))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def prepared() -> tuple[Any, list[Any], list[Any], nn.Module]:
    """The task, the rows for training and those held out, and the whole base."""
    data = {"data": str(data_file("shell", "train")), "val": str(data_file("shell", "val"))}
    settings = Reads(resolve(mapping={**SETTINGS, **data, "model": str(model_folder("smollm2")), "precision": "fp32"}))
    parts = read_data(settings, None, quiet)
    task = make_task(settings, settings.model, None, parts, quiet)
    rows, val = (part.samples for part in encode_rows(task, settings, parts, quiet))
    return task, rows, by_length(val), AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--more", action="store_true")
    args = parser.parse_args()
    task, rows, val, whole = prepared()
    looked = [task.asked(batch) for batch in task.batches(rows[:32], 1)]
    bases = {"fp32": whole, "nf4, plain": copy.deepcopy(whole)}
    veneer.quantize(bases["nf4, plain"], "nf4")
    own: dict[str, dict[str, Any]] = {"nf4": {}}
    if args.more:
        own |= {"nf4, blocks of 32": {"block": 32}, "nf4 but for down_proj": {"exclude": ["down_proj"]}}
    for name, options in own.items():
        bases[name] = copy.deepcopy(whole)
        veneer.quantize(bases[name], "nf4", data=looked, **options)

    whole = copy.deepcopy(whole)
    train(whole, task, rows, args.steps, args.seed)
    learned, first = {name: value.detach() for name, value in parameters(whole).items()}, {}
    for name, base in bases.items():
        veneer.attach(base, LoRA(rank=SETTINGS["r"], alpha=SETTINGS["alpha"]))
        line = name
        for what in ("base", "with the adapter"):
            found, tokens = answers(base, task, val)  # a new adapter changes nothing yet
            loss = -found.gather(1, tokens[:, None]).mean()
            full = first.setdefault(what, found)
            line += f"; {what}: loss {loss:.4f}, KL {(full.exp() * (full - found)).sum(1).mean():.4f}"
            with torch.no_grad():
                for site, value in parameters(base).items():
                    value.copy_(learned[site])
        if args.trained:
            veneer.detach(base)
            train(base, task, rows, args.steps, args.seed)
            found, tokens = answers(base, task, val)
            line += f"; trained on it: loss {-found.gather(1, tokens[:, None]).mean():.4f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
