"""Recorded runs: lazy, addressed, sorted by failure; logs of other frameworks mean the same."""

import dataclasses
import json

import pandas as pd
import pytest

from hiper_lab import protocol, records, trajectory
from hiper_lab.credit import CreditConfig, credit_table, estimate
from hiper_lab.records import FAILURES, Rollouts, failures, from_table
from hiper_lab.trajectory import EndReason, Trajectory, Turn


def episode(name, plan, end=EndReason.TURN_LIMIT, problems=()):
    """One turn per letter of the plan: upper case says SWITCH, the letter is the subgoal."""
    turns = [
        Turn(
            f"room {i}", ["go"], [], [], [], [], [], protocol.write(c.isupper(), c.lower(), "go"),
            c.isupper(), c.lower(), "go", ["bad"] if i in problems else [], float(i),
            0.1 * i, 0.2 * i, 0.3 * i,
        )
        for i, c in enumerate(plan)
    ]  # fmt: skip
    return Trajectory(name, "find it", "game", 0, turns, end, "", [], 0.5)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo"
    for iteration in range(1, 8):
        made = [episode(f"{k:04d}", "AaBb") for k in range(iteration)]
        trajectory.save(made, folder / "rollouts" / f"{iteration:06d}.jsonl.gz")
    (folder / "config.json").write_text(json.dumps({"seed": 3}))
    return folder


# ----------------------------------------------------------------------------------------- reading


def test_rollouts_read_an_iteration_when_it_is_asked_for(run, monkeypatch):
    seen, read = [], trajectory.read
    monkeypatch.setattr(records, "read", lambda path: seen.append(path.name) or read(path))
    rollouts = Rollouts(run)
    assert list(rollouts) == list(range(1, 8)) and not seen
    assert rollouts.name == "demo" and rollouts.config == {"seed": 3}
    assert len(rollouts[3]) == 3 and rollouts[3] is rollouts[3] and seen == ["000003.jsonl.gz"]
    for iteration in (4, 5, 6, 7):
        rollouts[iteration]
    rollouts[7], rollouts[3]  # the oldest of the four was given up
    assert seen == [f"{k:06d}.jsonl.gz" for k in (3, 4, 5, 6, 7, 3)]


def test_rollouts_see_what_is_written_meanwhile(run):
    rollouts = Rollouts(run)
    assert len(rollouts[7]) == 7
    trajectory.save([episode("new", "A")], run / "rollouts" / "000007.jsonl.gz")
    trajectory.save([episode("new", "A")], run / "rollouts" / "000009.jsonl.gz")
    assert 9 not in rollouts and [t.id for t in rollouts[7]] == ["new"]
    rollouts.refresh()
    assert len(rollouts[9]) == 1


def test_rollouts_of_a_file_and_of_trajectories_at_hand(run, tmp_path):
    assert Rollouts(run / "rollouts" / "000002.jsonl.gz").name == "000002"
    here = Rollouts([episode("a", "A")], name="mine")
    assert list(here) == [0] and here[0][0].id == "a" and here.name == "mine"
    with pytest.raises(FileNotFoundError, match="no run folder"):
        Rollouts(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", []):
        with pytest.raises(ValueError, match="no recorded trajectories"):
            Rollouts(nothing)


# ---------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("plan", "change", "patterns"),
    [
        ("AaaBbb", {}, ["out of turns"]),
        ("AaaBbb", {"end": EndReason.LOST}, []),
        ("AaaBbb", {"problems": (1, 2)}, ["malformed", "out of turns"]),  # 2 of 6
        ("AaaaaBbbbb", {"problems": (1, 2)}, ["out of turns"]),  # 2 of 10
        ("Aaaaaaaa", {}, ["never switch", "out of turns"]),
        ("Aaaaaaa", {}, ["out of turns"]),
        ("aaaaaaaa", {}, ["never switch", "out of turns"]),  # the first turn's word is no matter
        ("ABCcc", {}, ["premature switch", "out of turns"]),  # 2 of 2 that were given up
        ("ABbCcDdd", {}, ["out of turns"]),  # 1 of 3
        ("ABbC", {}, ["out of turns"]),  # 1 of 2 is not more than half; the last one has just begun
        ("Aab", {}, ["drift", "out of turns"]),  # another subgoal on KEEP
        ("AaBbAaBbAa", {}, ["drift", "out of turns"]),  # a, b and a again
        ("AaBbAaBb", {}, ["out of turns"]),  # as one does to put two things away
        ("AaAaAa", {}, ["out of turns"]),  # SWITCH to the same subgoal gives nothing up
    ],
)
def test_failures_by_hand(plan, change, patterns):
    turns = trajectory.turn_frame([episode("x", plan, **change)])
    row = failures(turns).loc["x"]
    assert [name for name in FAILURES if row[name]] == patterns
    assert row["failure"] == (patterns or ["lost"])[0]


def test_a_loop_is_the_same_action_at_the_same_observation_three_times():
    stuck = episode("x", "AaBb")
    for turn in stuck.turns[1:]:
        turn.observation = "nothing happens"
    assert failures(trajectory.turn_frame([stuck])).loc["x", "failure"] == "loop"
    stuck.turns[2].action = "look"
    assert failures(trajectory.turn_frame([stuck])).loc["x", "failure"] == "out of turns"


def test_failures_do_not_mix_trajectories_and_spare_the_won():
    episodes = [
        episode("b", "Aaaaaaaa", EndReason.WON), episode("a", "AB"), episode("c", "Ccc"),
    ]  # fmt: skip
    table = failures(trajectory.turn_frame(episodes).sample(frac=1, random_state=0).sort_index())
    assert table.index.tolist() == ["b", "a", "c"]
    assert table["failure"].tolist() == ["", "out of turns", "out of turns"]
    assert table["never switch"].tolist() == [True, False, False]


# -------------------------------------------------------------------------------- other frameworks


def test_our_own_table_comes_back():
    """What a frame of turns holds, the converter restores; order of rows does not matter."""
    episodes = [episode("a", "AaBb", EndReason.WON), episode("b", "AB", problems=(1,))]
    frame = trajectory.turn_frame(episodes)
    frame["done"] = frame["success"] & (frame["turn"] == 3)
    back = from_table(frame.sample(frac=1, random_state=1).sort_values("trajectory"))
    for was, now in zip(episodes, back, strict=True):
        for turn in was.turns:
            turn.admissible = []  # lists are not in a frame of turns
        assert now.turns == was.turns and now.id == was.id and now.end == was.end


def test_rows_of_verl_agent_are_understood():
    response = [
        protocol.write(True, "find mug", "go to desk 1"),
        protocol.write(False, "find mug", "take mug 1"),
        "I give up",
    ]
    rows = pd.DataFrame({
        "traj_uid": ["u/1", "u/1", "u/1", "u/2", "u/2"], "uid": "g",
        "turn_idx": [0, 1, 2, 0, 1], "anchor_obs": ["hall", "desk", "", "hall", "pad"],
        "response": [*response, response[0], ""], "rewards": [0.0, 10.0, 0.0, 0.0, 0.0],
        "dones": [False, False, True, False, True], "active_masks": [True] * 4 + [False],
        "is_action_valid": [True, True, False, False, True],
    })  # fmt: skip
    won, cut = from_table(rows)
    assert (won.id, won.game, won.end, cut.end) == (
        "u_1", "g", EndReason.WON, EndReason.TURN_LIMIT,
    )  # fmt: skip
    assert [t.action for t in won.turns] == ["go to desk 1", "take mug 1", ""]
    assert [t.subgoal for t in won.turns] == ["find mug"] * 3  # a malformed turn keeps it
    assert "no <switch> block" in won.turns[2].problems[0]
    assert len(cut.turns) == 1 and cut.turns[0].problems == ["logged as invalid"]
    lost = from_table(rows.assign(success=False))[0]
    assert lost.end is EndReason.LOST
    with pytest.raises(ValueError, match=r"no column \['trajectory', 'action'\]"):
        from_table(rows[["rewards"]])


def test_an_agent_without_subgoals_is_one_segment():
    rows = pd.DataFrame({"traj": 7, "response": ["<think>hm</think><action>go</action>", "look"]})
    (flat,) = from_table(rows)
    assert [t.action for t in flat.turns] == ["go", "look"] and not flat.turns[0].problems
    assert trajectory.boundaries(flat) == [True, False] and flat.end is EndReason.TURN_LIMIT


def test_converted_tables_get_the_credit_of_credit_table():
    """Two ways from a log to credit: the table, and trajectories laid out as a grid."""
    turns = pd.DataFrame({
        "traj": ["a"] * 3 + ["b"] * 2, "turn": [0, 1, 2, 0, 1],
        "reward": [0.0, 0.0, 1.0, 0.0, 0.0], "done": [False, False, True, False, False],
        "switch": [True, False, True, False, True], "valid": [True, False, True, True, True],
        "subgoal": ["x", "x", "y", "x", "x"], "v_low": [0.1, 0.2, 0.3, 0.4, 0.5],
        "v_high": [0.5, 0.4, 0.3, 0.2, 0.1], "v_switch": 0.25, "v_final": [0.75] * 5,
        "action": "go",
    })  # fmt: skip
    for config in (CreditConfig.lab(), CreditConfig.paper()):
        table = credit_table(turns, config)
        made = from_table(turns)
        credit = estimate(trajectory.to_grid(made), trajectory.to_values(made), config)
        assert credit.low[0].tolist() == pytest.approx(table["adv_low"][:3].tolist(), abs=1e-6)
        assert credit.low[1, :2].tolist() == pytest.approx(table["adv_low"][3:].tolist(), abs=1e-6)
        assert credit.high[0, 2].item() == pytest.approx(table["adv_high"][2], abs=1e-6)
    assert dataclasses.asdict(made[0])["final_value"] == 0.75
