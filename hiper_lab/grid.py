"""What every estimator of credit reads and returns: turns, values, configuration, credit.

Each trajectory is one row of dense ``[traj, turn]`` tensors, padded on the right.

Time: r_t follows the action of turn t, V_t is read at the prompt of turn t (high, switch) or
after its subgoal (low). The state after the last turn has a value of its own, `Values.final`.

Left out on purpose: any estimator. `hiper_lab.flat` and `hiper_lab.credit` build on this.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import pad


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
    group: Int[Tensor, "traj"] | None = None
    """Which trajectories may be compared: those of the same task instance share a number. Read by
    the group-relative estimators only, which refuse a trajectory that is alone in its group."""
    state: Int[Tensor, "traj turn"] | None = None
    """Which turns of a group saw the same state: see `hiper_lab.flat.anchor_states`. Read by
    `hiper_lab.flat.gigpo` only."""

    @classmethod
    def of(cls, reward: ArrayLike, switch: ArrayLike, terminated: bool = True) -> "TurnGrid":
        """Well-formed trajectories of equal length, a subgoal changing only where they SWITCH."""
        reward = torch.as_tensor(reward)
        switch = torch.as_tensor(switch, dtype=torch.bool)
        boundary, (traj, turn) = switch.clone(), reward.shape
        boundary[:, 0] = True
        return cls(
            reward=numbers(reward),
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
    """From `hae` at boundaries (0 elsewhere), from every flat estimator at every turn."""
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
    "step_weight": (lambda x: 0 <= x < math.inf, "at least 0"),
    "anchor_similarity": (lambda x: 0 < x <= 1, "in (0, 1]"),
}
_CHOICES = {
    "estimator": ("hae", "gae", "monte_carlo", "grpo", "rloo", "rloo_rows", "gigpo"),
    "gae_value": ("high", "switch"),
    "boundary_value": ("high", "low"),
    "lam_schedule": ("fixed", "critic"),
    "switch_advantage": ("return", "value"),
    "truncation": ("final_state", "own_state", "zero"),
    "keep_penalty_mode": ("per_turn", "ratio"),
    "consistency_requires_both": (True, False),
    "group_std": (True, False),
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
    lam_low: float = 0.8
    """λ across the turns inside a segment (across all turns in `gae`), in [0, 1]."""
    lam_high: float = 0.7
    """λ across segments, in [0, 1]. Applied once per segment, not once per turn."""
    lam_boundary: float = 0.5
    """λ_B in [0, 1]: how much of the next boundary's high-level advantage its V_high is
    corrected by when low and switch bootstrap from it. 0 is the paper."""
    lam_schedule: Literal["fixed", "critic"] = "fixed"
    """``"critic"`` lowers λ_B as the critic gets better: λ_B (1 - ρ), with ρ ≥ 0 the correlation of
    V_high at a batch's boundaries with the rewards still to come. Applied by
    `hiper_lab.credit.estimate`, to ``"hae"`` only."""
    boundary_value: Literal["high", "low"] = "high"
    """What they bootstrap from, for the part that λ_B leaves: V_high of the next boundary, or
    V_low, which knows the next subgoal already (an early draft of the released code)."""
    estimator: Literal["hae", "gae", "monte_carlo", "grpo", "rloo", "rloo_rows", "gigpo"] = "hae"
    """``"hae"`` is hierarchical; the rest (see `hiper_lab.flat`) give every role of a turn one
    flat advantage."""
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
    gae_value: Literal["high", "switch"] = "high"
    """The critic of `gae`: V_high(s), or V_switch(s, g_prev), which sees the active subgoal."""
    group_std: bool = True
    """Divide by the group's standard deviation. Read by `grpo` and `gigpo` only."""
    step_weight: float = 1.0
    """Weight of the comparison per state in `gigpo`, at least 0."""
    anchor_similarity: float = 1.0
    """How alike two observations must be to count as one state in `gigpo`: difflib's ratio, in
    (0, 1]; 1 is equality. Read where states get their numbers: by `credit_table` and in
    training."""

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
        """What we train with: HAE with a boundary λ and short traces, released switch advantage."""
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


def layout(grid: TurnGrid, values: Values | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Masks [traj, turn]: turn exists; is its episode's last; a boundary comes right after it.

    Checks shapes too: a wrong one would broadcast and still give numbers.
    """
    traj, turn = grid.reward.shape
    for name, x in [*grid._asdict().items(), *(values._asdict().items() if values else ())]:
        expected = (traj,) if name in ("terminated", "length", "group", "final") else (traj, turn)
        if x is not None and x.shape != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {expected}")
    if not (ok := (grid.length >= 1) & (grid.length <= turn)).all():
        seen = int(grid.length[~ok][0])
        raise ValueError(f"a trajectory has length {seen}, expected 1 to {turn} turns")
    if not grid.boundary[:, 0].all():
        raise ValueError("boundary is False at turn 0, expected every first turn to be one")
    real = real_turns(grid)
    goes_on = next_turn(real)
    return real, real & ~goes_on, next_turn(grid.boundary) & goes_on


def real_turns(grid: TurnGrid) -> Bool[Tensor, "traj turn"]:
    """Where there is a turn and no padding."""
    return torch.arange(grid.reward.shape[1], device=grid.reward.device) < grid.length[:, None]


def rewards_to_go(grid: TurnGrid) -> Float[Tensor, "traj turn"]:
    """What an episode still earns from each turn on, undiscounted.

    >>> rewards_to_go(TurnGrid.of(reward=[[0., 1., 2.]], switch=[[1, 0, 1]]))
    tensor([[3., 3., 2.]])
    """
    return grid.reward.flip(1).cumsum(1).flip(1)


def after_last_turn(
    grid: TurnGrid, last: Tensor, values: Values, config: CreditConfig, own: Tensor
) -> Tensor:
    """Value of the state after the last turn, at ``last`` of [traj, turn]; 0 if it terminated.

    ``own`` is what ``"own_state"`` puts there, as [traj, turn] or [traj, 1].
    """
    future = {"final_state": values.final[:, None], "own_state": own}
    if config.truncation == "zero":
        return torch.zeros_like(values.high)
    cut = last & ~grid.terminated[:, None]
    return torch.where(cut, numbers(future[config.truncation]), 0)


def next_turn(x: Tensor) -> Tensor:
    """What the following turn holds; 0 (or False) after the last column."""
    return pad(x[:, 1:], (0, 1))


def numbers(x: Tensor) -> Tensor:
    """At least float32: half precision is for storing numbers, not for adding them up."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
