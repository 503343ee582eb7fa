"""The machine that results are from: its GPU, versions of packages, speed of matrix products.

Example:
    python -m benchmarks.gpu_machine --device cuda
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.common import Row, add_device_flag, make_parser, matmul_rate, report, run
from model.packing import varlen_works

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "triton")
HEAD_WIDTH = 128  # of Llama-2-7B


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(device: torch.device) -> Iterator[Row]:
    """One row about the machine."""
    row: Row = {"python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    yield row | {
        "packages": {name: installed(name) for name in PACKAGES},
        "matmul_tflops": round(matmul_rate(device) / 1e12, 3),
        "variable_length_attention": varlen_works(device, torch.bfloat16, HEAD_WIDTH),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Describe the machine."""
    parser = make_parser(__doc__)
    add_device_flag(parser)
    flags = parser.parse_args(argv)
    report("gpu_machine", flags.device, describe(torch.device(flags.device)))


if __name__ == "__main__":
    run(main)
