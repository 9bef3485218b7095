"""From a data frame to a `plotly.graph_objects.Figure`, one plain function per picture.

A level has one colour in every figure, from Okabe & Ito's colour-blind safe set: the switch, the
subgoal (high), the action (low). Runs, shares and signs have colours of their own.
Backgrounds are transparent, and every ink is readable on white and on JupyterLab's dark theme.

The frames are those of `hiper_lab.trajectory` and ``metrics.jsonl``. Columns may also be named as
in `hiper_lab.credit.credit_table`: ``adv_high`` is the same as ``advantage_high``, ``v_low`` as
``value_low``, and so on.

Left out on purpose: widgets (they copy data out of these figures), torch, reading files.
"""

import html
import math
import os
import textwrap
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

from hiper_lab.stats import student

COLORS = {"switch": "#D55E00", "high": "#0072B2", "low": "#009E73"}
INK = "#7C7C7C"  # text, axes, and whatever belongs to no level
NAMES = {"switch": "switch", "high": "subgoal (high)", "low": "action (low)"}
RUNS = (INK, "#9B5FC0", "#A6761D", "#D1478C")
POSITIVE, NEGATIVE = (230, 159, 0), (155, 95, 192)  # orange and purple: safe, and no level's colour
SIGNS = [
    [0, f"rgb{NEGATIVE}"], [0.5, "rgba(127,127,127,0.12)"], [1, f"rgb{POSITIVE}"],
]  # fmt: skip
LETTERS = 105  # of the labels' size, in the width of a plot
LINES = 3  # of a label, in the height of a segment
SHARES = [[0, "#F4EEF8"], [1, f"rgb{NEGATIVE}"]]  # opaque: the numbers on it suit both themes

_AXIS = {"gridcolor": "rgba(127,127,127,0.25)", "zerolinecolor": "rgba(127,127,127,0.6)"}
# plotly's own template is 16 kB in every saved figure
pio.templates["hiper_lab"] = go.layout.Template(
    layout={
        "font": {"color": INK, "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [*COLORS.values(), INK],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {  # below the buttons, above the panels' titles
            "orientation": "h",
            "x": 0,
            "y": 0.96,
            "yanchor": "top",
            "yref": "container",
            "font": {"size": 12},
        },
        "margin": {"l": 60, "r": 60, "t": 90, "b": 50},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": INK, "activecolor": "#9B5FC0"},
    }
)


def rgba(color: str | tuple[int, int, int], alpha: float) -> str:
    """A colour with opacity alpha in [0, 1], as CSS and plotly write it."""
    if isinstance(color, str):
        color = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({color[0]},{color[1]},{color[2]},{alpha:.2f})"


def training_curves(metrics: pd.DataFrame) -> go.Figure:
    """Show whether a run learns, and whether its hierarchy is alive while it does.

    Four panels over iterations: success; how often the subgoal is switched and how long a segment
    lasts; how well each value head predicts the return; the entropy of each kind of decision.

    Args:
        metrics: One row per iteration, columns as in ``metrics.jsonl``. NaN leaves a gap, and a
            ``value/``, ``policy/`` or ``eval/`` curve that was never measured is left out (there is
            no entropy, say, as long as only the critic is trained).

    Raises:
        ValueError: If there is no row, or a column that every run has is missing.

    Example:
        >>> names = ["iteration", "rollout/success", "plan/switch_rate", "plan/segment_turns"]
        >>> training_curves(pd.DataFrame([[1, 0.2, 0.5, 2.0]], columns=names)).data[0].y
        array([0.2])
    """
    evals = ["eval/success", "eval/success_low", "eval/success_high"]
    evals = evals if evals[0] in metrics else []
    always = ["iteration", "rollout/success", "plan/switch_rate", "plan/segment_turns"]
    require(metrics, always + evals)
    metrics = metrics.sort_values("iteration")
    panels = ["success", "switches and segments", "values: correlation with return", "entropies"]
    figure = make_subplots(
        rows=2, cols=2, specs=[[{}, {"secondary_y": True}], [{}, {}]], shared_xaxes=True,
        vertical_spacing=0.12, horizontal_spacing=0.1, subplot_titles=panels,
    )  # fmt: skip

    def line(column: str, name: str, color: str, row: int, col: int, right=None, **style) -> None:
        figure.add_scatter(
            x=metrics["iteration"], y=metrics[column].to_numpy(float), name=name, mode="lines",
            line={"color": color, **style}, legendgroup=name, showlegend=name not in drawn,
            hovertemplate="%{y:.3f}", row=row, col=col, secondary_y=right,
        )  # fmt: skip
        drawn.add(name)

    drawn: set[str] = set()
    line("rollout/success", "rollouts", INK, 1, 1)
    if evals:
        known = metrics[metrics[evals[0]].notna()]
        mean, low, high = (known[column].to_numpy(float) for column in evals)
        interval = {"symmetric": False, "array": high - mean, "arrayminus": mean - low}
        figure.add_scatter(
            x=known["iteration"], y=mean, error_y=interval, mode="markers", row=1, col=1,
            marker={"color": INK, "size": 9, "symbol": "diamond"}, name="held-out, 95% interval",
            hovertemplate="%{y:.3f}",
        )  # fmt: skip
    line("plan/switch_rate", "switch rate", COLORS["switch"], 1, 2, right=False)
    line("plan/segment_turns", "segment length", COLORS["high"], 1, 2, right=True, dash="dot")
    for level, kind in zip(COLORS, ("switch", "subgoal", "action"), strict=True):
        for col, column in enumerate((f"value/{level}_correlation", f"policy/entropy_{kind}"), 1):
            if column in metrics:
                line(column, NAMES[level], COLORS[level], 2, col)

    titles = ["success rate", "switches per turn", "turns per segment", "correlation", "nats"]
    for axis, title in zip(figure.select_yaxes(), titles, strict=True):
        axis.update(title_text=title, rangemode="normal" if title == "correlation" else "tozero")
    _iteration_axes(figure, metrics["iteration"], row=2)
    figure.update_layout(yaxis_range=[0, 1], yaxis3={"showgrid": False, "tickmode": "auto"})
    return figure.update_layout(template="hiper_lab", height=620)


def trajectory_timeline(turns: pd.DataFrame, selected: int | None = None) -> go.Figure:
    """Show one trajectory: its subgoals, what the critic expected, and who got which credit.

    Top: one bar per segment with its subgoal, and a mark where the agent said SWITCH. Middle: the
    values each turn was judged by, and the rewards. Bottom: the advantages.

    Args:
        turns: One row per turn of one trajectory, in any order: ``turn``, ``segment``,
            ``switch``, ``subgoal``, ``action``, ``reward``, ``value_high``, ``value_low`` and
            ``advantage_high`` (NaN off boundaries), ``advantage_low``, ``advantage_switch``.
            An ``observation`` is shown on hover if there is one, and how it came to its ``end``.
        selected: The turn to mark.

    Raises:
        ValueError: If columns are missing, there is no turn, or a turn comes twice.
    """
    needed = ["action", "reward", "value_high", "value_low"]
    turns = _one_trajectory(turns, needed)
    x = turns["turn"]
    figure = make_subplots(3, shared_xaxes=True, row_heights=[1.4, 2.5, 2.8], vertical_spacing=0.06)
    _segments(figure, turns, 0, len(turns))
    if "end" in turns:
        figure.add_annotation(
            text="ended: " + str(turns["end"].iloc[0]).replace("_", " "), showarrow=False,
            x=1, xref="paper", xanchor="right", y=1, yref="paper", yanchor="bottom",
        )  # fmt: skip
    said = turns["action"].map(_text)
    if "observation" in turns:
        said = said + "<br>" + turns["observation"].map(_text)
    hover = "turn %{x}: %{y:.4f}<br>%{customdata}"

    def per_turn(add, column: str, name: str, **style) -> None:
        y = turns[column].to_numpy(float)
        add(x=x, y=y, name=name, col=1, customdata=said, hovertemplate=hover, **style)

    for level in [level for level in COLORS if f"value_{level}" in turns]:
        line = {"line_color": COLORS[level], "mode": "lines+markers", "showlegend": False}
        per_turn(figure.add_scatter, f"value_{level}", f"value, {NAMES[level]}", row=2, **line)
    dots = {"marker": {"color": INK, "symbol": "diamond-open"}, "mode": "markers"}
    per_turn(figure.add_scatter, "reward", "reward", row=2, **dots)
    for level, color in COLORS.items():
        per_turn(figure.add_bar, f"advantage_{level}", NAMES[level], row=3, marker_color=color)

    _turn_axes(figure, turns, selected)
    figure.update_layout(xaxis3_title="turn", yaxis2_title="value, reward", height=640)
    return figure.update_layout(yaxis3_title="advantage (reward)", template="hiper_lab")


def credit_comparison(
    first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str], selected: int | None = None
) -> go.Figure:
    """Show what two estimators say of the same trajectory, and where they differ.

    Below the subgoals: the advantages of the first, those of the second, on the same scale, and
    second minus first.

    Args:
        first: One row per turn of one trajectory: ``turn``, ``segment``, ``switch``, ``subgoal``
            and ``advantage_high`` (NaN off boundaries), ``advantage_low``, ``advantage_switch``.
        second: The same turns by another estimator.
        names: What the two are called.
        selected: The turn to mark.

    Raises:
        ValueError: If columns are missing, a turn comes twice, or the turns are not the same.
    """
    first, second = _one_trajectory(first), _one_trajectory(second)
    if first["turn"].tolist() != second["turn"].tolist():
        seen = f"{len(first)} turns and {len(second)} turns"
        raise ValueError(f"{seen}, expected the same turns of one trajectory")
    columns = [f"advantage_{level}" for level in COLORS]
    a, b = (frame.set_index("turn")[columns].astype(float) for frame in (first, second))
    titles = ["", *(_text(name, 60) for name in names), "difference"]
    figure = make_subplots(
        4, shared_xaxes=True, row_heights=[1.4, 2, 2, 2], vertical_spacing=0.07,
        subplot_titles=titles,
    )  # fmt: skip
    _segments(figure, first, 0, len(first))
    for row, frame in enumerate((a, b, b.fillna(0) - a.fillna(0)), 2):
        for level, color in COLORS.items():
            figure.add_bar(
                x=frame.index, y=frame[f"advantage_{level}"].to_numpy(), name=NAMES[level],
                legendgroup=level, showlegend=row == 2, marker_color=color, row=row, col=1,
                hovertemplate="turn %{x}: %{y:.4f}",
            )  # fmt: skip
    _turn_axes(figure, first, selected)
    limit = max(1e-6, pd.concat([a, b]).abs().max().max()) * 1.08
    for row in (2, 3):
        figure.update_yaxes(range=[-limit, limit], row=row)
    return figure.update_layout(xaxis4_title="turn", height=720, template="hiper_lab")


def side_by_side(turns: pd.DataFrame, limit: int = 12) -> go.Figure:
    """Show how several trajectories of one task divided it into subgoals, one lane each.

    Args:
        turns: One row per turn of all of them: ``lane`` (what to call the trajectory), ``turn``,
            ``segment``, ``switch``, ``subgoal``, ``end``.
        limit: Draw at most this many lanes, the first ones; at least 1.

    Raises:
        ValueError: If columns are missing or there is no row.
    """
    require(turns, ["lane", "turn", "segment", "switch", "subgoal", "end"])
    lanes = list(dict.fromkeys(turns["lane"]))
    shown = lanes[:limit]
    last, figure = turns.loc[turns["lane"].isin(shown), "turn"].max(), go.Figure()
    for y, lane in enumerate(shown):
        rows = turns[turns["lane"] == lane].sort_values("turn")
        _segments(figure, rows, -y, last + 4)
        figure.add_annotation(
            x=rows["turn"].max() + 0.6, y=-y, text=str(rows["end"].iloc[0]).replace("_", " "),
            showarrow=False, xanchor="left",
        )  # fmt: skip
    omitted = f" ({len(shown)} of {len(lanes)} trajectories)" if len(lanes) > limit else ""
    figure.update_yaxes(
        tickvals=[-y for y in range(len(shown))], ticktext=[_text(lane, 40) for lane in shown],
        automargin=True, zeroline=False, showgrid=False,
    )  # fmt: skip
    figure.update_xaxes(title="turn" + omitted, zeroline=False, range=[-0.6, last + 3.5])
    figure.update_layout(barmode="overlay", height=150 + 60 * len(shown))
    return figure.update_layout(template="hiper_lab")


CURVES = ("rollout/success", "eval/success", "plan/switch_rate", "plan/segment_turns")


def learning_curves(
    metrics: pd.DataFrame, columns: tuple[str, ...] = CURVES, smooth: int = 1
) -> go.Figure:
    """Compare runs: mean over seeds with a 95% band, one panel per metric.

    The band is mean ± t s/√n, Student's interval for n seeds; a single seed has none.

    Args:
        metrics: One row per run, seed and iteration: ``run`` (what is compared), ``seed``,
            ``iteration`` and metrics. NaN leaves out a point.
        columns: The metrics to draw; one that no run has is left out.
        smooth: Average each seed's curve over so many iterations, at least 1. Evaluations, which
            may be many iterations apart, are shown as they are.

    Raises:
        ValueError: If columns are missing or there is no row.

    Example:
        >>> rows = [("a", 0, 1, 0.2), ("a", 1, 1, 0.4)]
        >>> metrics = pd.DataFrame(rows, columns=["run", "seed", "iteration", "rollout/success"])
        >>> band, curve = learning_curves(metrics).data
        >>> curve.y.round(3), band.y.round(3)     # 0.3 ± 12.706 · 0.1
        (array([0.3]), array([ 1.571, -0.971]))
    """
    require(metrics, ["run", "seed", "iteration"])
    columns = [c for c in columns if c in metrics and metrics[c].notna().any()]
    if not columns:
        raise ValueError(f"none of the metrics is there; the frame has {list(metrics.columns)}")
    across = 1 if len(columns) == 1 else 2
    figure = make_subplots(
        math.ceil(len(columns) / across), across, shared_xaxes="all", subplot_titles=columns,
        vertical_spacing=0.12, horizontal_spacing=0.1,
    )  # fmt: skip
    runs = metrics.groupby("run", sort=False)
    step = 0.025 * max(2, metrics["iteration"].max() - metrics["iteration"].min())
    for i, (run, rows) in enumerate(runs):
        color, dash = RUNS[i % len(RUNS)], ("solid", "dash", "dot")[i // len(RUNS) % 3]
        for k, column in enumerate(columns):
            known = rows.dropna(subset=[column]).sort_values("iteration")
            smoothed = known.groupby("seed")[column].transform(
                lambda curve, window: curve.rolling(window, min_periods=1).mean(),
                window=1 if column.startswith("eval/") else smooth,
            )
            seeds = smoothed.groupby(known["iteration"]).agg(["mean", "sem", "size"])
            place = {"row": k // across + 1, "col": k % across + 1, "legendgroup": str(run)}
            banded = seeds[seeds["size"] > 1]
            half = banded["sem"] * banded["size"].map(student)
            around = pd.concat([banded["mean"] + half, (banded["mean"] - half)[::-1]])
            one = len(seeds) == len(half) == 1  # bars beside each other, not on each other
            alone = {"array": half.to_numpy(), "width": 6} if one else None
            figure.add_scatter(
                x=around.index, y=around.to_numpy(), fill="toself", hoverinfo="skip", mode="none",
                fillcolor=rgba(color, 0.2), showlegend=False, **place,
            )  # fmt: skip
            figure.add_scatter(
                x=seeds.index + one * step * (i - (len(runs) - 1) / 2), showlegend=k == 0,
                y=seeds["mean"].to_numpy(), name=_text(run, 60),
                mode="lines+markers" if len(seeds) <= 12 else "lines",
                line={"color": color, "dash": dash}, hovertemplate="%{y:.3f}", error_y=alone,
                **place,
            )  # fmt: skip
    _iteration_axes(figure, metrics["iteration"], row=math.ceil(len(columns) / across))
    figure.update_yaxes(rangemode="tozero")
    for k, column in enumerate(columns):
        if "success" in column or "rate" in column:  # a wide band is no reason to flatten a curve
            figure.update_yaxes(range=[0, 1.03], row=k // across + 1, col=k % across + 1)
    return figure.update_layout(
        height=120 + 250 * math.ceil(len(columns) / across), template="hiper_lab"
    )


def comparison(table: pd.DataFrame) -> go.Figure:
    """Show which arm is better and how sure that is: estimates with their 95% intervals.

    Three panels with a row per arm: the score (IQM), the paired difference to the baseline with a
    line at 0, the probability of beating it with a line at ½. An interval that crosses the line
    leaves the question open. Arms have the colours of `learning_curves`, in the same order.

    Args:
        table: As `hiper_lab.results.compare` gives it. NaN leaves out a point or its interval.

    Raises:
        ValueError: If columns are missing or there is no row.
    """
    panels = {"iqm": "", "difference": "difference_", "improvement": "improvement_"}
    require(table, ["arm", *(c for x, p in panels.items() for c in (x, f"{p}low", f"{p}high"))])
    titles = ["score, IQM", "difference to the baseline", "probability of improvement"]
    figure = make_subplots(1, 3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    names = [_text(arm, 40) for arm in table["arm"]]
    for col, (column, prefix) in enumerate(panels.items(), 1):
        low, x, high = (table[c].to_numpy(float) for c in (f"{prefix}low", column, f"{prefix}high"))
        for i, name in enumerate(names):
            around = {"array": high[[i]] - x[i], "arrayminus": x[i] - low[[i]], "symmetric": False}
            figure.add_scatter(
                x=x[[i]], y=[name], error_x=around, mode="markers", showlegend=False, row=1,
                marker={"color": RUNS[i % len(RUNS)], "size": 10}, name=name, col=col,
                hovertemplate="%{x:.3f}",
            )  # fmt: skip
    for col, line in ((2, 0), (3, 0.5)):
        figure.add_vline(line, line={"color": INK, "dash": "dot", "width": 1}, row=1, col=col)
    figure.update_xaxes(zeroline=False, range=[-0.03, 1.03], col=3)
    figure.update_yaxes(range=[len(names) - 0.5, -0.5], automargin=True, zeroline=False)
    return figure.update_layout(height=160 + 40 * len(names), template="hiper_lab")


def share_map(shares: pd.DataFrame, title: str) -> go.Figure:
    """Show how shares move over training, one row per kind and one panel per run.

    Args:
        shares: ``run``, ``iteration``, ``kind`` and ``share``, in [0, 1], e.g. the success per task
            type or how often each failure happened. Optional ``n``, shown on hover.
        title: What the share is of.

    Raises:
        ValueError: If columns are missing or there is no row.
    """
    require(shares, ["run", "iteration", "kind", "share"])
    runs, kinds = list(dict.fromkeys(shares["run"])), list(dict.fromkeys(shares["kind"]))
    figure = make_subplots(
        1, len(runs), shared_yaxes=True, subplot_titles=[_text(run, 40) for run in runs],
        horizontal_spacing=0.03,
    )  # fmt: skip
    for col, run in enumerate(runs, 1):
        rows = shares[shares["run"] == run]
        table = rows.pivot(index="kind", columns="iteration", values="share").reindex(kinds[::-1])
        counts = rows.assign(n=rows["n"] if "n" in rows else 1)
        counts = counts.pivot(index="kind", columns="iteration", values="n").reindex(kinds[::-1])
        figure.add_heatmap(
            z=table.to_numpy(float), x=[str(x) for x in table.columns],
            y=[_text(kind, 40) for kind in table.index], customdata=counts.to_numpy(float),
            zmin=0, zmax=1, colorscale=SHARES, xgap=1, ygap=1, showscale=col == len(runs),
            texttemplate="%{z:.0%}" if table.size <= 80 else None,
            hovertemplate="%{y}, iteration %{x}: %{z:.1%} of %{customdata}<extra></extra>",
            colorbar={"tickformat": ".0%", "thickness": 12}, row=1, col=col,
        )  # fmt: skip
    figure.update_xaxes(title_text="iteration", type="category", showgrid=False)
    figure.update_yaxes(automargin=True, showgrid=False)
    figure.update_layout(title={"text": _text(title), "font": {"size": 14}, "x": 0})
    return figure.update_layout(height=150 + 34 * len(kinds), template="hiper_lab")


def subgoal_history(segments: pd.DataFrame, limit: int = 20) -> go.Figure:
    """Show the vocabulary of subgoals over training: which appear, how often, with what credit.

    A dot's area is the subgoal's share of the iteration's segments, its colour the mean
    ``advantage_high`` of choosing it: orange above zero, purple below. Panels are runs.

    Args:
        segments: One row per segment: ``iteration``, ``subgoal``, ``advantage_high``, ``success``
            (of its trajectory) and, optional, ``run``.
        limit: Draw at most this many subgoals, the most frequent ones; at least 1.

    Raises:
        ValueError: If columns are missing or there is no row.
    """
    segments = _canonical(segments)
    segments = segments if "run" in segments else segments.assign(run="")
    require(segments, ["iteration", "subgoal", "advantage_high", "success"])
    counts = segments["subgoal"].value_counts()
    names = counts.index[:limit][::-1]
    table = segments.groupby(["run", "iteration", "subgoal"], sort=False, as_index=False).agg(
        n=("subgoal", "size"), credit=("advantage_high", "mean"), won=("success", "mean")
    )
    table["share"] = table["n"] / table.groupby(["run", "iteration"])["n"].transform("sum")
    table = table[table["subgoal"].isin(names)]
    limit_credit = max(1e-6, table["credit"].abs().max())
    runs = list(dict.fromkeys(table["run"]))
    figure = make_subplots(
        1, len(runs), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[_text(run, 40) for run in runs] if runs != [""] else None,
    )  # fmt: skip
    place = {name: i for i, name in enumerate(names)}
    for col, run in enumerate(runs, 1):
        rows = table[table["run"] == run]
        figure.add_scatter(
            x=rows["iteration"], y=rows["subgoal"].map(place), mode="markers", showlegend=False,
            customdata=[
                f"{_text(name)}<br>{n} segments ({share:.1%}), won {won:.0%}<br>credit {credit:.4f}"
                for name, n, share, won, credit in zip(
                    *(rows[c] for c in ("subgoal", "n", "share", "won", "credit")), strict=True
                )
            ],
            marker={
                "size": rows["share"], "sizemode": "area", "sizeref": table["share"].max() / 22**2,
                "sizemin": 3, "color": rows["credit"].to_numpy(), "colorscale": SIGNS,
                "cmin": -limit_credit, "cmax": limit_credit, "line": {"width": 1, "color": INK},
                "showscale": col == len(runs),
                "colorbar": {"title": {"text": "mean credit<br>(reward)"}, "thickness": 12},
            },
            hovertemplate="iteration %{x}<br>%{customdata}<extra></extra>", row=1, col=col,
        )  # fmt: skip
    _iteration_axes(figure, segments["iteration"])
    ticks = {"tickvals": list(place.values()), "ticktext": [_text(n, 40) for n in names]}
    figure.update_yaxes(automargin=True, zeroline=False, **ticks)
    return figure.update_layout(height=140 + 26 * len(names), template="hiper_lab")


def credit_per_subgoal(turns: pd.DataFrame, limit: int = 20) -> go.Figure:
    """Rank subgoals by the credit they earned: which plans helped, which hurt, how often.

    A bar is the mean ``advantage_high`` over the boundaries that chose the subgoal, with the
    standard error of that mean. Its label says how often, and how many of those were won.

    Args:
        turns: One row per turn of any number of trajectories: ``subgoal``, ``advantage_high``
            (NaN off boundaries) and, optional, ``success`` of the row's trajectory.
        limit: Draw at most this many subgoals, the most frequent ones; at least 1.

    Raises:
        ValueError: If columns are missing, no row has an ``advantage_high``, or limit is 0.

    Example:
        >>> turns = pd.DataFrame({"subgoal": ["find mug", "find mug", "wait"],
        ...                       "advantage_high": [0.5, 0.3, -0.2]})
        >>> figure = credit_per_subgoal(turns)
        >>> figure.layout.yaxis.ticktext, figure.data[0].x
        (('wait (n=1)', 'find mug (n=2)'), array([-0.2,  0.4]))
    """
    turns = _canonical(turns)
    require(turns, ["subgoal", "advantage_high"])
    chosen = turns[turns["advantage_high"].notna()].astype({"advantage_high": float})
    if chosen.empty or limit < 1:
        seen = f"{len(chosen)} rows with an advantage_high, limit {limit}"
        raise ValueError(f"{seen}; expected at least 1 of each")
    groups = chosen.groupby("subgoal", dropna=False)
    table = groups["advantage_high"].agg(["mean", "size", "sem"]).fillna({"sem": 0.0})
    table["note"] = "n=" + table["size"].astype(str)
    if "success" in chosen:
        table["note"] += groups["success"].mean().map(", won {:.0%}".format)
    table = table.nlargest(limit, "size").sort_values("mean", kind="stable")
    rows = list(range(len(table)))  # not names: two long ones may be shortened to the same text
    figure = go.Figure().add_bar(
        x=table["mean"].to_numpy(), y=rows, orientation="h", marker={"color": COLORS["high"]},
        error_x={"array": table["sem"].to_numpy(), "color": INK}, customdata=table.index.map(_text),
        hovertemplate="%{customdata}<br>%{x:.4f}<extra></extra>",
    )  # fmt: skip
    names = [f"{_text(name, 50)} ({note})" for name, note in table["note"].items()]
    figure.update_yaxes(automargin=True, tickvals=rows, ticktext=names)
    omitted = f" ({limit} most frequent of {len(groups)} subgoals)" if len(groups) > limit else ""
    figure.update_xaxes(title="mean advantage of choosing it (reward)" + omitted)
    return figure.update_layout(height=120 + 28 * len(rows), margin_t=30, template="hiper_lab")


def save(figure: go.Figure, path: Path | str) -> Path:
    """Write a figure; the ending says how. The file appears whole or not at all.

    ``.html`` opens in a browser without a network, ``.json`` is plotly's own format; ``.png`` and
    ``.svg`` need the package kaleido.

    Raises:
        ValueError: If the ending is another.
        RuntimeError: If kaleido, or the browser it drives, is missing; says how to install it.
    """
    path = Path(path)
    kind = path.suffix.lower().lstrip(".")
    if kind == "html":
        data = figure.to_html(include_plotlyjs=True, div_id="figure").encode()
    elif kind == "json":
        data = figure.to_json().encode()
    elif kind in ("png", "svg"):
        data = figure.to_image(format=kind)
    else:
        raise ValueError(f"{path} ends in {path.suffix!r}, expected .html, .json, .png or .svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _segments(figure: go.Figure, turns: pd.DataFrame, y: int, across: float) -> None:
    """A bar per segment at height y of the first panel, and a mark where the agent said SWITCH.

    ``across`` is how many turns the axis shows: a name is broken, then cut, to fit into its bar.
    """
    segments, switched = turns.groupby("segment"), turns[turns["switch"].astype(bool)]
    names, lengths = segments["subgoal"].first(), segments.size()
    room = (LETTERS * lengths / across).astype(int)
    figure.add_bar(
        x=lengths, base=segments["turn"].min() - 0.5, y=[y] * len(segments), width=0.8,
        orientation="h", text=[_lines(*cut) for cut in zip(names, room, strict=True)],
        customdata=names.map(_text), textposition="inside", insidetextanchor="start", textangle=0,
        textfont={"color": "white", "size": 11}, constraintext="none",
        marker={"color": COLORS["high"], "line": {"width": 2, "color": "white"}}, showlegend=False,
        hovertemplate="%{customdata}<br>%{x} turns<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=switched["turn"] - 0.5, y=[y + 0.52] * len(switched), mode="markers", cliponaxis=False,
        marker={"color": COLORS["switch"], "symbol": "triangle-down", "size": 11},
        name="SWITCH", showlegend=y == 0, hovertemplate="SWITCH<extra></extra>",
    )  # fmt: skip


def _iteration_axes(figure: go.Figure, iterations: pd.Series, row: int | None = None) -> None:
    """Whole numbers only, also on the axis of a short run."""
    short = iterations.max() - iterations.min() <= 10
    figure.update_xaxes(dtick=1 if short else None, zeroline=False)
    figure.update_xaxes(title_text="iteration", row=row)


def _turn_axes(figure: go.Figure, turns: pd.DataFrame, selected: int | None) -> None:
    """Shared axis of turns, the axis of the subgoals, and a band behind the selected turn."""
    x = turns["turn"]
    figure.update_xaxes(range=[x.min() - 0.5, x.max() + 0.5], zeroline=False)
    figure.update_layout(yaxis={"tickvals": [0], "ticktext": ["subgoal"], "range": [-0.6, 1]})
    if selected is not None:
        figure.add_shape(
            type="rect", x0=selected - 0.5, x1=selected + 0.5, y0=0, y1=1, yref="paper",
            fillcolor="rgba(127,127,127,0.2)", line_width=0, layer="below",
        )  # fmt: skip


def _one_trajectory(turns: pd.DataFrame, columns: list[str] | None = None) -> pd.DataFrame:
    turns = _canonical(turns)
    needed = ["turn", "segment", "switch", "subgoal", *(columns or [])]
    require(turns, needed + [f"advantage_{level}" for level in COLORS])
    if turns["turn"].duplicated().any():
        raise ValueError(f"turns are {sorted(turns['turn'])}, expected each once: one trajectory")
    return turns.sort_values("turn")


def _canonical(turns: pd.DataFrame) -> pd.DataFrame:
    """Read the columns of ``credit_table`` as those of ``turn_frame``."""
    prefixes = {"adv": "advantage", "v": "value"}
    names = {f"{a}_{level}": f"{b}_{level}" for a, b in prefixes.items() for level in COLORS}
    return turns.rename(columns={a: b for a, b in names.items() if b not in turns})


def require(frame: pd.DataFrame, columns: list[str]) -> None:
    """Refuse a frame without these columns, or without rows, with a ValueError."""
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"missing columns {missing}; the frame has {list(frame.columns)}")
    if frame.empty:
        raise ValueError("the frame has no rows, expected at least one")


def _text(value: object, width: int = 300) -> str:
    """A label: one line, shortened, with nothing that plotly would take for markup."""
    text = " ".join(str(value).split()) if isinstance(value, str) else ""
    text = text if len(text) <= width else text[: width - 1] + "…"
    return html.escape(text, quote=False) or "(none)"


def _lines(value: object, width: int) -> str:
    """A label of a few lines of ``width`` letters: long words are cut, then the whole."""
    width = max(1, width)
    words = value.split() if isinstance(value, str) else []
    text = " ".join(word if len(word) <= width else word[: width - 1] + "…" for word in words)
    lines = textwrap.wrap(text, width, max_lines=LINES, placeholder="…")
    return "<br>".join(html.escape(line, quote=False) for line in lines) or "(none)"
