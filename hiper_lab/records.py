"""Recorded runs: read lazily by iteration, sorted by what went wrong, other frameworks' logs too.

Left out on purpose: models and trainers (nothing here needs one), pictures.
"""

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd

from hiper_lab import protocol
from hiper_lab.trajectory import (
    EndReason,
    Trajectory,
    Turn,
    read,
    trajectory_frame,
    turn_frame,
)


class Rollouts(Mapping[int, list[Trajectory]]):
    """The recorded trajectories of a run, by iteration; a file is read when it is asked for.

    A trajectory has the address ``run/iteration/trajectory``, its turn 4 ``run/iteration/0007:4``.

    Args:
        source: A run's folder, a record file, or trajectories at hand (they are iteration 0).
        name: The run in addresses; by default the folder's or file's own name.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If it holds no trajectory and is no run that may still record some.
    """

    kept = 4  # iterations in memory

    def __init__(self, source: Path | str | Iterable[Trajectory], name: str = ""):
        self.folder, self.config, self.skipped = None, {}, 0
        self._read: OrderedDict[int, tuple[Any, list[Trajectory]]] = OrderedDict()
        if isinstance(source, Path | str):
            self.folder = Path(source)
            self.name = name or self.folder.resolve().name.split(".jsonl")[0]
        else:
            self.name, self._here = name or "rollouts", list(source)
        self.refresh()
        begun = (
            self.folder and (self.folder / "manifest.json").is_file()
        )  # before its kernel starts
        if not (self.files or self.config or begun):
            raise ValueError(f"{self.folder or 'the list'} holds no recorded trajectories")

    def refresh(self) -> None:
        """Look for iterations that were recorded meanwhile."""
        if self.folder is None:
            self.files = {0: None} if self._here else {}
        elif self.folder.is_file():
            self.files = {0: self.folder}
        elif self.folder.is_dir():
            if not self.config and (config := self.folder / "config.json").is_file():
                self.config = json.loads(config.read_text())
            found = (self.folder / "rollouts").glob("[0-9]*.jsonl*")
            self.files = {int(path.name.split(".")[0]): path for path in sorted(found)}
        else:
            raise FileNotFoundError(f"no run folder or record file {str(self.folder)!r}")

    def __iter__(self) -> Iterator[int]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, iteration: int) -> list[Trajectory]:
        if (path := self.files[iteration]) is None:
            return self._here
        stamp = path.stat().st_mtime_ns, path.stat().st_size
        if self._read.get(iteration, (None,))[0] != stamp:
            records = read(path)
            self._read[iteration] = stamp, list(records)
            self.skipped = records.skipped
        self._read.move_to_end(iteration)
        while len(self._read) > self.kept:
            self._read.popitem(last=False)
        return self._read[iteration][1]


def read_parameters(folder: Path | str) -> dict[str, Any]:
    """A run's ``config.json`` under flat names, as its experiment file had them."""
    config = json.loads((Path(folder) / "config.json").read_text())
    flat = {name: value for name, value in config.items() if not isinstance(value, dict)}
    for stage in (value for value in config.values() if isinstance(value, dict)):
        flat |= stage
    return flat


def read_metrics(folder: Path | str) -> pd.DataFrame:
    """A run's ``metrics.jsonl``, one row per iteration; an unfinished last line is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return pd.DataFrame([json.loads(line) for line in lines if line.endswith("\n")])


def overview(trajectories: list[Trajectory]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`trajectory_frame` with the ``failure`` of each, and `turn_frame`."""
    turns, frame = turn_frame(trajectories), trajectory_frame(trajectories)
    return frame.assign(failure=frame["trajectory"].map(failures(turns)["failure"])), turns


def sample(runs: Mapping[str, list[Rollouts]], count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`overview` of several runs over training, of ``count`` evenly spaced iterations of each seed.

    Both frames gain ``run``, ``replica`` (which of the run's seeds, from 0), ``iteration`` and
    ``address``, the turns ``game`` and ``task`` too.

    Raises:
        ValueError: If none of them has recorded trajectories.
    """
    frames, turns = [], []
    for run, seeds in runs.items():
        for replica, rollouts in enumerate(seeds):
            there = list(rollouts)[::-1]
            for iteration in there[:: max(1, math.ceil(len(there) / count))][::-1]:
                frame, rows = overview(rollouts[iteration])
                where = f"{rollouts.name}/{iteration}/" + frame["trajectory"]
                frame = frame.assign(run=run, replica=replica, iteration=iteration, address=where)
                keys = ["trajectory", "run", "replica", "iteration", "address", "game", "task"]
                frames.append(frame)
                turns.append(rows.merge(frame[keys], on="trajectory"))
    if not frames:
        raise ValueError(f"no rollouts were recorded in {list(runs)}")
    return pd.concat(frames, ignore_index=True), pd.concat(turns, ignore_index=True)


# --------------------------------------------------------------------------------------- failures

FAILURES = ("malformed", "loop", "drift", "premature switch", "never switch", "out of turns")


def failures(turns: pd.DataFrame) -> pd.DataFrame:
    """Sort failed trajectories by what went wrong with them, from their turns alone.

    - ``malformed``: more than 1 in 5 of its turns were malformed;
    - ``loop``: it did the same action at the same observation three times or more;
    - ``drift``: a subgoal changed on KEEP, or three times or more a subgoal that had been given up
      for another was taken up again;
    - ``premature switch``: three segments or more, and of those that ended in a SWITCH more than
      half lasted a single turn;
    - ``never switch``: eight turns or more, all under the first subgoal;
    - ``out of turns``: the turn limit ended it.

    Args:
        turns: One row per turn as `turn_frame` makes it, of any number of trajectories.

    Returns:
        One row per trajectory in order of appearance: a bool column for each pattern (a won
        trajectory can loop as well), and ``failure``: the first that holds, in the order above, or
        how the episode ended if none does; empty where it was won.

    Example:
        >>> turns = pd.DataFrame({
        ...     "trajectory": "a", "turn": range(3), "segment": 0, "switch": False, "problems": "",
        ...     "observation": "a wall", "action": "push", "subgoal": "get out",
        ...     "success": False, "end": "turn_limit"})
        >>> failures(turns)[["loop", "drift", "out of turns", "failure"]]
                    loop  drift  out of turns failure
        trajectory
        a           True  False          True    loop
    """
    order = turns["trajectory"].unique()
    turns = turns.sort_values(["trajectory", "turn"], kind="stable")
    by = turns.groupby("trajectory", sort=False)
    opens = turns.drop_duplicates(["trajectory", "segment"])
    given_up = opens.duplicated(["trajectory", "subgoal"]) & (
        opens["subgoal"] != opens.groupby("trajectory")["subgoal"].shift()
    )
    kept = (turns["turn"] > 0) & ~turns["switch"].astype(bool)
    durations = turns.groupby(["trajectory", "segment"], sort=False).size()
    left = durations[durations.groupby(level=0).cumcount(ascending=False) > 0]  # not the last one
    segments, length = by["segment"].nunique(), by.size()
    frame = pd.DataFrame({
        "malformed": (turns["problems"] != "").groupby(turns["trajectory"]).mean() > 0.2,
        "loop": turns.groupby(["trajectory", "observation", "action"]).size()
        .groupby(level=0).max() >= 3,
        "drift": (kept & (turns["subgoal"] != by["subgoal"].shift()))
        .groupby(turns["trajectory"]).any()
        | (given_up.groupby(opens["trajectory"]).sum() >= 3),
        "premature switch": ((left == 1).groupby(level=0).mean() > 0.5)
        .reindex(length.index, fill_value=False) & (segments >= 3),
        "never switch": (segments == 1) & (length >= 8),
        "out of turns": by["end"].first() == EndReason.TURN_LIMIT,
    }).reindex(order)  # fmt: skip
    first = frame.idxmax(axis=1).where(frame.any(axis=1), by["end"].first().str.replace("_", " "))
    return frame.assign(failure=first.mask(by["success"].first().astype(bool), ""))


# ------------------------------------------------------------------------------ other frameworks

# What a column may be called; the first name is ours. The others are those of `credit_table`, of
# the rows of verl-agent and HiPER, and of verl's dumps.
ALIASES = {
    "trajectory": ("traj", "traj_uid", "trajectory_id", "episode_id"),
    "turn": ("turn_idx",),
    "observation": ("anchor_obs", "obs", "input", "prompt"),
    "response": ("output", "completion"),
    "reward": ("rewards",),
    "done": ("dones", "terminated"),
    "success": ("won",),
    "valid": ("is_action_valid",),
    "active": ("active_masks",),
    "task": ("task_description", "instruction"),
    "game": ("uid",),
    "final_value": ("v_final",),
    **{f"value_{level}": (f"v_{level}",) for level in ("high", "low", "switch")},
    **{f"advantage_{level}": (f"adv_{level}",) for level in ("high", "low", "switch")},
}


def from_table(turns: pd.DataFrame) -> list[Trajectory]:
    """Trajectories from a table of turns, so that logs of other frameworks can be inspected.

    Args:
        turns: One row per turn. ``trajectory`` is needed, and ``response`` or ``action``;
            everything else is optional and may have any name in `ALIASES`: ``turn`` (else the
            rows' order), ``observation``, ``reward``, ``done``, ``success``, ``valid``, ``switch``,
            ``subgoal``, ``task``, values, advantages, and any other field of `Turn`. Where
            ``switch``, ``subgoal`` or ``action`` is not given it is read from the Plan-Execute
            blocks of the response; an agent that never writes a ``<switch>`` is flat: one segment,
            and its action is the ``<action>`` block or else the whole response. Rows whose
            ``active`` is False (padding of a batch) are dropped.

    Returns:
        Trajectories in order of appearance. An episode whose last turn is ``done`` was won if
        ``success`` says so (or, without that column, if its rewards are positive in sum); one that
        is not done met the turn limit. ``/`` and ``:`` in a name become ``_`` (see `Rollouts`).

    Raises:
        ValueError: If the needed columns are missing or there is no row.

    Example:
        >>> rows = pd.DataFrame({
        ...     "traj_uid": ["a", "a"], "anchor_obs": ["a room", "a mug"], "rewards": [0.0, 1.0],
        ...     "dones": [False, True],
        ...     "response": [protocol.write(True, "find it", "go"),
        ...                  protocol.write(False, "find it", "take")]})
        >>> [trajectory] = from_table(rows)
        >>> trajectory.end.value, [(turn.switch, turn.action) for turn in trajectory.turns]
        ('won', [(True, 'go'), (False, 'take')])
    """
    turns = turns.rename(columns={
        next(name for name in names if name in turns): ours for ours, names in ALIASES.items()
        if ours not in turns and any(name in turns for name in names)
    })  # fmt: skip
    spoken = "response" if "response" in turns else "action"
    if missing := [name for name in ("trajectory", spoken) if name not in turns]:
        raise ValueError(f"turns has no column {missing}; it has {list(turns.columns)}")
    if "active" in turns:
        turns = turns[turns["active"].astype(bool)]
    if turns.empty:
        raise ValueError("turns has no rows, expected one per turn")
    flat = not turns[spoken].astype(str).str.contains("<switch>", regex=False).any()
    made = []
    for name, rows in turns.groupby("trajectory", sort=False):
        rows = rows.sort_values("turn", kind="stable") if "turn" in rows else rows
        rows = [
            {column: x for column, x in row.items() if not _missing(x)}
            for row in rows.to_dict("records")
        ]
        episode: list[Turn] = []
        for row in rows:
            episode.append(_foreign_turn(row, episode[-1].subgoal if episode else "", flat))
        first, last, total = rows[0], rows[-1], sum(turn.reward for turn in episode)
        won = bool(last.get("success", last.get("done", False) and total > 0))
        done = bool(last.get("done", won))
        made.append(Trajectory(
            id=re.sub("[/:]", "_", str(name)), task=str(first.get("task", "")),
            game=str(first.get("game", "")), seed=int(first.get("seed", 0)), turns=episode,
            end=EndReason.TURN_LIMIT if not done else EndReason.WON if won else EndReason.LOST,
            final_observation="", final_prompt_ids=[], final_value=last.get("final_value"),
            task_type=str(first.get("task_type", "")),
        ))  # fmt: skip
    return made


def _foreign_turn(row: dict[str, Any], subgoal: str, flat: bool) -> Turn:
    """One row of a foreign table; ``subgoal`` is the one in force before it."""
    response = str(row.get("response", ""))
    if flat:
        block = re.search("<action>(.*?)</action>", response, re.DOTALL)
        said = protocol.Response(False, "", (block[1] if block else response).strip())
    else:
        said = protocol.parse(response, subgoal)
    problems = row.get("problems", list(said.problems))
    if isinstance(problems, str):
        problems = [problem for problem in problems.split("; ") if problem]
    if not row.get("valid", True) and not problems:
        problems = ["logged as invalid"]
    given = {
        "observation": "", "admissible": [], "prompt_ids": [], "response_ids": [], "roles": [],
        "logprobs": [], "chosen": [], "response": response, "switch": said.switch,
        "subgoal": said.subgoal, "action": said.action,
    }  # fmt: skip
    given |= {f.name: row[f.name] for f in fields(Turn) if f.name in row}
    given |= {"problems": problems, "switch": bool(given["switch"])}
    given["reward"] = float(row.get("reward", 0.0))
    return Turn(**given)


def _missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and pd.isna(value))
