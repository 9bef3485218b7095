"""What training costs beyond its models: updates, decoding, and the sweep around the runs.

    python benchmarks/training.py --out benchmarks/results/training.json

writes the numbers there and the tables into ``README.md`` beside this file.

Updates: `train.update` next to bare forward and backward passes of transformers over the same
padded rows, in the same micro-batches, without optimiser, twice: with transformers' own loss on
every token, and with logits at the trained tokens only. They take turns on the same inputs; counted
are seconds of one core (not of the clock: others may use the machine), medians and their ratio.

Decoding: one policy plays the same games guided and free. A decode step is one forward pass of the
sampler, which advances every unfinished response by one choice.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench_sweep import overhead
from publishing import machine, publish
from transformers import LlamaConfig, LlamaForCausalLM

from hiper_lab import objective, train, trajectory
from hiper_lab.credit import estimate
from hiper_lab.objective import Sample
from hiper_lab.policy import load_model
from hiper_lab.rollout import collect
from hiper_lab.sampling import hf_sampler

REPETITIONS = 5
PLAY = {"warmup_iterations": 0, "eval_games": 0, "max_turns": 12}


# ------------------------------------------------------------------------------------- updates


def larger(folder: Path) -> str:
    """A random model of 5 million weights with the embedded one's tokenizer."""
    tokenizer = load_model("tiny", "cpu")[1]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def learn(state: train.State, played: list) -> list[Sample]:
    """What comes before the update: rows, values, credit."""
    config = state.config
    rollout, tokens = config.rollout, config.micro_batch_tokens
    samples = objective.pack(played, state.codec, rollout.decoding, rollout.max_new_tokens)
    values = objective.evaluate(state.policy, played, samples, tokens)
    grid = trajectory.to_grid(played)
    credit = train.scale_advantages(grid, estimate(grid, values, config.credit))
    objective.assign(samples, played, values, credit, high_everywhere=False)
    return samples


def bare(state: train.State, samples: list[Sample], lean: bool) -> None:
    """The least that a gradient over these rows takes, as one would write it in transformers."""
    config, policy = state.config, state.policy
    for start in range(0, len(samples), config.minibatch_turns):
        chosen = samples[start : start + config.minibatch_turns]
        state.optimizer.zero_grad()
        lengths = [len(sample.ids) for sample in chosen]
        for index in objective.micro_batches(lengths, config.micro_batch_tokens):
            rows, width = [chosen[i] for i in index], max(lengths[i] for i in index)
            ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in rows])
            if lean:
                row = torch.tensor([k for k, s in enumerate(rows) for _ in s.at])
                at = torch.tensor([position for s in rows for position in s.at])
                hidden = policy.model.get_decoder()(input_ids=ids, use_cache=False)[0]
                logits = policy.model.get_output_embeddings()(hidden[row, at])
                torch.nn.functional.cross_entropy(logits, ids[row, at + 1]).backward()
            else:
                policy.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            if policy.critic == "separate":
                critic = policy.critic_model.get_decoder()
                critic(input_ids=ids, use_cache=False)[0].mean().backward()


def updates(model: str, critic: str, episodes: int) -> dict:
    """Seconds of an update and of its bare passes, medians over repetitions that take turns."""
    # after the first update the policy is no longer the one that sampled, which is no news here
    given = PLAY | {"model": model, "critic": critic, "episodes": episodes}
    given["logprob_gap_limit"] = 1e9
    state = train.set_up(train.TrainConfig.from_parameters(given))
    played, samples = play(state), []

    def before() -> None:
        samples[:] = learn(state, played)

    before()
    sides = {
        "before": before,
        "update": lambda: train.update(state, samples),
        "bare": lambda: bare(state, samples, lean=False),
        "bare, lean": lambda: bare(state, samples, lean=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPETITIONS):
        for name, side in sides.items():
            start = time.process_time()
            side()
            taken[name].append(time.process_time() - start)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "weights": sum(p.numel() for p in state.policy.model.parameters()), "critic": critic,
        "turns": len(samples), "tokens": sum(len(s.ids) for s in samples), "seconds": seconds,
        "ratio": seconds["update"] / seconds["bare"],
        "lean ratio": seconds["update"] / seconds["bare, lean"],
        "with values and credit": (seconds["before"] + seconds["update"]) / seconds["bare"],
    }  # fmt: skip


# ------------------------------------------------------------------------------------ decoding


def play(state: train.State) -> list:
    """The configured number of training games, by the policy as it is."""
    config = state.config
    envs, names = train.make_envs(config, "train", 0, config.episodes)
    sampler = hf_sampler(state.policy, 1.0, torch.Generator().manual_seed(0))
    seeds = range(config.episodes)
    return collect(sampler, state.codec, envs, config.rollout, names=names, seeds=seeds)


def decoding(way: str) -> dict:
    """The embedded policy plays 64 games; every forward pass of its sampler is counted."""
    config = train.TrainConfig.from_parameters({"critic": "shared", "decoding": way})
    config = replace(config, rollout=replace(config.rollout, max_new_tokens=64))
    state = train.set_up(config)
    forward, fed = state.policy.hidden, []

    def counted(ids, *args, **kwargs):
        if "attention_mask" in kwargs:  # not the shared prefix, computed once for one row
            fed.append(len(ids))
        return forward(ids, *args, **kwargs)

    state.policy.hidden = counted
    start = time.process_time()
    played = play(state)
    seconds = time.process_time() - start
    turns = [len(t.turns) for t in played]
    return {
        "decoding": way, "episodes": len(played), "turns": sum(turns), "lock steps": max(turns),
        "success": statistics.mean(t.success for t in played),
        "forward passes": len(fed), "rows in them": sum(fed),
        "choices recorded": sum(sum(turn.chosen) for t in played for turn in t.turns),
        "tokens recorded": sum(len(turn.response_ids) for t in played for turn in t.turns),
        "seconds": seconds,
    }  # fmt: skip


# ----------------------------------------------------------------------------------- reporting


def report(result: dict) -> str:
    """The results as Markdown."""
    lines = [
        f"Measured on {result['machine']}, torch {result['torch']}, one thread.", "",
        "| weights | critic | turns, tokens | update | bare | ratio | bare, logits where trained |"
        " ratio | values, credit and update to bare |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["updates"]:
        per = {k: f"{s / row['tokens'] * 1e6:,.1f} µs" for k, s in row["seconds"].items()}
        lines.append(
            f"| {row['weights'] / 1e6:.2f}M | {row['critic']} | {row['turns']:,}, "
            f"{row['tokens']:,} | {per['update']} | {per['bare']} | {row['ratio']:.2f} | "
            f"{per['bare, lean']} | {row['lean ratio']:.2f} | {row['with values and credit']:.2f} |"
        )
    lines += [
        "", "(Times are per token. At most 1.3 is wanted of the first ratio.)", "",
        "| decoding | episodes, turns | forward passes | per lock step | rows in them | "
        "choices recorded | tokens recorded | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["decoding"]:
        lines.append(
            f"| {row['decoding']} | {row['episodes']}, {row['turns']:,} | "
            f"{row['forward passes']:,} | {row['forward passes'] / row['lock steps']:.1f} | "
            f"{row['rows in them']:,} | {row['choices recorded']:,} | "
            f"{row['tokens recorded']:,} | {row['seconds']:.1f} s |"
        )
    guided, free = result["decoding"]
    passes = guided["forward passes"] / free["forward passes"]
    same = guided["choices recorded"] / guided["tokens recorded"]
    idle = guided["episodes"] * guided["lock steps"] - guided["turns"]
    wasted = sum(row["rows in them"] - row["choices recorded"] for row in result["decoding"])
    lines += [
        "", f"Guided decoding takes {passes:.0%} of the forward passes of free decoding. The "
        f"embedded model was trained on choices only and writes the format badly, so the fairer "
        f"number: of its own guided responses, written token by token, {same:.0%} (at most 50% are "
        f"wanted of both). Rows that were computed "
        f"without a choice being recorded: {wasted}. So finished episodes generate nothing; had "
        f"all played on in lock step, the guided ones would have generated {idle:,} turns more.",
    ]  # fmt: skip
    swept = result["sweep"]
    return "\n".join([*lines, "", (
        f"A run of one small iteration takes {swept['launched']:.1f} s launched on its own and "
        f"{swept['swept']:.1f} s in a sweep of {swept['runs']}: an overhead of "
        f"{swept['swept'] - swept['launched']:.1f} s (at most 5 s are wanted)."
    )])  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the numbers here, and README.md's tables")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        models = {"tiny": 16, larger(Path(folder)): 3}
        compared = [
            updates(model, critic, episodes)
            for model, episodes in models.items() for critic in ("shared", "separate")
        ]  # fmt: skip
    result = {
        "machine": machine(), "torch": torch.__version__, "updates": compared,
        "decoding": [decoding(way) for way in ("guided", "free")], "sweep": overhead(),
    }  # fmt: skip
    text = report(result)
    print(text)
    if out:
        publish(result, out, "training.py", text)


if __name__ == "__main__":
    main()
