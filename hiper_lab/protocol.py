"""The Plan-Execute text: what the agent reads and what it must write.

A response is three blocks, in this order: ``<switch>KEEP|SWITCH</switch>``,
``<subgoal>…</subgoal>``, ``<action>…</action>`` (HiPER, arXiv 2602.16165, section 3). This module
renders prompts, parses responses strictly, and gives every response token exactly one
:class:`Role`.

Left out on purpose: tokenizers, models, repair of malformed text. Text in, text out.
"""

import re
from dataclasses import dataclass, field, replace
from enum import IntEnum

TAGS = ("switch", "subgoal", "action")
# The text between the agent's own words. Guided decoding injects it, free decoding must write it.
SKELETON = ("<switch>", "</switch>\n<subgoal>", "</subgoal>\n<action>", "</action>")
KEEP, SWITCH = "KEEP", "SWITCH"
NO_SUBGOAL = "None"


class Role(IntEnum):
    """What a response token is part of; decides which level's credit it gets."""

    SWITCH = 0
    SUBGOAL = 1
    ACTION = 2
    FORMAT = 3


@dataclass(frozen=True)
class Response:
    """One parsed response. ``problems`` is empty for well-formed text.

    A malformed response keeps the active subgoal and carries the empty action, which every
    environment answers with "nothing happens": it is never repaired.
    """

    switch: bool
    subgoal: str
    action: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """All that a prompt may show at one turn."""

    task: str
    observation: str
    admissible: list[str]
    subgoal: str = ""
    history: list[tuple[str, str]] = field(
        default_factory=list
    )  # (observation, action), oldest first


def parse(text: str, active_subgoal: str = "") -> Response:
    """Read a response strictly and say what is malformed.

    Args:
        text: The model's whole response.
        active_subgoal: The subgoal in force before this turn; kept if the response is malformed.

    Returns:
        The response; ``problems`` names each defect with what was seen.

    Example:
        >>> parse("<switch>SWITCH</switch>\\n<subgoal>find a mug</subgoal>\\n<action>look</action>")
        Response(switch=True, subgoal='find a mug', action='look', problems=())
        >>> parse("<switch>maybe</switch><action>look</action>", "find a mug").problems
        ("<switch> says 'maybe', expected KEEP or SWITCH", 'no <subgoal> block')
    """
    problems, blocks = [], {}
    for tag in TAGS:
        found = list(re.finditer(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        if not found:
            problems.append(f"no <{tag}> block")
        elif len(found) > 1:
            problems.append(f"{len(found)} <{tag}> blocks, expected one")
        else:
            blocks[tag] = found[0]
            if not found[0][1].strip():
                problems.append(f"empty <{tag}> block")
    word = blocks["switch"][1].strip() if "switch" in blocks else KEEP
    if word and word not in (KEEP, SWITCH):
        problems.insert(0, f"<switch> says {_short(word)}, expected KEEP or SWITCH")
    if len(blocks) == len(TAGS):
        starts = [blocks[tag].start() for tag in TAGS]
        if starts != sorted(starts):
            problems.append("blocks out of order, expected switch, subgoal, action")
        outside = text
        for match in blocks.values():
            outside = outside.replace(match[0], "")
        if outside.strip():
            problems.append(f"text outside the blocks: {_short(outside.strip())}")
    if problems:
        return Response(False, active_subgoal, "", tuple(problems))
    return Response(word == SWITCH, blocks["subgoal"][1].strip(), blocks["action"][1].strip())


def write(switch: bool, subgoal: str, action: str) -> str:
    """The well-formed response for a decision; ``parse`` is its inverse."""
    words = (SWITCH if switch else KEEP, subgoal, action)
    return "".join(a + b for a, b in zip(SKELETON, (*words, ""), strict=True))


def roles(pieces: list[str]) -> list[Role]:
    """One Role per token of a freely written response.

    A token belongs to the block in which its first character lies, tags included, so no token can
    have two roles; a token outside every block, and every token of a malformed response, is FORMAT.

    Args:
        pieces: The text of each response token; their concatenation is the response.

    Example:
        >>> [r.name for r in roles(["<switch>", "KEEP", "</switch>", "\\n", "<subgoal>a</subgoal>",
        ...                         "<action>", "b", "</action>"])][:5]
        ['SWITCH', 'SWITCH', 'SWITCH', 'FORMAT', 'SUBGOAL']
    """
    text = "".join(pieces)
    result = [Role.FORMAT] * len(pieces)
    if parse(text).problems:
        return result
    for tag, role in zip(TAGS, (Role.SWITCH, Role.SUBGOAL, Role.ACTION), strict=True):
        start, end = re.search(f"<{tag}>.*?</{tag}>", text, re.DOTALL).span()
        position = 0
        for i, piece in enumerate(pieces):
            if start <= position < end:
                result[i] = role
            position += len(piece)
    return result


# ------------------------------------------------------------------------------------- templates

_RULES = """\
At every turn, answer with exactly three blocks, in this order and with nothing else:
1) <switch>: KEEP to go on with the current subgoal, or SWITCH to replace it.
2) <subgoal>: the subgoal you follow from now on. With KEEP copy the current subgoal exactly; with \
SWITCH write a new, short one that a few actions can reach. It is neither the whole task nor a \
single action.
3) <action>: one admissible action, copied word for word.

<switch>KEEP or SWITCH</switch>
<subgoal>your subgoal</subgoal>
<action>your action</action>
"""
_FLAT_RULES = """\
At every turn, answer with exactly one block and with nothing else:
<action>: one admissible action, copied word for word.

<action>your action</action>
"""
_AGENT = "You are an expert agent acting in a text environment. "
_SUBGOALS = "You finish the task by always following one short-term subgoal: a small objective \
that a few actions can reach.\n"
_ROLE = f"{_AGENT}{_SUBGOALS}"
SEPARATOR = " [SEP] "  # between the pieces of a page of WebShop
SHOP_LIMIT = 13_000  # characters; a longer upstream prompt of WebShop is written without history

# The released prompts: their parts in their order, with the sentences that frame a field as they
# are there; the paragraphs between are said in our words.
_UPSTREAM_ROLE = "\nYou are an expert agent in the ALFRED Embodied Environment.\n"
_UPSTREAM_SHOP_ROLE = (
    "\nYou are an expert autonomous agent in the WebShop e\u2011commerce environment. "
)
_UPSTREAM_SUBGOALS = """
You complete the task by maintaining a SHORT-TERM SUB-GOAL at each step: a small, high-level \
objective that a few actions normally achieve. It is NOT the full task and NOT a low-level action.

At each step, reconsider the sub-goal given the latest observation: continue it, or switch to a \
new one.

"""
_UPSTREAM_RULES = """
At EVERY step, you MUST output EXACTLY THREE blocks, in the order shown below:
1) <switch> (KEEP or SWITCH)
2) <subgoal> (the sub-goal to follow next)
3) <action> (one admissible action)

NO other text, comments or reasoning is {where}.

STRICT FORMAT REQUIREMENTS:
- <switch> contains ONLY KEEP or SWITCH.
- <subgoal> appears at EVERY step. On KEEP, copy the EXACT current sub-goal. On SWITCH, write a \
NEW, short sub-goal that is achievable in a few actions{limit}.
- <action> contains EXACTLY ONE action, copied verbatim from the admissible actions.

Respond now in this EXACT format:
<switch>KEEP or SWITCH</switch>
<subgoal>the sub-goal</subgoal>
<action>one admissible action</action>
"""


def render(template: str, context: Context, history_turns: int) -> tuple[str, str]:
    """Render a prompt as ``(static, dynamic)``; the prompt is their concatenation.

    ``static`` is the same at every turn of every episode, so samplers compute its KV cache once.
    A page of WebShop, known by its separators, is shown from behind the task on, each piece in
    quotes; its ``upstream`` prompt offers ``search[<your query>]`` in place of listed searches.

    Args:
        template: ``full`` (instructions first, so that they are cached), ``upstream`` (as released
            with HiPER: all parts in their order, instructions last, other words at a turn without
            history; a page of WebShop goes without history where the prompt would be longer than
            13,000 characters), ``compact`` (for tiny models trained on it: no instructions; says
            how many turns have passed and which places were not visited yet, and marks things of a
            kind that the task names with ``*``), or ``flat`` (``full`` for an agent that writes an
            action and no subgoal).
        history_turns: How many past turns are shown (actions only in ``compact``).

    Raises:
        ValueError: If the template is unknown.
    """
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}, expected one of {sorted(TEMPLATES)}")
    past = context.history[-history_turns:] if history_turns else []
    if SEPARATOR not in context.observation:
        return TEMPLATES[template](context, past)
    context = replace(context, observation=_pieces(context.observation, context.task))
    past = [(_pieces(seen, context.task), action) for seen, action in past]
    return (_shop_upstream if template == "upstream" else TEMPLATES[template])(context, past)


def _full(context: Context, past: list[tuple[str, str]]) -> tuple[str, str]:
    return f"{_ROLE}{_RULES}\n", f"Your task: {context.task}\n{_situation(context, past)}"


def _flat(context: Context, past: list[tuple[str, str]]) -> tuple[str, str]:
    situation = f"{_past(context, past)}{_observed(context)}{_offered(context)}"
    return f"{_AGENT}\n{_FLAT_RULES}\n", f"Your task: {context.task}\n{situation}"


def _upstream(context: Context, past: list[tuple[str, str]]) -> tuple[str, str]:
    task = steps = ""
    note = f'(At the first step of an episode this is "{NO_SUBGOAL}".)\n'
    if past:
        task, note = f"Your overall task is: {context.task}\n", ""
        steps = (
            f"You have already taken {len(context.history)} step(s).\n"
            f"Most recent {len(past)} observations and actions:\n{_history(context, past)}\n"
        )
    return _UPSTREAM_ROLE, (
        f"{task}{_UPSTREAM_SUBGOALS}{steps}{_observed(context)}"
        f"\nYour current sub-goal is:\n{context.subgoal or NO_SUBGOAL}\n{note}"
        f"\n{_offered(context)}{_upstream_rules(past)}"
    )


def _shop_upstream(context: Context, past: list[tuple[str, str]]) -> tuple[str, str]:
    taken = len(context.history)
    actions = [a for a in context.admissible if not a.startswith("search[")]
    if len(actions) < len(context.admissible):
        actions.insert(0, "search[<your query>]")
    listed = "".join(f"'{action}',\n" for action in actions)
    now = "Your current observation is"
    if past:
        now = (
            f"You have already taken {taken} step(s). Below are the most recent {len(past)} "
            f"observations and the corresponding actions you took: {_history(context, past)}"
            f"You are now at step {taken + 1} and your current observation is"
        )
    dynamic = (
        f"Your task is to: {context.task}.\n{_UPSTREAM_SUBGOALS}{now}: {context.observation}.\n"
        f"\nYour current sub-goal is: {context.subgoal or NO_SUBGOAL}.\n"
        f"\nYour admissible actions are:\n[\n{listed}].\n{_upstream_rules(past)}"
    )
    if past and len(_UPSTREAM_SHOP_ROLE) + len(dynamic) > SHOP_LIMIT:
        return _shop_upstream(context, [])
    return _UPSTREAM_SHOP_ROLE, dynamic


def _upstream_rules(past: list[tuple[str, str]]) -> str:
    if past:
        return _UPSTREAM_RULES.format(
            where="permitted anywhere in the output", limit=" and NOT the entire task"
        )
    return _UPSTREAM_RULES.format(where="allowed before, after or between the blocks", limit="")


def _pieces(page: str, task: str) -> str:
    """The pieces of a WebShop page behind the task, in quotes; a page without the task as it is.

    Example:
        >>> _pieces("Instruction: [SEP] Find tea [SEP] Back to Search [SEP] < Prev", "Find tea")
        "'Back to Search' [SEP] '< Prev'"
    """
    _, found, rest = page.partition(f"{task}{SEPARATOR}")
    return SEPARATOR.join(f"'{piece}'" for piece in rest.split(SEPARATOR)) if found else page


def _history(context: Context, past: list[tuple[str, str]]) -> str:
    first = len(context.history) - len(past) + 1
    return "".join(
        f"[Observation {k}: '{seen}', Action {k}: '{done}']\n"
        for k, (seen, done) in enumerate(past, first)
    )


def _situation(context: Context, past: list[tuple[str, str]]) -> str:
    return (
        f"{_past(context, past)}{_observed(context)}"
        f"Your current subgoal is:\n{context.subgoal or NO_SUBGOAL}\n{_offered(context)}"
    )


def _past(context: Context, past: list[tuple[str, str]]) -> str:
    shown = f"Turns so far: {len(context.history)}. The latest {len(past)}:\n" if past else ""
    return f"{shown}{_history(context, past)}"


def _observed(context: Context) -> str:
    return f"Your current observation is:\n{context.observation.strip()}\n"


def _offered(context: Context) -> str:
    actions = "\n ".join(f"'{a}'" for a in context.admissible if a != "help")
    return f"Your admissible actions are:\n[{actions}]\n"


def _compact(context: Context, past: list[tuple[str, str]]) -> tuple[str, str]:
    # What a tiny model cannot work out for itself: how late it is, where it has not been, and
    # which of the things it sees the task is about.
    wanted = set(re.findall(r"[a-z]+", context.task))

    def mark(text: str) -> str:
        return re.sub(r"\b([a-z]+)(?= \d)", lambda m: "*" * (m[1] in wanted) + m[1], text)

    done = {action for _, action in context.history}
    new = [a[len(_GO) :] for a in context.admissible if a.startswith(_GO) and a not in done]
    # The first observation repeats the task and a banner: it is spared both.
    seen = context.observation.split("\n\nYour task is to:")[0].split("=-\n\n")[-1].strip()
    actions = "".join(f"> {action}\n" for _, action in past)
    return "", (
        f"{context.task}\n[ {len(context.history)}] {mark(', '.join(new))}\n"
        f"{mark(actions + seen)}\n# {context.subgoal or NO_SUBGOAL}\n"
    )


_GO = "go to "
TEMPLATES = {"full": _full, "upstream": _upstream, "compact": _compact, "flat": _flat}


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")
