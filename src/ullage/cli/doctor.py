"""``ullage doctor``: what this installation can do, and which engines are here."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from typing import Any

from ullage.errors import EXIT_OK
from ullage.i18n import _

#: Optional packages and what they are for; engines are compared with the version that is mirrored.
EXTRAS = {
    "huggingface_hub": "hub", "PyYAML": "train", "torch": "torch", "transformers": "trace", "nvidia-ml-py": "gpu",
    "psutil": "run", "prometheus-client": "watch", "httpx": "bench", "plotly": "html", "numpy": "plan",
}  # fmt: skip
PACKAGES = {"vllm": "vllm", "sglang": "sglang", "torch": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ullage.cli import print_json

    found = examine()
    if arguments.json:
        print_json(found)
        return EXIT_OK
    for name, text in _lines(found):
        print(f"{name:<18} {text}")
    return EXIT_OK


def examine() -> dict[str, Any]:
    """Return what there is."""
    from ullage import __version__
    from ullage.catalog.gpus import entries as gpu_entries
    from ullage.catalog.models import entries as model_entries
    from ullage.cli.engines import engines

    return {
        "ullage": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "extras": {extra: _version(package) for package, extra in EXTRAS.items()},
        "installed": {package: _version(package) for package in PACKAGES},
        "mirrored": {engine["name"]: engine["newest"] for engine in engines()},
        "num_models": len(model_entries()),
        "num_gpus_known": len(gpu_entries()),
        "gpus_here": _gpus_here(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus_here() -> list[str]:
    """Return the names that ``nvidia-smi`` gives, none when there is no driver."""
    import subprocess

    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("ullage", found["ullage"]),
        ("python", f"{found['python']} ({found['platform']})"),
        (
            _("catalog"),
            _("{models} models, {gpus} GPUs").format(models=found["num_models"], gpus=found["num_gpus_known"]),
        ),
    ]
    for extra, version in found["extras"].items():
        missing = _("not installed (pip install 'ullage[{extra}]')").format(extra=extra)
        lines.append((_("extra {name}").format(name=extra), version or missing))
    for engine, newest in found["mirrored"].items():
        here = found["installed"].get(engine)
        lines.append((engine, _("mirrored up to {newest}; installed: {here}").format(newest=newest, here=here or "–")))
    lines.append(("GPU", "; ".join(found["gpus_here"]) or _("none here (none is needed)")))
    return lines
