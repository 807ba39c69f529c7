"""Every way in which an adapter can silently do nothing, or do harm, and the guard against it.

Each was seen in the wild; each test rebuilds the situation and expects the right result or an error that says what to
do, and that the model is as it was before.
"""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import LoRA
from veneer.core.model import activate, adapter_of, attach, parameters, put, sites, tensors
from veneer.errors import CheckpointError, ConfigError, StateError, TargetError


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Toy(nn.Module):
    """An embedding, two blocks, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.checkpointed = checkpointed
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def spread(model: nn.Module, name: str | None = None) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(model, name).values():
            p.normal_(std=0.3)


def fingerprint(model: nn.Module) -> tuple[object, ...]:
    """Everything a failed call must leave alone."""
    return (
        [(n, type(m)) for n, m in model.named_modules()],
        {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}.keys(),
        [p.requires_grad for p in model.parameters()],
        sorted(vars(model)),
    )


# --- the table ------------------------------------------------------------------------------------------------------


def test_attach_after_sharding_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Toy()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        before = fingerprint(model)
        with pytest.raises(TargetError, match="attach adapters first, then call fully_shard"):
            veneer.attach(model, LoRA(rank=2))
        assert fingerprint(model) == before
    finally:
        torch.distributed.destroy_process_group()


def test_forward_set_on_the_instance_before_attach_is_kept_and_called() -> None:
    model, seen = Toy(), []
    layer = model.layers[0].up_proj
    plain = layer.forward
    layer.forward = lambda x: seen.append(1) or plain(x)  # type: ignore[method-assign]
    veneer.attach(model, LoRA(rank=2))
    y = model(IDS)
    spread(model)
    assert seen and not torch.equal(model(IDS), y)
    model(IDS).sum().backward()
    veneer.check_alive(model)
    veneer.detach(model)
    seen.clear()
    assert torch.equal(model(IDS), y) and seen, "the hook is back where it was"


def test_forward_replaced_after_attach_is_found() -> None:
    model = Toy()
    veneer.attach(model, LoRA(rank=2))
    spread(model)
    layer = model.layers[1].up_proj
    layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    model(IDS).sum().backward()
    with pytest.raises(StateError, match=r"layers\.1\.up_proj \(default\)") as error:
        veneer.check_alive(model)
    assert "attach last" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_is_not_alive(value: float) -> None:
    """A product that overflows on the way back: the loss is finite, and all before it learns nothing that is of use."""
    model = Toy()
    veneer.attach(model, LoRA(rank=2))
    spread(model)
    model.layers[1].up_proj.register_full_backward_hook(lambda module, grads, out: (grads[0] * value,))
    model(IDS).sum().backward()
    with pytest.raises(StateError, match="adapters got a gradient that is NaN or infinite") as error:
        veneer.check_alive(model)
    assert error.value.problems == ["layers.0.up_proj (default)", "layers.0.down_proj (default)"]
    assert "layers.0.down_proj" in str(error.value.fix) and "fp16" in str(error.value.fix)
    assert "got no gradient" not in str(error.value)
    veneer.check_alive(model, finite=False)  # a scaler of gradients sees to it
    silenced = model.layers[1].down_proj
    silenced.forward = lambda x: nn.functional.linear(x, silenced.weight, silenced.bias)  # type: ignore[method-assign]
    model.zero_grad()
    model(IDS).sum().backward()
    with pytest.raises(StateError, match="1 adapters got no gradient, 2 one that is NaN or infinite"):
        veneer.check_alive(model)


def test_a_weight_that_is_read_and_not_called_is_found() -> None:
    class Reader(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.lm_head(x + torch.tanh(x @ self.layers[0].up_proj.weight.T)[..., :8])

    model = Reader()
    veneer.attach(model, LoRA(rank=2, targets=["up_proj"], layers=[0]))
    model.requires_grad_(True)
    model(IDS).sum().backward()
    with pytest.raises(StateError, match="reads the weight directly"):
        veneer.check_alive(model)


def test_out_proj_of_multihead_attention_is_adapted_where_it_is_read() -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    y0 = mha.requires_grad_(False)(x, x, x)[0]  # frozen first: torch takes another kernel for weights that learn
    veneer.attach(mha, LoRA(rank=2, targets=["out_proj"]))
    assert torch.equal(mha(x, x, x)[0], y0)
    spread(mha)
    y = mha(x, x, x)[0]
    y.sum().backward()
    veneer.check_alive(mha)
    assert not torch.allclose(y, y0)
    veneer.merge(mha)
    torch.testing.assert_close(mha(x, x, x)[0], y)
    veneer.unmerge(mha)
    veneer.detach(mha)
    assert torch.equal(mha(x, x, x)[0], y0)


def test_merging_a_tied_weight_is_refused_and_untying_is_right() -> None:
    model = Toy(tied=True)
    veneer.attach(model, LoRA(rank=2, targets=["embed", "lm_head"]))
    spread(model)
    y = model(IDS)
    with pytest.raises(StateError, match="tied") as error:
        veneer.merge(model)
    assert "embed.weight is also lm_head.weight" in str(error.value) and "untie=True" in str(error.value)
    assert torch.equal(model(IDS), y)
    veneer.merge(model, untie=True)
    torch.testing.assert_close(model(IDS), y)


def test_merging_one_side_of_a_tie_is_refused() -> None:
    model = Toy(tied=True)
    veneer.attach(model, LoRA(rank=2, targets=["lm_head"], tied="apart"))
    with pytest.raises(StateError, match=r"lm_head.weight is also embed.weight"):
        veneer.merge(model)


def test_a_read_mode_weight_is_raw_while_sharded() -> None:
    """fully_shard looks parameters up by name; it must see what is stored, not W + dW."""
    mha = nn.MultiheadAttention(8, 2)
    veneer.attach(mha, LoRA(rank=2, targets=["out_proj"]))
    spread(mha)
    raw = mha.out_proj._parameters["weight"]
    assert mha.out_proj.weight is not raw
    raw._local_tensor = None  # type: ignore[union-attr, attr-defined]  # what a DTensor has
    assert mha.out_proj.weight is raw
    assert dict(mha.named_parameters())["out_proj.weight"] is raw


@pytest.mark.parametrize("how", ["routed", "disabled", "activate"])
def test_switching_between_a_checkpointed_forward_and_its_backward_is_refused(how: str) -> None:
    model = Toy(checkpointed=True)
    veneer.attach(model, LoRA(rank=2))
    veneer.attach(model, LoRA(rank=2), "other")
    spread(model)
    with pytest.raises(StateError, match="backward"):
        if how == "routed":
            with veneer.routed(model, ["default", "other"]):
                loss = model(IDS).sum()
            loss.backward()
        elif how == "disabled":
            loss = model(IDS).sum()
            with veneer.disabled(model):
                pass
        else:
            loss = model(IDS).sum()
            veneer.activate(model, "default")


def test_switching_is_free_again_after_the_backward_even_if_the_loss_is_kept() -> None:
    model, plain = Toy(checkpointed=True), Toy()
    for m in (model, plain):
        veneer.attach(m, LoRA(rank=2))
        veneer.attach(m, LoRA(rank=2), "other")
        spread(m)
        with veneer.routed(m, ["default", "other"]):
            loss = m(IDS).square().sum()
            loss.backward()
    assert loss is not None
    veneer.activate(model, "default")
    for (n, p), q in zip(parameters(model).items(), parameters(plain).values(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=n)


def test_without_checkpointing_two_adapters_may_share_one_backward() -> None:
    """A preference loss compares two adapters; nothing is run again, so nothing is refused."""
    model = Toy()
    veneer.attach(model, LoRA(rank=2), "a")
    veneer.attach(model, LoRA(rank=2), "b")
    veneer.activate(model, "a")
    first = model(IDS)
    veneer.activate(model, "b")
    (first - model(IDS)).square().sum().backward()
    assert all(p.grad is not None for p in parameters(model).values())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_init_taken_from_the_base_leaves_the_base_and_other_adapters_alone(init: str) -> None:
    model = Toy()
    y0 = model(IDS).detach()
    weights = copy.deepcopy(model.state_dict())
    veneer.attach(model, LoRA(rank=2, alpha=4), "plain")
    spread(model, "plain")
    y = model(IDS).detach()
    veneer.attach(model, LoRA(rank=2, alpha=4, init=init), "taken")
    torch.testing.assert_close(model(IDS), y0)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    veneer.activate(model, "plain")
    assert torch.equal(model(IDS), y)
    with veneer.disabled(model):
        assert torch.equal(model(IDS), y0)


def test_an_error_at_a_later_site_changes_nothing() -> None:
    model = Toy()
    before = fingerprint(model)
    for spec in (
        LoRA(rank=9),  # above the rank of some layers
        LoRA(rank=2, targets=["up_proj", "dwon_proj"]),
        LoRA(rank=3, init="orthogonal"),
        LoRA(rank=2, modules_to_save=["nothing"]),
        LoRA(rank=2, layers=[5]),
        LoRA(rank=2, exclude=["up_proj", "down_proj"]),
    ):
        with pytest.raises((TargetError, ConfigError)):
            veneer.attach(model, spec)
        assert fingerprint(model) == before


def test_merging_into_bf16_reports_what_is_lost_and_warns() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    veneer.attach(layer, LoRA(rank=8, alpha=8, targets=["0"]))
    adapter = sites(layer)["0"].slots["default"].delta  # type: ignore[index, union-attr]
    with torch.no_grad():
        adapter.B.normal_()
        adapter.B.mul_(1e-4 * layer[0].weight.norm() / adapter.norm())
    with pytest.warns(UserWarning, match=r"kept only .* of dW in 0"):
        report = veneer.merge(layer)
    assert 0 <= report.share < 0.3
    veneer.unmerge(layer)
    with torch.no_grad():
        adapter.B.mul_(1e4)
    assert veneer.merge(layer).share > 0.99


# --- names and states -----------------------------------------------------------------------------------------------


def test_a_misspelt_target_names_its_neighbours() -> None:
    with pytest.raises(TargetError, match=r"'dwon_proj' matches none of 6 adaptable layers. Near: down_proj"):
        veneer.attach(Toy(), LoRA(rank=2, targets=["up_proj", "dwon_proj"]))
    with pytest.raises(TargetError, match="cannot carry a low-rank adapter: Block"):
        veneer.attach(Toy(), LoRA(rank=2, targets=["0"]))
    with pytest.raises(ConfigError, match=r"init='pisa' is not known. Did you mean 'pissa'\?"):
        LoRA(init="pisa")
    with pytest.raises(ConfigError) as error:
        LoRA(rank=0, alpha=-1, dropout=1.0, bias="some", overrides={"x": {"rnak": 3, "rank": 0}})
    assert len(error.value.problems) == 6


def test_calls_in_the_wrong_state_say_what_to_do() -> None:
    model = Toy()
    with pytest.raises(StateError, match="attach"):
        veneer.activate(model, "default")
    veneer.attach(model, LoRA(rank=2))
    with pytest.raises(StateError, match="already an adapter"):
        veneer.attach(model, LoRA(rank=2))
    with pytest.raises(StateError, match=r"no adapter named 'defualt'. Did you mean 'default'\?"):
        veneer.activate(model, "defualt")
    with pytest.raises(StateError, match="nothing is merged"):
        veneer.unmerge(model)
    spread(model)
    veneer.merge(model, keep_base=False)
    for call in (
        lambda: veneer.merge(model),
        lambda: veneer.activate(model, "default"),
        lambda: veneer.attach(model, LoRA(rank=2), "b"),
        lambda: veneer.unmerge(model),
        lambda: veneer.disabled(model).__enter__(),
        lambda: veneer.routed(model, ["default", None]).__enter__(),
    ):
        with pytest.raises(StateError):
            call()


def test_a_batch_that_does_not_match_the_routing_is_refused() -> None:
    model = Toy()
    veneer.attach(model, LoRA(rank=2))
    with pytest.raises(StateError, match="3 rows are routed"), veneer.routed(model, ["default", None, None]):
        model(IDS)


def test_nan_in_an_adapter_is_not_merged() -> None:
    model = Toy()
    veneer.attach(model, LoRA(rank=2))
    next(iter(parameters(model).values())).data[0, 0] = float("nan")
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="NaN"):
        veneer.merge(model)
    del weights["layers.0.up_proj.lora.default.delta.A"]
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert veneer.adapters(model) == ("default",)


def test_put_checks_everything_before_it_writes() -> None:
    from veneer.core.model import put, tensors

    model = Toy()
    veneer.attach(model, LoRA(rank=2))
    values = {k: v.detach().clone() + 1 for k, v in tensors(model).items()}
    first, second = list(values)[:2]
    bad = {**values, first: torch.zeros(3, 3)}
    del bad[second]
    before = {k: v.detach().clone() for k, v in tensors(model).items()}
    with pytest.raises(CheckpointError) as error:
        put(model, "default", bad)
    assert len(error.value.problems) == 2
    assert all(torch.equal(v, before[k]) for k, v in tensors(model).items())


# --- copies, wrappers, other people's tools -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_have_adapters_of_their_own(twin_of) -> None:
    model = Toy()
    veneer.attach(model, LoRA(rank=2, combine="dora", modules_to_save=["lm_head"], targets=["up_proj"]))
    spread(model)
    y = model(IDS)
    twin = twin_of(model)
    assert torch.equal(twin(IDS), y)
    spread(twin)
    veneer.activate(twin, None)
    assert torch.equal(model(IDS), y) and not torch.equal(twin(IDS), y)
    veneer.detach(twin)
    assert torch.equal(model(IDS), y)


def test_wrappers_do_not_hide_the_adapters() -> None:
    model = Toy()
    veneer.attach(model, LoRA(rank=2))
    spread(model)
    with torch.no_grad():
        base, adapted = Toy()(IDS), model(IDS)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(IDS), adapted)
        with veneer.disabled(compiled):
            torch.testing.assert_close(compiled(IDS), base)
    assert veneer.adapters(compiled) == ("default",)


def test_detach_restores_what_was_trainable() -> None:
    model = Toy()
    model.embed.weight.requires_grad_(False)
    before = fingerprint(model)
    veneer.attach(model, LoRA(rank=2, bias="all", modules_to_save=["lm_head"]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".lora." not in n)
    veneer.detach(model)
    assert fingerprint(model) == before


def test_a_replaced_module_is_trained_whole_and_switches_with_its_adapter() -> None:
    model = Toy()
    y0 = model(IDS).detach()
    veneer.attach(model, LoRA(rank=2, targets=["up_proj"], modules_to_save=["lm_head"]), "a")
    veneer.attach(model, LoRA(rank=2, targets=["up_proj"], modules_to_save=["lm_head"]), "b")
    assert torch.equal(model(IDS), y0)
    spread(model)
    out = {}
    for name in ("a", "b"):
        veneer.activate(model, name)
        out[name] = model(IDS).detach()
    with veneer.routed(model, ["b", "a"]):
        mixed = model(IDS)
    torch.testing.assert_close(mixed[0], out["b"][0])
    torch.testing.assert_close(mixed[1], out["a"][1])
    veneer.activate(model, {"a": 0.5, "b": 0.5})
    blended = model(IDS)
    veneer.merge(model)
    torch.testing.assert_close(model(IDS), blended)
    veneer.unmerge(model)
    with veneer.disabled(model):
        assert torch.equal(model(IDS), y0)


def test_a_sequential_that_is_trained_whole_still_runs_its_own_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("head", nn.Sequential(nn.Linear(8, 4), nn.Tanh()))
    x = torch.randn(3, 8)
    y0 = model(x).detach()
    veneer.attach(model, LoRA(rank=2, targets=["body"], modules_to_save=["head"]))
    assert torch.equal(model(x), y0)
    spread(model)
    y = model(x)
    with veneer.disabled(model):
        assert torch.equal(model(x), y0)
    veneer.merge(model)
    torch.testing.assert_close(model(x), y)
    veneer.unmerge(model)
    veneer.detach(model)
    assert torch.equal(model(x), y0)


def test_bias_changes_belong_to_the_adapter() -> None:
    model = Toy()
    y0 = model(IDS).detach()
    veneer.attach(model, LoRA(rank=2, targets=["up_proj"], bias="all"))
    assert torch.equal(model(IDS), y0)
    spread(model)
    y = model(IDS)
    y.square().sum().backward()
    veneer.check_alive(model)
    veneer.merge(model)
    torch.testing.assert_close(model(IDS), y)
    veneer.unmerge(model)
    veneer.activate(model, None)
    assert torch.equal(model(IDS), y0)


def test_overrides_and_layers_pick_ranks_and_blocks() -> None:
    model = Toy()
    spec = LoRA(rank=2, alpha=4, overrides={r"layers\.1\.up_proj": {"rank": 4}, "up_proj": {"rank": 3, "alpha": 3}})
    veneer.attach(model, spec)
    ranks = {n: (m.slots["default"].delta.rank, m.slots["default"].delta.scale) for n, m in sites(model).items()}
    assert ranks["layers.1.up_proj"] == (4, 0.75) and ranks["layers.0.up_proj"] == (3, 1.0)
    assert ranks["layers.0.down_proj"] == (2, 2.0)
    veneer.detach(model)
    veneer.attach(model, LoRA(rank=2, layers=[-1]))
    assert set(sites(model)) == {"layers.1.up_proj", "layers.1.down_proj"}


def test_a_start_travels_with_the_values_that_count_from_it() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    attach(model, LoRA(rank=2, targets=["0"], init="pissa"))
    adapter_of(model[0], "default").delta.A.data.add_(0.1)
    attach(model, LoRA(rank=2, targets=["0"]), "again", init=False)
    put(model, "again", tensors(model, "default"))
    x = torch.randn(3, 6)
    assert torch.equal(model(x), (activate(model, "default"), model(x))[1])
    broken = {key: value[:1] if key[1] == "A0" else value for key, value in tensors(model, "default").items()}
    attach(model, LoRA(rank=2, targets=["0"]), "third", init=False)
    with pytest.raises(CheckpointError, match=r"'A0' is \(2, 6\) here and \(1, 6\) in the values"):
        put(model, "third", broken)
    assert not adapter_of(model[0], "third").delta.shifted


class InPlace(nn.Module):
    """Adds to what its layer gives, in its own memory, as many models do (`out += residual`, ReLU(inplace=True))."""

    def __init__(self, layer: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.layer, self.in_place = layer, in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.in_place:
            y += 1
            return torch.relu_(y)
        return torch.relu(y + 1)


@pytest.mark.parametrize("rows", [(3, 7), (21,)])
@pytest.mark.parametrize("out", [16, 4096])  # the second is large enough for a function of our own
@pytest.mark.parametrize("combine", ["add", "dora"])
@pytest.mark.parametrize("storage", [None, "nf4", "int8", "fp8"])
@pytest.mark.filterwarnings("ignore:.*weights are unpacked for each product")
def test_what_a_layer_gives_may_be_written_into(
    rows: tuple[int, ...], out: int, combine: str, storage: str | None
) -> None:
    found = []
    for in_place in (True, False):
        torch.manual_seed(0)
        net, x = InPlace(nn.Linear(64, out), in_place), torch.randn(*rows, 64, requires_grad=True)
        if storage is not None:
            veneer.quantize(net, storage, targets=["layer"])
        attach(net, LoRA(rank=4, targets=["layer"], combine=combine))
        for p in parameters(net).values():
            p.data.add_(torch.randn_like(p) / 5)
        net(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in parameters(net).values())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
