"""AdaLoRA under PEFT's names: update_and_allocate(step), and a loss that keeps the directions apart.

    loss.backward(); optimizer.step()
    model.update_and_allocate(step)       # or model.base_model.update_and_allocate(step)
    optimizer.zero_grad()

`veneer.core.allocate` does the work. PEFT adds the penalty to the loss that the model returns, as the mean over all A
and B of |A A^T - I| (not squared, as the paper's eq. 4 has it); a script written for PEFT gets the loss that it knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.core.allocate import RankAllocator
from veneer.core.deltas.adalora import AdaLora
from veneer.core.model import adapter_of, sites
from veneer.errors import StateError
from veneer.peft.config import AdaLoraConfig
from veneer.peft.held import is_trained

__all__ = ["penalised", "trained_adapter", "update_and_allocate"]


def trained_adapter(model: Any) -> str | None:
    """The AdaLoRA adapter that is being trained: one that is active and takes gradients."""
    for name in model.active_adapters:
        if isinstance(model.peft_config.get(name), AdaLoraConfig) and is_trained(model, name):
            return name
    return None


def update_and_allocate(model: Any, global_step: int) -> None:
    """Score the directions by the gradients that are there, and zero those that lost their place."""
    name = trained_adapter(model)
    if name is None:
        raise StateError(
            "no AdaLoRA adapter is active and trained", fix="get_peft_model(model, AdaLoraConfig(total_step=...))"
        )
    config, held = model.peft_config[name], vars(model).setdefault("_allocators", {})
    if name not in held:
        held[name] = _allocator(model, name, config)
    if global_step < config.total_step - config.tfinal:
        held[name].observe()
    if held[name].allocate(global_step) is not None:
        deltas = held[name].deltas
        config.rank_pattern = {f"{site}.lora_E": d.E[:, 0].ne(0).tolist() for site, d in deltas.items()}


def _allocator(model: Any, name: str, config: AdaLoraConfig) -> RankAllocator:
    return RankAllocator(
        model,
        name,
        target_rank=config.target_r,
        total_steps=config.total_step or 0,
        warmup=config.tinit,
        final=config.tfinal,
        every=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
        orthogonality=config.orth_reg_weight,
    )


def penalised(model: Any, output: Any) -> Any:
    """The model's output, with the penalty in its loss where an AdaLoRA adapter is trained."""
    loss = getattr(output, "loss", None)
    name = trained_adapter(model) if isinstance(loss, Tensor) else None
    if name is not None:
        output.loss = loss + model.peft_config[name].orth_reg_weight * _apart(model, name)
    return output


def _apart(model: Any, name: str) -> Tensor:
    """The mean of |A A^T - I| and |B^T B - I| over all layers."""
    deltas = [adapter_of(layer, name).delta for layer in sites(model, name).values()]
    terms = []
    for delta in deltas:
        if isinstance(delta, AdaLora):
            eye = torch.eye(delta.rank, dtype=delta.A.dtype, device=delta.A.device)
            terms += [(delta.A @ delta.A.T - eye).norm(), (delta.B.T @ delta.B - eye).norm()]
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()
