"""Generated games are winnable, reproducible and split by room; the expert plays by reading."""

import gzip
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hiper_lab.envs.games import (
    HORIZONS,
    LONG_TASK_TYPES,
    PLAN_TURNS,
    SIZES,
    SPLITS,
    TASK_TYPES,
    WORDING,
    Expert,
    generate_game,
    plan_lengths,
    walkthrough,
)
from hiper_lab.envs.household import LONG_TASKS, TASKS, HouseholdEnv, World

SHARED = Path(os.environ.get("HIPER_SHARED", Path(__file__).parents[1].with_name("shared")))


def episode(env: HouseholdEnv, expert: Expert) -> tuple[bool, list[tuple[bool, str, str]]]:
    """Let the expert play one episode; returns whether it won, and its turns."""
    observation, info = env.reset()
    turns, terminated, truncated = [], False, False
    while not (terminated or truncated):
        turns.append(expert.act(observation, info))
        assert turns[-1][2] in info["admissible"]
        observation, _, terminated, truncated, info = env.step(turns[-1][2])
    return terminated, turns


@pytest.mark.parametrize("task_type", TASK_TYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_walkthrough_wins_at_its_last_command(size, task_type):
    for seed in range(9):
        split = SPLITS[seed % 3]
        game = json.loads(json.dumps(generate_game(seed, split=split, size=size,
                                                   task_type=task_type)))
        assert game["solvable"] and len(game["walkthrough"]) in PLAN_TURNS
        meta = game["meta"]
        assert meta == {"task_type": task_type, "split": split, "seed": seed, "size": size,
                        "room": meta["room"]}
        env = HouseholdEnv(game)
        assert env.world.goal.task_type == task_type
        _, info = env.reset()
        for command in game["walkthrough"]:
            assert not info["won"] and command in info["admissible"]
            _, reward, terminated, _, info = env.step(command)
        assert terminated and reward == 1.0


@pytest.mark.parametrize("size", SIZES)
def test_games_of_each_horizon_have_plans_of_its_length(size):
    """Every plan is played to its win while generating; here the types and lengths are seen."""
    for turns in HORIZONS.values():
        lengths, types = set(), set()
        for seed in range(40):
            game = generate_game(seed, split=SPLITS[seed % 3], size=size, turns=turns)
            assert len(game["walkthrough"]) in turns
            assert len(game["walkthrough"]) in plan_lengths(game["meta"]["task_type"])
            goal = World.from_game(game).goal
            assert goal.task_type == game["meta"]["task_type"]
            assert (goal.treatment, goal.count) == (TASKS | LONG_TASKS)[goal.task_type]
            lengths.add(len(game["walkthrough"]))
            types.add(goal.task_type)
        assert types <= set(LONG_TASK_TYPES if turns.start > 10 else TASK_TYPES) and len(types) > 3
        assert len(lengths) >= 3


def test_any_length_of_plan_is_one_that_the_formula_allows():
    for task_type in (*TASK_TYPES, *LONG_TASK_TYPES):
        for seed in range(12):
            game = generate_game(seed, size=SIZES[seed % 3], task_type=task_type,
                                 turns=range(1, 99))
            assert len(game["walkthrough"]) in plan_lengths(task_type)


def shortest(env: HouseholdEnv, limit: int) -> int:
    """The fewest commands that win, by trying all of them (breadth first)."""
    env.reset()
    layer = {env.snapshot()._replace(turn=0, taken=frozenset())}
    seen = set(layer)
    for turns in range(1, limit + 1):
        reached = set()
        for state in layer:
            for command in env.restore(state)["admissible"]:
                if not command.startswith(("help", "look", "inventory", "examine", "close")):
                    env.restore(state)
                    if env.step(command)[2]:
                        return turns
                    reached.add(env.snapshot()._replace(turn=0, taken=frozenset()))
        layer = reached - seen
        seen |= layer
    return limit + 1


@pytest.mark.parametrize("turns", [range(4, 7), range(7, 8)])
def test_the_walkthrough_is_a_shortest_plan(turns):
    for seed in range(10 if turns.stop == 7 else 3):
        game = generate_game(seed, turns=turns)
        plan = len(game["walkthrough"])
        assert shortest(HouseholdEnv(game, None), plan) == plan


@pytest.mark.parametrize(("size", "receptacles", "objects"), [
    ("small", range(6, 9), range(6, 11)), ("medium", range(12, 17), range(12, 21)),
    ("full", range(7, 29), range(16, 33))])
def test_sizes_are_kept_and_objects_lie_where_they_fit(size, receptacles, objects):
    shared = set()
    for seed in range(40):
        world = World.from_game(generate_game(seed, size=size))
        assert len(world.receptacles) in receptacles and len(world.start.inside) in objects
        assert world.traits["openable"]
        shared |= {len(here) for here in world.served.values()}
        for i, r in world.start.inside:
            assert i in world.traits["toggleable"] or (world.types[r], world.types[i]) in world.fits
        assert all(name.startswith(world.types[i]) for i, name in world.names.items())
    assert (max(shared) > 1) == (size == "full")


def test_the_task_is_worded_as_in_alfworld():
    for seed in range(60):
        game = generate_game(seed)
        goal = World.from_game(game).goal
        sentences = [text.format(o=goal.object, r=goal.lamp or goal.receptacle) + "."
                     for text in WORDING[goal.task_type]]
        line = re.search(r'"rhs": "Your task is to: (.*)"\n', game["grammar"])
        assert line[1] in sentences


def test_a_room_is_a_fixed_layout_and_unseen_rooms_are_held_out():
    rooms, layouts = {split: set() for split in SPLITS}, {}
    for seed in range(150):
        for split in SPLITS:
            game = generate_game(seed, split=split)
            room, world = game["meta"]["room"], World.from_game(game)
            rooms[split].add(room)
            assert layouts.setdefault(room, world.points) == world.points
    assert not rooms["unseen"] & (rooms["train"] | rooms["seen"])
    assert rooms["train"] & rooms["seen"] and len(rooms["unseen"]) == 24
    assert generate_game(1, split="train") != generate_game(1, split="seen")


def test_the_same_arguments_give_the_same_game_and_play_in_any_process():
    code = ("from tests.test_games import *;"
            "games = [generate_game(s, size=z) for s in range(6) for z in SIZES];"
            "envs = [HouseholdEnv(game) for game in games];"
            "plays = [episode(e, Expert(e, random.Random(0), 0.3)) for e in envs];"
            "print(json.dumps([games, plays]))")
    said = {subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True).stdout
            for seed in ("1", "2")}
    assert len(said) == 1
    games, _ = json.loads(said.pop())
    assert games[0] == generate_game(0)


def test_small_games_their_text_and_the_expert_stay_what_the_embedded_model_was_trained_on():
    """The digest is of 200 games and of an erring expert's episodes in them, as first released."""
    digest = hashlib.sha256()
    for seed in range(200):
        game = generate_game(seed, split=SPLITS[seed % 3],
                             task_type=(*TASK_TYPES, None)[seed % 7])
        env = HouseholdEnv(game)
        expert = Expert(env, random.Random(seed), 0.2)
        observation, info = env.reset()
        told, over = [json.dumps(game), observation], False
        while not over:
            turn = expert.act(observation, info)
            observation, reward, terminated, truncated, info = env.step(turn[2])
            told += [turn, observation, info["admissible"], reward]
            over = terminated or truncated
        digest.update(json.dumps(told).encode())
    assert digest.hexdigest() == "38d43f70e86e4423db9c192bfe02aa548ce248e9f44c311b86fa9039a578c37c"


@pytest.mark.parametrize(("arguments", "message"), [
    ({"seed": "0"}, "seed: saw '0', expected an int"),
    ({"seed": 0, "split": "test"}, "split: saw 'test', expected one of"),
    ({"seed": 0, "size": "tiny"}, "size: saw 'tiny', expected one of"),
    ({"seed": 0, "task_type": "cook"}, "task_type: saw 'cook', expected one of"),
    ({"seed": 0, "turns": range(5, 5)}, r"turns: saw range\(5, 5\), expected a range of plan"),
    ({"seed": 0, "turns": 5}, "turns: saw 5, expected a range of plan lengths, not empty"),
    ({"seed": 0, "turns": range(30, 40)}, "found no small game of any task with a plan that long"),
    ({"seed": 0, "task_type": "pick_and_place_simple", "turns": range(9, 12)},
     "found no small game of pick_and_place_simple with a plan that long, expected for instance"),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_game(**arguments)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_the_expert_wins_every_small_game(task_type, split):
    for seed in range(4):
        game = generate_game(seed, split=split, task_type=task_type)
        env = HouseholdEnv(game, max_turns=30)
        won, turns = episode(env, Expert(env, random.Random(seed)))
        assert won and len(turns) >= len(game["walkthrough"])
        switches, subgoals = [turn[0] for turn in turns], [turn[1] for turn in turns]
        assert switches == [a != b for a, b in zip(subgoals, ["", *subgoals], strict=False)]
        goal = env.world.goal
        assert subgoals[0] == f"find a {goal.object}"
        assert subgoals[-1] in (f"turn on the {goal.lamp}",
                                f"put the {goal.object} in the {goal.receptacle}")
        assert not goal.treatment or f"{goal.treatment} the {goal.object}" in subgoals


@pytest.mark.parametrize("task_type", LONG_TASK_TYPES)
def test_the_expert_wins_long_games(task_type):
    for seed in range(3):
        game = generate_game(seed, size=SIZES[seed], task_type=task_type, turns=range(11, 21))
        env = HouseholdEnv(game, max_turns=120)
        won, turns = episode(env, Expert(env, random.Random(seed)))
        assert won and len(turns) >= len(game["walkthrough"])
        won, _ = episode(HouseholdEnv(game, 200), Expert(env, random.Random(seed), 0.15))
        assert won


def test_the_expert_knows_only_what_it_has_read():
    """Made for one game, it wins another one: same room and goal, but all objects moved."""
    for seed in range(20):
        game = generate_game(seed, task_type="pick_and_place_simple")
        world = World.from_game(game)
        target = next(i for i in world.types if world.types[i] == world.goal.object)
        places = [r for r in world.receptacles if world.types[r] != world.goal.receptacle]
        home = random.Random(seed).choice(places)
        moved = re.sub(r"\(inReceptacle \w+ \w+\)", "", game["pddl_problem"]).replace(
            "(:init", f"(:init (inReceptacle {target} {home})")
        env = HouseholdEnv({**game, "pddl_problem": moved}, max_turns=30)
        assert episode(env, Expert(HouseholdEnv(world), random.Random(seed)))[0]


@pytest.mark.parametrize("mistake_rate", [0.2, 0.5, 1.0])
def test_the_expert_recovers_from_its_mistakes(mistake_rate):
    won, wrong = 0, 0
    for seed in range(30):
        env = HouseholdEnv(generate_game(seed, size=SIZES[seed % 3]), max_turns=80)
        success, turns = episode(env, Expert(env, random.Random(seed), mistake_rate))
        won += success
        wrong += sum(turn[0] for turn in turns) > 3
    assert won == 30 if mistake_rate == 0.2 else won >= 27 if mistake_rate == 0.5 else won < 15
    assert wrong


def test_a_mistake_rate_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="mistake_rate: saw 1.5"):
        Expert(HouseholdEnv(generate_game(0)), random.Random(0), 1.5)


def test_the_expert_and_the_plan_win_the_recorded_games():
    path = SHARED / "data" / "alfworld_games.json.gz"
    if not path.exists():
        pytest.skip(f"no recordings at {path}; set HIPER_SHARED to the folder that has data/")
    for recorded in json.loads(gzip.decompress(path.read_bytes()))["games"]:
        env = HouseholdEnv(recorded["game"], max_turns=150)
        assert episode(env, Expert(env, random.Random(0)))[0]
        assert len(walkthrough(env.world)) <= len(recorded["walkthrough"])
