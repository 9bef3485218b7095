"""Will it fit? An estimate, a dry run of the longest batches, and which number to change if not.

On a GPU the dry run decides, before the first game is played. On a CPU, where the system kills
whoever asks for too much, the estimate does.

Left out on purpose: choosing the numbers; they decide how fast a run is, and that is the user's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

from hiper_lab import objective
from hiper_lab.objective import Sample
from hiper_lab.policy import Policy
from hiper_lab.protocol import Role

PROBE = 64  # tokens of a probing pass
GIB = 2**30


class Longest(NamedTuple):
    """The longest batches that a configuration allows, in rows and tokens."""

    prompt: int
    response: int
    decode_rows: int
    """Responses written at a time."""
    micro_batch_tokens: int
    minibatch_turns: int

    @property
    def row(self) -> int:
        return self.prompt + self.response

    @property
    def train_rows(self) -> int:
        """Rows of the longest micro-batch.

        >>> Longest(2048, 512, 128, micro_batch_tokens=40960, minibatch_turns=256).train_rows
        16
        """
        return min(self.minibatch_turns, max(1, self.micro_batch_tokens // self.row))


class Memory(NamedTuple):
    """Bytes on one device. Playing and learning take turns: only the larger of them counts."""

    weights: int
    moments: int
    """AdamW's two, float32."""
    gradients: int
    activations: int
    """Kept for the backward pass of the longest micro-batch, logits included."""
    cache: int
    """Keys and values of the longest batch of responses, and one layer's work on their prompts."""

    @property
    def total(self) -> int:
        learning = self.gradients + self.activations
        return self.weights + self.moments + max(learning, self.cache)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in self._asdict().items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def estimate(policy: Policy, longest: Longest, processes: int = 1) -> Memory:
    """What a training will take at its peak.

    Weights, gradients and moments are counted. What a token costs in activations is measured, by
    two short passes of this very model: it depends on the architecture, the precision, the critic,
    LoRA and gradient checkpointing, and grows linearly with tokens. Room for temporary tensors is
    not included; allow a fifth more.

    Args:
        processes: How many of them share weights, gradients and moments between them (FSDP).
    """
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    config = policy.lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 if policy.half else 4  # bytes; rotated keys are float32 all the same
    wide = getattr(config, "intermediate_size", 4 * config.hidden_size)
    per_cached = config.num_hidden_layers * heads * head * (4 + width)
    per_cached += 3 * wide * width + 2 * config.hidden_size * 4
    per_token, fixed = _activations(policy)
    if policy.gradient_checkpointing:  # the backward pass unfolds one layer at a time
        policy.gradient_checkpointing = False
        per_token += _activations(policy)[0] // config.num_hidden_layers
        policy.gradient_checkpointing = True
    rows, read = longest.train_rows, longest.train_rows * longest.response
    logits = 6 * 4 * min(objective.LOGITS, read * policy.vocab)
    return Memory(
        weights=weights // processes, moments=8 * trained // processes,
        gradients=4 * trained // processes,
        activations=rows * longest.row * per_token + fixed + logits,
        cache=longest.decode_rows * longest.row * per_cached,
    )  # fmt: skip


def _activations(policy: Policy) -> tuple[int, int]:
    """Bytes kept for the backward pass: per token, and whatever the number of tokens."""
    one, two = _kept(policy, PROBE), _kept(policy, 2 * PROBE)
    per_token = (two - one) // PROBE
    return per_token, max(0, one - PROBE * per_token)


def _kept(policy: Policy, tokens: int) -> int:
    """Bytes that a pass over one row keeps for its backward pass, weights left out."""
    batch = objective.collate([objective.state_sample([0] * tokens)], policy.device)
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        objective.read(policy, batch, 1.0, True)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights)


def available(device: torch.device) -> int:
    """Bytes that this process may still take there, and those it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def play(policy: Policy, longest: Longest) -> None:
    """What the sampler does for its longest batch of responses, without the games."""
    ids = torch.zeros(longest.decode_rows, longest.row, dtype=torch.long, device=policy.device)
    cache = DynamicCache(config=policy.lm.config)
    with torch.no_grad():
        policy.logits(policy.hidden(ids, past_key_values=cache, use_cache=True)[:, -1])


def samples(longest: Longest) -> list[Sample]:
    """The longest micro-batch: every token of every response was a choice from all there are."""
    n, at = longest.response, range(longest.prompt - 1, longest.row - 1)
    row = Sample(
        ids=[0] * longest.row, prompt=longest.prompt, action=longest.row - 1, at=list(at),
        role=[int(Role.ACTION)] * n, logprob_old=[0.0] * n, allowed=[None] * n,
    )  # fmt: skip
    return [row] * longest.train_rows


# ------------------------------------------------------------------------------------------ advice


def advice(policy: Policy, longest: Longest, stage: str, started: bool) -> str:
    """Which numbers to change, from the cheapest on.

    Args:
        stage: ``playing`` or ``learning``.
        started: Only what a run may change and still be the same run.
    """
    if stage == "playing":
        fewer = max(1, longest.decode_rows // 2)
        options = [f"set decode_rows to {fewer}"] if longest.decode_rows > 1 else []
    else:
        options = []
        if longest.train_rows > 1:
            fewer = longest.row * (longest.train_rows // 2)
            options = [f"lower micro_batch_tokens from {longest.micro_batch_tokens} to {fewer}"]
        if not policy.gradient_checkpointing:
            options.append("set gradient_checkpointing to true")
        if not policy.lora_rank and not started:
            options.append("train a LoRA adapter (lora_rank 16)")
    if not started or not options:
        options.append(f"lower max_prompt_tokens from {longest.prompt}")
    return ", or ".join(options)


@contextmanager
def explained(
    policy: Policy, longest: Longest, stage: str, iteration: int | None
) -> Iterator[None]:
    """Turn the engine's out-of-memory errors into one that says what to change.

    Args:
        iteration: Where the run is; None before it starts.

    Raises:
        MemoryError: In place of whatever torch raises on this device.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        started = iteration is not None
        when = f"{stage} in iteration {iteration + 1}" if started else f"a dry run of {stage}"
        then = (
            "; the last checkpoint is safe: the same run with another of these numbers resumes"
            if started else ""
        )  # fmt: skip
        raise MemoryError(
            f"out of memory while {when}: {advice(policy, longest, stage, started)}{then}. "
            f"({str(error).splitlines()[0]})"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    said = ("out of memory", "can't allocate memory", "not enough memory")
    kind = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return kind or any(text in str(error) for text in said)


def refuse(policy: Policy, longest: Longest, needed: Memory) -> None:
    """Refuse what will not fit into this machine's memory.

    Raises:
        MemoryError: With the estimate, what there is, and which number to change.
    """
    there = available(policy.device)
    if needed.total > there:
        learning = needed.gradients + needed.activations > needed.cache
        stage = "learning" if learning else "playing"
        raise MemoryError(
            f"{stage} takes about {needed}, but {there / GIB:.2f} GiB are free: "
            f"{advice(policy, longest, stage, started=False)}"
        )
