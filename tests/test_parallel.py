"""Two processes compute what one computes, by DDP and FSDP, and read each other's checkpoints.

Actions are greedy, so that both play the same games: what is compared is credit and the update.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hiper_lab import train, trajectory
from hiper_lab.parallel import Team

# 5 episodes for 2 processes, of unequal lengths, in several micro-batches per minibatch
PARAMETERS = {
    "iterations": 3, "episodes": 5, "max_turns": 5, "warmup_iterations": 1, "eval_games": 3,
    "rollout_every": 1, "minibatch_turns": 8, "micro_batch_tokens": 700, "keep_penalty": -0.1,
    "temperature": 0.0, "eval_temperature": 0.0, "kl_coef": 0.1, "whiten": True,
}  # fmt: skip
# accelerate offers FSDP on accelerators only, but torch's runs on gloo: let it take these for some
FSDP = """
import json, sys
from accelerate.state import DistributedType, PartialState
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
from torch.distributed.tensor import DTensor
from hiper_lab import train
made = train.set_up
def set_up(config, team):
    state = made(config, team)
    assert state.team.sharded and state.team.size == 2
    assert all(isinstance(p, DTensor) for p in state.policy.parameters())
    return state
train.set_up = set_up
for report in train.train(train.TrainConfig.from_parameters(json.loads(sys.argv[1])), sys.argv[2]):
    pass
"""


def launch(root, *arguments):
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2",
               "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
               "--main_process_port=0", *arguments]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def differences(one, other, iteration):
    a, b = (
        load_file(folder / "checkpoints" / f"{iteration:06d}" / "weights.safetensors")
        for folder in (one, other)
    )
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if not k.startswith("time/")} for x in lines]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run on one process; beside it, how it was after its first iteration."""
    folder = tmp_path_factory.mktemp("alone")
    for report in train.train(train.TrainConfig.from_parameters(PARAMETERS), folder / "run"):
        if report.iteration == 1:
            shutil.copytree(folder / "run", folder / "first")
    return folder


def same_run(one, other, first):
    for iteration in range(first, 4):
        assert differences(one, other, iteration) < 1e-5
    found, expected = metrics(other), metrics(one)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    for iteration in range(1, 4):
        name = f"rollouts/{iteration:06d}.jsonl.gz"
        mine, theirs = list(trajectory.read(other / name)), list(trajectory.read(one / name))
        assert [t.id for t in mine] == [t.id for t in theirs] == [f"{k:04d}" for k in range(5)]
        for a, b in zip(mine, theirs, strict=True):
            assert (a.game, a.seed, a.end) == (b.game, b.seed, b.end)
            assert [x.response_ids for x in a.turns] == [x.response_ids for x in b.turns]
            assert [x.advantage_low for x in a.turns] == pytest.approx(
                [x.advantage_low for x in b.turns], abs=1e-4
            )


def test_two_processes_launched_with_the_notebook_are_one_run(alone, root, tmp_path):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(PARAMETERS))
    folder = tmp_path / "two"
    launch(root, "--multi_gpu", "-m", "hiper_lab.runs", "launch",
           str(tmp_path / "experiment.yaml"), "--out", str(folder))  # fmt: skip
    same_run(alone / "run", folder, first=2)
    assert (folder / "20_train.ipynb").exists()
    # one process goes on from what two have written
    shutil.rmtree(folder / "checkpoints" / "000003")
    reports = list(train.train(train.TrainConfig.from_parameters(PARAMETERS), folder))
    assert [r.iteration for r in reports] == [3]
    assert differences(alone / "run", folder, 3) < 1e-5


def test_two_processes_with_a_slice_of_every_weight_go_on_where_one_was(alone, root, tmp_path):
    folder = tmp_path / "sliced"
    shutil.copytree(alone / "first", folder)
    (tmp_path / "fsdp.py").write_text(FSDP)
    launch(root, "--use_fsdp", "--fsdp_version=2",
           "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP", str(tmp_path / "fsdp.py"),
           json.dumps(PARAMETERS), str(folder))  # fmt: skip
    same_run(alone / "run", folder, first=2)


def test_shares_are_whole_groups_and_cover_everything():
    team = Team()
    for size, count, unit in [(2, 10, 2), (3, 12, 4), (4, 7, 1), (3, 2, 1)]:
        team.size, shares = size, []
        for rank in range(size):
            team.rank = rank
            shares.append(team.share(count, unit))
        assert [i for share in shares for i in share] == list(range(count))
        assert all(len(share) % unit == 0 for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= unit


def test_more_processes_than_groups_are_refused(monkeypatch):
    real = Team.__init__

    def crowd(self):
        real(self)
        self.size = 3

    monkeypatch.setattr(Team, "__init__", crowd)
    with pytest.raises(ValueError, match="2 groups of episodes, expected one for each of 3"):
        train.set_up(train.TrainConfig(episodes=4, group_size=2))


def test_other_engines_are_refused(monkeypatch):
    import accelerate

    class Elsewhere:
        def __init__(self, **_):
            self.distributed_type = accelerate.DistributedType.DEEPSPEED

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", Elsewhere)
    with pytest.raises(ValueError, match="launched for DEEPSPEED, expected MULTI_CPU, MULTI_GPU"):
        Team()


def test_means_are_of_the_whole_batch_and_the_gap_is_the_largest():
    parts = [
        {"value/low_loss": [3.0, 1], "policy/logprob_gap": [0.1, 1], "policy/loss": [0.0, 0]},
        {"value/low_loss": [1.0, 3], "policy/logprob_gap": [0.2, 1]},
    ]
    assert train._means(parts) == {"value/low_loss": 1.0, "policy/logprob_gap": 0.2}
    assert torch.tensor(1.0) == train.whole_tensor(torch.tensor(1.0))
