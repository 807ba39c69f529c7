"""Writing an adapter over another: it answers as itself, and nothing is compiled again."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.combine import COMBINES
from veneer.core.model import parameters, spec_of, tensors
from veneer.core.swap import overwrite
from veneer.errors import CheckpointError, StateError

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def net(**specs: LoRA) -> Net:
    model = Net()
    for i, (name, spec) in enumerate(specs.items()):
        veneer.attach(model, spec, name)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in parameters(model, name).values():
                p.normal_(std=0.3)
    return model


def answer(model: nn.Module, name: str) -> Tensor:
    veneer.activate(model, name)
    return model(X).detach()


def lora(rank: int, alpha: float, targets: tuple[str, ...] = ("one", "two"), **fields: object) -> LoRA:
    return LoRA(rank=rank, alpha=alpha, targets=targets, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("rank, alpha, scaling", [(4, 8, "lora"), (4, 4, "rslora"), (2, 7, "lora"), (1, 1, "lora")])
def test_an_adapter_in_the_place_of_another_answers_as_itself(
    combine: str, rank: int, alpha: float, scaling: str
) -> None:
    model = net(room=lora(4, 8, combine=combine), new=lora(rank, alpha, combine=combine, scaling=scaling))
    kept = dict(parameters(model, "room"))
    wanted = answer(model, "new")
    overwrite(model, "room", spec_of(model, "new"), tensors(model, "new"))
    got = answer(model, "room")
    assert torch.equal(got, wanted) if (rank, alpha) == (4, 8) else torch.allclose(got, wanted, atol=1e-5)
    assert all(p is kept[k] for k, p in parameters(model, "room").items())


def test_layers_that_the_new_one_leaves_alone_are_left_alone() -> None:
    model = net(room=lora(4, 8), new=lora(2, 2, ("two",)))
    wanted = answer(model, "new")
    overwrite(model, "room", spec_of(model, "new"), tensors(model, "new"))
    torch.testing.assert_close(answer(model, "room"), wanted)


def test_what_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    rooms = {
        "larger rank": (lora(2, 2), lora(4, 4), r"\(4, 12\), and there is room for \(2, 12\)"),
        "another layer": (lora(4, 4, ("two",)), lora(4, 4), "one: there is no room for its 'A'"),
        "another kind": (lora(4, 4), lora(4, 4, delta="loha"), "delta is 'loha'"),
        "another combine": (lora(4, 4, combine="dora"), lora(4, 4), "combine is 'add'"),
        "another scale": (lora(2, 4, delta="loha"), lora(2, 2, delta="loha"), "its scale is 0.5 times"),
    }
    for name, (room, new, said) in rooms.items():
        model = net(room=room, new=new)
        before = copy.deepcopy(tensors(model, "room"))
        with pytest.raises(CheckpointError, match=said):
            overwrite(model, "room", spec_of(model, "new"), tensors(model, "new"))
        assert all(torch.equal(before[k], v) for k, v in tensors(model, "room").items()), name
    model = net(room=lora(4, 4), new=lora(4, 4))
    wide = {key: value.double() for key, value in tensors(model, "new").items()}
    with pytest.raises(CheckpointError, match="would be rounded"):
        overwrite(model, "room", spec_of(model, "new"), wide)
    veneer.merge(model, "room")
    with pytest.raises(StateError, match="merged"):
        overwrite(model, "room", spec_of(model, "new"), tensors(model, "new"))


def test_swap_reads_a_folder(tmp_path: Path) -> None:
    source = net(default=lora(2, 6))
    wanted = answer(source, "default")
    veneer.save(source, tmp_path)
    model = net(default=lora(4, 4))
    veneer.swap(model, tmp_path)
    torch.testing.assert_close(model(X).detach(), wanted)
    veneer.save(net(default=lora(2, 6, bias="lora_only")), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be written over"):
        veneer.swap(model, tmp_path)


COMPILED = """
import tempfile, torch, veneer
from torch import nn
from torch._dynamo.utils import counters
from veneer import LoRA, Pool
from veneer.core.model import parameters

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

def graphs():
    return counters["stats"]["unique_graphs"]

x, names, plain = torch.randn(6, 3, 8), [f"a{i}" for i in range(12)], net()
room = LoRA(rank=4, alpha=4, targets=["0", "2"], combine="COMBINE")
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    for i, name in enumerate(names):
        spec = LoRA(rank=1 + i % 4, alpha=3.0, targets=["0", "2"], combine="COMBINE", scaling=("lora", "rslora")[i % 2])
        veneer.attach(plain, spec, name)
        for p in parameters(plain, name).values():
            nn.init.normal_(p, std=0.3)
        veneer.save(plain, folder, name)
    model = net()
    veneer.attach(model, room, "default")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    before = graphs()
    for name in names:
        veneer.swap(model, f"{folder}/{name}")
        veneer.activate(plain, name)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert graphs() == before == 1, (graphs(), before)
    veneer.detach(model)

    pool = Pool(model, capacity=5, room=room)
    for name in names:
        pool.add(name, folder)
    with pool.routed([None] * 6):
        compiled(x)
    before, dice = graphs(), torch.Generator().manual_seed(0)
    for _ in range(10):
        some = [names[i] for i in torch.randperm(12, generator=dice)[:4]]
        rows = [some[0], None, {some[1]: 0.5, some[2]: -1.0}, some[3], some[0], some[1]]
        pool.prefetch(*some)
        with pool.routed(rows), veneer.routed(plain, rows):
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)
    assert graphs() == before and not counters["graph_break"], (graphs(), before)
print("no recompilation")
"""


@pytest.mark.parametrize("combine", ["add", "dora"])
def test_swaps_and_routings_compile_nothing_again(combine: str) -> None:
    script = COMPILED.replace("COMBINE", combine)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "no recompilation", done.stderr[-2000:]
