"""Huge pages are asked for once, where the C library and the system have them."""

import os
import subprocess
import sys

import pytest

from alignjax.core import allocator

PROGRAM = """
import os, sys
from alignjax.core.allocator import restart_with_huge_pages
print("started", flush=True)
restart_with_huge_pages()
print(sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.fixture
def pages(monkeypatch, tmp_path):
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(allocator, "_PAGES", file)
    monkeypatch.setattr(allocator.os, "confstr", lambda name: "glibc 2.36")
    return file


def test_the_setting_joins_what_is_set_and_is_asked_for_once(pages):
    assert allocator.huge_pages({"A": "b"}) == {
        "A": "b",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    found = allocator.huge_pages({"GLIBC_TUNABLES": "glibc.malloc.check=3"})
    assert found == {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.hugetlb=1"}
    assert allocator.huge_pages(found) is None
    assert allocator.huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None


@pytest.mark.parametrize("version", ["glibc 2.34", "musl 1.2.5", "", None])
def test_other_c_libraries_are_left_alone(pages, monkeypatch, version):
    monkeypatch.setattr(allocator.os, "confstr", lambda name: version)
    assert allocator.huge_pages({}) is None


def test_a_system_that_gives_them_to_all_or_none_is_left_alone(pages):
    for text in ("[always] madvise never", "always madvise [never]"):
        pages.write_text(text)
        assert allocator.huge_pages({}) is None
    pages.unlink()
    assert allocator.huge_pages({}) is None


def test_the_program_starts_anew_with_its_words(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if (expected := allocator.huge_pages(environment)) is None:
        pytest.skip("this system has no huge pages that are to be asked for")
    out = subprocess.run(
        [sys.executable, script, "a", "b=1 2"], capture_output=True, text=True, env=environment
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout == f"started\nstarted\n['a', 'b=1 2'] {expected['GLIBC_TUNABLES']}\n"
