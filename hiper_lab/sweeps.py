"""Many runs of one notebook: arms by seeds, several at a time, on this machine or a Ray cluster.

The folders of the runs are the only state: a sweep that was stopped, killed or spent its budget
goes on where it was, and skips what is finished. A run that fails leaves an ``error.txt`` and stops
no other.

Left out on purpose: schedulers, search over parameters, copying files between machines.
"""

import importlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
from tqdm.auto import tqdm

from hiper_lab.config import TrainConfig, check_type
from hiper_lab.folder import RunFolder, sole_writer
from hiper_lab.launcher import NOTEBOOK, check, launch, read_experiment
from hiper_lab.results import ERROR, results
from hiper_lab.trajectory import write_atomic


@dataclass(frozen=True)
class Sweep:
    """Many runs of one notebook, as `read_sweep` found them to be sound."""

    notebook: Path
    runs: dict[str, dict[str, Any]]
    """Parameters by the name of the run's folder, ``<arm>-seed<k>``."""
    processes: int = 1
    """Runs at a time."""
    minutes: float = 0.0
    """Wall-clock time of the whole sweep, after which it is stopped; 0: no limit."""
    gpus: float = 0.0
    """GPUs per run, for Ray's placement; without Ray every run sees all."""


def read_sweep(
    path: Path | str, overrides: dict[str, Any] | None = None, base: Path | str | None = None
) -> Sweep:
    """Read a sweep and check every run of it, so that nothing starts that can not end.

    ``base``: an experiment file, parameters, or a list of both (later ones win). ``grid``: axes,
    all combinations of which are arms; an axis is a list of values of the parameter it is named
    after, or a mapping from names to parameters. ``seeds``: a list. ``notebook``: by default the
    training notebook. ``budget``: ``processes``, ``minutes``, ``gpus``.

    Args:
        overrides: Parameters put on top of the base.
        base: An experiment file instead of the sweep's own base: the same arms at another scale.

    Raises:
        FileNotFoundError: If the file, its base or its notebook is not there.
        ValueError: On an unknown key or parameter, a value of a wrong type, two axes that set the
            same parameter, or two arms that are the same.
    """
    given, needed = read_experiment(path), {"base", "grid", "seeds"}
    lacks, odd = sorted(needed - set(given)), sorted(set(given) - needed - {"notebook", "budget"})
    if lacks or odd:
        raise ValueError(
            f"{path} has unknown {odd} and lacks {lacks}; a sweep has {sorted(needed)}, and may "
            "have notebook and budget"
        )
    parts = given["base"] if base is None else str(base)
    common: dict[str, Any] = {}
    for part in parts if isinstance(parts, list) else [parts]:
        if not isinstance(part, str | dict):
            raise ValueError(f"{path}: base has {part!r}, expected a file's name or parameters")
        common |= part if isinstance(part, dict) else read_experiment(part)
    common, arms = common | (overrides or {}), {}
    for options in itertools.product(*_axes(path, given["grid"])):
        chosen = {name: value for _, option in options for name, value in option.items()}
        if len(chosen) < sum(len(option) for _, option in options) or "seed" in chosen:
            raise ValueError(f"{path}: an axis sets seed, or two axes set the same of {[*chosen]}")
        arms["-".join(name for name, _ in options) or "base"] = common | chosen
    seeds = check_type("seeds", given["seeds"], tuple[int, ...])
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds is {list(seeds)}, expected each once, at least one")
    notebook, seen = Path(str(given.get("notebook", NOTEBOOK))), {}
    for arm, parameters in arms.items():
        try:
            config = check(parameters | {"seed": seeds[0]}, notebook)
        except ValueError as error:
            raise ValueError(f"{path}, arm {arm!r}: {error}") from error
        if (twin := seen.setdefault(str(config), arm)) != arm:
            raise ValueError(f"{path}: arms {twin!r} and {arm!r} are the same configuration")
    # seed by seed: a budget that ends early has treated every arm alike
    runs = {f"{arm}-seed{k}": p | {"seed": k} for k in seeds for arm, p in arms.items()}
    budget, kinds = given.get("budget") or {}, {"processes": int, "minutes": float, "gpus": float}
    if not isinstance(budget, dict) or set(budget) - set(kinds):
        raise ValueError(f"{path}: budget is {budget}, expected a mapping of {sorted(kinds)}")
    budget = {name: check_type(name, value, kinds[name]) for name, value in budget.items()}
    if budget.get("processes", 1) < 1 or min(budget.values(), default=0) < 0:
        raise ValueError(f"{path}: budget is {budget}, expected processes ≥ 1 and nothing negative")
    return Sweep(notebook, runs, **budget)


def _axes(path: Path | str, grid: Any) -> list[list[tuple[str, dict[str, Any]]]]:
    """Each axis as (name, parameters) of its options."""
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: grid is {grid!r}, expected axes by name (or {{}}: a single arm)")
    axes = []
    for axis, options in grid.items():
        if isinstance(options, list):
            options = {re.sub(r"[^\w.=+-]", "_", f"{axis}={x}"): {axis: x} for x in options}
        named = list(options.items()) if isinstance(options, dict) else []
        plain = all(re.fullmatch(r"[\w.=+-]+", str(n)) and isinstance(o, dict) for n, o in named)
        if not named or not plain:
            raise ValueError(
                f"{path}: {axis} is {options!r}, expected a list of values, or plain names each "
                "with its parameters"
            )
        axes.append([(str(name), option) for name, option in named])
    return axes


def attempt(parameters: dict[str, Any], folder: Path, notebook: Path, place: Path) -> None:
    """`launch` in a worker: a failure is left in the run's folder, as ``error.txt``.

    Args:
        place: The folder to work in; relative paths mean the same in every worker.
    """
    os.chdir(place)
    (folder / ERROR).unlink(missing_ok=True)
    try:
        launch(parameters, folder, notebook, bar=False)
    except papermill.PapermillExecutionError as error:  # its text is the cell and its traceback
        _failed(folder, re.sub(r"\x1b\[[\d;]*m", "", str(error)))
    except Exception:
        _failed(folder, traceback.format_exc())


def _failed(folder: Path, why: str) -> None:
    write_atomic(folder / ERROR, (why.strip() + "\n").encode())


class _Processes:
    """Runs in processes of this machine. They are forked from one that has imported everything."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hiper_lab.train", "papermill"])
        self.running: dict[str, multiprocessing.Process] = {}

    def start(self, name: str, *arguments: Any) -> None:
        self.running[name] = self.context.Process(target=_detached, args=arguments)
        self.running[name].start()

    def ended(self, seconds: float) -> dict[str, str]:
        """Runs that ended meanwhile, with what happened to their process ("": nothing)."""
        multiprocessing.connection.wait([p.sentinel for p in self.running.values()], seconds)
        over = [name for name, process in self.running.items() if process.exitcode is not None]
        codes = {name: self.running.pop(name).exitcode for name in over}
        said = "its process ended with exit code {} (negative: killed by that signal)"
        return {name: said.format(code) if code else "" for name, code in codes.items()}

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()  # its kernel sees that and ends; what the folder holds is whole
            process.join()


def _detached(*arguments: Any) -> None:
    os.setsid()  # Ctrl-C is for the sweep, which then ends its runs
    threading.Thread(target=_follow_parent, daemon=True).start()
    attempt(*arguments)


def _follow_parent() -> None:
    """A sweep that was killed leaves no run behind, which its successor would start again."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _Ray:
    """Runs as tasks of a Ray cluster ($RAY_ADDRESS, or one here) that shares our file system.

    A task whose worker or machine is lost starts again elsewhere, and resumes its folder.
    """

    def __init__(self, gpus: float):
        try:
            self.ray = importlib.import_module("ray")
        except ImportError as error:
            raise ValueError('ray is not installed; pip install "hiper-lab[ray]"') from error
        self.ray.init(ignore_reinit_error=True, log_to_driver=False)
        self.task = self.ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(attempt)
        self.running: dict[Any, str] = {}

    def start(self, name: str, *arguments: Any) -> None:
        self.running[self.task.options(name=name).remote(*arguments)] = name

    def ended(self, seconds: float) -> dict[str, str]:
        over = {}
        for reference in self.ray.wait(list(self.running), timeout=seconds)[0]:
            try:
                over[self.running.pop(reference)] = self.ray.get(reference) or ""
            except self.ray.exceptions.RayError as error:
                over[self.running.pop(reference)] = f"Ray: {error}"
        return over

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)


def sweep(
    plan: Sweep, folder: Path | str, processes: int | None = None, on_ray: bool = False
) -> pd.DataFrame:
    """Run what is not finished of a sweep, several runs at a time; a failed run stops no other.

    Args:
        folder: Of the runs' folders.
        processes: Runs at a time; None is the sweep's own budget.
        on_ray: As tasks of a Ray cluster instead of processes here.

    Returns:
        `results` of these runs.

    Raises:
        ValueError: Before anything starts: if a folder holds a run with another configuration.
        BlockingIOError: Before anything starts: if another sweep runs in the folder.
    """
    processes = plan.processes if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes is {processes}, expected at least 1")
    with sole_writer(folder):
        return _sweep(plan, Path(folder), processes, on_ray)


def _sweep(plan: Sweep, folder: Path, processes: int, on_ray: bool) -> pd.DataFrame:
    place = Path.cwd()
    configs = {name: TrainConfig.from_parameters(p) for name, p in plan.runs.items()}
    for name in sorted(configs, key=lambda name: not (folder / name / "config.json").exists()):
        RunFolder(folder / name, configs[name])
    state = results(folder).set_index("run")["state"]
    waiting = [
        name for name in plan.runs
        if state[name] != "finished" or _cut_short(folder / name / plan.notebook.name)
    ]  # fmt: skip
    # two runs that each take all cores are slower than one after the other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    workers = _Ray(plan.gpus) if on_ray else _Processes()
    over, started, failed = set(plan.runs) - set(waiting), time.monotonic(), 0
    total = sum(config.iterations for config in configs.values())

    def at() -> int:
        """Iterations done, of all runs; one that ended early counts in full."""
        return sum(
            c.iterations if name in over else min(c.iterations, _iteration(folder / name))
            for name, c in configs.items()
        )

    with tqdm(total=total, initial=at(), unit="it", desc=folder.name) as bar:
        try:
            while waiting or workers.running:
                if 0 < plan.minutes * 60 < time.monotonic() - started:
                    break
                while waiting and len(workers.running) < processes:
                    name = waiting.pop(0)
                    own = plan.runs[name], (folder / name).resolve(), plan.notebook.resolve()
                    workers.start(name, *own, place)
                for name, what in workers.ended(1.0).items():
                    over.add(name)
                    if what:
                        _failed(folder / name, what)
                    failed += (folder / name / ERROR).exists()
                before, bar.n = (bar.n, bar.postfix), at()
                said = f"{len(workers.running)} running, {len(over)} over, {failed} failed"
                bar.set_postfix_str(said, refresh=before != (bar.n, said))
        finally:
            workers.stop()
    found = results(folder)
    return found[found["run"].isin(plan.runs)].reset_index(drop=True)


def _cut_short(executed: Path) -> bool:
    """True for an executed notebook that papermill did not come to the end of."""
    if not executed.exists():  # a record kept without it
        return False
    try:
        return not json.loads(executed.read_text())["metadata"]["papermill"]["end_time"]
    except ValueError:  # killed while it was written
        return True


def _iteration(folder: Path) -> int:
    """The iteration a run is at, from the lines of its metrics (the first one is iteration 0)."""
    metrics = folder / "metrics.jsonl"
    return max(0, metrics.read_bytes().count(b"\n") - 1) if metrics.exists() else 0
