"""Real servers for tests: the alphabet engine, a tokenizer on disk, a socket on 127.0.0.1."""

import functools
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from fake_engine import END, PATIENCE, FakeEngine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from duetjax.config import SamplingParams
from duetjax.serve.context import Service
from duetjax.serve.server import HttpServer, bind
from duetjax.text.tokenizer import Tokenizer as ServedTokenizer

MODEL = "alphabet"
GREEDY = SamplingParams(temperature=0.0, max_tokens=None)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if enable_thinking %}!{% endif %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> None:
    """A folder's tokenizer: token id = byte, 256 = <|end|>."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    vocab = {chr(b) if b in printable else chr(256 + hidden.index(b)): b for b in range(256)}
    assert set(vocab) == set(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    assert tokenizer.token_to_id("<|end|>") == END
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


@functools.cache
def _read_tokenizer(folder: Path) -> ServedTokenizer:
    return ServedTokenizer.from_folder(folder)


def make_service(folder: Path, engine: FakeEngine, **changes) -> Service:
    """A service over `engine` with the tokenizer of `folder`."""
    facts = {
        "client": engine,
        "tokenizer": _read_tokenizer(folder),
        "model_names": (MODEL, "abc/alias"),
        "created": 1_700_000_000,
        "max_model_len": 256,
        "vocab_size": END + 1,
        "eos_token_ids": (END,),
        "defaults": GREEDY,
        "compilations": lambda: 10,
    }
    return Service(**facts | changes)


@dataclass
class Served:
    """A running server and what a test needs to talk to it."""

    engine: FakeEngine
    server: HttpServer
    thread: threading.Thread

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT."""
        return self.server.url

    @property
    def context(self):
        """The app's own context."""
        return self.server._context

    def http(self, **options) -> httpx.Client:
        """A plain client; close it."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **options)

    def connect(self) -> socket.socket:
        """A bare connection."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=PATIENCE)

    def join(self) -> None:
        """Waits for the server to return."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the server did not stop"


@contextmanager
def serving(folder: Path, engine: FakeEngine | None = None, **changes) -> Iterator[Served]:
    """A server in a thread, stopped at the end whatever the test left behind."""
    engine = engine or FakeEngine()
    options = {"shutdown_timeout": 0.0, "trace": None}
    options |= {name: changes.pop(name) for name in options.keys() & changes.keys()}
    service = make_service(folder, engine, **changes)
    server = HttpServer(service, bind("127.0.0.1", 0), **options)
    lines: list[str] = []
    is_up = threading.Event()

    def announce(line: str) -> None:
        lines.append(line)
        is_up.set()

    thread = threading.Thread(target=server.run, args=(announce,), name="http-server")
    thread.start()
    try:
        assert is_up.wait(PATIENCE), "the server did not start"
        assert lines == [f"duetjax: serving {MODEL} on {server.url}"]
        yield Served(engine, server, thread)
    finally:
        engine.executor.release()
        server.stop()
        thread.join(PATIENCE)
        assert engine.shutdown(PATIENCE)
        assert not thread.is_alive(), "the server did not stop"


def post_bytes(path: str, body: dict, **headers: str) -> bytes:
    """A request as bytes, for bare connections."""
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: test", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def read_all(connection: socket.socket) -> bytes:
    """What the peer sends until it closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def events(response: bytes) -> list[str]:
    """The data of a stream's events, in order; the stream may still be in HTTP chunks."""
    lines = response.decode().splitlines()
    return [line[6:] for line in lines if line.startswith("data: ")]
