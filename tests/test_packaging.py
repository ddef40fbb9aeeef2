"""Check which files the sdist and the wheel have. The release workflow unpacks the sdist and runs its tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or later builds the package")

ROOT = Path(__file__).resolve().parents[1]
#: Folders and files that tests, examples, documentation and `make test` read, in addition to the packages.
FOLDERS = ("tests", "benchmarks", "docs", "examples", "constraints", "tools", ".ci", ".github")
FILES = (
    "Makefile",
    "MANIFEST.in",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
    ".pre-commit-config.yaml",
    "CITATION.cff",
)
TEXTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md", "LICENSE")
PACKAGES = ("flare", "flare_kernels")


def files_in(folder: Path, base: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to ``base``, without what Python and tools generate."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    generated = ("__pycache__", ".pytest_cache", ".benchmarks", ".ipynb_checkpoints")
    return {path.relative_to(base).as_posix() for path in paths if not any(part in generated for part in path.parts)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``sources``, the file list of the sdist, and ``lib``, the files of the wheel."""
    folder = tmp_path_factory.mktemp("build")
    commands = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    done = subprocess.run([sys.executable, "setup.py", "-q", *commands], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "flare_kernels.egg-info" / "SOURCES.txt").rename(folder / "sources")
    return folder


def test_the_sdist_has_every_file_that_tests_need(built: Path) -> None:
    listed = set((built / "sources").read_text().splitlines())
    needed = {*FILES, *TEXTS}.union(*(files_in(ROOT / folder, ROOT) for folder in (*FOLDERS, *PACKAGES)))
    assert sorted(needed - listed) == [], "add these files to MANIFEST.in or to package-data"
    assert {"benchmarks/run_gpu.sh", ".ci/run", "constraints/oldest.txt", "tests/recorded_benchmarks.json"} <= listed
    assert not any("__pycache__" in path or path.endswith(".pyc") for path in listed)


def test_the_wheel_has_both_packages_with_their_data_and_no_tests(built: Path) -> None:
    lib = built / "lib"
    assert sorted(path.name for path in lib.iterdir()) == sorted(PACKAGES)
    expected = set().union(*(files_in(ROOT / package, ROOT) for package in PACKAGES))
    assert files_in(lib, lib) == expected
    data = {Path(path).suffix for path in expected if not path.endswith(".py")}
    assert data >= {".typed", ".json", ".yaml"}, (
        "the wheel lacks py.typed, JSON files (launch tables, languages) or YAML files (recipes)"
    )
