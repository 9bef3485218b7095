"""Committed notebooks are small, executed in order, portable and without widget state."""

import json
import re
import warnings
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("**/[0-9][0-9]_*.ipynb"))
CHECKED = re.compile(r"[01]\d_")  # 0x learn, 1x analyse: nbval compares them; 2x run
LIMIT = 200_000
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:home|root|tmp|work|Users|mnt|opt|var|data)/[\w.-]+")


def problems(path: Path) -> list[str]:
    """What is wrong with a notebook, one line each; empty if it may be committed."""
    notebook = nbformat.read(path, as_version=4)
    found = []
    if path.stat().st_size > LIMIT:
        found.append(f"{path.stat().st_size} bytes, at most {LIMIT}")
    if "widgets" in notebook.metadata:
        found.append("holds widget state; save it without (store_widget_state=False)")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if not notebook.cells or not notebook.cells[0].source.startswith("# "):
        found.append("the first cell is not a title")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells are tagged parameters, expected 1")
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in code):
        found.append("holds parameters injected by papermill")
    counts = [cell.execution_count for cell in code]
    unexecuted = counts == [None] * len(code) and not CHECKED.match(path.name)
    if counts != list(range(1, len(code) + 1)) and not unexecuted:
        found.append(f"execution counts are {counts}, expected 1 to {len(code)}: run it afresh")
    for number, cell in enumerate(notebook.cells, 1):
        outputs = cell.get("outputs", [])
        if any(output.output_type == "error" for output in outputs):
            found.append(f"cell {number} failed")
        if seen := MACHINE_PATH.search(json.dumps(cell)):
            found.append(f"cell {number} holds a path of one machine: {seen[0]}")
    return found


def long_cells(path: Path, limit: int = 15) -> list[str]:
    """Code cells with more lines than a reader takes in at once."""
    cells = enumerate(nbformat.read(path, as_version=4).cells, 1)
    cells = [(n, c) for n, c in cells if c.cell_type == "code"]
    cells = [(n, c) for n, c in cells if "parameters" not in c.metadata.get("tags", [])]
    sizes = {n: len(c.source.splitlines()) for n, c in cells}
    return [f"cell {number} has {size} lines" for number, size in sizes.items() if size > limit]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook(path):
    assert problems(path) == []
    for line in long_cells(path):
        warnings.warn(f"{path.name}: {line}, better at most 15", stacklevel=1)


# ------------------------------------------------------------------- the checker checks something


@pytest.fixture
def good():
    """A notebook without fault, as an object to spoil."""
    printed = new_output("stream", name="stdout", text="0.67 and/or ./runs/x")
    cells = [
        new_markdown_cell("# Title"),
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
    n.cells[0].source = "no heading"


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


def test_long_cells_are_named(good, tmp_path):
    good.cells[2].source = "\n".join(["pass"] * 16)
    assert long_cells(write(good, tmp_path)) == ["cell 3 has 16 lines"]
