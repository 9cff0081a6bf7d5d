"""Tokenizers of the kinds that language models come with, each small and made by code.

chatml       bytes, no BOS of its own: the template's <|im_start|> stands first (SmolLM2, Qwen)
llama3       bytes, BOS before every text; its template writes that BOS too
gpt2         bytes, BOS = EOS = UNK and none is added
gpt2_prefix  the same with add_prefix_space: marks the beginning of every piece of text
eos_always   bytes, EOS after every text
llama2       SentencePiece in its old form: a normaliser puts "▁" before every piece of text; BOS before every text
first        SentencePiece in its new form: "▁" before the first piece alone; BOS before every text
always       Metaspace that marks every piece; an added token that swallows white space behind it (Phi-3)
t5           words cut at white space, each marked; EOS after every text, no BOS
"""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS = "<s>", "</s>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
TEXT = (
    "question answer: tell me about the cat and the dog, it is kind and it is rude. Hello world, hello there!\n\n"
    "What is 12 and 345? The answer: 7. [INST] user [/INST] assistant system\n  two  spaces\n"
)
# Headers that end in an added token, in text and in a newline: the three ways in which an answer may begin.
TEMPLATES = {
    "token": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "text": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "newline": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
KINDS = ("chatml", "llama3", "gpt2", "gpt2_prefix", "eos_always", "llama2", "first", "always", "t5")
_FORMS = {"llama3": f"{BOS} $A", "llama2": f"{BOS} $A", "first": f"{BOS} $A", "always": f"{BOS} $A"}
_FORMS |= {"eos_always": f"$A {EOS}", "t5": f"$A {EOS}"}


def make(kind: str, template: str | None = "newline", **changes: Any) -> Any:
    """A tokenizer of one of KINDS, with one of TEMPLATES (or another template's text)."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained(kind))
    if kind == "gpt2":
        tokens: dict[str, Any] = {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS}
    elif kind in _FORMS and BOS in _FORMS[kind]:
        tokens = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    else:
        tokens = {"eos_token": EOS, "pad_token": EOS}
    text = TEMPLATES.get(template, template) if template else None
    if text and "bos_token" not in tokens:
        text = text.replace("{{ bos_token }}", "")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{**tokens, "chat_template": text, **changes}
    )


@functools.cache
def _trained(kind: str) -> str:
    sentencepiece = kind in ("llama2", "first", "always", "t5")
    backend = Tokenizer(models.BPE(byte_fallback=sentencepiece, unk_token="<unk>" if sentencepiece else None))
    if sentencepiece:
        _sentencepiece(backend, kind)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "gpt2_prefix")
        backend.decoder = decoders.ByteLevel()
    special = [BOS, EOS, "<unk>"] if sentencepiece else [BOS, EOS]
    size = 500 if sentencepiece else 400
    spare = [f"<0x{byte:02X}>" for byte in range(256)] if sentencepiece else sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special + (spare if sentencepiece else []),
        initial_alphabet=[] if sentencepiece else spare,
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.add_special_tokens(
        [AddedToken(name, special=True, normalized=False, rstrip=kind == "always") for name in (USER, ASSISTANT)]
    )
    if kind in _FORMS:
        names = [(name, backend.token_to_id(name)) for name in (BOS, EOS)]
        backend.post_processor = processors.TemplateProcessing(single=_FORMS[kind], special_tokens=names)
    elif not sentencepiece:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return str(backend.to_str())


def _sentencepiece(backend: Tokenizer, kind: str) -> None:
    if kind == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # Trained without joining words; as a real one, it then sees a text as one word.
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    elif kind == "t5":
        metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
