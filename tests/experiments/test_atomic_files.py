"""Tests of atomic_files: a write removes the temporary files of killed processes and leaves all other files."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from flare.experiments.utils.atomic_files import replacing, write_json


def make_old(path: Path) -> Path:
    """Set the modification time to 1970, so that the file counts as abandoned."""
    os.utime(path, (1, 1))
    return path


def test_a_later_write_removes_temporary_files_of_killed_processes(tmp_path) -> None:
    run = tmp_path / "run.json"
    abandoned = []
    for number in (3, 99999):
        (tmp_path / f".run.json.{number}").write_text("{")
        abandoned.append(make_old(tmp_path / f".run.json.{number}"))
    remaining = [tmp_path / ".run.json.notes", tmp_path / ".metrics.json.3", tmp_path / ".run.json.4"]
    for path in remaining:
        path.write_text("mine")
    for path in remaining[:2]:
        make_old(path)
    os.mkfifo(tmp_path / ".run.json.5")
    with (tmp_path / ".run.json.6").open("w") as being_written:
        fcntl.flock(being_written, fcntl.LOCK_EX)
        make_old(tmp_path / ".run.json.6")
        write_json(run, {"status": "done"})
    assert not any(path.exists() for path in abandoned)
    reason = "the first has no process number, the second belongs to metrics.json, the third was just written"
    assert all(path.read_text() == "mine" for path in remaining), reason
    assert (tmp_path / ".run.json.6").exists(), "a locked file is still being written"
    assert run.read_text() == '{\n  "status": "done"\n}\n'


def test_an_error_leaves_the_file_unchanged(tmp_path) -> None:
    path = tmp_path / "run.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError, match="meanwhile"), replacing(path) as file:
        file.write("half")
        raise RuntimeError("meanwhile")
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["run.json"]
