"""From trajectories and credit to a gradient: packing, the PPO loss, the value loss.

A token's advantage is the credit of its Role in its turn: SWITCH tokens get the switch level's,
SUBGOAL tokens the high level's, ACTION tokens (and freely written FORMAT) the low level's. Injected
tokens were no choice and have no gradient. Logits are computed only where a token is trained, and
no more than `LOGITS` of them at a time.

Left out on purpose: optimizers, sampling, how credit is estimated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hiper_lab.credit import LEVELS, Credit, Values
from hiper_lab.policy import Policy, Scores, scores
from hiper_lab.protocol import KEEP, Role
from hiper_lab.sampling import Codec, allowed_mask, allowed_sets, micro_batches
from hiper_lab.trajectory import Trajectory, Turn, boundaries

# Logits held at a time: 64 MiB in float32, whatever the vocabulary and the batch.
LOGITS = 2**24
_LEVEL_OF_ROLE = torch.tensor([LEVELS.index(level) for level in ("switch", "high", "low", "low")])


@dataclass(frozen=True)
class PPOConfig:
    """The clipped objective and what is added to it."""

    clip: float = 0.2
    """ε of the clipped ratio, > 0."""
    dual_clip: float = 3.0
    """Bound on ratio × |advantage| where the advantage is negative, > 1."""
    value_clip: float = 0.5
    """How far a value may move from its old value and still be trained, in reward units, > 0."""
    value_coef: float = 0.5
    """Weight of the value loss, ≥ 0."""
    kl_coef: float = 0.0
    """Weight of the KL (k3) to the reference, ≥ 0; 0 keeps no reference."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, ≥ 0."""

    def __post_init__(self):
        for name, low in (("clip", 0.0), ("value_clip", 0.0), ("dual_clip", 1.0)):
            if not getattr(self, name) > low:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected more than {low}")
        for name in ("value_coef", "kl_coef", "entropy_coef"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected at least 0")


@dataclass
class Sample:
    """One turn as a training row: its ids up to the last choice, and where to read what."""

    ids: list[int]
    prompt: int  # V_high and V_switch are read at ids[prompt − 1]
    action: int  # V_low is read at ids[action − 1]
    at: list[int]  # positions whose logits predict the chosen tokens
    role: list[int]
    logprob_old: list[float]
    allowed: list[np.ndarray | None]
    advantage: Sequence[float] = (0.0, 0.0, 0.0)  # in the order of LEVELS
    target: Sequence[float] = (0.0, 0.0, 0.0)
    value_old: Sequence[float] = (0.0, 0.0, 0.0)
    train_high: bool = True
    logprob_reference: list[float] | None = None


class Batch(NamedTuple):
    """Rows of one forward pass, padded on the right, and flat views of what is trained in them."""

    ids: Int[Tensor, "seq token"]
    row: Int[Tensor, "n"]
    at: Int[Tensor, "n"]
    token: Int[Tensor, "n"]
    role: Int[Tensor, "n"]
    allowed: list[np.ndarray | None] | None
    logprob_old: Float[Tensor, "n"]
    logprob_reference: Float[Tensor, "n"]
    advantage: Float[Tensor, "n"]
    value_at: Int[Tensor, "seq level"]
    value_old: Float[Tensor, "seq level"]
    target: Float[Tensor, "seq level"]
    value_trained: Bool[Tensor, "seq level"]


# ----------------------------------------------------------------------------------------- packing


def pack(
    trajectories: list[Trajectory], codec: Codec, decoding: str, max_new_tokens: int,
    subgoal: str = "",
) -> list[Sample]:  # fmt: skip
    """One Sample per turn, in order of trajectories and turns.

    Args:
        subgoal: Active before their first turns, where they begin in the middle of an episode.
    """
    samples = []
    for trajectory in trajectories:
        active = subgoal
        for turn in trajectory.turns:
            samples.append(pack_turn(turn, active, codec, decoding, max_new_tokens))
            active = turn.subgoal
    return samples


def pack_turn(turn: Turn, subgoal: str, codec: Codec, decoding: str, max_new_tokens: int) -> Sample:
    """One turn as a Sample, given the subgoal that was active before it."""
    start = len(turn.prompt_ids)
    chosen, roles = np.flatnonzero(turn.chosen), np.array(turn.roles)
    actions = np.flatnonzero(roles == Role.ACTION)
    action = start + int(actions[0] if len(actions) else 0)
    end = max(start + int(chosen[-1]) + 1 if len(chosen) else start, action)
    return Sample(
        ids=[*turn.prompt_ids, *turn.response_ids][:end],
        prompt=start,
        action=action,
        at=(start + chosen - 1).tolist(),
        role=roles[chosen].tolist(),
        logprob_old=[turn.logprobs[i] for i in chosen],
        allowed=allowed_sets(codec, turn, subgoal, decoding, max_new_tokens),
    )


def assign(
    samples: list[Sample], trajectories: list[Trajectory], values: Values, credit: Credit,
    *, rows: range | None = None, high_everywhere: bool,
) -> None:  # fmt: skip
    """Give every sample the advantages, targets and old values of its turn.

    Args:
        rows: Whose turns the samples are; by default of all trajectories.
        high_everywhere: Train V_high at every turn (flat estimators), not only at boundaries.
    """
    rows = range(len(trajectories)) if rows is None else rows
    spots = [(b, t) for b in rows for t in range(len(trajectories[b].turns))]
    opens = [o for b in rows for o in boundaries(trajectories[b])]
    index = tuple(torch.tensor(spots).T)
    advantage = torch.stack([credit.high, credit.low, credit.switch], -1)[index].tolist()
    target = torch.stack([credit.target_high, credit.target_low, credit.target_switch], -1)
    old = torch.stack([values.high, values.low, values.switch], -1)[index].tolist()
    for i, (sample, goal) in enumerate(zip(samples, target[index].tolist(), strict=True)):
        sample.advantage, sample.target, sample.value_old = advantage[i], goal, old[i]
        sample.train_high = high_everywhere or opens[i]


def collate(samples: list[Sample], device: torch.device) -> Batch:
    """Samples as tensors."""
    width = max(len(s.ids) for s in samples)
    ids = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in samples], device=device)

    def flat(values, dtype=torch.long) -> Tensor:
        return torch.tensor([x for value in values for x in value], dtype=dtype, device=device)

    def levels(values, dtype=torch.float32) -> Tensor:
        return torch.tensor([list(v) for v in values], dtype=dtype, device=device)

    row = flat([k] * len(s.at) for k, s in enumerate(samples))
    at, role = flat(s.at for s in samples), flat(s.role for s in samples)
    per_level = levels(s.advantage for s in samples)
    reference = flat((s.logprob_reference or s.logprob_old for s in samples), torch.float32)
    return Batch(
        ids=ids, row=row, at=at, token=ids[row, (at + 1).clamp_max(width - 1)], role=role,
        allowed=[a for s in samples for a in s.allowed],
        logprob_old=flat((s.logprob_old for s in samples), torch.float32),
        logprob_reference=reference,
        advantage=per_level[row, _LEVEL_OF_ROLE.to(device)[role]],
        value_at=levels(((s.prompt - 1, s.action - 1, s.prompt - 1) for s in samples), torch.long),
        value_old=levels(s.value_old for s in samples),
        target=levels(s.target for s in samples),
        value_trained=levels(((s.train_high, True, True) for s in samples), torch.bool),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- reading


def read_scores(
    policy: Policy, batch: Batch, hidden: Tensor, temperature: float, trunk: str = "policy"
) -> Scores:
    """Scores of the chosen tokens, from hidden states ``[seq, token, width]`` of a trunk.

    Where they do not all fit into `LOGITS`, logits are computed in parts, and again for the
    gradient, so that memory depends neither on the vocabulary nor on how much is trained.
    """
    read, size = hidden[batch.row, batch.at], max(1, LOGITS // policy.vocab)

    def score(read: Tensor, token: Tensor, sets: list[np.ndarray | None] | None) -> Scores:
        allowed = None if sets is None else allowed_mask(sets, policy.vocab)
        allowed = None if allowed is None else allowed.to(read.device)
        return scores(policy.logits(read, trunk), allowed, token, temperature or 1.0)

    if len(read) <= size:
        return score(read, batch.token, batch.allowed)
    parts = []
    for start in range(0, len(read), size):
        part = slice(start, start + size)
        sets = None if batch.allowed is None else batch.allowed[part]
        parts.append(
            checkpoint(
                score, read[part], batch.token[part], sets,
                use_reentrant=False, preserve_rng_state=False,
            )
        )  # fmt: skip
    return Scores(*map(torch.cat, zip(*parts, strict=True)))


def read_values(policy: Policy, batch: Batch, hidden: Tensor) -> Float[Tensor, "seq level"]:
    """The three heads at their reading positions."""
    rows = torch.arange(len(batch.ids), device=hidden.device)
    return torch.stack(
        [policy.heads(level, hidden[rows, batch.value_at[:, k]]) for k, level in enumerate(LEVELS)],
        1,
    )


def read(
    policy: Policy, batch: Batch, temperature: float, train_policy: bool
) -> tuple[Scores | None, Float[Tensor, "seq level"]]:
    """What the loss is made of: scores of the chosen tokens, if the policy is trained; values."""
    hidden = now = None
    if train_policy:
        hidden = policy.hidden(batch.ids)
        now = read_scores(policy, batch, hidden, temperature)
    if policy.critic != "shared":
        hidden = policy.hidden(batch.ids, "critic")
    elif hidden is None:  # a shared trunk is not moved by the critic alone
        with torch.no_grad():
            hidden = policy.hidden(batch.ids)
    return now, read_values(policy, batch, hidden)


@torch.no_grad()
def evaluate(
    policy: Policy, trajectories: list[Trajectory], samples: list[Sample], tokens: int
) -> Values:
    """Values of every turn and of every final state, ``[traj, turn]``; padding is 0.

    What the sampler already read (shared critic) is used; the rest is computed here.
    """
    size = (len(trajectories), max(len(t.turns) for t in trajectories))
    grid = {level: torch.zeros(size) for level in LEVELS}
    spots = [(b, t) for b, tr in enumerate(trajectories) for t in range(len(tr.turns))]
    turns = [turn for tr in trajectories for turn in tr.turns]
    known = all(getattr(turn, f"value_{k}") is not None for turn in turns for k in LEVELS)
    if known:
        read = torch.tensor([[getattr(turn, f"value_{k}") for k in LEVELS] for turn in turns])
    else:
        read = _read_all(policy, samples, tokens)
    for k, level in enumerate(LEVELS):
        grid[level][tuple(torch.tensor(spots).T)] = read[:, k]
    final = torch.zeros(len(trajectories))
    cut = [b for b, tr in enumerate(trajectories) if not tr.end.terminated]
    if cut:
        ends = [state_sample(trajectories[b].final_prompt_ids) for b in cut]
        final[cut] = _read_all(policy, ends, tokens)[:, LEVELS.index("high")]
    return Values(grid["high"], grid["low"], grid["switch"], final)


@torch.no_grad()
def mix_switch_values(
    policy: Policy, codec: Codec, trajectories: list[Trajectory], values: Values, tokens: int
) -> Values:
    """The paper's switch baseline from two heads: V_switch = β V_high + (1 − β) V_low(s, g_prev).

    β is the probability with which SWITCH was sampled. On a KEEP turn V_low(s, g_prev) is the
    turn's own V_low; on a SWITCH turn it is read from the response the agent would have
    written to keep. Turn 0 has no previous subgoal: V_switch = V_high.

    References:
        HiPER, arXiv:2602.16165, section 4 (the switch advantage has no head of its own).
    """
    switch = values.high.clone()
    rows, spots = [], []
    opening, after_switch, after_subgoal, _ = codec.skeleton
    for b, trajectory in enumerate(trajectories):
        for t, turn in enumerate(trajectory.turns[1:], 1):
            drawn = [
                lp for lp, role, c in zip(turn.logprobs, turn.roles, turn.chosen, strict=True)
                if c and role == Role.SWITCH
            ]  # fmt: skip
            p = float(np.exp(sum(drawn))) if drawn else 1.0
            beta = p if turn.switch else 1 - p
            switch[b, t] = beta * values.high[b, t] + (1 - beta) * values.low[b, t]
            if turn.switch:
                kept = codec.encode(trajectory.turns[t - 1].subgoal)
                keep = (*opening, *codec.encode(KEEP), *after_switch, *kept, *after_subgoal)
                rows.append(state_sample([*turn.prompt_ids, *keep]))
                spots.append((b, t, beta))
    kept_low = _read_all(policy, rows, tokens)[:, LEVELS.index("low")].tolist()
    for (b, t, beta), low in zip(spots, kept_low, strict=True):
        switch[b, t] = beta * values.high[b, t] + (1 - beta) * low
    return values._replace(switch=switch)


def state_sample(ids: list[int]) -> Sample:
    """A row that only has values, all read at its end."""
    return Sample(ids, len(ids), len(ids), [], [], [], [])


def _read_all(policy: Policy, samples: list[Sample], tokens: int) -> Float[Tensor, "row level"]:
    """The three heads on every sample; nothing after the action's first token is fed."""
    read = torch.zeros(len(samples), len(LEVELS))
    for index in micro_batches([s.action for s in samples], tokens):
        rows = [samples[i] for i in index]
        cut = [Sample(s.ids[: s.action], s.prompt, s.action, [], [], [], []) for s in rows]
        batch = collate(cut, policy.device)
        read[index] = read_values(policy, batch, policy.hidden(batch.ids, "critic")).cpu()
    return read


# -------------------------------------------------------------------------------------------- loss


Logged = dict[str, tuple[float | int, int]]  # name → (sum, count): micro-batches add up exactly


def policy_loss(batch: Batch, now: Scores, config: PPOConfig) -> tuple[Tensor, Logged]:
    """Clipped surrogate with dual clip, KL and entropy terms, summed (not averaged) over tokens.

        L = −min(ρ A, clip(ρ, 1−ε, 1+ε) A), and where A < 0 at most −c A;  ρ = exp(logπ − logπ_old)

    The KL to the reference is the k3 estimator exp(d) − d − 1, d = logπ_ref − logπ ≥ 0 in the mean.

    References:
        Schulman et al. 2017, arXiv:1707.06347 (clip). Ye et al. 2020, arXiv:1912.09729 (dual clip).
    """
    ratio = (now.logprob - batch.logprob_old).exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    loss = torch.maximum(-batch.advantage * ratio, -batch.advantage * clipped)
    bounded = torch.minimum(loss, -config.dual_clip * batch.advantage)
    loss = torch.where(batch.advantage < 0, bounded, loss)
    gap = (batch.logprob_reference - now.logprob).clamp(-10, 10)
    k3 = gap.exp() - gap - 1
    n = len(ratio)
    logged = {
        "policy/loss": (loss.sum().item(), n),
        "policy/kl_k3": (k3.sum().item(), n),
        "policy/clip_fraction": ((ratio != clipped).sum().item(), n),
    }
    for role in (Role.SWITCH, Role.SUBGOAL, Role.ACTION):
        mine, name = batch.role == role, role.name.lower()
        count = mine.sum().item()
        for what, each in (("kl", k3), ("entropy", now.entropy)):
            logged[f"policy/{what}_{name}"] = (each[mine].sum().item(), count)
    total = loss + config.kl_coef * k3 - config.entropy_coef * now.entropy
    return total.sum(), logged


def value_loss(batch: Batch, now: Float[Tensor, "seq level"], clip: float) -> Tensor:
    """Clipped squared error per level, summed over the turns that train it.

    L = max((V − G)², (V_old + clip(V − V_old, ±c) − G)²)
    """
    clipped = batch.value_old + (now - batch.value_old).clamp(-clip, clip)
    loss = torch.maximum((now - batch.target) ** 2, (clipped - batch.target) ** 2)
    return (loss * batch.value_trained).sum(0)
