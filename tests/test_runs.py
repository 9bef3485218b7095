"""Runs by papermill: refused before a kernel starts, executed small, resumed, summarised."""

import inspect
import json
import typing

import nbformat
import pandas as pd
import papermill
import pytest

from hiper_lab import launcher, results, runs, sweeps, train
from hiper_lab.config import TrainConfig, parameter_names
from hiper_lab.folder import sole_writer

TINY = {
    "iterations": 2, "episodes": 4, "max_turns": 5, "eval_games": 4, "warmup_iterations": 1,
    "rollout_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _from_the_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture
def no_kernel(monkeypatch):
    def started(*_, **__):
        raise AssertionError("a kernel was started")

    monkeypatch.setattr(papermill, "execute_notebook", started)


def test_the_notebook_declares_every_parameter_with_the_codes_default():
    declared = papermill.inspect_notebook(str(runs.NOTEBOOK))
    assert set(declared) == {*parameter_names(), "run_folder"}
    own = TrainConfig.from_parameters({})
    names = {name: p for name, p in declared.items() if name != "run_folder"}
    values = {name: eval(p["default"]) for name, p in names.items()}
    assert TrainConfig.from_parameters(values) == own
    assert all(p["help"] and p["inferred_type_name"] != "None" for p in names.values())


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"iteration": 3}, "did you mean 'iterations'"),
        ({"iterations": "many"}, "iterations is 'many' .str., expected int"),
        ({"lam_boundary": 2.0}, "lam_boundary is 2.0"),
    ],
)
def test_bad_parameters_are_refused_before_a_kernel_starts(
    tmp_path, no_kernel, parameters, message
):
    with pytest.raises(ValueError, match=message):
        runs.launch(parameters, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_before_a_kernel_starts(
    tmp_path, no_kernel, monkeypatch, capsys
):
    monkeypatch.setattr("hiper_lab.folder.PATIENCE", 0.0)
    experiment = tmp_path / "x.yaml"
    experiment.write_text("iterations: 1\n")
    with sole_writer(tmp_path / "run"):
        assert runs.main(["launch", str(experiment), "--out", str(tmp_path / "run")]) == 2
    assert "is being written by process" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_the_command_line_says_what_is_wrong(tmp_path, no_kernel, capsys):
    experiment = tmp_path / "x.yaml"
    experiment.write_text("lr: [1]\n")
    assert runs.main(["launch", str(experiment), "--out", str(tmp_path / "run")]) == 2
    assert "lr is [1] (list), expected float" in capsys.readouterr().err
    experiment.write_text("- lr\n")
    assert runs.main(["launch", str(experiment)]) == 2
    assert "holds list, expected parameter: value lines" in capsys.readouterr().err
    assert runs.main(["launch", str(tmp_path / "y.yaml")]) == 2
    assert "no experiment" in capsys.readouterr().err and experiment.exists()


@pytest.mark.slow
def test_papermill_run_end_to_end(tmp_path, capsys, root):
    folder, experiment = tmp_path / "run", tmp_path / "x.yaml"
    experiment.write_text(json.dumps(TINY))
    assert runs.main(["launch", str(experiment), "--out", str(folder), "-p", "seed", "3"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("held-out success ") and "% (4 games, 0." in last and " -> " in last
    executed = folder / "20_train.ipynb"
    notebook = nbformat.read(executed, 4)
    assert executed.stat().st_size < 200_000 and "widgets" not in notebook.metadata
    assert all(c.get("execution_count") for c in notebook.cells if c.cell_type == "code")
    shown = json.dumps(notebook)
    assert shown.count("application/vnd.plotly.v1+json") == 3 and "Warning" not in shown
    said = json.loads((folder / "manifest.json").read_text())
    assert said["seed"] == 3 and said["packages"]["torch"]
    metrics = runs.read_metrics(folder)
    assert metrics["iteration"].tolist() == [0, 1, 2]
    before = (folder / "metrics.jsonl").read_bytes()
    assert runs.main(["launch", str(experiment), "--out", str(folder), "-p", "seed", "3"]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before  # already done: nothing was repeated
    assert capsys.readouterr().out.strip().splitlines()[-1] == last
    # the same folder with another configuration fails with a reason, and loses nothing
    assert runs.main(["launch", str(experiment), "--out", str(folder), "-p", "seed", "4"]) == 1
    assert "another seed" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_parameter_that_papermill_only_warns_about_is_refused_in_the_notebook():
    injected = {"lr": 0.1, "learning_rate": 0.1, "json": json, "_": 1, "run_folder": "x", "In": []}
    found = runs.notebook_parameters(injected)
    assert found == {"lr": 0.1, "learning_rate": 0.1}
    with pytest.raises(ValueError, match="unknown parameter 'learning_rate'"):
        TrainConfig.from_parameters(found)


def test_an_unfinished_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n{"iterat')
    assert runs.read_metrics(tmp_path)["iteration"].tolist() == [0]
    with pytest.raises(ValueError, match="no finished iteration, expected at least one"):
        runs.summary(tmp_path)
    line = '{"iteration": %d, "rollout/success": %.1f, "time/total_s": 60}\n'
    (tmp_path / "metrics.jsonl").write_text(line % (1, 0.2) + line % (2, 0.5))
    said = runs.summary(tmp_path)
    assert said == "training success 20.0% -> 50.0% (not evaluated, 1.0 min)"


def test_refresh_executes_strips_and_replaces_only_on_success(tmp_path, capsys):
    cells = [
        nbformat.v4.new_code_cell("import pathlib\nprint(pathlib.Path('beside.txt').read_text())"),
        nbformat.v4.new_code_cell("import os\nprint('threads', os.environ['OMP_NUM_THREADS'])"),
        nbformat.v4.new_code_cell("import ipywidgets\nipywidgets.IntSlider()"),
    ]
    path = tmp_path / "01_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {"a": {}}}), path)
    (tmp_path / "beside.txt").write_text("found")
    assert runs.main(["refresh", str(path)]) == 0
    notebook = nbformat.read(path, 4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3]
    shown = [cell.outputs[0].text for cell in notebook.cells[:2]]
    assert shown == ["found\n", "threads 1\n"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not any(cell.metadata for cell in notebook.cells)
    notebook.cells[0].source = "raise KeyError('no such thing')"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    assert runs.main(["refresh", str(path)]) == 1
    assert "no such thing" in capsys.readouterr().err and path.read_bytes() == before
    assert runs.main(["refresh", str(tmp_path / "02_y.ipynb")]) == 1
    assert "no notebook" in capsys.readouterr().err


def test_small_rates_keep_their_digits_in_a_table():
    rows = pd.DataFrame({"run": ["a"], "arm": ["a"], "seed": [0], "lr": [2e-4], "success": [0.5]})
    assert runs._table(rows).split()[-3:] == ["a", "2.0e-04", "0.500"]


def test_public_functions_are_documented():
    for module in (runs, launcher, sweeps, results, train):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert function.__doc__ and typing.get_type_hints(function), name
