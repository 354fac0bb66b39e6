"""What is compiled while something runs."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """Names of what is compiled, or fetched from the cache on disk, meanwhile."""
    names = []

    def listen(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(more.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
