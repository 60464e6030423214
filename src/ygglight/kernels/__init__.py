"""The kernel layer: one folder an operation, each with a plain torch twin that is the truth.

Importing this package imports neither Triton nor any kernel; `list_kernels` says what each operation would run here.
"""

from ygglight.kernels._dispatch import KernelInfo, list_kernels

__all__ = ["KernelInfo", "list_kernels"]
