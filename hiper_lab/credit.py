"""Credit for every decision of a turn: the subgoal (high), the action (low), the switch.

One dense grid ``[traj, turn]`` in, one out. Each level is a single backward recurrence
``y_t = b_t + c_t * y_{t+1}``, so there is no table of segments and no ragged padding; where a
segment ends is only a place where ``c`` changes.

Time: r_t follows the action of turn t, V_t is read at the prompt of turn t (high, switch) or
after its subgoal (low). The state after the last turn has a value of its own, `Values.final`.

Left out on purpose: tokens (a token takes the credit of its role in its turn) and gradients
(credit is a constant to the loss).
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad

from hiper_lab.scan import reverse_scan


class TurnGrid(NamedTuple):
    """What happened, one row per trajectory. Columns from ``length`` on are padding."""

    reward: Float[Tensor, "traj turn"]
    """Reward after the turn's action, in the environment's unit."""
    switch: Bool[Tensor, "traj turn"]
    """The decision as the model said it: True is SWITCH. Turn 0 may say KEEP."""
    boundary: Bool[Tensor, "traj turn"]
    """A segment starts here: turn 0 whatever it said, and every SWITCH."""
    valid: Bool[Tensor, "traj turn"]
    """The output was well formed. (Whether a turn exists at all is ``length``.)"""
    has_subgoal: Bool[Tensor, "traj turn"]
    """The turn's own text holds subgoal tokens."""
    same_subgoal: Bool[Tensor, "traj turn"]
    """The subgoal equals that of the turn before. False at turn 0."""
    terminated: Bool[Tensor, "traj"]
    """The episode reached a terminal state; False where a limit stopped it."""
    length: Int[Tensor, "traj"]
    """Number of turns, at least 1."""

    @classmethod
    def of(cls, reward: ArrayLike, switch: ArrayLike, terminated: bool = True) -> "TurnGrid":
        """Well-formed trajectories of equal length, a subgoal changing only where they SWITCH."""
        reward = torch.as_tensor(reward)
        switch = torch.as_tensor(switch, dtype=torch.bool)
        boundary, (traj, turn) = switch.clone(), reward.shape
        boundary[:, 0] = True
        return cls(
            reward=_numbers(reward),
            switch=switch,
            boundary=boundary,
            valid=torch.ones_like(switch),
            has_subgoal=torch.ones_like(switch),
            same_subgoal=~boundary,
            terminated=torch.full((traj,), terminated),
            length=torch.full((traj,), turn),
        )


class Values(NamedTuple):
    """What the critic said; g_prev is the subgoal in force when the prompt is read."""

    high: Float[Tensor, "traj turn"]
    """V_high(s_t), before anything is decided."""
    low: Float[Tensor, "traj turn"]
    """V_low(s_t, g_t), after the subgoal and before the action."""
    switch: Float[Tensor, "traj turn"]
    """V_switch(s_t, g_prev) = (1-β) V_low(s_t, g_prev) + β V_high(s_t), β = P(SWITCH)."""
    final: Float[Tensor, "traj"]
    """V_high of the state after the last turn. Not read where the episode terminated."""


class Credit(NamedTuple):
    """Advantages, and the targets the value heads regress to. 0 in padding."""

    high: Float[Tensor, "traj turn"]
    """Of the subgoal, at boundaries; 0 elsewhere."""
    low: Float[Tensor, "traj turn"]
    """Of the action."""
    switch: Float[Tensor, "traj turn"]
    """Of the KEEP/SWITCH decision that was taken."""
    target_high: Float[Tensor, "traj turn"]
    """From `hae` at boundaries (0 elsewhere), from `gae` at every turn."""
    target_low: Float[Tensor, "traj turn"]
    target_switch: Float[Tensor, "traj turn"]


_UNIT = (lambda x: 0 <= x <= 1, "in [0, 1]")
_PENALTY = (lambda x: -math.inf < x <= 0, "at most 0 (it is added to the reward)")
_NUMBERS = {
    "gamma": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "lam_low": _UNIT,
    "lam_high": _UNIT,
    "lam_boundary": _UNIT,
    "keep_penalty": _PENALTY,
    "consistency_penalty": _PENALTY,
    "invalid_penalty": (lambda x: 0 <= x < math.inf, "at least 0 (it is subtracted)"),
}
_CHOICES = {
    "estimator": ("hae", "gae"),
    "switch_advantage": ("return", "value"),
    "truncation": ("final_state", "own_state", "zero"),
    "keep_penalty_mode": ("per_turn", "ratio"),
    "consistency_requires_both": (True, False),
    "whiten": (True, False),
}


def _checks_itself(config: type) -> type:
    """Let ``__post_init__`` answer to bad arguments, even where tests check annotations."""
    config.__init__.__annotations__.clear()
    return config


@_checks_itself
@dataclass(frozen=True)
class CreditConfig:
    """How credit is computed. The defaults are `lab`; vary one with `dataclasses.replace`.

    >>> from dataclasses import replace
    >>> replace(CreditConfig.paper(), gamma=0.9).gamma
    0.9
    >>> replace(CreditConfig.paper(), lam_low=1.5)
    Traceback (most recent call last):
    ValueError: lam_low is 1.5, expected a number in [0, 1]
    """

    gamma: float = 0.98
    """Discount per turn, in (0, 1]."""
    lam_low: float = 0.95
    """λ across the turns inside a segment (across all turns in `gae`), in [0, 1]."""
    lam_high: float = 0.95
    """λ across segments, in [0, 1]. Applied once per segment, not once per turn."""
    lam_boundary: float = 0.95
    """λ_B in [0, 1]: how much of the next boundary's high-level advantage its V_high is
    corrected by when low and switch bootstrap from it. 0 is the paper."""
    estimator: Literal["hae", "gae"] = "hae"
    """``"hae"`` is hierarchical; ``"gae"`` gives every role of a turn one flat advantage."""
    switch_advantage: Literal["return", "value"] = "return"
    """``"return"``: return of the segment minus V_switch, as released. ``"value"``: the
    paper's (q-β)(V_high - V_low(s, g_prev)), which never uses a return. Read by `hae` only."""
    truncation: Literal["final_state", "own_state", "zero"] = "final_state"
    """Value that stands for the future where a limit stopped the episode: `Values.final`; or
    that of the turn (low) or segment (high, switch) that is being cut, as released; or 0."""
    keep_penalty: float = 0.0
    """Added to the reward of turns that say KEEP; zero or negative, in reward units."""
    keep_penalty_mode: Literal["per_turn", "ratio"] = "per_turn"
    """``"per_turn"`` adds it to each such turn, ``"ratio"`` adds ``keep_penalty / length``,
    so that an episode pays in proportion to its share of KEEP turns."""
    invalid_penalty: float = 0.0
    """Subtracted from the reward of malformed turns; zero or positive, in reward units."""
    consistency_penalty: float = 0.0
    """Added where a KEEP turn's subgoal differs from the turn before; zero or negative."""
    consistency_requires_both: bool = True
    """True skips the consistency check where either turn has no subgoal; False counts a
    missing subgoal as a difference."""
    whiten: bool = False
    """Shift and scale the advantages of each level to mean 0, standard deviation 1."""

    def __post_init__(self) -> None:
        for name, (accepts, expected) in _NUMBERS.items():
            seen = getattr(self, name)
            if isinstance(seen, bool) or not isinstance(seen, Real) or not accepts(seen):
                raise ValueError(f"{name} is {seen!r}, expected a number {expected}")
            object.__setattr__(self, name, float(seen))
        for name, choices in _CHOICES.items():
            seen = getattr(self, name)
            if type(seen) is not type(choices[0]) or seen not in choices:
                expected = " or ".join(map(repr, choices))
                raise ValueError(f"{name} is {seen!r}, expected {expected}")

    @classmethod
    def lab(cls) -> "CreditConfig":
        """What we train with: HAE with a boundary λ and the switch form that learned best."""
        return cls()

    @classmethod
    def paper(cls) -> "CreditConfig":
        """The equations of the paper, with the γ and λ of the released code."""
        return cls(
            gamma=1.0, lam_low=1.0, lam_high=0.95, lam_boundary=0.0, switch_advantage="value"
        )

    @classmethod
    def upstream(cls) -> "CreditConfig":
        """What the released code runs on ALFWorld, without its duplicated rows."""
        return cls(
            gamma=1.0,
            lam_low=1.0,
            lam_high=0.95,
            lam_boundary=0.0,
            truncation="own_state",
            keep_penalty=-0.3,
            invalid_penalty=0.1,
            consistency_penalty=-0.3,
            whiten=True,
        )


@torch.no_grad()
def estimate(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Credit as a trainer wants it: shaped rewards, the configured estimator, whitening."""
    shaped = grid._replace(reward=shape_rewards(grid, config))
    credit = {"hae": hae, "gae": gae}[config.estimator](shaped, values, config)
    return whiten(credit, grid) if config.whiten else credit


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
    real, _, _ = _layout(grid)
    keep = real & ~grid.switch
    reward = _numbers(grid.reward)
    dtype = reward.dtype  # masks are cast before a float meets them: it would make them float32
    if config.keep_penalty_mode == "ratio":  # an episode of one turn had nothing to keep
        share = config.keep_penalty / grid.length.to(dtype)
        share = torch.where(grid.length > 1, share, 0)[:, None]
    else:
        share = config.keep_penalty
    reward = reward + share * keep.to(dtype)
    reward = reward - config.invalid_penalty * (~grid.valid).to(dtype)
    both = grid.has_subgoal & pad(grid.has_subgoal[:, :-1], (1, 0))
    if config.consistency_requires_both:
        differs = both & ~grid.same_subgoal
    else:
        differs = ~(both & grid.same_subgoal)
    differs = differs & keep
    differs[:, 0] = False
    return torch.where(real, reward + config.consistency_penalty * differs.to(dtype), 0)


@torch.no_grad()
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
    telescopes to the whole return: Âᴸₜ = Σ γᵘ⁻ᵗ rᵤ − Vᴸₜ.

    ``switch_advantage="value"`` makes the switch level a matter of values alone,

        switch  Âˢₜ = (Vᴴₜ if SWITCH else Vᴸₜ) − Vˢₜ  =  (qₜ − βₜ)(Vᴴ(sₜ) − Vᴸ(sₜ, g_prev)),

    equal because Vᴸₜ of a KEEP turn is Vᴸ(sₜ, g_prev) and Vˢ the β-mixture (see `Values`).
    Turn 0 had no choice, so 0. The target of Vˢ is that Vᴴₜ or Vᴸₜ: its mean is the mixture.

    Args:
        grid: What happened. Rewards are used as they are; see `shape_rewards`.
        values: ``high`` is read at boundaries, with ``"value"`` everywhere.
        config: γ, the three λ, ``switch_advantage`` and ``truncation`` are read.

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
    real, last, crossing = _layout(grid, values)
    inside, boundary = real & ~last & ~crossing, real & grid.boundary
    reward = torch.where(real, _numbers(grid.reward), 0)
    v_high, v_low, v_switch, _ = map(_numbers, values)
    gamma, flows = config.gamma, inside.to(reward.dtype)
    # Where a limit cut the episode: what stands for V of the state after the last turn.
    opens = (boundary * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
    cut_high = _after_last_turn(grid, values, config, own=_pick(v_high, opens))
    cut_low = _after_last_turn(grid, values, config, own=_pick(v_low, grid.length - 1))

    # high: what a segment's last turn sees ahead is (1 - λᴴ) Vᴴ + λᴴ y, y the next one's return.
    ahead = torch.where(last, cut_high, (1 - config.lam_high) * _next(v_high))
    returns = reverse_scan(
        reward + gamma * torch.where(last | crossing, ahead, 0),
        gamma * (flows + config.lam_high * crossing.to(reward.dtype)),
    )
    high = torch.where(boundary, returns - v_high, 0)

    # low
    arrival = _next(v_high + config.lam_boundary * high)  # W in the equations
    ahead = torch.where(inside, _next(v_low), torch.where(last, cut_low, arrival))
    td_error = torch.where(real, reward + gamma * ahead - v_low, 0)
    low = reverse_scan(td_error, gamma * config.lam_low * flows)

    if config.switch_advantage == "return":
        ahead = torch.where(last, cut_high, torch.where(crossing, arrival, 0))
        target_switch = reverse_scan(reward + gamma * ahead, gamma * flows)
        switch = target_switch - v_switch
    else:
        target_switch = torch.where(boundary, v_high, v_low)
        switch = target_switch - v_switch
        switch[:, 0] = 0
    return Credit(
        high=high,
        low=low,
        switch=torch.where(real, switch, 0),
        target_high=torch.where(boundary, high + v_high, 0),
        target_low=torch.where(real, low + v_low, 0),
        target_switch=torch.where(real, target_switch, 0),
    )


@torch.no_grad()
def gae(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Turn-level Generalised Advantage Estimation: the flat opponent of `hae`.

        Âₜ = δₜ + γ λ Âₜ₊₁        δₜ = rₜ + γ Vₜ₊₁ − Vₜ        over all turns, λ = ``lam_low``

    The subgoal, the action and the switch of a turn all get Âₜ. V is ``values.high``, read at
    every prompt. Our prompts show the subgoal in force, so this critic is V(sₜ, g_prev), not
    V(sₜ): the fairer opponent. (A critic that ignores g_prev makes λ < 1 biased, for sₜ alone
    is not Markov under an options policy.)

    Every head gets the same target Âₜ + Vₜ at **every** turn, ``target_high`` included, so
    train V_high at every turn here, not at boundaries only.

    Args:
        grid: What happened. ``boundary`` decides only where ``high`` is shown.
        values: ``high`` and ``final`` are read.
        config: ``gamma``, ``lam_low`` and ``truncation`` are read; ``"own_state"`` is V of
            the last turn.

    Raises:
        ValueError: If shapes differ, a trajectory has no turn, or turn 0 is no boundary.

    Example:
        >>> grid = TurnGrid.of(reward=[[0., 0., 0., 1.]], switch=[[1, 0, 1, 0]])
        >>> zero = torch.zeros(1, 4)
        >>> config = CreditConfig(gamma=0.5, lam_low=1.0)
        >>> gae(grid, Values(zero, zero, zero, torch.zeros(1)), config).low
        tensor([[0.1250, 0.2500, 0.5000, 1.0000]])

    References:
        Schulman et al. 2016, arXiv:1506.02438. Indices follow HiPER: rₜ follows aₜ.
    """
    real, last, _ = _layout(grid, values)
    value = _numbers(values.high)
    cut = _after_last_turn(grid, values, config, own=_pick(value, grid.length - 1))
    ahead = torch.where(last, cut, _next(value))
    td_error = torch.where(real, _numbers(grid.reward) + config.gamma * ahead - value, 0)
    flows = (real & ~last).to(td_error.dtype)
    advantage = reverse_scan(td_error, config.gamma * config.lam_low * flows)
    target = torch.where(real, advantage + value, 0)
    high = torch.where(real & grid.boundary, advantage, 0)
    return Credit(high, advantage, advantage, target, target, target)


@torch.no_grad()
def whiten(credit: Credit, grid: TurnGrid) -> Credit:
    """Bring each level's advantages to mean 0 and standard deviation 1; targets stay.

    Statistics (population) run over turns, not tokens: all turns for low and switch; for high
    the boundaries whose text holds subgoal tokens. An all-equal level becomes exactly 0.
    """
    real, _, _ = _layout(grid)
    boundary = real & grid.boundary

    def standard(x: Tensor, shown: Tensor, counted: Tensor) -> Tensor:
        if not counted.any():
            return x
        std, mean = torch.std_mean(x[counted], correction=0)  # exact for equal numbers (Welford)
        return torch.where(shown, (x - mean) / (std + 1e-8), 0)

    return credit._replace(
        high=standard(credit.high, boundary, boundary & grid.has_subgoal),
        low=standard(credit.low, real, real),
        switch=standard(credit.switch, real, real),
    )


def segment_index(boundary: Bool[Tensor, "traj turn"]) -> Int[Tensor, "traj turn"]:
    """Number of the segment each turn belongs to, from 0. Padding continues the last one.

    >>> segment_index(torch.tensor([[True, False, True, False]]))
    tensor([[0, 0, 1, 1]])
    """
    return boundary.cumsum(1) - 1


VALUES = ("v_low", "v_high", "v_switch")
COLUMNS = ("traj", "turn", "reward", "done", "switch", "valid", "subgoal", *VALUES)


def credit_table(turns: pd.DataFrame, config: CreditConfig) -> pd.DataFrame:
    """Credit for a log of turns, whichever framework wrote it: one row in, one row out.

    Args:
        turns: One row per turn, in any order. ``traj`` (any hashable), ``turn`` (0, 1, 2, …
            within each), ``reward``, ``done`` (terminated after this turn), ``switch``,
            ``valid``, ``subgoal`` (text or token ids; empty or missing if there is none),
            ``v_low``, ``v_high``, ``v_switch`` as in `Values`. Optional ``v_final``, read from
            each trajectory's last row: the value of the state after it.
        config: What `estimate` should compute.

    Returns:
        The index of ``turns`` with ``adv_low``, ``adv_high``, ``adv_switch``, ``target_low``,
        ``target_high``, ``target_switch`` in float64 and ``segment`` (from 0). ``adv_high`` and
        ``target_high`` are NaN off boundaries.

    Raises:
        ValueError: If a column or a number is missing, a (traj, turn) occurs twice, turn
            numbers have gaps, or an episode goes on after ``done``.

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
    grid, values, cell = table_to_grid(turns)
    blind = ~grid.terminated & values.final.isnan()
    if config.truncation == "final_state" and blind.any():
        name = turns["traj"].iloc[int(blind[cell[0]].nonzero()[0])]
        raise ValueError(
            f"{int(blind.sum())} trajectories (one is {name!r}) do not end in done and have no "
            "v_final: give their last row v_final, the value of the state after it, or set "
            "truncation to 'own_state' or 'zero'"
        )
    credit = estimate(grid, values, config)
    columns = {
        "adv_low": credit.low,
        "adv_high": credit.high,
        "adv_switch": credit.switch,
        "target_low": credit.target_low,
        "target_high": credit.target_high,
        "target_switch": credit.target_switch,
        "segment": segment_index(grid.boundary),
    }
    table = pd.DataFrame({k: x[cell].numpy() for k, x in columns.items()}, index=turns.index)
    table.loc[~grid.boundary[cell].numpy(), ["adv_high", "target_high"]] = np.nan
    return table


def table_to_grid(turns: pd.DataFrame) -> tuple[TurnGrid, Values, tuple[Tensor, Tensor]]:
    """Lay a table of turns out as a grid, in float64. See `credit_table` for its columns.

    Returns:
        The grid (trajectories in order of appearance), the values (``final`` is NaN where the
        table has none), and ``cell``: ``x[cell]`` reads a grid back, one number per table row.
    """
    if missing := [name for name in COLUMNS if name not in turns]:
        raise ValueError(f"turns has no column {missing}, expected {list(COLUMNS)}")
    if turns.empty or turns["traj"].isna().any():
        raise ValueError("turns has no rows or rows without traj, expected one per turn")
    ids: dict[Hashable, int] = {}
    traj = np.array([ids.setdefault(name, len(ids)) for name in turns["traj"]])
    turn = _floats(turns, "turn")
    order = np.lexsort((turn, traj))
    cell = torch.tensor(traj), torch.tensor(turn).long()

    # From here on in order of trajectory and turn, so that neighbours can be compared.
    turns, traj, turn, length = turns.iloc[order], traj[order], turn[order], np.bincount(traj)
    first, again = np.diff(traj, prepend=-1) > 0, np.diff(turn, prepend=-1) == 0
    last, expected = np.roll(first, -1), np.concatenate([np.arange(n) for n in length])
    done, switch, valid = (_flags(turns, name) for name in ("done", "switch", "valid"))
    for wrong, problem in (
        (again & ~first, "occurs more than once: drop the copies, they would be credited twice"),
        (turn != expected, "leaves a gap, expected turns 0, 1, 2, ..."),
        (done & ~last, "has done, expected only at the last turn"),
    ):
        if wrong.any():
            row = turns.iloc[wrong.argmax()]
            raise ValueError(f"turn {row['turn']} of trajectory {row['traj']!r} {problem}")
    subgoal = [_subgoal(x) for x in turns["subgoal"]]
    same = np.array([a == b for a, b in zip(subgoal, [None, *subgoal[:-1]], strict=True)])

    def grid(column: np.ndarray) -> Tensor:
        padded = np.zeros((len(length), length.max()), dtype=column.dtype)
        padded[traj, turn.astype(int)] = column
        return torch.tensor(padded)

    final = np.full(len(length), np.nan)
    if "v_final" in turns:
        final = _floats(turns[last], "v_final", optional=True)
    return (
        TurnGrid(
            reward=grid(_floats(turns, "reward")),
            switch=grid(switch),
            boundary=grid(switch | first),
            valid=grid(valid),
            has_subgoal=grid(np.array([x != "" for x in subgoal])),
            same_subgoal=grid(same & ~first),
            terminated=torch.tensor(done[last]),
            length=torch.tensor(length),
        ),
        Values(
            high=grid(_floats(turns, "v_high")),
            low=grid(_floats(turns, "v_low")),
            switch=grid(_floats(turns, "v_switch")),
            final=torch.tensor(final),
        ),
        cell,
    )


def _floats(turns: pd.DataFrame, name: str, optional: bool = False) -> np.ndarray:
    """A column as float64; what is no finite number is refused, or NaN if ``optional``."""
    column = pd.to_numeric(turns[name], errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = ~np.isfinite(column) & ~(turns[name].isna().to_numpy() & optional)
    if wrong.any():
        seen, where = turns[name][wrong].tolist()[0], turns.index[wrong][0]
        raise ValueError(f"{name} is {seen!r} at index {where!r}, expected a finite number")
    return column


def _flags(turns: pd.DataFrame, name: str) -> np.ndarray:
    """A column as bool; 0 and 1 will do, text and missing values will not."""
    wrong = ~turns[name].isin([True, False]).to_numpy(bool)
    if wrong.any():
        seen, where = turns[name][wrong].tolist()[0], turns.index[wrong][0]
        raise ValueError(f"{name} is {seen!r} at index {where!r}, expected True or False")
    return turns[name].to_numpy(bool)


def _subgoal(subgoal: object) -> Hashable:
    """Text or token ids as something to compare; ``""`` if there is none."""
    if isinstance(subgoal, str):
        return subgoal
    if hasattr(subgoal, "tolist"):  # an array or a tensor of ids
        subgoal = subgoal.tolist()
    return "" if pd.api.types.is_scalar(subgoal) else tuple(subgoal) or ""


def _layout(grid: TurnGrid, values: Values | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [traj, turn]: turn exists; is its episode's last; a boundary comes right after it.

    Checks shapes too: a wrong one would broadcast and still give numbers.
    """
    traj, turn = grid.reward.shape
    for name, x in [*grid._asdict().items(), *(values._asdict().items() if values else ())]:
        expected = (traj,) if name in ("terminated", "length", "final") else (traj, turn)
        if x.shape != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected}")
    if not (ok := (grid.length >= 1) & (grid.length <= turn)).all():
        seen = int(grid.length[~ok][0])
        raise ValueError(f"a trajectory has length {seen}, expected 1 to {turn} turns")
    if not grid.boundary[:, 0].all():
        raise ValueError("boundary is False at turn 0, expected every first turn to be one")
    length, column = grid.length[:, None], torch.arange(turn, device=grid.reward.device)
    real = column < length
    return real, column == length - 1, _next(grid.boundary & real)


def _after_last_turn(grid: TurnGrid, values: Values, config: CreditConfig, own: Tensor) -> Tensor:
    """Value of the state after each trajectory's last turn, as [traj, 1]; 0 if it terminated."""
    future = {"final_state": values.final, "own_state": own, "zero": torch.zeros_like(own)}
    return torch.where(grid.terminated, 0, _numbers(future[config.truncation]))[:, None]


def _next(x: Tensor) -> Tensor:
    """What the following turn holds; 0 (or False) after the last column."""
    return pad(x[:, 1:], (0, 1))


def _pick(x: Tensor, turn: Tensor) -> Tensor:
    """One column per trajectory, as [traj]."""
    return x.gather(1, turn.long()[:, None])[:, 0]


def _numbers(x: Tensor) -> Tensor:
    """At least float32: half precision is for storing numbers, not for adding them up."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
