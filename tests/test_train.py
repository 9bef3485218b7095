"""The loop: exact resume, honest limits, every critic and reference, parameters checked."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hiper_lab import train, trajectory, worlds
from hiper_lab.config import TrainConfig
from hiper_lab.credit import CreditConfig
from hiper_lab.envs.games import HORIZONS, generate_game
from hiper_lab.folder import RunFolder, save_checkpoint, sole_writer

SMALL = {
    "iterations": 3, "episodes": 8, "max_turns": 8, "warmup_iterations": 1, "eval_games": 3,
    "rollout_every": 1, "minibatch_turns": 8, "env_tasks": ["pick_and_place_simple"],
}  # fmt: skip


def small(**changes):
    return TrainConfig.from_parameters(SMALL | changes)


def stable(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith("time/")}


def weights(folder, iteration):
    return load_file(folder / "checkpoints" / f"{iteration:06d}" / "weights.safetensors")


def test_resume_after_a_kill_is_bit_exact(tmp_path, monkeypatch):
    whole = [stable(r.metrics) for r in train.train(small(), tmp_path / "whole")]
    assert [m["iteration"] for m in whole] == [0, 1, 2, 3]
    assert whole[3]["policy/grad_norm"] > 0  # it learns, so there is something to repeat

    # killed in the middle of iteration 2's update, with half a line of metrics written
    cut, real, calls = tmp_path / "cut", train._minibatch, []

    def dying(state, *args):
        calls.append(state.iteration)
        if state.iteration == 1 and calls.count(1) == 2:
            raise KeyboardInterrupt
        real(state, *args)

    monkeypatch.setattr(train, "_minibatch", dying)
    with pytest.raises(KeyboardInterrupt):
        list(train.train(small(), cut))
    monkeypatch.undo()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "rollout/su')
    rest = [stable(r.metrics) for r in train.train(small(), cut)]
    assert [m["iteration"] for m in rest] == [2, 3]
    assert rest == whole[2:]
    lines = [json.loads(s) for s in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [stable(m) for m in lines] == whole
    a, b = weights(tmp_path / "whole", 3), weights(cut, 3)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert list(train.train(small(), cut)) == []  # finished: nothing left to do
    records = [
        (tmp_path / d / "rollouts" / "000003.jsonl.gz").read_bytes() for d in ("whole", "cut")
    ]
    assert records[0] == records[1]


def test_same_seed_same_run_other_seed_other_run():
    def run(seed):
        return [stable(r.metrics) for r in train.train(small(seed=seed, iterations=1))]

    assert run(0) == run(0) != run(1)


def test_horizons_ask_for_plans_of_their_length():
    for horizon, turns in HORIZONS.items():
        config = small(env_horizon=horizon, env_tasks=[], max_turns=24)
        envs, _ = train.make_envs(config, "unseen", 0, 3)
        plans = [generate_game(k, split="unseen", turns=turns)["walkthrough"] for k in range(3)]
        assert all(len(plan) in turns for plan in plans)
        for env, plan in zip(envs, plans, strict=True):
            env.reset()
            assert [env.step(command)[2] for command in plan] == [False] * (len(plan) - 1) + [True]
    with pytest.raises(ValueError, match="env_horizon is 'far', expected one of .*'long'"):
        small(env_horizon="far")


def test_an_incomplete_checkpoint_does_not_count(tmp_path, monkeypatch):
    list(train.train(small(iterations=1), tmp_path))
    state = train.set_up(small(iterations=1))
    state.iteration = 2

    def full(*_):
        raise OSError("could not write: No space left on device")

    monkeypatch.setattr(trajectory, "write_atomic", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(state, tmp_path / "checkpoints" / "000002")
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*"))[-1] == "000001"
    RunFolder(tmp_path, small(iterations=1)).restore(state)
    assert state.iteration == 1


def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_used(tmp_path):
    whole = [stable(r.metrics) for r in train.train(small(), tmp_path)]
    newest = tmp_path / "checkpoints" / "000003"

    def cut(name, folder=newest, at=0.5):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * at)])

    for name in ("weights.safetensors", "optimizer.safetensors", "progress.json"):
        cut(name)
        with pytest.warns(UserWarning, match="000003 is damaged and left out"):
            rest = list(train.train(small(), tmp_path))
        assert [stable(r.metrics) for r in rest] == whole[3:]
    (newest / "weights.safetensors").unlink()
    cut("weights.safetensors", newest.with_name("000002"), at=0)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no checkpoint in .* can be"):
        next(train.train(small(), tmp_path))


def test_a_folder_belongs_to_one_configuration(tmp_path):
    list(train.train(small(iterations=0), tmp_path))
    file = tmp_path / "config.json"
    older = json.loads(file.read_text())
    del older["env_horizon"], older["credit"]["lam_boundary"]  # begun before there were such fields
    file.write_text(json.dumps(older))
    RunFolder(tmp_path, small(iterations=0))
    with pytest.raises(ValueError, match="another credit; use another folder"):
        RunFolder(tmp_path, small(iterations=0, lam_boundary=0.25))
    with pytest.raises(ValueError, match="another lr, seed; use another folder"):
        next(train.train(small(iterations=0, seed=4, lr=1e-3), tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"critic": "shared", "kl_coef": 0.1},
        {"critic": "adapter", "lora_rank": 2, "kl_coef": 0.1},
        {"credit": "paper", "temperature": 0.9},
        {"credit": "upstream", "decoding": "free", "max_new_tokens": 12},
        {"estimator": "gae", "decoding": "action"},
        {"lam_schedule": "critic"},
        {
            "estimator": "gae",
            "advantage_scale": "none",
            "epochs": 2,
            "critic_epochs": 2,
            "micro_batch_tokens": 300,
        },
    ],
)
def test_every_combination_trains_what_it_should(changes):
    # a reward at many turns, so that there is credit even where nothing is won
    config = small(eval_games=0, iterations=2, **{"keep_penalty": -0.1, **changes})
    state = train.set_up(config)
    before = {n: p.detach().clone() for n, p in state.policy.named_parameters()}
    first = train.step(state)
    own, critic = state.policy.parameters_by_owner()
    assert all(torch.equal(before[n], own[n]) for n in own), "warm-up moved the policy"
    assert any(not torch.equal(before[n], critic[n]) for n in critic), "warm-up left the critic"
    second = train.step(state)
    assert any(not torch.equal(before[n], own[n]) for n in own), "the policy was not trained"
    assert first.metrics["policy/trained"] == 0 and second.metrics["policy/trained"] == 1
    assert second.metrics["policy/logprob_gap"] < 1e-4
    frozen = {n for n, p in state.policy.named_parameters() if not p.requires_grad}
    assert all(torch.equal(before[n], p) for n, p in state.policy.named_parameters() if n in frozen)
    assert all(abs(v) < 1e6 for v in second.metrics.values())


def test_only_one_training_writes_into_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("hiper_lab.folder.PATIENCE", 0.3)
    first = train.train(small(iterations=1), tmp_path)
    assert next(first).iteration == 0
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(BlockingIOError, match=f"by process {os.getpid()} on .*this is process"):
        next(train.train(small(iterations=1), tmp_path))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    first.close()  # as when a cell is interrupted
    # what was evaluated is not evaluated again
    assert [r.iteration for r in train.train(small(iterations=1), tmp_path)] == [1]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1]
    assert list(train.train(small(iterations=1), tmp_path)) == []  # its end freed the folder, too


def test_the_lock_of_a_killed_process_is_free(tmp_path, monkeypatch):
    hold = "import sys, time; from hiper_lab.folder import *\nwith sole_writer(sys.argv[1]): " \
        "print('held', flush=True); time.sleep(60)"  # fmt: skip
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr("hiper_lab.folder.PATIENCE", 0.3)
        with pytest.raises(BlockingIOError, match=f"written by process {holder.pid} on "):
            with sole_writer(tmp_path):
                pytest.fail("two writers")
        holder.send_signal(signal.SIGKILL)
    with sole_writer(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_stale_sampler_weights_are_noticed(monkeypatch):
    """A sampler that lies about its log-probabilities stops the run, with an explanation."""
    state = train.set_up(small(warmup_iterations=0, eval_games=0))
    real = train.collect

    def stale(*args, **kwargs):
        played = real(*args, **kwargs)
        for turn in (turn for t in played for turn in t.turns):
            turn.logprobs = [lp - 0.2 * c for lp, c in zip(turn.logprobs, turn.chosen, strict=True)]
        return played

    monkeypatch.setattr(train, "collect", stale)
    with pytest.raises(RuntimeError, match="disagree by 0.2 nats.*stale"):
        train.step(state)


def test_the_game_of_a_group_is_drawn_once(monkeypatch):
    drawn, generate = [], worlds.generate_game
    monkeypatch.setattr(
        worlds, "generate_game", lambda k, **kind: drawn.append(k) or generate(k, **kind)
    )
    envs, names = train.make_envs(small(), "train", 5, 7, copies=3)
    assert drawn == [5, 6, 7] and names == [f"train/small/{k}" for k in (5, 5, 5, 6, 6, 6, 7)]
    assert len({env.reset()[0] for env in envs}) == 3 and len(set(map(id, envs))) == 7


def test_groups_play_one_game_and_only_a_game_that_varies_teaches():
    config = small(estimator="grpo", group_size=2, warmup_iterations=0, eval_games=0)
    report = next(r for r in train.train(config) if r.trajectories)
    games = [t.game for t in report.trajectories]
    assert games[::2] == games[1::2] and len(set(games)) == 4
    returns = torch.tensor([t.return_ for t in report.trajectories]).reshape(4, 2)
    varies = returns[:, 0] != returns[:, 1]
    assert torch.equal(report.credit.low.reshape(4, 2, -1).abs().sum((1, 2)) > 0, varies)

    def states(similarity):
        like = small(
            estimator="gigpo", group_size=2, warmup_iterations=0, eval_games=0,
            anchor_similarity=similarity,
        )  # fmt: skip
        return next(r for r in train.train(like) if r.trajectories).grid.state.max()

    assert states(0.2) < states(1.0)  # the parameter reaches the trainer
    with pytest.raises(ValueError, match="group_size is 1, expected at least 2"):
        small(estimator="gigpo")
    with pytest.raises(ValueError, match="episodes is 8, expected a multiple of group_size 3"):
        small(group_size=3)


def test_time_limit_stops_cleanly_with_an_evaluation(tmp_path):
    reports = list(train.train(small(iterations=50, max_minutes=1e-6), tmp_path))
    assert [r.iteration for r in reports] == [0, 1]
    assert reports[0].evaluation is not None and reports[-1].evaluation is not None


def test_common_scale_keeps_the_levels_relative_sizes():
    state = train.set_up(small(eval_games=0, keep_penalty=-0.1))
    report = train.step(state)
    scaled = train.scale_advantages(report.grid, report.credit)
    valid = torch.arange(report.grid.reward.shape[1]) < report.grid.length[:, None]
    assert scaled.low[valid].mean().abs() < 1e-5
    assert (scaled.low[~valid] == 0).all() and (scaled.high[~report.grid.boundary] == 0).all()
    if scaled.low.abs().max() < 5 and scaled.switch.abs().max() < 5:  # nothing was clamped
        spread = report.credit.low[valid].std() / report.credit.switch[valid].std()
        assert (scaled.low[valid].std() / scaled.switch[valid].std()).item() == pytest.approx(
            spread.item(), rel=1e-3
        )


def test_parameters_are_strict():
    config = TrainConfig.from_parameters(
        {"credit": "upstream", "gamma": 1, "lr": 1, "whiten": None}
    )
    assert config.credit == dataclasses.replace(CreditConfig.upstream(), gamma=1.0)
    assert isinstance(config.lr, float)
    for bad, message in [
        ({"learning_rate": 1e-3}, "unknown parameter 'learning_rate'"),
        ({"iterations": "ten"}, "iterations is 'ten' .str., expected int"),
        ({"iterations": True}, "iterations is True .bool., expected int"),
        ({"iterations": 2.5}, "expected int"),
        ({"credit": "best"}, "credit is 'best', expected one of"),
        ({"critic": "both"}, "critic is 'both'"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"decoding": "beam"}, "decoding 'beam'"),
        ({"env_tasks": ["cook"]}, "env_tasks has .'cook'."),
        ({"epochs": 3, "critic_epochs": 1}, "critic_epochs is 1, expected at least 3"),
        ({"rollout": {}}, "unknown parameter 'rollout'"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig.from_parameters(bad)


def test_worlds_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="alfworld-download"):
        next(train.train(small(env="alfworld", env_path=str(tmp_path))))
    with pytest.raises(FileNotFoundError, match="items_shuffle"):
        next(train.train(small(env="webshop", env_path=str(tmp_path))))


def test_official_game_folders_are_played(tmp_path):
    for split in ("train", "valid_unseen"):
        folder = tmp_path / split / "pick_and_place_simple-Mug-None-Shelf-1" / "trial_1"
        folder.mkdir(parents=True)
        game = worlds.generate_game(3, task_type="pick_and_place_simple")
        (folder / "game.tw-pddl").write_text(json.dumps(game))
    config = small(env="alfworld", env_path=str(tmp_path), iterations=1)
    reports = list(train.train(config))
    assert reports[-1].trajectories[0].game == "trial_1" and reports[-1].evaluation.games == 3


def test_an_interval_contains_its_estimate_and_shrinks():
    for k, n in [(0, 10), (10, 10), (46, 200)]:
        low, high = train.wilson_interval(k, n)
        assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    wide, narrow = train.wilson_interval(5, 10), train.wilson_interval(500, 1000)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
