"""docs/serving.md tells every route, limit and error code that there is."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from serve_setup import make_service

import duetjax.serve
from duetjax.config import flag
from duetjax.serve.app import create_app
from duetjax.serve.limits import Limits

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
LIMITS = PAGE.partition("\n## Limits\n")[2].partition("\n## ")[0]
SOURCES = Path(duetjax.serve.__file__).parent.glob("*.py")
CODE = re.compile(r'(?:code=|HttpError\(\s*\d+,\s*)"([a-z_]+)"')


@pytest.mark.parametrize("name", [each.name for each in fields(Limits)])
def test_a_limit_is_there_with_its_default(name):
    [row] = [line for line in LIMITS.splitlines() if f"`{flag(name)}`" in line and line[0] == "|"]
    default = Limits.__dataclass_fields__[name].default
    if isinstance(default, int) and default not in (2 * 2**20, 64 * 2**10):
        assert f"{default:,}" in row
    elif isinstance(default, float):
        assert f"{default:g}" in row


def test_every_route_is_there(folder):
    routes = create_app(make_service(folder, FakeEngine())).routes
    paths = {route.path.replace("{id:path}", "{id}") for route in routes}
    assert [path for path in paths if path not in PAGE] == []


def test_every_error_code_is_there():
    codes = {code for source in SOURCES for code in CODE.findall(source.read_text())}
    assert len(codes) > 10
    assert [code for code in codes if f"`{code}`" not in PAGE] == []
