"""Credit for every decision of a turn: the subgoal (high), the action (low), the switch.

One dense grid ``[traj, turn]`` in, one out. Each level is a single backward recurrence
``y_t = b_t + c_t * y_{t+1}``, so there is no table of segments and no ragged padding; where a
segment ends is only a place where ``c`` changes. `credit_table` does the same for a table of turns
from anywhere, and `explain` takes any one advantage apart.

Left out on purpose: tokens (a token takes the credit of its role in its turn) and gradients
(credit is a constant to the loss).
"""

from collections.abc import Callable, Hashable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from hiper_lab import flat
from hiper_lab.grid import (
    Credit,
    CreditConfig,
    TurnGrid,
    Values,
    after_last_turn,
    layout,
    next_turn,
    numbers,
    real_turns,
    rewards_to_go,
)
from hiper_lab.scan import choose_method, reverse_scan

LEVELS = ("high", "low", "switch")


@torch.no_grad()
def estimate(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Credit as a trainer wants it: shaped rewards, the configured estimator, whitening.

    Raises:
        ValueError: If shapes differ, a trajectory has no turn, turn 0 is no boundary, a number that
            is read is not finite, or the grid lacks what a group-relative estimator compares by.
    """
    shaped = grid._replace(reward=shape_rewards(grid, config))
    config = in_effect(grid, values, config)
    credit = _estimator(config)(shaped, values, config)
    if not (credit.high.sum() + credit.low.sum() + credit.switch.sum()).isfinite():
        _refuse_nonfinite(grid, values, config)
    return whiten(credit, grid) if config.whiten else credit


@torch.no_grad()
def in_effect(grid: TurnGrid, values: Values, config: CreditConfig) -> CreditConfig:
    """``config`` with the λ_B that its schedule gives this batch; no schedule is left to apply.

    Example:
        V_high tells the two episodes apart, so nothing beyond the boundary needs to be heard.

        >>> grid = TurnGrid.of(reward=[[0., 1.], [0., 0.]], switch=[[1, 1], [1, 1]])
        >>> high = torch.tensor([[0.6, 0.6], [0.2, 0.2]])
        >>> config = CreditConfig(lam_schedule="critic")
        >>> round(in_effect(grid, Values(high, high, high, torch.zeros(2)), config).lam_boundary, 6)
        0.0
    """
    if config.lam_schedule == "fixed" or config.estimator != "hae":
        return config
    shown = real_turns(grid) & grid.boundary
    rho = correlation(values.high[shown], rewards_to_go(grid)[shown])
    lam = config.lam_boundary * (1 - max(0.0, rho))
    return replace(config, lam_boundary=lam, lam_schedule="fixed")


def correlation(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> float:
    """Pearson's correlation, in [-1, 1]; 0 where either is constant."""
    both = torch.stack([x, y]).double()
    both = both - both.mean(1, keepdim=True)
    sizes = both.norm(dim=1)
    return 0.0 if (sizes < 1e-12).any() else (both[0] @ both[1] / sizes.prod()).clamp(-1, 1).item()


@torch.no_grad()
def shape_rewards(grid: TurnGrid, config: CreditConfig) -> Float[Tensor, "traj turn"]:
    """Rewards with the penalties of ``config`` applied; with none, the rewards themselves.

    The penalties are not potential-based: they change which policy is optimal.

    Example:
        Three KEEP turns, the first of them forced to start a segment. It pays all the same.

        >>> grid = TurnGrid.of(reward=[[0., 0., 0., 10.]], switch=[[0, 0, 1, 0]])
        >>> grid = grid._replace(valid=torch.tensor([[True, False, True, True]]))
        >>> shape_rewards(grid, CreditConfig.upstream())
        tensor([[-0.3000, -0.4000,  0.0000,  9.7000]])
    """
    return sum(reward_parts(grid, config).values())


def reward_parts(grid: TurnGrid, config: CreditConfig) -> dict[str, Float[Tensor, "traj turn"]]:
    """What `shape_rewards` adds up: the environment's reward and each penalty in use."""
    real = real_turns(grid)
    parts = {"reward": torch.where(real, numbers(grid.reward), 0)}
    keep, dtype = real & ~grid.switch, parts["reward"].dtype
    # masks are cast before a float meets them: it would make them float32
    if config.keep_penalty:
        share = torch.full_like(grid.length, config.keep_penalty, dtype=dtype)
        if config.keep_penalty_mode == "ratio":  # an episode of one turn had nothing to keep
            share = torch.where(grid.length > 1, share / grid.length, 0)
        parts["keep penalty"] = share[:, None] * keep.to(dtype)
    if config.invalid_penalty:
        parts["invalid penalty"] = -config.invalid_penalty * (real & ~grid.valid).to(dtype)
    if config.consistency_penalty:
        both = grid.has_subgoal & pad(grid.has_subgoal[:, :-1], (1, 0))
        if config.consistency_requires_both:
            differs = both & ~grid.same_subgoal & keep
        else:
            differs = ~(both & grid.same_subgoal) & keep
        differs[:, 0] = False
        parts["consistency penalty"] = config.consistency_penalty * differs.to(dtype)
    return parts


def hae(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Hierarchical Advantage Estimation: credit for subgoals, actions and switches.

    A boundary turn b starts a segment; its subgoal runs until the next boundary b'. Credit
    flows at two speeds. Between segments, with R_b the discounted reward of the d turns of b,

        high    Âᴴ_b = R_b + γᵈ Vᴴ_b' − Vᴴ_b + γᵈ λᴴ Âᴴ_b'

    and inside a segment, with W = Vᴴ_b' + λᴮ Âᴴ_b' in place of what follows its last turn,

        low     Âᴸₜ = δₜ + γ λᴸ Âᴸₜ₊₁           δₜ = rₜ + γ (Vᴸₜ₊₁ or W) − Vᴸₜ
        switch  Âˢₜ = Gₜ − Vˢₜ                  Gₜ = rₜ + γ (Gₜ₊₁  or W)

    where Âᴸₜ₊₁ = 0 after the segment's last turn. After the episode's last turn Âᴴ_b' = 0 and
    Vᴴ_b' is 0 if it terminated, else what ``config.truncation`` says.

    λᴮ = 0 is the paper: nothing but Vᴴ is heard from beyond the boundary. λᴮ = λᴴ = λᴸ = 1
    telescopes to the whole return: Âᴸₜ = Σ γᵘ⁻ᵗ rᵤ − Vᴸₜ. ``boundary_value="low"`` puts Vᴸ in
    the place of Vᴴ: W = (1 − λᴮ) Vᴸ_b' + λᴮ (Vᴴ_b' + Âᴴ_b'); with λᴮ = λᴸ = 0 it is one-step
    TD on Vᴸ, as if there were no segments.

    ``switch_advantage="value"`` makes the switch level a matter of values alone,

        switch  Âˢₜ = (Vᴴₜ if SWITCH else Vᴸₜ) − Vˢₜ  =  (qₜ − βₜ)(Vᴴ(sₜ) − Vᴸ(sₜ, g_prev)),

    equal because Vᴸₜ of a KEEP turn is Vᴸ(sₜ, g_prev) and Vˢ the β-mixture (see `Values`).
    Turn 0 had no choice, so 0. The target of Vˢ is that Vᴴₜ or Vᴸₜ: its mean is the mixture.

    Args:
        grid: What happened. Rewards are used as they are; see `shape_rewards`.
        values: ``high`` is read at boundaries.
        config: γ, the three λ, ``boundary_value``, ``switch_advantage`` and ``truncation`` are
            read.

    Returns:
        Credit whose targets are advantage + value, but for ``target_switch`` as said above.

    Raises:
        ValueError: If shapes differ, a trajectory has no turn, or turn 0 is no boundary.

    Example:
        Two segments of two turns, reward 1 at the end, untrained (zero) values.

        >>> grid = TurnGrid.of(reward=[[0., 0., 0., 1.]], switch=[[1, 0, 1, 0]])
        >>> zero = torch.zeros(1, 4)
        >>> config = CreditConfig(gamma=0.5, lam_high=1.0, lam_low=1.0, lam_boundary=0.0)
        >>> credit = hae(grid, Values(zero, zero, zero, torch.zeros(1)), config)
        >>> credit.low        # the last action's reward stays inside segment 1
        tensor([[0.0000, 0.0000, 0.5000, 1.0000]])
        >>> credit.high       # subgoal 0 gets γ² of subgoal 1's credit
        tensor([[0.1250, 0.0000, 0.5000, 0.0000]])

    References:
        Peng et al. 2026, arXiv:2602.16165 (λᴮ is ours); Schulman et al. 2016, arXiv:1506.02438;
        Sutton, Precup & Singh 1999 (options). Indices follow HiPER: rₜ follows aₜ.
    """
    real, last, crossing = layout(grid, values)
    dtype = torch.promote_types(numbers(grid.reward).dtype, values.low.dtype)
    if choose_method(real.shape, real.device, dtype) == "triton":
        return _hae_on_gpu(grid, values, config)
    inside, boundary = real & ~last & ~crossing, real & grid.boundary
    reward = torch.where(real, numbers(grid.reward), 0)
    v_high, v_low, v_switch, _ = map(numbers, values)
    gamma, flows = config.gamma, config.gamma * inside.to(reward.dtype)
    # Where a limit cut the episode: what stands for V of the state after the last turn.
    opened = v_high
    if config.truncation == "own_state":  # V at the opening of the last segment
        opens = (boundary * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        opened = v_high.gather(1, opens[:, None])
    cut_high = after_last_turn(grid, last, values, config, own=opened)
    cut_low = after_last_turn(grid, last, values, config, own=v_low)

    # high: what a segment's last turn sees ahead is (1 - λᴴ) Vᴴ + λᴴ y, y the next one's return.
    arrival = torch.where(crossing, next_turn(v_high), 0)
    returns = reverse_scan(
        reward + gamma * (cut_high + (1 - config.lam_high) * arrival),
        flows + gamma * config.lam_high * crossing.to(reward.dtype),
    )
    high = torch.where(boundary, returns - v_high, 0)

    # low
    if config.boundary_value == "low":
        differs = torch.where(crossing, next_turn(v_low - v_high), 0)
        arrival = arrival + (1 - config.lam_boundary) * differs
    arrival = arrival + config.lam_boundary * next_turn(high)  # W in the equations
    ahead = torch.where(inside, next_turn(v_low), arrival + cut_low)
    td_error = torch.where(real, reward + gamma * ahead - v_low, 0)
    low = reverse_scan(td_error, config.lam_low * flows)

    if config.switch_advantage == "return":
        target_switch = reverse_scan(reward + gamma * (arrival + cut_high), flows)
        switch = torch.where(real, target_switch - v_switch, 0)
    else:
        target_switch = torch.where(real, torch.where(boundary, v_high, v_low), 0)
        switch = torch.where(real, target_switch - v_switch, 0)
        switch[:, 0] = 0
    return Credit(
        high=high,
        low=low,
        switch=switch,
        target_high=torch.where(boundary, returns, 0),
        target_low=torch.where(real, low + v_low, 0),
        target_switch=target_switch,
    )


@torch.no_grad()
def whiten(credit: Credit, grid: TurnGrid) -> Credit:
    """Bring each level's advantages to mean 0 and standard deviation 1; targets stay.

    Statistics (population) run over turns, not tokens: all turns for low and switch; for high
    the boundaries whose text holds subgoal tokens. An all-equal level becomes exactly 0.
    """
    whitened = {}
    for level in LEVELS:
        x, shown = getattr(credit, level), _decisions(grid, level)
        mean, scale = _moments(credit, grid, level)
        whitened[level] = torch.where(shown, (x - mean) / scale, 0)
    return credit._replace(**whitened)


@torch.no_grad()
def explain(
    grid: TurnGrid, values: Values, config: CreditConfig, traj: int, turn: int, level: str
) -> pd.DataFrame:
    """Take one advantage of `estimate` apart: the terms whose sum it is.

    For given decisions an advantage is a weighted sum of rewards and values, whichever estimator
    computes it. The weights are its derivatives, taken from the estimator itself in float64, so
    that nothing is explained which is not computed.

    Args:
        grid, values, config: As for `estimate`.
        traj: Row of the grid.
        turn: Turn of that trajectory, from 0.
        level: ``"high"`` (at boundaries only), ``"low"`` or ``"switch"``.

    Returns:
        One row per term: ``term`` (what it is), ``kind`` (``reward``, ``penalty``, ``bootstrap``: a
        value in place of rewards not seen, or ``baseline``: what was expected anyway), ``turn`` (of
        which the term is; the number of turns for the state after the last; missing for means),
        ``coefficient``, ``value``, and ``contribution``, their product. The contributions add up to
        the advantage. Where ``truncation="own_state"`` makes one value both bootstrap and
        baseline, the coefficient is the difference. Rewards and penalties that are 0 are left out.

    Raises:
        ValueError: As `estimate`; or if there is no such turn or level, or no subgoal was chosen
            there.

    Example:
        The first action of a segment of two turns, then another segment.

        >>> grid = TurnGrid.of(reward=[[1., 2., 9.]], switch=[[1, 0, 1]])
        >>> high = torch.tensor([[0., 0., 6.]])
        >>> low = torch.tensor([[2.5, 3., 0.]])
        >>> config = CreditConfig(gamma=0.5, lam_low=1.0, lam_boundary=0.0)
        >>> values = Values(high, low, high, torch.zeros(1))
        >>> explain(grid, values, config, traj=0, turn=0, level="low")
             term       kind  turn  coefficient  value  contribution
        0  reward     reward     0         1.00    1.0           1.0
        1  reward     reward     1         0.50    2.0           1.0
        2  V_high  bootstrap     2         0.25    6.0           1.5
        3   V_low   baseline     0        -1.00    2.5          -2.5
    """
    grid = TurnGrid(*(x if x is None else x.cpu() for x in grid))
    grid = grid._replace(reward=grid.reward.double())
    values = Values(*(v.cpu().double() for v in values))
    _refuse_nonfinite(grid, values, config)
    _find(grid, traj, turn, level)
    config = in_effect(grid, values, config)
    parts = reward_parts(grid, config)
    leaves = [x.detach().requires_grad_() for x in (sum(parts.values()), *values)]
    shaped, read = grid._replace(reward=leaves[0]), Values(*leaves[1:])
    with torch.enable_grad():
        credit = _estimator(config)(shaped, read, config)
        advantage = getattr(credit, level)[traj, turn]
        gradients = torch.autograd.grad(advantage, leaves, materialize_grads=True)
    of_reward, *of_values = (x[traj] for x in gradients)
    rows = []
    for name, part in parts.items():
        kind = "reward" if name == "reward" else "penalty"
        terms = enumerate(zip(of_reward.tolist(), part[traj].tolist(), strict=True))
        rows += [(name, kind, t, weight, x) for t, (weight, x) in terms if weight and x]
    for name, value, weights in zip(Values._fields, values, of_values, strict=True):
        first = int(grid.length[traj]) if name == "final" else 0
        terms = zip(weights.reshape(-1).tolist(), value[traj].reshape(-1).tolist(), strict=True)
        for t, (weight, x) in enumerate(terms, start=first):
            if abs(weight) > 1e-15:  # less is rounding of weights that cancel
                kind = "bootstrap" if weight > 0 else "baseline"
                rows.append((f"V_{name}", kind, t, weight, x))
    rows.sort(key=lambda row: (row[1] == "baseline", row[2]))
    if config.estimator in flat.GROUP_RELATIVE:
        for _, mean, scale, name in flat.comparisons(config.estimator, shaped, values, config):
            if weight := float(scale[traj, turn]):
                rows.append((name, "baseline", None, -weight, float(mean[traj, turn])))
    if config.whiten:
        mean, scale = (float(x) for x in _moments(credit, grid, level))
        rows = [(*row[:3], row[3] / scale, row[4]) for row in rows]
        rows.append(("mean advantage of the batch", "baseline", None, -1 / scale, mean))
    table = pd.DataFrame(rows, columns=["term", "kind", "turn", "coefficient", "value"])
    table["turn"] = table["turn"].astype("Int64")
    return table.assign(contribution=table["coefficient"] * table["value"])


def per_token(
    credit: Credit, cell: tuple[Tensor, Tensor], level: Int[Tensor, "row token"]
) -> Float[Tensor, "row token"]:
    """Spread credit over tokens: each takes the advantage of its level in its turn, in float32.

    Args:
        credit: Of all turns.
        cell: Trajectory and turn of each row, as `table_to_grid` returns them.
        level: Of each token, 0 to 2 in the order of `LEVELS`; 3 for those that were no decision.

    Example:
        >>> zero = torch.zeros(1, 1)
        >>> credit = Credit(zero + 5, zero + 7, zero + 9, zero, zero, zero)
        >>> per_token(credit, (torch.tensor([0]), torch.tensor([0])), torch.tensor([[2, 3, 0, 1]]))
        tensor([[9., 0., 5., 7.]])
    """
    choices = torch.stack([getattr(credit, name)[cell] for name in LEVELS], 1)
    choices = torch.cat([choices, torch.zeros_like(choices[:, :1])], 1).float()
    out = torch.empty(level.shape, device=level.device)
    parts = zip(out.split(256), choices.split(256), level.split(256), strict=True)
    for part, chosen, tokens in parts:
        torch.gather(chosen, 1, tokens.long(), out=part)  # in parts: indices are 64-bit
    return out


def segment_index(boundary: Bool[Tensor, "traj turn"]) -> Int[Tensor, "traj turn"]:
    """Number of the segment each turn belongs to, from 0. Padding continues the last one.

    >>> segment_index(torch.tensor([[True, False, True, False]]))
    tensor([[0, 0, 1, 1]])
    """
    return boundary.cumsum(1) - 1


COLUMNS = ("traj", "turn", "reward", "done", "switch", "valid", "subgoal")
VALUE_COLUMNS = ("v_high", "v_low", "v_switch")


def credit_table(turns: pd.DataFrame, config: CreditConfig) -> pd.DataFrame:
    """Credit for a log of turns, whichever framework wrote it: one row in, one row out.

    Args:
        turns: One row per turn, in any order. ``traj`` (any hashable), ``turn`` (0, 1, 2, …
            within each), ``reward``, ``done`` (terminated after this turn), ``switch``,
            ``valid``, ``subgoal`` (text or token ids; empty or missing if there is none), and
            what the estimator reads: ``v_low``, ``v_high``, ``v_switch`` as in `Values` (the
            critic-free ones read none with ``truncation="zero"``); ``v_final`` in each cut
            trajectory's last row, the value of the state after it; ``group`` (the task instance,
            any hashable) for `flat.grpo`, `flat.rloo`, `flat.rloo_rows` and `flat.gigpo`; ``state``
            (what the turn saw, as in `flat.anchor_states`) for `flat.gigpo`.
        config: What `estimate` should compute.

    Returns:
        The index of ``turns`` with ``adv_low``, ``adv_high``, ``adv_switch``, ``target_low``,
        ``target_high``, ``target_switch`` in float64 and ``segment`` (from 0). ``adv_high`` and
        ``target_high`` are NaN off boundaries.

    Raises:
        ValueError: If a column or a number is missing, a (traj, turn) occurs twice, turn
            numbers have gaps, an episode goes on after ``done``, or a group is no group.

    Example:
        >>> turns = pd.DataFrame({
        ...     "traj": "a", "turn": [1, 0], "reward": [1.0, 0.0], "done": [True, False],
        ...     "switch": [False, True], "valid": True, "subgoal": "find the mug",
        ...     "v_low": [0.5, 0.25], "v_high": 0.25, "v_switch": 0.0})
        >>> credit_table(turns, CreditConfig.paper())[["adv_low", "adv_high", "segment"]]
           adv_low  adv_high  segment
        0     0.50       NaN        0
        1     0.75      0.75        0
    """
    grid, values, cell = table_to_grid(turns, config)
    credit = estimate(grid, values, config)
    off = ~grid.boundary
    columns = {
        "adv_low": credit.low,
        "adv_high": credit.high.masked_fill(off, torch.nan),
        "adv_switch": credit.switch,
        "target_low": credit.target_low,
        "target_high": credit.target_high.masked_fill(off, torch.nan),
        "target_switch": credit.target_switch,
        "segment": segment_index(grid.boundary),
    }
    return pd.DataFrame({k: x[cell].numpy() for k, x in columns.items()}, index=turns.index)


def explain_table(
    turns: pd.DataFrame, config: CreditConfig, traj: Hashable, turn: int, level: str
) -> pd.DataFrame:
    """`explain` for one row of a table as `credit_table` takes it, ``traj`` by its name there."""
    grid, values, _ = table_to_grid(turns, config)
    _, names = _numbered(turns["traj"])
    if traj not in names:
        raise ValueError(f"traj is {traj!r}, expected one of the {len(names)} in the table")
    return explain(grid, values, config, names.index(traj), turn, level)


def table_to_grid(
    turns: pd.DataFrame, config: CreditConfig
) -> tuple[TurnGrid, Values, tuple[Tensor, Tensor]]:
    """Lay a table of turns out as a grid, in float64. See `credit_table` for its columns.

    Returns:
        The grid (trajectories in order of appearance), the values (NaN where the table has none
        and ``config`` needs none), and ``cell``: ``x[cell]`` reads a grid back, one number per
        table row.
    """
    needed = [*COLUMNS, *_columns_read(config)]
    if missing := [name for name in needed if name not in turns]:
        raise ValueError(f"turns has no column {missing}, expected {needed}")
    traj, names = _numbered(turns["traj"])
    if turns.empty or traj.min() < 0:
        raise ValueError("turns has no rows or rows without traj, expected one per turn")
    turn, length = _floats(turns, "turn"), np.bincount(traj)
    if not _is_gapless(traj, turn, length):
        raise ValueError(_first_gap(names, traj, turn))
    turn = turn.astype(np.int64)
    shape = len(length), int(length.max())

    def grid(column: np.ndarray, padding: float = 0) -> np.ndarray:
        padded = np.full(shape, padding, dtype=column.dtype)
        padded[traj, turn] = column
        return padded

    last = turn == length[traj] - 1
    done = _flags(turns, "done")
    if (early := done & ~last).any():
        where = _earliest(traj, turn, early)
        raise ValueError(
            f"turn {turn[where]} of trajectory {names[traj[where]]!r} has done, expected only at "
            "the last turn"
        )
    switch, (subgoal, none) = grid(_flags(turns, "switch")), _subgoals(turns["subgoal"])
    boundary, subgoal = switch.copy(), grid(subgoal)
    boundary[:, 0] = True
    same = np.zeros(shape, dtype=bool)
    np.equal(subgoal[:, 1:], subgoal[:, :-1], out=same[:, 1:])
    same[:, 1:] &= np.arange(1, shape[1]) < length[:, None]
    terminated = np.zeros(shape[0], dtype=bool)
    terminated[traj[last]] = done[last]
    final = np.full(shape[0], np.nan)
    if "v_final" in turns:
        final[traj[last]] = _floats(turns[last], "v_final", optional=True)
    if config.truncation == "final_state" and (blind := ~terminated & np.isnan(final)).any():
        raise ValueError(
            f"{blind.sum()} trajectories (one is {names[blind.argmax()]!r}) do not end in done and "
            "have no v_final: give their last row v_final, the value of the state after it, or set "
            "truncation to 'own_state' or 'zero'"
        )
    group = state = None
    if config.estimator in flat.GROUP_RELATIVE:
        group = _groups(turns, names, traj)
        if config.estimator == "gigpo":
            seen = [_hashable(x) for x in turns["state"]]
            if None in seen:
                where = turns.index[seen.index(None)]
                raise ValueError(f"state is None at index {where!r}, expected what the turn saw")
            state = flat.anchor_states(seen, group[traj].tolist(), config.anchor_similarity)
            state = torch.from_numpy(grid(np.array(state)))
        group = torch.from_numpy(group)
    value = {
        name: _floats(turns, name, optional=name not in needed)
        if name in turns
        else np.full(len(turns), np.nan)
        for name in VALUE_COLUMNS
    }
    tensor = torch.from_numpy
    return (
        TurnGrid(
            reward=tensor(grid(_floats(turns, "reward"))),
            switch=tensor(switch),
            boundary=tensor(boundary),
            valid=tensor(grid(_flags(turns, "valid"))),
            has_subgoal=tensor(grid(~none)),
            same_subgoal=tensor(same),
            terminated=tensor(terminated),
            length=tensor(length),
            group=group,
            state=state,
        ),
        Values(*(tensor(grid(value[name])) for name in VALUE_COLUMNS), tensor(final)),
        (tensor(traj), tensor(turn)),
    )


def _columns_read(config: CreditConfig) -> list[str]:
    """The columns, beyond `COLUMNS`, without which ``config`` cannot be computed."""
    if config.estimator == "hae":
        return list(VALUE_COLUMNS)
    if config.estimator == "gae":
        return [f"v_{config.gae_value}"]
    read = ["v_high"] if config.truncation == "own_state" else []
    read += ["group"] if config.estimator in flat.GROUP_RELATIVE else []
    return read + (["state"] if config.estimator == "gigpo" else [])


def _is_gapless(traj: np.ndarray, turn: np.ndarray, length: np.ndarray) -> bool:
    """Each trajectory has turns 0, 1, 2, ... once: as many as rows, all in range, none twice."""
    if not ((turn >= 0) & (turn < length[traj]) & (turn == np.floor(turn))).all():
        return False
    place = (length.cumsum() - length)[traj] + turn.astype(np.int64)
    return bool((np.bincount(place, minlength=len(turn)) == 1).all())


def _first_gap(names: list[Hashable], traj: np.ndarray, turn: np.ndarray) -> str:
    """What is wrong with the first turn that is not where it should be."""
    order = np.lexsort((turn, traj))
    traj, turn = traj[order], turn[order]
    expected = np.concatenate([np.arange(n) for n in np.bincount(traj)])
    at = (turn != expected).argmax()
    if at and traj[at] == traj[at - 1] and turn[at] == turn[at - 1]:
        problem = "occurs more than once: drop the copies, they would be credited twice"
    else:
        problem = "leaves a gap, expected turns 0, 1, 2, ..."
    return f"turn {turn[at]:g} of trajectory {names[traj[at]]!r} {problem}"


def _earliest(traj: np.ndarray, turn: np.ndarray, wrong: np.ndarray) -> int:
    """Row of the first wrong turn of the first trajectory that has one."""
    rows = wrong.nonzero()[0]
    return int(rows[np.lexsort((turn[rows], traj[rows]))[0]])


def _groups(turns: pd.DataFrame, names: list[Hashable], traj: np.ndarray) -> np.ndarray:
    """One number per trajectory; no trajectory in two groups or alone in its group."""
    code, groups = _numbered(turns["group"])
    group = np.full(len(names), -1)
    group[traj] = code
    if (wrong := (group[traj] != code) | (code < 0)).any():
        name, seen = names[traj[wrong.argmax()]], turns["group"].iloc[int(wrong.argmax())]
        raise ValueError(
            f"group is {seen!r} in trajectory {name!r}, expected one and the same in all its turns"
        )
    size = np.bincount(group)
    if (size == 1).any():
        alone = (size[group] == 1).argmax()
        raise ValueError(
            f"trajectory {names[alone]!r} is alone in group {groups[group[alone]]!r}, expected at "
            "least two trajectories of each task instance to compare"
        )
    return group


def _numbered(column: pd.Series) -> tuple[np.ndarray, list[Hashable]]:
    """A number for each different entry, in order of appearance; -1 for a missing one."""
    code, different = pd.factorize(column)
    return code, different.tolist()


def _floats(turns: pd.DataFrame, name: str, optional: bool = False) -> np.ndarray:
    """A column as float64; what is no finite number is refused, or NaN if ``optional``."""
    column = pd.to_numeric(turns[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = ~np.isfinite(column)
    if optional:
        wrong &= ~turns[name].isna().to_numpy()
    if wrong.any():
        seen, where = turns[name][wrong].tolist()[0], turns.index[wrong][0]
        raise ValueError(f"{name} is {seen!r} at index {where!r}, expected a finite number")
    return column


def _flags(turns: pd.DataFrame, name: str) -> np.ndarray:
    """A column as bool; 0 and 1 will do, text and missing values will not."""
    if turns[name].dtype != bool:
        wrong = ~turns[name].isin([True, False]).to_numpy(bool)
        if wrong.any():
            seen, where = turns[name][wrong].tolist()[0], turns.index[wrong][0]
            raise ValueError(f"{name} is {seen!r} at index {where!r}, expected True or False")
    return turns[name].to_numpy(bool)


def _subgoals(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """A number for each different subgoal, and where there is none."""
    if pd.api.types.infer_dtype(column, skipna=True) not in ("string", "empty"):
        column = pd.Series([_hashable(x) for x in column], dtype=object)
    code, different = _numbered(column)
    empty = [i for i, x in enumerate(different) if x == "" or x == ()]
    code[np.isin(code, empty)] = -1
    return code, code == -1


def _hashable(x: object) -> Hashable:
    """Text as it is; an array, a tensor or a list of token ids as a tuple; missing as None."""
    if isinstance(x, str):
        return x
    if hasattr(x, "tolist"):
        x = x.tolist()
    return (
        None if pd.api.types.is_scalar(x) and pd.isna(x) else tuple(x) if isinstance(x, list) else x
    )


def _hae_on_gpu(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """`hae` in one launch."""
    from hiper_lab import scan_triton  # needs a GPU: never import it without

    fields = scan_triton.hae(
        numbers(grid.reward), grid.boundary, grid.terminated, grid.length, *map(numbers, values),
        gamma=config.gamma, lam_low=config.lam_low, lam_high=config.lam_high,
        lam_boundary=config.lam_boundary, truncation=config.truncation,
        value_form=config.switch_advantage == "value",
        low_boundary=config.boundary_value == "low",
    )  # fmt: skip
    return Credit(*fields)


def _estimator(config: CreditConfig) -> Callable[[TurnGrid, Values, CreditConfig], Credit]:
    return hae if config.estimator == "hae" else getattr(flat, config.estimator)


def _decisions(grid: TurnGrid, level: str) -> Bool[Tensor, "traj turn"]:
    """Where something was decided at this level."""
    real = real_turns(grid)
    return real & grid.boundary if level == "high" else real


def _moments(credit: Credit, grid: TurnGrid, level: str) -> tuple[Tensor, Tensor]:
    """What `whiten` subtracts and divides by; 0 and 1 where nothing is counted."""
    counted = _decisions(grid, level)
    if level == "high":
        counted = counted & grid.has_subgoal
    x = getattr(credit, level)[counted]
    if not len(x):
        return x.new_zeros(()), x.new_ones(())
    std, mean = torch.std_mean(x, correction=0)  # exact for equal numbers (Welford)
    return mean, std + 1e-8


def _refuse_nonfinite(grid: TurnGrid, values: Values, config: CreditConfig) -> None:
    """Names the first number that is read and is no number."""
    real, last, _ = layout(grid, values)
    cut = last & ~grid.terminated[:, None]
    read = {"reward": (grid.reward, real)}
    if config.estimator == "hae":
        read["high"] = values.high, real & grid.boundary
        read["low"], read["switch"] = (values.low, real), (values.switch, real)
    elif config.estimator == "gae":
        read[config.gae_value] = getattr(values, config.gae_value), real
    elif config.truncation == "own_state":
        read["high"] = values.high, cut
    if config.truncation == "final_state":
        read["final"] = values.final[:, None].expand_as(cut), cut
    for name, (x, where) in read.items():
        wrong = where & ~x.isfinite()
        if wrong.any():
            traj, turn = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{name} is {float(x[traj, turn])} at turn {turn} of trajectory {traj}, expected "
                "a finite number"
            )


def _find(grid: TurnGrid, traj: int, turn: int, level: str) -> None:
    """Refuses what has no advantage."""
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {LEVELS}")
    if not 0 <= traj < len(grid.length):
        raise ValueError(f"traj is {traj}, expected 0 to {len(grid.length) - 1}")
    if not 0 <= turn < grid.length[traj]:
        raise ValueError(f"turn is {turn}, expected 0 to {int(grid.length[traj]) - 1}")
    if not _decisions(grid, level)[traj, turn]:
        raise ValueError(f"turn {turn} kept its subgoal, expected a boundary for level 'high'")
