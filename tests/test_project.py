"""Laws of the project as a whole: who may import whom, how fast it starts, what its pages and files may say.

None of them lists the modules there are. A new file is under these laws by existing.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import resource
import runpy
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "veneer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Top to bottom. A package or module imports from its own row and from those below it.
ROWS = [
    {"__main__"},
    {"app"},
    {"assets"},
    {"infer", "train", "advise", "prove"},
    {"tasks"},
    {"data", "ckpt", "peft"},
    {"kernels", "quant"},
    {"core"},
    {"errors", "extras"},
]
HEIGHT = {name: len(ROWS) - number for number, row in enumerate(ROWS) for name in row}


# ---------------------------------------------------------------- who imports whom


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and part (`core`, `errors`, ...) of all that a file of ours imports from us, however it is spelt."""
    package = ["veneer", *file.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:  # from . import x; from ..core.op import y
            start = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [".".join([*filter(None, start), alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "veneer":
                yield node.lineno, name.partition(".")[2].split(".")[0]


def edges() -> Iterator[tuple[str, str, str]]:
    """(place, importing part, imported part) over the whole source, but for veneer/__init__.py, the lazy front door."""
    for file in sorted(SOURCE.rglob("*.py")):
        here = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if here != "__init__":
            for line, there in imports(file):
                yield f"{file.relative_to(ROOT)}:{line}", here, there


def test_imports_point_down() -> None:
    wrong = []
    for place, here, there in edges():
        if there == "__version__" or (there not in HEIGHT and here == "app"):
            continue  # the front door stands beside app: what users see, app may use
        if there not in HEIGHT:
            wrong.append(f"{place}: import {there!r} from where it is defined, not from the package's front door")
        elif HEIGHT.get(here, -1) < HEIGHT[there]:
            wrong.append(f"{place}: {here} may not import {there}")
    assert not wrong, "\n".join(wrong)


def test_every_part_has_its_row() -> None:
    parts = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in SOURCE.rglob("*.py")}
    assert parts - {"__init__"} <= set(HEIGHT)


def test_no_two_parts_import_each_other() -> None:
    pairs = {(here, there) for _, here, there in edges() if here != there}
    assert not {tuple(sorted(pair)) for pair in pairs if pair[::-1] in pairs}


@pytest.mark.parametrize(
    "line,expected",
    [
        ("import veneer.core.op", "core"),
        ("import veneer.train as t", "train"),
        ("from veneer import data", "data"),
        ("from veneer.app import cli", "app"),
        ("from ..core.op import op_of", "core"),
        ("from .. import prove", "prove"),
        ("from ..errors import UserError", "errors"),
        ("importlib.import_module('veneer.infer.chat')", "infer"),
        ("import torch, veneer.ckpt", "ckpt"),
    ],
)
def test_every_spelling_of_an_import_is_seen(line: str, expected: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    file = tmp_path / "data" / "some.py"
    file.parent.mkdir()
    file.write_text(line)
    assert [there for _, there in imports(file)] == [expected]


# ---------------------------------------------------------------- how it starts


def fresh(code: str) -> str:
    """What a new Python, without the test session's hooks and variables, prints for `code`."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONDONT"))}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=known | {"PYTHONPATH": str(SOURCE.parent)}
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def cpu_seconds(code: str, times: int = 5) -> float:
    """Median CPU time of a new Python that runs `code`: what else the machine is doing does not count."""

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    def once() -> float:
        before = used()
        fresh(code)
        return used() - before

    once()  # writes the bytecode files
    return statistics.median(once() for _ in range(times))


HEAVY = {"torch", "transformers", "numpy", "safetensors", "rich", "yaml", "datasets"}


def test_import_veneer_is_quick() -> None:
    loaded = set(fresh("import veneer, sys; print(*sys.modules)").split())
    assert not loaded & HEAVY
    assert cpu_seconds("import veneer") - cpu_seconds("pass") < 0.1


def test_help_is_quick() -> None:
    call = "import sys\nfrom veneer.app.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    printed = fresh(call + "print(*sys.modules)")
    assert "train" in printed
    assert not set(printed.splitlines()[-1].split()) & {"torch", "transformers", "numpy"}
    assert cpu_seconds(call) < 0.3


def modules() -> list[str]:
    """Every module of ours that is code (the package `__init__`s are empty)."""
    found = pkgutil.walk_packages([str(SOURCE)], "veneer.")
    return [module.name for module in found if not module.ispkg and not module.name.endswith("__main__")]


def test_the_front_door_has_what_it_lists() -> None:
    """`__all__`, what `dir` shows and what can be had are one and the same."""
    import veneer

    assert veneer.__all__ == sorted(veneer.__all__)
    assert set(veneer.__all__) == {"__version__"} | {name for name in dir(veneer) if not name.startswith("_")}
    for name in veneer.__all__:
        assert getattr(veneer, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = veneer.no_such_name


def test_a_name_that_is_also_a_package_can_still_be_called() -> None:
    """`veneer.train` is a function and a package. Neither may take the other away, whichever is imported first."""
    import veneer

    both = [name for name in veneer.__all__ if (SOURCE / name).is_dir()]
    assert both
    for name in both:
        room = next(module for module in modules() if module.startswith(f"veneer.{name}."))
        assert fresh(f"import veneer, {room} as room; print(callable(veneer.{name}))") == "True\n"
        assert fresh(f"import veneer; print(callable(veneer.{name})); import {room} as room") == "True\n"


@pytest.mark.parametrize("name", modules())
def test_modules_say_what_they_are_for_and_what_they_offer(name: str) -> None:
    path = ROOT / "src" / name.replace(".", "/")
    tree = ast.parse(path.with_suffix(".py").read_text())
    assert ast.get_docstring(tree), f"{name} does not open with what it is for"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "triton" and name.rpartition(".")[2].startswith("cuda"):
            pytest.skip("kernels for a GPU; Triton comes with torch's builds for one")
        raise
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ lists {public}, which it lacks"


def test_shapes_and_types_are_checked_while_testing() -> None:
    """Without the hook every annotation would be decoration. A checked function refuses what it is not made for."""
    from jaxtyping import TypeCheckError

    from veneer.extras import need

    with pytest.raises(TypeCheckError, match="package"):
        need(1, extra="demo", use="see the hook bite")  # type: ignore[arg-type]


# ---------------------------------------------------------------- what the package declares


def test_extras_named_in_the_code_exist() -> None:
    asked = {}
    for file in [*SOURCE.rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for pair in re.findall(r"veneer\[([a-z, ]+)\]|extra=\"([a-z]+)\"", file.read_text()):
            asked |= {extra.strip(): file for extra in (pair[0] or pair[1]).split(",")}
    assert not {extra: str(file) for extra, file in asked.items() if extra not in EXTRAS}


DISTRIBUTIONS = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "PIL": "pillow"}  # where the names differ


def third_party(file: Path) -> Iterator[tuple[str, bool]]:
    """Packages of others that a file imports, and whether that happens the moment the file is imported."""
    tree = ast.parse(file.read_text())
    at_once = {node for top in tree.body if isinstance(top, ast.Import | ast.ImportFrom) for node in ast.walk(top)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in (name.split(".")[0] for name in names):
            if name != "veneer" and name not in sys.stdlib_module_names:
                yield DISTRIBUTIONS.get(name, name), node in at_once


def test_everything_imported_is_declared() -> None:
    """At the top of a file only what every user has; inside a function also what an extra brings."""
    always = {Requirement(line).name for line in PROJECT["dependencies"]}
    users = {name: lines for name, lines in EXTRAS.items() if name not in ("test", "dev")}
    extra = {Requirement(line).name for lines in users.values() for line in lines}
    wrong = []
    for file in SOURCE.rglob("*.py"):
        for name, at_once in third_party(file):
            if name == "triton" and file.name.startswith("cuda"):
                continue  # torch's builds for GPUs bring it, and these files are imported where there is one
            if name not in always and (at_once or name not in extra):
                wrong.append(f"{file.relative_to(ROOT)}: {name}")
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_what_the_project_asks_for_and_nothing_else() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {r.name: next(iter(r.specifier)).version for r in map(Requirement, filter(None, lines))}
    for wanted in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["test"], *EXTRAS["dev"], *EXTRAS["demo"]]):
        if wanted.name != "veneer":
            assert wanted.specifier.contains(pinned[wanted.name]), f"{wanted} excludes the pinned version"


def test_missing_extra_is_answered_with_the_pip_line(monkeypatch) -> None:
    from veneer.errors import UserError
    from veneer.extras import need

    assert need("json", extra="demo", use="read JSON").__name__ == "json"
    with pytest.raises(UserError, match=r"needed to fly") as caught:
        need("no_such_package", extra="gguf", use="fly")
    assert caught.value.fix == "pip install 'veneer[gguf]'"


def test_changelog_knows_this_version() -> None:
    import veneer

    versions = re.findall(r"^## \[?(\d\S*?)\]?(?: |$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert veneer.__version__ == PROJECT["version"] == versions[0]
    assert all(Version(newer) > Version(older) for newer, older in pairwise(versions))


# ---------------------------------------------------------------- what files and pages may say


def tracked(*endings: str) -> list[Path]:
    """The files that git knows; all of them when this is not a clone."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = (ROOT / line for line in listed.stdout.splitlines()) if not listed.returncode else ROOT.rglob("*.*")
    return [file for file in files if file.is_file() and (not endings or file.suffix in endings)]


MACHINE = re.compile(
    r"(?<![\w.])/(?:work|root|opt|home/\w+|Users/\w+)/"  # somebody's folders
    r"|py[p]i\.org|pythonhosted|npm[j]s|deb\.debian|ind[e]x-url"  # pip knows where packages are; we do not
)


def test_no_machine_and_no_registry_is_named() -> None:
    wrong = []
    for file in tracked():
        if file == Path(__file__) or file.suffix in {".png", ".woff2"}:
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if found := MACHINE.search(line):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {found.group()}")
    assert not wrong, "\n".join(wrong)


def test_source_is_ascii() -> None:
    """But for the marks that are shown to people (a bar, a tick), which are in strings and not in names or comments."""
    wrong = []
    for file in SOURCE.rglob("*.py"):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            comment = line.partition("#")[2] if line.lstrip().startswith("#") else ""
            if not comment.isascii():
                wrong.append(f"{file.relative_to(ROOT)}:{number}")
    assert not wrong, "\n".join(wrong)


def test_the_page_of_settings_is_what_the_code_says() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "settings.py"))["page"]()
    assert (ROOT / "docs" / "settings.md").read_text() == page, "run: python docs/settings.py"


PAGES = [file for file in tracked(".md") if "node_modules" not in file.parts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text()):
        target = link[0] or link[1]
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


# ---------------------------------------------------------------- code on the pages

FENCE = re.compile(r"^```(\w+)( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[str, bool]]:
    """The fenced blocks of a language: code, and whether it is marked to be run (```python run)."""
    return [(code, bool(run)) for name, run, code in FENCE.findall(page.read_text()) if name == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_pages_compiles(page: Path) -> None:
    for code, _ in blocks(page, "python"):
        compile(code, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


RUNNABLE = [page for page in PAGES if any(run for _, run in blocks(page, "python"))]
STAND_IN = "HuggingFaceTB/SmolLM2-135M-Instruct"  # pages name a real model; a tiny one takes its place here


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_on_pages_runs(page: Path, tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    """The blocks of a page run one after the other in one namespace, beside a file of examples called train.jsonl."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"show {n} lines", "completion": f"head -n {n}"}) for n in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    namespace: dict[str, object] = {"__name__": "page"}
    for number, (code, run) in enumerate(blocks(page, "python"), 1):
        if run:
            source = code.replace(STAND_IN, str(tiny_folder))
            exec(compile(source, f"{page.name}, block {number}", "exec"), namespace)


def command_lines() -> Iterator[tuple[Path, str]]:
    """Every `veneer ...` line in a shell block of a page."""
    for page in PAGES:
        for code, _ in blocks(page, "sh") + blocks(page, "bash") + blocks(page, "console"):
            for line in re.sub(r"\\\n\s*", " ", code).splitlines():
                if found := re.match(r"(?:\$ )?(veneer [a-z].*)", line.split(" #")[0].rstrip()):
                    yield page, found.group(1)


def test_commands_on_pages_are_understood() -> None:
    """Every word of them, and none is missing that must be there."""
    from veneer.app import cli
    from veneer.app.flags import from_said
    from veneer.errors import VeneerError

    wrong = []
    for page, line in command_lines():
        _, name, *words = shlex.split(line)
        try:
            args = cli.parse(name, importlib.import_module(f"veneer.app.commands.{name}"), words)
            if hasattr(args, "positional") and args.said.get("resume") is None:
                from_said(args.positional, args.said, args.set, args.config)
        except VeneerError as error:
            wrong.append(f"{page.name}: {line}: {error}")
    assert not wrong, "\n".join(wrong)
