#!/usr/bin/env bash
# Stage demo: the demo with its real model on one GPU, from the two halves of the model that prepare.sh --model made.
set -eu
if [ ! -f "$PARTS/a" ] || [ ! -f "$PARTS/b" ]; then
  echo "| no model: bring .gpu-a and .gpu-b here, together or one after the other"
  exit 1
fi
folder=${WORK:-/tmp}/malora_demo
rm -rf "$folder" && mkdir -p "$folder/demo"
cat "$PARTS/a" "$PARTS/b" >"$folder/demo/SmolLM2-135M-Instruct.Q4_1.gguf"
cp -r .gpu/demo/tasks "$folder/demo/"
recipe=$PWD/malora_dist/recipes/demo.yaml
cd "$folder"
log=$LOGS/demo_run.log
deepspeed --num_gpus 1 --module malora_dist.train "$recipe" "$@" >"$log" 2>&1 || { tail -20 "$log"; exit 1; }
grep -E "accuracy|step [0-9]+/|improved|average" "$log" | sed 's/^/| /' | tail -20
