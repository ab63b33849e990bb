"""Chat templates against Jinja2 set up as transformers does, and against hostile templates."""

import functools
import json
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from templates import FAMILIES, LLAMA2, LLAMA3, LLAMA3_TOOLS, QWEN, QWEN_TOOLS

from duetjax.config import InvalidRequest, ModelFolderError
from duetjax.text.chat_template import ChatTemplate, probe

COMPILED = {name: ChatTemplate(source) for name, source in FAMILIES.items()}
USER = [{"role": "user", "content": "Hi"}]


@functools.cache
def jinja2_compile(source):
    def raise_exception(message):
        raise JinjaError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    env.filters["tojson"] = lambda x, ensure_ascii=False, **kw: json.dumps(
        x, ensure_ascii=ensure_ascii, **kw
    )
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env.from_string(source)


def jinja2_render(source, messages, **kwargs):
    """What transformers' apply_chat_template does; an exception where the template raises."""
    context = {"tools": None, "documents": None, "add_generation_prompt": True, **kwargs}
    return jinja2_compile(source).render(messages=messages, **context)


# str.strip() removes U+001C to U+001F, minijinja's strip does not.
CHARACTERS = st.characters(exclude_characters="\x1c\x1d\x1e\x1f", codec="utf-8")


def turn(role):
    text = st.one_of(
        st.text(CHARACTERS, max_size=20),
        st.text(alphabet=" \n<>/|[]{}%'\"&thinkINS_é你", max_size=30),
        st.sampled_from(["", "  x \n", "<think>\na\n</think>\n\nb", "{{ bos_token }}", "<resp>x"]),
    )
    return st.builds(dict, role=st.just(role), content=text)


@st.composite
def conversations(draw):
    system = draw(st.lists(turn("system"), max_size=1))
    pairs = draw(st.lists(st.tuples(turn("user"), turn("assistant")), max_size=3))
    last = draw(st.lists(turn("user"), max_size=1))
    messages = system + [m for pair in pairs for m in pair] + last
    return messages or [draw(turn("user"))]


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None)
@given(messages=conversations(), prompt=st.booleans())
def test_a_conversation_renders_as_jinja2_renders_it(family, messages, prompt):
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompt}
    expected = jinja2_render(FAMILIES[family], messages, **kwargs)
    assert COMPILED[family].render(messages, **kwargs) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ messages[0] | string }}",
        "{{ {'b': 1, 'a': [true, none, 1.5]} | tojson }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
        "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{{ messages[::-1] | map(attribute='role') | join(',') }}{{ messages[0].content[::-1] }}",
        "{{ messages[0].get('name', 'none') }} {{ 'role' in messages[0] }} {{ messages[0].zz }}",
        "{{ messages | length }}{{ [1] is sequence }}{{ 'x' is sequence }}{{ 'x' is iterable }}"
        "{{ messages[0] is mapping }}{{ zz is defined }}{{ none is none }}{{ tools is none }}",
        "{{ 'a b,c'.split() }}{{ 'a,b'.split(',', 1) }}{{ 'aXb'.lower().upper().title() }}",
        "{{ 'abc'.replace('b', 'z').endswith('c') }}{{ 'a\n'.rstrip() }}{{ ' x'.lstrip() }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{% for m in messages if m.role == 'user' %}{{ loop.last }}{% endfor %}",
        "{% set x = 'outer' %}{% for m in messages %}{% set x = 'inner' %}{% endfor %}{{ x }}",
        "{{ 1.0 }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ true }} {{ none }} {{ 'é<&>' }} {{ '<' | e }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{{ messages | rejectattr('name', 'defined') | list | length }}{{ zz | default('d') }}",
        "a\n  {% if true %}\n  b\n  {%- endif %}\n  {# note #}\nc  {%+ if true %} d{% endif %}\n\n",
        "{% macro f(x, y='q') %}[{{ x }}{{ y }}]{% endmacro %}{{ f('a') }}{{ f('b', y='c') }}",
        "{{ 'a\nb' | indent(2) }}{{ 'x' if zz else 'y' }}{{ 'x' ~ 1 ~ none }}{{ ' t ' | trim }}",
    ],
)
def test_a_construct_of_real_templates_renders_as_in_jinja2(source):
    messages = [
        {"role": "user", "content": "Grüße <&> 'x' \"y\" 你好", "name": None},
        {"role": "assistant", "content": ""},
    ]
    assert ChatTemplate(source).render(messages) == jinja2_render(source, messages)


def test_tools_reach_the_template_as_json_that_is_not_escaped():
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & 'é'"}}]
    expected = jinja2_render(QWEN, USER, tools=tools)
    assert COMPILED["qwen"].render(USER, tools=tools) == expected
    assert "a < b & 'é'" in expected


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place, in <C> & 'F'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def calling(*arguments):
    return [
        {"id": f"call_{i}", "type": "function", "function": {"name": "weather", "arguments": a}}
        for i, a in enumerate(arguments)
    ]


ASKED = [
    {"role": "user", "content": "Weather in Köln?"},
    {"role": "assistant", "content": "", "tool_calls": calling({"city": "Köln", "days": [1]})},
    {"role": "tool", "tool_call_id": "call_0", "content": '{"sky": "<grey>"}'},
]


@pytest.mark.parametrize("source", [LLAMA3_TOOLS, QWEN_TOOLS], ids=["llama3", "qwen"])
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, WEATHER]])
def test_a_conversation_with_calls_renders_as_jinja2_renders_it(source, tools):
    for messages in (USER, ASKED[:1], ASKED[:2], ASKED, [*ASKED, ASKED[2], *USER]):
        expected = jinja2_render(source, messages, tools=tools, bos_token="<s>")
        assert ChatTemplate(source).render(messages, tools=tools, bos_token="<s>") == expected


def test_calls_and_results_stand_in_the_prompt_as_the_models_write_and_read_them():
    text = ChatTemplate(LLAMA3_TOOLS).render(ASKED, tools=[WEATHER], bos_token="<s>")
    call = '{"name": "weather", "parameters": {"city": "Köln", "days": [1]}}<|eot_id|>'
    assert f"<|end_header_id|>\n\n{call}" in text
    assert json.dumps(WEATHER, indent=4) in text
    text = ChatTemplate(QWEN_TOOLS).render(
        [*ASKED[:1], {**ASKED[1], "tool_calls": calling({}, {"a": 1})}, ASKED[2], ASKED[2]]
    )
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"sky": "<grey>"}\n</tool_response>\n'
        '<tool_response>\n{"sky": "<grey>"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_a_template_that_refuses_parallel_calls_says_so():
    messages = [*USER, {"role": "assistant", "content": "", "tool_calls": calling({}, {})}]
    with pytest.raises(InvalidRequest, match="One call at a time"):
        ChatTemplate(LLAMA3_TOOLS).render(messages, bos_token="<s>")


def test_a_template_knows_no_tools_as_none():
    source = "{{ tools is none }}{{ tools is defined }}"
    for tools in (None, [], ()):
        assert ChatTemplate(source).render(USER, tools=tools).lower() == "truetrue"


def test_a_template_supports_tools_where_it_looks_at_them():
    assert [ChatTemplate(s).supports_tools for s in (LLAMA3_TOOLS, QWEN_TOOLS, QWEN)] == [True] * 3
    assert [ChatTemplate(s).supports_tools for s in (LLAMA2, LLAMA3)] == [False] * 2
    assert "tools" not in ChatTemplate(QWEN_TOOLS).kwarg_names


def test_many_tools_and_calls_have_fuel_enough():
    calls = {"role": "assistant", "content": "", "tool_calls": calling(*[{"a": 1}] * 1000)}
    template = ChatTemplate(QWEN_TOOLS)
    assert template.render([*USER, calls]).count("<tool_call>") == 1000
    assert template.render(USER, tools=[WEATHER] * 2000).count("<C>") == 2000


def test_thinking_can_be_switched_off_by_the_variable_the_template_names():
    text = COMPILED["qwen"].render(USER, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_generation_tags_leave_what_they_enclose():
    source = "{% generation %}a{% endgeneration %}|{%- generation -%} b {%- endgeneration -%} |"
    assert ChatTemplate(source).render(USER) == "a|b|"


def test_a_conversation_of_a_thousand_messages_has_fuel_enough():
    messages = [{"role": r, "content": "<think>a</think>b"} for r in ("user", "assistant") * 512]
    kwargs = {"bos_token": "<s>", "eos_token": "</s>"}
    for template in COMPILED.values():
        assert template.render(messages, **kwargs).count("b") >= 1024


def test_what_a_template_raises_is_the_requests_fault_in_the_templates_words():
    messages = [*USER, *USER]
    with pytest.raises(InvalidRequest, match=r"^Turns must go user, assistant") as caught:
        COMPILED["llama2"].render(messages, bos_token="<s>", eos_token="</s>")
    assert caught.value.param == "messages"
    with pytest.raises(JinjaError, match=r"^Turns must go user, assistant"):
        jinja2_render(LLAMA2, messages, bos_token="<s>", eos_token="</s>")


def test_a_message_without_the_content_a_template_needs_is_the_requests_fault():
    with pytest.raises(InvalidRequest, match="cannot render these messages"):
        COMPILED["mistral"].render([{"role": "user"}], bos_token="<s>")


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (
            "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
            "fuel",
        ),
        ("{% for i in range(900) %}{{ 'a' * 90000 }}{% endfor %}", "81000000 characters"),
        ("{{ 'a' | nosuchfilter }}", "nosuchfilter"),
        ("{{ nosuchfunction() }}", "nosuchfunction"),
        ("{% include 'tokenizer.json' %}", "tokenizer.json"),
        ("{% import '/etc/passwd' as p %}", "passwd"),
        ("{% set d = messages[0].copy() %}{{ d.update({'d': d}) }}{{ d | tojson }}", "Circular"),
        ("{{ messages | tojson(indent=10 ** 12) }}", "MemoryError"),
    ],
)
def test_a_hostile_or_broken_template_is_the_folders_fault(source, fault):
    with pytest.raises(ModelFolderError, match=fault):
        ChatTemplate(source).render([dict(USER[0])])


def test_a_template_that_does_not_compile_is_refused_in_one_line():
    with pytest.raises(ModelFolderError, match=r"does not compile: .*chat:2") as caught:
        ChatTemplate("\n{% if messages %}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["__class__", "__init__", "__globals__", "_meta"])
def test_a_template_cannot_reach_pythons_internals(name):
    for value in ("messages", "messages[0]", "raise_exception", "''", "messages.append"):
        assert (
            ChatTemplate(f"{{{{ {value}.{name} }}}}{{{{ {value}['{name}'] }}}}").render(USER) == ""
        )


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' | indent(10 ** 12, true) }}",
        "{% set ns = namespace(a='a') %}"
        "{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% for i in range(100000) %}{{ range(100000) | list | length }}{% endfor %}",
    ],
    ids=["allocation that aborts", "doubling", "long filters"],
)
def test_a_template_that_no_fuel_can_stop_dies_in_the_probe(source):
    with pytest.raises(ModelFolderError, match="--chat-template FILE"):
        probe(source, bos_token=None, eos_token=None)


def test_a_template_that_fails_in_the_probe_is_refused_in_its_own_words():
    with pytest.raises(ModelFolderError, match="nosuchfilter is unknown"):
        probe("{{ 'a' | nosuchfilter }}", bos_token=None, eos_token=None)


@pytest.mark.parametrize("source", [*FAMILIES.values(), "{{ raise_exception('never') }}"])
def test_the_probe_passes_real_templates_and_those_that_refuse_messages(source):
    probe(source, bos_token="<s>", eos_token="</s>")


def test_kwargs_may_be_booleans_and_strings_under_names_in_the_source():
    assert COMPILED["qwen"].kwarg_names == {"enable_thinking"}
    assert COMPILED["llama3"].kwarg_names == {"today"}
    COMPILED["qwen"].check_kwargs({"enable_thinking": False})
    COMPILED["llama3"].check_kwargs({"today": "2026"})
    assert "Year: 2026" in ChatTemplate(LLAMA3).render(USER, bos_token="", today="2026")


@pytest.mark.parametrize(
    "kwargs",
    [{"thinking": True}, {"messages": "x"}, {"tools": "x"}, {"bos_token": "x"}, {"range": "x"}],
)
def test_a_kwarg_the_source_does_not_name_or_the_renderer_sets_is_refused(kwargs):
    with pytest.raises(InvalidRequest, match=f"no variable '{next(iter(kwargs))}'") as caught:
        COMPILED["qwen"].check_kwargs(kwargs)
    assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("value", [1, 0.5, None, ["x"], {"a": 1}])
def test_a_kwarg_of_another_type_is_refused(value):
    with pytest.raises(InvalidRequest, match="boolean or a string"):
        COMPILED["qwen"].check_kwargs({"enable_thinking": value})
