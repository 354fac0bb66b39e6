"""Every test runs on the CPU, seen as eight devices, with one compilation cache for all of them."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from tests import flags

# A shell that starts the tests in the background has them ignore Ctrl-C, and their processes too.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent

# Before anything imports jax: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiles in a third of the time, and what it makes is no slower at the sizes of tests. See also
# `compiled_as_for_users`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = flags.xla_flags(8)
# Threads for eight devices, which wait for each other in them; on two cores XLA would have two, and
# of some programs the devices would wait for ever (as `cli.runtime.prepare`).
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# In the environment, so that the processes which tests start share the cache. Not in a folder that
# other users can write to: it holds programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".cache" / "jax-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; the test is skipped, with the reason, where there is none."""
    folder = Path(os.environ.get("ALIGNJAX_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set ALIGNJAX_DATA to its folder")
    return folder


def pytest_collection_finish():
    """Looks for garbage less often: traces are many objects, and hardly any of them in cycles."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Forgets compiled programs once there are many. Each takes several memory maps, of which Linux
    gives a process 65,530: without this a worker ran out of them near the end, and died."""
    yield
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > 5_000:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def compiled_as_for_users():
    """Machine code as users get it, for tests that are about its last bits."""
    with flags.as_for_users():
        yield
