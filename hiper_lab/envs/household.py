"""ALFWorld's household games in pure Python: the same text as the TextWorld engine, much faster.

A game is the content of a ``game.tw-pddl`` file. :class:`World` is what never changes in it,
:class:`State` what does; a :class:`HouseholdEnv` goes from state to state by text commands. One
table, made by :meth:`HouseholdEnv._commands`, says what is admissible and what it means.

Left out on purpose: the PDDL planner, TextWorld's grammar (its sentences are written out here),
goals that need slicing or a movable receptacle, ALFWorld's shuffling of instance numbers, and
objects that stand at no receptacle.

Source: domain and wording of ALFWorld (Shridhar et al. 2021, arXiv:2010.03768; MIT).
"""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

TREATMENTS = {  # verb: (type of the appliance, trait the object needs, mark that it gets)
    "clean": ("sinkbasin", "cleanable", "isclean"),
    "cool": ("fridge", "coolable", "iscool"),
    "heat": ("microwave", "heatable", "ishot"),
}
TASKS = {  # ALFWorld's six types of task: (treatment, how many objects)
    "pick_and_place_simple": ("", 1), "look_at_obj_in_light": ("", 1),
    "pick_clean_then_place_in_recep": ("clean", 1), "pick_heat_then_place_in_recep": ("heat", 1),
    "pick_cool_then_place_in_recep": ("cool", 1), "pick_two_obj_and_place": ("", 2),
}
LONG_TASKS = {"pick_three_obj_and_place": ("", 3)} | {  # ours, in the same language of goals
    f"pick_{verb}_{number}_then_place_in_recep": (verb, count)
    for count, number in ((2, "two"), (3, "three")) for verb in TREATMENTS
}
EFFECTS = {  # verb: (mark gained, mark lost)
    "open": ("opened", ""), "close": ("", "opened"), "use": ("istoggled", ""),
    "slice": ("issliced", ""), "clean": ("isclean", ""), "cool": ("iscool", "ishot"),
    "heat": ("ishot", "iscool"),
}
SENTENCES = {  # with the names of what the command is about and, {2}, how the first of them looks
    "go to": "You arrive at {0}. {2}", "examine": "{2}",
    "open": "You open the {0}. {2}", "close": "You close the {0}.",
    "take": "You pick up the {0} from the {1}.", "move": "You move the {0} to the {1}.",
    "use": "You turn on the {0}.", "slice": "You sliced the {0} with the {1}.",
    "clean": "You clean the {0} using the {1}.", "cool": "You cool the {0} using the {1}.",
    "heat": "You heat the {0} using the {1}.",
}
LIGHT_PREDICATES = {"objecttype", "toggleable", "istoggled", "receptacleatlocation", "atlocation",
                    "inreceptacle", "holds"}
TRAITS = ("openable", "pickupable", "toggleable", "sliceable", "isreceptacleobject",
          "cleanable", "coolable", "heatable")
KNIVES = ("knife", "butterknife")
NOTHING_HAPPENS = "Nothing happens."
HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


class Goal(NamedTuple):
    """What wins a game. Types are in lower case, as in the text; "" where there is none."""

    task_type: str
    object: str
    receptacle: str
    lamp: str
    treatment: str  # "clean", "cool" or "heat"
    count: int  # so many of the objects, treated, in one and the same receptacle


class State(NamedTuple):
    """Everything that changes during a game; immutable, so it is its own snapshot."""

    turn: int
    point: str  # where the agent stands; several receptacles may be used from one point
    held: str  # the object in the hand, or ""
    inside: frozenset[tuple[str, str]]  # (object, receptacle)
    marks: frozenset[tuple[str, str]]  # (mark of EFFECTS, object or receptacle)
    taken: frozenset[tuple[str, str]] = frozenset()  # (object, receptacle it was taken from)


@dataclass(frozen=True, eq=False)
class World:
    """What never changes in a game: parse it once with :meth:`from_game`, share it between envs.

    Everything is known by its PDDL id in lower case; ``names`` says what the text calls it.
    """

    task: str
    goal: Goal
    names: dict[str, str]
    types: dict[str, str]
    receptacles: tuple[str, ...]  # ascending ids, the engine's order
    points: dict[str, str]  # receptacle -> where one stands to use it
    served: dict[str, tuple[str, ...]]  # the reverse: point -> receptacles
    within: dict[str, tuple[str, ...]]  # object -> objects inside it, which can't be reached
    traits: dict[str, frozenset[str]]  # one of TRAITS -> ids
    fits: frozenset[tuple[str, str]]  # (receptacle type, object type)
    start: State

    @classmethod
    def from_game(cls, game: dict) -> "World":
        """Parse ``game["pddl_problem"]`` and the task sentence in ``game["grammar"]``.

        Raises:
            ValueError: If a part is missing or broken; says what was seen and what expected.
        """
        for key in ("pddl_problem", "grammar"):
            if not isinstance(game, dict) or not isinstance(game.get(key), str):
                seen = f"keys {sorted(game)}" if isinstance(game, dict) else type(game).__name__
                raise ValueError(f"game: saw {seen}, expected a dict with text under {key!r}")
        problem = re.sub(r";.*", "", game["pddl_problem"]).lower()
        sections = re.search(r"(?s)\(:init(.*)\(:goal(.*)", problem)
        if not sections:
            raise ValueError(f"pddl_problem: saw {problem[:60]!r}, expected (:init ..) (:goal ..)")
        task = re.search(r'"rhs": "Your task is to: ([^"]*)"', game["grammar"])
        if not task:
            raise ValueError(f"grammar: saw {game['grammar'][:60]!r}, expected a line "
                             '"rhs": "Your task is to: ..."')
        facts = defaultdict(list)
        for predicate, words in re.findall(r"\(([a-z]+) ([^()]*)\)", sections[1]):
            facts[predicate].append(tuple(words.split()))
        try:
            types = {i: _type(t) for i, t in facts["receptacletype"] + facts["objecttype"]}
            receptacles = tuple(sorted(r for r, _ in facts["receptacletype"]))
            points = dict(facts["receptacleatlocation"])
            served = defaultdict(tuple)
            for receptacle in receptacles:
                served[points[receptacle]] += (receptacle,)
            (_, start), = facts["atlocation"]
            holders = facts["inreceptacle"] + facts["inreceptacleobject"]
            if unknown := {i for pair in holders for i in pair} - set(types):
                raise ValueError(f"no type for {sorted(unknown)}")
            for i, r in facts["inreceptacle"]:
                if i in points or r not in points:
                    raise ValueError(f"(inreceptacle {i} {r}), which is no object in a receptacle")
            within = defaultdict(tuple)
            for i, o in sorted(facts["inreceptacleobject"]):
                within[o] += (i,)
                _check_no_cycle(i, dict(facts["inreceptacleobject"]))
            return cls(
                task[1], _goal(sections[2]), _names(types), types, receptacles, points,
                served=dict(served), within=dict(within),
                traits={trait: frozenset(i for i, in facts[trait]) for trait in TRAITS},
                fits=frozenset((_type(r), _type(o)) for r, o in facts["cancontain"]),
                start=State(0, start, "", frozenset(facts["inreceptacle"]), frozenset(
                    (mark, i) for mark, _ in EFFECTS.values() for i, in facts[mark])))
        except (ValueError, KeyError) as error:
            raise ValueError(f"pddl_problem: saw {error}; expected one atLocation, a type for what "
                             "is inReceptacle, a receptacleAtLocation for every receptacle, "
                             "nothing inside itself, and a goal of TASKS or LONG_TASKS") from error


class HouseholdEnv:
    """One game, played by text: the same observations and commands as TextWorld's engine.

    Args:
        game: The content of a game.tw-pddl file, or a World parsed from one.
        max_turns: Truncate after this many turns without a win; None for no limit.

    Raises:
        ValueError: If the game is broken or ``max_turns`` is below 1.

    Example:
        >>> from hiper_lab.envs.games import generate_game
        >>> env = HouseholdEnv(generate_game(0, task_type="pick_and_place_simple"))
        >>> observation, info = env.reset()
        >>> observation.splitlines()[-1] == "Your task is to: " + info["task"]
        True
        >>> env.step("dance")[:4]  # observation, reward, terminated, truncated
        ('Nothing happens.', 0.0, False, False)
    """

    def __init__(self, game: dict | World, max_turns: int | None = 50):
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns: saw {max_turns}, expected at least 1, or None")
        self.world = game if isinstance(game, World) else World.from_game(game)
        self.max_turns = max_turns
        self._state: State | None = None

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        """Start over; a game is one fixed task, so ``seed`` and ``options`` change nothing.

        Returns:
            The first observation and info: ``admissible`` (commands in the engine's order),
            ``won``, ``task`` (the sentence after "Your task is to: ") and ``task_type``.
        """
        info = self.restore(self.world.start)
        view, task = self._look(self.world.receptacles), f"Your task is to: {self.world.task}"
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{view}\n\n{task}", info

    def step(self, text: str) -> tuple[str, float, bool, bool, dict]:
        """Play one command; one that is not admissible does nothing.

        Returns:
            observation, reward (1.0 on the winning turn, else 0.0), terminated (won), truncated
            (``max_turns`` reached without a win) and info as in :meth:`reset`.

        Raises:
            RuntimeError: If the episode has not started or is over.
        """
        if self._state is None or self._over:
            raise RuntimeError(f"step({text!r}) outside an episode; call reset() or restore()")
        command = self._admissible.get(text.strip())
        observation = self._play(*command) if command else NOTHING_HAPPENS
        info = self.restore(self._state._replace(turn=self._state.turn + 1))
        return observation, float(info["won"]), info["won"], self._over and not info["won"], info

    def snapshot(self) -> State:
        """The present state, for :meth:`restore` in any env of the same game."""
        if self._state is None:
            raise RuntimeError("snapshot() outside an episode; call reset()")
        return self._state

    def restore(self, state: State) -> dict:
        """Go (back) to a state of this game; returns the info that belongs to it."""
        self._state = state
        won = self._won()
        self._over = won or (self.max_turns is not None and state.turn >= self.max_turns)
        self._admissible = self._commands()
        return {"admissible": sorted(self._admissible), "won": won, "task": self.world.task,
                "task_type": self.world.goal.task_type}

    def _here(self) -> tuple[str, ...]:
        return self.world.served.get(self._state.point, ())

    def _contents(self, receptacle: str) -> list[str]:
        return sorted(i for i, where in self._state.inside if where == receptacle)

    def _closed(self, receptacle: str) -> bool:
        return (receptacle in self.world.traits["openable"]
                and ("opened", receptacle) not in self._state.marks)

    def _commands(self) -> dict[str, tuple[str, ...]]:
        """Every admissible command and its meaning: the verb and the ids that it is about."""
        names, types, traits = self.world.names, self.world.types, self.world.traits
        held, here = self._state.held, self._here()
        commands = {verb: (verb,) for verb in ("help", "inventory", "look")}
        for r in self.world.receptacles:
            if r not in here:
                commands[f"go to {names[r]}"] = ("go to", r)
        if held:
            commands[f"examine {names[held]}"] = ("examine", held)
        for r in here:
            closed = self._closed(r)
            commands[f"examine {names[r]}"] = ("examine", r)
            if r in traits["openable"]:
                verb = "open" if closed else "close"
                commands[f"{verb} {names[r]}"] = (verb, r)
            for i in self._contents(r):
                if i in traits["toggleable"]:
                    commands[f"use {names[i]}"] = ("use", i)
                if i in traits["pickupable"] and not held and not closed:
                    commands[f"take {names[i]} from {names[r]}"] = ("take", i, r)
                if i in traits["sliceable"] and held and types[held] in KNIVES:
                    commands[f"slice {names[i]} with {names[held]}"] = ("slice", i, held)
            if held and not closed and (types[r], types[held]) in self.world.fits:
                commands[f"move {names[held]} to {names[r]}"] = ("move", held, r)
            for verb, (appliance, trait, _) in TREATMENTS.items():
                if held in traits[trait] and types[r] == appliance:
                    commands[f"{verb} {names[held]} with {names[r]}"] = (verb, held, r)
        return commands

    def _play(self, verb: str, i: str = "", r: str = "") -> str:
        """Carry out an admissible command; returns what the engine says."""
        state, names = self._state, self.world.names
        if verb == "help":
            return HELP
        if verb == "look":
            return self._look()
        if verb == "inventory":
            return (f"You are carrying: a {names[state.held]}." if state.held
                    else "You are not carrying anything.")
        if verb == "go to":
            self._state = state._replace(point=self.world.points[i])
        elif verb == "take":
            self._state = state._replace(held=i, inside=state.inside - {(i, r)},
                                         taken=state.taken | {(i, r)})
        elif verb == "move":
            self._state = state._replace(held="", inside=state.inside | {(i, r)})
        elif verb in EFFECTS:
            gained, lost = ({(mark, i)} if mark else set() for mark in EFFECTS[verb])
            self._state = state._replace(marks=state.marks - lost | gained)
        return SENTENCES[verb].format(names[i], names.get(r), self._examine(i))

    def _look(self, overview: tuple[str, ...] = ()) -> str:
        names, inside, here = self.world.names, self._state.inside, self._here()
        if not here:  # the engine lists the receptacles at the very start only
            return ("You are in the middle of a room. Looking quickly around you, you see "
                    f"{_listing([names[r] for r in overview])}.")
        # "Next to it" lies what was taken out of one receptacle here and put into another one here.
        near = {i for i, r in inside if r in here}
        aside = [names[i] for i, r in sorted(self._state.taken - inside) if r in here and i in near]
        facing = _listing([names[r] for r in here], article="")
        return f"You are facing the {facing}. Next to it, you see {_listing(aside)}."

    def _examine(self, i: str) -> str:
        name, marks, traits = self.world.names[i], self._state.marks, self.world.traits
        if i in self.world.points:
            if self._closed(i):
                return f"The {name} is closed."
            place = f"The {name} is open. In it" if i in traits["openable"] else f"On the {name}"
            return f"{place}, you see {_listing([self.world.names[o] for o in self._contents(i)])}."
        if i in traits["isreceptacleobject"]:
            inner = [self.world.names[o] for o in self.world.within.get(i, ())]
            return f"This is a normal {name}. In it, you see {_listing(inner)}."
        sliced = ("issliced", i) in marks
        treated = [word for word in ("hot", "cool", "clean") if ("is" + word, i) in marks]
        if treated:
            words = "cold" if treated == ["cool"] and not sliced else " and ".join(treated)
            return f"This is a {words}{' sliced' if sliced else ''} {name}."
        if i in traits["toggleable"]:
            return f"This {name} is {'on' if ('istoggled', i) in marks else 'off'}."
        return f"This is a sliced {name}." if sliced else f"There's nothing special about {name}."

    def _won(self) -> bool:
        goal, state, types = self.world.goal, self._state, self.world.types
        if goal.lamp:  # the object in the hand, at a lamp that was switched on at any time before
            return types.get(state.held) == goal.object and any(
                types[i] == goal.lamp and ("istoggled", i) in state.marks
                for r in self._here() for i in self._contents(r))
        mark = goal.treatment and TREATMENTS[goal.treatment][2]
        placed = Counter(r for i, r in state.inside if types[i] == goal.object
                         and types[r] == goal.receptacle and (not mark or (mark, i) in state.marks))
        return max(placed.values(), default=0) >= goal.count


def load_game(path: str | Path) -> dict:
    """Read a game.tw-pddl file, or the one in a folder, and check that it can be played.

    Raises:
        ValueError: If there is no such file or it is broken; with the file, the key and what is
            wrong with it.
    """
    file = Path(path) / "game.tw-pddl" if Path(path).is_dir() else Path(path)
    game = _read(file)
    try:
        World.from_game(game)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return game


def find_games(folder: str | Path) -> list[Path]:
    """The game files below a folder, sorted, without those that ALFWorld's AlfredTWEnv skips.

    These are games not marked solvable, and "movable" or "Sliced" in the path below ``folder``.

    Raises:
        ValueError: If there is no such folder, or a game file in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one with game.tw-pddl files below it")
    return [file for file in sorted(folder.rglob("game.tw-pddl"))
            if not re.search("movable|Sliced", str(file.parent.relative_to(folder)))
            and _read(file).get("solvable")]


def _read(file: Path) -> dict:
    try:
        game = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}; expected a game.tw-pddl file (JSON)") from error
    if not isinstance(game, dict):
        raise ValueError(f"{file}: saw a {type(game).__name__}, expected a JSON object")
    return game


def _check_no_cycle(i: str, outer: dict[str, str]) -> None:
    chain = [i]
    while (i := outer.get(i, "")) and i not in chain:
        chain.append(i)
    if i:
        raise ValueError(f"{' inside '.join([*chain, i])}, a cycle")


def _goal(text: str) -> Goal:
    """Recognise the goal of a task in TASKS or LONG_TASKS by its predicates and types."""
    def pairs(predicate: str) -> list[tuple[str, str]]:
        return re.findall(rf"\({predicate} (\?\w+) ([?\w]+)\)", text)

    predicates = set(re.findall(r"\(([a-z]+|=)", text)) - {"and", "exists"}
    wanted = {variable: _type(kind) for variable, kind in pairs("objecttype")}
    places = {variable: _type(kind) for variable, kind in pairs("receptacletype")}
    lamps = [wanted.pop(variable, "") for variable in re.findall(r"\(istoggled (\?\w+)\)", text)]
    what, count = "".join(set(wanted.values())), len(wanted)
    if lamps:
        known = LIGHT_PREDICATES == predicates and len(lamps) == count == 1 and not places
        if known and what and lamps[0]:
            return Goal("look_at_obj_in_light", what, "", lamps[0], "", 1)
    elif len(set(wanted.values())) == len(places) == 1:
        (place, receptacle), = places.items()
        treatment = next((t for t in TREATMENTS if TREATMENTS[t][2] in predicates), "")
        each = TREATMENTS[treatment][1:] if treatment else ()
        known = {"objecttype", "receptacletype", "inreceptacle", *each}
        known |= {"not", "="} if count > 1 else set()
        # every one of them treated, in the same place, and different from every other one
        alike = all(set(re.findall(rf"\({p} (\?\w+)\)", text)) == set(wanted) for p in each)
        together = set(pairs("inreceptacle")) == {(variable, place) for variable in wanted}
        different = pairs(r"not \(=")
        task_type = next((name for name, task in (TASKS | LONG_TASKS).items()
                          if task == (treatment, count)), "")
        if (task_type and predicates == known and alike and together
                and sorted(map(sorted, different)) == sorted(map(sorted, combinations(wanted, 2)))
                and text.count("(not") == len(different)):
            return Goal(task_type, what, receptacle, "", treatment, count)
    raise ValueError(f"a goal with {sorted(predicates)} about {sorted(wanted.values())}")


def _type(word: str) -> str:
    return word.removesuffix("type")


def _names(types: dict[str, str]) -> dict[str, str]:
    """Number the instances downwards along the sorted ids.

    Source: alfworld.agents.utils.misc.Demangler, not shuffled.
    """
    kinds = {i: i.split("_bar_")[0] + ("basin" if "basin" in i else "") for i in sorted(types)}
    left, names = Counter(kinds.values()), {}
    for i, kind in kinds.items():
        names[i] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return names


def _listing(names: list[str], article: str = "a ") -> str:
    """Join names the way the engine does: ", and" even for two.

    Example:
        >>> _listing(["mug 2", "mug 1"])
        'a mug 2, and a mug 1'
    """
    words = [article + name for name in names]
    return ", and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:]) or "nothing"
