"""Profiles on disk: every shipped one can be read, and no file of a stranger's does harm."""

import pytest

from duetjax.config import ConfigError
from duetjax.profile_files import (
    Kind,
    read_hardware_profile,
    read_model_profile,
    shipped,
    shipped_file,
)

READERS = {Kind.MODEL: read_model_profile, Kind.HARDWARE: read_hardware_profile}
SHIPPED = [(kind, name) for kind in Kind for name in shipped(kind)]


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_a_shipped_profile_is_called_as_its_file(kind, name):
    profile = READERS[kind](shipped_file(kind, name))
    assert name == (profile.model if kind is Kind.MODEL else profile.name)


def test_some_of_each_kind_are_shipped():
    assert "llama-3.1-8b" in shipped(Kind.MODEL)
    assert "h200-sxm" in shipped(Kind.HARDWARE)


@pytest.mark.parametrize("kind", Kind)
def test_a_profile_of_the_other_kind_is_refused(kind):
    [other] = set(Kind) - {kind}
    with pytest.raises(ConfigError, match="kind must be"):
        READERS[kind](shipped_file(other, shipped(other)[0]))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (2**20 + 1)], ids=len
)
@pytest.mark.parametrize("kind", Kind)
def test_a_file_that_is_none_is_refused_in_one_line(kind, text, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"a\.json") as caught:
        READERS[kind](file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.json", ".", "x" * 300])
@pytest.mark.parametrize("kind", Kind)
def test_a_file_that_is_not_there_is_refused_in_one_line(kind, name, tmp_path):
    with pytest.raises(ConfigError, match="name a profile's file"):
        READERS[kind](tmp_path / name)
