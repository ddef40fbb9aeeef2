"""Tests of the package for the Hugging Face kernels hub: the source's files, separate operators, equal results."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import flare_kernels

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ["cpu", "cuda"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_hub_kernel", ROOT / "tools" / "build_hub_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, script: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    script.build(folder, "someone/flare-kernels")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return relative path -> bytes of every file in a folder, without bytecode."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def metadata(package: Path, backend: str) -> dict:
    return json.loads((package / "build" / f"torch-{backend}" / "metadata.json").read_text())


# --- the files --------------------------------------------------------------------------------------------------------


def test_torch_ext_holds_the_source_without_the_file_that_the_builder_writes(package):
    source = contents(ROOT / "flare_kernels")
    assert source.pop("_ops.py")
    assert "tables/nvidia-h200.json" in source
    assert contents(package / "torch-ext") == {f"flare_kernels/{path}": text for path, text in source.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variant_holds_the_source_with_its_own_namespace(package, backend):
    source = contents(ROOT / "flare_kernels")
    variant = contents(package / "build" / f"torch-{backend}")
    kernel_id = json.loads(variant.pop("metadata.json"))["id"]
    default = source.pop("_ops.py").decode()
    assert variant.pop("_ops.py").decode() == default.replace('"flare_kernels"', f'"{kernel_id}"') != default
    assert variant == source


def test_build_toml_has_the_keys_of_the_current_edition(package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert tomllib.loads((package / "build.toml").read_text()) == {
        "general": {
            "name": project["name"],
            "version": int(flare_kernels.__version__.split(".")[0]),
            "edition": 5,
            "license": project["license"],
            "backends": BACKENDS,
            "hub": {"repo-id": "someone/flare-kernels"},
        },
        "torch-noarch": {"pyext": ["py", "json"]},
    }
    # the builder copies .py and .json files (pyext); without the remaining file, py.typed, the kernels work too
    suffixes = {path.suffix for path in (package / "torch-ext").rglob("*") if path.is_file()}
    assert suffixes == {".py", ".json", ".typed"}


def test_the_card_has_a_header_and_names_the_repository(package):
    card = (package / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert 'get_kernel("someone/flare-kernels", version=0' in card
    assert "{{" not in card and "{%" not in card  # the builder renders the card as a template


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_names_the_build(package, script, backend):
    assert metadata(package, backend) == {
        "name": "flare-kernels",
        "version": 0,
        "license": "Apache-2.0",
        "id": f"_flare_kernels_{backend}_{script.unique_id()}",
        "python-depends": [],
        "backend": {"type": backend},
    }


def test_the_id_changes_with_the_source(tmp_path, monkeypatch, script):
    before = script.unique_id()
    assert len(before) == 7 and before == load_script().unique_id()
    source = tmp_path / "flare_kernels"
    for path, data in contents(ROOT / "flare_kernels").items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    monkeypatch.setattr(script, "SOURCE", source)
    assert script.unique_id() == before
    (source / "tables" / "nvidia-h200.json").write_text("{}")
    assert script.unique_id() != before


def test_the_package_imports_itself_relatively():
    for path in (ROOT / "flare_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            assert "flare_kernels" not in {name.partition(".")[0] for name in names}, f"{path}:{node.lineno}"


# --- the output folder ------------------------------------------------------------------------------------------------


def test_an_earlier_output_is_replaced_and_other_files_stay(tmp_path, script):
    script.build(tmp_path, "someone/flare-kernels")
    (tmp_path / "torch-ext" / "flare_kernels" / "removed_since.py").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    script.build(tmp_path, "someone/else")
    assert not (tmp_path / "torch-ext" / "flare_kernels" / "removed_since.py").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert "someone/else" in (tmp_path / "build.toml").read_text()


@pytest.mark.parametrize("name", ["notes.txt", "build.toml"])
def test_a_folder_of_other_files_is_refused(tmp_path, monkeypatch, capsys, script, name):
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["build_hub_kernel.py", str(tmp_path)])
    assert script.main() == 1
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"mine"}


# --- loading ----------------------------------------------------------------------------------------------------------

LOAD_AND_COMPUTE = """
    import importlib.util
    import json
    import sys
    from pathlib import Path

    class Blocks:
        # A finder that hides packages from the other finders, as if only torch and Triton were installed.
        names = {"flare", "flare_kernels", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub"}

        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in self.names:
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Blocks())
    import torch

    def load(variant):
        # load the variant as the package `kernels` does
        name = json.loads((variant / "metadata.json").read_text())["id"]
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def run(kernel, dtype, backend, compiled=False):
        targets = []

        def capture(graph, inputs):
            targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        generator = torch.Generator().manual_seed(0)
        x, x_source, y, A, B = (
            torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
            for size in ((5, 19), (5, 19), (5, 21), (3, 19), (21, 3))
        )
        leaves = [tensor.requires_grad_() for tensor in (x, x_source, A, B)]

        def call(x, x_source, A, B):
            return kernel.fused_lora(x, x_source, y.clone(), A, B, scaling=0.5, fusion="add_relu", backend=backend)

        output = (torch.compile(call, backend=capture, fullgraph=True) if compiled else call)(*leaves)
        output.square().sum().backward()
        return [output.detach().double(), *(leaf.grad.double() for leaf in leaves)], targets

    folder = Path(sys.argv[1])
    cpu = load(folder / "build" / "torch-cpu")
    assert "flare_kernels" not in sys.modules
    cuda = load(folder / "build" / "torch-cuda")
    Blocks.names -= {"flare_kernels"}
    import flare_kernels as installed

    expected_results, _ = run(installed, torch.float64, "reference")
    for kernel in (cpu, cuda, installed):
        name = kernel.__name__
        assert kernel.library.lora is not (installed if kernel is cpu else cpu).library.lora
        assert kernel.library.lora._opoverload is getattr(torch.ops, name).lora.default
        assert kernel.library.lora_backward._opoverload is getattr(torch.ops, name).lora_backward.default

        for actual, expected in zip(run(kernel, torch.float64, "torch")[0], expected_results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for actual, expected in zip(run(kernel, torch.float32, "triton")[0], expected_results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        compiled, targets = run(kernel, torch.float64, "torch", compiled=True)
        assert f"{name}.lora.default" in targets, targets
        for actual, expected in zip(compiled, expected_results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    print(cpu.__name__, cuda.__name__, installed.__name__)
"""


def test_two_variants_and_the_installed_package_compute_the_same_in_one_process(package):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD_AND_COMPUTE), str(package)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [metadata(package, backend)["id"] for backend in BACKENDS] + ["flare_kernels"]
