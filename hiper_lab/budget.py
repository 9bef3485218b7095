"""What a study costs before it is run: tokens, GPU-hours and memory, from formulas.

Time is floating-point operations, and bytes read from memory, over what a GPU does at best times
the share of it that is reached. Memory is counted tensor by tensor, as this trainer holds them.

Left out on purpose: the environments' own time, traffic between GPUs, measuring (the dry run).
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import AutoConfig

from hiper_lab.config import TrainConfig
from hiper_lab.objective import LOGITS
from hiper_lab.policy import TINY


class Architecture(NamedTuple):
    """The shape of a Llama- or Qwen-type causal language model."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    """The output embedding is the input embedding."""
    qkv_bias: bool


KNOWN = {
    TINY: Architecture(2, 64, 2, 2, 32, 192, 640, True, False),
    "smollm": Architecture(30, 576, 9, 3, 64, 1536, 49_152, True, False),
    "Qwen/Qwen2.5-0.5B-Instruct": Architecture(24, 896, 14, 2, 64, 4864, 151_936, True, True),
    "Qwen/Qwen2.5-1.5B-Instruct": Architecture(28, 1536, 12, 2, 128, 8960, 151_936, True, True),
    "Qwen/Qwen2.5-7B-Instruct": Architecture(28, 3584, 28, 4, 128, 18_944, 152_064, False, True),
}


class Lengths(NamedTuple):
    """Means over a whole training."""

    turns: float
    """Turns of an episode."""
    prompt: float
    """Tokens read in a turn."""
    response: float
    """Tokens written in a turn."""


# Of the published runs (alfworld_seed6_1_5b, webshop_dev_h100), whose episodes get shorter as they
# succeed: their rows per iteration over 128 episodes; and of our demo's first iteration.
TYPICAL = {
    "alfworld": Lengths(27, 740, 40),
    "webshop": Lengths(7.4, 1330, 71),
    "household": Lengths(20, 50, 11),
}


class GPU(NamedTuple):
    """What a GPU does at best, and the share of it that is reached. By default an H100."""

    flops: float = 989e12
    """Dense bfloat16 operations per second."""
    bandwidth: float = 3.35e12
    """Bytes of its memory read per second."""
    utilisation: float = 0.21
    """In (0, 1]; this one is that of the published runs' policy updates, by the formulas below."""


class Budget(NamedTuple):
    """What one run takes."""

    written: float
    """Tokens sampled, evaluations included."""
    read: float
    """Tokens of the prompts they answer."""
    hours: dict[str, float]
    """GPU-hours by phase."""
    memory: dict[str, float]
    """Bytes on each GPU, by what holds them; the sum is the peak, which is in the update."""


def architecture(model: str) -> Architecture:
    """The shape of a model, by its name or from the folder it is in.

    Raises:
        ValueError: If it is neither known nor the folder of such a model.

    Example:
        >>> parameters(architecture("Qwen/Qwen2.5-1.5B-Instruct"))
        1543714304
    """
    if model in KNOWN:
        return KNOWN[model]
    try:
        c = AutoConfig.from_pretrained(model, local_files_only=True).get_text_config()
        dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        return Architecture(
            c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, dim,
            c.intermediate_size, c.vocab_size, c.tie_word_embeddings, c.model_type == "qwen2",
        )  # fmt: skip
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"model is {model!r}, expected one of {sorted(KNOWN)} or a folder with the config.json "
            "of a Llama- or Qwen-type model"
        ) from error


def parameters(a: Architecture, embeddings: bool = True) -> int:
    """Number of weights, with or without the embeddings (input, and output if not tied).

    Example:
        >>> parameters(KNOWN["tiny"]), parameters(KNOWN["tiny"], embeddings=False)
        (147776, 106816)
    """
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    attention = 2 * a.width * q + 2 * a.width * kv + a.qkv_bias * (q + 2 * kv)
    layer = attention + 3 * a.width * a.ffn + 2 * a.width
    return a.layers * layer + a.width + embeddings * (2 - a.tied) * a.vocab * a.width


def adapters(a: Architecture, rank: int) -> int:
    """Number of weights of LoRA adapters on all linear layers: rank × (inputs + outputs) of each.

    Example:
        >>> adapters(KNOWN["tiny"], 1)     # 2 layers × (4 × (64 + 64) + 3 × (64 + 192))
        2560
    """
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    return a.layers * rank * (2 * (a.width + q) + 2 * (a.width + kv) + 3 * (a.width + a.ffn))


def forward(a: Architecture, rows: float, length: float, scored: float) -> float:
    """FLOPs of a forward pass: 2 per weight and token, and what causal attention adds.

        rows × (length × (2 N + 2 layers × heads × head_dim × length) + scored × 2 width × vocab)

    with N the weights but the embeddings; a backward pass takes twice as many (once, where the
    weights are frozen).

    Args:
        scored: Tokens per row whose logits are computed.
    """
    token = 2 * parameters(a, False) + 2 * a.layers * a.heads * a.head_dim * length
    return rows * (length * token + scored * 2 * a.width * a.vocab)


def activations(a: Architecture, tokens: float, half: bool, checkpointing: bool = False) -> float:
    """Bytes that a forward pass keeps for the backward pass, without logits.

    Exactly what torch saves per token and layer: under bfloat16 autocast

        26 width + 4 heads × head_dim + 4 kv_heads × head_dim + 8 ffn + 4 heads + 8

    (in float32 24, 8, 8 and 16). Checkpointing keeps each layer's input, and one layer.
    """
    w, q, kv, f = (26, 4, 4, 8) if half else (24, 8, 8, 16)
    layer = w * a.width + a.head_dim * (q * a.heads + kv * a.kv_heads) + f * a.ffn + 4 * a.heads + 8
    if checkpointing:
        return tokens * (a.layers * 4 * a.width + layer)
    return tokens * a.layers * layer


def estimate(
    config: TrainConfig,
    lengths: Lengths | None = None,
    gpu: GPU | None = None,
    gpus: int = 1,
) -> Budget:
    """Tokens, GPU-hours and memory of one run.

    Collection is taken to be an engine's, such as vLLM: prompts are read as one forward pass, and
    then every lock step reads all weights (bfloat16) and every token written its KV cache.

    Args:
        lengths: Means over the training; None: the typical ones of the environment.
        gpu: None: an H100 at the published runs' utilisation.
        gpus: Trajectories are shared out; weights, gradients and moments are sharded (FSDP).

    Raises:
        ValueError: On an unknown model, or no GPU.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}, expected at least 1")
    lengths, gpu = lengths or TYPICAL[config.env], gpu or GPU()
    policy = architecture(config.model)
    critic = architecture(config.critic_model) if config.critic_model else policy
    rows, whole = config.episodes * lengths.turns, lengths.prompt + lengths.response
    n, lora, again = config.iterations, config.lora_rank, config.gradient_checkpointing

    kv_token = 2 * 2 * policy.layers * policy.kv_heads * policy.head_dim  # K and V, bfloat16
    steps = config.max_turns * lengths.response  # some episode runs to the limit
    moved = gpus * steps * 2 * parameters(policy) + rows * lengths.response * whole * kv_token
    seconds = {"collect": forward(policy, rows, whole, lengths.response) / gpu.flops}
    seconds["collect"] += moved / gpu.bandwidth
    played = 0.0  # episodes of evaluations, in iterations' worth
    if config.eval_games:
        evaluations = 2 + (max(0, n - 1) // config.eval_every if config.eval_every else 0)
        played = evaluations * config.eval_games / config.episodes / n
    seconds["evaluate"] = played * seconds["collect"]

    once = forward(policy, rows, whole, lengths.response) / gpu.flops
    values = 0.0 if config.critic == "shared" else forward(critic, rows, whole, 0) / gpu.flops
    backward = (1 if lora else 2) + again
    trained = config.epochs * max(0, n - config.warmup_iterations) / n
    frozen = config.critic == "adapter"
    seconds["score"] = values + (once if config.ppo.kl_coef else 0)
    seconds["update policy"] = trained * (1 + backward) * once
    passes = 1 + (1 if frozen else 2) + again
    seconds["update critic"] = config.critic_epochs * passes * values

    own, theirs = parameters(policy), parameters(critic)
    trainable = {"adapter": adapters(critic, lora), "separate": theirs, "shared": 0}[config.critic]
    trainable += adapters(policy, lora) if lora else own
    still = own if lora or config.ppo.kl_coef else 0  # the frozen base, or the frozen reference
    tokens = max(config.micro_batch_tokens, config.rollout.max_prompt_tokens)
    trunks = [policy] if config.critic == "shared" else [policy, critic]
    scored = tokens * lengths.response / whole
    memory = {
        "weights": 4 * (trainable + still) / gpus,
        "gradients": 4 * trainable / gpus,
        "moments": 8 * trainable / gpus,
        "bfloat16 copies": 2 * sum(map(parameters, trunks)),
        "activations": sum(activations(a, tokens, True, again) for a in trunks),
        "logits": 6 * 4 * min(scored * policy.vocab, LOGITS),
    }
    share = n * (1 + played) * rows
    hours = {phase: n * x / gpu.utilisation / 3600 for phase, x in seconds.items()}
    return Budget(share * lengths.response, share * lengths.prompt, hours, memory)


def table(studies: dict[str, Sequence[Budget]]) -> str:
    """Studies, each the budgets of its runs, as Markdown."""
    lines = [
        "| study | runs | tokens written | tokens read | GPU-hours per run | of the study | "
        "collecting | peak memory per GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in studies.items():
        written, read = (sum(each) for each in list(zip(*runs, strict=True))[:2])
        hours = [sum(run.hours.values()) for run in runs]
        collecting = sum(run.hours["collect"] + run.hours["evaluate"] for run in runs) / sum(hours)
        peak = max(sum(run.memory.values()) for run in runs)
        lines.append(
            f"| {name} | {len(runs)} | {written / 1e6:,.1f}M | {read / 1e6:,.1f}M | "
            f"{sum(hours) / len(runs):,.3g} | {sum(hours):,.3g} | {collecting:.0%} | "
            f"{peak / 2**30:,.3g} GiB |"
        )
    return "\n".join(lines)
