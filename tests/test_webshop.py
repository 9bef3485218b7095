"""The shop says, allows and pays what the genuine WebShop does; the embedded one can be won.

The recorded sessions are compared where they are at hand (``shared`` beside the repository);
everything else stands on the generated catalogue and on numbers worked out by hand.
"""

import gzip
import hashlib
import json
import math
import random
import re
import tracemalloc
from collections import Counter

import pytest
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st

from hiper_lab import train
from hiper_lab.envs.catalogue import HELD_OUT, OPTIONS, generate_catalogue
from hiper_lab.envs.shop import (
    STOP_WORDS,
    Goal,
    Shop,
    embedded_shop,
    search_words,
    spacy_nouns,
    title_words,
)
from hiper_lab.envs.shopper import Expert
from hiper_lab.envs.webshop import SUB_PAGES, WebShopEnv, parse_action, suggest_searches
from hiper_lab.protocol import SEPARATOR, SHOP_LIMIT, TEMPLATES, Context, render

# ----------------------------------------------------------------------- the genuine environment


def read(path):
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.fixture(scope="module")
def recorded(shared):
    return read(shared / "data" / "webshop_sessions.json.gz")


@pytest.fixture(scope="module")
def files(shared):
    folder = shared / "data" / "webshop"
    return folder / "items_shuffle_1000.json.gz", folder / "items_ins_v2_1000.json.gz"


@pytest.fixture(scope="module")
def own(recorded, files):
    """The genuine products, with our search and our words for the tagger's nouns."""
    return Shop.from_files(*files, seed=recorded["preseed"])


@pytest.fixture(scope="module")
def tags(own, recorded):
    return {p.title: recorded["title_nouns"][p.asin] for p in own.products}


@pytest.fixture(scope="module")
def genuine(recorded, files, tags):
    """The genuine products, with the recorded rankings and nouns."""
    rankings = recorded["search_results"].__getitem__
    return Shop.from_files(*files, seed=recorded["preseed"], search=rankings, nouns=tags.get)


def test_prices_and_all_goals_are_the_genuine_ones(genuine, recorded):
    assert genuine.prices == recorded["purchase_prices"]
    lines = [[g.asin, g.instruction_text, g.price_upper] for g in genuine.goals]
    assert len(lines) == recorded["n_goals"] == 6910
    digest = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    assert digest == recorded["goals_digest"]
    for fields in recorded["goals"]:
        goal = genuine.goals[fields["index"]]
        ours = goal._replace(attributes=list(goal.attributes))._asdict()
        assert ours | {"index": fields["index"]} == fields
    assert genuine.splits == {"seen": list(range(500)), "train": list(range(500, 6910))}


@pytest.mark.parametrize("observation", ["text", "text_rich"])
def test_every_step_of_every_session_is_the_genuine_one(genuine, recorded, observation):
    key = {"text": "observation", "text_rich": "observation_rich"}[observation]
    compared = 0
    for session in recorded["sessions"]:
        if key not in session["steps"][0]:
            continue
        env = WebShopEnv(genuine, None, observation=observation, continue_after_purchase=True)
        seen, info = env.reset(options={"goal": session["goal_index"]})
        for step in session["steps"]:
            reward, done = 0.0, False
            if step["action"] is not None:
                seen, reward, done, _, info = env.step(step["action"])
            where = (session["goal_index"], step["action"])
            assert seen == step[key], where
            assert env.get_available_actions() == step["available"], where
            assert done == step["done"] and abs(reward - step["reward"]) <= 1e-6, where
            if bought := step.get("purchase"):
                assert info["breakdown"] == bought["reward_info"], where
            compared += 1
    assert compared == {"text": 521, "text_rich": 54}[observation]


def test_every_recorded_reward_is_the_genuine_one(genuine, recorded):
    for call in recorded["rewards"]:
        goal = Goal(**{k: v for k, v in call["goal"].items() if k in Goal._fields})
        score, breakdown = genuine.reward(call["asin"], goal, call["options"], call["price"])
        assert abs(score - call["reward"]) <= 1e-6 and breakdown == call["info"], call["kind"]
    assert len(recorded["rewards"]) == 200


def slow_scores(shop, keywords, words):
    """BM25 with Lucene's formula, one number at a time; yields each query with {asin: score}."""
    documents = {}
    for p in shop.products:
        said = ", and ".join(f"{name}: {', '.join(v)}" for name, v in p.options.items())
        text = f"{p.title} {p.description} {p.bullets[0] if p.bullets else ''} {said}"
        documents[p.asin] = Counter(words(text))
    mean = sum(d.total() for d in documents.values()) / len(documents)
    containing = Counter(word for d in documents.values() for word in d)
    for query in keywords:
        scores = Counter()
        for word in words(query):
            n = containing[word]
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            for asin, d in documents.items():
                if d[word]:
                    length = 0.9 * (1 - 0.4 + 0.4 * d.total() / mean)
                    scores[asin] += idf * d[word] / (d[word] + length)
        yield query, scores


def recorder_words(text):
    """How the program that made the recordings cut words; WebShop itself has Lucene."""
    stem = Stemmer.Stemmer("porter").stemWord
    words = re.findall(r"\d+(?:[.,]\d+)+|\w+(?:['’.]\w+)*", text.lower())
    return [stem(word) for word in words if word not in STOP_WORDS]


@pytest.fixture(scope="module")
def rankings(recorded):
    return {k: v for k, v in recorded["search_results"].items() if not k.startswith("<")}


def test_search_ranks_like_a_slow_bm25(own, rankings):
    for query, scores in slow_scores(own, rankings, search_words):
        ours = [p.asin for p in own.search(query, random.Random())]
        best = sorted(scores.values(), reverse=True)[:50]
        assert len(ours) == len(best), query
        assert [scores[asin] for asin in ours] == pytest.approx(best, abs=1e-5)
        for a, b in zip(ours, ours[1:], strict=False):
            assert scores[a] != scores[b] or a < b, query


def test_the_recorded_rankings_are_a_bm25_over_words_cut_otherwise(own, rankings):
    """Every one is, up to the order of equal scores; so they differ from Lucene's, and from ours.

    For these queries Lucene's first hit is ours in 98% of cases, and the recorded one in 85%.
    """
    for query, scores in slow_scores(own, rankings, recorder_words):
        best = sorted(scores.values(), reverse=True)[:50]
        assert [scores[asin] for asin in rankings[query]] == pytest.approx(best, abs=1e-5), query


def test_search_agrees_with_webshop_s_lucene(root):
    """Anserini's own first hits in the embedded shop, as ``benchmarks/webshop.py`` wrote them."""
    measured = json.loads((root / "benchmarks" / "results" / "webshop.json").read_text())
    first = measured["lucene_first_hits"]
    shop = embedded_shop()
    same = sum(shop.search(q, random.Random())[0].asin == hit for q, hit in first.items())
    assert len(first) >= 500 and same / len(first) >= 0.98
    assert all(row["same first hit"] >= 0.98 for row in measured["lucene"])


@pytest.mark.parametrize(
    ("text", "words"),
    [  # as Anserini 0.14.3 prints them, DefaultEnglishAnalyzer
        ("Women’s shoes", "women shoe"), ("l'oreal women'ss kids'", "l'oreal women'ss kid"),
        ("3.5oz 10,000mAh 2.5.1", "3.5oz 10,000mah 2.5.1"), ("wi-fi 1/2 50%", "wi fi 1 2 50"),
        ("color:red 12:30", "color:r 12 30"), ("us s xs", "us s xs"), ("snake_case", "snake_cas"),
        ("u.s.a. v1.5 a.b", "u.s.a v1.5 a.b"), ("(it's) it.s rock'n'roll", "it. rock'n'rol"),
        ("running runs", "run run"), ("24pcs;12 7'5 5'x7'", "24pc 12 7'5 5 x7"),
    ],
)  # fmt: skip
def test_words_are_cut_as_lucene_does(text, words):
    assert " ".join(search_words(text)) == words


def test_pages_with_our_own_search_and_words_differ_only_where_those_are_shown(own, recorded):
    """75 lists of hits, ordered as in the test above; 6 last pages, whose score counts nouns."""
    different, steps = Counter(), 0
    for session in recorded["sessions"]:
        env = WebShopEnv(own, None, continue_after_purchase=True)
        seen, _ = env.reset(options={"goal": session["goal_index"]})
        for step in session["steps"]:
            if step["action"] is not None:
                seen, *_ = env.step(step["action"])
            different[env.snapshot().page] += seen != step["observation"]
            steps += 1
    assert steps == 521 and +different == {"results": 75, "done": 6}


def test_unusual_searches_do_as_recorded_and_what_crashed_does_nothing(own, recorded):
    ways = {"start": [], "results": ["search[lamp]"], "item": ["search[lamp]", "click[{}]"]}
    for case in recorded["unusual_searches"]:
        env = WebShopEnv(own, None)
        seen, _ = env.reset(options={"goal": 0})
        for action in ways[case["page"]]:
            seen = env.step(action.format(env.get_available_actions()["clickables"][-1]))[0]
        after = env.step(case["action"])[0]
        assert after == seen if case["raises"] else case["total_line"] in after


def test_title_words_stand_in_for_the_tagger_as_often_as_their_docstring_says(own, tags, genuine):
    rng, products = random.Random(0), own.products
    groups = {
        "random": lambda p: products,
        "category": lambda p: [q for q in products if q.category == p.category],
        "query": lambda p: [q for q in products if q.query == p.query],
    }
    for group, expected in (("random", 0.97), ("category", 0.95), ("query", 0.96)):
        same = 0
        for _ in range(600):
            wanted = rng.choice(products)
            bought = rng.choice(groups[group](wanted))
            goal = Goal(*bought[:1], wanted.category, wanted.query, wanted.title,
                        wanted.product_category, "", (), 0.0, {})  # fmt: skip
            kinds = [shop._type_reward(bought, goal)["r_type"] for shop in (own, genuine)]
            same += kinds[0] == kinds[1]
        assert abs(same / 600 - expected) < 0.025, (group, same / 600)


def test_spacy_tags_titles_as_recorded(own, tags):
    spacy = pytest.importorskip("spacy", reason="the extra 'webshop' is not installed")
    if not spacy.util.is_package("en_core_web_sm"):
        pytest.skip("spaCy's small English model is not installed")
    nouns = spacy_nouns()
    different = sum(nouns(p.title) != tags[p.title] for p in own.products)
    assert different <= 0.02 * len(own.products)


# ------------------------------------------------------------------------------ reward and goals

LAMP = {
    "asin": "A1", "name": "Oak Table Lamp", "full_description": "It glows.",
    "query": "Table Lamps ", "small_description": ["Warm light", "Oak foot"],
    "pricing": "$12.50 to $20",
    "customization_options": {"Color": [{"value": " Red/Blue"}, {"value": "rectangular"}],
                              "Size": [{"value": "L"}, {"value": "rectangular"}], "Empty": None},
    "category": "garden", "product_category": "Home › Lights › Lamps",
}  # fmt: skip
MUG = LAMP | {"asin": "B2", "name": "Green Mug", "query": "mugs", "pricing": "",
              "category": "kitchen", "product_category": "Kitchen › Cups",
              "customization_options": "", "small_description": "Holds tea"}  # fmt: skip
BOWL = MUG | {"asin": "C3", "name": "Mug Bowl", "pricing": "$1.5 to $3.5"}
WISHES = {
    "A1": {"attributes": ["oak", "dimmable"], "instruction": "Find me oak lamps",
           "instruction_attributes": ["oak"]},
    "B2": {"attributes": ["ceramic"], "instruction": None},
    "C3": {"attributes": ["ceramic", "oven safe"], "instruction": "Find me bowls",
           "instruction_attributes": ["oven safe", "oak"]},
}  # fmt: skip


def goal_for(product=LAMP, **changes):
    goal = Goal(product["asin"], product["category"], product["query"].lower().strip(),
                product["name"], product["product_category"], "", ("oak", "dimmable"), 30.0,
                {"color": "red | blue", "size": "l"})  # fmt: skip
    return goal._replace(**changes)


@pytest.fixture(scope="module")
def tiny():
    return Shop([LAMP, MUG, BOWL], WISHES, seed=7)


def test_products_prices_and_goals_by_hand(tiny):
    lamp, mug, bowl = tiny.products
    assert lamp.options == {"color": ("red | blue", "rectangular"), "size": ("l", "rectangular")}
    assert (lamp.price_tag, mug.price_tag, lamp.query) == (
        "$12.5 to $20.0",
        "$100.0",
        "table lamps",
    )
    assert (lamp.bullets, mug.bullets) == (("Warm light", "Oak foot"), ("Holds tea",))
    # the same draws from a generator of our own: only ranges take one, then one bound per wish
    rng = random.Random(7)
    prices = {"A1": rng.uniform(12.5, 20.0), "B2": 100.0, "C3": rng.uniform(1.5, 3.5)}
    assert tiny.prices == prices
    bounds = [
        max(rng.sample([x for x in range(10, 1000, 10) if x > prices[asin]][:4], 2))
        for asin in ("A1", "C3")
    ]
    texts = {
        f"Find me oak lamps with color: {color}, and size: {size}, and price lower than "
        f"{bounds[0]:.2f} dollars"
        for color in ("red | blue", "rectangular") for size in ("l", "rectangular")
    } | {f"Find me bowls, and price lower than {bounds[1]:.2f} dollars"}  # fmt: skip
    assert {g.instruction_text for g in tiny.goals} == texts
    # "oak" is in five goals, "oven safe" in one
    assert {g.asin: round(g.weight, 6) for g in tiny.goals} == {"A1": 0.2, "C3": (1 + 0.2) / 2}


def test_a_price_that_nothing_is_above_has_no_bound():
    shop = Shop([LAMP | {"pricing": "$985.00"}], WISHES)
    assert {g.price_upper for g in shop.goals} == {1000000}
    assert all("price" not in g.instruction_text for g in shop.goals)


def test_people_s_goals_have_lists_of_options():
    human = {"A1": [
        {"instruction": "I need a lamp.", "instruction_attributes": ["oak"],
         "instruction_options": ["red", "l"]},
        {"instruction": "Anything", "instruction_attributes": [], "instruction_options": []},
    ]}  # fmt: skip
    (goal,) = Shop([LAMP, MUG], WISHES, human).goals
    assert goal.instruction_text.startswith("I need a lamp, and price lower than ")
    assert (goal.goal_options, goal.weight) == (["red", "l"], 1.0)


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({"color": "red | blue", "size": "l"}, {}, 1.0),
        # the three numbers of upstream's own test: 4 of 6 parts, 4 of 7, and half of that
        ({"color": "red | blue", "size": "l"}, {"attributes": ("oak", "tin", "zinc")}, 4 / 6),
        ({"color": "red | blue", "size": "l"},
         {"attributes": ("oak", "tin", "zinc"), "goal_options": ["blue", "l", "xyz"]}, 4 / 7),
        ({"color": "red | blue", "size": "l"},
         {"attributes": ("oak", "tin", "zinc"), "goal_options": ["blue", "l", "xyz"], "query": "q",
          "product_category": "x", "name": "Lamp and some quite other things"}, 2 / 7),
        ({}, {}, 3 / 5),
        ({"color": "red | blue", "size": "l"}, {"price_upper": 10.0}, 4 / 5),
        ({"color": "red | blue"}, {"goal_options": {}}, 1.0),
        # kept quirk: what was chosen turns into the colour "tan", what was wanted does not
        ({"color": "rectangular"}, {"goal_options": {"color": "rectangular"}}, 3 / 4),
        # ... unless people wrote it
        ({"color": "rectangular"}, {"goal_options": ["rectangular"]}, 1.0),
        # an attribute may also be read in title, bullets or description
        ({}, {"goal_options": {}, "attributes": ("warm light", "glows", "no such")}, 3 / 4),
    ],
)  # fmt: skip
def test_reward_by_hand(tiny, options, changes, expected):
    score, parts = tiny.reward("A1", goal_for(**changes), options, price=15.0)
    assert score == pytest.approx(expected, abs=1e-12)
    whole = parts["r_att"] * parts["w_att"] + parts["r_price"] * parts["w_price"]
    whole += parts.get("r_option", 0) * parts.get("w_option", 0)
    assert score == pytest.approx(whole * parts["r_type"])


@pytest.mark.parametrize(
    ("changes", "r_type", "title_score"),
    [
        ({"query": "other"}, 1.0, 1.0),
        ({"query": "q", "product_category": "x", "name": "Oak a1 b1 c1 d1"}, 0.5, 0.2),
        ({"name": " ".join(["Oak", *(f"w{i}" for i in range(11))])}, 0.1, 1 / 12),
        ({"name": "Something else"}, 0.0, 0.0),  # although query and category match
        ({"query": "q", "product_category": "x", "name": "5"}, 0.5, 0.2),  # no noun at all
        ({"query": "q", "product_category": "Home › Lamps › x", "name": "5"}, 1.0, 0.2),
    ],
)
def test_type_reward_by_hand(tiny, changes, r_type, title_score):
    _, parts = tiny.reward("A1", goal_for(**changes), {})
    assert (parts["r_type"], parts["title_score"]) == (r_type, pytest.approx(title_score))


# ------------------------------------------------------------------------------ pages and actions


def play(env, *actions):
    """Reset, act, and return the last observation and info."""
    seen, info = env.reset(seed=0)
    for action in actions:
        seen, *_, info = env.step(action)
    return seen, info


def test_quirks_of_the_pages(tiny):
    env = WebShopEnv(tiny, None, goal=0)
    seen, info = play(env, "search[lamp]", "click[A1]")
    assert seen.split(SEPARATOR)[2:10] == [
        "Back to Search", "< Prev", "color", "red | blue", "rectangular", "size", "l", "rectangular"
    ]  # fmt: skip
    same, _ = play(env, "search[lamp]", "click[a1]", "click[L]")
    assert same == seen and env.snapshot().options == (("size", "l"),)  # chosen, but not marked
    play(env, "search[lamp]", "click[a1]", "click[rectangular]", "click[red | blue]")
    # a value of two options belongs to the later; an option keeps its last value
    assert env.snapshot().options == (("size", "rectangular"), ("color", "red | blue"))
    env.step("click[l]")
    assert dict(env.snapshot().options) == {"size": "l", "color": "red | blue"}
    for page in SUB_PAGES:
        env.step(f"click[{page}]")
        assert env.snapshot().page == page and len(env.snapshot().options) == 2
        env.step("click[< prev]")
    env.step("click[< prev]")
    assert env.snapshot().options == ()  # forgotten on returning to the results
    seen, info = play(env, "search[lamp]", *["click[next >]"] * 7)
    assert "Page 8 (Total results: 1)" in seen and "click[< prev]" in info["admissible"]
    # a search is accepted on every page, and empty ones find nothing
    for query in ("s", "the of and", "!!! ???", " ", "🙂", "\ud800", "<q>", "<c> toys"):
        assert "(Total results: 0)" in env.step(f"search[{query}]")[0], query
    assert "(Total results: 1)" in env.step("search[<c> garden]")[0]
    assert "(Total results: 3)" in env.step("search[<r>]")[0]


def test_what_is_not_an_action_changes_nothing(tiny):
    env = WebShopEnv(tiny, None, goal=0)
    play(env, "search[lamp]", "click[a1]")
    before, seen = env.snapshot(), env._render()
    for text in ("", "look", "CLICK[l]", "Search[x]", "please click[l]", "click[ l]", "click[l",
                 "click[]", "search[]", "search[\n]", "search[a][b]", "click[search]", "click[b2]",
                 "search[<a> oak]", "search[<c>]", "click[attributes]", "\nclick[l]"):  # fmt: skip
        assert env.step(text)[:4] == (seen, 0.0, False, False), text
    assert env.snapshot()._replace(turn=before.turn) == before
    assert env.step("click[l] now\nclick[buy now]")[0] == seen  # only this much of it is read
    assert env.snapshot().options == (("size", "l"),)


@given(st.text(alphabet="ab[]\n A", max_size=12) | st.text())
def test_parse_action_is_the_original_s_regular_expression(text):
    match = re.match(r"(.+)\[(.+)\]", text)
    assert parse_action(text) == ((match[1], match[2].lower()) if match else ("", ""))


def test_turns_run_out():
    env = WebShopEnv(max_turns=3, goal=0)
    env.reset()
    ends = [env.step("look")[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(RuntimeError, match="outside an episode"):
        env.step("look")


@pytest.mark.parametrize(
    ("options", "score"), [({"color": "red | blue", "size": "l"}, 1.0), ({"size": "l"}, 0.75)]
)
def test_a_purchase_ends_the_episode(tiny, options, score):
    wanted = {"color": "red | blue", "size": "l"}
    goal = next(k for k, g in enumerate(tiny.goals) if g.goal_options == wanted)
    for reward in ("score", "success"):
        env = WebShopEnv(tiny, 5, goal=goal, reward=reward)
        play(env, "search[lamp]", "click[a1]", *(f"click[{v}]" for v in options.values()))
        seen, got, terminated, truncated, info = env.step("click[buy now]")
        assert (terminated, truncated, info["won"]) == (True, False, score == 1.0)
        assert got == (score if reward == "score" else float(info["won"]))
        assert info["score"] == score and str(score) in seen.split(SEPARATOR)
        assert info["breakdown"]["r_option"] == (1.0 if score == 1.0 else 0.5)
        bought = ["Purchased", "asin", "A1", "options", json.dumps(options)]
        assert seen.split(SEPARATOR)[4:9] == bought
        assert info["admissible"] == []
        with pytest.raises(RuntimeError, match="outside an episode"):
            env.step("search[x]")


def test_rich_text_marks_what_was_clicked(tiny):
    env = WebShopEnv(tiny, None, goal=0, observation="text_rich")
    seen, _ = play(env, "search[lamp]", "click[a1]", "click[l]")
    assert seen.startswith("You have clicked l.\nInstruction:\n")
    assert "  [clicked button] l [clicked button_]\n  [button] rectangular [button_]" in seen
    assert "[clicked button] A1 [clicked button_]\nOak Table Lamp" in env.step("click[< prev]")[0]


def test_goals_are_chosen_drawn_by_weight_or_refused(tiny):
    env = WebShopEnv(tiny)
    assert env.reset(options={"goal": 3})[1]["task"] == tiny.goals[3].instruction_text
    assert env.reset(seed=5) == WebShopEnv(tiny).reset(seed=5)
    drawn = Counter()
    env.reset(seed=0)
    for _ in range(4000):
        env.reset()
        drawn[env.goal.asin] += 1
    # weights: four goals of 0.2 for the lamp, one of 0.6 for the bowl
    assert drawn["C3"] / 4000 == pytest.approx(0.6 / 1.4, abs=0.03)
    for bad in (5, -1, "0", 1.0):
        with pytest.raises(ValueError, match="goal: saw .*, expected an int from 0 to 4"):
            env.reset(options={"goal": bad})
        with pytest.raises(ValueError, match="goal: saw .*, expected an int from 0 to 4"):
            WebShopEnv(tiny, goal=bad)
    for arguments, message in (
        ({"max_turns": 0}, "max_turns: saw 0"), ({"reward": "both"}, "reward: saw 'both'"),
        ({"observation": "html"}, "observation: saw 'html'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            WebShopEnv(tiny, **arguments)
    with pytest.raises(ValueError, match=r"options: saw \['session'\], expected only 'goal'"):
        env.reset(options={"session": 1})


# ------------------------------------------------------------------------- any text, any moment


def consistent(env):
    """What the state says is possible, and what the page shows belongs to it."""
    state, shop = env.snapshot(), env.shop
    assert (state.asin in shop.by_asin) == (state.page in ("item", "done", *SUB_PAGES))
    if state.asin:
        offered = shop.by_asin[state.asin].options
        assert all(value in offered[name] for name, value in state.options)
    else:
        assert state.options == ()
    assert state.number >= 1 and env.restore(state) == env.restore(state)
    labels = env.get_available_actions()["clickables"]
    assert len(set(labels)) == len(labels)


TEXTS = st.one_of(
    st.text(), st.text(max_size=30).map(lambda t: f"search[{t}]"),
    st.text(max_size=10).map(lambda t: f"click[{t}]"),
    st.sampled_from(["search[<r>]", "search[<c> beauty]", "search[" * 2000, "]" * 5000 + "[",
                     "search[" + "a " * 20_000 + "]", "click[< prev]", "click[back to search]"]),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.lists(TEXTS, min_size=1, max_size=8))
def test_20000_random_and_adversarial_commands_leave_a_consistent_state(seed, texts):
    """100 commands an example: admissible ones, mutated ones, and hypothesis' own."""
    rng = random.Random(seed)
    env = WebShopEnv(max_turns=None, continue_after_purchase=True)
    seen, info = env.reset(seed=seed)
    mutations = [str.upper, str.title, lambda t: t[:-1], lambda t: t + "x", lambda t: t * 300,
                 lambda t: t.replace("[", "[["), lambda t: t.replace("]", "\n]")]  # fmt: skip
    for k in range(100):
        offered = info["admissible"] or ["search[lamp]"]  # after a purchase
        text = rng.choice([*offered, *texts[: k % 5]])
        if rng.random() < 0.3:
            text = rng.choice(mutations)(text)
        before, said = env.snapshot(), seen
        seen, reward, terminated, truncated, info = env.step(text)
        assert 0 <= reward <= 1 and not truncated
        assert info["won"] <= (env.snapshot().page == "done") and terminated <= ("score" in info)
        name, argument = parse_action(text)
        if name not in ("search", "click"):
            assert seen == said and env.snapshot() == before._replace(turn=before.turn + 1)
        if text in offered:
            assert env.snapshot()._replace(turn=0) != before._replace(turn=0) or (
                before.options and argument in dict(before.options).values()
            )
    consistent(env)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_same_seed_and_actions_same_episode_and_restore_undoes_everything(seed):
    rng = random.Random(seed)
    env, other = (WebShopEnv(max_turns=None, continue_after_purchase=True) for _ in range(2))
    assert env.reset(seed=seed) == other.reset(seed=seed)
    offered = ["search[<r>]", "search[lamp]"]

    def walk():
        actions, results = [], []
        for _ in range(15):
            clicks = [f"click[{x}]" for x in env.get_available_actions()["clickables"]]
            actions.append(rng.choice(clicks + offered))
            results.append(env.step(actions[-1]))
        return actions, results

    actions, results = walk()
    assert [other.step(action) for action in actions] == results
    snapshot, info = env.snapshot(), results[-1][-1]
    actions, results = walk()
    assert env.restore(snapshot) == info
    assert [env.step(action) for action in actions] == results
    other.restore(snapshot)  # in another environment of the same shop
    assert [other.step(action) for action in actions] == results


def test_a_live_environment_takes_less_than_a_megabyte():
    shop = embedded_shop()
    shop.search("lamp", random.Random())
    tracemalloc.start()
    envs = []
    for k in range(64):
        env = WebShopEnv(shop, goal=k)
        _, info = env.reset()
        for _ in range(5):
            clicks = [a for a in info["admissible"] if a not in ("click[buy now]",)]
            info = env.step(clicks[k % len(clicks)])[-1]
        envs.append(env)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(envs) < 2**20


# ------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("which", "content", "message"),
    [
        ("products", b"\x1f\x8bnot gzip", "products.json: .*expected JSON, plain or gzipped"),
        ("products", gzip.compress(b"[1, 2")[:-4], "products.json: .*expected JSON"),
        ("products", b"[{]", "products.json: .*expected JSON"),
        ("products", b"\xff\xfe", "products.json: .*expected JSON"),
        ("products", {"a": 1}, "products.json: saw a dict, expected a list of products"),
        ("instructions", [], "instructions.json: saw a list, expected a dict by asin"),
        ("products", [], "products.json: no product"),
        ("products", [LAMP | {"name": "the", "full_description": "", "small_description": [],
                              "customization_options": ""}], "no word to search for"),
        ("products", [5], "products.json: product 0: saw a int, expected a dict with 'asin'"),
        ("products", [{"name": "x"}], "products.json: product 0: no 'asin'"),
        ("products", [LAMP, {k: v for k, v in MUG.items() if k != "full_description"}],
         r"products.json: product 1 \(B2\): no 'full_description'"),
        ("products", [LAMP | {"name": None}], "'name' is a NoneType, expected str"),
        ("products", [LAMP | {"pricing": "cheap"}], r"\(A1\): 'pricing' is 'cheap', expected one"),
        ("products", [LAMP | {"pricing": 5}], r"\(A1\): 'pricing' is 5, expected one like"),
        ("products", [LAMP | {"customization_options": {"Size": [{"text": "L"}]}}],
         r"\(A1\): option 'Size': no 'value'"),
        ("products", [LAMP | {"customization_options": {"Size": "L"}}], "option 'Size' is a str"),
        ("products", [LAMP | {"customization_options": "red"}], "'customization_options' is 'red'"),
        ("products", [LAMP | {"small_description": [1]}], "'small_description' is .1., expected a"),
        ("instructions", {"B2": {}}, "instructions.json: no 'A1'"),
        ("instructions", WISHES | {"A1": []}, "instructions.json: 'A1' is a list, expected dict"),
        ("instructions", {"A1": {"attributes": []}, "B2": {}}, "instructions.json: no instruction"),
        ("instructions", WISHES | {"A1": {"instruction": "x"}},
         "instructions.json: A1: 'instruction_attributes' is None, expected a list"),
        ("instructions", WISHES | {"A1": {"instruction": "x", "instruction_attributes": []}},
         "A1: 'instruction_attributes' is empty"),
    ],
)  # fmt: skip
def test_broken_files_are_named_with_the_key(tmp_path, which, content, message):
    parts = {"products": [LAMP, MUG], "instructions": WISHES} | {which: content}
    paths = {name: tmp_path / f"{name}.json" for name in parts}
    for name, part in parts.items():
        paths[name].write_bytes(part if isinstance(part, bytes) else json.dumps(part).encode())
    with pytest.raises(ValueError, match=message):
        WebShopEnv.from_files(paths["products"], paths["instructions"])


def test_files_are_read_plain_and_gzipped_and_may_be_missing(tmp_path):
    products, instructions = tmp_path / "p.json", tmp_path / "i.json.gz"
    doubled = [LAMP, MUG, LAMP, LAMP | {"asin": "nan"}, LAMP | {"asin": "elevenchars"}]
    products.write_text(json.dumps(doubled))
    instructions.write_bytes(gzip.compress(json.dumps(WISHES).encode()))
    env = WebShopEnv.from_files(products, instructions, seed=7, goal=1)
    assert [p.asin for p in env.shop.products] == ["A1", "B2"]
    with pytest.raises(FileNotFoundError, match="none.json"):
        Shop.from_files(products, tmp_path / "none.json")


# ------------------------------------------------------------------- the embedded shop, the expert


def test_the_catalogue_is_the_same_everywhere_and_of_the_promised_size():
    products, instructions = generate_catalogue()
    assert (products, instructions) == generate_catalogue()
    assert len(products) >= 500 and len({p["category"] for p in products}) == 5
    assert all(p["customization_options"] and p["asin"] in instructions for p in products)
    digest = hashlib.sha256(json.dumps([products, instructions]).encode()).hexdigest()
    assert digest[:16] == "ed1cb7ea0f5b5098"


def test_splits_share_no_goal_and_unseen_kinds_are_never_trained():
    shop = embedded_shop()
    parts = [set(shop.splits[name]) for name in ("train", "seen", "unseen")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(shop.goals)
    kinds = [{shop.goals[i].query for i in part} for part in parts]
    assert kinds[2] == set(HELD_OUT) and not kinds[2] & (kinds[0] | kinds[1])
    assert kinds[1] == kinds[0] and len(parts[1]) > 200 and len(parts[2]) > 200


def test_every_goal_can_be_paid_in_full_and_no_other_value_will_do():
    shop = embedded_shop()
    for goal in shop.goals:
        assert shop.reward(goal.asin, goal, goal.goal_options)[0] == 1.0
    product = shop.products[0]
    for name, text in OPTIONS.items():
        values = text.split(" | ")
        for wanted in values:
            goal = Goal(product.asin, "", product.query, product.title, "", "", ("x",), 1e6,
                        {name: wanted})  # fmt: skip
            for value in values:
                matched = shop.reward(product.asin, goal, {name: value})[1]["r_option"]
                assert matched == (value == wanted), (wanted, value)


def test_the_expert_reaches_every_goal_by_reading():
    shop, turns = embedded_shop(), Counter()
    for k in range(len(shop.goals)):
        env = WebShopEnv(shop, 60, goal=k)
        expert = Expert(env, random.Random(0))
        (seen, info), over = env.reset(), False
        while not over:
            _, _, action = expert.act(seen, info)
            assert action in info["admissible"]
            seen, reward, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        assert reward == 1.0 and info["won"], k
        turns[env.snapshot().turn] += 1
    within = sum(count for turn, count in turns.items() if turn <= 15)
    assert within / turns.total() > 0.99  # HiPER's limit


def test_the_expert_s_mistakes_are_marked_and_survived():
    shop, won, differs = embedded_shop(), 0, 0
    for k in range(60):
        env = WebShopEnv(shop, 40, goal=k)
        expert = Expert(env, random.Random(k), 0.3)
        (seen, info), over, active = env.reset(), False, None
        while not over:
            switch, subgoal, action = expert.act(seen, info)
            assert switch == (subgoal != active)
            differs += (subgoal, action) != expert.intended
            active = subgoal
            seen, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        won += info["won"]
    assert 20 < won < 60 and differs > 100
    with pytest.raises(ValueError, match="mistake_rate: saw 2"):
        Expert(WebShopEnv(goal=0), random.Random(), 2)


@given(st.text())
def test_suggested_searches_are_searches(instruction):
    offered = suggest_searches(instruction)
    assert len(offered) == len(set(offered)) <= 10
    for text in offered:
        name, argument = parse_action(text)
        assert name == "search" and f"search[{argument}]" == text


# ------------------------------------------------------------------------------ prompts, training


def contexts():
    """The contexts of a visit, from the start to the page after the purchase."""
    env = WebShopEnv(goal=0)
    expert = Expert(env, random.Random(0))
    (seen, info), history, over = env.reset(), [], False
    while True:
        yield Context(info["task"], seen, info["admissible"], "buy it", list(history))
        if over:
            return
        action = expert.act(seen, info)[2]
        history.append((seen, action))
        seen, _, over, _, info = env.step(action)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_of_the_shop(template):
    played = list(contexts())
    prompts = [render(template, context, 2) for context in played]
    assert len({static for static, _ in prompts}) == 1
    for context, (_, dynamic) in zip(played, prompts, strict=True):
        assert dynamic.count(context.task) == 1, "the task once, although every page repeats it"
        assert ("buy it" in dynamic) == (template != "flat")  # the subgoal in force
        for _, action in context.history[-2:]:
            assert action in dynamic
    results = next(c for c in played if "Total results" in c.observation)
    _, dynamic = render(template, results, 2)
    assert "'Back to Search' [SEP] 'Page 1 (Total results: 50)' [SEP] 'Next >'" in dynamic
    for action in results.admissible:
        assert (f"'{action}'" in dynamic) == (template != "compact")


def test_upstream_prompts_offer_a_search_and_drop_their_history_when_too_long():
    first, *_, last = contexts()
    _, dynamic = render("upstream", first, 2)
    assert dynamic.startswith(f"Your task is to: {first.task}.\n")
    assert "Your admissible actions are:\n[\n'search[<your query>]',\n].\n" in dynamic
    assert "Your current observation is: 'Search'.\n" in dynamic
    static, dynamic = render("upstream", last, 2)
    k = len(last.history)
    assert f"You have already taken {k} step(s). Below are the most recent 2 obs" in dynamic
    assert f"[Observation {k}: '" in dynamic and f"You are now at step {k + 1} and" in dynamic
    room = SHOP_LIMIT - len(static) - len(dynamic)
    for extra, shortened in ((room, False), (room + 1, True)):
        long = [*last.history[:-1], (last.history[-1][0] + "x" * extra, last.history[-1][1])]
        context = Context(last.task, last.observation, last.admissible, last.subgoal, long)
        text = "".join(render("upstream", context, 2))
        assert ("Your current observation is:" in text) == shortened == (len(text) < SHOP_LIMIT)
        assert "Your current sub-goal is: buy it." in text


def test_training_plays_the_splits_of_the_shop_for_success(tmp_path):
    config = train.TrainConfig.from_parameters({"env": "webshop", "max_turns": 7})
    shop = embedded_shop()
    envs, names = train.make_envs(config, "unseen", 1, 3)
    goals = shop.splits["unseen"][1:4]
    assert names == [f"unseen/{k}" for k in goals]
    for env, k in zip(envs, goals, strict=True):
        assert env.reset(seed=3)[1]["task"] == shop.goals[k].instruction_text
        assert env.shop is shop and env.max_turns == 7
    many = train.make_envs(config, "seen", len(shop.splits["seen"]) - 1, 2)[1]
    assert many[1] == f"seen/{shop.splits['seen'][0]}"  # an endless list
    for name, part in (("items_shuffle_1000", [LAMP, MUG]), ("items_ins_v2_1000", WISHES),
                       ("items_shuffle", "broken"), ("items_ins_v2", "broken")):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    files = train.TrainConfig.from_parameters({"env": "webshop", "env_path": str(tmp_path)})
    assert train.make_envs(files, "train", 0, 1)[0][0].shop.products[0].asin == "A1"
    with pytest.raises(ValueError, match=r"no goals in split 'unseen', expected .*'train'"):
        train.make_envs(files, "unseen", 0, 1)


def test_an_iteration_of_training_in_the_shop():
    config = train.TrainConfig.from_parameters({
        "env": "webshop", "iterations": 1, "episodes": 2, "eval_games": 0, "max_turns": 3,
        "warmup_iterations": 0, "history_turns": 1,
    })  # fmt: skip
    *_, report = train.train(config)
    assert [len(t.turns) for t in report.trajectories] == [3, 3]
    for turn in report.trajectories[0].turns:
        assert turn.action in turn.admissible


def test_title_words_keep_the_order_and_repeats():
    assert title_words("The Men’s men's 3 x USB-C Lamps of 2021") == [
        "men", "men", "usb", "lamps"
    ]  # fmt: skip
