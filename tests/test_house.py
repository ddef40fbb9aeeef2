"""Check the project's rules: which package imports what, sizes of files, one version number, one version of ruff."""

import ast
import fnmatch
import importlib
import importlib.metadata
import re
import subprocess
import sys
import textwrap
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flare", "flare_kernels")
#: Folders with Python files. They are searched if the project is a copy without git.
FOLDERS = (*PACKAGES, "benchmarks", "tests", "examples", "tools")
#: Packages without import cycles. Imports inside functions, under TYPE_CHECKING and with import_module count too.
STRICT_PACKAGES = ("flare_kernels", "flare")
#: Modules that import a module whose name is in a variable. This test cannot follow such imports.
DYNAMIC_IMPORTS = {"flare_kernels.aot", "flare"}


def python(code: str) -> str:
    """Run code in a new interpreter and return its output."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources(package: str) -> dict[str, Path]:
    """Return the file of every module of a package, by module name."""
    files = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    assert package in files, f"{package}/__init__.py is missing"
    return files


def runs_later(node: ast.stmt) -> bool:
    """Return whether a statement is a function or a block for type checkers, whose body does not run at import."""
    for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    return for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def imported(module: str, path: Path, top_level_only: bool) -> set[str]:
    """Return the dotted names that a file imports. `from a import b` gives a and a.b, because b may be a module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    up = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*up, base] if base else up)
                names.add(base)
                names.update(f"{base}.{alias.name}" for alias in node.names)
            elif not (top_level_only and runs_later(node)):
                for field in ("body", "orelse", "finalbody"):
                    visit(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(ast.parse(path.read_text()).body)
    return names


# --- imports of flare_kernels -----------------------------------------------------------------------------------------


def test_flare_kernels_imports_no_hugging_face_library():
    loaded = python(
        """
        import sys
        import flare_kernels
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
        """
    ).split()
    forbidden = {"flare", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "matplotlib"}
    assert not forbidden & set(loaded)
    assert "torch" in loaded  # the check itself works


def test_flare_kernels_files_import_only_torch_triton_and_the_standard_library():
    allowed = {"torch", "triton", "flare_kernels", *sys.stdlib_module_names}
    for module, path in sources("flare_kernels").items():
        roots = {name.partition(".")[0] for name in imported(module, path, top_level_only=False)}
        assert roots <= allowed, f"{path.relative_to(ROOT)} imports {sorted(roots - allowed)}"


def test_flare_kernels_imports_without_triton_and_gives_the_reason():
    printed = python(
        """
        import sys

        class Hides:
            # A finder that does not find triton, as if it were not installed.
            def __init__(self, finder):
                self.finder = finder

            def find_spec(self, name, path=None, target=None):
                return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

            def __getattr__(self, name):
                return getattr(self.finder, name)

        sys.meta_path[:] = [Hides(finder) for finder in sys.meta_path]
        import torch
        import flare_kernels

        status = flare_kernels.backends()
        print(status["torch"])
        print("|", status["triton"])
        x, A, B = torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1)
        y = flare_kernels.fused_lora(x, x, torch.zeros(2, 4), A, B, scaling=1.0, fusion="add")
        assert (y == 6).all(), y
        """
    )
    usable, _, reason = printed.partition("|")
    assert usable.strip()
    assert "triton" in reason.lower(), f"backends() gives no reason for the missing triton: {reason}"


# --- imports of flare -------------------------------------------------------------------------------------------------


def test_flare_imports_heavy_optional_packages_only_where_used():
    optional = ("datasets", "matplotlib", "bitsandbytes")
    loaded = python(
        f"""
        import sys
        import transformers, peft, accelerate  # their own imports are excluded

        before = set(sys.modules)
        import flare
        import flare.cli
        print(*[name for name in {optional!r} if name in sys.modules and name not in before])
        """
    )
    assert loaded == ""
    for module, path in sources("flare").items():
        roots = {name.partition(".")[0] for name in imported(module, path, top_level_only=True)}
        assert not roots & set(optional), f"{path.relative_to(ROOT)} imports {roots & set(optional)} at import time"


def imported_by_name(module: str, path: Path) -> set[str]:
    """Return the names that a file passes to ``import_module``. An f-string gives its constant prefix and "*"."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(("import_module", "__import__")):
            continue
        name = node.args[0]
        if isinstance(name, ast.Constant):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            names.add(importlib.util.resolve_name(name.value, package))
        elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
            names.add(f"{name.values[0].value}*")
        else:
            assert module in DYNAMIC_IMPORTS, f"{module} imports {ast.unparse(name)}, which this test cannot follow"
    return names


def import_graph(package: str, *, strict: bool) -> dict[str, set[str]]:
    """Return module -> modules of the package that its import loads; with ``strict``, also modules imported later."""
    modules = sources(package)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = imported(module, path, top_level_only=not strict)
        for name in imported_by_name(module, path) if strict else ():
            names |= {other for other in modules if fnmatch.fnmatchcase(other, name)}
        # `from package import module` depends on the submodule, not on the names that the package's __init__ collects
        direct = {n for n in names if n in modules and n != module}
        graph[module] = {n for n in direct if not any(d.startswith(n + ".") for d in direct)}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Return a cycle of a directed graph, or None."""
    state: dict[str, int] = {}
    trail: list[str] = []

    def walk(node: str) -> list[str] | None:
        state[node] = 1
        trail.append(node)
        for following in sorted(graph[node]):
            if state.get(following) == 1:
                return [*trail[trail.index(following) :], following]
            if following not in state and (deeper := walk(following)):
                return deeper
        trail.pop()
        state[node] = 2
        return None

    for node in graph:
        if node not in state and (result := walk(node)):
            return result
    return None


def test_the_cycle_check_finds_a_cycle():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_cycles(package: str):
    modules = cycle(import_graph(package, strict=package in STRICT_PACKAGES))
    assert modules is None, " -> ".join(modules)


def test_the_strict_import_graph_includes_later_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {
        "__init__": "",
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import B",
        "b": "import importlib\ndef f():\n    importlib.import_module('p.c')",
        "c": "def f():\n    from . import d",
        "d": "from importlib import import_module\ndef f(name):\n    import_module(f'p.e_{name}')",
        "e_1": "def f():\n    import p.a",
    }
    (tmp_path / "p").mkdir()
    for name, text in files.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert cycle(import_graph("p", strict=False)) is None
    assert cycle(import_graph("p", strict=True)) == ["p.a", "p.b", "p.c", "p.d", "p.e_1", "p.a"]


@pytest.mark.parametrize("package", STRICT_PACKAGES)
def test_no_module_is_hidden_by_a_name_that_its_package_collects(package: str):
    pytest.importorskip("triton", reason="Triton is not installed")
    for module in sources(package):
        parent, _, name = module.rpartition(".")
        if module.startswith("flare.experiments.harness") and not importlib.util.find_spec("lm_eval"):
            continue  # the extra [dev] does not install lm_eval
        if parent:
            loaded = importlib.import_module(module)
            assert getattr(importlib.import_module(parent), name) is loaded, f"{module} is hidden by another {name}"


#: Layers of the folders of flare/ and of flare/experiments/, as in CONTRIBUTING.md. A folder may import only folders of
#: later layers. All folders that are not listed form the last layer, and may import each other.
LAYERS = {
    "flare": (("__main__",), ("cli",), ("experiments",), ("baselines", "recipes"), ("training",)),
    "flare.experiments": (
        ("commands",),
        ("check", "report", "demo", "prediction", "harness"),
        ("runs", "translation"),
        ("tasks", "measure"),
        ("utils",),
    ),
}
#: Packages that only the experiments may import; the extra `experiments` installs them.
ONLY_IN_EXPERIMENTS = {"datasets", "tqdm", "matplotlib", "scipy", "seqeval", "sklearn"}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_downwards(package: str):
    """Imports inside functions count too. ``flare/__init__.py`` is exempt, because it collects the public names."""
    depth = {name: index for index, names in enumerate(LAYERS[package]) for name in names}
    lowest = len(LAYERS[package])

    def folder(module: str) -> tuple[str, int]:
        name = module.removeprefix(package + ".").partition(".")[0]
        return name, depth.get(name, lowest)

    for module, path in sources("flare").items():
        if not module.startswith(package + "."):
            continue
        importer, upper = folder(module)
        for target in imported(module, path, top_level_only=False):
            if target.startswith(package + "."):
                name, lower = folder(target)
                below = lower > upper or name == importer or upper == lowest == lower
                assert below, f"{module} imports {target}"


def test_only_the_experiments_import_their_libraries():
    for module, path in sources("flare").items():
        if not module.startswith("flare.experiments"):
            roots = {name.partition(".")[0] for name in imported(module, path, top_level_only=False)}
            assert not roots & ONLY_IN_EXPERIMENTS, f"{module} imports {sorted(roots & ONLY_IN_EXPERIMENTS)}"


def test_code_of_a_models_folder_runs_only_if_the_caller_allows_it():
    """Every from_pretrained of transformers gets trust_remote_code, because without it, transformers asks the user."""
    calls = 0
    for module, path in {**sources("flare"), **sources("flare_kernels")}.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).endswith(".from_pretrained"):
                continue
            if ast.unparse(node.func).rpartition(".")[0].endswith(("PeftModel", "PeftConfig")):
                continue  # these load only weights and settings of an adapter
            calls += 1
            named = any(keyword.arg == "trust_remote_code" for keyword in node.keywords)
            options = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
            dictionaries = [ast.unparse(each) for each in ast.walk(tree) if isinstance(each, ast.Dict)]
            in_options = "options" in options and any("trust_remote_code" in text for text in dictionaries)
            assert named or in_options, f"{module}: {ast.unparse(node)} does not pass trust_remote_code"
    assert calls


# --- one version, one linter ------------------------------------------------------------------------------------------


def test_all_version_numbers_agree():
    import flare
    import flare_kernels

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "flare-kernels"
    assert flare.__version__ == flare_kernels.__version__ == project["version"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    try:
        installed = importlib.metadata.version("flare-kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flare-kernels is run from its folder and not installed")
    assert installed == project["version"]


def test_pre_commit_uses_the_pinned_ruff():
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    ruff = next(pin.removeprefix("ruff==") for pin in pins if pin.startswith("ruff"))
    assert f"rev: v{ruff}" in (ROOT / ".pre-commit-config.yaml").read_text()


def _constraints(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    requirements = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]
    return {one.name: str(one.specifier) for one in requirements}


def test_environments_install_the_tested_versions():
    from flare._versions import TESTED

    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest, newest = _constraints("oldest.txt"), _constraints("newest.txt")
    assert newest == {package: f"<{untested}" for package, (_, untested) in TESTED.items()}
    for package, (floor, untested) in TESTED.items():
        assert any(re.fullmatch(rf"{package}>={floor}(;.*)?", need) for need in dependencies), package
        if package == "torch":  # see constraints/oldest.txt
            assert oldest[package] == newest[package]
            assert f"torch>={floor}$(comma)<{untested},torch==" in (ROOT / "Makefile").read_text()
        else:
            assert re.fullmatch(rf"=={floor}(\.0)?", oldest[package]), f"{package} {oldest[package]} is not the oldest"
    assert "CONSTRAINTS=constraints/oldest.txt" in (ROOT / ".ci/run").read_text()


def test_packages_ship_their_types():
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)


# --- sizes of files ---------------------------------------------------------------------------------------------------


def python_files() -> list[Path]:
    """Return the Python files that git tracks, or, without git, all Python files in the project's folders."""
    try:
        listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        names: list[str] = []
    else:
        names = listed.stdout.splitlines()
    files = [ROOT / name for name in names] or [path for each in FOLDERS for path in (ROOT / each).rglob("*.py")]
    return [path for path in files if path.exists()]


def test_python_files_have_at_most_450_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert "flare/__init__.py" in lengths  # the check itself works
    long = {name: lines for name, lines in lengths.items() if lines > 450}
    assert not long, f"split by purpose: {long}"


def test_test_files_have_different_names():
    """pytest collects no two files of one name, because tests/ and benchmarks/ are not packages."""
    names = Counter(path.name for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_golden_numbers_stay_small():
    """tests/goldens holds a selection of the recorded numbers. FLARE_GOLDENS names a folder that holds all of them."""
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "goldens").iterdir()) < 3_000_000
