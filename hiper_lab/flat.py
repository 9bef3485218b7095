"""Estimators that know no hierarchy: one advantage per turn, for whatever was decided in it.

They are what hierarchical credit has to beat, and they share its interface: `gae` asks a critic,
`monte_carlo` nobody, and `grpo`, `rloo`, `rloo_rows` and `gigpo` compare a trajectory with the
others of its group, all of which started from the same task instance. `token_gae` works at the
grain of tokens and so stands apart.

Left out on purpose: shaping of rewards and whitening, which are the same for every estimator
(`hiper_lab.credit.estimate`).
"""

from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hiper_lab.grid import (
    Credit,
    CreditConfig,
    TurnGrid,
    Values,
    after_last_turn,
    layout,
    next_turn,
    numbers,
    pick,
)
from hiper_lab.scan import reverse_scan

GroupRelative = Literal["grpo", "rloo", "rloo_rows", "gigpo"]
GROUP_RELATIVE = ("grpo", "rloo", "rloo_rows", "gigpo")


def gae(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Turn-level Generalised Advantage Estimation: the flat opponent of `hae`.

        Âₜ = δₜ + γ λ Âₜ₊₁        δₜ = rₜ + γ Vₜ₊₁ − Vₜ        over all turns, λ = ``lam_low``

    The subgoal, the action and the switch of a turn all get Âₜ. V is ``values.high`` or, with
    ``gae_value="switch"``, ``values.switch``, which knows the subgoal in force. A critic V(sₜ)
    that ignores it makes λ < 1 biased even if it is exact, for sₜ alone is not Markov under an
    options policy. (Our own prompts show that subgoal, so there either critic may know it.)

    Every head gets the same target Âₜ + Vₜ at **every** turn, ``target_high`` included, so
    train V_high at every turn here, not at boundaries only.

    Args:
        grid: What happened. ``boundary`` decides only where ``high`` is shown.
        values: ``final`` and the chosen column are read.
        config: ``gamma``, ``lam_low``, ``gae_value`` and ``truncation`` are read; ``"own_state"``
            is V of the last turn.

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
    real, last, _ = layout(grid, values)
    value = numbers(getattr(values, config.gae_value))
    cut = after_last_turn(grid, values, config, own=pick(value, grid.length - 1))
    ahead = torch.where(last, cut, next_turn(value))
    td_error = torch.where(real, numbers(grid.reward) + config.gamma * ahead - value, 0)
    flows = (real & ~last).to(td_error.dtype)
    advantage = reverse_scan(td_error, config.gamma * config.lam_low * flows)
    return _same_for_every_role(grid, advantage, torch.where(real, advantage + value, 0))


def monte_carlo(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """REINFORCE with the reward to go: no critic, no baseline, no bias, much variance.

        Âₜ = Gₜ = rₜ + γ Gₜ₊₁

    After the last turn of an episode that a limit cut, G is what ``config.truncation`` says; with
    ``"zero"`` no value is ever read. (With a baseline it is `gae` at λ = 1.)

    Example:
        >>> grid = TurnGrid.of(reward=[[0., 0., 0., 1.]], switch=[[1, 0, 1, 0]])
        >>> zero = torch.zeros(1, 4)
        >>> values = Values(zero, zero, zero, torch.zeros(1))
        >>> monte_carlo(grid, values, CreditConfig(gamma=0.5)).low
        tensor([[0.1250, 0.2500, 0.5000, 1.0000]])

    References:
        Williams 1992.
    """
    returns = _returns(grid, values, config, config.gamma)
    return _same_for_every_role(grid, returns, returns)


def grpo(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Group Relative Policy Optimization: how far an episode did better than its group.

        Âₜ = (R − mean R) / (std R + 1e-6)        R = Σ rₜ of the trajectory, over its group

    All turns of a trajectory get the same. There is no γ: R is undiscounted, as published. The
    standard deviation is the unbiased one, and 1 / (std + 1e-6) is left out if ``group_std`` is
    False ("Dr. GRPO"). A group of equal returns gets exactly 0.

    A group holds all trajectories of one task instance (``grid.group``); R compares nothing else.
    An episode that a limit cut adds to R what ``config.truncation`` says.

    Args:
        grid: What happened, with ``group``.
        values: Read for truncation only, and not at all with ``"zero"``.
        config: ``group_std`` and ``truncation`` are read; ``gamma`` for the targets.

    Returns:
        The same advantage at every level; targets are the discounted return from each turn.

    Raises:
        ValueError: If the grid has no groups, or a trajectory is alone in its group: its advantage
            would be 0 whatever it did.

    Example:
        Two of four attempts at one task succeed.

        >>> grid = TurnGrid.of(reward=[[0., 1.], [0., 0.], [0., 1.], [0., 0.]],
        ...                    switch=[[1, 0]] * 4)._replace(group=torch.zeros(4).long())
        >>> zero = torch.zeros(4, 2)
        >>> values = Values(zero, zero, zero, torch.zeros(4))
        >>> grpo(grid, values, CreditConfig(group_std=False)).low[:2]
        tensor([[ 0.5000,  0.5000],
                [-0.5000, -0.5000]])

    References:
        Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783 (no std).
    """
    return _compared("grpo", grid, values, config)


def rloo(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """REINFORCE Leave-One-Out: an episode's return minus the mean of the *others* of its group.

        Âₜ = R − mean of R over the other trajectories = N/(N−1) (R − mean R)

    The baseline does not depend on the trajectory itself, so the estimator is unbiased. Arguments,
    groups and errors are those of `grpo`.

    Example:
        >>> grid = TurnGrid.of(reward=[[0., 1.], [0., 0.], [0., 1.], [0., 0.]],
        ...                    switch=[[1, 0]] * 4)._replace(group=torch.zeros(4).long())
        >>> zero = torch.zeros(4, 2)
        >>> rloo(grid, Values(zero, zero, zero, torch.zeros(4)), CreditConfig()).low[:2]
        tensor([[ 0.6667,  0.6667],
                [-0.6667, -0.6667]])

    References:
        Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740.
    """
    return _compared("rloo", grid, values, config)


def rloo_rows(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """What verl-agent and HiPER run under the name RLOO: a mean over turn rows.

        Âₜ = n/(n−1) (R − Σ T R / n)        n = Σ T, sums over the group, T = turns of a trajectory

    Every turn is a row with its episode's return, so long (often failed) episodes weigh more, and
    a row's own trajectory stays in its baseline: this leaves one *row* out, not one trajectory.

    Example:
        A failure of three turns against a success of one: the mean is 1/4, n is 4.

        >>> grid = TurnGrid.of(reward=[[1., 0., 0.], [0., 0., 0.]], switch=[[1, 0, 0]] * 2)
        >>> grid = grid._replace(length=torch.tensor([1, 3]), group=torch.zeros(2).long())
        >>> zero = torch.zeros(2, 3)
        >>> rloo_rows(grid, Values(zero, zero, zero, torch.zeros(2)), CreditConfig()).low
        tensor([[ 1.0000,  0.0000,  0.0000],
                [-0.3333, -0.3333, -0.3333]])
    """
    return _compared("rloo_rows", grid, values, config)


def gigpo(grid: TurnGrid, values: Values, config: CreditConfig) -> Credit:
    """Group-in-Group Policy Optimization: compare episodes, and also turns that saw one state.

        Âₜ = (R − mean R)/F + w (Gₜ − mean G)/F'        Gₜ = rₜ + γ Gₜ₊₁,  w = ``step_weight``

    The first mean runs over the trajectories of the group, the second over all turns of the group
    with the same ``grid.state``, whenever they came (see `anchor_states`). F and F' are the
    standard deviations plus 1e-6, or 1 if ``group_std`` is False, the default of the released code.
    A turn alone in its state has nothing to be compared with: its second term is 0.

    Two differences to the released code, which averages R over turn rows (as `rloo_rows` does) and
    subtracts a malformed turn's penalty from that turn's own R and G only: our R and G are sums of
    shaped rewards.

    Raises:
        ValueError: As `grpo`, and if the grid has no ``state``.

    Example:
        Both trajectories pass through state 5; from there one succeeds. State 6 and 7: seen once.

        >>> grid = TurnGrid.of(reward=[[0., 1.], [0., 0.]], switch=[[1, 0]] * 2)
        >>> grid = grid._replace(group=torch.tensor([0, 0]), state=torch.tensor([[5, 6], [5, 7]]))
        >>> zero = torch.zeros(2, 2)
        >>> config = CreditConfig(gamma=1.0, group_std=False)
        >>> gigpo(grid, Values(zero, zero, zero, torch.zeros(2)), config).low
        tensor([[ 1.0000,  0.5000],
                [-1.0000, -0.5000]])

    References:
        Feng et al. 2025, arXiv:2505.10978.
    """
    return _compared("gigpo", grid, values, config)


class Comparison(NamedTuple):
    """One term of a group-relative advantage, ``scale · (own − mean)``. All ``[traj, turn]``."""

    own: Float[Tensor, "traj turn"]
    mean: Float[Tensor, "traj turn"]
    """A constant, as is ``scale``: no estimator differentiates its own statistics."""
    scale: Float[Tensor, "traj turn"]
    name: str
    """What ``mean`` is, in words."""


def comparisons(
    estimator: GroupRelative, grid: TurnGrid, values: Values, config: CreditConfig
) -> list[Comparison]:
    """The terms whose sum is a group-relative advantage, in float64."""
    group = _group(estimator, grid)
    score = _returns(grid, values, config, gamma=1.0)[:, :1]
    weight = grid.length if estimator == "rloo_rows" else torch.ones_like(grid.length)
    count, mean, std = _statistics(score.detach()[:, 0], group, weight)
    name = "mean return of the group"
    if estimator == "rloo":
        mean, scale = mean + (mean - score.detach()[:, 0]) / (count - 1), torch.ones_like(mean)
        name = "mean return of the others in the group"
    elif estimator == "rloo_rows":
        scale, name = count / (count - 1), "mean return of the group's turn rows"
    else:
        scale = _inverse(std, config)
    wide = grid.reward.shape
    terms = [Comparison(*(x.expand(wide) for x in (score, mean[:, None], scale[:, None])), name)]
    if estimator == "gigpo":
        if grid.state is None:
            raise ValueError("gigpo compares turns that saw one state, but the grid has no state")
        real, _, _ = layout(grid)
        key = group[:, None] * (grid.state[real].max() + 1) + grid.state
        own = _returns(grid, values, config, config.gamma)
        _, mean, std = _statistics(own.detach()[real], key[real], torch.ones_like(key[real]))
        scale = config.step_weight * _inverse(std, config)
        wide = (own.new_zeros(own.shape).masked_scatter(real, x) for x in (mean, scale))
        terms.append(Comparison(own, *wide, "mean return from this state"))
    return terms


def anchor_states(
    observations: Sequence[Hashable], group: Sequence[int], similarity: float = 1.0
) -> list[int]:
    """Number the states that `gigpo` compares: equal observations within one group.

    Args:
        observations: What each turn saw, without history or subgoal: text, or anything hashable.
        group: The group of each turn. States of different groups are different.
        similarity: Below 1, texts at least this similar count as one: in order of appearance, a
            text joins the first state whose first text it resembles (difflib's ratio, as in the
            released code; quadratic in the number of different texts per group).

    Returns:
        One number per turn, from 0 in order of appearance.

    Raises:
        ValueError: If ``similarity`` is below 1 and an observation is not text.

    Example:
        >>> anchor_states(["a mug", "a cup", "a mug", "a mug"], [0, 0, 0, 1])
        [0, 1, 0, 2]
        >>> anchor_states(["mug 1 here", "mug 2 here", "nothing"], [0, 0, 0], similarity=0.9)
        [0, 0, 1]
    """
    number: dict[tuple[int, Hashable], int] = {}
    anchors: dict[int, list[tuple[SequenceMatcher, int]]] = {}
    states = 0
    for key in zip(group, observations, strict=True):
        if key in number:
            continue
        number[key] = states
        if similarity < 1:
            number[key] = _resembling(key[1], anchors.setdefault(key[0], []), similarity, states)
        states += number[key] == states
    return [number[key] for key in zip(group, observations, strict=True)]


class TokenCredit(NamedTuple):
    """Credit at the grain of tokens. 0 in padding."""

    advantage: Float[Tensor, "seq token"]
    target: Float[Tensor, "seq token"]


@torch.no_grad()
def token_gae(
    score: Float[Tensor, "seq"],
    value: Float[Tensor, "seq token"],
    length: Int[Tensor, "seq"],
    config: CreditConfig,
) -> TokenCredit:
    """PPO as usual for language models: GAE over the tokens of one response, turn by turn.

        Âⱼ = δⱼ + γ λ Âⱼ₊₁        δⱼ = rⱼ + γ Vⱼ₊₁ − Vⱼ        over the tokens j of one response

    where r is 0 but at the last token, which earns the score, and V and Â after it are 0. Nothing
    flows from turn to turn: a turn hears of its episode only through its score, and the usual score
    is the whole episode's return, the same for all its turns. A turn's advantage is therefore no
    number per role, and this estimator returns no `Credit`.

    Args:
        score: What each response is told at its end, in reward units: as a rule
            ``shape_rewards(grid, config).sum(1)`` of its trajectory.
        value: V before each token of the response.
        length: Number of tokens of each response, at least 1.
        config: ``gamma`` and ``lam_low`` are read, **per token**, and ``whiten`` (over tokens).

    Raises:
        ValueError: If shapes differ or a length is out of range.

    Example:
        >>> config = CreditConfig(gamma=1.0, lam_low=0.5)
        >>> value = torch.tensor([[0.2, 0.4, 0.8], [0.5, 9.0, 9.0]])
        >>> token_gae(torch.tensor([1.0, 0.0]), value, torch.tensor([3, 1]), config).advantage
        tensor([[ 0.4500,  0.5000,  0.2000],
                [-0.5000,  0.0000,  0.0000]])

    References:
        Schulman et al. 2016, arXiv:1506.02438; Ouyang et al. 2022, arXiv:2203.02155.
    """
    seq, token = value.shape
    for name, x in (("score", score), ("length", length)):
        if x.shape != (seq,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {(seq,)}")
    if not (ok := (length >= 1) & (length <= token)).all():
        seen = int(length[~ok][0])
        raise ValueError(f"a response has length {seen}, expected 1 to {token} tokens")
    value, column = numbers(value), torch.arange(token, device=value.device)
    real, last = column < length[:, None], column == length[:, None] - 1
    ahead = torch.where(last, numbers(score)[:, None], config.gamma * next_turn(value))
    td_error = torch.where(real, ahead - value, 0)
    advantage = reverse_scan(td_error, config.gamma * config.lam_low * (real & ~last).to(td_error))
    target = torch.where(real, advantage + value, 0)
    if config.whiten:
        std, mean = torch.std_mean(advantage[real], correction=0)
        advantage = torch.where(real, (advantage - mean) / (std + 1e-8), 0)
    return TokenCredit(advantage, target)


def _compared(
    estimator: GroupRelative, grid: TurnGrid, values: Values, config: CreditConfig
) -> Credit:
    """Credit that is a sum of comparisons."""
    real, _, _ = layout(grid, values)
    terms = comparisons(estimator, grid, values, config)
    advantage = sum(term.scale * (term.own - term.mean) for term in terms)
    target = _returns(grid, values, config, config.gamma)
    return _same_for_every_role(grid, torch.where(real, advantage, 0), target)


def _same_for_every_role(grid: TurnGrid, advantage: Tensor, target: Tensor) -> Credit:
    real, _, _ = layout(grid)
    dtype = numbers(grid.reward).dtype
    advantage, target = advantage.to(dtype), target.to(dtype)
    high = torch.where(real & grid.boundary, advantage, 0)
    return Credit(high, advantage, advantage, target, target, target)


def _returns(grid: TurnGrid, values: Values, config: CreditConfig, gamma: float) -> Tensor:
    """Discounted reward from each turn on, in float64, with what follows a cut. 0 in padding."""
    real, last, _ = layout(grid, values)
    cut = after_last_turn(grid, values, config, own=pick(values.high, grid.length - 1)).double()
    reward = torch.where(real, grid.reward.double(), 0)
    flows = (real & ~last).to(reward)
    return reverse_scan(torch.where(last, reward + gamma * cut, reward), gamma * flows)


def _group(estimator: str, grid: TurnGrid) -> Int[Tensor, "traj"]:
    """Groups numbered from 0, none of them of one trajectory."""
    if grid.group is None:
        raise ValueError(
            f"{estimator} compares the trajectories of one task instance, but the grid has no "
            "group: expected one number per trajectory"
        )
    _, group, size = grid.group.unique(return_inverse=True, return_counts=True)
    if (alone := (size == 1)[group]).any():
        raise ValueError(
            f"{estimator} compares the trajectories of one task instance, but trajectory "
            f"{int(alone.nonzero()[0])} is alone in its group: expected at least two of each"
        )
    return group


def _statistics(
    x: Float[Tensor, "n"], group: Int[Tensor, "n"], weight: Int[Tensor, "n"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and unbiased standard deviation of each one's group; exact for equal ones."""
    _, index = group.unique(return_inverse=True)
    groups, weight = int(index.max()) + 1, weight.to(x)

    def total(numbers: Tensor) -> Tensor:
        return numbers.new_zeros(groups).index_add(0, index, numbers)[index]

    top = x.new_full((groups,), -torch.inf).scatter_reduce(0, index, x, "amax")[index]
    count = total(weight)
    mean = top + total(weight * (x - top)) / count  # of equal numbers: top + 0
    square = total(weight * (x - mean) ** 2)
    return count, mean, (square / (count - 1).clamp_min(1)).sqrt()


def _inverse(std: Tensor, config: CreditConfig) -> Tensor:
    """What a comparison is multiplied by; 0 where nothing differs."""
    if not config.group_std:
        return torch.ones_like(std)
    return torch.where(std > 0, 1 / (std + 1e-6), 0)


def _resembling(text: Hashable, anchors: list, similarity: float, new: int) -> int:
    """The first state whose anchor is similar enough, or a new one."""
    if not isinstance(text, str):
        raise ValueError(f"state is {text!r}, expected text, since anchor_similarity is below 1")
    for matcher, state in anchors:
        matcher.set_seq1(text)
        bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)  # from above
        if all(ratio() >= similarity for ratio in bounds):
            return state
    anchors.append((SequenceMatcher(None, "", text), new))
    return new
