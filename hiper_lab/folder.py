"""A run in memory, and what it keeps in its folder: metrics, rollouts, checkpoints.

Left out on purpose: what was launched and how long it took (see launcher); reading (see records).
"""

import fcntl
import json
import os
import shutil
import socket
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hiper_lab import memory, trajectory
from hiper_lab.config import TrainConfig
from hiper_lab.credit import Credit, TurnGrid, Values
from hiper_lab.parallel import Team, spread_like, whole_tensor
from hiper_lab.policy import Policy, save_adapter
from hiper_lab.sampling import Codec
from hiper_lab.trajectory import Trajectory
from hiper_lab.vllm_sampler import Engine

# Where and in how much memory a run is computed, not what: it may be resumed with others.
PLACE = ("engine", "engine_memory", "micro_batch_tokens", "gradient_checkpointing", "decode_rows")


class Evaluation(NamedTuple):
    """Success on held-out games with a 95% Wilson interval."""

    success: float
    low: float
    high: float
    games: int


@dataclass
class StepReport:
    """What one iteration did. Iteration 0 is the evaluation before any training."""

    iteration: int
    metrics: dict[str, float]
    trajectories: list[Trajectory] = field(default_factory=list)
    grid: TurnGrid | None = None
    values: Values | None = None
    credit: Credit | None = None
    evaluation: Evaluation | None = None


@dataclass
class State:
    """What training changes: weights, optimiser, how far it is."""

    config: TrainConfig
    policy: Policy
    codec: Codec
    optimizer: torch.optim.Optimizer
    model: torch.nn.Module  # the policy, as it is called for its gradient
    team: Team
    longest: memory.Longest
    needed: memory.Memory
    iteration: int = 0
    seconds: float = 0.0
    engine: Engine | None = None


PATIENCE = 15.0  # seconds for a run to end whose launcher was killed


@contextmanager
def sole_writer(folder: Path | str) -> Iterator[None]:
    """Keep others from writing into a folder, by a lock on its file ``.lock``.

    The system frees the lock when its holder ends, however that happens: nothing is ever stale.

    Raises:
        BlockingIOError: If somebody else, or an earlier call of this process, has held it for
            15 seconds; says who.
    """
    file = Path(folder) / ".lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + PATIENCE
    with file.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    lock.seek(0)
                    raise BlockingIOError(
                        f"{folder} is being written by {lock.read().strip()} (this is process "
                        f"{os.getpid()}); wait for it, stop it, or use another folder"
                    ) from error
                time.sleep(0.1)
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
        yield


class RunFolder:
    """The files of a run: config.json, memory.json, metrics.jsonl, rollouts/, checkpoints/.

    Args:
        write: This process writes them; the others of a training only read.

    Raises:
        ValueError: If the folder holds a run with another configuration.
    """

    def __init__(self, path: Path | str, config: TrainConfig, write: bool = True):
        self.path, self.write = Path(path), write
        file = self.path / "config.json"
        ours = _as_json(config)
        theirs = json.loads(file.read_text()) if file.exists() else {}
        if theirs:
            # what the code that began the run did not know, it did as is the default
            for name, value in _as_json(TrainConfig()).items():
                seen = theirs.setdefault(name, value)
                theirs[name] = value | seen if isinstance(value, dict) else seen
            changed = _differences(ours, theirs)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another {', '.join(changed)}; "
                    "use another folder, or delete this one to start over"
                )
        if write and theirs != ours:
            trajectory.write_atomic(file, (json.dumps(ours, indent=1) + "\n").encode())

    def note_memory(self, needed: memory.Memory, peak: float | None) -> None:
        """Keep what was estimated, and what the dry run took (None: none was made)."""
        if self.write:
            parts = {k: round(v / memory.GIB, 3) for k, v in needed._asdict().items()}
            noted = {"total": round(needed.total / memory.GIB, 3), **parts}
            text = json.dumps({"estimated_gib": noted, "dry_run_gib": peak}, indent=1) + "\n"
            trajectory.write_atomic(self.path / "memory.json", text.encode())

    def record(self, report: StepReport, state: State, last: bool = False) -> None:
        """Write what an iteration leaves behind; the checkpoint comes last and makes it count."""
        config = state.config
        if self.write:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(report.metrics) + "\n")
                file.flush()
            if report.trajectories and (last or report.iteration % config.rollout_every == 0):
                name = f"{report.iteration:06d}.jsonl.gz"
                trajectory.save(report.trajectories, self.path / "rollouts" / name)
        if last or report.iteration % config.checkpoint_every == 0:
            save_checkpoint(state, self.path / "checkpoints" / f"{report.iteration:06d}")

    def restore(self, state: State) -> bool:
        """Load the newest checkpoint that is whole, and drop metrics that are newer than it.

        Returns:
            Whether there was one.

        Raises:
            ValueError: If there are checkpoints and none can be used, or one is of another model.
        """
        found = sorted((self.path / "checkpoints").glob("[0-9]*"), reverse=True)
        for folder in found:
            try:
                saved = read_checkpoint(folder)
            except DAMAGE as error:
                warnings.warn(f"{folder} is damaged and left out: {error}", stacklevel=2)
                continue
            load_checkpoint(state, saved, folder)
            break
        else:
            if found:
                raise ValueError(
                    f"no checkpoint in {self.path} can be read, expected one of "
                    f"{[folder.name for folder in found]}; delete the folder to start over"
                )
        state.team.wait()  # until all have read what is now cleaned up
        if not self.write:
            return bool(found)
        if not found:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return False
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [
            s for s in lines if s.endswith("\n") and json.loads(s)["iteration"] <= state.iteration
        ]
        if kept != lines:
            trajectory.write_atomic(self.path / "metrics.jsonl", "".join(kept).encode())
        return True


def _as_json(config: TrainConfig) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(asdict(config)))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of settings that make another run of it."""
    names = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [name] * bool(_differences(a, b))
        elif a != b and name not in PLACE:
            names.append(name)
    return names


def save_checkpoint(state: State, folder: Path) -> None:
    """Weights, optimiser and progress, complete or not at all; older checkpoints are removed.

    The file is the same whatever the number of processes, all of which have to come here; the main
    one writes. No random state is stored: every generator is made from the seed and the iteration.
    """
    policy, main = state.policy, state.team.main
    weights = {n: p for group in policy.parameters_by_owner() for n, p in group.items()}
    moments = {
        f"{i}.{name}": tensor
        for i, entry in state.optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    weights, moments = _plain(weights, main), _plain(moments, main)
    if not main:
        return
    progress = {"iteration": state.iteration, "seconds": state.seconds, "base": policy.base}
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    trajectory.write_atomic(temporary / "weights.safetensors", save(weights))
    trajectory.write_atomic(temporary / "optimizer.safetensors", save(moments))
    trajectory.write_atomic(temporary / "progress.json", json.dumps(progress).encode())
    if policy.lora_rank:
        save_adapter(policy, temporary / "adapter", weights)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in sorted(folder.parent.glob("[0-9]*"))[:-2]:
        shutil.rmtree(old)


class Checkpoint(NamedTuple):
    """What a checkpoint's files say."""

    weights: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]
    progress: dict[str, Any]


# What reading a file may raise that was cut off, or is not there.
DAMAGE = (OSError, SafetensorError, ValueError, KeyError)


def read_checkpoint(folder: Path) -> Checkpoint:
    """All of a checkpoint, or one of `DAMAGE`."""
    progress = json.loads((folder / "progress.json").read_text())
    progress["iteration"], progress["seconds"]
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        moments[int(index)][key] = tensor
    return Checkpoint(load_file(folder / "weights.safetensors"), dict(moments), progress)


def load_checkpoint(state: State, saved: Checkpoint, folder: Path) -> None:
    """Put a checkpoint into a freshly set up state, whatever the number of processes.

    Raises:
        ValueError: If it is of another model.
    """
    policy = state.policy
    base = saved.progress.get("base", policy.base)
    if policy.lora_rank and base != policy.base:
        raise ValueError(
            f"{folder} is an adapter of another base model: {base!r}, but the model is "
            f"{policy.base!r}"
        )
    mine = {n: p for group in policy.parameters_by_owner() for n, p in group.items()}
    theirs = {name: tuple(weight.shape) for name, weight in saved.weights.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in mine.items()}
    if theirs != shapes:
        odd = sorted(n for n in theirs | shapes if theirs.get(n) != shapes.get(n))[:3]
        raise ValueError(f"{folder} does not fit this model: weights differ in {odd}, …")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(spread_like(saved.weights[name], parameter))
    order = list(mine.values())  # as the optimiser got them
    moments = {
        i: {k: spread_like(v, order[i]) if v.ndim else v for k, v in entry.items()}
        for i, entry in saved.moments.items()
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.iteration, state.seconds = saved.progress["iteration"], saved.progress["seconds"]


def _plain(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors in one piece on the CPU; processes that do not keep them only help to."""
    plain = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            plain[name] = whole.cpu().contiguous()
    return plain
