"""The CUDA backend: kernels by CuPy on torch's stream and device.

CuPy compiles each kernel of ``cuda/`` at its first use on a device and keeps it on disk. The
tensors of a region are copied at its first use. So a call with the same region and dtypes has to
come before the capture of a CUDA graph. The graph reads those tensors at every replay, so keep the
region as well. Nothing here waits for a device.
"""
