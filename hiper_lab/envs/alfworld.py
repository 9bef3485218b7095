"""The genuine ALFWorld: TextWorld's PDDL engine behind the interface of HouseholdEnv.

It needs ``pip install 'hiper-lab[alfworld]'`` (two packages are compiled) and plays generated games
and official ones alike. It is slow, see ``benchmarks/environments.py``: to train, use HouseholdEnv,
whose text is the same; ``tests/test_alfworld.py`` compares the two, step by step. For many games at
once put it into a :class:`hiper_lab.envs.pool.EnvPool`.

What the engine does to its host is undone: it overwrites ``sys.argv``; alfworld creates a folder
in ``~/.cache`` and sets ALFWORLD_DATA on import. What it repeats is remembered: it parses the same
grammar for every admissible command of every step, translates the game twice for every reset, once
for a planner that nobody asks, and loads a copy of a 34 MB library for every game, for ever.

Left out on purpose: ALFWorld's experts, shuffled instance numbers, AlfredTWEnv (in its batches all
games share one table of names, see :class:`AlfworldEnv`).
"""

import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache

from hiper_lab.envs.games import complete_game
from hiper_lab.envs.household import World

_LIBRARIES: list = []  # loaded and free; to unload one would crash Python when it exits


class AlfworldEnv:
    """One game in the genuine engine.

    Every instance has a wrapper for names of its own; AlfredTWEnv hands one and the same to all of
    a batch, which then silently play one game.

    Args:
        game: A generated game or the content of a game.tw-pddl file.
        max_turns: Truncate after this many turns without a win; None for no limit.

    Raises:
        ImportError: If the extra is not installed.
        ValueError: If the game is broken or ``max_turns`` is below 1.
    """

    def __init__(self, game: dict, max_turns: int | None = 50):
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns: saw {max_turns}, expected at least 1, or None")
        self.world = World.from_game(game)  # a broken game would crash the engine's C++
        self.max_turns = max_turns
        self._translation: tuple | None = None
        self._texts: list[str] | None = None
        with self._engine():
            textworld, pddl, demangler = _packages()
            infos = textworld.EnvInfos(admissible_commands=True, won=True)
            self._env = demangler(pddl(infos), shuffle=False)
            try:
                self._env.load(complete_game(game))
            except (Exception, SystemExit) as error:  # the translator exits where others raise
                raise ValueError(
                    f"game: the engine can't load it, {type(error).__name__}: {error}; "
                    "expected PDDL of ALFWorld's domain"
                ) from error

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start over; a game is one fixed task, so ``seed`` and ``options`` change nothing."""
        with self._engine():
            state = self._env.reset()
        self._texts = []
        return state.feedback, self._info(state)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """Play one command, as :meth:`hiper_lab.envs.household.HouseholdEnv.step` does.

        Raises:
            RuntimeError: If the episode has not started or is over.
        """
        if self._texts is None or self._over:
            raise RuntimeError(f"step({text!r}) outside an episode; call reset() or restore()")
        with self._engine():
            state, _, _ = self._env.step(text)
        self._texts.append(text)
        info = self._info(state)
        return state.feedback, float(info["won"]), info["won"], self._over and not info["won"], info

    def snapshot(self) -> tuple[str, ...]:
        """The texts since ``reset``; the engine can't go back, :meth:`restore` plays them again."""
        if self._texts is None:
            raise RuntimeError("snapshot() outside an episode; call reset()")
        return tuple(self._texts)

    def restore(self, snapshot: tuple[str, ...]) -> dict:
        """Go (back) to a state of this game, in the time that its steps take."""
        _, info = self.reset()
        for text in snapshot:
            info = self.step(text)[-1]
        return info

    def __del__(self):
        if (env := self.__dict__.get("_env")) and _LIBRARIES is not None:  # None: Python is ending
            _LIBRARIES.append(env.unwrapped.downward_lib)

    def _info(self, state) -> dict:
        won = bool(state["won"])
        self._over = won or (self.max_turns is not None and len(self._texts) >= self.max_turns)
        return {
            "admissible": list(state["admissible_commands"]),
            "won": won,
            "task": self.world.task,
            "task_type": self.world.goal.task_type,
        }

    @contextmanager
    def _engine(self) -> Iterator[None]:
        """While the engine works: remember what it repeats, and give back what it takes."""
        _packages()
        import fast_downward
        from textworld.envs.pddl import textgen

        def translate_once(domain: str, problem: str, verbose: bool, optimize: bool = False):
            # The optimised translation is for a planner, which is loaded but never asked here.
            if self._translation is None:
                self._translation = translate(domain, problem, verbose)
            return self._translation

        def load_or_reuse():
            return _LIBRARIES.pop() if _LIBRARIES else load()

        argv, translate, load = sys.argv, fast_downward.pddl2sas, fast_downward.load_lib
        parse = textgen._parse_and_convert
        fast_downward.pddl2sas, fast_downward.load_lib = translate_once, load_or_reuse
        textgen._parse_and_convert = _parse
        try:
            yield
        finally:
            sys.argv, textgen._parse_and_convert = argv, parse
            fast_downward.pddl2sas, fast_downward.load_lib = translate, load


@cache
def _packages() -> tuple:
    """Import the engine without what alfworld does to the environment and the home folder."""
    data = os.environ.get("ALFWORLD_DATA")
    os.environ["ALFWORLD_DATA"] = data or tempfile.gettempdir()
    try:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv
    except ImportError as error:
        raise ImportError(
            f"{error}; the genuine engine needs pip install 'hiper-lab[alfworld]' "
            "and a C++ compiler"
        ) from error
    finally:
        if data is None:
            del os.environ["ALFWORLD_DATA"]
    return textworld, PddlEnv, AlfredDemangler


@lru_cache(maxsize=10_000)
def _parsed(text: str, rule_name: str) -> list:
    from textworld.envs.pddl import textgen

    return textgen._Converter().walk(textgen._PARSER.parse(text, rule_name=rule_name))


def _parse(text: str, rule_name: str, trace: bool = False) -> list:
    """What ``textgen._parse_and_convert`` returns: a new tree each time, since it is written to."""
    return copy.deepcopy(_parsed(text, rule_name))
