"""Results of many runs: the states a run can be in, the numbers of each, and who beats whom."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from hiper_lab import figures, results, stats
from hiper_lab.config import TrainConfig
from hiper_lab.folder import RunFolder


@pytest.fixture
def run(tmp_path):
    """Write a run's files: its configuration, then success of training, and held-out at points."""

    def write(name, training=(), held_out=None, error="", minutes=1.0, **parameters):
        folder = tmp_path / name
        RunFolder(folder, TrainConfig.from_parameters({"iterations": 2} | parameters))
        lines = []
        for i, success in enumerate([None, *training]):
            row = {"iteration": i}
            row |= {"rollout/success": success, "time/total_s": 60.0 * minutes * i} if i else {}
            if i in (held_out or {}):
                won = held_out[i]
                row |= {"eval/success": won, "eval/success_low": won - 0.1}
                row |= {"eval/success_high": won + 0.1, "eval/games": 50}
            lines.append(json.dumps(row) + "\n")
        if held_out is not None:
            (folder / "metrics.jsonl").write_text("".join(lines))
        if error:
            (folder / results.ERROR).write_text(error)
        return folder

    return write


def test_one_row_per_run_with_what_differs_and_how_it_went(run, tmp_path):
    run("a-seed0", [0.2, 0.4], {0: 0.1, 2: 0.5}, gamma=0.9)
    run("a-seed1", [0.2], {0: 0.1}, seed=1, gamma=0.9)
    run("deep/b-seed0", held_out=None, env_tasks=["look_at_obj_in_light"])
    table = results.results(tmp_path)
    assert table["run"].tolist() == ["a-seed0", "a-seed1", "deep/b-seed0"]
    assert table["arm"].tolist() == ["a", "a", "deep/b"]
    assert list(table)[:5] == ["run", "arm", "seed", "env_tasks", "gamma"]
    assert table["gamma"].tolist() == [0.9, 0.9, 0.98] and table["seed"].tolist() == [0, 1, 0]
    assert table["state"].tolist() == ["finished", "unfinished", "unfinished"]
    assert table["iteration"].tolist() == [2, 1, 0]
    done = table.iloc[0]
    assert done[["before", "success", "low", "high"]].tolist() == [0.1, 0.5, 0.4, 0.6]
    assert done["auc"] == pytest.approx(0.3) and done["minutes"] == 2
    assert table.iloc[1][["before", "minutes"]].tolist() == [0.1, 1]
    assert table.iloc[1:][["success", "low", "auc"]].isna().all(axis=None)


def test_when_a_run_is_finished(run, tmp_path):
    """At its last iteration or its time limit, after the evaluation that it was asked for."""
    run("all", [0.1, 0.2], {0: 0.1, 2: 0.5})
    run("not-evaluated", [0.1, 0.2], {0: 0.1})
    run("no-games", [0.1, 0.2], {}, eval_games=0)
    run("halfway", [0.1], {0: 0.1, 1: 0.4})
    run("out-of-time", [0.1], {0: 0.1, 1: 0.4}, max_minutes=1.0)
    run("in-time", [0.1], {0: 0.1, 1: 0.4}, max_minutes=1.1)
    run("nothing", [], {0: 0.3}, iterations=0)
    run("failed", [0.1, 0.2], {0: 0.1, 2: 0.5}, error="Traceback\nValueError: too late\n")
    table = results.results(tmp_path).set_index("run")
    assert table["state"].to_dict() == {
        "all": "finished", "failed": "failed", "halfway": "unfinished", "in-time": "unfinished",
        "no-games": "finished", "not-evaluated": "unfinished", "nothing": "finished",
        "out-of-time": "finished",
    }  # fmt: skip
    assert table.loc["failed", "error"] == "ValueError: too late"
    assert math.isnan(table.loc["no-games", "success"])


def test_a_single_run_is_a_folder_of_runs_and_none_is_an_error(run, tmp_path):
    only = run("x-seed3", [0.1, 0.2], {0: 0.1, 2: 0.5}, seed=3)
    assert results.results(only)[["run", "arm", "seed"]].values.tolist() == [["x-seed3", "x", 3]]
    with pytest.raises(ValueError, match="no run below .*config.json"):
        results.results(tmp_path / "empty")


def test_the_committed_sweep_is_finished_and_differs_only_in_its_arms(root):
    table = results.results(root / "experiments" / "results" / "hae_vs_gae")
    assert set(table["arm"]) == {"hae", "hae_paper", "gae"} and (table["state"] == "finished").all()
    assert set(table.columns[3:5]) == {"estimator", "lam_boundary"} and len(table) == 9
    assert table.columns[5] == "state"
    frame = results.curves(root / "experiments" / "results" / "hae_vs_gae", table)
    assert frame.groupby(["run", "seed"]).size().tolist() == [31] * 9


def test_published_curves_have_our_columns(tmp_path):
    path = tmp_path / "curves.csv"
    path.write_text(
        "run,step,val_success_rate,episode_success_rate\nx,0,0.1,\nx,1,,0.2\ny,0,0.3,\n"
    )
    frame = results.published(path, ["x"])
    assert frame[["run", "seed", "iteration"]].values.tolist() == [
        ["published: x", 0, 0], ["published: x", 0, 1]
    ]  # fmt: skip
    assert frame["eval/success"][0] == 0.1 and frame["rollout/success"][1] == 0.2
    with pytest.raises(ValueError, match="has no run .'z'., expected some of .'x', 'y'."):
        results.published(path, ["z"])


RUNS = pd.DataFrame(
    [("a", k, x) for k, x in enumerate([0.5, 0.7, 0.6])]
    + [("b", k, x) for k, x in enumerate([0.4, 0.5, 0.5, 0.9])]
    + [("c", 0, 0.3), ("c", 5, math.nan), ("d", 7, math.nan)],
    columns=["arm", "seed", "success"],
)


def test_arms_are_compared_by_seed_with_the_baseline():
    table = results.compare(RUNS, "b", np.random.default_rng(0)).set_index("arm")
    assert table["seeds"].to_dict() == {"a": 3, "b": 4, "c": 1, "d": 0}
    assert table["iqm"].tolist()[:3] == pytest.approx([0.6, 0.5, 0.3])  # b: without 0.4 and 0.9
    assert table["pairs"].to_dict() == {"a": 3, "b": 4, "c": 1, "d": 0}
    a = table.loc["a"]  # pairs .1, .2, .1; as in the doctest of paired_difference
    found = a[["difference", "difference_low", "difference_high"]].tolist()
    assert found == pytest.approx(stats.paired_difference([0.5, 0.7, 0.6], [0.4, 0.5, 0.5]))
    assert a["improvement"] == pytest.approx((2 + 3 + 3) / 12)  # 0.5 beats 0.4 and ties with two
    assert a["improvement_low"] <= a["improvement"] <= a["improvement_high"]
    assert table.loc["b", "difference":].isna().all()  # of the baseline against itself
    alone = table.loc["c", ["low", "difference", "improvement"]]
    assert alone.isna().all() and table.loc["d"].drop(["seeds", "pairs"]).isna().all()


def test_the_order_of_rows_does_not_matter_but_the_generator_does():
    first = results.compare(RUNS, "b", np.random.default_rng(0))
    again = results.compare(RUNS, "b", np.random.default_rng(0))
    pd.testing.assert_frame_equal(first, again)
    mixed = pd.concat([RUNS[RUNS["arm"] == arm][::-1] for arm in "abcd"])
    pd.testing.assert_frame_equal(first, results.compare(mixed, "b", np.random.default_rng(0)))
    many = pd.DataFrame({"arm": "b", "seed": range(40), "success": np.sin(range(40))})
    found = [results.compare(many, "b", np.random.default_rng(k))["low"].item() for k in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_the_figure_of_a_comparison_shows_its_numbers():
    table = results.compare(RUNS, "b", np.random.default_rng(0))
    figure = figures.comparison(table)
    assert len(figure.data) == 12  # three panels by four arms
    for k, (column, prefix) in enumerate(
        {"iqm": "", "difference": "difference_", "improvement": "improvement_"}.items()
    ):
        for (_, row), point in zip(table.iterrows(), figure.data[4 * k : 4 * k + 4], strict=True):
            ends = [point.x[0] - point.error_x.arrayminus[0], point.x[0] + point.error_x.array[0]]
            expected = [row[column], row[f"{prefix}low"], row[f"{prefix}high"]]
            assert [point.x[0], *ends] == pytest.approx(expected, nan_ok=True)
            assert point.y[0] == row["arm"]
    assert [shape.x0 for shape in figure.layout.shapes] == [0, 0.5]
    with pytest.raises(ValueError, match="missing columns .'improvement'"):
        figures.comparison(table.drop(columns="improvement"))


def test_curves_of_training_are_smoothed_and_evaluations_are_not():
    frame = pd.DataFrame({"run": "a", "seed": 0, "iteration": [0, 1, 2]})
    frame["rollout/success"] = frame["eval/success"] = [0.0, 0.3, 0.9]
    _, trained, _, tested = figures.learning_curves(frame, smooth=2).data
    assert trained.y.tolist() == pytest.approx([0.0, 0.15, 0.6])
    assert tested.y.tolist() == pytest.approx([0.0, 0.3, 0.9])


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match="baseline is 'x', expected one of .'a', 'b', 'c', 'd'."):
        results.compare(RUNS, "x", np.random.default_rng(0))
    twice = pd.concat([RUNS, RUNS[:1]]).assign(run="r")
    with pytest.raises(ValueError, match="the seed of another run of their arm"):
        results.compare(twice, "b", np.random.default_rng(0))
