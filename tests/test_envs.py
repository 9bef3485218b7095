"""Every environment keeps the promises of TextEnv, here and in a process of a pool."""

import importlib.util
import os
import random
import re
import shutil
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiper_lab.envs.base import _step, check_env
from hiper_lab.envs.games import SIZES, generate_game
from hiper_lab.envs.household import EFFECTS, HouseholdEnv
from hiper_lab.envs.pool import EnvPool, reset_all, step_all
from hiper_lab.envs.probes import KitchenEnv


def household() -> HouseholdEnv:
    return HouseholdEnv(generate_game(7, size="medium"), max_turns=20)


def alfworld():
    if not importlib.util.find_spec("alfworld"):  # (importing it would create a folder at home)
        pytest.skip("the extra 'alfworld' is not installed")
    from hiper_lab.envs.alfworld import AlfworldEnv

    return AlfworldEnv(generate_game(7), max_turns=20)


def webshop():
    module = pytest.importorskip("hiper_lab.envs.webshop", exc_type=ImportError)
    return module.WebShopEnv()


def express():
    if not importlib.util.find_spec("textworld_express") or not shutil.which("java"):
        pytest.skip("the extra 'express' or Java is not installed")
    from hiper_lab.envs.express import ExpressEnv

    return ExpressEnv("coin", parameters="numLocations=3", max_turns=20)


def pooled():
    """Closed by nobody: the process has to end when the pool is forgotten, or with this one."""
    return EnvPool([partial(HouseholdEnv, generate_game(7))], workers=1).envs[0]


@pytest.fixture(scope="session")
def corridor(root):
    """The environment that README.md writes in 40 lines."""
    text = (root / "README.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Corr" in c)
    assert len(code.splitlines()) <= 40
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names["Corridor"]


@pytest.mark.parametrize("make", [household, alfworld, webshop, express, KitchenEnv, pooled])
def test_every_environment_keeps_its_promises(make):
    env = make()
    for seed in range(3):
        check_env(env, seed=seed, chance=make is KitchenEnv)


def test_the_environment_of_the_guide_keeps_its_promises_and_can_be_won(corridor):
    env = corridor()
    for seed in range(5):
        check_env(env, seed=seed)
    _, info = env.reset(seed=3)
    over = False
    while not over:
        wanted = [text for text in info["admissible"] if text in ("take the key", "open the door")]
        move = "go left" if env.snapshot().key == -1 else "go right"
        _, reward, terminated, truncated, info = env.step((wanted or [move])[0])
        over = terminated or truncated
    assert (reward, terminated, info["won"]) == (1.0, True, True)


class Bad(HouseholdEnv):
    """Breaks one promise."""

    def __init__(self, fault: str):
        super().__init__(generate_game(0), max_turns=10)
        self.fault, self.calls = fault, 0

    def reset(self, seed=None, options=None):
        observation, info = super().reset()
        self.calls += self.fault == "forgets the seed"
        return observation + "!" * self.calls, info

    def step(self, text):
        if self.fault == "raises" and len(text) > 1000:
            raise KeyError(text)
        observation, reward, terminated, truncated, info = super().step(text)
        if self.fault == "reward is an int":
            reward = int(reward)
        if self.fault == "both ends":
            terminated = truncated = terminated or truncated
        if self.fault == "no task type":
            del info["task_type"]
        if self.fault == "another task":
            info["task"] += "?"
        if self.fault == "says everything twice":
            info["admissible"] *= 2
        return observation, reward, terminated, truncated, info

    def restore(self, snapshot):
        turns = self._state.turn if self._state else 0
        keep = self.fault == "does not restore" and turns
        return super().restore(snapshot._replace(turn=turns, point="") if keep else snapshot)


@pytest.mark.parametrize(("fault", "message"), [
    ("none", None),
    ("forgets the seed", "reset: saw another episode for the same seed"),
    ("raises", r"step\('ä+'\): saw KeyError"),
    ("reward is an int", "step: reward: saw 0"),
    ("both ends", r"\(terminated, truncated\): saw \(True, True\)"),
    ("no task type", r"info\['task_type'\]"),
    ("another task", "step: another task"),
    ("says everything twice", r"info\['admissible'\]"),
    ("does not restore", "saw other results|saw another info"),
])  # fmt: skip
def test_the_checker_finds_each_broken_promise(fault, message):
    if message is None:
        return check_env(Bad(fault))
    with pytest.raises(ValueError, match=message):
        check_env(Bad(fault))


# -------------------------------------------------------------------------------- any text at all

MUTATIONS = [
    str.upper, str.title, str.strip, lambda t: t + " ", lambda t: t + "\x00", lambda t: t[:-1],
    lambda t: t.replace(" ", "  "), lambda t: t.replace(" ", "\u00a0"), lambda t: t + " 1",
    lambda t: t[::-1], lambda t: f"<action>{t}</action>", lambda t: t * 500, lambda t: "\ufeff" + t,
    lambda t: t.replace("1", "99"), lambda t: f"{t}\n{t}",
    lambda t: t.encode().decode("utf-16", "replace"),
]  # fmt: skip
GAMES = [HouseholdEnv(generate_game(k, size=SIZES[k % 3]), max_turns=None) for k in range(12)]


def spoilt(rng: random.Random, admissible: list[str], texts: list[str]) -> str:
    """Half the time what is admissible; else a mutation of it, or a text of hypothesis' own."""
    text = rng.choice(admissible)
    if rng.random() < 0.5:
        return text
    return rng.choice(texts) if texts and rng.random() < 0.3 else rng.choice(MUTATIONS)(text)


def consistent(env: HouseholdEnv) -> None:
    """Everything is in exactly one place, and what is said agrees with the state."""
    state, world = env.snapshot(), env.world
    things = [i for i, _ in state.inside] + [state.held] * bool(state.held)
    assert sorted(things) == sorted(i for i, _ in world.start.inside)
    assert state.point == world.start.point or state.point in world.served
    assert {mark for mark, _ in state.marks} <= {mark for mark, _ in EFFECTS.values()}
    for i in things:
        assert not {("ishot", i), ("iscool", i)} <= state.marks
    assert env.restore(state)["admissible"] == sorted(env.restore(state)["admissible"])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.text(), max_size=5))
def test_20000_random_and_adversarial_commands_leave_a_consistent_state(seed, texts):
    """100 commands an example: admissible ones, mutated ones, and hypothesis' own texts."""
    rng = random.Random(seed)
    env = rng.choice(GAMES)
    _, info = env.reset()
    for _ in range(100):
        if info["won"]:
            _, info = env.reset()
        before = env.snapshot()
        text = spoilt(rng, info["admissible"], texts)
        known = text.strip() in info["admissible"]
        observation, reward, terminated, truncated, info = env.step(text)
        assert (observation == "Nothing happens.") != known and not truncated
        assert terminated == info["won"] == bool(reward)
        if not known:
            assert env.snapshot() == before._replace(turn=before.turn + 1)
    consistent(env)


@pytest.mark.parametrize(("make", "examples"), [(KitchenEnv, 200), (express, 200), (alfworld, 5)])
def test_any_text_is_answered_and_the_state_stays_consistent(make, examples):
    """As above, 20,000 commands; 500 of the genuine ALFWorld, which takes 20 ms for each.

    (``tests/test_webshop.py`` has the shop's.)
    """
    env = make()

    @settings(max_examples=examples, deadline=None)
    @given(st.integers(0, 2**32), st.lists(st.text(), max_size=5))
    def play(seed, texts):
        rng, over = random.Random(seed), True
        for _ in range(100):
            if over:
                _, info = env.reset(seed=rng.randrange(1000))
            *_, terminated, truncated, info = _step(
                env, spoilt(rng, info["admissible"], texts), info["task"]
            )
            over = terminated or truncated
        assert env.restore(env.snapshot()) == info

    play()


# --------------------------------------------------------------------------------------- the pool


def broken_game() -> HouseholdEnv:
    return HouseholdEnv({})


def mortal() -> "Mortal":
    return Mortal(generate_game(0))


class Mortal(HouseholdEnv):
    def step(self, text):
        if text == "die":
            os._exit(7)
        if text == "raise":
            raise KeyError("lost")
        return super().step(text)


def test_a_pool_plays_exactly_as_its_environments_would_here():
    games = [generate_game(k) for k in range(5)]
    here = [HouseholdEnv(game) for game in games]
    with EnvPool([partial(HouseholdEnv, game) for game in games], workers=2) as pool:
        mixed = [*pool.envs[:3], here[3], pool.envs[4]]
        seeds = [None] * 5
        starts = reset_all(mixed, seeds)
        assert starts == [env.reset() for env in here]
        state, rng = pool.envs[0].snapshot(), random.Random(0)
        infos = [info for _, info in starts]
        for _ in range(10):
            texts = [rng.choice(info["admissible"]) for info in infos]
            expected = [env.step(text) for env, text in zip(here[:3], texts, strict=False)]
            answers = step_all(mixed, texts)
            assert answers[:3] == expected
            infos = [answer[-1] for answer in answers]
        assert pool.envs[0].restore(state) == starts[0][1] == here[0].restore(state)


def test_one_broken_environment_does_not_take_the_others_with_it():
    with EnvPool([mortal, mortal, broken_game], workers=3) as pool:
        with pytest.raises(ValueError, match="expected a dict with text under 'pddl_problem'"):
            reset_all(pool.envs, [None] * 3)
        reset_all(pool.envs[:2], [None] * 2)
        answers = step_all(pool.envs[:2], ["raise", "look"])
        assert isinstance(answers[0], RuntimeError) and "KeyError: 'lost'" in str(answers[0])
        assert answers[1][0].startswith("You are in the middle")
        for _ in range(2):  # dead processes stay reported
            answers = step_all(pool.envs[:2], ["die", "look"])
            assert isinstance(answers[0], RuntimeError) and "exit code 7" in str(answers[0])
            assert answers[1][0].startswith("You are in the middle")
        with pytest.raises(RuntimeError, match="ended, exit code 7"):
            pool.envs[0].step("look")
    with pytest.raises(RuntimeError, match="the process of this environment ended"):
        pool.envs[1].step("look")


def test_what_an_interrupted_call_left_behind_is_not_taken_for_an_answer():
    with EnvPool([mortal], workers=1) as pool:
        pool.workers[0][1].send((-1, [(0, "reset", ())]))  # sent, but never waited for
        assert pool.envs[0].reset() == mortal().reset()
        pool.workers[0][1].send((-1, [(0, "step", ("dance",))]))
        assert pool.envs[0].step("inventory")[0] == "You are not carrying anything."


def test_a_pool_without_workers_is_refused():
    with pytest.raises(ValueError, match="workers: saw 0, expected at least 1"):
        EnvPool([mortal], workers=0)


def test_the_package_says_how_to_get_an_engine_that_is_missing(monkeypatch):
    module = importlib.import_module("hiper_lab.envs.alfworld")
    monkeypatch.setitem(__import__("sys").modules, "textworld", None)
    module._packages.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'hiper-lab\[alfworld\]'"):
        module.AlfworldEnv(generate_game(0))
