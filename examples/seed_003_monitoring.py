"""Document 003's monitoring: the norm of the adapter's gradients, and how far its weights have moved.

Its two functions stand below as they are; they find the adapter by "lora" in a parameter's name, which holds here as it
does in PEFT. They were nested in a function that never called them, so a callback calls them after every step.

What they show at the very first step is worth knowing: A does not move. B starts at zero, so the gradient of A, which
runs through B, is zero as well. It is not a fault, and `veneer.check_alive` does not take it for one.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from base import arguments, batches, load, rate, rows, scratch
from torch import nn

import veneer
from veneer.core.model import adapter_of, sites
from veneer.peft import LoraConfig, get_peft_model


# the gradient's norm
def log_gradient_norm(model: nn.Module) -> float:
    total_norm = 0.0
    for name, param in model.named_parameters():
        if param.grad is not None and "lora" in name:
            param_norm = param.grad.data.norm(2)
            total_norm += param_norm.item() ** 2
    total_norm = total_norm ** (1.0 / 2)
    return total_norm


# the change of the LoRA weights
def log_lora_weight_changes(model: nn.Module, initial_weights: dict[str, torch.Tensor]) -> dict[str, float]:
    changes = {}
    for name, param in model.named_parameters():
        if "lora" in name and name in initial_weights:
            change = torch.norm(param.data - initial_weights[name]).item()
            changes[name] = change
    return changes


class Monitor(transformers.TrainerCallback):
    """Calls both: the gradient is there before the optimizer's step, the change after it."""

    def __init__(self, model: nn.Module) -> None:
        self.initial = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}
        self.rows: list[tuple[float, float, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.norm = log_gradient_norm(model)
        if not self.rows:
            veneer.check_alive(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        changes = log_lora_weight_changes(model, self.initial)
        moved = [sum(v**2 for k, v in changes.items() if k.endswith(end)) ** 0.5 for end in (".A", ".B")]
        self.rows.append((self.norm, *moved))


def main() -> None:
    args = arguments(__doc__).parse_args()
    model, tokenizer = load(args.model)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    monitor = Monitor(model)
    data = [{k: v[0] for k, v in b.items()} for b in batches(tokenizer, rows(args.model, 12), size=1)]
    training = transformers.TrainingArguments(
        str(scratch()), max_steps=8, weight_decay=0.0, per_device_train_batch_size=1, learning_rate=rate(args.model),
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=0.0,  # no clipping: the callback comes after it, and would see the limit instead of the norm
    )  # fmt: skip
    transformers.Trainer(model=model, args=training, train_dataset=data, callbacks=[monitor]).train()

    print(f"{'step':>4} {'gradient norm':>14} {'|A - A0|':>10} {'|B - B0|':>10}")
    for step, (norm, a, b) in enumerate(monitor.rows, 1):
        print(f"{step:4} {norm:14.4f} {a:10.4f} {b:10.4f}")
    first = monitor.rows[0]
    assert first[0] > 0 and first[2] > 0
    assert first[1] == 0 and all(row[1] > 0 for row in monitor.rows[1:])

    print("what it amounts to, layer by layer (|dW| from the factors alone, nothing of the layer's size is formed):")
    norms = {name: adapter_of(layer).delta.norm() for name, layer in sites(model).items()}  # type: ignore[union-attr]
    for name, norm in sorted(norms.items(), key=lambda item: -item[1])[:5]:
        print(f"  {name:36} |dW| = {norm:.4f}")
    assert min(norms.values()) > 0


if __name__ == "__main__":
    main()
