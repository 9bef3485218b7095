"""How fast credit is, next to loops over elements in the style of the published code.

Both sides compute the same numbers, which is checked before anything is timed. They take turns on
the same inputs in one run, and the fastest repetition of each counts. Results go to
``results/credit.json`` and into the table of ``README.md``, both beside this file.

The loops are our own, kinder than the originals: one pass over the turns where those nest three
levels deep, and masks are given where those decode every token to find them.
"""

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

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


def loop_credit(grid: TurnGrid, values: Values) -> torch.Tensor:
    """High, low and switch advantages one number at a time, straight from the equations."""
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


def loop_turns(turns: pd.DataFrame) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Credit of a table's rows [level, traj, turn], and where each row is, by loops."""
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
    return loop_credit(grid, values), where


def loop_step(turns: pd.DataFrame, level: torch.Tensor, by_token: bool) -> torch.Tensor:
    """From the table to per-token advantages, row by row or token by token."""
    credit, where = loop_turns(turns)
    out = torch.zeros(level.shape)
    for row, (b, t) in enumerate(where):
        if by_token:
            for j, k in enumerate(level[row].tolist()):
                if k != NO_LEVEL:
                    out[row, j] = credit[k, b, t]
        else:
            for k in range(len(LEVELS)):
                out[row] += credit[k, b, t] * (level[row] == k)
    return out


def scan_step(turns: pd.DataFrame, level: torch.Tensor) -> torch.Tensor:
    grid, values, cell = table_to_grid(turns, CONFIG)
    return per_token(estimate(grid, values, CONFIG), cell, level)


# ---------------------------------------------------------------------------------- measuring


def fastest(ways: dict[str, Callable], seconds: float) -> dict[str, float]:
    """Seconds of each way's fastest repetition; taking turns, so that all meet the same machine."""
    best = dict.fromkeys(ways, math.inf)
    spent = dict.fromkeys(ways, 0.0)
    while any(s < seconds for s in spent.values()):
        for name, run in ways.items():
            if spent[name] < seconds:
                start = time.perf_counter()
                run()
                took = time.perf_counter() - start
                best[name], spent[name] = min(best[name], took), spent[name] + took
    return best


def size_of(*containers: tuple) -> int:
    """Bytes of the tensors in a grid or in values."""
    return sum(x.nbytes for c in containers for x in c if x is not None)


def peak_memory(run: Callable) -> int | None:
    """Bytes that the process needs at most while it runs, beyond what it holds before (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before)


def on_cpu() -> dict:
    """Turn-level credit and the whole step at the published size, and growth with size."""
    grid, values = random_grid(TRAJ, TURN)
    torch.testing.assert_close(
        scan_credit(grid, values), loop_credit(grid, values), atol=2e-5, rtol=0
    )
    ways = {"loops": loop_credit, "library": scan_credit}
    result = {"turn level": fastest({k: partial(f, grid, values) for k, f in ways.items()}, 2)}
    turns, level = random_table()
    steps = {
        "loops, row by row": partial(loop_step, turns, level, by_token=False),
        "loops, token by token": partial(loop_step, turns, level, by_token=True),
        "library": partial(scan_step, turns, level),
    }
    expected = steps["library"]()
    for run in steps.values():
        torch.testing.assert_close(run(), expected, atol=2e-5, rtol=0)
    result["whole step"] = fastest(steps, 3)
    result["sizes"] = []
    for size in SIZES:
        grid, values = random_grid(size // TURN, TURN)
        ways = {"library": partial(estimate, grid, values, CONFIG)}
        if size <= LOOPS_UP_TO:
            ways["loops"] = partial(loop_credit, grid, values)
        row = {"turns": size} | fastest(ways, 1)
        row["memory over inputs"] = None
        if size == SIZES[-1] and (peak := peak_memory(ways["library"])) is not None:
            row["memory over inputs"] = peak / size_of(grid, values)
        result["sizes"].append(row)
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
        )  # fmt: skip
        read = (grid.reward, grid.boundary, grid.terminated, grid.length, *values)
        moved = size_of(read, kernel())
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        row = {"turns": size, "bytes moved": moved, "launches": launches(kernel)}
        row |= {"kernel": by_events(kernel), "copy": by_events(lambda: target.copy_(source))}
        row["hae"] = by_events(partial(hae, grid, values, CONFIG))
        if size <= LOOPS_UP_TO:
            start = time.perf_counter()
            expected = loop_credit(grid, values)
            row["loops"] = time.perf_counter() - start
            credit = hae(grid, values, CONFIG)
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
    turn, step = cpu["turn level"], cpu["whole step"]
    lines = [
        f"Measured on {result['machine']}, torch {result['torch']}, one thread.", "",
        f"| {TRAJ} trajectories × {TURN} turns × {TOKEN} tokens | loops | library | ratio |",
        "|---|---|---|---|",
        row_of("turn-level credit", turn["loops"], turn["library"]),
        row_of("table to tokens, loops row by row", step["loops, row by row"], step["library"]),
        row_of("table to tokens, loops token by token", step["loops, token by token"],
               step["library"]),
        "", "| turns | loops | library | ratio | library per turn |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in cpu["sizes"]:
        each = f" {row['library'] / row['turns'] * 1e9:,.0f} ns |"
        lines.append(row_of(f"{row['turns']:,}", row.get("loops"), row["library"]) + each)
    if (memory := cpu["sizes"][-1]["memory over inputs"]) is not None:
        lines += ["", f"At {SIZES[-1]:,} turns the library needs at its peak {memory:.1f} times the "
                  "memory of its inputs, results included."]  # fmt: skip
    lines += ["", "| trajectories × turns | loop | doubling | chosen |", "|---|---|---|---|"]
    for row in cpu["methods"]:
        shape = " × ".join(map(str, row["shape"]))
        lines.append(f"| {shape} | {ms(row['loop'])} | {ms(row['doubling'])} | {row['chosen']} |")
    if not result["gpu"]:
        return "\n".join([*lines, "", "No GPU was there: the kernel has not been timed."])
    lines += ["", "| turns on the GPU | launches | kernel | copy of as many bytes | kernel ÷ copy | "
              "`hae`, checks included | loops on the GPU |", "|---|---|---|---|---|---|---|"]  # fmt: skip
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
    gpu = torch.cuda.is_available()
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result = {
        "machine": machine + (f", {torch.cuda.get_device_name()}" if gpu else ""),
        "torch": torch.__version__, "cpu": on_cpu(), "gpu": on_gpu() if gpu else [],
    }  # fmt: skip
    text = report(result)
    print(text)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "credit.json").write_text(json.dumps(result, indent=1) + "\n")
    readme = HERE / "README.md"
    pattern = r"(<!-- credit.py -->\n).*(<!-- end -->)"
    updated = re.sub(pattern, rf"\1\n{text}\n\n\2", readme.read_text(), count=1, flags=re.DOTALL)
    readme.write_text(updated)


if __name__ == "__main__":
    main()
