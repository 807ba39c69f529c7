"""Tiny tokenizers of the common kinds and chat templates of the common, and the nasty, families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARKS = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|return|>", "<|user|>", "<|assistant|>",
]  # fmt: skip
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on; 0123456789 = + - question answer",
    "user assistant system model Hello world! What is 2+2? It is 4. caf\u00e9 \u4f60\u597d \U0001f600 <think> </think>",
] * 3


def byte_level(bos: bool) -> Tokenizer:
    """Of the kind of GPT-2, Llama 3 and Qwen."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=MARKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def metaspace() -> Tokenizer:
    """Of the kind of Llama 2 and Mistral: a dummy space before the text, BOS, bytes for what is unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*MARKS, "<unk>", *bytes_], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: byte_level(bos=False),
    "bytes with BOS": lambda: byte_level(bos=True),
    "metaspace with BOS": metaspace,
}


def wrapped(made: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"} | options
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in MARKS]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, str]:
    return {kind: make().to_str() for kind, make in KINDS.items()}


@pytest.fixture
def tokenizer_of(tokenizers_by_kind):
    """`tokenizer_of(kind, template=None, **names of special tokens)`, a fresh one each time."""

    def make(kind: str = "bytes", template: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
        tokenizer = wrapped(Tokenizer.from_str(tokenizers_by_kind[kind]), **options)
        tokenizer.chat_template = template
        return tokenizer

    return make


GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
THINK = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n' }}{% endif %}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
)

# The templates of model families, cut down to the traits that matter here.
OWN = {
    "chatml": CHATML + GENERATE,
    "default system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    + CHATML
    + GENERATE,
    "llama3, with BOS and trimming": "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral, no generation prompt needed": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "gemma, refuses system": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ '<start_of_turn>' + "
    "('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "qwen3, drops earlier reasoning": THINK + GENERATE,
    "r1, prompts for reasoning it then strips": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|start_header_id|>user' + m.content }}{% else %}{{ '<|start_header_id|>assistant' + "
    "m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<think>\n' }}{% endif %}",
    "harmony, another end for the last turn": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    + GENERATE,
    "no generation prompt though needed": CHATML,
    "phi3, EOS behind the last turn": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "glm, ended by the next marker": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "apertus, leaves the last turn open": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content }}{% if not loop.last %}{{ '<|end|>' }}{% endif %}{% else %}"
    "{{ '<|user|>' + m.content + '<|end_header_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "vicuna, a space behind the colon": "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ 'USER: ' + m.content + '\n' }}{% else %}"
    "{{ 'ASSISTANT: ' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}",
    "qwen3.5, a prompt that melts into the answer": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    "system in the last user turn": "{{ bos_token }}{% set sys = messages[0].content if messages[0].role == 'system' "
    "else '' %}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + (sys if loop.index0 >= messages | length "
    "- 2 else '') + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}",
}
ALWAYS = CHATML + "{{ '<|im_start|>assistant\n' }}"  # a generation prompt whether it is asked for or not
ENDLESS = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
