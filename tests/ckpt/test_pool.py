"""Many adapters on few places: answers are those of each adapter alone, bit for bit, wherever it waited."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ckpt_nets import spread
from torch import Tensor, nn

import veneer
from veneer import LoRA, Pool
from veneer.ckpt.hub import WEIGHTS
from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.model import active_of, is_merged, parameters, tensors
from veneer.errors import CheckpointError, ConfigError, StateError

TARGETS = ["one", "two"]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))


def inputs(rows: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(3)).to(dtype)


def saved(folder: Path, names: str | list[str], dtype: torch.dtype = torch.float32, **fields: Any) -> dict[str, Tensor]:
    """Adapters of different ranks in folders of their names; what each answers."""
    net, wanted = Net(dtype), {}
    for i, name in enumerate(names):
        own = {"rank": 1 + i % 4, "alpha": 2.0 * (1 + i % 4), "targets": TARGETS}
        veneer.attach(net, LoRA(**(own | fields)), name)
        spread(list(parameters(net, name).values()), seed=i)
        with torch.no_grad():
            wanted[name] = net(inputs(dtype=dtype))
        veneer.save(net, folder, name)
        veneer.detach(net, name)
    return wanted


def answers(pool: Pool, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    with pool.active(name) as model, torch.no_grad():
        return model(inputs(dtype=dtype))


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("hold", ["disk", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_disk_device_is_bit_for_bit_the_same(
    tmp_path: Path, combine: str, hold: Any, dtype: torch.dtype
) -> None:
    wanted = saved(tmp_path, "abcde", dtype, combine=combine, modules_to_save=["out"])
    pool = Pool(Net(dtype), capacity=2)
    for name in wanted:
        pool.add(name, tmp_path, hold=hold)
    for name in "abcdeedcbaace":
        assert torch.equal(answers(pool, name, dtype), wanted[name])
        assert len(pool.resident) <= 2 and pool.resident[-1] == name


@pytest.mark.parametrize("delta, combine", [*itertools.product(DELTAS, COMBINES)])
def test_device_memory_device_is_bit_for_bit_the_same_for_every_kind(delta: str, combine: str) -> None:
    options = {"tokens": {"rows": [1, 3]}, "fused": {"parts": [(0, 4), (6, 10)]}}.get(delta, {})
    net, wanted = Net(), {}
    for i, name in enumerate("abc"):
        spec = LoRA(rank=2 + 2 * i, alpha=3, targets=TARGETS, delta=delta, combine=combine, options=options, bias="all")
        veneer.attach(net, spec, name)
        spread(list(parameters(net, name).values()), seed=i)
        wanted[name] = net(inputs()).detach()
    veneer.activate(net, None)
    pool = Pool(net, capacity=1)
    for name in wanted:
        pool.add(name, hold="cpu")
    assert veneer.adapters(net) == () and type(net.one) is nn.Linear
    for name in "abcacb":
        assert torch.equal(answers(pool, name), wanted[name])


@pytest.mark.parametrize("room", [None, LoRA(rank=4, alpha=4, targets=TARGETS)], ids=["as itself", "room"])
def test_a_routed_batch_through_the_pool_equals_each_adapter_alone(tmp_path: Path, room: LoRA | None) -> None:
    names = list("abcdefgh")
    wanted = saved(tmp_path, names)
    with torch.no_grad():
        base = Net()(inputs())
    with Pool(Net(), capacity=4, room=room) as pool:
        for name in names:
            pool.add(name, tmp_path)
        dice = torch.Generator().manual_seed(0)
        for _ in range(12):
            rows = [[*names, None][i] for i in torch.randint(0, 9, (6,), generator=dice).tolist()]
            rows = [row if row in [*dict.fromkeys(r for r in rows if r)][:4] else None for row in rows]
            pool.prefetch(*(row for row in rows if row))
            with pool.routed(rows) as model, torch.no_grad():
                got = model(inputs())
            alone = torch.stack([base[i] if row is None else wanted[row][i] for i, row in enumerate(rows)])
            torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-6)


def test_rows_and_models_may_be_weighted_sums(tmp_path: Path) -> None:
    saved(tmp_path, "ab")
    plain, pool = Net(), Pool(Net(), room=LoRA(rank=4, alpha=4, targets=TARGETS))
    for name in "ab":
        veneer.load(plain, tmp_path, name)
        pool.add(name, tmp_path)
    mix = {"a": 0.7, "b": -0.3}
    veneer.activate(plain, mix)
    with torch.no_grad():
        wanted = plain(inputs())
        with pool.active(mix) as model:
            torch.testing.assert_close(model(inputs()), wanted)
        with pool.routed([mix] * 6) as model:
            torch.testing.assert_close(model(inputs()), wanted)
        with pool.active(None) as model:
            assert torch.equal(model(inputs()), Net()(inputs()))


def test_a_place_forgets_who_was_in_it(tmp_path: Path) -> None:
    """A wide adapter on two layers, then a narrow one on one layer, in the same place."""
    wanted = saved(tmp_path, ["wide"], rank=4, alpha=8) | saved(tmp_path, ["thin"], rank=1, alpha=1, targets=["two"])
    pool = Pool(Net(), capacity=1, room=LoRA(rank=4, alpha=4, targets=TARGETS))
    for name in wanted:
        pool.add(name, tmp_path)
    for name in ("wide", "thin", "wide"):
        torch.testing.assert_close(answers(pool, name), wanted[name], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- hundreds


def calls(work: Callable[[], object]) -> int:
    """Functions of Python that `work` calls: a clock that a busy machine does not move."""
    count = 0

    def tick(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(tick)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_two_hundred_on_the_model_cost_what_their_files_say_and_no_more_each(tmp_path: Path) -> None:
    saved(tmp_path, ["a"], rank=4)
    net, loads, switches = Net(), [], []
    for i in range(210):
        loads.append(calls(lambda i=i: veneer.load(net, tmp_path / "a", f"a{i}")))
        switches.append(calls(lambda: veneer.activate(net, "a0")))
    assert loads[-1] <= 1.01 * loads[5] and switches[-1] <= switches[5]
    each = 4 * sum(p.numel() for p in parameters(net, "a0").values())
    own = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for n in range(210)
        for t in tensors(net, f"a{n}").values()
    }
    assert sum(own.values()) == 210 * each


def test_hundreds_in_a_pool_hold_the_memory_of_a_few(tmp_path: Path) -> None:
    saved(tmp_path, ["a"], rank=4)
    net = Net()
    size = 4 * 4 * (12 + 16 + 16 + 12)
    pool = Pool(net, capacity=100, capacity_bytes=5 * size)
    adds = [calls(lambda i=i: pool.add(f"a{i}", tmp_path / "a")) for i in range(300)]
    assert adds[-1] <= 1.01 * adds[5] and len(pool) == 300 and pool.resident == ()
    visits = []
    for i in range(300):
        visits.append(calls(lambda i=i: answers(pool, f"a{i}")))
        assert pool.resident_bytes <= 5 * size
    assert pool.resident == tuple(f"a{i}" for i in range(295, 300))
    assert max(visits[-20:]) <= 1.2 * max(visits[6:30])
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in Net().parameters()) + 5 * size // 4


# ---------------------------------------------------------------- who goes, who stays


def test_the_longest_unused_goes_and_whoever_is_in_use_stays(tmp_path: Path) -> None:
    saved(tmp_path, "abcd")
    pool = Pool(Net(), capacity=2)
    for name in "abcd":
        pool.add(name, tmp_path)
    with pool.active("a"):
        for name in "bcd":
            answers(pool, name)
            assert pool.resident == ("a", name)
        with pool.active("b"), pytest.raises(StateError, match=r"3 adapters .* would be in use"), pool.active("c"):
            pass
        with pytest.raises(StateError, match="in use"):
            pool.remove("a")
        with pytest.raises(StateError, match="in use"):
            pool.close()
    answers(pool, "c")
    assert "a" not in pool.resident
    with pytest.raises(StateError, match="3 adapters"), pool.routed(["a", "b", "c"]):
        pass


def test_what_was_active_before_is_active_after(tmp_path: Path) -> None:
    saved(tmp_path, "abc")
    net = Net()
    veneer.attach(net, LoRA(rank=2, alpha=2, targets=TARGETS), "own")
    pool = Pool(net, capacity=1)
    for name in "abc":
        pool.add(name, tmp_path)
    veneer.activate(net, {"own": 0.5})
    before = active_of(net)
    with pool.active("a"):
        assert active_of(net).names == ("a",)
    answers(pool, "b")
    assert active_of(net) is before and before.names == ("own",) and float(before.mix) == 0.5  # type: ignore[arg-type]
    pool.close()
    assert veneer.adapters(net) == ("own",)


def test_prefetched_adapters_wait_and_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = saved(tmp_path, "abcde")
    pool = Pool(Net(), capacity=2)
    for name in "abcde":
        pool.add(name, tmp_path)
    read: list[str] = []
    stage = Pool._stage
    monkeypatch.setattr(Pool, "_stage", lambda self, name, *rest: read.append(name) or stage(self, name, *rest))
    pool.prefetch("a", "b", "c", "d")
    assert len(pool._coming) == 2, "no more are read ahead than there are places"
    for name in "abcd":
        assert torch.equal(answers(pool, name), wanted[name])
    assert read == list("abcd")
    pool.prefetch("e", "a")
    pool.cancel("e", "a")
    assert not pool._coming and not pool._queue
    assert torch.equal(answers(pool, "e"), wanted["e"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("room", [None, LoRA(rank=4, alpha=4, targets=TARGETS)], ids=["as itself", "room"])
@pytest.mark.parametrize("hold", ["disk", "cpu", "pinned"])
def test_on_a_gpu_copies_run_beside_the_model_and_answers_are_the_same(
    tmp_path: Path, hold: str, room: LoRA | None
) -> None:
    names, net, plain, x = list("abcdef"), Net().cuda(), Net().cuda(), inputs().cuda()
    saved(tmp_path, names)
    pool = Pool(net, capacity=2, room=room)
    for name in names:
        veneer.load(plain, tmp_path, name)
        pool.add(name, tmp_path, hold=hold)
    for name in "abcdefbdfaceab":
        pool.prefetch(*names)
        veneer.activate(plain, name)
        with pool.active(name) as model, torch.no_grad():
            got, wanted = model(x), plain(x)
        assert torch.equal(got, wanted) if room is None else torch.allclose(got, wanted, atol=1e-5)
        pool.cancel(*names)
    held = pool._held["a"].kept if hold != "disk" else None  # type: ignore[union-attr]
    assert held is None or all(v.is_pinned() == (hold == "pinned") for v in held.values.values())


# ---------------------------------------------------------------- what goes wrong


def test_what_is_wrong_with_a_file_is_said_when_it_is_added(tmp_path: Path) -> None:
    saved(tmp_path, "a")
    saved(tmp_path, ["dora"], combine="dora")
    saved(tmp_path, ["biased"], bias="lora_only")
    saved(tmp_path, ["broad"], rank=8)
    pool = Pool(Net(), room=LoRA(rank=4, alpha=4, targets=TARGETS))
    for name, said in {
        "dora": "combine is 'dora'",
        "biased": "a bias",
        "broad": r"\(8, 12\)",
        "none": "no adapter",
    }.items():
        with pytest.raises(CheckpointError, match=said):
            pool.add(name, tmp_path)
    pool.add("a", tmp_path)
    with pytest.raises(StateError, match="holds an adapter"):
        pool.add("a", tmp_path)
    with pytest.raises(StateError, match=r"no adapter named 'aa'. Did you mean 'a'"), pool.active("aa"):
        pass
    with pytest.raises(ConfigError, match="Did you mean 'disk'"):
        pool.add("b", tmp_path, hold="disc")
    with pytest.raises(ConfigError, match="GPU"):
        pool.add("b", tmp_path, hold="pinned")
    with pytest.raises(ConfigError, match="has no file"):
        pool.add("b")
    with pytest.raises(ConfigError, match="alone takes"):
        Pool(Net(), capacity_bytes=10).add("a", tmp_path)
    with pytest.raises(ConfigError, match="a place of this room"):
        Pool(Net(), capacity_bytes=10, room=LoRA(rank=4, targets=TARGETS))
    with pytest.raises(ConfigError, match="plain LoRAs"):
        Pool(Net(), room=LoRA(rank=4, targets=TARGETS, delta="loha"))


def test_a_failure_while_reading_is_raised_where_the_adapter_is_used(tmp_path: Path) -> None:
    wanted = saved(tmp_path, "ab")
    pool = Pool(Net(), capacity=1)
    for name in "ab":
        pool.add(name, tmp_path)
    answers(pool, "b")
    path = tmp_path / "a" / WEIGHTS
    whole = path.read_bytes()
    for broken in (None, whole[:-8], whole[: -4 * 4] + b"\xff\xff\xff\x7f" * 4):  # gone, cut short, NaN
        path.unlink()
        if broken is not None:
            path.write_bytes(broken)
        pool.prefetch("a")
        with pytest.raises(CheckpointError):
            answers(pool, "a")
        assert pool.resident == ("b",) and torch.equal(answers(pool, "b"), wanted["b"])
        path.write_bytes(whole)
    assert torch.equal(answers(pool, "a"), wanted["a"])


def test_a_merged_model_takes_no_visitors(tmp_path: Path) -> None:
    saved(tmp_path, "a")
    net = Net()
    pool = Pool(net)
    pool.add("a", tmp_path)
    with pool.active("a"):
        veneer.merge(net, "a")
    assert is_merged(net)
    with pytest.raises(StateError, match="merged"), pool.active("a"):
        pass
