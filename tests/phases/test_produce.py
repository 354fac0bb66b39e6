"""A file of records, made batch by batch, is the same wherever its making was cut short."""

import json

import pytest

from alignjax.phases import produce as module
from alignjax.phases.produce import PROGRESS, produce


class Squares:
    """Three batches of two squares; breaks off before the batch that `breaks_at` names."""

    output = "squares.jsonl"
    shown = ("num",)
    warnings = ()

    num_closed = 0

    def __init__(self, breaks_at=None):
        self.breaks_at = breaks_at
        self.made = []

    def init(self):
        return {"counts": {"num": 0}}

    def produce(self, state):
        num = state["counts"]["num"]
        if num == self.breaks_at:
            raise KeyboardInterrupt
        if num == 6:
            return None
        self.made.append(num)
        records = [{"n": n, "square": n * n, "text": "ä\ud800"} for n in (num, num + 1)]
        return records, {"counts": {"num": num + 2}}

    def finish(self, state, records, run_dir):
        total = sum(record["square"] for record in records)
        return f"{state['counts']['num']} numbers, {total}"

    def close(self):
        self.num_closed += 1


def test_records_and_states_in_order(tmp_path):
    told = []
    said = produce(Squares(), tmp_path, lambda state: told.append(state["counts"]["num"]))
    assert said == "6 numbers, 55"
    assert told == [0, 2, 4, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["squares.jsonl"], "nothing else is left"
    lines = (tmp_path / "squares.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["square"] for line in lines] == [0, 1, 4, 9, 16, 25]
    assert "ä" in lines[0] and json.loads(lines[0])["text"] == "ä\ud800"


@pytest.mark.parametrize("breaks_at", [0, 2, 6])
def test_goes_on_after_the_last_whole_batch(tmp_path, breaks_at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    produce(Squares(), whole, lambda _: None)
    broken = Squares(breaks_at)
    with pytest.raises(KeyboardInterrupt):
        produce(broken, cut, lambda _: None)
    assert broken.num_closed == 1
    assert not (cut / "squares.jsonl").exists()
    with (cut / ".squares.jsonl.partial").open("a") as file:
        file.write('{"n": 99, "squ')  # What a kill leaves of a batch that it cuts short.
    again = Squares()
    produce(again, cut, lambda _: None)
    assert again.made == list(range(breaks_at, 6, 2)), "nothing is made twice"
    assert (cut / "squares.jsonl").read_bytes() == (whole / "squares.jsonl").read_bytes()


def test_a_batch_that_is_on_disk_but_not_noted_is_made_anew(tmp_path, monkeypatch):
    note = module.replace_file

    def fails(path, content):
        if b'"num": 4' in content:
            raise OSError("power cut")
        note(path, content)

    monkeypatch.setattr(module, "replace_file", fails)
    with pytest.raises(OSError, match="power cut"):
        produce(Squares(), tmp_path, lambda _: None)
    assert json.loads((tmp_path / PROGRESS).read_text())["state"] == {"counts": {"num": 2}}
    monkeypatch.undo()
    again = Squares()
    produce(again, tmp_path, lambda _: None)
    assert again.made == [2, 4]
    lines = (tmp_path / "squares.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["n"] for line in lines] == list(range(6))
