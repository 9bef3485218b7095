"""Budgets: weights and activations against torch's own count, time against the published logs."""

import dataclasses

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hiper_lab import budget, runs
from hiper_lab.budget import GPU, KNOWN, Lengths, estimate
from hiper_lab.config import TrainConfig
from hiper_lab.policy import Policy, load_model

QWEN = "Qwen/Qwen2.5-1.5B-Instruct"


def random_model(kind=Qwen2Config, **changes):
    """With a query width that is not the width, so that formulas can not mix them up."""
    given = {
        "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 200, "num_hidden_layers": 3, "vocab_size": 320,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(kind(**given | changes))


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_adapters_are_those_of_the_model(kind, tied, tmp_path):
    model = random_model(kind, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    a = budget.architecture(str(tmp_path))
    assert budget.parameters(a) == sum(p.numel() for p in model.parameters())
    body = [p for n, p in model.named_parameters() if "embed" not in n and "lm_head" not in n]
    assert budget.parameters(a, embeddings=False) == sum(p.numel() for p in body)
    policy = Policy(model, load_model("tiny", "cpu")[1], critic="shared", lora_rank=4)
    adapted = [p for n, p in policy.model.named_parameters() if "lora_" in n]
    assert budget.adapters(a, 4) == sum(p.numel() for p in adapted)


def test_known_models_have_their_published_numbers_of_weights():
    # Qwen2.5 technical report: 0.49B, 1.54B, 7.61B, without embeddings 0.36B, 1.31B, 6.53B
    for name, whole, body in [("0.5B", 0.49, 0.36), ("1.5B", 1.54, 1.31), ("7B", 7.61, 6.53)]:
        a = KNOWN[f"Qwen/Qwen2.5-{name}-Instruct"]
        assert budget.parameters(a) / 1e9 == pytest.approx(whole, abs=0.006)
        assert budget.parameters(a, embeddings=False) / 1e9 == pytest.approx(body, abs=0.006)
    tiny = load_model("tiny", "cpu")[0]
    assert budget.parameters(KNOWN["tiny"]) == sum(p.numel() for p in tiny.parameters())
    with pytest.raises(ValueError, match="model is 'gpt-9', expected one of .*smollm"):
        budget.architecture("gpt-9")


@pytest.mark.parametrize("half", [True, False])
def test_activations_are_what_torch_saves(half, tmp_path):
    """Per layer: models of three layers and of one, so that what lies around the layers cancels."""

    def saved(layers: int) -> int:
        model = random_model(num_hidden_layers=layers)
        model.config.save_pretrained(tmp_path)
        casts = sum(
            p.numel() * 2 for n, p in model.named_parameters() if "proj" in n and p.dim() > 1
        )
        known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        kept = {}

        def keep(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = x  # alive, so that its address stays its own
            return x

        ids = torch.zeros(2, 50, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast:
            model.get_decoder()(input_ids=ids, use_cache=False)
        return sum(x.untyped_storage().nbytes() for x in kept.values()) - half * casts

    layers = (saved(3) - saved(1)) / 2
    a = budget.architecture(str(tmp_path))._replace(layers=1)
    assert budget.activations(a, 100, half) == layers


def test_flops_by_hand():
    # N = 3 of attention and MLP: one layer, one head of one dimension, width 1, ffn 1
    a = budget.Architecture(1, 1, 1, 1, 1, 1, vocab=10, tied=True, qkv_bias=False)
    n = 4 + 3 + 2 + 1  # q k v o, gate up down, two norms, last norm
    assert budget.parameters(a, embeddings=False) == n and budget.parameters(a) == n + 10
    # 2 rows of 5 tokens; 2·5 more per token by attention; logits of 3 tokens of each row
    assert budget.forward(a, 2, 5, 3) == 2 * (5 * (2 * n + 2 * 5) + 3 * 20)


@pytest.mark.parametrize("step, rows, prompt, response", [(1, 6400, 702, 36), (149, 2048, 778, 40)])
def test_time_fits_the_published_logs(root, step, rows, prompt, response):
    """Rows and prompts as logged (four H100); the curves are the committed ones."""
    logged = pd.read_csv(root / "experiments" / "upstream_curves.csv")
    logged = logged.query("run == 'run_alfworld_seed6_1_5b' and step == @step").iloc[0]
    config = TrainConfig.from_parameters(
        runs.read_experiment("experiments/alfworld_qwen2.5_1.5b.yaml")
    )
    config = dataclasses.replace(config, iterations=1)
    found = estimate(config, Lengths(rows / 128, prompt, response), gpus=4).hours
    for phase, column in [("policy", "actor"), ("critic", "critic")]:
        seconds = found[f"update {phase}"] * 3600 / 4
        assert seconds == pytest.approx(logged[f"timing_s_update_{column}"], rel=0.2)


def test_a_budget_adds_up_and_answers_to_its_arguments():
    config = TrainConfig.from_parameters({
        "model": QWEN, "iterations": 10, "episodes": 8, "eval_games": 0, "max_turns": 5,
        "warmup_iterations": 0,
    })  # fmt: skip
    lengths = Lengths(turns=4, prompt=100, response=10)
    one = estimate(config, lengths)
    assert one.written == 10 * 8 * 4 * 10 and one.read == 10 * 8 * 4 * 100
    assert one.hours["evaluate"] == 0 and one.hours["score"] > 0
    half = estimate(config, lengths, GPU(utilisation=0.105))
    assert sum(half.hours.values()) == pytest.approx(2 * sum(one.hours.values()))
    assert half.memory == one.memory and half.written == one.written
    n = budget.parameters(KNOWN[QWEN])
    assert one.memory["moments"] == 2 * 8 * n  # policy and critic, two float32 each
    assert estimate(config, lengths, gpus=2).memory["moments"] == 8 * n
    lora = dataclasses.replace(config, lora_rank=16, critic="shared")
    tuned = estimate(lora, lengths)
    assert tuned.memory["moments"] == 8 * budget.adapters(KNOWN[QWEN], 16)
    assert tuned.hours["update policy"] == pytest.approx(one.hours["update policy"] * 2 / 3)
    assert tuned.hours["update critic"] == 0
    warm = estimate(dataclasses.replace(config, warmup_iterations=5), lengths)
    assert warm.hours["update policy"] == pytest.approx(one.hours["update policy"] / 2)
    tested = estimate(dataclasses.replace(config, eval_games=16, eval_every=5), lengths)
    # before, at 5, after: three times two iterations' worth of episodes, over ten
    assert tested.hours["evaluate"] == pytest.approx(0.6 * tested.hours["collect"])
    assert tested.written == pytest.approx(1.6 * one.written)
    less = estimate(dataclasses.replace(config, gradient_checkpointing=True), lengths)
    assert less.memory["activations"] < one.memory["activations"] / 5
    assert less.hours["update policy"] == pytest.approx(one.hours["update policy"] * 4 / 3)
    with pytest.raises(ValueError, match="gpus is 0"):
        estimate(config, lengths, gpus=0)
