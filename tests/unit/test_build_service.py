"""A loaded model behind an ASGI server that is not `duetjax serve`."""

from pathlib import Path

import pytest
from fake_engine import PATIENCE
from starlette.testclient import TestClient

from duetjax.build import ModelRequest, load
from duetjax.build_service import build_service
from duetjax.config import EngineConfig
from duetjax.serve.app import create_app

DEMO = str(Path(__file__).parents[2] / "checkpoints" / "demo")


@pytest.fixture
def model():
    config = EngineConfig(device="sim", sim_step_ms=(0.1, 0.1))
    loaded = load(ModelRequest(DEMO), config, needs_tokenizer=True)
    yield loaded
    assert loaded.engine.shutdown(PATIENCE)


def names(client):
    return [each["id"] for each in client.get("/v1/models").json()["data"]]


def test_its_app_starts_the_engine_and_answers_by_the_models_own_name(model):
    with TestClient(create_app(build_service(model))) as client:
        assert names(client) == [model.name]
        body = {"model": model.name, "prompt": "Hello", "max_tokens": 3, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert client.get("/livez").status_code == 200


def test_other_names_replace_it_each_once(model):
    with TestClient(create_app(build_service(model, ["a", "b", "a"]))) as client:
        assert names(client) == ["a", "b"]
