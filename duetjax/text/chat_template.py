"""Chat templates of model folders, rendered as Hugging Face renders them but with bounded work.

A template is a stranger's program. minijinja has no way from it to Python objects or files, and a
fuel limit ends its loops. It has no limit on memory (`a ~ a` in a loop, a filter over a long
list), so `probe` first renders short conversations in a child process that may use little.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from minijinja import Environment, TemplateError

from duetjax.config import InvalidRequest, ModelFolderError

_NAME: Final = "chat"
# Instructions (0.1 to 0.2 us each). Real templates use 50 to 200 for a message, tool or tool call.
_FUEL: Final = 20_000
_FUEL_PER_ITEM: Final = 1_000
_MAX_RENDERED_CHARS: Final = 16 << 20
_PROBE_BYTES: Final = 512 << 20
_PROBE_SECONDS: Final = 2

# What the renderer sets and a request's chat_template_kwargs may not replace.
_SET_HERE: Final = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")
)
# These depend on the template alone; all other render errors depend on the messages too.
_TEMPLATE_FAULTS: Final = {"TemplateNotFound", "UnknownFilter", "UnknownTest", "UnknownFunction"}
# The tag marks assistant text for training; for rendering it is only a scope.
_GENERATION_TAG: Final = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class ChatTemplate:
    """A compiled chat template; `render` may be called from several threads.

    supports_tools: whether the source looks at `tools`; what does not, leaves them out silently.
    Raises `ModelFolderError` where the source does not compile.
    """

    def __init__(self, source: str) -> None:
        env = Environment(trim_blocks=True, lstrip_blocks=True, debug=False)
        env.add_global("raise_exception", _raise_exception)
        env.add_global("strftime_now", lambda form: datetime.now().strftime(form))
        env.add_filter("tojson", _tojson)
        # In Jinja2, strings and mappings are sequences too.
        env.add_test("sequence", lambda value: isinstance(value, Sequence | Mapping))
        try:
            env.add_template(_NAME, _GENERATION_TAG.sub(_as_scope, source))
        except TemplateError as error:
            raise ModelFolderError(
                f"chat template does not compile: {_one_line(error)}; give another one with"
                " --chat-template FILE"
            ) from None
        names = frozenset(env.undeclared_variables_in_template(_NAME))
        self.kwarg_names = names.difference(env.globals, _SET_HERE)
        self.supports_tools = "tools" in names
        self._env = env
        self._lock = threading.Lock()  # fuel is a property of the environment, not of a render

    def check_kwargs(self, kwargs: Mapping[str, object]) -> None:
        """Raises InvalidRequest unless every value is a bool or str under a name in the source."""
        for name, value in kwargs.items():
            if name not in self.kwarg_names:
                known = ", ".join(sorted(self.kwarg_names)) or "none"
                raise InvalidRequest(
                    f"chat_template_kwargs: this model's template has no variable {name!r}"
                    f" (it has: {known})",
                    param="chat_template_kwargs",
                )
            if not isinstance(value, bool | str):
                raise InvalidRequest(
                    f"chat_template_kwargs.{name} must be a boolean or a string,"
                    f" not {type(value).__name__}",
                    param="chat_template_kwargs",
                )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        add_generation_prompt: bool = True,
        **kwargs: object,
    ) -> str:
        """The prompt text of a conversation.

        The template sees `messages`, `tools` and `kwargs` themselves and can call their methods:
        pass copies where that matters. tools: as in OpenAI's API; templates know an empty list as
        None. InvalidRequest: the template refuses these messages. ModelFolderError: it runs too
        long or writes too much.
        """
        context = {
            "messages": messages,
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **{k: v for k, v in (("bos_token", bos_token), ("eos_token", eos_token)) if v},
            **kwargs,
        }
        try:
            with self._lock:
                self._env.fuel = _FUEL + _FUEL_PER_ITEM * _num_items(messages, tools)
                text = self._env.render_template(_NAME, **context)
        except InvalidRequest:  # from raise_exception
            raise
        except TemplateError as error:
            raise _render_fault(error) from None
        except Exception as error:
            kind = type(error).__name__
            raise ModelFolderError(f"chat template failed with {kind}: {error}") from error
        if len(text) > _MAX_RENDERED_CHARS:
            raise ModelFolderError(
                f"chat template wrote {len(text)} characters; the limit is {_MAX_RENDERED_CHARS}"
            )
        return text


def probe(source: str, *, bos_token: str | None, eos_token: str | None) -> None:
    """Raises ModelFolderError if short conversations cost the template 512 MiB, 2 s or a crash.

    Runs in a child process: an allocation that fails there aborts it, not the caller.
    """
    case = {"source": source, "bos_token": bos_token, "eos_token": eos_token}
    child = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(case).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if child.returncode > 0:
        report = (child.stdout or child.stderr).decode(errors="replace").strip()
        raise ModelFolderError(report.rpartition("\n")[2])
    if child.returncode < 0:
        raise ModelFolderError(
            f"chat template needs over {_PROBE_BYTES >> 20} MiB or {_PROBE_SECONDS} s for a short"
            " conversation, or crashes; give another one with --chat-template FILE"
        )


def _probe_child() -> int:
    """Renders what stdin asks for; writes the fault to stdout and returns 1 if there is one."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_PROBE_BYTES, _PROBE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_PROBE_SECONDS, _PROBE_SECONDS))
    case = json.load(sys.stdin)
    turns = [{"role": role, "content": "Hello"} for role in ("system", *("user", "assistant") * 3)]
    try:
        template = ChatTemplate(case.pop("source"))
        for messages in (turns[1:2], turns[:2], turns[1:6], turns):
            try:
                template.render(messages, add_generation_prompt=messages is not turns, **case)
            except InvalidRequest:
                continue  # a template may refuse a system message
    except ModelFolderError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


def _num_items(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> int:
    calls = sum(len(message.get("tool_calls") or ()) for message in messages)
    return len(messages) + calls + len(tools or ())


def _render_fault(error: TemplateError) -> InvalidRequest | ModelFolderError:
    if error.kind == "OutOfFuel":
        return ModelFolderError(
            "chat template ran out of fuel: it loops too long for this conversation"
        )
    if error.kind in _TEMPLATE_FAULTS:
        return ModelFolderError(f"chat template cannot be rendered: {_one_line(error)}")
    return InvalidRequest(
        f"this model's chat template cannot render these messages: {_one_line(error)}",
        param="messages",
    )


def _one_line(error: TemplateError) -> str:
    return str(error).partition("\n")[0]


def _as_scope(tag: re.Match[str]) -> str:
    return f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}"


def _raise_exception(message: object = "") -> NoReturn:
    raise InvalidRequest(str(message)[:1000], param="messages")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes; minijinja's own filter escapes, and overflows on cycles."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


if __name__ == "__main__":
    sys.exit(_probe_child())
