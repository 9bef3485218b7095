"""Credit by the book: plain loops over trajectories, segments and turns, in Python floats.

An independent second writing of what `hiper_lab.credit` and `hiper_lab.flat` compute with masks and
scans. It shares no code with them, knows no padding, and builds γᵈ, the table of segments, groups
and anchor states the obvious way.
"""

import math
from difflib import SequenceMatcher
from functools import cache

import numpy as np
import pandas as pd

STATES = ("a mug on shelf 1", "a mug on shelf 2", "a fridge", "a fridge!", "nothing")
LEVELS = ("adv_low", "adv_high", "adv_switch", "target_low", "target_high", "target_switch")


def random_trajectories(seed, count, longest=12):
    """``count`` trajectories with every oddity: KEEP at turn 0, no subgoal, drift, truncation."""
    rng = np.random.default_rng(seed)
    return [
        {
            "group": f"game {i // 3 if i // 3 < count // 3 else i // 3 - 1}",
            "state": [STATES[k] for k in rng.integers(0, len(STATES), turns)],
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
        for i, turns in enumerate(rng.integers(1, longest + 1, count).tolist())
    ]


def to_frame(trajectories):
    """The table that `credit_table` takes, in order."""
    turns = [len(trajectory["reward"]) for trajectory in trajectories]
    columns = {
        name: [x for trajectory in trajectories for x in trajectory[name]]
        for name in ("reward", "switch", "valid", "subgoal", "state", "v_high", "v_low", "v_switch")
    }
    spots = [(i, t) for i, n in enumerate(turns) for t in range(n)]
    for name, key in (("v_final", "final"), ("group", "group")):
        columns[name] = [trajectories[i][key] for i, _ in spots]
    ends = [trajectories[i]["terminated"] and t == turns[i] - 1 for i, t in spots]
    order = {"traj": [i for i, _ in spots], "turn": [t for _, t in spots], "done": ends}
    return pd.DataFrame(order | columns)


def credit(trajectories, config):
    """One row per turn with `LEVELS` and ``segment``; NaN in high off boundaries."""
    shaped = [t | {"reward": shape(t, config)} for t in trajectories]
    if config.estimator in ("hae", "gae", "monte_carlo"):
        estimate = {"hae": hae, "gae": gae, "monte_carlo": monte_carlo}[config.estimator]
        columns = [estimate(trajectory, config) for trajectory in shaped]
    else:
        columns = group_relative(shaped, config)
    rows = []
    for trajectory, column in zip(shaped, columns, strict=True):
        column["has_subgoal"] = [len(g) > 0 for g in trajectory["subgoal"]]
        rows += [dict(zip(column, x, strict=True)) for x in zip(*column.values(), strict=True)]
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
        if config.boundary_value == "low" and k + 1 < len(table):
            next_low = v_low[table[k + 1][0]]
            corrected = next_value + next_advantage
            arrival[k] = next_low + config.lam_boundary * (corrected - next_low)
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
    reward, turns = trajectory["reward"], len(trajectory["reward"])
    value = trajectory[{"high": "v_high", "switch": "v_switch"}[config.gae_value]]
    after = [*value[1:], after_end(trajectory, config, own=value[-1])]
    td_error = [reward[t] + config.gamma * after[t] - value[t] for t in range(turns)]
    decay = config.gamma * config.lam_low
    advantage = [sum(decay ** (u - t) * td_error[u] for u in range(t, turns)) for t in range(turns)]
    return for_every_role(trajectory, advantage, [advantage[t] + value[t] for t in range(turns)])


def monte_carlo(trajectory, config):
    reward_to_go = returns(trajectory, config, config.gamma)
    return for_every_role(trajectory, reward_to_go, reward_to_go)


def returns(trajectory, config, gamma):
    reward, turns = trajectory["reward"], len(trajectory["reward"])
    cut = after_end(trajectory, config, own=trajectory["v_high"][-1])
    return [
        sum(gamma ** (u - t) * reward[u] for u in range(t, turns)) + gamma ** (turns - t) * cut
        for t in range(turns)
    ]


def group_relative(trajectories, config):
    groups = {}
    for i, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory["group"], []).append(i)
    score = [returns(trajectory, config, 1.0)[0] for trajectory in trajectories]
    to_go = [returns(trajectory, config, config.gamma) for trajectory in trajectories]
    out = [None] * len(trajectories)
    for members in groups.values():
        scores = [score[i] for i in members]
        steps = step_advantages(trajectories, members, to_go, config)
        for i in members:
            turns = len(to_go[i])
            if config.estimator == "rloo":
                others = [score[j] for j in members if j != i]
                episode = score[i] - sum(others) / len(others)
            elif config.estimator == "rloo_rows":
                rows = [score[j] for j in members for _ in to_go[j]]
                episode = len(rows) / (len(rows) - 1) * (score[i] - sum(rows) / len(rows))
            else:
                episode = compare(score[i], scores, config)
            advantage = [episode] * turns
            if config.estimator == "gigpo":
                advantage = [episode + config.step_weight * steps[i, t] for t in range(turns)]
            out[i] = for_every_role(trajectories[i], advantage, to_go[i])
    return out


def compare(x, xs, config):
    mean = sum(xs) / len(xs)
    if not config.group_std:
        return x - mean
    if len(xs) == 1 or len(set(xs)) == 1:
        return 0.0
    std = math.sqrt(sum((y - mean) ** 2 for y in xs) / (len(xs) - 1))
    return (x - mean) / (std + 1e-6)


def step_advantages(trajectories, members, to_go, config):
    """{(trajectory, turn): advantage among the turns of the group that saw the same state}"""
    clusters = []  # (first text, spots)
    for i in members:
        for t, text in enumerate(trajectories[i]["state"]):
            for anchor, spots in clusters:
                if text == anchor or ratio(text, anchor) >= config.anchor_similarity:
                    spots.append((i, t))
                    break
            else:
                clusters.append((text, [(i, t)]))
    out = {}
    for _, spots in clusters:
        group = [to_go[i][t] for i, t in spots]
        out |= {(i, t): compare(to_go[i][t], group, config) for i, t in spots}
    return out


@cache
def ratio(text, anchor):
    return SequenceMatcher(None, text, anchor).ratio()


def for_every_role(trajectory, advantage, target):
    out = {level: list(advantage if "adv" in level else target) for level in LEVELS}
    out["segment"] = [0] * len(advantage)
    for k, (first, last) in enumerate(segments(trajectory)):
        for t in range(first, last + 1):
            out["segment"][t] = k
            if t > first:
                out["adv_high"][t] = out["target_high"][t] = math.nan
    return out


def token_gae(score, value, length, config):
    """[(advantages, targets)] of the tokens of each response, without padding."""
    out = []
    for r, v, n in zip(score, value, length, strict=True):
        v = [float(x) for x in v[:n]] + [0.0]
        decay = config.gamma * config.lam_low
        td_error = [config.gamma * v[j + 1] - v[j] + (r if j == n - 1 else 0) for j in range(n)]
        advantage = [sum(decay ** (k - j) * td_error[k] for k in range(j, n)) for j in range(n)]
        out.append((advantage, [advantage[j] + v[j] for j in range(n)]))
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
