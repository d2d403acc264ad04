"""What kernels run by."""

from triton.runtime import driver  # noqa: F401
