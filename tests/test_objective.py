"""The gradient: PPO terms by hand, only choices are trained, micro-batches add up exactly."""

import pytest
import torch
from test_sampling import make_policy, play

from hiper_lab import objective, trajectory
from hiper_lab.credit import LEVELS, Credit, CreditConfig, Values, estimate
from hiper_lab.objective import Batch, PPOConfig
from hiper_lab.policy import Scores
from hiper_lab.protocol import Role


def by_hand(advantage, ratio, reference=None):
    n = len(advantage)
    old = torch.full((n,), -1.0)
    now = old + torch.tensor(ratio).log()
    zeros = torch.zeros(n, dtype=torch.long)
    empty = torch.zeros(1, 3)
    batch = Batch(
        ids=torch.zeros(1, 1, dtype=torch.long), row=zeros, at=zeros, token=zeros,
        role=torch.full((n,), int(Role.ACTION)), allowed=None, logprob_old=old,
        logprob_reference=old if reference is None else torch.tensor(reference),
        advantage=torch.tensor(advantage), value_at=zeros[:1, None].expand(1, 3), value_old=empty,
        target=empty, value_trained=empty.bool(),
    )  # fmt: skip
    return batch, Scores(now, torch.full((n,), 0.5))


def test_clip_and_dual_clip_by_hand():
    batch, now = by_hand([1.0, 1.0, -1.0, -1.0, -1.0], [1.5, 0.5, 0.5, 1.5, 9.0])
    loss, logged = objective.policy_loss(batch, now, PPOConfig(clip=0.2, dual_clip=3.0))
    # −min(ρA, clip(ρ)A):  −1.2, −0.5, +0.8, +1.5, and 9 bounded by 3
    assert loss.item() == pytest.approx(-1.2 - 0.5 + 0.8 + 1.5 + 3.0)
    assert logged["policy/clip_fraction"] == (5, 5)
    assert logged["policy/entropy_action"] == (2.5, 5) and logged["policy/entropy_switch"] == (0, 0)


def test_kl_and_entropy_by_hand():
    batch, now = by_hand([0.0, 0.0], [1.0, 1.0], reference=[-1.0, 0.0])
    loss, logged = objective.policy_loss(batch, now, PPOConfig(kl_coef=0.1, entropy_coef=0.01))
    k3 = 2.718282 - 1 - 1  # e^d − d − 1 at d = 1, and 0 at d = 0
    assert logged["policy/kl_k3"][0] == pytest.approx(k3, abs=1e-5)
    assert logged["policy/kl_action"] == logged["policy/kl_k3"]  # all tokens are of actions here
    assert logged["policy/kl_switch"] == (0, 0)
    assert loss.item() == pytest.approx(0.1 * k3 - 0.01 * 1.0, abs=1e-5)


def test_value_loss_by_hand():
    batch, _ = by_hand([0.0], [1.0])
    batch = batch._replace(
        value_old=torch.tensor([[0.0, 0.0, 0.0]]), target=torch.tensor([[1.0, 1.0, 1.0]]),
        value_trained=torch.tensor([[True, True, False]]),
    )  # fmt: skip
    now = torch.tensor([[0.9, 0.2, 7.0]])
    # 0.9 moved further than 0.5 from its old value: the clipped error (0.5 − 1)² is the larger one
    assert objective.value_loss(batch, now, 0.5).tolist() == pytest.approx([0.25, 0.64, 0.0])


def packed(advantage=1.0):
    policy = make_policy("tiny", critic="separate")
    codec, played = play(policy, count=3)
    samples = objective.pack(played, codec, "guided", 16)
    for k, sample in enumerate(samples):
        sample.advantage = [advantage * (k + 1), -advantage, advantage / 2]
    return policy, played, samples


def policy_gradient(policy, samples, tokens):
    policy.zero_grad()
    for index in objective.micro_batches([len(s.ids) for s in samples], tokens):
        batch = objective.collate([samples[i] for i in index], policy.device)
        now = objective.read_scores(policy, batch, policy.hidden(batch.ids), 1.0)
        objective.policy_loss(batch, now, PPOConfig())[0].backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def test_micro_batches_add_up_to_the_batch():
    policy, _, samples = packed()
    whole, split = policy_gradient(policy, samples, 10**6), policy_gradient(policy, samples, 300)
    assert whole.abs().max() > 0 and torch.allclose(whole, split, atol=1e-4 * whole.abs().max())


def test_a_token_gets_the_credit_of_its_role_and_nothing_else_is_trained():
    policy, played, samples = packed()
    batch = objective.collate(samples, policy.device)
    turns = [turn for t in played for turn in t.turns]
    level = {Role.SWITCH: "switch", Role.SUBGOAL: "high", Role.ACTION: "low"}
    expected, tokens = [], []
    for sample, turn in zip(samples, turns, strict=True):
        for token, role, chosen in zip(turn.response_ids, turn.roles, turn.chosen, strict=True):
            if chosen:
                expected.append(sample.advantage[LEVELS.index(level[Role(role)])])
                tokens.append(token)
    assert batch.advantage.tolist() == pytest.approx(expected)
    assert batch.token.tolist() == tokens  # exactly the sampled tokens, none of a prompt
    assert len(set(batch.role.tolist())) == 3


def test_zero_credit_is_zero_gradient():
    policy, _, samples = packed(advantage=0.0)
    assert policy_gradient(policy, samples, 10**6).abs().max() == 0


def test_assign_reads_the_grid_by_trajectory_and_turn():
    _, played, samples = packed()
    grid = trajectory.to_grid(played)
    shape = grid.reward.shape
    stamp = torch.arange(shape[0])[:, None] * 100.0 + torch.arange(shape[1])
    credit = Credit(stamp, stamp + 0.1, stamp + 0.2, stamp + 0.3, stamp + 0.4, stamp + 0.5)
    values = Values(stamp + 0.6, stamp + 0.7, stamp + 0.8, torch.zeros(shape[0]))
    objective.assign(samples, played, values, credit, high_everywhere=False)
    spots = [(b, t) for b, tr in enumerate(played) for t in range(len(tr.turns))]
    for sample, (b, t) in zip(samples, spots, strict=True):
        at = 100.0 * b + t
        assert sample.advantage == pytest.approx([at, at + 0.1, at + 0.2], abs=1e-4)
        assert sample.target == pytest.approx([at + 0.3, at + 0.4, at + 0.5], abs=1e-4)
        assert sample.value_old == pytest.approx([at + 0.6, at + 0.7, at + 0.8], abs=1e-4)
        assert sample.train_high == bool(grid.boundary[b, t])


def test_the_papers_switch_baseline_is_the_mixture():
    """V_switch = β V_high + (1 − β) V_low(s, g_prev), with V_low of the kept subgoal."""
    policy = make_policy("tiny", critic="separate")
    codec, played = play(policy, count=4, max_turns=10)
    samples = objective.pack(played, codec, "guided", 16)
    values = objective.evaluate(policy, played, samples, 4096)
    mixed = objective.mix_switch_values(policy, codec, played, values, 4096)
    grid = trajectory.to_grid(played)
    credit = estimate(grid, mixed, CreditConfig.paper())
    checked = 0
    for b, tr in enumerate(played):
        assert mixed.switch[b, 0] == values.high[b, 0] and credit.switch[b, 0] == 0
        for t, turn in enumerate(tr.turns[1:], 1):
            (i,) = [k for k, c in enumerate(turn.chosen) if c and turn.roles[k] == Role.SWITCH]
            p = torch.tensor(turn.logprobs[i]).exp()
            if turn.switch:  # what V_low would have been had it kept: replayed as a KEEP turn
                kept = codec.write(False, tr.turns[t - 1].subgoal, "look")
                action = len(kept) - len(codec.encode("look")) - len(codec.skeleton[3])
                ids = torch.tensor([[*turn.prompt_ids, *kept[:action]]])
                low = policy.heads("low", policy.hidden(ids, "critic")[0, -1:])[0]
                checked += 1
            else:
                low, p = values.low[b, t], 1 - p
            expected = p * values.high[b, t] + (1 - p) * low
            assert mixed.switch[b, t].item() == pytest.approx(expected.item(), abs=1e-4)
            q = float(turn.switch)
            advantage = (q - p) * (values.high[b, t] - low)
            assert credit.switch[b, t].item() == pytest.approx(advantage.item(), abs=1e-4)
    assert checked > 3


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="clip is 0.0, expected more than 0"):
        PPOConfig(clip=0.0)
    with pytest.raises(ValueError, match="kl_coef is -1.0, expected at least 0"):
        PPOConfig(kl_coef=-1.0)
