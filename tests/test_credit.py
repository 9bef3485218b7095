"""Credit against hand numbers, the published code's numbers, a slow reference, and itself."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiper_lab import scan
from hiper_lab.credit import (
    LEVELS,
    CreditConfig,
    TurnGrid,
    Values,
    credit_table,
    estimate,
    explain,
    explain_table,
    hae,
    in_effect,
    per_token,
    segment_index,
    shape_rewards,
    table_to_grid,
    whiten,
)
from hiper_lab.flat import gae

PLAIN = replace(CreditConfig.paper(), switch_advantage="return", truncation="zero")
GOLDEN = json.loads((Path(__file__).parent / "data" / "hae_golden.json").read_text())["cases"]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ESTIMATORS = ["hae", "gae", "monte_carlo", "grpo", "rloo", "rloo_rows", "gigpo"]
seeds = st.integers(0, 2**32 - 1)
unit = st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0])


def random_grid(seed, traj=6, turn=11, dtype=torch.float64):
    """A padded grid and its values; padding is filled with NaN where a number can be NaN."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, turn + 1, (traj,), generator=g)
    real = torch.arange(turn) < length[:, None]
    switch = torch.rand(traj, turn, generator=g) < 0.4
    boundary = switch.clone()
    boundary[:, 0] = True

    def numbers():
        x = torch.randn(traj, turn, generator=g, dtype=torch.float64)
        return torch.where(real, x, torch.nan).to(dtype)

    def flags():
        return torch.rand(traj, turn, generator=g) < 0.7

    terminated = torch.rand(traj, generator=g) < 0.5
    first = torch.arange(turn) == 0
    grid = TurnGrid(
        numbers(), switch, boundary, flags(), flags(), flags() & ~first, terminated, length
    )
    grid = grid._replace(
        group=torch.arange(traj) % max(1, traj // 2),
        state=torch.randint(0, 4, (traj, turn), generator=g),
    )
    final = torch.randn(traj, generator=g, dtype=torch.float64).to(dtype)
    return grid, Values(numbers(), numbers(), numbers(), final), real


def returns_to_go(grid, values, real, gamma):
    """Σ γᵘ⁻ᵗ rᵤ, plus the discounted value of the final state where the episode was cut."""
    out = torch.zeros_like(grid.reward)
    for i, length in enumerate(grid.length.tolist()):
        carry = 0.0 if grid.terminated[i] else values.final[i].item()
        for t in reversed(range(length)):
            carry = grid.reward[i, t].item() + gamma * carry
            out[i, t] = carry
    return out


def assert_credit_equal(a, b, **tolerance):
    for name, x, y in zip(a._fields, a, b, strict=True):
        torch.testing.assert_close(x, y, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# ------------------------------------------------------------- the published implementation


# Four turns, two segments; 99 stands where no level may look. The published code's outputs:
# case -> (config, rewards, done, low, high at 0 and 2, switch, target low, high, switch)
FOUR = {
    "plain": (
        dict(),
        [0, 0, 0, 10], True,
        [3, 2, 7, 5], [7.7, 6], [2.5, 3, 6.5, 4],
        [4, 4, 10, 10], [9.7, 10], [4, 4, 10, 10],
    ),
    "discounted": (
        dict(gamma=0.9, lam_low=0.8, lam_high=0.7),
        [0, 0, 0, 10], True,
        [1.952, 1.6, 5.1, 5], [4.075, 5], [1.74, 2.6, 5.5, 4],
        [2.952, 3.6, 8.1, 10], [6.075, 9], [3.24, 3.6, 9, 10],
    ),
    "penalties": (
        dict(keep_penalty=-0.3, invalid_penalty=0.1, consistency_penalty=-0.3),
        [0, 0, 0, 10], True,
        [2.6, 1.6, 6.4, 4.4], [6.73, 5.4], [2.1, 2.6, 5.9, 3.4],
        [3.6, 3.6, 9.4, 9.4], [8.73, 9.4], [3.6, 3.6, 9.4, 9.4],
    ),
    "penalties by ratio": (
        dict(keep_penalty=-0.3, keep_penalty_mode="ratio", invalid_penalty=0.1,
             consistency_penalty=-0.3),
        [0, 0, 0, 10], True,
        [2.825, 1.825, 6.625, 4.625], [7.16875, 5.625], [2.325, 2.825, 6.125, 3.625],
        [3.825, 3.825, 9.625, 9.625], [9.16875, 9.625], [3.825, 3.825, 9.625, 9.625],
    ),
    "whitened": (
        dict(whiten=True),
        [0, 0, 0, 10], True,
        [-0.6509, -1.1717, 1.4321, 0.3906], [1, -1], [-0.9733, -0.6489, 1.6222, 0],
        [4, 4, 10, 10], [9.7, 10], [4, 4, 10, 10],
    ),
    "cut, zero": (
        dict(),
        [0, 0, 0, 0], False,
        [3, 2, -3, -5], [-1.8, -4], [2.5, 3, -3.5, -6],
        [4, 4, 0, 0], [0.2, 0], [4, 4, 0, 0],
    ),
    "cut, own state": (
        dict(truncation="own_state"),
        [0, 0, 0, 0], False,
        [3, 2, 2, 0], [2, 0], [2.5, 3, 0.5, -2],
        [4, 4, 5, 5], [4, 4], [4, 4, 4, 4],
    ),
    "cut, own state, discounted": (
        dict(truncation="own_state", gamma=0.9),
        [0, 0, 0, 0], False,
        [2.24, 1.6, 1.05, -0.5], [0.65518, -0.76], [1.74, 2.6, -0.26, -2.4],
        [3.24, 3.6, 4.05, 4.5], [2.65518, 3.24], [3.24, 3.6, 3.24, 3.6],
    ),
}  # fmt: skip


def four_turns(reward, done):
    return pd.DataFrame({
        "traj": "a", "turn": range(4), "reward": reward, "done": [False] * 3 + [done],
        "switch": [True, False, True, False], "valid": [True, False, True, True],
        "subgoal": [[7], [7], [8], [9]],
        "v_low": [1.0, 2, 3, 5], "v_high": [2.0, 99, 4, 99], "v_switch": [1.5, 1, 3.5, 6],
    })  # fmt: skip


@pytest.mark.parametrize("case", FOUR)
def test_four_turns(case):
    changes, reward, done, low, high, switch, to_low, to_high, to_switch = FOUR[case]
    table = credit_table(four_turns(reward, done), replace(PLAIN, **changes))
    nan = np.nan
    expected = pd.DataFrame({
        "adv_low": low, "adv_high": [high[0], nan, high[1], nan], "adv_switch": switch,
        "target_low": to_low, "target_high": [to_high[0], nan, to_high[1], nan],
        "target_switch": to_switch, "segment": [0, 0, 1, 1],
    }, dtype=float)  # fmt: skip
    tolerance = 6e-5 if case == "whitened" else 1e-9  # published to four digits
    pd.testing.assert_frame_equal(table.astype(float), expected, rtol=0, atol=tolerance)


def golden_config(published):
    modes = {"normalized": "ratio", "fixed": "per_turn"}
    return replace(
        CreditConfig.upstream(),
        gamma=published["gamma"],
        lam_low=published["lam_turn"],
        lam_high=published["lam_seg"],
        whiten=published.get("norm_adv", False),
        keep_penalty=published.get("keep_penalty", 0.0),
        keep_penalty_mode=modes[published.get("keep_penalty_mode", "fixed")],
        consistency_penalty=published.get("keep_consistency_penalty", 0.0),
        consistency_requires_both=published.get("keep_consistency_requires_both", True),
        invalid_penalty=published.get("invalid_action_penalty_coef", 0.0),
        truncation="own_state" if published.get("bootstrap_truncated") else "zero",
    )


@pytest.mark.parametrize("case", range(len(GOLDEN)))
def test_golden(case):
    turns = pd.DataFrame(GOLDEN[case]["turns"]).rename(columns={"v_term": "v_switch"})
    expected = pd.DataFrame(GOLDEN[case]["expected"]).astype(float)
    table = credit_table(turns, golden_config(GOLDEN[case]["config"]))
    names = {"adv_low": "adv_low", "adv_high": "adv_high", "adv_switch": "adv_term",
             "target_low": "ret_low", "target_high": "ret_high",
             "target_switch": "ret_term"}  # fmt: skip
    for ours, theirs in names.items():
        known = expected[theirs].notna()
        gap = (table[ours] - expected[theirs])[known].abs()
        assert gap.max() < 1e-5, ours
    assert (table["target_high"].isna() == expected["ret_high"].isna()).all()


# -------------------------------------------------------------------- the slow reference

configs = st.builds(
    CreditConfig,
    gamma=st.sampled_from([0.5, 0.9, 0.98, 1.0]),
    lam_low=unit,
    lam_high=unit,
    lam_boundary=unit,
    boundary_value=st.sampled_from(["high", "low"]),
    estimator=st.sampled_from(["hae", "hae", "hae", *ESTIMATORS]),
    switch_advantage=st.sampled_from(["return", "value"]),
    truncation=st.sampled_from(["final_state", "own_state", "zero"]),
    keep_penalty=st.sampled_from([0.0, -0.3]),
    keep_penalty_mode=st.sampled_from(["per_turn", "ratio"]),
    invalid_penalty=st.sampled_from([0.0, 0.1]),
    consistency_penalty=st.sampled_from([0.0, -0.2]),
    consistency_requires_both=st.booleans(),
    whiten=st.booleans(),
    gae_value=st.sampled_from(["high", "switch"]),
    group_std=st.booleans(),
    step_weight=st.sampled_from([0.0, 0.7, 1.0]),
    anchor_similarity=st.sampled_from([0.8, 0.97, 1.0]),
)


def assert_equals_the_reference(trajectories, config):
    expected = reference.credit(trajectories, config)
    table = credit_table(reference.to_frame(trajectories), config)
    # rows that are equal but for rounding, whitened, are rounding divided by 1e-8
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if config.whiten else CLOSE
    pd.testing.assert_frame_equal(table, expected, check_dtype=False, **tolerance)


@settings(deadline=None, max_examples=50)
@given(seeds, configs, st.sampled_from(["loop", "doubling"]))
def test_ten_thousand_trajectories_equal_the_reference(seed, config, method):
    """50 times 200 trajectories of 1 to 60 turns."""
    trajectories = reference.random_trajectories(seed, 200, longest=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "choose_method", lambda *_: method)
        assert_equals_the_reference(trajectories, config)


@settings(deadline=None, max_examples=60)
@given(seeds, st.integers(2, 5), configs)
def test_small_batches_equal_the_reference(seed, count, config):
    """Where a level, a group or a state has few members, or one."""
    assert_equals_the_reference(reference.random_trajectories(seed, count, longest=4), config)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_each_estimator_equals_the_reference(estimator):
    for seed, config in enumerate((CreditConfig.lab(), CreditConfig.upstream())):
        trajectories = reference.random_trajectories(seed, 60, longest=20)
        assert_equals_the_reference(trajectories, replace(config, estimator=estimator))


@pytest.mark.parametrize("config", [CreditConfig.lab(), CreditConfig.paper()])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_edge_cases_equal_the_reference(estimator, config):
    """Episodes of one turn, all KEEP, all SWITCH, without any reward; each also whitened."""
    for k, change in enumerate((
        lambda t: {},
        lambda t: {"switch": np.zeros_like(t["switch"])},
        lambda t: {"switch": np.ones_like(t["switch"])},
        lambda t: {"reward": np.zeros_like(t["reward"]), "terminated": True},
    )):  # fmt: skip
        trajectories = reference.random_trajectories(k, 8, longest=1 if k == 0 else 6)
        trajectories = [t | change(t) for t in trajectories]
        for whitened in (False, True):
            changed = replace(config, estimator=estimator, whiten=whitened)
            assert_equals_the_reference(trajectories, changed)


def test_float32_is_close_to_float64():
    grid, values, _ = random_grid(0, traj=64, turn=50)
    exact = hae(grid, values, CreditConfig.lab())
    single = grid._replace(reward=grid.reward.float()), Values(*(v.float() for v in values))
    credit = hae(*single, CreditConfig.lab())
    for x, y in zip(credit, exact, strict=True):
        assert x.dtype == torch.float32 and y.dtype == torch.float64
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_half_precision_is_not_computed_in():
    grid, values, _ = random_grid(1, dtype=torch.bfloat16)
    for estimator in (hae, gae):
        assert {x.dtype for x in estimator(grid, values, PLAIN)} == {torch.float32}


# ------------------------------------------------------------------------------ reductions


@pytest.mark.parametrize("seed", range(3))
def test_every_turn_a_boundary(seed):
    """low is the one-step TD error onto V_high; high is flat GAE(λ_high) on V_high."""
    grid, values, real = random_grid(seed)
    grid = grid._replace(switch=torch.ones_like(real), boundary=torch.ones_like(real))
    config = replace(PLAIN, gamma=0.9, lam_high=0.8, lam_low=0.3, truncation="final_state")
    credit = hae(grid, values, config)
    flat = gae(grid, values, replace(config, lam_low=config.lam_high))
    torch.testing.assert_close(credit.high, flat.low, **CLOSE)
    one_step = gae(grid, values, replace(config, lam_low=0.0))
    expected = torch.where(real, one_step.target_low - values.low, 0)
    torch.testing.assert_close(credit.low, expected, **CLOSE)


@pytest.mark.parametrize("lam_high", [0.0, 0.5, 1.0])
def test_one_segment(lam_high):
    """low is flat GAE(λ_low) on V_low; high is return − V_high whatever λ_high."""
    grid, values, real = random_grid(3)
    no = torch.zeros_like(real)
    grid = grid._replace(switch=no, boundary=no | (torch.arange(real.shape[1]) == 0))
    config = replace(PLAIN, gamma=0.9, lam_high=lam_high, lam_low=0.7, truncation="final_state")
    credit = hae(grid, values, config)
    flat = gae(grid, values._replace(high=values.low), config)
    torch.testing.assert_close(credit.low, flat.low, **CLOSE)
    expected = torch.zeros_like(credit.high)
    expected[:, 0] = returns_to_go(grid, values, real, 0.9)[:, 0] - values.high[:, 0]
    torch.testing.assert_close(credit.high, expected, **CLOSE)


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_lambda_high_one_is_return_minus_value(gamma):
    grid, values, real = random_grid(4)
    config = replace(PLAIN, gamma=gamma, lam_high=1.0, truncation="final_state")
    target = returns_to_go(grid, values, real, gamma)
    credit = hae(grid, values, config)
    boundary = grid.boundary & real
    expected = torch.where(boundary, target - values.high, 0)
    torch.testing.assert_close(credit.high, expected, **CLOSE)


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([0.5, 0.98, 1.0]))
def test_boundary_lambda_one_telescopes(seed, gamma):
    """λ_B = λ_low = λ_high = 1: the whole return, whatever the critic says in between."""
    grid, values, real = random_grid(seed)
    config = CreditConfig(gamma=gamma, lam_low=1.0, lam_high=1.0, lam_boundary=1.0)
    target = returns_to_go(grid, values, real, gamma)
    credit = hae(grid, values, config)
    expected = torch.where(real, target - values.low, 0)
    torch.testing.assert_close(credit.low, expected, **CLOSE)
    expected = torch.where(real, target - values.switch, 0)
    torch.testing.assert_close(credit.switch, expected, **CLOSE)


def test_boundary_lambda_zero_hears_only_the_next_value():
    """Rewards beyond the next boundary change no low or switch credit before it."""
    grid = TurnGrid.of(reward=[[0.0, 1.0, 2.0, 3.0]], switch=[[1, 0, 1, 0]])
    other = grid._replace(reward=torch.tensor([[0.0, 1.0, -7.0, 5.0]]))
    values = Values(*torch.randn(3, 1, 4), torch.zeros(1))
    a, b = hae(grid, values, PLAIN), hae(other, values, PLAIN)
    assert torch.equal(a.low[:, :2], b.low[:, :2])
    assert torch.equal(a.switch[:, :2], b.switch[:, :2])
    some = replace(PLAIN, lam_boundary=0.5)
    a, b = hae(grid, values, some), hae(other, values, some)
    assert (a.low[:, :2] != b.low[:, :2]).all()


def test_the_schedule_hears_less_from_beyond_the_boundary_as_the_critic_gets_better():
    """By hand: of two episodes one is won, so ρ is 1, 0 or −1 for a V_high that tells them apart,
    is constant, or has them the wrong way round."""
    grid = TurnGrid.of(reward=[[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], switch=[[1, 0, 1]] * 2)
    config = replace(PLAIN, lam_boundary=0.8, lam_schedule="critic")
    for won, lost, lam in ((0.7, 0.2, 0.0), (0.4, 0.4, 0.8), (0.2, 0.7, 0.8)):
        high = torch.tensor([[won] * 3, [lost] * 3])
        values = Values(high, *torch.randn(2, 2, 3), torch.zeros(2))
        assert in_effect(grid, values, config).lam_boundary == pytest.approx(lam, abs=1e-6)
        fixed = estimate(grid, values, replace(PLAIN, lam_boundary=lam))
        torch.testing.assert_close(estimate(grid, values, config), fixed)
        terms = explain(grid, values, config, 0, 0, "low")
        assert terms["contribution"].sum() == pytest.approx(fixed.low[0, 0].item(), abs=1e-6)
    # what lies within a segment is no boundary: only those are read
    high[:, 1] = torch.tensor([9.0, -9.0])
    assert in_effect(grid, values._replace(high=high), config).lam_boundary == pytest.approx(0.8)
    flat = replace(config, estimator="gae")
    assert in_effect(grid, values, flat) is flat


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_bootstrapping_from_the_low_value_forgets_the_segments(seed):
    """With λ_B = λ_low = 0 it is one-step TD on V_low, whatever the plan was."""
    grid, values, real = random_grid(seed)
    grid = grid._replace(terminated=torch.ones_like(grid.terminated))
    config = CreditConfig(gamma=0.9, lam_low=0.0, lam_boundary=0.0, boundary_value="low")
    flat_td = gae(grid, values._replace(high=values.low), config)
    expected = torch.where(real, flat_td.low, 0)
    torch.testing.assert_close(hae(grid, values, config).low, expected, **CLOSE)
    # and at λ_B = 1 nothing is left of either value
    whole = replace(config, lam_boundary=1.0)
    a, b = (hae(grid, values, replace(whole, boundary_value=v)) for v in ("high", "low"))
    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("estimator", [hae, gae])
@pytest.mark.parametrize("form", ["return", "value"])
def test_scaling(estimator, form):
    grid, values, _ = random_grid(5)
    config = replace(CreditConfig.lab(), switch_advantage=form)
    once = estimator(grid, values, config)
    larger = grid._replace(reward=3 * grid.reward), Values(*(3 * v for v in values))
    assert_credit_equal(type(once)(*(3 * x for x in once)), estimator(*larger, config), **CLOSE)


@settings(deadline=None, max_examples=20)
@given(seeds, configs)
def test_padding_and_batch_order_do_not_matter(seed, config):
    grid, values, _ = random_grid(seed)
    order = torch.randperm(len(grid.length), generator=torch.Generator().manual_seed(seed))

    def moved(x, fill):
        if x is None:
            return None
        return torch.nn.functional.pad(x, (0, 3), value=fill)[order] if x.ndim == 2 else x[order]

    wide = TurnGrid(*(moved(x, torch.nan if x is grid.reward else True) for x in grid))
    wide_values = Values(*(moved(v, torch.nan) for v in values))
    credit, widened = estimate(grid, values, config), estimate(wide, wide_values, config)
    expected = type(credit)(*(moved(x, 0.0) for x in credit))
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if config.whiten else CLOSE
    assert_credit_equal(widened, expected, **tolerance)


# -------------------------------------------------------------------------- the switch level


def test_value_form_is_the_papers():
    """With V_switch the β-mixture: (q − β)(V_high − V_low(s, g_prev)), and 0 where forced."""
    grid, values, real = random_grid(6)
    beta = torch.rand(real.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low_prev = torch.where(grid.boundary, torch.randn_like(beta), values.low)
    values = values._replace(switch=(1 - beta) * low_prev + beta * values.high)
    config = replace(CreditConfig.paper(), gamma=0.9, lam_boundary=0.4)
    credit = hae(grid, values, config)
    expected = (grid.switch.double() - beta) * (values.high - low_prev)
    expected = torch.where(real, expected, 0)
    expected[:, 0] = 0
    torch.testing.assert_close(credit.switch, expected, **CLOSE)
    target = torch.where(real, torch.where(grid.boundary, values.high, values.low), 0)
    torch.testing.assert_close(credit.target_switch, target, **CLOSE)


def test_forced_first_switch_has_return_credit_only_in_the_return_form():
    grid = TurnGrid.of(reward=[[0.0, 1.0]], switch=[[0, 0]])
    values = Values(*torch.zeros(3, 1, 2), torch.zeros(1))
    assert hae(grid, values, PLAIN).switch.tolist() == [[1.0, 1.0]]
    value_form = replace(PLAIN, switch_advantage="value")
    assert hae(grid, values, value_form).switch.tolist() == [[0.0, 0.0]]


# ------------------------------------------------------------------- truncation and the end


def test_termination_ignores_every_bootstrap():
    grid, values, _ = random_grid(7)
    grid = grid._replace(terminated=torch.ones_like(grid.terminated))
    values = values._replace(final=torch.full_like(values.final, torch.nan))
    for estimator in (hae, gae):
        zero = estimator(grid, values, replace(PLAIN, truncation="zero"))
        for truncation in ("final_state", "own_state"):
            credit = estimator(grid, values, replace(PLAIN, truncation=truncation))
            assert_credit_equal(credit, zero, rtol=0, atol=0)


def test_truncation_of_gae():
    grid = TurnGrid.of(reward=[[0.0, 1.0]], switch=[[1, 0]], terminated=False)
    values = Values(torch.tensor([[2.0, 4.0]]), *torch.zeros(2, 1, 2), torch.tensor([8.0]))
    config = replace(PLAIN, gamma=0.5, lam_low=1.0)
    for truncation, last in (("final_state", 1.0), ("own_state", -1.0), ("zero", -3.0)):
        credit = gae(grid, values, replace(config, truncation=truncation))
        # the last: 1 + .5 V − 4; the first: 0 + .5 * 4 − 2 + .5 * last
        torch.testing.assert_close(credit.low, torch.tensor([[0.5 * last, last]]))


def test_gae_gives_every_role_the_same():
    grid, values, real = random_grid(8)
    credit = gae(grid, values, CreditConfig.lab())
    assert torch.equal(credit.low, credit.switch)
    assert torch.equal(credit.high, torch.where(grid.boundary & real, credit.low, 0))
    target = torch.where(real, credit.low + values.high, 0)
    for level in (credit.target_high, credit.target_low, credit.target_switch):
        torch.testing.assert_close(level, target, **CLOSE)


# ------------------------------------------------------------------ shaping and whitening


def test_without_penalties_shaping_changes_nothing():
    grid, _, real = random_grid(9)
    shaped = shape_rewards(grid, CreditConfig.lab())
    assert torch.equal(shaped, torch.where(real, grid.reward, 0))


def test_ratio_penalty_of_an_episode_is_its_keep_share():
    """The episode pays keep_penalty × K/T in all, and nothing if it has a single turn."""
    config = replace(PLAIN, keep_penalty=-3.5, keep_penalty_mode="ratio")
    grid = TurnGrid.of(reward=torch.zeros(1, 5), switch=[[1, 0, 0, 1, 0]])
    assert shape_rewards(grid, config).sum().item() == pytest.approx(-3.5 * 3 / 5)
    single = TurnGrid.of(reward=torch.zeros(1, 1), switch=[[0]])
    assert shape_rewards(single, config).item() == 0


@pytest.mark.parametrize("both, expected", [(True, [0, 0, 0, 0, -1]), (False, [0, 0, -1, -1, -1])])
def test_consistency(both, expected):
    """cup, KEEP cup, KEEP nothing, KEEP cup after nothing, KEEP mug."""
    turns = pd.DataFrame({
        "traj": 0, "turn": range(5), "reward": 0.0, "done": False, "switch": False,
        "valid": True, "subgoal": ["cup", "cup", "", "cup", "mug"],
        "v_low": 0.0, "v_high": 0.0, "v_switch": 0.0,
    })  # fmt: skip
    config = replace(PLAIN, consistency_penalty=-1.0, consistency_requires_both=both)
    grid, _, _ = table_to_grid(turns, PLAIN)
    assert shape_rewards(grid, config).tolist() == [expected]
    twice = pd.concat([turns, turns.assign(traj=1, subgoal="mug")])  # mug, mug: two firsts
    same = [[False, True, False, False, False], [False, True, True, True, True]]
    assert table_to_grid(twice, PLAIN)[0].same_subgoal.tolist() == same


@pytest.mark.parametrize("number", [0.0, 0.1, -12.3, 1e6 / 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (90, 31)])
def test_whitening_an_all_equal_level_gives_zero(number, shape):
    """Rounding in the mean, divided by 1e-8, would not be small."""
    zero, equal = torch.zeros(shape), torch.full(shape, number)
    grid = TurnGrid.of(reward=zero, switch=zero)
    credit = hae(grid, Values(zero, zero, zero, zero[:, 0]), PLAIN)
    high = torch.where(grid.boundary, equal, 0)
    white = whiten(credit._replace(high=high, low=equal, switch=equal), grid)
    for level in (white.high, white.low, white.switch):
        assert torch.equal(level, zero)


def test_whitening_statistics():
    grid, values, real = random_grid(10, traj=20)
    credit = estimate(grid, values, replace(PLAIN, whiten=True))
    owning = grid.boundary & real & grid.has_subgoal
    for level, counted in ((credit.low, real), (credit.switch, real), (credit.high, owning)):
        assert level[counted].mean().item() == pytest.approx(0, abs=1e-9)
        assert level[counted].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    plain = estimate(grid, values, PLAIN)
    assert torch.equal(credit.target_low, plain.target_low)


def test_whitening_where_no_boundary_owns_a_subgoal():
    grid, values, _ = random_grid(11)
    grid = grid._replace(has_subgoal=torch.zeros_like(grid.has_subgoal))
    credit = estimate(grid, values, replace(PLAIN, whiten=True))
    assert torch.equal(credit.high, estimate(grid, values, PLAIN).high)


def test_no_gradient_flows_through_credit():
    grid, values, _ = random_grid(12)
    values = Values(*(v.clone().requires_grad_() for v in values))
    for estimator in ESTIMATORS:
        credit = estimate(grid, values, replace(CreditConfig.upstream(), estimator=estimator))
        assert not any(x.requires_grad for x in credit)


def test_segment_index():
    boundary = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert segment_index(boundary).tolist() == [[0, 0, 0, 1, 2], [0, 1, 1, 1, 1]]


# -------------------------------------------------------------------------------- the table


def log(seed=0, count=6):
    return reference.to_frame(reference.random_trajectories(seed, count))


def test_any_row_order_index_and_name():
    turns = log()
    names = ["a", 7, ("run", 3), frozenset({"b"}), 2.5, "c"]
    expected = credit_table(turns, CreditConfig.lab())
    shuffled = turns.assign(traj=turns["traj"].map(dict(enumerate(names))))
    shuffled = shuffled.sample(frac=1, random_state=0)
    table = credit_table(shuffled, CreditConfig.lab())
    assert table.index.equals(shuffled.index)
    pd.testing.assert_frame_equal(table.sort_index(), expected, **CLOSE)
    repeated = shuffled.set_index(pd.Index(["same"] * len(turns)))
    pd.testing.assert_frame_equal(
        credit_table(repeated, CreditConfig.lab()).reset_index(drop=True),
        table.reset_index(drop=True),
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_turn_and_batch_order_do_not_matter(estimator):
    config, turns = replace(CreditConfig.lab(), estimator=estimator), log(2, 12)
    shuffled = turns.sample(frac=1, random_state=2)
    table = credit_table(shuffled, config)
    pd.testing.assert_frame_equal(table.sort_index(), credit_table(turns, config), **CLOSE)


def test_table_leaves_its_input_alone_and_takes_extra_columns():
    turns = log().assign(action="look")
    before = turns.copy(deep=True)
    credit_table(turns, CreditConfig.upstream())
    pd.testing.assert_frame_equal(turns, before)


def test_table_and_grid_agree():
    turns = log(1).sample(frac=1, random_state=1)
    grid, values, cell = table_to_grid(turns, PLAIN)
    credit = estimate(grid, values, CreditConfig.lab())
    table = credit_table(turns, CreditConfig.lab())
    np.testing.assert_array_equal(credit.low[cell].numpy(), table["adv_low"])
    np.testing.assert_array_equal(grid.reward[cell].numpy(), turns["reward"])
    np.testing.assert_array_equal(values.final[cell[0]].numpy(), turns["v_final"])


def test_subgoals_as_text_ids_or_arrays():
    config = replace(CreditConfig.upstream(), whiten=False)
    turns = four_turns([0, 0, 0, 10], True)
    expected = credit_table(turns, config)
    for convert in (tuple, np.array, torch.tensor, lambda ids: "abc"[ids[0] - 7]):
        table = credit_table(turns.assign(subgoal=turns["subgoal"].map(convert)), config)
        pd.testing.assert_frame_equal(table, expected)


@pytest.mark.parametrize("nothing", ["", [], (), None, np.nan, np.array([]), pd.NA])
def test_no_subgoal(nothing):
    turns = four_turns([0, 0, 0, 10], True)
    turns["subgoal"] = pd.Series(["cup", "cup", nothing, nothing], dtype=object)
    grid, _, _ = table_to_grid(turns, PLAIN)
    assert grid.has_subgoal.tolist() == [[True, True, False, False]]


def test_columns_of_other_dtypes():
    turns = four_turns([0, 0, 0, 10], True)
    expected = credit_table(turns, PLAIN)
    other = turns.astype({"switch": int, "done": "boolean", "valid": object, "reward": "Int64",
                          "v_low": "float32", "turn": float, "v_high": "Float64"})  # fmt: skip
    pd.testing.assert_frame_equal(credit_table(other, PLAIN), expected)


def test_only_cut_trajectories_need_v_final():
    done = four_turns([0, 0, 0, 10], True)
    config = replace(PLAIN, truncation="final_state")
    expected = credit_table(done, config)
    pd.testing.assert_frame_equal(credit_table(done.assign(v_final=np.nan), config), expected)
    cut = four_turns([0, 0, 0, 10], False)
    credit_table(cut, PLAIN)
    for blind in (cut, cut.assign(v_final=np.nan), cut.assign(v_final=[1.0, 1, 1, np.nan])):
        with pytest.raises(ValueError, match=r"'a'.*no v_final: give their last row v_final"):
            credit_table(blind, config)
    given_last = credit_table(cut.assign(v_final=[np.nan, np.nan, np.nan, 2.0]), config)
    assert given_last["adv_low"].iloc[3] == 10 + 2 - 5


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t.drop(columns="v_low"), r"no column \['v_low'\], expected"),
        (lambda t: t.drop(columns=["done", "v_switch"]), r"no column \['done', 'v_switch'\]"),
        (lambda t: t.iloc[:0], "no rows"),
        (lambda t: t.assign(traj=[None, "a", "a", "a"]), "rows without traj"),
        (lambda t: pd.concat([t, t.iloc[[3]]]), "turn 3 of trajectory 'a' occurs more than once"),
        (lambda t: t.iloc[[0, 1, 3]], "turn 3 of trajectory 'a' leaves a gap"),
        (lambda t: t.assign(turn=t["turn"] + 1), "turn 1 of trajectory 'a' leaves a gap"),
        (lambda t: t.assign(turn=t["turn"] - 1), "turn -1 of trajectory 'a' leaves a gap"),
        (lambda t: t.assign(turn=t["turn"] / 2), "turn 0.5 of trajectory 'a' leaves a gap"),
        (lambda t: t.assign(done=[False, True, False, True]), "turn 1 of trajectory 'a' has done"),
        (lambda t: t.assign(reward=[0, np.nan, 0, 1]), "reward is nan at index 1, expected"),
        (lambda t: t.assign(v_high=[0, 0, np.inf, 1]), "v_high is inf at index 2"),
        (lambda t: t.assign(v_switch=["x", 0, 0, 1]), "v_switch is 'x' at index 0"),
        (lambda t: t.assign(v_final=["x"] * 4), "v_final is 'x' at index 3"),
        (lambda t: t.assign(switch=["KEEP"] * 4), "switch is 'KEEP' at index 0, expected True"),
        (lambda t: t.assign(valid=[True, None, True, True]), "valid is None at index 1"),
    ],
)
def test_table_errors(spoil, message):
    with pytest.raises(ValueError, match=message):
        credit_table(spoil(four_turns([0, 0, 0, 10], True)), PLAIN)


# ------------------------------------------------------------------------------- explanation


@settings(deadline=None, max_examples=100)
@given(seeds, configs, st.sampled_from(LEVELS), st.data())
def test_explanations_add_up(seed, config, level, data):
    """To the advantage that `estimate` gives, at any turn and level."""
    grid, values, real = random_grid(seed, traj=4, turn=5)
    decided = real & grid.boundary if level == "high" else real
    traj, turn = data.draw(st.sampled_from(decided.nonzero().tolist()))
    terms = explain(grid, values, config, traj, turn, level)
    advantage = float(getattr(estimate(grid, values, config), level)[traj, turn])
    assert terms["contribution"].sum() == pytest.approx(advantage, abs=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_explanations_of_single_precision_and_large_batches(estimator):
    grid, values, _ = random_grid(1, traj=1100, turn=6)  # so many that estimate loops over columns
    config = replace(CreditConfig.upstream(), estimator=estimator)
    single = grid._replace(reward=grid.reward.float()), Values(*(v.float() for v in values))
    terms = explain(*single, config, 7, 0, "switch")
    advantage = float(estimate(*single, config).switch[7, 0])
    assert terms["contribution"].sum() == pytest.approx(advantage, abs=1e-5)


def test_explanation_by_hand():
    """Two segments, γ = λ_high = λ_B = ½, λ_low = 1; the second is cut: every kind of term."""
    grid = TurnGrid.of(reward=[[1.0, 0.0, 4.0]], switch=[[1, 0, 1]], terminated=False)
    grid = grid._replace(valid=torch.tensor([[True, False, True]]))
    values = Values(*torch.tensor([[[3.0, 9, 5]], [[2, 7, 6]], [[1, 8, 9]]]), torch.tensor([8.0]))
    config = CreditConfig(0.5, lam_low=1.0, lam_high=0.5, lam_boundary=0.5, invalid_penalty=0.1)

    def rows(turn, level):
        return explain(grid, values, config, 0, turn, level).drop(columns="contribution").values

    # r₀ + ½ r₁ + ¼ (½ V_high₂ + ½ (r₂ + ½ V_final)) − V_low₀
    assert rows(0, "low").tolist() == [
        ["reward", "reward", 0, 1.0, 1.0],
        ["invalid penalty", "penalty", 1, 0.5, -0.1],
        ["reward", "reward", 2, 0.125, 4.0],
        ["V_high", "bootstrap", 2, 0.125, 5.0],
        ["V_final", "bootstrap", 3, 0.0625, 8.0],
        ["V_low", "baseline", 0, -1.0, 2.0],
    ]
    # the same with λ_high for λ_B, and its own baseline
    assert rows(0, "high")[-1].tolist() == ["V_high", "baseline", 0, -1.0, 3.0]
    assert rows(2, "switch").tolist() == [
        ["reward", "reward", 2, 1.0, 4.0],
        ["V_final", "bootstrap", 3, 0.5, 8.0],
        ["V_switch", "baseline", 2, -1.0, 9.0],
    ]


def test_explanation_of_a_comparison():
    grid = TurnGrid.of(reward=[[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]], switch=[[1, 0]] * 3)
    grid = grid._replace(group=torch.zeros(3).long(), state=torch.tensor([[5, 6], [5, 7], [5, 6]]))
    values = Values(*torch.zeros(3, 3, 2), torch.zeros(3))
    config = CreditConfig(1.0, estimator="gigpo", group_std=False, step_weight=0.5)
    terms = explain(grid, values, config, 0, 1, "low")
    assert terms["term"].tolist() == [
        "reward", "mean return of the group", "mean return from this state"
    ]  # fmt: skip
    assert terms["coefficient"].tolist() == [1.5, -1.0, -0.5]
    assert terms["value"].tolist() == [1.0, 1.0, 1.0]
    assert terms["turn"].isna().tolist() == [False, True, True]
    alone = explain(grid, values, config, 1, 1, "low")  # nobody else saw state 7
    assert alone["contribution"].tolist() == [-1.0, 0.0]


def test_coefficients_are_what_a_change_changes():
    grid, values, _ = random_grid(3, traj=2, turn=8)
    grid = grid._replace(length=torch.tensor([8, 8]), reward=torch.rand(2, 8).double())
    values = Values(*torch.rand(3, 2, 8).double(), values.final)
    before = hae(grid, values, CreditConfig.lab()).low[0, 0]
    terms = explain(grid, values, CreditConfig.lab(), 0, 0, "low")
    more = grid.reward.clone()
    more[0, 3] += 1
    changed = hae(grid._replace(reward=more), values, CreditConfig.lab()).low[0, 0] - before
    expected = terms.query("term == 'reward' and turn == 3")["coefficient"].item()
    assert changed.item() == pytest.approx(expected)


def test_explain_a_table():
    turns = log(5).assign(traj=lambda t: "run " + t["traj"].astype(str))
    shuffled = turns.sample(frac=1, random_state=0)
    table = credit_table(turns, CreditConfig.lab())
    row = turns.index[(turns["traj"] == "run 4") & (turns["turn"] == 1)][0]
    terms = explain_table(shuffled, CreditConfig.lab(), "run 4", 1, "low")
    assert terms["contribution"].sum() == pytest.approx(table["adv_low"][row])


@pytest.mark.parametrize(
    "where, message",
    [
        ((0, 0, "term"), r"level is 'term', expected one of \('high', 'low', 'switch'\)"),
        ((2, 0, "low"), "traj is 2, expected 0 to 1"),
        ((0, 3, "low"), "turn is 3, expected 0 to 2"),
        ((0, -1, "low"), "turn is -1, expected 0 to 2"),
        ((0, 1, "high"), "turn 1 kept its subgoal, expected a boundary for level 'high'"),
    ],
)
def test_explain_errors(where, message):
    grid = TurnGrid.of(reward=torch.zeros(2, 3), switch=[[0, 0, 1]] * 2)
    values = Values(*torch.zeros(3, 2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        explain(grid, values, PLAIN, *where)
    with pytest.raises(ValueError, match="traj is 'b', expected one of the 1 in the table"):
        explain_table(four_turns([0, 0, 0, 1], True), PLAIN, "b", 0, "low")


def test_per_token():
    grid, values, real = random_grid(4)
    credit = estimate(grid, values, PLAIN)
    traj, turn = cell = tuple(real.nonzero()[torch.randperm(int(real.sum()))].T)
    level = torch.randint(0, 4, (len(traj), 9), dtype=torch.int8)
    tokens = per_token(credit, cell, level)
    for row, column in ((0, 0), (3, 5), (len(traj) - 1, 8)):
        k = int(level[row, column])
        expected = 0.0 if k == 3 else getattr(credit, LEVELS[k])[traj[row], turn[row]].item()
        assert tokens[row, column].item() == pytest.approx(expected)
    assert tokens.dtype == torch.float32 and (tokens[level == 3] == 0).all()


# -------------------------------------------------------------------------------- the config


def test_fields():
    assert [f.name for f in fields(CreditConfig)] == [
        "gamma", "lam_low", "lam_high", "lam_boundary", "lam_schedule", "boundary_value",
        "estimator",
        "switch_advantage", "truncation", "keep_penalty", "keep_penalty_mode", "invalid_penalty",
        "consistency_penalty", "consistency_requires_both", "whiten",
        "gae_value", "group_std", "step_weight", "anchor_similarity",
    ]  # fmt: skip


def test_presets():
    paper, lab, upstream = CreditConfig.paper(), CreditConfig.lab(), CreditConfig.upstream()
    assert paper.lam_boundary == upstream.lam_boundary == 0 < lab.lam_boundary
    assert paper.switch_advantage == "value" and upstream.switch_advantage == "return"
    assert paper.truncation == lab.truncation == "final_state"
    assert upstream.truncation == "own_state" and upstream.whiten and not paper.whiten
    for method in (paper, lab):
        assert method.keep_penalty == method.invalid_penalty == method.consistency_penalty == 0
    assert (upstream.keep_penalty, upstream.invalid_penalty) == (-0.3, 0.1)
    assert lab == CreditConfig() and hash(lab) == hash(CreditConfig())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gamma": 0.0}, r"gamma is 0.0, expected a number in \(0, 1\]"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": "0.9"}, "gamma is '0.9'"),
        ({"gamma": True}, "gamma is True"),
        ({"lam_low": -0.1}, r"lam_low is -0.1, expected a number in \[0, 1\]"),
        ({"lam_high": 1.1}, "lam_high is 1.1"),
        ({"lam_boundary": None}, "lam_boundary is None"),
        ({"estimator": "ppo"}, "estimator is 'ppo', expected 'hae' or 'gae' or 'monte_carlo'"),
        ({"gae_value": "low"}, "gae_value is 'low', expected 'high' or 'switch'"),
        ({"group_std": None}, "group_std is None, expected True or False"),
        ({"step_weight": -1}, "step_weight is -1, expected a number at least 0"),
        ({"anchor_similarity": 0}, r"anchor_similarity is 0, expected a number in \(0, 1\]"),
        ({"switch_advantage": "paper"}, "expected 'return' or 'value'"),
        ({"truncation": ["zero"]}, "truncation is"),
        ({"keep_penalty": 0.3}, "keep_penalty is 0.3, expected a number at most 0"),
        ({"keep_penalty_mode": "fixed"}, "expected 'per_turn' or 'ratio'"),
        ({"invalid_penalty": -0.1}, "invalid_penalty is -0.1, expected a number at least 0"),
        ({"consistency_penalty": float("-inf")}, "consistency_penalty is -inf"),
        ({"whiten": 1}, "whiten is 1, expected True or False"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CreditConfig.lab(), **change)


def test_whole_numbers_are_numbers():
    config = CreditConfig(gamma=1, lam_low=np.float32(0.5), keep_penalty=np.int64(-1))
    assert (config.gamma, config.lam_low, config.keep_penalty) == (1.0, 0.5, -1.0)
    assert {type(config.gamma), type(config.lam_low), type(config.keep_penalty)} == {float}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["reward", "high", "low", "switch", "final"])
def test_a_number_that_is_none_is_refused_by_name(name, bad):
    grid, values, _ = random_grid(13)
    grid = grid._replace(terminated=torch.zeros_like(grid.terminated))

    def spoil(x):
        x = x.clone()
        x[(2, 0) if x.ndim == 2 else 2] = bad
        return x

    if name == "reward":
        grid = grid._replace(reward=spoil(grid.reward))
    else:
        values = values._replace(**{name: spoil(getattr(values, name))})
    turn = int(grid.length[2]) - 1 if name == "final" else 0
    message = f"{name} is {bad} at turn {turn} of trajectory 2, expected a finite number"
    with pytest.raises(ValueError, match=message):
        estimate(grid, values, CreditConfig.lab())
    with pytest.raises(ValueError, match=message):
        explain(grid, values, CreditConfig.lab(), 0, 0, "low")
    if name != "reward":  # what is not read may be anything
        critic_free = CreditConfig(estimator="monte_carlo", truncation="zero")
        assert all(x.isfinite().all() for x in estimate(grid, values, critic_free))


def test_grid_errors():
    grid = TurnGrid.of(reward=[[0.0, 1.0]], switch=[[1, 0]])
    values = Values(*torch.zeros(3, 1, 2), torch.zeros(1))
    for estimator in (hae, gae):
        for length in (0, 3):
            with pytest.raises(ValueError, match=f"length {length}, expected 1 to 2"):
                estimator(grid._replace(length=torch.tensor([length])), values, PLAIN)
        with pytest.raises(ValueError, match="boundary is False at turn 0"):
            estimator(grid._replace(boundary=torch.zeros(1, 2, dtype=torch.bool)), values, PLAIN)
        with pytest.raises(ValueError, match=r"final has shape \(1, 1\), expected \(1,\)"):
            estimator(grid, values._replace(final=torch.zeros(1, 1)), PLAIN)
        with pytest.raises(ValueError, match=r"high has shape \(1, 1\), expected \(1, 2\)"):
            estimator(grid, values._replace(high=torch.zeros(1, 1)), PLAIN)
