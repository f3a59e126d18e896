"""The example on the scale-out page that does not use Dask: the reducers under torch.distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.framework("torch")
def test_the_reducers_under_torch_distributed():
    """Two processes give the numbers of one, which the script asserts, and say nothing else."""
    script = ROOT / "docs/examples/torch_distributed.py"
    command = ["-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 processes; largest eigenvalue")
    assert done.stdout.count("\n") == 1
    assert "Warning" not in done.stderr
