"""How a step is computed: precision and what a machine must have for it.

Knows torch's switches and devices; must not know networks or losses.
"""

from __future__ import annotations

import shutil

import torch

from equipoise.config import RunConfig, SpeedConfig
from slicestore.errors import InputError

COMPILERS = ("c++", "g++", "clang++")


def check(config: RunConfig, device: torch.device) -> None:
    """Refuse what this machine cannot do.

    Raises:
        InputError: a setting of `speed` that the device, or its software, has no support for.
    """
    speed = config.speed
    cuda = device.type == "cuda"
    for setting, asked, there, rule, remedy in (
        ("precision", speed.precision == "bfloat16", bfloat16(device), "bfloat16 needs units for it", "take float32"),
        (
            "precision",
            speed.precision == "tf32",
            cuda and _ampere(device),
            "tf32 is of NVIDIA cards since Ampere",
            "take float32",
        ),
        ("graphs", speed.graphs, cuda, "CUDA graphs need a CUDA device", "leave it out"),
        (
            "graphs",
            speed.graphs,
            config.workers == 1,
            "a graph holds no exchange between workers",
            "set workers to 1, or leave it out",
        ),
        (
            "compile",
            speed.compile,
            compiler() is not None,
            "torch.compile needs a C++ compiler",
            "install g++, or leave it out",
        ),
    ):
        if asked and not there:
            raise InputError(
                f"speed.{setting}",
                found=f"{getattr(speed, setting)} on {device.type} with {config.workers} worker(s)",
                rule=rule,
                remedy=remedy,
            )


def bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def compiler() -> str | None:
    """The C++ compiler that torch.compile would find, if there is one."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def arrange(speed: SpeedConfig) -> None:
    """Set what torch keeps for the whole process: whether convolutions in float32 may use tf32."""
    precision = "tf32" if speed.precision == "tf32" else "ieee"
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = precision


def autocast(speed: SpeedConfig, device: torch.device) -> torch.autocast:
    """The context in which networks are called; losses and gradients are taken outside of it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=speed.precision == "bfloat16")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
