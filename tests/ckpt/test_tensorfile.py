"""Our reader and writer of safetensors agree with the reference implementation, byte for byte where it matters."""

from __future__ import annotations

import gc
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from veneer.ckpt.shards import Shards
from veneer.ckpt.tensorfile import DTYPES, TensorFile, header_bytes, save_tensors, writing
from veneer.errors import CheckpointError


def every_type() -> dict[str, torch.Tensor]:
    """One tensor of each type that the format has, odd lengths among them; a scalar and an empty one."""
    found = {}
    for i, (code, dtype) in enumerate(DTYPES.items()):
        raw = torch.randint(0, 2, (3, 2 * i + 1), generator=torch.Generator().manual_seed(i))
        found[code.lower()] = raw.to(torch.float32).to(dtype) if dtype.is_floating_point else raw.to(dtype)
    return found | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = (t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else t for t in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(*flat)


def test_what_we_write_the_reference_reads(tmp_path):
    tensors = every_type()
    save_tensors(tmp_path / "x", tensors, {"who": "us"})
    theirs = load_file(tmp_path / "x")
    assert theirs.keys() == tensors.keys() and all(same(theirs[k], tensors[k]) for k in tensors)
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "us"}


def test_what_the_reference_writes_we_read(tmp_path):
    tensors = every_type()
    save_file(tensors, tmp_path / "x", {"who": "they"})
    file = TensorFile(tmp_path / "x")
    assert file.metadata["who"] == "they" and len(file) == len(tensors)
    for name, tensor in tensors.items():
        stored = file[name]
        assert same(stored.load(), tensor) and stored.file.path == tmp_path / "x"
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
        assert same(stored.read(flat), tensor.reshape(-1))


def test_a_transposed_or_sliced_tensor_is_written_as_it_looks(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {"turned": whole.T, "cut": whole[:, 1::2], "grad": whole.clone().requires_grad_()}
    save_tensors(tmp_path / "x", tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in load_file(tmp_path / "x").items())


def test_every_tensor_begins_at_a_multiple_of_its_width(tmp_path):
    save_tensors(tmp_path / "x", every_type())
    file = TensorFile(tmp_path / "x")
    assert all(stored.start % stored.dtype.itemsize == 0 for stored in file)


def test_a_foreign_file_that_does_not_align_is_read_all_the_same(tmp_path):
    announced = {"odd": (torch.uint8, (3,)), "wide": (torch.float32, (2,))}
    with writing(tmp_path / "x", announced) as writer:
        writer.write("odd", torch.tensor([1, 2, 3], dtype=torch.uint8))
        writer.write("wide", torch.tensor([1.5, -2.0]))
    assert TensorFile(tmp_path / "x")["wide"].load().tolist() == [1.5, -2.0]


def test_pieces_and_copies_make_the_same_file_as_the_whole(tmp_path):
    tensors = {"a": torch.randn(7, 5), "b": torch.randn(1000).bfloat16(), "c": torch.empty(0)}
    announced = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with writing(tmp_path / "whole", announced) as writer:
        for name, t in tensors.items():
            writer.write(name, t)
    source = TensorFile(tmp_path / "whole")
    with writing(tmp_path / "pieces", announced) as writer:
        for start in range(0, 35, 4):
            writer.write("a", tensors["a"].view(-1)[start : start + 4])
        writer.copy("b", source["b"], chunk=300)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


@pytest.mark.parametrize("fault", ["order", "long", "short", "unknown"])
def test_a_writer_that_does_not_keep_its_word_is_stopped(fault, tmp_path):
    announced = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(AssertionError, match="announced"), writing(tmp_path / "x", announced) as writer:
        if fault == "order":
            writer.write("b", torch.zeros(2))
        writer.write("a", torch.zeros(3 if fault == "long" else 2))
        if fault == "unknown":
            writer.write("z", torch.zeros(2))


def test_a_type_that_the_format_lacks_is_refused():
    with pytest.raises(CheckpointError, match=r"safetensors cannot hold torch.complex128"):
        header_bytes({"x": (torch.complex128, (1,))})


def test_reading_copies_nothing_and_forgetting_changes_nothing(tmp_path):
    save_tensors(tmp_path / "x", {"w": torch.arange(100_000.0)})
    stored = TensorFile(tmp_path / "x")["w"]
    first, second = stored.load(), stored.load()
    assert first.data_ptr() == second.data_ptr()
    assert float(first.double().sum()) == 4999950000.0
    stored.forget()
    assert float(first.double().sum()) == 4999950000.0


def test_a_tensor_outlives_its_file(tmp_path):
    save_tensors(tmp_path / "x", {"w": torch.arange(1000.0)})
    w = TensorFile(tmp_path / "x")["w"].load()
    (tmp_path / "x").unlink()
    gc.collect()
    assert float(w.sum()) == 499500.0


def test_writing_into_a_loaded_tensor_leaves_the_file_alone(tmp_path):
    save_tensors(tmp_path / "x", {"w": torch.zeros(10)})
    TensorFile(tmp_path / "x")["w"].load().fill_(1)
    assert float(load_file(tmp_path / "x")["w"].sum()) == 0


def test_open_files_are_closed(tmp_path):
    save_tensors(tmp_path / "x", {"w": torch.zeros(10)})
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        TensorFile(tmp_path / "x")
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) <= before


def test_shards_come_in_the_order_of_the_disk_and_know_their_file(tmp_path):
    for i in (1, 2):
        save_tensors(
            tmp_path / f"model-0000{i}-of-00002.safetensors", {f"b{i}": torch.zeros(2), f"a{i}": torch.ones(3)}
        )
    table = {f"{n}{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2) for n in "ab"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    shards = Shards(tmp_path)
    assert [name for name, _ in shards] == ["a1", "b1", "a2", "b2"] and shards.bytes == 40
    assert {name: stored.file.path.name for name, stored in shards} == table


def test_files_without_an_index_are_not_guessed_at(tmp_path):
    for name in ("one", "two"):
        save_tensors(tmp_path / f"{name}.safetensors", {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="There are 2 safetensors files and no index"):
        Shards(tmp_path)
    (tmp_path / "two.safetensors").rename(tmp_path / "model.safetensors")
    assert Shards(tmp_path)["w"].file.path.name == "model.safetensors"


@pytest.mark.parametrize("length", [640, 1152])
def test_a_header_whose_length_looks_like_a_pickle_is_none(length, tmp_path):
    """The first two bytes of these lengths, 80 02 and 80 04, are those of a pickle of protocol 2 or 4."""
    tensors = {"w": torch.arange(6.0)}
    short = len(header_bytes({"w": (torch.float32, (6,))}, {"pad": ""})) - 8
    save_tensors(tmp_path / "x", tensors, {"pad": "." * (length - short)})
    assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") == length
    assert torch.equal(next(iter(TensorFile(tmp_path / "x"))).load(), tensors["w"])
    torch.save(tensors, tmp_path / "pickle", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="This is a pickle"):
        TensorFile(tmp_path / "pickle")
