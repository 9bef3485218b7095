"""The report: refused before a kernel starts, executed on small recorded runs, one page."""

import gzip
import json
import re

import nbformat
import numpy as np
import papermill
import pytest
from recorded import make_run

from hiper_lab import results, runs, trajectory
from hiper_lab.config import TrainConfig
from hiper_lab.folder import RunFolder


@pytest.fixture(autouse=True)
def _from_the_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture
def folder(tmp_path):
    """Two arms of two seeds with rollouts, and one run that failed before its first iteration."""
    for arm, gain in (("flat", 0.0), ("deep", 0.1)):
        for seed in (0, 1):
            run = make_run(tmp_path / f"{arm}-seed{seed}", iterations=3, seed=seed)
            (run / "config.json").unlink()
            lam = {"flat": 0.0, "deep": 0.5}[arm]
            config = {"iterations": 3, "episodes": 6, "seed": seed, "lam_boundary": lam}
            RunFolder(run, TrainConfig.from_parameters(config))
            lines = (run / "metrics.jsonl").read_text().splitlines()
            last = json.loads(lines[-1])
            last |= {"eval/success": 0.5 + gain + 0.05 * seed, "eval/games": 50}
            last |= {"eval/success_low": 0.4, "eval/success_high": 0.7, "time/total_s": 60.0}
            (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    RunFolder(tmp_path / "broken-seed0", TrainConfig.from_parameters({"iterations": 3}))
    (tmp_path / "broken-seed0" / results.ERROR).write_text("Traceback\nOSError: no <space> left\n")
    return tmp_path


def test_papermill_shows_typed_and_described_parameters():
    declared = papermill.inspect_notebook(str(runs.REPORT))
    assert {"folder", "baseline", "score", "published", "html"} <= set(declared)
    for name, parameter in declared.items():
        assert parameter["help"] and parameter["inferred_type_name"] != "None", name


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"base_line": "flat"}, "declares no parameter .'base_line'."),
        ({"smooth": "3"}, "smooth is '3' .str., expected int"),
        ({"published_runs": "run_alfworld"}, "published_runs is .*expected list"),
        ({"baseline": "gae"}, "baseline is 'gae', expected one of .'broken', 'deep', 'flat'."),
    ],
)
def test_bad_parameters_are_refused_before_a_kernel_starts(
    folder, monkeypatch, parameters, message
):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ValueError, match=message):
        runs.report(folder, parameters)


def test_nothing_to_report(tmp_path, capsys):
    assert runs.main(["report", str(tmp_path)]) == 2
    RunFolder(tmp_path / "run", TrainConfig())
    assert runs.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "no run below" in said[0] and "has finished an iteration" in said[1]


@pytest.mark.slow
def test_a_report_is_one_page_that_opens_offline(folder, tmp_path):
    curves = tmp_path / "curves.csv"
    curves.write_text("run,step,val_success_rate,episode_success_rate\nthem,0,0.1,\nthem,3,,0.4\n")
    command = ["report", str(folder), "-p", "baseline", "flat", "-p", "published", str(curves)]
    assert runs.main([*command, "-p", "published_runs", "[them]"]) == 0
    executed = nbformat.read(folder / "21_report.ipynb", 4)
    printed = "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in executed.cells if cell.cell_type == "code" for output in cell.outputs
    )  # fmt: skip
    assert "5 runs of 3 arms; {'finished': 4, 'failed': 1}" in printed and "Warning" not in printed
    assert (folder / "21_report.ipynb").stat().st_size < 200_000

    page = (folder / "report.html").read_text()
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?!data:)', page)
    assert (
        "Plotly.newPlot" in page and "published: them" in page and "no &lt;space&gt; left" in page
    )
    table = results.compare(results.results(folder), "flat", np.random.default_rng(0))
    deep = table.set_index("arm").loc["deep"]
    assert deep["difference"] == pytest.approx(0.1)
    for number in (deep["iqm"], deep["difference"], deep["improvement"]):
        assert f'<td class="n">{number:.4f}</td>' in page
    assert "pick_and_place_simple" in page and "out of turns" in page


def test_what_is_kept_is_small_and_reads_the_same(folder, tmp_path_factory, capsys):
    into = tmp_path_factory.mktemp("kept")
    assert runs.main(["keep", str(folder), str(into)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    kept, whole = results.results(into), results.results(folder).query("state == 'finished'")
    assert kept[["run", "success", "auc"]].equals(
        whole[["run", "success", "auc"]].reset_index(drop=True)
    )
    (path,) = (into / "deep-seed0" / "rollouts").iterdir()
    before = list(trajectory.read(folder / "deep-seed0" / "rollouts" / path.name))
    after = list(trajectory.read(path))
    assert trajectory.trajectory_frame(after).equals(trajectory.trajectory_frame(before))
    same = ["subgoal", "action", "observation", "value_high", "advantage_low", "problems"]
    frames = trajectory.turn_frame(after), trajectory.turn_frame(before)
    assert frames[0][same].equals(frames[1][same])
    assert '"prompt_ids": []' in gzip.decompress(path.read_bytes()).decode()
    turns = [turn for episode in after for turn in episode.turns]
    assert not any(turn.response_ids or turn.admissible or turn.logprobs for turn in turns)
    with pytest.raises(ValueError, match="no run below .* is finished"):
        runs.keep(folder / "broken-seed0", into)
