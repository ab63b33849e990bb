"""The `duetjax` command: generate, serve, convert, doctor."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from duetjax.config import ConfigError, DuetJAXError, EngineConfig, SamplingParams

_CHOICES = ("temperature", "top_p", "top_k", "min_p")  # flags of generate, in SamplingParams
_EPILOG = "With no --model, duetjax uses the small demo checkpoint that ships with it."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for a fault the user can mend, 130."""
    args = _parser().parse_args(argv)
    try:
        with _log_to_stderr():
            return int(args.run(args))
    except DuetJAXError as error:
        print(f"duetjax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="duetjax", description=__doc__, epilog=_EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="print the answer to a prompt", epilog=_EPILOG)
    generate.add_argument("prompt", nargs="?", help="the prompt; without it, standard input")
    generate.add_argument("--model", help="folder, preset name or hub id")
    generate.add_argument(
        "--raw", action="store_true", help="continue the text itself, without the chat template"
    )
    generate.add_argument("--max-tokens", type=int, help="default: until the context is full")
    generate.add_argument("--temperature", type=float, help="0 is greedy; default: the model's")
    generate.add_argument("--top-p", type=float, help="default: the model's")
    generate.add_argument("--top-k", type=int, help="default: the model's")
    generate.add_argument("--min-p", type=float, help="default: the model's")
    generate.add_argument("--stop", action="append", default=[], help="end before this text")
    _add_engine_flags(generate)
    generate.set_defaults(run=_generate)

    serve = commands.add_parser("serve", help="serve the OpenAI API over HTTP", epilog=_EPILOG)
    serve.add_argument("model", nargs="?", help="folder, preset name or hub id")
    serve.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0: any free port")
    serve.add_argument("--api-key", help="demand this key as a bearer token")
    serve.add_argument("--served-model-name", action="append", help="name in the API; repeatable")
    serve.add_argument(
        "--shutdown-timeout", type=float, default=30.0, metavar="S", help="seconds to finish in"
    )
    _add_engine_flags(serve)
    serve.set_defaults(run=_serve)

    convert = commands.add_parser("convert", help="rewrite a model folder for Orbax, or back")
    convert.add_argument("source", metavar="SRC", help="folder or hub id")
    convert.add_argument("target", metavar="DST", help="new folder")
    convert.add_argument(
        "--format", choices=("orbax", "safetensors"), help="default: the one that SRC has not"
    )
    convert.add_argument(
        "--max-shard-size", type=int, metavar="BYTES", help="per safetensors file; default: 5 GB"
    )
    convert.set_defaults(run=_convert)

    doctor = commands.add_parser("doctor", help="show what this installation can do")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    default = EngineConfig()
    group = parser.add_argument_group("model and engine")
    group.add_argument("--tokenizer", help="folder of the tokenizer, if not the model's")
    group.add_argument("--chat-template", type=Path, help="file with a template of your own")
    group.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    group.add_argument("--dtype", default=default.dtype, help="auto, float32, bfloat16, float16")
    group.add_argument("--max-model-len", type=int, help="longest context in tokens")
    group.add_argument("--max-num-seqs", type=int, default=default.max_num_seqs)
    group.add_argument("--max-num-batched-tokens", type=int, default=default.max_num_batched_tokens)
    group.add_argument("--page-size", type=int, default=default.page_size)
    group.add_argument("--kv-cache-memory-bytes", type=int, help="default: 512 MiB on the host")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=default.gpu_memory_utilization
    )
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument(
        "--deterministic", action="store_true", help="same tokens, bit for bit, in any company"
    )


def _engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are fields of `EngineConfig`, by the same names."""
    return {field.name: getattr(args, field.name) for field in fields(EngineConfig)}


def _generate(args: argparse.Namespace) -> int:
    from duetjax.llm import LLM

    chosen = {name: value for name in _CHOICES if (value := getattr(args, name)) is not None}
    params = SamplingParams(**chosen, max_tokens=args.max_tokens, stop=args.stop)  # checked early
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        chat_template=args.chat_template,
        load_format=args.load_format,
        **_engine_settings(args),
    )
    with llm:
        defaults = llm.get_default_sampling_params()
        params = replace(defaults, **chosen, max_tokens=params.max_tokens, stop=params.stop)
        if args.raw or not llm.has_chat_template:
            deltas = llm.stream(prompt, params)
        else:
            deltas = llm.stream_chat([{"role": "user", "content": prompt}], params)
        for delta in deltas:
            print(delta.text, end="", flush=True)
    print()
    return 0


def _serve(args: argparse.Namespace) -> int:
    from duetjax.build import ModelRequest, load
    from duetjax.runtime import compilations
    from duetjax.serve.context import Service
    from duetjax.serve.server import HttpServer, bind

    if args.model and args.model_flag:
        raise ConfigError("name the model once: as an argument or with --model")
    request = ModelRequest(
        args.model or args.model_flag, args.tokenizer, args.chat_template, args.load_format
    )
    with bind(args.host, args.port) as listener:
        model = load(request, EngineConfig(**_engine_settings(args)), needs_tokenizer=True)
        assert model.tokenizer is not None
        service = Service(
            client=model.engine,
            tokenizer=model.tokenizer,
            model_names=tuple(args.served_model_name or [model.name]),
            created=int(time.time()),
            max_model_len=model.max_model_len,
            vocab_size=model.config.vocab_size,
            eos_token_ids=model.generation.eos_token_ids,
            defaults=model.generation.sampling,
            compilations=compilations.count,
            api_key=args.api_key,
        )
        server = HttpServer(service, listener, shutdown_timeout=args.shutdown_timeout)
        try:
            server.run(lambda line: print(line, flush=True))
        finally:
            model.engine.shutdown(timeout=30)
    return 0


def _convert(args: argparse.Namespace) -> int:
    # Orbax asks jax for its devices; converting needs none, and others may be using them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from duetjax.checkpoint.convert import convert
    from duetjax.checkpoint.weights import WeightFormat

    started = time.perf_counter()
    done = convert(
        args.source,
        args.target,
        to=None if args.format is None else WeightFormat(args.format),
        max_shard_size=args.max_shard_size,
    )
    print(
        f"wrote {done.folder}: {done.num_tensors} tensors as {done.format},"
        f" {done.nbytes / 1e9:.3g} GB in {time.perf_counter() - started:.1f} s"
    )
    return 0


def _doctor(_args: argparse.Namespace) -> int:
    """Facts for a bug report."""
    import importlib.metadata
    import platform

    import jax

    from duetjax.checkpoint.source import preset_names, resolve_model

    packages = ("duetjax", "jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers")
    print(f"python       {platform.python_version()} on {platform.platform()}")
    for package in packages:
        print(f"{package:12} {importlib.metadata.version(package)}")
    print(f"devices      {', '.join(map(str, jax.devices()))} ({os.cpu_count()} cores)")
    print("attention    plain XLA, paged")
    print("launcher     none: launches run as plain JAX calls, one after another")
    print(f"presets      {', '.join(preset_names())}")
    print(f"demo         {resolve_model(None).folder}")
    return 0


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """While it lasts, what the package logs goes to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("duetjax: %(message)s"))
    logger = logging.getLogger("duetjax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
