"""The loop: collect → credit → update, as a generator of one report per iteration.

``train(config)`` can be stepped from a notebook cell or run to its end; with a folder it writes
metrics, rollouts and checkpoints, and the same call resumes after any interruption. All randomness
comes from generators made from (seed, iteration, purpose), so a resumed run repeats, bit for bit
on a CPU, the run that was never interrupted.

Under ``accelerate launch`` the same call trains on several processes (see parallel); the folder
then has to be one that all of them see.

Left out on purpose: launching (see runs).
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from hiper_lab import memory, objective, trajectory
from hiper_lab.config import TrainConfig
from hiper_lab.credit import LEVELS, Credit, TurnGrid, Values, correlation, estimate, in_effect
from hiper_lab.folder import Evaluation, RunFolder, State, StepReport, sole_writer
from hiper_lab.grid import real_turns, rewards_to_go
from hiper_lab.objective import Sample, micro_batches
from hiper_lab.parallel import Team, whole_tensor
from hiper_lab.policy import Policy, load_model, name_of
from hiper_lab.rollout import collect
from hiper_lab.sampling import Codec, Sampler, hf_sampler, longest_response
from hiper_lab.trajectory import Trajectory
from hiper_lab.vllm_sampler import open_engine, vllm_sampler
from hiper_lab.worlds import make_envs


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
    if config.credit.lam_schedule != "fixed":
        metrics["credit/lam_boundary"] = in_effect(grid, values, config.credit).lam_boundary
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
    valid = real_turns(grid)
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
    subgoals = [
        turn.subgoal
        for t in trajectories
        for turn, opens in zip(t.turns, trajectory.boundaries(t), strict=True)
        if opens
    ]
    ends = [t.end for t in trajectories]
    return {
        "rollout/success": _mean([t.success for t in trajectories]),
        "rollout/return": grid.reward.sum(1).mean().item(),
        "rollout/turns": len(turns) / len(trajectories),
        "rollout/errors": sum(end is trajectory.EndReason.ERROR for end in ends),
        "plan/switch_rate": _mean(choices),
        "plan/segment_turns": len(turns) / len(subgoals),
        "plan/subgoals": effective_number(subgoals),
        "format/malformed_rate": _mean([bool(turn.problems) for turn in turns]),
    }


def effective_number(texts: list[str]) -> float:
    """How many different texts there are, those that are rare counting less: exp of the entropy.

    Example:
        >>> effective_number(["find a mug", "find a mug", "clean the mug", "clean the mug"])
        2.0
    """
    shares = torch.tensor(list(Counter(texts).values()), dtype=torch.float64) / len(texts)
    return torch.special.entr(shares).sum().exp().item()


def credit_metrics(
    grid: TurnGrid, values: Values, credit: Credit, high_everywhere: bool
) -> dict[str, float]:
    """Spread of each level's advantage; how well each head predicts the return to go (γ = 1)."""
    valid = real_turns(grid)
    to_go = rewards_to_go(grid)
    high = valid & (grid.boundary | high_everywhere)
    metrics = {}
    for level, mask in (("high", high), ("low", valid), ("switch", valid)):
        value, goal = getattr(values, level)[mask], to_go[mask]
        metrics[f"credit/{level}_std"] = getattr(credit, level)[mask].std(unbiased=False).item()
        metrics[f"value/{level}_mean"] = value.mean().item()
        if value.std(unbiased=False) * goal.std(unbiased=False) > 0:
            metrics[f"value/{level}_correlation"] = correlation(value, goal)
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
