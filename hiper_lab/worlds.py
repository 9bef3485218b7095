"""The environments of a run, by its configuration.

Left out on purpose: the environments themselves (see envs).
"""

import math
import os
from functools import lru_cache, partial
from pathlib import Path

from hiper_lab.config import TrainConfig
from hiper_lab.envs.alfworld import AlfworldEnv
from hiper_lab.envs.games import HORIZONS, PLAN_TURNS, TASK_TYPES, generate_game
from hiper_lab.envs.household import HouseholdEnv, find_games, load_game
from hiper_lab.envs.pool import EnvPool
from hiper_lab.envs.shop import Shop, embedded_shop
from hiper_lab.envs.webshop import WebShopEnv


def make_envs(
    config: TrainConfig, split: str, start: int, count: int, copies: int = 1
) -> tuple[list, list[str]]:
    """``count`` environments of a split and their names, from number ``start`` of an endless list.

    Each game comes ``copies`` times in a row.

    Raises:
        FileNotFoundError: If the files of ``alfworld`` or ``webshop`` are not there.
        ValueError: If they are broken, or have no such split.
    """
    tasks = config.env_tasks or TASK_TYPES
    numbers = range(start, start + math.ceil(count / copies))
    if config.env == "household":
        if config.env_horizon != "any" and not config.env_tasks:
            tasks = (None,)  # drawn among those that can be so long
        games = [
            generate_game(
                k, split=split, size=config.env_size, task_type=tasks[k % len(tasks)],
                turns=HORIZONS.get(config.env_horizon, PLAN_TURNS),
            )
            for k in numbers
        ]  # fmt: skip
        names = [f"{split}/{config.env_size}/{k}" for k in numbers]
    elif config.env.startswith("alfworld"):
        folder = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}[split]
        paths = _alfworld_games(config.env_path, folder, tasks)
        chosen = [paths[k % len(paths)] for k in numbers]
        games, names = [load_game(path) for path in chosen], [str(p.parent.name) for p in chosen]
    else:
        shop = _shop(config.env_path)
        goals = shop.splits.get(split)
        if not goals:
            raise ValueError(f"no goals in split {split!r}, expected one of {sorted(shop.splits)}")
        games = [goals[k % len(goals)] for k in numbers]
        names = [f"{split}/{goal}" for goal in games]
    games, names = ([x for x in each for _ in range(copies)][:count] for each in (games, names))
    if config.env == "webshop":
        return [WebShopEnv(shop, config.max_turns, goal=k, reward="success") for k in games], names
    if config.env == "alfworld_engine":
        return EnvPool([partial(AlfworldEnv, game, config.max_turns) for game in games]).envs, names
    return [HouseholdEnv(game, config.max_turns) for game in games], names


def _alfworld_games(env_path: str, split: str, tasks: tuple[str, ...]) -> list[Path]:
    root = Path(env_path or os.environ.get("ALFWORLD_DATA", "")).expanduser()
    folders = [root / split, root / "json_2.1.1" / split]
    folder = next((f for f in folders if (env_path or str(root) != ".") and f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no ALFWorld games in {str(root)!r}: expected a folder {split!r} with game.tw-pddl "
            "files. Download them with `alfworld-download` and set env_path or $ALFWORLD_DATA"
        )
    paths = [p for p in find_games(folder) if any(task in str(p) for task in tasks)]
    if not paths:
        raise FileNotFoundError(f"no playable game of {tasks} under {folder}")
    return paths


@lru_cache(maxsize=1)
def _shop(env_path: str) -> Shop:
    """The embedded shop, or the one of WebShop's files in a folder: its small set, if it is there.

    Purchase prices are drawn with seed 0, so that they are the same in every run.
    """
    if not env_path:
        return embedded_shop()
    files = []
    for name in ("items_shuffle", "items_ins_v2"):
        found = sorted(Path(env_path).expanduser().glob(f"{name}*.json*"))
        small = [file for file in found if "_1000." in file.name]
        if not found:
            raise FileNotFoundError(
                f"no {name}*.json in {env_path!r}: expected a folder with WebShop's files "
                "items_shuffle_1000.json and items_ins_v2_1000.json, plain or gzipped; "
                "env_path '' is the embedded shop"
            )
        files.append((small or found)[0])
    return Shop.from_files(*files)
