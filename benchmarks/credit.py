"""How fast credit is, next to loops over elements in the style of the published code.

Both sides compute the same numbers, which is checked before anything is timed. They take turns on
the same inputs in one run, and the fastest repetition of each counts, in seconds of one core (not
of the clock: others may use the machine).

    python benchmarks/credit.py --out benchmarks/results/credit.json

writes the numbers there and the tables into ``README.md`` beside this file.

The loops are our own, in two manners. `tensor_loops` go as the published code does: trajectories,
segments, turns, one level after the other, each number an element of a tensor. `float_loops` are as
good as such loops get: one pass for all levels, in Python floats. Masks are given to both, where
the original decodes every token to find them.
"""

import argparse
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from publishing import machine, publish

from hiper_lab import scan
from hiper_lab.credit import (
    LEVELS,
    CreditConfig,
    TurnGrid,
    Values,
    estimate,
    hae,
    per_token,
    table_to_grid,
)

HERE = Path(__file__).parent
CONFIG = CreditConfig.lab()
TRAJ, TURN, TOKEN = 128, 50, 512  # a batch of the published runs
SIZES = [10**k for k in range(2, 7)]
LOOPS_UP_TO = 10**5  # turns; beyond it the loops take a minute
NO_LEVEL = len(LEVELS)


def random_grid(traj: int, turn: int, seed: int = 0) -> tuple[TurnGrid, Values]:
    """Trajectories of mixed outcome with a switch about every fourth turn, in float32."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator)
    grid = TurnGrid.of(reward=(draw(traj, turn) < 0.1).float(), switch=draw(traj, turn) < 0.25)
    grid = grid._replace(terminated=draw(traj) < 0.5)
    return grid, Values(*(draw(traj, turn) for _ in range(3)), draw(traj))


def random_table(seed: int = 0) -> tuple[pd.DataFrame, torch.Tensor]:
    """The published batch as a shuffled table, and the level of each of its tokens.

    Of 512 tokens, 40 are decisions (8 switch, 16 subgoal, 16 action); the rest is padding.
    """
    rng = np.random.default_rng(seed)
    rows = TRAJ * TURN
    turns = pd.DataFrame({
        "traj": np.repeat([f"run {i}" for i in range(TRAJ)], TURN),
        "turn": np.tile(np.arange(TURN), TRAJ),
        "reward": rng.random(rows),
        "done": np.tile(np.arange(TURN) == TURN - 1, TRAJ),
        "switch": rng.random(rows) < 0.25,
        "valid": rng.random(rows) < 0.9,
        "subgoal": [f"find object {i}" for i in rng.integers(0, 9, rows)],
        **{name: rng.random(rows) for name in ("v_high", "v_low", "v_switch")},
    })  # fmt: skip
    level = torch.full((rows, TOKEN), NO_LEVEL, dtype=torch.int8)
    for name, start, end in (("switch", 0, 8), ("high", 8, 24), ("low", 24, 40)):
        level[:, start:end] = LEVELS.index(name)
    return turns.sample(frac=1, random_state=seed), level


# --------------------------------------------------------------------------------- both sides


def tensor_loops(grid: TurnGrid, values: Values) -> torch.Tensor:
    """High, low and switch advantages, level by level, from and into elements of tensors."""
    gamma, out = CONFIG.gamma, torch.zeros(3, *grid.reward.shape)
    for b in range(len(grid.length)):
        turns, start = int(grid.length[b]), 0
        segments = []
        for t in range(1, turns + 1):
            if t == turns or grid.boundary[b, t]:
                segments.append((start, t))
                start = t
        cut = torch.zeros(()) if grid.terminated[b] else values.final[b]
        arrivals, next_value, next_advantage = [], cut, torch.zeros(())
        for start, end in reversed(segments):
            arrivals.insert(0, next_value + CONFIG.lam_boundary * next_advantage)
            inside = torch.zeros(())
            for t in range(start, end):
                inside = inside + gamma ** (t - start) * grid.reward[b, t]
            weight = gamma ** (end - start)
            delta = inside + weight * next_value - values.high[b, start]
            next_advantage = delta + weight * CONFIG.lam_high * next_advantage
            next_value = values.high[b, start]
            out[0, b, start] = next_advantage
        for (start, end), arrival in zip(segments, arrivals, strict=True):
            advantage, next_value = torch.zeros(()), arrival
            for t in reversed(range(start, end)):
                delta = grid.reward[b, t] + gamma * next_value - values.low[b, t]
                advantage = delta + gamma * CONFIG.lam_low * advantage
                next_value = values.low[b, t]
                out[1, b, t] = advantage
        for (start, end), arrival in zip(segments, arrivals, strict=True):
            following = arrival
            for t in reversed(range(start, end)):
                following = grid.reward[b, t] + gamma * following
                out[2, b, t] = following - values.switch[b, t]
    return out


def float_loops(grid: TurnGrid, values: Values) -> torch.Tensor:
    """The same in a single pass, with Python floats in between."""
    gamma, out = CONFIG.gamma, torch.zeros(3, *grid.reward.shape)
    for b in range(len(grid.length)):
        final = 0.0 if grid.terminated[b] else float(values.final[b])
        value_high_next, high_next = final, 0.0  # V and advantage of the next boundary
        inside, weight = 0.0, 1.0  # reward and discount from here to that boundary
        value_next, return_next, low_next = final, final, 0.0
        for t in reversed(range(int(grid.length[b]))):
            reward = float(grid.reward[b, t])
            td_error = reward + gamma * value_next - float(values.low[b, t])
            low_next = td_error + gamma * CONFIG.lam_low * low_next
            return_next = reward + gamma * return_next
            inside, weight = reward + gamma * inside, gamma * weight
            value_next = float(values.low[b, t])
            out[1, b, t], out[2, b, t] = low_next, return_next - float(values.switch[b, t])
            if grid.boundary[b, t]:
                value_high = float(values.high[b, t])
                high = inside + weight * (value_high_next + CONFIG.lam_high * high_next)
                high -= value_high
                out[0, b, t] = high
                value_high_next, high_next, inside, weight = value_high, high, 0.0, 1.0
                value_next = return_next = value_high + CONFIG.lam_boundary * high
                low_next = 0.0
    return out


def scan_credit(grid: TurnGrid, values: Values) -> torch.Tensor:
    """The same from the library, with all its checks."""
    credit = estimate(grid, values, CONFIG)
    return torch.stack([credit.high, credit.low, credit.switch])


def loop_turns(turns: pd.DataFrame) -> tuple[TurnGrid, Values, list[tuple[int, int]]]:
    """A table as a grid, and where in it each row is, by loops."""
    columns = {name: turns[name].tolist() for name in turns}
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(columns["traj"]):
        rows.setdefault(name, []).append(row)
    shape, where = (len(rows), max(map(len, rows.values()))), [(0, 0)] * len(turns)
    grid = TurnGrid.of(reward=torch.zeros(shape), switch=torch.zeros(shape))
    values = Values(*(torch.zeros(shape) for _ in range(3)), torch.zeros(shape[0]))
    for b, members in enumerate(rows.values()):
        for t, row in enumerate(sorted(members, key=columns["turn"].__getitem__)):
            where[row] = b, t
            grid.reward[b, t] = columns["reward"][row]
            grid.boundary[b, t] = t == 0 or columns["switch"][row]
            for name, value in zip(("v_high", "v_low", "v_switch"), values[:3], strict=True):
                value[b, t] = columns[name][row]
        grid.terminated[b] = columns["done"][row]
    return grid, values, where


def loop_step(turns: pd.DataFrame, level: torch.Tensor, loops: Callable) -> torch.Tensor:
    """From the table to per-token advantages; the masked writes take a whole row at a time."""
    grid, values, where = loop_turns(turns)
    credit = loops(grid, values)
    out = torch.zeros(level.shape)
    for row, (b, t) in enumerate(where):
        for k in range(len(LEVELS)):
            out[row] += credit[k, b, t] * (level[row] == k)
    return out


def scan_step(turns: pd.DataFrame, level: torch.Tensor) -> torch.Tensor:
    grid, values, cell = table_to_grid(turns, CONFIG)
    return per_token(estimate(grid, values, CONFIG), cell, level)


# ---------------------------------------------------------------------------------- measuring


def fastest(ways: dict[str, Callable], seconds: float) -> dict[str, float]:
    """CPU seconds of each way's fastest repetition, taking turns, for ``seconds`` each."""
    best = dict.fromkeys(ways, math.inf)
    spent = dict.fromkeys(ways, 0.0)
    while any(s < seconds for s in spent.values()):
        for name, run in ways.items():
            if spent[name] < seconds:
                start = time.process_time()
                run()
                took = time.process_time() - start
                best[name], spent[name] = min(best[name], took), spent[name] + took
    return best


def size_of(*containers: tuple) -> int:
    """Bytes of the tensors in a grid or in values."""
    return sum(x.nbytes for c in containers for x in c if x is not None)


def memory_over_inputs() -> float:
    """Most memory that credit of the largest size needs at a time, in sizes of its inputs."""
    grid, values = random_grid(SIZES[-1] // TURN, TURN)
    estimate(*random_grid(2000, TURN), CONFIG)  # loads whatever is loaded once

    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    estimate(grid, values, CONFIG)
    return 1024 * (kilobytes("VmHWM") - before) / size_of(grid, values)


def in_fresh_process(flag: str) -> float | None:
    """The number this script prints for ``flag``, where freed memory really goes back."""
    if platform.system() != "Linux":
        return None
    command = [sys.executable, __file__, flag]
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return float(subprocess.run(command, env=environ, check=True, capture_output=True).stdout)


def on_cpu() -> dict:
    """Turn-level credit and the whole step at the published size, and growth with size."""
    grid, values = random_grid(TRAJ, TURN)
    turns, level = random_table()
    result = {}
    for name, ways in {
        "turn-level credit": {
            "tensor loops": partial(tensor_loops, grid, values),
            "float loops": partial(float_loops, grid, values),
            "library": partial(scan_credit, grid, values),
        },
        "table to tokens": {
            "tensor loops": partial(loop_step, turns, level, tensor_loops),
            "float loops": partial(loop_step, turns, level, float_loops),
            "library": partial(scan_step, turns, level),
        },
    }.items():
        expected = ways["library"]()
        for run in ways.values():
            torch.testing.assert_close(run(), expected, atol=2e-5, rtol=0)
        result[name] = fastest(ways, 3)
    result["sizes"] = []
    for size in SIZES:
        grid, values = random_grid(size // TURN, TURN)
        ways = {"library": partial(estimate, grid, values, CONFIG)}
        if size <= LOOPS_UP_TO:
            ways["loops"] = partial(tensor_loops, grid, values)
        result["sizes"].append({"turns": size} | fastest(ways, 1))
    result["memory over inputs"] = in_fresh_process("--memory")
    result["methods"] = []
    for shape in [
        (16, 50),
        (128, 50),
        (256, 50),
        (1024, 50),
        (20000, 50),
        (16, 1000),
        (1000, 1000),
    ]:
        b, c = torch.rand(shape), torch.rand(shape)
        ways = {m: partial(scan.reverse_scan, b, c, m) for m in ("loop", "doubling")}
        chosen = scan.choose_method(shape, b.device)
        result["methods"].append({"shape": shape, "chosen": chosen} | fastest(ways, 0.3))
    return result


def on_gpu() -> list[dict]:
    """One launch of the kernel, against the loops and against copying as many bytes."""
    from hiper_lab import scan_triton

    rows = []
    for size in (TRAJ * TURN, SIZES[-1]):
        grid, values = random_grid(size // TURN, TURN)
        grid = TurnGrid(*(x if x is None else x.cuda() for x in grid))
        values = Values(*(v.cuda() for v in values))
        kernel = partial(
            scan_triton.hae, grid.reward, grid.boundary, grid.terminated, grid.length, *values,
            gamma=CONFIG.gamma, lam_low=CONFIG.lam_low, lam_high=CONFIG.lam_high,
            lam_boundary=CONFIG.lam_boundary, truncation=CONFIG.truncation, value_form=False,
            low_boundary=False,
        )  # fmt: skip
        read = (grid.reward, grid.boundary, grid.terminated, grid.length, *values)
        moved = size_of(read, kernel())
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        row = {"turns": size, "bytes moved": moved, "launches": launches(kernel)}
        row |= {"kernel": by_events(kernel), "copy": by_events(partial(target.copy_, source))}
        row["hae"] = by_events(partial(hae, grid, values, CONFIG))
        if size <= LOOPS_UP_TO:
            same = TurnGrid(*(x if x is None else x.cpu() for x in grid))
            loops = partial(tensor_loops, same, Values(*(v.cpu() for v in values)))
            row |= fastest({"loops": loops}, 1)
            expected, credit = loops(), hae(grid, values, CONFIG)
            got = torch.stack([credit.high, credit.low, credit.switch]).cpu()
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
        rows.append(row)
    return rows


def by_events(run: Callable, repetitions: int = 50) -> float:
    """Seconds on the device, fastest of many."""
    run()
    best = math.inf
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def launches(run: Callable) -> int:
    """Kernels that one call starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profile.events())


# ----------------------------------------------------------------------------------- reporting


def report(result: dict) -> str:
    """The results as Markdown."""
    cpu = result["cpu"]
    lines = [
        f"Measured on {result['machine']}, torch {result['torch']}, one thread.", "",
        f"| {TRAJ} trajectories × {TURN} turns × {TOKEN} tokens | loops | library | ratio |",
        "|---|---|---|---|",
        *(row_of(f"{step}, against {loops}", cpu[step][loops], cpu[step]["library"])
          for step in ("turn-level credit", "table to tokens")
          for loops in ("tensor loops", "float loops")),
        "", "| turns | tensor loops | library | ratio | library per turn |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in cpu["sizes"]:
        each = f" {row['library'] / row['turns'] * 1e9:,.0f} ns |"
        lines.append(row_of(f"{row['turns']:,}", row.get("loops"), row["library"]) + each)
    if memory := cpu["memory over inputs"]:
        lines += ["", f"At {SIZES[-1]:,} turns the library needs, results included, at most "
                  f"{memory:.1f} times the memory of its inputs."]  # fmt: skip
    lines += ["", "| trajectories × turns | loop | doubling | chosen |", "|---|---|---|---|"]
    for row in cpu["methods"]:
        shape = " × ".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {ms(row['loop'])} | {ms(row['doubling'])} | {row['chosen']} |")
    if not result["gpu"]:
        return "\n".join([*lines, "", "No GPU was there: the kernel has not been timed."])
    lines += ["", "| turns on the GPU | launches | kernel | copy of as many bytes | ratio |"
              " `hae`, checked | loops on the CPU |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["gpu"]:
        loops = ms(row["loops"]) if "loops" in row else ""
        lines.append(
            f"| {row['turns']:,} | {row['launches']} | {ms(row['kernel'])} | {ms(row['copy'])} | "
            f"{row['kernel'] / row['copy']:.1f} | {ms(row['hae'])} | {loops} |"
        )
    return "\n".join(lines)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"


def row_of(name: str, loops: float | None, library: float) -> str:
    if loops is None:
        return f"| {name} | | {ms(library)} | |"
    return f"| {name} | {ms(loops)} | {ms(library)} | {loops / library:,.0f} |"


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the numbers here, and README.md's tables")
    parser.add_argument("--memory", action="store_true", help="print peak memory over inputs only")
    arguments = parser.parse_args()
    if arguments.memory:
        print(memory_over_inputs())
        return
    result = {
        "machine": machine(), "torch": torch.__version__,
        "gpu": on_gpu() if torch.cuda.is_available() else [], "cpu": on_cpu(),
    }  # fmt: skip
    text = report(result)
    print(text)
    if arguments.out:
        publish(result, arguments.out, "credit.py", text)


if __name__ == "__main__":
    main()
