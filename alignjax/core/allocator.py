"""How this process gets its memory from the system."""

import os
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages(environment: dict[str, str]) -> dict[str, str] | None:
    """The environment in which glibc asks for huge pages; None where that changes nothing.

    A training step on a CPU frees its activations and asks for them again in the next. The system
    clears each page that it hands out, and 4 KiB at a time that takes 15% of an SFT step of 42M
    parameters; of huge pages it takes 2%.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _TUNABLE in tunables or not _is_glibc_with_it() or not _PAGES.exists():
        return None
    if "[madvise]" not in _PAGES.read_text():  # All memory has them, or none.
        return None
    whole = f"{tunables}:{_TUNABLE}=1" if tunables else f"{_TUNABLE}=1"
    return {**environment, "GLIBC_TUNABLES": whole}


def _is_glibc_with_it() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, ValueError):  # No such function, no such name, another C library.
        return False
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def restart_with_huge_pages() -> None:
    """Starts this program anew, in the same process, if it would then have huge pages: glibc reads
    its settings at the start alone. To be called before anything else is done."""
    environment = huge_pages(dict(os.environ))
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
