"""Everything that defines a run, checked before anything starts.

Notebooks, YAML files and the command line give flat names; a run keeps the nested form.

Left out on purpose: sweeps over configurations (see sweeps).
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field, replace
from typing import Any

from hiper_lab.credit import CreditConfig
from hiper_lab.envs.games import HORIZONS, LONG_TASK_TYPES, SIZES, SPLITS, TASK_TYPES
from hiper_lab.flat import GROUP_RELATIVE
from hiper_lab.objective import PPOConfig
from hiper_lab.policy import CRITICS, PRECISIONS
from hiper_lab.rollout import RolloutConfig

ENVS = ("household", "alfworld", "alfworld_engine", "webshop")
PRESETS = ("lab", "paper", "upstream")
ENGINES = ("hf", "vllm")  # or the address of a server
# Their fields are flat parameters beside our own.
STAGES = {"rollout": RolloutConfig, "ppo": PPOConfig, "credit": CreditConfig}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; kept in ``config.json``, flat in notebooks and YAML."""

    seed: int = 0
    """Seed of everything random in the run."""
    env: str = "household"
    """``household`` (generated games), ``alfworld`` (a folder of game files), ``alfworld_engine``
    (the same in the genuine engine: extra ``alfworld``, a thousand times slower), ``webshop``."""
    env_path: str = ""
    """Folder of ALFWorld's json_2.1.1 games (empty: $ALFWORLD_DATA), or of WebShop's files (empty:
    the embedded shop)."""
    env_size: str = "small"
    """Size of generated household games: small, medium or full."""
    env_tasks: tuple[str, ...] = ()
    """Task types of the games; empty: all six, or those that can have the horizon."""
    env_horizon: str = "any"
    """Turns that a generated household game takes at best: short (4 to 6), middle (7 to 10), long
    (11 to 20; tasks of two treated or of three objects), or any (4 to 10)."""
    max_turns: int = 24
    """Turn limit of an episode."""
    reward_scale: float = 1.0
    """Reward of success (upstream: 10)."""
    model: str = "tiny"
    """``tiny``, ``smollm``, a local folder, or a name on the model hub."""
    critic: str = "separate"
    """Where the value heads sit: shared, adapter or separate."""
    critic_model: str = ""
    """Start of the separate critic; empty: a copy of the policy's start."""
    lora_rank: int = 0
    """Rank of the LoRA adapter; 0 trains all weights."""
    adapter: str = ""
    """Folder of the LoRA adapter to start from (as peft saves it); empty: a fresh one."""
    precision: str = "auto"
    """``float32``, ``bfloat16`` (what is trained stays float32), or ``auto``: bfloat16 on a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: a third slower, far less memory."""
    engine: str = "hf"
    """What samples: ``hf`` (the policy itself), ``vllm`` (in this process), or a server's http
    address."""
    engine_memory: float = 0.4
    """Share of the GPU's memory for ``vllm`` in this process, between 0 and 1."""
    iterations: int = 60
    """Collect-and-learn rounds."""
    episodes: int = 64
    """Episodes per iteration."""
    group_size: int = 1
    """Episodes per game; estimators that compare episodes of a game (grpo, …) need at least 2."""
    warmup_iterations: int = 3
    """First iterations that train only the critic."""
    lr: float = 7e-4
    """Learning rate of the policy."""
    critic_lr: float = 1e-3
    """Learning rate of heads and critic."""
    lr_final: float = 0.1
    """Both rates fall linearly to this fraction of themselves."""
    epochs: int = 1
    """Passes over the batch that train the policy (and the critic)."""
    critic_epochs: int = 1
    """Passes in all that train the critic, ≥ epochs."""
    minibatch_turns: int = 128
    """Turns per optimiser step."""
    micro_batch_tokens: int = 16384
    """Tokens (with padding) per forward pass; longer minibatches accumulate gradients."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this, for policy and critic each."""
    advantage_scale: str = "common"
    """``common``: centre each level, divide all by one scale, clamp to ±5; ``none``."""
    logprob_gap_limit: float = 0.05
    """Stop if sampler and trainer disagree by more than this on any chosen token, in nats (with
    vLLM: in the mean; a hundredth of it on a CPU)."""
    eval_games: int = 200
    """Held-out games per evaluation, before and after; 0 skips it."""
    eval_split: str = "unseen"
    """Split of the held-out games."""
    eval_every: int = 0
    """Evaluate every so many iterations too; 0: only before and after."""
    eval_temperature: float = 1.0
    """Sampling temperature of evaluations; 0 is greedy."""
    checkpoint_every: int = 1
    """Iterations between checkpoints."""
    rollout_every: int = 10
    """Iterations between recorded rollouts (the last is always recorded)."""
    max_minutes: float = 0.0
    """Stop cleanly, with the final evaluation, after so much training time; 0: no limit."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    credit: CreditConfig = field(default_factory=CreditConfig.lab)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def __post_init__(self):
        splits, scales = SPLITS, ("common", "none")
        for name, choices in {
            "env": ENVS, "env_size": SIZES, "env_horizon": ("any", *HORIZONS), "critic": CRITICS,
            "precision": PRECISIONS, "eval_split": splits, "advantage_scale": scales,
        }.items():  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")
        if not self.engine.startswith(("http://", "https://")) and self.engine not in ENGINES:
            raise ValueError(
                f"engine is {self.engine!r}, expected one of {ENGINES} or a server's http address"
            )
        if not 0 < self.engine_memory < 1:
            raise ValueError(f"engine_memory is {self.engine_memory}, expected between 0 and 1")
        known = (*TASK_TYPES, *LONG_TASK_TYPES)
        unknown = set(self.env_tasks) - set(known)
        if unknown:
            raise ValueError(f"env_tasks has {sorted(unknown)}, expected some of {known}")
        least = {"iterations": 0, "episodes": 1, "max_turns": 1, "epochs": 1, "minibatch_turns": 1,
                 "group_size": 2 if self.credit.estimator in GROUP_RELATIVE else 1,
                 "micro_batch_tokens": 1, "checkpoint_every": 1, "rollout_every": 1,
                 "eval_games": 0,
                 "eval_every": 0, "warmup_iterations": 0, "critic_epochs": self.epochs,
                 "lora_rank": 0, "max_minutes": 0, "lr": 0, "critic_lr": 0}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")
        if self.episodes % self.group_size:
            raise ValueError(
                f"episodes is {self.episodes}, expected a multiple of group_size {self.group_size}"
            )

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any]) -> "TrainConfig":
        """Build the configuration from flat names, as notebooks and YAML files give them.

        ``credit`` names a preset (lab, paper, upstream); any field of CreditConfig overrides it. A
        value of None means "the default". Numbers may be given as int where float is meant.

        Raises:
            ValueError: On an unknown name (with the nearest known one), or a value of another type.

        Example:
            >>> TrainConfig.from_parameters({"credit": "paper", "gamma": 0.9}).credit.lam_boundary
            0.0
            >>> TrainConfig.from_parameters({"iteration": 3})
            Traceback (most recent call last):
            ValueError: unknown parameter 'iteration'; did you mean 'iterations'?
        """
        given = {name: value for name, value in parameters.items() if value is not None}
        preset = given.pop("credit", "lab")
        if preset not in PRESETS:
            raise ValueError(f"credit is {preset!r}, expected one of {PRESETS}")
        values: dict[str, dict[str, Any]] = {name: {} for name in (*STAGES, "own")}
        for name, value in given.items():
            for stage, kind in (*STAGES.items(), ("own", cls)):
                if name in kind.__dataclass_fields__ and name not in STAGES:
                    values[stage][name] = check_type(name, value, typing.get_type_hints(kind)[name])
                    break
            else:
                raise ValueError(f"unknown parameter {name!r}{_nearest(name)}")
        credit = replace(getattr(CreditConfig, preset)(), **values["credit"])
        return cls(
            **values["own"], credit=credit,
            rollout=RolloutConfig(**values["rollout"]), ppo=PPOConfig(**values["ppo"]),
        )  # fmt: skip


def parameter_names() -> list[str]:
    """All flat parameter names that ``TrainConfig.from_parameters`` takes."""
    own = [f.name for f in dataclasses.fields(TrainConfig) if f.name not in STAGES]
    return own + ["credit"] + [f.name for k in STAGES.values() for f in dataclasses.fields(k)]


def check_type(name: str, value: Any, kind: Any) -> Any:
    """Return the value as ``kind``, or raise a ValueError that names what was seen and expected."""
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(check_type(name, v, typing.get_args(kind)[0]) for v in value)
    if origin is typing.Literal and value in typing.get_args(kind):
        return value
    if origin in (types.UnionType, typing.Union):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    expected = getattr(kind, "__name__", str(kind)) if origin is None else str(kind)
    raise ValueError(f"{name} is {value!r} ({type(value).__name__}), expected {expected}")


def _nearest(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, parameter_names(), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
