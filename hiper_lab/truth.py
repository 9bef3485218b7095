"""Ground truth for credit: what a decision was worth, found by playing on from it many times.

A world that can be restored answers what a critic only guesses. From a turn (s; q, g, a) of the
agent's own play the same policy plays on, ``rollouts`` times each,

    V = E[G | s]   Q_q = E[G | s, q]   Q_g = E[G | s, q, g]   Q_a = E[G | s, q, g, a]

and the true advantages are Q_q − V (switch), Q_g − Q_q (high, where a subgoal was chosen) and
Q_a − Q_g (low). The same continuations, cut loose from that turn, are what an estimator would have
seen, so the mean and the variance of its advantage for this very decision are measured too.

Left out on purpose: estimators that compare episodes of a group; free decoding, where a
decision can not be separated from its spelling.

Source: Monte-Carlo evaluation of decisions as in VinePPO (arXiv:2410.01679, section 4), for all
three levels of HiPER (arXiv:2602.16165).
"""

import argparse
import math
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hiper_lab import objective, trajectory
from hiper_lab.config import TrainConfig
from hiper_lab.credit import CreditConfig, estimate
from hiper_lab.flat import GROUP_RELATIVE
from hiper_lab.folder import RunFolder, State
from hiper_lab.protocol import Role
from hiper_lab.records import read_parameters
from hiper_lab.rollout import Episode, collect, play
from hiper_lab.sampling import hf_sampler
from hiper_lab.train import set_up
from hiper_lab.trajectory import Trajectory, Turn, write_atomic
from hiper_lab.worlds import make_envs

# What is decided within a turn, one after the other.
DECISIONS = {"switch": Role.SWITCH, "high": Role.SUBGOAL, "low": Role.ACTION}


def measure(
    state: State, estimators: dict[str, CreditConfig], *, turns: int, rollouts: int = 64,
    draws: int = 32, seed: int = 0,
) -> pd.DataFrame:  # fmt: skip
    """True advantages of ``turns`` turns of the policy's play, and what estimators make of them.

    Args:
        estimators: By name. All get the rewards, values and continuations of the same draws.
        turns: Turns to sample, uniformly from one episode each in as many training games.
        rollouts: Continuations per expectation, for the truth.
        draws: Further continuations, from which the estimates are made.
        seed: Of the play and the sampled turns.

    Returns:
        One row per turn, level and estimator: ``game``, ``turn``, ``level``, ``truth`` (of the
        decision) and ``error`` (its standard error), ``expects`` (what the estimator would give
        with exact values: the truth, or for a flat one Q − V), ``mean`` and ``variance`` of its
        advantage over the ``draws``; ``value``, what the level's head says before the decision,
        and ``worth`` (with ``worth_error``), what it should say. Levels where nothing was chosen
        (the subgoal of a KEEP turn) have no row.

    Raises:
        ValueError: On free decoding, an estimator that compares episodes of a group, another γ or
            switch form than the values can serve, or too few rollouts.
    """
    config = state.config
    _check(config, estimators, rollouts, draws)
    generator = torch.Generator(state.policy.device).manual_seed(seed)
    sampler = hf_sampler(state.policy, config.rollout.temperature, generator)
    envs, names = make_envs(config, "train", 0, turns)
    played = collect(sampler, state.codec, envs, config.rollout, names=names, seeds=[seed] * turns)
    picked = np.random.default_rng(seed)
    rows = []
    for k in tqdm(range(turns), desc="truth", unit="turn"):
        t = int(picked.integers(len(played[k].turns)))
        turn = played[k].turns[t]
        # {what was decided last: the choices up to there}
        decided, choices = {"state": []}, []
        for level, role in DECISIONS.items():
            if made := _chosen(turn, role):
                decided[level] = choices = choices + made
        size = rollouts + draws
        count = size * len(decided)
        copies, _ = make_envs(config, "train", k, count, count)
        begun = _begin(copies, played[k], t, [x for x in decided.values() for _ in range(size)])
        rest = play(sampler, state.codec, begun, config.rollout)
        sets = {level: rest[i * size : (i + 1) * size] for i, level in enumerate(decided)}
        rows += _compare(state, sets, played[k], t, estimators, rollouts)
    return pd.DataFrame(rows)


def _check(
    config: TrainConfig, estimators: dict[str, CreditConfig], rollouts: int, draws: int
) -> None:
    if config.rollout.decoding != "guided":
        raise ValueError(f"decoding is {config.rollout.decoding!r}, expected 'guided'")
    if min(rollouts, draws) < 2:
        raise ValueError(f"rollouts {rollouts}, draws {draws}: expected at least 2 of each")
    for name, credit in estimators.items():
        if credit.estimator in GROUP_RELATIVE:
            raise ValueError(f"{name}: {credit.estimator} compares episodes, expected one that "
                             "credits an episode by itself")  # fmt: skip
        if credit.gamma != config.credit.gamma or credit.switch_advantage == "value":
            raise ValueError(
                f"{name}: gamma is {credit.gamma}, switch_advantage {credit.switch_advantage!r}; "
                f"expected {config.credit.gamma} as in training, and 'return'"
            )


def _chosen(turn: Turn, role: Role) -> list[int]:
    """The tokens of this role that were a choice, in order."""
    return [
        i for i, r, chosen in zip(turn.response_ids, turn.roles, turn.chosen, strict=True)
        if chosen and r == role
    ]  # fmt: skip


def _begin(envs: list, played: Trajectory, t: int, decided: list[list[int]]) -> list[Episode]:
    """An episode in the state before turn ``t`` in each environment, with its choices made."""
    before, now = played.turns[:t], played.turns[t]
    for env in envs:
        env.reset(seed=played.seed)
    for turn in before:
        envs[0].step(turn.action)
    here = envs[0].snapshot()
    return [
        Episode(
            env, played.game, played.seed, now.observation, env.restore(here),
            subgoal=before[-1].subgoal if before else "",
            history=[(turn.observation, turn.action) for turn in before], decided=choices,
        )
        for env, choices in zip(envs, decided, strict=True)
    ]  # fmt: skip


def _compare(
    state: State, sets: dict[str, list[Trajectory]], played: Trajectory, t: int,
    estimators: dict[str, CreditConfig], rollouts: int,
) -> list[dict]:  # fmt: skip
    """Rows of one turn."""
    gamma, scale = state.config.credit.gamma, state.config.reward_scale
    rollout = state.config.rollout
    q, variance = {}, {}
    for level, rest in sets.items():
        returns = [scale * _discounted(trajectory, gamma) for trajectory in rest[:rollouts]]
        q[level], variance[level] = np.mean(returns), np.var(returns, ddof=1) / rollouts
    subgoal = played.turns[t - 1].subgoal if t else ""
    rows = []
    for before, level in pairwise(sets):
        rest = sets[level][rollouts:]
        grid = trajectory.to_grid(rest)
        grid = grid._replace(reward=grid.reward * scale)
        samples = objective.pack(
            rest, state.codec, rollout.decoding, rollout.max_new_tokens, subgoal
        )
        values = objective.evaluate(state.policy, rest, samples, state.config.micro_batch_tokens)
        said = getattr(values, level)[0, 0].item()  # in all draws: it is read before they part
        for name, credit in estimators.items():
            given = getattr(estimate(grid, values, credit), level)[:, 0].double()
            flat = credit.estimator != "hae"
            rows.append({
                "game": played.game, "turn": t, "level": level, "estimator": name,
                "truth": q[level] - q[before],
                "error": math.sqrt(variance[level] + variance[before]),
                "expects": q[level] - q["state" if flat else before],
                "mean": given.mean().item(), "variance": given.var().item(), "draws": len(given),
                "value": said, "worth": q[before], "worth_error": math.sqrt(variance[before]),
            })  # fmt: skip
    return rows


def _discounted(played: Trajectory, gamma: float) -> float:
    return sum(gamma**k * turn.reward for k, turn in enumerate(played.turns))


def summary(measured: pd.DataFrame) -> pd.DataFrame:
    """How good each estimator's credit is, per level; rows of `measure` in, a row per pair out.

    ``signal``, the standard deviation of the truth; ``noise``, the root mean variance of the
    estimate; ``offset``, the root mean square of mean − expects, without what the finite number of
    draws and rollouts adds (where it is the same whatever was decided, it is a baseline and
    biases no gradient); ``correlation`` and ``slope`` of the mean with the truth; ``clear``, the
    decisions whose truth is beyond two standard errors; ``signs``, the share of them that one
    draw, taken as normal, credits with the right sign.

    Example:
        >>> rows = pd.DataFrame({"level": "low", "estimator": "x", "truth": [0.2, -0.2],
        ...     "error": 0.0, "expects": [0.2, -0.2], "mean": [0.3, -0.1], "variance": 0.0,
        ...     "draws": 8})
        >>> summary(rows).round(3).to_dict("records")[0]["offset"]
        0.1
    """

    def one(rows: pd.DataFrame) -> pd.Series:
        chance = rows.variance / rows.draws + rows.error**2
        offset = ((rows["mean"] - rows.expects) ** 2 - chance).mean()
        clear = rows[rows.truth.abs() > 2 * rows.error]
        z = (clear["mean"] * np.sign(clear.truth)) / np.sqrt(clear.variance.clip(lower=1e-12))
        right = [0.5 * math.erfc(-x / math.sqrt(2)) for x in z]
        spread = rows.truth.std(ddof=0)
        return pd.Series({
            "turns": len(rows), "signal": spread, "offset": math.sqrt(max(offset, 0.0)),
            "noise": math.sqrt(rows.variance.mean()),
            "correlation": rows["mean"].corr(rows.truth),
            "slope": rows["mean"].cov(rows.truth, ddof=0) / max(spread**2, 1e-12),
            "clear": len(clear), "signs": float(np.mean(right)) if right else math.nan,
        })  # fmt: skip

    groups = measured.groupby(["level", "estimator"], sort=False)
    return (
        pd.DataFrame({key: one(rows) for key, rows in groups})
        .T.rename_axis(["level", "estimator"])
        .reset_index()
    )


def head_errors(measured: pd.DataFrame) -> pd.DataFrame:
    """How wrong the heads are, and whether they err alike: a row per pair of levels.

    Of turns at which both levels decided: ``turns``; the correlation of value − worth of the two,
    without the noise of the measured worths (it can leave [-1, 1] if turns are few); and the root
    mean square of both errors about their means, likewise.

    Example:
        >>> low = pd.DataFrame({"game": ["a", "b", "c"], "turn": 0, "level": "low",
        ...     "value": [0.1, 0.2, 0.6], "worth": [0.0, 0.2, 0.4], "worth_error": 0.0})
        >>> switch = low.assign(level="switch", value=[0.2, 0.2, 0.6])
        >>> head_errors(pd.concat([switch, low]))["correlation"].round(6).tolist()
        [0.866025]
    """
    once = measured.drop_duplicates(["game", "turn", "level"])
    once = once.assign(error=once["value"] - once["worth"], noise=once["worth_error"] ** 2)
    table = once.pivot(index=["game", "turn"], columns="level", values=["error", "noise"])
    rows = []
    for a, b in combinations([level for level in DECISIONS if level in table["error"]], 2):
        both = table.loc[:, (slice(None), [a, b])].dropna()
        variance = both["error"].var() - both["noise"].mean()
        size = variance.clip(lower=1e-12) ** 0.5
        rows.append({
            "levels": f"{a}, {b}", "turns": len(both),
            "correlation": both["error"].cov().loc[a, b] / (size[a] * size[b]),
            "size of the first": size[a], "of the second": size[b],
        })  # fmt: skip
    return pd.DataFrame(rows)


def arms(config: TrainConfig) -> dict[str, CreditConfig]:
    """The estimators that the study compares; γ and the rest are as in the run.

    λ is 0.95 for every level where the name says nothing; ``hae lab`` has that of the preset.
    """
    lab = CreditConfig.lab()
    hae = replace(
        config.credit,
        estimator="hae",
        lam_low=0.95,
        lam_high=0.95,
        lam_boundary=0.95,
        lam_schedule="fixed",
        switch_advantage="return",
        whiten=False,
    )
    shorter = {name: getattr(lab, name) for name in ("lam_low", "lam_high", "lam_boundary")}
    return {
        **{f"hae λ_B {x:g}": replace(hae, lam_boundary=x) for x in (0.0, 0.5, 0.95, 1.0)},
        "hae lab": replace(hae, **shorter),
        **{f"gae λ {x:g}": replace(hae, estimator="gae", lam_low=x) for x in (0.8, 0.95, 1.0)},
    }


def main() -> None:
    """Measure the true credit of decisions of a finished run, and how well estimators see it."""
    parser = argparse.ArgumentParser(prog="python -m hiper_lab.truth", description=main.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run with a checkpoint")
    parser.add_argument("--turns", type=int, default=40, help="to sample (default 40)")
    parser.add_argument("--rollouts", type=int, default=64, help="for each truth (default 64)")
    parser.add_argument("--draws", type=int, default=32, help="for each estimate (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON lines of what was measured")
    args = parser.parse_args()
    config = TrainConfig.from_parameters(read_parameters(args.run))
    state = set_up(config)
    if not RunFolder(args.run, config, write=False).restore(state):
        parser.error(f"{args.run} has no checkpoint, expected a run that has trained")
    measured = measure(
        state, arms(config), turns=args.turns, rollouts=args.rollouts, draws=args.draws,
        seed=args.seed,
    )  # fmt: skip
    if args.out:
        lines = measured.to_json(orient="records", lines=True, double_precision=6)
        write_atomic(args.out, lines.encode())
    print(summary(measured).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
