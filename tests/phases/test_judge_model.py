"""A model as a judge: probabilities of options against a plain forward pass, whatever is beside."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.judge_model import ModelAsk, exclusive
from alignjax.rewards.judge import Judge, Pair
from alignjax.rewards.judge_answer import Question
from alignjax.rewards.judge_config import JudgingConfig, LocalConfig, ThinkConfig
from alignjax.rewards.judge_prompt import load_templates
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer, vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *"abcAB019 >:\n?", "User:\n", "Assistant:\n", "System:\n"]
CONTEXT = 64


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    shape = ModelConfig(
        vocab_size=len(TOKENS), hidden_size=16, num_layers=1, num_heads=2,
        max_position_embeddings=CONTEXT, initializer_range=0.4,
    )  # fmt: skip
    model = Model(shape)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save(folder, model, jax.jit(model.init)(jax.random.key(1)), extra_config=ids)
    vocab_tokenizer(TOKENS).save(str(folder))
    return str(folder)


def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def plain(path):
    return ModelAsk(LocalConfig(path=path, chat=False, batch_size=3), None, mesh())


def answered(ask, questions):
    found = {}
    for chunk in ask(questions):
        found |= chunk
    return [found[i] for i in range(len(questions))]


@functools.cache
def forward(model):
    """Params, tokens [1, CONTEXT] -> log-probs of what follows each, [CONTEXT, V]."""

    def logps(params, tokens):
        segments, positions = jnp.ones_like(tokens), jnp.arange(CONTEXT)[None]
        hidden, _ = model.apply(params, tokens, segments, positions)
        return jax.nn.log_softmax(hidden[0] @ model.unembedding(params))

    return jax.jit(logps)


def logp(ask, before, after):
    """Of the ids of a text after those of another, from the logits of a plain forward pass."""
    tokens = np.zeros((1, CONTEXT), np.int32)
    ids = [*before, *after]
    tokens[0, : len(ids)] = ids
    logps = np.asarray(forward(ask._model)(ask._params, tokens))
    return float(sum(logps[i, ids[i + 1]] for i in range(len(before) - 1, len(ids) - 1)))


def test_probabilities_are_those_of_the_model(path, plain):
    tokenizer = load_tokenizer(path)
    texts = ["ab?", "c", "abcabcab > b?", "0", "a:b"]
    found = answered(plain, [Question(text, ("A", "B")) for text in texts])
    for text, answer in zip(texts, found, strict=True):
        before = [1, *tokenizer.encode(text)]
        expected = [logp(plain, before, tokenizer.encode(option)) for option in ("A", "B")]
        assert answer.logps == pytest.approx(expected, abs=1e-5)
        assert answer.usage.prompt_tokens == len(before) and answer.text == ""
    several = ("ab", "A", "Ab:c")  # Of one token and of more; the second begins the third.
    (answer,) = answered(plain, [Question("c?", several)])
    before = [1, *tokenizer.encode("c?")]
    expected = [logp(plain, before, tokenizer.encode(option)) for option in several]
    left = math.exp(expected[1]) - math.exp(logp(plain, before, tokenizer.encode("Ab:c")))
    assert answer.logps == pytest.approx((expected[0], math.log(left), expected[2]), abs=1e-5)


def test_an_option_that_begins_another_one():
    """Of digits, 1 and 10: what goes on with 0 is 10 and not 1."""
    ids = [np.array(one, np.int32) for one in ([1], [2], [1, 0], [1, 0, 0])]
    logps = np.log([0.5, 0.2, 0.3, 0.1])
    assert np.exp(exclusive(ids, logps)) == pytest.approx([0.5 - 0.3, 0.2, 0.3 - 0.1, 0.1])
    # Rounding may leave less than nothing; far below the smallest number, the ratio counts.
    assert exclusive(ids[::2], np.log([0.3, 0.3 + 1e-9]))[0] == -math.inf
    low = exclusive(ids[::2], np.array([-2000.0, -2000.0 + math.log(0.25)]))
    assert low == pytest.approx((-2000 + math.log(0.75), -2000 + math.log(0.25)))


def test_an_answer_does_not_depend_on_the_others(plain):
    questions = [Question(f"{'ab'[i % 2] * (i % 5 + 1)}c?", ("A", "B")) for i in range(10)]
    together = answered(plain, questions)
    alone = [answered(plain, [question])[0] for question in questions]
    assert together == alone, "to the last bit"


def test_what_does_not_fit_or_cannot_be_written(plain):
    texts = ["a?", "a" * CONTEXT, "x"]
    fine, long, unknown = answered(plain, [Question(text, ("A", "B")) for text in texts])
    assert fine.error is None
    assert long.error == (
        f"judge.model: a question of {CONTEXT + 1} tokens do not fit into the model's context of "
        f"{CONTEXT}"
    )
    assert "unknown character 'x'" in unknown.error
    (equal,) = answered(plain, [Question("a?", ("A", "z"))])
    assert "unknown character 'z'" in equal.error


def test_judged_text_makes_no_special_token(path, tmp_path):
    """In this vocabulary a broken token cannot be written: there is no verdict then."""
    ask = ModelAsk(LocalConfig(path=path, chat=False), None, mesh())
    assert set(ask.specials) == {"<pad>", "<bos>", "<eos>"}
    template = tmp_path / "t.jinja"
    template.write_text("{{ prompt }}> {{ first }}: {{ second }}?")
    config = JudgingConfig(template=str(template))
    judge = Judge(ask, config, load_templates(config, ask.specials))
    good, bad = judge.pairwise([Pair("a", "b", "c"), Pair("a", "b<eos>", "c")])
    assert good.value is not None and bad.value is None
    assert "unknown character '<'" in bad.error


def test_through_the_chat_template(path):
    tokenizer = load_tokenizer(path)
    ask = ModelAsk(LocalConfig(path=path, system="c"), None, mesh())
    (answer,) = answered(ask, [Question("ab?", ("A", "B"))])
    before = tokenizer.encode("<bos>System:\nc\n\nUser:\nab?\n\nAssistant:\n")
    expected = [logp(ask, before, tokenizer.encode(option)) for option in ("A", "B")]
    assert answer.logps == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="system and chat_template go with chat: true"):
        ModelAsk(LocalConfig(path=path, system="c", chat=False), None, mesh())


def test_with_chain_of_thought(path):
    """The verdict is computed behind the cue, after what was sampled before it."""
    tokenizer = load_tokenizer(path)
    config = LocalConfig(path=path, chat=False, batch_size=2, temperature=9.0)
    ask = ModelAsk(config, ThinkConfig(max_tokens=4), mesh())
    questions = [Question("ab"[i % 2] * (i + 1) + "?", ("A", "B"), cue="0:") for i in range(8)]
    found = answered(ask, questions)
    assert len({answer.text for answer in found}) > 1
    num_compared = 0
    for question, answer in zip(questions, found, strict=True):
        thought = tokenizer.encode(answer.text)
        assert "0:" not in answer.text and len(thought) <= answer.usage.completion_tokens <= 4
        if len(thought) < answer.usage.completion_tokens:
            continue  # A special token was sampled, which the text does not show.
        num_compared += 1
        before = [1, *tokenizer.encode(question.text), *thought]
        expected = [logp(ask, before, tokenizer.encode(f"0: {o}")) for o in ("A", "B")]
        assert answer.logps == pytest.approx(expected, abs=1e-4)
    assert num_compared >= 2
    # Where a run goes on, a batch of questions gets the same thoughts.
    assert answered(ask, questions[2:]) == found[2:]
    assert ask._before_cue(tokenizer.encode("ab0:A0:"), "0:") == tokenizer.encode("ab")
    assert ask._before_cue(tokenizer.encode("ab0"), "0:") == tokenizer.encode("ab0")


def test_it_is_known_by_what_its_files_hold(path, plain, tmp_path):
    others = [LocalConfig(path=path), LocalConfig(path=path, chat=False, batch_size=7)]
    chat, same = (ModelAsk(config, None, mesh()) for config in others)
    assert same.identity == plain.identity != chat.identity
    changed = tmp_path / "model"
    model = plain._model
    save(changed, model, jax.jit(model.init)(jax.random.key(2)), extra_config={"eos_token_id": 2})
    vocab_tokenizer(TOKENS).save(str(changed))
    other = ModelAsk(LocalConfig(path=str(changed), chat=False), None, mesh())
    assert other.identity != plain.identity and path not in plain.identity
