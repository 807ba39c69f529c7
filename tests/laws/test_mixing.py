"""Laws of mixing: one adapter with weight 1 is itself under every method; sums are sums of dW; cuts are optimal."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.combine import COMBINES
from veneer.core.delta import DELTAS
from veneer.core.mixing import METHODS, combine, convert, cut, extract, resize
from veneer.core.model import adapter_of, parameters, sites
from veneer.core.op import op_of
from veneer.core.weight import read_weight
from veneer.errors import ConfigError, StateError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.out = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.two(torch.tanh(self.one(x)))))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def spread(model: nn.Module, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in parameters(model, name).values():
            p.normal_(std=0.3)


def pair(**fields: object) -> Net:
    net = Net()
    for i, name in enumerate(("a", "b")):
        own = {"rank": 2 + 2 * i, "alpha": 3.0, "targets": ["one", "two"], "bias": "all", "modules_to_save": ["out"]}
        veneer.attach(net, LoRA(**(own | fields)), name)
        spread(net, name, i)
    return net


def change(net: Net, site: str, name: str) -> Tensor:
    layer = sites(net, name)[site]
    w = op_of(layer).to_matrix(layer, read_weight(layer))
    return (adapter_of(layer, name).weight(w) - w).detach()


def output(net: Net, mix: object) -> Tensor:
    veneer.activate(net, mix)
    return net(X).detach()


OPTIONS: dict[str, dict[str, object]] = {"tokens": {"rows": [1, 3]}, "fused": {"parts": [(0, 4), (6, 10)]}}
KINDS = [(d, c) for d, c in itertools.product(DELTAS, COMBINES)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta,dora", KINDS)
def test_one_adapter_with_weight_one_is_itself(method: str, delta: str, dora: str) -> None:
    options = OPTIONS.get(delta, {})
    net = pair(delta=delta, combine=dora, options=options)
    combine(net, {"b": 1.0}, "c", method, density=1.0, rank=12)
    torch.testing.assert_close(output(net, "c"), output(net, "b"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_cat_is_the_exact_sum(scaling: str) -> None:
    net = pair(scaling=scaling)
    report = combine(net, {"a": 0.7, "b": -0.4}, "ab", "cat")
    assert set(report.ranks.values()) == {6} and max(report.errors.values()) == 0
    torch.testing.assert_close(output(net, "ab"), output(net, {"a": 0.7, "b": -0.4}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", COMBINES)
@pytest.mark.parametrize("rank", [1, 3, 5, 12])
def test_svd_is_the_best_of_its_rank_and_says_its_error(dora: str, rank: int) -> None:
    net = pair(combine=dora)
    report = combine(net, {"a": 1.0, "b": 0.5}, "ab", "svd", rank=rank)
    for site in ("one", "two"):
        wanted = change(net, site, "a") + 0.5 * change(net, site, "b")
        got = change(net, site, "ab")
        s = torch.linalg.svdvals(wanted)
        best = float(s[rank:].norm() / s.norm())
        assert float((got - wanted).norm() / wanted.norm()) == pytest.approx(best, abs=1e-4)
        assert report.errors[site] == pytest.approx(best, abs=1e-4)


def test_negation_takes_back_what_an_adapter_does() -> None:
    net = pair(bias="none", modules_to_save=())
    combine(net, {"a": -1.0}, "minus", "cat")
    with veneer.disabled(net):
        base = net(X)
    torch.testing.assert_close(output(net, ["a", "minus"]), base, rtol=1e-4, atol=1e-5)


def test_ties_follows_its_definition() -> None:
    """Entry by entry against the paper's three steps written as loops."""
    net = pair()
    for sign, density in itertools.product(("total", "frequency"), (0.3, 1.0)):
        name = f"t{sign}{density:.0f}"
        combine(net, {"a": 1.0, "b": 2.0}, name, "ties", density=density, sign=sign, rank=12)
        parts = [change(net, "one", "a"), change(net, "one", "b")]
        trimmed = []
        for d in parts:
            keep = d.abs().flatten().topk(round(density * d.numel())).indices
            mask = torch.zeros(d.numel()).index_fill_(0, keep, 1).view_as(d)
            trimmed.append(d * mask)
        wanted = torch.zeros_like(parts[0])
        for i, j in itertools.product(range(wanted.shape[0]), range(wanted.shape[1])):
            values = [float(t[i, j]) for t in trimmed]
            votes = values if sign == "total" else [(v > 0) - (v < 0) for v in values]
            votes = votes if sum(votes) else values  # an even election goes by the total
            elected = (sum(votes) > 0) - (sum(votes) < 0)
            agreeing = [w * v for v, w in zip(values, (1.0, 2.0), strict=True) if v and (v > 0) - (v < 0) == elected]
            wanted[i, j] = sum(agreeing) / max(len(agreeing), 1)
        torch.testing.assert_close(change(net, "one", name), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_a_negated_adapter_votes_with_its_sign_turned(method: str, sign: str) -> None:
    """{a: 1, b: -1} is {a: 1, minus_b: 1} under every election."""
    net = pair(bias="none", modules_to_save=())
    combine(net, {"b": -1.0}, "minus_b", "cat")
    combine(net, {"a": 1.0, "b": -1.0}, "one", method, density=0.6, sign=sign, rank=12)
    combine(net, {"a": 1.0, "minus_b": 1.0}, "two", method, density=0.6, sign=sign, rank=12)
    torch.testing.assert_close(change(net, "one", "one"), change(net, "one", "two"), rtol=1e-3, atol=1e-4)


def test_task_arithmetic_moves_along_the_difference_of_two() -> None:
    """base + (b - a), the analogy of arXiv:2212.04089: exact with cat, best of its rank with svd."""
    net = pair(bias="none", modules_to_save=())
    combine(net, {"b": 1.0, "a": -1.0}, "moved", "cat")
    torch.testing.assert_close(output(net, "moved"), output(net, {"b": 1.0, "a": -1.0}), rtol=1e-4, atol=1e-5)
    report = combine(net, {"b": 1.0, "a": -1.0}, "cut", "svd", rank=6)
    assert max(report.errors.values()) < 1e-5


def test_mixing_draws_from_no_generator_of_the_caller() -> None:
    net = pair()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    combine(net, {"a": 1.0}, "d", "dare_linear", density=0.5)
    assert torch.equal(torch.rand(3), wanted)


def test_dare_keeps_the_expectation_and_repeats_by_seed() -> None:
    net = pair()
    combine(net, {"a": 1.0}, "d1", "dare_linear", density=0.5, rank=12, seed=1)
    combine(net, {"a": 1.0}, "d2", "dare_linear", density=0.5, rank=12, seed=1)
    assert torch.equal(change(net, "one", "d1"), change(net, "one", "d2"))
    got, full = change(net, "one", "d1"), change(net, "one", "a")
    kept = got.abs() > 1e-5
    assert 0.3 < float(kept.float().mean()) < 0.7
    torch.testing.assert_close(got[kept], 2 * full[kept], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("dora", COMBINES)
def test_any_kind_converts_to_a_plain_lora_with_its_error(delta: str, dora: str) -> None:
    net = pair(delta=delta, combine=dora, options=OPTIONS.get(delta, {}))
    convert(net, "b", "plain")
    assert adapter_of(net.one, "plain").delta.__class__.__name__ == "Lora"
    torch.testing.assert_close(output(net, "plain"), output(net, "b"), rtol=1e-4, atol=1e-5)
    report = convert(net, "b", "small", rank=1)
    got, wanted = change(net, "one", "small"), change(net, "one", "b")
    assert report.errors["one"] == pytest.approx(float((got - wanted).norm() / wanted.norm()), abs=1e-4)


def test_resize_by_energy_keeps_that_share() -> None:
    net = pair()
    report = resize(net, "b", "small", energy=0.9)
    for site in ("one", "two"):
        wanted, got = change(net, site, "b"), change(net, site, "small")
        assert 1 - float((got - wanted).square().sum() / wanted.square().sum()) >= 0.9
        s = torch.linalg.svdvals(wanted).square()
        assert float(s[: report.ranks[site] - 1].sum() / s.sum()) < 0.9, "a smaller rank would not do"


def test_extract_takes_an_adapter_out_of_two_models() -> None:
    base, tuned = Net(), pair(bias="none", modules_to_save=())
    veneer.activate(tuned, "b")
    y = tuned(X).detach()
    veneer.merge(tuned)
    veneer.detach(tuned)
    report = extract(tuned, base, rank=4)
    assert max(report.errors["one"], report.errors["two"]) < 1e-5 and report.left_out == ()
    torch.testing.assert_close(base(X), y, rtol=1e-4, atol=1e-5)
    other = Net()
    tuned.out.bias.data.add_(1)
    assert extract(tuned, other, rank=None, energy=0.999).left_out == ("out.bias",)


def test_the_factored_cut_equals_the_dense_one() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(9, 40), torch.randn(30, 9)
    (a1, b1), e1 = cut((a, b), 4)
    (a2, b2), e2 = cut(b @ a, 4)
    torch.testing.assert_close(b1 @ a1, b2 @ a2, rtol=1e-4, atol=1e-4)
    assert e1 == pytest.approx(e2, abs=1e-5)


def test_impossible_mixes_are_refused_and_change_nothing() -> None:
    net = pair(combine="dora")
    before = copy.deepcopy(net.state_dict())
    for arguments in (
        ({"a": 1.0, "b": 1.0}, "c", "cat"),  # DoRA's change has full rank
        ({}, "c", "svd"),
        ({"a": float("nan")}, "c", "svd"),
        ({"a": 1.0}, "c", "tise"),
    ):
        with pytest.raises(ConfigError):
            combine(net, *arguments)
    with pytest.raises(ConfigError, match="density"):
        combine(net, {"a": 1.0}, "c", "ties", density=0)
    with pytest.raises(ConfigError, match="rank=0 must be"):
        combine(net, {"a": 1.0}, "c", "svd", rank=0)
    for energy in (0.0, 1.5):
        with pytest.raises(ConfigError, match="share of"):
            resize(net, "a", "c", energy=energy)
    with pytest.raises(StateError, match="no adapter named 'x'"):
        combine(net, {"x": 1.0}, "c")
    with pytest.raises(StateError, match="already"):
        combine(net, {"a": 1.0}, "b", "svd")
    assert net.state_dict().keys() == before.keys() and veneer.adapters(net) == ("a", "b")
    next(iter(parameters(net, "b").values())).data[0] = float("nan")
    with pytest.raises(ConfigError, match="'b' holds NaN"):
        combine(net, {"a": 1.0, "b": 1.0}, "c", "svd")
    with pytest.raises(StateError, match="holds NaN"):
        convert(net, "b", "c")
