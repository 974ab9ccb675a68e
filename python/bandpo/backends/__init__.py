"""What computes the loss of a token: compiled code, a CUDA kernel, or plain torch."""

import bandpo.tensors  # noqa: F401  # reports a missing torch
