"""The loop: collect → credit → update, as a generator of one report per iteration.

``train(config)`` can be stepped from a notebook cell or run to its end; with a folder it writes
metrics, rollouts and checkpoints, and the same call resumes after any interruption. All randomness
comes from generators made from (seed, iteration, purpose), so a resumed run repeats, bit for bit
on a CPU, the run that was never interrupted.

Under ``accelerate launch`` the same call trains on several processes (see parallel); the folder
then has to be one that all of them see.

Left out on purpose: launching (see runs).
"""

import dataclasses
import fcntl
import json
import math
import os
import shutil
import socket
import time
import types
import typing
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from hiper_lab import memory, objective, trajectory
from hiper_lab.credit import LEVELS, Credit, CreditConfig, TurnGrid, Values, estimate
from hiper_lab.envs.alfworld import AlfworldEnv
from hiper_lab.envs.games import (
    HORIZONS,
    LONG_TASK_TYPES,
    PLAN_TURNS,
    SIZES,
    SPLITS,
    TASK_TYPES,
    generate_game,
)
from hiper_lab.envs.household import HouseholdEnv, find_games, load_game
from hiper_lab.envs.pool import EnvPool
from hiper_lab.envs.shop import Shop, embedded_shop
from hiper_lab.envs.webshop import WebShopEnv
from hiper_lab.flat import GROUP_RELATIVE
from hiper_lab.objective import PPOConfig, Sample, micro_batches
from hiper_lab.parallel import Team, spread_like, whole_tensor
from hiper_lab.policy import CRITICS, PRECISIONS, Policy, load_model, name_of, save_adapter
from hiper_lab.rollout import RolloutConfig, collect
from hiper_lab.sampling import Codec, Sampler, hf_sampler, longest_response
from hiper_lab.trajectory import Trajectory
from hiper_lab.vllm_sampler import Engine, open_engine, vllm_sampler

ENVS = ("household", "alfworld", "alfworld_engine", "webshop")
PRESETS = ("lab", "paper", "upstream")
ENGINES = ("hf", "vllm")  # or the address of a server
# Their fields are flat parameters beside our own.
STAGES = {"rollout": RolloutConfig, "ppo": PPOConfig, "credit": CreditConfig}
# Where and in how much memory a run is computed, not what: it may be resumed with others.
PLACE = ("engine", "engine_memory", "micro_batch_tokens", "gradient_checkpointing", "decode_rows")


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


# ------------------------------------------------------------------------------------------ worlds


def make_envs(
    config: TrainConfig, split: str, start: int, count: int, copies: int = 1
) -> tuple[list, list[str]]:
    """``count`` environments of a split and their names, from number ``start`` of an endless list.

    Each game comes ``copies`` times in a row.

    Raises:
        FileNotFoundError: If the files of ``alfworld`` or ``webshop`` are not there.
        ValueError: If they are broken, or have no such split.
    """
    tasks = config.env_tasks or TASK_TYPES
    numbers = range(start, start + math.ceil(count / copies))
    if config.env == "household":
        if config.env_horizon != "any" and not config.env_tasks:
            tasks = (None,)  # drawn among those that can be so long
        games = [
            generate_game(
                k, split=split, size=config.env_size, task_type=tasks[k % len(tasks)],
                turns=HORIZONS.get(config.env_horizon, PLAN_TURNS),
            )
            for k in numbers
        ]  # fmt: skip
        names = [f"{split}/{config.env_size}/{k}" for k in numbers]
    elif config.env.startswith("alfworld"):
        folder = {"train": "train", "seen": "valid_seen", "unseen": "valid_unseen"}[split]
        paths = _alfworld_games(config.env_path, folder, tasks)
        chosen = [paths[k % len(paths)] for k in numbers]
        games, names = [load_game(path) for path in chosen], [str(p.parent.name) for p in chosen]
    else:
        shop = _shop(config.env_path)
        goals = shop.splits.get(split)
        if not goals:
            raise ValueError(f"no goals in split {split!r}, expected one of {sorted(shop.splits)}")
        games = [goals[k % len(goals)] for k in numbers]
        names = [f"{split}/{goal}" for goal in games]
    games, names = ([x for x in each for _ in range(copies)][:count] for each in (games, names))
    if config.env == "webshop":
        return [WebShopEnv(shop, config.max_turns, goal=k, reward="success") for k in games], names
    if config.env == "alfworld_engine":
        return EnvPool([partial(AlfworldEnv, game, config.max_turns) for game in games]).envs, names
    return [HouseholdEnv(game, config.max_turns) for game in games], names


def _alfworld_games(env_path: str, split: str, tasks: tuple[str, ...]) -> list[Path]:
    root = Path(env_path or os.environ.get("ALFWORLD_DATA", "")).expanduser()
    folders = [root / split, root / "json_2.1.1" / split]
    folder = next((f for f in folders if (env_path or str(root) != ".") and f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no ALFWorld games in {str(root)!r}: expected a folder {split!r} with game.tw-pddl "
            "files. Download them with `alfworld-download` and set env_path or $ALFWORLD_DATA"
        )
    paths = [p for p in find_games(folder) if any(task in str(p) for task in tasks)]
    if not paths:
        raise FileNotFoundError(f"no playable game of {tasks} under {folder}")
    return paths


@lru_cache(maxsize=1)
def _shop(env_path: str) -> Shop:
    """The embedded shop, or the one of WebShop's files in a folder: its small set, if it is there.

    Purchase prices are drawn with seed 0, so that they are the same in every run.
    """
    if not env_path:
        return embedded_shop()
    files = []
    for name in ("items_shuffle", "items_ins_v2"):
        found = sorted(Path(env_path).expanduser().glob(f"{name}*.json*"))
        small = [file for file in found if "_1000." in file.name]
        if not found:
            raise FileNotFoundError(
                f"no {name}*.json in {env_path!r}: expected a folder with WebShop's files "
                "items_shuffle_1000.json and items_ins_v2_1000.json, plain or gzipped; "
                "env_path '' is the embedded shop"
            )
        files.append((small or found)[0])
    return Shop.from_files(*files)


# ------------------------------------------------------------------------------------- the trainer


class Evaluation(NamedTuple):
    """Success on held-out games with a 95% Wilson interval."""

    success: float
    low: float
    high: float
    games: int


@dataclass
class StepReport:
    """What one iteration did. Iteration 0 is the evaluation before any training."""

    iteration: int
    metrics: dict[str, float]
    trajectories: list[Trajectory] = field(default_factory=list)
    grid: TurnGrid | None = None
    values: Values | None = None
    credit: Credit | None = None
    evaluation: Evaluation | None = None


@dataclass
class State:
    """What training changes: weights, optimiser, how far it is."""

    config: TrainConfig
    policy: Policy
    codec: Codec
    optimizer: torch.optim.Optimizer
    model: torch.nn.Module  # the policy, as it is called for its gradient
    team: Team
    longest: memory.Longest
    needed: memory.Memory
    iteration: int = 0
    seconds: float = 0.0
    engine: Engine | None = None


def set_up(config: TrainConfig, team: Team | None = None) -> State:
    """Load the models and make the optimiser.

    Raises:
        ValueError: If a model or adapter cannot be had or does not fit, a prompt and a response do
            not fit into the model's context, or there are more processes than groups of episodes or
            than the engine can serve.
        MemoryError: On a CPU, if it will not fit into memory.
    """
    team = team or Team()
    groups = config.episodes // config.group_size
    if groups < team.size:
        raise ValueError(
            f"{groups} groups of episodes, expected one for each of {team.size} processes"
        )
    if config.engine != "hf" and team.size > 1:
        raise ValueError(
            f"engine is {config.engine!r}, expected 'hf' in a training on {team.size} processes"
        )
    torch.manual_seed(config.seed)  # new heads and adapters
    model, tokenizer = load_model(config.model, team.device)
    critic_model = load_model(config.critic_model, team.device)[0] if config.critic_model else None
    policy = Policy(
        model, tokenizer, critic=config.critic, lora_rank=config.lora_rank,
        critic_model=critic_model, reference=config.ppo.kl_coef > 0, adapter=config.adapter,
        precision=config.precision, gradient_checkpointing=config.gradient_checkpointing,
    ).to(model.device)  # fmt: skip
    codec = Codec(tokenizer)
    longest = _longest(config, codec, team)
    _check_context(policy, longest)
    needed = memory.estimate(policy, longest, team.size if team.sharded else 1)
    if policy.device.type == "cpu":
        memory.refuse(policy, longest, needed)
    own, critic = policy.parameters_by_owner()
    optimizer = torch.optim.AdamW(
        [{"params": list(own.values())}, {"params": list(critic.values())}], weight_decay=0.01
    )
    trained, optimizer = team.prepare(policy, optimizer)
    return State(config, policy, codec, optimizer, trained, team, longest, needed)


def _longest(config: TrainConfig, codec: Codec, team: Team) -> memory.Longest:
    rollout = config.rollout
    played = team.share(config.episodes, config.group_size), team.share(config.eval_games)
    episodes = max(map(len, played))
    return memory.Longest(
        prompt=rollout.max_prompt_tokens,
        response=longest_response(codec, rollout.decoding, rollout.max_new_tokens),
        decode_rows=min(rollout.decode_rows or episodes, episodes),
        micro_batch_tokens=config.micro_batch_tokens, minibatch_turns=config.minibatch_turns,
    )  # fmt: skip


def _check_context(policy: Policy, longest: memory.Longest) -> None:
    models = [policy.lm] + ([policy.critic_model] if policy.critic == "separate" else [])
    for model in models:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context and longest.row > context:
            raise ValueError(
                f"max_prompt_tokens is {longest.prompt} and a response may have "
                f"{longest.response} tokens, but {name_of(model)} reads no more than {context}: "
                f"expected max_prompt_tokens of at most {context - longest.response}"
            )


def dry_run(state: State) -> float | None:
    """Play and learn once from the longest batches there can be; nothing is changed by it.

    Returns:
        Peak of memory in GiB, where the device keeps count of it.

    Raises:
        MemoryError: If it does not fit, with the number to change.
    """
    policy, longest, optimizer = state.policy, state.longest, state.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    with memory.explained(policy, longest, "playing", None), state.team.whole(policy):
        memory.play(policy, longest)
    with memory.explained(policy, longest, "learning", None):
        batch = objective.collate(memory.samples(longest), policy.device)
        now, values = state.model(objective.read, batch, state.config.rollout.temperature, True)
        loss = objective.policy_loss(batch, now, state.config.ppo)[0]
        loss = loss + objective.value_loss(batch, values, state.config.ppo.value_clip).sum()
        state.team.backward(loss, last=True)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        optimizer.step()  # makes the moments
    optimizer.zero_grad()
    optimizer.state.clear()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return _peak(policy)


def _peak(policy: Policy) -> float | None:
    on_gpu = policy.device.type == "cuda"
    return torch.cuda.max_memory_allocated(policy.device) / memory.GIB if on_gpu else None


def train(config: TrainConfig, folder: Path | str | None = None) -> Iterator[StepReport]:
    """Train, yielding a StepReport per iteration.

    Args:
        folder: The run's folder. Metrics, rollouts and checkpoints go there; if it already holds a
            run of this configuration, that run is resumed. None keeps nothing.

    Raises:
        ValueError: If the folder holds a run with another configuration, or see `set_up`.
        BlockingIOError: If another training writes into the folder.
        MemoryError: If memory does not suffice, with the number to change. The folder keeps what
            was done, and the run resumes with a lower one.

    Example:
        ``for report in train(TrainConfig(iterations=10), "runs/mine"): print(report.metrics)``
    """
    team = Team()
    with sole_writer(folder) if folder and team.main else nullcontext():
        yield from _train(config, folder, team)


def _train(config: TrainConfig, folder: Path | str | None, team: Team) -> Iterator[StepReport]:
    run = RunFolder(folder, config, write=team.main) if folder else None
    state, resumed = set_up(config, team), False
    peak = dry_run(state) if state.policy.device.type == "cuda" else None
    if run:
        run.note_memory(state.needed, peak)
        resumed = run.restore(state)
    if config.engine != "hf":
        state.engine = open_engine(
            config.engine, run and run.path, config.model, config.engine_memory, config.lora_rank
        )
    if not resumed:
        # an interruption during the evaluation leaves nothing behind and starts over
        if config.eval_games:
            report = StepReport(0, {"iteration": 0}, evaluation=evaluate(state))
            _log_evaluation(report)
            if run:
                run.record(report, state)
            yield report
        elif run:
            run.record(StepReport(0, {"iteration": 0}), state)
    while state.iteration < config.iterations and not _finished_early(state):
        report = step(state)
        last = state.iteration == config.iterations or _finished_early(state)
        due = config.eval_every and state.iteration % config.eval_every == 0
        if config.eval_games and (last or due):
            report.evaluation = evaluate(state)
            _log_evaluation(report)
        if run:
            run.record(report, state, last=last)
        yield report
    team.wait()  # all is written before any process ends


def make_sampler(state: State, temperature: float, generator: torch.Generator) -> Sampler:
    """The sampler of the configuration, over the weights as they are now."""
    config = state.config
    if state.engine is None:
        return hf_sampler(state.policy, temperature, generator)
    state.engine.sync(state.policy, max(0, state.iteration - config.warmup_iterations))
    return vllm_sampler(
        state.engine, state.policy, state.codec, temperature, generator,
        max_new_tokens=config.rollout.max_new_tokens,
        micro_batch_tokens=config.micro_batch_tokens, gap_limit=config.logprob_gap_limit,
    )  # fmt: skip


def _finished_early(state: State) -> bool:
    limit = state.config.max_minutes * 60
    return bool(limit) and state.seconds >= limit


def step(state: State) -> StepReport:
    """One iteration: collect, credit, update. The whole method, in the order of the paper."""
    config, policy, codec, team = state.config, state.policy, state.codec, state.team
    started = time.perf_counter()
    mine = team.share(config.episodes, config.group_size)  # all, unless there are more processes
    first = (state.iteration * config.episodes + mine.start) // config.group_size
    envs, names = make_envs(config, "train", first, len(mine), config.group_size)
    seeds = [config.seed + i for i in mine]
    generator = _generator(config, state.iteration, "collect", policy.device, team.rank)
    explained = partial(memory.explained, policy, state.longest, iteration=state.iteration)
    with explained("playing"), team.whole(policy):
        sampler = make_sampler(state, config.rollout.temperature, generator)
        trajectories = collect(sampler, codec, envs, config.rollout, names=names, seeds=seeds)
        sampled = state.engine.metrics() if state.engine else {}
        collected = time.perf_counter()
        samples = objective.pack(
            trajectories, codec, config.rollout.decoding, config.rollout.max_new_tokens
        )
        values = objective.evaluate(policy, trajectories, samples, config.micro_batch_tokens)
        if config.credit.switch_advantage == "value" and config.credit.estimator == "hae":
            values = objective.mix_switch_values(
                policy, codec, trajectories, values, config.micro_batch_tokens
            )
        if config.ppo.kl_coef:
            _score_reference(state, samples)
    trajectories, values = _gather(team, trajectories, values)
    grid = trajectory.to_grid(trajectories, config.credit.anchor_similarity)
    grid = grid._replace(reward=grid.reward * config.reward_scale)
    credit = estimate(grid, values, config.credit)
    flat = config.credit.estimator != "hae"
    scaled = scale_advantages(grid, credit) if config.advantage_scale == "common" else credit
    objective.assign(samples, trajectories, values, scaled, rows=mine, high_everywhere=flat)
    with explained("learning"):
        logged = update(state, samples)
    state.iteration += 1
    trajectory.attach(trajectories, values, credit)
    metrics = {"iteration": state.iteration}
    metrics |= rollout_metrics(trajectories, grid) | credit_metrics(grid, values, credit, flat)
    metrics |= logged | sampled
    ended = time.perf_counter()
    state.seconds = team.gather([state.seconds + ended - started])[0]  # all have to agree
    metrics |= {
        "time/collect_s": collected - started, "time/update_s": ended - collected,
        "time/total_s": state.seconds,
    }  # fmt: skip
    if (peak := _peak(policy)) is not None:
        metrics["memory/peak_gib"] = peak
    return StepReport(state.iteration, metrics, trajectories, grid, values, credit)


def _gather(
    team: Team, trajectories: list[Trajectory], values: Values
) -> tuple[list[Trajectory], Values]:
    """Trajectories and values of all processes, in each."""
    if team.size == 1:
        return trajectories, values
    rows = team.gather(list(zip(trajectories, *(x.tolist() for x in values), strict=True)))
    trajectories = [replace(row[0], id=f"{k:04d}") for k, row in enumerate(rows)]
    width = max(len(t.turns) for t in trajectories)
    grids = [[(row[k] + [0.0] * width)[:width] for row in rows] for k in (1, 2, 3)]
    return trajectories, Values(*map(torch.tensor, (*grids, [row[4] for row in rows])))


def scale_advantages(grid: TurnGrid, credit: Credit) -> Credit:
    """Centre each level over its turns, divide all levels by one scale, clamp to ±5.

    One common scale keeps the levels' sizes relative to each other, which whitening each level does
    not (papers on per-level whitening: the joint direction is no longer the gradient's).
    """
    valid = torch.arange(grid.reward.shape[1]) < grid.length[:, None]
    masks = {"high": valid & grid.boundary, "low": valid, "switch": valid}
    centred = {}
    for level, mask in masks.items():
        advantage = getattr(credit, level)
        centred[level] = torch.where(mask, advantage - advantage[mask].mean(), 0)
    scale = torch.cat([centred[level][mask] for level, mask in masks.items()]).std().clamp_min(1e-6)
    return credit._replace(**{k: (a / scale).clamp(-5, 5) for k, a in centred.items()})


# ------------------------------------------------------------------------------------------ update


def update(state: State, samples: list[Sample]) -> dict[str, float]:
    """PPO epochs over the batch, of which ``samples`` are this process's.

    The sampler's log-probabilities are PPO's old ones. In the first minibatch, before any step, the
    trainer must reproduce them: the largest difference is logged as ``policy/logprob_gap``.

    Raises:
        RuntimeError: If they disagree by more than ``logprob_gap_limit``, or a loss is not finite.
    """
    config, team = state.config, state.team
    warming_up = state.iteration < config.warmup_iterations
    logged: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    sizes = team.gather([(len(s.at), s.train_high) for s in samples])  # of the whole batch
    before = sum(team.gather([len(samples)])[: team.rank])
    progress = state.iteration / max(1, config.iterations)
    decay = 1 - (1 - config.lr_final) * progress
    for group, rate in zip(
        state.optimizer.param_groups, (config.lr, config.critic_lr), strict=True
    ):
        group["lr"] = rate * decay
    generator = _generator(config, state.iteration, "shuffle")
    for epoch in range(config.critic_epochs):
        train_policy = epoch < config.epochs and not warming_up
        order = torch.randperm(len(sizes), generator=generator).tolist()
        for start in range(0, len(order), config.minibatch_turns):
            chosen = order[start : start + config.minibatch_turns]
            mine = [samples[i - before] for i in chosen if 0 <= i - before < len(samples)]
            on_policy = epoch == start == 0
            _minibatch(state, mine, [sizes[i] for i in chosen], train_policy, on_policy, logged)
    means = _means(team.gather([dict(logged)]))
    return means | {"policy/trained": float(not warming_up), "policy/lr": config.lr * decay}


def _means(parts: list[dict[str, list[float]]]) -> dict[str, float]:
    """Means from the (sum, count) of all processes; of the gap, which is no sum, the largest."""
    means = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        totals, counts = zip(*(part[name] for part in parts if name in part), strict=True)
        if name == "policy/logprob_gap":
            means[name] = max(totals)
        elif sum(counts):
            means[name] = sum(totals) / sum(counts)
    return means


@torch.no_grad()
def _score_reference(state: State, samples: list[Sample]) -> None:
    """Log-probabilities of the chosen tokens under the reference policy."""
    config, policy = state.config, state.policy
    for index in micro_batches([len(s.ids) for s in samples], config.micro_batch_tokens):
        rows = [samples[i] for i in index]
        batch = objective.collate(rows, policy.device)
        hidden, t = policy.hidden(batch.ids, "reference"), config.rollout.temperature
        logprob = objective.read_scores(policy, batch, hidden, t, "reference").logprob
        split = logprob.cpu().split([len(s.at) for s in rows])
        for row, part in zip(rows, split, strict=True):
            row.logprob_reference = part.tolist()


def _check_gap(gap: float, config: TrainConfig) -> None:
    if not gap <= config.logprob_gap_limit:
        raise RuntimeError(
            f"sampler and trainer disagree by {gap:.3g} nats on a token they should score alike "
            f"(limit {config.logprob_gap_limit}); the weights of the sampler may be stale, or the "
            "precision too low. Raise logprob_gap_limit only if you know why"
        )


def _minibatch(
    state: State, samples: list[Sample], sizes: list[tuple[int, bool]], train_policy: bool,
    on_policy: bool, logged: dict,
) -> None:  # fmt: skip
    """One optimiser step; micro-batches add up to exactly the minibatch's gradient.

    Args:
        samples: This process's part of the minibatch.
        sizes: Of each row of the whole minibatch, trained tokens and whether V_high is trained.
    """
    config, policy, team = state.config, state.policy, state.team
    tokens = max(1, sum(n for n, _ in sizes))
    counts = torch.tensor([sum(high for _, high in sizes), len(sizes), len(sizes)])
    counts = counts.clamp_min(1).to(policy.device)
    state.optimizer.zero_grad()
    parts = [
        [samples[i] for i in index]
        for index in micro_batches([len(s.ids) for s in samples], config.micro_batch_tokens)
    ]
    rounds = max(team.gather([len(parts)]))
    for k in range(rounds):
        idle = k >= len(parts)  # another process has one more: go through it with it
        rows = [objective.state_sample([0])] if idle else parts[k]
        batch = objective.collate(rows, policy.device)
        t = config.rollout.temperature
        now, values = state.model(objective.read, batch, t, train_policy)
        loss = torch.zeros((), device=policy.device)
        if now is not None:
            if on_policy and len(batch.token):
                gap = (now.logprob - batch.logprob_old).abs().max().item()
                _check_gap(gap, config)
                logged["policy/logprob_gap"] = [max(gap, logged["policy/logprob_gap"][0]), 1]
            total, sums = objective.policy_loss(batch, now, config.ppo)
            loss = loss + total / tokens
            _add(logged, sums)
        per_level = objective.value_loss(batch, values, config.ppo.value_clip)
        loss = loss + config.ppo.value_coef * (per_level / counts).sum()
        if idle:
            loss = 0 * loss
        else:
            trained = batch.value_trained.sum(0).tolist()
            _add(logged, {
                f"value/{k}_loss": (per_level[i].item(), trained[i]) for i, k in enumerate(LEVELS)
            })  # fmt: skip
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"loss is {loss.item()} at iteration {state.iteration}; lower the lr"
            )
        team.backward(loss, last=k == rounds - 1)
    for group, name in zip(state.optimizer.param_groups, ("policy", "value"), strict=True):
        norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
        if train_policy or name == "value":
            _add(logged, {f"{name}/grad_norm": (whole_tensor(norm).item(), 1)})
    state.optimizer.step()


def _add(logged: dict, sums: dict[str, tuple[float, float]]) -> None:
    for name, (total, count) in sums.items():
        logged[name][0] += total
        logged[name][1] += count


def _generator(
    config: TrainConfig, iteration: int, purpose: str, device="cpu", rank: int = 0
) -> torch.Generator:
    purposes = ("collect", "shuffle", "evaluate")
    seed = (config.seed * 1_000_003 + iteration) * len(purposes) + purposes.index(purpose)
    seed += rank << 48  # processes sample independently, and shuffle alike
    return torch.Generator(device=device).manual_seed(seed)


# ----------------------------------------------------------------------------------------- metrics


def rollout_metrics(trajectories: list[Trajectory], grid: TurnGrid) -> dict[str, float]:
    """Success, return, length, and how the plan behaved."""
    turns = [turn for t in trajectories for turn in t.turns]
    choices = [turn.switch for t in trajectories for turn in t.turns[1:]]
    segments = sum(sum(trajectory.boundaries(t)) for t in trajectories)
    ends = [t.end for t in trajectories]
    return {
        "rollout/success": _mean([t.success for t in trajectories]),
        "rollout/return": grid.reward.sum(1).mean().item(),
        "rollout/turns": len(turns) / len(trajectories),
        "rollout/errors": sum(end is trajectory.EndReason.ERROR for end in ends),
        "plan/switch_rate": _mean(choices),
        "plan/segment_turns": len(turns) / segments,
        "format/malformed_rate": _mean([bool(turn.problems) for turn in turns]),
    }


def credit_metrics(
    grid: TurnGrid, values: Values, credit: Credit, high_everywhere: bool
) -> dict[str, float]:
    """Spread of each level's advantage; how well each head predicts the return to go (γ = 1)."""
    valid = torch.arange(grid.reward.shape[1]) < grid.length[:, None]
    to_go = grid.reward.flip(1).cumsum(1).flip(1)
    high = valid & (grid.boundary | high_everywhere)
    metrics = {}
    for level, mask in (("high", high), ("low", valid), ("switch", valid)):
        value, goal = getattr(values, level)[mask], to_go[mask]
        metrics[f"credit/{level}_std"] = getattr(credit, level)[mask].std(unbiased=False).item()
        metrics[f"value/{level}_mean"] = value.mean().item()
        spread = value.std(unbiased=False) * goal.std(unbiased=False)
        covariance = ((value - value.mean()) * (goal - goal.mean())).mean()
        if spread > 0:
            metrics[f"value/{level}_correlation"] = (covariance / spread).item()
        if goal.var(unbiased=False) > 0:
            unexplained = (goal - value).var(unbiased=False) / goal.var(unbiased=False)
            metrics[f"value/{level}_explained_variance"] = 1 - unexplained.item()
    return metrics


def evaluate(state: State) -> Evaluation:
    """Play the held-out games with the current policy. The games are the same every time."""
    config, policy, team = state.config, state.policy, state.team
    mine = team.share(config.eval_games)
    envs, names = make_envs(config, config.eval_split, mine.start, len(mine))
    generator = _generator(config, 0, "evaluate", policy.device, team.rank)
    with memory.explained(policy, state.longest, "playing", state.iteration), team.whole(policy):
        sampler = make_sampler(state, config.eval_temperature, generator)
        played = collect(sampler, state.codec, envs, config.rollout, names=names, seeds=list(mine))
    won = team.gather([t.success for t in played])
    return Evaluation(_mean(won), *wilson_interval(sum(won), len(won)), len(won))


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95% confidence interval of a success rate (Wilson 1927); valid at 0 and 1 too.

    Example:
        >>> [round(x, 3) for x in wilson_interval(46, 200)]
        [0.177, 0.293]
    """
    p, n = successes / trials, trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _log_evaluation(report: StepReport) -> None:
    e = report.evaluation
    report.metrics |= {
        "eval/success": e.success, "eval/success_low": e.low, "eval/success_high": e.high,
        "eval/games": e.games,
    }  # fmt: skip


def _mean(values: list) -> float:
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------------------------------------------------ folder


PATIENCE = 15.0  # seconds for a run to end whose launcher was killed


@contextmanager
def sole_writer(folder: Path | str) -> Iterator[None]:
    """Keep others from writing into a folder, by a lock on its file ``.lock``.

    The system frees the lock when its holder ends, however that happens: nothing is ever stale.

    Raises:
        BlockingIOError: If somebody else, or an earlier call of this process, has held it for
            15 seconds; says who.
    """
    file = Path(folder) / ".lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + PATIENCE
    with file.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    lock.seek(0)
                    raise BlockingIOError(
                        f"{folder} is being written by {lock.read().strip()} (this is process "
                        f"{os.getpid()}); wait for it, stop it, or use another folder"
                    ) from error
                time.sleep(0.1)
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
        yield


class RunFolder:
    """The files of a run: config.json, memory.json, metrics.jsonl, rollouts/, checkpoints/.

    Args:
        write: This process writes them; the others of a training only read.

    Raises:
        ValueError: If the folder holds a run with another configuration.
    """

    def __init__(self, path: Path | str, config: TrainConfig, write: bool = True):
        self.path, self.write = Path(path), write
        file = self.path / "config.json"
        ours = json.loads(json.dumps(asdict(config)))
        theirs = json.loads(file.read_text()) if file.exists() else {}
        if theirs:
            # what the code that began the run did not know, it did as is the default
            for name, value in json.loads(json.dumps(asdict(TrainConfig()))).items():
                seen = theirs.setdefault(name, value)
                theirs[name] = value | seen if isinstance(value, dict) else seen
            changed = _differences(ours, theirs)
            if changed:
                raise ValueError(
                    f"{self.path} holds a run with another {', '.join(changed)}; "
                    "use another folder, or delete this one to start over"
                )
        if write and theirs != ours:
            trajectory.write_atomic(file, (json.dumps(ours, indent=1) + "\n").encode())

    def note_memory(self, needed: memory.Memory, peak: float | None) -> None:
        """Keep what was estimated, and what the dry run took (None: none was made)."""
        if self.write:
            parts = {k: round(v / memory.GIB, 3) for k, v in needed._asdict().items()}
            noted = {"total": round(needed.total / memory.GIB, 3), **parts}
            text = json.dumps({"estimated_gib": noted, "dry_run_gib": peak}, indent=1) + "\n"
            trajectory.write_atomic(self.path / "memory.json", text.encode())

    def record(self, report: StepReport, state: State, last: bool = False) -> None:
        """Write what an iteration leaves behind; the checkpoint comes last and makes it count."""
        config = state.config
        if self.write:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(report.metrics) + "\n")
                file.flush()
            if report.trajectories and (last or report.iteration % config.rollout_every == 0):
                name = f"{report.iteration:06d}.jsonl.gz"
                trajectory.save(report.trajectories, self.path / "rollouts" / name)
        if last or report.iteration % config.checkpoint_every == 0:
            save_checkpoint(state, self.path / "checkpoints" / f"{report.iteration:06d}")

    def restore(self, state: State) -> bool:
        """Load the newest checkpoint that is whole, and drop metrics that are newer than it.

        Returns:
            Whether there was one.

        Raises:
            ValueError: If there are checkpoints and none can be used, or one is of another model.
        """
        found = sorted((self.path / "checkpoints").glob("[0-9]*"), reverse=True)
        for folder in found:
            try:
                saved = read_checkpoint(folder)
            except DAMAGE as error:
                warnings.warn(f"{folder} is damaged and left out: {error}", stacklevel=2)
                continue
            load_checkpoint(state, saved, folder)
            break
        else:
            if found:
                raise ValueError(
                    f"no checkpoint in {self.path} can be read, expected one of "
                    f"{[folder.name for folder in found]}; delete the folder to start over"
                )
        state.team.wait()  # until all have read what is now cleaned up
        if not self.write:
            return bool(found)
        if not found:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return False
        lines = (self.path / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [
            s for s in lines if s.endswith("\n") and json.loads(s)["iteration"] <= state.iteration
        ]
        if kept != lines:
            trajectory.write_atomic(self.path / "metrics.jsonl", "".join(kept).encode())
        return True


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names of settings that make another run of it."""
    names = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [name] * bool(_differences(a, b))
        elif a != b and name not in PLACE:
            names.append(name)
    return names


def save_checkpoint(state: State, folder: Path) -> None:
    """Weights, optimiser and progress, complete or not at all; older checkpoints are removed.

    The file is the same whatever the number of processes, all of which have to come here; the main
    one writes. No random state is stored: every generator is made from the seed and the iteration.
    """
    policy, main = state.policy, state.team.main
    weights = {n: p for group in policy.parameters_by_owner() for n, p in group.items()}
    moments = {
        f"{i}.{name}": tensor
        for i, entry in state.optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    }
    weights, moments = _plain(weights, main), _plain(moments, main)
    if not main:
        return
    progress = {"iteration": state.iteration, "seconds": state.seconds, "base": policy.base}
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    trajectory.write_atomic(temporary / "weights.safetensors", save(weights))
    trajectory.write_atomic(temporary / "optimizer.safetensors", save(moments))
    trajectory.write_atomic(temporary / "progress.json", json.dumps(progress).encode())
    if policy.lora_rank:
        save_adapter(policy, temporary / "adapter", weights)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    for old in sorted(folder.parent.glob("[0-9]*"))[:-2]:
        shutil.rmtree(old)


class Checkpoint(NamedTuple):
    """What a checkpoint's files say."""

    weights: dict[str, Tensor]
    moments: dict[int, dict[str, Tensor]]
    progress: dict[str, Any]


# What reading a file may raise that was cut off, or is not there.
DAMAGE = (OSError, SafetensorError, ValueError, KeyError)


def read_checkpoint(folder: Path) -> Checkpoint:
    """All of a checkpoint, or one of `DAMAGE`."""
    progress = json.loads((folder / "progress.json").read_text())
    progress["iteration"], progress["seconds"]
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        moments[int(index)][key] = tensor
    return Checkpoint(load_file(folder / "weights.safetensors"), dict(moments), progress)


def load_checkpoint(state: State, saved: Checkpoint, folder: Path) -> None:
    """Put a checkpoint into a freshly set up state, whatever the number of processes.

    Raises:
        ValueError: If it is of another model.
    """
    policy = state.policy
    base = saved.progress.get("base", policy.base)
    if policy.lora_rank and base != policy.base:
        raise ValueError(
            f"{folder} is an adapter of another base model: {base!r}, but the model is "
            f"{policy.base!r}"
        )
    mine = {n: p for group in policy.parameters_by_owner() for n, p in group.items()}
    theirs = {name: tuple(weight.shape) for name, weight in saved.weights.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in mine.items()}
    if theirs != shapes:
        odd = sorted(n for n in theirs | shapes if theirs.get(n) != shapes.get(n))[:3]
        raise ValueError(f"{folder} does not fit this model: weights differ in {odd}, …")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(spread_like(saved.weights[name], parameter))
    order = list(mine.values())  # as the optimiser got them
    moments = {
        i: {k: spread_like(v, order[i]) if v.ndim else v for k, v in entry.items()}
        for i, entry in saved.moments.items()
    }
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.iteration, state.seconds = saved.progress["iteration"], saved.progress["seconds"]


def _plain(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors in one piece on the CPU; processes that do not keep them only help to."""
    plain = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            plain[name] = whole.cpu().contiguous()
    return plain
