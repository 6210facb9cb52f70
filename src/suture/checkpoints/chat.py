"""Chat templates: how a conversation becomes the text that a model continues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suture.checkpoints.checkpoint import within
from suture.checkpoints.headers import parse_object
from suture.checkpoints.vocabulary import dumped, json_file
from suture.errors import (
    RecipeError,
    brief,
    did_you_mean,
)

AUTO = "auto"
_HEADER = "'<|start_header_id|>' ~ {} ~ '<|end_header_id|>\\n\\n'"
CHAT_TEMPLATES = {
    "alpaca": (
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{{ message.content | trim ~ '\\n\\n' }}"
        "{%- elif message.role == 'user' -%}"
        "{{ '### Instruction:\\n' ~ message.content | trim ~ '\\n\\n' }}"
        "{%- elif message.role == 'user_context' -%}"
        "{{ '### Input:\\n' ~ message.content | trim ~ '\\n\\n' }}"
        "{%- elif message.role == 'assistant' -%}"
        "{{ '### Response:\\n' ~ message.content | trim ~ '\\n\\n' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    "chatml": (
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    "exaone": (
        "{%- if messages and messages[0].role != 'system' -%}"
        "{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{ '[|' ~ message.role ~ '|]' ~ message.content }}"
        "{{ '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}{%- for message in messages -%}"
        "{{ " + _HEADER.format("message.role") + " ~ message.content | trim ~ '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ " + _HEADER.format("'assistant'") + " }}{%- endif -%}"
    ),
    "mistral": (
        "{{- bos_token -}}{%- set ahead = namespace(text='') -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' and loop.first -%}"
        "{%- set ahead.text = message.content ~ '\\n\\n' -%}"
        "{%- elif message.role == 'user' -%}"
        "{{ ' [INST] ' ~ ahead.text ~ message.content ~ ' [/INST]' }}"
        "{%- set ahead.text = '' -%}"
        "{%- elif message.role == 'assistant' -%}{{ ' ' ~ message.content ~ eos_token }}"
        "{%- else -%}{{ raise_exception('no role ' ~ message.role ~ ' here') }}"
        "{%- endif -%}{%- endfor -%}"
    ),
}  # fmt: skip
"""Formats of conversations that a recipe may name."""


def as_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, ask: bool) -> str:
    """Messages in the model's own template; ``ask`` adds what stands before an answer.

    Raises:
        RecipeError: the template is wrong, or does not take these messages.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
    except Exception as error:  # noqa: BLE001  a template is a program, it may fail in any way
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise RecipeError(f"the model's chat template fails for messages of {roles}: "
                          f"{type(error).__name__}: {error}") from None  # fmt: skip
    return text


def chat_template_named(text: object) -> str | None:
    """Return what a recipe says of the template: ``auto``, the name of one, or its Jinja text.

    Raises:
        RecipeError: it is none of these.
    """
    if text == "":
        return None
    if not isinstance(text, str):
        raise RecipeError(f"a name or Jinja text, not {brief(text)}")
    if text != AUTO and text not in CHAT_TEMPLATES and "{" not in text:
        hint = did_you_mean(text, [AUTO, *CHAT_TEMPLATES])
        raise RecipeError(f"{brief(text)} is no template (Jinja text has braces); {hint}")
    return text


def template_of(folder: Path) -> str | None:
    """The chat template of a folder, in whichever file it stands."""
    path = folder / "chat_template.jinja"
    if path.is_file() and path.stat().st_size < 1 << 22:
        return within(path, folder).read_text("utf-8", "replace").strip() or None
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = (json_file(folder, name) or {}).get("chat_template")
        if isinstance(found, list):
            by_name = [e for e in found if isinstance(e, dict) and e.get("name") == "default"]
            found = by_name[0].get("template") if by_name else None
        if isinstance(found, str) and found.strip():
            return found.strip()
    return None


def chosen_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The text of a chat template; ``auto`` is what most folders have, the first of equals."""
    if wanted != AUTO:
        return CHAT_TEMPLATES.get(wanted, wanted)
    found = [t for folder in folders if (t := template_of(folder)) is not None]
    return Counter(found).most_common(1)[0][0] if found else None


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Tokenizer files with another chat template, in both places where loaders look for it.

    Raises:
        CheckpointError: the tokenizer's configuration is no JSON object.
    """
    found = {name: content for name, content in files.items() if name != "chat_template.json"}
    config = parse_object(found.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
    config["chat_template"] = template
    return found | {
        "tokenizer_config.json": dumped(config),
        "chat_template.jinja": template.encode(),
    }


__all__ = [
    "CHAT_TEMPLATES",
    "chat_template_named",
    "chosen_template",
    "template_of",
    "with_template",
]
