"""LoRA-FA: A stays where it starts (arXiv:2308.03303)."""

from __future__ import annotations

from collections.abc import Callable

from veneer.core.delta import DELTAS, Lora
from veneer.core.init import Site, Start

__all__ = ["LoraFA"]


@DELTAS.register("lora_fa")
class LoraFA(Lora):
    """dW = s B A with A frozen: the backward pass needs h = A x, r wide, and not x."""

    @classmethod
    def create(cls, site: Site, init: Callable[[Site], Start], dropout: float) -> LoraFA:
        start = init(site)
        if site.op.looks_up:  # embeddings start with A = 0, and a frozen zero would never learn anything
            start = Start(start.a.normal_(std=site.rank**-0.5), start.b.zero_())
        return cls(start, site.scale, dropout)

    def __init__(self, start: Start, scale: float, dropout: float = 0.0) -> None:
        super().__init__(start, scale, dropout)
        frozen = self.A.detach()
        del self.A
        self.register_buffer("A", frozen)
