"""Memory that is kept: counted by the kernel, in a process of its own, whose heap nobody else has shaped."""

import platform
import subprocess
import sys

import pytest

from tests.support import ROOT, environment

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

FAULTS = """
import ctypes, resource, sys
from pretrain.heap import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]


def touch():
    blocks = [libc.malloc(ctypes.c_size_t(24 << 20)) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 24 << 20)
    for block in blocks:
        libc.free(block)


kept = keep_freed_memory()
touch()
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("chosen", [{}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_blocks_that_were_freed_are_not_faulted_in_again(chosen: dict[str, str]) -> None:
    """96 MiB are 24,576 pages, each time; where the user has chosen a threshold, that stays."""
    own = {key: value for key, value in environment().items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=own | chosen, cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(not chosen)
    assert int(faults) < 1000 if kept == "True" else int(faults) > 60_000
