"""The Hessian of tall-skinny networks: one solve, by depth, by width, and against the textbook's construction."""

from __future__ import annotations

import ddnref

from ._hessian_cases import factored, fastest, ours, problem, quotient, second, textbook, wide


class HessianSolve:
    """Derivatives, factorisation and one refined solve: (layers, width, samples)."""

    params = (((25, 64, 1), (100, 64, 1), (400, 64, 1), (100, 16, 1), (100, 32, 1), (50, 64, 4), (20, 8, 32)),)
    unit = "backward error"
    param_names = ("network",)

    def setup(self, network: tuple[int, int, int]) -> None:
        self.problem = problem(*network)
        self.call = ours(self.problem)
        self.again = second(self.problem)
        self.call()

    def time_solve(self, *_: object) -> None:
        self.call()

    def time_second_right_hand_side(self, *_: object) -> None:
        self.again()

    def track_backward_error(self, *_: object) -> float:
        return float(self.call()[1].backward_error)


class HessianRatio:
    """Ratios inside one process, at which a change of the machine cancels."""

    params = (((20, 16, 1), (20, 8, 8)),)
    param_names = ("network",)
    unit = "ratio"

    def track_textbook_over_ours(self, network: tuple[int, int, int]) -> float:
        p = problem(*network)
        return quotient(textbook(p), ours(p)).median


class HessianCounts:
    """Inertia by three eliminations."""

    unit = "seconds"

    def setup(self) -> None:
        self.problem = problem(100, 32, 1)

    def track_count(self) -> float:
        p = self.problem
        return fastest(lambda: ddnref.curvature.hessian_eigval_count(p.chain, p.x, p.t, (0.01, float("inf"))), 1)

    track_count.version = "f492839a429d50952366fd5566d771142a60bb68a91ac3e310da1c84c4e919f7"  # type: ignore[attr-defined]


class HessianDiagonal:
    """The exact diagonal, in products with one vector: (layers, width, samples)."""

    params = (((7, 24, 64), (3, 256, 64)),)
    param_names = ("network",)
    unit = "ratio"

    def track_over_product(self, network: tuple[int, int, int]) -> float:
        p = problem(*network)
        diagonal = lambda: ddnref.curvature.hessian_diagonal(p.chain, p.x, p.t)  # noqa: E731
        return quotient(diagonal, lambda: p.chain.hvp(p.x, p.t, p.b)).median


class HessianSweep:
    """Times as fast as the plain sweep with LU pivots, N above the width: (activation, method, precision)."""

    params = (
        ("relu", "tanh"),
        (("active", "double"), ("cholesky", "double"), ("cholesky", "single")),
    )
    param_names = ("activation", "factor")
    unit = "ratio"

    def track_plain_over_ours(self, activation: str, factor: tuple[str, str]) -> float:
        p = wide(activation)
        return quotient(factored(p, 200.0, "riccati"), factored(p, 200.0, *factor)).median
