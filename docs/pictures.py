"""Draw the README's two pictures anew from the gallery: ``python docs/pictures.py``, with PyTorch and JAX installed.

They are copies of pictures in the gallery, which is drawn at every build of the documentation. The README needs files.
The file keeps the date and the versions that it was drawn with, as text inside the PNG.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl

import ddnref
from ddnref.examples._look import LOOK
from ddnref.examples._show import Picture, recording, settings

HERE = Path(__file__).parent
PICTURES = {"plot_deblurring": "photographs", "plot_repeated_eigenvalues": "error"}  # story: picture
LIBRARIES = ("numpy", "torch", "jax", "matplotlib", "scikit-learn")


class Recorder:
    """Keep the picture of one name, and drop what else a story shows."""

    def __init__(self, name: str, path: Path, text: dict[str, str]) -> None:
        self.name, self.path, self.text = name, path, text

    def add(self, result: Any) -> None:
        """Write the picture that was asked for."""
        if isinstance(result, Picture) and result.name == self.name:
            result.figure.savefig(self.path, dpi=110, metadata=self.text)

    def track(self, items: Any, label: str) -> Any:  # noqa: ARG002
        """Show no progress."""
        return iter(items)


def main() -> None:
    """Run the two stories and write their pictures beside the style sheet."""
    mpl.use("Agg")
    mpl.rcParams.update(LOOK)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    for story, name in PICTURES.items():
        text = {
            "Source": f"python docs/pictures.py, ddnref.examples.{story}",
            "Comment": f"{datetime.date.today()}, ddnref {ddnref.__version__}, {versions}",
        }
        path = HERE / "_static" / f"{story.removeprefix('plot_')}.png"
        recorder = Recorder(name, path, text)
        with recording(recorder, full=False, seed=settings.seed, backend=settings.backend):
            runpy.run_module(f"ddnref.examples.{story}", run_name="__main__")
        print(path.relative_to(HERE.parent), path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
