# shellcheck shell=bash
# Settings for RANKS processes on this machine: `source launch/env.sh RANKS`. What is set already stays.

if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
  export OMP_NUM_THREADS="$((cores > $1 ? cores / $1 : 1))"
  unset cores
fi

if ! nvidia-smi -L >/dev/null 2>&1; then
  # On CPU, each step frees large buffers and asks for them again. Let glibc (2.35 or newer) keep them in its heap:
  # giving them back costs a page fault for every 4 KiB at the next step.
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
  # Experts receive another number of rows each step, and oneDNN compiles a kernel for every shape: keep them all.
  export ONEDNN_PRIMITIVE_CACHE_CAPACITY="${ONEDNN_PRIMITIVE_CACHE_CAPACITY:-100000}"
fi
