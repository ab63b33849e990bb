"""Flags that several commands have, and what becomes of them."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from duetjax.config import ConfigError, EngineConfig, PolicyName

type Commands = argparse._SubParsersAction[argparse.ArgumentParser]
"""What a command is added to."""
EPILOG = "With no --model, duetjax uses the small demo checkpoint that ships with it."
POLICIES = ", ".join(PolicyName)


def add_engine_flags(parser: argparse.ArgumentParser, title: str = "model and engine") -> None:
    """Of a model and its engine: fields of `EngineConfig`, and what `ModelRequest` has."""
    default = EngineConfig()
    group = parser.add_argument_group(title)
    group.add_argument("--tokenizer", help="folder of the tokenizer, if not the model's")
    group.add_argument("--chat-template", type=Path, help="file with a template of your own")
    group.add_argument("--load-format", default="auto", help="auto, or dummy for random weights")
    group.add_argument("--dtype", default=default.dtype, help="auto, float32, bfloat16, float16")
    group.add_argument(
        "--max-model-len", type=max_model_len, help="longest context in tokens; auto: what fits"
    )
    group.add_argument("--max-num-seqs", type=int, help="default: 64; on a GPU 256")
    group.add_argument(
        "--max-num-batched-tokens", type=int, help="of a launch; default: 512; on a GPU 2048"
    )
    group.add_argument("--page-size", type=int, default=default.page_size)
    group.add_argument("--kv-cache-memory-bytes", type=int, help="default: 512 MiB on the host")
    add_kv_dtype_flag(group)
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=default.gpu_memory_utilization
    )
    group.add_argument("--seed", type=int, default=default.seed)
    group.add_argument(
        "--deterministic", action="store_true", help="same tokens, bit for bit, in any company"
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=default.enable_prefix_caching,
        help="keep the KV of ended requests for others that begin alike",
    )
    group.add_argument(
        "--policy", default=default.policy, help=f"how prefill and decode share: {POLICIES}"
    )
    group.add_argument(
        "--split", type=split, default=default.split, help="static-split: DECODE/PREFILL cores"
    )
    group.add_argument(
        "--look-ahead",
        type=int,
        default=default.look_ahead,
        help="decode steps a launch: with static-split always, with duet at most",
    )
    group.add_argument(
        "--tbt-slo-ms",
        type=float,
        default=default.tbt_slo_ms,
        help="longest time between tokens, where a request names none; default: %(default)g",
    )
    group.add_argument(
        "--hardware-profile",
        metavar="NAME|FILE",
        help="foretell launches by it; aggregated-slo, duet and --device sim need one",
    )
    group.add_argument(
        "--model-profile",
        metavar="FILE",
        help="what the model costs; default: a shipped one, else its programs are timed",
    )
    group.add_argument(
        "--watchdog-s",
        type=float,
        default=default.watchdog_s,
        metavar="S",
        help="end when a step takes longer, or 20 times the prediction; 0: never; default: 60",
    )
    group.add_argument(
        "--backend",
        default=default.backend,
        help="what runs launches: lanes (beside each other), jax (plain calls) or auto",
    )
    group.add_argument(
        "--kernels", default=default.kernels, help="attention on a GPU: auto, mosaic, triton or xla"
    )
    group.add_argument(
        "--device",
        default=default.device,
        help="auto: what is there; sim: none, tokens are invented and take a profile's time",
    )
    group.add_argument(
        "--sim-noise",
        type=float,
        default=default.sim_noise,
        metavar="SIGMA",
        help="sim: how uneven steps are, from 0 to 1 (standard deviation of the logarithm)",
    )
    group.add_argument(
        "--sim-step-ms",
        type=_step_ms,
        metavar="DECODE/PREFILL",
        help="sim: milliseconds of each decode step and prefill launch, in place of a profile's",
    )


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that are fields of `EngineConfig`, by the same names."""
    return {field.name: getattr(args, field.name) for field in fields(EngineConfig)}


def add_kv_dtype_flag(parser: argparse._ActionsContainer) -> None:
    """Of the numbers in KV pages."""
    default = EngineConfig().kv_cache_dtype
    parser.add_argument(
        "--kv-cache-dtype",
        default=default,
        help="auto (the model's), or fp8 (fp8_e4m3): half the memory, with scales of its own",
    )


def add_parser_flags(command: argparse.ArgumentParser) -> None:
    """Of what a model spells in its own way: see `styles`."""
    command.add_argument(
        "--tool-call-parser",
        choices=("hermes", "llama3_json"),
        help="how the model spells tool calls: hermes for Qwen, llama3_json for Llama 3",
    )
    command.add_argument(
        "--reasoning-parser",
        choices=("qwen3", "deepseek_r1"),
        help="how the model marks its reasoning",
    )


def styles(args: argparse.Namespace) -> dict[str, Any]:
    """How the model spells tool calls and reasoning, as a `Service` has them."""
    from duetjax.text.answer import ReasoningStyle, ToolStyle

    tools, reasoning = args.tool_call_parser, args.reasoning_parser
    return {
        "tool_style": None if tools is None else ToolStyle(tools),
        "reasoning_style": None if reasoning is None else ReasoningStyle(reasoning),
    }


def fields_of[R](kind: type[R], args: argparse.Namespace) -> R:
    """A request from the flags called like its fields; the others keep their defaults."""
    names = [each.name for each in fields(kind) if hasattr(args, each.name)]  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names})


def write_picture(file: Path, text: str, name: str = "--plot") -> None:
    """Writes it to the file that the flag `name` gave. Raises `ConfigError`."""
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name} {file}: {error.strerror}; name another file") from error


def max_model_len(text: str) -> int | None:
    """Tokens; None for auto, or -1."""
    try:
        return None if text in ("auto", "-1") else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give tokens, or auto") from None


def split(text: str) -> tuple[int, int]:
    """Cores of decode and of prefill, from DECODE/PREFILL."""
    try:
        decode, prefill = text.split("/")
        return int(decode), int(prefill)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give cores as in 32/100") from None


def _step_ms(text: str) -> tuple[float, float]:
    try:
        decode, prefill = text.split("/")
        return float(decode), float(prefill)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give milliseconds as in 10/40") from None
