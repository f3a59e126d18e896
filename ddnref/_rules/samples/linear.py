"""Random linear systems, well conditioned and without symmetry."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddnref._rules.samples import Batch, Convert, Sample, is_double, normal


def solve(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A matrix near a rotation, and a vector."""
    a, b = normal(rng, (*batch, m, m), is_complex), normal(rng, (*batch, m), is_complex)
    a = np.linalg.qr(a)[0] + 0.3 * a / max(m, 1) ** 0.5
    return Sample((convert(a), convert(b)), {}, None, 0.3, 30.0)


def linear_solve(convert: Convert, rng: np.random.Generator, batch: Batch, m: int, is_complex: bool) -> Sample:
    """A matrix near the identity, where an iteration is fast; small ones are factorised."""
    a = np.eye(m) + 0.3 * normal(rng, (*batch, m, m), is_complex) / max(m, 1) ** 0.5
    sample = Sample((convert(a), convert(normal(rng, (*batch, m), is_complex))), {}, None, 0.3, 30.0)
    options: dict[str, Any] = {"solver": "gmres"} if m >= 12 else {}
    options["rtol"] = 1e-13 if is_double(sample.inputs[0]) else 2e-6
    return sample._replace(options=options)
