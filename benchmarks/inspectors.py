"""How long a reader waits for an inspector, and what streaming a large record file takes.

A run of 150 iterations of 128 trajectories is made up first. Times are the fastest of several
repetitions, in one process; each is also given as a multiple of the least there is to do: parsing
the JSON of one iteration (opening), or computing the credit (a slider). ``--gigabytes 2`` streams a
file of that size instead of a small one.
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

from recorded import make_run

from hiper_lab.credit import CreditConfig, estimate
from hiper_lab.trajectory import to_grid, to_values
from hiper_lab.widgets import CreditExplorer, TrajectoryInspector

STREAM = r"""
import re, sys
from hiper_lab.trajectory import read
# (ru_maxrss would start from the parent's)
peak = lambda: int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
count = sum(1 for _ in read(sys.argv[1]))
print(count, before, peak())
"""


def fastest(act, repetitions: int = 5) -> float:
    """Seconds of the fastest repetition."""
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return min(times)


def line(name: str, seconds: float, least: float) -> None:
    print(f"{name:<58} {1000 * seconds:7.0f} ms  {seconds / least:6.1f} x")


def inspectors(folder: Path) -> None:
    """Opening the large run, then selecting in it."""
    make_run(folder / "big", iterations=3, episodes=128, turns=24)
    file = folder / "big/rollouts/000003.jsonl.gz"
    for i in range(4, 151):
        shutil.copy(file, file.with_name(f"{i:06d}.jsonl.gz"))

    def parse() -> None:
        with gzip.open(file) as lines:
            for record in lines:
                json.loads(record)

    least = fastest(parse)
    print("150 iterations x 128 trajectories, multiples of parsing one iteration's JSON")
    inspector = TrajectoryInspector(folder / "big")
    line("first view", fastest(lambda: TrajectoryInspector(folder / "big")), least)
    for name, control, values in (
        ("select a turn", inspector.turn, range(1, 6)),
        ("select a trajectory", inspector.listing, [f"{i:04d}" for i in range(1, 6)]),
        ("select another iteration (read from disk)", inspector.iteration, range(100, 105)),
        ("search all texts", inspector.search, ("mug", "desk", "plate", "book", "shelf")),
    ):
        left = iter(values)
        line(name, fastest(lambda c=control, v=left: setattr(c, "value", next(v))), least)


def sliders(folder: Path) -> None:
    """Live credit for 200 trajectories of 50 turns."""
    explorer = CreditExplorer(make_run(folder / "wide", iterations=1, episodes=200, turns=50))
    made = explorer.trajectories
    grid, values, config = to_grid(made), to_values(made), CreditConfig.lab()
    least = fastest(lambda: estimate(grid, values, config), 20)
    print("200 trajectories x 50 turns, multiples of computing the credit alone")
    gamma = iter([0.9 + 0.005 * i for i in range(9)])
    slider = explorer.sliders["gamma"]
    line("credit, both configurations", fastest(explorer.compute), least)
    line("move a slider", fastest(lambda: setattr(slider, "value", next(gamma))), least)
    line("flip a switch", fastest(lambda: explorer.flip_turn(3)), least)


def streaming(folder: Path, gigabytes: float) -> None:
    """Peak memory of a process that reads a large file, record by record."""
    make_run(folder / "long", iterations=1, episodes=128, turns=24)
    chunk = gzip.decompress((folder / "long/rollouts/000001.jsonl.gz").read_bytes())
    copies = max(1, round(gigabytes * 1e9 / len(chunk)))
    for name, opened in (("plain", open), ("gz", gzip.open)):
        path = folder / ("large.jsonl" + (".gz" if name == "gz" else ""))
        with opened(path, "wb", **({"compresslevel": 1} if name == "gz" else {})) as file:
            for _ in range(copies):
                file.write(chunk)
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", STREAM, str(path)], capture_output=True, text=True, check=True
        )
        count, before, peak = map(float, result.stdout.split())
        size = copies * len(chunk) / 1e9
        rate = size * 1000 / (time.perf_counter() - started)
        print(
            f"streaming {size:.1f} GB ({name}): {count:.0f} trajectories, {rate:.0f} MB/s, peak "
            f"{peak:.0f} MB, of which {before:.0f} MB before the first"
        )
        path.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.1, help="size of the streamed file")
    gigabytes = parser.parse_args().gigabytes
    with tempfile.TemporaryDirectory() as folder:
        inspectors(Path(folder))
        sliders(Path(folder))
        streaming(Path(folder), gigabytes)
