"""A model's folder of safetensors, one file or many, as one sequence of tensors that have not been read yet."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from veneer.ckpt.base import is_hub_id
from veneer.ckpt.tensorfile import Stored, TensorFile
from veneer.errors import CheckpointError

__all__ = ["Shards", "model_folder", "shard_names"]

INDEX = ".safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*")


class Shards:
    """The tensors of a folder by name; iterating gives them file by file, in the order in which they lie on the disk.

    Each `Stored` knows the file that it comes from (`stored.file.path`).
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.files = [TensorFile(self.folder / name) for name in _file_names(self.folder)]
        self.tensors: dict[str, Stored] = {}
        twice = []
        for file in self.files:
            for stored in file:
                if stored.name in self.tensors:
                    twice.append(f"{stored.name}: in {self.tensors[stored.name].file.path.name} and {file.path.name}")
                self.tensors[stored.name] = stored
        if twice:
            raise CheckpointError("Some tensors are there twice.", str(self.folder), "remove the older files", twice)
        self._check_index()

    def __iter__(self) -> Iterator[tuple[str, Stored]]:
        return iter(self.tensors.items())

    def __getitem__(self, name: str) -> Stored:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def bytes(self) -> int:
        return sum(stored.bytes for stored in self.tensors.values())

    def _check_index(self) -> None:
        index = _index(self.folder)
        if index is None:
            return
        wanted: dict[str, str] = _read_index(index)
        problems = [f"{n}: not in {f}" for n, f in wanted.items() if n not in self.tensors]
        problems += [f"{n}: in {s.file.path.name}, but not in the index" for n, s in self if n not in wanted]
        if problems:
            raise CheckpointError("The shards and their index do not agree.", str(index), "download again", problems)


def shard_names(count: int) -> list[str]:
    """The file names that transformers gives to so many shards.

    >>> shard_names(1), shard_names(2)
    (['model.safetensors'], ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'])
    """
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def model_folder(where: str | os.PathLike[str], revision: str | None = None, download: bool = True) -> Path:
    """The folder of a model: as given, or downloaded from a hub into its cache (or only looked for there)."""
    folder = Path(where).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(str(where)):
        raise CheckpointError("There is no such folder.", str(where), "check the path")
    try:
        from huggingface_hub import snapshot_download

        options = {"revision": revision, "allow_patterns": list(DOWNLOADED), "local_files_only": not download}
        return Path(snapshot_download(str(where), **options))
    except (ImportError, OSError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise CheckpointError(
            f"{str(where)!r} is neither a folder here nor a model that could be downloaded.", str(where), first
        ) from error


def _file_names(folder: Path) -> list[str]:
    index = _index(folder)
    if index is not None:
        names = sorted(set(_read_index(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError("Shards are missing.", str(folder), "finish the download", missing)
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(names) > 1 and "model.safetensors" in names:
        return ["model.safetensors"]
    if len(names) == 1:
        return names
    raise _nothing(folder, names)


def _nothing(folder: Path, names: list[str]) -> CheckpointError:
    if names:
        return CheckpointError(
            f"There are {len(names)} safetensors files and no index.", str(folder), "add the index", names
        )
    pickles = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
    if pickles:
        return CheckpointError(
            f"The weights are pickles ({pickles[0]}), and loading a pickle can run any code.",
            str(folder),
            "if you trust their author: AutoModel.from_pretrained(folder).save_pretrained(new_folder) converts them",
        )
    return CheckpointError("There are no safetensors files in this folder.", str(folder), "name a model's folder")


def _index(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{INDEX}"))
    plain = [path for path in found if path.name == f"model{INDEX}"]
    return (plain or found or [None])[0]


def _read_index(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(k, str) and isinstance(v, str) and os.path.basename(v) == v for k, v in table.items()):
            return table
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError("The index of the shards is damaged.", str(index), "download it again")
