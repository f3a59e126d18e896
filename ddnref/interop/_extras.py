"""The error of a bridge whose framework is not installed: it names the extra that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed_by_bridge(framework: str) -> Iterator[None]:
    """Import a framework inside; if it is missing, say how to install it. Its extra has the same name."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != framework:
            raise  # the framework is there, but something that it needs is not
        raise ModuleNotFoundError(
            f'ddnref.interop.{framework} needs {framework}, which is not installed: pip install "ddnref[{framework}]"',
            name=error.name,
        ) from error
