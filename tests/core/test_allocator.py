"""What is freed is there for the next allocation."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from alignjax.core.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24, np.float32)  # 64 MiB: written, and freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), keep_freed_memory(), faults() and faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_pages_that_were_freed_are_not_asked_for_again():
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    before, is_kept, after = out.stdout.split()
    assert is_kept == "True"
    assert int(before) > 10 * max(int(after), 1), out.stdout


def test_another_c_library_does_as_it_always_does(monkeypatch):
    from alignjax.core import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
