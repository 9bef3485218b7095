"""Records: what is written is read back, damage is named, frames and grid agree by hand."""

import json
import os

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
    with pytest.raises(ValueError, match="schema 99 is newer than 1.*update hiper_lab"):
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
