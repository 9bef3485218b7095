"""The checks of the exercises know right from wrong, and name the mistake that was made.

The answers here are written as a student would, apart from the checks' own.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

PATH = Path(__file__).parents[1] / "notebooks" / "checks.py"
spec = importlib.util.spec_from_file_location("checks", PATH)
checks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(checks)


# ------------------------------------------------------------------------ 02: returns and GAE


def returns(reward, gamma):
    T = len(reward)
    return [sum(gamma ** (u - t) * reward[u] for u in range(t, T)) for t in range(T)]


def returns_undiscounted(reward, gamma):
    return np.cumsum(reward[::-1])[::-1]


def returns_from_the_start(reward, gamma):
    T = len(reward)
    return [sum(gamma**u * reward[u] for u in range(t, T)) for t in range(T)]


def returns_of_the_past(reward, gamma):
    total, found = 0.0, []
    for r in reward:
        total = r + gamma * total
        found.append(total)
    return found


def returns_without_own_reward(reward, gamma):
    return [*returns(reward, gamma)[1:], 0.0]


def td_errors(reward, value, final_value, terminated, gamma):
    ahead = value[1:] + [0.0 if terminated else final_value]
    return torch.tensor(reward) + gamma * torch.tensor(ahead) - torch.tensor(value)


def td_always_bootstraps(reward, value, final_value, terminated, gamma):
    return td_errors(reward, value, final_value, False, gamma)


def td_never_bootstraps(reward, value, final_value, terminated, gamma):
    return td_errors(reward, value, final_value, True, gamma)


def td_own_state(reward, value, final_value, terminated, gamma):
    return td_errors(reward, value, value[-1], terminated, gamma)


def td_no_gamma(reward, value, final_value, terminated, gamma):
    return td_errors(reward, value, final_value, terminated, 1)


def td_turned_round(**case):
    return -td_errors(**case)


def advantages(reward, value, gamma, lam):
    total, found = 0.0, []
    for t in reversed(range(len(reward))):
        after = value[t + 1] if t + 1 < len(value) else 0.0
        total = reward[t] + gamma * after - value[t] + gamma * lam * total
        found.insert(0, total)
    return found


def advantages_fading(reward, value, gamma, fade):
    deltas = td_errors(reward, value, 0.0, True, gamma).tolist()
    T = len(deltas)
    return [sum(fade ** (u - t) * deltas[u] for u in range(t, T)) for t in range(T)]


# ------------------------------------------------------------------- 03: options and segments


def segments(switch):
    starts = [0] + [t for t in range(1, len(switch)) if switch[t]]
    return [(a, b - a) for a, b in zip(starts, starts[1:] + [len(switch)], strict=True)]


def segments_trusting_turn_0(switch):
    starts = [t for t in range(len(switch)) if switch[t]]
    return [(a, b - a) for a, b in zip(starts, (starts + [len(switch)])[1:], strict=True)]


def segment_rewards(reward, boundary, gamma):
    found = []
    for r, opens in zip(reward, boundary, strict=True):
        if opens:
            found.append(0.0)
            fade = 1.0
        found[-1] += fade * r
        fade *= gamma
    return found


def segment_rewards_to_the_end(reward, boundary, gamma):
    return [g for g, opens in zip(returns(reward, gamma), boundary, strict=True) if opens]


def segment_rewards_episode_discount(reward, boundary, gamma):
    found = []
    for t, (r, opens) in enumerate(zip(reward, boundary, strict=True)):
        if opens:
            found.append(0.0)
        found[-1] += gamma**t * r
    return found


def high_errors(reward, boundary, v_high, gamma, power=True, next_turn=False, after_end=0.0):
    found = []
    for (t, d), inside in zip(
        segments(boundary), segment_rewards(reward, boundary, gamma), strict=True
    ):
        at = t + 1 if next_turn else t + d
        after = v_high[at] if at < len(v_high) else after_end and v_high[-1]
        found.append(inside + (gamma**d if power else gamma) * after - v_high[t])
    return found


# ------------------------------------------------------------------------------ 04: HAE by hand


def low(reward, boundary, v_high, v_low, gamma, lam_low, across="high", cut="end"):
    T, total, found = len(reward), 0.0, []
    for t in reversed(range(T)):
        end = t + 1 == T or boundary[t + 1]
        after = 0.0 if t + 1 == T else (v_high if end and across == "high" else v_low)[t + 1]
        stop = {"end": end, "start": boundary[t], "never": False}[cut]
        total = reward[t] + gamma * after - v_low[t] + (0 if stop else gamma * lam_low * total)
        found.insert(0, total)
    return found


def high(reward, boundary, v_high, gamma, lam_high, fade=lambda gamma, lam, d: gamma**d * lam):
    errors = high_errors(reward, boundary, v_high, gamma)
    total, found = 0.0, [0.0] * len(reward)
    for (t, d), error in reversed(list(zip(segments(boundary), errors, strict=True))):
        total = error + fade(gamma, lam_high, d) * total
        found[t] = total
    return found


def high_flat(reward, boundary, v_high, gamma, lam_high):
    return np.array(advantages(reward, v_high, gamma, lam_high)) * boundary


def switched(switch, beta, v_high, v_low_prev, weight=lambda q, b: q - b, first=0.0):
    found = [
        weight(float(q), b) * (h - v)
        for q, b, h, v in zip(switch, beta, v_high, v_low_prev, strict=True)
    ]
    return found if first is None else [first] + found[1:]


def arrivals(boundary, v_high, high, lam_boundary, weight=1.0):
    W = [weight * v + lam_boundary * a for v, a in zip(v_high, high, strict=True)]
    return [W[t + 1] if boundary[t + 1] else 0.0 for t in range(len(W) - 1)] + [0.0]


# -------------------------------------------------------------------------- 05: HAE as two scans


def scan(b, c):
    y, found = 0.0, []
    for t in range(len(b) - 1, -1, -1):
        y = b[t] + c[t] * y
        found.append(y)
    return found[::-1]


def scan_forwards(b, c):
    y, found = 0.0, []
    for b_t, c_t in zip(b, c, strict=True):
        y = b_t + c_t * y
        found.append(y)
    return found


def scan_reads_c_of_the_next(b, c):
    return scan(b, c[1:] + [0.0])


def coefficients(reward, boundary, v_high, v_low, gamma, lam_low, across="high", cut="end"):
    b = low(reward, boundary, v_high, v_low, gamma, 0.0, across)
    T = len(b)
    stops = {"end": lambda t: t + 1 < T and boundary[t + 1], "start": lambda t: boundary[t],
             "never": lambda t: False}[cut]  # fmt: skip
    return b, [0.0 if stops(t) else gamma * lam_low for t in range(T)]


def coefficients_without_lambda(**case):
    b, _ = coefficients(**case)
    return b, coefficients(**case | {"lam_low": 1.0})[1]


def doubling(y, c, step):
    T = len(y)
    new_y = [y[t] + (c[t] * y[t + step] if t + step < T else 0) for t in range(T)]
    return new_y, [c[t] * c[t + step] if t + step < T else 0.0 for t in range(T)]


def doubling_in_place(y, c, step):
    _, new_c = doubling(y, c, step)
    for t in range(len(y) - step - 1, -1, -1):
        y[t] += c[t] * y[t + step]
    return y, new_c


def doubling_keeps_the_edge(y, c, step):
    new_y, new_c = doubling(y, c, step)
    return new_y, new_c[: len(c) - step] + c[len(c) - step :]


# ------------------------------------------------------------------------ 06: bias and variance


def moments(outcomes, probability, critic, lam, power=2, centre=True):
    G, p = np.array(outcomes), np.array(probability)
    variance = p @ (G - centre * (p @ G)) ** 2
    return p @ ((1 - lam) * critic + lam * G - G), lam**power * variance


def total_variance(probability, mean, variance, centre=True):
    p, m = np.array(probability), np.array(mean)
    return p @ np.array(variance), p @ (m - centre * (p @ m)) ** 2


def switch_gradient(beta, v_high, v_low):
    outcomes = [(beta, 1 - beta), (1 - beta, -beta)]  # (probability, q - beta)
    return sum(p * score * score * (v_high - v_low) for p, score in outcomes)


# -------------------------------------------------------------------------- 07: tokens and loss


def tokens(roles, chosen, switch, high, low, injected=0.0, form=None):
    levels = {"switch": switch, "subgoal": high, "action": low}
    levels["format"] = low if form is None else form
    return [levels[r] if c else injected * levels[r] for r, c in zip(roles, chosen, strict=True)]


def loss(ratio, advantage, clip):
    clipped = np.clip(ratio, 1 - clip, 1 + clip)
    return max(-ratio * advantage, -clipped * advantage)


def logprob(logits, allowed, chosen):
    logits = torch.tensor(logits).masked_fill(~torch.tensor(allowed), -math.inf)
    return logits.log_softmax(-1)[chosen]


def logprob_zeroed(logits, allowed, chosen):
    return (torch.tensor(logits) * torch.tensor(allowed)).log_softmax(-1)[chosen]


EXERCISES = {
    "returns": (returns, [
        (returns_undiscounted, "without a discount"),
        (returns_from_the_start, "from the start of the episode"),
        (returns_of_the_past, "the past"),
        (returns_without_own_reward, "leave out the turn's own reward"),
    ]),
    "td_errors": (td_errors, [
        (td_always_bootstraps, "although the episode terminated"),
        (td_never_bootstraps, "truncated episode as a terminated one"),
        (td_own_state, "its own last state"),
        (td_no_gamma, "gamma is missing"),
        (td_turned_round, "sign"),
    ]),
    "advantages": (advantages, [
        (lambda reward, value, gamma, lam: advantages(reward, value, gamma, 0), "TD error alone"),
        (lambda reward, value, gamma, lam: advantages_fading(reward, value, gamma, lam),
         "lam alone"),
        (lambda reward, value, gamma, lam: advantages_fading(reward, value, gamma, gamma),
         "gamma alone"),
        (lambda reward, value, gamma, lam: np.add(advantages(reward, value, gamma, lam), value),
         "target"),
    ]),
    "segments": (segments, [
        (segments_trusting_turn_0, "whatever it says"),
        (lambda switch: segments(switch)[:-1], "last segment is missing"),
        (lambda switch: [(t, t + d - 1) for t, d in segments(switch)], "last turn"),
        (lambda switch: [(t, d - 1) for t, d in segments(switch)], "one too short"),
    ]),
    "segment_rewards": (segment_rewards, [
        (lambda reward, boundary, gamma: segment_rewards(reward, boundary, 1), "no discount"),
        (segment_rewards_to_the_end, "beyond the boundary"),
        (segment_rewards_episode_discount, "from the start of the episode"),
    ]),
    "high_td_errors": (high_errors, [
        (lambda **case: high_errors(**case, power=False), "gamma ** d"),
        (lambda **case: high_errors(**case, next_turn=True), "from the next turn"),
        (lambda **case: high_errors(**case, after_end=1.0), "episode terminated"),
    ]),
    "low_advantages": (low, [
        (lambda **case: low(**case, across="low", cut="never"), "flat GAE"),
        (lambda **case: low(**case, cut="never"), "leaks"),
        (lambda **case: low(**case, across="low"), "not V_low"),
        (lambda **case: low(**case, cut="start"), "after its last turn"),
    ]),
    "high_advantages": (high, [
        (lambda **case: high(**case, fade=lambda g, lam, d: (g * lam) ** d), "once per segment"),
        (lambda **case: high(**case, fade=lambda g, lam, d: g * lam), "d turns away"),
        (high_flat, "flat GAE"),
        (lambda **case: high(**case, fade=lambda g, lam, d: 0.0), "TD error"),
    ]),
    "switch_advantages": (switched, [
        (lambda **case: switched(**case, weight=lambda q, b: 1), "both outcomes"),
        (lambda **case: switched(**case, weight=lambda q, b: q), "KEEP gets no credit"),
        (lambda **case: switched(**case, weight=lambda q, b: b - q), "turned round"),
        (lambda **case: switched(**case, first=None), "turn 0"),
    ]),
    "arrivals": (arrivals, [
        (lambda **case: arrivals(**case, weight=1 - case["lam_boundary"]), "mixes V_high away"),
        (lambda **case: arrivals(**case | {"lam_boundary": 0}), "V_high alone"),
        (lambda **case: arrivals(**case | {"lam_boundary": 1}), "its value 1"),
    ]),
    "scan": (scan, [
        (scan_forwards, "forwards"),
        (scan_reads_c_of_the_next, "of the next turn"),
        (lambda b, c: scan([x * y for x, y in zip(b, c, strict=True)], c), "multiply b"),
    ]),
    "low_coefficients": (coefficients, [
        (lambda **case: coefficients(**case, cut="start"), "one turn too late"),
        (lambda **case: coefficients(**case, cut="never"), "never 0"),
        (coefficients_without_lambda, "λ_low is missing"),
        (lambda **case: coefficients(**case, across="low"), "V_low across"),
    ]),
    "doubling_pass": (doubling, [
        (lambda y, c, step: (doubling(y, c, step)[0], c), "updated too"),
        (doubling_in_place, "new y"),
        (lambda y, c, step: doubling(y, c, 1), "one turn ahead"),
        (doubling_keeps_the_edge, "c becomes 0"),
    ]),
    "bias_and_variance": (moments, [
        (lambda **case: moments(**case, power=1), "SQUARED"),
        (lambda **case: np.array([-1, 1]) * moments(**case), "sign of the bias"),
        (lambda **case: moments(
            **case | {"probability": np.full(len(case["outcomes"]), 1 / len(case["outcomes"]))}),
         "not equally likely"),
        (lambda **case: moments(**case | {"lam": 1 - case["lam"]}), "exchanged"),
        (lambda **case: moments(**case, centre=False), "second moment"),
    ]),
    "total_variance": (total_variance, [
        (lambda **case: total_variance(**case)[::-1], "exchanged"),
        (lambda **case: total_variance(**case, centre=False), "overall mean"),
        (lambda probability, mean, variance: (np.mean(variance), np.var(mean)),
         "not equally likely"),
    ]),
    "switch_gradient": (switch_gradient, [
        (lambda **case: -switch_gradient(**case), "wrong sign"),
        (lambda beta, v_high, v_low: 0.0, "mean of the advantage"),
        (lambda beta, v_high, v_low: beta * (1 - beta) ** 2 * (v_high - v_low), "SWITCH alone"),
    ]),
    "token_advantages": (tokens, [
        (lambda **case: tokens(**case, injected=1.0), "injected"),
        (lambda **case: tokens(**case | {"switch": case["low"], "high": case["low"]}), "flat PPO"),
        (lambda **case: tokens(**case | {"switch": case["high"], "high": case["switch"]}),
         "the subgoal's"),
        (lambda **case: tokens(**case, form=0.0), "FORMAT"),
    ]),
    "clipped_loss": (loss, [
        (lambda **case: -loss(**case), "its negative"),
        (lambda ratio, advantage, clip: min(
            -ratio * advantage, -np.clip(ratio, 1 - clip, 1 + clip) * advantage), "optimistic"),
        (lambda ratio, advantage, clip: -np.clip(ratio, 1 - clip, 1 + clip) * advantage,
         "always clip"),
        (lambda ratio, advantage, clip: -ratio * advantage, "nothing is clipped"),
    ]),
    "allowed_logprob": (logprob, [
        (lambda logits, allowed, chosen: torch.tensor(logits).log_softmax(-1)[chosen],
         "whole vocabulary"),
        (logprob_zeroed, "minus infinity"),
        (lambda **case: logprob(**case).exp(), "logarithm"),
    ]),
}  # fmt: skip
WRONG = [(name, i) for name, (_, wrongs) in EXERCISES.items() for i in range(len(wrongs))]


def test_every_check_is_tested_with_a_right_and_at_least_three_wrong_answers():
    public = {
        name for name, x in vars(checks).items()
        if getattr(x, "__module__", "") == "checks" and callable(x) and name[0] != "_"
    } - {"Wrong"}  # fmt: skip
    assert set(EXERCISES) == public
    assert all(len(wrongs) >= 3 for _, wrongs in EXERCISES.values())


@pytest.mark.parametrize("name", EXERCISES)
def test_a_right_answer_passes(name, capsys):
    getattr(checks, name)(EXERCISES[name][0])
    assert ": right, on all " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "i"), WRONG)
def test_a_typical_wrong_answer_is_refused_and_named(name, i):
    wrong, message = EXERCISES[name][1][i]
    with pytest.raises(checks.Wrong) as refused:
        getattr(checks, name)(wrong)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda reward, gamma: None, "is there a `return`?"),
        (lambda reward, gamma: "0.3", "returned str"),
        (lambda reward, gamma: [1.0], "returned 1 numbers, expected 6"),
        (lambda reward, gamma: [*returns(reward, gamma)[:-1], 7.0],
         "number 5 is 7.0000, expected 1.0000, for reward=[0.0, 0.0, 0.2"),
        (lambda reward, gamma: [math.nan] * len(reward), "number 0 is nan"),
    ],
)  # fmt: skip
def test_an_untypical_wrong_answer_is_shown_where_it_differs(answer, message):
    with pytest.raises(checks.Wrong) as refused:
        checks.returns(answer)
    assert message in str(refused.value)
    assert refused.value._render_traceback_() == [f"✗ {refused.value}"]


def test_an_exercise_that_is_not_written_is_no_error(capsys):
    def stub(reward, gamma):
        raise NotImplementedError

    checks.returns(stub)
    assert capsys.readouterr().out == "Exercise 2.1: not written yet.\n"


def test_a_function_that_spoils_its_arguments_is_judged_by_what_it_returns(capsys):
    def greedy(reward, gamma):
        found = []
        while reward:
            found.append(returns(reward, gamma)[0])
            reward.pop(0)
        return found

    checks.returns(greedy)
    assert "right" in capsys.readouterr().out
