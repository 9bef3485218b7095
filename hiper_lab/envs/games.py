"""Games for :mod:`hiper_lab.envs.household` without ALFWorld's data: a generator and an expert.

A room is a fixed layout of receptacles, numbered like AI2-THOR's floor plans; a seed draws the
objects, their places and the task. The splits are ALFWorld's: ``train`` and ``seen`` share rooms
(with different games), ``unseen`` has rooms of its own.

A game is small; :func:`complete_game` adds the PDDL domain and grammar that only the genuine engine
reads, and :func:`write_games` writes folders in the official form.

Left out on purpose: physics (objects are drawn, not simulated), human wording and slicing tasks.
Scores on these games are not comparable with published ALFWorld results.

Source: types, affordances, goals and wording of ALFWorld (arXiv:2010.03768; MIT). The tasks of two
treated and of three objects are ours, in its language of goals.
"""

import json
import random
import re
from collections.abc import Iterable
from itertools import permutations, product
from pathlib import Path
from typing import NamedTuple

from hiper_lab.envs.household import (
    EFFECTS,
    LONG_TASKS,
    TASKS,
    TREATMENTS,
    HouseholdEnv,
    World,
)
from hiper_lab.trajectory import write_atomic

TASK_TYPES = tuple(TASKS)
LONG_TASK_TYPES = tuple(LONG_TASKS)
SPLITS = ("train", "seen", "unseen")
OFFICIAL_SPLITS = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}
SIZES = ("small", "medium", "full")
PLAN_TURNS = range(4, 11)  # the walkthrough is this long, unless another range is asked for
HORIZONS = {"short": range(4, 7), "middle": range(7, 11), "long": range(11, 21)}
TEXTS = Path(__file__).parent / "alfworld_texts"  # MIT, from the package alfworld
DRAWS = 2_000  # of a room and its objects, until one has a plan of the length asked for

# Which objects a receptacle can hold.
SURFACE = """AlarmClock Apple BaseballBat BasketBall Book Bowl Box Bread ButterKnife CD Candle
    CellPhone Cloth CreditCard Cup DishSponge Egg Fork HandTowel Kettle KeyChain Knife Ladle
    Laptop Lettuce Mug Newspaper Pan Pen Pencil PepperShaker Plate Pot Potato RemoteControl
    SaltShaker SoapBar SoapBottle Spatula Spoon SprayBottle Statue TennisRacket TissueBox
    ToiletPaper Tomato Vase Watch WateringCan WineBottle"""
SEAT = """BasketBall Book Box CellPhone Cloth CreditCard KeyChain Laptop Newspaper Pillow
    RemoteControl"""
DESK = """AlarmClock BasketBall Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup KeyChain
    Laptop Mug Newspaper Pen Pencil Plate RemoteControl SprayBottle Statue TennisRacket TissueBox
    ToiletPaper Vase Watch WateringCan WineBottle"""
HOLDS = {receptacle: tuple(objects.split()) for receptacle, objects in {
    "CounterTop": SURFACE, "DiningTable": SURFACE, "CoffeeTable": SURFACE, "SideTable": SURFACE,
    "Sofa": SEAT, "ArmChair": SEAT, "Ottoman": SEAT, "Dresser": DESK, "Desk": DESK + " SoapBottle",
    "Bed": "BaseballBat BasketBall Book CellPhone Laptop Newspaper Pillow TennisRacket",
    "Shelf": """AlarmClock Book Bowl Box CD Candle CellPhone Cloth CreditCard Cup DishSponge
        HandTowel Kettle KeyChain Mug Newspaper Pen Pencil PepperShaker Plate Pot RemoteControl
        SaltShaker SoapBar SoapBottle SprayBottle Statue TissueBox ToiletPaper Vase Watch
        WateringCan WineBottle""",
    "Cabinet": """Book Bowl Box CD Candle Cloth Cup DishSponge HandTowel Kettle Ladle Mug
        Newspaper Pan PepperShaker Plate Plunger Pot SaltShaker SoapBar SoapBottle SprayBottle
        TissueBox ToiletPaper Vase WateringCan WineBottle""",
    "Drawer": """Book ButterKnife CD Candle CellPhone Cloth CreditCard DishSponge Fork HandTowel
        KeyChain Knife Ladle Newspaper Pen Pencil PepperShaker RemoteControl SaltShaker SoapBar
        SoapBottle Spatula Spoon SprayBottle TissueBox ToiletPaper Watch WateringCan""",
    "Fridge": "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle",
    "Microwave": "Apple Bowl Bread Cup Egg Mug Plate Potato Tomato",
    "SinkBasin": """Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork HandTowel Kettle Knife
        Ladle Lettuce Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato""",
    "BathtubBasin": "Cloth DishSponge HandTowel SoapBar",
    "GarbageCan": """Apple Bread CD Cloth DishSponge Egg HandTowel Lettuce Newspaper Pen Pencil
        Potato SoapBar SoapBottle SprayBottle TissueBox ToiletPaper Tomato WineBottle""",
    "Toilet": """Candle Cloth DishSponge HandTowel Newspaper SoapBar SoapBottle SprayBottle
        TissueBox ToiletPaper""",
    "Safe": "CD CellPhone CreditCard KeyChain Statue Vase Watch",
    "StoveBurner": "Kettle Pan Pot", "CoffeeMachine": "Mug", "Toaster": "", "TVStand": "TissueBox",
    "LaundryHamper": "Cloth", "HandTowelHolder": "HandTowel", "TowelHolder": "Towel",
    "ToiletPaperHanger": "ToiletPaper",
}.items()}
TRAITS = {trait: objects.split() for trait, objects in {
    "heatable": "Apple Bread Cup Egg Mug Plate Potato Tomato",
    "coolable": "Apple Bowl Bread Cup Egg Lettuce Mug Pan Plate Pot Potato Tomato WineBottle",
    "cleanable": """Apple Bowl ButterKnife Cloth Cup DishSponge Egg Fork Kettle Knife Ladle Lettuce
        Mug Pan Plate Pot Potato SoapBar Spatula Spoon Tomato""",
    "sliceable": "Apple Bread Egg Lettuce Potato Tomato",
    "isReceptacleObject": "Bowl Box Cup Mug Pan Plate Pot",
    "toggleable": "DeskLamp FloorLamp",
    "openable": "Cabinet Drawer Fridge Microwave Safe",
}.items()}
LAMP_SPOTS = ("Desk", "SideTable", "Dresser", "CoffeeTable", "Shelf", "DiningTable", "TVStand")
RECEPTACLES = {"small": (6, 8), "medium": (12, 16)}  # how many; at "full" it depends on the room
OBJECTS = {"small": (6, 10), "medium": (12, 20), "full": (20, 32)}
SHARING = ("StoveBurner", "Drawer", "Cabinet")  # in full rooms, some pairs share a standing point
HELD_OUT = 6  # so many floor plans of each kind, the first, are for the split "unseen"


class Room(NamedTuple):
    """One kind of room; 30 floor plans, numbered from ``first``."""

    first: int
    always: str  # receptacles that every such room has
    maybe_small: str  # further receptacles to draw from in a small room
    maybe: str  # the same in larger rooms
    objects_small: str
    objects: str  # further ones in larger rooms
    full: tuple[int, int]  # how many receptacles at size "full"


ROOMS = {
    "kitchen": Room(
        1, "CounterTop Fridge Microwave SinkBasin Cabinet", "Cabinet Drawer GarbageCan DiningTable",
        "Cabinet " * 12 + "Drawer " * 6 + "StoveBurner " * 4 + """CounterTop CounterTop DiningTable
        GarbageCan CoffeeMachine Toaster Shelf SideTable""",
        "Mug Apple Plate Egg Potato Tomato Cup Bowl Lettuce Spoon",
        """Bread Pan Pot Fork Knife ButterKnife Spatula DishSponge SoapBottle SaltShaker
        PepperShaker Kettle Ladle WineBottle Vase Book""", (18, 28)),
    "living room": Room(
        201, "Sofa CoffeeTable SideTable Drawer", "Drawer ArmChair Shelf GarbageCan Dresser",
        "Drawer " * 6 + "Shelf " * 5 + """ArmChair ArmChair SideTable SideTable GarbageCan TVStand
        Dresser DiningTable Cabinet Cabinet Safe Ottoman""",
        "Book CellPhone CreditCard KeyChain Laptop Newspaper RemoteControl Pillow Vase Watch",
        "Statue Box TissueBox Plate Bowl WateringCan Pen Pencil Candle", (11, 18)),
    "bedroom": Room(
        301, "Bed Desk Drawer SideTable", "Drawer Shelf Dresser GarbageCan",
        "Drawer " * 6 + "Shelf " * 4 + """Dresser Safe GarbageCan ArmChair Cabinet SideTable
        LaundryHamper""",
        "Book CellPhone CreditCard KeyChain Laptop Pillow Pen CD AlarmClock Mug",
        "Pencil Bowl Box BaseballBat BasketBall TennisRacket Cloth Statue Vase TissueBox",
        (10, 16)),
    "bathroom": Room(
        401, "SinkBasin CounterTop Toilet Cabinet", "Cabinet Drawer GarbageCan Shelf",
        "Cabinet " * 4 + "Drawer " * 4 + """GarbageCan SinkBasin BathtubBasin HandTowelHolder
        TowelHolder ToiletPaperHanger Shelf""",
        "Cloth SoapBar SoapBottle SprayBottle ToiletPaper Candle HandTowel DishSponge",
        "TissueBox Plunger Towel", (7, 12)),
}
WITH_LAMP = ("living room", "bedroom")
TREATMENT_ROOMS = {"": tuple(ROOMS), "clean": ("kitchen", "bathroom"), "heat": ("kitchen",),
                   "cool": ("kitchen",)}
WORDING = {
    "pick_and_place_simple": ("put a {o} in {r}", "put some {o} on {r}"),
    "look_at_obj_in_light": ("look at {o} under the {r}", "examine the {o} with the {r}"),
    "pick_clean_then_place_in_recep": ("put a clean {o} in {r}",
                                       "clean some {o} and put it in {r}"),
    "pick_heat_then_place_in_recep": ("put a hot {o} in {r}", "heat some {o} and put it in {r}"),
    "pick_cool_then_place_in_recep": ("put a cool {o} in {r}", "cool some {o} and put it in {r}"),
    "pick_two_obj_and_place": ("put two {o} in {r}", "find two {o} and put them in {r}"),
    "pick_three_obj_and_place": ("put three {o} in {r}", "find three {o} and put them in {r}"),
} | {
    f"pick_{verb}_{number}_then_place_in_recep": (
        f"put {number} {adjective} {{o}} in {{r}}", f"{verb} {number} {{o}} and put them in {{r}}")
    for verb, adjective in (("clean", "clean"), ("heat", "hot"), ("cool", "cool"))
    for number in ("two", "three")
}
GRAMMAR = """grammar :: \"""
    {
        "task": [
            {
                "rhs": "Your task is to: UNKNOWN GOAL."
            }
        ]
    }
\""";
"""
_TYPES = "(objectType ?o {o}Type) (receptacleType ?r {r}Type)"
_PLACED = f"(exists (?r - receptacle) (exists (?o - object) (and %s{_TYPES}%s)))"
MARKS = {"clean": "isClean", "heat": "isHot", "cool": "isCool"}
GOALS = {  # ALFWorld's own, but for white space
    "pick_and_place_simple": _PLACED % ("(inReceptacle ?o ?r) ", ""),
    "look_at_obj_in_light":
        "(exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and "
        "(objectType ?ot {r}Type) (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l) "
        "(atLocation ?a ?l) (inReceptacle ?ot ?r)))\n"
        "    (exists (?o - object ?a - agent) (and (objectType ?o {o}Type) (holds ?a ?o)))",
} | {f"pick_{verb}_then_place_in_recep": _PLACED % (f"({verb}able ?o) ", f" ({mark} ?o) "
                                                   "(inReceptacle ?o ?r)")
     for verb, mark in MARKS.items()}


def _goal(task_type: str, target: str, destination: str) -> str:
    """The PDDL of a task. Of several objects, each is sought inside the condition on the others."""
    verb, count = (TASKS | LONG_TASKS)[task_type]
    text = GOALS.get(task_type, "")
    if not text:
        one = f"({verb}able ?o) {_TYPES} ({MARKS[verb]} ?o)" if verb else _TYPES
        for k in range(count, 0, -1):
            others = "".join(f"(not (= ?o{j} ?o{k})) " for j in range(1, k))
            this = re.sub(r"\?o\b", f"?o{k}", f"{one} (inReceptacle ?o ?r)")
            text = f"(exists (?o{k} - object) (and {others}{this}{text and ' ' + text}))"
        text = f"(exists (?r - receptacle) {text})"
    return text.format(o=target, r=destination)


def generate_game(seed: int, *, split: str = "train", size: str = "small",
                  task_type: str | None = None, turns: range = PLAN_TURNS) -> dict:
    """Draw a winnable game; the same arguments give the same game, everywhere.

    Args:
        seed: Draws the room, the objects and their places, and the task.
        split: One of SPLITS.
        size: One of SIZES: "small" has 6 to 8 receptacles and 6 to 10 objects of few types,
            "medium" 12 to 16 and 12 to 20, "full" as many as ALFWorld's rooms of that kind.
        task_type: One of TASK_TYPES or LONG_TASK_TYPES. None draws one that can have such a plan:
            of TASK_TYPES if ``turns`` begins at 10 or below, else of LONG_TASK_TYPES.
        turns: Lengths of plan to accept, for instance one of the tiers in HORIZONS. A task of one
            object takes 3 to 8, of two 8 to 15, of three 12 to 22.

    Returns:
        A game for HouseholdEnv and :func:`write_games`. ``walkthrough`` is a plan as long as
        ``turns`` says, played to its win; ``meta`` has task_type, split, room, seed and size.

    Raises:
        ValueError: If an argument is none of the above, or no game with such a plan is found.

    Example:
        >>> game = generate_game(3, split="unseen", task_type="pick_heat_then_place_in_recep")
        >>> game["meta"]["room"] in range(1, 7), len(game["walkthrough"]) in PLAN_TURNS
        (True, True)
    """
    for name, value, known in (
            ("split", split, SPLITS), ("size", size, SIZES),
            ("task_type", task_type, (*TASK_TYPES, *LONG_TASK_TYPES, None))):
        if value not in known:
            raise ValueError(f"{name}: saw {value!r}, expected one of {known}")
    if not isinstance(seed, int):
        raise ValueError(f"seed: saw {seed!r}, expected an int")
    if not isinstance(turns, range) or not turns:
        raise ValueError(f"turns: saw {turns!r}, expected a range of plan lengths, not empty")
    rng = random.Random(f"{split}/{size}/{task_type}/{seed}")
    pool = TASK_TYPES if turns.start <= 10 else LONG_TASK_TYPES
    pool = [task_type] if task_type else [t for t in pool if set(turns) & set(plan_lengths(t))]
    task_type = task_type or (rng.choice(pool) if pool else "")
    for _ in range(DRAWS if pool else 0):
        kind = rng.choice(_rooms(task_type))
        plans = range(HELD_OUT) if split == "unseen" else range(HELD_OUT, 30)
        room = ROOMS[kind].first + rng.choice(plans)
        layout = _layout(kind, room, size)
        drawn = _draw(task_type, kind, layout, size, rng)
        if drawn is None:
            continue
        target, destination, objects = drawn
        wording = rng.choice(WORDING[task_type]).format(o=target.lower(), r=destination.lower())
        goal = _goal(task_type, target, destination)
        game = {
            "pddl_domain": "",
            "grammar": GRAMMAR.replace("UNKNOWN GOAL", wording),
            "pddl_problem": _problem(f"plan_trial_G{room:03d}_{seed:06d}", layout, objects, goal),
            "solvable": True,
            "meta": {"task_type": task_type, "split": split, "room": room, "seed": seed,
                     "size": size},
        }
        world = World.from_game(game)
        game["walkthrough"] = walkthrough(world)
        if len(game["walkthrough"]) in turns:
            assert _wins(world, game["walkthrough"]), game["meta"]
            return game
    raise ValueError(f"turns: saw {turns}, but found no {size} game of {task_type or 'any task'} "
                     f"with a plan that long, expected for instance {HORIZONS}")


def plan_lengths(task_type: str) -> range:
    """The lengths that a plan can have: go, open, take, go, treat, go, open, move for each object.

    Opening is not always needed, treatment may happen where the object lies, and the destination
    is opened at most once.

    Example:
        >>> plan_lengths("pick_and_place_simple"), plan_lengths("pick_heat_two_then_place_in_recep")
        (range(4, 7), range(10, 16))
    """
    treatment, count = (TASKS | LONG_TASKS)[task_type]
    if task_type == "look_at_obj_in_light":
        return range(3, 6)  # go, open, take, go, use; object and lamp may lie at one place
    return range(count * (5 if treatment else 4), count * (7 if treatment else 5) + 2)


def walkthrough(world: World) -> list[str]:
    """A shortest plan of the plain kind, found with full knowledge; empty if there is none.

    Plain: each object is fetched, treated if need be and placed (or held under the lamp) before
    the next. Every choice of objects, appliance and destination is tried.
    """
    goal, types, names = world.goal, world.types, world.names
    where = dict(world.start.inside)
    pool = [i for i in sorted(where) if types[i] == goal.object]
    tools = [r for r in world.receptacles
             if goal.treatment and types[r] == TREATMENTS[goal.treatment][0]]
    ends = [i for i in sorted(types) if types[i] == (goal.lamp or goal.receptacle)]
    plans = []
    for objects, tool, end in product(permutations(pool, goal.count), tools or [""], ends):
        stops = []  # (receptacle, does it have to be open, command)
        for i in objects:
            stops.append((where[i], True, f"take {names[i]} from {names[where[i]]}"))
            if tool:
                stops.append((tool, False, f"{goal.treatment} {names[i]} with {names[tool]}"))
            stops.append((where[end], False, f"use {names[end]}") if goal.lamp
                         else (end, True, f"move {names[i]} to {names[end]}"))
        plan, at = [], world.start.point
        closed = world.traits["openable"] - {i for mark, i in world.start.marks if mark == "opened"}
        for receptacle, reach_in, command in stops:
            if world.points[receptacle] != at:
                at = world.points[receptacle]
                plan.append(f"go to {names[receptacle]}")
            if reach_in and receptacle in closed:
                closed -= {receptacle}
                plan.append(f"open {names[receptacle]}")
            plan.append(command)
        plans.append(plan)
    return min(plans, key=len, default=[])


def _wins(world: World, plan: list[str]) -> bool:
    """Whether every command is admissible and the last one, no earlier, wins."""
    env = HouseholdEnv(world, max_turns=None)
    _, info = env.reset()
    for command in plan:
        if info["won"] or command not in info["admissible"]:
            return False
        info = env.step(command)[-1]
    return info["won"]


def complete_game(game: dict) -> dict:
    """The game with what only the genuine engine reads: ALFWorld's domain and its whole grammar.

    A game that has a domain is returned as it is. The texts are ALFWorld's, see their LICENSE.
    """
    if game.get("pddl_domain"):
        return game
    task = World.from_game(game).task.removesuffix(".")
    grammar = (TEXTS / "alfred.twl2").read_text(encoding="utf-8").replace("UNKNOWN GOAL", task)
    return {**game, "grammar": grammar,
            "pddl_domain": (TEXTS / "alfred.pddl").read_text(encoding="utf-8")}


def write_games(folder: str | Path, games: Iterable[dict]) -> list[Path]:
    """Write generated games in the form of ALFWorld's own data, for its engine and any tool of it.

    ``folder`` may then be ALFWORLD_DATA. A game becomes
    ``json_2.1.1/SPLIT/TASK-OBJECT-None-PLACE-ROOM/TRIAL/game.tw-pddl`` with a traj_data.json beside
    it; the splits are called train, valid_seen and valid_unseen. ALFWorld's own loader skips
    LONG_TASK_TYPES, which it does not know.

    Returns:
        The path of each game.tw-pddl.

    Raises:
        ValueError: If a game was not made by :func:`generate_game`, or its place is taken.
    """
    written = []
    for game in games:
        if not isinstance(game, dict) or not isinstance(game.get("meta"), dict):
            seen = sorted(game) if isinstance(game, dict) else type(game).__name__
            raise ValueError(f"game: saw {seen}, expected one of generate_game, with 'meta'")
        meta, goal = game["meta"], World.from_game(game).goal
        spelled = {kind.lower(): kind for kind in
                   re.findall(r"(\w+)Type - [or]type", game["pddl_problem"])}
        target, place, lamp = (spelled.get(kind, "") for kind in
                               (goal.object, goal.receptacle, goal.lamp))
        trial = f"trial_G{meta['room']:03d}_{meta['size']}_{meta['seed']:06d}"
        path = (Path(folder) / "json_2.1.1" / OFFICIAL_SPLITS[meta["split"]]
                / f"{goal.task_type}-{target}-None-{place or lamp}-{meta['room']}" / trial)
        texts = {
            "game.tw-pddl": complete_game(game),
            "traj_data.json": {
                "task_id": trial, "task_type": goal.task_type,
                "pddl_params": {"object_target": target, "parent_target": place,
                                "toggle_target": lamp, "mrecep_target": "",
                                "object_sliced": False},
                "scene": {"floor_plan": f"FloorPlan{meta['room']}", "scene_num": meta["room"]},
                "turk_annotations": {"anns": []},
            },
        }
        for name, content in reversed(texts.items()):  # the game last: it says that all is there
            data = json.dumps(content, indent=1).encode()
            if (path / name).exists() and (path / name).read_bytes() != data:
                raise ValueError(f"{path / name}: saw another game, expected an empty folder")
            write_atomic(path / name, data)
        written.append(path / "game.tw-pddl")
    return written


def _rooms(task_type: str) -> tuple[str, ...]:
    """The kinds of room in which this task is possible."""
    if task_type == "look_at_obj_in_light":
        return WITH_LAMP
    return TREATMENT_ROOMS[(TASKS | LONG_TASKS)[task_type][0]]


def _layout(kind: str, room: int, size: str) -> list[tuple[str, str, str]]:
    """The receptacles of a room, (id, type, standing point): fixed for a room and size."""
    rng = random.Random(f"{room}/{size}")
    spec = ROOMS[kind]
    types, more = spec.always.split(), (spec.maybe_small if size == "small" else spec.maybe).split()
    rng.shuffle(more)
    types += more[:rng.randint(*RECEPTACLES.get(size, spec.full)) - len(types)]
    layout: list[tuple[str, str, str]] = []
    for what in sorted(types):
        point = _pddl(f"loc|{rng.randint(-20, 20)}|{len(layout)}|{rng.randrange(4)}|30")
        pair = size == "full" and what in SHARING and layout and layout[-1][1] == what
        if pair and rng.random() < 0.2:
            point = layout[-1][2]
        base = what.removesuffix("Basin")
        layout.append((_entity(base, rng) + (f"_bar_{what}" if base != what else ""), what, point))
    return layout


def _draw(task_type: str, kind: str, layout: list, size: str,
          rng: random.Random) -> tuple[str, str, list] | None:
    """Target type, destination or lamp type, and objects, (id, type, receptacle, point).

    None if the room does not suit the task.
    """
    by_type: dict[str, list] = {}
    for receptacle in layout:
        by_type.setdefault(receptacle[1], []).append(receptacle)
    objects: list[tuple[str, str, str, str]] = []

    def homes(what: str) -> list[str]:
        return [t for t in by_type if what in HOLDS[t]]

    def place(what: str, where: list[str]) -> None:
        receptacle, _, point = rng.choice(by_type[rng.choice(where)])
        objects.append((_entity(what, rng), what, receptacle, point))

    lamp = ""
    if kind in WITH_LAMP:
        lamp = rng.choice(TRAITS["toggleable"])
        place(lamp, [t for t in LAMP_SPOTS if t in by_type])
    vocabulary = ROOMS[kind].objects_small.split()
    if size != "small":
        vocabulary += ROOMS[kind].objects.split()
    treatment, count = (TASKS | LONG_TASKS)[task_type]
    appliance, trait, _ = TREATMENTS.get(treatment, ("", "", ""))
    pairs = [(o, t) for o in vocabulary if not trait or o in TRAITS[trait]
             for t in homes(o) if t.lower() != appliance]
    if task_type == "look_at_obj_in_light":
        pairs = [(o, lamp) for o in vocabulary]
    if not pairs:
        return None
    target, destination = rng.choice(pairs)
    elsewhere = [t for t in homes(target) if t != destination]
    if not elsewhere:
        return None
    for _ in range(count - 1 + rng.choice((1, 1, 2))):
        place(target, elsewhere)
    others = [o for o in vocabulary * 2 if o != target and homes(o)]
    for other in rng.sample(others, len(others))[:rng.randint(*OBJECTS[size]) - len(objects)]:
        place(other, homes(other))
    return target, destination, objects


def _entity(what: str, rng: random.Random) -> str:
    return _pddl("|".join([what] + [f"{rng.uniform(-3, 3):+06.2f}" for _ in range(3)]))


def _pddl(name: str) -> str:
    for sign, word in (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_")):
        name = name.replace(sign, word)
    return name


def _problem(name: str, layout: list, objects: list, goal: str) -> str:
    """A PDDL problem in the form of ALFWorld's game files."""
    layout, objects = sorted(layout), sorted(objects)
    rtypes, otypes = sorted({r[1] for r in layout}), sorted({o[1] for o in objects})
    start = _pddl("loc|-35|35|0|30")
    declared = ["agent1 - agent"]
    declared += [f"{t}Type - otype" for t in otypes] + [f"{t}Type - rtype" for t in rtypes]
    declared += [f"{o[0]} - object" for o in objects] + [f"{r[0]} - receptacle" for r in layout]
    declared += [f"{point} - location" for point in [*sorted({r[2] for r in layout}), start]]
    facts = [f"(atLocation agent1 {start})"]
    for r, kind, point in layout:
        facts += [f"(receptacleType {r} {kind}Type)", f"(receptacleAtLocation {r} {point})"]
        facts += [f"(openable {r})"] if kind in TRAITS["openable"] else []
    facts += [f"(canContain {r}Type {o}Type)" for r in rtypes for o in otypes if o in HOLDS[r]]
    for o, kind, r, point in objects:
        facts += [f"(objectType {o} {kind}Type)", f"(inReceptacle {o} {r})",
                  f"(objectAtLocation {o} {point})"]
        facts += [] if kind in TRAITS["toggleable"] else [f"(pickupable {o})"]
        facts += [f"({trait} {o})" for trait, kinds in TRAITS.items() if kind in kinds]
    return (f"(define (problem {name})\n(:domain alfred)\n(:objects\n  " + "\n  ".join(declared)
            + "\n)\n(:init\n  " + "\n  ".join(facts)
            + f"\n)\n(:goal\n  (and\n    {goal}\n  )\n)\n)\n")


class Expert:
    """Plays a game by searching, with subgoals: the demonstrator for behaviour cloning.

    It knows the goal and the receptacles; where objects are it learns only from what it reads.
    Mistakes make demonstrations that can be improved on; it recovers from them.

    Args:
        env: The env it will play; only the goal, types and names are read from it.
        rng: Draws the order of the search and the mistakes.
        mistake_rate: Chance per turn of a random admissible action, in [0, 1]; with half that
            chance, independently, the turn's subgoal is a wrong one.

    Raises:
        ValueError: If ``mistake_rate`` is not in [0, 1].

    Example:
        >>> env = HouseholdEnv(generate_game(0, task_type="pick_clean_then_place_in_recep"))
        >>> expert = Expert(env, random.Random(0))
        >>> switch, subgoal, action = expert.act(*env.reset())
        >>> switch, subgoal == f"find a {env.world.goal.object}", action.startswith("go to ")
        (True, True, True)
    """

    def __init__(self, env: HouseholdEnv, rng: random.Random, mistake_rate: float = 0.0):
        if not 0 <= mistake_rate <= 1:
            raise ValueError(f"mistake_rate: saw {mistake_rate}, expected a number in [0, 1]")
        world = env.world
        self._goal, self._fits, self._rng, self._mistake_rate = (
            world.goal, world.fits, rng, mistake_rate)
        self._types = {world.names[i]: kind for i, kind in world.types.items()}
        self._receptacles = [world.names[r] for r in world.receptacles]
        goal = world.goal
        last = (f"turn on the {goal.lamp}" if goal.lamp
                else f"put the {goal.object} in the {goal.receptacle}")
        treat = [f"{goal.treatment} the {goal.object}"] if goal.treatment else []
        self._subgoals = [f"find a {goal.object}", *treat, last]  # what a mistake draws from
        self._forget()

    def act(self, observation: str, info: dict) -> tuple[bool, str, str]:
        """Read what ``reset`` or ``step`` returned; choose (switch, subgoal, action).

        Call it exactly once a turn. ``switch`` says that the subgoal is not the last turn's.
        """
        if observation.startswith("-= Welcome"):
            self._forget()
        self._remember(observation)
        rng, admissible = self._rng, info["admissible"]
        subgoal, action = self._intend(admissible)
        if rng.random() < self._mistake_rate:
            idle = ("help", "look", "inventory", "examine") if rng.random() < 0.5 else ()
            action = rng.choice([c for c in admissible if not c.startswith(idle)])
        if rng.random() < self._mistake_rate / 2:
            subgoal = rng.choice([s for s in self._subgoals if s != subgoal])
        switch, self._subgoal = subgoal != self._subgoal, subgoal
        return switch, subgoal, action

    def _forget(self) -> None:
        self._order = self._rng.sample(self._receptacles, len(self._receptacles))
        self._seen: set[str] = set()  # receptacles whose contents were read
        self._where: dict[str, str] = {}  # object -> receptacle
        self._marks: set[tuple[str, str]] = set()  # (mark, object), as in State
        self._held = self._subgoal = ""

    def _remember(self, text: str) -> None:
        if seen := re.search(r"(?:On t|T)he (\w+ \d+)(?: is open\. In it)?, you see (.*)\.", text):
            self._seen.add(seen[1])
            self._where = {o: r for o, r in self._where.items() if r != seen[1]}
            self._where |= dict.fromkeys(re.findall(r"\ba (\w+ \d+)", seen[2]), seen[1])
        elif taken := re.match(r"You pick up the (\w+ \d+) from", text):
            self._held = taken[1]
            self._where.pop(taken[1], None)
        elif moved := re.match(r"You move the (\w+ \d+) to the (\w+ \d+)", text):
            self._held, self._where[moved[1]] = "", moved[2]
        elif treated := re.match(r"You (clean|cool|heat) the (\w+ \d+) using", text):
            gained, lost = EFFECTS[treated[1]]
            self._marks = self._marks - {(lost, treated[2])} | {(gained, treated[2])}

    def _ready(self, o: str) -> bool:
        treatment = self._goal.treatment
        return not treatment or (TREATMENTS[treatment][2], o) in self._marks

    def _intend(self, admissible: list[str]) -> tuple[str, str]:
        """The subgoal and action that serve the goal, given what is known."""
        goal, held, types = self._goal, self._held, self._types
        known = [(o, r) for o, r in self._where.items() if types[o] == goal.object]
        placed = [r for o, r in known if self._ready(o)]
        # The destination: of the right type, preferably where one of the objects is already.
        end = max((r for r in self._order if types[r] == goal.receptacle), key=placed.count,
                  default="")
        if not held:
            takes = [(f"take {o} from {r}", r) for o, r in known if r != end or not self._ready(o)]
            takes.sort(key=lambda take: take[0] not in admissible)
            return f"find a {goal.object}", (self._reach(*takes[0], admissible) if takes
                                             else self._search(goal.object, admissible))
        if types[held] != goal.object:  # taken by mistake: put it down
            homes = [r for r in self._order if (types[r], types[held]) in self._fits]
            home = min(homes, key=lambda r: f"move {held} to {r}" not in admissible)
            return (f"put the {types[held]} in the {types[home]}",
                    self._reach(f"move {held} to {home}", home, admissible))
        if goal.lamp:
            lamp = next((o for o in self._where if types[o] == goal.lamp), None)
            if lamp is None:
                return f"find a {goal.lamp}", self._search(goal.lamp, admissible)
            return (f"turn on the {goal.lamp}",
                    self._reach(f"use {lamp}", self._where[lamp], admissible))
        if not self._ready(held):
            tool = next(r for r in self._order if types[r] == TREATMENTS[goal.treatment][0])
            return (f"{goal.treatment} the {goal.object}",
                    self._reach(f"{goal.treatment} {held} with {tool}", tool, admissible))
        return (f"put the {goal.object} in the {goal.receptacle}",
                self._reach(f"move {held} to {end}", end, admissible))

    def _search(self, kind: str, admissible: list[str]) -> str:
        """Look into the next receptacle not seen yet: one that is here, then likely ones."""
        if self._seen.issuperset(self._order):
            self._seen.clear()
        likely = {r for r, o in self._fits if o == kind} or {spot.lower() for spot in LAMP_SPOTS}
        r = min((r for r in self._order if r not in self._seen),
                key=lambda r: (f"open {r}" not in admissible, self._types[r] not in likely))
        return self._reach("", r, admissible)

    def _reach(self, command: str, r: str, admissible: list[str]) -> str:
        """The command, or else a step towards being able to give it at receptacle ``r``."""
        steps = (command, f"open {r}", f"go to {r}", f"examine {r}", "look")
        return next(step for step in steps if step in admissible)
