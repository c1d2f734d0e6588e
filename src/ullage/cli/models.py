"""``ullage models [NAME|CONFIG.json]``: the catalog, or the exact counts of one model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ullage.errors import EXIT_OK, UllageError
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.spec.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("model", nargs="?", metavar="NAME|CONFIG.json", help=_("count this one instead of listing"))
    parser.add_argument("--assume", action="store_true", help=_("go on over config keys that are not understood"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ullage.cli import print_json

    if arguments.model is None:
        from ullage.catalog.models import entries

        if arguments.json:
            print_json([{key: value for key, value in entry.items() if key != "file"} for entry in entries()])
        else:
            from ullage.report.lists import print_models

            print_models(entries())
        return EXIT_OK
    from ullage.read.model_source import load_model

    facts = model_facts(load_model(arguments.model, assume=arguments.assume, network=True))
    if arguments.json:
        print_json(facts)
    else:
        from ullage.report.lists import print_model

        print_model(facts)
    return EXIT_OK


def model_facts(model: Model) -> dict[str, Any]:
    """Return the counts of a model as plain values."""
    from ullage.account.parameters import count
    from ullage.report.layers import kinds_of_layers

    counts, costs = count(model), cache_costs(model)
    return {
        "name": model.name,
        "architecture": model.architecture,
        "num_parameters": counts.total,
        "num_active_parameters": counts.active,
        "num_mtp_parameters": counts.mtp,
        "num_tower_parameters": counts.towers,
        "num_embedding_parameters": counts.embedding,
        "num_expert_parameters": counts.routed_experts,
        "num_layers": len(model.layers),
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "tied_embeddings": model.tied_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "dtype": model.dtype,
        "quantization": model.quantization.method if model.quantization else None,
        "layers": [{"count": number, "layer": text} for number, text in kinds_of_layers(model)],
        "kv_bytes_per_token": costs[0]["bytes_per_token"],
        "kv_cache": costs,
        "source": model.source,
        "assumed": list(model.assumed),
    }


def cache_costs(model: Model) -> list[dict[str, Any]]:
    """Return fixed and slope of one request, whole model, in each cache format that this kind of attention has.

    ``bytes_per_token`` is exact: an integer, or a float where compressed layers make it a fraction.
    """
    from ullage.account.request_cache import cache_cost

    found = []
    for dtype in (model.dtype, "fp8", "fp8_ds_mla", "nvfp4_ds_mla", "q8_0"):
        try:
            cost = cache_cost(model, dtype)
        except UllageError:  # a format that this kind of attention does not have
            continue
        slope = cost.bytes_per_token
        number = slope.numerator if slope.denominator == 1 else float(slope)
        found.append({"dtype": dtype, "bytes_per_token": number, "fixed_bytes_per_request": cost.fixed_bytes})
    return found
