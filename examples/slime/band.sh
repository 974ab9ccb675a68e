#!/bin/sh
# slime 0.3.1 with a band. Not run here: it needs GPUs and Megatron. Arguments go to slime's train.py.
here=$(dirname "$0")
exec python train.py \
  --loss-type custom_loss \
  --custom-loss-function-path bandpo.integrations.slime.band_loss \
  --custom-config-path "$here/band.yaml" \
  "$@"
