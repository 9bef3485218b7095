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
