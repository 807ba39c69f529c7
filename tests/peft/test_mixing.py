"""Mixing methods on dW against PEFT's own functions for dense tensors, where the two mean the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.core.mixing import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0")
merge_utils = pytest.importorskip("peft.utils.merge_utils")
WEIGHTS = [0.7, 1.6, 0.2]


def changes() -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    return [torch.randn(20, 30, generator=dice) for _ in WEIGHTS]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_ties_is_pefts(density: float, sign: str) -> None:
    """But for even elections by frequency, which PEFT gives to the positive side and we to the larger one."""
    wanted = merge_utils.ties(changes(), torch.tensor(WEIGHTS), density, sign)
    got = METHODS["ties"](changes(), WEIGHTS, density, sign)  # type: ignore[misc]
    trimmed = torch.stack([merge_utils.prune(d, density, "magnitude") for d in changes()])
    clear = trimmed.sign().sum(0) != 0
    assert clear.float().mean() > 0.4
    torch.testing.assert_close(got[clear], wanted[clear])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_magnitude_prune_is_pefts(density: float) -> None:
    wanted = merge_utils.magnitude_prune(changes(), torch.tensor(WEIGHTS), density)
    torch.testing.assert_close(METHODS["magnitude_prune"](changes(), WEIGHTS, density, "total"), wanted)  # type: ignore[misc]


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_without_dropping_is_pefts(method: str) -> None:
    more = ("total",) if method == "dare_ties" else ()
    wanted = getattr(merge_utils, method)(changes(), torch.tensor(WEIGHTS), 1.0, *more)
    torch.testing.assert_close(METHODS[method](changes(), WEIGHTS, 1.0, "total"), wanted)  # type: ignore[misc]
