"""Cloning: the expert's turns are packed as the policy would have written them, and are learned."""

import dataclasses

import pytest

from hiper_lab import protocol
from hiper_lab.policy import Policy, load_model
from hiper_lab.protocol import Role
from hiper_lab.rollout import RolloutConfig
from hiper_lab.sampling import DECODINGS, Codec
from hiper_lab.warmstart import clone, names_of_things, to_samples, train_tokenizer, watch_expert


@pytest.fixture(scope="module", params=["household", "webshop"])
def watched(request):
    played, won = watch_expert(6, 0.0, 24, seed=5, env=request.param)
    assert won == 1  # without mistakes
    return request.param, played


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_clone_is_trained_on_what_the_sampler_may_draw(watched, decoding):
    _, played = watched
    model, tokenizer = load_model("tiny", "cpu")
    codec, config = Codec(tokenizer), RolloutConfig(decoding=decoding, max_new_tokens=200)
    samples = to_samples(played, codec, config)
    decisions = [d for episode in played for d in episode]
    for sample, decision in zip(samples, decisions, strict=True):
        prompt, written = sample.ids[: sample.prompt], codec.decode(sample.ids[sample.prompt :])
        shown, roles = decision.context, set(sample.role)
        if decoding == "action":
            shown, whole = (
                dataclasses.replace(shown, subgoal=""),
                f"<action>{decision.action}</action>",
            )
            assert roles == {Role.ACTION}
        else:
            switch = decision.subgoal != decision.context.subgoal
            whole = protocol.write(switch, decision.subgoal, decision.action)
        text = "".join(protocol.render("compact", shown, config.history_turns))
        assert codec.decode(prompt).removeprefix("<s>") == text
        # what follows the last choice is not fed
        assert whole == written if decoding == "free" else whole.startswith(written)
        for at, allowed in zip(sample.at, sample.allowed, strict=True):
            assert (allowed is None) == (decoding == "free")
            assert allowed is None or sample.ids[at + 1] in allowed
    policy = Policy(model, tokenizer, critic="shared", precision="float32")
    first, second = (clone(policy, samples[:32], epochs=1, lr=1e-3, seed=0) for _ in range(2))
    assert second > first


def test_names_are_spelt_alike_wherever_they_stand(watched):
    env, played = watched
    texts = ["".join(protocol.render("compact", d.context, 6)) for e in played for d in e]
    named = names_of_things(played, texts, env)
    tokenizer = train_tokenizer(texts, named, vocab_size=len(named) + 400)
    for text in texts[:3]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    name = max(named)
    (alone,) = tokenizer(name, add_special_tokens=False).input_ids
    for text in (f"take {name} 1", f"'{name}'", f"click[{name}]\n"):
        assert alone in tokenizer(text, add_special_tokens=False).input_ids
