"""Small tokenizers with the chat templates of well-known families, trained on the fly."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from transformers import PreTrainedTokenizerFast

TEXTS = [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))]


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How a family writes a chat; `special` begins with bos, eos, and the token that ends a turn."""

    name: str
    template: str
    special: tuple[str, str, str, *tuple[str, ...]]
    roles: tuple[str, ...] = ()
    """Tokens that begin a turn and yet are not special."""
    words: tuple[str, ...] = ()
    """Added tokens that a message may hold."""
    sentencepiece: bool = False
    adds_bos: bool = True

    @property
    def control(self) -> tuple[str, ...]:
        """Strings that no message may turn into a token."""
        return (*self.special, *self.roles)


CHATML = ChatStyle(
    "chatml",
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    adds_bos=False,
)
LLAMA3 = ChatStyle(
    "llama3",
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    (
        *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
        *("<|start_header_id|>", "<|end_header_id|>"),
    ),
)
GEMMA = ChatStyle(
    "gemma",
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ("<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"),
    words=("\n\n", "<h1>"),
    sentencepiece=True,
)
MISTRAL = ChatStyle(
    "mistral",
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[/INST]", "[INST]"),
    sentencepiece=True,
)
THINKER = ChatStyle(
    "thinker",
    "{{ bos_token }}{% for message in messages %}"
    "{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>' + content }}"
    "{% else %}{{ '<|Assistant|>' + content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    ("<|bos|>", "<|eos|>", "<|pad|>"),
    roles=("<|User|>", "<|Assistant|>"),
    words=("</think>",),
)
STYLES = (CHATML, LLAMA3, GEMMA, MISTRAL, THINKER)


def save(style: ChatStyle, folder: Path) -> Path:
    """Train the style's tokenizer and save it as a model folder's."""
    train = _sentencepiece_like if style.sentencepiece else _byte_level
    tokenizer = train(style.special)
    if style.adds_bos:
        bos = style.special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in (*style.roles, *style.words)]
    )
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=style.special[0],
        eos_token=style.special[1],
        extra_special_tokens=list(style.special[2:]),
        chat_template=style.template,
    )
    wrapped.save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in style.special[1:3]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def _byte_level(special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, list(special), initial_alphabet=alphabet)


def _sentencepiece_like(special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces, edge = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), edge])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = _trained(tokenizer, ["<unk>", *special, *byte_tokens], initial_alphabet=["▁"])
    document = json.loads(trained.to_str())
    added = document["added_tokens"]  # byte tokens are vocabulary, not tokens to look for
    document["added_tokens"] = [t for t in added if t["content"] not in byte_tokens]
    return Tokenizer.from_str(json.dumps(document))


def _trained(tokenizer: Tokenizer, special: list[str], initial_alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=initial_alphabet,
        limit_alphabet=300,
        show_progress=False,
    )
    lines = (line for text in TEXTS for line in text.splitlines())
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer
