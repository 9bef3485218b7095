"""Runs: the command line, and what one does with runs in one place.

- ``python -m hiper_lab.runs launch experiments/tiny_household.yaml``: one run, by papermill.
- ``… sweep experiments/hae_vs_gae.yaml --out runs/hae_vs_gae``: many, several at a time.
- ``… results FOLDER`` and ``… report FOLDER``: what came of them, as a table and as a page.
- ``… budget experiments/*.yaml``: what they would cost on GPUs.
- ``… keep FOLDER INTO``: what of them is worth committing.
- ``… refresh notebooks/02_*.ipynb``: executes the checked notebooks afresh, as they are committed.

Left out on purpose: everything that is done there (see launcher, sweeps, results).
"""

import argparse
import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
import yaml
from nbclient.exceptions import CellExecutionError, DeadKernelError

from hiper_lab import budget
from hiper_lab.config import TrainConfig, check_type, parameter_names
from hiper_lab.launcher import (
    NOTEBOOK,
    declared,
    execute,
    helping,
    launch,
    manifest,
    notebook_parameters,
    read_experiment,
    refresh,
)
from hiper_lab.records import read_metrics
from hiper_lab.results import ERROR, compare, curves, published, results, run_folder
from hiper_lab.sweeps import Sweep, read_sweep, sweep
from hiper_lab.trajectory import Trajectory, read, save, write_atomic

__all__ = [
    "NOTEBOOK", "Sweep", "compare", "configurations", "curves", "keep", "launch", "manifest",
    "notebook_parameters", "published", "read_experiment", "read_metrics", "read_sweep", "refresh",
    "report", "results", "summary", "sweep",
]  # fmt: skip
REPORT = Path("notebooks") / "21_report.ipynb"


def configurations(
    path: Path | str, overrides: dict[str, Any] | None = None, base: Path | str | None = None
) -> dict[str, TrainConfig]:
    """The configuration of every run of a file, by the run's name: of a sweep or an experiment.

    Args:
        overrides: Parameters put on top.
        base: As for `read_sweep`; an experiment ignores it.
    """
    parameters = read_experiment(path)
    if "grid" in parameters:
        runs = read_sweep(path, overrides, base).runs
    else:
        runs = {Path(path).stem: parameters | (overrides or {})}
    return {name: TrainConfig.from_parameters(given) for name, given in runs.items()}


def summary(folder: Path | str) -> str:
    """One line: held-out success before and after; without evaluations, that of the training.

    Raises:
        ValueError: If the run has not come to an iteration yet.
    """
    metrics = read_metrics(folder)
    done = metrics.dropna(subset=["eval/success"]) if "eval/success" in metrics else metrics[:0]
    played = metrics.dropna(subset=["rollout/success"]) if "rollout/success" in metrics else done
    if not len(played):
        raise ValueError(f"{folder} has no finished iteration, expected at least one")
    minutes = metrics["time/total_s"].max() / 60
    if len(done) < 2:
        first, last = played["rollout/success"].iloc[[0, -1]]
        return f"training success {first:.1%} -> {last:.1%} (not evaluated, {minutes:.1f} min)"
    before, after = done["eval/success"].iloc[0], done["eval/success"].iloc[-1]
    games = int(done["eval/games"].iloc[-1])
    return f"held-out success {before:.1%} -> {after:.1%} ({games} games, {minutes:.1f} min)"


def report(folder: Path | str, parameters: dict[str, Any] | None = None) -> Path:
    """Execute the report notebook over a folder of runs, into that folder.

    Args:
        folder: Where the runs are.
        parameters: Of the notebook, ``papermill --help-notebook notebooks/21_report.ipynb``.

    Returns:
        Path of the executed notebook; the page it wrote lies beside it.

    Raises:
        ValueError: Before a kernel starts: on a parameter that is unknown or ill-typed, a baseline
            that is no arm, or if there is nothing to report yet.
        papermill.PapermillExecutionError: If a cell fails.
    """
    given, folder = {"folder": str(folder)} | (parameters or {}), Path(folder)
    kinds = {"str": str, "int": int, "float": float, "list": list}
    for name, kind in declared(given, REPORT).items():
        if name in given:
            check_type(name, given[name], kinds[kind])
    found = results(folder)
    if not found["iteration"].any():
        raise ValueError(f"no run below {str(folder)!r} has finished an iteration")
    arms = set(found["arm"])
    if given.get("baseline", "") not in {"", *arms}:
        raise ValueError(f"baseline is {given['baseline']!r}, expected one of {sorted(arms)}")
    execute(REPORT, folder / REPORT.name, given)
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
            if (source / file).exists():  # a run that was not launched has no manifest
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


def _table(runs: pd.DataFrame) -> str:
    shown = runs.drop(columns=["arm", "seed"])
    return shown.to_string(index=False, float_format=_short, na_rep="", max_colwidth=60)


def _short(number: float) -> str:
    """Three decimals; a rate like 0.0002 keeps its digits."""
    return f"{number:.3f}" if number == 0 or abs(number) >= 0.001 else f"{number:.1e}"


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
    cost = commands.add_parser("budget", help="estimate tokens, GPU-hours and memory of studies")
    cost.add_argument("experiments", nargs="+", metavar="FILE", help="experiments or sweeps")
    cost.add_argument("--lengths", type=float, nargs=3, metavar=("TURNS", "PROMPT", "RESPONSE"),
                      help="means of turns per episode, and of tokens read and written per turn "
                      "(default: typical of the environment)")  # fmt: skip
    cost.add_argument("--utilisation", type=float, default=budget.GPU().utilisation,
                      help="share of an H100's peak in use (default: %(default)s)")  # fmt: skip
    cost.add_argument("--gpus", type=int, default=1, help="GPUs of a run (default: 1)")
    found = commands.add_parser("results", help="all runs below a folder, a line each")
    page = commands.add_parser("report", help="compare all runs below a folder, in one HTML page")
    kept = commands.add_parser("keep", help="copy what is worth committing of finished runs")
    for command in (found, page, kept):
        command.add_argument("folder")
    kept.add_argument("into")
    for command in (many, cost):
        command.add_argument("--base", help="an experiment file instead of the sweep's own base")
    for command in (start, many, page, cost):
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
        if args.command == "budget":
            gpu = budget.GPU(utilisation=args.utilisation)
            lengths = budget.Lengths(*args.lengths) if args.lengths else None
            print(budget.table({
                Path(path).stem: [
                    budget.estimate(config, lengths, gpu, args.gpus)
                    for config in configurations(path, overrides, args.base).values()
                ] for path in args.experiments
            }))  # fmt: skip
            return 0
        if args.command == "sweep":
            folder = Path(args.out or f"runs/{Path(args.experiment).stem}")
            plan = read_sweep(args.experiment, overrides, args.base)
            return _report(sweep(plan, folder, args.processes, args.ray), folder)
        parameters = read_experiment(args.experiment) | overrides
        if "grid" in parameters:
            raise ValueError(f"{args.experiment} is a sweep: python -m hiper_lab.runs sweep …")
        seed = parameters.get("seed", 0)
        folder = Path(args.out or f"runs/{Path(args.experiment).stem}-seed{seed}")
        executed = launch(parameters, folder)
        if helping():
            return 0
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
