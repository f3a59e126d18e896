"""Benchmarks of ddnref for airspeed velocity (asv): one module per module of the package, and the ladder.

Importing the package pins the threads, so it comes before NumPy. A name with an underscore holds no benchmarks.
"""

import os

THREADS = int(os.environ.get("DDNREF_BENCH_THREADS", "2"))
ENVIRONMENT = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"),  # NPROC: the pool of XLA
    str(THREADS),
)
os.environ.update(ENVIRONMENT)

from ._names import use_present_names  # noqa: E402  # after the environment, which NumPy reads when it is imported

use_present_names()
