"""Makes tests/golden/*.npz: logits of the tiny models by Hugging Face transformers on a CPU.

Runs in an environment of its own (README.md beside this file), from the tests folder:

    python golden/make_golden.py [name ...]
"""

import json
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `golden.tiny`
from golden import tiny

PROMPT_LEN = 150
OUTPUT_LEN = 64


def load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model in `folder` with eager attention, after checking that each weight found its place.

    Loaded as users load it, not cast afterwards, so that rotary frequencies stay float32.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    faults = {kind: found for kind, found in info.items() if found}
    if faults:
        raise SystemExit(f"{folder}: weights do not fit the model: {faults}")
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {dtype}
    return model.eval()


def forward(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits [N, V] float32 of one causal pass over tokens [N].

    The head's product is taken in float32 from the model's own hidden states and weights: in
    bfloat16 it would round logits to three digits and tie many of the top two.
    """
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = hidden.float() @ model.lm_head.weight.float().T
        official = model(input_ids=ids, use_cache=False).logits.float()
    resolution = torch.finfo(model.dtype).eps * logits.abs().max()
    assert (official - logits).abs().max() <= 2 * resolution, "not the model's own head"
    return logits[0].numpy()


def top2_gap(logits: np.ndarray) -> np.ndarray:
    """Difference between the largest and second largest logit of every row: [N]."""
    top = np.sort(logits, axis=-1)[:, -2:]
    return top[:, 1] - top[:, 0]


def greedy(model: torch.nn.Module, prompt: np.ndarray) -> np.ndarray:
    """Prompt [N] and its OUTPUT_LEN likeliest next tokens, each from a pass over all before it."""
    tokens = prompt
    for _ in range(OUTPUT_LEN):
        best = forward(model, tokens)[-1].argmax()
        tokens = np.append(tokens, best.astype(np.int32))
    return tokens


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file; README.md says what each holds."""
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("float32", "bfloat16"):
            tiny.write_checkpoint(name, Path(scratch, dtype), dtype)
        exact = load(Path(scratch, "float32"), torch.float32)
        rounded = load(Path(scratch, "bfloat16"), torch.bfloat16)
    for key, weight in exact.state_dict().items():
        assert torch.equal(weight.to(torch.bfloat16), rounded.state_dict()[key]), key
    tokens = greedy(exact, tiny.prompt(name, PROMPT_LEN))
    logits = forward(exact, tokens)
    continuation = logits[PROMPT_LEN - 1 : -1].argmax(-1)
    assert (continuation == tokens[PROMPT_LEN:]).all(), "one pass and greedy steps disagree"
    gaps = top2_gap(logits)
    assert gaps[PROMPT_LEN - 1 : -1].min() > 1e-3, f"{name}: a near-tie, hash another prompt"
    logits_bf16 = forward(rounded, tokens)
    return {
        "prompt_len": np.array(PROMPT_LEN),
        "tokens": tokens,
        "logits": logits,
        "top2_gap": gaps,
        "logits_bf16": logits_bf16,
        "top2_gap_bf16": top2_gap(logits_bf16),
        "fingerprint": np.array(tiny.fingerprint(name)),
        "versions": np.array(json.dumps(versions())),
    }


def versions() -> dict[str, str]:
    """What made these files; another torch or processor may differ in the last digits."""
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def report(name: str, arrays: dict[str, np.ndarray]) -> str:
    """One line on whether the logits are worth comparing with."""
    logits, rounded = arrays["logits"], arrays["logits_bf16"]
    relative = np.linalg.norm(rounded - logits, axis=-1) / np.linalg.norm(logits, axis=-1)
    same = (rounded.argmax(-1) == logits.argmax(-1)).mean()
    distinct = len(set(arrays["tokens"][PROMPT_LEN:].tolist()))
    return (
        f"{name}: spread {logits.std():.2f}, {distinct} distinct of {OUTPUT_LEN} greedy tokens,"
        f" smallest gap {arrays['top2_gap'][PROMPT_LEN - 1 :].min():.1e};"
        f" bfloat16 is {relative.max():.1e} away at most, top-1 agrees on {same:.1%}\n"
    )


def main(names: list[str]) -> None:
    """Writes one file for each of `names`, or for every tiny model; prints a line on each."""
    torch.set_num_threads(1)  # one order of summation, hence the same bytes at every run
    transformers.logging.disable_progress_bar()
    for name in names or tiny.CONFIGS:
        arrays = golden(name)
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **arrays)
        sys.stdout.write(report(name, arrays))


if __name__ == "__main__":
    main(sys.argv[1:])
