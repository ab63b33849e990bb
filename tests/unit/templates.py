"""Chat templates in the styles of four model families, and tiny real tokenizers to go with them."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set turns = messages[1:] %}
    {% set preamble = messages[0]['content'] %}
{% else %}
    {% set turns = messages %}
    {% set preamble = false %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Turns must go user, assistant, user, assistant') }}
    {% endif %}
    {% if loop.index0 == 0 and preamble != false %}
        {% set said = '<<SYS>>\\n' + preamble.strip() + '\\n<</SYS>>\\n\\n' + turn['content'] %}
    {% else %}
        {% set said = turn['content'] %}
    {% endif %}
    {% if turn['role'] == 'user' %}
        {{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}
    {% elif turn['role'] == 'assistant' %}
        {{ ' ' + said.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not today is defined %}
    {%- if strftime_now is defined %}
        {%- set today = strftime_now("%Y") %}
    {%- else %}
        {%- set today = "2024" %}
    {%- endif %}
{%- endif %}
{%- macro head(role) -%}
    <|start_header_id|>{{ role }}<|end_header_id|>{{ "\\n\\n" }}
{%- endmacro -%}
{{- head("system") + "Year: " ~ today }}
{%- if messages[0].role == "system" %}
    {{- "\\n" + messages[0].content | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- head(message['role']) + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- head("assistant") }}
{%- endif %}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(seeking=true, last_query=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.seeking and message.role == 'user' and not message.content.startswith('<resp>') %}
        {%- set ns.seeking = false %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
        {%- continue %}
    {%- endif %}
    {%- set thought = '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_text = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- set asked = rest | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in rest %}
    {%- if message["role"] not in ["user", "assistant"] or
           (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must alternate after the optional system message") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_text is defined %}
            {{- "[INST] " + system_text + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if asked | length == 0 %}{{- "[INST][/INST]" }}{%- endif %}
"""

LLAMA3_TOOLS = """\
{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- macro head(role) -%}
    <|start_header_id|>{{ role }}<|end_header_id|>{{ "\\n\\n" }}
{%- endmacro -%}
{%- if tools is not none %}
    {{- head("system") }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + "\\n\\n" }}
    {%- endfor %}
    {{- '{"name": tool, "parameters": arguments}<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ["tool", "ipython"] %}
        {{- head("ipython") }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- elif "tool_calls" in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("One call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- head("assistant") + '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + "}" }}
    {%- else %}
        {{- head(message["role"]) + message["content"] | trim }}
    {%- endif %}
    {{- "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- head("assistant") }}{%- endif %}
"""

QWEN_TOOLS = """\
{%- if tools %}
    {{- "<|im_start|>system\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- "<|im_start|>user" }}
        {%- endif %}
        {{- "\\n<tool_response>\\n" + message.content + "\\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- "<|im_end|>\\n" }}
        {%- endif %}
        {%- continue %}
    {%- endif %}
    {{- "<|im_start|>" + message.role }}
    {%- if message.content %}{{- "\\n" + message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- if call.function %}{%- set call = call.function %}{%- endif %}
        {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
        {%- if call.arguments is string %}
            {{- call.arguments }}
        {%- else %}
            {{- call.arguments | tojson }}
        {%- endif %}
        {{- "}\\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}
"""

FAMILIES = {"llama2": LLAMA2, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}

LLAMA3_SPECIALS = ("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
SENTENCE_SPECIALS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
_CORPUS = ("hello world, the cat sat on the mat", "system user assistant Year: eot_id") * 4


def byte_level() -> Tokenizer:
    """Byte-level BPE that begins with <|begin|>, as Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(LLAMA3_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def byte_fallback(prepend: bool = True) -> Tokenizer:
    """BPE on ▁-words with <0xNN> tokens for other characters, as Llama 2's; begins with <s>."""
    pieces = [*SENTENCE_SPECIALS, *(f"<0x{b:02X}>" for b in range(256))]
    letters = [*"▁abcdehinorstu<>/|[]", "▁h", "at", "▁th"]
    vocab = {piece: i for i, piece in enumerate(pieces + letters)}
    merges = [("▁", "h"), ("a", "t"), ("▁t", "h")]
    vocab["▁t"] = len(vocab)
    merges.insert(2, ("▁", "t"))
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prepend:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SENTENCE_SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram whose pieces include the control tokens, so that its model may pick them."""
    pieces = [(t, 0.0) for t in SENTENCE_SPECIALS]
    pieces += [(c, -5.0) for c in "▁abcdehinorstu<>/|[]"] + [("▁th", -4.0), ("at", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SENTENCE_SPECIALS))
    return tokenizer
