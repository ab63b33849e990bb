"""What a model's answers lose where its keys and values are kept in fewer bits.

Answers the same prompts greedily with pages in the model's own dtype and in another one. Up to an
answer's first token that differs both saw the same text, so the log-probabilities they gave it can
be compared: how far they lie apart, and how many tokens pass until the first difference. Chat
models get the prompts through their template. Last line: one JSON document.

    python benchmarks/kv_dtype.py [--model FOLDER] [--kv-cache-dtype fp8] [--tokens 160]
        [--prompts FILE, one a line]
"""

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
from checkout import commit

from duetjax import LLM, SamplingParams
from duetjax.bench_questions import questions_of
from duetjax.completion import CompletionOutput


def answers(dtype: str, prompts: list[str], args: argparse.Namespace) -> list[CompletionOutput]:
    """To every prompt, with pages in that dtype."""
    params = SamplingParams(max_tokens=args.tokens, temperature=0, logprobs=0, ignore_eos=True)
    with LLM(args.model, kv_cache_dtype=dtype, max_model_len=args.max_model_len) as llm:
        if llm.has_chat_template:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            return [each.outputs[0] for each in llm.chat(messages, params)]
        return [each.outputs[0] for each in llm.generate(prompts, params)]


def same_tokens(one: CompletionOutput, other: CompletionOutput) -> int:
    """How many both answers begin with."""
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(one.token_ids))


def apart(one: CompletionOutput, other: CompletionOutput, count: int) -> list[float]:
    """By how much the log-probabilities of the first tokens differ."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    pairs = zip(one.logprobs[:count], other.logprobs[:count], strict=True)
    return [abs(a.logprob - b.logprob) for a, b in pairs]


def main() -> None:
    """Prints facts, then the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--kv-cache-dtype", default="fp8")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--prompts", type=Path)
    args = parser.parse_args()
    prompts = [question.prompt for question in questions_of(None)]
    if args.prompts is not None:
        prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    ours, theirs = (answers(dtype, prompts, args) for dtype in ("auto", args.kv_cache_dtype))
    pairs = list(zip(ours, theirs, strict=True))
    same = [same_tokens(*pair) for pair in pairs]
    differences = [d for pair, count in zip(pairs, same, strict=True) for d in apart(*pair, count)]
    mean, late = float(np.mean(differences)), float(np.quantile(differences, 0.99))
    share = sum(same) / sum(len(one.token_ids) for one in ours)
    alike = sum(count == len(one.token_ids) for one, count in zip(ours, same, strict=True))
    print(f"{len(prompts)} answers of {args.tokens} tokens, pages in {args.kv_cache_dtype}:")
    print(
        f"log-probabilities of the same tokens {mean:.3g} apart on average, 99 % within {late:.3g}"
    )
    print(f"{share:.0%} of all tokens before the first that differs; {alike} answers the same")
    document = {
        "benchmark": "kv_dtype",
        "model": args.model,
        "kv_cache_dtype": args.kv_cache_dtype,
        "answers": len(prompts),
        "tokens": args.tokens,
        "logprob_mean": mean,
        "logprob_p99": late,
        "share_before_first_difference": share,
        "same_answers": alike,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "commit": commit(),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
