#!/usr/bin/env bash
# Call 5, carries nothing (PACK/training came in pieces): what a step of training takes, and as much of a run as the time allows.
. "$(dirname "$0")/steps.sh"
step training_step 90 "$PYTHON" -m benchmarks.gpu.visit.training_step ${DRY:+--dry-run} --out "$OUT/training_step.json"
[ -n "${DRY:-}" ] || whole training
export PYTHONPATH=$PYTHONPATH:$VISIT/training/whole/site
if [ -z "${DRY:-}" ]; then run=(cifar10-advmoe-cpu --data "cifar10:$VISIT/training/whole/data" --set evaluate_every=5)
else run=(digits-advmoe --set epochs=1 --set evaluate_every=1); fi
step train $(($(left) - 20)) "$PYTHON" -c 'from advmoe_deploy.cli.app import main; main()' train "${run[@]}" --out "$VISIT/run"
