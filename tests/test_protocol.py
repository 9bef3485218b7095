"""The text protocol: writing and reading agree, every defect is named, every token has one role."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiper_lab import protocol
from hiper_lab.protocol import Context, Role, parse, render, roles, write

WORDS = st.text("abcdefghij 0123456789", min_size=1).map(str.strip).filter(bool)


@given(st.booleans(), WORDS, WORDS)
def test_parse_inverts_write(switch, subgoal, action):
    assert parse(write(switch, subgoal, action), "other") == protocol.Response(
        switch, subgoal, action
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("look around", "no <switch> block"),
        (write(True, "a", "b").replace("SWITCH", "maybe"), "'maybe', expected KEEP or SWITCH"),
        (write(True, "a", "b").replace("SWITCH", "switch"), "'switch', expected KEEP or SWITCH"),
        (write(True, "", "b"), "empty <subgoal> block"),
        (write(True, "a", "b") + "<action>c</action>", "2 <action> blocks"),
        ("I think: " + write(True, "a", "b"), "text outside the blocks: 'I think:'"),
        ("<action>b</action><switch>KEEP</switch><subgoal>a</subgoal>", "out of order"),
        (write(True, "a", "b")[:-3], "no <action> block"),
    ],
)
def test_every_defect_is_named_and_nothing_is_repaired(text, problem):
    response = parse(text, "old subgoal")
    assert problem in "; ".join(response.problems)
    assert (response.switch, response.subgoal, response.action) == (False, "old subgoal", "")


@given(st.booleans(), WORDS, WORDS, st.integers(1, 5))
def test_roles_partition_the_tokens(switch, subgoal, action, size):
    text = write(switch, subgoal, action)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = roles(pieces)
    assert len(found) == len(pieces)
    by_role = {r: "".join(p for p, x in zip(pieces, found, strict=True) if x == r) for r in Role}
    # whatever is inside a tag pair, but for a token that straddles its start, is that block's
    assert by_role[Role.ACTION].endswith(f"{action}</action>"[size:])
    assert "subgoal" not in by_role[Role.SWITCH][: -size or None]


def test_a_malformed_response_has_no_trained_level():
    assert set(roles(["<switch>", "KEEP", "</switch>", "<action>", "x", "</action>"])) == {
        Role.FORMAT
    }


def test_templates_show_what_they_should():
    history = [(f"seen {k}", f"do {k}") for k in range(4)]
    context = Context("find a mug", "You see a mug.", ["take mug", "help"], "find a mug", history)
    for template in protocol.TEMPLATES:
        static, dynamic = render(template, context, 2)
        other = render(template, Context("else", "Other.", ["x"]), 2)
        assert static == other[0], f"{template}: the static part depends on the turn"
        assert all(s in dynamic for s in ("find a mug", "You see a mug.", "do 3", "do 2"))
        assert "do 1" not in dynamic, f"{template} shows more history than asked for"
    full = "".join(render("full", context, 2))
    assert "'take mug'" in full and "'help'" not in full  # as upstream: help is not offered
    assert "Observation 3: 'seen 2'" in full  # turns are numbered from the episode's start
    with pytest.raises(ValueError, match="unknown template 'short'"):
        render("short", context, 2)


PARAGRAPHS = """
You complete the task by maintaining a SHORT-TERM SUB-GOAL at each step: a small, high-level \
objective that a few actions normally achieve. It is NOT the full task and NOT a low-level action.

At each step, reconsider the sub-goal given the latest observation: continue it, or switch to a \
new one.
"""
FORMAT = """
At EVERY step, you MUST output EXACTLY THREE blocks, in the order shown below:
1) <switch> (KEEP or SWITCH)
2) <subgoal> (the sub-goal to follow next)
3) <action> (one admissible action)

NO other text, comments or reasoning is %s.

STRICT FORMAT REQUIREMENTS:
- <switch> contains ONLY KEEP or SWITCH.
- <subgoal> appears at EVERY step. On KEEP, copy the EXACT current sub-goal. On SWITCH, write a \
NEW, short sub-goal that is achievable in a few actions%s.
- <action> contains EXACTLY ONE action, copied verbatim from the admissible actions.

Respond now in this EXACT format:
<switch>KEEP or SWITCH</switch>
<subgoal>the sub-goal</subgoal>
<action>one admissible action</action>
"""
FIRST = FORMAT % ("allowed before, after or between the blocks", "")
LATER = FORMAT % ("permitted anywhere in the output", " and NOT the entire task")
HOUSEHOLD_FIRST = f"""
You are an expert agent in the ALFRED Embodied Environment.
{PARAGRAPHS}
Your current observation is:
You are in a room. Your task is to: find a mug.

Your current sub-goal is:
None
(At the first step of an episode this is "None".)

Your admissible actions are:
['go to desk 1'
 'look']
{FIRST}"""
HOUSEHOLD_LATER = f"""
You are an expert agent in the ALFRED Embodied Environment.
Your overall task is: find a mug.
{PARAGRAPHS}
You have already taken 3 step(s).
Most recent 2 observations and actions:
[Observation 2: 'page 1', Action 2: 'do 1']
[Observation 3: 'page 2', Action 3: 'do 2']

Your current observation is:
You are in a room. Your task is to: find a mug.

Your current sub-goal is:
search the desk

Your admissible actions are:
['go to desk 1'
 'look']
{LATER}"""
SHOP_FIRST = f"""
You are an expert autonomous agent in the WebShop e\u2011commerce environment. Your task is to: Tea.
{PARAGRAPHS}
Your current observation is: 'Back to Search' [SEP] '< Prev'.

Your current sub-goal is: None.

Your admissible actions are:
[
'search[<your query>]',
'click[< prev]',
].
{FIRST}"""
SHOP_LATER = f"""
You are an expert autonomous agent in the WebShop e\u2011commerce environment. Your task is to: Tea.
{PARAGRAPHS}
You have already taken 3 step(s). Below are the most recent 2 observations and the corresponding \
actions you took: [Observation 2: 'page 1', Action 2: 'do 1']
[Observation 3: 'page 2', Action 3: 'do 2']
You are now at step 4 and your current observation is: 'Back to Search' [SEP] '< Prev'.

Your current sub-goal is: search the desk.

Your admissible actions are:
[
'search[<your query>]',
'click[< prev]',
].
{LATER}"""
PAGES = {
    "household": ("find a mug.", "You are in a room. Your task is to: find a mug.",
                  ["go to desk 1", "help", "look"]),
    "shop": ("Tea", "Instruction: [SEP] Tea [SEP] Back to Search [SEP] < Prev",
             ["search[tea]", "search[tea bags]", "click[< prev]"]),
}  # fmt: skip


def context_of(benchmark: str, turns: int) -> Context:
    history = [(f"page {k}", f"do {k}") for k in range(turns)]
    return Context(*PAGES[benchmark], "search the desk" if turns else "", history)


@pytest.mark.parametrize(
    ("benchmark", "first", "later"),
    [("household", HOUSEHOLD_FIRST, HOUSEHOLD_LATER), ("shop", SHOP_FIRST, SHOP_LATER)],
)
def test_upstream_prompts_word_by_word(benchmark, first, later):
    """All that the released prompts say, in their order, at both kinds of turn."""
    assert "".join(render("upstream", context_of(benchmark, 0), 2)) == first
    assert "".join(render("upstream", context_of(benchmark, 3), 2)) == later
    alone = "".join(render("upstream", context_of(benchmark, 3), 0))
    assert alone == first.replace("None\n(", "search the desk\n(").replace(
        "sub-goal is: None", "sub-goal is: search the desk"
    )


@pytest.mark.parametrize("template", protocol.TEMPLATES)
@pytest.mark.parametrize("benchmark", PAGES)
@pytest.mark.parametrize("shown", [0, 1, 2, 9])
def test_every_template_shows_as_much_history_as_asked_for(template, benchmark, shown):
    context = context_of(benchmark, 5)
    static, dynamic = render(template, context, shown)
    assert [f"do {k}" in dynamic for k in range(5)] == [k >= 5 - shown for k in range(5)]
    assert ("search the desk" in dynamic) == (template != "flat") and "do " not in static


@pytest.mark.parametrize("benchmark", PAGES)
def test_the_flat_prompt_is_the_full_one_without_subgoals(benchmark):
    context = context_of(benchmark, 3)
    (rules, flat), (_, full) = render("flat", context, 2), render("full", context, 2)
    assert flat == full.replace("Your current subgoal is:\nsearch the desk\n", "")
    assert rules.count("<action>") == 2 and "goal" not in rules and "switch" not in rules


def test_compact_says_how_late_it_is_where_to_look_and_what_is_wanted():
    context = Context(
        "put a clean mug in shelf.",
        "On the desk 1, you see a book 2, and a mug 1.",
        ["go to bed 1", "go to shelf 1", "go to shelf 2", "take mug 1 from desk 1"],
        "find a mug",
        [("", "go to bed 1"), ("", "go to desk 1")],
    )
    assert render("compact", context, 1)[1].splitlines() == [
        "put a clean mug in shelf.",
        "[ 2] *shelf 1, *shelf 2",
        "> go to desk 1",
        "On the desk 1, you see a book 2, and a *mug 1.",
        "# find a mug",
    ]
