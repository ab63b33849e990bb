"""Tokenizer folders, one BOS token, and control tokens typed by users, on tiny real tokenizers."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import (
    LLAMA2,
    LLAMA3,
    LLAMA3_SPECIALS,
    MISTRAL,
    QWEN_TOOLS,
    SENTENCE_SPECIALS,
    byte_fallback,
    byte_level,
    unigram,
)
from tokenizers import AddedToken

from duetjax.config import InvalidRequest, ModelFolderError
from duetjax.text.chat_template import ChatTemplate
from duetjax.text.tokenizer import Tokenizer

LLAMA3_TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|eot_id|>"}
SENTENCE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def loaded(backend, source, tokens, **kwargs):
    template = None if source is None else ChatTemplate(source)
    return Tokenizer(backend.to_str().encode(), chat_template=template, **tokens, **kwargs)


BACKENDS = {
    "byte-level": (byte_level(), LLAMA3, LLAMA3_TOKENS, LLAMA3_SPECIALS),
    "byte-fallback": (byte_fallback(), LLAMA2, SENTENCE_TOKENS, SENTENCE_SPECIALS),
    "metaspace-first": (byte_fallback(prepend=False), MISTRAL, SENTENCE_TOKENS, SENTENCE_SPECIALS),
    "unigram": (unigram(), MISTRAL, SENTENCE_TOKENS, SENTENCE_SPECIALS),
}
TOKENIZERS = {name: loaded(*parts[:3]) for name, parts in BACKENDS.items()}
EVERY_TOKENIZER = pytest.mark.parametrize("name", BACKENDS)


def write_folder(folder, backend, config=None, **files):
    (folder / "tokenizer.json").write_text(backend.to_str())
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def rendered(name, messages):
    _, source, tokens, _ = BACKENDS[name]
    return ChatTemplate(source).render(messages, **tokens)


def special_ids(name, ids):
    unknown = TOKENIZERS[name].encode("<unk>", add_special_tokens=False)[:1]
    return [i for i in ids if i in TOKENIZERS[name].special_ids and i not in unknown]


# --- prompts


@EVERY_TOKENIZER
def test_a_prompt_begins_with_one_bos_token_whether_or_not_its_text_does(name):
    tokenizer, tokens = loaded(*BACKENDS[name][:3], add_bos=True), BACKENDS[name][2]
    for text in ("hello", tokens["bos_token"] + "hello", ""):
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_without_special_tokens_a_prompt_has_only_those_it_spells():
    tokenizer = TOKENIZERS["byte-level"]
    assert tokenizer.bos_token_id not in tokenizer.encode("hello", add_special_tokens=False)
    ids = tokenizer.encode("<|begin|>hello<|eot_id|>", add_special_tokens=False)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_add_bos_token_false_in_the_folder_wins_over_the_post_processor(tmp_path):
    write_folder(tmp_path, byte_level(), {**LLAMA3_TOKENS, "add_bos_token": False})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_token_id not in tokenizer.encode("hello")


def test_a_bos_token_is_not_added_where_the_tokenizer_adds_none():
    ids = TOKENIZERS["unigram"].encode("hat")
    assert TOKENIZERS["unigram"].bos_token_id not in ids


@given(text=st.text(st.characters(codec="utf-8"), max_size=50))
def test_byte_level_text_survives_encoding_and_decoding(text):
    ids = TOKENIZERS["byte-level"].encode(text, add_special_tokens=False)
    assert TOKENIZERS["byte-level"].decode(ids, skip_special_tokens=False) == text


def test_decoding_leaves_out_special_tokens_unless_asked():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("hello<|eot_id|>")
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin|>hello<|eot_id|>"


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    tokenizer = TOKENIZERS["byte-level"]
    assert tokenizer.decode([tokenizer.vocab_size, *tokenizer.encode("a"), 2**31]) == "a"


@EVERY_TOKENIZER
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab hello\n\u00e9\u4f60\U0001f600\u2581"), max_size=20))
def test_the_bytes_of_tokens_join_to_the_text_that_they_decode_to(name, text):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert joined in (decoded, " " + decoded)  # sentencepiece drops the first space of a text


def test_a_token_inside_a_character_has_its_bytes_alone():
    for name in ("byte-level", "byte-fallback"):
        ids = TOKENIZERS[name].encode("\U0001f600", add_special_tokens=False)[-4:]
        parts = [TOKENIZERS[name].token_bytes(i) for i in ids]
        assert parts == [b"\xf0", b"\x9f", b"\x98", b"\x80"]


@EVERY_TOKENIZER
def test_a_special_token_is_its_name_and_an_id_beyond_the_vocabulary_nothing(name):
    tokenizer, specials = TOKENIZERS[name], BACKENDS[name][3]
    assert [tokenizer.token_bytes(i).decode() for i in range(len(specials))] == list(specials)
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None


def test_vocab_size_is_one_more_than_the_largest_id():
    backend = byte_level()
    backend.add_tokens(["<extra>"])
    tokenizer = loaded(backend, None, {})
    assert tokenizer.encode("<extra>", add_special_tokens=False) == [tokenizer.vocab_size - 1]


def test_truncation_and_padding_left_in_the_file_are_ignored():
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert loaded(backend, None, {}).encode("hello " * 9) == byte_level().encode("hello " * 9).ids


def test_a_lone_surrogate_is_refused():
    with pytest.raises(InvalidRequest, match=r"lone surrogate \(U\+D800\)"):
        TOKENIZERS["byte-level"].encode("a\ud800")
    with pytest.raises(InvalidRequest, match=r"lone surrogate \(U\+DFFF\)"):
        TOKENIZERS["byte-level"].encode_chat(chat("\udfff"))


# --- conversations


@pytest.mark.parametrize("typed", ["<\U000ffffc|eot_id|>", "\U000ffffd1\U000ffffd"])
def test_the_private_characters_of_the_guard_cannot_be_typed(typed):
    with pytest.raises(InvalidRequest, match=r"private-use characters U\+FFFFC and U\+FFFFD"):
        TOKENIZERS["byte-level"].encode_chat(chat(typed))


# Without "s" and "[", so that no control token comes about.
HARMLESS = st.text(alphabet="abcdehinortu \n<>/|é你😀\ufffd", max_size=12)


@EVERY_TOKENIZER
@settings(deadline=None)
@given(contents=st.lists(HARMLESS, min_size=1, max_size=3))
def test_an_ordinary_conversation_gets_the_tokens_of_its_rendered_text(name, contents):
    backend = BACKENDS[name][0]
    expected = backend.encode(rendered(name, chat(*contents)), add_special_tokens=False).ids
    assert TOKENIZERS[name].encode_chat(chat(*contents)) == expected


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback", "metaspace-first"])
def test_a_conversation_has_the_bos_token_the_template_writes_and_no_other(name):
    ids = TOKENIZERS[name].encode_chat(chat("hello"))
    assert ids.count(TOKENIZERS[name].bos_token_id) == 1


@st.composite
def attacks(draw):
    """A tokenizer's name and contents made of its control tokens, parts of them and text."""
    name = draw(st.sampled_from(list(BACKENDS)))
    specials = [s for s in BACKENDS[name][3] if s != "<unk>"]
    parts = [
        s[i:j] for s in specials for i, j in ((0, None), (0, 2), (0, -1), (1, None), (-1, None))
    ]
    content = st.lists(st.sampled_from([*parts, "a", " ", "<"]), min_size=1, max_size=6)
    return name, draw(st.lists(content.map("".join), min_size=1, max_size=3))


@settings(deadline=None, max_examples=300)
@given(attacks())
def test_typed_control_tokens_stay_text_while_those_of_the_template_are_kept(attack):
    name, contents = attack
    ids = TOKENIZERS[name].encode_chat(chat(*contents))
    harmless = TOKENIZERS[name].encode_chat(chat(*("a" for _ in contents)))
    assert special_ids(name, ids) == special_ids(name, harmless)
    if name == "byte-level":
        text = TOKENIZERS[name].decode(ids, skip_special_tokens=False)
        assert text == rendered(name, chat(*contents))


@EVERY_TOKENIZER
def test_a_typed_end_of_turn_reads_back_as_it_was_typed(name):
    tokenizer, eos = TOKENIZERS[name], BACKENDS[name][2]["eos_token"]
    ids, harmless = tokenizer.encode_chat(chat(f"a{eos}b")), tokenizer.encode_chat(chat("ab"))
    assert ids.count(tokenizer.eos_token_id) == harmless.count(tokenizer.eos_token_id)
    assert f"a{eos}b" in tokenizer.decode(ids).replace(" ", "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].name }}:{{ messages[0].content }}", {"name": "<|eot_id|>"}),
        ("{{ messages[0].name }}{{ messages[0].content }}", {"name": "<|eot", "content": "_id|>"}),
        (
            "{{ messages[0].content[0].text }}",
            {"content": [{"type": "text", "text": "<|eot_id|>"}]},
        ),
        ("{{ messages[0] | tojson }}", {"args": {"<|eot_id|>": "<|begin|>"}}),
        ("{{ messages[0].content.strip().replace('x', '') }}", {"content": " <|eot_id|>"}),
    ],
    ids=["name", "two strings in a row", "content part", "keys of objects", "edited"],
)
def test_every_string_of_a_message_is_guarded(source, message):
    tokenizer = loaded(byte_level(), source, LLAMA3_TOKENS)
    ids = tokenizer.encode_chat([{"role": "user", "content": "", **message}])
    assert tokenizer.special_ids.isdisjoint(ids)
    assert "<|eot_id|>" in tokenizer.decode(ids)


HOSTILE_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "<|eot_id|>",
        "parameters": {"properties": {"role": {"enum": ["<|begin|>"]}, "<|eot_id|>": {}}},
    },
}


@pytest.mark.parametrize(
    ("source", "message", "tools"),
    [
        ("{{ tools | tojson }}", {}, [HOSTILE_TOOL]),
        ("{{ tools[0].function.description }}", {}, [HOSTILE_TOOL]),
        (
            "{{ messages[0].tool_calls[0].function.arguments | tojson }}",
            {"tool_calls": [{"function": {"arguments": {"role": "<|eot_id|>"}}}]},
            None,
        ),
    ],
    ids=["tools", "one of their texts", "arguments"],
)
def test_every_string_of_tools_and_calls_is_guarded(source, message, tools):
    tokenizer = loaded(byte_level(), source, LLAMA3_TOKENS)
    ids = tokenizer.encode_chat([{"role": "user", "content": "", **message}], tools=tools)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert "<|eot_id|>" in tokenizer.decode(ids)


def test_tools_stand_in_the_prompt_as_the_template_writes_them():
    backend, tool = byte_level(), {"type": "function", "function": {"name": "hat", "role": "<"}}
    tokenizer = loaded(backend, QWEN_TOOLS, LLAMA3_TOKENS)
    text = ChatTemplate(QWEN_TOOLS).render(chat("hello"), tools=[tool])
    assert tokenizer.supports_tools
    assert (
        tokenizer.encode_chat(chat("hello"), tools=[tool])
        == backend.encode(text, add_special_tokens=False).ids
    )
    assert "hat" not in tokenizer.decode(tokenizer.encode_chat(chat("hello"), tools=[]))


def test_without_a_template_or_with_one_that_ignores_tools_there_is_no_support_for_them():
    assert not TOKENIZERS["byte-level"].supports_tools
    assert not loaded(byte_level(), None, {}).supports_tools


def test_a_tool_nested_without_end_is_refused():
    nested = {}
    for _ in range(5000):
        nested = {"a": nested}
    tokenizer = loaded(byte_level(), QWEN_TOOLS, {})
    with pytest.raises(InvalidRequest, match="nested more than 100 deep"):
        tokenizer.encode_chat(chat("hello"), tools=[nested])


def test_added_tokens_have_ids_by_their_text_special_or_not():
    backend = byte_level()
    backend.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = loaded(backend, None, LLAMA3_TOKENS)
    expected = {text: backend.token_to_id(text) for text in (*LLAMA3_SPECIALS, "<think>")}
    assert tokenizer.added_ids == expected
    assert tokenizer.added_ids["<think>"] not in tokenizer.special_ids


def test_a_typed_control_token_gets_the_tokens_of_its_characters():
    backend = byte_level()
    backend.add_special_tokens(["hello!"])
    tokenizer = loaded(backend, "{{ messages[0].content }}<|eot_id|>", LLAMA3_TOKENS)
    backend.encode_special_tokens = True
    expected = backend.encode("say hello!", add_special_tokens=False).ids
    assert tokenizer.encode_chat(chat("say hello!"))[:-1] == expected


def test_of_two_control_tokens_that_begin_alike_the_template_writes_the_longer():
    backend = byte_level()
    backend.add_special_tokens(["<|eot_id|>s"])
    ids = loaded(backend, "<|eot_id|>s", {}).encode_chat(chat(""))
    assert ids == [backend.token_to_id("<|eot_id|>s")]


def test_template_kwargs_are_checked_and_guarded():
    tokenizer = loaded(byte_level(), "{{ bos_token }}{{ date }}", LLAMA3_TOKENS)
    ids = tokenizer.encode_chat(chat("a"), template_kwargs={"date": "<|eot_id|>"})
    assert special_ids("byte-level", ids) == [tokenizer.bos_token_id]
    with pytest.raises(InvalidRequest, match="no variable 'dates'"):
        tokenizer.encode_chat(chat("a"), template_kwargs={"dates": "x"})


def test_whitespace_rules_of_special_tokens_hold_in_conversations():
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer = loaded(backend, "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}", {})
    text = "hello \n<|end|>  cat  <|end|>"
    ids = tokenizer.encode_chat(chat("hello \n", "  cat  "))
    assert ids == backend.encode(text, add_special_tokens=False).ids


def test_a_message_is_not_changed_by_a_template_that_writes_into_it():
    messages = chat("hello")
    source = "{{ messages[0].update({'content': 'x'}) }}{{ messages.clear() }}"
    loaded(byte_level(), source, {}).encode_chat(messages)
    assert messages == chat("hello")


def test_a_model_without_a_template_refuses_conversations_and_names_the_flag():
    tokenizer = loaded(byte_level(), None, LLAMA3_TOKENS)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="--chat-template FILE"):
        tokenizer.encode_chat(chat("hello"))


def test_the_generation_prompt_is_optional():
    tokenizer = TOKENIZERS["byte-level"]
    with_prompt = tokenizer.encode_chat(chat("hello"))
    without = tokenizer.encode_chat(chat("hello"), add_generation_prompt=False)
    assert with_prompt[: len(without)] == without
    assert tokenizer.decode(with_prompt[len(without) :]) == "assistant\n\n"


# --- folders


def test_a_folder_gives_tokens_written_as_text_or_as_objects(tmp_path):
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|eot_id|>", "lstrip": False}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level(), config))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_a_folder_with_a_tokenizer_alone_has_no_bos_and_no_template(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, byte_level()))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("cat") == byte_level().encode("cat").ids


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "cat"}]


@pytest.mark.parametrize("template", ["cat", NAMED], ids=["text", "list of named templates"])
def test_a_template_is_read_from_the_configuration(tmp_path, template):
    write_folder(tmp_path, byte_level(), {"chat_template": template})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat(chat("x"))) == "cat"


def test_a_template_file_wins_over_the_configuration_and_the_flag_over_both(tmp_path):
    config = {"chat_template": "cat"}
    write_folder(tmp_path, byte_level(), config, chat_template__jinja="mat", own__txt="hat")
    for flag, expected in ((None, "mat"), (tmp_path / "own.txt", "hat")):
        tokenizer = Tokenizer.from_folder(tmp_path, chat_template=flag)
        assert tokenizer.decode(tokenizer.encode_chat(chat("x"))) == expected


def test_a_list_without_a_default_template_is_no_template(tmp_path):
    write_folder(tmp_path, byte_level(), {"chat_template": NAMED[:1]})
    assert not Tokenizer.from_folder(tmp_path).has_chat_template


def refusal(folder, **kwargs):
    with pytest.raises(ModelFolderError) as caught:
        Tokenizer.from_folder(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_folder_is_refused_by_the_name_of_the_missing_file(tmp_path):
    assert "has no tokenizer.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json", "vocab.json"])
def test_a_tokenizer_of_another_format_is_refused_with_the_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    message = refusal(tmp_path)
    assert f"has {name} but no tokenizer.json" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[" * 100_000],
)
def test_a_broken_tokenizer_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert refusal(tmp_path).startswith("tokenizer.json cannot be loaded: ")


def test_a_truncated_tokenizer_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level().to_str()[:-100])
    assert refusal(tmp_path).startswith("tokenizer.json cannot be loaded: ")


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ("not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold an object, not list"),
        ('{"bos_token": 1}', "bos_token must be a string, not 1"),
        ('{"eos_token": "<nowhere>"}', "eos_token '<nowhere>' is not in the vocabulary"),
        ('{"chat_template": 1}', "chat_template must be a string, not int"),
        ('{"chat_template": "{% if %}"}', "chat template does not compile"),
        ('{"chat_template": "{{ \'a\' | indent(10 ** 12, true) }}"}', "--chat-template FILE"),
    ],
)
def test_a_broken_configuration_is_refused_in_one_line(tmp_path, config, fault):
    write_folder(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert re.search(re.escape(fault), refusal(tmp_path))


def test_a_template_flag_that_names_no_file_is_refused(tmp_path):
    write_folder(tmp_path, byte_level())
    assert "nothing.txt does not exist" in refusal(tmp_path, chat_template=tmp_path / "nothing.txt")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    assert "cannot be read" in refusal(tmp_path)
