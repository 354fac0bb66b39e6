"""Losses by name: all that there are, their hyperparameters, what is refused."""

import inspect

import pytest

from alignjax import losses
from alignjax.core.config import build, dump, loads, to_dict
from alignjax.core.errors import UserError
from alignjax.losses import f_divergence, preference, reference_free, unpaired
from alignjax.phases.preference_config import LOSSES, PreferenceConfig

TEXT = """
phase: preference
name: x
model: {path: some/model}
data: {train: pairs.jsonl}
"""


def read(more="", text=TEXT):
    return build(PreferenceConfig, loads(text + more))


def test_every_public_loss_of_comparisons_has_its_name():
    modules = (preference, reference_free, unpaired, f_divergence)
    public = {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    assert public - {"mixture", "kto_kl"} == LOSSES.keys()
    assert all(loss.function is getattr(losses, name) for name, loss in LOSSES.items())


def test_whether_the_reference_is_read_is_what_the_module_says():
    free = {name for name, loss in LOSSES.items() if not loss.reads_reference}
    assert free == {n for n in LOSSES if hasattr(reference_free, n)}


def test_hyperparameters_are_written_out_and_read_back():
    config = read()
    assert config.losses == {"dpo": {"weight": 1.0, "beta": 0.1, "label_smoothing": 0.0}}
    config = read("losses: {bco: {beta: 0.2, weight: 0.5}, chosen_nll: {}, dpo: {}}")
    assert config.losses["bco"] == {"weight": 0.5, "beta": 0.2}
    assert build(PreferenceConfig, loads(dump(to_dict(config)))) == config
    objective = config.objective
    assert [part.weight for part in objective.parts] == [0.5, 1.0, 1.0]
    assert objective.parts[0].options == {"beta": 0.2} and objective.beta == 0.2
    assert objective.takes == {"pairs", "delta"} and objective.reads_reference
    assert not read("losses: {simpo: {}, chosen_nll: {}}").objective.reads_reference
    assert read("losses: {orpo: {coef: 0.3}}").objective.beta == 0.3


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ("losses: {dpo: {beta: 0}}", r":6: losses.dpo: beta=0.*expected beta > 0"),
        ("losses: {dpo: {tau: 1}}", "losses.dpo: has no tau; it has weight, beta, label_smoothing"),
        ("losses: {dpoo: {}}", "dpoo"),
        ("losses: {}", "losses"),
        ("losses: {dpo: 3}", "losses.dpo"),
        ("losses: {dpo: {}, kto: {}}", "dpo, kto are of pairs and of single responses"),
        ("losses: {soft_dpo: {}}", "soft_dpo and data.prob_field"),
        ("losses: {kto: {}}\nlength_alpha: 0.5", "takes single responses"),
        ("length_alpha: 1.5", "length_alpha"),
    ],
)
def test_what_is_refused(more, complaint):
    with pytest.raises(UserError, match=complaint):
        read(more)


@pytest.mark.parametrize(
    ("data", "more", "complaint"),
    [
        ("micro_batches: 2", "losses: {aot: {}}", "micro_batches=2: aot sorts the pairs"),
        ("num_prompts: 1", "losses: {kto: {}}", "num_prompts=1: the KL of kto"),
        ("prob_field: sure", "", "soft_dpo and data.prob_field"),
        ("micro_batches: 5", "", "do not divide into 5"),
    ],
)
def test_what_is_refused_of_data(data, more, complaint):
    with pytest.raises(UserError, match=complaint):
        read(more, TEXT.replace("pairs.jsonl}", f"pairs.jsonl, {data}}}"))


def test_adapters_that_drop_inputs_are_refused():
    with pytest.raises(UserError, match=r"model.lora.dropout=0.1"):
        read(text=TEXT.replace("some/model}", "some/model, lora: {rank: 2, dropout: 0.1}}"))
