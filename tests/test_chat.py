"""Chat templates in the manner of the model families, rendered here and by transformers."""

import itertools
from datetime import datetime

import pytest
from text_models import byte_level_backend
from transformers import PreTrainedTokenizerFast

from moejax.errors import InputError, TokenizerError
from moejax.text import Tokenizer

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
MIXTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant') }}
{% endif %}
{%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
    {{- ' ' + message['content'] | trim + eos_token }}
{%- else %}
    {{- raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}
{%- endfor %}"""
LLAMA3 = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
   + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
LLAMA31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'assistant' and message.content is defined %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}
{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}
{{bos_token}}{{ns.system_prompt}}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}
{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['tool_calls'] is defined %}
{%- for tool in message['tool_calls'] %}
{%- if not ns.is_first %}{%- set ns.is_first = true -%}{{'<｜tool▁calls▁begin｜>'}}{%- endif %}
{{- tool['function']['name'] + '\n' + tool['function']['arguments'] | tojson }}{%- endfor %}
{%- elif message['role'] == 'assistant' %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{'<｜Assistant｜>' + content + eos_token}}{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not message.content.startswith('<tool_response>') %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and reasoning_content %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning_content + '\n</think>\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
OTHERS = """{% for message in messages %}
  {% if loop.index0 == 1 %}{% continue %}{% endif %}
  {% if loop.index0 == 4 %}{% break %}{% endif %}
  {% generation %}{{ message.content }}{% endgeneration %}
{% endfor %}
{{ dict(a=1, b=messages[0]) | tojson(sort_keys=true, separators=(',', ':')) }}
{{ '<é&>' | tojson }}{{ '<é&>' | tojson(ensure_ascii=true) }}{{ pad_token }}{{ documents }}
"""
TEMPLATES = {
    "mixtral": MIXTRAL,
    "llama3": LLAMA3,
    "llama31": LLAMA31,
    "deepseek": DEEPSEEK,
    "qwen3": QWEN3,
    "others": OTHERS,
}
CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Zürich <1>"}}}
CONVERSATIONS = {
    "one": [{"role": "user", "content": " Hello 東京 "}],
    "turns": [
        {"role": "user", "content": "1 < 2 & 'x'?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes "},
        {"role": "user", "content": "why\n\n"},
    ],
    "system": [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "reasoning": "because", "content": "y", "tool_calls": None},
    ],
    "tools": [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "reasoning_content": "r", "content": "both"},
    ],
}
SCHEMA = {"type": "function", "function": {"name": "get", "description": "weather in a city"}}
OPTIONS = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False, "tools": [SCHEMA]},
    {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<other>"},
]


def tokenizer_with(template):
    return Tokenizer(byte_level_backend(), config=TOKENS, chat_templates={"default": template})


def rendered(render, refusal):
    try:
        return render()
    except refusal as error:
        return f"refused: {str(error).rsplit(': ', 1)[-1]}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name):
    import jinja2

    ours = tokenizer_with(TEMPLATES[name])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), chat_template=TEMPLATES[name], **TOKENS
    )
    seen = set()
    for messages, options in itertools.product(CONVERSATIONS.values(), OPTIONS):
        expected = rendered(
            lambda m=messages, o=options: theirs.apply_chat_template(m, tokenize=False, **o),
            jinja2.TemplateError,
        )
        text = rendered(
            lambda m=messages, o=options: ours.apply_chat_template(m, **o), TokenizerError
        )
        assert text == expected
        seen.add(text)
    assert len(seen) >= len(CONVERSATIONS)
    assert sum(text.startswith("refused") for text in seen) < len(seen)


def test_a_known_prompt_is_exact():
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert tokenizer_with(QWEN3).apply_chat_template(messages) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    text = tokenizer_with(LLAMA31).apply_chat_template(messages)
    assert datetime.now().strftime("Today Date: %d %b %Y") in text
    given = datetime(2031, 2, 3)
    text = tokenizer_with(LLAMA31).apply_chat_template(messages, now=given)
    assert "Today Date: 03 Feb 2031" in text


def test_templates_come_from_the_directory(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_level_backend().to_str(), encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    user = [{"role": "user", "content": "x"}]
    with pytest.raises(TokenizerError, match="no default chat template; pass chat_template="):
        Tokenizer.load(tmp_path).apply_chat_template(user)
    config.write_text('{"chat_template": "from config"}')
    assert Tokenizer.load(tmp_path).apply_chat_template(user) == "from config"
    config.write_text(
        '{"chat_template": [{"name": "default", "template": "plain"}, '
        '{"name": "tool_use", "template": "tools"}]}'
    )
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template(user) == "plain"
    assert tokenizer.apply_chat_template(user, tools=[SCHEMA]) == "tools"
    assert tokenizer.apply_chat_template(user, chat_template="tool_use") == "tools"
    assert tokenizer.apply_chat_template(user, chat_template="{{ messages[0].role }}") == "user"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert Tokenizer.load(tmp_path).apply_chat_template(user, tools=[SCHEMA]) == "from file"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "rag.jinja").write_text("rag")
    with pytest.raises(TokenizerError, match="it has rag"):
        Tokenizer.load(tmp_path).apply_chat_template(user)


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('not like this') }}", "not like this"),
        ("{% if %}", "not valid Jinja"),
        ("{{ messages[9].content }}", "failed"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(__init__=1) %}", "namespace"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "namespace"),
        ("{{ dict.items(messages[0]) }}", "items"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "range"),
        ("{% include 'tokenizer.json' %}", "loader"),
    ],
)
def test_a_template_cannot_do_harm_and_its_failure_is_named(template, word):
    with pytest.raises(TokenizerError, match=word):
        tokenizer_with(template).apply_chat_template([{"role": "user", "content": "x"}])


def test_messages_are_plain_data():
    class Loud(str):
        def shout(self):
            raise AssertionError("a template called a method of the caller's object")

    tokenizer = tokenizer_with("{{ messages[0].content.shout is defined }}{{ x | tojson }}")
    messages = [{"role": "user", "content": Loud("x")}]
    assert tokenizer.apply_chat_template(messages, x=(1, 2.5, None, True)).startswith("False[1,")
    for bad in ([], "text", ["text"], [{"role": "user", "content": object()}]):
        with pytest.raises(InputError, match="messages?"):
            tokenizer.apply_chat_template(bad)
    with pytest.raises(InputError, match="messages?"):
        tokenizer.apply_chat_template(messages, x=open)
    with pytest.raises(InputError, match="continue_final_message"):
        tokenizer.apply_chat_template(messages, continue_final_message=True)


def test_an_old_or_missing_jinja_is_named(monkeypatch):
    import sys

    import jinja2

    from moejax import chat

    user = [{"role": "user", "content": "x"}]
    chat._environment.cache_clear()
    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(TokenizerError, match=r"3\.1\.5 is not safe"):
        tokenizer_with("old").apply_chat_template(user)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(TokenizerError, match="pip install 'jinja2"):
        tokenizer_with("none").apply_chat_template(user)
