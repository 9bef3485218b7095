"""What happened: turns, trajectories, why they ended, and their record on disk.

A record is one JSON line per trajectory (``.jsonl`` or ``.jsonl.gz``): the fields of `Trajectory`
and its `Turn`, and ``"schema": SCHEMA``. It is readable without the trainer or any model. Token ids
are the source of truth; text is derived from them. Data frames exist at every grain: run,
trajectory, segment, turn, token. `records` reads whole runs, and logs of other frameworks.

Left out on purpose: tensors other than the turn grid, plots, anything about training.
"""

import gzip
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from hiper_lab.flat import anchor_states
from hiper_lab.grid import TurnGrid, Values
from hiper_lab.protocol import Role

# 1: the first. 2: adds Turn.pieces and Trajectory.task_type, both empty in older records.
SCHEMA = 2


class EndReason(StrEnum):
    """Why an episode ended. ``won`` and ``lost`` are terminal states; the rest are limits."""

    WON = "won"
    LOST = "lost"
    TURN_LIMIT = "turn_limit"
    TOKEN_LIMIT = "token_limit"
    ERROR = "error"

    @property
    def terminated(self) -> bool:
        """True for terminal states of the environment, False for truncation (Gymnasium's sense)."""
        return self in (EndReason.WON, EndReason.LOST)


@dataclass
class Turn:
    """One prompt, response and environment step.

    ``roles``, ``logprobs`` and ``chosen`` have one entry per response token; a token that was
    injected rather than sampled has ``chosen`` False and log-probability 0. ``pieces`` is the text
    of each response token (their concatenation is the response), or empty where nobody kept it.
    Values and advantages are None until they are computed; ``advantage_high`` stays None off
    segment boundaries.
    """

    observation: str
    admissible: list[str]
    prompt_ids: list[int]
    response_ids: list[int]
    roles: list[int]
    logprobs: list[float]
    chosen: list[bool]
    response: str
    switch: bool
    subgoal: str
    action: str
    problems: list[str] = field(default_factory=list)
    reward: float = 0.0
    value_high: float | None = None
    value_low: float | None = None
    value_switch: float | None = None
    advantage_high: float | None = None
    advantage_low: float | None = None
    advantage_switch: float | None = None
    pieces: list[str] = field(default_factory=list)


@dataclass
class Trajectory:
    """One episode from reset to its end, with the prompt that would have come next.

    ``final_prompt_ids`` is what a truncated episode bootstraps from: the state after the last turn.
    ``task_type`` is the environment's class of tasks, for results per class; empty if it has none.
    """

    id: str
    task: str
    game: str
    seed: int
    turns: list[Turn]
    end: EndReason
    final_observation: str
    final_prompt_ids: list[int]
    final_value: float | None = None
    detail: str = ""  # for EndReason.ERROR: what the environment said
    task_type: str = ""

    @property
    def success(self) -> bool:
        return self.end is EndReason.WON

    @property
    def return_(self) -> float:
        """Undiscounted sum of rewards."""
        return sum(turn.reward for turn in self.turns)


def boundaries(trajectory: Trajectory) -> list[bool]:
    """True at turns that open a segment: the first one, and every SWITCH."""
    return [i == 0 or turn.switch for i, turn in enumerate(trajectory.turns)]


def to_grid(trajectories: list[Trajectory], anchor_similarity: float = 1.0) -> TurnGrid:
    """Lay trajectories out as ``[traj, turn]`` tensors, padded on the right.

    Trajectories of one ``game`` are one group, and turns of a group with one ``observation`` one
    state (or similar ones, see `hiper_lab.flat.anchor_states`).

    Raises:
        ValueError: If there are no trajectories, or one has no turns.
    """
    empty = [t.id for t in trajectories if not t.turns]
    if empty or not trajectories:
        raise ValueError(
            f"expected trajectories with at least one turn, got {empty or 'none at all'}"
        )

    def grid(rows: Iterable, dtype: torch.dtype) -> torch.Tensor:
        rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def same(trajectory: Trajectory) -> list[bool]:
        subgoals = [turn.subgoal for turn in trajectory.turns]
        return [i > 0 and subgoals[i] == subgoals[i - 1] for i in range(len(subgoals))]

    turns = [t.turns for t in trajectories]
    length = torch.tensor([len(row) for row in turns])
    number: dict[str, int] = {}
    group = torch.tensor([number.setdefault(t.game, len(number)) for t in trajectories])
    state = anchor_states(
        [turn.observation for row in turns for turn in row],
        group.repeat_interleave(length).tolist(),
        anchor_similarity,
    )
    return TurnGrid(
        reward=grid(([t.reward for t in row] for row in turns), torch.float32),
        switch=grid(([t.switch for t in row] for row in turns), torch.bool),
        boundary=grid(map(boundaries, trajectories), torch.bool),
        valid=grid(([not t.problems for t in row] for row in turns), torch.bool),
        has_subgoal=grid(
            ([not t.problems and bool(t.subgoal) for t in row] for row in turns), torch.bool
        ),
        same_subgoal=grid(map(same, trajectories), torch.bool),
        terminated=torch.tensor([t.end.terminated for t in trajectories]),
        length=length,
        group=group,
        state=grid(torch.tensor(state).split(length.tolist()), torch.long),
    )


# ------------------------------------------------------------------------------------ data frames


def trajectory_frame(trajectories: Iterable[Trajectory]) -> pd.DataFrame:
    """One row per trajectory: task, outcome, length, number of segments, switches per choice."""
    return pd.DataFrame(
        {
            "trajectory": t.id, "task": t.task, "task_type": t.task_type, "game": t.game,
            "seed": t.seed, "success": t.success, "return": t.return_, "end": str(t.end),
            "turns": len(t.turns), "segments": sum(boundaries(t)),
            "switch_rate": sum(turn.switch for turn in t.turns[1:]) / max(1, len(t.turns) - 1),
            "malformed": sum(bool(turn.problems) for turn in t.turns),
        }
        for t in trajectories
    )  # fmt: skip


def turn_frame(trajectories: Iterable[Trajectory]) -> pd.DataFrame:
    """One row per turn; ``advantage_*`` and ``value_*`` are NaN where not computed."""
    rows = []
    for trajectory in trajectories:
        segment = -1
        for i, (turn, opens) in enumerate(
            zip(trajectory.turns, boundaries(trajectory), strict=True)
        ):
            segment += opens
            row = {"trajectory": trajectory.id, "turn": i, "segment": segment, "boundary": opens}
            plain = {k: v for k, v in vars(turn).items() if not isinstance(v, list)}
            rows.append(row | plain | {
                "problems": "; ".join(turn.problems), "success": trajectory.success,
                "end": str(trajectory.end), "logprob": sum(turn.logprobs),
                "tokens": len(turn.response_ids), "sampled_tokens": sum(turn.chosen),
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    numbers = [c for c in frame if c.startswith(("value_", "advantage_"))]
    return frame.astype(dict.fromkeys(numbers, float))


def segment_frame(trajectories: Iterable[Trajectory]) -> pd.DataFrame:
    """One row per segment: its subgoal, first turn, duration, reward inside it, and credit."""
    turns = turn_frame(trajectories)
    groups = turns.groupby(["trajectory", "segment"], sort=False)
    frame = groups.agg(
        subgoal=("subgoal", "first"), first_turn=("turn", "first"), duration=("turn", "size"),
        reward=("reward", "sum"), success=("success", "first"),
        value_high=("value_high", "first"), advantage_high=("advantage_high", "first"),
        advantage_low=("advantage_low", "mean"),
    )  # fmt: skip
    return frame.reset_index()


def token_frame(trajectory: Trajectory) -> pd.DataFrame:
    """One row per response token of one trajectory, with its Role and the advantage it receives."""
    rows = []
    for i, turn in enumerate(trajectory.turns):
        level = {
            Role.SWITCH: turn.advantage_switch,
            Role.SUBGOAL: turn.advantage_high,
            Role.ACTION: turn.advantage_low,
        }
        pieces = turn.pieces or [None] * len(turn.response_ids)
        for k, token in enumerate(turn.response_ids):
            role = Role(turn.roles[k])
            advantage = level.get(role) if turn.chosen[k] else None
            rows.append({
                "turn": i, "position": k, "token": token, "piece": pieces[k],
                "role": role.name.lower(), "chosen": turn.chosen[k], "logprob": turn.logprobs[k],
                "advantage": advantage,
            })  # fmt: skip
    columns = ["turn", "position", "token", "piece", "role", "chosen", "logprob", "advantage"]
    return pd.DataFrame(rows, columns=columns).astype({"advantage": float})


# ------------------------------------------------------------------------------------------- disk


def write_atomic(path: Path | str, data: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: With the path and the reason (for example a full disk); the old file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path}: {error.strerror}") from error


def save(trajectories: Iterable[Trajectory], path: Path | str) -> None:
    """Write records as JSON lines, gzipped if the name ends in ``.gz``; atomic.

    Non-finite numbers are refused (JSON has none).
    """
    lines = [json.dumps({"schema": SCHEMA} | asdict(t), allow_nan=False) for t in trajectories]
    data = "".join(line + "\n" for line in lines).encode()
    # mtime 0: the same trajectories give the same bytes
    write_atomic(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, zlib.error, gzip.BadGzipFile)


class Records:
    """The trajectories of a record file, streamed: memory for one of them at a time.

    A file may be read while it is written: a last line without its end is skipped, and so is the
    rest of a ``.gz`` that stops early. After iterating, ``skipped`` says how many there were.
    """

    def __init__(self, path: Path | str):
        self.path, self.skipped = Path(path), 0
        if not self.path.is_file():
            raise FileNotFoundError(f"no record file {str(path)!r}")

    def __iter__(self) -> Iterator[Trajectory]:
        self.skipped, number = 0, 0
        with gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb") as file:
            try:
                for line in file:
                    number += 1
                    try:
                        record = json.loads(line)
                    except ValueError:
                        if line.endswith(b"\n"):
                            raise
                        self.skipped += 1
                        return
                    yield _trajectory(record)
            except EOFError:  # the compressed stream has no end yet
                self.skipped += 1
            except _DAMAGE as error:
                where = f"{self.path}, line {number}"
                raise ValueError(f"{where}: not a trajectory record: {error}") from error


def _trajectory(record: dict[str, Any]) -> Trajectory:
    if (schema := record.pop("schema")) > SCHEMA:
        raise ValueError(
            f"schema {schema} is newer than {SCHEMA}, the newest this version of hiper_lab reads; "
            "update hiper_lab"
        )
    turns = [Turn(**turn) for turn in record.pop("turns")]
    return Trajectory(turns=turns, end=EndReason(record.pop("end")), **record)


def read(path: Path | str) -> Records:
    """Stream trajectories from a record file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: While iterating, if a complete line is not a record, or was written by a newer
            schema.
    """
    return Records(path)


def to_values(trajectories: list[Trajectory]) -> Values:
    """The recorded values as ``[traj, turn]`` tensors: the inverse of `attach`; NaN for None."""
    grids = [
        torch.nn.utils.rnn.pad_sequence(
            [
                torch.tensor([_or_nan(getattr(turn, f"value_{level}")) for turn in t.turns])
                for t in trajectories
            ],
            batch_first=True,
        )
        for level in Values._fields[:3]
    ]
    return Values(*grids, final=torch.tensor([_or_nan(t.final_value) for t in trajectories]))


def attach(trajectories: list[Trajectory], values, credit) -> None:
    """Copy ``[traj, turn]`` values and advantages into the turns, for records and inspectors."""
    for b, trajectory in enumerate(trajectories):
        trajectory.final_value = _number(values.final[b])
        for t, (turn, opens) in enumerate(
            zip(trajectory.turns, boundaries(trajectory), strict=True)
        ):
            turn.value_high = _number(values.high[b, t])
            turn.value_low = _number(values.low[b, t])
            turn.value_switch = _number(values.switch[b, t])
            turn.advantage_high = _number(credit.high[b, t]) if opens else None
            turn.advantage_low = _number(credit.low[b, t])
            turn.advantage_switch = _number(credit.switch[b, t])


def _number(x: torch.Tensor) -> float | None:
    return round(float(x), 6) if math.isfinite(x) else None


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x
