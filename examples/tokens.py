"""The example model's own tokenizer, and the library's files and tasks as its tokens."""

import random
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from examples import corpus, tasks

BOS, EOS, PAD, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('the roles are system, user and assistant') }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
VOCABULARY = 4096
Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts, with bos before every plain text and a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [BOS, EOS, PAD, END, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[END, *(f"<|{role}|>" for role in ROLES)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def source_tokens(tokenizer: PreTrainedTokenizerFast, sources: list[corpus.Source]) -> Tokens:
    """The files one after another, each as bos, text, eos."""
    encoded = tokenizer([source.text for source in sources], return_attention_mask=False)
    return _joined([[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]])


def task_tokens(
    tokenizer: PreTrainedTokenizerFast, sources: list[corpus.Source], seed: int
) -> Tokens:
    """Every task of the files' definitions, shuffled: half as plain text, half as chat."""
    rng = random.Random(seed)
    texts = []
    for found in (found for source in sources for found in corpus.definitions(source)):
        for task in [*tasks.instructed(found, rng), tasks.completion(found, rng)]:
            if len(task.answer) < 1200:  # longer than a window can teach
                texts.append(_as_text(tokenizer, task, chat=rng.random() < 0.5))
    rng.shuffle(texts)
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return _joined(encoded["input_ids"])


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids that end a text or a turn."""
    return [tokenizer.get_vocab()[token] for token in (EOS, END)]


def _as_text(tokenizer: PreTrainedTokenizerFast, task: tasks.Task, chat: bool) -> str:
    if not chat:
        return f"{BOS}{task.plain()}{task.plain_answer()}{EOS}"
    prompt = tokenizer.apply_chat_template(
        task.messages(), tokenize=False, add_generation_prompt=True
    )
    return f"{prompt}{task.answer}{END}\n"


def _joined(documents: list[list[int]]) -> Tokens:
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in documents])
