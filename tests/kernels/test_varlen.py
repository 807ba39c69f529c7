"""The law of attention by samples: each sample of a row is what it is alone, in values and gradients, whatever lies
beside it; over builds (grouped heads, windows, head norms), fused and plain blocks, and what is kept of them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen3Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig

import veneer
from veneer import LoRA
from veneer.core.model import parameters
from veneer.data.batch import Batch, batches, collate, mould_of
from veneer.data.isolation import check
from veneer.data.pack import pack
from veneer.data.types import IGNORE, Encoded
from veneer.errors import StateError
from veneer.kernels.fuse import fuse
from veneer.kernels.varlen import NAME, attend_each, attention, obstacle, within
from veneer.train.base import recomputing

SIZE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZE),
    "qwen3": Qwen3Config(**SIZE),
    "mistral with windows": MistralConfig(**SIZE, sliding_window=4),
    "gemma3 with windows": Gemma3TextConfig(**SIZE, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
                       resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}  # fmt: skip
LENGTHS = [[7], [1, 5, 1], [9, 4, 17, 2]]  # none divides another, a single sample, samples of one token


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").double()
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    veneer.attach(model, LoRA(rank=3, alpha=6))
    torch.manual_seed(1)
    for p in parameters(model).values():
        nn.init.normal_(p, std=0.2)
    return model.train()


def samples_of(lengths: list[int], seed: int = 0) -> list[Encoded]:
    dice = random.Random(seed)
    made = []
    for n in lengths:
        ids = [dice.randrange(3, 97) for _ in range(n)]
        made.append(Encoded(ids, [IGNORE, *ids[1:]]))
    return made


def outcome(model: Any, given: Iterator[Batch] | list[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss over all batches, and the gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in given:
        logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Up to rounding: transformers norms in fp32 even where the model is in fp64."""
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-6, atol=1e-6)
    assert got[1].keys() == wanted[1].keys() and len(wanted[1]) > 4
    for name, value in wanted[1].items():
        off = (got[1][name] - value).norm() / value.norm().clamp_min(1e-12)
        assert off <= 2e-5, f"{name} is off by {off:.2g}"


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_its_samples_one_by_one(name: str, lengths: list[int]) -> None:
    model, samples = model_of(name), samples_of(lengths)
    alone = outcome(model, list(batches(samples, 1)))
    with within(model):
        agree(outcome(model, [collate(samples, by_samples=True)]), alone)
        agree(outcome(model, list(batches(samples, 2, by_samples=True))), alone)
        agree(outcome(model, list(batches(pack(samples, 20), 2, by_samples=True))), alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_fills_a_batch_up_counts_for_nothing(name: str) -> None:
    """All batches in one shape: some of the last samples are of nothing that counts, some of no token at all."""
    model, samples = model_of(name), samples_of([9, 4, 17, 2, 5, 5])
    mould = mould_of(samples, 2)
    made = list(batches(samples, 2, by_samples=True, mould=mould))
    assert {tuple(batch.inputs["input_ids"].shape) for batch in made} == {(1, mould.tokens)}
    assert {len(batch.inputs["cu_seq_lens_q"]) for batch in made} == {mould.samples + 1}
    assert {batch.inputs["max_length_q"] for batch in made} == {17}
    assert [batch.tokens for batch in made] == [13, 19, 10] and made[1].inputs["cu_seq_lens_q"].diff().min() == 0
    with within(model):
        agree(outcome(model, made), outcome(model, list(batches(samples, 2, by_samples=True))))


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_mould_takes_any_rows_and_leaves_alone_what_does_not_fit(rows: int) -> None:
    dice = random.Random(1)
    packed = pack(samples_of([dice.randrange(1, 30) for _ in range(40)]), 40)
    mould = mould_of(packed, rows)
    for _ in range(50):
        lengths = [n for row in dice.sample(packed, rows) for n in row.segments]
        filling = mould.filling(lengths)
        assert filling is not None and sum(lengths) + sum(filling) == mould.tokens
        assert len(lengths) + len(filling) == mould.samples and max(filling, default=0) <= mould.longest
    assert mould.filling([mould.tokens + 1]) is None and mould.filling([1] * (mould.samples + 1)) is None
    assert mould.filling([mould.longest + 1]) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_takes_samples_of_no_token() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (14, 2, 2))
    found = []
    for ends, longest in (([0, 100, 170, 300], 130), ([0, 100, 170, 300, 300, 300, 300], 256)):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        o = attend_each(*inputs, torch.tensor(ends, dtype=torch.int32, device="cuda"), longest)
        found.append([o, *torch.autograd.grad(o, inputs, torch.cos(o.detach()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-2)
        assert torch.isfinite(other).all()


@pytest.mark.parametrize("level", ["none", "gate_up", "middle", "input"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with windows"])
def test_inside_fused_blocks_too(name: str, level: str) -> None:
    model, samples = model_of(name), samples_of([9, 4, 17, 2])
    alone = outcome(model, list(batches(samples, 1)))
    assert fuse(model, level, verbose=False).replaced["blocks"] == 2
    with within(model), warnings.catch_warnings():
        warnings.simplefilter("error")  # a block that runs plainly says so
        agree(outcome(model, [collate(samples, by_samples=True)]), alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_by_transformers_it_is_the_same(name: str) -> None:
    model, samples = model_of(name), samples_of([9, 4, 17, 2])
    alone = outcome(model, list(batches(samples, 1)))
    with within(model), recomputing(model, True):
        agree(outcome(model, [collate(samples, by_samples=True)]), alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sentinel_in_another_sample_changes_nothing(name: str) -> None:
    """To the bit: every token of one sample replaced, the logits of the others looked at."""
    model, samples = model_of(name), samples_of([9, 4, 17])
    changed = [*samples[:1], Encoded([96] * 4, [IGNORE] * 4), *samples[2:]]
    with within(model), torch.no_grad():
        one, two = (model(**collate(rows, by_samples=True).inputs).logits[0] for rows in (samples, changed))
        assert check(model, by_samples=True) < 1e-5
    assert torch.equal(one[:9], two[:9]) and torch.equal(one[13:], two[13:])
    assert not torch.equal(one[9:13], two[9:13])


def test_the_model_is_as_it_was_and_takes_other_batches_meanwhile() -> None:
    model, samples = model_of("mistral with windows"), samples_of([9, 4, 17])
    padded, packed = collate(samples), collate(samples, flat=True)
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    before = [model(**batch.inputs).logits for batch in (padded, packed)]
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False)
    with within(model):
        assert model.config._attn_implementation == NAME
        for batch, logits in zip((padded, packed), before, strict=True):
            assert torch.equal(model(**batch.inputs).logits, logits)
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), answer)
    assert model.config._attn_implementation == "sdpa"


def test_bounds_that_do_not_arrive_are_no_attention_at_all() -> None:
    """A model that keeps the library's names to itself must not see everything instead."""
    model, batch = model_of("llama"), collate(samples_of([5, 4]), by_samples=True)
    lost = {name: value for name, value in batch.inputs.items() if not name.startswith("cu_seq")}
    with within(model), pytest.raises(StateError, match="was not handed the bounds"):
        model(**lost)


def test_what_the_kernel_does_not_know_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(GptOssConfig(**SIZE, num_local_experts=4), attn_implementation="eager")
    assert "its attention is eager" in str(obstacle(model))
    with pytest.raises(StateError, match="left as it is"), within(model):
        raise AssertionError("not reached")
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert obstacle(mamba) is not None and obstacle(nn.Linear(2, 2)) is not None and obstacle(model_of("llama")) is None
    q = torch.randn(1, 2, 5, 8)
    asked = nn.Identity()
    with pytest.raises(StateError, match="asks for softcap"):
        attention(asked, q, q, q, cu_seq_lens_q=torch.tensor([0, 5]), max_length_q=5, softcap=30.0)


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(StateError, match="a batch of no samples"):
        collate([])
    with pytest.raises(StateError, match="a batch of no samples"):
        collate([], by_samples=True)
    assert list(batches([], 4, by_samples=True)) == []


# ------------------------------------------------------------------ the function


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_the_reference_is_attention_under_a_block_mask(
    heads: tuple[int, int], window: int | None, causal: bool
) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    q, k, v = (torch.randn(20, h, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], *heads[1:] * 2))
    got = attend_each(q, k, v, bounds, 12, scale=0.3, window=window, causal=causal)
    owner = torch.bucketize(torch.arange(20), bounds[1:-1].long(), right=True)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    seen = owner[:, None] == owner
    seen &= (distance >= 0) if causal else True
    seen &= distance.abs() < (window or 99)
    wide = [t.repeat_interleave(heads[0] // heads[1], 1) for t in (k, v)]
    scores = torch.einsum("qhd,khd->hqk", q, wide[0]) * 0.3
    wanted = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), wide[1])
    torch.testing.assert_close(got, wanted)
    g = torch.randn_like(got)
    for mine, theirs in zip(*(torch.autograd.grad(o, (q, k, v), g) for o in (got, wanted)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_dropout_is_drawn_within_samples() -> None:
    torch.manual_seed(0)
    q = torch.randn(9, 2, 8)
    v = torch.ones(9, 2, 8)
    o = attend_each(q, q, v, torch.tensor([0, 4, 9]), 5, dropout=0.5)
    assert not torch.allclose(o, torch.ones_like(o))
    assert torch.allclose(attend_each(q, q, v, torch.tensor([0, 9]), 9), v)
