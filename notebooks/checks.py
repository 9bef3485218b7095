"""Checks of the exercises: each takes your function, tries it, and says what is likely wrong.

A check knows the right answer (most often the library's own) and some typical wrong ones. If yours
equals a wrong one on every case, its message names the mistake; otherwise you are shown the first
case that differs. An exercise that is not written yet is not an error.

Left out on purpose: hints. The notebook says how; this file only says whether.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch

from hiper_lab.credit import hae, segment_index
from hiper_lab.flat import gae
from hiper_lab.grid import CreditConfig, TurnGrid, Values
from hiper_lab.scan import reverse_scan

Case = dict[str, Any]


class Wrong(AssertionError):
    """A wrong answer. Jupyter shows the message alone, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"✗ {self}"]


def _grade(
    exercise: str, student: Callable, right: Callable, cases: list[Case], mistakes: dict
) -> None:
    """Try the student's function on every case; print that it is right, or raise `Wrong`."""
    try:
        given = [student(**copy.deepcopy(case)) for case in cases]
    except NotImplementedError:
        print(f"Exercise {exercise}: not written yet.")
        return
    answers = [right(**case) for case in cases]
    differ = [not _equal(a, b) for a, b in zip(given, answers, strict=True)]
    if not any(differ):
        print(f"Exercise {exercise}: right, on all {len(cases)} cases.")
        return
    for message, mistake in mistakes.items():
        wrong = [mistake(**case) for case in cases]
        if all(_equal(a, b) for a, b in zip(given, wrong, strict=True)):
            raise Wrong(f"Exercise {exercise}: {message}")
    first = differ.index(True)
    raise Wrong(f"Exercise {exercise}: {_difference(given[first], answers[first], cases[first])}")


def _flat(answer: Any) -> list[float] | None:
    """An answer as a flat list of numbers; None if it is nothing of the kind."""
    if isinstance(answer, torch.Tensor):
        answer = answer.tolist()
    if hasattr(answer, "tolist"):  # numpy, pandas
        answer = answer.tolist()
    if isinstance(answer, (bool, int, float)):
        return [float(answer)]
    if not isinstance(answer, (list, tuple)):
        return None
    parts = [_flat(part) for part in answer]
    return None if None in parts else [number for part in parts for number in part]


def _equal(a: Any, b: Any) -> bool:
    a, b = _flat(a), _flat(b)
    if a is None or b is None or len(a) != len(b):
        return False
    return all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-5) for x, y in zip(a, b, strict=True))


def _difference(seen: Any, expected: Any, case: Case) -> str:
    """The first thing that is not as expected, with the case it was seen in."""
    numbers, goal = _flat(seen), _flat(expected)
    if seen is None:
        return "your function returned None; is there a `return`?"
    if numbers is None:
        return f"your function returned {type(seen).__name__}, expected a list of numbers"
    if len(numbers) != len(goal):
        return f"you returned {len(numbers)} numbers, expected {len(goal)}, for {_show(case)}"
    rows = zip(numbers, goal, strict=True)
    at = next(i for i, (x, y) in enumerate(rows) if not _equal(x, y))
    return f"number {at} is {numbers[at]:.4f}, expected {goal[at]:.4f}, for {_show(case)}"


def _show(case: Case) -> str:
    return ", ".join(f"{name}={value}" for name, value in case.items())


# ----------------------------------------------------------------- what the episodes are made of

REWARD = [0.0, 0.0, 0.2, 0.0, 0.0, 1.0]
SWITCH = [True, False, False, True, False, True]
V_HIGH = [0.4, 0.3, 0.5, 0.6, 0.5, 0.9]
V_LOW = [0.5, 0.4, 0.6, 0.5, 0.6, 0.8]
# another rhythm, and a turn 0 that says KEEP: it starts a segment all the same
OTHER_REWARD = [0.1, -0.3, 0.0, 0.5, 0.2]
OTHER_SWITCH = [False, True, False, False, True]
OTHER_HIGH = [0.7, -0.2, 0.1, 0.4, 0.3]
OTHER_LOW = [0.2, 0.6, -0.1, 0.8, 0.5]


def _boundary(switch: list[bool]) -> list[bool]:
    return [True, *switch[1:]]


LEVELS = [
    {"reward": REWARD, "boundary": SWITCH, "v_high": V_HIGH, "v_low": V_LOW, "gamma": 0.8},
    {"reward": OTHER_REWARD, "boundary": _boundary(OTHER_SWITCH), "v_high": OTHER_HIGH,
     "v_low": OTHER_LOW, "gamma": 0.9},
]  # fmt: skip


def _pick(case: Case, *names: str, **more: Any) -> Case:
    return {name: case[name] for name in names} | more


def _credit(reward, boundary, v_high, v_low=None, **config):
    """The library's HAE of one episode that terminated, without γ and λ's that do not matter."""
    high = torch.tensor([v_high], dtype=torch.float64)
    low = high if v_low is None else torch.tensor([v_low], dtype=torch.float64)
    grid = TurnGrid.of(torch.tensor([reward], dtype=torch.float64), [boundary])
    return hae(grid, Values(high, low, high, high[:, 0]), CreditConfig(**config))


def _scan(b: list[float], c: list[float]) -> list[float]:
    return reverse_scan(torch.tensor([b]).double(), torch.tensor([c]).double())[0].tolist()


def _ends(boundary: list[bool]) -> list[bool]:
    """True at the last turn of each segment."""
    return [*boundary[1:], True]


# ------------------------------------------------------------------------- 02: returns and GAE


def returns(student: Callable) -> None:
    """Exercise 2.1: ``returns(reward, gamma) -> list``."""

    def right(reward, gamma):
        return _scan(reward, [gamma] * len(reward))

    def from_the_start(reward, gamma):
        shrunk = [gamma**t * r for t, r in enumerate(reward)]
        return [sum(shrunk[t:]) for t in range(len(reward))]

    cases = [{"reward": REWARD, "gamma": 0.8}, {"reward": OTHER_REWARD, "gamma": 0.5}]
    _grade("2.1", student, right, cases, {
        "that is the sum without a discount: each turn further away costs one factor gamma.":
            lambda reward, gamma: right(reward, 1.0),
        "you discount from the start of the episode. The exponent is the distance u - t.":
            from_the_start,
        "you sum the past. The return of turn t looks ahead: go backwards from the last turn.":
            lambda reward, gamma: right(reward[::-1], gamma)[::-1],
        "you start with the next turn's reward. r_t follows a_t, so it belongs to G_t, whole.":
            lambda reward, gamma: [gamma * g for g in [*right(reward, gamma)[1:], 0.0]],
        "you leave out the turn's own reward: G_t = r_t + gamma * G_next.":
            lambda reward, gamma: [*right(reward, gamma)[1:], 0.0],
    })  # fmt: skip


def td_errors(student: Callable) -> None:
    """Exercise 2.2: ``td_errors(reward, value, final_value, terminated, gamma) -> list``."""

    def errors(reward, value, last, gamma):
        ahead = [*value[1:], last]
        rows = zip(reward, ahead, value, strict=True)
        return [r + gamma * after - v for r, after, v in rows]

    def right(reward, value, final_value, terminated, gamma):
        return errors(reward, value, 0.0 if terminated else final_value, gamma)

    def undiscounted(reward, value, final_value, terminated, gamma):
        return right(reward, value, final_value, terminated, 1.0)

    def negative(**case):
        return [-x for x in right(**case)]

    episode = {"reward": REWARD, "value": V_HIGH, "final_value": 0.5, "gamma": 0.8}
    cases = [episode | {"terminated": True}, episode | {"terminated": False},
             {"reward": OTHER_REWARD, "value": OTHER_LOW, "final_value": -0.4, "gamma": 0.9,
              "terminated": False}]  # fmt: skip
    _grade("2.2", student, right, cases, {
        "you bootstrap although the episode terminated. After a terminal state nothing follows: 0.":
            lambda reward, value, final_value, terminated, gamma:
                errors(reward, value, final_value, gamma),
        "you treat a truncated episode as a terminated one. A limit stopped it: the state after "
        "the last turn is worth final_value.":
            lambda reward, value, final_value, terminated, gamma:
                errors(reward, value, 0.0, gamma),
        "you bootstrap the truncated episode from its own last state; the next one is final_value.":
            lambda reward, value, final_value, terminated, gamma:
                errors(reward, value, 0.0 if terminated else value[-1], gamma),
        "gamma is missing in front of the next value.": undiscounted,
        "the sign is turned round: what happened minus what was expected.": negative,
    })  # fmt: skip


def advantages(student: Callable) -> None:
    """Exercise 2.3: ``advantages(reward, value, gamma, lam) -> list``, of a terminated episode."""

    def flat(reward, value, gamma, lam):
        grid = TurnGrid.of(torch.tensor([reward], dtype=torch.float64), [[True] * len(reward)])
        v = torch.tensor([value], dtype=torch.float64)
        config = CreditConfig(gamma=gamma, lam_low=lam)
        return gae(grid, Values(v, v, v, v[:, 0]), config).low[0].tolist()

    def errors(reward, value, gamma):
        return flat(reward, value, gamma, 0.0)

    def only_lam(reward, value, gamma, lam):
        return _scan(errors(reward, value, gamma), [lam] * len(reward))

    def only_gamma(reward, value, gamma, lam):
        return flat(reward, value, gamma, 1.0)

    def from_the_front(reward, value, gamma, lam):
        return _scan(errors(reward, value, gamma)[::-1], [gamma * lam] * len(reward))[::-1]

    def target(reward, value, gamma, lam):
        return [a + v for a, v in zip(flat(reward, value, gamma, lam), value, strict=True)]

    cases = [{"reward": REWARD, "value": V_HIGH, "gamma": 0.8, "lam": 0.5},
             {"reward": OTHER_REWARD, "value": OTHER_LOW, "gamma": 0.5, "lam": 0.9}]  # fmt: skip
    _grade("2.3", student, flat, cases, {
        "that is the TD error alone (λ = 0): the later ones are missing.":
            lambda reward, value, gamma, lam: errors(reward, value, gamma),
        "a later TD error fades by gamma * lam per turn; you use lam alone.": only_lam,
        "a later TD error fades by gamma * lam per turn; you use gamma alone.": only_gamma,
        "you add up the past. Â_t looks ahead: go backwards from the last turn.": from_the_front,
        "that is the target Â + V that a value regresses to; the advantage is without V.": target,
    })  # fmt: skip


# -------------------------------------------------------------------- 03: options and segments


def segments(student: Callable) -> None:
    """Exercise 3.1: ``segments(switch) -> [(first turn, duration), ...]``."""

    def right(switch):
        index = segment_index(torch.tensor([_boundary(switch)]))[0].tolist()
        return [(index.index(k), index.count(k)) for k in range(index[-1] + 1)]

    def no_first(switch):
        starts = [t for t, q in enumerate(switch) if q]
        ends = [*starts, len(switch)][1:]
        return [(a, b - a) for a, b in zip(starts, ends, strict=True)]

    cases = [{"switch": SWITCH}, {"switch": OTHER_SWITCH}, {"switch": [False]},
             {"switch": [True, True, False]}]  # fmt: skip
    _grade("3.1", student, right, cases, {
        "turn 0 starts a segment whatever it says: there is no subgoal yet that it could keep.":
            no_first,
        "the last segment is missing: it ends with the episode, not with a SWITCH.":
            lambda switch: right(switch)[:-1],
        "you give the segment's last turn; asked is its duration, the number of turns.":
            lambda switch: [(first, first + d - 1) for first, d in right(switch)],
        "each duration is one too short: count the segment's first turn too.":
            lambda switch: [(first, d - 1) for first, d in right(switch)],
    })  # fmt: skip


def segment_rewards(student: Callable) -> None:
    """Exercise 3.2: ``segment_rewards(reward, boundary, gamma) -> list``, one per segment."""

    def starts(boundary):
        return [t for t, opens in enumerate(boundary) if opens]

    def right(reward, boundary, gamma):
        inside = [0.0 if end else gamma for end in _ends(boundary)]
        sums = _scan(reward, inside)
        return [sums[t] for t in starts(boundary)]

    def leaks(reward, boundary, gamma):
        to_go = _scan(reward, [gamma] * len(reward))
        return [to_go[t] for t in starts(boundary)]

    def from_the_start(reward, boundary, gamma):
        shrunk = [gamma**t * r for t, r in enumerate(reward)]
        return right(shrunk, boundary, 1.0)

    cases = [_pick(case, "reward", "boundary", "gamma") for case in LEVELS]
    _grade("3.2", student, right, cases, {
        "no discount: the segment's second turn counts gamma, its third gamma squared.":
            lambda reward, boundary, gamma: right(reward, boundary, 1.0),
        "you count on beyond the boundary: R_k ends with the segment's last turn.": leaks,
        "you discount from the start of the episode; R_k starts afresh at its own boundary.":
            from_the_start,
        "you include the reward of the next boundary's turn; it belongs to the next segment.":
            lambda reward, boundary, gamma: [
                sum(gamma ** (u - t) * reward[u] for u in range(t, min(end + 1, len(reward))))
                for t, end in zip(
                    starts(boundary), [*starts(boundary)[1:], len(reward)], strict=True
                )
            ],
    })  # fmt: skip


def high_td_errors(student: Callable) -> None:
    """Exercise 3.3: ``high_td_errors(reward, boundary, v_high, gamma) -> list``, per segment."""

    def solve(reward, boundary, v_high, gamma, discount, ahead):
        starts = [t for t, opens in enumerate(boundary) if opens]
        found = []
        for t, end in zip(starts, [*starts[1:], len(reward)], strict=True):
            inside = sum(gamma ** (u - t) * reward[u] for u in range(t, end))
            after = ahead(v_high, t, end)
            found.append(inside + discount(gamma, end - t) * after - v_high[t])
        return found

    def at_boundary(v, t, end):
        return v[end] if end < len(v) else 0.0

    def power(gamma, d):
        return gamma**d

    def right(**case):
        return solve(**case, discount=power, ahead=at_boundary)

    cases = [_pick(case, "reward", "boundary", "v_high", "gamma") for case in LEVELS]
    _grade("3.3", student, right, cases, {
        "you discount the next boundary by gamma once; it is d turns away: gamma ** d.":
            lambda **case: solve(**case, discount=lambda g, d: g, ahead=at_boundary),
        "you bootstrap from the next turn; a subgoal is judged at the next boundary.":
            lambda **case: solve(
                **case, discount=power,
                ahead=lambda v, t, end: v[t + 1] if t + 1 < len(v) else 0.0),
        "the value at the next boundary is not discounted: it is d turns away.":
            lambda **case: solve(**case, discount=lambda g, d: 1.0, ahead=at_boundary),
        "you bootstrap after the last segment, but the episode terminated: nothing follows.":
            lambda **case: solve(
                **case, discount=power, ahead=lambda v, t, end: v[min(end, len(v) - 1)]),
    })  # fmt: skip


# -------------------------------------------------------------------------------- 04: HAE by hand


def _low(reward, boundary, v_low, gamma, lam_low, ahead, cut) -> list[float]:
    """Low-level advantages from what is seen across a boundary and where the recurrence is cut."""
    total, found = 0.0, []
    for t in reversed(range(len(reward))):
        td_error = reward[t] + gamma * ahead(t) - v_low[t]
        total = td_error + gamma * lam_low * total * (not cut(t))
        found.append(total)
    return found[::-1]


def low_advantages(student: Callable) -> None:
    """Exercise 4.1: ``low_advantages(reward, boundary, v_high, v_low, gamma, lam_low) -> list``."""

    def right(lam_low, **case):
        return _credit(lam_low=lam_low, lam_boundary=0.0, **case).low[0].tolist()

    def variant(boundary, v_high, v_low, across, cut, **case):
        ends, values = _ends(boundary), {"high": v_high, "low": v_low}

        def ahead(t):
            if t + 1 == len(v_low):
                return 0.0
            return values[across][t + 1] if ends[t] else v_low[t + 1]

        at = {"end": ends, "start": boundary, "never": [False] * len(ends)}[cut]
        return _low(v_low=v_low, boundary=boundary, ahead=ahead, cut=lambda t: at[t], **case)

    cases = [LEVELS[0] | {"lam_low": 0.5}, LEVELS[1] | {"lam_low": 1.0}]
    _grade("4.1", student, right, cases, {
        "that is flat GAE on V_low: at a boundary bootstrap from V_high, and stop there.":
            lambda **case: variant(**case, across="low", cut="never"),
        "credit leaks across the boundary: Â_low of the next segment must not flow back.":
            lambda **case: variant(**case, across="high", cut="never"),
        "at the segment's last turn the next value is V_high of the boundary, not V_low: the next "
        "subgoal is not chosen yet.":
            lambda **case: variant(**case, across="low", cut="end"),
        "you cut at a segment's first turn; the cut lies after its last turn, so that the first "
        "one still hears of the rest.":
            lambda **case: variant(**case, across="high", cut="start"),
    })  # fmt: skip


def high_advantages(student: Callable) -> None:
    """Exercise 4.2: ``high_advantages(reward, boundary, v_high, gamma, lam_high) -> list``."""

    def right(lam_high, **case):
        return _credit(lam_high=lam_high, **case).high[0].tolist()

    def variant(reward, boundary, v_high, gamma, fade):
        """`fade(d)`: what multiplies the next segment's advantage."""
        starts = [t for t, opens in enumerate(boundary) if opens]
        spans = list(zip(starts, [*starts[1:], len(reward)], strict=True))
        found, total = [0.0] * len(reward), 0.0
        for t, end in reversed(spans):
            after = v_high[end] if end < len(reward) else 0.0
            inside = sum(gamma ** (u - t) * reward[u] for u in range(t, end))
            total = inside + gamma ** (end - t) * after - v_high[t] + fade(end - t) * total
            found[t] = total
        return found

    def per_turn(gamma, lam_high, **case):
        return variant(**case, gamma=gamma, fade=lambda d: (gamma * lam_high) ** d)

    def once(gamma, lam_high, **case):
        return variant(**case, gamma=gamma, fade=lambda d: gamma * lam_high)

    def flat(gamma, lam_high, boundary, **case):
        every = right(gamma=gamma, lam_high=lam_high, boundary=[True] * len(boundary), **case)
        return [a if opens else 0.0 for a, opens in zip(every, boundary, strict=True)]

    cases = [_pick(case, "reward", "boundary", "v_high", "gamma", lam_high=lam)
             for case, lam in zip(LEVELS, (0.5, 0.9), strict=True)]  # fmt: skip
    _grade("4.2", student, right, cases, {
        "λ_high counts once per segment, gamma once per turn: gamma**d * lam_high, not "
        "(gamma * lam_high)**d.": per_turn,
        "the next segment is d turns away: gamma**d * lam_high, not gamma * lam_high.": once,
        "that is flat GAE read at the boundaries; the high level makes one step per segment.": flat,
        "the next subgoal's advantage is missing: that is the TD error, λ_high = 0.":
            lambda lam_high, **case: right(lam_high=0.0, **case),
    })  # fmt: skip


def switch_advantages(student: Callable) -> None:
    """Exercise 4.3: ``switch_advantages(switch, beta, v_high, v_low_prev) -> list``."""

    def variant(switch, beta, v_high, v_low_prev, weight):
        gap = [h - low for h, low in zip(v_high, v_low_prev, strict=True)]
        rows = zip(switch, beta, gap, strict=True)
        return [0.0 if t == 0 else weight(q, b) * x for t, (q, b, x) in enumerate(rows)]

    def right(**case):
        return variant(**case, weight=lambda q, b: q - b)

    def no_first(switch, beta, v_high, v_low_prev):
        rest = right(switch=switch, beta=beta, v_high=v_high, v_low_prev=v_low_prev)[1:]
        return [(switch[0] - beta[0]) * (v_high[0] - v_low_prev[0]), *rest]

    cases = [
        {"switch": SWITCH, "beta": [0.7, 0.1, 0.2, 0.8, 0.1, 0.9], "v_high": V_HIGH,
         "v_low_prev": [0.0, 0.4, 0.6, 0.2, 0.6, 0.5]},
        {"switch": OTHER_SWITCH, "beta": [0.6, 0.3, 0.5, 0.2, 0.4], "v_high": OTHER_HIGH,
         "v_low_prev": OTHER_LOW},
    ]  # fmt: skip
    _grade("4.3", student, right, cases, {
        "V_high - V_low for both outcomes: KEEP would be praised where SWITCH was better. "
        "Centre the decision: q - beta.":
            lambda **case: variant(**case, weight=lambda q, b: 1.0),
        "KEEP gets no credit at all: it was a decision too. Centre it: q - beta, not q.":
            lambda **case: variant(**case, weight=lambda q, b: float(q)),
        "the sign is turned round: SWITCH is good where V_high is above V_low.":
            lambda **case: variant(**case, weight=lambda q, b: b - q),
        "KEEP weighs -beta, SWITCH 1 - beta; you have the two exchanged.":
            lambda **case: variant(**case, weight=lambda q, b: b if q else b - 1),
        "turn 0 had nothing to keep, so it decided nothing: its advantage is 0.": no_first,
    })  # fmt: skip


def arrivals(student: Callable) -> None:
    """Exercise 4.4: ``arrivals(boundary, v_high, high, lam_boundary) -> list``."""

    def variant(boundary, v_high, high, see):
        last = len(boundary) - 1
        return [see(v_high[t + 1], high[t + 1]) if t < last and boundary[t + 1] else 0.0
                for t in range(last + 1)]  # fmt: skip

    def right(lam_boundary, **case):
        return variant(**case, see=lambda v, a: v + lam_boundary * a)

    def own(boundary, v_high, high, lam_boundary):
        return [v + lam_boundary * a if opens else 0.0
                for opens, v, a in zip(boundary, v_high, high, strict=True)]  # fmt: skip

    cases = [
        {"boundary": SWITCH, "v_high": V_HIGH, "high": [0.5, 0.0, 0.0, -0.2, 0.0, 0.1],
         "lam_boundary": 0.5},
        {"boundary": _boundary(OTHER_SWITCH), "v_high": OTHER_HIGH,
         "high": [0.3, -0.7, 0.0, 0.0, 0.4], "lam_boundary": 0.9},
    ]  # fmt: skip
    _grade("4.4", student, right, cases, {
        "that mixes V_high away: W = V_high + lam * Â_high, and V_high keeps its full weight.":
            lambda lam_boundary, **case: variant(
                **case, see=lambda v, a: (1 - lam_boundary) * v + lam_boundary * a),
        "that is V_high alone, λ_boundary = 0.":
            lambda lam_boundary, **case: variant(**case, see=lambda v, a: v),
        "λ_boundary is missing: that is its value 1.":
            lambda lam_boundary, **case: variant(**case, see=lambda v, a: v + a),
        "you write W at the boundary itself; it is what the turn BEFORE the boundary sees ahead.":
            own,
    })  # fmt: skip


# --------------------------------------------------------------------------- 05: HAE as two scans


def scan(student: Callable) -> None:
    """Exercise 5.1: ``scan(b, c) -> list``."""

    def late(b, c):
        return _scan(b, [*c[1:], 0.0])

    cases = [{"b": [1.0, 1.0, 0.0, 4.0], "c": [0.5, 0.0, 0.5, 0.5]},
             {"b": [0.3, -1.0, 2.0, 0.7, 1.0], "c": [0.9, 0.8, -0.5, 0.2, 3.0]}]  # fmt: skip
    _grade("5.1", student, _scan, cases, {
        "you run forwards in time; what is known first is the last turn.":
            lambda b, c: _scan(b[::-1], c[::-1])[::-1],
        "you multiply by c of the next turn: c_t says how much flows back INTO turn t.": late,
        "the last column multiplies nothing: after it y = 0, so c there is never read.":
            lambda b, c: [x * (1 + c[-1]) if t == len(b) - 1 else x
                          for t, x in enumerate(_scan(b, c))],
        "you multiply b as well: y = b + c * y_next.":
            lambda b, c: _scan([x * y for x, y in zip(b, c, strict=True)], c),
    })  # fmt: skip


def low_coefficients(student: Callable) -> None:
    """Exercise 5.2: ``low_coefficients(reward, boundary, v_high, v_low, gamma, lam_low)``."""

    def variant(reward, boundary, v_high, v_low, factor, gamma, cut, across="high"):
        ends = _ends(boundary)
        values = v_high if across == "high" else v_low
        ahead = [0.0 if t + 1 == len(reward) else values[t + 1] if ends[t] else v_low[t + 1]
                 for t in range(len(reward))]  # fmt: skip
        b = [r + gamma * after - v for r, after, v in zip(reward, ahead, v_low, strict=True)]
        stop = {"end": ends, "start": boundary, "never": [False] * len(ends)}[cut]
        c = [0.0 if s else factor for s in stop]
        return b, [*c[:-1], 0.0]

    def without_last_c(lam_low, gamma, **case):
        b, c = student(lam_low=lam_low, gamma=gamma, **case)
        return list(_flat(b)), [*_flat(c)[:-1], 0.0]  # the scan never reads the last c

    def right(lam_low, gamma, **case):
        return variant(**case, gamma=gamma, factor=gamma * lam_low, cut="end")

    cases = [LEVELS[0] | {"lam_low": 0.5}, LEVELS[1] | {"lam_low": 0.9}]
    _grade("5.2", without_last_c, right, cases, {
        "c is 0 one turn too late: the flow is cut AT the segment's last turn.":
            lambda lam_low, gamma, **case: variant(
                **case, gamma=gamma, factor=gamma * lam_low, cut="start"),
        "c is never 0: credit would leak into the segment before.":
            lambda lam_low, gamma, **case: variant(
                **case, gamma=gamma, factor=gamma * lam_low, cut="never"),
        "λ_low is missing in c.":
            lambda lam_low, gamma, **case: variant(
                **case, gamma=gamma, factor=gamma, cut="end"),
        "b sees V_low across the boundary; there the next subgoal is open: V_high.":
            lambda lam_low, gamma, **case: variant(
                **case, gamma=gamma, factor=gamma * lam_low, cut="end", across="low"),
    })  # fmt: skip


def doubling_pass(student: Callable) -> None:
    """Exercise 5.3: ``doubling_pass(y, c, step) -> (y, c)``."""

    def shifted(x, step):
        return [*x[step:], *[0.0] * min(step, len(x))]

    def right(y, c, step):
        far, flow = shifted(y, step), shifted(c, step)
        y = [a + b * f for a, b, f in zip(y, c, far, strict=True)]
        return y, [b * f for b, f in zip(c, flow, strict=True)]

    def c_kept(y, c, step):
        return right(y, c, step)[0], c

    def in_place(y, c, step):
        y = list(y)
        for t in reversed(range(len(y) - step)):
            y[t] = y[t] + c[t] * y[t + step]
        return y, right(y, c, step)[1]

    def neighbour(y, c, step):
        return right(y, c, 1)

    def edge(y, c, step):
        new_y, new_c = right(y, c, step)
        return new_y, [*new_c[:-step], *c[-step:]]

    y, c = [1.0, 1.0, 0.0, 4.0, 2.0], [0.5, 0.9, 0.5, 0.5, 0.7]
    cases = [{"y": y, "c": c, "step": 1}, {"y": y, "c": c, "step": 2}]
    _grade("5.3", student, right, cases, {
        "c must be updated too: two hops flow back by the product of both factors.": c_kept,
        "some turns already use the new y of a later turn; a pass reads only the old numbers.":
            in_place,
        "you always look one turn ahead; a pass looks `step` turns ahead.": neighbour,
        "near the end there is nothing `step` turns ahead, so nothing flows: c becomes 0 there.":
            edge,
    })  # fmt: skip


# ------------------------------------------------------------------------ 06: bias and variance


def bias_and_variance(student: Callable) -> None:
    """Exercise 6.1: ``bias_and_variance(outcomes, probability, critic, lam) -> two floats``."""

    def moments(outcomes, probability):
        mean = sum(p * x for x, p in zip(outcomes, probability, strict=True))
        square = sum(p * x * x for x, p in zip(outcomes, probability, strict=True))
        return mean, square - mean**2

    def right(outcomes, probability, critic, lam):
        mean, variance = moments(outcomes, probability)
        return (1 - lam) * (critic - mean), lam**2 * variance

    def variant(change):
        return lambda **case: change(**case, answer=right(**case))

    def unweighted(outcomes, probability, critic, lam):
        return right(outcomes, [1 / len(outcomes)] * len(outcomes), critic, lam)

    def exchanged(outcomes, probability, critic, lam):
        return right(outcomes, probability, critic, 1 - lam)

    cases = [
        {"outcomes": [0.0, 1.0], "probability": [0.5, 0.5], "critic": 0.8, "lam": 0.5},
        {"outcomes": [0.0, 1.0, 3.0], "probability": [0.5, 0.3, 0.2], "critic": 0.4, "lam": 0.3},
    ]
    _grade("6.1", student, right, cases, {
        "the variance of lam * G is lam SQUARED times that of G.":
            variant(lambda lam, answer, **_: (answer[0], answer[1] / lam)),
        "the sign of the bias is turned round: mean of the estimate minus the truth.":
            variant(lambda answer, **_: (-answer[0], answer[1])),
        "the outcomes are not equally likely: weigh each by its probability.": unweighted,
        "the weights are exchanged: lam belongs to the return, 1 - lam to the critic.": exchanged,
        "that is the second moment, not the variance: subtract the mean before you square.":
            variant(lambda outcomes, probability, lam, answer, **_: (
                answer[0], answer[1] + (lam * moments(outcomes, probability)[0]) ** 2)),
        "the bias of the critic counts in full only at lam = 0: it has weight 1 - lam.":
            variant(lambda lam, answer, **_: (answer[0] / (1 - lam), answer[1])),
    })  # fmt: skip


def total_variance(student: Callable) -> None:
    """Exercise 6.2: ``total_variance(probability, mean, variance) -> (removed, left)``."""

    def right(probability, mean, variance):
        overall = sum(p * m for p, m in zip(probability, mean, strict=True))
        removed = sum(p * v for p, v in zip(probability, variance, strict=True))
        left = sum(p * (m - overall) ** 2 for p, m in zip(probability, mean, strict=True))
        return removed, left

    def unweighted(probability, mean, variance):
        return right([1 / len(mean)] * len(mean), mean, variance)

    def not_centred(probability, mean, variance):
        removed, _ = right(probability, mean, variance)
        return removed, sum(p * m * m for p, m in zip(probability, mean, strict=True))

    def squared(probability, mean, variance):
        return right(probability, mean, [v * v for v in variance])

    cases = [
        {"probability": [0.5, 0.5], "mean": [0.2, 0.8], "variance": [0.25, 0.1]},
        {"probability": [0.6, 0.3, 0.1], "mean": [0.5, -1.0, 2.0], "variance": [0.0, 0.5, 1.5]},
    ]
    _grade("6.2", student, right, cases, {
        "the two parts are exchanged: V_high knows the state it is in, so what varies between "
        "boundaries stays.": lambda **case: right(**case)[::-1],
        "the boundaries are not equally likely: weigh each by its probability.": unweighted,
        "subtract the overall mean before you square: Var(E[G|b]), not E[E[G|b]²].": not_centred,
        "`variance` holds variances already; do not square them.": squared,
    })  # fmt: skip


def switch_gradient(student: Callable) -> None:
    """Exercise 6.3: ``switch_gradient(beta, v_high, v_low) -> float``."""

    def right(beta, v_high, v_low):
        return beta * (1 - beta) * (v_high - v_low)

    cases = [
        {"beta": 0.25, "v_high": 0.6, "v_low": 0.2},
        {"beta": 0.9, "v_high": 0.1, "v_low": 0.7},
    ]
    _grade("6.3", student, right, cases, {
        "exactly the wrong sign: after SWITCH both factors are positive, after KEEP both negative.":
            lambda **case: -right(**case),
        "that is the mean of the advantage, which is 0. The score weighs it with q - beta.":
            lambda **case: 0.0,
        "that is the gradient of SWITCH alone; KEEP has probability 1 - beta and counts too.":
            lambda **case: right(**case) * (1 - case["beta"]),
        "weigh SWITCH with its probability beta and KEEP with 1 - beta.":
            lambda beta, v_high, v_low: (1 - 2 * beta + 2 * beta**2) * (v_high - v_low),
    })  # fmt: skip


# --------------------------------------------------------------------------- 07: tokens and loss


def token_advantages(student: Callable) -> None:
    """Exercise 7.1: ``token_advantages(roles, chosen, switch, high, low) -> list``."""

    def variant(roles, chosen, switch, high, low, masked=True, level=None):
        credit = {"switch": switch, "subgoal": high, "action": low} | (level or {})
        return [credit.get(role, low) if is_choice or not masked else 0.0
                for role, is_choice in zip(roles, chosen, strict=True)]  # fmt: skip

    wrote = {
        "roles": ["format", "switch", "format", "subgoal", "subgoal", "format", "action", "action"],
        "chosen": [False, True, False, True, True, False, True, False],
        "switch": 0.3, "high": -0.2, "low": 0.7,
    }  # fmt: skip
    kept = {
        "roles": ["format", "switch", "format", "subgoal", "format", "action", "format"],
        "chosen": [False, True, False, False, False, True, True],
        "switch": -0.1, "high": 0.0, "low": 0.4,
    }  # fmt: skip
    copied = kept | {"high": 0.9}
    _grade("7.1", student, variant, [wrote, kept, copied], {
        "injected tokens get an advantage; nobody chose them, so they get 0.":
            lambda **case: variant(**case, masked=False),
        "all tokens get the action's advantage, as in flat PPO; look the level up by role.":
            lambda **case: variant(**case, level={"switch": case["low"], "subgoal": case["low"]}),
        "subgoal tokens get the switch's advantage and switch tokens the subgoal's.":
            lambda **case: variant(
                **case, level={"switch": case["high"], "subgoal": case["switch"]}),
        "the levels are summed; a token belongs to exactly one.":
            lambda **case: variant(
                **case, level=dict.fromkeys(
                    ("switch", "subgoal", "action"), case["switch"] + case["high"] + case["low"])),
        "freely written FORMAT tokens were chosen too; they go with the action (low).":
            lambda **case: variant(**case, level={"format": 0.0}),
    })  # fmt: skip


def clipped_loss(student: Callable) -> None:
    """Exercise 7.2: ``clipped_loss(ratio, advantage, clip) -> float``."""

    def both(ratio, advantage, clip):
        return ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage

    def always_clipped(**case):
        return -both(**case)[1]

    cases = [{"ratio": ratio, "advantage": advantage, "clip": 0.2}
             for ratio in (0.5, 0.9, 1.0, 1.5) for advantage in (1.0, -2.0)]  # fmt: skip
    _grade("7.2", student, lambda **case: -min(both(**case)), cases, {
        "that is the objective; the loss is its negative.": lambda **case: min(both(**case)),
        "max of the two is the optimistic bound; PPO is pessimistic: the smaller objective.":
            lambda **case: -max(both(**case)),
        "you always clip: where the step back to 1 would help, the unclipped term must win.":
            always_clipped,
        "nothing is clipped.": lambda **case: -both(**case)[0],
    })  # fmt: skip


def allowed_logprob(student: Callable) -> None:
    """Exercise 7.3: ``allowed_logprob(logits, allowed, chosen) -> float``."""

    def logprob(logits, chosen):
        return logits[chosen] - math.log(sum(math.exp(z) for z in logits))

    def right(logits, allowed, chosen):
        masked = [z if ok else -math.inf for z, ok in zip(logits, allowed, strict=True)]
        return logprob(masked, chosen)

    def zeroed(logits, allowed, chosen):
        return logprob([z * ok for z, ok in zip(logits, allowed, strict=True)], chosen)

    cases = [
        {"logits": [2.0, 1.0, 0.0, -1.0], "allowed": [True, False, True, False], "chosen": 0},
        {"logits": [0.5, 3.0, 0.5], "allowed": [True, False, True], "chosen": 2},
        {"logits": [0.0, 1.0], "allowed": [True, True], "chosen": 1},
    ]
    _grade("7.3", student, right, cases, {
        "that is over the whole vocabulary: tokens that may not be drawn still take a share.":
            lambda logits, allowed, chosen: logprob(logits, chosen),
        "a forbidden logit set to 0 still has weight exp(0) = 1; set it to minus infinity.": zeroed,
        "that is the probability; asked is its logarithm.":
            lambda logits, allowed, chosen: math.exp(right(logits, allowed, chosen)),
    })  # fmt: skip
