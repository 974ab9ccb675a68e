"""GRPO with a band by verl's own FSDP2 worker, on a CPU, with a tiny Qwen2 and a rule for rewards.

    python examples/verl/update_on_cpu.py  # half a minute

verl has no platform for a CPU, and its rollout engines run on none. So this file has a platform and
draws the responses; log-probs, losses, micro-batches and optimiser steps are verl's.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_LOGGING_LEVEL": "ERROR"}

import torch
from tensordict import TensorDict
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils
from verl.workers.config import (
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from bandpo.integrations.verl import BandPOPolicyLossConfig

VOCABULARY, PROMPT, RESPONSE = 64, 4, 12
PROMPTS, GROUP, MICRO_BATCH = 8, 8, 16
REWARDED = torch.arange(0, VOCABULARY, 8)
"""Tokens that a response is rewarded for."""


class CpuDevice:
    """torch.cpu, with the functions of torch.cuda whose numbers the workers log."""

    def __getattr__(self, name: str) -> Any:
        if name == "mem_get_info":
            return lambda: (0, 0)
        if name == "get_device_name":
            return lambda: "CPU"
        if "memory" in name:
            return lambda *_: 0
        return getattr(torch.cpu, name)


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformCUDA):  # type: ignore[misc]
    """The part of a platform that a worker calls."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = CpuDevice()

    def is_available(self) -> bool:
        """Returns True."""
        return True

    def current_device(self) -> torch.device:
        """Returns the CPU, whose number is no device."""
        return torch.device("cpu")

    def set_device(self, device_index: int) -> None:
        """Changes nothing."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Waits for nothing."""

    def manual_seed(self, seed: int) -> None:
        """Seeds torch."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def empty_cache(self) -> None:
        """Frees nothing."""

    def communication_backend_name(self) -> str:
        """Returns gloo."""
        return "gloo"


def worker(folder: Path) -> TrainingWorker:
    """The worker of an actor, with a model of 25 thousand parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # read, but not connected to
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    single = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    made = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(folder),
                load_tokenizer=False,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "sdpa"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                mixed_precision=single,
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=MICRO_BATCH,
                infer_micro_batch_size_per_gpu=PROMPTS * GROUP,
                max_token_len_per_gpu=4096,
                infer_max_token_len_per_gpu=4096,
            ),
            optimizer_config=FSDPOptimizerConfig(
                lr=1e-2, total_training_steps=100, lr_warmup_steps=0
            ),
            checkpoint_config=CheckpointConfig(),
        )
    )
    made.reset()
    return made


def sampled(actor: TrainingWorker, prompts: torch.Tensor) -> torch.Tensor:
    """Prompts with responses of the policy, at temperature 1."""
    tokens = prompts
    with actor.engine.eval_mode(), torch.no_grad():
        for _ in range(RESPONSE):
            logits = actor.engine.module(input_ids=tokens).logits[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    return tokens


def batch_of(tokens: torch.Tensor, **tensors: torch.Tensor) -> TensorDict:
    """A batch as verl's trainer hands it to a worker."""
    mask = torch.ones_like(tokens)
    data = TensorDict(
        {
            "input_ids": tokens,
            "prompts": tokens[:, :PROMPT],
            "responses": tokens[:, PROMPT:],
            "attention_mask": mask,
            "response_mask": mask[:, PROMPT:],
            "position_ids": mask.cumsum(1) - 1,
            **tensors,
        },
        batch_size=len(tokens),
    )
    tensordict_utils.assign_non_tensor(data, temperature=1.0, calculate_entropy=False)
    return left_right_2_no_padding(data)


def update(
    actor: TrainingWorker, tokens: torch.Tensor, epochs: int
) -> tuple[float, dict[str, Any]]:
    """Updates the policy by GRPO; returns the mean reward and the metrics of each update."""
    batch = batch_of(tokens)
    tensordict_utils.assign_non_tensor(batch, compute_loss=False)
    log_probs = actor.infer_batch(batch)["log_probs"]
    old_log_probs = no_padding_2_padding(log_probs, batch)
    rewards = torch.isin(tokens[:, PROMPT:], REWARDED).float().mean(1).reshape(-1, GROUP)
    spread = rewards.std(1, keepdim=True) + 1e-4
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).reshape(-1, 1)
    batch = batch_of(
        tokens,
        old_log_probs=old_log_probs,
        advantages=advantages.expand_as(old_log_probs).contiguous(),
    )
    tensordict_utils.assign_non_tensor(
        batch, global_batch_size=len(tokens), mini_batch_size=len(tokens), epochs=epochs,
        compute_loss=True,
    )  # fmt: skip
    output = actor.train_mini_batch(batch)
    metrics: dict[str, Any] = tensordict_utils.get(output, "metrics")
    return float(rewards.mean()), metrics


def main(batches: int = 8, epochs: int = 4) -> list[dict[str, Any]]:
    """Trains, prints a line for each batch, and returns their metrics."""
    with tempfile.TemporaryDirectory() as folder:
        actor = worker(Path(folder))
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=GROUP,
        ppo_micro_batch_size_per_gpu=MICRO_BATCH,
        policy_loss=BandPOPolicyLossConfig(
            region="(kl@0.01).cap(10)", schedule=f"linear(0.05, 0.01, {batches * epochs})"
        ),
    )
    actor.set_loss_fn(partial(ppo_loss, config=config))
    history = []
    for number in range(batches):
        prompts = torch.randint(0, VOCABULARY, (PROMPTS, PROMPT)).repeat_interleave(GROUP, 0)
        reward, metrics = update(actor, sampled(actor, prompts), epochs)
        history.append({"reward": reward, **metrics})
        clipped, delta = (metrics[f"actor/{name}"] for name in ("pg_clipfrac", "band/delta"))
        print(
            f"batch {number}: mean reward {reward:.3f}, clipped in the {epochs} updates "
            f"{', '.join(f'{share:.1%}' for share in clipped)}, delta {delta[0]:.3f}"
        )
    torch.distributed.destroy_process_group()
    return history


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
