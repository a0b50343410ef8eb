"""Chat templates: the text that transformers renders, and what a template cannot do."""

import json

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed: pip install -e '.[serve]'")

from gptjax.errors import UserError
from gptjax.tokenizers import ByteTokenizer, ChatTemplate, HuggingFaceTokenizer, chat_template

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FEATURES = """
{%- if messages[0].role == 'system' %}{{ bos_token }}{{ messages[0]['content'] | trim }}{% endif -%}
{% for message in messages %}
    {% if loop.index0 == 0 %}{% continue %}{% endif %}
    {% generation %}[{{ message.role | upper }}] {{ message | tojson }}{{ eos_token }}{% endgeneration %}

{% endfor %}
{{- {'a': ['é<', 1]} | tojson(indent=2) }}
"""
TALK = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Who's <b>there</b>? é"}]


def test_a_conversation_is_the_text_that_transformers_renders():
    chat = pytest.importorskip("transformers.utils.chat_template_utils", reason="pip install -e '.[peer]'")
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for template in (CHATML, FEATURES):
        for prompt in (True, False):
            theirs = chat.render_jinja_template(
                [TALK], chat_template=template, add_generation_prompt=prompt, **tokens
            )[0][0]
            assert ChatTemplate(template, tokens).render(TALK, prompt) == theirs


def test_a_tokenizers_template_knows_its_tokens(hf_directory):
    files = {name: (hf_directory / name).read_text() for name in ("tokenizer.json", "tokenizer_config.json")}
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    files["tokenizer_config.json"] = json.dumps(config)
    assert chat_template(HuggingFaceTokenizer(files)).render(TALK[1:]) == (
        f"<|begin|>{TALK[1]['content']}<|endoftext|>"
    )
    with pytest.raises(UserError, match="has no chat template"):
        chat_template(ByteTokenizer())


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
    ],
)
def test_a_template_that_reaches_outside_is_one_line(template):
    with pytest.raises(UserError) as refused:
        ChatTemplate(template).render(TALK)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("template", ["{% for %}", "{{", "{% generation %}", "{{ '}}' "])
def test_a_damaged_template_is_one_line(template):
    with pytest.raises(UserError, match="damaged"):
        ChatTemplate(template)
