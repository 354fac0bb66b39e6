"""JAX for the command line: processes that belong together, compilations kept on disk."""

import logging
import os
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError

HEARTBEAT_SECONDS = 30
"""A process that is not heard of for so long is taken for dead, and the others are ended."""


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
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)


def prepare() -> None:
    """To be called by a verb before it uses JAX."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        root = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "alignjax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # Orbax logs each save in several lines; what matters of them reaches the user as an error.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        import absl.logging
    except ImportError:
        return
    absl.logging.set_verbosity(absl.logging.ERROR)
