"""Text and messages <-> token ids, with masks of what is trained. No jax."""

from alignjax.text.chat import (
    PLAIN_TEMPLATE,
    ChatTemplate,
    Message,
    encode_chat,
    encode_chat_prompt,
    encode_prompt,
    encode_prompt_completion,
    is_special,
    turns,
)
from alignjax.text.load import load_tokenizer
from alignjax.text.sentencepiece import load_sentencepiece, train_sentencepiece
from alignjax.text.tokenizer import (
    HFTokenizer,
    check_fits,
    stop_ids,
    vocab_tokenizer,
)

__all__ = [
    "PLAIN_TEMPLATE",
    "ChatTemplate",
    "HFTokenizer",
    "Message",
    "check_fits",
    "encode_chat",
    "encode_chat_prompt",
    "encode_prompt",
    "encode_prompt_completion",
    "is_special",
    "load_sentencepiece",
    "load_tokenizer",
    "stop_ids",
    "train_sentencepiece",
    "turns",
    "vocab_tokenizer",
]
