"""Where an adapter is: a folder here, a run's folder, or an id on a hub."""

from __future__ import annotations

import os
from pathlib import Path

from veneer.ckpt.atomic import recover
from veneer.ckpt.base import is_hub_id
from veneer.ckpt.config import CONFIG
from veneer.core.registry import near
from veneer.errors import CheckpointError

__all__ = ["WEIGHTS", "find"]

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

CONVERT = (
    'if you trust its author, convert it: python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{PICKLED}', weights_only=True), '{WEIGHTS}')\""
)


def find(where: str | os.PathLike[str], name: str = "default", revision: str | None = None) -> Path:
    """The folder that holds adapter `name`: PEFT keeps "default" at the top and others in a subfolder of their name.

    A folder with a single adapter gives that one whatever it is to be called, and a run's folder gives its adapter.
    """
    folder = Path(where).expanduser()
    if folder.name in (WEIGHTS, CONFIG):
        folder = folder.parent
    recover(folder)
    if folder.is_dir():
        return _checked(_choose(folder, name))
    if folder.is_file():
        shared = f"veneer convert {folder.name} --to peft --out FOLDER makes one of what image models share"
        fix = shared if folder.suffix == ".safetensors" else "name the folder"
        raise CheckpointError("This is a file, and an adapter is a folder.", str(where), fix)
    if is_hub_id(str(where)):
        return _checked(_download(str(where), name, revision))
    raise CheckpointError("There is no such folder.", str(where), _nearby(folder))


def _choose(folder: Path, name: str) -> Path:
    places = [folder, folder / "adapter"] if name == "default" else [folder / name, folder, folder / "adapter" / name]
    for place in (*places, folder / "adapter"):
        if (place / CONFIG).is_file() or (place / WEIGHTS).is_file() or (place / PICKLED).is_file():
            return place
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    fix = f"name one of the adapters in it: {', '.join(inside)}" if inside else f"an adapter is a folder with {CONFIG}"
    raise CheckpointError(f"There is no adapter {name!r} in this folder.", str(folder), fix)


def _checked(folder: Path) -> Path:
    """Both files are there, and the weights are no pickle."""
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise CheckpointError(f"{PICKLED} is a pickle, and a pickle can run any code.", str(folder), CONVERT)
        raise CheckpointError(f"There is no {WEIGHTS}.", str(folder), "download or save the adapter again")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"There is no {CONFIG}, so rank and alpha are unknown.", str(folder), "copy it too")
    return folder


def _nearby(folder: Path) -> str:
    if not folder.parent.is_dir():
        return "check the path; a model id on a hub looks like organisation/name"
    return f"check the path.{near(folder.name, [path.name for path in folder.parent.iterdir()])}"


def _download(repository: str, name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        fix = "pip install huggingface_hub, or give a folder"
        raise CheckpointError("There is no such folder, and no way to download.", repository, fix) from None
    problem: Exception | None = None
    for subfolder in (None,) if name == "default" else (name, None):
        try:
            config = hf_hub_download(repository, CONFIG, subfolder=subfolder, revision=revision)
            hf_hub_download(repository, WEIGHTS, subfolder=subfolder, revision=revision)
            return Path(config).parent
        except LocalEntryNotFoundError as error:  # offline, or no network: nothing in the cache
            problem = error
        except (HfHubHTTPError, OSError, ValueError) as error:
            problem = problem or error
    raise _unreachable(repository, problem) from problem


def _unreachable(repository: str, problem: Exception | None) -> CheckpointError:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    what = "is neither a folder here nor an adapter in the download cache" if offline else "could not be downloaded"
    fix = "unset HF_HUB_OFFLINE, or download it on a machine with a network" if offline else f"{problem}".split("\n")[0]
    return CheckpointError(f"{repository!r} {what}.", repository, fix)
