#!/usr/bin/env bash
# check.sh [STAGE | GROUP]...: on the GPU machine, in the repository's root, beside the folders of prepare.sh.
#
#   core   env tests layer nf4 train        does it run, and is it right
#   speed  attention bench model            how fast, against PEFT
#   demo   the demo on its real model
#
# Without arguments: core. Every stage has a limit of seconds and ends in a verdict; LIMIT is for all of them. Logs are in
# $OUT/logs.tgz. Without a GPU the stages run on tiny sizes on the CPU, which tries these scripts and nothing else.
#
# PYTHON  another python3              SITE         where .gpu-wheels are installed, once
# OUT     where results are put        WORKERS      arguments of pytest, such as -n 8
# LOGS    where stages write           STAGE_LIMIT  seconds for each stage, instead of its own limit
# PARTS   where halves of the demo's model are kept, once they were beside the repository
# WORK    where malora_train and malora_demo, the folders of runs, are made anew; the rest of it is left alone
set -u
export OUT=${OUT:-$PWD/.gpu/out} LOGS=${LOGS:-/tmp/malora_logs} PARTS=${PARTS:-/tmp/malora_parts}
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error
export MALORA_CACHE=${MALORA_CACHE:-/tmp/malora_cache}
site=${SITE:-/tmp/malora_site}
began=$SECONDS
summary=()
failed=0

install() { # what the machine lacks, beside what it has
  [ -d .gpu-wheels ] && [ ! -f "$site/.done" ] || return 0
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
    .gpu-wheels/*.whl 2>"$LOGS/install.log" || { tail "$LOGS/install.log"; exit 1; }
  touch "$site/.done"
  echo "installed in $((SECONDS - began)) s"
}

keep_parts() { # of the demo's model, which may come here one by one
  local part
  for part in a b; do [ ! -f ".gpu-$part/part" ] || cp ".gpu-$part/part" "$PARTS/$part"; done
}

stage() { # name seconds command...
  local name=$1 own=${STAGE_LIMIT:-$2} start=$SECONDS verdict left=$((began + ${LIMIT:-390} - SECONDS)) limit
  shift 2
  if [ "$left" -lt 10 ]; then
    summary+=("$name not begun") failed=1
    return
  fi
  limit=$((left < own ? left : own))
  timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  case $? in
    0) verdict=PASS ;;
    124 | 137) if ((limit < own)); then verdict="CUT (LIMIT left $limit s of $own)"; else verdict="FAIL (over $limit s)"; fi ;;
    *) verdict=FAIL ;;
  esac
  echo "== $name: $verdict in $((SECONDS - start)) s"
  grep '^|' "$LOGS/$name.log" | cut -c1-320
  if [ "$verdict" != PASS ]; then
    grep -v '^|' "$LOGS/$name.log" | tail -15 | cut -c1-240
    failed=1
  fi
  summary+=("$name $verdict")
  tar czf "$OUT/logs.tgz" -C "$LOGS" .
}

tests() {
  local workers=${WORKERS-$($PYTHON -c 'import xdist; print("-n 8")' 2>/dev/null)}
  # shellcheck disable=SC2086
  stage tests 200 $PYTHON -m pytest -q -m gpu -p no:cacheprovider $workers tests/gpu tests/functional
  tail -1 "$LOGS/tests.log"
}

run() {
  case $1 in
    core) for each in env tests layer nf4 train; do run $each; done ;;
    speed) for each in attention bench model; do run $each; done ;;
    tests) tests ;;
    env) stage env 60 $PYTHON -m benchmarks.gpu.env ;;
    layer) stage layer 90 $PYTHON -m benchmarks.gpu.layer ;;
    nf4) stage nf4 40 $PYTHON -m benchmarks.gpu.nf4 ;;
    train) stage train 170 $PYTHON -m benchmarks.gpu.train ;;
    attention) stage attention 60 $PYTHON -m benchmarks.gpu.attention ;;
    bench) stage bench 150 $PYTHON -m benchmarks.gpu.bench ;;
    model) stage model 150 $PYTHON -m benchmarks.gpu.model ;;
    demo) stage demo 280 bash benchmarks/gpu/demo.sh ;;
    *)
      echo "no stage $1"
      summary+=("$1 unknown") failed=1
      ;;
  esac
}

mkdir -p "$OUT" "$LOGS" "$PARTS"
install
keep_parts
export PYTHONPATH=$PWD:$site PATH=$site/bin:$PATH
for wanted in "${@:-core}"; do run "$wanted"; done
echo "== summary after $((SECONDS - began)) s"
printf '%s\n' "${summary[@]}"
exit $failed
