"""GRPO on a toy task with Liger's chunked loss and a band, on a CPU, in some seconds.

A tiny language model writes eight tokens, and the reward is how many of them are a certain one. The
loss takes hidden states and the weight of the head, so that the logits of a batch are never whole.
Only ``BandGRPOLoss`` is bandpo's; with ``LigerFusedLinearGRPOLoss`` it is Liger as it was.

    python examples/liger/grpo.py --steps 20
"""

from __future__ import annotations

import argparse

import torch

from bandpo.integrations.liger import BandGRPOLoss
from bandpo.integrations.settings import LossSettings

WORDS, WANTED, LENGTH, GROUPS, SAMPLES, UPDATES = 16, 7, 8, 4, 16, 4


class Model(torch.nn.Module):
    """A recurrent language model without its head's product."""

    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, hidden)
        self.body = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, WORDS, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns hidden states, [B, T, H], each of which predicts the next token."""
        return self.body(self.embedding(tokens))[0]


@torch.no_grad()
def sampled(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Tokens after a first one, their log-probs, advantages of sequences, and the mean reward."""
    tokens = torch.randint(WORDS, (GROUPS, 1)).repeat_interleave(SAMPLES, 0)
    log_probs = []
    for _ in range(LENGTH):
        log_prob = model.head(model(tokens)[:, -1]).log_softmax(-1)
        new = torch.multinomial(log_prob.exp(), 1)
        log_probs.append(log_prob.gather(-1, new))
        tokens = torch.cat([tokens, new], dim=1)
    rewards = (tokens[:, 1:] == WANTED).sum(-1).float().reshape(GROUPS, SAMPLES)
    spread = rewards.std(1, keepdim=True) + 1e-6
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).reshape(-1)
    return tokens, torch.cat(log_probs, dim=1), advantages, float(rewards.mean())


def main(steps: int, region: str) -> list[float]:
    """Trains and prints; returns the mean reward of each step."""
    torch.manual_seed(0)
    model = Model()
    loss_fn = BandGRPOLoss(
        settings=LossSettings(region),
        loss_type="dapo",
        beta=0.0,
        use_ref_model=False,
        compiled=False,
        chunk_size=16,
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rewards = []
    for step in range(steps):
        tokens, old_log_prob, advantages, reward = sampled(model)
        written = tokens[:, 1:]
        for _ in range(UPDATES):  # from the second one on, ratios differ from 1 and may be clipped
            loss, metrics = loss_fn(
                model(tokens[:, :-1]),
                model.head.weight,
                written,
                torch.ones_like(written),
                advantages,
                old_per_token_logps=old_log_prob,
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(reward)
        print(f"step {step}: reward {reward:.2f}, clip fraction {float(metrics[-1]):.3f}")
    return rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--region", default="(kl@0.01).cap(10)")
    main(**vars(parser.parse_args()))
