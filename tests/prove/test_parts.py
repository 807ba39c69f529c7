"""The pieces of the proofs that can be held to a law of their own: fingerprints, masks, watched settings."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.core.model import parameters
from veneer.data.types import IGNORE, Encoded
from veneer.prove.consumed import every_key_read
from veneer.prove.fingerprint import fingerprints
from veneer.prove.masks import AT_ONCE, every_sample_teaches

END = 4

# ---------------------------------------------------------------- fingerprints

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    t = (torch.randn(40, 5) * 3).to(dtype)
    before = fingerprints({"t": t})
    assert fingerprints({"t": t.clone()}).differing(before) == []
    assert fingerprints({"t": t.T.contiguous().T}).differing(before) == []  # the same values, laid out otherwise
    bits = t.clone().view(torch.uint8)
    for _ in range(50):
        place = random.randrange(bits.numel())
        bits.view(-1)[place] ^= 1 if dtype is torch.bool else 1 << random.randrange(8)
        assert fingerprints({"t": bits.view(dtype)}).differing(before) == ["t"]
        bits = t.clone().view(torch.uint8)


def test_places_count_within_and_across_blocks() -> None:
    t = torch.arange(3 << 16, dtype=torch.float32)
    before = fingerprints({"t": t})
    for a, b in ((0, 1), (5, 1 << 16), ((1 << 16) + 3, (2 << 16) + 3)):
        swapped = t.clone()
        swapped[[a, b]] = swapped[[b, a]]
        assert fingerprints({"t": swapped}).differing(before) == ["t"]
    assert fingerprints({"t": t.roll(1 << 16)}).differing(before) == ["t"]


def test_gone_and_new_tensors_differ() -> None:
    one = fingerprints({"a": torch.ones(2), "b": torch.ones(2)})
    two = fingerprints({"b": torch.ones(2), "c": torch.ones(2)})
    assert sorted(two.differing(one)) == ["a", "c"]
    assert one.combined() != two.combined()


def test_a_small_budget_is_told() -> None:
    t = {"t": torch.randn(1 << 18)}
    assert fingerprints(t).share == 1
    assert fingerprints(t, budget=1 << 18).share == 0.25


def test_empty_meta_and_shared_tensors() -> None:
    odd = {"empty": torch.empty(0), "meta": torch.empty(3, device="meta"), "scalar": torch.tensor(2.0)}
    assert fingerprints(odd).differing(fingerprints(odd)) == []


def test_tensors_inside_a_tensor_are_read() -> None:
    class Packed(torch.Tensor):  # as quantised tensors are: a shell around plain ones
        @staticmethod
        def __new__(cls: type, codes: torch.Tensor) -> torch.Tensor:
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes: torch.Tensor) -> None:
            self.codes = codes

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes"], None

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return Packed(args[0].codes) if func is torch.ops.aten.detach.default else NotImplemented

    codes = torch.arange(8, dtype=torch.uint8)
    before = fingerprints({"w": Packed(codes)})
    codes[3] ^= 1
    assert fingerprints({"w": Packed(codes)}).differing(before) == ["w"]


# ---------------------------------------------------------------- masks


def slow(samples: list[Encoded]) -> tuple[int, int]:
    """What P1 counts, one label at a time: samples without a trained token, answers without an end."""
    empty = endless = 0
    for sample in samples:
        start = 0
        for size in sample.segments:
            spans: list[list[int]] = [[]]
            for label in sample.labels[start : start + size]:
                if label == IGNORE:
                    spans.append([])
                else:
                    spans[-1].append(label)
            found = [span for span in spans if span]
            empty += not found
            endless += any(END not in span for span in found)
            start += size
    return empty, endless


def drawn(source: random.Random) -> Encoded:
    sizes = [source.randint(1, 9) for _ in range(source.randint(1, 3))]
    labels = array("i", (source.choice([IGNORE, IGNORE, 8, 9, END]) for _ in range(sum(sizes))))
    return Encoded(array("i", [7]) * len(labels), labels, segments=tuple(sizes))


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_counted_as_one_by_one(seed: int) -> None:
    source = random.Random(seed)
    samples = [drawn(source) for _ in range(30)]
    figures = every_sample_teaches(samples, [END]).figures
    assert (figures["without_trained_token"], figures["without_end"]) == slow(samples)
    assert figures["trained_tokens"] == sum(sample.trained_tokens for sample in samples)
    assert figures["tokens"] == sum(map(len, samples))


def test_groups_do_not_leak_into_each_other() -> None:
    long = Encoded([7] * (AT_ONCE + 5), [IGNORE] * (AT_ONCE + 4) + [END], where="long")
    bad = Encoded([7, 7], [IGNORE, 9], where="bad")
    check = every_sample_teaches([bad, long, bad, long], [END])
    assert check.figures["without_end"] == 2
    assert check.figures["samples"] == 4
    assert "bad" in check.statement and "long" not in check.statement


def test_an_answer_that_was_cut_may_lack_its_end() -> None:
    cut = Encoded([7, 7, 7], [IGNORE, 8, 9])
    inner = Encoded([7, 7, 7], [IGNORE, 8, IGNORE])
    assert not every_sample_teaches([cut], [END]).passed
    assert every_sample_teaches([cut], [END], may_be_cut=True).passed
    assert not every_sample_teaches([inner], [END], may_be_cut=True).passed
    assert every_sample_teaches([cut, inner]).passed  # a task without answers has no ends to check


def test_labels_per_row_and_targets() -> None:
    def row(*labels: float) -> Encoded:
        return Encoded([7, 8, 9], list(labels), layout="row", where="r")

    assert every_sample_teaches([row(1), row(0)]).passed
    assert every_sample_teaches([row(0.5), row(-2.0)]).passed
    assert every_sample_teaches([row(0.0, 1.0, 0.0)]).passed
    assert not every_sample_teaches([row(1), row(float("nan"))]).passed
    assert not every_sample_teaches([row(1), row(IGNORE)]).passed
    target = Encoded([7, 8, 9], [11, END], layout="target")
    assert every_sample_teaches([target], [END]).passed
    assert not every_sample_teaches([target, Encoded([7], [11, 12], layout="target")], [END]).passed


def test_the_share_of_trained_tokens_is_said() -> None:
    check = every_sample_teaches([Encoded([7, 7, 7, 7], [IGNORE, IGNORE, 9, END])], [END])
    assert "(50.0 % of all tokens)" in check.statement
    assert check.figures["trained_share"] == 0.5


# ---------------------------------------------------------------- settings


def test_a_key_that_nothing_read_is_named_with_its_place() -> None:
    check = every_key_read({"lr": "flag", "warmup": "file: a.yaml:3"}, {"lr", "r"})
    assert not check.passed
    assert check.statement == "1 of 2 settings were given but nothing read them: warmup (file: a.yaml:3)."
    assert every_key_read({"lr": ""}, {"lr", "r"}).passed
    assert every_key_read({}, ()).passed


# ---------------------------------------------------------------- fp32 in fp32


class Asks(nn.Module):
    """Remembers what torch was allowed to do with fp32 while it answered."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = nn.Linear(4, 4), set[tuple[str, str]]()

    def forward(self, x: Tensor) -> Tensor:
        # "none" is what the older way leaves of "tf32" where it is taken back
        self.seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        return self.layer(x)


def tf32_by_the_older_way(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def tf32_by_the_newer_way(allowed: bool) -> None:
    kind = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = kind


@pytest.mark.parametrize("allow", [tf32_by_the_older_way, tf32_by_the_newer_way])
def test_answers_in_fp32_are_computed_in_fp32(allow: Callable[[bool], None]) -> None:
    """TF32, on by default for convolutions, took 13 bits from the answers: P5 failed for nothing."""
    backends = torch.backends
    was = [kind.fp32_precision for kind in (backends.cuda.matmul, backends.cudnn.conv)]
    model = Asks()
    veneer.attach(model, veneer.LoRA(rank=2, targets=["layer"]))
    with torch.no_grad():
        for p in parameters(model).values():
            p.normal_()
    try:
        allow(True)
        allowed = [kind.fp32_precision for kind in (backends.cuda.matmul, backends.cudnn.conv)]
        assert veneer.prove(model, torch.randn(3, 4)).passed
        assert not any("tf32" in kinds for kinds in model.seen) and model.seen
        assert [kind.fp32_precision for kind in (backends.cuda.matmul, backends.cudnn.conv)] == allowed
    finally:
        for kind, before in zip((backends.cuda.matmul, backends.cudnn.conv), was, strict=True):
            kind.fp32_precision = before
