"""The embedded model: a tokenizer and a tiny Llama, behaviour-cloned on an imperfect expert.

``python -m hiper_lab.warmstart`` regenerates what ships in ``hiper_lab/models/tiny``. The clone
uses the same prompts, decoder and renormalised log-probabilities as the trainer, so it is
exactly the policy that reinforcement learning starts from.

Left out on purpose: pretraining on text; a model knows the games of its demonstrators and nothing
else.
"""

import argparse
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hiper_lab import objective, protocol
from hiper_lab.envs import games, shopper
from hiper_lab.envs.base import TextEnv
from hiper_lab.envs.games import HORIZONS, PLAN_TURNS, TASK_TYPES, generate_game
from hiper_lab.envs.household import HouseholdEnv
from hiper_lab.envs.shop import embedded_shop
from hiper_lab.envs.webshop import WebShopEnv
from hiper_lab.policy import Policy, fastest_device
from hiper_lab.protocol import KEEP, SKELETON, SWITCH, Context
from hiper_lab.rollout import RolloutConfig
from hiper_lab.sampling import DECODERS, DECODINGS, Codec, Draft
from hiper_lab.trajectory import Turn

CLONE_TURNS = 32  # turns per optimiser step
FIRST_SEED = 1_000_000  # games of the expert, far from the games of training runs


class Decision(NamedTuple):
    """One turn of the expert: what it saw and what it did, mistakes included."""

    context: Context
    subgoal: str
    action: str


def watch_expert(
    episodes: int, mistake_rate: float, max_turns: int, seed: int, horizon: str = "any",
    env: str = "household",
) -> tuple[list[list[Decision]], float]:  # fmt: skip
    """Let the expert play training games; its decisions, and its success rate.

    Each episode has a mistake rate of its own, uniform between 0 and ``mistake_rate``:
    demonstrators of every skill. ``env`` (``household`` or ``webshop``, the embedded shop) and
    ``horizon`` are those of the configuration (`hiper_lab.config`).
    """
    played, won = [], 0
    for k in tqdm(range(episodes), desc="expert", leave=False):
        world = _game(env, k, seed, horizon, max_turns)
        rng = random.Random(f"expert/{seed}/{k}")
        expert = EXPERTS[env](world, rng, rng.uniform(0, mistake_rate))
        seen, info = world.reset()
        decisions, history, active, over = [], [], "", False
        while not over:
            _, subgoal, action = expert.act(seen, info)
            context = Context(info["task"], seen, info["admissible"], active, list(history))
            decisions.append(Decision(context, subgoal, action))
            history.append((seen, action))
            active = subgoal
            seen, _, terminated, truncated, info = world.step(action)
            over = terminated or truncated
        won += info["won"]
        played.append(decisions)
    return played, won / episodes


EXPERTS = {"household": games.Expert, "webshop": shopper.Expert}


def _game(env: str, k: int, seed: int, horizon: str, max_turns: int) -> TextEnv:
    if env == "webshop":  # from the end: the goals of training runs are taken from the beginning
        shop = embedded_shop()
        goals = shop.splits["train"]
        return WebShopEnv(shop, max_turns, goal=goals[-1 - (seed + k) % len(goals)])
    task_type = TASK_TYPES[k % len(TASK_TYPES)] if horizon == "any" else None
    turns = HORIZONS.get(horizon, PLAN_TURNS)
    game = generate_game(FIRST_SEED + seed + k, task_type=task_type, turns=turns)
    return HouseholdEnv(game, max_turns)


def names_of_things(played: list[list[Decision]], texts: list[str], env: str) -> set[str]:
    """The words that a tiny model has to copy: the household's things, or what the wishes say."""
    if env == "household":
        return {name for text in texts for name in re.findall(r"([a-z]+) \d", text)}
    said = {w for e in played for w in re.findall("[a-z]+", e[0].context.task.lower())}
    return said | {word.capitalize() for word in said}  # titles are capitalised


def train_tokenizer(texts: list[str], named: set[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without word splitting, in which names and numbers are atoms.

    Phrases become single tokens ("\\n> go to ", ", you see a "). The names of things, and their
    numbers, are never merged with what surrounds them: a tiny model can copy "mug 1" from an
    observation into a command only if it is spelt the same way in both.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" \d+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    bpe.decoder = decoders.ByteLevel()
    names = re.compile(rf"\b(?:{'|'.join(sorted(named))})\b")
    atoms = [
        AddedToken(n, single_word=True, normalized=False, special=False) for n in sorted(named)
    ]
    atoms += [AddedToken(w, normalized=False, special=False) for w in (*SKELETON, KEEP, SWITCH)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(atoms), special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=24,
    )  # fmt: skip
    bpe.train_from_iterator((part for text in texts for part in names.split(text)), trainer)
    bpe.add_tokens(atoms)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def to_samples(
    played: list[list[Decision]], codec: Codec, config: RolloutConfig
) -> list[objective.Sample]:
    """The expert's turns as the policy would have written them."""
    samples, decoding, limit = [], config.decoding, config.max_new_tokens
    for context, subgoal, action in (decision for episode in played for decision in episode):
        if decoding == "action":
            context, ids = replace(context, subgoal=""), codec.write_action(action)
        else:
            ids = codec.write(subgoal != context.subgoal, subgoal, action)
        prompt = codec.prompt(*protocol.render(config.template, context, config.history_turns))
        draft = Draft()
        decoder = DECODERS[decoding](codec, draft, context.subgoal, context.admissible, limit)
        next(decoder)
        try:
            while True:
                decoder.send(ids[len(draft.ids)])
        except StopIteration as stop:
            response = stop.value
        turn = Turn(
            context.observation, context.admissible, prompt.ids, draft.ids, draft.roles,
            draft.logprobs, draft.chosen, codec.decode(draft.ids),
            response.switch, response.subgoal, response.action,
        )  # fmt: skip
        samples.append(objective.pack_turn(turn, context.subgoal, codec, decoding, limit))
    return samples


def clone(
    policy: Policy, samples: list[objective.Sample], *, epochs: int, lr: float, seed: int
) -> float:
    """Maximise the log-probability of the expert's choices; returns the last epoch's mean."""
    own, _ = policy.parameters_by_owner()
    optimizer = torch.optim.AdamW(own.values(), lr=lr, weight_decay=0.01)
    shuffle = random.Random(seed)
    steps = epochs * -(-len(samples) // CLONE_TURNS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(total=steps, desc="clone")
    for _ in range(epochs):
        order = shuffle.sample(range(len(samples)), len(samples))
        total = count = 0.0
        for start in range(0, len(order), CLONE_TURNS):
            rows = [samples[i] for i in order[start : start + CLONE_TURNS]]
            optimizer.zero_grad()
            tokens = sum(len(s.at) for s in rows)
            for index in objective.micro_batches([len(s.ids) for s in rows], 8192):
                batch = objective.collate([rows[i] for i in index], policy.device)
                now = objective.read_scores(policy, batch, policy.hidden(batch.ids), 1.0)
                (-now.logprob.sum() / tokens).backward()
                total += now.logprob.sum().item()
            count += tokens
            torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(logprob=f"{total / count:.3f}")
    return total / count


def main() -> None:
    """Regenerate the embedded model: clone what an imperfect expert did."""
    parser = argparse.ArgumentParser(prog="python -m hiper_lab.warmstart", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models" / "tiny")
    parser.add_argument("--episodes", type=int, default=3000, help="to watch (default 3000)")
    parser.add_argument("--mistakes", type=float, default=0.9, help="highest rate (default 0.9)")
    parser.add_argument("--env", choices=EXPERTS, default="household",
                        help="whose games (default household)")  # fmt: skip
    parser.add_argument("--horizon", choices=("any", *HORIZONS), default="any",
                        help="plans as long as train's env_horizon says (default any)")  # fmt: skip
    parser.add_argument("--max-turns", type=int, default=24, help="of an episode (default 24)")
    parser.add_argument("--decoding", choices=DECODINGS, default="guided",
                        help="what the model will write by itself (default guided)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=2, help="passes over them (default 2)")
    parser.add_argument("--width", type=int, default=64, help="hidden size (default 64)")
    parser.add_argument("--layers", type=int, default=2, help="(default 2)")
    parser.add_argument("--vocab", type=int, default=640, help="(default 640)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = RolloutConfig(
        decoding=args.decoding, max_new_tokens=48 if args.decoding == "free" else 16
    )
    played, success = watch_expert(
        args.episodes, args.mistakes, args.max_turns, args.seed, args.horizon, args.env
    )
    print(f"expert: {success:.1%} success in {args.episodes} training games")
    texts = [
        text
        for episode in played[:500]
        for d in episode
        for text in (
            "".join(protocol.render(config.template, d.context, config.history_turns)),
            d.subgoal,
            *d.context.admissible,
        )
    ]
    tokenizer = train_tokenizer(texts, names_of_things(played, texts, args.env), args.vocab)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.width, intermediate_size=3 * args.width,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 32,
        max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=args.width**-0.5,
    ))  # fmt: skip
    policy = Policy(model, tokenizer, critic="shared", precision="float32")
    policy.to(fastest_device())
    codec = Codec(tokenizer)
    samples = to_samples(played, codec, config)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f}M parameters, {len(samples)} turns")
    rate = 3e-3 * 64 / args.width  # wider layers bear smaller steps (Yang et al. 2022, muP)
    clone(policy, samples, epochs=args.epochs, lr=rate, seed=args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
