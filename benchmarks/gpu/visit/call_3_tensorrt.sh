#!/usr/bin/env bash
# Call 3, carries nothing: the first engine, whether it answers as it should, and then how fast.
. "$(dirname "$0")/steps.sh"
if ! await 150 "$VISIT/export.done" "$VISIT/export.pid"; then # it was cut off, is too slow, or the machine is a new one
  behind export $measure --stages export,reference               # which ends the old one
  await 150 "$VISIT/export.done" "$VISIT/export.pid"
fi
if [ -z "${DRY:-}" ]; then
  whole tensorrt
  . "$VISIT/tensorrt/whole/activate"
  export PYTHONPATH=$PWD
  measure=${measure/#$PYTHON/python3.10}
fi
# The first proof. 2,048 images are in the reference.
step build_level_0 120 $measure --stages build --level 0
step proof 60 $measure --stages parity
cp "$VISIT"/work/*stages/parity.json "$OUT/parity_level_0.json" # level 2 takes its place in the records
# The bounds on speed are on fp16.
step build_level_2 150 $measure --stages build --level 2 --precisions fp16 --again
step latency 60 $measure --stages latency --precisions fp16 --seconds 4
step parts 40 $measure --stages parts --precisions fp16
step ceilings 30 $measure --stages device --precisions fp16
step proof_level_2 40 $measure --stages parity --precisions fp16 --again
step one_engine 40 $measure --stages one_engine --level 0 --precisions fp16 --seconds 2
