#!/usr/bin/env bash
# Resolves cpu.txt and gpu.txt from their .in files with uv, and keeps the head of each. Pins stay as they are unless
# an .in file forbids them or --upgrade is given.
set -euo pipefail
cd "$(dirname "$0")/.."

resolve() {
    local lock=requirements/$1.txt head
    shift
    head=$(grep '^#' "$lock")
    uv pip compile -q "$@" --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header -o "$lock"
    printf '%s\n%s\n' "$head" "$(cat "$lock")" >"$lock"
}

resolve cpu requirements/cpu.in --override requirements/overrides-cpu.txt "$@"
resolve gpu requirements/gpu.in "$@"
