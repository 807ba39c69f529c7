"""Layers that share one weight, and rows of a vocabulary: both sides show one change, or the adapter is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import LoRA
from veneer.core.model import adapter_of, parameters, put, sites, tensors
from veneer.errors import ConfigError, StateError, TargetError

VOCABULARY, WIDTH = 13, 8  # 13 and 8 in one test, 8 and 8 in another: a square table must be turned as well


class Speaker(nn.Module):
    """An embedding, a layer and a head; the head may be tied, and may have a bias."""

    def __init__(self, vocabulary: int = VOCABULARY, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.up_proj = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.up_proj(self.embed(ids))))

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ROWS = (3, 5, 7)


def spread(model: nn.Module, name: str | None = None) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in parameters(model, name).values():
            p.add_(torch.randn_like(p) * 0.3)


def oracle(model: Speaker, rows: tuple[int, ...] = ROWS, name: str = "default") -> Tensor:
    """The same model, plain, with the rows written into its table."""
    plain = Speaker(model.embed.num_embeddings, bias=model.lm_head.bias is not None)
    with torch.no_grad():
        plain.embed.weight[list(rows)] += adapter_of(model.embed, name).delta.change
        plain.up_proj.weight += adapter_of(model.up_proj, name).delta.weight()
    return plain(IDS).detach()


@pytest.mark.parametrize("vocabulary", [VOCABULARY, WIDTH])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_trained_beside_a_lora_and_seen_by_the_tied_head(vocabulary: int, bias: bool) -> None:
    model = Speaker(vocabulary, bias=bias)
    y0 = model(IDS).detach()
    stored = copy.deepcopy(model.state_dict())
    report = veneer.attach(model, LoRA(rank=2, token_rows=ROWS))
    assert set(report.sites) == {"up_proj", "embed", "lm_head"}
    assert report.trainable == 2 * 2 * WIDTH + len(ROWS) * WIDTH == sum(p.numel() for p in parameters(model).values())
    assert torch.equal(model(IDS), y0)

    spread(model)
    y = model(IDS)
    torch.testing.assert_close(y, oracle(model))
    others = [i for i in range(vocabulary) if i not in ROWS]
    untouched = torch.tensor([[1, 2, 4], [6, 0, 1]])
    with veneer.disabled(model):
        embedded = model.embed(untouched)
    assert torch.equal(model.embed(untouched), embedded), "other tokens keep their rows"
    hidden = torch.randn(2, WIDTH)
    said = model.lm_head(hidden)
    with veneer.disabled(model):
        assert torch.equal(model.lm_head(hidden)[:, others], said[:, others])
        assert not torch.equal(model.lm_head(hidden)[:, list(ROWS)], said[:, list(ROWS)])

    y.square().sum().backward()
    veneer.check_alive(model)
    assert model.embed.weight.grad is None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), y)
        spread(twin)
        torch.testing.assert_close(twin(IDS), oracle(twin))
        assert torch.equal(model(IDS), y), "a copy has rows of its own"

    veneer.merge(model)
    assert model.lm_head.weight is model.embed.weight, "the tie stays: both sides show the one change"
    torch.testing.assert_close(model(IDS), y)
    veneer.unmerge(model)
    assert torch.equal(model(IDS), y)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in stored.items())
    veneer.detach(model)
    assert torch.equal(model(IDS), y0)


def test_the_gradient_of_a_row_is_what_the_whole_table_would_have_got() -> None:
    model, plain = Speaker(), Speaker()
    veneer.attach(model, LoRA(targets=(), token_rows=ROWS))
    model(IDS).square().sum().backward()
    plain(IDS).square().sum().backward()
    (change,) = parameters(model).values()
    torch.testing.assert_close(change.grad, plain.embed.weight.grad[list(ROWS)])


def test_rows_survive_tensors_and_put_and_several_adapters_mix() -> None:
    model, other = Speaker(), Speaker()
    for each in (model, other):
        veneer.attach(each, LoRA(rank=2, token_rows=ROWS), "a")
    spread(model, "a")
    assert [key for key in tensors(model, "a") if key[0] != "up_proj"] == [("embed", "change")]
    put(other, "a", tensors(model, "a"))
    assert torch.equal(other(IDS), model(IDS))
    veneer.attach(model, LoRA(rank=2, token_rows=(5, 6)), "b")
    spread(model, "b")
    mix = {"a": 0.5, "b": 2.0}
    veneer.activate(model, mix)
    y = model(IDS)
    veneer.merge(model, mix)
    assert model.lm_head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), y)
    veneer.unmerge(model)
    alone = {}
    for name in mix:
        veneer.activate(model, name)
        alone[name] = model(IDS)
    with veneer.routed(model, ["b", "a"]):
        torch.testing.assert_close(model(IDS), torch.stack([alone["b"][0], alone["a"][1]]))


def test_an_untied_head_keeps_its_own_rows_and_may_have_some_trained() -> None:
    model = Speaker(tied=False)
    veneer.attach(model, LoRA(targets=(), token_rows=ROWS), "in")
    assert set(sites(model, "in")) == {"embed"}
    veneer.attach(model, LoRA(targets=(), token_rows={"embed": ROWS, "lm_head": [1]}), "both")
    spread(model, "both")
    y = model(IDS)
    y.sum().backward()
    assert all(p.grad.any() for p in parameters(model, "both").values())
    veneer.merge(model)
    torch.testing.assert_close(model(IDS), y)


def test_new_tokens_of_a_transformer_are_learned(make_model) -> None:
    model = make_model("qwen2")  # its head is tied
    model.resize_token_embeddings(387, mean_resizing=False)
    new = torch.tensor([[384, 385, 386] * 4])
    veneer.attach(model, LoRA(rank=2, token_rows=[384, 385, 386], targets=["q_proj"]))
    table = model.model.embed_tokens.weight.detach().clone()
    before = float(model(input_ids=new, labels=new).loss.detach())
    optimizer = torch.optim.Adam(parameters(model).values(), lr=0.03)
    for _ in range(30):
        model(input_ids=new, labels=new).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(input_ids=new, labels=new)
    assert float(after.loss.detach()) < 0.2 * before
    assert torch.equal(model.model.embed_tokens._parameters["weight"], table)
    veneer.merge(model, keep_base=False)
    veneer.detach(model)
    torch.testing.assert_close(model(input_ids=new).logits, after.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spec,match",
    [
        ({"token_rows": [99]}, "token rows go from 0 to 12"),
        ({"token_rows": [1], "targets": ["embed"]}, "is a target as well"),
        ({"token_rows": [1], "targets": ["up_proj"], "modules_to_save": ["embed"]}, "is trained whole"),
        ({"token_rows": [1], "targets": ["up_proj"], "modules_to_save": ["lm_head"]}, "is trained whole"),
        ({"token_rows": [1], "targets": ["lm_head"]}, "adapter of another kind"),
        ({"token_rows": {"embed": [1], "lm_head": [2]}}, "adapter of another kind"),
        ({"token_rows": {"embd": [1]}}, "Near: embed"),
        ({"targets": ["embed"]}, "shares its weight with lm_head, which is no target"),
        ({"targets": ["lm_head", "up_proj"]}, "tied='together'"),
        ({"targets": ["embed"], "tied": "together", "combine": "dora"}, "scales rows"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(spec: dict[str, object], match: str) -> None:
    model = Speaker()
    before = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises((TargetError, ConfigError)) as error:
        veneer.attach(model, LoRA(rank=2, **spec))
    assert match in str(error.value)
    assert before == ([type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert not veneer.adapters(model)


@pytest.mark.parametrize("rows", [[-1], [True], {"embed": [-3]}])
def test_rows_that_are_no_numbers_are_refused(rows: Any) -> None:
    with pytest.raises(ConfigError, match="must be numbers of tokens"):
        LoRA(token_rows=rows)
    with pytest.raises(ConfigError, match=r"tied='togehter' is none of .* Did you mean 'together'\?"):
        LoRA(tied="togehter")


def test_two_embeddings_need_a_name() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(9, 4)})
    with pytest.raises(TargetError, match=r"token_rows=\{'name of the embedding'"):
        veneer.attach(model, LoRA(targets=(), token_rows=[1]))


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [VOCABULARY, WIDTH])
@pytest.mark.parametrize("targets", [["embed"], ["lm_head"], ["embed", "lm_head", "up_proj"]])
@pytest.mark.parametrize("delta", ["lora", "lora_fa", "adalora", "vera", "loha"])
def test_one_change_is_seen_on_both_sides_of_a_tie(vocabulary: int, targets: list[str], delta: str) -> None:
    model = Speaker(vocabulary)
    y0 = model(IDS).detach()
    veneer.attach(model, LoRA(rank=2, targets=targets, tied="together", delta=delta))
    torch.testing.assert_close(model(IDS), y0)
    spread(model)
    y = model(IDS)
    y.square().sum().backward()
    veneer.check_alive(model)
    plain = Speaker(vocabulary)
    with torch.no_grad():
        plain.embed.weight += adapter_of(model.embed).delta.weight().T
        if "up_proj" in targets:
            plain.up_proj.weight += adapter_of(model.up_proj).delta.weight()
    torch.testing.assert_close(y, plain(IDS), rtol=1e-4, atol=1e-5)
    veneer.merge(model)
    assert model.lm_head.weight is model.embed.weight
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)
    veneer.unmerge(model)
    assert torch.equal(model(IDS), y)
    veneer.detach(model)
    assert torch.equal(model(IDS), y0)


def test_one_side_left_apart_merges_only_untied() -> None:
    model = Speaker()
    veneer.attach(model, LoRA(rank=2, targets=["embed"], tied="apart"))
    spread(model)
    y = model(IDS)
    with pytest.raises(StateError, match=r"embed.weight is also lm_head.weight"):
        veneer.merge(model)
    assert torch.equal(model(IDS), y)
    veneer.merge(model, untie=True)
    assert model.lm_head.weight is not model.embed.weight
    torch.testing.assert_close(model(IDS), y)


def test_a_tied_head_that_is_trained_whole_is_refused_by_merge_and_not_a_crash() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    veneer.attach(model, LoRA(rank=2, targets=["inner"], modules_to_save=("head",)))
    with pytest.raises(StateError, match="their weights are tied"):
        veneer.merge(model)
