"""Write the kernels as a package for the Hugging Face kernels hub: ``python tools/build_hub_kernel.py hub-kernel``.

``kernel-builder`` reads ``build.toml``, ``flake.nix``, ``CARD.md`` and ``torch-ext/``; ``kernels.get_local_kernel``
loads ``build/``, which holds one variant per backend. Both folders have copies of the files of ``flare_kernels/``,
except ``_ops.py``, which sets the namespace of the operators. Every build needs its own namespace, so this script
writes ``_ops.py`` for each variant in ``build/``, and ``kernel-builder`` writes it for ``torch-ext/``. The script needs
only the standard library. See docs/kernels-hub.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "flare_kernels"
#: "cpu" runs the plain PyTorch implementation, "cuda" the Triton kernels.
BACKENDS = ("cpu", "cuda")
MARKER = "# Written by tools/build_hub_kernel.py.\n"

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = {backends}

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "json"]
"""

FLAKE_NIX = """\
{
  inputs = {
    kernel-builder.url = "github:huggingface/kernels";
  };
  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
"""

CARD = """\
---
library_name: kernels
license: {card_license}
tags:
- lora
- triton
---

# {name}

Triton kernels for LoRA whose bottleneck fuses a source-language and a target-language stream
([FLARE](https://arxiv.org/abs/2501.06892)), with a plain PyTorch form for CPUs.

```python
from kernels import get_kernel

kernel = get_kernel("{repo_id}", version={version}, trust_remote_code=True)
y = kernel.fused_lora(x, x_source, base_output, lora_A, lora_B, scaling=alpha / r, fusion="add_relu")
```

`base_output` is the output of the frozen linear layer; the adapter's update is added to it in place. Forward and
backward exist for float16, bfloat16 and float32. `kernel.backends()` lists what can run on this machine.

Needs Python {python}, {packages}. The GPU needs compute capability 8.0 or newer.
"""


def source_files() -> list[Path]:
    """Return the paths of all files of ``flare_kernels``, relative to that folder, in sorted order."""
    paths = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    return sorted(path for path in paths if "__pycache__" not in path.parts)


def unique_id() -> str:
    """Return seven hex digits that change with any change of a file of ``flare_kernels``."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.as_posix()}\0".encode() + (SOURCE / path).read_bytes() + b"\0")
    return digest.hexdigest()[:7]


def copy_source(target: Path) -> None:
    """Copy the files of ``flare_kernels`` to a folder, except ``_ops.py``."""
    for path in source_files():
        if path.name != "_ops.py":
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(SOURCE / path, target / path)


def ops_file(namespace: str) -> str:
    """Return the text of ``_ops.py`` with the given namespace."""
    before, default, after = (SOURCE / "_ops.py").read_text(encoding="utf-8").partition('"flare_kernels"')
    assert before.endswith("NAMESPACE = ") and default
    return f'{before}"{namespace}"{after}'


def prepare(output: Path) -> None:
    """Create the folder, or remove ``torch-ext`` and ``build`` of an earlier output from it.

    Raises:
        FileExistsError: the folder has files, but no ``build.toml`` written by this script.
    """
    output.mkdir(parents=True, exist_ok=True)
    build_toml = output / "build.toml"
    written_here = build_toml.is_file() and build_toml.read_text(encoding="utf-8").startswith(MARKER)
    if any(output.iterdir()) and not written_here:
        raise FileExistsError(f"{output} is not empty and was not written by this script: choose another folder")
    for folder in (output / "torch-ext", output / "build"):
        if folder.exists():
            shutil.rmtree(folder)


def build(output: Path, repo_id: str) -> None:
    """Write the package for the hub into a folder.

    Args:
        output: an empty or new folder, or the output of an earlier call.
        repo_id: "owner/name" on the hub.

    Raises:
        FileExistsError: the folder has files, but no ``build.toml`` written by this script.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    fields = {
        "name": project["name"],
        "version": int(project["version"].split(".")[0]),  # 0 means alpha or beta on the hub
        "license": project["license"],
        "card_license": project["license"].lower(),
        "backends": json.dumps(BACKENDS),
        "repo_id": repo_id,
        "python": project["requires-python"],
        "packages": " and ".join(
            need.split(";")[0] for need in project["dependencies"] if need.startswith(("torch>", "triton>"))
        ),
    }
    prepare(output)
    for name, text in {
        "build.toml": MARKER + BUILD_TOML.format(**fields),
        "flake.nix": FLAKE_NIX,
        "CARD.md": CARD.format(**fields),
        ".gitignore": "build/\n",
    }.items():
        (output / name).write_text(text, encoding="utf-8")

    module = fields["name"].replace("-", "_")
    copy_source(output / "torch-ext" / module)
    for backend in BACKENDS:
        variant = output / "build" / f"torch-{backend}"
        kernel_id = f"_{module}_{backend}_{unique_id()}"
        copy_source(variant)
        (variant / "_ops.py").write_text(ops_file(kernel_id), encoding="utf-8")
        metadata = {key: fields[key] for key in ("name", "version", "license")} | {
            "id": kernel_id,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the kernels as a package for the Hugging Face kernels hub.")
    parser.add_argument("output", type=Path, help="an empty or new folder, or an earlier output, which is replaced")
    parser.add_argument(
        "--repo-id", default="local/flare-kernels", help="repository on the hub (default: %(default)s, for local use)"
    )
    args = parser.parse_args()
    try:
        build(args.output, args.repo_id)
    except FileExistsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: build.toml and torch-ext/ for kernel-builder, build/ for kernels.get_local_kernel")
    return 0


if __name__ == "__main__":
    sys.exit(main())
