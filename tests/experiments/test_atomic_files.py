"""flare.experiments.utils.atomic_files: which temporary files of killed processes are removed, and which files stay."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from flare.experiments.utils.atomic_files import replacing, write_json


def make_old(path: Path) -> Path:
    os.utime(path, (1, 1))
    return path


def test_a_later_write_removes_temporary_files_of_killed_processes(tmp_path) -> None:
    run = tmp_path / "run.json"
    abandoned = []
    for number in (3, 99999):
        (tmp_path / f".run.json.{number}").write_text("{")
        abandoned.append(make_old(tmp_path / f".run.json.{number}"))
    kept = [tmp_path / ".run.json.notes", tmp_path / ".metrics.json.3", tmp_path / ".run.json.4"]
    for path in kept:
        path.write_text("mine")
    for path in kept[:2]:
        make_old(path)
    os.mkfifo(tmp_path / ".run.json.5")
    with (tmp_path / ".run.json.6").open("w") as being_written:
        fcntl.flock(being_written, fcntl.LOCK_EX)
        make_old(tmp_path / ".run.json.6")
        write_json(run, {"status": "done"})
    assert not any(path.exists() for path in abandoned)
    assert all(path.read_text() == "mine" for path in kept), "not a temporary file, another file's, and a new one"
    assert (tmp_path / ".run.json.6").exists(), "another process writes it"
    assert run.read_text() == '{\n  "status": "done"\n}\n'


def test_an_error_leaves_the_file_unchanged(tmp_path) -> None:
    path = tmp_path / "run.json"
    write_json(path, 1)
    with pytest.raises(RuntimeError, match="meanwhile"), replacing(path) as file:
        file.write("half")
        raise RuntimeError("meanwhile")
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["run.json"]
