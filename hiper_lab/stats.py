"""How sure can we be from a few runs? Averages that one odd run cannot move, and their intervals.

A score is one number per run, say the final held-out success; scores of several tasks are an array
``[run, task]`` with a row per independent run (seed). Every random draw comes from a
``np.random.Generator`` of the caller. Formulas follow Agarwal et al. 2021 (arXiv:2108.13264) and
their library rliable, whose bootstrap ignores its seed.

Left out on purpose: p-values, data frames (see runs), anything but numpy.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

SAMPLES = 2000  # bootstrap resamples, as in rliable


class Interval(NamedTuple):
    """An estimate and the two ends of its 95% confidence interval, in the unit of the score."""

    estimate: float
    low: float
    high: float


def _finite(name: str, scores: ArrayLike, least: int = 1) -> np.ndarray:
    scores = np.asarray(scores, float)
    if scores.ndim == 0 or len(scores) < least or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"{name} is {scores.tolist()}, expected finite numbers of ≥ {least} runs")
    return scores


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean: the mean of the middle half, steadier than the mean, finer than a median.

        IQM = 1/(n − 2k) Σ x₍ᵢ₎  over i = k+1 … n−k,   k = ⌊n/4⌋

    over all n scores in ascending order, whatever the shape. With fewer than four scores nothing is
    cut and it is the mean.

    Raises:
        ValueError: If there is no score, or one is not finite.

    Example:
        >>> iqm([0, 1, 2, 3, 4, 5, 6, 100])     # (2 + 3 + 4 + 5) / 4
        3.5
    """
    ordered = np.sort(_finite("scores", scores), axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap(
    statistic: Callable[..., float],
    *strata: ArrayLike,
    rng: np.random.Generator,
    samples: int = SAMPLES,
) -> Interval:
    """95% interval of any statistic of runs, by the stratified percentile bootstrap.

        strata* = each stratum's runs, drawn with replacement;   interval = the 2.5% and 97.5%
        quantiles of statistic(strata*) over ``samples`` such draws

    What the strata are says what is independent. ``bootstrap(iqm, scores, rng=rng)`` resamples
    whole runs, for tasks played by one agent. ``bootstrap(lambda *t: iqm(t), *scores.T, rng=rng)``
    resamples the runs of each task on their own, for one training per task and run (rliable).
    ``bootstrap(probability_of_improvement, a, b, rng=rng)`` has two arms.

    With few runs it is too narrow: of normal scores a nominal 95% covers the mean in about 75% of
    cases with three runs, 83% with five, 90% with ten. See `paired_difference`.

    Args:
        statistic: Takes as many arrays as there are strata and gives a number.
        strata: Arrays whose first axis is the run.
        rng: Where the draws come from; the same state gives the same interval.
        samples: Number of draws, at least 1.

    Raises:
        ValueError: If a stratum has no run or a number that is not finite.

    Example:
        Two runs: a resample is (0, 0), (0, 1), (1, 0) or (1, 1).

        >>> bootstrap(np.mean, [0.0, 1.0], rng=np.random.default_rng(0))
        Interval(estimate=0.5, low=0.0, high=1.0)
    """
    if not strata or samples < 1:
        raise ValueError(f"got {len(strata)} strata and samples={samples}, expected one of each")
    arrays = [_finite("a stratum", stratum) for stratum in strata]
    drawn = [
        statistic(*(a[rng.integers(len(a), size=len(a))] for a in arrays)) for _ in range(samples)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(statistic(*arrays)), float(low), float(high))


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """How likely a run of arm a scores higher than a run of arm b.

        P(X > Y) = 1/T Σ_t 1/(N M) Σᵢⱼ S(a_it, b_jt),   S = 1 if a > b, ½ if a = b, else 0

    Above ½ a is better more often than not, by however little; it says nothing about how much.

    Args:
        a, b: ``[run]`` or ``[run, task]``; the number of runs may differ.

    Raises:
        ValueError: If the tasks differ in number, or a number is not finite.

    Example:
        >>> probability_of_improvement([0.6, 0.5], [0.5, 0.4])     # (1 + 1 + ½ + 1) / 4
        0.875
    """
    a, b = _finite("a", a), _finite("b", b)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"a has shape {a.shape}, b {b.shape}: expected the same tasks")
    above = (a[:, None] > b) + 0.5 * (a[:, None] == b)
    return float(above.mean())


def paired_difference(a: ArrayLike, b: ArrayLike) -> Interval:
    """Mean difference of two arms whose runs are paired, with Student's interval.

        d̄ ± t s/√n,   dᵢ = aᵢ − bᵢ,  s their standard deviation, t the 97.5% quantile, n − 1 d.f.

    Runs of one seed share what the seed decides (games, first weights), and the difference cancels
    it. Its coverage is right for a handful of runs where the bootstrap's is not, if the differences
    are roughly normal.

    Args:
        a, b: ``[run]``, in the same order of seeds.

    Raises:
        ValueError: If lengths differ, there are fewer than two pairs, or a number is not finite.

    Example:
        >>> d = paired_difference([0.5, 0.7, 0.6], [0.4, 0.5, 0.5])   # .1, .2, .1: s = 0.0577
        >>> f"{d.estimate:.3f} {d.low:.3f} {d.high:.3f}"              # ± 4.303 · 0.0577 / √3
        '0.133 -0.010 0.277'
    """
    a, b = _finite("a", a, 2), _finite("b", b, 2)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape}, b {b.shape}: expected one score per seed")
    difference = a - b
    mean = float(difference.mean())
    half = student(len(a)) * float(difference.std(ddof=1)) / math.sqrt(len(a))
    return Interval(mean, mean - half, mean + half)


def student(n: int) -> float:
    """The 97.5% quantile of Student's t for n ≥ 2 runs, that is n − 1 degrees of freedom.

    >>> [round(student(n), 3) for n in (2, 11, 12, 31)]
    [12.706, 2.228, 2.201, 2.042]
    """
    exact = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    if n - 2 < len(exact):
        return exact[n - 2]
    z, v = 1.959964, n - 1  # Abramowitz & Stegun 26.7.5
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def _curve(x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = _finite("x", x), _finite("y", y)
    if x.ndim != 1 or x.shape != y.shape or (np.diff(x) <= 0).any():
        raise ValueError(f"x is {x.tolist()} for {y.shape} values, expected as many, ascending")
    return x, y


def area_under_curve(x: ArrayLike, y: ArrayLike) -> float:
    """A learning curve's mean height, which rewards learning early: trapezoids over the width.

        AUC = 1/(x_n − x_1) Σᵢ (xᵢ₊₁ − xᵢ)(yᵢ + yᵢ₊₁)/2

    in the unit of y, so that curves of different lengths compare.

    Raises:
        ValueError: If there are fewer than two points, x does not ascend, or a number is not
            finite.

    Example:
        >>> area_under_curve([0, 1, 3], [0.0, 0.4, 0.4])     # (0.2 + 0.8) / 3
        0.3333333333333333
    """
    x, y = _curve(x, y)
    if len(x) < 2:
        raise ValueError(f"the curve has {len(x)} point, expected at least two")
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def episodes_to_threshold(
    episodes: ArrayLike, success: ArrayLike, threshold: float, window: int = 1
) -> float:
    """Episodes until success first reaches a threshold: how much experience learning takes.

    Args:
        episodes: Episodes played so far at each point, ascending.
        success: Success rate at each point.
        threshold: In the unit of success.
        window: A noisy curve touches any threshold early by luck; it has to hold as the mean of the
            last ``window`` points.

    Returns:
        Episodes at the first such point; ``inf`` if there is none.

    Raises:
        ValueError: If episodes do not ascend, a number is not finite, or window is below 1.

    Example:
        >>> episodes_to_threshold([64, 128, 192, 256], [0.2, 0.6, 0.4, 0.6], 0.5, window=2)
        192.0
        >>> episodes_to_threshold([64, 128], [0.2, 0.3], 0.5)
        inf
    """
    episodes, success = _curve(episodes, success)
    if window < 1:
        raise ValueError(f"window is {window}, expected at least 1")
    if len(success) < window:
        return math.inf
    means = np.lib.stride_tricks.sliding_window_view(success, window).mean(axis=1)
    reached = np.flatnonzero(means >= threshold - 1e-12)  # a mean of floats may miss it by a hair
    return float(episodes[reached[0] + window - 1]) if len(reached) else math.inf
