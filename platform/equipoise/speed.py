"""How a step is computed: precision and what a machine must have for it.

Knows torch's switches and devices; must not know networks or losses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch

from equipoise.config import RunConfig, SpeedConfig
from slicestore.errors import InputError

COMPILERS = ("c++", "g++", "clang++")
FLOAT32 = "set speed.precision to float32"


def check(config: RunConfig, device: torch.device) -> None:
    """Refuse what this machine cannot do.

    Raises:
        InputError: a setting of `speed` that the device, or its software, has no support for.
    """
    speed, alone = config.speed, config.workers == 1
    cuda = device.type == "cuda"
    needs: tuple[tuple[str, bool, Callable[[], bool], str, str], ...] = (
        ("precision", speed.precision == "bfloat16", lambda: bfloat16(device), "bfloat16 needs units for it", FLOAT32),
        (
            "precision",
            speed.precision == "tf32",
            lambda: cuda and _ampere(device),
            "NVIDIA has it since Ampere",
            FLOAT32,
        ),
        ("graphs", speed.graphs, lambda: cuda, "CUDA graphs need a CUDA device", "leave it out"),
        ("graphs", speed.graphs, lambda: alone, "a graph holds no exchange between workers", "set workers to 1"),
        ("compile", speed.compile, lambda: compiler() is not None, "torch.compile needs a C++ compiler", "install g++"),
    )
    for setting, asked, there, rule, remedy in needs:
        if asked and not there():
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
    tf32 = speed.precision == "tf32"
    # By the older switches: after the newer ones torch's own getters raise, and compile and export ask them.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


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
