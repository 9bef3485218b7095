"""How fast WebShop's environment runs on one core, and how much memory a live one takes.

A random walk: clicks drawn from what is admissible, every search made of other words, so that none
is answered from a cache. ``--products`` and ``--instructions`` take WebShop's own files; without
them it is the embedded shop. The ratio to the genuine environment uses GENUINE, a published figure
that was measured on another machine: read its order of magnitude.
"""

import argparse
import random
import time
import tracemalloc

from hiper_lab.envs.shop import Shop, embedded_shop
from hiper_lab.envs.webshop import WebShopEnv

# Cited, not measured here: WebShop at 64fa2a5 in text mode, 1000 products, bm25s in place of
# Lucene, random policy with one more call of get_available_actions a step, on two shared cores.
GENUINE = 57.0  # steps per second
STEPS, REPETITIONS = 4_000, 3


def walk(shop: Shop, count: int, steps: int = STEPS) -> list[WebShopEnv]:
    """``steps`` steps in all, in lock step over ``count`` environments; returns these."""
    rng = random.Random(0)
    titles = [product.title for product in shop.products]
    envs = [WebShopEnv(shop, goal=k % len(shop.goals)) for k in range(count)]
    infos = [env.reset()[1] for env in envs]
    for step in range(steps):
        k = step % count
        actions = infos[k]["admissible"]
        if actions[0].startswith("search["):  # the start page: a query of our own
            words = rng.choice(titles).split() + rng.choice(titles).split()
            actions = [f"search[{' '.join(rng.sample(words, 5))}]"]
        *_, terminated, truncated, infos[k] = envs[k].step(rng.choice(actions))
        if terminated or truncated:
            infos[k] = envs[k].reset()[1]
    return envs


def measure(shop: Shop, counts: tuple[int, ...] = (1, 8, 64, 512)) -> list[dict[str, float]]:
    """Per number of parallel environments: envs, steps_per_s, kb_per_env, times_genuine."""
    best = dict.fromkeys(counts, float("inf"))
    for _ in range(REPETITIONS):  # taking turns, so that all meet the same machine
        for count in counts:
            start = time.process_time()
            walk(shop, count)
            best[count] = min(best[count], time.process_time() - start)
    rows = []
    for count, seconds in best.items():
        tracemalloc.start()
        kept = walk(shop, count, 4 * count)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        rate = STEPS / seconds
        rows.append({"envs": count, "steps_per_s": rate, "kb_per_env": held / len(kept) / 1024,
                     "times_genuine": rate / GENUINE})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--products", help="items_shuffle_1000.json, plain or gzipped")
    parser.add_argument("--instructions", help="items_ins_v2_1000.json, plain or gzipped")
    args = parser.parse_args()
    start = time.process_time()
    shop = Shop.from_files(args.products, args.instructions) if args.products else embedded_shop()
    ready = time.process_time() - start
    print(f"WebShop, one core: {len(shop.products)} products, {len(shop.goals)} goals, "
          f"ready in {ready:.2f} s of CPU")  # fmt: skip
    print(f"environments   steps/s   KB each   × the genuine one's {GENUINE:.0f}/s (cited)")
    for row in measure(shop):
        print("{envs:12} {steps_per_s:9,.0f} {kb_per_env:9.1f}   {times_genuine:.0f}".format(**row))


if __name__ == "__main__":
    main()
