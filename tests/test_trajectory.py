"""Records: what is written is read back, damage is named, frames and grid agree by hand."""

import json
import os
import tracemalloc

import pytest
import torch

from hiper_lab import trajectory
from hiper_lab.protocol import Role
from hiper_lab.trajectory import EndReason, Trajectory, Turn


def turn(switch, subgoal, reward=0.0, problems=(), **values):
    return Turn(
        "seen", ["look"], [1, 2], [3, 4, 5], [Role.SWITCH, Role.SUBGOAL, Role.ACTION],
        [-0.5, 0.0, -1.0], [True, False, True], "text", switch, subgoal, "look", list(problems),
        reward, **values,
    )  # fmt: skip


def episodes():
    first = [
        turn(False, "a"),
        turn(False, "a"),
        turn(True, "b", advantage_high=0.5),
        turn(False, "c", 1.0),
    ]
    second = [turn(True, "a"), turn(False, "a", problems=["no <action> block"])]
    return [
        Trajectory("0000", "task é", "g1", 1, first, EndReason.WON, "end", [7]),
        Trajectory("0001", "task", "g2", 2, second, EndReason.TURN_LIMIT, "end", [8, 9], 0.25),
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_read_inverts_save(tmp_path, name):
    trajectory.save(episodes(), tmp_path / name)
    assert list(trajectory.read(tmp_path / name)) == episodes()


def test_grid_by_hand():
    grid = trajectory.to_grid(episodes())
    assert grid.length.tolist() == [4, 2]
    assert grid.terminated.tolist() == [True, False]  # a limit is not a terminal state
    assert grid.boundary.tolist() == [[True, False, True, False], [True, False, False, False]]
    assert grid.switch.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert grid.same_subgoal.tolist() == [[False, True, False, False], [False, True, False, False]]
    assert grid.valid.tolist() == [[True] * 4, [True, False, False, False]]
    assert grid.reward.sum(1).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least one turn"):
        trajectory.to_grid([])


def test_frames_agree_with_each_other():
    runs = trajectory.trajectory_frame(episodes()).set_index("trajectory")
    turns, segments = trajectory.turn_frame(episodes()), trajectory.segment_frame(episodes())
    assert runs["segments"].tolist() == [2, 1] and runs["malformed"].tolist() == [0, 1]
    assert turns.groupby("trajectory").size().tolist() == runs["turns"].tolist()
    assert segments["duration"].tolist() == [2, 2, 2]
    assert segments["subgoal"].tolist() == ["a", "b", "a"]
    assert segments["advantage_high"].tolist()[1] == 0.5
    tokens = trajectory.token_frame(episodes()[0])
    assert len(tokens) == 12 and tokens["chosen"].sum() == 8
    assert tokens["role"].tolist()[:3] == ["switch", "subgoal", "action"]


def test_damage_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    trajectory.save(episodes(), path)
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + lines[1][:50] + "\n")
    with pytest.raises(ValueError, match="line 2: not a trajectory record"):
        list(trajectory.read(path))
    path.write_text(json.dumps(json.loads(lines[0]) | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99 is newer than 2.*update hiper_lab"):
        list(trajectory.read(path))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*x.jsonl: No space left"):
        trajectory.save(episodes(), path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.jsonl"]


def test_infinite_numbers_are_refused(tmp_path):
    bad = episodes()
    bad[0].turns[0].reward = float(torch.tensor(1.0) / 0)
    with pytest.raises(ValueError, match="JSON"):
        trajectory.save(bad, tmp_path / "x.jsonl")


def test_records_of_the_first_schema_are_read(tmp_path):
    """They know nothing of token texts and task types; both are empty."""
    path = tmp_path / "x.jsonl"
    trajectory.save(episodes(), path)
    old = [json.loads(line) | {"schema": 1} for line in path.read_text().splitlines()]
    for record in old:
        del record["task_type"]
        for turn in record["turns"]:
            del turn["pieces"]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert list(trajectory.read(path)) == episodes()


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_the_last_line_of_a_file_being_written_is_skipped_and_counted(tmp_path, keep):
    trajectory.save(episodes(), tmp_path / "x.jsonl")
    first, last = (tmp_path / "x.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "x.jsonl").write_bytes(first + last[: int(keep * len(last)) - 1])
    records = trajectory.read(tmp_path / "x.jsonl")
    assert list(records) == episodes()[:1] and records.skipped == 1
    (tmp_path / "x.jsonl").write_bytes(first + last.rstrip())  # complete but for the line's end
    assert list(records) == episodes() and records.skipped == 0


def test_a_compressed_file_being_written_gives_its_complete_lines(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    trajectory.save(episodes() * 200, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    records = trajectory.read(path)
    read = list(records)
    assert records.skipped == 1 and 100 < len(read) < 300
    assert read == (episodes() * 200)[: len(read)]
    path.write_bytes(whole[: len(whole) // 2] + b"x" * 100)  # that is damage, not a missing end
    with pytest.raises(ValueError, match="not a trajectory record"):
        list(trajectory.read(path))
    with pytest.raises(FileNotFoundError, match="no record file"):
        trajectory.read(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_reading_takes_no_more_memory_for_a_longer_file(tmp_path, name):
    peaks = []
    for copies in (2, 40):
        trajectory.save(episodes() * 20 * copies, tmp_path / name)
        tracemalloc.start()
        assert sum(1 for _ in trajectory.read(tmp_path / name)) == 40 * copies
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_values_come_back_from_the_record():
    rows = episodes()
    for row in rows:
        for i, t in enumerate(row.turns):
            t.value_high, t.value_low, t.value_switch = i + 0.25, i + 0.5, i + 0.75
    values = trajectory.to_values(rows)
    assert values.high.tolist() == [[0.25, 1.25, 2.25, 3.25], [0.25, 1.25, 0, 0]]
    assert values.switch[0].tolist() == [0.75, 1.75, 2.75, 3.75]
    assert values.final.isnan().tolist() == [True, False] and values.final[1] == 0.25
    rows[1].turns[1].value_low = None
    assert trajectory.to_values(rows).low[1].isnan().tolist() == [False, True, False, False]
