"""A whole run on a GPU: skipped where there is none (no CI of ours has one)."""

import json
import math

import pytest
import torch
from test_train import SMALL, small

from hiper_lab import credit, memory, sweeps, train
from hiper_lab.credit import Credit, TurnGrid, Values
from hiper_lab.records import read_metrics

pytestmark = pytest.mark.gpu
HERE = {"iterations": 2, "max_prompt_tokens": 512}


def run(folder=None, **changes):
    return list(train.train(small(**HERE | changes), folder))


@pytest.mark.parametrize("critic", ["shared", "separate", "adapter"])
@pytest.mark.parametrize("precision, gap", [("float32", 1e-4), ("auto", 0.05)])
def test_it_learns_there_and_sampler_and_trainer_agree(critic, precision, gap):
    """``auto`` is bfloat16 on a GPU: what the sampler rounds, the trainer rounds alike."""
    lora = 4 if critic == "adapter" else 0
    last = run(critic=critic, precision=precision, lora_rank=lora)[-1].metrics
    assert last["policy/logprob_gap"] < gap
    assert last["policy/grad_norm"] > 0 and math.isfinite(last["policy/loss"])


def test_the_estimate_and_the_dry_run_bound_what_a_run_takes(tmp_path):
    torch.cuda.reset_peak_memory_stats()
    reports = run(tmp_path, precision="float32")
    noted = json.loads((tmp_path / "memory.json").read_text())
    peak = reports[-1].metrics["memory/peak_gib"]
    assert noted["dry_run_gib"] == pytest.approx(peak, rel=0.01)  # nothing was longer than that
    assert noted["estimated_gib"]["total"] == pytest.approx(peak, rel=0.5)


def test_a_gpu_that_is_too_small_is_noticed_before_the_run():
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(256 * 2**20 / total)
    try:
        with pytest.raises(MemoryError, match="a dry run of learning: lower micro_batch_tokens"):
            run(micro_batch_tokens=2**18, minibatch_turns=2**10)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_an_interrupted_run_goes_on(tmp_path):
    whole = run(tmp_path / "whole", precision="float32")
    for report in train.train(small(**HERE, precision="float32"), tmp_path / "cut"):
        if report.iteration == 1:
            break
    rest = run(tmp_path / "cut", precision="float32")
    assert [r.iteration for r in rest] == [2]
    # sums are taken in any order there, so the two are close and not the same
    for name in ("value/low_mean", "rollout/turns"):
        assert rest[0].metrics[name] == pytest.approx(whole[-1].metrics[name], rel=0.2)


def test_hae_of_a_run_is_the_same_there_and_here():
    report = run(iterations=1, warmup_iterations=0)[-1]
    config = small().credit
    grid = TurnGrid(*(x if x is None else x.cuda() for x in report.grid))
    there = credit.estimate(grid, Values(*(v.cuda() for v in report.values)), config)
    here = credit.estimate(report.grid, report.values, config)
    for name, x, y in zip(Credit._fields, there, here, strict=True):
        torch.testing.assert_close(x.cpu(), y, msg=lambda m, name=name: f"{name}: {m}")


def test_free_memory_is_that_of_the_gpu():
    free = torch.cuda.mem_get_info()[0]
    assert free <= memory.available(torch.device("cuda")) <= torch.cuda.mem_get_info()[1]


def test_a_sweep_uses_it(tmp_path):
    """Its workers are forks: none may have met CUDA before."""
    plan = {"base": SMALL | HERE | {"iterations": 1}, "grid": {}, "seeds": [0, 1]}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    runs = sweeps.sweep(sweeps.read_sweep(tmp_path / "plan.yaml"), tmp_path / "runs", processes=2)
    assert runs["state"].tolist() == ["finished", "finished"]
    assert "memory/peak_gib" in read_metrics(tmp_path / "runs" / runs["run"][0])
