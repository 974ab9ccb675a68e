"""GRPO in TRL with a band, on a CPU and without a download: a toy model learns to repeat a word.

    pip install trl==1.16.0
    python examples/trl/grpo.py --region "kl@0.01" --max_steps 60

Every setting of `BandPOConfig` is an option, and ``--config file.yaml`` reads them from a file.
"""

from __future__ import annotations

import os
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import TrlParser

from bandpo.integrations.trl import BandPOConfig, BandPOTrainer

WORDS = [f"w{number}" for number in range(20)]
SPECIAL = ("<pad>", "<end>", "<unknown>")

DEFAULTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 8,
    "num_iterations": 2,  # in the first of them every ratio is 1, and nothing is clipped
    "learning_rate": 5e-3,
    "max_steps": 40,
    "logging_steps": 10,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose tokens are words."""
    words = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        unk_token=SPECIAL[2],
        padding_side="left",
    )


def toy_model(seed: int = 0) -> Qwen2ForCausalLM:
    """Returns an untrained transformer with 21 000 weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # so that some tokens are likely and others rare
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def prompts() -> Dataset:
    """Returns one prompt a word."""
    return Dataset.from_list([{"prompt": word} for word in WORDS])


def repeats(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Returns the share of each completion's words that are the word of its prompt."""
    pairs = zip(prompts, (text.split() for text in completions), strict=True)
    return [words.count(prompt) / max(len(words), 1) for prompt, words in pairs]


def main(arguments: list[str]) -> BandPOTrainer:
    """Trains with the settings of a command line; returns the trainer."""
    parser = TrlParser(BandPOConfig)
    parser.set_defaults(output_dir=tempfile.mkdtemp(), **DEFAULTS)
    (settings,) = parser.parse_args_and_config(arguments)
    trainer = BandPOTrainer(
        toy_model(),
        repeats,
        settings,
        train_dataset=prompts(),
        processing_class=toy_tokenizer(),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    for line in main(sys.argv[1:]).state.log_history:
        if "reward" in line:
            names = ("step", "reward", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")
            print(*(f"{name} {line[name]:.3g}" for name in names), sep="   ")
