"""What a sweep adds to its runs: the same runs launched one after the other, and as a sweep.

Real runs of the embedded model, of one iteration, one at a time. The sweep's start (importing
everything once more, in the process that its runs are forked from) is part of what it costs.
"""

import tempfile
import time
from pathlib import Path

from hiper_lab.runs import Sweep, launch, read_experiment, sweep

RUNS = 3
SMALL = {"iterations": 1, "episodes": 4, "eval_games": 6, "max_turns": 6, "warmup_iterations": 1}


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def overhead() -> dict[str, float]:
    """Seconds per run, launched one after the other and in a sweep."""
    base = read_experiment("experiments/tiny_household.yaml") | SMALL
    runs = {f"run-seed{k}": base | {"seed": k} for k in range(RUNS)}
    plan = Sweep(Path("notebooks/20_train.ipynb"), runs)
    with tempfile.TemporaryDirectory() as folder:
        launch(base, Path(folder) / "first", bar=False)  # whatever only the first one pays for
        launched = timed(
            lambda: [launch(p, Path(folder) / name, bar=False) for name, p in runs.items()]
        )
        swept = timed(lambda: sweep(plan, Path(folder) / "sweep"))
    return {"runs": RUNS, "launched": launched / RUNS, "swept": swept / RUNS}


def main() -> None:
    took = overhead()
    launched, swept = took["launched"], took["swept"]
    print(f"a run, launched        {launched:5.1f} s")
    print(f"a run, in a sweep      {swept:5.1f} s   {swept / launched:.2f} times")
    print(f"overhead of the sweep  {swept - launched:5.1f} s per run (at most 5 wanted)")


if __name__ == "__main__":
    main()
