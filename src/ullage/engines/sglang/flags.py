"""The settings of a job that the shared fields do not hold, read from ``ServingJob.flags``."""

from __future__ import annotations

from dataclasses import dataclass

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.serving import ServingJob

_FALSE = frozenset(("false", "0", "none", "null", "off", "no"))
_DEEPEP_LIKE = frozenset(
    ("deepep", "deepep_v2", "pplx", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer", "megamoe")
)


@dataclass(frozen=True)
class Flags:
    """Read access to a job's flags by name, typed."""

    values: dict[str, str]

    def text(self, name: str, default: str = "") -> str:
        """Return the value as typed, ``default`` where it was not given or given as none."""
        value = self.values.get(name, "").strip()
        return default if value.lower() in ("", "none", "null", "auto") else value

    def on(self, name: str) -> bool:
        """Tell whether a switch was given (and not as false)."""
        return name in self.values and self.values[name].strip().lower() not in _FALSE

    def number(self, name: str) -> float | None:
        """Return a number, or None where it was not given.

        Raises:
            InputError: the value is not a number.
        """
        text = self.text(name)
        if not text:
            return None
        try:
            return float(text)
        except ValueError:
            raise InputError(
                _("--{name} wants a number, not {text!r}").format(name=name.replace("_", "-"), text=text[:80])
            ) from None

    def integer(self, name: str) -> int | None:
        """Return a whole number, or None where it was not given."""
        value = self.number(name)
        return None if value is None else int(value)

    @property
    def all_to_all(self) -> str:
        """The expert all-to-all backend in use, or an empty string.

        Source: sglang@0.5.23:srt/models/deepseek_v2.py:DeepseekV2MoE (_shared_expert_use_tp1).
        """
        backend = self.text("moe_a2a_backend").lower()
        if backend in _DEEPEP_LIKE:
            return backend
        return "deepep" if self.on("enable_deepep_moe") else ""


def flags_of(job: ServingJob) -> Flags:
    """Return the flags of a job, the last of a repeated one."""
    return Flags({name.lstrip("-").replace("-", "_"): value for name, value in job.flags})
