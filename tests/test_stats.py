"""Statistics of few runs: numbers by hand, exact enumeration, slow loops, and coverage."""

import ast
import inspect
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiper_lab import stats

numbers = st.lists(st.floats(-10, 10), min_size=1, max_size=12)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_iqm_by_hand():
    assert stats.iqm([3, 1, 2]) == 2  # fewer than four: the mean
    assert stats.iqm([9, 1, 2, 4]) == 3  # without 1 and 9
    assert stats.iqm(np.arange(10)) == 4.5  # 2 to 7
    scores = np.array([[0.1, 0.9], [0.2, 0.4], [0.3, 0.8], [0.0, 0.5]])
    assert stats.iqm(scores) == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)


@given(numbers)
def test_iqm_ignores_order_and_outliers_and_follows_shifts(scores):
    middle = stats.iqm(scores)
    assert min(scores) - 1e-9 <= middle <= max(scores) + 1e-9
    assert stats.iqm(scores[::-1]) == middle
    assert stats.iqm(np.array(scores) + 5) == pytest.approx(middle + 5)
    if len(scores) >= 4:
        spoilt = sorted(scores)
        spoilt[-1] = 1e6
        assert stats.iqm(spoilt) == pytest.approx(middle)


def test_bootstrap_agrees_with_all_resamples_written_out():
    a, b = [0.1, 0.4, 0.9], [0.3, 0.2]
    exact = [
        stats.probability_of_improvement(x, y)
        for x in itertools.product(a, repeat=3)
        for y in itertools.product(b, repeat=2)
    ]  # 27 × 4, all equally likely
    expected = np.quantile(exact, [0.025, 0.975])
    found = stats.bootstrap(stats.probability_of_improvement, a, b, rng=rng(), samples=8000)
    assert found.estimate == pytest.approx(4 / 6)  # 0.4 and 0.9 beat both, 0.1 neither
    assert [found.low, found.high] == pytest.approx(expected, abs=0.02)


def test_bootstrap_resamples_each_stratum_on_its_own_and_keeps_rows_whole():
    table = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    seen = []

    def watch(rows, other):
        assert rows.shape == (3, 2) and other.shape == (4,)
        assert np.array_equal(rows[:, 1], 10 * rows[:, 0])  # a run keeps its scores
        seen.append((tuple(rows[:, 0]), tuple(other)))
        return rows.sum()

    stats.bootstrap(watch, table, [5.0, 6.0, 7.0, 8.0], rng=rng(), samples=400)
    rows, other = zip(*seen[:-1], strict=True)  # the last call is the estimate itself
    assert len(set(rows)) == 27 and len(set(other)) > 150  # of 27 and 256
    assert len(set(seen)) > 380  # drawn independently
    assert seen[-1] == ((1.0, 2.0, 3.0), (5.0, 6.0, 7.0, 8.0))


def test_bootstrap_repeats_with_its_generator_and_nothing_else():
    scores = rng(1).normal(size=(5, 3))
    first = stats.bootstrap(stats.iqm, scores, rng=rng(2))
    np.random.seed(1)
    assert stats.bootstrap(stats.iqm, scores, rng=rng(2)) == first
    assert stats.bootstrap(stats.iqm, scores, rng=rng(3)) != first
    assert first.low <= first.estimate == stats.iqm(scores) <= first.high


@given(numbers, numbers)
def test_probability_of_improvement_is_the_share_of_won_pairs(a, b):
    won = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
    found = stats.probability_of_improvement(a, b)
    assert found == pytest.approx(won / len(a) / len(b))
    assert found + stats.probability_of_improvement(b, a) == pytest.approx(1)
    assert stats.probability_of_improvement(a, a) == pytest.approx(0.5)


def test_probability_of_improvement_averages_over_tasks():
    a, b = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
    # task 0: always; task 1: a tie with one of three
    assert stats.probability_of_improvement(a, b) == pytest.approx((1 + 0.5 / 3) / 2)


def test_pairing_cancels_what_a_seed_does_to_both_arms():
    a, b = np.array([0.5, 0.7, 0.6]), np.array([0.4, 0.5, 0.5])
    luck = np.array([3.0, -2.0, 7.0])
    alone = stats.paired_difference(a, b)
    assert stats.paired_difference(a + luck, b + luck) == pytest.approx(alone)
    low, high = alone.low, alone.high
    assert stats.paired_difference(b, a) == pytest.approx((-alone.estimate, -high, -low))
    assert stats.paired_difference(a, a) == (0, 0, 0)


def test_student_quantiles_of_the_tables():
    known = {2: 12.706, 3: 4.303, 4: 3.182, 6: 2.571, 11: 2.228, 12: 2.201, 21: 2.086, 31: 2.042}
    assert {n: round(stats.student(n), 3) for n in known} == known
    assert stats.student(10**6) == pytest.approx(1.96, abs=1e-4)


@pytest.mark.parametrize(("runs", "bootstrap"), [(3, 0.75), (10, 0.90)])
def test_how_often_an_interval_holds_the_truth(runs, bootstrap):
    """What the docstrings say of few runs: Student keeps its promise, the bootstrap does not."""
    draws, trials, random = [], 400, rng(4)
    for _ in range(trials):
        scores = random.normal(loc=1.0, size=runs)
        resampled = stats.bootstrap(np.mean, scores, rng=random, samples=100)
        student = stats.paired_difference(scores, np.zeros(runs))
        draws.append([i.low <= 1 <= i.high for i in (resampled, student)])
    found = np.mean(draws, axis=0)
    assert found == pytest.approx([bootstrap, 0.95], abs=0.05)  # over 2 standard errors


def test_area_under_a_curve():
    assert stats.area_under_curve([0, 10], [0.2, 0.6]) == pytest.approx(0.4)
    assert stats.area_under_curve([0, 1, 10], [0, 1, 1]) == pytest.approx(9.5 / 10)
    x = np.arange(7.0)
    assert stats.area_under_curve(x, 0.1 * x) == pytest.approx(0.3)
    y = rng(5).random(7)
    assert stats.area_under_curve(64 * x, y) == pytest.approx(stats.area_under_curve(x, y))
    early, late = stats.area_under_curve([0, 1, 2], [0, 1, 1]), [0, 0, 1]
    assert early > stats.area_under_curve([0, 1, 2], late)


def test_episodes_to_threshold():
    x, y = [10, 20, 30, 40, 50], [0.1, 0.5, 0.1, 0.5, 0.6]
    assert stats.episodes_to_threshold(x, y, 0.5) == 20
    assert stats.episodes_to_threshold(x, y, 0.5, window=2) == 50  # 0.3, 0.3, 0.3, 0.55
    assert stats.episodes_to_threshold(x, y, 0.4, window=3) == 50
    assert stats.episodes_to_threshold(x, y, 0.7) == math.inf
    assert stats.episodes_to_threshold(x, y, 0.1, window=6) == math.inf
    assert stats.episodes_to_threshold([1, 2, 3], [0.1, 0.2, 0.3], 0.2, window=3) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.iqm([]), "expected finite numbers"),
        (lambda: stats.iqm([0.1, math.nan]), "nan.*expected finite"),
        (lambda: stats.iqm(0.5), "expected finite"),
        (lambda: stats.bootstrap(np.mean, rng=rng()), "0 strata"),
        (lambda: stats.bootstrap(np.mean, [1.0], rng=rng(), samples=0), "samples=0"),
        (lambda: stats.bootstrap(np.mean, [1.0], [], rng=rng()), "a stratum is"),
        (lambda: stats.probability_of_improvement([[1, 2]], [[1, 2, 3]]), "the same tasks"),
        (lambda: stats.paired_difference([1.0], [2.0]), "≥ 2 runs"),
        (lambda: stats.paired_difference([1.0, 2.0], [2.0, 3.0, 4.0]), "one score per seed"),
        (lambda: stats.area_under_curve([1], [1.0]), "1 point, expected at least two"),
        (lambda: stats.area_under_curve([2, 1], [1.0, 2.0]), "ascending"),
        (lambda: stats.episodes_to_threshold([1, 1], [0.1, 0.2], 0.5), "ascending"),
        (lambda: stats.episodes_to_threshold([1], [0.1], 0.5, window=0), "window is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_numpy_is_imported():
    nodes = list(ast.walk(ast.parse(inspect.getsource(stats))))
    names = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    assert {name.split(".")[0] for name in names} == {"math", "collections", "typing", "numpy"}


@pytest.mark.parametrize("n", [2, 5, 11, 12, 20, 40])
def test_students_quantile(n):
    """Against the distribution itself, integrated."""
    v, t = n - 1, stats.student(n)
    x = np.linspace(0, t, 200_001)
    density = (1 + x**2 / v) ** (-(v + 1) / 2)
    tail = np.linspace(0, 4000, 4_000_001)
    whole = np.trapezoid((1 + tail**2 / v) ** (-(v + 1) / 2), tail)
    assert np.trapezoid(density, x) / whole == pytest.approx(0.95, abs=4e-4)
