"""Sweeps: refused as a whole or not at all, several at a time, resumed; failures stop no other.

Most runs here are of a stand-in notebook that writes metrics without training anything.
"""

import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from hiper_lab import runs, sweeps
from hiper_lab.folder import sole_writer

PARAMETERS = """
run_folder: str = ""
seed: int = 0
iterations: int = 60
eval_games: int = 4
episodes: int = 1  # runs that have to be at work at the same time
max_turns: int = 9  # what happens at iteration 2, unless a file "mended" says otherwise
lr: float = 0.0  # seconds an iteration takes
gamma: float = 0.9
lam_low: float = 0.9
"""
BODY = """
import json, os, signal, time
from pathlib import Path
folder = Path(run_folder)
metrics = folder / "metrics.jsonl"
done = metrics.read_text().count("\\n") if metrics.exists() else 0
for i in range(done, iterations + 1):
    if i == 2 and not (folder.parent / "mended").exists():
        if max_turns == 1: raise RuntimeError("no luck")
        if max_turns == 2: os.kill(os.getpid(), signal.SIGKILL)
        if max_turns == 3: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)
    row = {"iteration": i, "pid": os.getpid()}
    row |= {"rollout/success": i / 10, "time/total_s": 6.0 * i} if i else {}
    row |= {"eval/success": gamma * i / iterations} if i in (0, iterations) else {}
    with metrics.open("a") as file: print(json.dumps(row), file=file)
    until = time.time() + 120
    while len(list(folder.parent.glob("*/metrics.jsonl"))) < episodes and time.time() < until:
        time.sleep(0.05)
    assert time.time() < until, "the other run did not start"
    time.sleep(lr)
"""


@pytest.fixture(autouse=True)
def _from_the_root(root, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def stand_in(tmp_path):
    """Write a sweep over the stand-in notebook."""
    tag = {"tags": ["parameters"]}
    cells = [new_code_cell(PARAMETERS.strip(), metadata=tag), new_code_cell(BODY)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "stand_in.ipynb")

    def write(**given):
        plan = {"notebook": str(tmp_path / "stand_in.ipynb"), "base": {}, "grid": {}, "seeds": [0]}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan | given, sort_keys=False))
        return tmp_path / "sweep.yaml"

    return write


def pids(folder):
    return set(pd.concat(map(runs.read_metrics, folder.glob("*-seed*")))["pid"])


def alive(pid: int) -> bool:
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def gone(pids, seconds: float = 60) -> bool:
    until = time.time() + seconds
    while any(map(alive, pids)) and time.time() < until:
        time.sleep(0.1)
    return not any(map(alive, pids))


# ---------------------------------------------------------------------------------------- reading


def test_the_committed_sweep_is_three_arms_by_three_seeds(root):
    plan = runs.read_sweep(root / "experiments" / "hae_vs_gae.yaml")
    assert list(plan.runs) == [
        f"{a}-seed{k}" for k in range(3) for a in ("hae", "hae_paper", "gae")
    ]
    configs = {name: sweeps.TrainConfig.from_parameters(p) for name, p in plan.runs.items()}
    said = {c.credit.lam_boundary for n, c in configs.items() if n.startswith("hae-seed")}
    assert said == {0.95} and configs["hae_paper-seed1"].credit.lam_boundary == 0
    assert configs["gae-seed2"].credit.estimator == "gae" and configs["gae-seed2"].seed == 2
    assert {(c.iterations, c.eval_games, c.eval_every) for c in configs.values()} == {(30, 200, 10)}
    base = runs.read_experiment("experiments/tiny_household.yaml")
    assert {c.lr for c in configs.values()} == {base["lr"]}


@pytest.mark.parametrize(
    "sweep",
    ["hae_vs_gae", "horizon", "horizon_arms", "horizon_fresh", "horizon_tiers", "horizon_shop"],
)
def test_the_committed_records_are_of_the_committed_sweep(sweep, root, tmp_path):
    """Otherwise nobody could repeat them; a sweep into their folder would find nothing to do."""
    plan = runs.read_sweep(f"experiments/{sweep}.yaml")
    # a copy: what may change within a run, as the size of micro-batches, is written down
    folder = shutil.copytree(root / "experiments" / "results" / sweep, tmp_path / sweep)
    for name, parameters in plan.runs.items():
        config = sweeps.TrainConfig.from_parameters(parameters)
        sweeps.RunFolder(folder / name, config)  # refuses another configuration
    table = runs.results(folder)
    assert set(table["run"]) == set(plan.runs) and (table["state"] == "finished").all()


def test_arms_are_all_combinations_of_the_axes(stand_in):
    named = {"slow": {"lr": 0.1, "gamma": 0.5}, "fast": {"lr": 0.2}}
    path = stand_in(base={"gamma": 0.8}, grid={"pace": named, "lam_low": [0.0, 1.0]}, seeds=[7, 8])
    plan = runs.read_sweep(path, {"gamma": 0.7, "iterations": 2})
    assert list(plan.runs) == [  # seed by seed
        f"{pace}-lam_low={lam}-seed{k}" for k in (7, 8) for pace in named for lam in ("0.0", "1.0")
    ]
    # what an arm says wins over -p, which wins over the base
    assert plan.runs["slow-lam_low=1.0-seed8"] == {
        "gamma": 0.5, "iterations": 2, "lr": 0.1, "lam_low": 1.0, "seed": 8
    }  # fmt: skip
    assert plan.runs["fast-lam_low=0.0-seed7"]["gamma"] == 0.7
    assert list(runs.read_sweep(stand_in()).runs) == ["base-seed0"]
    two = runs.read_sweep(stand_in(grid={"env_path": ["a b/c"]}, notebook=str(runs.NOTEBOOK)))
    assert list(two.runs) == ["env_path=a_b_c-seed0"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": [0]}, r"unknown \['seed'\] and lacks \[\]"),
        ({"base": 3}, "base has 3, expected a file's name or parameters"),
        ({"base": ["nowhere.yaml"]}, "no experiment 'nowhere.yaml'"),
        ({"base": {"gama": 1.0}}, "arm 'base': unknown parameter 'gama'; did you mean 'gamma'"),
        ({"base": {"clip": 0.1}}, "declares no parameter .'clip'."),
        ({"grid": {"lr": ["fast"]}}, "arm 'lr=fast': lr is 'fast' .str., expected float"),
        ({"grid": {"lr": 0.1}}, "lr is 0.1, expected a list of values"),
        ({"grid": {"lr": []}}, "lr is {}, expected a list"),
        ({"grid": {"arm": {"a/b": {"lr": 1.0}}}}, "expected a list of values, or plain names"),
        ({"grid": {"arm": {"a": 0.1}}}, "expected a list of values, or plain names"),
        ({"grid": [1]}, r"grid is \[1\], expected axes by name"),
        ({"grid": {"lr": [0.1], "arm": {"a": {"lr": 0.2}}}}, "two axes set the same"),
        ({"grid": {"seed": [0, 1]}}, "an axis sets seed"),
        ({"grid": {"arm": {"a": {}, "b": {"gamma": 0.98}}}}, "'a' and 'b' are the same config"),
        ({"seeds": []}, "seeds is .., expected each once"),
        ({"seeds": [0, 0]}, "seeds is .0, 0., expected each once"),
        ({"seeds": ["a"]}, "seeds is 'a' .str., expected int"),
        ({"notebook": "nowhere.ipynb"}, "no notebook 'nowhere.ipynb'"),
        ({"budget": {"hours": 1}}, "budget is .*expected a mapping of .*'minutes'"),
        ({"budget": {"processes": 0}}, "expected processes ≥ 1"),
        ({"budget": {"processes": 1.5}}, "processes is 1.5 .float., expected int"),
    ],
)
def test_a_bad_sweep_starts_nothing(stand_in, tmp_path, capsys, given, message):
    path = stand_in(**given)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        runs.read_sweep(path)
    assert runs.main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not (tmp_path / "out").exists()


def test_a_sweep_is_not_launched_as_one_run(stand_in, capsys):
    assert runs.main(["launch", str(stand_in())]) == 2
    assert "is a sweep: python -m hiper_lab.runs sweep" in capsys.readouterr().err


def test_a_folder_of_other_runs_is_refused(stand_in, tmp_path):
    path = stand_in(seeds=[0, 1])
    sweeps.RunFolder(
        tmp_path / "out" / "base-seed1", sweeps.TrainConfig.from_parameters({"seed": 1, "lr": 0.5})
    )
    with pytest.raises(ValueError, match="base-seed1 holds a run with another lr"):
        runs.sweep(runs.read_sweep(path), tmp_path / "out")
    assert not (tmp_path / "out" / "base-seed0").exists()


def test_two_sweeps_do_not_share_a_folder(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hiper_lab.folder.PATIENCE", 0.0)
    with sole_writer(tmp_path / "out"):
        assert runs.main(["sweep", str(stand_in()), "--out", str(tmp_path / "out")]) == 2
    assert "out is being written by process" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


# ---------------------------------------------------------------------------------------- running


def test_failures_are_listed_and_stop_no_other_run(stand_in, tmp_path, capsys):
    grid = {"arm": {"good": {"episodes": 2}, "bad": {"max_turns": 1}, "dead": {"max_turns": 2},
                    "lost": {"max_turns": 3}}}  # fmt: skip
    path, out = stand_in(grid=grid, budget={"processes": 2}), tmp_path / "out"
    command = ["sweep", str(path), "--out", str(out), "-p", "iterations", "4"]
    assert runs.main(command) == 1
    printed = capsys.readouterr()
    table = runs.results(out).set_index("arm")
    assert table["state"].to_dict() == {
        "good": "finished", "bad": "failed", "dead": "failed", "lost": "failed"
    }  # fmt: skip
    assert table["iteration"].to_dict() == {"good": 4, "bad": 1, "dead": 1, "lost": 1}
    assert table.loc["bad", "error"] == "RuntimeError: no luck"
    assert 'raise RuntimeError("no luck")' in printed.out and str(out / "bad-seed0") in printed.out
    assert "\x1b" not in (out / "bad-seed0" / "error.txt").read_text()
    assert "DeadKernelError" in table.loc["dead", "error"]
    assert "ended with exit code -9" in table.loc["lost", "error"]
    assert "0 running, 4 over, 3 failed" in printed.err.replace("\r", "\n").splitlines()[-1]
    assert "the same command tries again" in printed.out and gone(pids(out))

    kept = (out / "good-seed0" / "metrics.jsonl").stat()
    (out / "mended").touch()
    assert runs.main(command) == 0
    table = runs.results(out)
    assert (table["state"] == "finished").all() and not list(out.glob("*/error.txt"))
    assert (out / "good-seed0" / "metrics.jsonl").stat() == kept  # skipped, not run again
    for name in table["run"]:  # resumed, not repeated
        assert runs.read_metrics(out / name)["iteration"].tolist() == [0, 1, 2, 3, 4]


def test_two_runs_at_a_time_and_no_more(stand_in, tmp_path):
    plan = runs.read_sweep(
        stand_in(base={"episodes": 2, "lr": 0.2, "iterations": 3}, seeds=[0, 1, 2])
    )
    table = runs.sweep(plan, tmp_path / "out", processes=2)  # each waits until two are there
    assert (table["state"] == "finished").all()
    times = [
        (folder / "manifest.json").stat().st_mtime_ns for folder in tmp_path.glob("out/base-*")
    ]
    ends = [path.stat().st_mtime_ns for path in tmp_path.glob("out/base-*/metrics.jsonl")]
    assert max(times) > min(ends)  # the third began when one of the first two had ended
    with pytest.raises(ValueError, match="processes is 0"):
        runs.sweep(plan, tmp_path / "out", processes=0)


def test_a_spent_budget_ends_the_runs_and_keeps_what_they_did(stand_in, tmp_path):
    path = stand_in(base={"lr": 1000.0}, seeds=[0, 1], budget={"minutes": 0.001})
    out = tmp_path / "out"
    table = runs.sweep(runs.read_sweep(path), out)
    assert table["state"].tolist() == ["unfinished"] * 2 and (table["error"] == "").all()
    assert not (out / "base-seed1" / "manifest.json").exists()  # never started


def test_a_run_cut_short_after_training_is_taken_up_again(tmp_path):
    executed = tmp_path / "x.ipynb"
    assert not sweeps._cut_short(executed)
    executed.write_text('{"metadata": {"papermill": {"end_time": null}}}')
    assert sweeps._cut_short(executed)
    executed.write_text('{"metadata": {"papermill": {"end_time": "2026"}}}')
    assert not sweeps._cut_short(executed)
    executed.write_text('{"metadata": {"pap')
    assert sweeps._cut_short(executed)


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_run_behind_and_goes_on(stand_in, tmp_path):
    path, out = stand_in(base={"lr": 0.3, "iterations": 12, "episodes": 2}, seeds=[0, 1]), "out"
    path.write_text(path.read_text() + "budget: {processes: 2}\n")
    command = [sys.executable, "-m", "hiper_lab.runs", "sweep", str(path)]
    with (tmp_path / "log").open("wb") as log:
        started = subprocess.Popen([*command, "--out", str(tmp_path / out)], stderr=log)
    until = time.time() + 300
    while time.time() < until and started.poll() is None:
        if [len(runs.read_metrics(f)) > 2 for f in (tmp_path / out).glob("*-seed*")] == [True] * 2:
            break
        time.sleep(0.1)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert gone(pids(tmp_path / out)), (tmp_path / "log").read_text()
    assert (runs.results(tmp_path / out)["state"] == "unfinished").all()
    table = runs.sweep(runs.read_sweep(path), tmp_path / out)
    assert (table["state"] == "finished").all()
    for name in table["run"]:
        metrics = runs.read_metrics(tmp_path / out / name)
        assert metrics["iteration"].tolist() == list(range(13)) and metrics["pid"].nunique() == 2


@pytest.mark.slow
def test_one_worker_of_a_ray_cluster_is_killed_and_its_run_resumes(stand_in, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    psutil, out = pytest.importorskip("psutil"), tmp_path / "out"
    path = stand_in(base={"lr": 0.5, "iterations": 12, "episodes": 2}, seeds=[0, 1])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        killed = _kill_later(psutil, out / "base-seed1")
        table = runs.sweep(runs.read_sweep(path), out, processes=2, on_ray=True)
        killed.join()
    finally:
        ray.shutdown()
    assert (table["state"] == "finished").all()
    used = {name: runs.read_metrics(out / name)["pid"].nunique() for name in table["run"]}
    assert used == {"base-seed0": 1, "base-seed1": 2}
    for name in table["run"]:
        assert runs.read_metrics(out / name)["iteration"].tolist() == list(range(13))


def _kill_later(psutil, folder):
    """Kill the Ray worker above a run's kernel once the run is at work."""
    import threading

    def kill():
        while len(runs.read_metrics(folder)) < 3:
            time.sleep(0.1)
        psutil.Process(int(runs.read_metrics(folder)["pid"].iloc[0])).parent().kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread
