"""Where a run takes place: versions, device and command, so that a reader can tell what its figures mean."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from lit_compress import __version__


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a figure measured here and now hangs on, by name, as text.

    Args:
        device: What the network runs on.

    Example:
        >>> environment()["torch"] == torch.__version__
        True
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else processor()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "lit-compress": __version__,
        "torch": f"{torch.__version__}{f', CUDA {torch.version.cuda}' if on_cuda else ''}",
    }


def processor() -> str:
    """Name of this machine's processor."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpus.read_text(encoding="utf-8")) if cpus.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()
