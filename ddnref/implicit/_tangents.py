"""Tangents of inputs: which of them are given, and zeros for inputs that do not move."""

from __future__ import annotations

from ddnref._core.arrays import Array, namespace, namespace_of
from ddnref._core.checks import check_dtypes, check_shapes, given


def require_direction(**tangents: Array | None) -> None:
    """Raise ``TypeError`` where every tangent is ``None``."""
    if all(tangent is None for tangent in tangents.values()):
        raise TypeError(f"{' and '.join(tangents)} are all None: there is no direction.")


def split_arguments(
    function: str, arrays: tuple[Array | None, ...], point: tuple[str, ...], named: tuple[str, ...] = ()
) -> tuple[tuple[Array, ...], tuple[Array | None, ...], tuple[Array, ...]]:
    """Split ``(*tangents, *point, *inputs)`` into its three parts, and put zeros for tangents of ``None``.

    There are as many tangents as inputs. The first inputs may be `named`; the others are ``x[0]`` and so on.
    """
    count, odd = divmod(len(arrays) - len(point), 2)
    if odd or count < max(1, len(named)):
        expected = [*(f"{name}_dot" for name in named), "*x_dots", *point, *named, "*inputs"]
        raise TypeError(
            f"{function} got {len(arrays)} arrays, expected {', '.join(expected)}: one tangent for each input, None "
            "for one that does not move."
        )
    dots, middle = arrays[:count], arrays[count:-count]
    inputs: tuple[Array, ...] = arrays[-count:]
    numbers = range(count - len(named))
    sources = (*named, *(f"x[{i}]" for i in numbers))
    given(**dict(zip(sources, inputs, strict=True)))
    names = (*(f"{name}_dot" for name in named), *(f"x_dot[{i}]" for i in numbers))
    require_direction(**dict(zip(names, dots, strict=True)))
    # Inputs that do not move may be anything, as they may for a VJP. All else is in one library, on one device.
    moving = [(name, d, x) for name, d, x in zip(names, dots, inputs, strict=True) if d is not None]
    moved = {source: x for source, d, x in zip(sources, dots, inputs, strict=True) if d is not None}
    namespace(**{name: d for name, d, _ in moving}, **moved, **dict(zip(point, middle, strict=True)))
    check_shapes(**{name: (d, tuple(x.shape)) for name, d, x in moving})
    check_dtypes(**{name: (d, x.dtype) for name, d, x in moving})
    zeros = tuple(namespace_of(x).zeros_like(x) if d is None else d for d, x in zip(dots, inputs, strict=True))
    return zeros, middle, inputs
