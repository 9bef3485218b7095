"""Decoding: from a prompt to a Plan-Execute response, token by token.

A *decoder* is a generator that writes one response into a :class:`Draft`. It yields the token ids
allowed next (None: the whole vocabulary), is sent the token that was drawn, and injects by itself
whatever is not a choice. The same generator is replayed on recorded tokens when training, so the
log-probabilities are renormalised over the same sets both times and the PPO ratio is 1 on policy.

- ``guided``: the skeleton is injected, KEEP copies the subgoal, the action is drawn from the
  admissible list by a token trie. This is π(q)·π(g)^q·π(a), token by token.
- ``free``: the model writes everything and stops at ``</action>``.
- ``action``: an admissible action and nothing else. A flat policy, to compare with.

Left out on purpose: other engines (their adapters drive the same decoders).
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from hiper_lab import protocol
from hiper_lab.policy import Policy, scores
from hiper_lab.protocol import KEEP, SKELETON, SWITCH, Response, Role
from hiper_lab.trajectory import Turn

DECODINGS = ("guided", "free", "action")
ACTION_START = "<action>"
Decoder = Generator[np.ndarray | None, int, Response]


@dataclass
class Draft:
    """A response being written: per token its id, Role, whether it was a choice, its logprob."""

    ids: list[int] = field(default_factory=list)
    roles: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # V_low is read before this response token: the first of the action (None: no action yet)
    action_at: int | None = None
    # {level: value}, read in the sampling pass when the critic shares the policy's trunk
    values: dict[str, float] = field(default_factory=dict)

    def inject(self, ids: Iterable[int], role: Role = Role.FORMAT) -> None:
        for token in ids:
            self._add(token, role, False)

    def choose(self, token: int, role: Role) -> None:
        self._add(token, role, True)

    def _add(self, token: int, role: Role, chosen: bool) -> None:
        self.ids.append(int(token))
        self.roles.append(int(role))
        self.chosen.append(chosen)
        self.logprobs.append(0.0)


@dataclass(frozen=True)
class Prompt:
    """Prompt ids in two parts; ``static`` is the same at every turn, so its KV cache is shared."""

    static: tuple[int, ...]
    dynamic: tuple[int, ...]

    @property
    def ids(self) -> list[int]:
        return [*self.static, *self.dynamic]


class Codec:
    """What the decoders need to know of a tokenizer, worked out once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        self.skeleton = [self._encode(piece) for piece in SKELETON]
        self.subgoal_end = self.skeleton[2][0]
        size = len(tokenizer)
        self.pieces = tokenizer.batch_decode([[i] for i in range(size)])
        special = set(tokenizer.all_special_ids)
        skeleton = {token for piece in self.skeleton for token in piece}
        content = [
            i for i, piece in enumerate(self.pieces)
            if i not in special and i not in skeleton and piece and not set(piece) & set("<>\n�")
        ]  # fmt: skip
        # A subgoal is a line of text: its first token is not blank, any later one may end it.
        self.subgoal_first = np.array([i for i in content if self.pieces[i].strip()])
        self.subgoal_next = np.array([*content, self.subgoal_end])
        self.switch_trie = self.trie((KEEP, SWITCH), self.skeleton[1][0])

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def spell(self, ids: list[int]) -> list[str]:
        """The text of each token; joined, they are what `decode` gives.

        A character that several tokens make up belongs to the last of them.
        """
        text, pieces = self.decode(ids), [self.pieces[i] for i in ids]
        if "".join(pieces) == text:
            return pieces
        ends = [len(self.decode(ids[:k]).rstrip("�")) for k in range(len(ids))]
        return [text[a:b] for a, b in itertools.pairwise([*ends, len(text)])]

    def prompt(self, static: str, dynamic: str) -> Prompt:
        """Wrap the two parts in the chat template, if the tokenizer has one, and encode each."""
        if self.tokenizer.chat_template:
            mark = "\x00"
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": static + mark + dynamic}],
                tokenize=False, add_generation_prompt=True,
            )  # fmt: skip
            static, _, dynamic = text.partition(mark)  # a model may have written one itself
            return Prompt(self.encode(static), self._encode(dynamic))
        bos = self.tokenizer.bos_token_id
        return Prompt(
            (*([] if bos is None else [bos]), *self.encode(static)), self._encode(dynamic)
        )

    def write(self, switch: bool, subgoal: str, action: str) -> list[int]:
        """Token ids of a well-formed response, piece by piece as guided decoding writes it."""
        words = (SWITCH if switch else KEEP, subgoal, action)
        parts = [(*a, *self.encode(b)) for a, b in zip(self.skeleton, words, strict=False)]
        return [token for part in (*parts, self.skeleton[3]) for token in part]

    def write_action(self, action: str) -> list[int]:
        """Token ids of a response that is an action only."""
        return [*self.encode(ACTION_START), *self.encode(action), *self.skeleton[3]]

    def trie(self, texts: Iterable[str], end: int) -> dict:
        """Token trie of the texts, each closed by ``end``, so that none is a prefix of another."""
        root: dict = {}
        for text in texts:
            node = root
            for token in (*self.encode(text), end):
                node = node.setdefault(token, {})
        return root


# ---------------------------------------------------------------------------------------- decoders


def guided(
    codec: Codec, draft: Draft, subgoal: str, admissible: list[str], max_tokens: int
) -> Decoder:
    """Write a well-formed response: choose KEEP or SWITCH, a subgoal, an admissible action.

    Args:
        subgoal: The active subgoal; empty at the first turn, where the switch is forced.
        max_tokens: Longest subgoal, in tokens.

    Raises:
        ValueError: If nothing is admissible.
    """
    _refuse_none(admissible)
    opening, after_switch, after_subgoal, _ = codec.skeleton
    draft.inject(opening)
    switch = True
    if subgoal:
        word = yield from _walk(codec.switch_trie, draft, Role.SWITCH)
        switch = codec.decode(word) == SWITCH
    else:
        draft.inject((*codec.encode(SWITCH), after_switch[0]))
    draft.inject(after_switch[1:])
    if switch:
        subgoal = yield from _write_subgoal(codec, draft, max_tokens)
    else:
        draft.inject(codec.encode(subgoal))
        draft.inject(after_subgoal)
    action = yield from _choose_action(codec, draft, admissible)
    return Response(switch, subgoal, action)


def action_only(
    codec: Codec, draft: Draft, subgoal: str, admissible: list[str], max_tokens: int
) -> Decoder:
    """Choose an admissible action: no switch and no subgoal are written, so there is one segment.

    Args:
        subgoal, max_tokens: Not read.

    Raises:
        ValueError: If nothing is admissible.
    """
    _refuse_none(admissible)
    draft.inject(codec.encode(ACTION_START))
    action = yield from _choose_action(codec, draft, admissible)
    return Response(False, "", action)


def _refuse_none(admissible: list[str]) -> None:
    if not admissible:
        raise ValueError("guided decoding needs at least one admissible action, got none")


def _choose_action(
    codec: Codec, draft: Draft, admissible: list[str]
) -> Generator[np.ndarray, int, str]:
    closing = codec.skeleton[3]
    draft.action_at = len(draft.ids)
    words = yield from _walk(codec.trie(admissible, closing[0]), draft, Role.ACTION)
    draft.inject(closing[1:])
    return next(a for a in admissible if codec.encode(a) == words)


def _walk(node: dict, draft: Draft, role: Role) -> Generator[np.ndarray, int, tuple[int, ...]]:
    """Descend a trie to a leaf; a node with one child is no choice. The end token is dropped."""
    start = len(draft.ids)
    while node:
        if len(node) == 1:
            (token,) = node
            draft.inject([token], role)
        else:
            token = yield np.fromiter(node, dtype=np.int64)
            draft.choose(token, role)
        node = node[token]
    return tuple(draft.ids[start:-1])


def _write_subgoal(codec: Codec, draft: Draft, max_tokens: int) -> Generator[np.ndarray, int, str]:
    start = len(draft.ids)
    while len(draft.ids) - start < max_tokens:
        token = yield codec.subgoal_next if len(draft.ids) > start else codec.subgoal_first
        draft.choose(token, Role.SUBGOAL)
        if token == codec.subgoal_end:
            break
    else:
        draft.inject([codec.subgoal_end])
    text = codec.decode(draft.ids[start:-1]).strip()
    draft.inject(codec.skeleton[2][1:])
    return text


def free(
    codec: Codec, draft: Draft, subgoal: str, admissible: list[str], max_tokens: int
) -> Decoder:
    """Let the model write everything; stop at ``</action>``, at the end token, or at the limit.

    Args:
        max_tokens: Longest response, in tokens. What it cuts off is malformed, and says so.
    """
    text = ""
    while len(draft.ids) < max_tokens and SKELETON[3] not in text:
        token = yield None
        draft.choose(token, Role.FORMAT)
        if token == codec.tokenizer.eos_token_id:
            break
        text += codec.pieces[token]
    ended = [i for i in draft.ids if i != codec.tokenizer.eos_token_id]
    draft.roles[: len(ended)] = map(int, protocol.roles([codec.pieces[i] for i in ended]))
    return protocol.parse(codec.decode(ended), subgoal)


DECODERS = {"guided": guided, "free": free, "action": action_only}
ACTION_TOKENS = 64  # room for a listed action; the longest of WebShop's searches have about 40


def longest_response(codec: Codec, decoding: str, max_tokens: int) -> int:
    """Tokens that a response may have at most; what a context must leave room for."""
    if decoding == "free":
        return max_tokens
    return len(codec.write(True, "", "")) + max_tokens + ACTION_TOKENS


def decided(decoder: Decoder, tokens: Sequence[int]) -> Decoder:
    """The same decoder with its first choices made: it asks for those that are left.

    Example:
        >>> def two() -> Decoder:
        ...     first = yield None
        ...     return (first, (yield None))
        >>> rest = decided(two(), [7])
        >>> next(rest) is None  # the second choice
        True
        >>> rest.send(8)
        Traceback (most recent call last):
        StopIteration: (7, 8)
    """
    try:
        allowed = next(decoder)
        for token in tokens:
            allowed = decoder.send(token)
        while True:
            allowed = decoder.send((yield allowed))
    except StopIteration as stop:
        return stop.value


def allowed_sets(
    codec: Codec, turn: Turn, subgoal: str, decoding: str, max_tokens: int
) -> list[np.ndarray | None]:
    """The set each chosen token of a recorded turn was drawn from, by replaying its decoder.

    Raises:
        ValueError: If the record does not fit the decoder (other tokenizer, other settings).
    """
    draft, sets = Draft(), []
    decoder = DECODERS[decoding](codec, draft, subgoal, turn.admissible, max_tokens)
    tokens = (i for i, chosen in zip(turn.response_ids, turn.chosen, strict=True) if chosen)
    try:
        allowed = next(decoder)
        for token in tokens:
            sets.append(allowed)
            allowed = decoder.send(token)
    except (StopIteration, KeyError):
        pass
    if draft.ids != turn.response_ids or len(sets) != sum(turn.chosen):
        raise ValueError(
            f"turn does not replay under {decoding!r} decoding: recorded {turn.response!r}, "
            f"replayed {codec.decode(draft.ids)!r}; "
            "expected the tokenizer and settings it was sampled with"
        )
    return sets


# ----------------------------------------------------------------------------------- the hf sampler


# A sampler runs decoders to their ends: (prompts, drafts, decoders) → responses.
Sampler = Callable[[list[Prompt], list[Draft], list[Decoder]], list[Response]]


def hf_sampler(policy: Policy, temperature: float, generator: torch.Generator) -> Sampler:
    """The sampler over the policy's own transformers model.

    Args:
        temperature: 0 is greedy (log-probabilities are then those of temperature 1).
        generator: Source of randomness, on the policy's device.
    """

    def sample(
        prompts: list[Prompt], drafts: list[Draft], decoders: list[Decoder]
    ) -> list[Response]:
        responses: dict[int, Response] = {}
        for index in micro_batches([len(prompt.dynamic) for prompt in prompts]):
            rows = [[column[i] for i in index] for column in (prompts, drafts, decoders)]
            responses |= zip(index, _sample(policy, temperature, generator, *rows), strict=True)
        return [responses[i] for i in range(len(prompts))]

    return sample


def micro_batches(lengths: Sequence[int], tokens: float = math.inf) -> Iterator[list[int]]:
    """Split rows, longest first, so that rows × longest row ≤ ``tokens`` (one row at the least).

    No row is shorter than half the longest beside it: less than half of the work is padding.

    Example:
        >>> list(micro_batches([3, 9, 4, 10], tokens=30))
        [[3, 1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = max(1, lengths[order[0]])
        alike = sum(2 * lengths[i] >= longest for i in order)
        size = max(1, int(min(tokens / longest, alike)))
        yield order[:size]
        order = order[size:]


@torch.no_grad()
def _sample(
    policy: Policy,
    temperature: float,
    generator: torch.Generator,
    prompts: list[Prompt],
    drafts: list[Draft],
    decoders: list[Decoder],
) -> list[Response]:
    """Our own batched KV-cache loop.

    Every forward feeds each row all that it has pending, injected tokens included, left-padded so
    that the last column predicts the next choice. The static prefix is computed once; rows that are
    finished leave the batch.
    """
    device = policy.device
    responses: list[Response | None] = [None] * len(decoders)
    allowed: list[np.ndarray | None] = [None] * len(decoders)

    def advance(row: int, token: int | None) -> bool:
        try:
            allowed[row] = next(decoders[row]) if token is None else decoders[row].send(token)
            return True
        except StopIteration as stop:
            responses[row] = stop.value
            return False

    rows = [row for row in range(len(decoders)) if advance(row, None)]
    cache, mask = _prefix(policy, prompts[0].static, len(rows))
    fed = [0] * len(decoders)
    pending = {row: [*prompts[row].dynamic, *drafts[row].ids] for row in rows}
    while rows:
        width = max(len(pending[row]) for row in rows)
        ids = _left_pad([pending[row] for row in rows], width, device)
        real = _left_pad([[1] * len(pending[row]) for row in rows], width, device)
        mask = torch.cat([mask, real], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -width:]
        hidden = policy.hidden(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        if policy.critic == "shared":
            _read_values(policy, hidden, [drafts[row] for row in rows], [fed[row] for row in rows])
        logits = policy.logits(hidden[:, -1])
        logits = logits if temperature == 0 else logits / temperature
        mask_out = allowed_mask([allowed[row] for row in rows], logits.shape[-1])
        if mask_out is not None:
            logits = logits.masked_fill(~mask_out.to(device), -torch.inf)
        if temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        logprobs = scores(logits, None, tokens, 1.0).logprob.tolist()
        keep = []
        for k, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            fed[row] = len(drafts[row].ids)
            going = advance(row, token)
            drafts[row].logprobs[fed[row]] = logprobs[k]
            if going:
                keep.append(k)
                pending[row] = drafts[row].ids[fed[row] :]
        if len(keep) < len(rows):
            rows = [rows[k] for k in keep]
            index = torch.tensor(keep, dtype=torch.long, device=device)
            cache.batch_select_indices(index)
            mask = mask[index]
    return responses


def _read_values(policy: Policy, hidden: Tensor, drafts: list[Draft], fed: list[int]) -> None:
    """Values of the rows whose reading positions lie in the tokens just fed.

    ``hidden`` ends with response tokens ``fed … len(ids) − 1`` of each draft, preceded, in the
    first pass, by its prompt.
    """
    for draft, row, before in zip(drafts, hidden, fed, strict=True):
        end = len(row) - len(draft.ids)  # where response token 0 would stand
        reads = [("high", 0), ("switch", 0)] if not draft.values else []
        if draft.action_at is not None and before < draft.action_at:
            reads.append(("low", draft.action_at))
        for level, position in reads:
            draft.values[level] = policy.heads(level, row[end + position - 1][None]).item()


def _left_pad(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)


def _prefix(policy: Policy, static: tuple[int, ...], rows: int) -> tuple[DynamicCache, Tensor]:
    """KV cache of the shared prefix, computed for one row and repeated."""
    cache = DynamicCache(config=policy.lm.config)
    if static and rows:
        ids = torch.tensor([static], device=policy.device)
        policy.hidden(ids, past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(rows)
    return cache, torch.ones(
        rows, len(static) if rows else 0, dtype=torch.long, device=policy.device
    )


def allowed_mask(sets: list[np.ndarray | None], vocab: int) -> Tensor | None:
    """Boolean ``[n, vocab]`` of the sets; None if none of them restricts anything."""
    if all(s is None for s in sets):
        return None
    mask = torch.zeros(len(sets), vocab, dtype=torch.bool)
    everything = [i for i, s in enumerate(sets) if s is None]
    mask[everything] = True
    some = [i for i, s in enumerate(sets) if s is not None]
    index = np.repeat(some, [len(sets[i]) for i in some])
    mask[torch.from_numpy(index), torch.from_numpy(np.concatenate([sets[i] for i in some]))] = True
    return mask
