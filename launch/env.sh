# shellcheck shell=bash
# Memory settings for processes that train: `source launch/env.sh`. What is set already stays.

if ! nvidia-smi -L >/dev/null 2>&1; then
  # On CPU, each step frees large buffers and asks for them again. Let glibc (2.35 or newer) keep them in its heap:
  # giving them back costs a page fault for every 4 KiB at the next step.
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}"
  export MALLOC_TOP_PAD_="${MALLOC_TOP_PAD_:-268435456}"
  # Experts receive another number of rows each step, and oneDNN compiles a kernel for every shape: keep them all.
  export ONEDNN_PRIMITIVE_CACHE_CAPACITY="${ONEDNN_PRIMITIVE_CACHE_CAPACITY:-100000}"
fi
