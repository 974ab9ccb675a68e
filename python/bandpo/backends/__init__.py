"""Backends, which compute the losses of tokens: compiled code, a CUDA kernel, plain torch."""

import bandpo.tensors  # noqa: F401  # reports a missing torch
