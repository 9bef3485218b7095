"""From a record to HTML: the text of a turn with its tokens coloured, tables, whole pages.

A page is one file that opens without a network or a kernel, in light and dark.

Left out on purpose: pictures (see figures) and widgets (which show these same texts).
"""

import html
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from hiper_lab import figures, protocol
from hiper_lab.figures import COLORS, NAMES, NEGATIVE, POSITIVE, rgba
from hiper_lab.trajectory import Trajectory, token_frame, write_atomic

ROLES = {"switch": "switch", "subgoal": "high", "action": "low"}  # a token's role -> its level
MONO = (
    "font-family:var(--jp-code-font-family,monospace);font-size:13px;line-height:1.5;"
    "white-space:pre-wrap;overflow-wrap:anywhere"
)
STYLE = """<style>
.hl{font-size:13px;line-height:1.5} .hl .s{max-height:320px;overflow:auto}
.hl table{border-collapse:collapse;margin:4px 0} .hl td,.hl th{padding:1px 16px 1px 0;
text-align:left;font-weight:normal;border:0;background:transparent!important;white-space:normal;
max-width:520px;overflow-wrap:break-word}
.hl .n{text-align:right;font-variant-numeric:tabular-nums} .hl th{opacity:.7}
.hl summary{cursor:pointer;opacity:.8}
.hl select{font-family:var(--jp-code-font-family,monospace);font-size:12px}
</style>"""
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{style}
<style>:root{{color-scheme:light dark}} body{{font-family:system-ui,sans-serif;max-width:1240px;
margin:24px auto;padding:0 16px}}</style></head><body class="hl">
<h3>{title}</h3>{body}</body></html>
"""


def save(path: Path | str, title: str, parts: list[go.Figure | pd.DataFrame | str]) -> Path:
    """Write figures, tables and HTML texts, in this order, as one file that opens offline."""
    body, plotly = [], True  # plotly.js once
    for part in parts:
        if isinstance(part, go.Figure):
            part = part.to_html(full_html=False, include_plotlyjs=plotly, div_id=f"f{len(body)}")
            plotly = False
        body.append(table_html(part) if isinstance(part, pd.DataFrame) else part)
    page = PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(body))
    write_atomic(path, page.encode())
    return Path(path)


def token_strip(tokens: pd.DataFrame, by: str = "role") -> str:
    """Show a response token by token as HTML, coloured; injected tokens are pale.

    Args:
        tokens: One row per token: ``piece`` (its text), ``role``, ``chosen``, ``logprob``,
            ``advantage`` (NaN if it gets none).
        by: ``role`` (each level's colour), ``advantage`` (orange above zero, purple below), or
            ``logprob`` (the less likely, the stronger).

    Raises:
        ValueError: If columns are missing or ``by`` is another.

    Example:
        >>> token = {"piece": "KEEP", "role": "switch", "chosen": True, "logprob": -0.7}
        >>> strip = token_strip(pd.DataFrame([token | {"advantage": 0.25}]), by="advantage")
        >>> 'title="switch, logprob -0.7000, advantage 0.2500"' in strip
        True
    """
    figures.require(tokens, ["piece", "role", "chosen", "logprob", "advantage"])
    if by not in ("role", "advantage", "logprob"):
        raise ValueError(f"by is {by!r}, expected role, advantage or logprob")
    largest = max(1e-6, tokens["advantage"].abs().max(skipna=True) if len(tokens) else 0)

    def background(role: str, logprob: float, advantage: float) -> str:
        if by == "role":
            return rgba(COLORS[ROLES[role]], 0.4) if role in ROLES else "transparent"
        if by == "logprob":
            return rgba(NEGATIVE, 0 if math.isnan(logprob) else 0.7 * min(1, -logprob / 4))
        strength = 0 if math.isnan(advantage) else abs(advantage) / largest
        return rgba(POSITIVE if advantage > 0 else NEGATIVE, 0.75 * strength)

    spans = []
    columns = ("piece", "role", "chosen", "logprob", "advantage")
    for piece, role, chosen, logprob, advantage in zip(*(tokens[c] for c in columns), strict=True):
        known = [f"{k} {x:.4f}" for k, x in (("logprob", logprob), ("advantage", advantage))
                 if not math.isnan(x)]  # fmt: skip
        hover = ", ".join([role, *known] if chosen else [role, "not a choice"])
        style = f"background:{background(role, logprob, advantage)};border-radius:3px"
        style += "" if chosen else ";opacity:.7"
        text = html.escape(piece, quote=False)
        spans.append(f'<span title="{hover}" style="{style}">{text}</span>')
    return f'<div style="{MONO}">{"".join(spans)}</div>'


def prompt_text(trajectory: Trajectory, turn: int, config: dict[str, Any]) -> str:
    """The prompt of a turn, rendered again from the record (without a tokenizer's chat template).

    Args:
        config: The run's ``config.json``; what it does not say is read as the trainer's defaults.
    """
    rollout = config.get("rollout", {})
    past = trajectory.turns[:turn]
    now = trajectory.turns[turn]
    context = protocol.Context(
        trajectory.task, now.observation, now.admissible, past[-1].subgoal if past else "",
        [(t.observation, t.action) for t in past],
    )  # fmt: skip
    template = rollout.get("template", "compact")
    return "".join(protocol.render(template, context, rollout.get("history_turns", 12)))


def response_tokens(trajectory: Trajectory, turn: int) -> pd.DataFrame:
    """`token_frame` of one turn; without token texts, one row per run of characters of a Role."""
    now = trajectory.turns[turn]
    if now.pieces:
        return token_frame(replace(trajectory, turns=[now]))
    roles, rows = iter(protocol.roles(list(now.response))), []
    for role, run in itertools.groupby(now.response, key=lambda _: next(roles).name.lower()):
        advantage = getattr(now, f"advantage_{ROLES[role]}") if role in ROLES else None
        rows.append(("".join(run), role, True, math.nan, advantage))
    columns = ["piece", "role", "chosen", "logprob", "advantage"]
    return pd.DataFrame(rows, columns=columns).astype({"advantage": float})


def turn_html(trajectory: Trajectory, turn: int, by: str, config: dict[str, Any]) -> str:
    """Everything about one turn as HTML: texts, tokens, decisions, values, credit, reward."""
    now = trajectory.turns[turn]
    said = {"switch": "SWITCH" if now.switch else "KEEP", "high": now.subgoal, "low": now.action}
    rows = "".join(
        f'<tr><td style="border-left:4px solid {COLORS[level]};padding-left:8px">{NAMES[level]}'
        f"</td><td>{html.escape(said[level])}</td>"
        f"<td class='n'>{_number(getattr(now, 'value_' + level))}</td>"
        f"<td class='n'>{_number(getattr(now, 'advantage_' + level))}</td></tr>"
        for level in COLORS
    )
    problems = f"<div><b>malformed:</b> {html.escape('; '.join(now.problems))}</div>"
    prompt = _block("prompt", prompt_text(trajectory, turn, config)) if now.prompt_ids else ""
    last = turn == len(trajectory.turns) - 1
    outcome = f", then the episode ended: {trajectory.end.replace('_', ' ')}" if last else ""
    spoken = f"logprob {sum(now.logprobs):.4f}, " if now.logprobs else ""
    after = trajectory.final_observation if last else trajectory.turns[turn + 1].observation
    return (
        f"<div>task: {html.escape(trajectory.task)}</div>"
        f"{_block('observation', now.observation, True)}"
        f"{prompt}<div style='margin-top:6px'>{token_strip(response_tokens(trajectory, turn), by)}"
        f"</div>{problems if now.problems else ''}<table><tr><th></th><th>decision</th>"
        f"<th class='n'>value</th><th class='n'>advantage</th></tr>{rows}</table>"
        f"<div>{spoken}reward {now.reward:g}{outcome}</div>"
        f"{_block('what came of it', after, last)}"
    )


def _block(title: str, text: str, opened: bool = False) -> str:
    return (
        f"<details {'open' if opened else ''}><summary>{title}</summary>"
        f'<div style="{MONO};margin-left:14px">{html.escape(text.strip())}</div></details>'
    )


def _number(x: float | None) -> str:
    return "" if x is None or math.isnan(x) else f"{x:.4f}"


def _cell(x: object) -> str:
    return _number(x) if isinstance(x, float) else "" if x is pd.NA else html.escape(str(x))


def table_html(frame: pd.DataFrame) -> str:
    """A frame as an HTML table that scrolls if it is long."""
    kinds = ["n" if pd.api.types.is_numeric_dtype(kind) else "" for kind in frame.dtypes]

    def row(tag: str, cells: Iterable[object]) -> str:
        cells = (_cell(x) for x in cells)
        made = (f'<{tag} class="{k}">{x}</{tag}>' for k, x in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(made)}</tr>"

    rows = [row("th", frame.columns), *(row("td", r) for r in frame.itertuples(index=False))]
    return f'<div class="s"><table>{"".join(rows)}</table></div>'
