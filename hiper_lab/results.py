"""What came of many runs: a table of them, and which arm is better, with how much certainty.

An arm is a configuration; its runs differ in the seed alone and share a folder name up to
``-seed<k>``. Only the files of the runs are read, so that neither a model nor a GPU is needed.

Left out on purpose: starting runs (see runs), pictures.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hiper_lab import stats
from hiper_lab.records import read_metrics, read_parameters

ERROR = "error.txt"  # in the folder of a run that failed in a sweep: why
SEED = re.compile(r"[-_]seed\d+$")  # what a run's name has beyond its arm's


def results(folder: Path | str) -> pd.DataFrame:
    """All runs below a folder, one row each: what it was, how far it got, how well it did.

    Returns:
        ``run`` (its folder, below this one), ``arm`` (the same without ``-seed<k>``), ``seed``, the
        parameters in which the runs differ, ``state`` (finished, unfinished or failed),
        ``iteration`` (the last one), ``before`` and ``success`` (held-out, before training and at
        the end; NaN until it is finished), ``low`` and ``high`` (its 95% interval over games),
        ``auc`` (mean success of the training episodes, `stats.area_under_curve`), ``minutes``,
        ``error`` (the last line of what went wrong).

    Raises:
        ValueError: If there is no run.
    """
    folder = Path(folder)
    found = sorted(path.parent for path in folder.rglob("config.json"))
    if not found:
        raise ValueError(f"no run below {str(folder)!r}: expected folders with a config.json")
    rows, parameters = [], []
    for path in found:
        flat = read_parameters(path)
        parameters.append(flat)
        name = str(path.relative_to(folder)) if path != folder else path.resolve().name
        rows.append({"run": name, "arm": SEED.sub("", name)} | _outcome(path, flat))
    names = dict.fromkeys(name for each in parameters for name in each)
    values = {name: [each.get(name) for each in parameters] for name in names}
    differ = [n for n, v in values.items() if n != "seed" and any(x != v[0] for x in v)]
    frame = pd.DataFrame(rows)
    frame = frame.assign(**{name: values[name] for name in ["seed", *differ]})
    first = ["run", "arm", "seed", *differ]
    return frame[first + [column for column in frame if column not in first]]


def _outcome(path: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """How far a run got, and what its metrics say."""
    metrics = read_metrics(path).reindex(
        columns=["iteration", "eval/success", "eval/success_low", "eval/success_high",
                 "rollout/success", "time/total_s"]
    ).astype(float)  # fmt: skip
    error = path / ERROR
    state, at, seconds = "unfinished", metrics["iteration"].max(), metrics["time/total_s"].max()
    if len(metrics):
        limit = parameters.get("max_minutes", 0) * 60
        over = at >= parameters.get("iterations", math.inf) or 0 < limit <= seconds
        evaluated = not parameters.get("eval_games", 0) or not math.isnan(
            metrics["eval/success"].iloc[-1]
        )
        state = "finished" if over and evaluated else "unfinished"
    failed = error.read_text().strip() if error.exists() else ""
    last = metrics.iloc[-1] if state == "finished" else metrics.iloc[:0].max()
    curve = metrics.dropna(subset=["rollout/success"])
    auc = [curve["iteration"], curve["rollout/success"]]
    return {
        "state": "failed" if failed else state, "iteration": int(at) if len(metrics) else 0,
        "before": metrics["eval/success"].get(0, math.nan), "success": last["eval/success"],
        "low": last["eval/success_low"], "high": last["eval/success_high"],
        "auc": stats.area_under_curve(*auc) if len(curve) > 1 else math.nan,
        "minutes": seconds / 60, "error": failed.splitlines()[-1] if failed else "",
    }  # fmt: skip


def curves(folder: Path | str, runs: pd.DataFrame) -> pd.DataFrame:
    """Metrics of these runs at every iteration, as `hiper_lab.figures.learning_curves` takes them.

    Args:
        folder: The one that `results` was asked for.
        runs: Its answer, or some rows of it.

    Returns:
        The columns of ``metrics.jsonl``, with ``run`` (the arm: what is compared) and ``seed``.
    """
    names = zip(runs["run"], runs["arm"], runs["seed"], strict=True)
    return pd.concat(
        [
            read_metrics(run_folder(folder, run)).assign(run=arm, seed=seed)
            for run, arm, seed in names
        ],
        ignore_index=True,
    )


def run_folder(folder: Path | str, run: str) -> Path:
    """Where a run of `results` is; the folder itself if it is the only run there."""
    return Path(folder) / run if (Path(folder) / run).is_dir() else Path(folder)


def published(path: Path | str, runs: list[str]) -> pd.DataFrame:
    """Published learning curves, in the columns of `curves`; ``run`` says that they are.

    Args:
        path: A CSV with a row per ``run`` and ``step`` (our iteration), ``val_success_rate`` and
            ``episode_success_rate``, as ``experiments/upstream_curves.csv``.
        runs: Those wanted.

    Raises:
        ValueError: If one of them is not there.
    """
    table = pd.read_csv(path)
    if odd := sorted(set(runs) - set(table["run"])):
        raise ValueError(f"{path} has no run {odd}, expected some of {sorted(set(table['run']))}")
    names = {"step": "iteration", "val_success_rate": "eval/success"}
    table = table.rename(columns=names | {"episode_success_rate": "rollout/success"})
    table = table[table["run"].isin(runs)]
    return table.assign(run="published: " + table["run"], seed=0)


def compare(
    runs: pd.DataFrame, baseline: str, rng: np.random.Generator, score: str = "success"
) -> pd.DataFrame:
    """Which arm is better, and how sure are we: a row per arm, each against one of them.

    Args:
        runs: As `results` gives them: ``arm``, ``seed`` and the score. Runs without a score (NaN:
            not finished) are left out.
        baseline: The arm to compare with.
        rng: For the bootstrap.
        score: The column compared: ``success`` or ``auc``.

    Returns:
        ``arm``; ``seeds``; ``iqm`` with its bootstrap interval ``low``, ``high``; ``pairs`` (seeds
        that the arm and the baseline share); ``difference`` (arm − baseline over them) with
        Student's interval ``difference_low``, ``difference_high``; ``improvement`` (probability
        that a run of the arm beats one of the baseline) with its bootstrap interval. NaN where
        there is nothing to say: of the baseline itself, and with fewer than two seeds or pairs.

    Raises:
        ValueError: If the baseline is not among the arms, or an arm has a seed twice.

    Example:
        >>> rows = [("hae", 0, 0.6), ("hae", 1, 0.7), ("gae", 0, 0.5), ("gae", 1, 0.5)]
        >>> runs = pd.DataFrame(rows, columns=["arm", "seed", "success"])
        >>> table = compare(runs, "gae", np.random.default_rng(0)).set_index("arm")
        >>> table.loc["hae", ["seeds", "iqm", "difference", "improvement"]].round(3).tolist()
        [2.0, 0.65, 0.15, 1.0]
    """
    arms = list(dict.fromkeys(runs["arm"]))
    if baseline not in arms:
        raise ValueError(f"baseline is {baseline!r}, expected one of {arms}")
    if (twice := runs.duplicated(["arm", "seed"])).any():
        raise ValueError(f"{runs[twice]['run'].tolist()} have the seed of another run of their arm")
    scores = runs.pivot(index="seed", columns="arm", values=score).astype(float)
    rows, base = [], scores[baseline].dropna()
    for arm in arms:
        own, nothing = scores[arm].dropna(), stats.Interval(math.nan, math.nan, math.nan)
        pairs = scores[[arm, baseline]].dropna().T.to_numpy()
        several = min(len(own), len(base)) > 1 and arm != baseline
        middle = nothing._replace(estimate=stats.iqm(own)) if len(own) else nothing
        if len(own) > 1:
            middle = stats.bootstrap(stats.iqm, own, rng=rng)
        paired = pairs.shape[1] > 1 and arm != baseline
        difference = stats.paired_difference(*pairs) if paired else nothing
        above = stats.probability_of_improvement
        better = stats.bootstrap(above, own, base, rng=rng) if several else nothing
        rows.append({
            "arm": arm, "seeds": len(own), "iqm": middle.estimate, "low": middle.low,
            "high": middle.high, "pairs": pairs.shape[1], "difference": difference.estimate,
            "difference_low": difference.low, "difference_high": difference.high,
            "improvement": better.estimate, "improvement_low": better.low,
            "improvement_high": better.high,
        })  # fmt: skip
    return pd.DataFrame(rows)
