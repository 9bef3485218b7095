"""An expert for :mod:`hiper_lab.envs.webshop`: the demonstrator for behaviour cloning.

It searches, opens what looks right, reads the description, chooses options and buys: with
subgoals, and with mistakes if they are asked for. Without mistakes its purchases in the embedded
shop score exactly 1, so every goal there can be reached by reading.

Left out on purpose: knowing the goal's product (the expert knows the wish and the pages it is on),
and the untidy texts of the genuine products, where attributes are often not to be read anywhere.
"""

import random

from hiper_lab.envs.shop import Product
from hiper_lab.envs.webshop import WebShopEnv

PAGES = 2  # so many pages of results are read before another search


class Expert:
    """Shops by reading, with subgoals; a new visit starts from nothing.

    Args:
        env: The env it will play; only the wish and the present page are read from it. Its goals
            have named options (not those written by people).
        rng: Draws the mistakes.
        mistake_rate: Chance per turn of a random admissible action, in [0, 1]; with half that
            chance, independently, the turn's subgoal is a wrong one.

    Raises:
        ValueError: If ``mistake_rate`` is not in [0, 1].

    Example:
        >>> env = WebShopEnv(goal=0)
        >>> expert = Expert(env, random.Random(0))
        >>> (observation, info), over = env.reset(), False
        >>> while not over:
        ...     switch, subgoal, action = expert.act(observation, info)
        ...     observation, reward, over, _, info = env.step(action)
        >>> subgoal, action, reward
        ('buy it', 'click[buy now]', 1.0)
    """

    def __init__(self, env: WebShopEnv, rng: random.Random, mistake_rate: float = 0.0):
        if not 0 <= mistake_rate <= 1:
            raise ValueError(f"mistake_rate: saw {mistake_rate}, expected a number in [0, 1]")
        self._env, self._rng, self._mistake_rate = env, rng, mistake_rate

    def act(self, observation: str, info: dict) -> tuple[bool, str, str]:
        """Read what ``reset`` or ``step`` returned; choose (switch, subgoal, action).

        Call it exactly once a turn. ``switch`` says that the subgoal is not the last turn's.
        ``intended`` is then the (subgoal, action) it would have chosen without a mistake.
        """
        if self._env.snapshot().turn == 0:
            self._subgoal = ""
            self._searches = 0
            self._read: set[str] = set()  # asins whose description was read
            self._rejected: set[str] = set()
        rng = self._rng
        subgoal, action = self.intended = self._intend(info["admissible"])
        if rng.random() < self._mistake_rate:
            action = rng.choice(info["admissible"])
        if rng.random() < self._mistake_rate / 2:
            subgoal = rng.choice([s for s in self._subgoals() if s != subgoal])
        switch, self._subgoal = subgoal != self._subgoal, subgoal
        return switch, subgoal, action

    def _subgoals(self) -> tuple[str, str, str, str, str]:
        kind = self._env.goal.query
        return (f"search for a {kind}", f"find a {kind} that fits", f"check the {kind}",
                "choose the options", "buy it")  # fmt: skip

    def _intend(self, admissible: list[str]) -> tuple[str, str]:
        """The subgoal and action that serve the wish, given what is known."""
        env, state, goal = self._env, self._env.snapshot(), self._env.goal
        search, find, check, choose, buy = self._subgoals()
        if state.page == "start":
            queries = [a for a in admissible if a.startswith("search[")]
            return search, queries[self._searches % len(queries)]
        if state.page == "results":
            shown = [p for a in admissible if (p := env.shop.by_asin.get(a[6:-1].upper()))]
            fitting = [p for p in shown if self._may_fit(p)]
            if fitting:  # the best hit comes first
                return find, f"click[{fitting[0].asin.lower()}]"
            if shown and state.number < PAGES:
                return find, "click[next >]"
            self._searches += 1
            return search, "click[back to search]"
        if state.page != "item":
            if state.page == "description":
                self._read.add(state.asin)
            return check, "click[< prev]"
        shown = env.shop.by_asin[state.asin]
        text = shown.title.lower()
        if state.asin in self._read:
            text += shown.description.lower()
        complete = all(attribute in text for attribute in goal.attributes)
        if not self._may_fit(shown) or not self._has_options(shown):
            self._rejected.add(state.asin)
            return find, "click[< prev]"
        if not complete and state.asin not in self._read:
            return check, "click[description]"
        if not complete:
            self._rejected.add(state.asin)
            return find, "click[< prev]"
        chosen = dict(state.options)
        for name, value in goal.goal_options.items():
            if chosen.get(name) != value:
                return choose, f"click[{value}]"
        return buy, "click[buy now]"

    def _may_fit(self, shown: Product) -> bool:
        """By title and price, which the list of results shows.

        A range has to be affordable to its end; after a search in vain, its beginning will do.
        """
        goal = self._env.goal
        return (
            shown.asin not in self._rejected
            and goal.query in shown.title.lower()
            and (min if self._searches else max)(shown.prices) <= goal.price_upper
        )

    def _has_options(self, shown: Product) -> bool:
        wanted = self._env.goal.goal_options
        return all(value in shown.options.get(name, ()) for name, value in wanted.items())
