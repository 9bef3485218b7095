"""vLLM's interface, against a server that answers it from a real model through transformers.

The engine itself is in test_vllm_engine.py, which `make test-vllm` runs.
"""

import json
import sys
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from peft import PeftModel
from test_train import small, stable, weights
from transformers import AutoModelForCausalLM
from vllm_standin import StandIn

from hiper_lab import objective
from hiper_lab.envs.games import generate_game
from hiper_lab.envs.household import HouseholdEnv
from hiper_lab.policy import Policy, load_model
from hiper_lab.rollout import RolloutConfig, collect
from hiper_lab.sampling import DECODINGS, Codec, allowed_mask, hf_sampler
from hiper_lab.train import train
from hiper_lab.vllm_sampler import (
    EngineError,
    Server,
    export_adapter,
    export_model,
    open_engine,
    vllm_sampler,
)


def short(address, **changes):
    few = {"iterations": 2, "max_turns": 3, "warmup_iterations": 0, "eval_games": 0}
    # with a penalty every batch moves the policy, whether a game was won or not
    return small(engine=address, **few | {"keep_penalty": -0.3} | changes)


def tiny_policy(lora_rank=0):
    policy = Policy(*load_model("tiny", "cpu"), lora_rank=lora_rank)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:  # a fresh adapter changes nothing
            torch.nn.init.normal_(weight, std=0.05)
    return policy


def samplers(engine, policy, temperature=1.0, max_new_tokens=16, seed=0):
    """The two samplers of one policy, and the codec."""
    codec = Codec(policy.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    ours = vllm_sampler(
        engine, policy, codec, temperature, generator,
        max_new_tokens=max_new_tokens, micro_batch_tokens=4096, gap_limit=0.05,
    )  # fmt: skip
    return codec, ours, hf_sampler(policy, temperature, generator)


def play(codec, sampler, games=3, max_turns=3, **config):
    envs = [HouseholdEnv(generate_game(k), max_turns) for k in range(games)]
    names, seeds = [str(k) for k in range(games)], list(range(games))
    return collect(sampler, codec, envs, RolloutConfig(**config), names=names, seeds=seeds)


def drift(codec, policy, played, temperature, decoding, max_new_tokens):
    """How far log-probabilities of drawn tokens are from their expectation, in standard errors.

    Under the policy, log π(y) + entropy has mean 0 at every token, whatever came before it.
    """
    samples = objective.pack(played, codec, decoding, max_new_tokens)
    batch = objective.collate(samples, policy.device)
    hidden = policy.hidden(batch.ids)
    now = objective.read_scores(policy, batch, hidden, temperature)
    logits = policy.logits(hidden[batch.row, batch.at]) / temperature
    if batch.allowed is not None:
        allowed = allowed_mask(batch.allowed, policy.vocab)
        logits = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
    p = logits.softmax(-1)
    surprise = torch.where(p > 0, logits.log_softmax(-1), 0)
    variance = (p * surprise**2).sum(-1) - now.entropy**2
    assert len(now.logprob) > 100
    return ((now.logprob + now.entropy).sum() / variance.sum().sqrt()).item()


@pytest.fixture
def server():
    with StandIn() as running:
        yield running


@pytest.mark.parametrize("decoding", DECODINGS)
def test_greedy_text_and_logprobs_are_the_hf_samplers(server, decoding):
    policy, engine = tiny_policy(lora_rank=4), Server(server.address, None)
    engine.sync(policy, 0)
    codec, vllm, hf = samplers(engine, policy, temperature=0.0)
    template = "flat" if decoding == "action" else "full"
    ours, theirs = (play(codec, s, decoding=decoding, template=template) for s in (vllm, hf))
    turns = [(a, b) for x, y in zip(ours, theirs, strict=True)
             for a, b in zip(x.turns, y.turns, strict=True)]  # fmt: skip
    for a, b in turns:
        assert a.response_ids == b.response_ids and a.chosen == b.chosen and a.roles == b.roles
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
    metrics = engine.metrics()
    assert metrics["engine/logprob_gap_max"] < 1e-4 and len(turns) >= 6
    assert metrics["engine/prefix_hit_rate"] > 0.4  # the rules come first, at every turn the same


@pytest.mark.parametrize("decoding", ["guided", "free"])
def test_what_is_sampled_has_the_policys_distribution(server, decoding):
    policy, engine = tiny_policy(), Server(server.address, None)
    engine.sync(policy, 0)
    codec, vllm, _ = samplers(engine, policy, temperature=1.3, max_new_tokens=12)
    played = play(codec, vllm, games=16, max_turns=2, decoding=decoding, max_new_tokens=12)
    assert abs(drift(codec, policy, played, 1.3, decoding, 12)) < 3.5
    assert abs(drift(codec, policy, played, 0.7, decoding, 12)) > 3.5  # another is told apart


def test_nothing_is_asked_for_what_is_decided_or_finished(server):
    policy, engine = tiny_policy(), Server(server.address, None)
    engine.sync(policy, 0)
    codec, vllm, _ = samplers(engine, policy)
    del server.completions[:]  # the check at the start
    envs = [HouseholdEnv(generate_game(k), limit) for k, limit in enumerate((1, 3))]
    played = collect(vllm, codec, envs, RolloutConfig(), names=["a", "b"], seeds=[0, 1])
    turns = [turn for trajectory in played for turn in trajectory.turns]
    assert len(played[0].turns) == 1 and len(played[1].turns) > 1
    of_turn = [
        [r for r in server.completions if r["prompt"][: len(t.prompt_ids)] == t.prompt_ids]
        for t in turns
    ]
    assert sum(map(len, of_turn)) == len(server.completions) == engine.requests
    for turn, requests in zip(turns, of_turn, strict=True):
        assert len(requests) <= sum(turn.chosen)
        # a subgoal is two requests, however long it is; every fork of a trie is one
        long = [r for r in requests if r["max_tokens"] > 1]
        assert len(long) <= 1 and all(r["stop_token_ids"] for r in long)
        assert all("allowed_token_ids" in r or "logit_bias" in r for r in requests)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training_hands_weights_over_and_an_engine_that_keeps_old_ones_stops_it(lora_rank):
    with StandIn() as server:
        reports = list(train(short(server.address, lora_rank=lora_rank, max_turns=5)))
        assert len(server.adapters) == (lora_rank > 0)  # older ones are taken out
    for report in reports:
        assert report.metrics["engine/logprob_gap_max"] < 1e-4
        assert report.metrics["policy/logprob_gap"] < 1e-4
        assert report.metrics["engine/tokens"] > 0 < report.metrics["engine/prefix_hit_rate"]
    with StandIn(deaf=True) as server:
        with pytest.raises(EngineError, match="disagree by .* kept older weights"):
            list(train(short(server.address, lora_rank=lora_rank, max_turns=5)))


def test_a_server_that_dies_in_an_iteration_loses_that_iteration_only(tmp_path):
    with StandIn() as server:
        whole = list(train(short(server.address), tmp_path / "whole"))
        everything = len(server.completions)
    cut = tmp_path / "cut"
    with StandIn(dies_after=everything * 3 // 4) as server:
        with pytest.raises(EngineError, match="no answer from the vLLM server .* command resumes"):
            list(train(short(server.address), cut))
    done = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [m["iteration"] for m in done] == [0, 1]
    with StandIn() as server:  # at another address
        rest = list(train(short(server.address), cut))

    def comparable(metrics):  # how much of a prompt is cached depends on what came before
        return {k: v for k, v in stable(metrics).items() if "prefix" not in k}

    last = comparable(whole[-1].metrics)
    assert comparable(rest[-1].metrics) == last
    a, b = weights(tmp_path / "whole", 2), weights(cut, 2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(cut.glob(".engine-*"))  # what handed the weights over is gone


class Other(BaseHTTPRequestHandler):
    """A server of something else that also has /v1/completions."""

    choice = {"text": "hello", "logprobs": None}

    def do_GET(self):
        self._answer({"data": [{"id": "other"}]} if self.path == "/v1/models" else {})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({"choices": [self.choice]})

    def _answer(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class Heedless(Other):
    choice = {"token_ids": [7], "logprobs": {"token_logprobs": [0.0]}}


@pytest.mark.parametrize(
    ("handler", "message"),
    [(Other, "does not answer as vLLM does.*token_ids"), (Heedless, "ignores allowed_token_ids")],
)
def test_a_server_of_another_kind_is_refused(handler, message):
    other = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(EngineError, match=message):
        Server(f"http://127.0.0.1:{other.server_port}/v1", None)
    other.shutdown()
    other.server_close()


def test_a_server_that_is_not_there_or_not_set_up_says_what_to_do():
    with StandIn(processed=False) as server:
        with pytest.raises(EngineError, match="vLLM 0.32.0.*--logprobs-mode processed_logprobs"):
            list(train(short(server.address)))
        gone = server.address
    with pytest.raises(EngineError, match=f"no answer from the vLLM server at {gone}"):
        list(train(short(gone)))
    with StandIn() as server:
        server.post = lambda path, body: (400, {"error": {"message": "no such adapter"}})
        with pytest.raises(EngineError, match="400 to /v1/completions: .*no such adapter"):
            Server(server.address, None)


def test_another_model_is_noticed_at_the_first_turn(server):
    with torch.no_grad():
        server.model.get_input_embeddings().weight.mul_(1.1)
    config = short(server.address, lora_rank=4)
    server.adapters = _Ignored(server.model)
    with pytest.raises(EngineError, match="serves another model"):
        list(train(config))


class _Ignored(dict):
    """Adapters of the server's own base."""

    def __init__(self, model):
        self.model = model

    def get(self, name, default):
        return self.model


@pytest.mark.parametrize("version", [None, "0.33.1"])
def test_a_missing_or_untested_vllm_is_refused(monkeypatch, version):
    fake = None if version is None else types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    expected = "needs the extra: pip install" if version is None else "0.33.1 is installed, expect"
    with pytest.raises(ValueError, match=expected):
        open_engine("vllm", None, "tiny", 0.4, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.32.0"))
    with pytest.raises(ValueError, match="one of 2; start a server"):
        open_engine("vllm", None, "tiny", 0.4, 0)


@pytest.mark.parametrize("bad", [{"engine": "sglang"}, {"engine_memory": 1.5}])
def test_bad_engines_are_refused(bad):
    with pytest.raises(ValueError, match="engine.* is .*, expected"):
        small(**bad)


def test_exported_weights_are_the_policys(tmp_path):
    policy, ids = tiny_policy(lora_rank=4), torch.arange(2, 40)[None]
    export_model(policy, tmp_path / "base")
    export_adapter(policy, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        start = load_model("tiny", "cpu")[0](ids).logits
        assert torch.equal(base(ids).logits, start)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
        assert torch.allclose(adapted, policy.logits(policy.hidden(ids)), atol=1e-5)
        assert not torch.allclose(adapted, start, atol=1e-2)
