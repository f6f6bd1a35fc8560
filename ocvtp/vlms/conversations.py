"""How a conversation is written for a VLM: by its own chat template, or by one that papers asked with."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ocvtp.errors import BadInput

Messages = Sequence[Mapping[str, Any]]
"""A conversation: `role`, and `content` as text or a list of parts of type text and image."""
OWN, VICUNA_V1 = "own", "vicuna_v1"
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TURNS = {"user": ("USER", " "), "assistant": ("ASSISTANT", "</s>")}


def written(processor: Any, messages: Messages, conversation: str = OWN) -> str:
    """A conversation as a prompt for an answer, an image token for each image.

    Args:
        processor: of the VLM.
        messages: the conversation.
        conversation: "own", the processor's chat template, or "vicuna_v1", that of LLaVA's authors.

    Raises:
        BadInput: a part is neither text nor image; vicuna_v1: a role other than user and assistant.
    """
    return WRITERS[conversation](processor, messages)


def authors(processor: Any) -> str:
    """The conversation in which a VLM's authors asked it: vicuna_v1 for LLaVA on Vicuna, else the VLM's own.

    LLaVA on Vicuna is told by its template, whose turns are "USER: ... ASSISTANT:", and by its vocabulary, which has
    all words of the authors' system prompt.
    """
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "{question}"}]}]
    image = re.escape(str(getattr(processor, "image_token", "<image>")))
    if not re.fullmatch(rf"(.*\s)?USER:\s*{image}\s*\{{question\}}\s*ASSISTANT:\s*", written(processor, question)):
        return OWN
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    return OWN if unknown in tokenizer(VICUNA_SYSTEM, add_special_tokens=False).input_ids else VICUNA_V1


def _own(processor: Any, messages: Messages) -> str:
    text: str = processor.apply_chat_template(
        [{"role": message["role"], "content": _parts(message["content"])} for message in messages],
        add_generation_prompt=True,
        tokenize=False,
    )
    return text


def _vicuna_v1(processor: Any, messages: Messages) -> str:
    """`conv_vicuna_v1` of LLaVA (haotian-liu/LLaVA, llava/conversation.py), its image tokens as `lmms_eval` sets them.

    These stand before the text, in one line; between texts, where a question names an image, they stand in their place.
    """
    text = VICUNA_SYSTEM + " "
    for message in messages:
        if message["role"] not in _TURNS:
            raise BadInput(f"{VICUNA_V1} has turns of user and assistant, none of {message['role']!r}")
        role, end = _TURNS[message["role"]]
        text += f"{role}: {_said(_parts(message['content']), processor.image_token)}{end}"
    return f"{text}ASSISTANT:"


def _said(parts: Sequence[Mapping[str, Any]], image: str) -> str:
    images = sum(part["type"] == "image" for part in parts)
    if any(part["type"] == "image" for part in parts[images:]):
        return " ".join(image if part["type"] == "image" else part["text"] for part in parts)
    text = "".join(part["text"] for part in parts[images:])
    return f"{' '.join([image] * images)}\n{text}" if images else text


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    for part in content:
        if part["type"] not in ("image", "text"):
            raise BadInput(f"a question has a part of type {part['type']!r}; image and text can be answered")
    return [
        {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]} for part in content
    ]


WRITERS: Mapping[str, Callable[[Any, Messages], str]] = {OWN: _own, VICUNA_V1: _vicuna_v1}
