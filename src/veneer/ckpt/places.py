"""Keys that name a module and mean something inside it, or something that is tied to it.

    in the file                                             here
    experts.lora_A, experts.base_layer.lora_A               parameters of `experts`, the first nested deepest
    attn.lora_A, attn.base_layer.out_proj.lora_A            attn.in_proj_weight, attn.out_proj (nn.MultiheadAttention)
    lm_head.lora_A beside embed_tokens.lora_embedding_A     nothing, if it is the embedding's change turned over

Each function gives the file's contents their names here, in place. Why out_proj counts double says layout.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from veneer.ckpt.layout import NESTED
from veneer.ckpt.names import Found
from veneer.core.leaf import Leaf, leaves_of
from veneer.core.op import op_for
from veneer.core.spec import LoRA

__all__ = ["drop_mirrors", "leaf_at", "name_parameters", "name_projections", "projection_overrides"]

Modules = Mapping[str, nn.Module]
Rule = Callable[[str], bool]


def name_projections(modules: Modules, found: Found, is_target: Rule) -> dict[str, str]:
    """An nn.MultiheadAttention that is a target: its projections by name, and the attention that each belongs to."""
    attentions = {}
    for key in list(found.adapted):
        outer = key.removesuffix(f"{NESTED}.out_proj")
        if isinstance(modules.get(outer), nn.MultiheadAttention) and is_target(outer):
            site = f"{outer}.out_proj" if outer != key else f"{outer}.in_proj_weight"
            attentions[site] = outer
            found.adapted[site] = found.adapted.pop(key)
    return attentions


def projection_overrides(spec: LoRA, attentions: Mapping[str, str]) -> dict[str, dict[str, object]]:
    """What is said of an attention holds for its projections; of out_proj's change PEFT takes the double."""
    own = {site: spec.at(attention) for site, attention in attentions.items()}
    return {
        "^" + re.escape(site): {"rank": at.rank, "alpha": at.alpha * (2 if site.endswith(".out_proj") else 1)}
        for site, at in own.items()
    }


def name_parameters(modules: Modules, found: Found, is_target: Rule) -> None:
    """Adapters of bare parameters bear the name of the module that holds them; give each its parameter's name."""
    for key in list(found.adapted):
        owner = key.removesuffix(NESTED * key.count(NESTED))
        module = modules.get(owner)
        if module is None or op_for(type(module)) is not None:
            continue
        names = [p for p in module._parameters if is_target(f"{owner}.{p}")]
        place = len(names) - 1 - key.count(NESTED)
        if place >= 0:
            found.adapted[f"{owner}.{names[place]}"] = found.adapted.pop(key)


def leaf_at(modules: Modules, site: str) -> Leaf | None:
    """The place for adapters that a parameter of this name is, if there is one."""
    owner, _, parameter = site.rpartition(".")
    module = modules.get(owner)
    if module is None or module._parameters.get(parameter) is None:
        return None
    return leaves_of(module).get(parameter) or Leaf(module, parameter)


def drop_mirrors(modules: Modules, found: Found, wanted: Collection[str]) -> None:
    """With ensure_weight_tying one change is in the file twice: for the target, and for what shares its weight."""
    weights = {name: module._parameters.get("weight") for name, module in modules.items()}
    owners = {id(weights[site]): site for site in wanted if weights.get(site) is not None}
    for site in [s for s in found.adapted if s not in wanted and weights.get(s) is not None]:
        source = owners.get(id(weights[site]))
        if source in found.adapted and _is_mirror(_pair(found, site), _pair(found, source)):
            del found.adapted[site]
            found.base.pop(f"{site}.weight", None)


def _pair(found: Found, site: str) -> tuple[Tensor, Tensor]:
    return found.adapted[site]["A"].load(), found.adapted[site]["B"].load()


def _is_mirror(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    (a, b), (a0, b0) = one, other
    turned = a.shape == b0.mT.shape and torch.equal(a, b0.mT) and torch.equal(b, a0.mT)
    return turned or (a.shape == a0.shape and torch.equal(a, a0) and torch.equal(b, b0))
