"""Committed notebooks are small, taught in small cells, executed in order, portable, and listed.

nbval compares outputs; it passes a cell that was never executed, so what it cannot see is checked
here.
"""

import json
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("**/[0-9][0-9]_*.ipynb"))
CHECKED = re.compile(r"[01]\d_")  # 0x learn, 1x analyse: nbval compares them; 2x run
WITH_EXERCISES = re.compile(r"0[2-7]_")
LIMIT = 200_000
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|tmp|work|Users|mnt|opt|var|data)/[\w.-]+")
# What an output must not hold, because the next machine, version or day prints another.
CHANGING = {
    "a time stamp": re.compile(r"\b\d{4}-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b"),
    "a device": re.compile(r"\b(?:cuda|mps|cpu)(?::\d)?\b|nvidia", re.I),
    "a version": re.compile(r"\b\d+\.\d+\.\d+\b"),
    "an address": re.compile(r"\b0x[0-9a-f]{6,}\b"),
}
PLOT = "application/vnd.plotly.v1+json"


def problems(path: Path) -> list[str]:
    """What is wrong with a notebook, one line each; empty if it may be committed."""
    notebook = nbformat.read(path, as_version=4)
    checked, solution = bool(CHECKED.match(path.name)), path.parent.name == "solutions"
    found = []
    if path.stat().st_size > LIMIT:
        found.append(f"{path.stat().st_size} bytes, at most {LIMIT}")
    if "widgets" in notebook.metadata:
        found.append("holds widget state; save it without (store_widget_state=False)")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != (not solution):
        found.append(f"{len(tagged)} cells are tagged parameters, expected {int(not solution)}")
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in code):
        found.append("holds parameters injected by papermill")
    counts = [cell.execution_count for cell in code]
    unexecuted = counts == [None] * len(code) and not checked
    if counts != list(range(1, len(code) + 1)) and not unexecuted:
        found.append(f"execution counts are {counts}, expected 1 to {len(code)}: run it afresh")
    for number, cell in enumerate(notebook.cells, 1):
        if seen := MACHINE_PATH.search(json.dumps(cell)):
            found.append(f"cell {number} holds a path of one machine: {seen[0]}")
        if cell.cell_type == "code":
            found += [f"cell {number} {problem}" for problem in output_problems(cell)]
    return found + teaching_problems(notebook, solution)


def output_problems(cell) -> list[str]:
    """What no committed output may hold. A cell that is not compared may say when and where."""
    found, compared = [], "NBVAL_IGNORE_OUTPUT" not in cell.source
    for output in cell.outputs:
        if output.output_type == "error":
            found.append("failed")
        if output.get("name") == "stderr":
            found.append(f"prints a warning or a progress bar: {output.text[:40]!r}")
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        for what, pattern in CHANGING.items():
            if compared and (seen := pattern.search(text)):
                found.append(f"prints {what}: {seen[0]}")
    return found


def teaching_problems(notebook, solution: bool) -> list[str]:
    """Where a notebook asks too much of its reader at once, or does not say what it is for."""
    cells, found = notebook.cells, []
    first = cells[0].source if cells else ""
    if not first.startswith("# "):
        found.append("the first cell is not a title")
    expected = {
        "a question in bold": r"^\*\*[^*]+\?\*\*",
        "what the reader will be able to do": r"\*\*You will be able to:\*\*",
        "the time it takes": r"\*\*Time:\*\*",
        "prerequisites": r"\*\*Prerequisites:\*\*",
        "the paper": r"arXiv 2602\.16165",
    }
    if not solution:
        absent = [what for what, text in expected.items() if not re.search(text, first, re.M)]
        found += [f"the first cell does not give {what}" for what in absent]
    code = [cell for cell in cells if cell.cell_type == "code"]
    sizes = [
        sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code
        if "parameters" not in cell.metadata.get("tags", [])
    ]  # fmt: skip
    if len(code) > 30:
        found.append(f"{len(code)} code cells, at most 30")
    if sizes and max(sizes) > 15:
        found.append(f"a code cell of {max(sizes)} lines, at most 15")
    if sizes and not solution and median(sizes) > 6:
        found.append(f"code cells have {median(sizes)} lines in the median, at most 6")
    for cell, after in zip(code, [*code[1:], None], strict=True):
        shown = [output.get("data", {}) for output in cell.outputs]
        if any(PLOT in data for data in shown) and not (after and printed(after)):
            found.append("a figure is not followed by a table of its numbers")
    return found


def printed(cell) -> bool:
    """This cell's output has text that nbval compares."""
    return any("text" in o or "text/plain" in o.get("data", {}) for o in cell.outputs)


def exercises(path: Path) -> list[str]:
    """Names of the checks that a notebook calls, in order."""
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return re.findall(r"^checks\.(\w+)\(", "\n".join(code), re.M)


def listed(page: str) -> list[str]:
    """Paths of the notebooks that a page links to in its table."""
    rows = [line for line in page.splitlines() if line.startswith("|")]
    return re.findall(r"\]\(([\w/]+\.ipynb)\)", "\n".join(rows))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_notebook(path):
    assert problems(path) == []


def test_the_course_page_lists_every_notebook_once():
    page = (FOLDER / "README.md").read_text()
    assert sorted(listed(page)) == [str(path.relative_to(FOLDER)) for path in NOTEBOOKS]


@pytest.mark.parametrize(
    "path",
    [p for p in FOLDER.glob("*.ipynb") if WITH_EXERCISES.match(p.name)],
    ids=lambda p: p.name,
)
def test_every_exercise_is_a_stub_with_a_check_and_a_solution(path):
    code = "".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
    asked, solution = exercises(path), path.parent / "solutions" / path.name
    assert 2 <= len(asked) == code.count("raise NotImplementedError") <= 4
    assert exercises(solution) == asked
    outputs = [o.text for c in nbformat.read(solution, 4).cells for o in c.get("outputs", [])]
    assert [": right, on all " in text for text in outputs] == [True] * len(asked)


def test_every_check_belongs_to_an_exercise():
    checks = re.findall(r"^def ([a-z]\w*)\(student", (FOLDER / "checks.py").read_text(), re.M)
    assert [
        name for path in NOTEBOOKS if path.parent == FOLDER for name in exercises(path)
    ] == checks


# ------------------------------------------------------------------- the checker checks something


@pytest.fixture
def good():
    """A notebook without fault, as an object to spoil."""
    printed = new_output("stream", name="stdout", text="0.67 and/or ./runs/x")
    first = (
        "# Title\n\n**Why is it so?** Because.\n\n- **You will be able to:** see.\n"
        "- **Time:** 1 min.\n- **Prerequisites:** none.\n"
        "- **In the paper:** HiPER (arXiv 2602.16165), section 1."
    )
    cells = [
        new_markdown_cell(first),
        new_code_cell("seed: int = 0  # seed", metadata={"tags": ["parameters"]}),
        new_code_cell("print(2.0 / 3)", outputs=[printed]),
    ]
    for count, cell in enumerate(cells[1:], 1):
        cell.execution_count = count
    kernel = {"name": "python3", "display_name": "Python 3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def write(notebook, folder: Path, name: str = "01_x.ipynb") -> Path:
    nbformat.write(notebook, folder / name)
    return folder / name


def test_a_good_notebook_passes(good, tmp_path):
    assert problems(write(good, tmp_path)) == []


def spoil_path(n):
    n.cells[2].source = "open('/home/someone/data.json')"


def spoil_output_path(n):
    n.cells[2].outputs[0].text = "saved to /tmp/tmpab12/run"


def spoil_size(n):
    n.cells[2].outputs[0].text = "x" * LIMIT


def spoil_error(n):
    n.cells[2].outputs = [new_output("error", ename="E", evalue="v", traceback=[])]


def spoil_state(n):
    n.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def spoil_order(n):
    n.cells[2].execution_count = 7


def spoil_unexecuted(n):
    n.cells[1].execution_count = n.cells[2].execution_count = None


def spoil_tag(n):
    n.cells[1].metadata["tags"] = []


def spoil_injected(n):
    n.cells[2].metadata["tags"] = ["injected-parameters"]


def spoil_title(n):
    n.cells[0].source = "no heading\n" + n.cells[0].source


def spoil_question(n):
    n.cells[0].source = n.cells[0].source.replace("?**", ".**")


def spoil_prerequisites(n):
    n.cells[0].source = n.cells[0].source.replace("Prerequisites", "Before")


def spoil_warning(n):
    n.cells[2].outputs.append(new_output("stream", name="stderr", text="UserWarning: x"))


def spoil_time(n):
    n.cells[2].outputs[0].text = "at 10:11:12"


def spoil_day(n):
    n.cells[2].outputs[0].text = "on 2026-11-25"


def spoil_device(n):
    n.cells[2].outputs = [
        new_output("execute_result", {"text/plain": "tensor(1., device='cuda:0')"})
    ]


def spoil_version(n):
    n.cells[2].outputs[0].text = "torch 2.13.0"


def spoil_address(n):
    n.cells[2].outputs[0].text = "<function f at 0x7f1f6bc9de80>"


def spoil_length(n):
    n.cells[2].source = "\n".join(["pass"] * 16)
    n.cells += [new_code_cell("pass", execution_count=k) for k in (3, 4)]


def spoil_median(n):
    n.cells[2].source = "\n".join(["pass"] * 8)


def spoil_number(n):
    n.cells += [new_code_cell("pass", execution_count=k) for k in range(3, 32)]


def spoil_figure(n):
    n.cells[2].outputs = [new_output("display_data", {PLOT: {}})]


def spoil_kernel(n):
    n.metadata["kernelspec"]["name"] = "my-venv"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_path, "path of one machine: /home/someone"),
        (spoil_output_path, "path of one machine: /tmp/tmpab12"),
        (spoil_size, "bytes, at most"),
        (spoil_error, "cell 3 failed"),
        (spoil_state, "widget state"),
        (spoil_order, r"execution counts are [1, 7]"),
        (spoil_unexecuted, "execution counts are [None, None]"),
        (spoil_tag, "0 cells are tagged"),
        (spoil_injected, "injected"),
        (spoil_title, "title"),
        (spoil_question, "a question in bold"),
        (spoil_prerequisites, "prerequisites"),
        (spoil_warning, "cell 3 prints a warning"),
        (spoil_time, "a time stamp: 10:11:12"),
        (spoil_day, "a time stamp: 2026-11-25"),
        (spoil_device, "a device: cuda:0"),
        (spoil_version, "a version: 2.13.0"),
        (spoil_address, "an address: 0x7f1f6bc9de80"),
        (spoil_length, "a code cell of 16 lines"),
        (spoil_median, "8 lines in the median"),
        (spoil_number, "31 code cells"),
        (spoil_figure, "a figure is not followed by a table"),
        (spoil_kernel, "kernel"),
    ],
)
def test_each_fault_is_found(good, spoil, message, tmp_path):
    spoil(good)
    (found,) = problems(write(good, tmp_path))
    assert message in found


def test_a_run_notebook_may_be_unexecuted_but_not_half_executed(good, tmp_path):
    spoil_unexecuted(good)
    assert problems(write(good, tmp_path, "20_x.ipynb")) == []
    good.cells[1].execution_count = 1
    assert "execution counts" in problems(write(good, tmp_path, "20_x.ipynb"))[0]


def test_a_cell_that_is_not_compared_may_say_when_and_where(good, tmp_path):
    spoil_version(good)
    good.cells[2].source = "# NBVAL_IGNORE_OUTPUT\n" + good.cells[2].source
    assert problems(write(good, tmp_path)) == []


def test_a_solution_has_no_parameters_and_only_a_title(good, tmp_path):
    (tmp_path / "solutions").mkdir()
    spoil_tag(good)
    good.cells[0].source = "# Solutions"
    assert problems(write(good, tmp_path / "solutions")) == []
    assert "0 cells are tagged parameters, expected 1" in problems(write(good, tmp_path))


def test_the_list_of_a_page_is_its_table():
    page = "| [02](02_x.ipynb) | x | [s](solutions/02_x.ipynb) |\nsee [03](03_y.ipynb)"
    assert listed(page) == ["02_x.ipynb", "solutions/02_x.ipynb"]
