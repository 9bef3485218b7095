"""The flat estimators by hand, by identity, and against what they must refuse."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_credit import CLOSE, PLAIN, assert_credit_equal, random_grid

from hiper_lab import flat
from hiper_lab.credit import CreditConfig, TurnGrid, Values, credit_table, estimate
from hiper_lab.flat import anchor_states, gae, gigpo, grpo, monte_carlo, rloo, rloo_rows, token_gae

GROUP_RELATIVE = (grpo, rloo, rloo_rows, gigpo)
ZERO = replace(CreditConfig.lab(), truncation="zero")


def episodes(*rewards, **columns):
    """One group of terminated episodes of possibly different lengths, without values."""
    length = torch.tensor([len(r) for r in rewards])
    reward = torch.zeros(len(rewards), int(length.max()), dtype=torch.float64)
    for row, r in zip(reward, rewards, strict=True):
        row[: len(r)] = torch.tensor(r)
    grid = TurnGrid.of(reward=reward, switch=torch.ones_like(reward))
    columns = {"group": torch.zeros(len(rewards)).long(), "length": length} | columns
    return grid._replace(**columns), Values(
        *torch.zeros(3, *reward.shape), torch.zeros(len(length))
    )


# --------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("truncation", ["final_state", "own_state", "zero"])
def test_monte_carlo_is_gae_with_lambda_one_without_its_baseline(truncation):
    grid, values, _ = random_grid(0)
    config = CreditConfig(gamma=0.9, lam_low=1.0, truncation=truncation)
    reward_to_go = monte_carlo(grid, values, config)
    with_critic = gae(grid, values, config)
    torch.testing.assert_close(reward_to_go.low, with_critic.target_low, **CLOSE)
    assert torch.equal(reward_to_go.low, reward_to_go.target_switch)


def test_gae_reads_the_critic_it_is_told_to():
    grid, values, _ = random_grid(1)
    seeing = gae(grid, values, replace(CreditConfig.lab(), gae_value="switch"))
    swapped = gae(grid, values._replace(high=values.switch), CreditConfig.lab())
    assert_credit_equal(seeing, swapped, rtol=0, atol=0)
    assert not torch.equal(seeing.low, gae(grid, values, CreditConfig.lab()).low)


def test_rloo_is_centred_grpo_scaled_by_n_over_n_minus_one():
    grid, values, _ = random_grid(2)  # three groups of two
    centred = grpo(grid, values, replace(ZERO, group_std=False))
    torch.testing.assert_close(rloo(grid, values, ZERO).low, 2 * centred.low, **CLOSE)


def test_group_advantages_sum_to_zero_over_trajectories_and_over_rows():
    grid, values, _ = random_grid(3, traj=8)
    for estimator in (grpo, rloo, rloo_rows):
        advantage = estimator(grid, values, ZERO).low[:, 0]
        weight = grid.length if estimator is rloo_rows else torch.ones_like(grid.length)
        for group in range(4):
            total = (weight * advantage)[grid.group == group].sum().item()
            assert total == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("std", [True, False])
def test_gigpo_without_shared_states_is_grpo(std):
    grid, values, real = random_grid(4)
    config = replace(ZERO, group_std=std)
    distinct = grid._replace(state=torch.arange(real.numel()).reshape(real.shape))
    expected = grpo(grid, values, config)
    assert_credit_equal(gigpo(distinct, values, config), expected, **CLOSE)
    without = gigpo(grid, values, replace(config, step_weight=0.0))
    assert_credit_equal(without, expected, **CLOSE)
    assert not torch.allclose(gigpo(grid, values, config).low, expected.low)


def test_states_of_different_groups_are_different():
    grid, values, _ = random_grid(5)
    apart = grid._replace(state=grid.state + 10 * grid.group[:, None])
    assert_credit_equal(gigpo(grid, values, ZERO), gigpo(apart, values, ZERO), rtol=0, atol=0)


@pytest.mark.parametrize("estimator", GROUP_RELATIVE)
def test_other_groups_do_not_matter(estimator):
    grid, values, _ = random_grid(6)
    other = torch.where(grid.group[:, None] == 0, grid.reward, 5 - grid.reward)
    credit = estimator(grid, values, ZERO)
    changed = estimator(grid._replace(reward=other), values, ZERO)
    assert torch.equal(credit.low[grid.group == 0], changed.low[grid.group == 0])


def test_rloo_is_unbiased_where_a_self_including_mean_is_not():
    """All batches of two coin flips, one for 1 and one for 0, P(1) = p: E[A · score] = p(1 − p)."""
    p, total = 0.3, {"rloo": 0.0, "grpo": 0.0}
    for first in (0.0, 1.0):
        for second in (0.0, 1.0):
            grid, values = episodes([first], [second])
            probability = np.prod([p if x else 1 - p for x in (first, second)])
            score = first - p  # of the first flip's logit
            for name in total:
                config = replace(ZERO, group_std=False)
                advantage = getattr(flat, name)(grid, values, config).low[0, 0].item()
                total[name] += probability * advantage * score
    assert total["rloo"] == pytest.approx(p * (1 - p))
    assert total["grpo"] == pytest.approx(p * (1 - p) / 2)


# ------------------------------------------------------------------------------------ by hand


def test_grpo_by_hand():
    """Returns 3, 1, 2, undiscounted whatever γ: mean 2, standard deviation 1."""
    grid, values = episodes([1.0, 2.0], [1.0], [0.0, 0.0, 2.0])
    credit = grpo(grid, values, replace(ZERO, gamma=0.5))
    low = [[1.0, 1, 0], [-1, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(credit.low, torch.tensor(low).double(), rtol=0, atol=2e-6)
    assert credit.target_low.tolist() == [[2.0, 2, 0], [1, 0, 0], [0.5, 1, 2]]


def test_rloo_by_hand():
    grid, values = episodes([1.0, 2.0], [1.0], [0.0, 0.0, 2.0])
    assert rloo(grid, values, ZERO).low[:, 0].tolist() == [3 - 1.5, 1 - 2.5, 2 - 2.0]
    # rows: 3 3 1 2 2 2, mean 13/6
    expected = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64) - 13 / 6
    torch.testing.assert_close(rloo_rows(grid, values, ZERO).low[:, 0], 6 / 5 * expected)


def test_gigpo_by_hand():
    """State 0 is seen three times: returns from it 1, 2 (the same episode later) and 0."""
    grid, values = episodes([0.0, 0.0, 4.0], [0.0], state=torch.tensor([[0, 1, 0], [0, 9, 9]]))
    credit = gigpo(grid, values, replace(ZERO, gamma=0.5, step_weight=0.5, group_std=False))
    # episodes 4, 0: ±2; from state 0: 1, 4, 0, mean 5/3
    expected = [[2 + (1 - 5 / 3) / 2, 2.0, 2 + (4 - 5 / 3) / 2], [-2 + (0 - 5 / 3) / 2, 0, 0]]
    torch.testing.assert_close(credit.low, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", GROUP_RELATIVE)
@pytest.mark.parametrize("reward", [0.0, -0.1, 0.7, 1e6 / 3])
def test_a_group_of_equals_gets_exactly_nothing(estimator, reward):
    """No success in the batch: rounding, divided by a standard deviation near 0, would be noise."""
    grid, values = episodes(*[[reward] * 3] * 7, state=torch.zeros(7, 3).long())
    grid = grid._replace(reward=grid.reward.float())
    credit = estimator(grid, values, replace(ZERO, step_weight=0.0))
    assert not credit.low.any() and not credit.high.any()


# --------------------------------------------------------------------------- anchors, refusals


def test_similar_texts_join_the_first_anchor_they_resemble():
    texts = ["abcd", "abce", "abfe", "abcd"]  # each differs from the next by one letter: 0.75
    assert anchor_states(texts, [0] * 4, 0.75) == [0, 0, 1, 0]
    assert anchor_states(texts, [0] * 4, 0.5) == [0, 0, 0, 0]
    assert anchor_states(texts, [0] * 4) == [0, 1, 2, 0]
    assert anchor_states(texts, [0, 1, 0, 1], 0.75) == [0, 1, 2, 1]
    with pytest.raises(ValueError, match=r"state is \(1, 2\), expected text, since"):
        anchor_states(["a", (1, 2)], [0, 0], 0.9)


def turns_of_two(**columns):
    trajectories = reference.random_trajectories(0, 2, longest=3)
    return reference.to_frame(trajectories).assign(**columns)


def test_groups_and_states_are_read_only_where_they_are_compared():
    credit_table(turns_of_two(group=None, state=None), CreditConfig.lab())
    critic_free = turns_of_two().drop(columns=["v_high", "v_low", "v_switch", "v_final"])
    credit_table(critic_free, replace(ZERO, estimator="gigpo"))
    seen = turns_of_two()["state"].map(lambda text: np.array([len(text)]))
    credit_table(turns_of_two(state=seen), replace(CreditConfig.lab(), estimator="gigpo"))


@pytest.mark.parametrize(
    "change, spoil, message",
    [
        ({"estimator": "grpo"}, lambda t: t.drop(columns="group"), r"no column \['group'\]"),
        ({"estimator": "gigpo"}, lambda t: t.drop(columns="state"), r"no column \['state'\]"),
        ({"estimator": "gae"}, lambda t: t.drop(columns="v_high"), r"no column \['v_high'\]"),
        ({"estimator": "gae", "gae_value": "switch"}, lambda t: t.drop(columns="v_switch"),
         r"no column \['v_switch'\]"),
        ({"estimator": "rloo", "truncation": "own_state"}, lambda t: t.drop(columns="v_high"),
         r"no column \['v_high'\]"),
        ({"estimator": "rloo"}, lambda t: t.assign(group=t["traj"]),
         "trajectory 0 is alone in group 0, expected at least two"),
        ({"estimator": "rloo"}, lambda t: t.assign(group=range(len(t))),
         "group is .* in trajectory .*, expected one and the same in all its turns"),
        ({"estimator": "rloo"}, lambda t: t.assign(group=None), "group is None in trajectory 0"),
        ({"estimator": "gigpo"}, lambda t: t.assign(state=None), "state is None at index 0"),
    ],
)  # fmt: skip
def test_table_errors(change, spoil, message):
    with pytest.raises(ValueError, match=message):
        credit_table(spoil(turns_of_two()), replace(CreditConfig.lab(), **change))


def test_grid_errors():
    grid, values, _ = random_grid(7)
    for name in ("grpo", "rloo", "rloo_rows", "gigpo"):
        config = replace(ZERO, estimator=name)
        with pytest.raises(ValueError, match=f"{name} compares .* but the grid has no group"):
            estimate(grid._replace(group=None), values, config)
        alone = grid._replace(group=torch.tensor([0, 1, 0, 1, 5, 0]))
        with pytest.raises(ValueError, match="trajectory 4 is alone in its group"):
            estimate(alone, values, config)
    with pytest.raises(ValueError, match="the grid has no state"):
        estimate(grid._replace(state=None), values, replace(ZERO, estimator="gigpo"))
    with pytest.raises(ValueError, match=r"group has shape \(2,\), expected \(6,\)"):
        grpo(grid._replace(group=torch.tensor([0, 0])), values, PLAIN)


# --------------------------------------------------------------------------------------- tokens


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.booleans(),
)
def test_token_gae_equals_the_reference(seed, gamma, lam, whiten):
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 13, (7,), generator=g)
    real = torch.arange(12) < length[:, None]
    value = torch.randn(7, 12, generator=g, dtype=torch.float64)
    score = torch.randn(7, generator=g, dtype=torch.float64)
    config = CreditConfig(gamma=gamma, lam_low=lam, whiten=whiten)
    credit = token_gae(score, torch.where(real, value, torch.nan), length, config)
    rows = reference.token_gae(score.tolist(), value.tolist(), length.tolist(), config)
    expected = torch.tensor([x for row in rows for x in row[0]], dtype=torch.float64)
    if whiten:
        expected = (expected - expected.mean()) / (expected.std(correction=0) + 1e-8)
    torch.testing.assert_close(credit.advantage[real], expected, rtol=1e-8, atol=1e-8)
    target = torch.tensor([x for row in rows for x in row[1]], dtype=torch.float64)
    torch.testing.assert_close(credit.target[real], target, **CLOSE)
    assert not credit.advantage[~real].any() and not credit.target[~real].any()


def test_token_gae_with_lambda_one_is_score_minus_value():
    value = torch.rand(3, 5)
    credit = token_gae(torch.ones(3), value, torch.tensor([5, 5, 5]), CreditConfig(1.0, 1.0))
    torch.testing.assert_close(credit.advantage, 1 - value)


def test_token_gae_errors():
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"has length {length}, expected 1 to 3 tokens"):
            token_gae(torch.zeros(2), torch.zeros(2, 3), torch.tensor([1, length]), ZERO)
