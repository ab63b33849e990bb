"""Faults that end the process of a server, or meet it while it starts, serves or ends."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from faults import Faults
from golden import tiny
from server_process import starting
from test_hanging_process import PROGRAM as HANGING

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
REAL = ("--max-num-seqs", "1", "--max-num-batched-tokens", "64")  # few programs
SIM = ("--device", "sim", "--sim-step-ms", "10/10")
PATIENCE, IMPATIENCE = 60.0, 2.0  # seconds, for what happens and for what may never
PROMPT = {"prompt": [5, 6, 7], "temperature": 0, "seed": 1}
ENDLESS = {**PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True}
MAIN = "import sys, duetjax.cli; sys.exit(duetjax.cli.main())"
SOON = "import duetjax.serve.server; duetjax.serve.server._OBITUARY_SECONDS = 0.1\n"


class NoStart(Exception):
    """A server that never answered; why, in words."""


class Server:
    """A server that answers, as a process."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, patience: float) -> None:
        self.process = process
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=patience, trust_env=False)
        self._patience = patience

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def answer(self) -> str:
        """The text after a prompt, the same every time."""
        response = self.http.post("/v1/completions", json=PROMPT | {"max_tokens": 8, "model": "m"})
        return str(response.json()["choices"][0]["text"])

    def wait_until_draining(self) -> str:
        """What new work is told once SIGTERM has been seen."""
        deadline = time.monotonic() + self._patience
        while self.http.get("/readyz").status_code == 200:
            if time.monotonic() > deadline:
                raise TimeoutError
        response = self.http.post("/v1/completions", json=PROMPT | {"model": "m"})
        return f"{response.status_code} {response.json()['error']['code']}"

    @contextmanager
    def stream(self, **changes: Any) -> "Iterator[Stream]":
        """A stream of which something has come."""
        body = ENDLESS | {"model": "m"} | changes
        with self.http.stream("POST", "/v1/completions", json=body) as response:
            stream = Stream(response, self._patience)  # without its iterator it would be closed
            yield stream

    def exit(self) -> str:
        """How the process ends."""
        return waited(self.process, self._patience)

    def stop(self) -> tuple[str, str]:
        """How it ends by SIGTERM, and what it has said."""
        self.terminate()
        said = self.process.communicate(timeout=self._patience)[1]
        return self.exit(), said


class Stream:
    """Events as they come; the first one has."""

    def __init__(self, response: httpx.Response, patience: float) -> None:
        lines = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
        self._lines = itertools.chain([next(lines)], lines)
        self._deadline = time.monotonic() + patience

    def ending(self) -> str:
        """How it ends, in words."""
        last = ""
        for line in self._lines:
            if line == "[DONE]":
                break
            last = line
            if time.monotonic() > self._deadline:
                return "still streams"
        else:
            return "ends without a word"
        event = json.loads(last)
        if "error" in event:
            return f"error event {event['error']['code']}"
        return f"finished by {event['choices'][0]['finish_reason']}"


def waited(process: "subprocess.Popen[str]", patience: float) -> str:
    """How a process ends, in words."""
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        return "still there"
    return f"exit {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"


class Machine:
    """Where servers are started. unguarded: Python that takes a guard away in each of them."""

    unguarded = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def patience(self) -> float:
        """Seconds to wait for what a guard makes happen."""
        return IMPATIENCE if self.unguarded else PATIENCE

    @contextmanager
    def start(
        self, *flags: str, fault: str = "", main: str = MAIN, **options: Any
    ) -> "Iterator[subprocess.Popen[str]]":
        """A process that is to become a server. fault: Python to run in it first."""
        program = "\n".join((self.unguarded, fault, main))
        named = ("--served-model-name", "m")
        with starting(*named, *flags, program=("-c", program), **options) as process:
            yield process

    @contextmanager
    def serve(self, *flags: str, **options: Any) -> Iterator[Server]:
        """A server."""
        with self.start(*flags, **options) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            if not found:
                raise NoStart(reason(process.stderr.read()))
            server = Server(process, found[0], self.patience)
            with server.http:
                yield server

    @contextmanager
    def real(self, *flags: str, cache: Path | None = None, **options: Any) -> Iterator[Server]:
        """A server of a tiny model on this processor. cache: of programs; usually it has all."""
        model, store, _ = stock()
        options["DUETJAX_CACHE_DIR"] = str(cache or store)
        with self.serve("--model", str(model), *REAL, *flags, **options) as server:
            yield server


def child(process: "subprocess.Popen[str]") -> int:
    """The id of the only process that a server has started."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    [pid] = "".join((task / "children").read_text() for task in tasks).split()
    return int(pid)


def left(engine: int) -> str:
    """Whether an engine's process ends soon, in words; it is ended in any case."""
    if has_ended(engine):
        return "nothing is left"
    os.kill(engine, signal.SIGKILL)
    return "a process is left"


def has_ended(pid: int) -> bool:
    """Whether a process, not of ours, ends soon."""
    deadline = time.monotonic() + IMPATIENCE
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":  # nobody has asked yet how
            return True
        time.sleep(0.01)
    return False


def reason(log: str) -> str:
    """What a log says last: an exception's name, or the error."""
    last = log.splitlines()[-1] if log else "killed"
    if last.startswith("duetjax: "):
        return re.sub(r"--port \d+", "--port PORT", last.removeprefix("duetjax: error: "))
    return last.partition(":")[0].rpartition(".")[2]


@contextmanager
def machine() -> Iterator[Machine]:
    """With a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="duetjax-faults-") as folder:
        yield Machine(Path(folder))


def harm(target: Machine) -> str | None:
    """Whether a new server answers; what has done harm already need not be asked."""
    if target.unguarded:
        return None
    with target.serve(*SIM) as server:
        return None if server.answer() == calm() else "another answer"


@functools.cache
def calm() -> str:
    """What a simulated server answers where nothing is wrong."""
    with tempfile.TemporaryDirectory() as folder, healthy(folder).serve(*SIM) as server:
        return server.answer()


@functools.cache
def stock() -> tuple[Path, Path, str]:
    """A tiny model, a cache that has its programs, and what it answers."""
    kept = tempfile.TemporaryDirectory(prefix="duetjax-faults-")
    _KEPT.append(kept)  # until the process ends
    model, cache = Path(kept.name) / "model", Path(kept.name) / "cache"
    write_model(model)
    flags = ("--model", str(model), *REAL)
    with healthy(kept.name).serve(*flags, DUETJAX_CACHE_DIR=str(cache)) as server:
        return model, cache, server.answer()


def healthy(folder: str) -> Machine:
    """A machine on which every guard is there."""
    found = Machine(Path(folder))
    found.unguarded = ""
    return found


_KEPT: list["tempfile.TemporaryDirectory[str]"] = []


def write_model(model: Path) -> None:
    """A tiny model; its weights begin where a processor can use them as they are mapped."""
    with mock.patch.dict(tiny.CONFIGS["mistral"], num_hidden_layers=1):  # few to compile
        tiny.write_checkpoint("mistral", model)
    shutil.copy(DEMO / "tokenizer.json", model)
    file = model / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    more = -(8 + size) % 64
    header = data[8 : 8 + size] + b" " * more
    file.write_bytes((size + more).to_bytes(8, "little") + header + data[8 + size :])


def same(text: str) -> str:
    """Whether this is what the tiny model answers where nothing is wrong."""
    return "the same answer" if text == stock()[2] else "another answer"


FAULTS = Faults("Process", machine, harm)


def attack(name: str, **facts: Any) -> Callable[..., Any]:
    """Decorates the attack of a fault; where a server does not start, that is what it saw."""

    def add(function: Callable[[Machine], str]) -> Callable[[Machine], str]:
        @functools.wraps(function)
        def told(target: Machine) -> str:
            try:
                return function(target)
            except NoStart as error:
                return f"does not start: {error}"

        FAULTS.add(name, told, **facts)
        return function

    return add


def without(code: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A guard that goes when a server runs this first."""
    return lambda monkeypatch: monkeypatch.setattr(Machine, "unguarded", code)


# Signals.


@attack(
    "SIGTERM while it starts, as the first process of a container",
    expected="ended by SIGTERM, nothing is left",
    guard="a handler from the start on",
    off=without("import duetjax.cli_serve as s; s._end_by_signal = lambda *_: None"),
)
def terminate_early(target):
    """The kernel ignores signals to that process that have no handler."""
    ignored = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    cache = str(target.folder)
    with target.start(*REAL, fault=ignored, apart=True, DUETJAX_CACHE_DIR=cache) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "preparing" in line:
                break
        engine = child(process)
        process.send_signal(signal.SIGTERM)
        return f"{waited(process, target.patience)}, {left(engine)}"


@attack(
    "SIGTERM, idle",
    expected="exit 0",
    guard="the server drains on the signal",
    off=without(
        "from duetjax.serve.server import HttpServer; HttpServer._on_stop = lambda _: None"
    ),
)
def terminate_idle(target):
    with target.serve(*SIM, apart=True) as server:
        server.terminate()
        return server.exit()


@attack(
    "SIGTERM under load",
    expected="new work 503 shutting_down, finished by length, exit 0",
    guard="the server waits for what is in flight",
    off=without(
        "from duetjax.serve.admission import Admission\n"
        "async def at_once(*_): return True\n"
        "Admission.wait_idle = at_once"
    ),
)
def terminate_loaded(target):
    with target.serve(*SIM, apart=True) as server, server.stream(max_tokens=200) as stream:
        server.terminate()
        told = server.wait_until_draining()
        return f"new work {told}, {stream.ending()}, {server.exit()}"


@attack(
    "SIGTERM under load for longer than --shutdown-timeout",
    expected="error event shutting_down, exit 0",
    guard="the bound of the drain",
    off=without(
        "from duetjax.serve.admission import Admission\n"
        "wait = Admission.wait_idle\n"
        "Admission.wait_idle = lambda self, _: wait(self, 1e6)"
    ),
)
def terminate_for_long(target):
    with target.serve(*SIM, "--shutdown-timeout", "0.3") as server, server.stream() as stream:
        server.terminate()
        return f"{stream.ending()}, {server.exit()}"


@attack(
    "SIGTERM twice under load",
    expected="error event shutting_down, exit 0",
    guard="the second one gives up what is in flight",
    off=without(
        "from duetjax.serve.server import HttpServer\n"
        "HttpServer._on_stop = lambda self: self._stopping.set()"
    ),
)
def terminate_twice(target):
    with target.serve(*SIM) as server, server.stream() as stream:
        server.terminate()
        server.wait_until_draining()
        server.terminate()
        return f"{stream.ending()}, {server.exit()}"


@attack(
    "SIGTERM again, once all has been answered",
    expected="exit 0",
    guard="it is ignored by then",
    off=without("import duetjax.cli_serve as s; s._ignore_sigterm = lambda: None"),
)
def terminate_late(target):
    slow = """
import time
from duetjax.engine import EngineClient
shutdown = EngineClient.shutdown
def slowly(self, timeout):
    print("ending", flush=True)
    time.sleep(1)
    return shutdown(self, timeout)
EngineClient.shutdown = slowly
"""
    with target.serve(*SIM, fault=slow) as server:
        server.terminate()
        assert server.process.stdout.readline() == "ending\n"
        server.terminate()
        return server.exit()


@attack(
    "SIGKILL under load, and a start on the same port with the same store",
    expected="ended by SIGKILL, the same answer",
    guard="SO_REUSEADDR",
    off=without("import socket; socket.SO_REUSEADDR = socket.SO_KEEPALIVE"),
)
def kill(target):
    with target.real() as server, server.stream():
        server.process.kill()
        ended = server.exit()
        port = server.url.rpartition(":")[2]
        with target.real("--port", port) as again:
            return f"{ended}, {same(again.answer())}"


@attack(
    "SIGKILL, and what is left of the engine",
    expected="ended by SIGKILL, nothing is left",
    guard="the engine's process ends with the server's",
    off=without(
        "import duetjax.engine_process as engine\n"
        "engine._PROGRAM = 'import os; os._exit = print' + engine._PROGRAM"
    ),
)
def orphan(target):
    with target.serve(*SIM, apart=True) as server:
        engine = child(server.process)
        server.process.kill()
        return f"{server.exit()}, {left(engine)}"


# The engine and its device.

NOBODY_TOLD = "from duetjax.engine import EngineClient; EngineClient._fail = lambda *_: None"
TOLD = "error event engine_dead, exit 1"


@attack(
    "SIGKILL of the engine's process, as for want of memory",
    expected=TOLD,
    guard="the server sees it leave",
    off=without(
        "from duetjax.engine_process import EngineProcess; EngineProcess._fail = lambda *_: None"
    ),
)
def lose_engine(target):
    with target.serve(*SIM, fault=SOON, apart=True) as server, server.stream() as stream:
        os.kill(child(server.process), signal.SIGKILL)
        return f"{stream.ending()}, {server.exit()}"


@attack(
    "a prefill step that raises",
    expected=TOLD,
    guard="the engine tells everybody",
    off=without(NOBODY_TOLD),
)
def fail_prefill(target):
    raising = """
from duetjax.sim.executor import SimulatedExecutor
def submit(self, launch):
    raise RuntimeError("the device is lost")
SimulatedExecutor.submit = submit
"""
    with target.serve(*SIM, fault=SOON + raising) as server, server.stream() as stream:
        return f"{stream.ending()}, {server.exit()}"


@attack(
    "a decode step that raises, on the device's thread",
    expected=TOLD,
    guard="the engine tells everybody",
    off=without(NOBODY_TOLD),
)
def fail_decode(target):
    raising = """
from duetjax.policy.launch import Program
from duetjax.sim.executor import _Slots
run = _Slots.run
def raising(self, launch, step):
    if launch.program is Program.DECODE:
        raise RuntimeError("the device is lost")
    return run(self, launch, step)
_Slots.run = raising
"""
    with target.serve(*SIM, fault=SOON + raising) as server, server.stream() as stream:
        return f"{stream.ending()}, {server.exit()}"


@attack(
    "a device that answers no more",
    expected=TOLD,
    guard="the watchdog",
    off=without("from duetjax.engine import EngineClient; EngineClient.watch = lambda *_: None"),
)
def hang(target):
    flags = ("--watchdog-s", "0.5")
    with (
        target.serve(*flags, fault=SOON, main=HANGING) as server,
        server.stream(max_tokens=40) as stream,
    ):
        return f"{stream.ending()}, {server.exit()}"


# The disk.


@attack(
    "weights that are cut off while it serves",
    expected="the same answer, exit 0",
    guard="weights are copied, not mapped",
    off=without(
        "import duetjax.build_device as build\n"
        "load = build._load_weights\n"
        "build._load_weights = lambda *given, **_: load(*given, on_host=False)"
    ),
)
def cut_off(target):
    model = target.folder / "model"
    shutil.copytree(stock()[0], model)
    with target.real("--model", str(model)) as server:
        os.truncate(model / "model.safetensors", 0)
        return f"{same(server.answer())}, {server.stop()[0]}"


@attack(
    "compiled programs that are garbage, or cut short",
    expected="2 compiled again, the same answer, exit 0",
    guard="what cannot be loaded is compiled",
    off=without(
        "import duetjax.runtime.store; duetjax.runtime.store.Exception = ZeroDivisionError"
    ),
)
def damage(target):
    garbage, cut, *_ = copied_programs(target)
    garbage.write_bytes(b"\xa5" * 10_000)
    os.truncate(cut, cut.stat().st_size // 2)
    with target.real(cache=target.folder) as server:
        answer = server.answer()
        ended, said = server.stop()
    again = said.count("is not used, the program is compiled")
    return f"{again} compiled again, {same(answer)}, {ended}"


@attack(
    "a disk that is read-only",
    expected="said once, the same answer, exit 0",
    guard="what cannot be stored is not",
    off=without("import duetjax.runtime.store; duetjax.runtime.store.OSError = ZeroDivisionError"),
)
def read_only(target):
    for program in copied_programs(target)[:2]:
        program.unlink()
    refused = """
import duetjax.runtime.store
def refuse(*_):
    raise OSError(30, "Read-only file system")
duetjax.runtime.store.write_whole = refuse
"""
    with target.real(cache=target.folder, fault=refused) as server:
        answer = server.answer()
        ended, said = server.stop()
    assert said.count("Read-only file system") == 1
    return f"said once, {same(answer)}, {ended}"


def copied_programs(target: Machine) -> list[Path]:
    """A copy of all compiled programs in a machine's folder, the least first."""
    shutil.copytree(stock()[1], target.folder, dirs_exist_ok=True)
    return sorted((target.folder / "programs").iterdir(), key=lambda file: file.stat().st_size)


@attack(
    "standard output that is full",
    expected="ready, exit 0",
    guard="what cannot be printed there is printed as an error",
    off=without("import duetjax.cli_serve as s; s._announce = lambda x: print(x, flush=True)"),
)
def full(target):
    with open("/dev/full", "w") as output, target.start(*SIM, stdout=output) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("duetjax: serving"):
                break
        else:
            raise NoStart(f"OSError, {waited(process, target.patience)}")
        process.send_signal(signal.SIGTERM)
        return f"ready, {waited(process, target.patience)}"


NO_LAUNCHER = "import sys; sys.modules['duetjax._launcher'] = None\n"


@attack(
    "no launcher",
    expected="plain JAX calls, 8 tokens, exit 0",
    guard="the kernels say what they lack",
    off=without(
        NO_LAUNCHER + "import duetjax.runtime.host_kernels as kernels\n"
        "kernels.why_not = lambda *_: None"
    ),
)
def no_launcher(target):
    with target.real(fault=NO_LAUNCHER) as server:
        body = PROMPT | {"model": "m", "max_tokens": 8, "ignore_eos": True}
        usage = server.http.post("/v1/completions", json=body).json()["usage"]
        ended, said = server.stop()
    assert said.count("launches are plain JAX calls") == 1
    return f"plain JAX calls, {usage['completion_tokens']} tokens, {ended}"


test_guarded, test_unguarded = FAULTS.tests()
