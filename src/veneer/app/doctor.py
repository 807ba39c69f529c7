"""What is wrong with this machine and this environment, each with the line that mends it.

Every check is a generator of `Finding`s, registered in `CHECKS` in the order they are shown. A check never raises: a
broken torch is what `doctor` is for, so whatever a check trips over becomes its finding. Levels mean

    ok      as it should be
    warn    works, but slower or with less than there could be
    fail    something that people will try does not work      the command exits 1
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from veneer.app.text import bytes_, plural

__all__ = ["CHECKS", "Finding", "examine"]

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    subject: str
    level: Level
    text: str
    fix: str = ""


Check = Callable[[], Iterator[Finding]]
CHECKS: dict[str, Check] = {}


def check(subject: str) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[subject] = function
        return function

    return add


def examine() -> Iterator[Finding]:
    """All findings, as they are made. A check that breaks is itself a finding."""
    for subject, function in CHECKS.items():
        try:
            yield from function()
        except Exception as error:  # the one place where everything is caught: a doctor must not die of the disease
            text = f"could not be checked: {type(error).__name__}: {error}"
            yield Finding(subject, "fail", text, "reinstall: pip install --force-reinstall veneer")


# ------------------------------------------------------------------ packages


def requirements() -> Iterator[tuple[str, str, str]]:
    """(package, range, extra or "") of everything Veneer names, from its own metadata or the pyproject beside it."""
    from packaging.requirements import Requirement

    for line in _requirement_lines():
        wanted = Requirement(line)
        found = re.search(r"extra == ['\"](\w+)['\"]", str(wanted.marker or ""))
        yield wanted.name, str(wanted.specifier), found[1] if found else ""


def _requirement_lines() -> list[str]:
    try:
        return metadata.requires("veneer") or []
    except metadata.PackageNotFoundError:
        return _from_source(Path(__file__).parents[3] / "pyproject.toml")


def _from_source(pyproject: Path) -> list[str]:
    import tomllib

    if not pyproject.is_file():
        return []
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = project.get("optional-dependencies", {})
    named = [f'{line}; extra == "{extra}"' for extra, lines in extras.items() for line in lines]
    return [*project["dependencies"], *named]


@check("python")
def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()} at {sys.executable}"
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "fail", text, "" if good else "Python 3.11 or newer is needed")


@check("packages")
def _packages() -> Iterator[Finding]:
    from packaging.specifiers import SpecifierSet

    for name, wanted, extra in requirements():
        if extra:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "fail", "not installed", f"pip install '{name}{wanted}'")
            continue
        inside = SpecifierSet(wanted).contains(found, prereleases=True)
        text = f"{found}" if inside else f"{found} is outside {wanted}, the range that is tested"
        yield Finding(name, "ok" if inside else "fail", text, "" if inside else f"pip install '{name}{wanted}'")


@check("imports")
def _imports() -> Iterator[Finding]:
    """An installed package that cannot be imported is the commonest broken environment."""
    for name in ("torch", "transformers", "tokenizers", "safetensors"):
        try:
            importlib.import_module(name)
        except Exception as error:
            text = f"installed, but `import {name}` fails: {type(error).__name__}: {str(error).splitlines()[0]}"
            yield Finding(name, "fail", text, f"pip install --force-reinstall --no-deps {name}")


@check("extras")
def _extras() -> Iterator[Finding]:
    from veneer.core.registry import near  # noqa: F401 - proves that veneer itself imports

    wanted: dict[str, list[str]] = {}
    for name, _, extra in requirements():
        if extra not in ("", "dev", "test") and name != "veneer":
            wanted.setdefault(extra, []).append(name)
    there = [extra for extra, names in wanted.items() if all(_is_installed(name) for name in names)]
    absent = [extra for extra in wanted if extra not in there]
    text = f"with: {', '.join(there) or 'none'}; without: {', '.join(absent) or 'none'}"
    yield Finding("extras", "ok", text, f"pip install 'veneer[{absent[0]}]' adds one" if absent else "")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# ------------------------------------------------------------------ the machine


@check("gpu")
def _gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            yield _one_gpu(torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i))
    elif shutil.which("nvidia-smi"):
        build = "is built for CPUs only" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) cannot use it"
        fix = "install the CUDA build of torch for your driver (pytorch.org shows the line)"
        yield Finding("gpu", "fail", f"there is an NVIDIA driver, but torch {torch.__version__} {build}", fix)
    elif torch.backends.mps.is_available():
        yield Finding("gpu", "ok", "Apple GPU (mps)")
    else:
        yield Finding("gpu", "ok", "none: everything runs on the CPU, models up to a few hundred million parameters")


def _one_gpu(properties: object, memory: tuple[int, int]) -> Finding:
    free, total = memory
    name, major = getattr(properties, "name", "?"), getattr(properties, "major", 0)
    text = f"{name}, {bytes_(free)} of {bytes_(total)} free"
    if major < 8:
        return Finding("gpu", "warn", f"{text}; no bf16, so fp32 is used", "")
    if free < 0.5 * total:
        return Finding("gpu", "warn", f"{text}: other programs hold the rest", "nvidia-smi lists them")
    return Finding("gpu", "ok", f"{text}, bf16")


@check("cpu")
def _cpu() -> Iterator[Finding]:
    import torch

    allowed, threads = cpu_quota(), torch.get_num_threads()
    text = f"{cpu_name()}, {plural(allowed, 'core')} for us, torch uses {plural(threads, 'thread')}"
    if threads > allowed:
        yield Finding("cpu", "warn", f"{text}: more threads than cores fight", f"export OMP_NUM_THREADS={allowed}")
    elif threads < allowed and "OMP_NUM_THREADS" in os.environ:
        fix = f"export OMP_NUM_THREADS={allowed} for the full speed"
        yield Finding("cpu", "warn", f"{text} (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})", fix)
    else:
        yield Finding("cpu", "ok", text)
    yield _bf16()


def _bf16() -> Finding:
    flags = cpu_flags()
    if "amx_bf16" in flags:
        return Finding("cpu", "ok", "AMX: bf16 is several times faster than fp32 here, and chosen by precision auto")
    if "avx512_bf16" in flags:
        return Finding(
            "cpu", "ok", "AVX-512 bf16 but no AMX: fp32 is used for training unless --precision bf16 says so"
        )
    return Finding("cpu", "ok", "no bf16 instructions: fp32 is used (bf16 would be several times slower)")


def cpu_quota() -> int:
    """Cores this process may use: what a container allows, not what the host has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, period = limit.read_text().split()
        if quota != "max":
            return max(1, min(cores, round(int(quota) / int(period))))
    return cores


def cpu_flags() -> frozenset[str]:
    return frozenset(_cpuinfo("flags").split())


def cpu_name() -> str:
    return re.sub(r"\s+", " ", _cpuinfo("model name")) or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


@check("memory")
def _memory() -> Iterator[Finding]:
    from veneer.advise.device import free_memory

    free = free_memory("cpu")
    low = free < 2e9
    fix = "close other programs, or take a smaller model; `veneer check` says what a run needs" if low else ""
    yield Finding("memory", "warn" if low else "ok", f"{bytes_(free)} free", fix)


@check("disk")
def _disk() -> Iterator[Finding]:
    from veneer.assets import cache_folder

    hub = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for what, folder in (("runs", Path("runs")), ("model cache", hub), ("demo cache", cache_folder())):
        yield _room(what, folder)


def _room(what: str, folder: Path) -> Finding:
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    text = f"{bytes_(free)} free for {what} in {folder}"
    if not os.access(there, os.W_OK):
        return Finding("disk", "fail", f"{folder} cannot be written to", f"mend the permissions of {there}")
    if free < 2e9:
        return Finding("disk", "warn", text, "`veneer runs rm NAME` removes old runs")
    return Finding("disk", "ok", text)


@check("hub")
def _hub() -> Iterator[Finding]:
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "TRUE", "ON", "YES"):
        yield Finding("hub", "ok", "offline by HF_HUB_OFFLINE: models and data come from folders and the cache")
    else:
        token = "with a token" if os.environ.get("HF_TOKEN") else "without a token: gated models need HF_TOKEN"
        yield Finding("hub", "ok", f"online, {token}")


@check("terminal")
def _terminal() -> Iterator[Finding]:
    encoding = (sys.__stdout__ and sys.__stdout__.encoding) or "none"
    if encoding.lower().replace("-", "") != "utf8":
        yield Finding("terminal", "warn", f"prints {encoding}: signs fall back to ASCII", "export PYTHONUTF8=1")
    else:
        yield Finding("terminal", "ok", f"{encoding}, {shutil.get_terminal_size().columns} columns")


# ------------------------------------------------------------------ does it work


@check("self-test")
def _self_test() -> Iterator[Finding]:
    """Adapt, train, save, load and compare, on a model of two layers: the whole path in a second."""
    import torch
    from torch import nn

    from veneer import LoRA, attach, check_alive, load, save

    def model() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    spec, x, live = LoRA(rank=2, targets=["0", "2"]), torch.ones(3, 16), model()
    base = live(x)
    attach(live, spec)
    step = torch.optim.SGD([p for p in live.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B is 0 at first, so A only moves in the second step
        live(x).square().mean().backward()
        check_alive(live)
        step.step()
        step.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        save(live, folder)
        load(again := model(), folder)
    apart, moved = float((again(x) - live(x)).detach().abs().max()), float((live(x) - base).detach().abs().max())
    good = apart < 1e-5 < moved < 100
    text = f"trained, saved and loaded a toy adapter: differs from its base by {moved:.2g}, from itself by {apart:.1g}"
    yield Finding("self-test", "ok" if good else "fail", text, "" if good else "please report this with the line above")
