"""Megatron-LM flags as ``validate_args`` leaves them: old names under new ones, and what follows from other flags.

Source: Megatron-LM@d98e8a6:megatron/training/arguments.py:validate_args.
"""

from __future__ import annotations

import re

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.megatron_words import Arguments

#: Optimizers whose distributed form deals out whole tensors instead of slices of a buffer.
_BY_TENSOR = ("muon", "dist_muon")
_VARIANTS = {"dsa": "dsa", "gdn": "gated_delta_net", "gated_delta_net": "gated_delta_net"}


def resolved(args: Arguments) -> Arguments:
    """Return the flags with one name for each thing."""
    values = dict(args.values)
    for resolve in (_graphs, _optimizer, _experts, _variant, _pattern):
        values.update(resolve(Arguments(values=values)))
    return Arguments(values=values, environment=args.environment)


def _graphs(args: Arguments) -> dict[str, str]:
    """``--enable-cuda-graph`` and ``--external-cuda-graph`` are implementations of ``--cuda-graph-impl``."""
    found = {"cuda-graph-modules": args.get("cuda-graph-scope")} if args.stated("cuda-graph-scope") else {}
    if args.on("enable-cuda-graph"):
        return {**found, "cuda-graph-impl": "local"}
    return {**found, "cuda-graph-impl": "transformer_engine"} if args.on("external-cuda-graph") else found


def _optimizer(args: Arguments) -> dict[str, str]:
    """Muon with the distributed optimizer is Muon that deals out whole tensors, and no distributed optimizer."""
    if args.get("optimizer") in _BY_TENSOR and args.on("use-distributed-optimizer"):
        return {"optimizer": "dist_muon", "use-distributed-optimizer": "false"}
    return {}


def _experts(args: Arguments) -> dict[str, str]:
    """No experts may be written as 0."""
    return {"num-experts": ""} if args.get("num-experts") in ("0", "None", "none") else {}


def _variant(args: Arguments) -> dict[str, str]:
    """Give a variant of attention its name.

    Raises:
        InputError: one that is not followed.
    """
    name = args.get("experimental-attention-variant")
    if not args.stated("experimental-attention-variant"):
        return {}
    if name not in _VARIANTS:
        raise InputError(
            _("the attention variant {name!r} is not followed").format(name=name[:40]),
            where="--experimental-attention-variant",
            remedy=_("known are {known}").format(known=", ".join(_VARIANTS)),
        )
    return {"experimental-attention-variant": _VARIANTS[name]}


def _pattern(args: Arguments) -> dict[str, str]:
    """A hybrid pattern says how many layers predict further tokens, and may divide the pipeline.

    ``M*M*/MM/MM``: two depths of ``MM``; ``M-M-|M-M*-``: two pipeline stages, placed like a pipeline layout.
    """
    text = args.pattern
    if not text:
        return {}
    depth, more = args.count("mtp-num-layers", 0), args.get("mtp-hybrid-override-pattern")
    if "/" not in text and more and depth:
        text = "/".join([text, *[more] * min(depth, 64)])
    main, *depths = text.split("/")
    found = {"hybrid-layer-pattern": text, "hybrid-override-pattern": ""}
    depths = [letters for letters in depths if letters]
    if depths:
        found["mtp-num-layers"] = str(len(depths))
    if "|" in main:
        stages = ["t" * len(re.sub(r"\s", "", stage)) for stage in main.split("|")]
        last = "m" * bool(depths or depth) + "L"
        found["pipeline-model-parallel-layout"] = "E" + "|".join(stages) + last
    return found
