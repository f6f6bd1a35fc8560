"""The words of the tiny VLMs, and the tokenizer over them."""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ocvtp.data.questions import MAX_COUNT, POST_PROMPT, plural
from ocvtp.data.scenes import COLORS, DIGITS, SHAPES

PHRASES = ("USER:", "ASSISTANT:", POST_PROMPT)
"""Phrases of every prompt, one token each: they carry no information and would only make sequences long."""
_WORDS = """
    is are there a an the what which how many color shape number total of in it does image this picture written
    object objects small medium large yes no nothing center and or to left right above below with text digit . , ? : ;
""".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}MARKS{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def chat_template(marks: Mapping[str, str]) -> str:
    """LLaVA's: images and videos come before the text. `marks` says what stands for a part of each type."""
    cases = "".join(f"{{% if part['type'] == '{kind}' %}}{mark}{{% endif %}}" for kind, mark in marks.items())
    return CHAT_TEMPLATE.replace("MARKS", cases)


def vocabulary(image_token: str, more: Sequence[str] = ()) -> list[str]:
    """Every token, in the order of its id; `more` come last, so that ids of the others are the same without them."""
    numbers = sorted({*DIGITS, *(str(n) for n in range(MAX_COUNT + 1))})
    special = ("<pad>", "<s>", "</s>", "<unk>", image_token)
    words = [*_WORDS, *COLORS, *SHAPES, *(plural(shape) for shape in SHAPES), *numbers]
    return list(dict.fromkeys([*special, *PHRASES, *words, *more]))


def make_tokenizer(named: Mapping[str, str], words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Words and punctuation in lower case, with the phrases of the prompts as single tokens.

    Args:
        named: special tokens beside those of text, by their names in transformers; `image_token` first.
        words: beside those of all tiny VLMs.
    """
    image_token, *others = named.values()
    tokens = {token: index for index, token in enumerate(vocabulary(image_token, [*others, *words]))}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([AddedToken(phrase, normalized=False, lstrip=True, rstrip=True) for phrase in PHRASES])
    special = ("<pad>", "<s>", "</s>", "<unk>", *named.values())
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True, lstrip=True, rstrip=True) for t in special]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokens["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=dict(named),
        padding_side="left",
        model_max_length=1024,
    )
