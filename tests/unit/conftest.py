"""What several test modules ask for, such as a server of their own with the alphabet engine."""

import dictation
import openai
import pytest
from serve_setup import serving, write_tokenizer
from unhurried import Unhurried

from duetjax.constrain import checker


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """For `dictated` servers: the template shows tools and reasoning too."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, template=dictation.TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(served):
    with served.http() as http:
        yield http


@pytest.fixture
def child(monkeypatch):
    """Looks at every grammar, in place of a process."""
    made = Unhurried()
    monkeypatch.setattr(checker, "_Child", lambda: made)
    yield made
    made.may_answer.set()
