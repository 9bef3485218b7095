"""Ground truth: continuations begin where the turn began, and the levels add up."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from hiper_lab import folder, truth
from hiper_lab.config import TrainConfig
from hiper_lab.credit import CreditConfig
from hiper_lab.rollout import collect, play
from hiper_lab.sampling import hf_sampler
from hiper_lab.train import set_up
from hiper_lab.worlds import make_envs

SETTINGS = {"max_turns": 6, "env_horizon": "short", "truncation": "zero"}


@pytest.fixture(scope="module")
def state():
    state = set_up(TrainConfig.from_parameters(SETTINGS))
    for head in (state.policy.heads.high, state.policy.heads.low, state.policy.heads.switch):
        torch.nn.init.normal_(head[-1].weight)  # a fresh head says 0 everywhere
    return state


@pytest.fixture(scope="module")
def sampler(state):
    return hf_sampler(state.policy, 1.0, torch.Generator().manual_seed(0))


def test_continuations_repeat_what_was_decided_in_the_very_same_state(state, sampler):
    config = state.config
    envs, names = make_envs(config, "train", 0, 2)
    for played in collect(sampler, state.codec, envs, config.rollout, names=names, seeds=[0, 0]):
        t = 3
        turn, made = played.turns[t], []
        for level, role in truth.DECISIONS.items():
            made = made + truth._chosen(turn, role)
            copies, _ = make_envs(config, "train", names.index(played.game), 8, 8)
            begun = truth._begin(copies, played, t, [made] * 8)
            for rest in play(sampler, state.codec, begun, config.rollout):
                first = rest.turns[0]
                assert first.prompt_ids == turn.prompt_ids and first.switch == turn.switch
                assert level == "switch" or first.subgoal == turn.subgoal
                assert level != "low" or first.response_ids == turn.response_ids
                if level == "low":  # the world is deterministic
                    seen = [*played.turns[t + 1 :], None][0]
                    after = rest.turns[1].observation if len(rest.turns) > 1 else None
                    assert after == (seen and seen.observation)
                assert len(rest.turns) <= config.max_turns - t  # the clock goes on


def test_levels_add_up_and_monte_carlo_has_no_bias(state):
    """Σ true advantages = Q_last − V; with λ 1 throughout only the baseline is the critic's."""
    credit = dataclasses.replace(state.config.credit, lam_low=1.0, lam_high=1.0, lam_boundary=1.0)
    flat = dataclasses.replace(credit, estimator="gae")
    rows = truth.measure(state, {"hae": credit, "flat": flat}, turns=3, rollouts=4, draws=6)
    for _, turn in rows.groupby("game"):
        hae, gae = (turn[turn.estimator == name] for name in ("hae", "flat"))
        assert hae.truth.sum() == pytest.approx(gae.expects.iloc[-1], abs=1e-12)
        assert gae.expects.to_numpy() == pytest.approx(np.cumsum(hae.truth.to_numpy()), abs=1e-12)
        assert (hae.expects == hae.truth).all() and (gae.draws == 6).all()
        # what a decision was worth is what the next one begins with
        assert hae.worth[1:].tolist() == pytest.approx((hae.worth + hae.truth)[:-1].tolist())
        assert (hae.value.to_numpy() == gae.value.to_numpy()).all() and hae.value.nunique() > 1
        # the same draws and returns: only the baselines differ, V_low or V_high
        low = turn[turn.level == "low"]
        assert low.variance.max() == pytest.approx(low.variance.min(), abs=1e-6)
    again = truth.measure(state, {"hae": credit, "flat": flat}, turns=3, rollouts=4, draws=6)
    pd.testing.assert_frame_equal(rows, again)


def test_errors_that_heads_share_are_found_through_the_noise_of_the_truth():
    rng = np.random.default_rng(0)
    common, own, noise = (rng.normal(0, s, (2, 4000)) for s in (0.2, 0.1, 0.3))
    rows = [
        pd.DataFrame({
            "game": [str(k) for k in range(4000)], "turn": 0, "level": level,
            "value": 0.5 + common[0] + own[k], "worth": 0.3 + noise[k], "worth_error": 0.3,
        })
        for k, level in enumerate(("switch", "low"))
    ]  # fmt: skip
    found = truth.head_errors(pd.concat(rows)).iloc[0]
    assert found.levels == "switch, low" and found.turns == 4000
    assert found.correlation == pytest.approx(0.2**2 / (0.2**2 + 0.1**2), abs=0.1)
    assert found["size of the first"] == pytest.approx(np.hypot(0.2, 0.1), abs=0.02)


def test_summary_by_hand():
    """Two decisions of worth ±0.3, estimated as +0.5 and +0.1 with standard deviation 0.1."""
    rows = pd.DataFrame({
        "level": "low", "estimator": "x", "truth": [0.3, -0.3], "error": [0.1, 0.1],
        "expects": [0.3, -0.3], "mean": [0.5, 0.1], "variance": 0.01, "draws": 10,
    })  # fmt: skip
    got = truth.summary(rows).iloc[0]
    assert got.signal == pytest.approx(0.3) and got.noise == pytest.approx(0.1)
    assert got.offset == pytest.approx(np.sqrt((0.2**2 + 0.4**2) / 2 - 0.01 / 10 - 0.1**2))
    assert got.slope == pytest.approx(2 / 3) and got.correlation == pytest.approx(1)
    # P(z > −5) and P(z > 1): the first is nearly always right, the second in 16% of the draws
    assert got.clear == 2 and got.signs == pytest.approx((1.0 + 0.1587) / 2, abs=1e-3)


@pytest.mark.parametrize(
    ("estimator", "why"),
    [
        (CreditConfig(gamma=0.98, estimator="grpo"), "grpo compares episodes"),
        (CreditConfig(gamma=0.9), "gamma is 0.9"),
        (CreditConfig(gamma=0.98, switch_advantage="value"), "'value'; expected 0.98"),
    ],
)
def test_what_can_not_be_measured_is_refused(state, estimator, why):
    with pytest.raises(ValueError, match=f"odd: .*{why}"):
        truth.measure(state, {"odd": estimator}, turns=1)


def test_the_arms_are_what_their_names_say_whatever_the_run_had():
    odd = {"lam_schedule": "critic", "whiten": True, "estimator": "gae", "lam_low": 0.3,
           "lam_high": 0.4, "lam_boundary": 0.1}  # fmt: skip
    found = truth.arms(TrainConfig.from_parameters(SETTINGS | odd))
    assert found == truth.arms(TrainConfig.from_parameters(SETTINGS))
    assert found["gae λ 0.8"].estimator == "gae" and found["gae λ 0.8"].lam_low == 0.8
    assert found["hae λ_B 0.5"].lam_boundary == 0.5 and found["hae λ_B 0.5"].lam_high == 0.95
    lab = CreditConfig.lab()
    lams = [(c.lam_low, c.lam_high, c.lam_boundary) for c in (found["hae lab"], lab)]
    assert lams[0] == lams[1]


def test_a_run_that_left_no_checkpoint_is_refused_and_left_alone(tmp_path, monkeypatch, capsys):
    folder.RunFolder(tmp_path, TrainConfig.from_parameters(SETTINGS))
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 0}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("sys.argv", ["truth", str(tmp_path)])
    with pytest.raises(SystemExit):
        truth.main()
    assert "has no checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
