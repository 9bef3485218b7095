"""Made-up recorded runs for the tests and benchmarks of the inspectors; seeded, no model."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from hiper_lab import protocol, trajectory
from hiper_lab.credit import CreditConfig, estimate
from hiper_lab.protocol import Role
from hiper_lab.trajectory import EndReason, Trajectory, Turn

TASKS = ("pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep")
THINGS = ("mug", "plate", "book", "apple")
PLACES = ("desk 1", "shelf 2", "fridge 1", "drawer 3", "sidetable 1")


def episode(rng: random.Random, name: str, game: int, turns: int, skill: float) -> Trajectory:
    """One trajectory of at most so many turns, with texts, token texts and values."""
    thing, subgoal, made = THINGS[game % len(THINGS)], "", []
    won = rng.random() < skill
    length = rng.randint(max(2, turns // 3), turns - 1) if won else turns
    for i in range(length):
        switch = i == 0 or rng.random() < 0.3
        if switch:
            subgoal = f"{rng.choice(('find', 'take', 'clean', 'put away'))} the {thing}"
        action = f"go to {rng.choice(PLACES)}"
        words = ("SWITCH" if switch else "KEEP", subgoal, action)
        tags = protocol.SKELETON
        pieces = [piece for pair in zip(tags, (*words, ""), strict=True) for piece in pair if piece]
        roles = [Role.FORMAT, Role.SWITCH, Role.FORMAT, Role.SUBGOAL, Role.FORMAT, Role.ACTION,
                 Role.FORMAT]  # fmt: skip
        chosen = [role in (Role.SWITCH, Role.ACTION) or (role == Role.SUBGOAL and switch)
                  for role in roles]  # fmt: skip
        made.append(Turn(
            observation=f"At {rng.choice(PLACES)} you see a {thing} 1 & <nothing> else.",
            admissible=[f"go to {place}" for place in PLACES],
            prompt_ids=[rng.randrange(600) for _ in range(60)],
            response_ids=list(range(len(pieces))), roles=[int(role) for role in roles],
            logprobs=[-round(rng.random(), 4) if c else 0.0 for c in chosen], chosen=chosen,
            response="".join(pieces), switch=switch, subgoal=subgoal, action=action,
            reward=float(won and i == length - 1), value_high=round(rng.random(), 4),
            value_low=round(rng.random(), 4), value_switch=round(rng.random(), 4), pieces=pieces,
        ))  # fmt: skip
    return Trajectory(
        id=name, task=f"put a {thing} in fridge.", game=f"train/{game}", seed=game, turns=made,
        end=EndReason.WON if won else EndReason.TURN_LIMIT, final_observation="The end.",
        final_prompt_ids=[1, 2], final_value=round(rng.random(), 4),
        task_type=TASKS[game % len(TASKS)],
    )  # fmt: skip


def make_run(
    folder: Path, iterations: int = 3, episodes: int = 6, turns: int = 8, seed: int = 0
) -> Path:
    """A run's folder: config, metrics, one record file per iteration, credit as in training."""
    rng, config = random.Random(seed), CreditConfig.lab()
    evaluation = {"eval/success": 0.2, "eval/success_low": 0.1, "eval/success_high": 0.3}
    metrics = [{"iteration": 0} | evaluation]
    for iteration in range(1, iterations + 1):
        made = [
            episode(rng, f"{k:04d}", k, turns, iteration / (iterations + 1))
            for k in range(episodes)
        ]
        values = trajectory.to_values(made)
        trajectory.attach(made, values, estimate(trajectory.to_grid(made), values, config))
        trajectory.save(made, folder / "rollouts" / f"{iteration:06d}.jsonl.gz")
        frame = trajectory.trajectory_frame(made)
        metrics.append({
            "iteration": iteration, "rollout/success": float(frame["success"].mean()),
            "plan/switch_rate": float(frame["switch_rate"].mean()),
            "plan/segment_turns": float(frame["turns"].sum() / frame["segments"].sum()),
        })  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in metrics)
    trajectory.write_atomic(folder / "metrics.jsonl", text.encode())
    stored = {
        "seed": seed, "iterations": iterations, "credit": asdict(config), "reward_scale": 1.0,
        "rollout": {"template": "compact", "history_turns": 12},
    }  # fmt: skip
    trajectory.write_atomic(folder / "config.json", json.dumps(stored).encode())
    return folder
