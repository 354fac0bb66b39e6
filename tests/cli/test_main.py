"""The command line: help at once, one message for an error, an exit status that scripts can use."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignjax.cli import main as cli
from alignjax.cli.runtime import terminable
from alignjax.core.errors import Terminated, UserError

HEAVY = ("jax", "numpy", "pydantic", "yaml", "flax", "matplotlib", "rich")
VERBS_WRITTEN = [v for v in cli.VERBS if Path(cli.__file__).with_name(f"{v}.py").exists()]


@pytest.fixture
def verb(monkeypatch):
    """Makes `run` a verb that does what the test says; returns the arguments that it was given."""
    seen = []

    def install(action=lambda args: None):
        def add_arguments(parser):
            parser.add_argument("config")
            parser.add_argument("overrides", nargs="*")
            parser.add_argument("--print-config", action="store_true")

        def act(args):
            seen.append(args)
            return action(args)

        module = SimpleNamespace(add_arguments=add_arguments, main=act)
        monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
        return seen

    return install


def raiser(error):
    def act(args):
        raise error

    return act


def test_words_of_a_verb_may_come_in_any_order(verb):
    seen = verb()
    words = ["run", "a.yaml", "x=1", "--print-config", "y=2"]
    assert cli.main(words) == 0
    assert (seen[0].config, seen[0].print_config) == ("a.yaml", True)
    assert cli.main(["--debug", *words]) == cli.main([*words, "--debug"]) == 0
    assert all(args.overrides == ["x=1", "y=2"] for args in seen) and len(seen) == 3


def test_status_of_the_verb_is_that_of_the_process(verb):
    verb(lambda args: 7)
    assert cli.main(["run", "a"]) == 7


def test_user_error_is_its_message_alone(verb, capsys):
    verb(raiser(UserError("a.yaml:3: unknown key 'x'")))
    assert cli.main(["run", "a.yaml"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "alignjax: a.yaml:3: unknown key 'x'\n")
    assert cli.main(["run", "a.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_one_line_and_the_way_to_see_more(verb, capsys):
    verb(raiser(RuntimeError("shapes differ:\n  [1]\n  [2]")))
    assert cli.main(["run", "a.yaml"]) == 1
    assert capsys.readouterr().err == (
        "alignjax: RuntimeError: shapes differ: [1] [2]\nrun again with --debug to see where\n"
    )
    assert cli.main(["--debug", "run", "a.yaml"]) == 1
    assert "raise error\nRuntimeError: shapes differ:\n  [1]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "status", "word"),
    [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 75, "terminated")],
)
def test_interrupt(verb, capsys, kind, status, word):
    verb(raiser(kind()))
    assert cli.main(["run", "a.yaml"]) == status
    assert f"alignjax: {word}" in capsys.readouterr().err


def test_terminable_raises_once_and_leaves_the_signal_as_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_wrong_usage_exits_2(capsys):
    for words in (["nope"], ["--nope"], ["tokenizer", "train", "x"], ["tokenizer", "--nope"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2
    assert "invalid choice: 'nope'" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in cli.VERBS) and "examples:" in text


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS_WRITTEN)])
def test_help_imports_nothing_heavy_and_is_instant(words):
    code = (
        "import sys; from alignjax.cli.main import main\n"
        f"try: main({[*words, '--help']})\n"
        f"finally: print([m for m in {HEAVY} if m in sys.modules])"
    )
    times = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
        assert "usage: alignjax" in done.stdout
        if times[-1] < 0.5:
            break
    assert min(times) < 0.5


def test_module_runs_and_a_reader_may_leave():
    done = subprocess.run(
        [sys.executable, "-m", "alignjax", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("alignjax 0.")
    code = (
        "from alignjax.cli import main as m\n"
        "m._dispatch = lambda words: print('y' * 10**6)\n"
        "m.main()"
    )
    pipe = '"$0" -c "$1" | head -c 1'
    done = subprocess.run(
        ["bash", "-c", pipe, sys.executable, code], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("y", "")
