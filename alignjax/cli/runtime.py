"""Settings of JAX for the command line: compilations kept on disk, and quiet libraries."""

import logging
import os
from pathlib import Path


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
