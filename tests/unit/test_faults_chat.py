"""Messages that are not what chat templates expect, and templates that nobody should render."""

import tempfile
from pathlib import Path
from typing import Any

from fake_engine import END
from faults import Faults
from faulty import asking, code, harm, lifted, server, setting
from serve_setup import MODEL, write_tokenizer

from duetjax.config import ModelFolderError
from duetjax.serve import chat
from duetjax.serve.protocol import ChatBody, Message
from duetjax.text import chat_template, tokenizer
from duetjax.text.tokenizer import Tokenizer, _ChatEncoder

FAULTS = Faults("Messages and chat templates", server, harm)
CHAT = "/v1/chat/completions"
HELLO = {"role": "user", "content": "hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
LOOP = "{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set all = namespace(text='x') %}"
    "{% for i in range(40) %}{% set all.text = all.text ~ all.text %}{% endfor %}"
)
RAISING = "{{ raise_exception('never') }}"


class AnyMessage(Message):
    """A message of anybody and anything."""

    role: str
    content: Any

    def as_template_value(self) -> dict[str, Any]:
        """All of it."""
        return {"role": self.role, "content": self.content}


class AnyChat(ChatBody):
    """A conversation of any length."""

    messages: list[AnyMessage]


def divide(_: object) -> object:
    """Fails unforeseen."""
    return 1 / 0


any_messages = setting(chat, "ChatBody", AnyChat)
any_text = setting(_ChatEncoder, "guard", lambda _, value: value)


def saying(**message: Any):
    """An attack: a message, and how many control tokens it comes to."""

    def attack(served):
        asked = {"model": MODEL, "messages": [HELLO | message], "return_token_ids": True}
        with served.http() as http:
            response = http.post(CHAT, json=asked | {"max_tokens": 1})
        if response.status_code != 200:
            return code(response)
        return f"200, control tokens: {response.json()['prompt_token_ids'].count(END)}"

    return attack


FAULTS.add(
    "messages []",
    asking(CHAT, messages=[]),
    expected="400 invalid_value",
    guard="the protocol's look at messages",
    off=any_messages,
)
FAULTS.add(
    "messages null",
    asking(CHAT, messages=None),
    expected="400 invalid_value",
    guard="pydantic",
)
for name, message in (
    ("role 'wizard'", {"role": "wizard"}),
    ("role '<|end|>'", {"role": "<|end|>"}),
):
    FAULTS.add(
        name,
        saying(**message),
        expected="400 invalid_value",
        guard="roles are a closed set",
        off=any_messages,
    )
FAULTS.add(
    "an image",
    saying(content=[IMAGE]),
    expected="400 unsupported_parameter",
    guard="parts are texts",
    off=any_messages,
)
FAULTS.add(
    "control tokens in a message",
    saying(content="a<|end|>b<|end|>"),
    expected="200, control tokens: 0",
    guard="control tokens come from the template alone",
    off=any_text,
)
FAULTS.add(
    "control tokens in parts of a message",
    saying(content=[{"type": "text", "text": "<|end|>"}] * 2),
    expected="200, control tokens: 0",
    guard="control tokens come from the template alone",
    off=any_text,
)
FAULTS.add(
    "10^5 messages",
    asking(CHAT, messages=[HELLO] * 10**5),
    expected="413 body_too_large",
    guard="max_body_bytes, then max_messages",
    off=lifted("max_body_bytes"),
)
FAULTS.add(
    "2,000 messages",
    asking(CHAT, messages=[HELLO | {"content": ""}] * 2000),
    expected="400 invalid_value",
    guard="max_messages, before any is looked at",
    off=lifted("max_messages"),
)


def loading(template: str):
    """An attack: a model folder whose template must not be taken."""

    def attack(_):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), template=template)
            try:
                Tokenizer.from_folder(Path(folder))
            except ModelFolderError as error:
                return str(error)
        return "taken"

    return attack


for name, template, expected in (
    (
        "loops 10^10 times",
        LOOP,
        "chat template ran out of fuel: it loops too long for this conversation",
    ),
    (
        "writes 2^40 characters",
        DOUBLING,
        "chat template needs over 512 MiB or 2 s for a short conversation, or crashes; give"
        " another one with --chat-template FILE",
    ),
):
    FAULTS.add(
        f"a model folder's template {name}",
        loading(template),
        expected,
        guard="templates are tried in a child process of limited memory and time",
        off=setting(tokenizer, "probe", lambda *_, **__: None),
    )


FAULTS.add(
    "a template that loops 10^10 times for one message",
    asking(CHAT, messages=[HELLO]),
    expected="400 chat_template_failed",
    guard="minijinja's fuel",
    settings={"template": "{% if messages[0].content == 'hello' %}" + LOOP + "{% endif %}x"},
)
FAULTS.add(
    "a template that loops 10^5 times for one message",
    asking(CHAT, messages=[HELLO]),
    expected="400 chat_template_failed",
    guard="how much of minijinja's fuel there is",
    off=setting(chat_template, "_FUEL", 10**9),
    settings={
        "template": "{% if messages[0].content == 'hello' %}"
        "{% for a in range(10**5) %}{% endfor %}{% endif %}x"
    },
)
FAULTS.add(
    "a template that raises",
    asking(CHAT, messages=[HELLO]),
    expected="400 invalid_value",
    guard="what a template raises is told to the client",
    off=setting(chat_template, "_raise_exception", divide),
    settings={"template": RAISING},
)
FAULTS.add(
    "a template that fails",
    asking(CHAT, messages=[HELLO]),
    expected="400 invalid_value",
    guard="how a template fails is told to the client",
    off=setting(chat_template, "_render_fault", divide),
    settings={"template": "{{ messages[0].content.nothing() }}"},
)


def render_anyway(self: Tokenizer, messages: Any, **options: Any) -> Any:
    return self._template.render(messages)


FAULTS.add(
    "no chat template",
    asking(CHAT, messages=[HELLO]),
    expected="400 invalid_value",
    guard="a look whether there is a template",
    off=setting(Tokenizer, "encode_chat", render_anyway),
    settings={"template": None},
)

test_guarded, test_unguarded = FAULTS.tests()
