"""WebShop's text environment in pure Python: the same pages and rewards, much faster.

A :class:`WebShopEnv` is one visit to a :class:`~hiper_lab.envs.shop.Shop`, going from
:class:`State` to state by ``search[words]`` and ``click[label]``. One list of pieces, made by
:meth:`WebShopEnv._page`, is the page's text and says what can be clicked.

Quirks of the original that are kept:

- a search is accepted on every page, although only the start page reports a search bar;
- chosen options are not marked in ``text``; they are forgotten on returning to the results;
- "Next >" has no upper bound: pages past the last hit are empty;
- the names of actions are case-sensitive, labels are not, and neither is stripped of white space.

Left out on purpose: HTML, the attributes page, past observations in the text (prompts show the
history). A search that crashes the original (``<a> …``, ``<c>``) does nothing.

Source: WebShop (Yao et al. 2022, arXiv:2207.01206; github.com/princeton-nlp/WebShop, MIT), whose
wording of pages and actions is kept for compatibility.
"""

import bisect
import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hiper_lab.envs.shop import Goal, Product, Shop, embedded_shop
from hiper_lab.protocol import SEPARATOR

PER_PAGE = 10
SUB_PAGES = ("description", "features", "reviews")
REWARDS = ("score", "success")
OBSERVATIONS = ("text", "text_rich")


class State(NamedTuple):
    """Everything that changes during a visit; immutable, so it is its own snapshot."""

    goal: int
    seed: int  # of the random products of search[<r>]
    turn: int = 0
    page: str = "start"  # start, results, item, done, or one of SUB_PAGES
    keywords: str = ""
    number: int = 1  # of the results page
    asin: str = ""
    options: tuple[tuple[str, str], ...] = ()  # (name, chosen value)
    visited: frozenset[str] = frozenset()
    listed: int = 0  # the turn that led to the results; random products are drawn anew each time


class WebShopEnv:
    """One visit at a time to a shop, by text.

    Args:
        shop: Where to; None is the embedded shop. Shared, never changed.
        max_turns: Truncate after so many turns without a purchase (HiPER: 15); None for no limit.
        goal: Index of the goal of every visit; None draws one by weight at each ``reset``.
        reward: ``score`` is WebShop's own, in [0, 1]; ``success`` is 1.0 for a score of exactly
            1 and else 0.0, what HiPER trains on.
        observation: ``text`` or ``text_rich``, which marks what can be and what was clicked.
        continue_after_purchase: As in the original, a search leads from the last page to a further
            purchase. Otherwise the episode is over.

    Raises:
        ValueError: If an argument is none of the above.

    Example:
        >>> env = WebShopEnv(goal=0)
        >>> observation, info = env.reset()
        >>> observation.split(SEPARATOR)[0], info["admissible"][-1].startswith("search[")
        ('WebShop', True)
        >>> env.step("think[hello]")[1:4]  # reward, terminated, truncated
        (0.0, False, False)
        >>> env.step("search[hand cream]")[0].split(SEPARATOR)[3]
        'Page 1 (Total results: 50)'
    """

    def __init__(
        self,
        shop: Shop | None = None,
        max_turns: int | None = 15,
        *,
        goal: int | None = None,
        reward: str = "score",
        observation: str = "text",
        continue_after_purchase: bool = False,
    ):
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns: saw {max_turns}, expected at least 1, or None")
        for name, value, known in (
            ("reward", reward, REWARDS), ("observation", observation, OBSERVATIONS)
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}: saw {value!r}, expected one of {known}")
        self.shop = embedded_shop() if shop is None else shop
        self.max_turns = max_turns
        self._fixed_goal = None if goal is None else self._check_goal(goal)
        self._reward, self._rich = reward, observation == "text_rich"
        self._continue = continue_after_purchase
        self._rng = random.Random()
        self._state: State | None = None

    @classmethod
    def from_files(
        cls, products: Path | str, instructions: Path | str, *, seed: int = 0, **options: Any
    ) -> "WebShopEnv":
        """An environment over WebShop's own files (see :meth:`Shop.from_files`).

        For several environments, load the Shop once and give it to each. ``options`` as for the
        class.
        """
        return cls(Shop.from_files(products, instructions, seed=seed), **options)

    @property
    def goal(self) -> Goal:
        """What is to be bought in this visit."""
        return self.shop.goals[self.snapshot().goal]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start a visit.

        Args:
            seed: Draws the goal, unless one is fixed, and the random products of ``search[<r>]``.
            options: ``{"goal": i}`` chooses goal i of ``shop.goals``.

        Returns:
            The start page and info: ``admissible``, ``won`` (a purchase scored exactly 1), ``task``
            and ``task_type`` (the goal's category). After a purchase also ``score`` and its
            ``breakdown``.

            ``admissible`` are the clicks that do something and, where there is a search bar, the
            searches of :func:`suggest_searches`. These are ours, so that an action can be chosen
            from a list; any other ``search[…]`` works as well, as in WebShop.

        Raises:
            ValueError: If there is no such goal or option.
        """
        options = options or {}
        if unknown := set(options) - {"goal"}:
            raise ValueError(f"options: saw {sorted(unknown)}, expected only 'goal'")
        if seed is not None:
            self._rng = random.Random(seed)
        goal = options.get("goal", self._fixed_goal)
        if goal is None:
            weights = self.shop.cumulative_weights
            goal = bisect.bisect(weights, self._rng.random() * weights[-1], 0, len(weights) - 1)
        info = self.restore(State(self._check_goal(goal), self._rng.randrange(2**32)))
        return self._render(), info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """Do what ``text`` says; what is not a valid action does nothing.

        Returns:
            observation, reward (0.0 but for a purchase), terminated (bought), truncated
            (``max_turns`` reached without a purchase) and info as in :meth:`reset`.

        Raises:
            RuntimeError: If the episode has not started or is over.
        """
        if self._state is None or self._over:
            raise RuntimeError(f"step({text[:60]!r}) outside an episode; call reset() or restore()")
        state = self._state._replace(turn=self._state.turn + 1)
        name, argument = parse_action(text)
        after = None
        if name == "search":
            after = self._search(state, argument)
        elif name == "click" and argument in self._clickables and argument != "search":
            after = self._click(state, argument)
        info = self.restore(after or state)
        bought = after is not None and after.page == "done"
        reward = 0.0
        if bought:
            reward = info["score"] if self._reward == "score" else float(info["won"])
        truncated = self._over and not bought
        return self._render(), reward, bought, truncated, info

    def snapshot(self) -> State:
        """The present state, for :meth:`restore` in any environment of the same shop."""
        if self._state is None:
            raise RuntimeError("no episode yet; call reset()")
        return self._state

    def restore(self, state: State) -> dict:
        """Go (back) to a state; returns the info that belongs to it."""
        self._state = state
        bought = state.page == "done"
        self._over = (bought and not self._continue) or (
            self.max_turns is not None and state.turn >= self.max_turns
        )
        goal, purchase = self.goal, {}
        if bought:
            score, breakdown = self.shop.reward(state.asin, goal, dict(state.options))
            purchase = {"score": score, "breakdown": breakdown}
        self._pieces = self._page(purchase.get("score"))
        labels = [text.lower() for kind, text in self._pieces if kind in ("button", "product")]
        self._clickables = dict.fromkeys(
            labels + [text for kind, text in self._pieces if kind == "option"]
        )
        admissible = [f"click[{x}]" for x in self._clickables if x != "search"]
        # a label with brackets or a line break cannot be clicked, in the original neither
        admissible = [a for a in admissible if parse_action(a)[1] == a[6:-1]]
        if state.page == "start":
            admissible += suggest_searches(goal.instruction_text)
        return {
            "admissible": admissible, "won": purchase.get("score") == 1.0,
            "task": goal.instruction_text, "task_type": goal.category, **purchase,
        }  # fmt: skip

    def get_available_actions(self) -> dict[str, Any]:
        """What the original reports under this name: has_search_bar and clickables."""
        bar = self.snapshot().page == "start"
        return {"has_search_bar": bar, "clickables": list(self._clickables)}

    def _check_goal(self, goal: int) -> int:
        count = len(self.shop.goals)
        if not isinstance(goal, int) or not 0 <= goal < count:
            raise ValueError(f"goal: saw {goal!r}, expected an int from 0 to {count - 1}")
        return goal

    def _hits(self, state: State) -> list[Product] | None:
        return self.shop.search(state.keywords, random.Random(state.seed + state.listed))

    def _search(self, state: State, keywords: str) -> State | None:
        after = self._results(state._replace(keywords=keywords, number=1))
        return None if self._hits(after) is None else after

    def _results(self, state: State) -> State:
        return state._replace(page="results", asin="", options=(), listed=state.turn)

    def _click(self, state: State, label: str) -> State:
        """What a click on one of the page's labels leads to."""
        if label == "buy now":
            return state._replace(page="done")
        if label == "back to search":
            return State(state.goal, state.seed, state.turn)
        if state.page == "results":
            if label in ("< prev", "next >"):
                step = 1 if label == "next >" else -1
                return self._results(state._replace(number=state.number + step))
            asin = next(t for kind, t in self._pieces if kind == "product" and t.lower() == label)
            return state._replace(page="item", asin=asin, visited=state.visited | {asin})
        if label == "< prev":
            if state.page == "item":
                return self._results(state)
            return state._replace(page="item")
        if label in SUB_PAGES:
            return state._replace(page=label)
        name = self.shop.by_asin[state.asin].named[label]
        options = dict(state.options) | {name: label}
        return state._replace(options=tuple(options.items()))

    def _page(self, score: float | None) -> list[tuple[str, str]]:
        """The visible pieces of the page in order: (text, button, option or product; string)."""
        state = self._state
        if state.page == "done":
            options = json.dumps(dict(state.options), sort_keys=True)
            for sign in "<>&'":  # as Flask writes JSON into a page
                options = options.replace(sign, f"\\u{ord(sign):04x}")
            return [("text", t) for t in (
                "Thank you for shopping with us!", "Your code: ", "None",
                " (Paste it in your MTurk interface.)", "Purchased", "asin", state.asin, "options",
                options, "attrs", "None", "category", "None", "query", "None", "product category",
                "None", "Target", "asin", "options", "attrs", "price upper", "instuction text",
                "category", "product category", "query", "Goal ", "None", "Reward",
                "Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None",
            )]  # fmt: skip
        text = self.goal.instruction_text
        if state.page == "start":
            return [("text", "WebShop"), ("text", "Instruction: "), ("text", text),
                    ("button", "Search")]  # fmt: skip
        pieces = [("text", "Instruction:"), ("text", text), ("button", "Back to Search")]
        if state.page == "results":
            hits = self._hits(state)
            pieces.append(("text", f"Page {state.number} (Total results: {len(hits)})"))
            if state.number > 1:
                pieces.append(("button", "< Prev"))
            pieces.append(("button", "Next >"))
            for hit in hits[(state.number - 1) * PER_PAGE : state.number * PER_PAGE]:
                pieces += [("product", hit.asin), ("text", hit.title), ("text", hit.price_tag)]
        else:
            shown = self.shop.by_asin[state.asin]
            pieces.append(("button", "< Prev"))
            if state.page == "item":
                for name, values in shown.options.items():
                    pieces += [("text", name), *(("option", value) for value in values)]
                pieces += [("text", shown.title), ("text", f"Price: {shown.price_tag}"),
                           ("text", "Rating: N.A.")]  # fmt: skip
                pieces += [("button", x) for x in ("Description", "Features", "Reviews", "Buy Now")]
            elif state.page == "description":
                pieces.append(("text", shown.description))
            elif state.page == "features":
                pieces += [("text", f" {bullet}") for bullet in shown.bullets]
        return [piece for piece in pieces if piece[1] not in ("", "\n")]

    def _render(self) -> str:
        if not self._rich:
            return SEPARATOR.join([text.strip() for _, text in self._pieces])
        state, lines, clicked = self._state, [], []
        # the original looks for the value, in quotes, in the page's address
        address = f"{state.keywords.replace(' ', '+')}/{json.dumps(dict(state.options))}"
        for kind, text in self._pieces:
            old = (kind == "option" and f'"{text}"' in address) or (
                kind == "product" and text in state.visited
            )
            if kind != "text":
                before = {"button": "", "option": "  ", "product": "\n"}[kind]
                word = "clicked button" if old else "button"
                if old and kind == "option":
                    clicked.insert(0, f"You have clicked {text}.\n")
                text = f"{before}[{word}] {text} [{word}_]"
            lines.append(text + "\n")
        return "".join(clicked + lines)


def parse_action(text: str) -> tuple[str, str]:
    r"""Name and argument of an action, the argument in lower case; two empty strings if malformed.

    The same as the original's regular expression ``(.+)\[(.+)\]`` at the start of the text, in
    linear time: the last "]" of the first line, and the last "[" that leaves an argument.

    Example:
        >>> parse_action("search[Red Shoes] please"), parse_action("search[a][b]")
        (('search', 'red shoes'), ('search[a]', 'b'))
        >>> parse_action("click[]")
        ('', '')
    """
    line = text.split("\n", 1)[0]
    end = line.rfind("]")
    start = line.rfind("[", 0, max(end - 1, 0))
    return (line[:start], line[start + 1 : end].lower()) if start > 0 else ("", "")


@lru_cache(maxsize=1024)
def suggest_searches(instruction: str) -> tuple[str, ...]:
    """Searches made of an instruction's own words: all of it, then phrase by phrase.

    Ours, not WebShop's: guided decoding chooses from a list. The price is left out and an option
    loses its name; at most ten.

    Example:
        >>> text = "Find me soft, warm wool scarf with gift box with color: navy"
        >>> for search in suggest_searches(text + ", and price lower than 50.00 dollars"):
        ...     print(search)
        search[soft warm wool scarf gift box navy]
        search[soft warm wool scarf gift box]
        search[soft]
        search[warm wool scarf]
        search[gift box]
        search[navy]
    """
    text = re.sub(r",? and price lower than [\d.]+ dollars.*$", "", instruction.lower())
    text = re.sub(r"^(find me|i am looking for|i'm looking for|i want|i need|get me) ", "", text)
    parts = [part for part in re.split(r", and |, | with (?!out)", text) if part.strip()]
    words = [re.sub(r"[\[\]\n]", " ", part.split(": ", 1)[-1]).strip() for part in parts]
    plain = [w for w, part in zip(words, parts, strict=True) if ": " not in part]
    queries = [" ".join(words), " ".join(plain), *words]
    # what no longer parses back to itself (an empty query, an exact filter) is not offered
    kept = [q for q in queries if q and not q.startswith("<")]
    return tuple(f"search[{query}]" for query in list(dict.fromkeys(kept))[:10])
