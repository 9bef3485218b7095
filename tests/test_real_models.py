"""Qwen2.5 and SmolLM2 by their architectures, small and random: LoRA, chat template, limits."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_sampling import play
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hiper_lab import rollout, train
from hiper_lab.config import TrainConfig
from hiper_lab.folder import read_checkpoint
from hiper_lab.policy import Policy, base_of, load_model
from hiper_lab.rollout import RolloutConfig
from hiper_lab.sampling import ACTION_TOKENS, Codec, longest_response
from hiper_lab.trajectory import EndReason

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
MODELS = {  # as published, but smaller: tied embeddings, grouped heads, biases, an idle vocabulary
    "Qwen2.5": (Qwen2ForCausalLM, Qwen2Config, {"num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 700, "max_position_embeddings": 1200, "rope_theta": 1e6}),
    "SmolLM2": (LlamaForCausalLM, LlamaConfig, {"num_attention_heads": 3, "num_key_value_heads": 1,
                "vocab_size": 640, "max_position_embeddings": 8192, "rope_theta": 1e5}),
}  # fmt: skip
REAL = {
    "iterations": 1, "episodes": 3, "max_turns": 3, "warmup_iterations": 0, "eval_games": 0,
    "env_tasks": ["pick_and_place_simple"], "template": "full", "history_turns": 2,
    "max_prompt_tokens": 1100, "lora_rank": 4, "critic": "adapter", "kl_coef": 0.1,
    "gradient_checkpointing": True, "keep_penalty": -0.1, "lr": 1e-2,
}  # fmt: skip


def save_model(folder, name, seed=0):
    kind, config, shape = MODELS[name]
    torch.manual_seed(seed)
    kind(config(**SHAPE, **shape, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer = load_model("tiny", "cpu")[1]
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A model folder, and a run that trained an adapter of it."""
    folder = tmp_path_factory.mktemp("qwen")
    config = TrainConfig.from_parameters(REAL | {"model": save_model(folder / "base", "Qwen2.5")})
    return folder, config, list(train.train(config, folder / "run"))


@pytest.mark.parametrize("decoding", ["guided", "free"])
def test_lora_trains_the_adapters_of_a_chat_model_and_nothing_else(tmp_path, decoding):
    config = TrainConfig.from_parameters(
        REAL | {"model": save_model(tmp_path, "SmolLM2"), "decoding": decoding,
                "max_new_tokens": 12, "precision": "bfloat16", "logprob_gap_limit": 0.5}
    )  # fmt: skip
    state = train.set_up(config)
    before = {n: p.detach().clone() for n, p in state.policy.named_parameters()}
    report = train.step(state)
    text = state.codec.decode(report.trajectories[0].turns[0].prompt_ids)
    assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_start|>assistant\n")
    moved = {n for n, p in state.policy.named_parameters() if not torch.equal(before[n], p)}
    assert moved and all("lora_" in n or n.startswith("heads.") for n in moved)
    assert any(".default." in n for n in moved) and any(".critic." in n for n in moved)
    assert report.metrics["policy/trained"] == 1
    reference = report.metrics["policy/kl_k3"]
    assert 0 <= reference < 0.01  # the adapter starts as nothing, so the reference is where we are


def test_an_adapter_goes_on_in_another_run_and_is_its_reference(qwen, tmp_path):
    folder, config, reports = qwen
    assert reports[-1].metrics["policy/logprob_gap"] < 1e-3
    saved = folder / "run" / "checkpoints" / "000001" / "adapter"
    assert json.loads((saved / "adapter_config.json").read_text())["r"] == 4
    state = train.set_up(replace(config, adapter=str(saved)))
    trained = {n: p for n, p in read_checkpoint(saved.parent).weights.items() if ".default." in n}
    mine = dict(state.policy.named_parameters())
    assert trained and all(torch.equal(p, mine[n]) for n, p in trained.items())
    ids = torch.arange(3, 30)[None]
    now = state.policy.hidden(ids)
    assert torch.equal(now, state.policy.hidden(ids, "reference"))
    plain = load_model(config.model, "cpu")[0].get_decoder()(input_ids=ids).last_hidden_state
    assert not torch.allclose(now, plain, atol=1e-4)
    train.step(state)
    assert torch.equal(now, state.policy.hidden(ids, "reference"))  # it stays where this run began
    assert not torch.equal(now, state.policy.hidden(ids))
    peft = pytest.importorskip("peft")
    loaded = peft.PeftModel.from_pretrained(load_model(config.model, "cpu")[0], str(saved))
    theirs = loaded.get_base_model().get_decoder()(input_ids=ids).last_hidden_state
    assert torch.allclose(now, theirs, atol=1e-5)  # anyone who knows peft can use it


def test_an_adapter_of_another_base_model_is_refused_by_name(qwen, tmp_path):
    folder, config, _ = qwen
    adapter = folder / "run" / "checkpoints" / "000001" / "adapter"
    other = save_model(tmp_path / "other", "Qwen2.5", seed=1)  # same shapes, other weights
    for model in (other, "tiny"):
        with pytest.raises(ValueError, match="adapter of another base model: 'base .0.1M param"):
            train.set_up(replace(config, model=model, adapter=str(adapter)))
    with pytest.raises(ValueError, match="has rank 4, but lora_rank is 8"):
        train.set_up(replace(config, adapter=str(adapter), lora_rank=8))
    with pytest.raises(ValueError, match="needs LoRA: set lora_rank > 0"):
        train.set_up(replace(config, critic="shared", adapter=str(adapter), lora_rank=0))
    with pytest.raises(FileNotFoundError, match="no adapter in .*expected adapter_config.json"):
        train.set_up(replace(config, adapter=str(tmp_path)))
    # of somebody else's adapter only the name of its base is known
    theirs = tmp_path / "theirs"
    shutil.copytree(adapter, theirs)
    (theirs / "base.json").unlink()
    train.set_up(replace(config, adapter=str(theirs)))
    said = json.loads((theirs / "adapter_config.json").read_text())
    said["base_model_name_or_path"] = "Qwen/Qwen2.5-7B-Instruct"
    (theirs / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="another base model: 'Qwen/Qwen2.5-7B-Instruct'"):
        train.set_up(replace(config, adapter=str(theirs)))


def test_a_run_does_not_go_on_over_another_base_model(qwen, tmp_path):
    """The name is the same, what lies there is not."""
    folder, config, _ = qwen
    shutil.copytree(folder / "run", tmp_path / "run")
    model = tmp_path / "base"
    shutil.copytree(folder / "base", model)
    moved = replace(config, model=str(model), iterations=1)
    settings = json.loads((tmp_path / "run" / "config.json").read_text()) | {"model": str(model)}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert list(train.train(moved, tmp_path / "run")) == []  # it is finished
    save_model(model, "Qwen2.5", seed=1)
    with pytest.raises(ValueError, match="000001 is an adapter of another base model: 'base "):
        next(train.train(moved, tmp_path / "run"))


def test_names_of_models_come_with_a_digest_of_their_weights(tmp_path):
    one, same, other = (
        load_model(save_model(tmp_path / str(k), "SmolLM2", seed), "cpu")[0]
        for k, seed in enumerate((0, 0, 1))
    )
    assert base_of(one).split(" ")[1:] == base_of(same).split(" ")[1:]
    assert base_of(one).split(" ")[1:] != base_of(other).split(" ")[1:]


def test_prompt_and_response_have_to_fit_into_the_context(qwen):
    _, config, _ = qwen
    codec = Codec(load_model("tiny", "cpu")[1])
    guided = longest_response(codec, "guided", 16)
    assert guided == len(codec.write(True, "", "")) + 16 + ACTION_TOKENS
    assert longest_response(codec, "free", 512) == 512
    longer = replace(config.rollout, max_prompt_tokens=1200 - guided + 1)
    with pytest.raises(ValueError, match=rf"reads no more than 1200: .* at most {1200 - guided}$"):
        train.set_up(replace(config, rollout=longer))


def test_a_long_prompt_drops_its_oldest_history_before_it_ends_the_episode():
    policy = Policy(*load_model("tiny", "cpu"))
    codec, free = play(policy, count=2, template="full", history_turns=6)
    lengths = [len(turn.prompt_ids) for t in free for turn in t.turns]
    limit = sorted(lengths)[len(lengths) // 2]
    _, ended = play(policy, count=2, template="full", max_prompt_tokens=limit)
    assert all(t.end is EndReason.TOKEN_LIMIT for t in ended)
    _, dropped = play(
        policy, count=2, template="full", max_prompt_tokens=limit, long_prompt="drop_history"
    )
    turns = [turn for t in dropped for turn in t.turns]
    assert all(len(turn.prompt_ids) <= limit for turn in turns)
    assert len(turns) > sum(len(t.turns) for t in ended)
    shown = [codec.decode(turn.prompt_ids) for turn in dropped[0].turns]
    k = next(k for k, t in enumerate(free[0].turns) if len(t.prompt_ids) > limit)
    assert "Action 1:" not in shown[k] and f"Action {k}:" in shown[k]  # the newest is still there


def test_responses_written_a_few_rows_at_a_time_are_as_greedy_as_all_at_once():
    policy = Policy(*load_model("tiny", "cpu"), critic="separate")
    _, together = play(policy, count=3, temperature=0.0)
    _, apart = play(policy, count=3, temperature=0.0, decode_rows=2)
    assert [[turn.response for turn in t.turns] for t in together] == [
        [turn.response for turn in t.turns] for t in apart
    ]


def test_limits_are_checked():
    for name, value in [("decode_rows", -1), ("max_prompt_tokens", 0), ("long_prompt", "cut")]:
        with pytest.raises(ValueError, match=f"{name} .*expected"):
            RolloutConfig(**{name: value})
    assert rollout.LONG_PROMPTS == ("end", "drop_history")
    with pytest.raises(ValueError, match="precision is 'half', expected one of"):
        TrainConfig(precision="half")
    with pytest.raises(ValueError, match="gradient_checkpointing is 1 .int., expected bool"):
        TrainConfig.from_parameters({"gradient_checkpointing": 1})
