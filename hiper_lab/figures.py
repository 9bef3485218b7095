"""From a data frame to a `plotly.graph_objects.Figure`, one plain function per picture.

A level has one colour in every figure, from Okabe & Ito's colour-blind safe set: the switch, the
subgoal (high), the action (low).
Backgrounds are transparent, and every ink is readable on white and on JupyterLab's dark theme.

The frames are those of `hiper_lab.trajectory` and ``metrics.jsonl``. Columns may also be named as
in `hiper_lab.credit.credit_table`: ``adv_high`` is the same as ``advantage_high``, ``v_low`` as
``value_low``, and so on.

Left out on purpose: widgets (they copy data out of these figures), torch, reading files.
"""

import html
import os
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.subplots import make_subplots

COLORS = {"switch": "#D55E00", "high": "#0072B2", "low": "#009E73"}
INK = "#777777"  # text, axes, and whatever belongs to no level
NAMES = {"switch": "switch", "high": "subgoal (high)", "low": "action (low)"}

_AXIS = {"gridcolor": "rgba(127,127,127,0.25)", "zerolinecolor": "rgba(127,127,127,0.6)"}
# plotly's own template is 16 kB in every saved figure
pio.templates["hiper_lab"] = go.layout.Template(
    layout={
        "font": {"color": INK, "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [*COLORS.values(), INK],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"orientation": "h", "x": 0, "y": 1.08, "yanchor": "bottom"},
        "margin": {"l": 60, "r": 60, "t": 90, "b": 50},
    }
)


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
    _require(metrics, always + evals)
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
    figure.update_xaxes(title_text="iteration", row=2)
    figure.update_layout(yaxis_range=[0, 1], yaxis3={"showgrid": False, "tickmode": "auto"})
    return figure.update_layout(template="hiper_lab", height=620)


def trajectory_timeline(turns: pd.DataFrame) -> go.Figure:
    """Show one trajectory: its subgoals, what the critic expected, and who got which credit.

    Top: one bar per segment with its subgoal, and a mark where the agent said SWITCH. Middle: the
    values each turn was judged by, and the rewards. Bottom: the advantages.

    Args:
        turns: One row per turn of one trajectory, in any order: ``turn``, ``segment``,
            ``switch``, ``subgoal``, ``action``, ``reward``, ``value_high``, ``value_low`` and
            ``advantage_high`` (NaN off boundaries), ``advantage_low``, ``advantage_switch``.
            An ``observation`` is shown on hover if there is one.

    Raises:
        ValueError: If columns are missing, there is no turn, or a turn comes twice.
    """
    turns = _canonical(turns)
    needed = ["turn", "segment", "switch", "subgoal", "action", "reward", "value_high", "value_low"]
    _require(turns, needed + [f"advantage_{level}" for level in COLORS])
    if turns["turn"].duplicated().any():
        raise ValueError(f"turns are {sorted(turns['turn'])}, expected each once: one trajectory")
    turns = turns.sort_values("turn")
    x, switched = turns["turn"], turns[turns["switch"].astype(bool)]
    figure = make_subplots(3, shared_xaxes=True, row_heights=[1, 2.5, 2.8], vertical_spacing=0.06)
    segments = turns.groupby("segment")
    figure.add_bar(
        x=segments.size(), base=segments["turn"].min() - 0.5, y=[0] * len(segments), width=1,
        orientation="h", text=segments["subgoal"].first().map(_text),
        textposition="inside", insidetextanchor="start", textangle=0, textfont={"color": "white"},
        marker={"color": COLORS["high"], "line": {"width": 2, "color": "white"}}, showlegend=False,
        hovertemplate="%{text}<br>%{x} turns<extra></extra>", row=1, col=1,
    )  # fmt: skip
    figure.add_scatter(
        x=switched["turn"] - 0.5, y=[0.7] * len(switched), mode="markers", cliponaxis=False,
        marker={"color": COLORS["switch"], "symbol": "triangle-down", "size": 11},
        name="SWITCH", hovertemplate="SWITCH<extra></extra>", row=1, col=1,
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

    figure.update_xaxes(range=[x.min() - 0.5, x.max() + 0.5], zeroline=False)
    figure.update_layout(yaxis={"tickvals": [0], "ticktext": ["subgoal"], "range": [-0.6, 1]})
    figure.update_layout(xaxis3_title="turn", yaxis2_title="value, reward", height=640)
    return figure.update_layout(yaxis3_title="advantage (reward)", template="hiper_lab")


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
    _require(turns, ["subgoal", "advantage_high"])
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


def _canonical(turns: pd.DataFrame) -> pd.DataFrame:
    """Read the columns of ``credit_table`` as those of ``turn_frame``."""
    prefixes = {"adv": "advantage", "v": "value"}
    names = {f"{a}_{level}": f"{b}_{level}" for a, b in prefixes.items() for level in COLORS}
    return turns.rename(columns={a: b for a, b in names.items() if b not in turns})


def _require(frame: pd.DataFrame, columns: list[str]) -> None:
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
