"""Hub ids, against a hub of our own on a local socket and the real client library."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import duetjax
from duetjax.checkpoint import hub as hub_module
from duetjax.config import ModelFolderError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": (2).to_bytes(8, "little") + b"{}",  # whole, if without tensors
    "consolidated.safetensors": b"y" * 1000,
    "original/model.safetensors": b"z" * 1000,
    "pytorch_model.bin": b"p" * 1000,
    "README.md": b"hello",
}
RESOLVE = """
import sys
from duetjax.checkpoint.source import resolve_model
from duetjax.config import ModelFolderError
try:
    source = resolve_model(sys.argv[1], load_format=sys.argv[2])
except ModelFolderError as refusal:
    print("refused", refusal)
else:
    print("found", source.kind, source.name, source.folder, source.description, sep="\\n")
"""


class Hub(BaseHTTPRequestHandler):
    """Serves org/open; org/gated shows its list but no files; anything else is not found."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo not in ("org/open", "org/gated"):
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models"):
            return self.answer(200, json.dumps(self.listing(path, repo)).encode(), {})
        if repo == "org/gated":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        content = FILES[path.split(f"/resolve/{COMMIT}/")[1]]
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def listing(self, path: str, repo: str) -> object:
        if "/tree/" not in path:
            return {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in FILES]}
        return [
            {"type": "file", "path": name, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for name, c in FILES.items()
        ]

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keeps the test's output clean."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(endpoint: str, home: Path, model: str, load_format: str = "auto", **environ: str):
    """Lines printed by a fresh process, as the library reads its variables at import."""
    home.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", RESOLVE, model, load_format],
        env={
            **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(Path(duetjax.__file__).parents[1]),
            **environ,
        },
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Traceback" not in run.stderr
    return run.stdout.splitlines()


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def downloaded(hub, tmp_path_factory) -> tuple[Path, list[str]]:
    """A home whose cache holds org/open, and what its download printed."""
    home = tmp_path_factory.mktemp("cached")
    return home, resolve(hub, home, "org/open")


def test_a_hub_id_downloads_what_serving_needs_and_no_more(downloaded):
    found, kind, name, folder, description = downloaded[1]
    assert (found, kind, name) == ("found", "hub", "org/open")
    assert sorted(file.name for file in Path(folder).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert description.startswith("model org/open: a hub id, as no folder or preset has that name")
    assert description.endswith(folder)


def test_dummy_weights_are_not_downloaded(hub, home):
    folder = resolve(hub, home, "org/open", "dummy")[3]
    assert sorted(file.name for file in Path(folder).iterdir()) == ["config.json", "tokenizer.json"]


def test_a_cached_model_is_found_without_the_network(downloaded):
    home, lines = downloaded
    assert resolve("http://127.0.0.1:9", home, "org/open") == lines


def test_a_cached_model_is_found_offline(hub, downloaded):
    home, lines = downloaded
    assert resolve(hub, home, "org/open", HF_HUB_OFFLINE="1") == lines


def test_an_unknown_repository_is_refused_with_the_three_things_tried(hub, home):
    [line] = resolve(hub, home, "org/nothing")
    assert line.startswith(
        "refused --model org/nothing: no such folder, not a preset (llama-3.1-70b"
    )
    assert line.endswith(
        "on the hub not found: check the spelling, or set HF_TOKEN if it is private"
    )


def test_a_gated_repository_is_refused_with_the_way_in(hub, home):
    [line] = resolve(hub, home, "org/gated")
    assert line.endswith("on the hub gated: accept its licence on its hub page, then set HF_TOKEN")


def test_offline_mode_is_honoured_and_named(hub, home):
    [line] = resolve(hub, home, "org/open", HF_HUB_OFFLINE="1")
    assert "not in the local cache, and HF_HUB_OFFLINE forbids asking" in line


def test_a_refused_connection_is_one_line(home):
    [line] = resolve("http://127.0.0.1:9", home, "org/open")
    assert "on the hub not available (" in line
    assert line.endswith("check the network, or download it elsewhere")


def test_a_hub_that_never_answers_is_given_up(home):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        [line] = resolve(f"http://127.0.0.1:{silent.getsockname()[1]}", home, "org/open")
    assert "on the hub not available (" in line


def test_a_name_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    given_up = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: given_up.wait(60))
    monkeypatch.setattr(hub_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFolderError, match=r"not available \(no answer within"):
        hub_module.download("org/open", weights=True)
    assert not given_up.is_set()
    given_up.set()
    for thread in threading.enumerate():
        if thread.name == "hub-probe":
            thread.join()


def test_an_id_that_the_library_rejects_is_one_line(hub, home):
    [line] = resolve(hub, home, "org/a--b..c")
    assert line.startswith("refused --model org/a--b..c: no such folder")
    assert "on the hub not available (" in line
