"""A stand-in for a vLLM server: its HTTP interface, answered by a real model through transformers.

It is an independent, slow reference: one request at a time; sampling, masks and log-probabilities
are written anew. What a request leaves to the server's defaults is
taken from a generation_config as Qwen's has it, so that a request which forgets one is caught.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from hiper_lab.policy import load_model

DEFAULTS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "min_p": 0.5}
NEUTRAL = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "min_p": 0.0}


class StandIn:
    """A running server; ``with StandIn() as server`` gives one with an ``address``.

    Args:
        processed: Whether log-probabilities are those of the distribution drawn from
            (``--logprobs-mode processed_logprobs``), or of the bare model, as is vLLM's default.
        deaf: Accept new weights and go on with the old ones.
        dies_after: Drop the connection at this many completions.
    """

    def __init__(self, processed=True, deaf=False, dies_after=None, port=0):
        self.model, self.tokenizer = load_model("tiny", "cpu")
        self.adapters = {}
        self.processed, self.deaf, self.dies_after = processed, deaf, dies_after
        self.completions, self.lock = [], threading.Lock()
        self.asked = self.cached = 0
        self.seen = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.address = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def _handler(standin):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self._answer(standin.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with standin.lock:
                    if self.path == "/v1/completions":
                        standin.completions.append(body)
                        if len(standin.completions) == standin.dies_after:
                            self.close_connection = True
                            return
                    self._answer(standin.post(self.path, body))

            def _answer(self, answer):
                status, content = answer
                text = content if isinstance(content, str) else json.dumps(content)
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler

    def get(self, path):
        if path == "/version":
            return 200, {"version": "0.32.0"}
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny", "max_model_len": 2048}]}
        if path == "/metrics":
            labels = '{engine="0",model_name="tiny"}'
            return 200, (
                "# TYPE vllm:prefix_cache_queries_total counter\n"
                f"vllm:prefix_cache_queries_total{labels} {self.asked:.1f}\n"
                f"vllm:prefix_cache_hits_total{labels} {self.cached:.1f}\n"
            )
        return 404, {"detail": "Not Found"}

    def post(self, path, body):
        if path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            if body["lora_name"] in self.adapters or not (folder / "adapter_config.json").exists():
                return 400, {"error": {"message": f"cannot load {body}"}}
            base = load_model("tiny", "cpu")[0]
            self.adapters[body["lora_name"]] = (
                base if self.deaf else PeftModel.from_pretrained(base, str(folder)).eval()
            )
            return 200, "Success"
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, "Success"
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            new = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
            if not self.deaf:
                self.model.load_state_dict(new, strict=False)
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            self.seen.clear()
            return 200, ""
        if path == "/v1/completions":
            return 200, self.complete(body)
        return 404, {"detail": "Not Found"}

    @torch.no_grad()
    def complete(self, body):
        asked = DEFAULTS | body
        assert asked["ignore_eos"] and not asked["add_special_tokens"] and asked["logprobs"] == 0
        assert {name: asked[name] for name in NEUTRAL} == NEUTRAL, "the request relies on defaults"
        model = self.adapters.get(body["model"], self.model)
        generator = torch.Generator().manual_seed(asked["seed"])
        ids, written, logprobs = asked["prompt"], [], []
        self._count(body["model"], ids)
        cache, new = None, ids
        while len(written) < asked["max_tokens"]:
            out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            raw, cache = out.logits[0, -1], out.past_key_values
            masked = raw.clone()
            if asked.get("allowed_token_ids"):
                masked[:] = -torch.inf
                masked[asked["allowed_token_ids"]] = raw[asked["allowed_token_ids"]]
            for token, bias in asked.get("logit_bias", {}).items():
                masked[int(token)] += bias
            drawn = masked / (asked["temperature"] or 1.0)
            token = int(drawn.argmax())
            if asked["temperature"]:
                # Gumbel-max: another way to draw than the hf sampler's
                noise = -torch.empty_like(drawn).exponential_(generator=generator).log()
                token = int((drawn + noise).argmax())
            logprobs.append((drawn if self.processed else raw).log_softmax(-1)[token].item())
            written.append(token)
            new = [token]
            text = self.tokenizer.decode(written)
            if token in asked["stop_token_ids"] or any(stop in text for stop in asked["stop"]):
                break
        return {"choices": [{"token_ids": written, "logprobs": {"token_logprobs": logprobs}}]}

    def _count(self, name, ids, block=16):
        """Prefix caching as vLLM counts it: whole blocks of a prompt that were seen before."""
        self.asked += len(ids)
        known = True
        for end in range(block, len(ids) + 1, block):
            key = (name, *ids[:end])
            known = known and key in self.seen and end < len(ids)
            self.cached += block * known
            self.seen.add(key)
