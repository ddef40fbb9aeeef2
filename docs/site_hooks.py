"""Hooks of the documentation build: add files outside docs/ that pages link to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
_RESULTS = (".md", ".png", ".json", ".csv")


def on_files(files: Files, config: Any) -> Files:
    """Add the change log, the contributing page, the examples, benchmark results and launch tables to the site."""
    results = [path for path in (_ROOT / "benchmarks" / "results").rglob("*") if path.suffix in _RESULTS]
    tables = (_ROOT / "flare_kernels" / "tables").glob("*.json")
    examples = (_ROOT / "examples").iterdir()
    for path in [*(_ROOT / name for name in _PAGES), *results, *tables, *examples]:
        files.append(File.generated(config, path.relative_to(_ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to files outside docs/, which :func:`on_files` adds."""
    return markdown if page.file.generated_by else markdown.replace("](../", "](")
