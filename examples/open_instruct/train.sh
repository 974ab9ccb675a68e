#!/bin/sh
# GRPO with a band by Open-Instruct. Not run here: it needs GPUs and vLLM.
# Arguments go to Open-Instruct: the model, the data, the batch sizes.
export RAY_RUNTIME_ENV_HOOK=bandpo.integrations.ray_workers.runtime_env
# Under uv run, Ray would take a hook of its own in place of that one, and there would be no band.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
export BANDPO_TRAINER=open_instruct
export BANDPO_RULE='{"region": "(kl@0.01).cap(10)"}'

# Without a second update on a batch every ratio is 1, and no clip acts.
exec python open_instruct/grpo_fast.py --loss_fn dapo --num_epochs 2 "$@"
