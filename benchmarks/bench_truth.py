"""How near `duetjax bench` and aiperf come to the truth, where the truth is written down.

`duetjax serve --device sim --sim-step-ms D/P` takes D ms for every decode step and P ms for every
prefill launch, so what its clients should see follows from the script alone (`Load.truth`). Each
tool measures the same loads, turn by turn; what the server says of itself meanwhile tells its own
lateness from its client's, and `duetjax bench --in-process` that of everything but HTTP. Medians of
requests, then of runs; the server tells means only, so the clients' are beside them. aiperf is left
out where it is not installed. Loads no jax. Takes about ten minutes. Last line: one JSON document.

    python benchmarks/bench_truth.py [--runs 5] [--aiperf build/clients/aiperf/bin/python]
        [--loads alone,long,several]
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from checkout import commit

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo"
COMMAND = [sys.executable, "-m", "duetjax.cli"]
PROMPT_TOKENS = 32  # no launch of several prompts is full, no page of a prompt is: none is shared
GOAL_PERCENT = 5.0
SERIES = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "e2el": "vllm:e2e_request_latency_seconds",
}
OF_AIPERF = {
    "ttft": "time_to_first_token",
    "tpot": "inter_token_latency",
    "e2el": "request_latency",
}

type Milliseconds = dict[str, float]
"""By metric."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests for `tokens` each. spacing_ms: between their arrivals; None: one after another.

    decode_ms, prefill_ms: the script.
    """

    name: str
    decode_ms: float
    prefill_ms: float
    tokens: int
    requests: int
    spacing_ms: float | None

    def truth(self) -> Milliseconds:
        """What the script fixes: of each request alone, of several at a time the median.

        Alone a request has its first token after its prefill, and each other one after a step.
        Several, with every launch as long as a step (d): each running request has a token from
        every launch. Launches follow each other without a gap, two in flight; so who comes between
        two ends joins the launch that is planned at the next end, begins at the one after it and
        ends d later: x after an end, at 3 d - x. Arrivals fall evenly between ends, as their
        spacing is a whole number of steps and the golden section of one: the median is 2.5 d. Were
        prefill launches longer than steps, or all to come at once, the first token would depend on
        whom a launch meets by fractions of a millisecond, and nothing would be true of it.
        """
        first = self.prefill_ms if self.spacing_ms is None else 2.5 * self.decode_ms
        whole = first + (self.tokens - 1) * self.decode_ms
        return {"ttft": first, "tpot": self.decode_ms, "e2el": whole}

    @property
    def device(self) -> list[str]:
        """Flags of the simulated device."""
        return ["--device", "sim", "--sim-step-ms", f"{self.decode_ms:g}/{self.prefill_ms:g}"]


STEP_MS = 20.0
LOADS = (
    Load("alone", STEP_MS, 60.0, 16, 20, spacing_ms=None),
    Load("long", STEP_MS, 200.0, 16, 20, spacing_ms=None),
    Load("several", STEP_MS, STEP_MS, 32, 100, spacing_ms=(5.5 + sqrt(1.25)) * STEP_MS),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """By one run of a tool. server_mean: of the same requests, by the server; empty without one."""

    median: Milliseconds
    mean: Milliseconds
    server_mean: Milliseconds


def bench(load: Load, seed: int, *where: str) -> Seen:
    """`duetjax bench`, in a process of its own."""
    command = [*COMMAND, "bench", *where, "--num-prompts", str(load.requests)]
    command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(load.tokens)]
    if load.spacing_ms is None:
        command += ["--max-concurrency", "1"]
    else:
        command += ["--request-rate", f"{1e3 / load.spacing_ms:.6f}", "--burstiness", "inf"]
    found = json.loads(_output([*command, "--seed", str(seed)]).splitlines()[-1])
    assert (found["completed"], found["total_output_tokens"]) == _asked(load), found
    middle = {name: found[f"median_{name}_ms"] for name in SERIES}
    return Seen(middle, {name: found[f"mean_{name}_ms"] for name in SERIES}, {})


def in_process(load: Load, seed: int) -> Seen:
    """The same without a server."""
    return bench(load, seed, "--in-process", *load.device)


def aiperf(python: Path, load: Load, seed: int, url: str) -> Seen:
    """NVIDIA's tool as a user starts it, with as many workers as it likes."""
    extra = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    command = [str(python), "-m", "aiperf", "profile", "--url", url, "--tokenizer", str(DEMO)]
    command += ["-m", "duetjax-demo", "--endpoint-type", "completions", "--streaming"]
    command += ["--isl", str(PROMPT_TOKENS), "--isl-stddev", "0", "--osl", str(load.tokens)]
    command += ["--osl-stddev", "0", "--extra-inputs", json.dumps(extra)]
    command += ["--use-server-token-count", "--request-count", str(load.requests)]
    command += ["--random-seed", str(seed), "--no-gpu-telemetry", "--no-server-metrics"]
    if load.spacing_ms is None:
        command += ["--concurrency", "1"]
    else:
        command += ["--request-rate", f"{1e3 / load.spacing_ms:.6f}", "--arrival-pattern"]
        command += ["constant"]
    with tempfile.TemporaryDirectory() as folder:
        nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": folder, "TMPDIR": folder}
        command += ["--ui", "none", "--output-artifact-dir", f"{folder}/out"]
        _output(command, folder=folder, **nowhere)
        found = json.loads(Path(folder, "out", "profile_export_aiperf.json").read_text())
    counted = found["request_count"]["avg"], found["total_usage_completion_tokens"]["avg"]
    assert counted == _asked(load), counted
    middle = {name: found[of]["p50"] for name, of in OF_AIPERF.items()}
    return Seen(middle, {name: found[of]["avg"] for name, of in OF_AIPERF.items()}, {})


def _asked(load: Load) -> tuple[int, int]:
    return load.requests, load.requests * load.tokens


def _output(command: list[str], *, folder: str | None = None, **environment: str) -> str:
    direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | direct | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@contextmanager
def serving(load: Load) -> Iterator[str]:
    """The address of a server with the load's script, that has answered once."""
    command = [*COMMAND, "serve", "--port", "0", *load.device]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert found, "the server did not start"
            _output([*COMMAND, "bench", "--base-url", found[0], "--num-prompts", "2"])
            yield found[0]
        finally:
            process.kill()


def beside(url: str, run: Callable[[], Seen]) -> Seen:
    """A run, and what the server says of its requests."""
    before = _served(url)
    seen = run()
    after = _served(url)
    means = {}
    for name in SERIES:
        seconds, count = (b - a for a, b in zip(before[name], after[name], strict=True))
        means[name] = 1e3 * seconds / count
    return Seen(seen.median, seen.mean, means)


def _served(url: str) -> dict[str, tuple[float, float]]:
    """By metric the sum, in seconds, and the count."""
    with urlopen(f"{url}/metrics") as answer:
        text = answer.read().decode()

    def value(series: str) -> float:
        [found] = re.findall(rf"^{series}(?:{{.*}})? (.*)$", text, re.MULTILINE)
        return float(found)

    return {name: (value(f"{of}_sum"), value(f"{of}_count")) for name, of in SERIES.items()}


def measure(load: Load, runs: int, python: Path | None) -> dict[str, list[Seen]]:
    """What each tool saw, run by run."""
    found: dict[str, list[Seen]] = {}
    with serving(load) as url:
        for number in range(runs):
            print(f"{load.name}: run {number + 1} of {runs}", file=sys.stderr)
            turns = {"in process": partial(in_process, load, number)}
            turns["bench"] = partial(beside, url, partial(bench, load, number, "--base-url", url))
            if python is not None:
                turns["aiperf"] = partial(beside, url, partial(aiperf, python, load, number, url))
            for tool, run in turns.items():
                found.setdefault(tool, []).append(run())
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """A metric of a load, in milliseconds: by tool medians of its runs, and of what these were."""

    load: str
    metric: str
    truth: float
    median: dict[str, float]
    deviation_percent: dict[str, float]
    mean: dict[str, float]
    server_mean: dict[str, float]
    medians: dict[str, list[float]]


def rows(load: Load, found: dict[str, list[Seen]]) -> Iterator[Row]:
    """One for each metric."""
    for metric, truth in load.truth().items():
        medians = {tool: [seen.median[metric] for seen in runs] for tool, runs in found.items()}
        middle = {tool: median(values) for tool, values in medians.items()}
        yield Row(
            load.name,
            metric,
            truth,
            median=middle,
            deviation_percent={tool: 100 * (ms / truth - 1) for tool, ms in middle.items()},
            mean={tool: median(seen.mean[metric] for seen in runs) for tool, runs in found.items()},
            server_mean={
                tool: median(seen.server_mean[metric] for seen in runs)
                for tool, runs in found.items()
                if runs[0].server_mean
            },
            medians=medians,
        )


def _print_tables(found: list[Row]) -> None:
    tools = list(found[0].median)
    print(f"{'median, ms':20}{'truth':>9}" + "".join(f"{tool:>20}" for tool in tools))
    for row in found:
        cells = [f"{row.median[tool]:.2f} ({row.deviation_percent[tool]:+.1f} %)" for tool in tools]
        print(f"{row.load:12}{row.metric:8}{row.truth:9.2f}" + "".join(f"{c:>20}" for c in cells))
    print(f"{'mean, server mean':29}" + "".join(f"{tool:>20}" for tool in tools))
    for row in found:
        told = {tool: f", {mean:.2f}" for tool, mean in row.server_mean.items()}
        cells = [f"{row.mean[tool]:.2f}{told.get(tool, '')}" for tool in tools]
        print(f"{row.load:12}{row.metric:17}" + "".join(f"{cell:>20}" for cell in cells))


def _rounded(row: Row) -> dict[str, object]:
    return json.loads(json.dumps(asdict(row)), parse_float=lambda text: round(float(text), 3))


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each tool; default: 5")
    names = [load.name for load in LOADS]
    parser.add_argument("--loads", type=lambda text: text.split(","), default=names)
    parser.add_argument(
        "--aiperf",
        type=Path,
        default=ROOT / "build/clients/aiperf/bin/python",
        metavar="PYTHON",
        help="of the environment that has it; default: what `make check-clients` makes",
    )
    args = parser.parse_args()
    python: Path | None = args.aiperf
    if not args.aiperf.exists():
        print(f"aiperf is left out: no {args.aiperf}; `make check-clients` makes one")
        python = None
    load_average = os.getloadavg()[0]
    loads = [load for load in LOADS if load.name in args.loads]
    found = [row for load in loads for row in rows(load, measure(load, args.runs, python))]
    _print_tables(found)
    worst = {
        tool: round(max(abs(row.deviation_percent[tool]) for row in found), 2)
        for tool in found[0].median
    }
    print(f"largest deviations, %: {worst}; goal: {GOAL_PERCENT:g}")
    result = {
        "benchmark": "bench_truth",
        "runs": args.runs,
        "loads": [asdict(load) for load in loads],
        "found_ms": [_rounded(row) for row in found],
        "largest_deviation_percent": worst,
        "goal_percent": GOAL_PERCENT,
        "reached": max(worst.values()) <= GOAL_PERCENT,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": [round(load_average, 2), round(os.getloadavg()[0], 2)],
        "python": platform.python_version(),
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
