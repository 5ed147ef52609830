#!/usr/bin/env bash
# Call 5, carries nothing (PACK/training came in pieces): what a step of training takes, and as much of a run as the time allows.
. "$(dirname "$0")/steps.sh"
step training_step 90 "$PYTHON" -m benchmarks.gpu.visit.training_step ${DRY:+--dry-run} --out "$OUT/training_step.json"
[ -n "${DRY:-}" ] || whole training
export PYTHONPATH=$PYTHONPATH:$VISIT/training/whole/site
step train $(($(left) - 20)) ${DRY:+echo not run:} "$PYTHON" -c 'from advmoe_deploy.cli.app import main; main()' \
  train cifar10-advmoe-cpu --data "cifar10:$VISIT/training/whole/data" --out "$VISIT/run" --set evaluate_every=5
