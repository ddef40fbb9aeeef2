"""Hooks of the documentation's build: files of the repository that pages link to become part of the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
_RESULTS = (".md", ".png", ".json", ".csv")


def on_files(files: Files, config: Any) -> Files:
    """Add the change log, the contributors' page, the examples and the measured results."""
    results = [path for path in (_ROOT / "benchmarks" / "results").rglob("*") if path.suffix in _RESULTS]
    tables = (_ROOT / "flare_kernels" / "tables").glob("*.json")
    examples = (_ROOT / "examples").iterdir()
    for path in [*(_ROOT / name for name in _PAGES), *results, *tables, *examples]:
        files.append(File.generated(config, path.relative_to(_ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ at the files that :func:`on_files` added."""
    return markdown if page.file.generated_by else markdown.replace("](../", "](")
