#!/usr/bin/env bash
# GRPO with a band by verl 0.9.1, on one machine with GPUs.
#
# It was not run on GPUs here. Tests compose the configuration of these lines and read it as verl does.
#
#   MODEL=Qwen/Qwen2.5-1.5B-Instruct TRAIN=train.parquet TEST=test.parquet GPUS=8 examples/verl/train.sh
#
# The files have the columns of verl's data, such as those of its examples/data_preprocess/gsm8k.py. Further words
# are added to the command, as in  examples/verl/train.sh trainer.total_epochs=1
set -euo pipefail

: "${MODEL:=Qwen/Qwen2.5-1.5B-Instruct}" "${TRAIN:=$HOME/data/gsm8k/train.parquet}" "${TEST:=$HOME/data/gsm8k/test.parquet}"
: "${GPUS:=8}" "${PYTHON:=python3}"

# Otherwise a missing loss is an error after the first rollouts. `bandpo doctor --verl` has the reason.
"$PYTHON" -c 'from verl.trainer.ppo.core_algos import get_policy_loss_fn; get_policy_loss_fn("bandpo")'

actor=actor_rollout_ref.actor
policy_loss=$actor.policy_loss
options=(
  algorithm.adv_estimator=grpo
  data.train_files="$TRAIN"
  data.val_files="$TEST"
  data.train_batch_size=512
  data.max_prompt_length=512
  data.max_response_length=2048
  actor_rollout_ref.model.path="$MODEL"

  # The band: kl within delta, ratios up to 10, and for A < 0 a dual clip of 10. Delta falls over the updates.
  $policy_loss.loss_mode=bandpo
  $policy_loss._target_=bandpo.integrations.verl.BandPOPolicyLossConfig
  +$policy_loss.preset=bandpo-kl
  "+$policy_loss.schedule='linear(0.05, 0.01, 400)'"

  # Four updates a batch: in the first all ratios are 1 and nothing is clipped.
  $actor.ppo_mini_batch_size=128
  $actor.loss_agg_mode=token-mean
  $actor.optim.lr=1e-6
  $actor.use_kl_loss=False
  $actor.use_dynamic_bsz=True
  $actor.ppo_max_token_len_per_gpu=24576
  $actor.strategy=fsdp2

  # Rollouts. Weights of old/rollout, truncated at 2, correct for the engine; the band's loss takes them.
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.temperature=1.0
  actor_rollout_ref.rollout.tensor_model_parallel_size=1
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  algorithm.rollout_correction.rollout_is=token
  algorithm.rollout_correction.rollout_is_threshold=2.0

  trainer.n_gpus_per_node="$GPUS"
  trainer.nnodes=1
  trainer.total_epochs=15
  trainer.save_freq=50
  trainer.test_freq=10
  trainer.project_name=bandpo
  trainer.experiment_name=grpo-band
  "trainer.logger=[console]"
)
exec "$PYTHON" -m verl.trainer.main_ppo "${options[@]}" "$@"
