"""Credit by the book: plain loops over trajectories, segments and turns, in Python floats.

An independent second writing of what `hiper_lab.credit` computes with masks and scans. It shares
no code with it, knows no padding, and builds γᵈ and the table of segments the obvious way.
"""

import math

import numpy as np
import pandas as pd

LEVELS = ("adv_low", "adv_high", "adv_switch", "target_low", "target_high", "target_switch")


def random_trajectories(seed, count, longest=12):
    """``count`` trajectories with every oddity: KEEP at turn 0, no subgoal, drift, truncation."""
    rng = np.random.default_rng(seed)
    return [
        {
            "reward": rng.normal(size=turns) * (rng.random(turns) < 0.5),
            "switch": rng.random(turns) < rng.random(),
            "valid": rng.random(turns) < 0.8,
            "subgoal": [("", "cup", "mug")[i] for i in rng.integers(0, 3, turns)],
            "v_high": rng.normal(size=turns),
            "v_low": rng.normal(size=turns),
            "v_switch": rng.normal(size=turns),
            "terminated": bool(rng.random() < 0.5),
            "final": float(rng.normal()),
        }
        for turns in rng.integers(1, longest + 1, count)
    ]


def to_frame(trajectories):
    """The table that `credit_table` takes, in order."""
    columns = ("reward", "switch", "valid", "subgoal", "v_high", "v_low", "v_switch")
    rows = []
    for i, trajectory in enumerate(trajectories):
        turns = len(trajectory["reward"])
        for t in range(turns):
            row = {name: trajectory[name][t] for name in columns}
            done = trajectory["terminated"] and t == turns - 1
            rows.append({"traj": i, "turn": t, "done": done, "v_final": trajectory["final"]} | row)
    return pd.DataFrame(rows)


def credit(trajectories, config):
    """One row per turn with `LEVELS` and ``segment``; NaN in high off boundaries."""
    rows = []
    for trajectory in trajectories:
        reward = shape(trajectory, config)
        estimate = {"hae": hae, "gae": gae}[config.estimator]
        columns = estimate(trajectory | {"reward": reward}, config)
        columns["has_subgoal"] = [len(g) > 0 for g in trajectory["subgoal"]]
        rows += [{name: x[t] for name, x in columns.items()} for t in range(len(reward))]
    if config.whiten:
        for level in ("adv_low", "adv_high", "adv_switch"):
            whiten(rows, level)
    return pd.DataFrame(rows)[[*LEVELS, "segment"]]


def shape(trajectory, config):
    reward = [float(r) for r in trajectory["reward"]]
    subgoal = trajectory["subgoal"]
    for t in range(len(reward)):
        if not trajectory["valid"][t]:
            reward[t] -= config.invalid_penalty
        if trajectory["switch"][t]:
            continue
        if config.keep_penalty_mode == "per_turn":
            reward[t] += config.keep_penalty
        elif len(reward) > 1:
            reward[t] += config.keep_penalty / len(reward)
        if t > 0:
            empty = len(subgoal[t]) == 0 or len(subgoal[t - 1]) == 0
            if empty:
                penalised = not config.consistency_requires_both
            else:
                penalised = subgoal[t] != subgoal[t - 1]
            if penalised:
                reward[t] += config.consistency_penalty
    return reward


def segments(trajectory):
    """[(first, last), ...], both inclusive."""
    turns = len(trajectory["switch"])
    starts = [t for t in range(turns) if t == 0 or trajectory["switch"][t]]
    return list(zip(starts, [b - 1 for b in starts[1:]] + [turns - 1], strict=True))


def after_end(trajectory, config, own):
    """The value that follows the last turn."""
    if trajectory["terminated"] or config.truncation == "zero":
        return 0.0
    return trajectory["final"] if config.truncation == "final_state" else own


def hae(trajectory, config):
    reward, turns = trajectory["reward"], len(trajectory["reward"])
    v_high, v_low, v_switch = (trajectory[k] for k in ("v_high", "v_low", "v_switch"))
    gamma = config.gamma
    out = {level: [math.nan] * turns for level in LEVELS} | {"segment": [0] * turns}

    # High level first, from the last segment to the first: low and switch may look at it.
    table = segments(trajectory)
    next_value = after_end(trajectory, config, own=v_high[table[-1][0]])
    next_advantage = 0.0
    arrival = {}  # segment -> what it bootstraps from at its end
    for k in reversed(range(len(table))):
        first, last = table[k]
        arrival[k] = next_value + config.lam_boundary * next_advantage
        inside = sum(gamma ** (t - first) * reward[t] for t in range(first, last + 1))
        power = gamma ** (last - first + 1)
        advantage = inside + power * next_value - v_high[first]
        advantage += power * config.lam_high * next_advantage
        out["adv_high"][first] = advantage
        out["target_high"][first] = advantage + v_high[first]
        next_value, next_advantage = v_high[first], advantage

    for k, (first, last) in enumerate(table):
        arrival_low = arrival[k]
        if last == turns - 1:
            arrival_low = after_end(trajectory, config, own=v_low[last])
        for t in range(first, last + 1):
            out["segment"][t] = k
            out["adv_low"][t] = sum(
                (gamma * config.lam_low) ** (u - t)
                * (reward[u] + gamma * (v_low[u + 1] if u < last else arrival_low) - v_low[u])
                for u in range(t, last + 1)
            )
            out["target_low"][t] = out["adv_low"][t] + v_low[t]
            if config.switch_advantage == "return":
                target = sum(gamma ** (u - t) * reward[u] for u in range(t, last + 1))
                target += gamma ** (last - t + 1) * arrival[k]
                out["adv_switch"][t] = target - v_switch[t]
            else:
                target = v_high[t] if t == first else v_low[t]
                out["adv_switch"][t] = 0.0 if t == 0 else target - v_switch[t]
            out["target_switch"][t] = target
    return out


def gae(trajectory, config):
    reward, value, turns = trajectory["reward"], trajectory["v_high"], len(trajectory["reward"])
    after = [*value[1:], after_end(trajectory, config, own=value[-1])]
    td_error = [reward[t] + config.gamma * after[t] - value[t] for t in range(turns)]
    decay = config.gamma * config.lam_low
    advantage = [
        sum(decay ** (u - t) * td_error[u] for u in range(t, turns)) for t in range(turns)
    ]
    target = [advantage[t] + value[t] for t in range(turns)]
    out = {level: list(advantage if "adv" in level else target) for level in LEVELS}
    out["segment"] = [0] * turns
    for k, (first, last) in enumerate(segments(trajectory)):
        for t in range(first, last + 1):
            out["segment"][t] = k
            if t > first:
                out["adv_high"][t] = out["target_high"][t] = math.nan
    return out


def whiten(rows, level):
    counted = [
        row[level]
        for row in rows
        if not math.isnan(row[level]) and (level != "adv_high" or row["has_subgoal"])
    ]
    if not counted:
        return
    mean = sum(counted) / len(counted)
    std = math.sqrt(sum((x - mean) ** 2 for x in counted) / len(counted))
    for row in rows:
        row[level] = (row[level] - mean) / (std + 1e-8)
