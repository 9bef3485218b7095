"""Inspectors without a browser: controls are moved, and what the figure and text became is read."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import ipywidgets as ui
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import traitlets
from nbclient import NotebookClient
from recorded import make_run

from hiper_lab import figures, pages, trajectory, widgets
from hiper_lab.credit import CreditConfig, estimate
from hiper_lab.figures import COLORS
from hiper_lab.records import Rollouts, from_table
from hiper_lab.trajectory import EndReason, to_grid, to_values, turn_frame
from hiper_lab.widgets import (
    UNFLIPPED,
    CreditExplorer,
    LiveMonitor,
    RunComparer,
    TrajectoryInspector,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def bars(plot: go.Figure, name: str) -> list[np.ndarray]:
    """The heights of the bars of a level, panel by panel."""
    return [np.asarray(t.y, float) for t in plot.data if t.name == name and t.type == "bar"]


def shown_is(widget) -> bool:
    """The live plot holds what the static twin holds."""
    return json.loads(go.Figure(widget.plot).to_json()) == json.loads(widget.figure().to_json())


# ------------------------------------------------------------------------------------- selection


def test_the_newest_iteration_is_shown_first(run):
    inspector = TrajectoryInspector(run)
    assert inspector.selection == (3, "0000", 0) and inspector.address == "demo/3/0000:0"
    assert shown_is(inspector) and "demo/3/0000:0" in inspector.text.value
    assert len(inspector.listing.options) == 6


def test_a_page_hears_of_a_plot_with_its_data(run, monkeypatch):
    """What it is told first is what a busy page draws."""
    told, real = [], ui.Widget.open

    def listen(widget: ui.Widget) -> None:
        if isinstance(widget, go.FigureWidget):
            told.append((widget, len(widget._widget_data)))
        real(widget)

    monkeypatch.setattr(ui.Widget, "open", listen)
    inspector = TrajectoryInspector(run)
    assert told == [(inspector.plot, len(inspector.figure().data))]


@pytest.mark.parametrize("heard", [True, False])
def test_a_plot_to_which_the_page_is_deaf_is_shown_anew(run, monkeypatch, heard):
    """A page reports a plot when it has drawn it, and each change that it hears of."""
    monkeypatch.setattr(widgets, "PATIENCE", 0.01)
    inspector = TrajectoryInspector(run)
    first = inspector.plot

    async def page() -> None:
        for edit in range(1 + heard):
            first._js2py_traceDeltas = {"trace_deltas": [], "trace_edit_id": edit}
        await asyncio.sleep(0.05)

    asyncio.run(page())
    assert first.layout.autosize  # the first change
    assert (inspector.plot is first) == heard and inspector.frame.children == (inspector.plot,)
    assert heard or shown_is(inspector)


@pytest.mark.parametrize("kind", [TrajectoryInspector, CreditExplorer])
def test_controls_clicks_and_addresses_move_one_selection(run, kind):
    inspector = kind(run)
    inspector.listing.value = "0004"
    assert inspector.selection == (3, "0004", 0)
    inspector.turn.value = 1
    assert inspector.selection == (3, "0004", 1) and shown_is(inspector)
    inspector.iteration.value = 2
    assert inspector.selection == (2, "0004", 0)  # the same place in the list
    inspector.goto("demo/3/0005:1")
    assert inspector.iteration.value == 3 and inspector.listing.value == "0005"
    assert inspector.turn.value == 1 and inspector.turn.max == len(inspector.trajectory.turns) - 1
    inspector.goto("runs/demo/3/0005:0")
    inspector.goto("0002")
    assert inspector.selection == (3, "0002", 0) and shown_is(inspector)
    # a click on a bar of turn 1, and on the segment that opens last
    level = next(t for t in inspector.plot.data if t.name == "action (low)" and t.type == "bar")
    inspector.clicked(level, SimpleNamespace(point_inds=[1], xs=[1]), None)
    assert inspector.selection[2] == 1
    segment = inspector.plot.data[0]
    last = len(segment.base) - 1
    inspector.clicked(segment, SimpleNamespace(point_inds=[last], xs=[99]), None)
    opens = [i for i, turn in enumerate(inspector.trajectory.turns) if i == 0 or turn.switch]
    assert inspector.selection[2] == opens[-1] and inspector.turn.value == opens[-1]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("other/3/0000:0", "expected demo/ITERATION/TRAJECTORY:TURN"),
        ("demo/9/0000", "no iteration 9"),
        ("3/9999:0", "no such trajectory"),
        ("0000:99", r"no turn 0000:99 in iteration 3: \d+ turns"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(run, address, problem):
    inspector = TrajectoryInspector(run)
    with pytest.raises(ValueError, match=problem):
        inspector.goto(address)
    assert inspector.selection == (3, "0000", 0)


def test_linked_inspectors_show_the_same_turn(run):
    inspector, explorer = TrajectoryInspector(run), CreditExplorer(run)
    link = traitlets.link((inspector, "selection"), (explorer, "selection"))
    inspector.goto("2/0003:1")
    assert explorer.address == "demo/2/0003:1" and explorer.turn.value == 1
    explorer.turn.value = 0
    assert inspector.selection == (2, "0003", 0)
    link.unlink()


# ------------------------------------------------------------------------------------- inspector


def test_filters_sorting_and_search(run):
    inspector = TrajectoryInspector(run)
    whole = inspector.table()
    inspector.outcome.value = "won"
    assert (
        inspector.table()["trajectory"].tolist() == whole[whole["success"]]["trajectory"].tolist()
    )
    assert inspector.selection[1] == inspector.listing.value
    inspector.outcome.value = "failed"
    assert not inspector.table()["success"].any()
    inspector.outcome.value = "all"
    inspector.sort.value = "turns"
    assert inspector.table()["turns"].is_monotonic_increasing
    assert [name for _, name in inspector.listing.options] == inspector.table()[
        "trajectory"
    ].tolist()
    inspector.sort.value, inspector.falling.value = "success", True
    assert inspector.table()["success"].is_monotonic_decreasing
    inspector.falling.value = False
    inspector.turns.value = (1, 7)
    assert inspector.table()["turns"].max() <= 7 < whole["turns"].max()
    inspector.turns.value = (1, 100)
    inspector.switching.value = (0.0, 0.25)
    assert inspector.table()["switch_rate"].max() <= 0.25 < whole["switch_rate"].max()
    inspector.switching.value = (0.0, 1.0)
    inspector.task.value = "look_at_obj_in_light"
    assert set(inspector.table()["trajectory"]) == {"0001", "0004"}
    inspector.task.value = "all"
    inspector.search.value = "the BOOK"  # of the subgoals; every third game is about a book
    assert inspector.table()["trajectory"].tolist() == ["0002"]
    inspector.search.value = "nowhere to be found"
    assert inspector.table().empty and inspector.selection[1] == "0002"  # what was shown stays


def test_an_outcome_is_one_of_those_that_happened(run):
    inspector = TrajectoryInspector(run)
    failed = set(inspector.table()["failure"]) - {""}
    assert set(inspector.outcome.options) == {"all", "won", "failed", *failed}
    name = sorted(failed)[0]
    inspector.outcome.value = name
    assert set(inspector.table()["failure"]) == {name}


def test_every_way_to_fail_can_be_filtered(run):
    made = Rollouts(run)[3][:3]
    ends = (EndReason.ERROR, EndReason.TOKEN_LIMIT, EndReason.WON)
    calm = [replace(turn, switch=False, subgoal="go") for turn in made[1].turns[:2]]
    inspector = TrajectoryInspector(
        [replace(t, turns=calm, end=end) for t, end in zip(made, ends, strict=True)]
    )
    assert inspector.outcome.options == ("all", "won", "failed", "error", "token limit")


def test_the_text_of_a_turn_is_complete_and_is_text(run):
    inspector = TrajectoryInspector(run)
    turn, text = inspector.trajectory.turns[0], inspector.text.value
    assert "&amp; &lt;nothing&gt; else" in text and "<nothing>" not in text
    for level in COLORS:
        credit = getattr(turn, f"advantage_{level}")
        assert f"{getattr(turn, f'value_{level}'):.4f}" in text and f"{credit:.4f}" in text
    assert f"logprob {sum(turn.logprobs):.4f}" in text and "&lt;/action&gt;" in text
    inspector.goto(f"0000:{len(inspector.trajectory.turns) - 1}")
    assert "then the episode ended" in inspector.text.value and "The end." in inspector.text.value
    before = inspector.text.value
    inspector.color.value = "advantage"
    assert inspector.text.value != before


def test_the_prompt_shown_is_the_prompt_that_was_read():
    """Rendered again from the record, it is what the rollout's tokenizer was given."""
    pytest.importorskip("transformers")
    from hiper_lab.policy import load_model
    from hiper_lab.train import TrainConfig, train

    config = TrainConfig(iterations=1, episodes=2, max_turns=4, eval_games=0, warmup_iterations=1)
    (report,) = train(config)
    tokenizer = load_model("tiny")[1]
    for made in report.trajectories:
        for i, turn in enumerate(made.turns):
            bos = int(turn.prompt_ids[0] == tokenizer.bos_token_id)
            assert pages.prompt_text(made, i, {}) == tokenizer.decode(turn.prompt_ids[bos:])


def test_without_token_texts_the_response_is_coloured_by_role(run):
    made = Rollouts(run)[3][0]
    whole = pages.response_tokens(made, 0)
    made = replace(made, turns=[replace(made.turns[0], pieces=[])])
    parts = pages.response_tokens(made, 0)
    assert "".join(parts["piece"]) == "".join(whole["piece"]) == made.turns[0].response
    assert parts["role"].tolist() == ["switch", "format", "subgoal", "format", "action"]
    assert parts["advantage"].tolist()[0] == made.turns[0].advantage_switch
    for by in ("role", "advantage", "logprob"):
        assert "nan" not in pages.token_strip(parts, by)
    with pytest.raises(ValueError, match="by is 'x', expected role"):
        pages.token_strip(parts, "x")


def test_token_colours_mean_role_and_sign():
    token = {"piece": "a<b", "role": "subgoal", "chosen": True, "logprob": -1.0, "advantage": -0.5}
    strip = pages.token_strip(pd.DataFrame([token, token | {"advantage": 0.25}]), "advantage")
    assert figures.rgba(figures.NEGATIVE, 0.75) in strip  # the largest in size
    assert figures.rgba(figures.POSITIVE, 0.375) in strip and "a&lt;b" in strip
    strip = pages.token_strip(pd.DataFrame([token, token | {"chosen": False}]))
    assert strip.count(figures.rgba(COLORS["high"], 0.4)) == 2 and strip.count("opacity:.7") == 1


# -------------------------------------------------------------------------------------- explorer


def test_the_explorer_starts_with_the_credit_of_training(run):
    explorer = CreditExplorer(run)
    explorer.goto("3/0001:1")
    turns = explorer.trajectory.turns
    for level in COLORS:
        recorded = [getattr(turn, f"advantage_{level}") for turn in turns]
        np.testing.assert_allclose(
            explorer.table()[f"{level}_left"], np.array(recorded, float), atol=2e-6
        )
    assert explorer.names() == ("as trained: hae", "paper: hae")


def test_sliders_and_presets_recompute_credit(run):
    explorer = CreditExplorer(run)
    made = Rollouts(run)[3]
    grid, values = to_grid(made), to_values(made)
    explorer.sliders["gamma"].value = 0.8
    explorer.sliders["lam_boundary"].value = 0.3
    expected = estimate(grid, values, replace(CreditConfig.lab(), gamma=0.8, lam_boundary=0.3))
    n = len(made[0].turns)
    left, right, difference = bars(explorer.plot, "action (low)")
    np.testing.assert_allclose(left, expected.low[0, :n], atol=1e-6)
    paper = estimate(grid, values, CreditConfig.paper())
    np.testing.assert_allclose(right, paper.low[0, :n], atol=1e-6)
    np.testing.assert_allclose(difference, right - left, atol=1e-6)
    assert "as trained, changed" in repr(explorer) and shown_is(explorer)
    explorer.preset.value = "upstream"
    assert explorer.config == CreditConfig.upstream() and explorer.sliders["gamma"].value == 1.0
    explorer.estimator.value = "gae"
    explorer.right.value = "lab"
    assert explorer.names() == ("upstream, changed: gae", "lab: hae")


def test_an_estimator_that_cannot_be_used_says_why_and_shows_no_old_picture(run):
    explorer = CreditExplorer(run)
    explorer.estimator.value = "grpo"  # these games were played once each
    assert "alone in its group" in explorer.text.value and explorer.plot is None
    assert repr(explorer).startswith("CreditExplorer: grpo compares")
    explorer.estimator.value = "hae"
    assert shown_is(explorer)


def test_flipping_a_switch_splits_and_merges_segments(run):
    """What the flip shows is the credit of a record in which the other word had been said."""
    explorer = CreditExplorer(run)
    turns = explorer.trajectory.turns
    turn = next(i for i in range(1, len(turns)) if turns[i].switch)
    explorer.turn.value = turn
    explorer.flip.click()
    made = Rollouts(run)[3]
    said = [replace(t, switch=t.switch and i != turn) for i, t in enumerate(made[0].turns)]
    for i in range(turn, len(said)):  # who keeps a subgoal keeps its words
        if said[i].switch:
            break
        said[i] = replace(said[i], subgoal=said[turn - 1].subgoal)
    made = [replace(made[0], turns=said), *made[1:]]
    expected = estimate(to_grid(made), to_values(made), CreditConfig.lab())
    for level in ("low", "switch"):
        np.testing.assert_allclose(
            explorer.table()[f"{level}_left"], getattr(expected, level)[0, : len(said)], atol=1e-6
        )
    assert np.isnan(explorer.table()["high_left"][turn])  # no subgoal is chosen there any more
    assert len(explorer.plot.data[0].base) == sum(t.switch for t in said)
    assert f"flipped turns: 0000:{turn}" in explorer.text.value
    explorer.right.value = UNFLIPPED
    assert np.abs(bars(explorer.plot, "action (low)")[2]).max() > 1e-4
    explorer.flip.click()
    assert not explorer.flips and np.abs(bars(explorer.plot, "action (low)")[2]).max() == 0


def test_flips_are_undone_and_the_first_turn_has_none(run):
    explorer = CreditExplorer(run)
    before = explorer.table()
    explorer.flip.click()  # turn 0
    assert not explorer.flips
    for turn in (1, 2):
        explorer.turn.value = turn
        explorer.flip.click()
    assert explorer.flips == {("0000", 1), ("0000", 2)}
    explorer.undo.click()
    pd.testing.assert_frame_equal(explorer.table(), before)
    explorer.turn.value = 1
    explorer.flip.click()
    explorer.iteration.value = 2
    assert not explorer.flips  # they were of other trajectories


@pytest.mark.parametrize("preset", ["lab", "paper", "upstream"])
def test_the_terms_of_an_explanation_add_up(run, preset):
    explorer = CreditExplorer(run)
    explorer.preset.value = preset
    explorer.turn.value = 2
    for level in ("low", "switch"):
        explorer.level.value = level
        total = explorer.explain()["contribution"].sum()
        assert total == pytest.approx(explorer.table()[f"{level}_left"][2], abs=1e-5)
        assert f"{total:.4f} = " in explorer.text.value


def test_any_estimator_can_stand_on_the_right(run):
    """The same numbers, another estimator: what would RLOO, or GAE, have said instead?"""
    explorer = CreditExplorer([replace(t, game="one") for t in Rollouts(run)[3]])
    explorer.sliders["gamma"].value = 0.9
    for name in ("gae", "monte_carlo", "grpo", "rloo", "rloo_rows", "gigpo"):
        explorer.right.value = f"left, but {name}"
        assert explorer.names()[1] == f"left, but {name}"
        config = replace(explorer.config, estimator=name)
        expected = estimate(explorer.grid, explorer.values, config)
        n = len(explorer.trajectory.turns)
        np.testing.assert_allclose(explorer.table()["low_right"], expected.low[0, :n], atol=1e-6)
        total = explorer.explain("right")["contribution"].sum()
        assert total == pytest.approx(float(expected.switch[0, 0]), abs=1e-5)
        assert f"({explorer.names()[1]}):" in explorer.text.value
    with pytest.raises(ValueError, match="side is 'both', expected left or right"):
        explorer.explain("both")


def test_a_redraw_computes_each_side_once(run, monkeypatch):
    explorer, seen = CreditExplorer(run), []
    monkeypatch.setattr(widgets, "estimate", lambda *a: seen.append(a[2].estimator) or estimate(*a))
    explorer.sliders["gamma"].value = 0.7
    assert seen == ["hae", "hae"]
    explorer.turn.value = 1  # the same credit, seen from elsewhere
    explorer.table(), explorer.summary(), repr(explorer)
    assert seen == ["hae", "hae"]
    explorer.flip.click()
    assert len(seen) == 4


def test_a_click_on_a_bar_explains_it(run):
    explorer = CreditExplorer(run)
    bar = next(t for t in explorer.plot.data if t.legendgroup == "low")
    explorer.clicked(bar, SimpleNamespace(point_inds=[1], xs=[1]), None)
    assert explorer.level.value == "low" and explorer.selection[2] == 1
    assert "advantage of the action (low) at turn 1" in explorer.text.value
    keep = next(i for i, turn in enumerate(explorer.trajectory.turns) if not turn.switch)
    explorer.turn.value = keep
    explorer.level.value = "high"
    assert "no subgoal" in explorer.text.value.lower() or "bound" in explorer.text.value.lower()


def test_agreement_over_all_trajectories(run):
    explorer = CreditExplorer(run)
    explorer.right.value = "as trained"
    same = explorer.summary()
    assert same["correlation"].tolist() == pytest.approx([1, 1, 1])
    assert same["same sign"].tolist() == [1, 1, 1]
    made = Rollouts(run)[3]
    credit = estimate(to_grid(made), to_values(made), CreditConfig.lab())
    chosen = [credit.high[b, t].item() for b, m in enumerate(made) for t, turn in enumerate(m.turns)
              if t == 0 or turn.switch]  # fmt: skip
    assert same["spread left"][1] == pytest.approx(np.std(chosen), abs=1e-6)


def test_foreign_logs_are_explored_without_a_critic():
    rows = pd.DataFrame({
        "traj_uid": ["a"] * 3, "rewards": [0.0, 0.0, 1.0], "dones": [False, False, True],
        "switch": [True, False, True], "subgoal": ["x", "x", "y"], "action": "go",
    })  # fmt: skip
    explorer = CreditExplorer(Rollouts(from_table(rows), name="log"))
    explorer.sliders["gamma"].value = 0.5
    explorer.sliders["lam_low"].value = explorer.sliders["lam_high"].value = 1.0
    explorer.sliders["lam_boundary"].value = 1.0
    assert explorer.table()["low_left"].tolist() == [0.25, 0.5, 1.0]  # the discounted return
    assert explorer.address == "log/0/a:0"
    assert repr(TrajectoryInspector(from_table(rows))).startswith(
        "TrajectoryInspector(rollouts/0/a:0 of 3 turns, 2 segments, return 1.0000"
    )


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return [make_run(folder / f"{n}-seed{s}", seed=s) for n in ("hae", "gae") for s in (0, 1)]


def test_seeds_of_a_run_are_found_by_name(runs):
    comparer = RunComparer(runs)
    assert {name: len(seeds) for name, seeds in comparer.runs.items()} == {"hae": 2, "gae": 2}
    assert repr(comparer) == "RunComparer(2 runs, 4 seeds, learning curves: 2 rows)"
    named = RunComparer({"A": runs[:1], "B": runs[1:]})
    assert {name: len(seeds) for name, seeds in named.runs.items()} == {"A": 1, "B": 3}
    with pytest.raises(ValueError, match="there is no run"):
        RunComparer([])


def test_every_view_shows_its_numbers(runs):
    comparer = RunComparer(runs, samples=2)
    frame, turns = comparer.recorded()
    assert sorted(set(frame["iteration"])) == [1, 3]  # two of three, the newest among them
    for view in comparer.views:
        comparer.view.value = view
        assert shown_is(comparer) and len(comparer.table()), view
    comparer.view.value = "task types"
    table = comparer.table().set_index(["run", "iteration", "kind"])
    rows = frame[(frame["run"] == "gae") & (frame["iteration"] == 3)]
    rows = rows[rows["task_type"] == "look_at_obj_in_light"]
    cell = table.loc[("gae", 3, "look_at_obj_in_light")]
    assert cell["share"] == rows["success"].mean() and cell["n"] == len(rows) == 4
    comparer.view.value = "failures"
    sums = comparer.table().groupby(["run", "iteration"])["share"].sum()
    assert np.allclose(sums, 1)
    comparer.view.value = "subgoals"
    table = comparer.table()
    assert table["segments"].sum() == turns["boundary"].sum()
    one = table.iloc[0]
    mine = turns[turns["boundary"] & (turns["run"] == one["run"])]
    mine = mine[mine["subgoal"] == one["subgoal"]]
    assert one["credit"] == pytest.approx(mine["advantage_high"].mean())
    comparer.view.value = "same task"
    comparer.game.value = "train/4"
    assert comparer.table()["address"].tolist() == [
        f"{n}-seed{s}/{i}/0004" for n in ("hae", "gae") for s in (0, 1) for i in (1, 3)
    ]


def test_curves_are_means_over_seeds_with_students_interval(runs):
    comparer = RunComparer(runs)
    curves = {t.name: t for t in comparer.plot.data if t.name and t.xaxis == "x"}
    table = comparer.metrics().pivot_table(index="iteration", columns=["run", "seed"],
                                           values="rollout/success")  # fmt: skip
    assert np.allclose(curves["hae"].y, table["hae"].mean(axis=1))
    band = comparer.plot.data[0]
    half = 12.706 * table["hae"].std(axis=1, ddof=1) / np.sqrt(2)
    upper = (table["hae"].mean(axis=1) + half).to_numpy()
    assert np.allclose(np.asarray(band.y)[: len(upper)], upper)
    comparer.smooth.value = 2
    smooth = {t.name: t for t in comparer.plot.data if t.name and t.xaxis == "x"}["hae"]
    rolled = table["hae"].rolling(2, min_periods=1).mean().mean(axis=1)
    assert np.allclose(smooth.y, rolled)


def test_no_task_twice_is_said(run):
    comparer = RunComparer([run], samples=1)
    comparer.view.value = "same task"
    assert "no task occurs twice" in comparer.text.value and comparer.plot is None


# ------------------------------------------------------------------------------------------ live


def test_a_run_is_followed_from_its_first_moment(tmp_path):
    folder = tmp_path / "live"
    folder.mkdir()
    (folder / "config.json").write_text('{"iterations": 3}')
    monitor = LiveMonitor(folder)
    assert repr(monitor) == "LiveMonitor(live, iteration 0 of 3)"
    assert "waiting for the first iteration" in monitor.text.value
    with pytest.raises(ValueError, match="live has no recorded trajectories yet"):
        monitor.inspect()
    make_run(folder, iterations=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rollout/succ')  # being written
    monitor.button.click()
    assert monitor.digest().startswith("live, iteration 2 of 3, success 0.")
    assert shown_is(monitor) and monitor.table()["trajectory"][0] == "live/2/0000"
    assert monitor.inspect().address == "live/2/0000:0"
    with pytest.raises(FileNotFoundError):
        LiveMonitor(tmp_path / "absent")


def test_the_monitor_follows_without_being_asked(tmp_path):
    make_run(tmp_path / "live", iterations=1)
    seen = []

    async def watch():
        monitor = LiveMonitor(tmp_path / "live")
        before = sorted((tmp_path / "live").rglob("*"))
        monitor.start(seconds=0.01)
        assert monitor.follow.value
        make_run(tmp_path / "live", iterations=2)
        for _ in range(500):
            await asyncio.sleep(0.01)
            if "iteration 2" in monitor.digest():
                break
        seen.append(monitor.digest())
        monitor.follow.value = False  # a reader presses it
        assert monitor._task is None
        monitor.stop()  # twice is once
        assert len(sorted((tmp_path / "live").rglob("*"))) == len(before) + 1  # it wrote nothing

    asyncio.run(watch())
    assert "iteration 2 of" in seen[0]


@pytest.mark.slow
def test_a_papermill_run_in_another_process_is_followed(tmp_path):
    folder, parameters = tmp_path / "live", tmp_path / "x.yaml"
    parameters.write_text(
        "{iterations: 3, episodes: 4, max_turns: 4, eval_games: 2, warmup_iterations: 1,"
        " rollout_every: 1}"
    )
    command = [sys.executable, "-m", "hiper_lab.runs", "launch", parameters, "--out", folder]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        monitor, seen = None, []
        while process.poll() is None:
            time.sleep(0.3)
            if monitor is None and (folder / "manifest.json").exists():
                monitor = LiveMonitor(folder)
            if monitor:
                monitor.button.click()
                seen.append((repr(monitor), len(monitor.table())))
    assert process.returncode == 0 and seen[0] == ("LiveMonitor(live, iteration 0 of ?)", 0)
    assert len(set(seen)) > 2, seen[-1]  # not only its beginning and its end
    monitor.refresh()
    assert monitor.digest().startswith("live, iteration 3 of 3") and len(monitor.table()) == 4
    assert shown_is(monitor) and monitor.inspect().address == "live/3/0000:0"
    # what was really sampled can be read token by token
    tokens = pages.response_tokens(monitor.inspect().trajectory, 0)
    assert set(tokens["role"]) >= {"subgoal", "action"} and tokens["piece"].str.len().sum() > 0


# ----------------------------------------------------------------------------------- static twins


def test_pages_open_offline_and_hold_the_whole_trajectory(run, runs, tmp_path):
    inspector = TrajectoryInspector(run)
    text = inspector.to_html(tmp_path / "a" / "i.html").read_text()
    assert text.count("<summary>turn ") == len(inspector.trajectory.turns)
    assert all(turn.action in text for turn in inspector.trajectory.turns)
    for widget in (CreditExplorer(run), RunComparer(runs), LiveMonitor(run)):
        text = widget.to_html(tmp_path / "w.html").read_text()
        assert "<script src=" not in text and 'src="http' not in text and "<link" not in text
        assert len(text) > 1_000_000  # plotly.js is inside
        assert repr(widget) in text


def test_digests_are_short_and_the_same_for_the_same_data(run, runs):
    for make in (
        lambda: TrajectoryInspector(run), lambda: CreditExplorer(run),
        lambda: RunComparer(runs), lambda: LiveMonitor(run),
    ):  # fmt: skip
        first, second = make(), make()
        assert repr(first) == repr(second) and len(repr(first)) < 110  # what a cell's output keeps
        assert first._repr_mimebundle_()["text/plain"] == repr(first)


@pytest.mark.slow
def test_an_inspector_adds_little_to_a_saved_notebook(run, tmp_path, monkeypatch):
    """Executed as our executor does: outputs without widget state."""
    code = [
        "from hiper_lab.widgets import CreditExplorer, TrajectoryInspector",
        f"TrajectoryInspector({str(run)!r})",
        f"CreditExplorer({str(run)!r})",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in code])
    NotebookClient(notebook, kernel_name="python3", store_widget_state=False, timeout=300).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[1][0].data["text/plain"].startswith("TrajectoryInspector(demo/3/0000:0 of ")
    assert outputs[2][0].data["text/plain"].startswith("CreditExplorer(demo/3/0000:0, as trained")
    assert len(nbformat.writes(notebook)) < 20_000


def test_inspectors_need_no_model():
    check = """
import sys
sys.modules["transformers"] = None
import hiper_lab.widgets, hiper_lab.records, hiper_lab.pages
"""
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
    assert "torch" not in figures.__dict__ and trajectory and turn_frame
