"""Inspectors for notebooks: what an agent tried, which credit it got, and how runs compare.

- `TrajectoryInspector`: the trajectories of a run, each with its subgoals, texts and credit.
- `CreditExplorer`: credit recomputed under the reader's γ, λ, estimator, and flipped switches.
- `RunComparer`: several runs over training.
- `LiveMonitor`: a run that another process is writing.

Each is ipywidgets around one plotly figure, needs neither network nor model, and has a static twin:
``figure()``, ``table()``, ``to_html(path)``. The first two share a trait, ``selection`` (iteration,
trajectory, turn); ``traitlets.link`` it to let two of them show the same turn. Its text is an
address, ``run/iteration/trajectory:turn``, which ``goto`` takes.

Left out on purpose: pictures (see figures), texts (pages), numbers (credit), files (records).
"""

import asyncio
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as ui
import numpy as np
import pandas as pd
import plotly
import plotly.graph_objects as go
import traitlets

from hiper_lab import figures, pages, records
from hiper_lab.credit import Credit, CreditConfig, TurnGrid, Values, estimate, explain
from hiper_lab.figures import COLORS, NAMES
from hiper_lab.grid import real_turns
from hiper_lab.records import FAILURES, Rollouts
from hiper_lab.trajectory import Trajectory, to_grid, to_values, turn_frame

Source = Rollouts | Path | str | Iterable[Trajectory]
FIELD = {"width": "270px"}


def _offer(control: ui.Dropdown | ui.Select, options: list[str] | list[tuple[str, str]]) -> None:
    """Give a control other options; what is picked stays if it is still there, else the first."""
    keep, control.options = control.value, options
    values = [option[1] if isinstance(option, tuple) else option for option in options]
    control.value = keep if keep in values else next(iter(values), None)


def _in_order(outcomes: Iterable[str]) -> list[str]:
    """How episodes went, in the order of the taxonomy; then the other ways in which they ended."""
    order = {name: i for i, name in enumerate(("won", *FAILURES))}
    return sorted(outcomes, key=lambda name: (order.get(name, len(order)), name))


def _parts(figure: go.Figure) -> tuple[list[str], set[str]]:
    """Kinds of traces and what the layout has: what two pictures must share to be one plot."""
    return [trace.type for trace in figure.data], set(figure.layout.to_plotly_json()) - {"autosize"}


PATIENCE = 5.0  # seconds that a page has for showing that it heard of a first change
# anywidget waits two seconds for a widget's module. Plotly's has 5 MB, and a plot for which a busy
# page takes longer is drawn but never hears of a change. This module is there soon, and loads
# plotly's from the string PLOTLY, once for all plots of a page.
_MODULE = """
const load = () => (globalThis[NAME] ??= import(
  URL.createObjectURL(new Blob([PLOTLY], { type: "text/javascript" }))));
export default () => {
  let widget;
  return {
    initialize(props) {
      widget = load().then((plotly) => {
        const made = plotly.default();
        made.initialize(props);
        return made;
      });
    },
    async render(props) { return (await widget).render(props); },
  };
};
"""


class _Plot(go.FigureWidget):
    """A plot that a busy page draws whole, and keeps up to date."""

    _esm = _MODULE.replace("NAME", json.dumps(f"hiper_lab plotly {plotly.__version__}")).replace(
        "PLOTLY", json.dumps(str(go.FigureWidget._esm))
    )

    reports = 0  # by pages, of what they have drawn

    def open(self) -> None:
        # plotly's own sends the data in a second message, after which a page does not look again
        if self._widget_data:
            super().open()


class _Inspector(ui.VBox):
    """What all inspectors share: one figure kept up to date, a digest, and the static twin."""

    def __init__(self, *rows: Iterable[ui.Widget]):
        self._muted = False
        self.plot: _Plot | None = None
        self.frame, self.text = ui.VBox(), ui.HTML()
        above = [ui.HBox(list(row), layout={"flex_flow": "row wrap"}) for row in rows]
        super().__init__([ui.HTML(pages.STYLE), *above, self.frame, self.text])
        self.add_class("hl")

    def figure(self) -> go.Figure:
        """The present picture as a plain figure, for readers without a kernel."""
        raise NotImplementedError

    def table(self) -> pd.DataFrame:
        """The numbers behind the picture."""
        raise NotImplementedError

    def digest(self) -> str:
        """What is shown, in a few words that are the same for the same data."""
        raise NotImplementedError

    def details(self) -> str:
        """HTML below the picture."""
        return ""

    def page(self) -> list[str]:
        """HTML texts for the file of `to_html`, between the picture and the table."""
        return [self.details()]

    def to_html(self, path: Path | str) -> Path:
        """Write what is shown as one file that opens without a network or a kernel."""
        return pages.save(path, repr(self), [self.figure(), *self.page(), self.table()])

    def __repr__(self) -> str:
        try:
            return f"{type(self).__name__}({self.digest()})"
        except ValueError as error:  # what is shown instead of a picture
            return f"{type(self).__name__}: {error}"

    def render(self) -> None:
        """Bring the picture and the text below it up to date; say what is wrong if that fails."""
        try:
            figure, text = self.figure(), self.details()
        except ValueError as error:
            self._put(None)
            self.text.value = f"<b>{escape(str(error))}</b>"
            return
        self.text.value = f'<div class="hl">{text}</div>'
        plot = self.plot
        if plot is None or _parts(plot) != _parts(figure):
            return self._put(figure)
        with plot.batch_update():
            for shown, new in zip(plot.data, figure.data, strict=True):
                shown.update(new.to_plotly_json(), overwrite=True)
            plot.layout.update(figure.layout.to_plotly_json(), overwrite=True)
        # A page that is still loading plotly's code drops these messages and starts from this.
        plot._widget_data, plot._widget_layout = deepcopy(plot._data), deepcopy(plot._layout)

    def _put(self, figure: go.Figure | None) -> None:
        """Show a picture of another kind (the page could not take the old one's parts away)."""
        old, self.plot = self.plot, None
        if figure is not None:
            self.plot = plot = _Plot(figure)
            plot.open()
            plot.observe(lambda report: self._reported(plot, report), "_js2py_traceDeltas")
            for trace in plot.data:
                if trace.type in ("bar", "scatter"):
                    trace.on_click(self.clicked)
        self.frame.children = [] if self.plot is None else [self.plot]
        if old is not None:
            old.close()

    def _reported(self, plot: _Plot, report: Mapping) -> None:
        """A page has drawn a plot, or a change of it: what it takes from us it reports."""
        if not report["new"]:
            return
        plot.reports += 1
        if plot.reports == 1:  # a page first draws 700 px wide; then it can take the width there is
            plot.plotly_update(relayout_data={"autosize": True})
            asyncio.get_running_loop().call_later(PATIENCE, self._again, plot)

    def _again(self, plot: _Plot) -> None:
        """Show a plot anew if the page is deaf to it."""
        if plot is self.plot and plot.reports == 1:
            self._put(None)
            self.render()

    def clicked(self, trace: Any, points: Any, _: Any) -> None:
        """A click on the picture; means nothing unless an inspector says otherwise."""

    @contextmanager
    def _mute(self) -> Iterator[None]:
        """Move controls without their callbacks."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    def _on(self, controls: Iterable[ui.Widget], act: Callable[[], None]) -> None:
        """Call ``act`` when a reader, not the program, moves a control."""
        for control in controls:
            control.observe(lambda _: None if self._muted else act(), "value")


class _OfTurns(_Inspector):
    """An inspector of one turn of one trajectory: the selection, its controls, its address."""

    selection = traitlets.Tuple(traitlets.Int(), traitlets.Unicode(), traitlets.Int())

    def __init__(self, source: Source, *rows: Iterable[ui.Widget], beside: Iterable[ui.Widget]):
        self.rollouts = source if isinstance(source, Rollouts) else Rollouts(source)
        if not self.rollouts:
            raise ValueError(f"{self.rollouts.name} has no recorded trajectories yet")
        newest = max(self.rollouts)
        self.iteration = ui.SelectionSlider(
            options=sorted(self.rollouts), value=newest, description="iteration",
            continuous_update=False, layout=FIELD,
        )  # fmt: skip
        self.listing = ui.Select(rows=7, layout={"width": "98%"})
        self.turn = ui.IntSlider(description="turn", max=0, layout={"width": "420px"})
        super().__init__([self.iteration], *rows, [self.listing], [self.turn, *beside])
        self._pick(newest)
        self._on([self.iteration], lambda: self._pick(self.iteration.value))
        self._on([self.listing], lambda: self._pick(self.selection[0], self.listing.value))
        self._on([self.turn], lambda: self._pick(*self.selection[:2], self.turn.value))

    def load(self, iteration: int) -> None:
        """Read an iteration; what else depends on it is made here too."""
        self.loaded, self.trajectories = iteration, self.rollouts[iteration]

    def listed(self) -> list[tuple[str, str]]:
        """(label, trajectory) of what the list offers."""
        return [
            (f"{t.id:<6} {t.end.replace('_', ' '):<12}{len(t.turns):>3} turns  {t.task}", t.id)
            for t in self.trajectories
        ]

    @property
    def trajectory(self) -> Trajectory:
        """The selected trajectory."""
        return next(t for t in self.trajectories if t.id == self.selection[1])

    @property
    def address(self) -> str:
        """``run/iteration/trajectory:turn`` of the selection."""
        iteration, trajectory, turn = self.selection
        return f"{self.rollouts.name}/{iteration}/{trajectory}:{turn}"

    def goto(self, address: str) -> None:
        """Select a turn by its address; parts may be missing from the left, and the turn.

        Raises:
            ValueError: If there is no such trajectory or turn.
        """
        found = re.fullmatch(r"(?:(?:(.*)/)?(\d+)/)?([^/:]+)(?::(\d+))?", address.strip())
        if not found or Path(found[1] or self.rollouts.name).name != self.rollouts.name:
            expected = f"{self.rollouts.name}/ITERATION/TRAJECTORY:TURN"
            raise ValueError(f"address is {address!r}, expected {expected}")
        iteration, turn = int(found[2] or self.selection[0]), int(found[4] or 0)
        if iteration not in self.rollouts:
            raise ValueError(f"no iteration {iteration} was recorded, only {list(self.rollouts)}")
        lengths = {t.id: len(t.turns) for t in self.rollouts[iteration]}
        if turn >= lengths.get(found[3], 0):
            there = f"{lengths[found[3]]} turns" if found[3] in lengths else "no such trajectory"
            raise ValueError(f"no turn {found[3]}:{turn} in iteration {iteration}: {there}")
        self.selection = (iteration, found[3], turn)

    @traitlets.observe("selection")
    def _selected(self, _: Any) -> None:
        iteration, trajectory, turn = self.selection
        with self._mute():
            if iteration != self.loaded:
                self.load(iteration)
                self.iteration.value = iteration
                self.fill()
            if trajectory in dict(self.listing.options).values():
                self.listing.value = trajectory
            with self.turn.hold_trait_notifications():
                self.turn.max, self.turn.value = len(self.trajectory.turns) - 1, turn
        self.render()

    def clicked(self, trace: Any, points: Any, _: Any) -> None:
        if points.point_inds:
            bar = trace.type == "bar" and trace.orientation == "h"  # a segment: its first turn
            x = trace.base[points.point_inds[0]] if bar else points.xs[0]
            self._pick(*self.selection[:2], math.ceil(x))

    def fill(self) -> None:
        """Offer what `listed` says, keeping what is picked if it is still there."""
        with self._mute():
            spaced = [(label.replace(" ", "\u00a0"), name) for label, name in self.listed()]
            _offer(self.listing, spaced)

    def _pick(self, iteration: int, trajectory: str | None = None, turn: int = 0) -> None:
        if trajectory is None:  # the first one listed there
            self.load(iteration)
            self.fill()
            trajectory = self.listing.value or self.trajectories[0].id
        self.selection = (iteration, trajectory, turn)


class TrajectoryInspector(_OfTurns):
    """The trajectories of a run: what was tried, where it switched, and who got which credit.

    Filter, sort and search the list; pick a trajectory; click on a turn. Filters hold within the
    iteration that is chosen; at first only the newest is read.

    Args:
        source: A run's folder, a record file, `Rollouts`, or trajectories at hand.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If no trajectory is recorded there.
    """

    def __init__(self, source: Source):
        self.task = ui.Dropdown(options=["all"], description="task type", layout=FIELD)
        self.outcome = ui.Dropdown(options=["all"], description="outcome", layout=FIELD)
        self.turns = ui.IntRangeSlider(
            description="turns", min=1, max=100, value=(1, 100), layout=FIELD
        )
        self.switching = ui.FloatRangeSlider(
            description="switch rate", min=0, max=1, step=0.05, value=(0, 1), layout=FIELD
        )
        self.search = ui.Text(
            description="search", placeholder="in all its texts",
            continuous_update=False, layout=FIELD,
        )  # fmt: skip
        columns = ["trajectory", "success", "return", "turns", "switch_rate", "failure", "task"]
        self.sort = ui.Dropdown(options=columns, description="sort by", layout=FIELD)
        self.falling = ui.Checkbox(
            description="largest first", indent=False, layout={"width": "150px"}
        )
        self.color = ui.ToggleButtons(
            options=["role", "advantage", "logprob"], style={"button_width": "90px"}
        )
        filters = (self.task, self.outcome, self.search, self.turns, self.switching, self.sort,
                   self.falling)  # fmt: skip
        super().__init__(source, filters[:3], filters[3:], beside=[self.color])
        self._on(filters, self._filter)
        self._on([self.color], self.render)

    def load(self, iteration: int) -> None:
        super().load(iteration)
        self._frame, self._turns = records.overview(self.trajectories)
        failed = _in_order(set(self._frame["failure"]) - {""})
        with self._mute():
            _offer(self.task, ["all", *sorted(set(self._frame["task_type"]) - {""})])
            _offer(self.outcome, ["all", "won", "failed", *failed])

    def table(self) -> pd.DataFrame:
        """The listed trajectories, filtered and sorted."""
        frame, texts = self._frame, self._turns
        (shortest, longest), (least, most) = self.turns.value, self.switching.value
        shown = frame["turns"].between(shortest, math.inf if longest == self.turns.max else longest)
        shown &= frame["switch_rate"].between(least - 1e-9, most + 1e-9)
        if self.task.value != "all":
            shown &= frame["task_type"] == self.task.value
        if self.outcome.value in ("won", "failed"):
            shown &= frame["success"] == (self.outcome.value == "won")
        elif self.outcome.value != "all":
            shown &= frame["failure"] == self.outcome.value
        if wanted := self.search.value.strip().lower():
            said = texts["observation"].str.cat(texts[["response", "subgoal", "action"]], "\n")
            hits = texts["trajectory"][said.str.lower().str.contains(wanted, regex=False)]
            task = frame["task"].str.lower().str.contains(wanted, regex=False)
            shown &= task | frame["trajectory"].isin(set(hits))
        columns = ["trajectory", "task", "task_type", "success", "failure", "return", "turns",
                   "segments", "switch_rate", "malformed"]  # fmt: skip
        rising = not self.falling.value
        return frame[shown].sort_values(self.sort.value, ascending=rising, kind="stable")[columns]

    def listed(self) -> list[tuple[str, str]]:
        return [
            (
                f"{name:<6} {'won' if won else failure:<17} {turns:>3} turns {segments:>3} segments"
                f"  switch rate {rate:.2f}  return {return_:>6.2f}  {task}",
                name,
            )
            for name, task, _, won, failure, return_, turns, segments, rate, _ in self.table()
            .itertuples(index=False)
        ]  # fmt: skip

    def _filter(self) -> None:
        self.fill()
        if self.listing.value not in (None, self.selection[1]):
            self._pick(self.selection[0], self.listing.value)

    def figure(self) -> go.Figure:
        turns = self._turns[self._turns["trajectory"] == self.selection[1]]
        return figures.trajectory_timeline(turns, self.selection[2])

    def digest(self) -> str:
        turns = self.trajectory.turns
        segments = 1 + sum(turn.switch for turn in turns[1:])
        return (
            f"{self.address} of {len(turns)} turns, {segments} segments, "
            f"return {self.trajectory.return_:.4f}, {len(self.listing.options)} listed"
        )

    def details(self) -> str:
        return f"<b>{escape(self.address)}</b>{self._text(self.selection[2])}"

    def page(self) -> list[str]:
        return [
            f"<details {'open' if i == self.selection[2] else ''}><summary>turn {i}: "
            f"{escape(turn.action)}</summary>{self._text(i)}</details>"
            for i, turn in enumerate(self.trajectory.turns)
        ]

    def _text(self, turn: int) -> str:
        return pages.turn_html(self.trajectory, turn, self.color.value, self.rollouts.config)


ESTIMATORS = typing.get_args(typing.get_type_hints(CreditConfig)["estimator"])
SLIDERS = {"gamma": "γ", "lam_low": "λ low", "lam_high": "λ high", "lam_boundary": "λ boundary"}
SIDES = ("left", "right")
UNFLIPPED = "left, nothing flipped"
OTHERS = {f"left, but {name}": name for name in ESTIMATORS}


class CreditExplorer(_OfTurns):
    """Credit under the reader's own γ, λ and estimator, beside that of another configuration.

    The left configuration (first panel) follows the sliders; a preset sets them all. The right one
    (second panel) is a preset, the run's own configuration, or the left one with another estimator
    or with nothing flipped. A click on a bar says which terms add up to that advantage, on both
    sides.

    ``flip`` turns a KEEP into a SWITCH or back: segments split or merge and credit is computed
    again. It is a counterfactual of the estimator, not of the world: what was done, seen and
    rewarded afterwards stays, and so does what the critic said.

    Values that nobody recorded count as 0: what is left is a discounted return.

    Args:
        source: A run's folder, a record file, `Rollouts`, or trajectories at hand.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If no trajectory is recorded there.
    """

    def __init__(self, source: Source):
        rollouts = source if isinstance(source, Rollouts) else Rollouts(source)
        self.presets = {n: getattr(CreditConfig, n)() for n in ("lab", "paper", "upstream")}
        if "credit" in rollouts.config:
            trained = CreditConfig(**rollouts.config["credit"])
            self.presets = {"as trained": trained} | self.presets
        names = list(self.presets)
        self.preset = ui.Dropdown(options=names, description="left", layout=FIELD)
        self.estimator = ui.Dropdown(options=ESTIMATORS, description="estimator", layout=FIELD)
        self.right = ui.Dropdown(
            options=[*names, UNFLIPPED, *OTHERS],
            value="paper",
            description="right",
            layout=FIELD,
        )
        self.sliders = {
            name: ui.FloatSlider(
                min=0.5 if name == "gamma" else 0.0, max=1.0, step=0.005, description=label,
                readout_format=".3f", layout=FIELD,
            )
            for name, label in SLIDERS.items()
        }  # fmt: skip
        self.level = ui.ToggleButtons(
            options=[(NAMES[level], level) for level in COLORS], style={"button_width": "115px"}
        )
        self.flip = ui.Button(description="flip", icon="exchange", tooltip="KEEP to SWITCH or back")
        self.undo = ui.Button(description="undo flips", icon="undo")
        self.flips: set[tuple[str, int]] = set()
        self._set_sliders()
        choices, sliders = (self.preset, self.estimator, self.right), self.sliders.values()
        super().__init__(rollouts, choices, sliders, beside=(self.flip, self.undo, self.level))
        self._on([self.preset], self._use_preset)
        self._on([self.estimator, self.right, self.level, *sliders], self.render)
        self.flip.on_click(lambda _: self.flip_turn(self.selection[2]))
        self.undo.on_click(lambda _: self.unflip())

    def load(self, iteration: int) -> None:
        super().load(iteration)
        self.flips.clear()
        self._computed: tuple[Any, list[tuple[TurnGrid, Credit]]] = (None, [])
        config = self.rollouts.config
        similarity = config.get("credit", {}).get("anchor_similarity", 1.0)
        grid = to_grid(self.trajectories, similarity)
        reward = grid.reward * config.get("reward_scale", 1.0)
        self.grid = grid._replace(reward=reward)
        self.values = Values(*(v.nan_to_num(0.0) for v in to_values(self.trajectories)))
        self._rows = {t.id: i for i, t in enumerate(self.trajectories)}

    @property
    def config(self) -> CreditConfig:
        """The left configuration: a preset with the numbers of the sliders."""
        numbers = {name: slider.value for name, slider in self.sliders.items()}
        return replace(self.presets[self.preset.value], estimator=self.estimator.value, **numbers)

    @property
    def configs(self) -> tuple[CreditConfig, CreditConfig]:
        """The left configuration and the right one."""
        left, name = self.config, self.right.value
        if name not in self.presets:
            return left, replace(left, estimator=OTHERS.get(name, left.estimator))
        return left, self.presets[name]

    def names(self) -> tuple[str, str]:
        """What the two configurations are called."""
        (left, right), name = self.configs, self.right.value
        changed = "" if left == self.presets[self.preset.value] else ", changed"
        said = name if name in OTHERS else f"{name}: {right.estimator}"
        return f"{self.preset.value}{changed}: {left.estimator}", said

    def _set_sliders(self) -> None:
        preset = self.presets[self.preset.value]
        self.estimator.value = preset.estimator
        for name, slider in self.sliders.items():
            slider.value = getattr(preset, name)

    def _use_preset(self) -> None:
        with self._mute():
            self._set_sliders()
        self.render()

    def flip_turn(self, turn: int) -> None:
        """Turn the selected trajectory's KEEP into a SWITCH at a turn, or back; twice undoes it.

        At turn 0 a segment starts whatever was said: there is nothing to flip.
        """
        if 0 < turn < len(self.trajectory.turns):
            self.flips ^= {(self.selection[1], turn)}
            self.render()

    def unflip(self) -> None:
        """Undo every flip."""
        self.flips.clear()
        self.render()

    def flipped(self) -> TurnGrid:
        """The grid with the flips applied."""
        switch, boundary = self.grid.switch.clone(), self.grid.boundary.clone()
        same = self.grid.same_subgoal.clone()
        for name, turn in self.flips:
            at = self._rows[name], turn
            switch[at] = boundary[at] = ~switch[at]
            same[at] = ~switch[at]  # who keeps a subgoal keeps its words
        return self.grid._replace(switch=switch, boundary=boundary, same_subgoal=same)

    def compute(self) -> list[tuple[TurnGrid, Credit]]:
        """The credit of all trajectories, left and right, each with the grid it was computed on.

        Raises:
            ValueError: If an estimator needs what these trajectories do not have.
        """
        state = self.loaded, frozenset(self.flips), self.right.value, self.configs
        if self._computed[0] != state:  # picture, tables and text of one redraw share it
            flipped = self.flipped()
            grids = flipped, self.grid if self.right.value == UNFLIPPED else flipped
            pairs = zip(grids, self.configs, strict=True)
            made = [(grid, estimate(grid, self.values, config)) for grid, config in pairs]
            self._computed = state, made
        return self._computed[1]

    def frames(self) -> list[pd.DataFrame]:
        """The turns of the selected trajectory with the credit of the left and of the right."""
        row, turns, frames = self._rows[self.selection[1]], turn_frame([self.trajectory]), []
        for grid, credit in self.compute():
            switch, boundary, *advantages = (
                x[row, : len(turns)].numpy()
                for x in (grid.switch, grid.boundary, credit.switch, credit.high, credit.low)
            )
            named = dict(zip((f"advantage_{level}" for level in COLORS), advantages, strict=True))
            frame = turns.assign(switch=switch, segment=boundary.cumsum() - 1, **named)
            frames.append(frame.assign(advantage_high=frame["advantage_high"].where(boundary)))
        return frames

    def figure(self) -> go.Figure:
        return figures.credit_comparison(*self.frames(), self.names(), self.selection[2])

    def table(self) -> pd.DataFrame:
        """Per turn of the selected trajectory: the advantages left and right."""
        left, right = self.frames()
        columns = {
            f"{level}_{side}": frame[f"advantage_{level}"]
            for level in COLORS for side, frame in (("left", left), ("right", right))
        }  # fmt: skip
        return left[["turn", "switch", "subgoal", "action"]].assign(**columns)

    def summary(self) -> pd.DataFrame:
        """Per level over all trajectories: the spread left and right, and how far they agree."""
        (grid, left), (there, right) = self.compute()
        real = real_turns(grid).numpy()
        rows = []
        for level in COLORS:
            chosen = (grid.boundary & there.boundary).numpy() if level == "high" else True
            a, b = (getattr(credit, level).numpy()[real & chosen] for credit in (left, right))
            varies = a.std() > 0 and b.std() > 0
            together = np.corrcoef(a, b)[0, 1] if varies else math.nan
            agree = (np.sign(a) == np.sign(b)).mean()
            rows.append((NAMES[level], a.std(), b.std(), together, agree))
        columns = ["level", "spread left", "spread right", "correlation", "same sign"]
        return pd.DataFrame(rows, columns=columns)

    def explain(self, side: str = "left") -> pd.DataFrame:
        """The terms that add up to the advantage of the selected turn and level.

        Args:
            side: By which configuration, ``"left"`` or ``"right"``.

        Raises:
            ValueError: If no subgoal was chosen at that turn, or side is another.
        """
        if side not in SIDES:
            raise ValueError(f"side is {side!r}, expected left or right")
        _, name, turn = self.selection
        k = SIDES.index(side)
        grid = self.compute()[k][0]
        return explain(grid, self.values, self.configs[k], self._rows[name], turn, self.level.value)

    def _explained(self, side: str) -> str:
        try:
            terms = self.explain(side)
        except ValueError as error:
            return escape(str(error))
        parts = " ".join(f"{x:+.4f}" for x in terms["contribution"])
        return f"{terms['contribution'].sum():.4f} = {parts}{pages.table_html(terms)}"

    def details(self) -> str:
        level, turn = self.level.value, self.selection[2]
        why = "".join(
            f"<div style='flex:1 1 480px;min-width:0'>The {side} advantage of the {NAMES[level]} "
            f"at turn {turn}, term by term ({escape(name)}):<br>{self._explained(side)}</div>"
            for side, name in zip(SIDES, self.names(), strict=True)
        )
        flips = ", ".join(f"{name}:{turn}" for name, turn in sorted(self.flips)) or "none"
        return (
            f"<b>{escape(self.address)}</b>, flipped turns: {escape(flips)}"
            f"<div style='margin:8px 0;border-left:4px solid {COLORS[level]};padding-left:8px;"
            f"display:flex;flex-wrap:wrap;gap:8px 24px'>{why}</div>"
            f"All {len(self.trajectories)} trajectories:{pages.table_html(self.summary())}"
        )

    def digest(self) -> str:
        turn = self.table().iloc[self.selection[2]]
        credit = turn[[f"{level}_left" for level in COLORS]].dropna()  # high only at boundaries
        said = ", ".join(f"{name.split('_')[0]} {x:.4f}" for name, x in credit.items())
        return f"{self.address}, {self.names()[0]}, {said}"

    def clicked(self, trace: Any, points: Any, state: Any) -> None:
        if points.point_inds and trace.legendgroup in COLORS:
            self.level.value = trace.legendgroup
        super().clicked(trace, points, state)


class RunComparer(_Inspector):
    """Several runs over training: curves, task types, failures, subgoals, one task side by side.

    Curves come from ``metrics.jsonl``; the rest from rollouts, of which ``samples`` iterations per
    seed, evenly spaced, are read when they are first shown.

    Args:
        runs: Run folders, or names with the folders of their seeds. Folders that differ only in a
            ``seed`` number at the end of their name are seeds of one run.
        samples: Iterations read per seed, at least 1.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If there is no run.
    """

    def __init__(
        self, runs: Mapping[str, Iterable[Path | str]] | Iterable[Path | str], samples: int = 8
    ):
        if not isinstance(runs, Mapping):
            named: dict[str, list[Path | str]] = {}
            for folder in runs:
                name = re.sub(r"[-_]*seed[-_]?\d+$", "", Path(folder).resolve().name)
                named.setdefault(name, []).append(folder)
            runs = named
        self.runs = {name: [Rollouts(folder) for folder in seeds] for name, seeds in runs.items()}
        if not self.runs:
            raise ValueError("there is no run, expected folders")
        self.samples, self._recorded = samples, None
        self.views = {
            "learning curves": self._curves, "task types": self._tasks, "failures": self._failures,
            "subgoals": self._subgoals, "same task": self._same_task,
        }  # fmt: skip
        self.view = ui.ToggleButtons(options=list(self.views), style={"button_width": "140px"})
        self.smooth = ui.IntSlider(description="smooth", value=1, min=1, max=20, layout=FIELD)
        self.game = ui.Dropdown(description="task", layout={"width": "480px"})
        super().__init__([self.view], [self.smooth, self.game])
        self._on([self.view, self.smooth, self.game], self.render)
        self.render()

    def metrics(self) -> pd.DataFrame:
        """``metrics.jsonl`` of every run, with its ``run`` and ``seed``."""
        frames = [
            records.read_metrics(rollouts.folder).assign(run=run, seed=seed)
            for run, seeds in self.runs.items() for seed, rollouts in enumerate(seeds)
        ]  # fmt: skip
        return pd.concat(frames, ignore_index=True)

    def recorded(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Trajectories and turns of the sampled iterations, as `records.sample` gives them."""
        if self._recorded is None:
            self._recorded = records.sample(self.runs, self.samples)
            games = self._recorded[0].groupby("game", sort=False)["task"].agg(["first", "size"])
            shared = games[games["size"] > 1]["first"]
            with self._mute():
                _offer(self.game, [(f"{task} ({game})", game) for game, task in shared.items()])
        return self._recorded

    def _curves(self) -> tuple[go.Figure, pd.DataFrame]:
        metrics = self.metrics()
        columns = [column for column in figures.CURVES if column in metrics]
        last = metrics.sort_values("iteration").groupby(["run", "seed"], sort=False)[columns].last()
        table = last.groupby("run", sort=False).mean().reset_index()
        return figures.learning_curves(metrics, smooth=self.smooth.value), table

    def _tasks(self) -> tuple[go.Figure, pd.DataFrame]:
        frame = self.recorded()[0].rename(columns={"task_type": "kind"})
        groups = frame.groupby(["run", "iteration", "kind"], sort=False)["success"]
        shares = groups.agg(share="mean", n="size").reset_index()
        shares = shares.sort_values(["kind", "iteration"], kind="stable")
        panels = "success, " + frame["kind"].replace("", "no task type")
        each = [frame["run"], frame["replica"].rename("seed"), frame["iteration"], panels]
        curves = frame["success"].groupby(each, sort=False).mean().unstack().reset_index()
        panels = tuple(sorted(set(panels)))
        return figures.learning_curves(curves, panels, self.smooth.value), shares

    def _failures(self) -> tuple[go.Figure, pd.DataFrame]:
        frame = self.recorded()[0]
        kinds = pd.get_dummies(frame["failure"].replace("", "won"), dtype=float)
        order = _in_order(kinds)
        by = [frame["run"], frame["iteration"]]
        shares = kinds[order].groupby(by, sort=False).mean().melt(
            var_name="kind", value_name="share", ignore_index=False
        )  # fmt: skip
        shares = shares.join(frame.groupby(by, sort=False).size().rename("n")).reset_index()
        return figures.share_map(shares, "how episodes went, share of all"), shares

    def _subgoals(self) -> tuple[go.Figure, pd.DataFrame]:
        turns = self.recorded()[1]
        chosen = turns[turns["boundary"]]
        table = chosen.groupby(["run", "subgoal"], sort=False).agg(
            segments=("subgoal", "size"), first=("iteration", "min"), last=("iteration", "max"),
            won=("success", "mean"), credit=("advantage_high", "mean"),
        )  # fmt: skip
        table = table.sort_values("segments", ascending=False, kind="stable").reset_index()
        return figures.subgoal_history(chosen), table

    def _same_task(self) -> tuple[go.Figure, pd.DataFrame]:
        frame, turns = self.recorded()
        if not self.game.options:
            raise ValueError("no task occurs twice in the iterations that were read; raise samples")
        turns = turns[turns["game"] == self.game.value].rename(columns={"address": "lane"})
        shown = frame[frame["game"] == self.game.value]
        columns = ["address", "success", "failure", "return", "turns", "segments", "switch_rate"]
        return figures.side_by_side(turns), shown[columns]

    def render(self) -> None:
        curves, same = ("learning curves", "task types"), ("same task",)
        for control, views in ((self.smooth, curves), (self.game, same)):  # where they do something
            control.layout.display = None if self.view.value in views else "none"
        super().render()

    def figure(self) -> go.Figure:
        return self.views[self.view.value]()[0]

    def table(self) -> pd.DataFrame:
        """The numbers of the present view."""
        return self.views[self.view.value]()[1]

    def details(self) -> str:
        return pages.table_html(self.table())

    def page(self) -> list[str]:
        return []

    def digest(self) -> str:
        seeds = sum(len(seeds) for seeds in self.runs.values())
        return f"{len(self.runs)} runs, {seeds} seeds, {self.view.value}: {len(self.table())} rows"


class LiveMonitor(_Inspector):
    """A run while another process writes it: its curves, how far it is, its newest trajectories.

    It only reads. ``refresh()`` looks once; ``start()`` keeps looking, also while other cells run
    in turn, until ``stop()``; so do its buttons.

    Args:
        folder: The run's folder; it may still be empty but for ``manifest.json``.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not the folder of a run.
    """

    def __init__(self, folder: Path | str):
        self.rollouts, self._task = Rollouts(folder), None
        self.button = ui.Button(description="refresh", icon="refresh")
        self.follow = ui.ToggleButton(description="follow", icon="play")
        super().__init__([self.button, self.follow])
        self.button.on_click(lambda _: self.refresh())
        self._on([self.follow], lambda: self.start() if self.follow.value else self.stop())
        self.refresh()

    def refresh(self) -> None:
        """Read what is new and show it."""
        self.rollouts.refresh()
        self._metrics = records.read_metrics(self.rollouts.folder)
        self.render()

    def start(self, seconds: float = 2.0) -> None:
        """Refresh every so many seconds, in the notebook's event loop."""

        async def follow() -> None:
            while True:
                await asyncio.sleep(seconds)
                self.refresh()

        self.stop()
        self._task = asyncio.get_running_loop().create_task(follow())
        with self._mute():
            self.follow.value = True

    def stop(self) -> None:
        """Stop refreshing."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        with self._mute():
            self.follow.value = False

    def inspect(self) -> TrajectoryInspector:
        """An inspector of what has been recorded so far."""
        return TrajectoryInspector(self.rollouts)

    def figure(self) -> go.Figure:
        if "rollout/success" not in self._metrics:
            raise ValueError(f"{self.rollouts.name}: waiting for the first iteration")
        return figures.training_curves(self._metrics)

    def table(self) -> pd.DataFrame:
        """The newest recorded trajectories."""
        if not self.rollouts:
            return pd.DataFrame({"trajectory": []})
        newest = max(self.rollouts)
        frame = records.overview(self.rollouts[newest])[0]
        frame["trajectory"] = f"{self.rollouts.name}/{newest}/" + frame["trajectory"]
        return frame[["trajectory", "task", "success", "failure", "turns", "segments"]]

    def digest(self) -> str:
        done = int(self._metrics["iteration"].max()) if len(self._metrics) else 0
        of = self.rollouts.config.get("iterations", "?")
        said = f"{self.rollouts.name}, iteration {done} of {of}"
        if "rollout/success" in self._metrics:
            recent = self._metrics["rollout/success"].dropna().tail(5)
            said += f", success {recent.mean():.4f} over {len(recent)}"
        return said

    def details(self) -> str:
        return f"<b>{escape(self.digest())}</b>{pages.table_html(self.table())}"

    def page(self) -> list[str]:
        return []
