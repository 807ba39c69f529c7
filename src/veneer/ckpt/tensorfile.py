"""One safetensors file: read lazily, written as a stream.

    8 bytes                  n, little endian
    n bytes                  JSON: name -> {"dtype", "shape", "data_offsets": [from, to]}, and "__metadata__"
    the rest                 the tensors' bytes, one after the other without gaps, at those offsets

The `safetensors` package reads this format too; this file exists for what it does not offer. A reader here can give
back the memory of pages it has passed (`Stored.forget`), and a writer takes its tensors piece by piece, so that a
model larger than memory goes through a few megabytes of it. A file that is cut short or tampered with is refused with
the reason before a single tensor is touched.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.errors import CheckpointError

__all__ = ["DTYPES", "Stored", "TensorFile", "Writer", "save_tensors", "writing"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Announced = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Names, types and shapes in the order in which the tensors will be written."""

# A private map of a file may be larger than memory: it is pages of the file, unless somebody writes to them.
MAP = {"flags": mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0), "prot": mmap.PROT_READ | mmap.PROT_WRITE}
WINDOW = 32 << 20  # bytes written before the disk is asked to begin
HEADER_LIMIT = 100 << 20  # the same limit as the reference implementation: a longer header is not a header


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a file that has not been read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: TensorFile = field(repr=False)
    start: int = field(repr=False)  # in bytes from the beginning of the file

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """The tensor, on the file's own pages: nothing is copied, and nothing is read before it is used."""
        count = math.prod(self.shape)
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.start % self.dtype.itemsize:  # a foreign file may pack an odd number of bytes before us
            raw = torch.frombuffer(self.file.map, dtype=torch.uint8, count=self.bytes, offset=self.start)
            return raw.clone().view(self.dtype).view(self.shape)
        return torch.frombuffer(self.file.map, dtype=self.dtype, count=count, offset=self.start).view(self.shape)

    def read(self, into: Tensor, first: int = 0) -> Tensor:
        """Fill `into` with the elements from number `first` on, past the file's pages: for what is read once.

        Mapped pages cost a fault each and stay in this process's memory; a read is a copy at memory speed.
        """
        assert into.dtype == self.dtype and into.is_contiguous()
        view, here = _memory_of(into), self.start + first * self.dtype.itemsize
        while len(view):
            done = os.preadv(self.file.descriptor, [view[: 1 << 30]], here)
            if not done:
                raise _corrupt(self.file.path, "it ended early: something shortened it while it was read")
            view, here = view[done:], here + done
        return into

    def forget(self, first_byte: int = 0, last_byte: int | None = None) -> None:
        """Let the memory of these pages go (they are read again if they are used again)."""
        self.file.forget(self.start + first_byte, self.start + (self.bytes if last_byte is None else last_byte))


class TensorFile:
    """An open safetensors file: a mapping from names to `Stored`, and its metadata."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                header, data_start = _read_header(self.path, file.read(8), self.size, file.read)
                self.map = mmap.mmap(file.fileno(), 0, **MAP)
                self.descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self.descriptor)
        except (FileNotFoundError, IsADirectoryError):
            raise CheckpointError("There is no such file.", str(self.path)) from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tensors = {name: self._stored(name, entry, data_start) for name, entry in header.items()}
        _check_layout(self.path, self.tensors.values(), data_start, self.size)

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[Stored]:
        """In the order of the file, which is the order a disk likes."""
        return iter(sorted(self.tensors.values(), key=lambda stored: stored.start))

    def __len__(self) -> int:
        return len(self.tensors)

    def forget(self, start: int, stop: int) -> None:
        page = mmap.PAGESIZE
        first, last = start // page * page, min(-(-stop // page) * page, self.size)
        if last > first:
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def _stored(self, name: str, entry: Any, data_start: int) -> Stored:
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            start, stop = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise _corrupt(self.path, f"the header's entry for {name!r} cannot be read: {entry!r}") from None
        stored = Stored(name, dtype, shape, self, data_start + start)
        if min(shape, default=0) < 0 or start < 0 or stop - start != stored.bytes:
            raise _corrupt(self.path, f"{name!r} says {list(shape)} of {entry['dtype']} in {stop - start} bytes")
        return stored


def _read_header(path: Path, first: bytes, size: int, read: Callable[[int], bytes]) -> tuple[dict[str, Any], int]:
    if first[:2] in (b"PK", b"\x80\x02", b"\x80\x04") and any(first[2:]):  # not a header of 640 or 1152 bytes
        raise CheckpointError(
            "This is a pickle, and loading a pickle can run any code.", str(path), "ask its author for safetensors"
        )
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    if not 2 <= length <= min(HEADER_LIMIT, size - 8):
        raise _corrupt(path, f"it has {size:,} bytes, and its header would need {length:,}")
    try:
        header = json.loads(read(length))
    except ValueError as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return header, 8 + length


def _check_layout(path: Path, stored: Iterable[Stored], data_start: int, size: int) -> None:
    """The tensors must follow each other without gap or overlap, up to the last byte."""
    here = data_start
    for one in sorted(stored, key=lambda s: (s.start, s.bytes)):
        if one.start != here:
            raise _corrupt(path, f"{one.name!r} begins at byte {one.start:,} instead of {here:,}")
        here += one.bytes
    if here != size:
        state = f"{here - size:,} bytes are missing at its end" if here > size else f"{size - here:,} bytes too many"
        raise _corrupt(path, state)


def _corrupt(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"The file is damaged or incomplete: {why}.", str(path), "download or save it again; nothing was loaded"
    )


# ---------------------------------------------------------------- writing


class Writer:
    """Writes tensors in the announced order, each in as many pieces as you like."""

    def __init__(self, path: Path, announced: Announced, metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.left = [(name, math.prod(shape) * dtype.itemsize) for name, (dtype, shape) in announced.items()][::-1]
        self.due = 0  # bytes still to come of the tensor being written
        self.written = self.behind = 0  # bytes given to the system; bytes that it was asked to write out
        self.header = header_bytes(announced, metadata)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - `writing` closes it

    def write(self, name: str, piece: Tensor) -> None:
        """The next piece (or the whole) of tensor `name`."""
        piece = piece.detach().to("cpu").contiguous()
        self._begin(name, piece.numel() * piece.element_size())
        if piece.numel():
            self._put(_memory_of(piece))

    def copy(self, name: str, stored: Stored, chunk: int = 64 << 20) -> None:
        """The whole of tensor `name` from another file, inside the kernel where it can."""
        self._begin(name, stored.bytes)
        here, stop = stored.start, stored.start + stored.bytes
        while here < stop:
            done = _copy_range(stored.file.descriptor, self._file.fileno(), here, min(chunk, stop - here))
            here, self.written = here + done, self.written + done
            self._write_behind()

    def close(self) -> None:
        self._file.close()

    def finish(self) -> None:
        missing = [name for name, size in self.left if size]
        assert not missing and not self.due, f"{self.path}: not everything announced was written: {missing[::-1]}"
        os.fsync(self._file.fileno())

    def _begin(self, name: str, size: int) -> None:
        if not self.due:
            expected = ""
            while self.left and not self.due:  # tensors without elements need no call of their own
                expected, self.due = self.left.pop()
                if expected == name:
                    break
            assert expected == name, f"{self.path}: {name} was written where {expected} was announced"
        assert size <= self.due, f"{self.path}: {name} is longer than announced"
        self.due -= size

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            done = os.write(self._file.fileno(), view[: 1 << 30])  # the kernel takes at most 2 GiB at once
            view, self.written = view[done:], self.written + done
        self._write_behind()

    def _write_behind(self) -> None:
        """Let the disk begin while we go on: Linux starts to write pages out when told that nobody needs them."""
        if self.written - self.behind >= WINDOW and hasattr(os, "posix_fadvise"):
            size = self.written - self.behind
            os.posix_fadvise(self._file.fileno(), self.behind, size, os.POSIX_FADV_DONTNEED)
            self.behind = self.written


@contextmanager
def writing(
    path: str | os.PathLike[str], announced: Announced, metadata: Mapping[str, str] | None = None
) -> Iterator[Writer]:
    """Open a safetensors file for these tensors, in this order; complete and on the disk when the block ends."""
    writer = Writer(Path(path), announced, metadata)
    try:
        writer._put(writer.header)
        yield writer
        writer.finish()
    finally:
        writer.close()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write them all. Wider types come first, so that every tensor begins at a multiple of its own width."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    announced = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in ordered}
    with writing(path, announced, metadata) as writer:
        for name in ordered:
            writer.write(name, tensors[name])


def header_bytes(announced: Announced, metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    here = 0
    for name, (dtype, shape) in announced.items():
        if dtype not in CODES:
            raise CheckpointError(f"safetensors cannot hold {dtype}.", name, "convert it before saving")
        stop = here + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [here, stop]}
        here = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    return struct.pack("<Q", len(text)) + text


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, whatever its type (numpy knows no bfloat16)."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _copy_range(source: int, target: int, offset: int, count: int) -> int:
    """Copy up to `count` bytes to the target's own position; the bytes never enter this process where Linux can."""
    if hasattr(os, "copy_file_range"):
        try:
            done = os.copy_file_range(source, target, count, offset_src=offset)
            if done:
                return done
        except OSError:  # across file systems, or one that cannot: by hand, where a real error shows again
            pass
    return os.write(target, os.pread(source, min(count, 8 << 20), offset))
