"""A model whose next token depends on the last one alone, so that its log-probs are known by hand.

Embeddings are unit vectors and the layers add nothing, so that the final norm gives the unit vector
of the last token times sqrt(D); the unembedding then reads its row out of a table of logits.
"""

import jax
import numpy as np

from alignjax.models import Model, ModelConfig, save
from alignjax.text import vocab_tokenizer

CHARS = [chr(i) for i in range(32, 127)] + ["\n"]
TOKENS = ["<pad>", "<bos>", "<eos>", *CHARS]
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def table(likely):
    """[V, V] float64 logits: 0, but for {(last, next): logit}."""
    logits = np.zeros((len(TOKENS), len(TOKENS)))
    for (last, following), logit in likely.items():
        logits[TOKENS.index(last), TOKENS.index(following)] = logit
    return logits


def logp(logits, before, text):
    """Float64, nats: of a text after another, token by token."""
    total, last = 0.0, before[-1]
    for char in text:
        row = logits[TOKENS.index(last)]
        total += row[TOKENS.index(char)] - np.log(np.exp(row).sum())
        last = char
    return total


def write(path, logits, context=512):
    """Saves the model of a table with its tokenizer."""
    D = 104
    shape = ModelConfig(
        vocab_size=len(TOKENS), hidden_size=D, num_layers=1, num_heads=2, intermediate_size=8,
        max_position_embeddings=context, tie_embeddings=False, norm_eps=1e-12,
    )  # fmt: skip
    model = Model(shape)
    params = jax.tree.map(np.array, model.init(jax.random.key(0)))
    params["embedding"] = np.eye(len(TOKENS), D, dtype=np.float32)
    params["layers"]["attention"]["out"]["kernel"][:] = 0
    params["layers"]["mlp"]["down"]["kernel"][:] = 0
    unembedding = np.zeros((D, len(TOKENS)), np.float32)
    unembedding[: len(TOKENS)] = logits / np.sqrt(D)
    params["unembedding"] = unembedding
    save(path, model, params, extra_config=IDS)
    vocab_tokenizer(TOKENS).save(str(path))
    return path
