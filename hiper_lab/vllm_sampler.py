"""Decoding by vLLM: in this process, or by a server that speaks its OpenAI-compatible API.

The decoders of :mod:`hiper_lab.sampling` decide what may be written; vLLM draws it. Each question
of a decoder becomes a request for the tokens that follow: one token at a fork of a trie, all that
may come where one set stays in force (a subgoal, a free response). What a decoder does not take is
thrown away, which leaves the distribution of what it takes as it is. The requests of a turn share
their prefix, so its prompt is computed once. (Structured outputs would not do: they also admit
other tokenisations of an action than the one that the trie holds.)

Whatever is written is scored again by the trainer: its log-probabilities are kept, so that the PPO
ratio is 1 on policy, and their distance to the engine's shows stale weights or too low a precision.

Left out on purpose: moving weights between machines other than through a shared folder.
"""

import copy
import gc
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hiper_lab.objective import Sample, collate, read_scores
from hiper_lab.policy import SMOLLM, TINY, Policy
from hiper_lab.protocol import SKELETON, Response
from hiper_lab.sampling import Codec, Decoder, Draft, Prompt, Sampler, micro_batches

TESTED = "0.32"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be built for
CONNECTIONS = 64
BAN = -100.0  # the lowest bias that vLLM takes: e⁻¹⁰⁰ is nothing in float32
RESUME = "finished iterations are kept, and the same command resumes"


class EngineError(RuntimeError):
    """The engine died, cannot be reached, or does not do what was asked of it."""


class Request(NamedTuple):
    """Ask for the tokens after ``ids``; the names of the other fields are vLLM's.

    Args:
        restriction: ``allowed_token_ids`` or ``logit_bias``, or nothing.
        stop: Text that ends the answer; the token that completes it is included.
        stop_token_ids: Tokens that end the answer, included.
        temperature: 0 is greedy.
    """

    ids: list[int]
    restriction: dict[str, Any]
    max_tokens: int
    stop: list[str]
    stop_token_ids: list[int]
    temperature: float
    seed: int


class Written(NamedTuple):
    """The answer: tokens, and the log-probability with which each of them was drawn."""

    ids: list[int]
    logprobs: list[float]


class Engine:
    """What both ways to vLLM share: when weights are handed over, and what is counted.

    Args:
        folder: The files that hand weights over lie in a temporary folder in it; None puts that
            where temporary files go. A server has to see it under the same path.
    """

    def __init__(self, folder: Path | None):
        self.files = TemporaryDirectory(prefix=".engine-", dir=folder)
        self.version: int | None = None
        self.sync_seconds = 0.0
        self._forget()

    def _generate(self, requests: list[Request]) -> list[Written]:
        raise NotImplementedError

    def _load(self, policy: Policy, path: Path) -> None:
        raise NotImplementedError

    def _counter(self, name: str) -> float:
        raise NotImplementedError

    def _prefix_tokens(self) -> tuple[float, float]:
        """Prompt tokens asked for so far, and how many of them were in the prefix cache."""
        return self._counter("vllm:prefix_cache_queries"), self._counter("vllm:prefix_cache_hits")

    def _forget(self) -> None:
        self.gap_sum = self.gap_max = 0.0
        self.tokens = self.requests = self.drawn = 0
        self.prefix_before = (0.0, 0.0)

    def sync(self, policy: Policy, version: int) -> None:
        """Hand the policy's weights over, unless the engine has this version; counts start anew.

        With LoRA it is the adapter that is handed over, under a new name, so that nothing computed
        with an older one is found in the prefix cache.
        """
        if version != self.version:
            started = time.perf_counter()
            old = self._path(self.version)
            self._load(policy, self._path(version))
            self.version = version
            shutil.rmtree(old, ignore_errors=True)
            self.sync_seconds = time.perf_counter() - started
        self._forget()
        self.prefix_before = self._prefix_tokens()

    def answer(self, requests: list[Request]) -> list[Written]:
        """Generate for all requests at once.

        Raises:
            EngineError: If the engine fails.
        """
        answers = self._generate(requests)
        self.requests += len(requests)
        self.drawn += sum(len(answer.ids) for answer in answers)
        return answers

    def compare(self, engines: Tensor, trainers: Tensor, limit: float, device: str) -> None:
        """Take note of how far apart two log-probabilities of the same tokens are.

        Raises:
            EngineError: If the mean since the last sync is above the limit; on a CPU, where both
                compute in float32, above a hundredth of it.
        """
        gap = (trainers - engines).abs()
        self.gap_sum += gap.sum().item()
        self.gap_max = max([self.gap_max, *gap.tolist()])
        self.tokens += len(gap)
        mean, limit = self.gap_sum / max(1, self.tokens), limit if device == "cuda" else limit / 100
        if not mean <= limit:
            raise EngineError(
                f"vLLM and the trainer disagree by {mean:.3g} nats in the mean over {self.tokens} "
                f"tokens (at most by {self.gap_max:.3g}; limit {limit}): vLLM serves another "
                "model, kept older weights, or computes too coarsely. A server on a CPU cannot "
                "take new full weights: use LoRA there (lora_rank), or engine 'vllm'. Raise "
                f"logprob_gap_limit only if you know why; {RESUME}"
            )

    def _path(self, version: int | None) -> Path:
        return Path(self.files.name) / f"weights-{version}"

    def metrics(self) -> dict[str, float]:
        """What happened since the last sync."""
        asked, cached = np.subtract(self._prefix_tokens(), self.prefix_before)
        hit_rate = {"engine/prefix_hit_rate": float(cached / asked)} if asked else {}
        return hit_rate | {
            "engine/logprob_gap": self.gap_sum / max(1, self.tokens),
            "engine/logprob_gap_max": self.gap_max,
            "engine/requests": self.requests,
            "engine/tokens": self.drawn,
            "time/sync_s": self.sync_seconds,
        }


def open_engine(
    address: str, folder: Path | None, model: str, memory: float, lora_rank: int
) -> Engine:
    """Start vLLM in this process (``address`` is ``vllm``), or connect to the server there.

    Args:
        model: The start model, as in ``load_model``.
        memory: Share of the GPU's memory for an engine in this process.

    Raises:
        ValueError: If vLLM is not installed, or in a version that was not tested.
        EngineError: If the server cannot be reached or lacks what is needed.
    """
    if address != "vllm":
        return Server(address, folder)
    return InProcess(folder, model, memory, lora_rank)


# ----------------------------------------------------------------------------------------- sampler


def vllm_sampler(
    engine: Engine,
    policy: Policy,
    codec: Codec,
    temperature: float,
    generator: torch.Generator,
    *,
    max_new_tokens: int,
    micro_batch_tokens: int,
    gap_limit: float,
) -> Sampler:
    """The sampler over vLLM; like ``hf_sampler`` it runs decoders to their ends.

    Args:
        temperature: 0 is greedy (log-probabilities are then those of temperature 1).
        generator: Gives every request its seed: an answer does not depend on its batch.
        max_new_tokens: As the decoders have it; bounds what is asked for at once.
        micro_batch_tokens: Tokens per forward pass when the trainer scores what was written.
        gap_limit: How far engine and trainer may disagree in the mean, in nats.
    """
    known = {id(s): restriction(s, policy.vocab) for s in (codec.subgoal_first, codec.subgoal_next)}

    def ask(ids: list[int], allowed: np.ndarray | None, seed: int) -> Request:
        """The longest piece that one set of allowed tokens may govern."""
        length, stop, stop_ids = 1, [], []
        if allowed is None:
            end = codec.tokenizer.eos_token_id
            length, stop, stop_ids = max_new_tokens, [SKELETON[3]], [] if end is None else [end]
        elif allowed is codec.subgoal_next:  # never the first token of a subgoal
            length, stop_ids = max_new_tokens - 1, [codec.subgoal_end]
        limits = known.get(id(allowed)) or restriction(allowed, policy.vocab)
        return Request(ids, limits, length, stop, stop_ids, temperature, seed)

    def sample(
        prompts: list[Prompt], drafts: list[Draft], decoders: list[Decoder]
    ) -> list[Response]:
        """Rounds of one request per response that is not finished, until all are."""
        writers = [_Writer(*row) for row in zip(drafts, decoders, strict=True)]
        while running := [i for i, writer in enumerate(writers) if writer.response is None]:
            seeds = torch.randint(
                2**62, (len(running),), generator=generator, device=generator.device
            ).tolist()
            answers = engine.answer([
                ask([*prompts[i].ids, *drafts[i].ids], writers[i].allowed, seed)
                for i, seed in zip(running, seeds, strict=True)
            ])  # fmt: skip
            for i, answer in zip(running, answers, strict=True):
                writers[i].take(answer)
        rows = [
            _as_sample(prompt, writer.draft, writer.sets)
            for prompt, writer in zip(prompts, writers, strict=True)
        ]
        for index in micro_batches([len(row.ids) for row in rows], micro_batch_tokens):
            batch = collate([rows[i] for i in index], policy.device)
            with torch.no_grad():
                hidden = policy.hidden(batch.ids)
                now = read_scores(policy, batch, hidden, temperature).logprob
            engine.compare(batch.logprob_old, now, gap_limit, policy.device.type)
            scored = iter(now.tolist())
            for i in index:
                for at in rows[i].at:
                    drafts[i].logprobs[at + 1 - rows[i].prompt] = next(scored)
        return [writer.response for writer in writers]

    return sample


class _Writer:
    """A decoder at work: what it allows next, and every set that it drew a token from."""

    def __init__(self, draft: Draft, decoder: Decoder):
        self.draft, self.decoder = draft, decoder
        self.sets: list[np.ndarray | None] = []
        self.response: Response | None = None
        self.allowed: np.ndarray | None = None
        self._advance(None)

    def _advance(self, token: int | None) -> None:
        try:
            self.allowed = self.decoder.send(token)  # None starts it
        except StopIteration as stop:
            self.response = stop.value

    def take(self, answer: Written) -> None:
        """Give the answer's tokens to the decoder for as long as it asks the same question."""
        asked = self.allowed
        if not answer.ids:
            raise EngineError(f"the engine wrote nothing; expected at least one token. {RESUME}")
        for token, logprob in zip(answer.ids, answer.logprobs, strict=True):
            if asked is not None and token not in asked:
                raise EngineError(f"the engine drew token {token}, which was not allowed; {RESUME}")
            at = len(self.draft.ids)
            self.sets.append(asked)
            self._advance(token)
            self.draft.logprobs[at] = logprob
            moved_on = self.allowed is not asked or len(self.draft.ids) > at + 1
            if self.response is not None or moved_on:
                return


def restriction(allowed: np.ndarray | None, vocab: int) -> dict[str, Any]:
    """The set as a parameter of vLLM: what is allowed, or what is not, whichever is shorter.

    Example:
        >>> restriction(np.array([2, 0]), 9), restriction(np.array([0, 1, 2]), 4)
        ({'allowed_token_ids': [2, 0]}, {'logit_bias': {3: -100.0}})
    """
    if allowed is None:
        return {}
    if len(allowed) <= vocab // 2:
        return {"allowed_token_ids": allowed.tolist()}
    banned = np.setdiff1d(np.arange(vocab), allowed)
    return {"logit_bias": dict.fromkeys(banned.tolist(), BAN)}


def _as_sample(prompt: Prompt, draft: Draft, sets: list[np.ndarray | None]) -> Sample:
    start, ids = len(prompt.ids), [*prompt.ids, *draft.ids]
    chosen = [i for i, choice in enumerate(draft.chosen) if choice]
    return Sample(
        ids=ids, prompt=start, action=start, at=[start + i - 1 for i in chosen],
        role=[draft.roles[i] for i in chosen],
        logprob_old=[draft.logprobs[i] for i in chosen], allowed=sets,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- weights


def export_adapter(policy: Policy, folder: Path) -> None:
    """Write the policy's LoRA adapter in peft's format."""
    policy.model.save_pretrained(str(folder), selected_adapters=["default"])


def export_model(policy: Policy, folder: Path) -> None:
    """Write the language model in transformers' format, without any adapter.

    On a GPU it is written in bfloat16, in which the trainer computes there too.
    """
    folder.mkdir(parents=True)
    dtype = torch.bfloat16 if policy.device.type == "cuda" else torch.float32
    weights = {}  # by address: tied weights are written once
    for name, tensor in policy.lm.state_dict().items():
        if ".lora_" not in name:
            weights.setdefault(tensor.data_ptr(), (name.replace(".base_layer", ""), tensor))
    save_file(
        {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.values()},
        folder / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    config = copy.deepcopy(policy.lm.config)
    config.architectures = [type(policy.lm).__name__]
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


# -------------------------------------------------------------------------------------- in process


class InProcess(Engine):
    """vLLM in this process, beside the trainer on one device.

    A LoRA adapter is exchanged. Full weights go to a GPU's engine through its reload; on a CPU,
    where linear layers are repacked and a reload silently keeps the old ones, it is built anew.
    """

    def __init__(self, folder: Path | None, model: str, memory: float, lora_rank: int):
        super().__init__(folder)
        # one process, and threads as the trainer has them; read when vllm is imported
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                "engine 'vllm' needs the extra: pip install 'hiper-lab[vllm]' "
                f"(see CONTRIBUTING.md for CPUs); {error}"
            ) from error
        if not vllm.__version__.startswith(f"{TESTED}."):
            raise ValueError(
                f"vllm {vllm.__version__} is installed, expected {TESTED}: what hiper_lab asks of "
                "it changes between versions"
            )
        self.vllm, self.model, self.memory, self.lora_rank = vllm, model, memory, lora_rank
        self.llm, self.lora = None, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "engine 'vllm' shares one process with one trainer, and this one is one of "
                f"{os.environ['WORLD_SIZE']}; start a server and give its address as engine"
            )

    def _load(self, policy: Policy, path: Path) -> None:
        if self.lora_rank:
            if self.llm is None:
                base = self.model
                if base in (TINY, SMOLLM):  # these are no folders
                    base = str(self._path(None))
                    export_model(policy, Path(base))
                self.llm = self._build(base, policy)
            export_adapter(policy, path)
            from vllm.lora.request import LoRARequest

            number = 1 if self.lora is None else self.lora.lora_int_id + 1
            self.lora = LoRARequest(path.name, number, str(path))
        elif self.llm is None or policy.device.type == "cpu":
            export_model(policy, path)
            self.llm = None
            gc.collect()
            self.llm = self._build(str(path), policy)
        else:
            weights = iter(policy.lm.state_dict().items())
            self._call(self.llm.collective_rpc, "reload_weights",
                       kwargs={"weights_iterator": weights})  # fmt: skip
            self.llm.reset_prefix_cache()

    def _build(self, path: str, policy: Policy) -> Any:
        known: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": self.memory}
        if policy.device.type == "cpu":
            # whole prompts only: a seeded request dies where its prompt is split (0.32.0)
            length = min(policy.lm.config.max_position_embeddings, 8192)
            known = {
                "dtype": "float32", "enforce_eager": True, "block_size": 32,
                "kv_cache_memory_bytes": 2**30, "enable_chunked_prefill": False,
                "max_model_len": length, "max_num_batched_tokens": length,
            }  # fmt: skip
        if self.lora_rank:
            rank = next((r for r in LORA_RANKS if r >= self.lora_rank), self.lora_rank)
            known |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        # While it starts, vLLM's CPU build (0.32.0) reads the attributes of every loaded module and
        # falls over this one, which numba brings.
        tripping = {n: sys.modules.pop(n) for n in ("llvmlite.binding.ffi",) if n in sys.modules}
        try:
            return self._call(
                self.vllm.LLM, path, logprobs_mode="processed_logprobs", generation_config="vllm",
                enable_prefix_caching=True, disable_log_stats=False, seed=0, **known,
            )  # fmt: skip
        finally:
            sys.modules.update(tripping)

    def _generate(self, requests: list[Request]) -> list[Written]:
        prompts = [self.vllm.TokensPrompt(prompt_token_ids=r.ids) for r in requests]
        parameters = [
            self.vllm.SamplingParams(
                temperature=r.temperature, seed=r.seed, max_tokens=r.max_tokens, stop=r.stop,
                stop_token_ids=r.stop_token_ids, ignore_eos=True, logprobs=0, **r.restriction,
            )
            for r in requests
        ]  # fmt: skip
        answers = self._call(
            self.llm.generate, prompts, parameters, use_tqdm=False, lora_request=self.lora
        )
        outputs = [answer.outputs[0] for answer in answers]
        return [
            Written(
                list(o.token_ids),
                [at[i].logprob for at, i in zip(o.logprobs, o.token_ids, strict=True)],
            )
            for o in outputs
        ]

    def _counter(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)

    def _call(self, do: Callable, *args, **named) -> Any:
        try:
            return do(*args, **named)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise EngineError(f"vLLM failed in this process ({said}); {RESUME}") from error


# ------------------------------------------------------------------------------------------ server


class Server(Engine):
    """A vLLM server, started by the user (README.md, "Other engines", has the commands).

    LoRA adapters are exchanged by ``/v1/load_lora_adapter``, full weights by ``reload_weights``.
    """

    def __init__(self, address: str, folder: Path | None):
        super().__init__(folder)
        self.address = address.rstrip("/").removesuffix("/v1")
        key = os.environ.get("VLLM_API_KEY")
        self.client = httpx.Client(
            base_url=self.address,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(600, connect=10),
            limits=httpx.Limits(max_connections=CONNECTIONS),
        )
        self.pool = ThreadPoolExecutor(CONNECTIONS)
        self.base = self.name = self._ask("/v1/models").json()["data"][0]["id"]
        self._check()

    def _check(self) -> None:
        """Ask for one token out of one, so that its log-probability has to be 0."""
        try:
            version = self._ask("/version").json()["version"]
        except (EngineError, ValueError, KeyError):
            version = "of unknown kind"
        who = f"the server at {self.address} (vLLM {version}; tested with {TESTED})"
        try:
            only = {"allowed_token_ids": [5]}
            (written,) = self._generate([Request([0, 1, 2, 3], only, 1, [], [], 1.0, 0)])
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{who} does not answer as vLLM does: {type(error).__name__} {error}; expected "
                "token_ids and logprobs in each choice of /v1/completions"
            ) from error
        if written.ids != [5]:
            raise EngineError(f"{who} ignores allowed_token_ids: allowed 5, got {written.ids}")
        if abs(written.logprobs[0]) > 1e-3:
            raise EngineError(
                f"{who} gives log-probabilities before masking ({written.logprobs[0]:.3g} for the "
                "only token allowed, expected 0); start it with --logprobs-mode processed_logprobs"
            )

    def _load(self, policy: Policy, path: Path) -> None:
        if policy.lora_rank:
            export_adapter(policy, path)
            old, name = self.name, f"{path.parent.name}/{path.name}"
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
            self.name = name
            if old != self.base:
                self._ask("/v1/unload_lora_adapter", {"lora_name": old})
        else:
            export_model(policy, path)
            where = {"weights_path": str(path)}
            self._ask("/collective_rpc", {"method": "reload_weights", "kwargs": where})
            self._ask("/reset_prefix_cache", {})

    def _generate(self, requests: list[Request]) -> list[Written]:
        return list(self.pool.map(self._complete, requests))

    def _complete(self, request: Request) -> Written:
        # every default is spelled out: the server would take the model's generation_config.json
        answer = self._ask("/v1/completions", {
            "model": self.name, "prompt": request.ids, "max_tokens": request.max_tokens,
            "temperature": request.temperature, "seed": request.seed, "stop": request.stop,
            "stop_token_ids": request.stop_token_ids, "ignore_eos": True, "top_p": 1.0, "top_k": 0,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": 0, "return_token_ids": True,
            "add_special_tokens": False, **request.restriction,
        })  # fmt: skip
        choice = answer.json()["choices"][0]
        return Written(list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"]))

    def _counter(self, name: str) -> float:
        found = re.findall(rf"^{name}_total\{{.*\}} (\S+)$", self._ask("/metrics").text, re.M)
        return sum(map(float, found))

    def _ask(self, path: str, body: dict | None = None) -> httpx.Response:
        try:
            answer = self.client.get(path) if body is None else self.client.post(path, json=body)
        except httpx.HTTPError as error:
            raise EngineError(
                f"no answer from the vLLM server at {self.address} "
                f"({type(error).__name__}: {error}); is it running? {RESUME}"
            ) from error
        if answer.is_error:
            raise EngineError(
                f"the vLLM server at {self.address} answered {answer.status_code} to {path}: "
                f"{answer.text[:500].strip()}; {RESUME}"
            )
        return answer
