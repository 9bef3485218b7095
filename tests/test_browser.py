"""The inspectors in JupyterLab in a real, headless Chromium: what is moved, clicked, and shown.

Screenshots, light and dark, are left in ``$HIPER_ARTEFACTS`` (else in the temporary folder).
"""

import os
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

from hiper_lab.widgets import CreditExplorer, RunComparer

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (pip, extra dev)")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs Chromium and chromedriver (apt-get install chromium chromium-driver)",
    ),
]
CELLS = [
    "from hiper_lab.widgets import CreditExplorer, RunComparer, TrajectoryInspector",
    "TrajectoryInspector('demo')",
    "explorer = CreditExplorer('demo')\nexplorer.goto('0003:0')\nexplorer",
    "RunComparer(['demo'])",
]


def notebook() -> nbformat.NotebookNode:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture(scope="module")
def lab(tmp_path_factory, root):
    """A JupyterLab of its own, with a recorded run and a notebook; yields (folder, address)."""
    folder = tmp_path_factory.mktemp("lab")
    make_run(folder / "work" / "demo")
    nbformat.write(notebook(), folder / "work" / "inspect.ipynb")
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
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1280,3400", "--hide-scrollbars"):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(executable_path=DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


def artefacts() -> Path:
    folder = Path(os.environ.get("HIPER_ARTEFACTS") or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def until(browser, script: str, *arguments):
    """What the script returns as soon as it is true; a failure shows the page's text."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if found := browser.execute_script(script, *arguments):
            return found
        time.sleep(0.2)
    browser.save_screenshot(str(artefacts() / "failure.png"))
    text = browser.execute_script("return document.body.innerText")
    raise AssertionError(f"never true: {script}\n{text[-3000:]}")


READY = """
    const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext.session;
    return session?.kernel?.connectionStatus == 'connected' && session.kernel.status == 'idle'
        && document.querySelectorAll('.jp-Cell').length > 3"""
RUN = "return jupyterapp.commands.execute(arguments[0], arguments[1] || {}).then(() => true)"
PLOTS = "const plots = document.querySelectorAll('.jp-OutputArea .js-plotly-plot');"
# the largest bar of the low level in a plot, and its turn
BAR = (
    PLOTS
    + """
    const plot = plots[arguments[0]];
    const k = plot.data.findIndex(t => t.type == 'bar' && t.name == 'action (low)');
    const size = Array.from(plot.data[k].y, Math.abs), turn = size.indexOf(Math.max(...size));
    const bars = plot.calcdata[k][0].node3?.node().querySelectorAll('.point path');
    return bars && bars.length == size.length && [bars[turn], turn]"""
)
GAMMA = """
    const sliders = [...document.querySelectorAll('.widget-hslider')];
    return sliders.find(s => s.innerText.includes('γ'))"""
SHOWN = "return document.querySelectorAll('.jp-OutputArea .hl')[{}].innerText"  # 0, 1; 2, 3


def test_sliders_and_clicks_in_jupyterlab(lab, browser):
    folder, address = lab
    keys, actions = webdriver.Keys, webdriver.ActionChains
    browser.get(address)
    until(browser, READY)
    browser.execute_script(RUN, "application:toggle-left-area")
    browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
    until(browser, PLOTS + "return plots.length == 3 && plots[1].querySelector('.bars .point')")
    until(browser, PLOTS + "return [...plots].every(p => p._fullLayout.width > 1000)")  # of 1280
    # what was chosen before the page had loaded plotly's code is what it shows
    assert "demo/3/0003:0" in browser.execute_script(SHOWN.format(2))
    explored = CreditExplorer(folder / "demo")
    explored.goto("3/0003:0")
    before = browser.execute_script(PLOTS + "return Array.from(plots[1].data[4].y)")
    assert before == pytest.approx(explored.table()["low_left"].tolist(), abs=1e-6)

    # a click on a bar selects its turn
    bar, turn = until(browser, BAR, 0)
    actions(browser).move_to_element(bar).pause(0.3).click().perform()
    until(browser, SHOWN.format(0) + f".includes('demo/3/0000:{turn}')")
    text = browser.execute_script(SHOWN.format(0))
    assert "you see a mug 1 & <nothing> else." in text and "</action>" in text

    # γ by keyboard: its number, the name of the left configuration and the picture follow
    slider = until(browser, GAMMA)
    handle = slider.find_element("css selector", ".noUi-handle")
    browser.execute_script("arguments[0].focus()", handle)
    actions(browser).send_keys(keys.ARROW_LEFT * 4).perform()
    until(browser, "return arguments[0].innerText.includes('0.960')", slider)
    explored.sliders["gamma"].value = 0.96
    expected = explored.table()["low_left"].tolist()
    first = PLOTS + "return Math.abs(plots[1].data[4].y[0] - arguments[0]) < 1e-6"
    until(browser, first, expected[0])
    after = browser.execute_script(PLOTS + "return Array.from(plots[1].data[4].y)")
    assert after == pytest.approx(expected, abs=1e-6) and after != before
    title = browser.execute_script(PLOTS + "return plots[1].layout.yaxis2.title.text")
    assert title == "as trained, changed: hae"

    # a click in the explorer explains the bar
    bar, turn = until(browser, BAR, 1)
    actions(browser).move_to_element(bar).pause(0.3).click().perform()
    said = f"advantage of the action (low) at turn {turn}, term by term"
    until(browser, SHOWN.format(2) + f".includes('{said}')")
    assert f"{expected[turn]:.4f} = " in browser.execute_script(SHOWN.format(2))

    # another view is another kind of picture in the same plot
    click = "return [...document.querySelectorAll('button')].find(b => b.innerText == arguments[0])"
    for view, kinds in (("failures", ["heatmap"]), ("subgoals", ["scatter"])):
        until(browser, click, view).click()
        shown = PLOTS + "return plots[2]?.data?.map(t => t.type).join() == arguments[0]"
        until(browser, shown, ",".join(kinds))
        if view == "failures":
            compared = RunComparer([folder / "demo"])
            compared.view.value = view
            cells = browser.execute_script(PLOTS + "return plots[2].data[0].z.map(r => [...r])")
            assert cells == [pytest.approx(list(row)) for row in compared.figure().data[0].z]
        title = browser.execute_script(PLOTS + "return plots[2].layout.title?.text")
        assert title == {"failures": "how episodes went, share of all"}.get(view)

    # nothing came from elsewhere
    loaded = "return performance.getEntriesByType('resource').map(e => e.name)"
    here = (address.split("/lab/")[0], "data:", "blob:")
    assert [name for name in browser.execute_script(loaded) if not name.startswith(here)] == []

    for theme in ("Light", "Dark"):
        browser.execute_script(RUN, "apputils:change-theme", {"theme": f"JupyterLab {theme}"})
        light = str(theme == "Light").lower()
        until(browser, f"return document.body.dataset.jpThemeLight == '{light}'")
        time.sleep(1)  # its style sheet
        browser.save_screenshot(str(artefacts() / f"jupyterlab_{theme.lower()}.png"))

    # saved, the inspectors add little: digests, no widget state
    browser.execute_script(RUN, "docmanager:save")
    file = folder / "inspect.ipynb"
    saved = nbformat.read(file, as_version=4)
    assert file.stat().st_size < 100_000 and "widgets" not in saved.metadata
    said = saved.cells[1].outputs[0]["data"]["text/plain"]
    assert said.startswith("TrajectoryInspector(demo/3/0000:0 of ")
