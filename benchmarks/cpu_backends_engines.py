"""The engines that cpu_backends.py measures; this file is what each one's process runs.

    python benchmarks/cpu_backends_engines.py ENGINE DTYPE FOLDER

Reads a call as a JSON line [method, argument], answers with a JSON line. Besides its engine it
needs numpy only, so that it runs in a Python that knows nothing of duetjax.
"""

import ctypes
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, override

import numpy as np
from cpu_backends_model import GGUF_F32, MAX_LEN, VOCAB

MOST_STREAMS = 8
DUETJAX = {"duetjax jax": "jax", "duetjax lanes": "lanes"}
ENGINES = (*DUETJAX, "transformers", "llama.cpp")


class Engine(ABC):
    """Runs in a worker process; imports what it needs when it is made."""

    versions: str

    @abstractmethod
    def prefill(self, prompt: list[int]) -> float:
        """Seconds from a prompt, which no call has had before, to its first token."""

    @abstractmethod
    def hold(self, prompts: list[list[int]]) -> None:
        """Takes equally long prompts, whose continuations `decode` times."""

    @abstractmethod
    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        """Seconds for so many tokens of each held prompt after its first, and all of them."""


class DuetJAX(Engine):
    """The product as users run it: `LLM.generate`. Held prompts lie in its prefix cache."""

    def __init__(self, backend: str, folder: Path, dtype: str) -> None:
        import jax

        from duetjax import LLM
        from duetjax.checkpoint.source import resolve_model

        demo = resolve_model(None).folder  # any tokenizer serves: prompts are token ids
        self._llm = LLM(
            str(folder),
            tokenizer=str(demo),
            backend=backend,
            dtype=dtype,
            max_num_seqs=MOST_STREAMS,
            max_model_len=MAX_LEN,
        )
        self.versions = f"jax {jax.__version__}"

    def _generate(self, prompts: list[list[int]], tokens: int) -> list[Any]:
        from duetjax import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    @override
    def prefill(self, prompt: list[int]) -> float:
        [output] = self._generate([prompt], 1)
        return float(output.timings.ttft)

    @override
    def hold(self, prompts: list[list[int]]) -> None:
        self._held = prompts
        self._generate(prompts, 1)

    @override
    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        """Streams start one after another: timed are those steps in which all of them run."""
        spare = 2 * len(self._held)
        outputs = self._generate(self._held, steps + 1 + spare)
        began = max(output.timings.token_times[0] for output in outputs)
        last = min(outputs, key=lambda output: output.timings.token_times[-1])
        times = [t for t in last.timings.token_times if t >= began]
        seconds = (times[-1] - times[0]) / (len(times) - 1) * steps
        return seconds, [list(output.token_ids[: steps + 1]) for output in outputs]


class Transformers(Engine):
    """transformers' Llama with its growing cache, one forward pass per step."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_grad_enabled(False)
        self._torch, self._cache_of = torch, transformers.DynamicCache
        self._model = transformers.LlamaForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.versions = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def _step(self, tokens: Any, cache: Any) -> Any:  # noqa: ANN401 - torch is not installed here
        """tokens [B, N] -> the next of each [B, 1]."""
        output = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)

    @override
    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        self._step(self._torch.tensor([prompt]), self._cache_of()).tolist()
        return time.perf_counter() - started

    @override
    def hold(self, prompts: list[list[int]]) -> None:
        self._cache, self._length = self._cache_of(), len(prompts[0])
        self._first = self._step(self._torch.tensor(prompts), self._cache)

    @override
    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        if added := self._cache.get_seq_length() - self._length:
            self._cache.crop(-added)
        taken = [self._first]
        started = time.perf_counter()
        for _ in range(steps):
            taken.append(self._step(taken[-1], self._cache))
        tokens = self._torch.cat(taken, 1).tolist()
        return time.perf_counter() - started, tokens


class LlamaCpp(Engine):
    """llama.cpp through llama-cpp-python's plain bindings; its KV cache has the weights' width."""

    def __init__(self, file: Path, dtype: str) -> None:
        import llama_cpp

        self._c = c = llama_cpp
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(
            str(file).encode(), c.llama_model_default_params()
        )
        params = c.llama_context_default_params()
        params.n_ctx = MOST_STREAMS * MAX_LEN
        params.n_batch, params.n_seq_max = MAX_LEN, MOST_STREAMS
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        if dtype == "float32":
            params.type_k = params.type_v = GGUF_F32  # else float16, as by default
            params.flash_attn_type = 0  # off: on, other tokens win, as it rounds
        self._context = c.llama_init_from_model(self._model, params)
        assert self._context, f"llama.cpp refuses {file}"
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(MAX_LEN, 0, 1)
        self.versions = f"llama-cpp-python {c.__version__}"

    def _run(self, rows: Sequence[tuple[int, int, list[int]]]) -> list[int]:
        """rows (stream, position, tokens) -> the next token of each."""
        batch, last, i = self._batch, [], 0
        for stream, position, tokens in rows:
            for offset, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, stream
                batch.logits[i] = offset == len(tokens) - 1
                i += 1
            last.append(i - 1)
        batch.n_tokens = i
        status = self._c.llama_decode(self._context, batch)
        assert status == 0, f"llama_decode: {status}"
        return [self._largest(index) for index in last]

    def _largest(self, index: int) -> int:
        logits = self._c.llama_get_logits_ith(self._context, index)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (VOCAB,)).argmax())

    @override
    def prefill(self, prompt: list[int]) -> float:
        self._c.llama_memory_clear(self._memory, False)
        started = time.perf_counter()
        self._run([(0, 0, prompt)])
        return time.perf_counter() - started

    @override
    def hold(self, prompts: list[list[int]]) -> None:
        self._c.llama_memory_clear(self._memory, False)
        self._length = len(prompts[0])
        self._first = [self._run([(i, 0, prompt)])[0] for i, prompt in enumerate(prompts)]

    @override
    def decode(self, steps: int) -> tuple[float, list[list[int]]]:
        for stream in range(len(self._first)):
            self._c.llama_memory_seq_rm(self._memory, stream, self._length, -1)
        taken = [self._first]
        started = time.perf_counter()
        for step in range(steps):
            place = self._length + step
            taken.append(self._run([(i, place, [token]) for i, token in enumerate(taken[-1])]))
        return time.perf_counter() - started, [list(row) for row in zip(*taken, strict=True)]


def work(name: str, dtype: str, files: Path) -> None:
    """A worker: a JSON line in for each call of its engine, a JSON line out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is not a reply

    def reply(answer: object) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    try:
        engine: Engine
        if name in DUETJAX:
            engine = DuetJAX(DUETJAX[name], files / "model", dtype)
        elif name == "transformers":
            engine = Transformers(files / "model", dtype)
        else:
            engine = LlamaCpp(files / f"{dtype}.gguf", dtype)
    except ImportError as missing:
        reply({"skipped": f"not installed ({missing})"})
        return
    reply({"versions": engine.versions})
    for line in sys.stdin:
        method, argument = json.loads(line)
        reply(getattr(engine, method)(argument))


if __name__ == "__main__":
    sys.path.pop(0)  # transformers would take kernels.py beside this file for another package
    work(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
