"""The genuine engine and ours are one world: same text, same choices, same wins, step by step.

Without the extra "alfworld" only the written files are checked.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from functools import partial

import pytest

from hiper_lab import train
from hiper_lab.envs.alfworld import AlfworldEnv
from hiper_lab.envs.games import (
    LONG_TASK_TYPES,
    OFFICIAL_SPLITS,
    SPLITS,
    TASK_TYPES,
    TEXTS,
    complete_game,
    generate_game,
    write_games,
)
from hiper_lab.envs.household import HouseholdEnv, find_games, load_game
from hiper_lab.envs.pool import EnvPool, reset_all, step_all

genuine = pytest.mark.skipif(
    not importlib.util.find_spec("alfworld"), reason="the extra 'alfworld' is not installed"
)
WRONG = [
    "",
    "dance",
    "LOOK",
    " look ",
    "go  to fridge 1",
    "help",
    "inventory",
    "take apple 1",
    "put mug 1 in/on shelf 1",
    "examine mug 1",
    "open fridge 1",
    "close drawer 1",
    "use desklamp 1",
    "go to sinkbasin 1\n",
    "slice apple 1 with knife 1",
]
GAMES = 6  # of each type
STEPS = 46  # of each, after which the plan is played from a fresh start


def games(task_type: str) -> list[dict]:
    """Small games mostly; the last two are of larger sizes, whose rooms share standing points."""
    sizes = ["small"] * (GAMES - 2) + ["medium", "full"]
    return [
        generate_game(
            1000 + k, split=SPLITS[k % 3], size=size, task_type=task_type, turns=range(4, 21)
        )
        for k, size in enumerate(sizes)
    ]


def choose(rng: random.Random, admissible: list[str]) -> str:
    """Mostly what touches things, sometimes a walk, sometimes nonsense."""
    if rng.random() < 0.1:
        return rng.choice(WRONG)
    touching = [c for c in admissible if not c.startswith(("go to", "help", "look", "inventory"))]
    return rng.choice(touching if touching and rng.random() < 0.6 else admissible)


@genuine
@pytest.mark.slow
@pytest.mark.parametrize("task_type", [*TASK_TYPES, *LONG_TASK_TYPES[:5]])
def test_every_step_equals_the_genuine_engines(task_type):
    """66 games, at least 3,000 steps: 6 games of each of 11 types."""
    steps = 0
    for k, game in enumerate(games(task_type)):
        rng = random.Random(f"{task_type}/{k}")
        ours, theirs = HouseholdEnv(game, None), AlfworldEnv(game, None)
        for commands in (None, game["walkthrough"]):
            said = ours.reset()
            assert said == theirs.reset()
            info = said[1]
            for turn in range(STEPS if commands is None else len(commands)):
                command = commands[turn] if commands else choose(rng, info["admissible"])
                said = ours.step(command)
                steps += 1
                assert said == theirs.step(command), (game["meta"], command)
                info = said[-1]
                if info["won"]:
                    break
        assert info["won"]
    assert steps >= 276  # eleven times this are more than 3,000


@genuine
def test_what_lies_in_a_bowl_is_seen_but_cannot_be_taken():
    game = generate_game(0, task_type="pick_cool_then_place_in_recep")
    world = HouseholdEnv(game).world
    holder = next(
        i for i in sorted(world.traits["isreceptacleobject"]) if dict(world.start.inside)[i]
    )
    for inner in ("pen_bar_1", "pen_bar_2"):
        game["pddl_problem"] = game["pddl_problem"].replace(
            "(:init",
            f"(:init\n (objectType {inner} PenType) (pickupable {inner}) "
            f"(inReceptacleObject {inner} {holder})",
        )
        game["pddl_problem"] = game["pddl_problem"].replace(
            "(:objects", f"(:objects {inner} - object" + " PenType - otype" * (inner[-1] == "1")
        )
    where, name = dict(world.start.inside)[holder], world.names[holder]
    commands = [
        f"go to {world.names[where]}",
        f"open {world.names[where]}",
        f"take {name} from {world.names[where]}",
        f"examine {name}",
    ]
    ours, theirs = HouseholdEnv(game), AlfworldEnv(game)
    assert ours.reset() == theirs.reset()
    for command in commands:
        said = ours.step(command)
        assert said == theirs.step(command)
    assert said[0] == f"This is a normal {name}. In it, you see a pen 2, and a pen 1."


@genuine
def test_the_engine_gives_back_what_it_takes(capsys, monkeypatch):
    """sys.argv, sys.stdout, ALFWORLD_DATA, and its own functions; it also counts turns as we do."""
    import fast_downward

    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    argv, translate, stdout = sys.argv, fast_downward.pddl2sas, sys.stdout
    env = AlfworldEnv(generate_game(0), max_turns=2)
    with pytest.raises(RuntimeError, match="outside an episode"):
        env.step("look")
    with pytest.raises(RuntimeError, match="outside an episode"):
        env.snapshot()
    env.reset()
    assert env.step("look")[1:4] == (0.0, False, False)
    assert env.step("look")[1:4] == (0.0, False, True)
    with pytest.raises(RuntimeError, match="outside an episode"):
        env.step("look")
    assert (sys.argv, fast_downward.pddl2sas, sys.stdout) == (argv, translate, stdout)
    assert "ALFWORLD_DATA" not in os.environ and capsys.readouterr().out == ""


@genuine
def test_a_library_is_used_again_and_python_exits_cleanly(root):
    """Unloading it, as fast_downward.close_lib does, ends in a segmentation fault at exit."""
    code = (
        "from hiper_lab.envs.alfworld import AlfworldEnv\n"
        "from hiper_lab.envs.games import generate_game\n"
        "for k in range(5):\n    env = AlfworldEnv(generate_game(k)); env.reset()\n"
        "lines = [line for line in open('/proc/self/maps') if 'libdownward' in line]\n"
        "print(len({line.split()[5] for line in lines}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\n")  # the next game is made before one is free


@genuine
def test_each_game_of_a_pool_is_its_own():
    """AlfredTWEnv's own batches can silently be one environment many times over."""
    chosen = [generate_game(k) for k in range(4)]
    here = [HouseholdEnv(game) for game in chosen]
    with EnvPool([partial(AlfworldEnv, game) for game in chosen], workers=1) as pool:
        starts = reset_all(pool.envs, [None] * 4)
        assert starts == [env.reset() for env in here] and len({text for text, _ in starts}) == 4
        infos, rng = [info for _, info in starts], random.Random(0)
        for _ in range(8):
            texts = [rng.choice(info["admissible"]) for info in infos]
            said = step_all(pool.envs, texts)
            assert said == [env.step(text) for env, text in zip(here, texts, strict=True)]
            infos = [turn[-1] for turn in said]


@genuine
def test_training_in_the_genuine_engine_is_training_in_ours(tmp_path):
    write_games(tmp_path, [generate_game(k, split="train") for k in range(2)])
    played = {}
    for env in ("alfworld", "alfworld_engine"):
        config = train.TrainConfig.from_parameters({
            "env": env, "env_path": str(tmp_path), "iterations": 1, "warmup_iterations": 0,
            "episodes": 4, "group_size": 2, "max_turns": 5, "eval_games": 0,
        })  # fmt: skip
        *_, report = train.train(config)
        played[env] = [
            (t.game, [(turn.observation, turn.action, turn.reward) for turn in t.turns])
            for t in report.trajectories
        ]
    assert played["alfworld"] == played["alfworld_engine"]


@genuine
def test_broken_games_are_refused_before_the_engine_sees_them():
    game = generate_game(0)
    with pytest.raises(ValueError, match="expected a dict with text under 'pddl_problem'"):
        AlfworldEnv({"grammar": ""})
    with pytest.raises(ValueError, match="max_turns: saw 0"):
        AlfworldEnv(game, max_turns=0)
    for old, new in (("(pickupable", "(liftable"), (" - otype", " - kind"), ("(define", "(")):
        wrong = {**game, "pddl_problem": game["pddl_problem"].replace(old, new)}
        with pytest.raises(ValueError, match="the engine can't load it, .*expected PDDL"):
            AlfworldEnv(wrong)


@genuine
def test_the_texts_that_we_ship_are_alfworlds():
    (package,) = importlib.util.find_spec("alfworld").submodule_search_locations
    for name in ("alfred.pddl", "alfred.twl2"):
        assert (TEXTS / name).read_bytes() == open(f"{package}/data/{name}", "rb").read()


@genuine
def test_alfworlds_own_loader_and_expert_play_the_written_games(tmp_path):
    from hiper_lab.envs import alfworld

    alfworld._packages()
    from alfworld.agents.environment.alfred_tw_env import AlfredExpert, AlfredTWEnv

    chosen = [
        generate_game(k, split="unseen", task_type=task_type, turns=range(4, 21))
        for k, task_type in enumerate([*TASK_TYPES, LONG_TASK_TYPES[0]])
    ]
    written = write_games(tmp_path, chosen)
    split = str(tmp_path / "json_2.1.1" / "valid_unseen")
    config = {
        "env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
        "dataset": {"eval_ood_data_path": split, "num_eval_games": -1},
    }
    found = AlfredTWEnv(config, train_eval="eval_out_of_distribution").game_files
    assert sorted(found) == sorted(map(str, written[:-1]))  # not the long one, of unknown type
    env = AlfworldEnv(load_game(written[0]))
    with env._engine():
        textworld, pddl, demangler = alfworld._packages()
        expert = AlfredExpert(
            demangler(pddl(textworld.EnvInfos(admissible_commands=True, facts=True, won=True)))
        )
        expert.load(str(written[0]))
        state = expert.reset()
    assert state.feedback == env.reset()[0] and state["extra.expert_plan"]


# ----------------------------------------------------------------------------------- without it


def test_written_games_have_the_official_form_and_play_as_before(tmp_path):
    chosen = [
        generate_game(k, split=SPLITS[k % 3], task_type=task_type, turns=range(4, 21))
        for k, task_type in enumerate([*TASK_TYPES, *LONG_TASK_TYPES])
    ]
    written = write_games(tmp_path, chosen)
    assert sorted(written) == find_games(tmp_path)
    for path, game in zip(written, chosen, strict=True):
        root, split, task, trial, _ = path.relative_to(tmp_path).parts
        assert (root, split) == ("json_2.1.1", OFFICIAL_SPLITS[game["meta"]["split"]])
        facts = json.loads((path.parent / "traj_data.json").read_text())
        wanted, params = HouseholdEnv(game).world.goal, facts["pddl_params"]
        place = params["parent_target"] or params["toggle_target"]
        assert task == (
            f"{wanted.task_type}-{params['object_target']}-None-{place}-{game['meta']['room']}"
        )
        assert params["object_target"].lower() == wanted.object
        assert place.lower() == (wanted.receptacle or wanted.lamp)
        assert facts["task_id"] == trial and facts["task_type"] == wanted.task_type
        again = load_game(path)
        assert again == complete_game(game) and again["pddl_domain"].startswith(";; Specification")
        assert HouseholdEnv(again).reset() == HouseholdEnv(game).reset()
    assert write_games(tmp_path, chosen) == written  # the same games may be written again
    changed = {**chosen[0], "walkthrough": []}
    with pytest.raises(ValueError, match="game.tw-pddl: saw another game"):
        write_games(tmp_path, [changed])


@pytest.mark.parametrize("game", [None, {}, {"meta": 3}])
def test_only_generated_games_are_written(tmp_path, game):
    with pytest.raises(ValueError, match="expected one of generate_game, with 'meta'"):
        write_games(tmp_path, [game])


def test_alfworlds_notice_is_kept():
    assert "Copyright (c) 2020 Mohit Shridhar" in (TEXTS / "LICENSE").read_text()
