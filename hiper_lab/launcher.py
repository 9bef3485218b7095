"""One papermill execution of ``notebooks/20_train.ipynb`` is one run, in a folder of its own.

Every parameter is checked before a kernel starts; an interrupted run is resumed by the same launch.

Left out on purpose: many runs (see sweeps), what came of them (see results), the command line
(see runs).
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import threading
import time
import types
import uuid
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import nbformat
import papermill
import torch
import yaml
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.paths import jupyter_runtime_dir
from nbclient import NotebookClient
from tqdm.auto import tqdm
from traitlets import default

import hiper_lab
from hiper_lab.config import TrainConfig
from hiper_lab.folder import sole_writer
from hiper_lab.records import read_metrics
from hiper_lab.train import train
from hiper_lab.trajectory import write_atomic

NOTEBOOK = Path("notebooks") / "20_train.ipynb"
_PACKAGES = ("torch", "transformers", "peft", "numpy", "pandas", "papermill")
_SHELL_NAMES = ("In", "Out", "exit", "quit", "open", "get_ipython")


def read_experiment(path: Path | str) -> dict[str, Any]:
    """Parameters of an experiment file.

    Raises:
        FileNotFoundError: If there is no such file, naming those that are there.
        ValueError: If it is not a YAML mapping.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.yaml"))
        raise FileNotFoundError(f"no experiment {str(path)!r}; there are {there or 'none'}")
    try:
        parameters = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(parameters, dict):
        raise ValueError(
            f"{path} holds {type(parameters).__name__}, expected parameter: value lines"
        )
    return parameters


def notebook_parameters(names: dict[str, Any]) -> dict[str, Any]:
    """The training parameters among a notebook's variables: ``notebook_parameters(globals())``.

    Called right after the parameters cell, when nothing else is defined; whatever papermill
    injected that no one knows is therefore seen here and refused.

    Raises:
        ValueError: By ``TrainConfig.from_parameters``, when it is given the result.
    """
    return {
        name: value for name, value in names.items()
        if not name.startswith("_") and name not in (*_SHELL_NAMES, "run_folder")
        and not isinstance(value, (type, types.ModuleType, types.FunctionType))
    }  # fmt: skip


def manifest(config: TrainConfig) -> dict[str, Any]:
    """What a reader needs to repeat a run: code, packages, hardware, seed."""
    root = Path(hiper_lab.__file__).parent.parent
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hiper_lab": hiper_lab.__version__, "commit": described.stdout.strip() or None,
        "python": platform.python_version(), "system": platform.system(),
        "machine": platform.machine(), "cores": os.cpu_count(), "gpu": gpu, "seed": config.seed,
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def check(parameters: dict[str, Any], notebook: Path | str = NOTEBOOK) -> TrainConfig:
    """The configuration that these parameters of this notebook mean.

    Raises:
        ValueError: On a parameter that is unknown, ill-typed, or not declared by the notebook.
        FileNotFoundError: If there is no such notebook.
    """
    config = TrainConfig.from_parameters(parameters)
    declared(parameters, notebook)
    return config


def declared(parameters: dict[str, Any], notebook: Path | str) -> dict[str, str]:
    """The types that a notebook declares for its parameters, once it knows all of these."""
    if not Path(notebook).is_file():
        raise FileNotFoundError(f"no notebook {str(notebook)!r}; run from the repository's root")
    declared = papermill.inspect_notebook(str(notebook))
    missing = sorted(set(parameters) - set(declared))
    if missing:
        raise ValueError(f"{notebook} declares no parameter {missing}; expected {sorted(declared)}")
    return {name: parameter["inferred_type_name"] for name, parameter in declared.items()}


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """Run a notebook with parameters into another file, without widget state or open ports."""
    papermill.execute_notebook(
        str(notebook), str(executed), parameters, kernel_name="python3", progress_bar=False,
        store_widget_state=False, kernel_manager_class=_LocalKernel,
    )  # fmt: skip


def launch(
    parameters: dict[str, Any],
    folder: Path | str,
    notebook: Path | str = NOTEBOOK,
    bar: bool = True,
) -> Path:
    """Execute the training notebook by papermill into a run folder; resumes a run already there.

    Under ``accelerate launch`` the first process executes the notebook; the others train with it.

    Args:
        parameters: Flat training parameters; anything unknown or ill-typed is refused here.
        folder: The run's folder.
        bar: Show progress on stderr.

    Returns:
        Path of the executed notebook.

    Raises:
        ValueError: On a bad parameter, before anything is written or started.
        BlockingIOError: Before a kernel starts, if another run writes into the folder.
        papermill.PapermillExecutionError: If a cell fails; the executed notebook shows where.
    """
    config = check(parameters, notebook)
    folder, notebook = Path(folder), Path(notebook)
    if helping():
        for _ in train(config, folder):
            pass
        return folder / notebook.name
    with sole_writer(folder):  # from here on by `train`, in the kernel
        if not (folder / "manifest.json").exists():
            text = json.dumps(manifest(config), indent=1) + "\n"
            write_atomic(folder / "manifest.json", text.encode())
    executed = folder / notebook.name
    with _progress(folder, config.iterations) if bar else nullcontext():
        execute(notebook, executed, {**parameters, "run_folder": str(folder)})
    return executed


def helping() -> bool:
    """This process is one of several of a training, and not the first."""
    return os.environ.get("RANK", "0") != "0"


def refresh(path: Path | str) -> None:
    """Execute a notebook afresh, in its own folder, and store it as it is committed.

    One thread, as in the tests; no widget state, no time stamps. The file is replaced only if every
    cell succeeded.

    Raises:
        FileNotFoundError: If there is no such notebook.
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no notebook {str(path)!r}")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=None, coalesce_streams=True, record_timing=False,
        store_widget_state=False, resources={"metadata": {"path": str(path.parent)}},
        kernel_manager_class=_LocalKernel,
    )  # fmt: skip
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1"})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    write_atomic(path, (nbformat.writes(notebook).rstrip("\n") + "\n").encode())


class _LocalKernel(AsyncKernelManager):
    """A kernel behind file sockets of its own, not TCP ports (which ipykernel warns about)."""

    @default("transport")
    def _file_socket(self) -> str:
        return "ipc"

    @default("ip")
    def _path_of_the_sockets(self) -> str:
        Path(jupyter_runtime_dir()).mkdir(parents=True, exist_ok=True)
        return str(Path(jupyter_runtime_dir()) / f"kernel-{uuid.uuid4().hex}")


@contextmanager
def _progress(folder: Path, iterations: int):
    """A progress bar that follows metrics.jsonl while another process writes it."""
    over = threading.Event()

    def follow() -> None:
        with tqdm(total=iterations, desc=str(folder), unit="it", smoothing=0.1) as bar:
            while not over.wait(0.5):
                show(bar)
            show(bar)

    def show(bar: tqdm) -> None:
        try:
            metrics = read_metrics(folder)
        except ValueError:  # a line is being written
            return
        if not len(metrics):
            return
        at = int(metrics["iteration"].iloc[-1])
        if bar.n == 0 and at > 1:  # resumed: the rate counts from here
            bar.initial = at
        if at != bar.n:
            bar.update(at - bar.n)
        if "rollout/success" in metrics and at:
            latest = metrics["rollout/success"].tail(5).mean()
            bar.set_postfix_str(f"training success {latest:.0%}", refresh=False)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
