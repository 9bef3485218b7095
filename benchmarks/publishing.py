"""What all benchmarks share: naming the machine, and writing down what was measured."""

import json
import os
import platform
import re
from pathlib import Path

import torch

from hiper_lab.trajectory import write_atomic


def machine() -> str:
    """Processor, cores, Python and GPU, in words."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    kind = name[1].strip() if name else platform.machine()
    return f"{kind}, {os.cpu_count()} cores, Python {platform.python_version()}{gpu}"


def publish(result: dict, out: Path, script: str, text: str) -> None:
    """Write the numbers of a script as JSON, and its tables into README.md, between its marks."""
    write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
    readme = Path(__file__).with_name("README.md")
    marks = rf"(<!-- {re.escape(script)} -->\n).*?(<!-- end -->)"
    updated = re.sub(
        marks, lambda m: f"{m[1]}\n{text}\n\n{m[2]}", readme.read_text(), count=1, flags=re.DOTALL
    )
    write_atomic(readme, updated.encode())
