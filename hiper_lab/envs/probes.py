"""Tiny decision processes whose credit is known exactly: what an estimator gets right, and wrong.

An options policy on a handful of states has a few thousand trajectories. All are listed, with
their probabilities, as one `TurnGrid`, so the very code that trains a model is asked for its
credit, and the mean and the covariance of its policy gradient come out without sampling error:

    mdp = kitchen()
    trajectories = enumerate_trajectories(mdp)             # what can happen; the true gradient
    values = read_values(trajectories, exact_values(mdp))  # or `perturb` the critic first
    credit = estimate(trajectories.grid, values, config)   # any estimator of `hiper_lab.credit`
    gradient_statistics(trajectories, credit)              # its bias and its variance

The horizon belongs to the process: values depend on the turn and are 0 after the last one, so
every episode ends by termination. Turn 0 must SWITCH; that decision has no score.

Left out on purpose: groups of finite size (their baselines add variance and, where they include
the sample, bias) and sampling, but for `KitchenEnv`, the kitchen as a text to be played.

Source: Sutton, Precup & Singh 1999 (options); Peng et al. 2026, arXiv:2602.16165 (HAE); the
theory and its numbers are ours.
"""

import random
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import one_hot, pad

from hiper_lab.credit import Credit, CreditConfig, TurnGrid, Values, estimate
from hiper_lab.scan import reverse_scan

LOGITS = ("switch_logit", "subgoal_logit", "action_logit")


class OptionMDP(NamedTuple):
    """A small decision process and an options policy on it, in float64."""

    transition: Float[Tensor, "state action next"]
    """P(s' | s, a). The last ``next``, one past the last state, is the end of the episode."""
    reward: Float[Tensor, "state action next"]
    """Reward of the turn."""
    switch_logit: Float[Tensor, "state subgoal"]
    """β(s, g_prev) = P(SWITCH) is its sigmoid."""
    subgoal_logit: Float[Tensor, "state subgoal"]
    """μ(g | s), asked for after SWITCH."""
    action_logit: Float[Tensor, "state subgoal action"]
    """π(a | s, g)."""
    horizon: int
    """The episode ends after so many turns. It starts in state 0."""
    gamma: float
    """Discount per turn, in (0, 1]."""


class ValueTables(NamedTuple):
    """Expected discounted reward from a turn on, given what is known at a point of the turn."""

    high: Float[Tensor, "turn state"]
    """Before a subgoal is chosen."""
    low: Float[Tensor, "turn state subgoal"]
    """After the subgoal, before the action."""
    switch: Float[Tensor, "turn state subgoal"]
    """At the prompt, g_prev in force: (1-β) low + β high; at turn 0 it is high."""
    action: Float[Tensor, "turn state subgoal action"]
    """After the action: Q(s, g, a)."""


class Trajectories(NamedTuple):
    """Every trajectory that has a chance; columns from its length on are padding."""

    mdp: OptionMDP
    gradient: Float[Tensor, "parameter"]
    """The true ∇J, which an unbiased estimator has as its mean."""
    probability: Float[Tensor, "traj"]
    grid: TurnGrid
    turn: Int[Tensor, "traj turn"]
    state: Int[Tensor, "traj turn"]
    previous: Int[Tensor, "traj turn"]
    """The subgoal in force at the prompt (0 at turn 0, where there is none)."""
    subgoal: Int[Tensor, "traj turn"]
    action: Int[Tensor, "traj turn"]
    score: Float[Tensor, "traj turn parameter"]
    """∇ log-probability of the turn's decisions, by the logits of switch, subgoal and action."""


class GradientStatistics(NamedTuple):
    """Mean and covariance of the policy gradient that one trajectory gives."""

    bias: float
    """Largest |mean - true gradient| of any parameter."""
    relative_bias: float
    """‖mean - true gradient‖ / ‖true gradient‖."""
    cosine: float
    """Of the angle between the mean and the true gradient."""
    trace: float
    """Trace of the covariance, the sum of the next three."""
    switch: float
    subgoal: float
    action: float
    mean: Float[Tensor, "parameter"]
    variance: Float[Tensor, "parameter"]


def kitchen(gamma: float = 1.0, horizon: int = 4) -> OptionMDP:
    """Fetch and put down, with two subgoals: states empty (0) and holding (1), actions grab, put.

    A turn costs 0.02, done pays 1. The policy is neither good nor bad, so every decision matters.

    >>> mdp = kitchen()
    >>> mdp.transition[1]  # holding: grab may drop the thing; put ends the episode 7 times in 10
    tensor([[0.5000, 0.5000, 0.0000],
            [0.0000, 0.3000, 0.7000]], dtype=torch.float64)
    """
    transition = _table([[[0.2, 0.8, 0], [1, 0, 0]], [[0.5, 0.5, 0], [0, 0.3, 0.7]]])
    return OptionMDP(
        transition=transition,
        reward=_table([-0.02, -0.02, 0.98]).expand_as(transition),
        switch_logit=_table([[-0.8, 0.6], [0.9, -0.5]]),
        subgoal_logit=_table([[0.7, -0.2], [-0.4, 0.8]]),
        action_logit=_table([[[1, -0.3], [0.1, 0.4]], [[0.6, 0], [-0.5, 0.9]]]),
        horizon=horizon,
        gamma=gamma,
    )


def random_mdp(
    rng: np.random.Generator,
    *,
    deterministic: bool = False,
    sparse: bool = False,
    states: int = 2,
    subgoals: int = 2,
    actions: int = 2,
    horizon: int = 3,
    gamma: float = 1.0,
) -> OptionMDP:
    """Draw a process and a policy.

    Args:
        rng: Draws transitions uniform on the simplex, rewards N(0, 1) and logits N(0, 1.5²).
        deterministic: Each action has one outcome, uniform among the states and the end.
        sparse: The reward is 1 on reaching the end, else 0, as in the household games.

    >>> mdp = random_mdp(np.random.default_rng(0), deterministic=True)
    >>> mdp.transition.shape, bool((mdp.transition.max(-1).values == 1).all())
    (torch.Size([2, 2, 3]), True)
    """
    shape = (states, actions, states + 1)
    if deterministic:
        transition = np.eye(states + 1)[rng.integers(states + 1, size=shape[:2])]
    else:
        transition = rng.dirichlet(np.ones(states + 1), size=shape[:2])
    reward = np.eye(states + 1)[-1] if sparse else rng.standard_normal(shape)
    return OptionMDP(
        transition=_table(transition),
        reward=_table(reward).expand(shape),
        switch_logit=_table(rng.normal(0, 1.5, (states, subgoals))),
        subgoal_logit=_table(rng.normal(0, 1.5, (states, subgoals))),
        action_logit=_table(rng.normal(0, 1.5, (states, subgoals, actions))),
        horizon=horizon,
        gamma=gamma,
    )


def exact_values(mdp: OptionMDP) -> ValueTables:
    """Values of the policy by dynamic programming, backwards from the horizon.

        Q(s,g,a) = Σ_s' P(s'|s,a) [r + γ Vˢ(s',g)]     Vᴸ = Σ_a π Q     Vᴴ = Σ_g μ Vᴸ

    and Vˢ = (1-β) Vᴸ + β Vᴴ. Differentiable in the logits.

    >>> exact_values(kitchen()).high[0, 0]  # J, the expected return
    tensor(0.5381, dtype=torch.float64)
    """
    beta, mu, pi = _policy(mdp)
    after, tables = torch.zeros_like(beta), []
    for turn in reversed(range(mdp.horizon)):
        ahead = mdp.reward[:, None] + mdp.gamma * pad(after, (0, 0, 0, 1)).T[:, None]
        action = (mdp.transition[:, None] * ahead).sum(-1)
        low = (pi * action).sum(-1)
        high = (mu * low).sum(-1)
        after = (1 - beta) * low + beta * high[:, None] if turn else high[:, None].expand_as(low)
        tables.append(ValueTables(high, low, after, action))
    return ValueTables(*map(torch.stack, zip(*reversed(tables), strict=True)))


def true_gradient(mdp: OptionMDP) -> Float[Tensor, "parameter"]:
    """∇J by the logits of switch, subgoal and action, through the dynamic programme.

    >>> true_gradient(kitchen()).norm()
    tensor(0.1906, dtype=torch.float64)
    """
    logits = {name: getattr(mdp, name).clone().requires_grad_() for name in LOGITS}
    value = exact_values(mdp._replace(**logits)).high[0, 0]
    # at horizon 1 nothing depends on the switch: zeros
    parts = torch.autograd.grad(value, list(logits.values()), materialize_grads=True)
    return torch.cat([x.flatten() for x in parts])


def enumerate_trajectories(mdp: OptionMDP) -> Trajectories:
    """List all that can happen under the policy.

    Example:
        >>> trajectories = enumerate_trajectories(kitchen())
        >>> len(trajectories.probability), round(trajectories.probability.sum().item(), 12)
        (5154, 1.0)
    """
    beta, mu, pi = _policy(mdp)
    states, subgoals = beta.shape
    keep = (1 - beta)[..., None] * torch.eye(subgoals, dtype=beta.dtype)
    change = beta[..., None] * mu[:, None]
    forced = torch.stack([0 * keep, mu[:, None].expand_as(keep)], 2)
    chosen = torch.stack([keep, change], 2)  # [state, previous, switch, subgoal]
    outcome = pi[..., None] * mdp.transition[:, None]  # [state, subgoal, action, next]

    history = torch.zeros(1, 0, 6, dtype=torch.long)  # its columns are those of `now` below
    probability, finished = torch.ones(1, dtype=beta.dtype), []
    state = previous = torch.zeros(1, dtype=torch.long)
    for turn in range(mdp.horizon):
        decided = (chosen if turn else forced)[state, previous]
        chance = decided[..., None, None] * outcome[state][:, None]
        chance = probability[:, None, None, None, None] * chance
        row, switch, subgoal, action, after = chance.nonzero(as_tuple=True)
        probability = chance[row, switch, subgoal, action, after]
        now = torch.stack([state[row], previous[row], switch, subgoal, action, after], -1)
        history = torch.cat([history[row], now[:, None]], 1)
        over = (after == states) | (turn == mdp.horizon - 1)
        padded = pad(history[over], (0, 0, 0, mdp.horizon - turn - 1))
        finished.append((padded, probability[over], torch.full((len(padded),), turn + 1)))
        history, probability = history[~over], probability[~over]
        state, previous = after[~over], subgoal[~over]
    history, probability, length = map(torch.cat, zip(*finished, strict=True))
    state, previous, switch, subgoal, action, after = history.unbind(-1)
    turn = torch.arange(mdp.horizon).expand_as(state)
    real = turn < length[:, None]

    def placed(score: Tensor, cell: Tensor, cells: int) -> Tensor:
        """The score of a decision, at the place of its logits."""
        return (one_hot(cell, cells)[..., None] * score[..., None, :]).flatten(2)

    free = (turn > 0) * (switch - beta[state, previous])
    named = switch[..., None] * (one_hot(subgoal, subgoals) - mu[state])
    acted = one_hot(action, pi.shape[-1]) - pi[state, subgoal]
    score = [
        placed(free[..., None], state * subgoals + previous, states * subgoals),
        placed(named, state, states),
        placed(acted, state * subgoals + subgoal, states * subgoals),
    ]
    return Trajectories(
        mdp=mdp,
        gradient=true_gradient(mdp),
        probability=probability,
        grid=TurnGrid.of(real * mdp.reward[state, action, after], switch)._replace(length=length),
        turn=turn,
        state=state,
        previous=previous,
        subgoal=subgoal,
        action=action,
        score=real[..., None] * torch.cat(score, -1),
    )


def read_values(trajectories: Trajectories, tables: ValueTables) -> Values:
    """What a critic that knows these tables says along each trajectory.

    `gae` reads ``high`` at every prompt. Give it ``values._replace(high=values.switch)`` for a
    critic that sees the subgoal in force, V(s, g_prev). One that does not see it knows at best
    ``conditional_mean(trajectories, values.switch, trajectories.turn, trajectories.state)``.

    >>> trajectories = enumerate_trajectories(kitchen())
    >>> read_values(trajectories, exact_values(kitchen())).high[0, 0]  # J, whatever comes later
    tensor(0.5381, dtype=torch.float64)
    """
    turn, state = trajectories.turn, trajectories.state
    return Values(
        high=tables.high[turn, state],
        low=tables.low[turn, state, trajectories.subgoal],
        switch=tables.switch[turn, state, trajectories.previous],
        final=torch.zeros_like(trajectories.probability),
    )


def perturb(
    tables: ValueTables, std: float = 0.15, seed: int = 0, *, shared: bool = False
) -> ValueTables:
    """A critic that is wrong: normal noise on low, high and switch, drawn in this order.

    ``shared``: instead one draw per turn and state, the same in all heads, as if they read it from
    one trunk and it were the trunk that errs.

    To perturb one head only, take it over:

    >>> exact = exact_values(kitchen())
    >>> wrong = exact._replace(high=perturb(exact).high)
    >>> torch.equal(wrong.low, exact.low), torch.equal(wrong.high, exact.high)
    (True, False)
    """
    rng, noisy = np.random.default_rng(seed), {}
    if shared:
        common = std * _table(rng.standard_normal(tables.high.shape))
        return tables._replace(
            high=tables.high + common, low=tables.low + common[..., None],
            switch=tables.switch + common[..., None],
        )  # fmt: skip
    for name in ("low", "high", "switch"):
        exact = getattr(tables, name)
        noise = rng.standard_normal([n + 1 for n in exact.shape[:2]] + list(exact.shape[2:]))
        noisy[name] = exact + std * _table(noise[:-1, :-1])  # the end is drawn too, never read
    return tables._replace(**noisy)


def conditional_mean(
    trajectories: Trajectories,
    x: Float[Tensor, "traj turn"],
    *given: Int[Tensor, "traj turn"] | Bool[Tensor, "traj turn"],
) -> Float[Tensor, "traj turn"]:
    """E[x | given] over all turns of all trajectories, read back at every turn.

    Example:
        E[reward | turn] of the kitchen: at turn 0 nothing but the cost.

        >>> trajectories = enumerate_trajectories(kitchen())
        >>> conditional_mean(trajectories, trajectories.grid.reward, trajectories.turn)[-1]
        tensor([-0.0200,  0.2200,  0.2538,  0.2632], dtype=torch.float64)
    """
    key = torch.zeros_like(trajectories.turn)
    for part in given:
        key = key * (int(part.max()) + 1) + part.long()
    weight = _real(trajectories) * trajectories.probability[:, None]
    total = torch.zeros(2, int(key.max()) + 1, dtype=x.dtype)
    total.index_add_(1, key.flatten(), torch.stack([weight * x, weight]).flatten(1))
    return (total[0] / torch.where(total[1] > 0, total[1], 1))[key]  # 0 where all is padding


def gradient_statistics(
    trajectories: Trajectories, credit: Credit, discount: bool = True
) -> GradientStatistics:
    """Bias and variance of the policy gradient that follows this credit.

        ĝ = Σₜ γᵗ (∇log β(qₜ) Âˢₜ + qₜ ∇log μ(gₜ) Âᴴₜ + ∇log π(aₜ) Âᴸₜ)

    Args:
        trajectories: All of them, with their probabilities and scores.
        credit: Of ``trajectories.grid``, with the γ of the process.
        discount: False drops γᵗ, as most code for deep RL does.

    Example:
        >>> trajectories = enumerate_trajectories(kitchen())
        >>> values = read_values(trajectories, exact_values(kitchen()))
        >>> credit = estimate(trajectories.grid, values, CreditConfig.paper())
        >>> statistics = gradient_statistics(trajectories, credit)
        >>> statistics.bias < 1e-12, round(statistics.trace, 4)
        (True, 0.3675)
    """
    mdp, probability = trajectories.mdp, trajectories.probability
    weight = _table(mdp.gamma ** np.arange(mdp.horizon) if discount else np.ones(mdp.horizon))
    levels = zip(
        (credit.switch, credit.high, credit.low), _levels(mdp, trajectories.score), strict=True
    )
    sample = torch.cat([torch.einsum("nt,ntp->np", weight * a, s) for a, s in levels], -1)
    mean = probability @ sample
    return _statistics(trajectories, mean, probability @ (sample - mean) ** 2)


def whiten_population(trajectories: Trajectories, credit: Credit) -> Credit:
    """Per-level whitening with the mean and standard deviation of the whole population.

    Taken over the turns where the level decides: low all, high boundaries, switch all but the
    first. Each level keeps its direction; their lengths, and so the joint direction, change.

    >>> trajectories = enumerate_trajectories(kitchen())
    >>> values = read_values(trajectories, exact_values(kitchen()))
    >>> config = CreditConfig(gamma=1.0, lam_low=1.0, lam_high=0.95, lam_boundary=0.0)
    >>> credit = estimate(trajectories.grid, values, config)
    >>> credit = whiten_population(trajectories, credit)
    >>> round(gradient_statistics(trajectories, credit).cosine, 4)
    0.9955
    """
    real = _real(trajectories)

    def standard(x: Tensor, decides: Tensor) -> Tensor:
        weight = decides * trajectories.probability[:, None]
        weight = weight / weight.sum()
        centred = x - (weight * x).sum()
        return decides * centred / (weight * centred**2).sum().sqrt()

    return credit._replace(
        high=standard(credit.high, real & trajectories.grid.boundary),
        low=standard(credit.low, real),
        switch=standard(credit.switch, real & (trajectories.turn > 0)),
    )


def vine_ppo(trajectories: Trajectories, values: Values, rollouts: int) -> GradientStatistics:
    """VinePPO: every V(sₜ, g_prev) is the mean of K fresh rollouts, A = rₜ + γ V(sₜ₊₁) - V(sₜ).

    The noise of V(sₜ) has variance Var(Gₜ | sₜ, g_prev) / K, is independent of all else and
    enters two neighbouring turns, so to the trace of flat GAE with λ = 0 it adds

        Σₜ E[γ²ᵗ ‖scoreₜ₋₁ - scoreₜ‖² Var(Gₜ | sₜ, g_prev)] / K.

    >>> trajectories = enumerate_trajectories(kitchen())
    >>> values = read_values(trajectories, exact_values(kitchen()))
    >>> [round(vine_ppo(trajectories, values, k).trace, 4) for k in (1, 9, 1000)]
    [1.1582, 0.3163, 0.212]

    Source: Kazemnejad et al. 2024, arXiv:2410.01679 (which has γ = 1 and K = 9).
    """
    mdp, seen = trajectories.mdp, (trajectories.turn, trajectories.state, trajectories.previous)
    config = CreditConfig(gamma=mdp.gamma, lam_low=0.0, estimator="gae")
    flat = estimate(trajectories.grid, values._replace(high=values.switch), config)
    exact = gradient_statistics(trajectories, flat)
    variance = _variance(trajectories, returns(trajectories), *seen)
    weight = trajectories.probability[:, None] * mdp.gamma ** (2.0 * trajectories.turn) * variance
    change = pad(trajectories.score, (0, 0, 1, 0))[:, :-1] - trajectories.score
    noise = torch.einsum("nt,ntp->p", weight * _real(trajectories) / rollouts, change**2)
    return _statistics(trajectories, exact.mean, exact.variance + noise)


def theory_table(mdp: OptionMDP) -> pd.DataFrame:
    """Bias and variance of every estimator with exact critics, one row each.

    Groups are infinite (their mean is an expectation). V(s) is a critic that does not see the
    subgoal in force. HAE has its (λᴸ, λᴴ), λᴮ = 0, and the paper's or the released switch form.

    >>> theory_table(kitchen()).trace[["GAE 1, V(s)", "HAE (1, 1) paper"]].round(4).to_dict()
    {'GAE 1, V(s)': 0.5678, 'HAE (1, 1) paper': 0.3811}
    """
    trajectories, exact = enumerate_trajectories(mdp), exact_values(mdp)
    grid, values = trajectories.grid, read_values(trajectories, exact)
    turn, state = trajectories.turn, trajectories.state
    to_go = returns(trajectories)
    # The statistics weigh turn t with γᵗ; the return of the episode counts in full at every turn.
    full = mdp.gamma ** -turn.double()
    whole, episode = to_go[:, :1] * full, (to_go[:, :1] - exact.high[0, 0]) * full
    anchor = to_go - conditional_mean(trajectories, to_go, state)
    seen = values._replace(high=values.switch)
    blind = values._replace(high=conditional_mean(trajectories, values.switch, turn, state))

    def credit(values: Values, form: str, low: float, high: float = 1.0) -> Credit:
        config = CreditConfig(mdp.gamma, lam_low=low, lam_high=high, lam_boundary=0.0)
        if form == "flat":
            return estimate(grid, values, replace(config, estimator="gae"))
        return estimate(grid, values, replace(config, switch_advantage=form))

    taken = exact.action[turn, state, trajectories.subgoal, trajectories.action]
    rows = {
        "exact advantages": credit(values, "value", 1)._replace(
            high=values.low - values.high, low=taken - values.low
        ),
        "REINFORCE": _same(whole),
        "reward-to-go": _same(to_go),
        "RLOO, GRPO": _same(episode),
        "GiGPO": _same((episode + anchor) / 2),
        "GAE 1, V(s)": credit(blind, "flat", 1),
        "GAE 1, V(s, g)": credit(seen, "flat", 1),
        "GAE 0.95, V(s)": credit(blind, "flat", 0.95),
        "GAE 0.95, V(s, g)": credit(seen, "flat", 0.95),
        "GAE 0, V(s)": credit(blind, "flat", 0),
        "GAE 0, V(s, g)": credit(seen, "flat", 0),
        "HAE (1, 1) paper": credit(values, "value", 1, 1),
        "HAE (1, 1) released": credit(values, "return", 1, 1),
        "HAE (1, 0.95) released": credit(values, "return", 1, 0.95),
        "HAE (0.95, 0.95) paper": credit(values, "value", 0.95, 0.95),
        "HAE (0, 0) paper": credit(values, "value", 0, 0),
    }
    statistics = {name: gradient_statistics(trajectories, row) for name, row in rows.items()}
    statistics |= {f"VinePPO K={k}": vine_ppo(trajectories, values, k) for k in (9, 1)}
    return pd.DataFrame.from_dict(statistics, orient="index").drop(columns=["mean", "variance"])


def critic_table(mdp: OptionMDP, std: float = 0.15, seed: int = 0) -> pd.DataFrame:
    """Who needs which critic: bias of each level when one head is wrong (see `perturb`), the
    others exact, as ‖bias of the level's gradient‖ / ‖true gradient‖.

    "flat" has its V(s, g_prev) from the switch head, and its bias is that of all levels. Names
    after a level are what differs from λ = 1 and λᴮ = 0; 0 (up to rounding) is "needs nothing".

    >>> critic_table(kitchen()).loc["low"].round(4) + 0.0
                low    high  switch
              0.0000  0.0436     0.0
    λᴸ 0.95  0.0047  0.0439     0.0
    λᴮ 0.9   0.0000  0.0044     0.0
    λᴮ 1     0.0000  0.0000     0.0
    """
    trajectories, exact = enumerate_trajectories(mdp), exact_values(mdp)
    wrong = perturb(exact, std, seed)
    critics = {
        name: read_values(trajectories, exact._replace(**{name: getattr(wrong, name)}))
        for name in ("low", "high", "switch")
    }
    one = CreditConfig(
        gamma=mdp.gamma, lam_low=1.0, lam_high=1.0, lam_boundary=0.0, switch_advantage="return"
    )
    cases = [
        ("flat", "", replace(one, estimator="gae")),
        ("flat", "λ 0.95", replace(one, estimator="gae", lam_low=0.95)),
        ("high", "", one),
        ("high", "λᴴ 0.95", replace(one, lam_high=0.95)),
        ("low", "", one),
        ("low", "λᴸ 0.95", replace(one, lam_low=0.95)),
        ("low", "λᴮ 0.9", replace(one, lam_boundary=0.9)),
        ("low", "λᴮ 1", replace(one, lam_boundary=1.0)),
        ("switch", "paper", replace(one, switch_advantage="value")),
        ("switch", "released", one),
        ("switch", "released, λᴮ 1", replace(one, lam_boundary=1.0)),
    ]
    table = {}
    for level, name, config in cases:
        for head, values in critics.items():
            if level == "flat":
                values = values._replace(high=values.switch)
            credit = estimate(trajectories.grid, values, config)
            error = gradient_statistics(trajectories, credit).mean - trajectories.gradient
            if level != "flat":
                error = _levels(mdp, error)[("switch", "high", "low").index(level)]
            bias = (error.norm() / trajectories.gradient.norm()).item()
            table.setdefault((level, name), {})[head] = bias
    return pd.DataFrame.from_dict(table, orient="index")


def variance_identity(mdp: OptionMDP) -> pd.DataFrame:
    """Why an action's credit is less noisy in HAE (λ = 1, exact values), at every (turn, state).

        Var(Gₜ | sₜ) - Var(Âᴸₜ | sₜ)  =  E[γ²ᵈ Var(G_b' | s_b') | sₜ]  +  Var(Vᴸ(sₜ, gₜ) | sₜ)
        flat         - hae            =  bootstrap                     +  conditioning

    b' is the next boundary, d turns away: what happens after it is replaced by its mean, Vᴴ
    (Rao-Blackwell); and the baseline knows the subgoal. It is a statement about each action's
    credit. The gradient sums over turns, whose covariances may grow: see `theory_table`.

    >>> variance_identity(kitchen()).round(4).iloc[0].to_dict()
    {'flat': 0.2503, 'hae': 0.0739, 'bootstrap': 0.1753, 'conditioning': 0.0011}
    """
    trajectories = enumerate_trajectories(mdp)
    grid, turn, state = trajectories.grid, trajectories.turn, trajectories.state
    values, real = read_values(trajectories, exact_values(mdp)), _real(trajectories)
    to_go = returns(trajectories)
    config = CreditConfig(gamma=mdp.gamma, lam_low=1.0, lam_high=1.0, lam_boundary=0.0)
    # What is still open at a boundary, once the decision to SWITCH is known, carried back to b'.
    opened = _variance(trajectories, to_go, turn, state, grid.switch) * (grid.boundary & real)
    within = (~grid.boundary & real).double()
    ahead = [pad(x[:, 1:], (0, 1)) * mdp.gamma**2 for x in (opened, within)]
    table = {
        "flat": _variance(trajectories, to_go, turn, state),
        "hae": _variance(trajectories, estimate(grid, values, config).low, turn, state),
        "bootstrap": conditional_mean(trajectories, reverse_scan(*ahead), turn, state),
        "conditioning": _variance(trajectories, values.low, turn, state),
    }
    keys = {"turn": turn, "state": state}
    rows = pd.DataFrame({name: x[real].numpy() for name, x in (keys | table).items()})
    return rows.drop_duplicates(list(keys)).sort_values(list(keys)).set_index(list(keys))


def returns(trajectories: Trajectories) -> Float[Tensor, "traj turn"]:
    """Discounted reward from each turn on, the G of every equation here.

    >>> trajectories = enumerate_trajectories(kitchen())
    >>> returns(trajectories)[0, :2]  # the shortest way: grab, put
    tensor([0.9600, 0.9800], dtype=torch.float64)
    """
    reward = trajectories.grid.reward
    return reverse_scan(reward, torch.full_like(reward, trajectories.mdp.gamma))


class KitchenEnv:
    """The kitchen as a text to be played, for training on what can be computed exactly.

    A `hiper_lab.envs.base.TextEnv`. The turns left are shown, for values depend on them. Whatever
    is no command costs a turn and does nothing.

    >>> env = KitchenEnv()
    >>> env.reset(seed=0)[0]
    'You are empty-handed. A mug is on the counter. 4 turns left.'
    >>> env.step("grab")[:4]  # observation, reward, terminated, truncated
    ('You hold the mug. 3 turns left.', -0.02, False, False)
    """

    ACTIONS = ("grab", "put")
    PLACES = ("You are empty-handed. A mug is on the counter.", "You hold the mug.", "Done.")

    def __init__(self, horizon: int = 4):
        self.mdp = kitchen(horizon=horizon)
        self._dice = random.Random()
        self._state: tuple[int, int] | None = None

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start over. A seed also restarts the dice."""
        if seed is not None:
            self._dice.seed(seed)
        info = self.restore((0, 0))
        return self._look(), info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """Play one turn. It ends the episode when the mug is put away or no turn is left."""
        if self._state is None or self._over:
            raise RuntimeError(f"step({text!r}) outside an episode; call reset() or restore()")
        (state, turn), command, after = self._state, text.strip(), self._state[0]
        if command in self.ACTIONS:
            chances = self.mdp.transition[state, self.ACTIONS.index(command)].tolist()
            after = self._dice.choices(range(len(chances)), chances)[0]
        reward = self.mdp.reward[state, 0, after].item()
        info = self.restore((after, turn + 1))
        return self._look(), reward, self._over, False, info

    def snapshot(self) -> tuple[int, int]:
        """State and turn, for `restore`. Not the dice: rollouts from here differ by chance."""
        if self._state is None:
            raise RuntimeError("snapshot() outside an episode; call reset()")
        return self._state

    def restore(self, state: tuple[int, int]) -> dict:
        """Go (back) to a state; returns the info that belongs to it."""
        self._state, won = state, state[0] == len(self.mdp.transition)
        self._over = won or state[1] >= self.mdp.horizon
        return {"admissible": list(self.ACTIONS), "won": won, "task": "put the mug away",
                "task_type": "kitchen"}  # fmt: skip

    def _look(self) -> str:
        state, turn = self._state
        return f"{self.PLACES[state]} {self.mdp.horizon - turn} turns left."


def _statistics(trajectories: Trajectories, mean: Tensor, variance: Tensor) -> GradientStatistics:
    true = trajectories.gradient
    blocks = [x.sum().item() for x in _levels(trajectories.mdp, variance)]
    return GradientStatistics(
        bias=(mean - true).abs().max().item(),
        relative_bias=((mean - true).norm() / true.norm()).item(),
        cosine=(mean @ true / (mean.norm() * true.norm())).item(),
        trace=sum(blocks),
        switch=blocks[0],
        subgoal=blocks[1],
        action=blocks[2],
        mean=mean,
        variance=variance,
    )


def _levels(mdp: OptionMDP, x: Float[Tensor, "*batch parameter"]) -> tuple[Tensor, ...]:
    """The parameters of switch, subgoal and action."""
    return x.split([getattr(mdp, name).numel() for name in LOGITS], -1)


def _variance(trajectories: Trajectories, x: Tensor, *given: Tensor) -> Tensor:
    """Var(x | given), read back at every turn."""
    return conditional_mean(
        trajectories, (x - conditional_mean(trajectories, x, *given)) ** 2, *given
    )


def _same(x: Tensor) -> Credit:
    """One advantage for all that was decided at the turn."""
    return Credit(x, x, x, x, x, x)


def _policy(mdp: OptionMDP) -> tuple[Tensor, Tensor, Tensor]:
    """β [state, previous], μ [state, subgoal] and π [state, subgoal, action]."""
    total = mdp.transition.sum(-1)
    if (mdp.transition < 0).any() or not torch.allclose(total, torch.ones_like(total)):
        raise ValueError(f"transition sums to {total.tolist()}, expected probabilities: 1 each")
    if mdp.horizon < 1 or not 0 < mdp.gamma <= 1:
        seen = f"horizon is {mdp.horizon} and gamma {mdp.gamma}"
        raise ValueError(f"{seen}, expected at least 1 turn and a number in (0, 1]")
    return mdp.switch_logit.sigmoid(), mdp.subgoal_logit.softmax(-1), mdp.action_logit.softmax(-1)


def _real(trajectories: Trajectories) -> Tensor:
    """Mask [traj, turn] of the turns that exist."""
    return trajectories.turn < trajectories.grid.length[:, None]


def _table(numbers: ArrayLike) -> Tensor:
    return torch.as_tensor(np.asarray(numbers, dtype=np.float64))
