"""The tokens of a batch under both policies."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bandpo.batch.tokens import Sequences


class TwoPolicies(NamedTuple):
    """The tokens; masked ones have log-prob 0 under both policies."""

    old: torch.Tensor  # [B, T], packed tokens as one row
    rollout: torch.Tensor
    log_ratio: torch.Tensor  # ln B, unclamped
    valid: torch.Tensor  # bool
    cu_seqlens: torch.Tensor | None
    given: torch.Size  # the shape of the user's tensors

    def sequences(self) -> Sequences:
        """Returns the sequences, computed at every call."""
        return Sequences.of(self.valid, self.cu_seqlens)
