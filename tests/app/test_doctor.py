"""The doctor says what is wrong with a line that mends it, and never dies of what it examines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from veneer.app import doctor
from veneer.app.doctor import CHECKS, Finding, examine


def test_this_environment_is_examined_whole(veneer: Callable[..., Any]) -> None:
    said = veneer("doctor", "--json")
    findings = said.json["findings"]
    subjects = {finding["subject"] for finding in findings}
    assert {"python", "torch", "transformers", "cpu", "memory", "disk", "self-test"} <= subjects
    assert [f for f in findings if f["subject"] == "self-test" and f["level"] == "ok"]
    assert said.code == (1 if any(f["level"] == "fail" for f in findings) else 0)
    text = veneer("doctor").out
    assert "self-test" in text and "\x1b" not in text


def test_every_problem_has_a_fix() -> None:
    for finding in examine():
        assert finding.level == "ok" or finding.fix, finding


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, veneer: Callable[..., Any]) -> None:
    def broken() -> Iterator[Finding]:
        raise OSError("libcudart.so.13: cannot open shared object file")
        yield

    monkeypatch.setitem(CHECKS, "gpu", broken)
    said = veneer("doctor")
    assert said.code == 1 and "libcudart.so.13" in said.out


def test_a_version_outside_the_range_is_named_with_the_line_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirement_lines", lambda: ["torch>=99", "nothing-of-this-name>=1", "rich"])
    torch, absent, rich = CHECKS["packages"]()
    assert torch.level == "fail" and torch.fix == "pip install 'torch>=99'" and "outside >=99" in torch.text
    assert absent.level == "fail" and absent.text == "not installed"
    assert rich.level == "ok"


@pytest.mark.parametrize(
    "flags, says",
    [("fma avx2", "fp32 is used"), ("avx512_bf16", "no AMX"), ("amx_tile amx_bf16 avx512_bf16", "AMX: bf16")],
)
def test_the_cpu_decides_the_advice_on_bf16(flags: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cpuinfo", lambda field: flags)
    assert any(says in finding.text for finding in CHECKS["cpu"]())


def test_more_threads_than_cores_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 64)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 2)
    finding = next(iter(CHECKS["cpu"]()))
    assert finding.level == "warn" and finding.fix == "export OMP_NUM_THREADS=2"


def test_a_driver_without_a_cuda_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    [finding] = CHECKS["gpu"]()
    assert finding.level == "fail" and "NVIDIA driver" in finding.text


def test_a_folder_that_cannot_be_written_to_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert all(finding.level == "fail" for finding in CHECKS["disk"]())
