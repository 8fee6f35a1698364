"""Tests run on 8 fake CPU devices; set before jax is imported."""

import atexit
import os
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's older fusions compile in half the time, which is most of what a test waits for; those that
# users get are in `make test-slow`.
FAST_COMPILES = "--xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_force_host_platform_device_count=8", os.environ.get("JAXLM_TESTS_XLA", FAST_COMPILES)]
)

# A shell's background job ignores SIGINT, and so would every process that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One compilation cache for all processes of a test run, and not the user's own.
if "JAXLM_TESTS_CACHE" not in os.environ:
    made = tempfile.mkdtemp(prefix="jaxlm-tests-")
    os.environ["JAXLM_TESTS_CACHE"] = made
    os.environ["XDG_CACHE_HOME"] = made
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(made, "xla")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
