"""Environments in processes of their own, and stepping many at once.

For engines that take milliseconds a step, like the genuine ALFWorld; a household game is faster
than the message that would ask for it, so leave it where it is.
"""

import multiprocessing
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from hiper_lab.envs.base import TextEnv

Request = tuple[int, str, tuple]  # which environment, which method, its arguments


class EnvPool:
    """Keeps environments in worker processes; ``envs`` stand for them here.

    Args:
        makers: Makes an environment, in its process, when it is first used. It has to be importable
            there: a class or function of a module, or a functools.partial of one.
        workers: Processes, each with its share of the environments; None for one per core.

    Raises:
        ValueError: If ``workers`` is below 1.

    Example:
        >>> from functools import partial
        >>> from hiper_lab.envs.games import generate_game
        >>> from hiper_lab.envs.household import HouseholdEnv
        >>> makers = [partial(HouseholdEnv, generate_game(seed)) for seed in range(3)]
        >>> with EnvPool(makers, workers=1) as pool:
        ...     starts = reset_all(pool.envs, [None] * 3)
        ...     [turn[0] for turn in step_all(pool.envs, ["dance"] * 3)]
        ['Nothing happens.', 'Nothing happens.', 'Nothing happens.']
    """

    def __init__(self, makers: Sequence[Callable[[], TextEnv]], workers: int | None = None):
        workers = min(workers if workers is not None else os.cpu_count() or 1, len(makers) or 1)
        if workers < 1:
            raise ValueError(f"workers: saw {workers}, expected at least 1, or None")
        self.envs = [PooledEnv(self, k) for k in range(len(makers))]
        context = multiprocessing.get_context("spawn")  # no fork: torch may have threads
        self.workers = []
        self._calls = 0
        for first in range(workers):
            here, there = context.Pipe()
            mine = {k: makers[k] for k in range(first, len(makers), workers)}
            process = context.Process(target=_serve, args=(there, mine), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def call(self, requests: Sequence[Request]) -> list[Any]:
        """Let all processes work at once; an answer is what the method returned, or the error."""
        self._calls += 1
        shares: dict[int, list[int]] = defaultdict(list)  # worker -> positions of its requests
        for position, (k, _, _) in enumerate(requests):
            shares[k % len(self.workers)].append(position)
        answers: list[Any] = [None] * len(requests)
        for worker, positions in shares.items():
            try:
                share = [requests[position] for position in positions]
                self.workers[worker][1].send((self._calls, share))
            except OSError:
                pass  # its process has ended, which the next loop reports
        for worker, positions in shares.items():
            process, pipe = self.workers[worker]
            try:
                call, replies = pipe.recv()
                while call != self._calls:  # left over from a call that was interrupted
                    call, replies = pipe.recv()
            except (EOFError, OSError):
                process.join(timeout=1)
                replies = [
                    RuntimeError(
                        f"the process of this environment ended, exit code {process.exitcode}"
                    )
                ] * len(positions)
            for position, reply in zip(positions, replies, strict=True):
                answers[position] = reply
        return answers

    def close(self) -> None:
        """End the processes; afterwards the environments answer with errors."""
        for _, pipe in self.workers:
            pipe.close()  # a worker ends when nobody can ask any more
        for process, _ in self.workers:
            process.join()

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class PooledEnv:
    """Stands for one environment of a pool; a TextEnv."""

    def __init__(self, pool: EnvPool, index: int):
        self.pool, self.index = pool, index

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        return self._ask("reset", seed, options)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        return self._ask("step", text)

    def snapshot(self) -> Any:
        return self._ask("snapshot")

    def restore(self, snapshot: Any) -> dict:
        return self._ask("restore", snapshot)

    def _ask(self, method: str, *arguments) -> Any:
        return _value(self.pool.call([(self.index, method, arguments)])[0])


def reset_all(envs: Sequence[TextEnv], seeds: Sequence[int | None]) -> list[tuple[str, dict]]:
    """Reset every environment, those of one pool at the same time."""
    return [_value(x) for x in _call_all(envs, "reset", [(seed,) for seed in seeds])]


def step_all(envs: Sequence[TextEnv], texts: Sequence[str]) -> list[Any]:
    """Step every environment with its text, those of one pool at the same time.

    Returns:
        What each ``step`` returned, or the exception that it raised: one broken environment must
        not take the others with it.
    """
    return _call_all(envs, "step", [(text,) for text in texts])


def _call_all(envs: Sequence[TextEnv], method: str, arguments: list[tuple]) -> list[Any]:
    answers: list[Any] = [None] * len(envs)
    pooled: dict[EnvPool, list[int]] = defaultdict(list)
    for k, (env, given) in enumerate(zip(envs, arguments, strict=True)):
        if isinstance(env, PooledEnv):
            pooled[env.pool].append(k)
        else:
            answers[k] = _answer(env, method, given)
    for pool, members in pooled.items():
        replies = pool.call([(envs[k].index, method, arguments[k]) for k in members])
        for k, reply in zip(members, replies, strict=True):
            answers[k] = reply
    return answers


def _answer(env: TextEnv, method: str, arguments: tuple) -> Any:
    try:
        return getattr(env, method)(*arguments)
    except Exception as error:
        return error


def _value(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(pipe, makers: dict[int, Callable[[], TextEnv]]) -> None:
    """The life of a worker: answer lists of requests until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupting a notebook is for its own process
    envs: dict[int, TextEnv] = {}
    while True:
        try:
            call, requests = pipe.recv()
        except EOFError:
            return
        answers = []
        for k, method, arguments in requests:
            try:
                if k not in envs:
                    envs[k] = makers[k]()
                answers.append(getattr(envs[k], method)(*arguments))
            except Exception as error:
                known = type(error) in (ValueError, RuntimeError)  # others may not travel
                answers.append(error if known else RuntimeError(f"{type(error).__name__}: {error}"))
        pipe.send((call, answers))
