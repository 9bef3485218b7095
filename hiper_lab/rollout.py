"""Collecting: play a batch of episodes in lock step and keep exactly what was read and written.

Token ids are kept as sampled and never re-tokenised; episodes that have ended cost nothing.

Left out on purpose: values, credit, anything that needs the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hiper_lab import protocol
from hiper_lab.envs.base import TextEnv
from hiper_lab.envs.pool import reset_all, step_all
from hiper_lab.sampling import (
    DECODERS,
    DECODINGS,
    Codec,
    Decoder,
    Draft,
    Prompt,
    Sampler,
    decided,
)
from hiper_lab.trajectory import EndReason, Trajectory, Turn

LONG_PROMPTS = ("end", "drop_history")


@dataclass(frozen=True)
class RolloutConfig:
    """How prompts are rendered and responses decoded."""

    template: str = "compact"
    """``compact`` (for the embedded model), ``full``, ``upstream``, or ``flat`` (no subgoals)."""
    decoding: str = "guided"
    """``guided``, ``free``, or ``action``: an admissible action and no subgoal, by a model that was
    cloned so (template ``compact``) or is told so (``flat``)."""
    history_turns: int = 6
    """Past turns shown in the prompt."""
    max_prompt_tokens: int = 2048
    """Longest prompt, chat template included."""
    long_prompt: str = "end"
    """What a longer one does: ``end`` the episode (``token_limit``), or ``drop_history``, oldest
    turns first; if that does not help, the episode ends."""
    max_new_tokens: int = 16
    """Longest subgoal (guided) or longest response (free), in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy."""
    decode_rows: int = 0
    """Responses written at a time; 0: those of all running episodes. Fewer take less memory."""

    def __post_init__(self):
        for name, choices in (
            ("template", protocol.TEMPLATES), ("decoding", DECODINGS),
            ("long_prompt", LONG_PROMPTS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r}, expected one of {sorted(choices)}"
                )
        fitting = (
            {"compact", "flat"} if self.decoding == "action" else {*protocol.TEMPLATES} - {"flat"}
        )
        if self.template not in fitting:
            raise ValueError(
                f"template {self.template!r} with decoding {self.decoding!r}, "
                f"expected one of {sorted(fitting)}"
            )
        least = {"history_turns": 0, "max_prompt_tokens": 1, "max_new_tokens": 1, "temperature": 0,
                 "decode_rows": 0}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")


@dataclass
class Episode:
    """An episode in progress: its world, what the agent sees now, and what it has written."""

    env: TextEnv
    game: str
    seed: int
    observation: str
    info: dict[str, Any]
    subgoal: str = ""
    history: list[tuple[str, str]] = field(default_factory=list)
    decided: Sequence[int] = ()
    """The first choices of the first turn, where they are made already."""
    prompt: Prompt | None = None
    turns: list[Turn] = field(default_factory=list)
    end: EndReason | None = None
    detail: str = ""


def collect(
    sampler: Sampler,
    codec: Codec,
    envs: Sequence[TextEnv],
    config: RolloutConfig,
    *,
    names: Sequence[str],
    seeds: Sequence[int],
) -> list[Trajectory]:
    """Play one episode in each environment, all in lock step.

    Args:
        names: The game of each environment, for the record.
        seeds: Passed to each environment's ``reset``.

    Returns:
        One trajectory per environment, in order. An environment that raises ends its episode with
        ``EndReason.ERROR`` and the message; the others go on.

    Raises:
        ValueError: If an episode's very first prompt is longer than ``max_prompt_tokens``.
    """
    starts = reset_all(envs, seeds)
    return play(sampler, codec, [
        Episode(env, name, seed, *start)
        for env, name, seed, start in zip(envs, names, seeds, starts, strict=True)
    ], config)  # fmt: skip


def play(
    sampler: Sampler, codec: Codec, episodes: list[Episode], config: RolloutConfig
) -> list[Trajectory]:
    """Play episodes to their ends, from wherever they are, all in lock step; see `collect`."""
    for episode in episodes:
        _render(episode, codec, config)
        if episode.end:
            raise ValueError(
                f"the first prompt has {len(episode.prompt.ids)} tokens, more than "
                f"max_prompt_tokens={config.max_prompt_tokens}; raise it or use a shorter template"
            )
    running = list(episodes)
    while running:
        drafts = [Draft() for _ in running]
        decoders = [
            _decoder(episode, codec, draft, config)
            for draft, episode in zip(drafts, running, strict=True)
        ]
        prompts, responses = [e.prompt for e in running], []
        rows = config.decode_rows or len(running)
        for part in (slice(start, start + rows) for start in range(0, len(running), rows)):
            responses += sampler(prompts[part], drafts[part], decoders[part])
        # one broken environment must not take the batch with it: its answer is an exception
        answers = step_all([e.env for e in running], [r.action for r in responses])
        for episode, draft, response, answer in zip(
            running, drafts, responses, answers, strict=True
        ):
            _record(episode, codec, draft, response, answer)
            _render(episode, codec, config)
        running = [e for e in running if e.end is None]
    return [
        Trajectory(
            id=f"{k:04d}", task=e.info["task"], game=e.game, seed=e.seed, turns=e.turns, end=e.end,
            final_observation=e.observation, final_prompt_ids=e.prompt.ids, detail=e.detail,
            task_type=e.info.get("task_type", ""),
        )
        for k, e in enumerate(episodes)
    ]  # fmt: skip


def _decoder(episode: Episode, codec: Codec, draft: Draft, config: RolloutConfig) -> Decoder:
    decoder = DECODERS[config.decoding](
        codec, draft, episode.subgoal, episode.info["admissible"], config.max_new_tokens
    )
    return decided(decoder, () if episode.turns else episode.decided)


def _record(
    episode: Episode, codec: Codec, draft: Draft, response: protocol.Response, answer: Any
) -> None:
    """Write down the turn and what the environment answered."""
    turn = Turn(
        observation=episode.observation, admissible=episode.info["admissible"],
        prompt_ids=episode.prompt.ids, response_ids=draft.ids, roles=draft.roles,
        logprobs=[round(x, 6) for x in draft.logprobs], chosen=draft.chosen,
        response=codec.decode(draft.ids), switch=response.switch, subgoal=response.subgoal,
        action=response.action, problems=list(response.problems), pieces=codec.spell(draft.ids),
        **{f"value_{level}": value for level, value in draft.values.items()},
    )  # fmt: skip
    episode.turns.append(turn)
    episode.history.append((episode.observation, response.action))
    episode.subgoal = response.subgoal
    if isinstance(answer, Exception):
        episode.end, episode.detail = EndReason.ERROR, f"{type(answer).__name__}: {answer}"
        return
    episode.observation, turn.reward, terminated, truncated, episode.info = answer
    if terminated:
        episode.end = EndReason.WON if episode.info["won"] else EndReason.LOST
    elif truncated:
        episode.end = EndReason.TURN_LIMIT


def _render(episode: Episode, codec: Codec, config: RolloutConfig) -> None:
    """The prompt of the next turn; also after the last one, for bootstrapping."""
    context = protocol.Context(
        episode.info["task"], episode.observation, episode.info["admissible"], episode.subgoal,
        episode.history,
    )  # fmt: skip
    shown = min(config.history_turns, len(episode.history))
    while True:
        episode.prompt = codec.prompt(*protocol.render(config.template, context, shown))
        fits = len(episode.prompt.ids) <= config.max_prompt_tokens
        if fits or not shown or config.long_prompt == "end":
            break
        shown -= 1
    if not fits and episode.end is None:
        episode.end = EndReason.TOKEN_LIMIT
