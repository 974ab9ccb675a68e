"""The CUDA backend: kernels on torch's stream and device.

NVIDIA's bindings for Python (`bandpo.backends.cuda.driver`) or else CuPy
(`bandpo.backends.cuda.raw_module`) compile each kernel of ``cuda/`` at its first use on a device
and keep it on disk. Both give the same bits. The tensors of a region are copied at its first use.
So a call with the same region and dtypes has to come before the capture of a CUDA graph, and its
backward pass if that is captured as well. The graph reads those tensors at every replay, so keep
the region as well. Nothing here waits for a device.
"""
