#!/usr/bin/env bash
# Call 4, carries nothing (PACK/onnxruntime came in pieces): ONNX Runtime on CUDA, compared and timed, and PyTorch.
. "$(dirname "$0")/steps.sh"
[ -n "${DRY:-}" ] || whole onnxruntime
export PYTHONPATH=$VISIT/onnxruntime/whole:$PYTHONPATH
step onnxruntime 120 $measure --stages onnxruntime --precisions fp32 --seconds 2
step torch 40 ${DRY:+echo not run:} $measure --stages torch --precisions fp16 --batches 256 --seconds 3
step compiled 80 ${DRY:+echo not run:} $measure --stages compiled --precisions fp16 --batches 256 --seconds 3
