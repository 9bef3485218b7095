"""How much faster HAE is as backward scans than as loops over turns, element by element.

Each line times all ways on the same random grid, in turns, and prints the fastest of several
repetitions with its ratio to the loops. That they agree is checked before anything is timed.
"""

import time
from functools import partial

import torch

from hiper_lab import credit, scan
from hiper_lab.credit import CreditConfig, TurnGrid, Values

CONFIG = CreditConfig.lab()
SHAPES = [(64, 24), (128, 50), (1024, 50), (4096, 64)]
LOOPS_UP_TO = 128 * 50  # turns; beyond it the element loops take seconds


def random_grid(traj: int, turn: int, seed: int = 0) -> tuple[TurnGrid, Values]:
    """Trajectories of mixed length and outcome with a switch about every fourth turn."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=generator)
    length = torch.randint(turn // 2, turn + 1, (traj,), generator=generator)
    real = torch.arange(turn) < length[:, None]
    switch = (draw(traj, turn) < 0.25) & real
    boundary = switch.clone()
    boundary[:, 0] = True
    grid = TurnGrid(
        reward=(draw(traj, turn) < 0.1).float() * real, switch=switch, boundary=boundary,
        valid=real, has_subgoal=real, same_subgoal=~boundary & real,
        terminated=draw(traj) < 0.5, length=length,
    )  # fmt: skip
    return grid, Values(*(draw(traj, turn) for _ in range(3)), draw(traj))


def element_loops(grid: TurnGrid, values: Values, config: CreditConfig) -> torch.Tensor:
    """HAE's high, low and switch advantages one number at a time, straight from the equations."""
    gamma, out = config.gamma, torch.zeros(3, *grid.reward.shape)
    for b in range(len(grid.length)):
        final = 0.0 if grid.terminated[b] else float(values.final[b])
        value_high_next, high_next = final, 0.0  # V and advantage of the next boundary
        inside, weight = 0.0, 1.0  # reward and discount from here to that boundary
        value_next, return_next, low_next = final, final, 0.0
        for t in reversed(range(int(grid.length[b]))):
            reward = float(grid.reward[b, t])
            td_error = reward + gamma * value_next - float(values.low[b, t])
            low_next = td_error + gamma * config.lam_low * low_next
            return_next = reward + gamma * return_next
            inside, weight = reward + gamma * inside, gamma * weight
            value_next = float(values.low[b, t])
            out[1, b, t], out[2, b, t] = low_next, return_next - float(values.switch[b, t])
            if grid.boundary[b, t]:
                value_high = float(values.high[b, t])
                high = inside + weight * (value_high_next + config.lam_high * high_next)
                high -= value_high
                out[0, b, t] = high
                value_high_next, high_next, inside, weight = value_high, high, 0.0, 1.0
                value_next = return_next = value_high + config.lam_boundary * high
                low_next = 0.0
    return out


def scans(method: str, grid: TurnGrid, values: Values) -> torch.Tensor:
    """The library's HAE with one method of `reverse_scan`."""
    credit.reverse_scan = partial(scan.reverse_scan, method=method)
    try:
        result = credit.hae(grid, values, CONFIG)
    finally:
        credit.reverse_scan = scan.reverse_scan
    return torch.stack([result.high, result.low, result.switch])


def fastest(ways: dict, repetitions: int) -> dict[str, float]:
    """Seconds of each way's fastest repetition; taking turns, so that all meet the same machine."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(repetitions):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    torch.set_num_threads(1)
    print("HAE on the CPU, one thread: milliseconds (speed relative to the first column)")
    for traj, turn in SHAPES:
        grid, values = random_grid(traj, turn)
        ways = {m: partial(scans, m, grid, values) for m in ("loop", "doubling", "auto")}
        results = {name: run() for name, run in ways.items()}
        if traj * turn <= LOOPS_UP_TO:
            slow = partial(element_loops, grid, values, CONFIG)
            ways, results["elements"] = {"elements": slow} | ways, slow()
        for name, result in results.items():
            torch.testing.assert_close(result, results["loop"], atol=2e-5, rtol=0, msg=name)
        best = fastest(ways, repetitions=3 if "elements" in ways else 10)
        first = next(iter(best.values()))
        columns = [f"{name} {s * 1e3:8.2f} ({first / s:6.1f}x)" for name, s in best.items()]
        print(f"{traj:5} x {turn:3}   " + "   ".join(columns))


if __name__ == "__main__":
    main()
