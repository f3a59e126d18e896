"""``ddnref.interop.dask``: eigendecompositions and gradients on two worker processes, against one process."""

from __future__ import annotations

from contextlib import ExitStack

from . import THREADS
from . import _scale_cases as cases
from ._common import interleaved, load

SIZE = cases.Size(blocks=16, items=250, m=32)


class TwoWorkers:
    """Forward, loss and VJP of 4000 matrices 32×32, float64, in 16 blocks on two processes of one thread each."""

    timeout = 300

    def setup(self) -> None:
        load("distributed")
        self.stack = ExitStack()
        self.client = self.stack.enter_context(cases.cluster())
        self.x = self.client.persist(cases.matrices(SIZE))

    def teardown(self) -> None:
        self.stack.close()

    def time_gradients(self) -> None:
        cases.left_there(self.client, self.x)

    def track_over_one_process(self) -> float:
        """Two workers with one thread each over this process with all its threads; results stay where they are."""
        data = cases.every_block(SIZE)
        return interleaved(lambda: cases.left_there(self.client, self.x), lambda: cases.alone(data, THREADS)).median

    track_over_one_process.unit = "ratio"  # type: ignore[attr-defined]

    def track_differences(self) -> int:
        """Numbers that are not, bit by bit, those of one process."""
        return cases.differences(cases.fetched(self.x), cases.expected(cases.every_block(SIZE)))

    track_differences.unit = "numbers"  # type: ignore[attr-defined]


class WorkerMemory:
    """Peak memory of the only worker above its idle state, in blocks of its input."""

    params = (500, 8000)
    param_names = ("matrices a block",)
    unit = "blocks"
    timeout = 300

    def setup(self, _: int) -> None:
        load("distributed")

    def track_peak(self, items: int) -> float:
        with cases.cluster(1) as client:
            return cases.peak_in_blocks(client, cases.Size(6, items, SIZE.m))
