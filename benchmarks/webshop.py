"""How fast WebShop's environment is, how small, and how close its search is to WebShop's Lucene.

A random walk: clicks drawn from what is admissible, every search made of other words, so that none
is answered from a cache. ``--products`` and ``--instructions`` take WebShop's own files; without
them it is the embedded shop. The ratio to the genuine environment uses GENUINE, a published figure
that was measured on another machine: read its order of magnitude.

The search of WebShop is Anserini's, of pyserini 0.17.0. Its jar is all that is needed, beside Java:

    pip download --no-deps pyserini==0.17.0 && unzip pyserini-0.17.0-*.whl '*.jar'
    python benchmarks/webshop.py --lucene pyserini/resources/jars/anserini-0.14.3-fatjar.jar

With ``--out`` the numbers are written down, also into README.md, and with ``--lucene`` its first
hits for the queries in the embedded shop, against which ``tests/test_webshop.py`` holds our search.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
import tracemalloc
from pathlib import Path

from environments import table
from publishing import machine, publish

from hiper_lab.envs.shop import HITS, Product, Shop, document, embedded_shop
from hiper_lab.envs.webshop import WebShopEnv, suggest_searches

# Cited, not measured here: WebShop at 64fa2a5 in text mode, 1000 products, bm25s in place of
# Lucene, random policy with one more call of get_available_actions a step, on two shared cores.
GENUINE = 57.0  # steps per second
STEPS, REPETITIONS = 4_000, 3
QUERIES = 250  # of each of three kinds


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


def measure(shop: Shop, counts: tuple[int, ...] = (1, 8, 64, 512)) -> list[dict]:
    """A row per number of parallel environments."""
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
        rows.append({
            "visits": count, "steps/s": STEPS / seconds, "KB per visit": held / len(kept) / 1024,
            f"ratio to the genuine one's {GENUINE:.0f} steps/s (cited)": STEPS / seconds / GENUINE,
        })  # fmt: skip
    return rows


def queries(shop: Shop) -> list[str]:
    """What an agent may search for: offered searches, words of instructions, words of titles."""
    rng, found = random.Random(0), []
    for _ in range(QUERIES):
        goal, wanted = rng.choice(shop.goals), rng.choice(shop.products)
        said = goal.instruction_text.split()
        first = rng.randrange(len(said))
        title = wanted.title.split()
        found += [
            rng.choice(suggest_searches(goal.instruction_text))[len("search[") : -1],
            " ".join(said[first : first + rng.randint(1, 7)]),
            " ".join(rng.sample(title, min(5, len(title)))),
        ]
    return list(dict.fromkeys(" ".join(query.lower().split()) for query in found))


def lucene_hits(jar: Path, products: list[Product], texts: list[str]) -> list[list[str]]:
    """The asins that Anserini finds for each query, indexed and asked as WebShop does."""
    lines = [json.dumps({"id": p.asin, "contents": document(p)}) for p in products]
    hits: list[list[str]] = [[] for _ in texts]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "docs").mkdir()
        (here / "docs" / "products.jsonl").write_text("\n".join(lines), encoding="utf-8")
        asked = "".join(f"{k}\t{text}\n" for k, text in enumerate(texts))
        (here / "queries.tsv").write_text(asked, encoding="utf-8")
        java = ["java", "-cp", str(jar)]
        index = (
            "io.anserini.index.IndexCollection -collection JsonCollection -threads 1 "
            f"-generator DefaultLuceneDocumentGenerator -input {here}/docs -index {here}/index"
        )
        search = (
            f"io.anserini.search.SearchCollection -index {here}/index -topicreader TsvString "
            f"-topics {here}/queries.tsv -bm25 -hits {HITS} -output {here}/run"
        )
        for command in (index, search):
            subprocess.run([*java, *command.split()], check=True, stdout=subprocess.DEVNULL)
        for line in (here / "run").read_text().splitlines():
            k, _, asin, *_ = line.split()
            hits[int(k)].append(asin)
    return hits


def agreement(shop: Shop, texts: list[str], theirs: list[list[str]]) -> dict:
    """A row: how often our search and another one say the same."""
    ours = [[p.asin for p in shop.search(text, random.Random()) or ()] for text in texts]
    pairs = [(a[:10], b[:10]) for a, b in zip(ours, theirs, strict=True)]
    shared = [len(set(a) & set(b)) / max(len(a), len(b), 1) if a or b else 1.0 for a, b in pairs]
    return {
        "products": len(shop.products), "queries": len(texts),
        "same first hit": sum(a[:1] == b[:1] for a, b in pairs) / len(pairs),
        "common to both first pages": sum(shared) / len(pairs),
        "same first page": sum(a == b for a, b in pairs) / len(pairs),
        "same number of hits": sum(len(a) == len(b) for a, b in zip(ours, theirs, strict=True))
        / len(pairs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--products", help="items_shuffle_1000.json, plain or gzipped")
    parser.add_argument("--instructions", help="items_ins_v2_1000.json, plain or gzipped")
    parser.add_argument("--lucene", type=Path, help="Anserini's jar, to compare the search with")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    if args.out and not args.lucene:
        parser.error("--out needs --lucene: the tables would lose Lucene's figures")
    shops = {"embedded": embedded_shop()}
    if args.products:
        shops["WebShop's files"] = Shop.from_files(args.products, args.instructions)
    result: dict = {"machine": machine(), "speed": {k: measure(s) for k, s in shops.items()}}
    texts = [f"Measured on {result['machine']}; steps per second of CPU."]
    for name, rows in result["speed"].items():
        about = f"{len(shops[name].products)} products, {len(shops[name].goals)} goals"
        texts.append(f"WebShop, {name}, {about}:\n\n{table(rows)}")
    if args.lucene:
        rows = []
        for name, shop in shops.items():
            asked = queries(shop)
            theirs = lucene_hits(args.lucene, shop.products, asked)
            rows.append({"catalogue": name} | agreement(shop, asked, theirs))
            if name == "embedded":
                first = {text: hits[0] for text, hits in zip(asked, theirs, strict=True) if hits}
        result |= {"lucene": rows, "lucene_first_hits": first}
        shown = [{k: f"{v:.1%}" if isinstance(v, float) else v for k, v in row.items()}
                 for row in rows]  # fmt: skip
        texts.append(f"Search against Lucene ({args.lucene.name}):\n\n{table(shown)}")
    print("\n\n".join(texts))
    if args.out:
        publish(result, args.out, "webshop.py", "\n\n".join(texts))


if __name__ == "__main__":
    main()
