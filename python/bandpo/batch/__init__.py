"""A batch of tokens: its checks, its sequences, and metrics over it."""

import bandpo.tensors  # noqa: F401  # reports a missing torch
