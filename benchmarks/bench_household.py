"""How fast household games run on one core, next to a yardstick that does no game at all.

The yardstick is a fixed amount of plain Python on the same core, taking turns with the games; its
ratio makes numbers of different machines comparable.
"""

import random
import time

from hiper_lab.envs.games import SIZES, generate_game
from hiper_lab.envs.household import HouseholdEnv, World

STEPS, REPETITIONS, GAMES = 2_000, 5, 4


def play(worlds: list[World]) -> None:
    """Random admissible commands, starting over at the end of an episode."""
    rng = random.Random(0)
    for world in worlds:
        env = HouseholdEnv(world)
        _, info = env.reset()
        for _ in range(STEPS // len(worlds)):
            _, _, terminated, truncated, info = env.step(rng.choice(info["admissible"]))
            if terminated or truncated:
                _, info = env.reset()


def branch(worlds: list[World]) -> None:
    """Snapshot, one step, restore: what a planner does at every node."""
    rng = random.Random(0)
    for world in worlds:
        env = HouseholdEnv(world)
        _, info = env.reset()
        for _ in range(STEPS // len(worlds)):
            state = env.snapshot()
            env.step(rng.choice(info["admissible"]))
            info = env.restore(state)


def yardstick() -> None:
    """As many dictionary updates and string joins as there are steps."""
    counts: dict[str, int] = {}
    for i in range(STEPS):
        words = [f"thing {j}" for j in range(i % 20)]
        counts[", ".join(words)] = i


def main() -> None:
    print("household games, one core: per second (relative to the yardstick)")
    ways = {"yardstick": yardstick}
    for size in SIZES:
        worlds = [World.from_game(generate_game(seed, size=size)) for seed in range(GAMES)]
        ways[f"{size}: steps"] = lambda worlds=worlds: play(worlds)
        ways[f"{size}: snapshot, step, restore"] = lambda worlds=worlds: branch(worlds)
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(REPETITIONS):  # taking turns, so that all meet the same machine
        for name, run in ways.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    for name, seconds in best.items():
        print(f"{name:32} {STEPS / seconds:10,.0f}   ({best['yardstick'] / seconds:.3f})")


if __name__ == "__main__":
    main()
