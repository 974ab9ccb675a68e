#!/bin/sh
# GRPO with a band by OpenRLHF 0.11.2. Not run here: it needs GPUs and vLLM.
# Arguments go to OpenRLHF: the model, the data, the batch sizes.
export RAY_RUNTIME_ENV_HOOK=bandpo.integrations.ray_workers.runtime_env
# Under uv run, Ray would take a hook of its own in place of that one, and there would be no band.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export BANDPO_TRAINER=openrlhf
export BANDPO_RULE='{"region": "(kl@0.01).cap(10)"}'

# Without a second update on a batch every ratio is 1, and no clip acts.
exec python -m openrlhf.cli.train_ppo_ray --train.max_epochs 2 "$@"
