#!/usr/bin/env bash
# Train a recipe on several machines with torchrun. Start this on every node, from the same folder.
#
# usage     MAIN=node0:29500 NODES=2 DEVICES=8 recipes/launch/torchrun.sh --config recipes/... --config recipes/...
#           MAIN     host (and port) of the first node, which all nodes can reach; default: this machine alone
#           NODES    how many machines; default 1
#           DEVICES  processes on each, one for each GPU; default 1
#           RESTARTS how often all ranks start again from the last checkpoint when one is lost; default 3
#
# The batch is the recipe's: give DifferentialPrivacy(expected_batch_size=...) in the recipe, or a loader's batch_size
# that gives the batch you want when multiplied by NODES × DEVICES.
set -euo pipefail

NODES=${NODES:-1} DEVICES=${DEVICES:-1} MAIN=${MAIN:-127.0.0.1:29500} RESTARTS=${RESTARTS:-3}

# With the default, torch 2.15 keeps one store over all restarts, and gloo then finds the addresses of dead processes.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# One rendezvous for all nodes: c10d, which hands out ranks by itself and starts again after a loss.
exec torchrun \
  --nnodes "$NODES" --nproc-per-node "$DEVICES" --max-restarts "$RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$MAIN" --rdzv-id "${RUN_ID:-lightning_dp}" \
  --module lightning_dp fit "$@" \
  --config recipes/launch/cluster.yaml \
  --trainer.num_nodes "$NODES" --trainer.devices "$DEVICES" \
  --ckpt_path last
