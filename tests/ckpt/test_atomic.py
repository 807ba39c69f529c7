"""A write that is killed or runs out of disk leaves the old thing whole, and the next write leaves no litter."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from ckpt_nets import killed_at

from veneer.ckpt import atomic
from veneer.ckpt.atomic import atomic_file, atomic_folder, atomic_write, recover
from veneer.errors import CheckpointError

OLD, NEW = {"a": "old a", "sub/b": "old b"}, {"a": "new a", "c": "new c"}


def fill(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def save(folder: Path, texts: dict[str, str], **options: bool) -> None:
    with atomic_folder(folder, **options) as temp:
        fill(temp, texts)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "step-aside"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path, monkeypatch, keep, exchange):
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    target, after = tmp_path / "adapter", {**OLD, **NEW} if keep else NEW
    save(target, OLD)
    seen = set()
    for step in range(1, 1000):
        if not killed_at(step, lambda: save(target, NEW, keep=keep)):
            break
        recover(target)
        assert read(target) in (OLD, after), f"killed at step {step}"
        seen.add(read(target) == after)
        save(target, OLD)
        assert os.listdir(tmp_path) == ["adapter"], f"litter after a kill at step {step}"
    assert step > 15 and seen == {False, True}
    assert read(target) == after


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_file(tmp_path):
    target = tmp_path / "run.json"
    atomic_write(target, "old")
    for step in range(1, 100):
        if not killed_at(step, lambda: atomic_write(target, "new")):
            break
        assert target.read_text() in ("old", "new")
        atomic_write(target, "old")
        assert os.listdir(tmp_path) == ["run.json"]
    assert step > 5 and target.read_text() == "new"


@pytest.mark.parametrize("keep", [False, True])
def test_keep_decides_what_becomes_of_the_rest(tmp_path, keep):
    save(tmp_path / "x", OLD)
    save(tmp_path / "x", NEW, keep=keep)
    assert read(tmp_path / "x") == ({**OLD, **NEW} if keep else NEW)


def test_an_error_inside_the_block_changes_nothing(tmp_path):
    save(tmp_path / "x", OLD)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "x") as temp:
        fill(temp, NEW)
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "f") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert read(tmp_path / "x") == OLD and os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_said_plainly_and_changes_nothing(tmp_path):
    save(tmp_path / "x", OLD)
    with pytest.raises(CheckpointError, match=r"The disk is full.*\n.*/x\ndo: free"), atomic_folder(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert read(tmp_path / "x") == OLD and os.listdir(tmp_path) == ["x"]


def test_a_disk_that_is_really_full(tmp_path, small_disk):
    save(small_disk / "x", OLD)
    with pytest.raises(CheckpointError, match="The disk is full"), atomic_folder(small_disk / "x", keep=True) as temp:
        (temp / "big").write_bytes(bytes(8 << 20))
    with pytest.raises(CheckpointError, match="The disk is full"):
        atomic_write(small_disk / "f", bytes(8 << 20))
    assert read(small_disk / "x") == OLD and os.listdir(small_disk) == ["x"]


def test_an_error_about_another_file_is_not_dressed_up(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "x"):
        (tmp_path / "missing").read_text()
    with pytest.raises(PermissionError), atomic_folder(tmp_path / "deep" / "x"):
        raise PermissionError(errno.EACCES, "no", "/etc/shadow")


def test_a_writer_that_still_works_is_left_alone(tmp_path):
    with atomic_folder(tmp_path / "x") as first:
        fill(first, OLD)
        save(tmp_path / "x", NEW)
        assert first.exists() and read(tmp_path / "x") == NEW
    assert read(tmp_path / "x") == OLD and os.listdir(tmp_path) == ["x"]


def test_a_file_system_without_locks_or_hard_links_works_too(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, "not here")

    save(tmp_path / "x", OLD)
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(os, "link", refuse)
    save(tmp_path / "x", NEW, keep=True)
    assert read(tmp_path / "x") == {**OLD, **NEW} and os.listdir(tmp_path) == ["x"]


def test_other_names_beside_are_not_taken_for_leftovers(tmp_path):
    for name in (".x.tmp", ".x.notes.tmp", ".xy.01234567.tmp", "x.tmp"):
        (tmp_path / name).write_text("mine")
    save(tmp_path / "x", NEW)
    assert sorted(os.listdir(tmp_path)) == sorted([".x.tmp", ".x.notes.tmp", ".xy.01234567.tmp", "x.tmp", "x"])


def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(CheckpointError, match="A file stands where"), atomic_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "precious"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    save(tmp_path / "best", OLD)
    (tmp_path / "adapter").symlink_to("best")
    save(tmp_path / "adapter", NEW)
    assert read(tmp_path / "best") == OLD and read(tmp_path / "adapter") == NEW
    assert sorted(os.listdir(tmp_path)) == ["adapter", "best"]
