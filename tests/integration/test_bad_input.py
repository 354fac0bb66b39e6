"""What users get wrong -> exit status 2 and one readable message; nothing there is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.cli.main import main
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.registry import DATA_PHASES, PHASES
from alignjax.recipes import chains
from alignjax.recipes.stage import lock
from alignjax.text import load_tokenizer, vocab_tokenizer

REPO = Path(__file__).resolve().parents[2]
NAMES = " or ".join([*PHASES, *DATA_PHASES])
STAGES = ["files", "tokenizer", "eval", *DATA_PHASES, *PHASES]
PRESETS = (
    "'grpo', 'dr_grpo', 'dapo', 'bnpo', 'gspo', 'gmpo', 'cispo', 'sapo', 'opo', 'gdpo', 'gpg', "
    "'rloo' or 'reinforce_pp_baseline'"
)

SFT = """\
phase: sft
name: sft
model: {path: HOME/model}
data:
  train: HOME/world/corpus.jsonl
  text: {fields: {completion: text}}
  row_len: 128
  rows: 8
optimizer:
  learning_rate: 1e-3
loop: {steps: 2, checkpoint_every: 1, tensorboard: false}
"""
GRPO = """\
phase: grpo
name: grpo
model: {path: HOME/model}
data:
  train: HOME/world/train.jsonl
  text: {fields: {prompt: prompt, reference: reference}}
rollout: {num_prompts: 8, group_size: 2, max_prompt_tokens: 16, max_tokens: 12}
algorithm: {preset: dr_grpo}
rewards:
  timeout_s: 0.5
  functions:
    mine: {function: "HOME/rewards.py:length"}
loop: {steps: 2, checkpoint_every: 1, num_samples: 100, tensorboard: false}
"""
REWARD = """\
phase: reward
name: reward
model: {path: HOME/model}
data: {train: ranked.jsonl, row_len: 512, num_prompts: 8, annotators: [ann, eve], overlong: error}
loop: {steps: 2, checkpoint_every: 1, tensorboard: false}
"""
REWARDS = """\
import os, time

def length(prompt, completion, reference):
    return float(len(completion))

def broken(prompt, completion, reference):
    raise RuntimeError("no luck")

def depends(prompt, completion, reference):
    match reference:
        case "raise":
            raise RuntimeError("no luck")
        case "hang":
            time.sleep(100)
        case "nan":
            return float("nan")
        case "text":
            return "good"
    return 0.25

calls = 0

def tires(prompt, completion, reference):
    global calls
    calls += 1
    if calls > 2 * 16:
        raise RuntimeError("tired")
    return float(len(completion))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small world, a model that fits it, and reward functions of all kinds."""
    folder = tmp_path_factory.mktemp("home")
    chains.write(folder / "world", seed=0, num_questions=20, num_drills=5, num_train=16, num_test=8)
    tokenizer = load_tokenizer(folder / "world/tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, num_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    model = Model(config)
    save(folder / "model", model, model.init(jax.random.PRNGKey(0)))
    tokenizer.save(str(folder / "model"))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def run(home, tmp_path, monkeypatch, capfd):
    """Writes a config to c.yaml, runs it with overrides and returns (status, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(text, *overrides):
        Path("c.yaml").write_text(text.replace("HOME", str(home)))
        status = main(["run", "c.yaml", *overrides])
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err and "--debug" not in err
        return status, err.replace(str(home), "HOME")

    return call


@pytest.fixture
def refused(run):
    """As `run`, for what must fail at once: returns the one message, and checks that it is one."""

    def call(text, *overrides, num_lines=1):
        status, err = run(text, *overrides)
        assert status == 2, err
        assert err.startswith("alignjax: ") and err.count("\n") == num_lines, err
        assert not list(Path(".").glob("runs/*/checkpoints/*"))
        return err.removeprefix("alignjax: ").rstrip("\n")

    return call


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (SFT.replace("learning_rate", "lerning_rate"), [],
         "c.yaml:10: unknown key 'lerning_rate' in optimizer; did you mean 'learning_rate'?"),
        (SFT, ["optimiser.learning_rate=1"],
         "command line: unknown key 'optimiser'; did you mean 'optimizer'?"),
        (SFT, ["learning_rate=1"],
         "command line: unknown key 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        (SFT.replace("1e-3", "fast"), [],
         "c.yaml:10: optimizer.learning_rate: expected a number, got the text 'fast'"),
        (SFT.replace("1e-3", "'1e-3'"), [],
         "c.yaml:10: optimizer.learning_rate: expected a number, got the text '1e-3'"),
        (SFT, ["loop.steps=2.5"],
         "command line: loop.steps: expected a whole number, got 2.5"),
        (SFT, ["loop.steps=0"],
         "command line: loop.steps: expected a number greater than or equal to 1, got 0"),
        (SFT, ["loop.steps"], "command line: 'loop.steps' is not an override; write key=value, "
         "as in optimizer.learning_rate=1e-4"),
        (SFT.replace("phase: sft", "phase: stf"), [],
         f"c.yaml:1: expected phase: {NAMES}, or stages: ... for a recipe; got phase: 'stf'"),
        (SFT.replace("phase: sft\n", ""), [],
         f"c.yaml: expected phase: {NAMES}, or stages: ... for a recipe; found neither"),
        (SFT.replace("  rows: 8\n", "  rows: 8\n  rows: 9\n"), [],
         "c.yaml:9: key 'data.rows' was given in line 8"),
        (SFT.replace("{steps: 2,", "{steps: 2"), [], "c.yaml:11: not valid YAML: "),
        (SFT.replace("model: {path: HOME/model}\n", ""), [], "c.yaml: missing key 'model'"),
        (SFT.replace("path: HOME/model", ""), [],
         "c.yaml:3: model: give either path (a directory) or init (a shape to start from)"),
        (GRPO, ["rollout.group_size=1"],
         "command line: rollout.group_size: group_size=1 gives no baseline; use at least 2"),
        (GRPO.replace("dr_grpo", "drgrpo"), [], f"c.yaml:8: algorithm.preset: expected {PRESETS}, "
         "got the text 'drgrpo'; did you mean 'dr_grpo'?"),
        (GRPO.replace("dr_grpo", "[dapo]"), [], f"c.yaml:8: algorithm.preset: expected {PRESETS}, "
         "got a list of 1; did you mean 'dapo'?"),
        (GRPO.replace("{preset: dr_grpo}", "{surrogate: clip}"), [],
         "c.yaml:8: algorithm.surrogate: expected 'ppo_clip', 'dual_clip', 'cispo', 'sapo', "
         "'reinforce' or 'gmpo', got the text 'clip'; did you mean 'ppo_clip'?"),
        (GRPO, ["data.micro_batches=3"], "c.yaml: 16 completions (rollout.num_prompts x "
         "group_size) do not divide into 1 minibatches of 3 micro-batches"),
    ],
)  # fmt: skip
def test_a_config(refused, text, overrides, message):
    said = refused(text, *overrides)
    assert said == message or (message.endswith(" ") and said.startswith(message))
    assert not Path("runs").exists()


def test_several_faults_are_told_together(refused):
    assert refused(SFT.replace("rows:", "rwos:"), "seed=-1", "loop.steps=x", num_lines=3) == (
        "c.yaml:8: unknown key 'rwos' in data; did you mean 'rows'?\n"
        "command line: seed: expected a number greater than or equal to 0, got -1\n"
        "command line: loop.steps: expected a whole number, got the text 'x'"
    )


def test_a_config_that_is_not_there(run, capfd):
    for name, message in (
        ("smoke/stf", "smoke/stf: no such config file; did you mean smoke/sft"),
        (".", ". is a directory; expected a YAML file"),
    ):
        assert main(["run", name]) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"alignjax: {message}") and err.count("\n") == 1


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line_7", "message"),
    [
        ('{"text": "1', "bad.jsonl:7: broken JSON: Unterminated string starting at (column 10)"),
        ("[1]", "bad.jsonl:7: expected an object {...}, came list"),
        ('{"txt": "1"}', "bad.jsonl:7: completion: no field 'text'; did you mean 'txt'? "
         "(fields there: 'txt')"),
        ('{"text": ["1"]}', "bad.jsonl:7: completion: field 'text': expected text or a number, "
         "came list ['1']"),
        ('{"text": "12x"}', "bad.jsonl:7: HOME/model/tokenizer.json: unknown character 'x' at "
         "position 2 of '12x'; the vocabulary has "),
        ('{"text": "' + 150 * "1" + '"}', "bad.jsonl:7: 152 tokens, but only 128 fit; allow more, "
         'shorten the record, or set overlong to "drop"'),
    ],
)  # fmt: skip
def test_line_7_of_the_data(refused, tmp_path, line_7, message):
    lines = ['{"text": "12"}'] * 10
    lines[6] = line_7
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    said = refused(SFT, "data.train=bad.jsonl")
    assert said == message or (message.endswith(" ") and said.startswith(message))


def test_no_data(refused, tmp_path):
    assert refused(SFT, "data.train=no.jsonl") == f"data: no such file: no.jsonl (in {tmp_path})"
    (tmp_path / "empty.jsonl").write_text("\n")
    assert refused(SFT, "data.train=empty.jsonl") == (
        "empty.jsonl: no records; expected at least one"
    )
    # Held-out data are looked at before anything is trained, too.
    assert refused(SFT, "data.eval=empty.jsonl").startswith("empty.jsonl: no records")
    (tmp_path / "data.csv").write_text("1,2\n")
    assert refused(SFT, "data.train=data.csv").startswith("data.csv: unknown kind of file; ")
    assert refused(SFT, "data.row_len=8", "data.overlong=drop").startswith(
        "data: every one of the last "
    )


def test_a_prompt_that_does_not_fit(refused):
    said = refused(GRPO, "rollout.max_prompt_tokens=5")
    assert "tokens, but only 5 fit; allow more, shorten" in said and "train.jsonl:" in said
    assert refused(GRPO, "rollout.max_tokens=120") == (
        "rollout.max_prompt_tokens=16 and max_tokens=120 exceed the model's context of 128 "
        "tokens; lower one"
    )


RANKED = {"prompt": "1+2=", "responses": ["3", "4"], "ranks": [1, 2], "annotator": "ann"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"responses": ["3"], "ranks": [1]}, "responses: 1 of them; expected at least 2: one "
         "alone is better than none other. Add another, or judge it by labels"),
        ({"annotator": "bob"}, "annotator: 'bob' is none of 'ann', 'eve'; add the id to "
         "data.annotators, or correct the record"),
        ({"responses": ["3", "3"]}, "responses[0] and responses[1] are equal, so neither is "
         "better; take one out"),
        ({"responses": ["3", " "]}, "responses[1]: empty, so there is nothing to train; take it "
         "out"),
        ({"ranks": None, "scores": [1.0, float("nan")]}, "scores[1]: expected a finite number, or "
         "null where nobody judged, came float nan"),
        ({"prompt": "1" * 200}, "203 tokens, but only 128 fit; allow more, shorten the record, or "
         'set overlong to "drop"'),
        ({"prompt": "x="}, "HOME/model/tokenizer.json: unknown character 'x' at position 0 of "
         "'x='; the vocabulary has "),
    ],
)  # fmt: skip
def test_line_2_of_preferences(refused, tmp_path, changes, message):
    lines = [json.dumps(RANKED), json.dumps(RANKED | changes), json.dumps(RANKED)]
    (tmp_path / "ranked.jsonl").write_text("\n".join(lines) + "\n")
    said, message = refused(REWARD), f"ranked.jsonl:2: {message}"
    assert said == message or (message.endswith(" ") and said.startswith(message))


def test_preferences_of_no_known_layout(refused, tmp_path):
    (tmp_path / "ranked.jsonl").write_text('{"question": "1+2=", "answer": "3"}\n')
    assert refused(REWARD).startswith(
        "ranked.jsonl:1: no known layout of preferences (fields there: question, answer); expected "
        "one of native: prompt, responses and one of ranks, choices, labels, scores; pairs: prompt"
    )


# --- models and tokenizers ----------------------------------------------------------------------


@pytest.fixture
def model(home, tmp_path):
    """A copy of the model, to be spoilt."""
    shutil.copytree(home / "model", tmp_path / "model")
    return tmp_path / "model"


def test_a_tensor_is_missing_or_misshapen(refused, model):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    kernel = tensors.pop(name)
    save_file(tensors, model / "model.safetensors")
    assert refused(SFT, "model.path=model") == (
        f"model: tensor {name!r} is missing; config.json implies it"
    )
    save_file(tensors | {name: kernel[:-1].copy()}, model / "model.safetensors")
    assert refused(SFT, "model.path=model").startswith(
        f"model/model.safetensors: tensor {name!r} has shape (15, 16); config.json implies (16, 16)"
    )


def test_a_file_of_the_model_is_missing_or_broken(refused, model):
    kept = {p.name: p.read_bytes() for p in model.iterdir()}
    for name, content, message in (
        ("model.safetensors", None, "model/model.safetensors: no such file; the weights are"),
        ("model.safetensors", b"x" * 99, "model/model.safetensors: not a safetensors file: "),
        ("config.json", None, "model/config.json: no such file; expected a Hugging Face model"),
        ("config.json", b"{\n\n,", "model/config.json:3: not JSON: "),
        ("config.json", kept["config.json"].replace(b"Llama", b"Lama"),
         "model/config.json: architectures=['LamaForCausalLM'] is not supported; expected one of"),
        ("tokenizer.json", None, "model: no tokenizer; expected tokenizer.json with "),
        ("tokenizer.json", b"{}", "model/tokenizer.json: not a tokenizer that can be read: "),
        ("tokenizer_config.json", b"{}", "model/tokenizer.json: no eos_token; set it in "),
    ):  # fmt: skip
        (model / name).unlink()
        if content is not None:
            (model / name).write_bytes(content)
        assert refused(SFT, "model.path=model").startswith(message)
        (model / name).write_bytes(kept[name])
    assert refused(SFT, "model.path=nowhere") == "tokenizer: no such directory: nowhere"


def test_a_tokenizer_that_does_not_fit(refused, model, capfd):
    tokens = [f"t{i}" for i in range(40)]
    vocab_tokenizer([*tokens, "<bos>", "<eos>", "<pad>"]).save("large")
    said = "large: the tokenizer has 43 ids, the model only 23; they do not belong together"
    assert refused(SFT, "tokenizer=large") == said
    vocab_tokenizer([*tokens, "<bos>", "<eos>", "<pad>"]).save("model")
    assert main(["generate", "model", "--prompt", "t1"]) == 2
    assert capfd.readouterr().err == f"alignjax: {said.replace('large', 'model')}\n"
    scratch = SFT.replace("path: HOME/model", "init: {vocab_size: 42}")
    assert refused(scratch, "tokenizer=large") == said.replace("23", "42")
    assert refused(scratch) == (
        "tokenizer: a model to be created (model.init) needs a tokenizer's directory"
    )


def test_a_stop_token_that_is_several(refused):
    assert refused(GRPO, "rollout.stop_tokens=[';', '12;']") == (
        "stop_tokens: '12;' is 3 tokens in this vocabulary; expected one"
    )


# --- rewards ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "args", "message"),
    [
        ("verify.exakt", "{}", "reward function 'verify.exakt': alignjax.rewards.verify has no "
         "function 'exakt'; it has "),
        ("nowhere:reward", "{}", "reward function 'nowhere:reward': there is no module 'nowhere'"),
        ("format.length", "{}", "reward function 'format.length', argument 'max_tokens': it is "),
        ("verify.exact", "{pace: all}", "reward function 'verify.exact' has no argument 'pace'; "),
    ],
)  # fmt: skip
def test_a_reward_that_is_none(refused, function, args, message):
    mine = f"rewards.functions={{mine: {{function: '{function}', args: {args}}}}}"
    assert refused(GRPO, mine).startswith(message)


def test_samples_whose_reward_fails_are_left_out_and_the_run_goes_on(run, home, tmp_path):
    kinds = ["raise", "hang", "nan", "text", "fine", "fine", "fine", "fine"]
    records = [{"prompt": f"1{i}+01=", "reference": kind} for i, kind in enumerate(kinds)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    status, err = run(
        GRPO.replace(":length", ":depends"),
        "data.train=d.jsonl",
        "loop.steps=1",
        "rewards.max_failure_frac=0.5",
        "rewards.num_workers=1",
    )
    assert status == 0
    assert "warning: step 1: 8 of 16 samples have no reward and are left out: reward 'mine'" in err
    metrics = lines("runs/grpo/metrics.jsonl")[-1]
    assert metrics["num_failed_rewards"] == 8 and metrics["rewards/mine/mean"] == 0.25
    assert metrics["reward"] == 0.25  # with zeros in the place of what failed it would be 0.125
    samples = lines("runs/grpo/samples.jsonl")
    failed = [s for s in samples if s["error"]][:8]
    assert len(failed) == 8 and all(s["reward"] is None for s in failed)
    for kind, reason in (
        ("raise", "RuntimeError: no luck (line 12 of rewards.py)"),
        ("hang", "no answer within 0.5 s; its worker was killed"),
        ("nan", "it returned nan; expected a finite number"),
        ("text", "it returned str; expected a number"),
    ):
        errors = [s["error"] for s in failed if s["reference"] == kind]
        assert len(errors) == 2 and all(reason in error for error in errors)
        prompt = f"prompt '1{kinds.index(kind)}+01='"
        assert all(prompt in error and "completion '" in error for error in errors)


def test_too_many_failures_at_once(refused):
    said = refused(GRPO.replace(":length", ":broken"))
    assert said.startswith(
        "16 of 16 samples have no reward, more than max_failure_frac=0.2 allows. The first: reward "
        "'mine' (HOME/rewards.py:broken): RuntimeError: no luck (line 7 of rewards.py); prompt '"
    )


def test_too_many_failures_later_stop_the_run_and_what_it_has_is_saved(run):
    text = GRPO.replace(":length", ":tires")
    words = ("rewards.num_workers=1", "loop.steps=4", "loop.checkpoint_every=100")
    status, err = run(text, *words)
    assert status == 2
    first, second = err[err.index("alignjax: ") :].splitlines()
    assert first.startswith("alignjax: 16 of 16 samples have no reward, more than")
    assert "RuntimeError: tired" in first
    assert second.startswith("stopped in step 3; step 2 is saved, and ")
    assert os.listdir("runs/grpo/checkpoints") == ["2"] and not Path("runs/grpo/model").exists()
    # A new process, a new worker: it goes on from there to the end.
    status, err = run(text, *words)
    assert status == 0 and "resumed from step 2 of 4" in err
    steps = [x["step"] for x in lines("runs/grpo/metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4] and Path("runs/grpo/model").is_dir()


# --- run directories ----------------------------------------------------------------------------


def test_a_directory_of_another_config(run):
    assert run(SFT, "loop.steps=1")[0] == 0
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    assert any("checkpoints/1/" in str(p) for p in before)
    changed = ("loop.steps=2", "data.packed=false")
    message = (
        "alignjax: runs/sft holds a run of another config (there -> now):\n"
        "  loop.steps: 1 -> 2\n"
        "  data.packed: true -> false\n"
        "choose another name (name=...), undo the change, or delete the directory\n"
    )
    assert run(SFT, *changed) == (2, message)
    assert {p: p.read_bytes() for p in before} == before
    shutil.rmtree("runs/sft/model")  # as if it had been stopped before its end
    assert run(SFT, *changed) == (2, message)
    status, err = run(SFT, "loop.steps=1")
    assert status == 0 and "resumed from step 1 of 1" in err and Path("runs/sft/model").is_dir()
    assert run(SFT, *changed, "name=other")[0] == 0


def test_a_run_that_never_trained_may_be_mended(run, tmp_path):
    assert run(SFT, "data.train=no.jsonl")[0] == 2
    assert run(SFT, "loop.steps=1")[0] == 0


def test_inputs_that_changed_since(run, home):
    """Whether the run is finished or to be continued: its result would be of both."""
    shutil.copytree(home / "model", "base")
    command = (SFT, "model.path=base", "loop.steps=1")
    assert run(*command)[0] == 0
    assert run(*command)[0] == 0
    os.utime("base/model.safetensors")  # the time alone is no change
    assert run(*command)[0] == 0
    before = Path("base/model.safetensors").read_bytes()
    weights = load_file("base/model.safetensors")
    save_file({name: 2 * x for name, x in weights.items()}, "base/model.safetensors")
    message = (
        "alignjax: runs/sft was made from another model.path base: its content has changed since. "
        "Choose another name (name=...), bring it back, or delete the directory\n"
    )
    assert run(*command) == (2, message)
    shutil.rmtree("runs/sft/model")
    assert run(*command) == (2, message)
    Path("base/model.safetensors").write_bytes(before)
    assert run(*command)[0] == 0
    shutil.rmtree("base")  # what is finished needs it no more
    assert run(*command)[0] == 0


def test_a_config_of_the_users_own_is_not_overwritten(run, home):
    Path("mine").mkdir()
    text = "# my notes\n" + SFT.replace("HOME", str(home))
    Path("mine/config.yaml").write_text(text)
    status, err = run(SFT, "name=mine", "output_dir=.")
    assert status == 2
    assert err == (
        "alignjax: mine is there, but no run made it (no inputs.json); move it away, or choose "
        "another name (name=...)\n"
    )
    assert Path("mine/config.yaml").read_text() == text


def test_names_and_places_that_cannot_be(refused):
    assert "name: '../x' names no directory of its own" in refused(SFT, "name=../x")
    Path("file").write_text("")
    assert refused(SFT, "output_dir=file") == (
        "file/sft cannot be written: Not a directory: file/sft; choose another output_dir"
    )


def test_a_name_that_looks_like_a_number(run):
    assert run(SFT, 'name="1e-4"', "loop.steps=1")[0] == 0
    assert main(["export", "runs/1e-4", "exported"]) == 0


def test_a_second_process(run, refused):
    with lock(Path("runs/sft"), Path("runs/sft/.lock")):
        assert refused(SFT) == "runs/sft: another process is at work in it"
    assert os.listdir("runs/sft") == [".lock"]


# --- recipes ------------------------------------------------------------------------------------


RECIPE = """\
name: recipe
stages:
  world:
    phase: files
    function: alignjax.recipes.chains.write
    args: {num_questions: 5, num_drills: 5, num_train: 2, num_test: 1}
  grpo:
    phase: grpo
    model: {path: HOME/model}
    data:
      train: ${world}/train.jsonl
      text: {fields: {prompt: prompt, reference: reference}}
    rollout: {num_prompts: 2, group_size: 4}
    optimizer:
      learning_rate: 1e-3
    rewards:
      functions:
        mine: {function: verify.exact}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("${world}", "${wolrd}", "c.yaml:11: stages.grpo.data.train: ${wolrd} is no earlier stage; "
         "there are world"),
        ("learning_rate", "lerning_rate", "c.yaml:15: unknown key 'lerning_rate' in "
         "stages.grpo.optimizer; did you mean 'learning_rate'?"),
        ("1e-3", "fast", "c.yaml:15: stages.grpo.optimizer.learning_rate: expected a number, got "
         "the text 'fast'"),
        ("phase: grpo", "phase: grop", "c.yaml:8: stages.grpo.phase: expected "
         f"{' or '.join(map(repr, STAGES))}, got the text 'grop'; did you mean 'grpo'?"),
        ("group_size: 4", "group_size: 1", "c.yaml:13: stages.grpo.rollout.group_size: "
         "group_size=1 gives no baseline; use at least 2"),
        ("verify.exact", "verify.exact, wieght: 2", "c.yaml:18: unknown key 'wieght' in "
         "stages.grpo.rewards.functions.mine; did you mean 'weight'?"),
        ("chains.write", "chains.wriet", "stages.world.function: expected "
         "package.module.function, got 'alignjax.recipes.chains.wriet': module "
         "'alignjax.recipes.chains' has no attribute 'wriet'"),
        ("num_drills", "num_dirlls", "stages.world.args: alignjax.recipes.chains.write: got an "
         "unexpected keyword argument 'num_dirlls'"),
    ],
)  # fmt: skip
def test_a_recipe(refused, old, new, message):
    assert RECIPE.count(old) == 1
    assert refused(RECIPE.replace(old, new)) == message
    assert not Path("runs").exists()


# --- as a real process --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("learning_rate", "lerning_rate",
         "alignjax: c.yaml:10: unknown key 'lerning_rate' in optimizer; did you mean "
         "'learning_rate'?\n"),
        ("HOME/world/corpus.jsonl", "bad.jsonl",
         "alignjax: bad.jsonl:7: broken JSON: Expecting value (column 10)\n"),
    ],
)  # fmt: skip
def test_as_a_process(home, tmp_path, old, new, message):
    (tmp_path / "c.yaml").write_text(SFT.replace(old, new).replace("HOME", str(home)))
    (tmp_path / "bad.jsonl").write_text('{"text": "1"}\n' * 6 + '{"text": }\n')
    path = os.pathsep.join([str(REPO), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, "-m", "alignjax", "run", "c.yaml"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
