"""Household games against the genuine engine: the same games, side by side in one run.

The engines take turns, so that both meet the same machine, and the best repetition counts. Every
game is played with the same seeded choices by both; a step always includes the list of admissible
commands. Without the extra "alfworld" only our engine is measured.

    python benchmarks/environments.py                  # prints the tables
    python benchmarks/environments.py --out benchmarks/results/environments.json   # README.md too
"""

import argparse
import importlib.util
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

from publishing import machine, publish

from hiper_lab.envs.alfworld import AlfworldEnv
from hiper_lab.envs.games import SIZES, TASK_TYPES, generate_game
from hiper_lab.envs.household import HouseholdEnv, World
from hiper_lab.envs.pool import EnvPool, reset_all, step_all

REPETITIONS = 3
SECONDS = 1.0  # of stepping, in each repetition
MAX_TURNS = 50


def walk(envs: list, infos: list[dict], rng: random.Random) -> int:
    """One step of every environment, in lock step; those at their end start over."""
    texts = [rng.choice(info["admissible"]) for info in infos]
    for k, (_, _, terminated, truncated, info) in enumerate(step_all(envs, texts)):
        infos[k] = envs[k].reset()[1] if terminated or truncated else info
    return len(envs)


def rate(step: Callable[[], int], seconds: float, clock: Callable[[], float]) -> float:
    """Steps per second of at least one call and about ``seconds``."""
    steps, start = 0, clock()
    while not steps or clock() - start < seconds:
        steps += step()
    return steps / (clock() - start)


def one_core() -> list[dict]:
    """Ours by size of game: steps, and what a planner does at every node; memory per live game."""
    rows = []
    for size in SIZES:
        worlds = [World.from_game(generate_game(k, size=size)) for k in range(8)]
        envs = [HouseholdEnv(world, MAX_TURNS) for world in worlds]
        infos, rng = [env.reset()[1] for env in envs], random.Random(0)

        def branch(env=envs[0], rng=rng) -> int:
            info = env.reset()[1]
            state = env.snapshot()
            for _ in range(20):
                env.step(rng.choice(info["admissible"]))
                info = env.restore(state)
            return 20

        runs = {"steps": partial(walk, envs, infos, rng), "snapshot, step, restore": branch}
        best = dict.fromkeys(runs, 0.0)
        for _ in range(REPETITIONS):
            for name, run in runs.items():
                best[name] = max(best[name], rate(run, SECONDS / 3, time.process_time))
        rows.append({"size": size, **best, "KB per live game": live_memory(worlds[0])})
    return rows


def live_memory(world: World, games: int = 64) -> float:
    """KB that one more game of the same world takes in the middle of an episode."""
    tracemalloc.start()
    envs, rng = [HouseholdEnv(world, MAX_TURNS) for _ in range(games)], random.Random(0)
    infos = [env.reset()[1] for env in envs]
    for _ in range(25):
        walk(envs, infos, rng)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / games / 1024


def resident(process: int | str = "self") -> float:
    """MB of memory that a process holds."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


def parallel(counts: list[int], size: str, workers: int, genuine: bool) -> list[dict]:
    """Lock-step play of many games by each engine: steps a second, and memory per game."""
    rows = []
    for count in counts:
        games = [
            generate_game(k, size=size, task_type=TASK_TYPES[k % len(TASK_TYPES)])
            for k in range(count)
        ]
        ours = [HouseholdEnv(game, MAX_TURNS) for game in games]
        runs = {"ours": partial(walk, ours, [env.reset()[1] for env in ours], random.Random(0))}
        row = {"games": count}
        pool = EnvPool(
            [partial(AlfworldEnv, game, MAX_TURNS) for game in games] if genuine else [], workers
        )
        with pool:
            if genuine:
                start = time.perf_counter()
                infos = [info for _, info in reset_all(pool.envs, [None] * count)]
                row["genuine: seconds until all games have started"] = time.perf_counter() - start
                runs["genuine"] = partial(walk, pool.envs, infos, random.Random(0))
            best = dict.fromkeys(runs, 0.0)
            for _ in range(REPETITIONS):
                for name, run in runs.items():
                    best[name] = max(best[name], rate(run, SECONDS, time.perf_counter))
            row |= {f"{name}: steps/s": value for name, value in best.items()}
            if genuine:
                row["ratio"] = best["ours"] / best["genuine"]
                held = sum(resident(process.pid) for process, _ in pool.workers)
                row["genuine: MB per game, with its share of the processes"] = held / count
        rows.append(row)
    return rows


def as_published(size: str) -> dict:
    """The genuine engine without what AlfworldEnv remembers, with it, and ours: one game, one core.

    Each walks at random for 20 turns and starts over; only the steps are timed.
    """
    game = generate_game(0, size=size)
    env, ours = AlfworldEnv(game, None), HouseholdEnv(game, None)
    steps = {
        "genuine as published": lambda text: env._env.step(text)[0]["admissible_commands"],
        "genuine through AlfworldEnv": lambda text: env.step(text)[-1]["admissible"],
        "ours": lambda text: ours.step(text)[-1]["admissible"],
    }
    best = dict.fromkeys(steps, 0.0)
    for seed in range(REPETITIONS):
        for name, step in steps.items():
            spent, taken, rng = 0.0, 0, random.Random(seed)
            while spent < SECONDS:
                admissible = (ours if name == "ours" else env).reset()[1]["admissible"]
                # walking and opening only, which never wins and so never ends the episode
                start = time.process_time()
                for _ in range(20):
                    walks = [c for c in admissible if c.startswith(("go to", "open", "close"))]
                    admissible = step(rng.choice(walks))
                spent, taken = spent + time.process_time() - start, taken + 20
            best[name] = max(best[name], taken / spent)
    return {"size": size, **best, "ratio to published": best["ours"] / best["genuine as published"]}


def table(rows: list[dict]) -> str:
    """Markdown."""

    def cell(value: object) -> str:
        return (
            f"{value:,.0f}"
            if isinstance(value, float) and value >= 10
            else (f"{value:.2g}" if isinstance(value, float) else str(value))
        )

    lines = [list(rows[0]), ["---"] * len(rows[0])] + [list(map(cell, r.values())) for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    given = parser.parse_args()
    genuine = importlib.util.find_spec("alfworld") is not None
    result = {
        "machine": machine(),
        "household, one core, per second of CPU": one_core(),
        f"parallel games of size {given.size}, {given.workers} processes for the genuine engine":
            parallel(given.games, given.size, given.workers, genuine),
    }  # fmt: skip
    if genuine:
        result["one game, one core, steps per second of CPU"] = [as_published(s) for s in SIZES]
    else:
        print("The genuine engine is not installed (pip install 'hiper-lab[alfworld]').")
    tables = [f"{name[0].upper()}{name[1:]}:\n\n{table(rows)}"
              for name, rows in result.items() if isinstance(rows, list)]  # fmt: skip
    text = "\n\n".join([f"Measured on {result['machine']}.", *tables])
    print(text)
    if given.out:
        publish(result, given.out, "environments.py", text)


if __name__ == "__main__":
    main()
