"""Time the two kinds of programs of grad_bottleneck, alone and together, to find what limits the kernel.

    python benchmarks/grad_bottleneck_parts.py --output parts.json      # needs a CUDA device

With --dry it runs small shapes in Triton's interpreter.

The part "rows" runs the row programs, which compute dT and dS. The part "strips" runs the strip programs, which
compute dB. The part "both" runs all programs. At each shape, each part is timed with many tile sizes, and "both" also
in two forms (ways to launch the programs). If Nsight Compute (ncu) is on PATH, the fastest case of each shape and part
also runs under it, for the L2 hit rate and the memory traffic. --output receives one JSON object with the run's
conditions and one row per measurement; the file is complete after each measurement.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bytes_moved import step_bytes
from results import Recorder
from shapes import LLAMA, XLMR, ProjectionShape
from timing import Effort, Rotation, interleave
from torch import Tensor

from flare_kernels.launch_mode import forcing
from flare_kernels.triton_ops import primitives
from flare_kernels.triton_ops.config import FORMS, TileConfig

#: Tokens and rank of the q and v projections of one block.
M, R = 8192, 64
SHAPES = {"llama-3.1-8b": ProjectionShape(LLAMA, M, R), "xlm-r-large": ProjectionShape(XLMR, M, R)}
PARTS = ("rows", "strips", "both")
_METRICS = {"dram__bytes.sum": "dram_bytes", "lts__t_sector_hit_rate.pct": "l2_hit_percent"}


@dataclass(frozen=True)
class Case:
    """One measurement: a part of grad_bottleneck (see `PARTS`), its form, and the tile sizes of all its kernels."""

    shape: str
    part: str
    form: str
    tiles: TileConfig

    def forced(self) -> Any:
        """Return the context in which the form and the tiles are used."""
        return forcing(form=self.form, **dict.fromkeys(FORMS["grad_bottleneck"][self.form], self.tiles))


def cases(shape: str) -> Iterator[Case]:
    """Yield the cases of a shape: "rows" and "strips" with many tile sizes, "both" also in two forms."""
    grid = itertools.product((64, 128), (64, 128), (128, 256), (4, 8), (3, 4), (132, 264))
    for m, k, n, warps, stages, programs in grid:
        if k == 128 and (n == 256 or stages == 4):  # exceeds the shared memory of a thread block
            continue
        tiles = TileConfig(m, k, n, R, warps, stages, programs)
        if n == 128 and programs == 132:  # n and programs do not affect the row programs
            yield Case(shape, "rows", "triton", tiles)
        if m == 64:
            yield Case(shape, "strips", "triton", tiles)
        for form in ("triton", "rows_first"):
            yield Case(shape, "both", form, tiles)


def inputs(shape: str, tokens: int, device: torch.device) -> Callable[[], dict[str, Any]]:
    """Return a function that makes random operands of a shape, named as in flare_kernels."""
    widths = SHAPES[shape].widths
    if device.type != "cuda":
        widths = tuple(n // 32 for n in widths)

    def randn(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

    def make() -> dict[str, Any]:
        T, S, dT, dS = (randn(tokens, len(widths) * R) for _ in range(4))
        Gs, Bs = [randn(tokens, n) for n in widths], [randn(n, R) for n in widths]
        return {"Gs": Gs, "T": T, "S": S, "Bs": Bs, "dT": dT, "dS": dS}

    return make


def run(part: str, t: dict[str, Any]) -> list[Tensor] | None:
    """Compute a part of the gradients. Return dB of each projection, or None if the part does not include dB."""
    outs: dict[str, Any] = {} if part == "strips" else {"dT": t["dT"], "dS": t["dS"]}
    outs |= {} if part == "rows" else {"B_grad_dtype": torch.float32}
    call = {"scalings": [2.0] * len(t["Gs"]), "fusion": "add_relu"}
    return primitives.grad_bottleneck(t["Gs"], t["T"], t["S"], t["Bs"], **call, **outs)


def measure(case: Case, rotation: Rotation, device: torch.device, how: Effort) -> dict[str, Any]:
    """Return the row of one case, with its times or the reason why it was refused."""
    row = {
        "case": f"{case.shape}/{case.part}",
        "variant": f"{case.form} {_short(case.tiles)}",
        "form": case.form,
        "tiles": asdict(case.tiles),
        "floor_bytes": step_bytes(SHAPES[case.shape])["grad_bottleneck"],
    }
    try:
        with case.forced():
            samples = interleave({"it": lambda: run(case.part, rotation.next())}, device, how=how)["it"]
    except Exception as error:  # refused by the compiler or the GPU
        return row | {"status": "refused", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    return row | {"status": "timed", **samples.row()}


def counters(case: Case) -> dict[str, Any]:
    """Return the counters of Nsight Compute for one call of a case; empty if ncu is missing or fails."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {}
    command = [sys.executable, __file__, "--once", json.dumps(asdict(case))]
    options = ["--csv", "--kernel-name", "regex:grad_bottleneck", "--metrics", ",".join(_METRICS)]
    done = subprocess.run([ncu, *options, *command], capture_output=True, text=True)
    return parse_counters(done.stdout) if done.returncode == 0 else {}


def parse_counters(text: str) -> dict[str, Any]:
    """Return the counters in ncu's CSV: bytes summed over launches, and the hit rate of each launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    scale = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    result: dict[str, Any] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines))):
        name, value = _METRICS.get(line["Metric Name"]), float(line["Metric Value"].replace(",", ""))
        if name == "dram_bytes":
            result[name] = result.get(name, 0.0) + value * scale[line["Metric Unit"]]
        elif name == "l2_hit_percent":
            result.setdefault(name, []).append(value)
    return result


def _short(tiles: TileConfig) -> str:
    return (
        f"M{tiles.BLOCK_M} K{tiles.BLOCK_K} N{tiles.BLOCK_N} w{tiles.num_warps} s{tiles.num_stages} p{tiles.programs}"
    )


def table(rows: list[dict[str, Any]], most: int = 8) -> str:
    """Return the ``most`` fastest rows of each shape and part as text."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = [row for row in rows if row["case"] == case and row["status"] == "timed"]
        for row in sorted(timed, key=lambda row: float(row["median_s"]))[:most]:
            counted = "".join(f"   {name} {row[name]}" for name in _METRICS.values() if name in row)
            lines.append(f"{case:<22}{row['median_s'] * 1e6:10.1f} us   {row['variant']}{counted}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="the JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--most", type=int, help="measure at most this many cases of each shape")
    parser.add_argument("--dry", action="store_true", help="small sizes in Triton's interpreter, on the CPU")
    parser.add_argument("--once", help=argparse.SUPPRESS)  # one call of one case, for ncu
    options = parser.parse_args(arguments)
    if not (options.dry or torch.cuda.is_available()):
        parser.error("no CUDA device was found; --dry with TRITON_INTERPRET=1 runs small sizes on the CPU")
    if options.dry and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry needs TRITON_INTERPRET=1 in the environment, before Triton is imported")
    device = torch.device("cpu" if options.dry else "cuda")
    tokens, how = (128, Effort(0.0, 1, 1, 1)) if options.dry else (M, Effort(0.02, 10, 100, 2))
    if options.once:
        case = json.loads(options.once)
        case = Case(**(case | {"tiles": TileConfig(**case["tiles"])}))
        with case.forced():
            run(case.part, inputs(case.shape, tokens, device)())
        return 0
    recorder = Recorder(options.output)
    for shape in options.shapes:
        rotation = Rotation(inputs(shape, tokens, device), device)
        best: dict[str, tuple[dict[str, Any], Case]] = {}
        for case in itertools.islice(cases(shape), options.most):
            row = measure(case, rotation, device, how)
            recorder.add([row])
            fastest = best.get(case.part)
            if row["status"] == "timed" and (fastest is None or row["median_s"] < fastest[0]["median_s"]):
                best[case.part] = row, case
        for row, case in best.values() if device.type == "cuda" else ():
            recorder.add([row | counters(case)])
    print(table(recorder.cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
