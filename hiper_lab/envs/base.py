"""The one interface of every text environment, and a checker for it.

It is Gymnasium's, with text for actions and observations. What :class:`TextEnv` says here is all
that the rest of the package relies on; ``README.md`` writes an environment in 40 lines.
"""

import math
import random
from typing import Any, Protocol


class TextEnv(Protocol):
    """An episodic world that is read and acted upon by text.

    ``info`` has at least:

    - ``admissible`` (list[str]): texts that would have an effect now, each once, never empty while
      the episode goes on. Guided decoding chooses among them; any other text is allowed too.
    - ``won`` (bool): whether the task is solved.
    - ``task`` (str): what to do, in one sentence, the same for the whole episode.
    - ``task_type`` (str): the kind of task, by which results are grouped.
    """

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start an episode; the same seed and options give the same one. Returns what is seen first
        and ``info``."""

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Act. Any text is accepted; one that means nothing costs a turn and changes nothing else.

        Returns:
            ``(observation, reward, terminated, truncated, info)``. ``terminated``: the world has
            come to its end, won or lost, and nothing follows. ``truncated``: only the number of
            turns ran out, so the state still has a value. Never both.
        """

    def snapshot(self) -> Any:
        """The present state. It stays valid whatever is done afterwards."""

    def restore(self, snapshot: Any) -> dict[str, Any]:
        """Go (back) to a state of the same episode; returns the ``info`` that belongs to it.

        What follows is what followed then, but for an environment of chance, which may throw its
        dice anew, so that rollouts from one state differ.
        """


ADVERSARIAL = (
    *("", " ", "\n", "\x00", "look\x00", "LOOK ", "go  to", "ä" * 10_000, "\ud800", "🥔 {0} %s"),
    *("]", "search[", "click[]", "<action>look</action>", "'; DROP TABLE turns; --"),
)


def check_env(env: TextEnv, *, seed: int = 0, turns: int = 30, chance: bool = False) -> None:
    """Play with an environment and compare what it does with what :class:`TextEnv` promises.

    Args:
        seed: Of the episodes and of what is played.
        turns: How many are played.
        chance: Whether the environment throws its dice anew after ``restore``.

    Raises:
        ValueError: With the first promise that is not kept: what was seen and what was expected.

    Example:
        >>> from hiper_lab.envs.games import generate_game
        >>> from hiper_lab.envs.household import HouseholdEnv
        >>> check_env(HouseholdEnv(generate_game(0)))
    """
    first = _reset(env, seed)
    texts, told, rng = [], [], random.Random(seed)
    info = first[1]
    for _ in range(turns):
        texts.append(rng.choice(info["admissible"]))
        told.append(_step(env, texts[-1], first[1]["task"]))
        info = told[-1][-1]
        if told[-1][2] or told[-1][3]:
            break
    _expect(_reset(env, seed) == first, "reset", "another episode for the same seed")
    half = len(texts) // 2
    again = [env.step(text) for text in texts[:half]]
    snapshot, kept = env.snapshot(), (again[-1][-1] if again else first[1])
    # in the second round the snapshot has been left and come back to
    for _ in range(1 if chance else 2):
        again = again[:half] + [env.step(text) for text in texts[half:]]
        _expect(again == told, "step", "other results for the same seed and texts")
        _expect(env.restore(snapshot) == kept, "restore", "another info than at the snapshot")
    for text in ADVERSARIAL:
        _reset(env, seed)
        try:
            _step(env, text, first[1]["task"])
        except Exception as error:
            raise ValueError(f"step({text[:20]!r}): saw {error!r}, expected an answer") from error


def _reset(env: TextEnv, seed: int) -> tuple[str, dict]:
    result = env.reset(seed=seed)
    _expect(isinstance(result, tuple) and len(result) == 2, "reset", result)
    _expect(isinstance(result[0], str) and result[0], "reset: observation", result[0])
    _check_info(result[1])
    _expect(
        not result[1]["won"] and result[1]["admissible"], "reset: an episode at its end", result
    )
    return result


def _step(env: TextEnv, text: str, task: str) -> tuple[str, float, bool, bool, dict]:
    result = env.step(text)
    _expect(isinstance(result, tuple) and len(result) == 5, "step", result)
    observation, reward, terminated, truncated, info = result
    _expect(isinstance(observation, str), "step: observation", observation)
    _expect(isinstance(reward, float) and math.isfinite(reward), "step: reward", reward)
    over = (terminated, truncated)
    _expect(
        all(isinstance(x, bool) for x in over) and not all(over),
        "step: (terminated, truncated)",
        over,
    )
    _check_info(info)
    _expect(info["task"] == task, "step: another task", info["task"])
    _expect(terminated or not info["won"], "step: won, but not terminated", info["won"])
    _expect(any(over) or info["admissible"], "step: nothing admissible", info["admissible"])
    return result


def _check_info(info: dict) -> None:
    for key, kind in (("admissible", list), ("won", bool), ("task", str), ("task_type", str)):
        _expect(isinstance(info, dict) and type(info.get(key)) is kind, f"info[{key!r}]", info)
    admissible = info["admissible"]
    _expect(
        all(isinstance(text, str) and text for text in admissible)
        and len(set(admissible)) == len(admissible),
        "info['admissible']",
        admissible,
    )


def _expect(kept: bool, what: str, seen: object) -> None:
    if not kept:
        raise ValueError(f"{what}: saw {str(seen)[:200]}, expected what TextEnv promises")
