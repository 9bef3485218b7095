"""Loaders, critics, adapters, reference: what is trained, what is not, what is refused."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from hiper_lab.policy import Policy, load_model

IDS = torch.arange(3, 23)[None]


def tiny(**kwargs):
    return Policy(*load_model("tiny", "cpu"), **kwargs)


def names(group):
    return {name.split(".")[0] for name in group}


def test_who_owns_which_parameters():
    own, critic = tiny(critic="shared").parameters_by_owner()
    assert names(own) == {"model"} and names(critic) == {"heads"}
    own, critic = tiny(critic="separate").parameters_by_owner()
    assert names(own) == {"model"} and names(critic) == {"heads", "critic_model"}
    own, critic = tiny(critic="adapter", lora_rank=2).parameters_by_owner()
    assert all("lora_" in n and ".default." in n for n in own)
    assert any(".critic." in n for n in critic) and not own.keys() & critic.keys()


def test_values_start_at_zero():
    policy = tiny()
    assert policy.heads("low", policy.hidden(IDS, "critic")[0]).abs().max() == 0


@pytest.mark.parametrize("critic", ["shared", "adapter", "separate"])
def test_each_head_and_its_trunk_receive_gradient(critic):
    policy = tiny(critic=critic, lora_rank=2 if critic == "adapter" else 0)
    for level in ("high", "low", "switch"):
        torch.nn.init.ones_(getattr(policy.heads, level)[-1].weight)
        policy.zero_grad()
        policy.heads(level, policy.hidden(IDS, "critic")[0]).sum().backward()
        touched = {
            n for n, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
        }
        assert any(n.startswith(f"heads.{level}") for n in touched)
        trunk = {"shared": "model.", "adapter": "lora_", "separate": "critic_model."}[critic]
        assert any(trunk in n for n in touched)
        if critic == "adapter":
            assert not any(".default." in n for n in touched)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_reference_stays_where_training_began(lora_rank):
    policy = tiny(lora_rank=lora_rank, reference=True)
    before = policy.hidden(IDS, "reference")
    assert torch.allclose(before, policy.hidden(IDS), atol=1e-5)
    with torch.no_grad():
        for parameter in policy.parameters_by_owner()[0].values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert not torch.allclose(before, policy.hidden(IDS), atol=1e-2)
    assert torch.equal(before, policy.hidden(IDS, "reference"))
    logits = policy.logits(before, "reference")
    assert torch.allclose(logits, load_model("tiny", "cpu")[0](input_ids=IDS).logits, atol=1e-5)


def test_the_critic_adapter_does_not_touch_the_policy():
    policy = tiny(critic="adapter", lora_rank=2)
    before = policy.hidden(IDS)
    with torch.no_grad():
        for name, parameter in policy.parameters_by_owner()[1].items():
            if "lora_B" in name:
                parameter.add_(1.0)
    assert not torch.allclose(before, policy.hidden(IDS, "critic"), atol=1e-2)
    assert torch.equal(before, policy.hidden(IDS))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="critic 'both', expected one of"):
        tiny(critic="both")
    with pytest.raises(ValueError, match="needs LoRA: set lora_rank > 0"):
        tiny(critic="adapter")
    with pytest.raises(FileNotFoundError, match="expected a folder with config.json"):
        load_model(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="could not load model 'no/such-model'"):
        load_model("no/such-model")
    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.01, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes its logits"):
        Policy(Gemma2ForCausalLM(config), load_model("tiny", "cpu")[1])


def test_a_local_folder_loads(tmp_path):
    model, tokenizer = load_model("tiny", "cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(str(tmp_path), "cpu")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
