"""What WebShop's environment is played on: products, prices, goals, search and the reward.

A :class:`Shop` never changes; it is made once, from WebShop's own files or from the generated
catalogue, and shared by any number of :class:`hiper_lab.envs.webshop.WebShopEnv`.

Quirks of the original that are kept:

- the reward turns a chosen value into the first of COLORS that it contains ("rectangular" into
  "tan"), but hardly ever the wanted value, so that a perfect purchase can score below 1;
- a value is compared with "name value" of what is wanted, fuzzily: "large" passes for "x-large";
- the price that is paid is drawn once from the range on the page, and is never shown.

Left out on purpose: Lucene (see :func:`bm25_search` for how close it is), images, reviews (no
product has any). ``search[<a> …]`` and ``search[<c>]``, which crash the original, find nothing.

Source: WebShop (Yao et al. 2022, arXiv:2207.01206; github.com/princeton-nlp/WebShop, MIT), whose
list of colours is kept for compatibility.
"""

import gzip
import json
import math
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import Stemmer
from thefuzz import fuzz

from hiper_lab.envs.catalogue import HELD_OUT, generate_catalogue

HITS = 50
STOP_WORDS = """a an and are as at be but by for if in into is it no not of on or such that the
    their then there these they this to was will with""".split()  # Lucene's
# As Lucene cuts words: some signs join letters, and some join digits.
WORD = re.compile(r"\w+(?:(?<=[^\W\d])['’.:](?=[^\W\d])\w+|(?<=\d)['’.,;](?=\d)\w+)*")
POSSESSIVE = re.compile(r"['’]s\b", re.IGNORECASE)
STEMMER = Stemmer.Stemmer("porter")
COLORS = """alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze
    brown burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee
    cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia gold
    granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender lemon
    leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom
    mustard natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust
    sand sapphire seashell silver skull slate steel stone stonewash sunflower tan taupe teal tiger
    turquoise violet walnut wheat white wine yellow""".split()


class Product(NamedTuple):
    """One product, as pages and reward need it."""

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price_tag: str
    prices: tuple[float, ...]  # none, one, or the ends of a range
    options: dict[str, tuple[str, ...]]
    attributes: tuple[str, ...]
    category: str
    query: str  # what WebShop's authors searched for to find it
    product_category: str

    @property
    def named(self) -> dict[str, str]:
        """The option of each value; of two with the same value, the later one."""
        return {value: name for name, values in self.options.items() for value in values}


class Goal(NamedTuple):
    """What is to be bought, and how it is said."""

    asin: str
    category: str
    query: str
    name: str
    product_category: str
    instruction_text: str
    attributes: tuple[str, ...]
    price_upper: float
    goal_options: dict[str, str] | list[str]  # a list in goals written by people
    weight: float = 1.0


class Shop:
    """Products, purchase prices, goals and search: made once, shared by any number of visits.

    Args:
        products: As in WebShop's items_shuffle file.
        instructions: As in its items_ins file: attributes per asin, and an instruction with the
            attributes it asks for.
        human: As in items_human_ins: instructions written by people, which then are the goals
            instead of those made from ``instructions``.
        seed: Draws purchase prices and price bounds, as the original does after
            ``random.seed(seed)``. The order of the goals does not depend on it.
        held_out: Queries whose goals make up the split "unseen".
        search: From keywords to asins, the best first; None searches with BM25.
        nouns: The nouns of a title, for the reward; see :func:`title_words`, :func:`spacy_nouns`.
        sources: What to call the three parts in an error.

    ``splits`` has the goals' indices: "seen" are the first 500 (the published test goals; at most
    a tenth of all), "train" the others, "unseen" those of ``held_out``, if any.

    Raises:
        ValueError: If a part is broken; says where, what was seen and what expected.

    Example:
        >>> shop = embedded_shop()
        >>> len(shop.products), sorted(shop.splits)
        (600, ['seen', 'train', 'unseen'])
        >>> goal = shop.goals[0]
        >>> shop.reward(goal.asin, goal, dict(goal.goal_options))[0]
        1.0
    """

    def __init__(
        self,
        products: list[dict],
        instructions: dict[str, dict],
        human: dict[str, list[dict]] | None = None,
        *,
        seed: int = 0,
        held_out: Collection[str] = (),
        search: Callable[[str], Sequence[str]] | None = None,
        nouns: Callable[[str], list[str]] | None = None,
        sources: tuple[str, str, str] = ("products", "instructions", "human instructions"),
    ):
        self.products = _products(products, instructions, sources)
        self.by_asin = {p.asin: p for p in self.products}
        rng = random.Random(seed)
        self.prices = {p.asin: _purchase_price(p, rng) for p in self.products}
        if human is None:
            goals = _synthetic_goals(self.products, self.prices, instructions, rng, sources[1])
        else:
            goals = _human_goals(self.products, self.prices, human, rng, sources[2])
        if not goals:
            raise ValueError(f"{sources[1]}: no instruction for any product, expected some")
        random.Random(233).shuffle(goals)
        self.goals: list[Goal] = goals
        self.cumulative_weights = list(accumulate(goal.weight for goal in goals))
        unseen = [i for i, goal in enumerate(goals) if goal.query in held_out]
        others = [i for i, goal in enumerate(goals) if goal.query not in held_out]
        first = min(500, len(others) // 10)
        self.splits = {"train": others[first:], "seen": others[:first]}
        if unseen:
            self.splits["unseen"] = unseen
        self._ranking = lru_cache(maxsize=4096)(search or bm25_search(self.products))
        self._nouns = lru_cache(maxsize=4096)(nouns or title_words)

    @classmethod
    def from_files(
        cls, products: Path | str, instructions: Path | str, human: Path | str | None = None,
        *, seed: int = 0, **options: Any,
    ) -> "Shop":  # fmt: skip
        """Load WebShop's own files, plain JSON or gzipped; ``options`` as for the class.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a file is broken: names the file, the product and the key.
        """
        files = [products, instructions, *([] if human is None else [human])]
        loaded = [_read(file, kind) for file, kind in zip(files, (list, dict, dict), strict=False)]
        sources = (str(products), str(instructions), str(human))
        return cls(*loaded, seed=seed, sources=sources, **options)

    def search(self, keywords: str, rng: random.Random) -> list[Product] | None:
        """The hits, the best first; None if the original would crash.

        ``<r>`` asks for random products, ``<c> category`` and ``<q> query`` are exact filters.
        """
        words = keywords.split(" ")
        if words[0] == "<r>":
            return rng.sample(self.products, min(HITS, len(self.products)))
        if words[0] == "<a>" or words == ["<c>"]:
            return None
        if words[0] == "<c>":
            return [p for p in self.products if p.category == words[1].strip()]
        if words[0] == "<q>":
            return [p for p in self.products if p.query == " ".join(words[1:]).strip()]
        return [self.by_asin[asin] for asin in self._ranking(keywords)]

    def reward(
        self, asin: str, goal: Goal, options: dict[str, str], price: float | None = None
    ) -> tuple[float, dict[str, Any]]:
        """The score of a purchase in [0, 1], and what it is made of.

        ``r_type · (attributes matched + options matched + price ok) / (attributes + options + 1)``

        Args:
            options: The chosen value of each option.
            price: What was paid; None: the product's purchase price.
        """
        bought = self.by_asin[asin]
        price = self.prices[asin] if price is None else price
        kind = self._type_reward(bought, goal)
        attributes = sum(_has_attribute(bought, a) for a in goal.attributes)
        chosen = [_normalize_color(value) for value in options.values()]
        wanted = goal.goal_options
        wanted = list(wanted.items()) if isinstance(wanted, dict) else wanted
        matched = sum(
            any(fuzz.token_set_ratio(_normalize_color(w), c) > 85 for c in chosen) for w in wanted
        )
        affordable = price <= goal.price_upper
        parts = len(goal.attributes) + len(wanted) + 1
        score = (attributes + matched + affordable) / parts * kind["r_type"]
        breakdown = kind | {
            "r_att": attributes / len(goal.attributes), "w_att": len(goal.attributes) / parts,
            "r_price": affordable, "w_price": 1 / parts,
        }  # fmt: skip
        if wanted:
            breakdown |= {"r_option": matched / len(wanted), "w_option": len(wanted) / parts}
        return score, breakdown

    def _type_reward(self, bought: Product, goal: Goal) -> dict[str, Any]:
        query_match = bought.query == goal.query
        levels = [
            {level.strip() for level in text.split("›")}
            for text in (bought.product_category, goal.product_category)
        ]
        category_match = len(levels[0] & levels[1]) >= 2
        ours, theirs = self._nouns(bought.title), self._nouns(goal.name)
        title_score = len(set(ours) & set(theirs)) / len(theirs) if theirs else 0.2
        r_type = 1.0 if query_match or category_match or title_score > 0.2 else 0.5
        if title_score < 0.1:
            r_type = 0.1 if title_score > 0 else 0.0
        return {"r_type": r_type, "query_match": query_match, "category_match": category_match,
                "title_score": title_score}  # fmt: skip


@lru_cache(maxsize=1)
def embedded_shop() -> Shop:
    """The shop of generated products, made at the first call; goals of held-out kinds are unseen.

    Example:
        >>> shop = embedded_shop()
        >>> sorted({shop.goals[i].query for i in shop.splits["unseen"]})
        ['bath towel', 'leather belt', 'nail polish', 'olive oil', 'tablet case']
    """
    return Shop(*generate_catalogue(), held_out=HELD_OUT)


# --------------------------------------------------------------------------------- words and hits


def title_words(title: str) -> list[str]:
    """Words of a title that may be nouns: no stop words, no numbers, nothing of one letter.

    A stand-in for the part-of-speech tagger of the original. On WebShop's 1000 products it gives
    the same r_type as the tagger for 97% of random pairs, 95% of pairs of one category and 96% of
    pairs of one query (4000 each).

    Example:
        >>> title_words("Women's Shoes with 2 Straps, 40mm Heel")
        ['women', 'shoes', 'straps', '40mm', 'heel']
    """
    words = re.findall(r"\w+", POSSESSIVE.sub("", title.lower()))
    return [w for w in words if len(w) > 1 and not w.isdigit() and w not in STOP_WORDS]


def spacy_nouns(model: str = "en_core_web_sm") -> Callable[[str], list[str]]:
    """The tagger of the original, for ``Shop(nouns=spacy_nouns())``.

    Needs the extra ``webshop`` and ``python -m spacy download en_core_web_sm``.

    Raises:
        ImportError: If spaCy is not installed.
        OSError: If its model is not.
    """
    import spacy

    tagger = spacy.load(model)
    return lambda text: [t.text.lower() for t in tagger(text) if t.pos_ in ("NOUN", "PROPN")]


def document(bought: Product) -> str:
    """What search reads of a product: title, description, first bullet and options."""
    options = (f"{name}: {', '.join(values)}" for name, values in bought.options.items())
    texts = (bought.title, bought.description, *bought.bullets[:1], ", and ".join(options))
    return " ".join(texts).lower()


def search_words(text: str) -> list[str]:
    """The words that search goes by, as Lucene's English analyzer makes them.

    It stems "-logi" and "-bli" otherwise, and keeps emoji.

    Example:
        >>> search_words("The Women's T-Shirts, size: XS, 3.5 oz, $1,299.95")
        ['women', 't', 'shirt', 'size', 'xs', '3.5', 'oz', '1,299.95']
    """
    text = text.encode("utf-8", "ignore").decode()  # a lone surrogate is nothing for the stemmer
    words = WORD.findall(POSSESSIVE.sub("", text.lower()))
    return [STEMMER.stemWord(w) if len(w) > 2 else w for w in words if w not in STOP_WORDS]


def bm25_search(products: Sequence[Product]) -> Callable[[str], tuple[str, ...]]:
    """Index products; returns the function from keywords to the asins of the best hits.

    BM25 with Lucene's formula, k1 = 0.9 and b = 0.4, equal scores in the order of the asins: what
    WebShop's Lucene is set to. It lists the same first hit for 99% of queries, and 99% of what is
    on the first page: ``benchmarks/webshop.py --lucene`` compares them. The others differ because
    Lucene rounds the length of a document to four bits, so that nearly equal scores change places.

    Raises:
        ValueError: If there is nothing to search for.
    """
    products = sorted(products, key=lambda p: p.asin)
    corpus = [search_words(document(p)) for p in products]
    if not any(corpus):
        raise ValueError("products: no word to search for in any title, description or option")
    # Where jax is installed, importing bm25s starts it: on a GPU it would take most of the memory.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s

    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(corpus, show_progress=False)

    def search(keywords: str) -> tuple[str, ...]:
        known = index.get_tokens_ids(search_words(keywords))
        if not known:
            return ()
        scores = index.get_scores_from_ids(known)
        # (bm25s itself leaves the order of equal scores to the processor's sorting instructions)
        best = np.argsort(-scores, kind="stable")[:HITS]
        return tuple(products[i].asin for i in best if scores[i] > 0)

    return search


# ------------------------------------------------------------------------- reward, piece by piece


def _has_attribute(bought: Product, wanted: str) -> bool:
    if any(fuzz.token_set_ratio(attribute, wanted) > 85 for attribute in bought.attributes):
        return True
    texts = (bought.title, " ".join(bought.bullets), bought.description)
    return any(wanted in text.lower() for text in texts)


def _normalize_color(text: str | tuple[str, str]) -> str | tuple[str, str]:
    """The first colour that a text contains, in its place; for a pair, that is one of its items."""
    return next((color for color in COLORS if color in text), text)


# ------------------------------------------------------------------------------- reading the files


def _read(file: Path | str, kind: type) -> Any:
    try:
        data = Path(file).read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        content = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{file}: {error}; expected JSON, plain or gzipped") from error
    if not isinstance(content, kind):
        seen, expected = type(content).__name__, {list: "list of products", dict: "dict by asin"}
        raise ValueError(f"{file}: saw a {seen}, expected a {expected[kind]}")
    return content


def _products(
    raw: list[dict], instructions: dict[str, dict], sources: tuple[str, str, str]
) -> list[Product]:
    """Parse products; skips those without an asin, with a long one, or seen before."""
    found: dict[str, Product] = {}
    for i, entry in enumerate(raw):
        where = f"{sources[0]}: product {i}"
        asin = _get(entry, "asin", str, where)
        if asin == "nan" or len(asin) > 10 or asin in found:
            continue
        where = f"{where} ({asin})"
        texts = {key: _get(entry, key, str, where) for key in (
            "name", "full_description", "category", "query", "product_category"
        )}  # fmt: skip
        bullets = _get(entry, "small_description", (list, str), where)
        instruction = _get(instructions, asin, dict, sources[1])
        prices, price_tag = _pricing(entry.get("pricing"), where)
        found[asin] = Product(
            asin, texts["name"], texts["full_description"],
            _strings([bullets] if isinstance(bullets, str) else bullets,
                     f"{where}: 'small_description'"),
            price_tag, prices, _options(entry, where),
            _strings(instruction.get("attributes", ["DUMMY_ATTR"]),
                     f"{sources[1]}: {asin}: 'attributes'"),
            texts["category"], texts["query"].lower().strip(), texts["product_category"],
        )  # fmt: skip
    if not found:
        raise ValueError(f"{sources[0]}: no product, expected some")
    return list(found.values())


def _options(entry: dict, where: str) -> dict[str, tuple[str, ...]]:
    raw = _get(entry, "customization_options", (dict, str, type(None)), where) or {}
    if isinstance(raw, str):
        raise ValueError(f"{where}: 'customization_options' is {raw[:40]!r}, expected a dict")
    options = {}
    for name, contents in raw.items():
        if contents is not None:
            key = f"{where}: option {name!r}"
            if not isinstance(contents, list):
                raise ValueError(f"{key} is a {type(contents).__name__}, expected a list")
            values = [_get(content, "value", str, key) for content in contents]
            options[name.lower()] = tuple(v.strip().replace("/", " | ").lower() for v in values)
    return options


def _pricing(text: Any, where: str) -> tuple[tuple[float, ...], str]:
    """Prices, and how pages show them.

    Example:
        >>> _pricing("$1,037.99 - $129.9", ""), _pricing("", "")
        (((1037.99, 129.9), '$1037.99 to $129.9'), ((100.0,), '$100.0'))
    """
    if not text:
        return (100.0,), "$100.0"
    try:
        prices = [float(re.sub(r"[^\d.]", "", part)) for part in text.split("$")[1:]][:2]
    except (AttributeError, ValueError):
        prices = []
    if not prices or not all(math.isfinite(p) for p in prices):
        raise ValueError(f"{where}: 'pricing' is {text!r}, expected one like '$9.99' or ''")
    return tuple(prices), " to ".join(f"${price}" for price in prices)


def _get(entry: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: saw a {type(entry).__name__}, expected a dict with {key!r}")
    if key not in entry:
        raise ValueError(f"{where}: no {key!r}")
    if not isinstance(entry[key], kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{where}: {key!r} is a {type(entry[key]).__name__}, expected {expected}")
    return entry[key]


def _strings(values: Any, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{where} is {str(values)[:40]}, expected a list of texts")
    return tuple(values)


# ------------------------------------------------------------------------------------------- goals


def _purchase_price(bought: Product, rng: random.Random) -> float:
    return bought.prices[0] if len(bought.prices) == 1 else rng.uniform(*bought.prices)


def _price_bound(price: float, rng: random.Random) -> tuple[float, str]:
    above = [10.0 * i for i in range(1, 100) if 10.0 * i > price][:4]
    if len(above) < 2:
        return 1000000, ""
    upper = max(rng.sample(above, 2))
    return upper, f", and price lower than {upper:.2f} dollars"


def _synthetic_goals(
    products: list[Product], prices: dict[str, float], instructions: dict[str, dict],
    rng: random.Random, source: str,
) -> list[Goal]:  # fmt: skip
    """One goal per product with an instruction and combination of its options."""
    goals: list[Goal] = []
    for p in products:
        entry = instructions[p.asin]
        if entry.get("instruction") is None:
            continue
        where = f"{source}: {p.asin}"
        text = _get(entry, "instruction", str, where)
        wanted = _strings(entry.get("instruction_attributes"), f"{where}: 'instruction_attributes'")
        if not wanted:
            raise ValueError(f"{where}: 'instruction_attributes' is empty, expected some")
        upper, bound = _price_bound(prices[p.asin], rng)
        names = sorted(p.options)
        for values in product(*(p.options[name] for name in names)):
            options = dict(zip(names, values, strict=True))
            said = ", and ".join(f"{name}: {value}" for name, value in options.items())
            goals.append(Goal(
                p.asin, p.category, p.query, p.title, p.product_category,
                text + (f" with {said}" if said else "") + bound, wanted, upper, options,
            ))  # fmt: skip
    counts = Counter(attribute for goal in goals for attribute in goal.attributes)
    return [
        goal._replace(weight=sum(1 / counts[a] for a in goal.attributes) / len(goal.attributes))
        for goal in goals
    ]


def _human_goals(
    products: list[Product], prices: dict[str, float], human: dict[str, list[dict]],
    rng: random.Random, source: str,
) -> list[Goal]:  # fmt: skip
    """One goal per instruction that asks for an attribute; its options are a list."""
    goals = []
    for p in products:
        for i, entry in enumerate(human.get(p.asin, [])):
            where = f"{source}: {p.asin}: instruction {i}"
            wanted, options = (
                _strings(_get(entry, key, list, where), f"{where}: {key!r}")
                for key in ("instruction_attributes", "instruction_options")
            )
            text = _get(entry, "instruction", str, where)
            if wanted:
                upper, bound = _price_bound(prices[p.asin], rng)
                goals.append(Goal(
                    p.asin, p.category, p.query, p.title, p.product_category,
                    text.strip(".") + bound, wanted, upper, list(options),
                ))  # fmt: skip
    return goals
