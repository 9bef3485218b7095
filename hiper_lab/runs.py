"""Runs: one papermill execution of ``notebooks/20_train.ipynb`` is one folder; sweeps; results.

``python -m hiper_lab.runs launch experiments/tiny_household.yaml`` checks every parameter before a
kernel starts, writes a manifest, follows the run with a progress bar, and resumes it if it was
interrupted. The folder holds config.json, manifest.json, metrics.jsonl, rollouts/, checkpoints/ and
the executed notebook.

``python -m hiper_lab.runs sweep experiments/hae_vs_gae.yaml --out runs/hae_vs_gae`` launches many,
several at a time, on this machine or a Ray cluster. The folders are the only state: the same
command goes on where it was stopped.

``python -m hiper_lab.runs refresh notebooks/02_*.ipynb`` executes the checked notebooks afresh and
stores them as they are committed.

Left out on purpose: schedulers, search over parameters, copying files between machines.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
import types
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import torch
import yaml
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from tqdm.auto import tqdm
from traitlets import default

import hiper_lab
from hiper_lab.records import read_metrics
from hiper_lab.results import ERROR, results, run_folder
from hiper_lab.train import RunFolder, TrainConfig, check_type, parameter_names
from hiper_lab.trajectory import Trajectory, read, save, write_atomic

NOTEBOOK = Path("notebooks") / "20_train.ipynb"
REPORT = Path("notebooks") / "21_report.ipynb"
_PACKAGES = ("torch", "transformers", "peft", "numpy", "pandas", "papermill")
_SHELL_NAMES = ("In", "Out", "exit", "quit", "open", "get_ipython")


def read_experiment(path: Path | str) -> dict[str, Any]:
    """Parameters of an experiment file.

    Raises:
        FileNotFoundError: If there is no such file, naming those that are there.
        ValueError: If it is not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise FileNotFoundError(f"no experiment {str(path)!r}; there are {there or 'none'}")
    try:
        parameters = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(parameters, dict):
        raise ValueError(
            f"{path} holds {type(parameters).__name__}, expected parameter: value lines"
        )
    return parameters


def notebook_parameters(names: dict[str, Any]) -> dict[str, Any]:
    """The training parameters among a notebook's variables: ``notebook_parameters(globals())``.

    Called right after the parameters cell, when nothing else is defined; whatever papermill
    injected that no one knows is therefore seen here and refused.

    Raises:
        ValueError: By ``TrainConfig.from_parameters``, when it is given the result.
    """
    return {
        name: value for name, value in names.items()
        if not name.startswith("_") and name not in (*_SHELL_NAMES, "run_folder")
        and not isinstance(value, (type, types.ModuleType, types.FunctionType))
    }  # fmt: skip


def manifest(config: TrainConfig) -> dict[str, Any]:
    """What a reader needs to repeat a run: code, packages, hardware, seed."""
    root = Path(hiper_lab.__file__).parent.parent
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hiper_lab": hiper_lab.__version__, "commit": described.stdout.strip() or None,
        "python": platform.python_version(), "system": platform.system(),
        "machine": platform.machine(), "cores": os.cpu_count(), "gpu": gpu, "seed": config.seed,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def summary(folder: Path | str) -> str:
    """One line: held-out success before and after.

    Raises:
        ValueError: If the run has no evaluation before and after.
    """
    metrics = read_metrics(folder)
    done = metrics.dropna(subset=["eval/success"]) if "eval/success" in metrics else metrics[:0]
    if len(done) < 2:
        raise ValueError(f"{folder} has {len(done)} evaluations, expected one before and one after")
    before, after = done["eval/success"].iloc[0], done["eval/success"].iloc[-1]
    games, minutes = int(done["eval/games"].iloc[-1]), metrics["time/total_s"].max() / 60
    return f"held-out success {before:.1%} -> {after:.1%} ({games} games, {minutes:.1f} min)"


def check(parameters: dict[str, Any], notebook: Path | str = NOTEBOOK) -> TrainConfig:
    """The configuration that these parameters of this notebook mean.

    Raises:
        ValueError: On a parameter that is unknown, ill-typed, or not declared by the notebook.
        FileNotFoundError: If there is no such notebook.
    """
    config = TrainConfig.from_parameters(parameters)
    _declared(parameters, notebook)
    return config


def _declared(parameters: dict[str, Any], notebook: Path | str) -> dict[str, str]:
    """The types that a notebook declares for its parameters, once it knows all of these."""
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"no notebook {str(notebook)!r}; run from the repository's root")
    declared = papermill.inspect_notebook(str(notebook))
    missing = sorted(set(parameters) - set(declared))
    if missing:
        raise ValueError(f"{notebook} declares no parameter {missing}; expected {sorted(declared)}")
    return {name: parameter["inferred_type_name"] for name, parameter in declared.items()}


def _execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    papermill.execute_notebook(
        str(notebook), str(executed), parameters, kernel_name="python3", progress_bar=False,
        store_widget_state=False, kernel_manager_class=_LocalKernel,
    )  # fmt: skip


def launch(
    parameters: dict[str, Any],
    folder: Path | str,
    notebook: Path | str = NOTEBOOK,
    bar: bool = True,
) -> Path:
    """Execute the training notebook by papermill into a run folder; resumes a run already there.

    Args:
        parameters: Flat training parameters; anything unknown or ill-typed is refused here.
        folder: The run's folder.
        bar: Show progress on stderr.

    Returns:
        Path of the executed notebook.

    Raises:
        ValueError: On a bad parameter, before anything is written or started.
        papermill.PapermillExecutionError: If a cell fails; the executed notebook shows where.
    """
    config = check(parameters, notebook)
    folder, notebook = Path(folder), Path(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        text = json.dumps(manifest(config), indent=1) + "\n"
        write_atomic(folder / "manifest.json", text.encode())
    executed = folder / notebook.name
    with _progress(folder, config.iterations, bar):
        _execute(notebook, executed, {**parameters, "run_folder": str(folder)})
    return executed


def refresh(path: Path | str) -> None:
    """Execute a notebook afresh, in its own folder, and store it as it is committed.

    One thread, as in the tests; no widget state, no time stamps. The file is replaced only if every
    cell succeeded.

    Raises:
        FileNotFoundError: If there is no such notebook.
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no notebook {str(path)!r}")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=None, coalesce_streams=True, record_timing=False,
        store_widget_state=False, resources={"metadata": {"path": str(path.parent)}},
        kernel_manager_class=_LocalKernel,
    )  # fmt: skip
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    write_atomic(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())


class _LocalKernel(AsyncKernelManager):
    """A kernel behind file sockets of its own, not TCP ports (which ipykernel warns about)."""

    @default("transport")
    def _file_socket(self) -> str:
        return "ipc"

    @default("ip")
    def _path_of_the_sockets(self) -> str:
        Path(jupyter_runtime_dir()).mkdir(parents=True, exist_ok=True)
        return str(Path(jupyter_runtime_dir()) / f"kernel-{uuid.uuid4().hex}")


@contextmanager
def _progress(folder: Path, iterations: int, bar: bool):
    """A progress bar that follows metrics.jsonl while another process writes it."""
    over = threading.Event()

    def follow() -> None:
        with tqdm(total=iterations, desc=str(folder), unit="it", smoothing=0.1) as drawn:
            while not over.wait(0.5):
                show(drawn)
            show(drawn)

    def show(bar: tqdm) -> None:
        try:
            metrics = read_metrics(folder)
        except ValueError:  # a line is being written
            return
        if not len(metrics):
            return
        at = int(metrics["iteration"].iloc[-1])
        if bar.n == 0 and at > 1:  # resumed: the rate counts from here
            bar.initial = at
        if at != bar.n:
            bar.update(at - bar.n)
        if "rollout/success" in metrics and at:
            latest = metrics["rollout/success"].tail(5).mean()
            bar.set_postfix_str(f"training success {latest:.0%}", refresh=False)

    thread = threading.Thread(target=follow if bar else over.wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# ---------------------------------------------------------------------------------------- results


def report(folder: Path | str, parameters: dict[str, Any] | None = None) -> Path:
    """Execute the report notebook over a folder of runs, into that folder.

    Args:
        folder: Where the runs are.
        parameters: Of the notebook, ``papermill --help-notebook notebooks/21_report.ipynb``.

    Returns:
        Path of the executed notebook; the page it wrote lies beside it.

    Raises:
        ValueError: Before a kernel starts: on a parameter that is unknown or ill-typed, a baseline
            that is no arm, or if there is no run.
        papermill.PapermillExecutionError: If a cell fails.
    """
    given, folder = {"folder": str(folder)} | (parameters or {}), Path(folder)
    kinds = {"str": str, "int": int, "list": list}
    for name, kind in _declared(given, REPORT).items():
        if name in given:
            check_type(name, given[name], kinds[kind])
    arms = set(results(folder)["arm"])
    if given.get("baseline", "") not in {"", *arms}:
        raise ValueError(f"baseline is {given['baseline']!r}, expected one of {sorted(arms)}")
    _execute(REPORT, folder / REPORT.name, given)
    return folder / REPORT.name


def keep(folder: Path | str, into: Path | str) -> list[Path]:
    """Copy what is worth committing of finished runs: some ten kilobytes of each.

    That is configuration, manifest, metrics, and the last recorded rollouts without their token
    ids, log-probabilities and lists of admissible actions.

    Raises:
        ValueError: If there is no finished run.
    """
    found = results(folder)
    names = found.loc[found["state"] == "finished", "run"]
    if not len(names):
        raise ValueError(f"no run below {str(folder)!r} is finished; {found['state'].tolist()}")
    for name in names:
        source, target = run_folder(folder, name), Path(into) / name
        for file in ("config.json", "manifest.json", "metrics.jsonl"):
            write_atomic(target / file, (source / file).read_bytes())
        for path in sorted((source / "rollouts").glob("[0-9]*.jsonl.gz"))[-1:]:
            slim = [_without_tokens(episode) for episode in read(path)]
            save(slim, target / "rollouts" / path.name)
    return [Path(into) / name for name in names]


def _without_tokens(episode: Trajectory) -> Trajectory:
    lists = {name: [] for name, value in vars(episode.turns[0]).items() if isinstance(value, list)}
    del lists["problems"]
    turns = [replace(turn, **lists) for turn in episode.turns]
    return replace(episode, turns=turns, final_prompt_ids=[])


# ----------------------------------------------------------------------------------------- sweeps


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


def read_sweep(path: Path | str, overrides: dict[str, Any] | None = None) -> Sweep:
    """Read a sweep and check every run of it, so that nothing starts that can not end.

    ``base``: an experiment file, parameters, or a list of both (later ones win). ``grid``: axes,
    all combinations of which are arms; an axis is a list of values of the parameter it is named
    after, or a mapping from names to parameters. ``seeds``: a list. ``notebook``: by default the
    training notebook. ``budget``: ``processes``, ``minutes``, ``gpus``.

    Args:
        overrides: Parameters put on top of the base.

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
    base: dict[str, Any] = {}
    for part in given["base"] if isinstance(given["base"], list) else [given["base"]]:
        if not isinstance(part, str | dict):
            raise ValueError(f"{path}: base has {part!r}, expected a file's name or parameters")
        base |= part if isinstance(part, dict) else read_experiment(part)
    base, arms = base | (overrides or {}), {}
    for options in itertools.product(*_axes(path, given["grid"])):
        chosen = {name: value for _, option in options for name, value in option.items()}
        if len(chosen) < sum(len(option) for _, option in options) or "seed" in chosen:
            raise ValueError(f"{path}: an axis sets seed, or two axes set the same of {[*chosen]}")
        arms["-".join(name for name, _ in options) or "base"] = base | chosen
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
    runs = {f"{arm}-seed{k}": p | {"seed": k} for arm, p in arms.items() for k in seeds}
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
    """
    folder, place = Path(folder), Path.cwd()
    processes = plan.processes if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes is {processes}, expected at least 1")
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


def _table(runs: pd.DataFrame) -> str:
    shown = runs.drop(columns=["arm", "seed"])
    return shown.to_string(index=False, float_format="%.3f", na_rep="", max_colwidth=60)


def _report(runs: pd.DataFrame, folder: Path) -> int:
    """Print what came of a sweep; the exit status."""
    print(_table(runs.drop(columns="error")))
    finished = (runs["state"] == "finished").all()
    for name in runs.loc[runs["state"] == "failed", "run"]:
        said = (folder / name / ERROR).read_text().splitlines()
        print(f"\n{folder / name / ERROR}:", *["…"] * (len(said) > 15), *said[-15:], sep="\n  ")
    if not finished:
        print("not all runs are finished; the same command tries again and resumes")
    return 0 if finished else 1


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m hiper_lab.runs", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("launch", help="run or resume an experiment by papermill")
    start.add_argument("experiment", help="a YAML file of parameters, see experiments/")
    start.add_argument("--out", help="run folder (default: runs/<experiment>-seed<seed>)")
    many = commands.add_parser("sweep", help="run or resume all runs of a sweep, several at a time")
    many.add_argument("experiment", metavar="sweep", help="a YAML file with base, grid and seeds")
    many.add_argument("--out", help="folder of the runs' folders (default: runs/<sweep>)")
    many.add_argument("--processes", type=int, help="runs at a time (default: the sweep's budget)")
    many.add_argument("--ray", action="store_true", help="as tasks of a Ray cluster")
    found = commands.add_parser("results", help="all runs below a folder, a line each")
    page = commands.add_parser("report", help="compare all runs below a folder, in one HTML page")
    kept = commands.add_parser("keep", help="copy what is worth committing of finished runs")
    for command in (found, page, kept):
        command.add_argument("folder")
    kept.add_argument("into")
    for command in (start, many, page):
        command.add_argument(
            "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="overrides",
            help="override a parameter; may be repeated",
        )  # fmt: skip
    show = commands.add_parser("summary", help="held-out success of finished runs, a line each")
    show.add_argument("folders", nargs="+", metavar="FOLDER")
    again = commands.add_parser("refresh", help="execute notebooks afresh, to be committed")
    again.add_argument("notebooks", nargs="+", metavar="NOTEBOOK")
    commands.add_parser("parameters", help="list all training parameters")
    args = parser.parse_args(arguments)
    if args.command == "parameters":
        print("\n".join(parameter_names()))
        return 0
    if args.command == "refresh":
        for path in args.notebooks:
            try:
                refresh(path)
            except (OSError, ValueError, CellExecutionError, DeadKernelError) as error:
                print(f"error: {path} is as it was: {error}", file=sys.stderr)
                return 1
            print(f"refreshed {path}")
        return 0
    try:
        if args.command == "summary":
            for folder in args.folders:
                print(f"{folder}: {summary(folder)}")
            return 0
        if args.command == "results":
            print(_table(results(args.folder)))
            return 0
        if args.command == "keep":
            print(*keep(args.folder, args.into), sep="\n")
            return 0
        overrides = {name: yaml.safe_load(value) for name, value in args.overrides}
        if args.command == "report":
            folder = Path(args.folder)
            print(f"executed notebook: {report(folder, overrides)}")
            return 0
        if args.command == "sweep":
            folder = Path(args.out or f"runs/{Path(args.experiment).stem}")
            plan = read_sweep(args.experiment, overrides)
            return _report(sweep(plan, folder, args.processes, args.ray), folder)
        parameters = read_experiment(args.experiment) | overrides
        if "grid" in parameters:
            raise ValueError(f"{args.experiment} is a sweep: python -m hiper_lab.runs sweep …")
        seed = parameters.get("seed", 0)
        folder = Path(args.out or f"runs/{Path(args.experiment).stem}-seed{seed}")
        executed = launch(parameters, folder)
        print(f"executed notebook: {executed}")
        print(summary(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DeadKernelError:
        print(f"error: the kernel died; what {folder} holds is safe", file=sys.stderr)
        print("the same command resumes", file=sys.stderr)
        return 1
    except papermill.PapermillExecutionError as error:
        print(f"error: {error.ename}: {error.evalue}", file=sys.stderr)
        print(f"see {folder / NOTEBOOK.name}; the same command resumes", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; nothing in {folder} is lost, the same command resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # under its own name, by which workers find what they are sent
    sys.exit(importlib.import_module("hiper_lab.runs").main())
