#!/usr/bin/env bash
# Call 1, carries PACK/1: what is there, our CUDA layer and the router's kernel, while the model is exported.
. "$(dirname "$0")/steps.sh"
cp -r "$PACK"/1/. "$VISIT" # data/ and site/
step needed 30 "$PYTHON" -c 'import advmoe_deploy.cli.app, numpy, onnx, onnxruntime, pydantic, rich, safetensors, torch, typer' # exported with
behind export $measure --stages export,reference
step look 20 bash -c 'nvidia-smi; nproc; free -g | head -2; nvcc --version | tail -2; ls /usr/lib/x86_64-linux-gnu | grep -iE "nvinfer|cudnn"; '"$PYTHON"' -m pip list 2>/dev/null | grep -iE "cuda|torch|onnx|tensorrt|triton|pydantic|numpy"' >"$OUT/look.txt"
step cuda_layer 60 "$PYTHON" -m benchmarks.gpu.visit.cuda_layer ${DRY:+--dry-run} --out "$OUT/cuda_layer.json"
step router_kernel 90 ${DRY:+echo not run:} $measure --stages router_kernel --seconds 1
[ -z "${DRY:-}" ] || await 3000 "$VISIT/export.done" "$VISIT/export.pid"
