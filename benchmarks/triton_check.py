"""Triton's kernels on the GPU at hand, against float64: whether they run, and are right.

    python benchmarks/triton_check.py [--out benchmarks/results/GPU/triton.json]

Needs jax-triton and a GPU of compute capability 8.0 or above; on Hopper too, where nobody gets
these kernels unless asked for. Prints a line per case and one JSON document. Where all are right,
keep the document and name it in `RESULTS_OF_TRITON` of pallas_kernels/choice.py: `doctor` then
stops saying that nobody has run them. Exit status 1: some result is wrong.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from checkout import commit
from triton.backends.nvidia import driver

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cpu"))
from paged_case import RELATIVE_ERROR, Case, PrefillCase, bits, relative_errors

from pallas_kernels.triton_gpu import CHUNK, TritonKernels

FORMS = (
    {"D": 64, "S": 16, "G": 1, "K": 2, "dtype": "bfloat16"},
    {"D": 96, "S": 32, "G": 4, "K": 2, "dtype": "float16"},
    {"D": 128, "S": 64, "G": 4, "K": 8, "dtype": "bfloat16"},
    {"D": 128, "S": 64, "G": 16, "K": 1, "dtype": "bfloat16"},
    {"D": 256, "S": 128, "G": 5, "K": 2, "dtype": "float16"},
)
ROWS = ((0, 70), (130, 1), (0, 0), (61, 200), (1000, 33))
"""Of a prefill: keys before, and queries."""


def check(kernels: TritonKernels, form: dict[str, object]) -> dict[str, object]:
    """The largest errors of both kernels in one form, and what else must be so."""
    S = form["S"]
    lengths = [0, 1, S, S + 1, CHUNK - 1, CHUNK, CHUNK + 1, 1100, 4096]
    decode, prefill = jax.jit(kernels.decode_attention), jax.jit(kernels.prefill_attention)
    rows = Case.random(lengths, seed=1, **form)
    decoded, alone = decode(*rows.operands), decode(*rows.only([7]).operands)
    prompts = PrefillCase.random(ROWS, T=320, **form)
    q, pages, table, (offsets, cached) = prompts.operands
    prefilled, end = np.asarray(prefill(q, pages, table, offsets, cached)), int(offsets[-1])
    found = {
        "decode_error": float(relative_errors(decoded, rows.dense()[0]).max()),
        "prefill_error": float(relative_errors(prefilled[:end], prompts.dense()[0][:end]).max()),
        "same_bits_alone": bool((bits(alone)[0] == bits(decoded)[7]).all()),
        "zeros_behind": bool((prefilled[end:] == 0).all()),
    }
    most = max(found["decode_error"], found["prefill_error"])
    is_right = most < RELATIVE_ERROR[form["dtype"]]
    is_right = is_right and found["same_bits_alone"] and found["zeros_behind"]
    return {**form, **found, "right": is_right}


def main() -> int:
    """Checks every form."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON document")
    options = parser.parse_args()
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        raise SystemExit(f"no NVIDIA GPU: {device.device_kind}")
    vars(driver).setdefault("TMA_TF32", 0)  # jax-triton asks for a name that triton 3.6 has not
    kernels = TritonKernels(int(capability.replace(".", "")))
    cases = []
    for form in FORMS:
        cases.append(check(kernels, form))
        print(cases[-1], flush=True)
    right = all(case["right"] for case in cases)
    document = json.dumps(
        {
            "benchmark": "triton_check",
            "device": device.device_kind,
            "compute_capability": capability,
            "right": right,
            "cases": cases,
            "versions": {name: version(name) for name in ("jax", "jax-triton", "triton")},
            "commit": commit(),
        }
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(document + "\n")
    print(document)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
