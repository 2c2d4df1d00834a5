"""The chat templates of data/chat.py as jinja texts, for who asks a model through transformers.

Each writes what `processor.chat` writes for the same messages, end tokens of the answers included;
`content` is a string, or text and image parts.
"""

from llava_min.data.chat import LLAVA_HF_JINJA, QWEN_SYSTEM, VICUNA_SYSTEM

# the images of a message, each on its own line, then its texts: `question` of chat.Turn
_QUESTION = (
    "{%- macro question(m) -%}"
    "{%- if m['content'] is string -%}{{ m['content'] }}"
    "{%- else -%}"
    "{%- set images = m['content'] | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- set texts = m['content'] | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join('') -%}"
    "{%- if images -%}"
    "{%- for i in images -%}<image>{%- if texts | trim or not loop.last -%}{{ '\\n' }}"
    "{%- endif -%}{%- endfor -%}{{ texts | trim }}"
    "{%- else -%}{{ texts }}{%- endif -%}"
    "{%- endif -%}{%- endmacro -%}"
)
_SYSTEM = (
    "{%- set system = question(messages[0]) if messages[0]['role'] == 'system' else DEFAULT -%}"
)
_LOOP = (
    "{%%- for m in messages -%%}{%%- if m['role'] == 'user' -%%}%s"
    "{%%- elif m['role'] == 'assistant' -%%}%s{%%- endif -%%}{%%- endfor -%%}"
)


def _system(default: str) -> str:
    quoted = default.replace("'", "\\'")
    return _SYSTEM.replace("DEFAULT", f"'{quoted}'")


def _vicuna() -> str:
    user = "{{ 'USER: ' + question(m) + ' ASSISTANT:' }}"
    answer = "{{ ' ' + question(m) + '</s>' }}"
    return _QUESTION + _system(VICUNA_SYSTEM) + "{{ system + ' ' }}" + _LOOP % (user, answer)


def _plain() -> str:
    return (
        "{%- for m in messages -%}{%- if m['role'] == 'user' -%}<image>"
        "{%- elif m['content'] is string -%}{{ m['content'] + '\\n' }}"
        "{%- else -%}{%- for part in m['content'] -%}{{ part['text'] }}{%- endfor -%}{{ '\\n' }}"
        "{%- endif -%}{%- endfor -%}"
    )


def _chatml() -> str:
    user = "{{ '\\n<|im_start|>user\\n' + question(m) + '<|im_end|>' }}"
    answer = "{{ '\\n<|im_start|>assistant\\n' + question(m) + '<|im_end|>' }}"
    return (
        _QUESTION
        + _system(QWEN_SYSTEM)
        + "{{ '<|im_start|>system\\n' + system + '<|im_end|>' }}"
        + _LOOP % (user, answer)
        + "{%- if add_generation_prompt -%}{{ '\\n<|im_start|>assistant\\n' }}{%- endif -%}"
    )


def _mistral() -> str:
    user = (
        "{%- if seen.first -%}{{ '[INST] ' + system }}{%- set seen.first = false -%}"
        "{%- else -%}{{ ' [INST] ' }}{%- endif -%}{{ question(m) + ' [/INST]' }}"
    )
    answer = "{{ ' ' + question(m) + '</s>' }}"
    return (
        _QUESTION
        + "{%- set system = question(messages[0]) + '\\n\\n'"
        + " if messages[0]['role'] == 'system' else '' -%}"
        + "{%- set seen = namespace(first=true) -%}{{ bos_token }}"
        + _LOOP % (user, answer)
    )


def _llama3() -> str:
    header = lambda role: f"<|start_header_id|>{role}<|end_header_id|>\\n\\n"
    return (
        _QUESTION
        + "{{ bos_token }}{%- for m in messages -%}"
        + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
        + " + (question(m) | trim) + '<|eot_id|>' }}{%- endfor -%}"
        + "{%- if add_generation_prompt -%}{{ '"
        + header("assistant")
        + "' }}{%- endif -%}"
    )


JINJA = {
    "llava_hf": LLAVA_HF_JINJA,
    "vicuna_v1": _vicuna(),
    "plain": _plain(),
    "chatml": _chatml(),
    "mistral": _mistral(),
    "llama3": _llama3(),
}
