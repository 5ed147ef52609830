# Sourced by the scripts of a first visit (../first_visit.md), in the root of this checkout.
#   OUT      an empty folder; what is in it when the call ends, cut off or not, is what one keeps
#   VISIT    where calls meet, outside the checkout
#   PACK     what benchmarks/gpu/visit/prepare.py made, or the part of it that this call carries
#   DRY      anything: do on a CPU what needs no GPU
#   SECONDS_OF_VISIT, SECONDS_OF_CALL   the machine is gone so long after the first call began (of 900, starting it took
#                                       some 120), a call is ended
: "${OUT:?name an empty folder in OUT}"
set -uo pipefail
export VISIT=${VISIT:-/tmp/advmoe-visit} PACK=${PACK:-pack} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" "$VISIT/work"
# Packages that were brought are for one version of Python.
export PYTHONPATH=$PWD:$VISIT/site/$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1
[ -e "$VISIT/began" ] || date +%s >"$VISIT/began"

# left: seconds until the visit ends, or the call where that is sooner.
left() {
  local visit=$(($(cat "$VISIT/began") + ${SECONDS_OF_VISIT:-750} - $(date +%s))) call=$((${SECONDS_OF_CALL:-585} - SECONDS))
  echo $((visit < call ? visit : call))
}

# keep: records of all stages, logs and what a training run says, as one file: few may come back.
keep() {
  local part=$VISIT/.kept.$BASHPID
  (cd "$VISIT" && tar -czf "$part" work/*stages ./*.log run/*.json*) 2>/dev/null || true # those that there are
  mv "$part" "$OUT/kept.tgz" 2>/dev/null || true
}
(while sleep 2; do keep; done) >/dev/null 2>&1 &
keeper=$!
trap 'kill $keeper 2>/dev/null; keep' EXIT

# step NAME SECONDS COMMAND...: run it for so long at most, less where the visit ends before; say in
# steps.jsonl what came of it, and go on whatever that was.
step() {
  local name=$1 most=$2 rc=0 begun
  shift 2
  begun=${EPOCHREALTIME/./}
  [ -z "${DRY:-}" ] || most=$((20 * most)) # a CPU is not a GPU
  ((most <= $(left))) || most=$(left)
  if ((most < 5)); then rc=skipped; else timeout -k 5 "$most" "$@" 2>&1 || rc=$?; fi
  printf '{"step": "%s", "rc": "%s", "cut_off_s": %d, "ms": %d, "left_s": %d}\n' \
    "$name" "$rc" "$most" $(((${EPOCHREALTIME/./} - begun) / 1000)) "$(left)" | tee -a "$OUT/steps.jsonl"
  keep
}

# alive PID: whether the process whose number is in this file runs; one that has ended and waits for its parent does not.
alive() { grep -qs '^State:.[^ZX]' "/proc/$(cat "$1" 2>/dev/null)/status"; }

# await SECONDS FILE PID: wait for a file that a process behind an earlier call makes.
await() {
  local until=$(($(date +%s) + $1))
  while [ ! -e "$2" ] && alive "$3" && (($(date +%s) < until)); do sleep 1; done
  [ -e "$2" ]
}

# whole NAME: wait for what came in pieces; where its unpacking was ended with an earlier call, begin it anew.
whole() {
  await 60 "$VISIT/$1.done" "$VISIT/$1.pid" || bash "$(dirname "$0")/call_2_pieces.sh" "$1"
  [ -e "$VISIT/$1.done" ] || { echo "$1 is not whole: bring the pieces that are missing, and call again"; exit 1; }
}

# behind NAME COMMAND...: let it go on when this call has ended; NAME.done says that all went well.
behind() {
  local name=$1
  shift
  [ ! -e "$VISIT/$name.pid" ] || kill -- "-$(cat "$VISIT/$name.pid")" 2>/dev/null || true # what is left of an earlier one
  rm -f "$VISIT/$name.done"
  setsid nohup bash -c '"$@" && touch "$0"' "$VISIT/$name.done" "$@" >"$VISIT/$name.log" 2>&1 </dev/null &
  echo $! >"$VISIT/$name.pid"
}

measure="$PYTHON -m benchmarks.gpu.main --data cifar10:$VISIT/data --work $VISIT/work --models advmoe-resnet18 --out $OUT/gpu_trt.json"
if [ -n "${DRY:-}" ]; then measure="$measure --dry-run --images 64 --batches 1,8"; else measure="$measure --images 2048"; fi
