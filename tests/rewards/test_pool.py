"""Rewards that raise, hang, die, print and lie: nothing is lost but the sample that did it."""

import contextlib
import datetime
import decimal
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.core.types import Sample
from alignjax.rewards.combine import FunctionConfig, RewardConfig
from alignjax.rewards.pool import RewardPool

SOURCE = """
import os, signal, subprocess, sys, time

def act(prompt, completion, reference, num_tokens, **fields):
    if completion == "raise":
        raise KeyError("lost")
    if completion == "sleep":
        time.sleep(60)
    if completion == "spin":  # holds the interpreter: no thread of the worker can run
        sum(range(10**11))
    if completion == "exit":
        sys.exit(3)
    if completion == "_exit":
        os._exit(7)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "memory":
        bytearray(10**15)
    if completion == "print":
        print("noise " * 10)
        print("[0, \\"a\\", null, null]", file=sys.stderr)
        os.system("echo more noise")
    if completion == "print a lot":
        print("x" * 10_000_000)
    if completion == "read":
        return len(sys.stdin.read()) + 1
    if completion == "child":
        pid = subprocess.Popen(["sleep", "61"]).pid
        with open(reference, "w") as file:
            file.write(str(pid))
        time.sleep(60)
    if completion == "child elsewhere" or completion == "child left behind":
        pid = subprocess.Popen(["sleep", "62"], start_new_session=True).pid
        with open(reference, "w") as file:
            file.write(str(pid))
        if completion == "child elsewhere":
            time.sleep(60)
    if completion == "fork":
        return 0.0 if os.fork() == 0 else 1.0
    if completion == "fork raises":
        if os.fork() == 0:
            raise KeyError("child")
        os.wait()
    if completion == "junk":
        for fd in range(3, 12):
            try:
                os.write(fd, fields["junk"].encode())
            except OSError:
                pass
    if completion == "nap":
        time.sleep(0.05)
    if completion == "fields":
        return {"tokens": num_tokens, "list": sum(fields["scores"]), "reward": reference["x"]}
    return {"nan": float("nan"), "string": "1.0", "none": None, "long": "x" * 10**7}.get(
        completion, 1.0
    )

def pid(prompt, completion, reference):
    return os.getpid()

def number(completion):
    return float(completion) if completion != "fork" else act("q", "fork", None, 1)

def text(when, at, number, ident, utf8, image, count, completion):
    got = [when, at, number, ident, utf8, image, count, completion]
    assert got == ["2026-11-24", "2026-11-24T09:30:00", "1.50",
                   "12345678-1234-5678-1234-567812345678", "é", None, 3, "the real one"], got
    return 1.0

def change(reference):
    reference.append(9)
    return 0.0

def size(reference):
    return len(reference)

def forever(prompt, completion, reference):
    with open(reference, "a") as file:
        if completion == "child":
            file.write(f"{subprocess.Popen(['sleep', '63']).pid}\\n")
        file.write(f"{os.getpid()}\\n")
    sum(range(10**11)) if completion == "spin" else time.sleep(60)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "acts.py"
    path.write_text(SOURCE)
    return path


def make_config(source: Path, name: str = "act", **limits: object) -> RewardConfig:
    functions = {"a": FunctionConfig(function=f"{source}:{name}")}
    return RewardConfig(**{"functions": functions, "timeout_s": 0.3, "num_workers": 1, **limits})


@pytest.fixture(scope="module")
def pool(source: Path) -> Iterator[RewardPool]:
    with RewardPool(make_config(source)) as pool:
        yield pool


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        num_threads = len(os.listdir(f"/proc/{pid}/task"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    # The first thread is a zombie at once; the parent may not wait for it before the others end.
    return state != "Z" or num_threads > 1


def wait_until(condition, limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not (done := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(done)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("raise", r"KeyError: 'lost' \(line 6 of acts.py\)"),
        ("sleep", "no answer within 0.3 s; its worker was killed"),
        ("spin", "no answer within 0.3 s; its worker was killed"),
        ("exit", "SystemExit: 3"),
        ("_exit", "its worker process ended with exit code 7"),
        ("segfault", "its worker process was ended by SIGSEGV"),
        ("memory", "MemoryError"),
        ("nan", "it returned nan; expected a finite number"),
        ("string", "it returned str; expected a number"),
        ("none", "it returned NoneType; expected a number"),
        ("long", "it returned str; expected a number"),
    ],
)
def test_only_the_sample_at_fault_has_no_score(pool: RewardPool, act: str, reason: str) -> None:
    samples = [Sample("q", c) for c in ["ok", "ok", act, "ok", "ok", act, "ok"]]
    scores = pool(samples)
    assert [s.value for s in scores] == [1.0, 1.0, None, 1.0, 1.0, None, 1.0]
    for score in (scores[2], scores[5]):
        with pytest.raises(ValueError, match=reason):
            raise ValueError(score.error)
        assert "reward 'a' (" in score.error and "acts.py:act)" in score.error
        assert f"prompt 'q', completion {act!r}" in score.error
        assert len(score.error) < 1000


def test_the_batch_of_one_message_is_not_blamed_for_one_sample(source: Path) -> None:
    """1,000 samples: many to a message, several of them bad, two workers."""
    with RewardPool(make_config(source, num_workers=2)) as pool:
        bad = {17: "sleep", 18: "_exit", 400: "raise", 999: "sleep"}
        start = time.perf_counter()
        scores = pool([Sample("q", bad.get(i, "ok")) for i in range(1000)])
        assert {i for i, s in enumerate(scores) if s.value is None} == set(bad)
        assert all(s.value == 1.0 for i, s in enumerate(scores) if i not in bad)
        assert "within 0.3 s" in scores[17].error and "exit code 7" in scores[18].error
        assert time.perf_counter() - start < 20


@pytest.mark.parametrize("act", ["print", "print a lot", "read"])
def test_printing_and_reading_do_not_disturb(pool: RewardPool, act: str, capfd) -> None:
    assert [s.value for s in pool([Sample("q", act), Sample("q", "ok")])] == [1.0, 1.0]
    assert capfd.readouterr() == ("", "")


def test_prints_can_be_kept(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "made" / "rewards.log"
    with RewardPool(make_config(source), log_path=path) as pool:
        pool([Sample("q", "print")])
    assert "more noise" in path.read_text()


def test_long_samples_are_passed_whole_and_shortened_in_errors(pool: RewardPool) -> None:
    """Longer than a pipe holds, also to a worker that does not read because it hangs."""
    big = "é\n\ud800" * 200_000
    scores = pool([Sample(big, "sleep"), Sample(big, "ok"), Sample(big, "raise")])
    assert [s.value for s in scores] == [None, 1.0, None]
    assert all(len(s.error) < 1000 for s in (scores[0], scores[2]))


def test_references_and_fields_arrive_as_json(pool: RewardPool) -> None:
    sample = Sample("q", "fields", {"x": np.float32(0.25)}, {"scores": np.array([1, 2])}, 9)
    (score,) = pool([sample])
    assert score.value == 0.25
    assert score.parts == {"a": 0.25, "a/tokens": 9.0, "a/list": 3.0}
    loop: list = []
    loop.append(loop)
    scores = pool([Sample("q", "ok", object()), Sample("q", "ok", loop), Sample("q", "ok")])
    assert [s.value for s in scores] == [None, None, 1.0]
    assert "object is not a JSON value" in scores[0].error


def test_columns_of_parquet_arrive_as_json(source: Path) -> None:
    fields = {
        "when": datetime.date(2026, 11, 24),
        "at": datetime.datetime(2026, 11, 24, 9, 30),
        "number": decimal.Decimal("1.50"),
        "ident": uuid.UUID("12345678-1234-5678-1234-567812345678"),
        "utf8": "é".encode(),
        "image": b"\xff\xd8",
        "count": np.int64(3),
        "completion": "a column of that name",
    }
    with RewardPool(make_config(source, "text")) as pool:
        good, bad = pool(
            [Sample("q", "the real one", None, f) for f in (fields, {"colour": {"a": 1j}})]
        )
    assert good.value == 1.0, good.error
    assert bad.value is None
    assert "field 'colour' cannot be given to it: complex is not a JSON value" in bad.error


def test_a_function_does_not_see_what_another_changed(source: Path) -> None:
    functions = {n: FunctionConfig(function=f"{source}:{n}") for n in ("change", "size")}
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        (score,) = pool([Sample("q", "c", [1])])
    assert score.parts == {"change": 0.0, "size": 1.0}


def test_the_limit_is_on_a_call_not_on_a_message_of_many(source: Path) -> None:
    with RewardPool(make_config(source)) as pool:
        assert [s.value for s in pool([Sample("q", "nap")] * 20)] == [1.0] * 20


@pytest.mark.parametrize("names", [["number"], ["number", "act"]])
@pytest.mark.parametrize("num_samples", [9, 64])
def test_a_fork_that_comes_back_says_nothing(source: Path, names, num_samples) -> None:
    functions = {n: FunctionConfig(function=f"{source}:{n}") for n in names}
    completions = [str(i) for i in range(num_samples)]
    completions[1] = "fork"
    config = RewardConfig(functions=functions, num_workers=1)
    with RewardPool(config) as pool:
        scores = pool([Sample("q", c) for c in completions])
    values = [s.parts["number"] for s in scores]
    assert values == [float(i) for i in range(num_samples)]


def test_a_fork_that_raises_says_nothing(pool: RewardPool) -> None:
    scores = pool([Sample("q", c) for c in ("ok", "fork raises", "ok")])
    assert [s.value for s in scores] == [1.0] * 3


@pytest.mark.parametrize(
    "junk",
    [
        "junk",
        "junk\n",
        "7\n",
        "[0]\n",
        '[0, "a", {"": 0.0}, null]\n',  # Another sample's turn.
        '[1, "b", {"": 0.0}, null]\n',
        '[1, "a", {}, null]\n',
        '[1, "a", {"": null}, null]\n',
        '[1, "a", null, null]\n',
        '{"fault": null}\n',
        "[" * 10_000 + "\n",
    ],
)
def test_what_is_no_outcome_costs_its_sample_only(pool: RewardPool, junk: str) -> None:
    acts = ("ok", "junk", "ok")
    scores = pool([Sample("q", act, fields={"junk": junk}) for act in acts])
    assert [s.value for s in scores] == [1.0, None, 1.0]
    assert "its worker wrote something else than outcomes" in scores[1].error
    assert pool([Sample("q", "ok")])[0].value == 1.0


def test_nothing_in_nothing_out(pool: RewardPool) -> None:
    assert pool([]) == []


def test_memory_limit(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "hungry.py"
    file.write_text("def eat(completion):\n    return len(bytearray(int(completion))) > 0\n")
    with RewardPool(make_config(file, "eat", max_memory_mb=512)) as pool:
        scores = pool([Sample("q", "1000"), Sample("q", str(2**31)), Sample("q", "1000")])
    assert [s.value for s in scores] == [1.0, None, 1.0]
    assert "MemoryError" in scores[1].error


def test_weights_parts_and_the_first_failing_function(source: Path) -> None:
    functions = {
        "accuracy": FunctionConfig(
            function="verify.exact", weight=0.9, args={"required_tags": ["think", "answer"]}
        ),
        "format": FunctionConfig(function="format.tags", weight=0.1),
    }
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        right, wrong, shapeless, faulty = pool(
            [
                Sample("q", "<think></think><answer>7</answer>", "7"),
                Sample("q", "<think></think><answer>8</answer>", "7"),
                Sample("q", "<answer>7</answer>", "7"),
                Sample("q", "<think></think><answer>7</answer>", None),
            ]
        )
    assert right.value == pytest.approx(1.0) and right.parts == {"accuracy": 1.0, "format": 1.0}
    assert wrong.value == pytest.approx(0.1) and wrong.parts == {"accuracy": 0.0, "format": 1.0}
    assert shapeless.value == 0.0
    assert faulty.value is None and "reward 'accuracy' (verify.exact)" in faulty.error


def test_the_function_that_hangs_is_named(source: Path) -> None:
    functions = {
        "shape": FunctionConfig(function="format.tags"),
        "acts": FunctionConfig(function=f"{source}:act"),
        "last": FunctionConfig(function="format.tags"),
    }
    config = RewardConfig(functions=functions, timeout_s=0.3, num_workers=1)
    with RewardPool(config) as pool:
        scores = pool([Sample("q", c) for c in ("ok", "sleep", "_exit", "raise", "ok")])
    assert [s.value for s in scores] == [1.0, None, None, None, 1.0]
    assert all("reward 'acts' (" in s.error for s in scores[1:4])


def test_sympy_can_be_killed() -> None:
    functions = {"a": FunctionConfig(function="verify.math")}
    config = RewardConfig(functions=functions, timeout_s=1.5, num_workers=1)
    samples = [Sample("q", f"\\boxed{{{x}}}", "7") for x in ("7", "9^{9^{9^{9^{9}}}}+1", "8")]
    with RewardPool(config) as pool:
        scores = pool(samples)
    assert (scores[0].value, scores[2].value) == (1.0, 0.0)
    assert scores[1].value in (None, 0.0)  # by math-verify's version


def test_functions_are_loaded_before_the_run(source: Path) -> None:
    with pytest.raises(UserError, match=r"no function 'atc'.*Did you mean 'act'"):
        RewardPool(make_config(source, "atc"))
    bad = FunctionConfig(function="verify.exact", args={"plcae": "boxed"})
    with pytest.raises(UserError, match="no argument 'plcae'"):
        RewardPool(RewardConfig(functions={"a": bad}))


def test_module_that_ends_the_worker(tmp_path: Path) -> None:
    (tmp_path / "fatal.py").write_text("import os\nos._exit(9)\n")
    with pytest.raises(UserError, match=r"could not load .*exit code 9"):
        RewardPool(make_config(tmp_path / "fatal.py"))


def test_workers_are_reused_and_do_not_outlive_the_pool(source: Path) -> None:
    with RewardPool(make_config(source, "pid", num_workers=2)) as pool:
        pids = {int(s.value) for _ in range(3) for s in pool([Sample("q", "c")] * 50)}
        assert 1 <= len(pids) <= 2 and os.getpid() not in pids
        victim = pids.pop()
        os.kill(victim, signal.SIGKILL)  # while idle: nobody's fault
        assert wait_until(lambda: not is_alive(victim))
        after = {int(s.value) for s in pool([Sample("q", "c")] * 50)}
        assert victim not in after
    assert not any(is_alive(p) for p in pids | after)
    with pytest.raises(RuntimeError, match="closed"):
        pool([Sample("q", "c")])


def test_children_of_a_hung_worker_are_killed_too(pool: RewardPool, tmp_path: Path) -> None:
    (score,) = pool([Sample("q", "child", str(tmp_path / "pid"))])
    assert score.value is None
    assert wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_children_in_sessions_of_their_own_are_killed_too(source: Path, tmp_path: Path) -> None:
    with RewardPool(make_config(source, timeout_s=1.0)) as pool:
        files = [tmp_path / "hung", tmp_path / "back"]
        acts = ("child elsewhere", "child left behind")
        samples = [Sample("q", act, str(f)) for act, f in zip(acts, files, strict=True)]
        assert [s.value for s in pool(samples)] == [None, 1.0]
        hung, back = (int(f.read_text()) for f in files)
        assert wait_until(lambda: not is_alive(hung))
        assert is_alive(back)
    assert wait_until(lambda: not is_alive(back))


def test_two_threads_can_score(pool: RewardPool) -> None:
    results: list[list[float | None]] = []
    threads = [
        threading.Thread(
            target=lambda: results.append([s.value for s in pool([Sample("q", "ok")] * 20)])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[1.0] * 20] * 4


def test_an_interrupt_leaves_a_usable_pool(source: Path) -> None:
    with RewardPool(make_config(source, timeout_s=30.0)) as pool:
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            pool([Sample("q", "sleep"), Sample("q", "ok")])
        assert [s.value for s in pool([Sample("q", "ok")] * 3)] == [1.0] * 3


PARENT = """
import sys
from alignjax.core.types import Sample
from alignjax.rewards.combine import FunctionConfig, RewardConfig
from alignjax.rewards.pool import RewardPool
config = RewardConfig(
    functions={"a": FunctionConfig(function=sys.argv[1] + ":forever")}, timeout_s=50.0
)
with RewardPool(config) as pool:
    pool([Sample("q", sys.argv[3], sys.argv[2])] * 2)
"""


@pytest.fixture
def parent(request: pytest.FixtureRequest, source: Path, tmp_path: Path):
    """A process whose two workers hang, and the pids of these and of what they started."""
    file = tmp_path / "pids"
    command = [sys.executable, "-c", PARENT, str(source), str(file), request.param]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    num = 4 if request.param == "child" else 2
    assert wait_until(lambda: file.exists() and len(file.read_text().split()) == num)
    pids = [int(p) for p in file.read_text().split()]
    yield process, pids
    for pid in (process.pid, *pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("parent", ["sleep", "spin", "child"], indirect=True)
def test_a_killed_parent_leaves_no_worker(parent) -> None:
    process, pids = parent
    assert all(is_alive(p) for p in pids)
    process.kill()
    assert wait_until(lambda: not any(is_alive(p) for p in pids))


@pytest.mark.parametrize("parent", ["sleep"], indirect=True)
def test_ctrl_c_prints_nothing_of_the_workers(parent) -> None:
    process, pids = parent
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert stderr.count("Traceback") == 1 and stderr.rstrip().endswith("KeyboardInterrupt")
    assert wait_until(lambda: not any(is_alive(p) for p in pids))


def test_speed_is_printed(pool: RewardPool) -> None:
    samples = [Sample("q" * 50, "ok" * 50)] * 1000
    start = time.perf_counter()
    scores = pool(samples)
    print(f"{len(samples) / (time.perf_counter() - start):,.0f} samples/s on one worker")
    assert [s.value for s in scores] == [1.0] * 1000


def test_functions_are_called_for_their_prompts_alone(source: Path) -> None:
    """`act` dies of a completion "_exit", `verify.exact` of a missing reference."""
    functions = {
        "right": FunctionConfig(function="verify.exact", weight=0.9, where={"kind": "sum"}),
        "format": FunctionConfig(function="format.tags", weight=0.1),
        "acts": FunctionConfig(function=f"{source}:act", where={"kind": "act"}),
    }
    answer = "<think></think><answer>7</answer>"
    with RewardPool(RewardConfig(functions=functions, num_workers=1)) as pool:
        found = pool(
            [
                Sample("q", answer, "7", {"kind": "sum"}),
                Sample("q", answer, None, {"kind": "other"}),
                Sample("q", "_exit", None, {"kind": "other"}),
                Sample("q", "_exit", None, {"kind": "act"}),
                Sample("q", answer, "7", {"knid": "sum"}),
                Sample("q", answer, "8", {"kind": "sum"}),
            ]
        )
    assert [s.parts for s in found[:3]] == [
        {"right": 1.0, "format": 1.0}, {"format": 1.0}, {"format": 0.0},
    ]  # fmt: skip
    assert [s.value for s in found] == pytest.approx([1.0, 0.1, 0.0, None, None, 0.1])
    assert "reward 'acts'" in found[3].error and "exit code 7" in found[3].error
    assert "reward 'right': where: the record has no field 'kind'" in found[4].error
    only = RewardConfig(functions={"right": functions["right"]}, num_workers=1)
    with RewardPool(only) as pool:
        assert pool([Sample("q", answer, "7", {"kind": "other"})])[0].parts == {}
