"""The inspectors in JupyterLab in a real, headless Chromium: what is moved, clicked, and shown.

Playwright drives its own Chromium (``playwright install chromium``) or, where that can't be had,
the system's. Screenshots of each inspector at 1280 px, light and dark, are left in
``$HIPER_ARTEFACTS`` (else in the temporary folder).
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from recorded import make_run

from hiper_lab.widgets import (
    PATIENCE,
    CreditExplorer,
    LiveMonitor,
    RunComparer,
    TrajectoryInspector,
)

api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip, extra dev)")
pytestmark = pytest.mark.slow
SLOWEST = 240_000  # ms, on a busy machine
api.expect.set_options(timeout=SLOWEST)
REAL = "experiments/results/hae_vs_gae"  # nine runs that were trained
CELLS = [
    "from pathlib import Path\n"
    "from hiper_lab.widgets import CreditExplorer, LiveMonitor, RunComparer, TrajectoryInspector",
    "TrajectoryInspector('demo')",
    "explorer = CreditExplorer('demo')\nexplorer.goto('0003:0')\nexplorer",
    "RunComparer(sorted(Path('real').iterdir()))",
    "LiveMonitor('live')",
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, root):
    """A JupyterLab of its own, with recorded runs and a notebook; yields (folder, address)."""
    folder = tmp_path_factory.mktemp("lab")
    make_run(folder / "work" / "demo")
    make_run(folder / "work" / "live", iterations=1)
    shutil.copytree(root / REAL, folder / "work" / "real")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / "work" / "inspect.ipynb")
    quiet = folder / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    quiet.mkdir(parents=True)
    (quiet / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        name: str(folder / name.lower())
        for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR",
                     "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    }  # fmt: skip
    own["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
        "--port-retries=0", "--IdentityProvider.token=t",
        "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder / 'work'}",
    ]  # fmt: skip
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        while True:  # the server needs a moment
            assert server.poll() is None, (folder / "lab.log").read_text()[-3000:]
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield folder / "work", f"http://127.0.0.1:{port}/lab/tree/inspect.ipynb?token=t"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page():
    """A page of 1280 px; ``asked`` lists the addresses it requested, ``errors`` its errors."""
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        binary = own if Path(own).exists() else shutil.which("chromium")
        if binary is None:
            pytest.skip("needs Chromium (playwright install chromium, or apt-get install chromium)")
        chromium = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 4400})
        page.set_default_timeout(SLOWEST)
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.add_init_script(LATE)
        yield page
        chromium.close()


def artefacts() -> Path:
    folder = Path(os.environ.get("HIPER_ARTEFACTS") or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def until(page, script: str, argument=None) -> None:
    """Wait for a function of the page to be true; a failure shows the page's text."""
    try:
        page.wait_for_function(script, arg=argument, polling=200)
    except api.TimeoutError as error:
        page.screenshot(path=artefacts() / "failure.png")
        text = page.inner_text("body")
        raise AssertionError(f"never true: {script} {argument}\n{text[-3000:]}") from error


# the fourth plot, the monitor's, does not load in the time that anywidget has for it
LATE = """(() => {
    const real = AbortSignal.timeout.bind(AbortSignal);
    let asked = 0;
    AbortSignal.timeout = ms => real(ms == 2000 && ++asked == 4 ? 0 : ms) })()"""
PLOTS = "const plots = document.querySelectorAll('.jp-OutputArea .js-plotly-plot');"
# where the largest bar of the low level is in a plot, and its turn
BAR = f"""k => {{ {PLOTS}
    const bar = t => t.type == 'bar' && t.name == 'action (low)';
    const at = plots[k]?.data?.findIndex(bar) ?? -1;
    if (at < 0) return null;
    const size = Array.from(plots[k].data[at].y, Math.abs);
    const turn = size.indexOf(Math.max(...size));
    const bars = plots[k].calcdata[at][0].node3?.node().querySelectorAll('.point path');
    if (bars?.length != size.length) return null;
    const box = bars[turn].getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2, turn] }}"""


def drawn(page, k: int, trace: int, y: list[float]) -> None:
    """Wait until a trace of the k-th plot has these heights."""
    shown = f"""([k, trace, y]) => {{ {PLOTS}
        const shown = Array.from(plots[k]?.data?.[trace]?.y ?? []), number = Number.isFinite;
        return shown.length == y.length && shown.every((x, i) =>
            number(x) ? Math.abs(x - y[i]) < 1e-6 : !number(y[i])) }}"""
    until(page, shown, [k, trace, y])


def click_bar(page, k: int) -> int:
    """Click on that bar of the k-th plot; the turn it is of."""
    until(page, BAR, k)
    x, y, turn = page.evaluate(BAR, k)
    page.mouse.move(x, y)
    page.wait_for_timeout(300)  # plotly looks for what is under the pointer
    page.mouse.click(x, y)
    return turn


def inspector(page, k: int):
    return page.locator(".jp-OutputArea-output .hl.widget-vbox").nth(k)


def press(page, k: int, name: str) -> None:
    """Press the button of the k-th inspector that is called so."""
    said = re.compile(rf"^\s*{name}\s*$")
    inspector(page, k).locator("button").filter(has_text=said).click()


def says(page, k: int, text: str) -> str:
    """Wait until the k-th inspector shows a text; all that it shows."""
    api.expect(inspector(page, k)).to_contain_text(text)
    return inspector(page, k).inner_text()


def test_sliders_and_clicks_in_jupyterlab(lab, page):
    folder, address = lab
    page.goto(address)
    until(page, """() => {
        const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext.session;
        return session?.kernel?.connectionStatus == 'connected' && session.kernel.status == 'idle'
            && document.querySelectorAll('.jp-Cell').length > 4 }""")  # fmt: skip

    def lab_command(name: str, arguments: dict | None = None, wait: bool = True) -> None:
        run = "([name, args]) => { const done = jupyterapp.commands.execute(name, args);"
        run += " return done.then(() => true) }" if wait else " }"
        page.evaluate(run, [name, arguments or {}])

    lab_command("application:toggle-left-area")
    lab_command("notebook:run-all-cells", wait=False)
    until(page, f"() => {{ {PLOTS} return plots.length == 4 "
          "&& [...plots].every(p => p._fullLayout?.width > 1000) }")  # fmt: skip
    page.wait_for_timeout(1000 * PATIENCE + 2000)  # until all to which the page is deaf are new
    # what was chosen before the page had loaded plotly's code is what it shows
    says(page, 1, "demo/3/0003:0")
    explored = CreditExplorer(folder / "demo")
    explored.goto("3/0003:0")
    drawn(page, 1, 4, explored.table()["low_left"].tolist())

    # a click on a bar selects its turn
    turn = click_bar(page, 0)
    text = says(page, 0, f"demo/3/0000:{turn}")
    assert "you see a mug 1 & <nothing> else." in text and "</action>" in text

    # γ by keyboard: its number, the name of the left configuration and the picture follow
    slider = inspector(page, 1).locator(".widget-hslider", has_text="γ")
    slider.locator(".noUi-handle").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    api.expect(slider).to_contain_text("0.960")
    explored.sliders["gamma"].value = 0.96
    expected = explored.table()["low_left"].tolist()
    drawn(page, 1, 4, expected)
    title = page.evaluate(f"() => {{ {PLOTS} return plots[1].layout.annotations[0].text }}")
    assert title == "as trained, changed: hae"

    # a click in the explorer explains the bar, by both configurations
    turn = click_bar(page, 1)
    text = says(page, 1, f"The left advantage of the action (low) at turn {turn}, term by term")
    explored.turn.value, explored.level.value = turn, "low"
    for side in ("left", "right"):
        assert f"{explored.explain(side)['contribution'].sum():.4f} = " in text
    assert f"{expected[turn]:.4f} = " in text

    # a flipped switch moves credit; another click on the button undoes it
    explored.flip_turn(turn)
    flipped = explored.table()["low_left"].tolist()
    assert flipped != expected
    for credit in (flipped, expected):
        press(page, 1, "flip")
        drawn(page, 1, 4, credit)

    # every view is another kind of picture in the same place, of real runs
    compared = RunComparer(sorted((folder / "real").iterdir()))
    for view in compared.views:
        press(page, 2, view)
        compared.view.value = view
        figure = compared.figure()
        kinds = [trace.type for trace in figure.data]
        same = f"kinds => {{ {PLOTS} return plots[2]?.data?.map(t => t.type).join() == kinds }}"
        until(page, same, ",".join(kinds))
        if view == "failures":
            cells = page.evaluate(f"() => {{ {PLOTS} return plots[2].data[0].z.map(r => [...r]) }}")
            assert cells == [pytest.approx(list(row)) for row in figure.data[0].z]
        shoot(page, 2, f"RunComparer_{view.replace(' ', '_')}")

    # the monitor sees what another process, this one, writes
    says(page, 3, "live, iteration 1 of 1")
    press(page, 3, "follow")
    make_run(folder / "live", iterations=4, episodes=9)
    says(page, 3, "live, iteration 4 of")
    drawn(page, 3, 0, list(LiveMonitor(folder / "live").figure().data[0].y))
    says(page, 3, "live/4/0008")
    press(page, 3, "follow")
    assert "[anywidget] Failed to initialize model." in page.errors  # it was shown anew

    # nothing came from elsewhere
    here = (address.split("/lab/")[0], address.split("/lab/")[0].replace("http", "ws"), "data:",
            "blob:")  # fmt: skip
    assert [url for url in page.asked if not url.startswith(here)] == []

    for theme in ("Light", "Dark"):
        lab_command("apputils:change-theme", {"theme": f"JupyterLab {theme}"})
        until(page, "light => document.body.dataset.jpThemeLight == light",
              str(theme == "Light").lower())  # fmt: skip
        page.wait_for_timeout(1000)  # its style sheet
        for k, kind in enumerate((TrajectoryInspector, CreditExplorer, RunComparer, LiveMonitor)):
            shoot(page, k, f"{kind.__name__}_{theme.lower()}")

    # saved, the inspectors add little: digests, no widget state
    lab_command("docmanager:save")
    file = folder / "inspect.ipynb"
    saved = nbformat.read(file, as_version=4)
    assert file.stat().st_size < 100_000 and "widgets" not in saved.metadata
    said = saved.cells[1].outputs[0]["data"]["text/plain"]
    assert said.startswith("TrajectoryInspector(demo/3/0000:0 of ")


def shoot(page, k: int, name: str) -> None:
    """Leave a picture of the k-th inspector, and see that nothing sticks out of it."""
    shown = inspector(page, k)
    shown.scroll_into_view_if_needed()
    shown.screenshot(path=artefacts() / f"{name}.png")
    assert shown.evaluate("box => box.scrollWidth <= box.clientWidth + 1"), name


def test_pages_open_without_a_network(lab, page):
    folder, _ = lab
    page.context.set_offline(True)
    inspectors = (
        TrajectoryInspector(folder / "real" / "hae-seed0"), CreditExplorer(folder / "demo"),
        RunComparer(sorted((folder / "real").iterdir())), LiveMonitor(folder / "demo"),
    )  # fmt: skip
    for shown in inspectors:
        file = shown.to_html(folder / f"{type(shown).__name__}.html")
        page.goto(file.as_uri())
        until(page, "() => document.querySelector('.js-plotly-plot .main-svg')")
        assert repr(shown) in page.inner_text("h3")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        for theme in ("light", "dark"):
            page.emulate_media(color_scheme=theme)
            page.screenshot(path=artefacts() / f"page_{file.stem}_{theme}.png", full_page=True)
    assert {url.split(":")[0] for url in page.asked} <= {"file", "data", "blob"}
