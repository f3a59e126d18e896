"""Every operation on CuPy arrays, where there is a GPU: elsewhere asv would start a process for each to hear that."""

from ._common import backend

try:
    backend("cupy")
except NotImplementedError:
    pass
else:
    from _gpu_suite import GpuHessian, GpuNetworks, GpuRules, GpuSolvers

    __all__ = ["GpuHessian", "GpuNetworks", "GpuRules", "GpuSolvers"]
