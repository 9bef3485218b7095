"""A figure shows exactly the numbers of its frame, in the colour of their level."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from hiper_lab import figures
from hiper_lab.figures import COLORS, INK, credit_per_subgoal, save, training_curves
from hiper_lab.figures import trajectory_timeline as timeline

NAN = float("nan")
LEVELS = ("switch", "high", "low")


def named(figure: go.Figure, name: str) -> list:
    return [trace for trace in figure.data if trace.name == name]


def same(shown, expected) -> bool:
    return np.array_equal(np.asarray(shown, float), np.asarray(expected, float), equal_nan=True)


def axis_title(figure: go.Figure, trace) -> str:
    return figure.layout["yaxis" + trace.yaxis[1:]].title.text


@pytest.fixture
def metrics() -> pd.DataFrame:
    """Iteration 0 is the evaluation before training; rows arrive in the wrong order."""
    frame = pd.DataFrame({"iteration": [0, 1, 2, 3], "rollout/success": [NAN, 0.1, 0.2, 0.4]})
    frame["eval/success"] = [0.2, NAN, NAN, 0.5]
    frame["eval/success_low"] = [0.15, NAN, NAN, 0.4]
    frame["eval/success_high"] = [0.3, NAN, NAN, 0.6]
    frame["plan/switch_rate"] = [NAN, 0.5, 0.4, 0.3]
    frame["plan/segment_turns"] = [NAN, 2.0, 2.5, 3.0]
    for i, (level, kind) in enumerate(zip(LEVELS, ("switch", "subgoal", "action"), strict=True)):
        frame[f"value/{level}_correlation"] = [NAN, 0.1 + i, 0.2 + i, 0.3 + i]
        frame[f"policy/entropy_{kind}"] = [NAN, NAN, 0.5 + i, 0.4 + i]
    return frame.iloc[[2, 0, 3, 1]]


@pytest.fixture
def turns() -> pd.DataFrame:
    """Two segments of two turns and one; the first opens though the agent said KEEP."""
    return pd.DataFrame({
        "turn": [0, 1, 2], "segment": [0, 0, 1], "switch": [False, False, True],
        "subgoal": ["find <b>mug</b>", "find <b>mug</b>", "clean mug"],
        "action": ["go to desk 1", "take mug 1", "clean mug 1"],
        "observation": ["a room", "On the desk 1, you\nsee a mug 1.", "You take it."],
        "reward": [0.0, 0.0, 1.0],
        "value_switch": [0.1, 0.2, 0.3], "value_high": [0.4, 0.5, 0.6],
        "value_low": [0.7, 0.8, 0.9],
        "advantage_switch": [0.01, 0.02, 0.03], "advantage_high": [0.5, NAN, -0.5],
        "advantage_low": [-0.1, 0.0, 0.1],
    })  # fmt: skip


# ------------------------------------------------------------------------------- training curves


def test_training_curves_show_the_metrics_in_order(metrics):
    figure, ordered = training_curves(metrics), metrics.sort_values("iteration")
    expected = {
        "rollouts": ["rollout/success"],
        "switch rate": ["plan/switch_rate"],
        "segment length": ["plan/segment_turns"],
        "switch": ["value/switch_correlation", "policy/entropy_switch"],
        "subgoal (high)": ["value/high_correlation", "policy/entropy_subgoal"],
        "action (low)": ["value/low_correlation", "policy/entropy_action"],
    }
    for name, columns in expected.items():
        traces = named(figure, name)
        assert len(traces) == len(columns), name
        for trace, column in zip(traces, columns, strict=True):
            assert same(trace.x, [0, 1, 2, 3]) and same(trace.y, ordered[column]), column
        assert [t.showlegend for t in traces] == [True, False][: len(traces)]
    assert len(figure.data) == 10  # and the held-out points


def test_training_curves_draw_held_out_success_with_its_interval(metrics):
    (points,) = named(training_curves(metrics), "held-out, 95% interval")
    assert same(points.x, [0, 3]) and same(points.y, [0.2, 0.5])
    np.testing.assert_allclose(points.error_y.array, [0.1, 0.1])
    np.testing.assert_allclose(points.error_y.arrayminus, [0.05, 0.1])
    assert points.error_y.symmetric is False and points.mode == "markers"


def test_training_curves_put_each_curve_on_its_axis_in_its_colour(metrics):
    figure = training_curves(metrics)
    seen = {(axis_title(figure, t), t.name): t.line.color for t in figure.data if t.mode == "lines"}
    assert seen == {
        ("success rate", "rollouts"): INK,
        ("switches per turn", "switch rate"): COLORS["switch"],
        ("turns per segment", "segment length"): COLORS["high"],
        ("correlation", "switch"): COLORS["switch"],
        ("correlation", "subgoal (high)"): COLORS["high"],
        ("correlation", "action (low)"): COLORS["low"],
        ("nats", "switch"): COLORS["switch"],
        ("nats", "subgoal (high)"): COLORS["high"],
        ("nats", "action (low)"): COLORS["low"],
    }


def test_training_curves_leave_out_what_was_never_measured(metrics):
    """During critic warm-up nothing has an entropy, and a run may skip its evaluations."""
    early = metrics.drop(columns=[c for c in metrics if c.startswith(("policy/", "eval/"))])
    figure = training_curves(early)
    assert {axis_title(figure, t) for t in figure.data} == {
        "success rate", "switches per turn", "turns per segment", "correlation",
    }  # fmt: skip
    assert not named(figure, "held-out, 95% interval")


@pytest.mark.parametrize("column", ["iteration", "rollout/success", "plan/switch_rate",
                                    "plan/segment_turns", "eval/success_low"])  # fmt: skip
def test_training_curves_name_the_missing_column(metrics, column):
    with pytest.raises(ValueError, match=rf"missing columns \['{column}'\]"):
        training_curves(metrics.drop(columns=column))


def test_no_rows_is_an_error(metrics, turns):
    for draw, frame in ((training_curves, metrics), (timeline, turns), (credit_per_subgoal, turns)):
        with pytest.raises(ValueError, match="no rows"):
            draw(frame.iloc[:0])


# -------------------------------------------------------------------------------------- timeline


def test_timeline_bars_are_the_segments(turns):
    bar = timeline(turns.sample(frac=1, random_state=0)).data[0]
    assert bar.orientation == "h" and same(bar.base, [-0.5, 1.5]) and same(bar.x, [2, 1])
    assert list(bar.text) == ["find &lt;b&gt;mug&lt;/b&gt;", "clean mug"]  # text, never markup
    assert bar.marker.color == COLORS["high"]


def test_a_name_is_broken_to_fit_its_segment_and_only_then_cut(turns):
    long = "put the clean mug into the cupboard over the sink"
    bar = timeline(turns.assign(subgoal=[long, long, f"{long} & {long}"])).data[0]
    assert bar.text[0] == long and bar.customdata[1] == f"{long} &amp; {long}"
    assert bar.text[1] == (  # 105 letters a plot, so 35 a turn
        "put the clean mug into the cupboard<br>over the sink &amp; put the clean mug<br>"
        "into the cupboard over the sink"
    )
    many = [turns.iloc[:1].assign(turn=i, segment=i, subgoal="clean the mug") for i in range(24)]
    assert set(timeline(pd.concat(many)).data[0].text) == {"cle…<br>the<br>mug"}  # 4 letters


def test_timeline_marks_where_the_agent_said_switch(turns):
    (mark,) = named(timeline(turns), "SWITCH")
    assert same(mark.x, [1.5]) and mark.marker.color == COLORS["switch"]


def test_timeline_shows_values_rewards_and_advantages(turns):
    figure = timeline(turns)
    bars = {t.name: t for t in figure.data if t.type == "bar" and t.orientation != "h"}
    for level, name in figures.NAMES.items():
        (value,) = named(figure, f"value, {name}")
        assert same(value.y, turns[f"value_{level}"]) and value.line.color == COLORS[level]
        assert same(bars[name].y, turns[f"advantage_{level}"]) and same(bars[name].x, [0, 1, 2])
        assert bars[name].marker.color == COLORS[level]
        assert axis_title(figure, bars[name]) == "advantage (reward)"
    (reward,) = named(figure, "reward")
    assert same(reward.y, [0, 0, 1]) and axis_title(figure, reward) == "value, reward"


def test_timeline_hover_tells_action_and_observation(turns):
    figure = timeline(turns)
    for trace in figure.data[2:]:
        assert list(trace.customdata) == [
            "go to desk 1<br>a room",
            "take mug 1<br>On the desk 1, you see a mug 1.",
            "clean mug 1<br>You take it.",
        ]
        assert "%{customdata}" in trace.hovertemplate
    bare = timeline(turns.drop(columns=["observation", "value_switch"]))
    assert bare.data[-1].customdata[0] == "go to desk 1"
    assert not named(bare, "value, switch")


def test_names_of_credit_table_are_read_alike(turns):
    short = {f"advantage_{level}": f"adv_{level}" for level in LEVELS}
    short |= {f"value_{level}": f"v_{level}" for level in LEVELS}
    renamed = turns.rename(columns=short)
    assert timeline(renamed) == timeline(turns)
    assert credit_per_subgoal(renamed) == credit_per_subgoal(turns)


def test_timeline_refuses_two_trajectories_and_missing_columns(turns):
    with pytest.raises(ValueError, match="expected each once"):
        timeline(pd.concat([turns, turns]))
    with pytest.raises(ValueError, match=r"missing columns \['action', 'advantage_low'\]"):
        timeline(turns.drop(columns=["action", "advantage_low"]))


def test_timeline_of_real_records_if_the_recorder_is_there():
    """The frame `trajectory.turn_frame` makes is the frame that is drawn."""
    trajectory = pytest.importorskip("hiper_lab.trajectory")
    made = [
        trajectory.Turn(
            observation="o", admissible=[], prompt_ids=[1], response_ids=[2], roles=[3],
            logprobs=[0.0], chosen=[True], response="r", switch=i == 0, subgoal="go",
            action=f"a{i}", reward=float(i), value_high=0.1, value_low=0.2, value_switch=0.3,
            advantage_high=0.4 if i == 0 else None, advantage_low=0.5, advantage_switch=0.6,
        )
        for i in range(2)
    ]  # fmt: skip
    record = trajectory.Trajectory(
        id="t", task="pick", game="g", seed=0, turns=made, end=trajectory.EndReason.WON,
        final_observation="", final_prompt_ids=[],
    )  # fmt: skip
    frame = trajectory.turn_frame([record])
    figure = timeline(frame)
    assert same(figure.data[0].x, [2]) and same(figure.data[-2].y, [0.4, NAN])
    assert credit_per_subgoal(frame).layout.yaxis.ticktext == ("go (n=1, won 100%)",)


# ---------------------------------------------------------------------------- credit per subgoal


def test_credit_per_subgoal_ranks_by_mean_over_boundaries():
    frame = pd.DataFrame({
        "subgoal": ["a", "a", "b", "a", "c", "c"],
        "advantage_high": [1.0, 0.0, -1.0, NAN, 0.2, 0.4],
        "success": [True, False, False, True, True, True],
    })  # fmt: skip
    figure = credit_per_subgoal(frame)
    (bars,) = figure.data
    assert figure.layout.yaxis.ticktext == (
        "b (n=1, won 0%)", "c (n=2, won 100%)", "a (n=2, won 50%)",
    )  # fmt: skip
    np.testing.assert_allclose(bars.x, [-1.0, 0.3, 0.5])
    np.testing.assert_allclose(bars.error_x.array, [0.0, 0.1, 0.5])  # standard error; 0 for n = 1
    assert bars.marker.color == COLORS["high"] and list(bars.customdata) == ["b", "c", "a"]
    without = credit_per_subgoal(frame.drop(columns="success"))
    assert without.layout.yaxis.ticktext == ("b (n=1)", "c (n=2)", "a (n=2)")


def test_credit_per_subgoal_says_what_it_left_out():
    frame = pd.DataFrame({"subgoal": list("aabbc"), "advantage_high": [1.0, 1, 2, 2, 9]})
    figure = credit_per_subgoal(frame, limit=2)
    assert same(figure.data[0].x, [1, 2])
    assert "2 most frequent of 3" in figure.layout.xaxis.title.text
    assert "most frequent" not in credit_per_subgoal(frame).layout.xaxis.title.text


def test_long_subgoals_with_the_same_start_stay_two_bars():
    frame = pd.DataFrame({"subgoal": ["x" * 90 + "1", "x" * 90 + "2"], "advantage_high": [1.0, 2]})
    figure = credit_per_subgoal(frame)
    assert len(set(figure.data[0].y)) == 2 and len(figure.layout.yaxis.ticktext[0]) < 70


def test_credit_per_subgoal_needs_credit(turns):
    with pytest.raises(ValueError, match="0 rows with an advantage_high"):
        credit_per_subgoal(turns.assign(advantage_high=NAN))
    with pytest.raises(ValueError, match="limit 0"):
        credit_per_subgoal(turns, limit=0)
    with pytest.raises(ValueError, match=r"missing columns \['subgoal'\]"):
        credit_per_subgoal(turns.drop(columns="subgoal"))


# ----------------------------------------------------------------------------------------- style


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [*COLORS.values(), INK])
@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
def test_every_ink_is_legible_in_light_and_dark(color, background):
    dim, bright = sorted((luminance(color), luminance(background)))
    assert (bright + 0.05) / (dim + 0.05) >= 3  # WCAG 2.2 for graphics and large text


def test_figures_are_small_and_transparent(metrics, turns):
    for figure in (training_curves(metrics), timeline(turns), credit_per_subgoal(turns)):
        layout = figure.layout.template.layout
        assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
        assert len(figure.to_json()) < 12_000  # plotly's own template alone takes 16,000


def test_figures_never_load_torch():
    check = "import sys, hiper_lab.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# ------------------------------------------------------------------------------------------ save


def test_html_needs_no_network(turns, tmp_path):
    path = save(timeline(turns), tmp_path / "new folder" / "figure.html")
    text = path.read_text()
    assert len(text) > 1_000_000 and "go to desk 1" in text  # plotly.js is inside
    assert "<script src=" not in text and 'src="http' not in text
    assert path.read_bytes() == save(timeline(turns), tmp_path / "again.html").read_bytes()


def test_json_reads_back_as_the_same_figure(turns, tmp_path):
    figure = credit_per_subgoal(turns)
    again = pio.from_json(save(figure, tmp_path / "figure.json").read_text())
    assert json.loads(again.to_json()) == json.loads(figure.to_json())


def test_unknown_ending_is_refused(turns, tmp_path):
    with pytest.raises(ValueError, match=r"ends in '.gif', expected .html, .json, .png or .svg"):
        save(timeline(turns), tmp_path / "figure.gif")


def test_png_without_kaleido_says_how_to_install_it(turns, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kaleido", None)  # importing it fails
    monkeypatch.setattr("plotly.io._kaleido.kaleido_available", lambda: False)
    with pytest.raises(RuntimeError, match="pip install"):
        save(timeline(turns), tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(turns, tmp_path, monkeypatch):
    path = save(timeline(turns), tmp_path / "figure.json")
    before = path.read_bytes()

    def full(self, data):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save(credit_per_subgoal(turns), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------- what the inspectors show


def test_the_selected_turn_is_marked_and_the_end_is_told(turns):
    figure = timeline(turns.assign(end="turn_limit"), selected=1)
    (band,) = figure.layout.shapes
    assert (band.x0, band.x1, band.yref) == (0.5, 1.5, "paper")
    assert figure.layout.annotations[0].text == "ended: turn limit"
    assert not timeline(turns).layout.shapes


def test_two_estimators_share_a_scale_and_their_difference_is_shown(turns):
    other = turns.assign(advantage_low=[0.4, 0.0, -0.8], advantage_high=[NAN, 0.25, -0.5])
    figure = figures.credit_comparison(turns, other, ("ours", "theirs"), selected=2)
    rows = {row: figure.layout[f"yaxis{row}"] for row in (2, 3, 4)}
    over = {title.y: title.text for title in figure.layout.annotations}
    assert [over[axis.domain[1]] for axis in rows.values()] == ["ours", "theirs", "difference"]
    assert rows[2].range == rows[3].range and rows[2].range[1] > 0.8  # the largest of both
    low = [t for t in figure.data if t.name == "action (low)"]
    assert same(low[0].y, [-0.1, 0.0, 0.1]) and same(low[1].y, [0.4, 0.0, -0.8])
    np.testing.assert_allclose(low[2].y, [0.5, 0.0, -0.9])
    high = [t for t in figure.data if t.name == "subgoal (high)"]
    np.testing.assert_allclose(high[2].y, [-0.5, 0.25, 0.0])  # no credit counts as none
    assert {t.marker.color for t in low} == {COLORS["low"]}
    with pytest.raises(ValueError, match="3 turns and 2 turns, expected the same"):
        figures.credit_comparison(turns, other.iloc[:2], ("a", "b"))


def test_one_lane_per_trajectory_of_a_task(turns):
    lanes = pd.concat([turns.assign(lane=f"run/{i}/0001", end="won") for i in range(3)])
    figure = figures.side_by_side(lanes)
    assert figure.layout.yaxis.ticktext == ("run/0/0001", "run/1/0001", "run/2/0001")
    bars = [t for t in figure.data if t.type == "bar"]
    assert [list(t.y) for t in bars] == [[0, 0], [-1, -1], [-2, -2]]
    assert all(same(t.base, [-0.5, 1.5]) for t in bars) and len(figure.layout.annotations) == 3
    assert "2 of 3 trajectories" in figures.side_by_side(lanes, limit=2).layout.xaxis.title.text


def test_learning_curves_average_seeds_and_smooth_each_first():
    metrics = pd.DataFrame({
        "run": ["a"] * 6 + ["b"] * 2, "seed": [0, 0, 0, 1, 1, 1, 0, 0],
        "iteration": [1, 2, 3, 1, 2, 3, 1, 2],
        "rollout/success": [0.0, 0.2, 0.4, 0.2, 0.4, 0.6, 0.5, 0.7],
        "plan/switch_rate": [NAN] * 8,
    })  # fmt: skip
    figure = figures.learning_curves(metrics)
    curves = {t.name: t for t in figure.data if t.name}
    np.testing.assert_allclose(curves["a"].y, [0.1, 0.3, 0.5])
    np.testing.assert_allclose(curves["b"].y, [0.5, 0.7])
    bands = [t for t in figure.data if not t.name]
    np.testing.assert_allclose(np.array(bands[0].y)[:3] - [0.1, 0.3, 0.5], 12.706 * 0.1)
    assert len(bands[1].x) == 0  # one seed has no interval
    assert [a.text for a in figure.layout.annotations] == ["rollout/success"]
    smooth = figures.learning_curves(metrics, smooth=2)
    curves = {t.name: t for t in smooth.data if t.name}
    np.testing.assert_allclose(curves["a"].y, [0.1, 0.2, 0.4])
    assert {t.line.color for t in figure.data if t.name} & set(COLORS.values()) == set()
    with pytest.raises(ValueError, match="none of the metrics"):
        figures.learning_curves(metrics, columns=("plan/switch_rate",))


def test_intervals_of_a_single_iteration_stand_side_by_side():
    rows = [(run, seed, 7, 0.2 + 0.1 * seed) for run in "abc" for seed in (0, 1)]
    metrics = pd.DataFrame(rows, columns=["run", "seed", "iteration", "eval/success"])
    bars = [t for t in figures.learning_curves(metrics).data if t.name]
    np.testing.assert_allclose([t.x[0] for t in bars], [6.95, 7.0, 7.05])
    np.testing.assert_allclose([t.error_y.array[0] for t in bars], 12.706 * 0.05)


def test_shares_are_laid_out_by_kind_and_iteration():
    shares = pd.DataFrame({
        "run": list("aaab"), "iteration": [1, 1, 2, 1], "kind": ["won", "loop", "won", "won"],
        "share": [0.75, 0.25, 1.0, 0.5], "n": [4, 4, 3, 2],
    })  # fmt: skip
    first, second = figures.share_map(shares, "what").data
    assert first.y == ("loop", "won") and first.x == ("1", "2")  # the first kind is on top
    assert same(first.z, [[0.25, NAN], [0.75, 1.0]]) and same(first.customdata, [[4, NAN], [4, 3]])
    assert same(second.z, [[NAN], [0.5]]) and (first.zmin, first.zmax) == (0, 1)


def test_the_vocabulary_shows_share_credit_and_success():
    segments = pd.DataFrame({
        "iteration": [1, 1, 1, 1, 2, 2], "subgoal": ["a", "a", "b", "c", "a", "b"],
        "advantage_high": [0.5, 0.3, -0.8, 0.1, NAN, 0.2],
        "success": [True, False, False, True, True, True],
    })  # fmt: skip
    (dots,) = figures.subgoal_history(segments, limit=2).data
    assert len(dots.x) == 4  # c is not among the two most frequent
    seen = dict(zip(zip(dots.x, dots.y, strict=True), dots.marker.size, strict=True))
    assert seen == {(1, 1): 0.5, (1, 0): 0.25, (2, 1): 0.5, (2, 0): 0.5}  # of all four segments
    assert same(dots.marker.color, [0.4, -0.8, NAN, 0.2]) and dots.marker.cmax == 0.8
    assert "2 segments (50.0%), won 50%<br>credit 0.4000" in dots.customdata[0]


@pytest.mark.parametrize("color", figures.RUNS)
@pytest.mark.parametrize("background", ["#ffffff", "#111111"])
def test_runs_are_legible_in_light_and_dark(color, background):
    test_every_ink_is_legible_in_light_and_dark(color, background)
