"""What a run takes: bounded logits, recomputed layers, halved weights, an estimate; errors."""

import json
import re
from dataclasses import replace

import pytest
import torch
from test_sampling import make_policy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hiper_lab import memory, objective, train
from hiper_lab.config import TrainConfig
from hiper_lab.memory import Longest, Memory
from hiper_lab.objective import PPOConfig, Sample
from hiper_lab.policy import Policy, load_model

SMALL = {
    "iterations": 2, "episodes": 4, "max_turns": 4, "warmup_iterations": 0, "eval_games": 0,
    "minibatch_turns": 8, "max_prompt_tokens": 400, "keep_penalty": -0.1,
}  # fmt: skip


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def wordy(vocab, **kwargs):
    """A model of many words and little else."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return Policy(LlamaForCausalLM(config), load_model("tiny", "cpu")[1], critic="shared", **kwargs)


def written(rows, tokens):
    """Responses of which every token was a choice, half of them among all there are."""
    some = torch.arange(0, 600, 2).numpy()
    return [
        Sample(
            ids=[(7 * k + 3 * i) % 300 * 2 for i in range(tokens + 2)], prompt=2, action=3,
            at=list(range(1, tokens + 1)), role=[2] * tokens, logprob_old=[-6.0] * tokens,
            allowed=[None if i % 2 else some for i in range(tokens)], advantage=[1.0, -0.5, 0.3],
        )
        for k in range(rows)
    ]  # fmt: skip


def learn(policy, samples):
    policy.zero_grad()
    batch = objective.collate(samples, policy.device)
    now, values = objective.read(policy, batch, 0.9, True)
    (objective.policy_loss(batch, now, PPOConfig())[0] + values.sum()).backward()
    grads = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return now, grads


def test_no_tensor_grows_with_vocabulary_times_length(monkeypatch):
    monkeypatch.setattr(objective, "LOGITS", 2**14)
    found = {}
    for vocab, rows in [(640, 4), (640, 8), (4096, 4), (4096, 8)]:
        policy = wordy(vocab)
        with Largest() as largest:
            learn(policy, written(rows, 30))
        found[vocab, rows] = largest.elements
        # logits of a part; weights; hidden states of all tokens. Whole logits: 77k to 983k
        assert largest.elements <= max(2**14, vocab * 8, rows * 32 * 8)
    assert found[640, 4] == found[640, 8] == 2**14 - 2**14 % 640
    monkeypatch.setattr(objective, "LOGITS", 2**30)
    with Largest() as largest:
        learn(wordy(640), written(4, 30))
    assert largest.elements == 4 * 30 * 640  # the measure sees what it should


def test_parts_change_neither_scores_nor_gradients(monkeypatch):
    policy, samples = wordy(640), written(4, 30)
    whole, expected = learn(policy, samples)
    monkeypatch.setattr(objective, "LOGITS", 640 * 7)
    parts, found = learn(policy, samples)
    assert torch.allclose(whole.logprob, parts.logprob, atol=1e-6)
    assert torch.allclose(whole.entropy, parts.entropy, atol=1e-5)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[k], expected[k], atol=1e-5) for k in found)


@pytest.mark.parametrize("critic", ["shared", "adapter", "separate"])
def test_recomputed_layers_give_the_same_gradient_and_keep_less(critic):
    torch.manual_seed(0)
    rank = 2 if critic == "adapter" else 0
    policy = Policy(*load_model("tiny", "cpu"), critic=critic, lora_rank=rank)
    torch.manual_seed(0)
    frugal = Policy(
        *load_model("tiny", "cpu"), critic=critic, lora_rank=rank, gradient_checkpointing=True
    )
    _, expected = learn(policy, written(3, 20))
    _, found = learn(frugal, written(3, 20))
    assert found.keys() == expected.keys() and found
    assert all(torch.allclose(found[k], expected[k], atol=1e-6) for k in found)
    assert memory._kept(frugal, 64) < 0.4 * memory._kept(policy, 64)


def test_a_sampler_keeps_its_cache_while_layers_are_recomputed():
    ids = torch.arange(3, 13)[None]
    policy = Policy(*load_model("tiny", "cpu"), gradient_checkpointing=True)
    whole = policy.hidden(ids)
    with torch.no_grad():
        cache = memory.DynamicCache(config=policy.lm.config)
        policy.hidden(ids[:, :6], past_key_values=cache, use_cache=True)
        rest = policy.hidden(ids[:, 6:], past_key_values=cache, use_cache=True)
    assert torch.allclose(whole[:, 6:], rest, atol=1e-5)


def test_half_precision_halves_what_nobody_trains_and_nothing_else(monkeypatch):
    ids = torch.arange(3, 23)[None]

    def made():
        torch.manual_seed(0)
        return Policy(
            *load_model("tiny", "cpu"), critic="adapter", lora_rank=2, precision="bfloat16"
        )

    policy = made()
    kinds = {n: p.dtype for n, p in policy.named_parameters()}
    half = {n for n, kind in kinds.items() if kind == torch.bfloat16}
    assert half and all(".base_layer." in n for n in half)
    assert all(kinds[n] == torch.float32 for g in policy.parameters_by_owner() for n in g)
    assert not {n for n in kinds if "embed" in n or "norm" in n or "heads" in n} & half
    assert policy.logits(policy.hidden(ids)).dtype == torch.float32
    # autocast would round the same weights at every use: not a bit differs
    monkeypatch.setattr("hiper_lab.policy._halve_frozen", lambda policy: None)
    unhalved = made()
    assert all(p.dtype == torch.float32 for p in unhalved.parameters())
    assert torch.equal(policy.hidden(ids), unhalved.hidden(ids))
    full = Policy(*load_model("tiny", "cpu"), critic="shared")
    assert 1e-4 < (policy.hidden(ids) - full.hidden(ids)).abs().max() < 1  # it is bfloat16
    with pytest.raises(ValueError, match="precision 'fp8', expected one of"):
        Policy(*load_model("tiny", "cpu"), precision="fp8")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"critic": "separate"},
        {"critic": "shared", "gradient_checkpointing": True},
        {"critic": "adapter", "lora_rank": 4, "precision": "bfloat16"},
    ],
)
def test_the_estimate_counts_weights_and_foretells_activations(kwargs):
    policy = Policy(*load_model("tiny", "cpu"), **kwargs)
    longest = Longest(300, 20, 5, micro_batch_tokens=10**6, minibatch_turns=1)
    found = memory.estimate(policy, longest)
    trained = sum(p.numel() for g in policy.parameters_by_owner() for p in g.values())
    assert found.weights == sum(p.numel() * p.element_size() for p in policy.parameters())
    assert (found.moments, found.gradients) == (8 * trained, 4 * trained)
    logits = 6 * 4 * 20 * 640
    unfolded = 0
    if policy.gradient_checkpointing:
        policy.gradient_checkpointing = False
        unfolded = 320 * memory._activations(policy)[0] // 2
        policy.gradient_checkpointing = True
    kept = memory._kept(policy, 320)
    assert found.activations - logits - unfolded == pytest.approx(kept, rel=0.02)
    halves = memory.estimate(policy, longest, processes=2)
    assert halves.weights == found.weights // 2 and halves.activations == found.activations


def test_playing_and_learning_take_turns():
    needed = Memory(weights=100, moments=20, gradients=10, activations=30, cache=35)
    assert needed.total == 160 and needed._replace(cache=50).total == 170


def test_what_will_not_fit_is_refused_with_numbers_that_will(monkeypatch):
    config = TrainConfig.from_parameters(SMALL | {"micro_batch_tokens": 64000})
    monkeypatch.setattr(memory, "available", lambda device: 60 * 2**20)
    messages = []
    while True:
        try:
            state = train.set_up(config)
            break
        except MemoryError as error:
            messages.append(str(error))
            assert len(messages) < 20
            number = re.search(r"micro_batch_tokens from \d+ to (\d+)", str(error))[1]
            config = replace(config, micro_batch_tokens=int(number))
    assert state.needed.total <= 60 * 2**20 and state.longest.train_rows >= 1
    assert "learning takes about 0." in messages[0] and "but 0.06 GiB are free" in messages[0]
    assert "lower micro_batch_tokens from 64000 to" in messages[0]
    assert "gradient_checkpointing" in messages[0] and "lora_rank 16" in messages[0]
    monkeypatch.setattr(memory, "available", lambda device: 2**20)
    with pytest.raises(MemoryError, match="max_prompt_tokens from 400"):
        train.set_up(replace(config, micro_batch_tokens=1, gradient_checkpointing=True))


def test_a_dry_run_goes_through_the_longest_batches_and_changes_nothing(monkeypatch):
    state = train.set_up(TrainConfig.from_parameters(SMALL | {"micro_batch_tokens": 1500}))
    before = {n: p.detach().clone() for n, p in state.policy.named_parameters()}
    seen, real = [], Policy.hidden

    def hidden(self, ids, trunk="policy", **cache):
        seen.append((trunk, *ids.shape, bool(cache)))
        return real(self, ids, trunk, **cache)

    monkeypatch.setattr(Policy, "hidden", hidden)
    assert train.dry_run(state) is None  # a CPU does not count
    row = 400 + state.longest.response
    assert seen == [
        ("policy", 4, row, True), ("policy", 1500 // row, row, False),
        ("critic", 1500 // row, row, False),
    ]  # fmt: skip
    assert all(torch.equal(before[n], p) for n, p in state.policy.named_parameters())
    assert all(p.grad is None for p in state.policy.parameters())
    assert not state.optimizer.state and state.optimizer.param_groups[0]["lr"] > 0

    def full(self, ids, trunk="policy", **cache):
        if not cache:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, ids, trunk, **cache)

    monkeypatch.setattr(Policy, "hidden", full)
    with pytest.raises(MemoryError, match="dry run of learning: lower micro_batch_tokens"):
        train.dry_run(state)


def test_out_of_memory_in_the_middle_names_a_number_and_the_run_goes_on_with_it(
    tmp_path, monkeypatch
):
    config = TrainConfig.from_parameters(SMALL | {"micro_batch_tokens": 2000})
    real, sizes = objective.read, []

    def counted(policy, batch, *args):
        sizes.append(batch.ids.numel())
        return real(policy, batch, *args)

    monkeypatch.setattr(objective, "read", counted)
    whole = [r.metrics for r in train.train(config)]
    enough = max(sizes) // 2

    def hungry(policy, batch, *args):
        if len(done) == 2 and batch.ids.numel() > enough:
            torch.empty(2**60)  # the allocator's own error
        return real(policy, batch, *args)

    monkeypatch.setattr(objective, "read", hungry)
    done = []
    with pytest.raises(MemoryError) as refused:
        for report in train.train(config, tmp_path):
            done += [report] * (2 - len(done))
    said = str(refused.value)
    assert "out of memory while learning in iteration 2: lower micro_batch_tokens from 2000" in said
    assert "gradient_checkpointing" in said and "resumes" in said and "lora_rank" not in said
    with pytest.raises(ValueError, match="holds a run with another minibatch_turns"):
        next(train.train(replace(config, minibatch_turns=4), tmp_path))
    lower = replace(config, micro_batch_tokens=enough, gradient_checkpointing=True)
    (last,) = train.train(lower, tmp_path)
    assert last.iteration == 2
    assert json.loads((tmp_path / "config.json").read_text())["micro_batch_tokens"] == enough
    for name in ("rollout/return", "policy/loss", "policy/grad_norm", "value/low_loss"):
        assert last.metrics[name] == pytest.approx(whole[-1][name], rel=1e-3, abs=1e-5)
    assert json.loads((tmp_path / "memory.json").read_text())["estimated_gib"]["total"] > 0


def test_other_errors_are_left_alone():
    policy = make_policy("tiny")
    with pytest.raises(RuntimeError, match="shapes"):
        with memory.explained(policy, Longest(9, 1, 1, 1, 1), "learning", 0):
            raise RuntimeError("shapes do not match")
