"""JAX for the command line: processes that belong together, compilations kept on disk."""

import contextlib
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignjax.core.errors import Terminated, UserError

HEARTBEAT_SECONDS = 30
"""A process that is not heard of for so long is taken for dead, and the others are ended."""
LEAVE_SECONDS = 10
"""How long a process that has failed waits for the others to fail, too."""


def join_processes() -> None:
    """Connects the processes of one run, where a launcher has started several.

    The launcher is known by its environment: SLURM (srun), Open MPI (mpirun), GKE (JobSet) on TPU
    hosts; or one says it: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    or ALIGNJAX_PROCESSES=auto, on the hosts of a TPU slice without GKE.

    Raises:
      UserError: if only a part of that is said.
    """
    import jax

    environment = os.environ
    options: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if "JAX_COORDINATOR_ADDRESS" in environment:
        for name, option in (
            ("JAX_NUM_PROCESSES", "num_processes"),
            ("JAX_PROCESS_ID", "process_id"),
        ):
            value = environment.get(name, "")
            if not value.isdecimal():
                raise UserError(
                    f"{name}={value!r}: JAX_COORDINATOR_ADDRESS is set, so expected a number here"
                )
            options[option] = int(value)
    elif not (
        int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or int(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1
        or environment.get("ALIGNJAX_PROCESSES") == "auto"
    ):
        return
    from alignjax.core.processes import wait_for_all

    prepare()  # Before anything is compiled.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)
    # Together from here on: gloo grants 30 s for devices to meet for the first time, by which
    # processes may well have begun apart.
    wait_for_all("joined")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` wherever nobody else waits for it, as `train.loop` does: while
    models load or are exported, and between stages.

    To be entered after `join_processes`: the service of JAX for notices of preemption, of which
    SIGTERM is the only one it knows, would take the signal and tell nobody.
    """

    def handle(number: int, frame: object) -> None:
        raise Terminated

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # Not in the main thread: the signal stays as it is.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def leaving_soon() -> Iterator[None]:
    """An error in one of several processes ends it within `LEAVE_SECONDS`.

    By itself it would wait at its exit, for minutes, for others that wait for it. When it is gone
    they miss it and end as well; where all have the error, none has to.
    """
    import jax

    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized():
            status = 2 if isinstance(error, UserError) else 1  # As of `cli.main`.
            timer = threading.Timer(LEAVE_SECONDS, os._exit, [status])
            timer.daemon = True
            timer.start()
        raise


def prepare() -> None:
    """To be called by a verb before it uses JAX."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "alignjax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # XLA has as many threads as there are cores. Devices that a CPU plays wait for each other in
    # them, for ever where others that should come have none.
    if played := re.search(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        os.environ.setdefault("NPROC", str(max(2 * int(played[1]), os.cpu_count() or 1)))
    # Orbax logs each save in several lines; what matters of them reaches the user as an error.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        import absl.logging
    except ImportError:
        return
    absl.logging.set_verbosity(absl.logging.ERROR)
