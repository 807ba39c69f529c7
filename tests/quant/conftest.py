from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for quant_nets: with importlib mode no folder of tests is on the path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A CPU without 8-bit products says so once; which test hears it depends on the order."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings(r"ignore:(int8|fp8). .*unpacked for each product"))
