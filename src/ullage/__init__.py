"""ullage: where the GPU memory of a large model goes, whether the job fits, and what to change when it does not.

    >>> import ullage
    >>> result = ullage.fit("deepseek-v3", on="8xH200", context=32768, concurrency=64)
    >>> result.verdict, result.max_context

Names are loaded when they are first used, so that ``import ullage`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ullage.api import fit as fit
    from ullage.api import fit_json as fit_json
    from ullage.api import fit_train as fit_train
    from ullage.api import inspect as inspect
    from ullage.api import validate as validate
    from ullage.engines.serving import EngineStart as EngineStart
    from ullage.errors import InputError as InputError
    from ullage.errors import LayoutError as LayoutError
    from ullage.errors import UllageError as UllageError
    from ullage.errors import UnknownArchitectureError as UnknownArchitectureError
    from ullage.fitting import FitResult as FitResult
    from ullage.fitting import fit_serving as fit_serving
    from ullage.ledger import Certainty as Certainty
    from ullage.ledger import Ledger as Ledger
    from ullage.ledger import Term as Term
    from ullage.read.machine import parse_machine as parse_machine
    from ullage.read.model_source import load_model as load_model
    from ullage.spec.machine import Gpu as Gpu
    from ullage.spec.machine import Machine as Machine
    from ullage.spec.model import Model as Model
    from ullage.spec.serving import ServingJob as ServingJob
    from ullage.spec.serving import ServingParallel as ServingParallel
    from ullage.spec.training import Precision as Precision
    from ullage.spec.training import Recompute as Recompute
    from ullage.spec.training import TrainingJob as TrainingJob
    from ullage.spec.training import TrainingParallel as TrainingParallel
    from ullage.trace.api import trace as trace
    from ullage.trace.result import TraceResult as TraceResult
    from ullage.training_fit import TrainingFit as TrainingFit

__version__ = "0.1.0"

#: public name -> module it lives in
_PUBLIC = {
    "fit": "ullage.api",
    "fit_json": "ullage.api",
    "fit_train": "ullage.api",
    "inspect": "ullage.api",
    "validate": "ullage.api",
    "EngineStart": "ullage.engines.serving",
    "InputError": "ullage.errors",
    "LayoutError": "ullage.errors",
    "UllageError": "ullage.errors",
    "UnknownArchitectureError": "ullage.errors",
    "FitResult": "ullage.fitting",
    "fit_serving": "ullage.fitting",
    "Certainty": "ullage.ledger",
    "Ledger": "ullage.ledger",
    "Term": "ullage.ledger",
    "parse_machine": "ullage.read.machine",
    "load_model": "ullage.read.model_source",
    "Gpu": "ullage.spec.machine",
    "Machine": "ullage.spec.machine",
    "Model": "ullage.spec.model",
    "ServingJob": "ullage.spec.serving",
    "ServingParallel": "ullage.spec.serving",
    "Precision": "ullage.spec.training",
    "Recompute": "ullage.spec.training",
    "TrainingJob": "ullage.spec.training",
    "TrainingParallel": "ullage.spec.training",
    "TraceResult": "ullage.trace.result",
    "TrainingFit": "ullage.training_fit",
}
#: rooms that are used by name, such as ``ullage.guard.Guard``; ``ullage.trace`` is a room that can be called
_ROOMS = ("guard", "trace")
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _ROOMS:
        return import_module(f"ullage.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ullage' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_ROOMS})
