"""How long a reader waits for an inspector, and what streaming a large record file takes.

A run of 150 iterations of 128 trajectories is made up first. Times are the fastest of several
repetitions, in seconds of one core (not of the clock: others may use the machine); each is also
given as a multiple of the least there is to do: parsing the JSON of one iteration (opening), or
computing the credit (a slider). ``--gigabytes 2`` streams a file of that size instead of a small
one.

    python benchmarks/inspectors.py --gigabytes 2 --out benchmarks/results/inspectors.json

writes the numbers there and the tables into ``README.md`` beside this file.
"""

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from publishing import machine, publish
from recorded import make_run

from hiper_lab.credit import CreditConfig, estimate
from hiper_lab.trajectory import to_grid, to_values
from hiper_lab.widgets import CreditExplorer, TrajectoryInspector

STREAM = r"""
import re, sys, time
from hiper_lab.trajectory import read
# (ru_maxrss would start from the parent's)
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024
before, started = peak(), time.process_time()
count = sum(1 for _ in read(sys.argv[1]))
print(count, before, peak(), time.process_time() - started)
"""


def fastest(act, repetitions: int = 5) -> float:
    """Seconds of the fastest repetition."""
    times = []
    for _ in range(repetitions):
        started = time.process_time()
        act()
        times.append(time.process_time() - started)
    return min(times)


def opening(folder: Path) -> dict[str, float]:
    """Seconds to open the large run and to select in it; the first is the least there is to do."""
    make_run(folder / "big", iterations=3, episodes=128, turns=24)
    file = folder / "big/rollouts/000003.jsonl.gz"
    for i in range(4, 151):
        shutil.copy(file, file.with_name(f"{i:06d}.jsonl.gz"))

    def parse() -> None:
        with gzip.open(file) as lines:
            for record in lines:
                json.loads(record)

    seconds = {"parse the JSON of one iteration": fastest(parse)}
    seconds["first view"] = fastest(lambda: TrajectoryInspector(folder / "big"))
    inspector = TrajectoryInspector(folder / "big")
    for name, control, values in (
        ("select a turn", inspector.turn, range(1, 6)),
        ("select a trajectory", inspector.listing, [f"{i:04d}" for i in range(1, 6)]),
        ("select another iteration, from disk", inspector.iteration, range(100, 105)),
        ("search all texts", inspector.search, ("mug", "desk", "plate", "book", "shelf")),
    ):
        left = iter(values)
        seconds[name] = fastest(lambda c=control, v=left: setattr(c, "value", next(v)))
    return seconds


def sliders(folder: Path) -> dict[str, float]:
    """Seconds of live credit for 200 trajectories of 50 turns."""
    explorer = CreditExplorer(make_run(folder / "wide", iterations=1, episodes=200, turns=50))
    made = explorer.trajectories
    grid, values, config = to_grid(made), to_values(made), CreditConfig.lab()
    gamma = iter([0.9 + 0.005 * i for i in range(9)])
    slider = explorer.sliders["gamma"]
    return {
        "compute the credit, once": fastest(lambda: estimate(grid, values, config), 20),
        "move a slider": fastest(lambda: setattr(slider, "value", next(gamma))),
        "flip a switch": fastest(lambda: explorer.flip_turn(3)),
    }


def streaming(folder: Path, gigabytes: float) -> list[dict]:
    """Peak memory of a process that reads a large file, record by record."""
    make_run(folder / "long", iterations=1, episodes=128, turns=24)
    chunk = gzip.decompress((folder / "long/rollouts/000001.jsonl.gz").read_bytes())
    copies, made = max(1, round(gigabytes * 1e9 / len(chunk))), []
    for name, opened in (("jsonl", open), ("jsonl.gz", gzip.open)):
        path = folder / f"large.{name}"
        with opened(path, "wb", **({"compresslevel": 1} if name == "jsonl.gz" else {})) as file:
            for _ in range(copies):
                file.write(chunk)
        result = subprocess.run(
            [sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, check=True
        )
        path.unlink()
        count, before, peak, seconds = map(float, result.stdout.split())
        size = copies * len(chunk)
        made.append({"file": name, "bytes": size, "trajectories": int(count), "seconds": seconds,
                     "before_mb": before, "peak_mb": peak})  # fmt: skip
    return made


def report(result: dict) -> str:
    """The results as Markdown."""
    lines = [f"Measured on {result['machine']}, one core."]
    for title, part in (("150 iterations × 128 trajectories", "opening"),
                        ("200 trajectories × 50 turns", "sliders")):  # fmt: skip
        lines += ["", f"| {title} | time | multiple |", "|---|---|---|"]
        least = next(iter(result[part].values()))
        for name, seconds in result[part].items():
            lines.append(f"| {name} | {1000 * seconds:.3g} ms | {seconds / least:.1f} |")
    lines += ["", "| streamed record by record | trajectories | per second | peak memory "
              "| of which before the first |", "|---|---|---|---|---|"]  # fmt: skip
    for row in result["streaming"]:
        size = row["bytes"] / 1e6
        lines.append(
            f"| {size / 1000:.1f} GB of {row['file']} | {row['trajectories']:,} "
            f"| {size / row['seconds']:.0f} MB | {row['peak_mb']:.0f} MB "
            f"| {row['before_mb']:.0f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.1, help="size of the streamed file")
    parser.add_argument("--out", type=Path, help="write the numbers here, and README.md's tables")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "machine": machine(), "opening": opening(folder),
            "sliders": sliders(folder), "streaming": streaming(folder, given.gigabytes),
        }  # fmt: skip
    print(report(result))
    if given.out:
        publish(result, given.out, "inspectors.py", report(result))
