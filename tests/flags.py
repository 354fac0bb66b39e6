"""What XLA is told in tests and in the processes that they start."""

import contextlib
import os

QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""Compiles in half the time, beside JAX_DISABLE_MOST_OPTIMIZATIONS. Alone, they make it slower."""
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
"""What XLA does where nothing is said."""


def is_quick() -> bool:
    return os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"


def xla_flags(num_devices: int = 1) -> str:
    """XLA_FLAGS as they are, but for so many devices of the CPU, and for programs made quickly."""
    ours = {"xla_force_host_platform_device_count": num_devices, **QUICK}
    flags = os.environ.get("XLA_FLAGS", "").split()
    others = [flag for flag in flags if flag.lstrip("-").partition("=")[0] not in ours]
    if not is_quick():
        ours = {name: value for name, value in ours.items() if name not in QUICK}
    return " ".join([*others, *(f"--{name}={str(value).lower()}" for name, value in ours.items())])


@contextlib.contextmanager
def as_for_users():
    """Programs are compiled as users have them, and none that was compiled otherwise is used."""
    if not is_quick():
        yield
        return
    import jax
    from jax._src import compiler  # XLA reads its flags once, and jax has no options for all calls.

    quick = compiler.get_compile_options

    def options(*args, env_options_overrides=None, **others):
        overrides = AS_FOR_USERS | (env_options_overrides or {})
        return quick(*args, env_options_overrides=overrides, **others)

    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    compiler.get_compile_options = options
    try:
        yield
    finally:
        compiler.get_compile_options = quick
        jax.config.update("jax_disable_most_optimizations", True)
        jax.clear_caches()
