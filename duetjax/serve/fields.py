"""What models of request bodies are made of: strict objects, bounds by the server's limits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from duetjax.config import InvalidRequest
from duetjax.serve.limits import Limits


class Body(BaseModel):
    """An object of a request; what it does not know it keeps, to be named to the caller."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None}

    def unknown_fields(self) -> Iterator[str]:
        """Names of the fields given but unknown, with the path to nested ones."""
        yield from self.model_extra or ()
        for name in type(self).model_fields:
            value = getattr(self, name)
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, Body):
                    path = f"{name}[{index}]" if isinstance(value, list) else name
                    yield from (f"{path}.{field}" for field in item.unknown_fields())


def parsed[B: Body](kind: type[B], given: Mapping[str, Any], limits: Limits) -> B:
    """A body of a kind; `InvalidRequest` names the first field at fault."""
    try:
        return kind.model_validate(given, context=limits)
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0]) from None


def check_limit(size: int, name: str, unit: str, info: ValidationInfo) -> None:
    """Raises what is told and counted as a request beyond one of the server's `Limits`."""
    most = getattr(info.context, name)
    if size > most:
        raise PydanticCustomError(
            "limit",
            "has {size} {unit}; at most {most} are accepted",
            {"size": size, "unit": unit, "most": most, "limit": name},
        )


@dataclass(frozen=True, slots=True)
class AtMost:
    """Metadata of a number that a limit bounds."""

    limit: str

    def __get_pydantic_core_schema__(
        self, kind: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return AfterValidator(self._check).__get_pydantic_core_schema__(kind, handler)

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(core) | {"maximum": self.limit}

    def _check(self, value: int, info: ValidationInfo) -> int:
        most = getattr(info.context, self.limit)
        if value > most:
            context = {"value": value, "most": most, "limit": self.limit}
            raise PydanticCustomError("limit", "is {value}; at most {most} is accepted", context)
        return value


@dataclass(frozen=True, slots=True)
class Bounded:
    """Metadata of a list whose length a limit bounds, before its items are looked at."""

    limit: str
    unit: str

    def __get_pydantic_core_schema__(
        self, kind: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return BeforeValidator(self._check).__get_pydantic_core_schema__(kind, handler)

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(core) | {"maxItems": self.limit}

    def _check(self, value: object, info: ValidationInfo) -> object:
        if isinstance(value, list):
            check_limit(len(value), self.limit, self.unit, info)
        return value


def _invalid(error: ErrorDetails) -> InvalidRequest:
    path = [p if isinstance(p, str) else f"[{p}]" for p in error["loc"]]
    param = ".".join(path).replace(".[", "[")
    message = error["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if error["type"] == "missing":
        message = "is required"
    elif error["type"] not in ("value_error", "unsupported_parameter", "limit"):
        message += f", not {short(error['input'])}"
    code = error["type"] if error["type"] == "unsupported_parameter" else "invalid_value"
    reason = error.get("ctx", {}).get("limit")
    return InvalidRequest(f"{param}: {message}", param=param, code=code, reason=reason)
