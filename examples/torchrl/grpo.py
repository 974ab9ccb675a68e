"""GRPO on a toy task with torchrl's own loss and a band, on a CPU, in some seconds.

A tiny language model writes eight tokens after a prompt, and the reward is how many of them are a
certain one. Only ``BandGRPOLoss`` is bandpo's; with ``GRPOLoss(actor)`` it is torchrl as it was.

    python examples/torchrl/grpo.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from tensordict import TensorDict
from tokenizers import Tokenizer, models
from torchrl.modules.llm import TransformersWrapper
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bandpo.integrations.settings import LossSettings
from bandpo.integrations.torchrl import BandGRPOLoss

WORDS, WANTED, GROUPS, SAMPLES, UPDATES = 16, 7, 4, 16, 4


def policy(**options: object) -> TransformersWrapper:
    """The model as a policy over tokens; it scores given tokens unless it generates."""
    return TransformersWrapper(
        MODEL, tokenizer=TOKENIZER, input_mode="tokens", pad_output=True, **options
    )


def sampled(
    generator: TransformersWrapper, scorer: TransformersWrapper
) -> tuple[TensorDict, float]:
    """Completions with the log-probs of now, old ones in the updates to come; the mean reward."""
    prompts = torch.randint(2, WORDS, (GROUPS, 4)).repeat_interleave(SAMPLES, 0)
    data = TensorDict(batch_size=[len(prompts)])
    data["tokens", "prompt"] = prompts
    data["masks", "all_attention_mask"] = torch.ones_like(prompts, dtype=torch.bool)
    written = generator(data)
    rewards = (written["tokens", "response"] == WANTED).sum(-1).float().reshape(GROUPS, SAMPLES)
    spread = rewards.std(1, keepdim=True) + 1e-6
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).reshape(-1, 1, 1)
    data["tokens", "full"] = full = written["tokens", "full"]
    data["masks", "all_attention_mask"] = torch.ones_like(full, dtype=torch.bool)
    with torch.no_grad():
        data["log_probs", "full"] = scorer(data.copy())["log_probs", "full"]
    data["advantage"] = advantages.expand(*full.shape, 1)
    return data, float(rewards.mean())


def main(steps: int, region: str) -> list[float]:
    """Trains and prints; returns the mean reward of each step."""
    generating = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True}
    generator = policy(generate=True, generate_kwargs=generating)
    actor = policy(generate=False, return_log_probs=True)
    loss_fn = BandGRPOLoss(actor, settings=LossSettings(region), entropy_bonus=False)
    optimizer = torch.optim.Adam(MODEL.parameters(), 3e-3)
    rewards = []
    for step in range(steps):
        data, reward = sampled(generator, actor)
        for _ in range(UPDATES):  # from the second one on, ratios differ from 1 and may be clipped
            output = loss_fn(data)
            output.loss_objective.backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append(reward)
        clipped = float(output.clip_fraction)
        print(f"step {step}: reward {reward:.2f}, clip fraction {clipped:.3f}")
    return rewards


torch.manual_seed(0)
VOCABULARY = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, WORDS)}}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(VOCABULARY, unk_token="<pad>")),
    pad_token="<pad>",
    eos_token="<eos>",
    padding_side="left",
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
MODEL = Qwen2ForCausalLM(Qwen2Config(vocab_size=WORDS, **SIZES, **HEADS, **IDS)).eval()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--region", default="(kl@0.01).cap(10)")
    main(**vars(parser.parse_args()))
