"""Runs a client of the API, in an environment of its own, against servers started for it.

`python run.py CLIENT.py PYTHON`: this Python has duetjax, PYTHON has the client's packages. Fails
where the client does, or where a server does not end well.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer

HERE = Path(__file__).parent
DEMO = HERE.parents[1] / "checkpoints" / "demo"
START_SECONDS, CLIENT_SECONDS, END_SECONDS = 300, 600, 60

_SMALL = (
    *("--device", "sim", "--sim-step-ms", "0.1/0.1", "--max-model-len", "128"),
    *("--chat-template", str(HERE / "every_role.jinja"), "--body-timeout-s", "1"),
    *("--max-prompt-characters", "200", "--max-body-bytes", "65536", "--max-messages", "4"),
    *("--max-prompts", "4", "--max-n", "2", "--max-choices", "6", "--max-stop-strings", "2"),
    *("--max-stop-characters", "8", "--max-stop-token-ids", "3", "--max-logit-bias", "4"),
    *("--max-logprobs", "2", "--max-top-logprobs", "3", "--max-tools", "3"),
    *("--max-schema-bytes", "300", "--max-schema-depth", "8"),
)  # limits that a generated request reaches
SERVERS = {
    "small": (*_SMALL, "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    "strict": (*_SMALL, "--api-key", "open-sesame", "--strict-params"),
    "demo": ("--max-num-seqs", "16", "--max-num-batched-tokens", "128"),
    "calling": (
        *("--max-num-seqs", "4", "--max-num-batched-tokens", "128"),
        *("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
        *("--chat-template", str(HERE / "calling.jinja")),
    ),
    "locked": ("--device", "sim", "--sim-step-ms", "1/1", "--api-key", "open-sesame"),
    "narrow": (
        *("--device", "sim", "--sim-step-ms", "10/40"),
        *("--max-num-seqs", "1", "--max-num-queued-reqs", "0"),
    ),
    "h200": (
        *("--device", "sim", "--hardware-profile", "h200-sxm", "--policy", "duet"),
        *("--model", "llama-3.1-8b", "--tokenizer", str(DEMO), "--max-num-batched-tokens", "8192"),
    ),
}
CLIENTS = {
    "openai_client.py": ("demo", "calling", "locked", "narrow"),
    "aiperf_client.py": ("demo", "h200"),
    "schemathesis_client.py": ("small", "strict", "narrow"),
    "page_client.py": ("demo", "h200", "locked"),
    "perfetto_client.py": ("demo", "h200"),
    "ray_client.py": ("demo",),
}


@contextmanager
def serving(name: str) -> Iterator[str]:
    """One of the servers on a free port; yields its address, and asks it to end afterwards."""
    command = [sys.executable, "-m", "duetjax.cli", "serve", "--port", "0", *SERVERS[name]]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            yield _address(process)
            process.send_signal(signal.SIGTERM)
            code = process.wait(END_SECONDS)
            assert code == 0, f"server {name} ended with {code}"
        except BaseException:
            log.seek(0)
            print(f"--- the log of server {name}:", log.read(), sep="\n", end="---\n", flush=True)
            raise
        finally:
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    late = Timer(START_SECONDS, process.kill)
    late.start()
    line = process.stdout.readline()
    late.cancel()
    print(line, end="", flush=True)
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, "the server did not start"
    return found[0]


def run(client: str, python: str) -> None:
    """Exits with the client's status where it failed; with 124 where it took too long."""
    with ExitStack() as servers:
        addresses = [f"{name}={servers.enter_context(serving(name))}" for name in CLIENTS[client]]
        direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        process = subprocess.Popen(
            [python, str(HERE / client), *addresses],
            env={**os.environ, **direct},
            start_new_session=True,
        )
        try:
            if code := process.wait(CLIENT_SECONDS):
                sys.exit(code)
        except subprocess.TimeoutExpired:
            print(f"{client}: not done after {CLIENT_SECONDS} s", flush=True)
            sys.exit(124)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                process.wait()


if __name__ == "__main__":
    run(*sys.argv[1:])
