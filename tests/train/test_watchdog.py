"""The stacks are written when nothing finishes, again and again, and only then."""

import re
import threading
import time

import pytest

from alignjax.train.watchdog import watchdog

SECONDS = 0.2


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_names_the_process_the_last_step_and_every_thread(tmp_path, capfd):
    is_over = threading.Event()

    def a_thread_that_waits():
        is_over.wait()

    other = threading.Thread(target=a_thread_that_waits)
    other.start()
    path = tmp_path / "run" / "stacks.0.txt"
    with watchdog(SECONDS / 60, path.parent) as finished:
        finished(6)
        wait_until(lambda: path.exists() and path.read_text().count("process 0 of 1") >= 2)
    is_over.set()
    other.join()
    text = path.read_text()
    waited = re.findall(r"no step has finished for (\S+) minutes \(the last: 6\)", text)
    assert len(waited) >= 2 and SECONDS / 60 <= float(waited[0]) * 1.01 < float(waited[1])
    assert "in a_thread_that_waits" in text and "in wait_until" in text
    err = capfd.readouterr().err
    assert "process 0 of 1" in err and "in a_thread_that_waits" in err and str(path) in err


def test_it_is_silent_while_steps_finish_and_ends_with_the_block(tmp_path, capfd):
    before = threading.active_count()
    with watchdog(1 / 60, tmp_path) as finished:
        for step in range(15):
            time.sleep(0.1)
            finished(step)
    assert threading.active_count() == before
    with watchdog(None, tmp_path) as finished:
        finished(1)
        assert threading.active_count() == before
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_a_file_that_cannot_be_written_is_said_and_the_stacks_are_shown(tmp_path, capfd):
    (tmp_path / "file").touch()
    seen = []
    with watchdog(SECONDS / 60, tmp_path / "file"):
        wait_until(lambda: seen.append(capfd.readouterr().err) or "cannot be written" in seen[-1])
    assert "in wait_until" in "".join(seen) or "in <lambda>" in "".join(seen)


@pytest.mark.parametrize("how", ["return", "raise"])
def test_it_ends_also_after_an_error(tmp_path, how):
    before = threading.active_count()
    try:
        with watchdog(10, tmp_path):
            if how == "raise":
                raise RuntimeError
    except RuntimeError:
        pass
    assert threading.active_count() == before
