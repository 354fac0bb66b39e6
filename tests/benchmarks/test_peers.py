"""The side-by-side benchmark: what it makes of runs, with workers that only pretend to work."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))

import peers  # noqa: E402
from peer import measure, process, table, tasks, variants  # noqa: E402
from peer.workers import slots  # noqa: E402

FAKE = f"""
import os, sys, time
sys.path.insert(0, {str(process.WORKERS)!r})
import protocol

def sft(spec, gate):
    print("a library that prints to standard output")
    how = spec["options"]
    if "raises" in how:
        raise ValueError("no such weights")
    if "dies" in how:
        print("out of memory", file=sys.stderr, flush=True)
        os._exit(7)
    if "not_beside" in how and os.path.exists(how["not_beside"]):
        os.remove(how["not_beside"])
        os.kill(os.getpid(), 9)
    runs = 0
    def run():
        nonlocal runs
        runs += 1
        if runs == how.get("fails_at"):
            raise RuntimeError("broke later")
        time.sleep(how.get("seconds", 0.01) * (20 if runs == 1 else 1))
        return {{"tokens": how.get("tokens", 64), "loss": how.get("loss", 2.0)}}
    gate.serve(run)

protocol.main({{"sft": sft}})
"""
TASK = tasks.TASKS["sft"].quick()  # 2 rows of 32 tokens


@pytest.fixture
def bench(tmp_path):
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE)
    names = ("alignjax", "trl", "tunix")
    libraries = {name: process.Library(name, sys.executable, script) for name in names}
    limits = {"float32_flops": 1e12, "bfloat16_flops": 2e12, "bytes": 1e10}
    return measure.Bench(
        tmp_path, libraries, [], "cpu", rounds=3, budget_s=100.0, timeout_s=30.0, limits=limits
    )


def test_variants_take_turns_and_what_fails_is_kept_with_its_error(bench):
    make = variants.Variant
    chosen = [
        make("alignjax", "float32", options={"seconds": 0.01}),
        make("trl", "default", options={"seconds": 0.04}),
        make("trl", "best", options={"seconds": 0.02}),
        make("tunix", "default", options={"raises": True}),
        make("tunix", "dead", options={"dies": True}),
        make("tunix", "late", options={"fails_at": 3}),
        make("tunix", "none", missing="has no such thing"),
    ]
    rows, alternates = measure.measure(bench, "sft", TASK, "T", chosen)
    assert [(r["library"], r["variant"]) for r in rows] == [(v.library, v.name) for v in chosen]
    ours, default, best, raised, dead, late, none = rows
    for found, seconds in ((ours, 0.01), (default, 0.04), (best, 0.02)):
        warm_up = measure.WARM_UP[found["library"]]
        assert len(found["seconds"]["all"]) == 3 and found["tokens"] == [64] * (warm_up + 3)
        assert found["seconds"]["min"] >= seconds
        assert found["warm_up_seconds"] > 0 and found["peak_gib"] > 0
    assert raised["error"] == "ValueError: no such weights"
    assert dead["error"].startswith("ended with exit code 7: ")
    assert dead["error"].endswith(" | out of memory")  # the end of what it printed
    assert late["error"] == "RuntimeError: broke later"
    assert none["error"] == "has no such thing"
    assert alternates
    ratio = table.ratios(rows)
    assert ratio == {"trl": {"float32": pytest.approx(
        ours["tokens_per_second"] / best["tokens_per_second"])}}  # fmt: skip
    text = table.table("sft", rows, {"trl": 1.0}, ["other work"])
    assert "alignjax float32" in text and "ValueError: no such weights" in text
    assert "as fast as trl at its best" in text and "NOT THE SAME WORK: other work" in text


def test_without_memory_for_all_they_run_one_after_the_other(bench, monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda: 0.0)
    chosen = [variants.Variant(name, "default") for name in ("alignjax", "trl")]
    rows, alternates = measure.measure(bench, "sft", TASK, "T", chosen)
    assert not alternates
    assert [len(r["seconds"]["all"]) for r in rows] == [3, 3]


def test_who_is_killed_beside_others_is_measured_alone(bench, tmp_path):
    (tmp_path / "full").touch()
    large = variants.Variant("tunix", "default", options={"not_beside": str(tmp_path / "full")})
    chosen = [variants.Variant("alignjax", "float32"), large, variants.Variant("trl", "default")]
    rows, alternates = measure.measure(bench, "sft", TASK, "T", chosen)
    assert not alternates
    assert [len(r["seconds"]["all"]) for r in rows] == [3, 3, 3]
    (tmp_path / "full").touch()
    (row,), _ = measure.measure(bench, "sft", TASK, "T", [large])
    assert row["error"].startswith("ended with exit code -9: ")


def test_a_slow_variant_gets_no_more_rounds_than_its_budget(bench):
    bench = dataclasses.replace(bench, budget_s=0.0)
    (row,), _ = measure.measure(bench, "sft", TASK, "T", [variants.Variant("trl", "default")])
    assert len(row["seconds"]["all"]) == 1


def test_a_worker_that_does_not_answer(bench):
    bench = dataclasses.replace(bench, timeout_s=2.0)
    slow = variants.Variant("trl", "default", options={"seconds": 1.0})  # 20 s of warm-up
    (row,), _ = measure.measure(bench, "sft", TASK, "T", [slow])
    assert row["error"] == "no answer within 2 s"


def replies(*seconds, tokens=100, loss=None):
    more = {} if loss is None else {"loss": loss}
    return [{"seconds": s, "tokens": tokens, "peak_bytes": 2**30, **more} for s in seconds]


def test_the_first_run_is_warm_up_and_shares_are_of_the_median():
    found = table.row(
        "trl", "best", replies(9.0, 2.0, 4.0, 1.0), prepare_s=5.0, num_warm_up=1,
        work={"flops": 3e9, "bytes": 4e6}, limits={"flops": 6e9, "bytes": 8e6},
    )  # fmt: skip
    assert found["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0, "all": [2.0, 4.0, 1.0]}
    assert found["tokens_per_second"] == 50
    assert found["warm_up_seconds"] == 5 + 9 - 2
    found = table.row(
        "tunix", "best", replies(9.0, 5.0, 2.0), prepare_s=5.0, num_warm_up=2,
        work={"flops": 3e9, "bytes": 4e6}, limits={"flops": 6e9, "bytes": 8e6},
    )  # fmt: skip
    assert found["seconds"]["all"] == [2.0] and found["warm_up_seconds"] == 5 + (9 - 2) + (5 - 2)
    assert (found["flops_share"], found["bytes_share"], found["peak_gib"]) == (0.25, 0.25, 1.0)


def test_what_is_not_the_same_work_is_found():
    def row(name, variant, tokens, loss):
        return table.row(
            name, variant, replies(2.0, 1.0, tokens=tokens, loss=loss),
            prepare_s=0.0, num_warm_up=1,
            work={"flops": 1.0, "bytes": 0.0}, limits={"flops": 1.0, "bytes": 1.0},
        )  # fmt: skip

    ours = row("alignjax", "float32", 64, 7.60072)
    same = row("trl", "best", 64, 7.60073)
    half = row("alignjax", "bfloat16", 64, 7.59)
    assert table.disagreements([ours, same, half], 64, True) == []
    fewer, other = row("tunix", "default", 60, 7.60072), row("trl", "default", 64, 7.6025)
    found = table.disagreements([ours, fewer, other], 64, True)
    assert found == [
        "tunix default: [60] tokens in a run, expected 64",
        "trl default: first loss 7.6025, of alignjax 7.60072",
    ]
    assert table.disagreements([ours, fewer, other], None, False) == []
    assert table.disagreements([], 64, True) == []


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_best_of_each_peer_is_its_default_where_that_is_all_there_is(name):
    args = argparse.Namespace(best=True, dtypes=["float32"], peers=["trl", "tunix"])
    found = {v.library: v.name for v in peers.chosen(args, tasks.TASKS[name])}
    everything = variants.variants(tasks.TASKS[name])
    assert found["alignjax"] == "float32" and len(found) == 3
    for library in ("trl", "tunix"):
        names = {v.name for v in everything if v.library == library}
        assert found[library].startswith("best" if "best" in names else "default")


def test_only_libraries_that_a_task_needs_are_installed(monkeypatch, tmp_path):
    def install(name, folder, also):
        if name == "tunix":
            raise subprocess.CalledProcessError(1, "pip")
        return process.Library(name, "python", tmp_path)

    monkeypatch.setattr(peers, "library", install)
    everything = variants.LIBRARIES[1:]
    args = argparse.Namespace(
        best=False, dtypes=["float32"], peers=everything, tasks=["sft"], dir=tmp_path, also=[]
    )
    found = peers.installed(args)
    assert list(found) == ["alignjax", "trl", "tunix"]
    assert "could not be installed" in found["tunix"]
    args.tasks = ["sft", "generate"]
    assert list(peers.installed(args)) == ["alignjax", *everything]
    args.peers = ["llamacpp"]
    assert list(peers.installed(args)) == ["alignjax", "llamacpp"]


def test_the_target_is_met_or_not():
    fast = table.row(
        "alignjax", "float32", replies(1.0, 1.0), prepare_s=0.0, num_warm_up=1,
        work={"flops": 1.0, "bytes": 0.0}, limits={"flops": 1.0, "bytes": 1.0},
    )  # fmt: skip
    slow = {**fast, "library": "trl", "variant": "best", "tokens_per_second": 50.0}
    assert "2.00x in float32; meant to be 2x: met" in table.table("", [fast, slow], {"trl": 2})
    text = table.table("", [fast, slow], {"trl": 2.1})
    assert "2.00x in float32; meant to be 2.1x: not met" in text


def test_every_task_has_ours_first_and_each_peer_or_a_reason():
    for name, task in tasks.TASKS.items():
        found = variants.variants(task)
        assert [v.name for v in found[:2]] == ["float32", "bfloat16"], name
        trainers = {"alignjax", "trl", "tunix"}
        expected = set(variants.LIBRARIES) if task.kind == "generate" else trainers
        assert {v.library for v in found} == expected, name
        assert len({(v.library, v.name) for v in found}) == len(found), name


def test_work_by_hand():
    """One layer of width 2: 2 heads' worth of queries and keys, as counted on paper."""
    size = {
        "hidden_size": 2, "intermediate_size": 5, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 7,
    }  # fmt: skip
    weights = 4 * 2 * 64 + 3 * 2 * 5  # q, k, v, o and the MLP
    task = tasks.Task("sft", (), {"rows": 3, "row_len": 4})
    dense, attention, head = 4 * 2 * weights, 2 * 2 * 64 * 4 * 4 / 2, 3 * 2 * 2 * 7
    found = tasks.work(task, size, 12)
    assert found == {"flops": 3 * 3 * (dense + attention + head), "bytes": 0.0}
    task = tasks.Task("generate", (), {"prompts": 1, "prompt": 2, "completion": 2})
    read = 2 * 4 * (weights + 2 * 7) + 4 * 2 * 64 * (2 * 2 + 2 * 2 / 2)
    assert tasks.work(task, size, 2)["bytes"] == read


def test_completions_end_where_the_prompt_says_and_by_eos_alone(tmp_path):
    """The two models: with ragged lengths, and never ending."""
    import jax

    from alignjax.core.types import STOP, Sampling
    from alignjax.generate import make_generate
    from alignjax.models import load

    task = tasks.TASKS["generate_ragged"].quick()
    tasks.write_data(tmp_path / "data.jsonl", task, tasks.SIZES["T"]["vocab_size"])
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    words = [json.loads(line)["prompt"].split() for line in lines]
    prompts = np.array([[int(word[1:]) for word in row] for row in words])
    for is_untied in (True, False):
        folder = tmp_path / f"model{is_untied}"
        tasks.write_model(folder, tasks.SIZES["T"], is_untied=is_untied)
        model, params = load(folder)
        if not is_untied:
            prompts[:, -1] = tasks.FIRST_WORD
        lengths = np.full(len(prompts), prompts.shape[1])
        sampling = Sampling(max_tokens=16, stop_tokens=(tasks.EOS,))
        out = make_generate(model)(params, prompts, lengths, jax.random.PRNGKey(0), sampling)
        if is_untied:
            assert (out.finish_reasons == STOP).all()
            assert out.lengths.tolist() == tasks.completion_lengths(task).tolist()
            assert out.lengths.sum() == tasks.expected_tokens(task) == 144
        else:
            assert (out.lengths == 16).all() and (out.tokens >= tasks.FIRST_WORD).all()


class Cells:
    """Sequences that hold their tokens, and sample a number that depends on each of them."""

    def __init__(self, num):
        self.tokens = [[] for _ in range(num)]
        self.batches = []

    @staticmethod
    def next(tokens):
        return sum(i * token for i, token in enumerate(tokens, 3)) % 5

    def decode(self, rows):
        in_use = [i for i, tokens in enumerate(self.tokens) if tokens]
        for i, start, tokens in rows:
            assert start == len(self.tokens[i]), "a position that does not follow"
            self.tokens[i] += tokens
            in_use.append(i)
        assert sorted(set(in_use)) == list(range(max(in_use) + 1)), "a gap"
        self.batches.append([start for _, start, _ in rows])
        return [self.next(self.tokens[i]) for i, _, _ in rows]

    def free(self, sequence):
        self.tokens[sequence] = []

    def move(self, source, target):
        assert self.tokens[source] and not self.tokens[target]
        self.tokens[target], self.tokens[source] = self.tokens[source], []


@pytest.mark.parametrize("num", [1, 3, 50])
def test_a_completion_does_not_depend_on_the_slot_that_it_was_decoded_in(num):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 99, rng.integers(1, 9)).tolist() for _ in range(20)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6:
            tokens.append(Cells.next(tokens))
            if tokens[-1] == 1:
                break
        expected.append(tokens[len(prompt) :])
    assert len({len(tokens) for tokens in expected}) > 3  # those that end early, and not
    cells = Cells(num)
    assert slots.complete(prompts, cells, slots=num, max_tokens=6, eos=1) == expected
    assert not any(cells.tokens)
    last_prompt = max(i for i, starts in enumerate(cells.batches) if starts[0] == 0)
    steps = [starts for starts in cells.batches[:last_prompt] if starts[0] > 0]
    assert all(len(starts) == num for starts in steps)  # while prompts wait, no slot is free


def test_results_are_kept_by_task_beside_the_others(tmp_path):
    out = tmp_path / "peers.json"
    for name, value in (("sft, S", 1), ("dpo, S", 2), ("sft, S", 3)):
        peers.keep(out, name, {"rows": value})
    found = json.loads(out.read_text())
    assert {name: one["rows"] for name, one in found.items()} == {"sft, S": 3, "dpo, S": 2}
    assert all("commit" in one for one in found.values())
