"""Does the environment that setup.sh made work? Prints the versions, or each fault with its fix. Exits 1 on a fault.

Usage: python requirements/verify.py cpu|gpu TORCH_INDEX
"""

import ctypes
import importlib
import platform
import sys
from importlib import metadata
from pathlib import Path


def check_torch(lock: str, index: str) -> str | None:
    if lock == "cpu":
        pin = f"torch=={metadata.version('torch').split('+')[0]}"
        fix = f"Take the CPU build: .venv/bin/pip install --no-deps --force-reinstall --index-url {index} {pin}"
    else:
        fix = "Remove .venv and run make setup again."
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError, ValueError) as error:
        return f"torch does not load: {error}. On a CPU this is mostly a build for CUDA. {fix}"
    if lock == "cpu" and torch.version.cuda is not None:
        return f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, whose libraries are not here. {fix}"
    if lock == "gpu" and torch.version.cuda is None:
        return f"torch {torch.__version__} is the CPU build, which pip's configuration puts first. Change it. {fix}"
    return None


def check_vllm(lock: str) -> str | None:
    if lock == "cpu":
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and "avx2" not in cpuinfo.read_text():
            return "vLLM needs a CPU with AVX2. Use `rollout.engine.type=local` in the config."
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError:
            return (
                "vLLM needs libnuma.so.1 of the system. On Debian or Ubuntu: sudo apt-get install libnuma1; "
                "on Fedora: sudo dnf install numactl-libs. Then run make setup again."
            )
    try:
        importlib.import_module("vllm")
    except (ImportError, OSError) as error:
        return f"vLLM does not load: {error}. Remove .venv and run make setup again."
    return None


def main(lock: str, index: str) -> int:
    fault = check_torch(lock, index)
    has_vllm = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    if fault is None and has_vllm:
        fault = check_vllm(lock)
    if fault is not None:
        print(f"setup: {fault}", file=sys.stderr)
        return 1
    torch = importlib.import_module("torch")
    engine = f"vLLM {importlib.import_module('vllm').__version__}" if has_vllm else "no vLLM here: use the local engine"
    print(f"setup: torch {torch.__version__}, {engine}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
