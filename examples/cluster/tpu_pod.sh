#!/bin/sh
# A run on all hosts of a TPU pod slice of Google Cloud, started from your own machine:
#
#     sh examples/cluster/tpu_pod.sh NAME ZONE run.yaml
#
# Every host needs the environment `.venv` in its home folder, made with `pip install "jax[tpu]"`, and
# a mounted file system with the data and the output, here `/mnt/shared`. TPU hosts know each other,
# so `--coordinator auto` needs no addresses. `fsdp` is the number of chips: 16 for a v5e-16.
set -eu

name=$1 zone=$2 settings=$3

gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
    cd /mnt/shared &&
    ~/.venv/bin/dpo-eqx train --config $settings --output run \
        --mesh fsdp=16 --coordinator auto --resume"
