"""docs/methods.md is what its script writes, and leaves no method out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from veneer.core.spec import REGISTRIES

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("methods_page", DOCS / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_picture_are_those_of_the_script(script: ModuleType) -> None:
    found = json.loads(script.RESULTS.read_text())
    assert script.PAGE.read_text() == script.page(found), "run: python docs/methods.py"
    assert script.PICTURE.read_text() == script.picture(found["runs"]), "run: python docs/methods.py"
    ElementTree.parse(script.PICTURE)


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_method_has_its_paragraph(script: ModuleType, kind: str) -> None:
    page = script.PAGE.read_text()
    missing = [name for name in REGISTRIES[kind] if f'"{name}"' not in page]
    assert not missing, f"docs/methods.py says nothing of {kind} {', '.join(missing)}"


def test_what_learns_in_both_libraries_learns_alike(script: ModuleType) -> None:
    """The figures that the page shows: every method's loss falls, and ends where its peer's ends."""
    runs = json.loads(script.RESULTS.read_text())["runs"]
    for name, run in runs.items():
        first, last = run["veneer"]["losses"][0][1], run["veneer"]["losses"][-1][1]
        assert last < first - 0.05, f"{name} did not learn"
        if "peft" in run:
            assert abs(run["peft"]["losses"][-1][1] - last) < 0.03, f"{name} learned otherwise than PEFT's"
