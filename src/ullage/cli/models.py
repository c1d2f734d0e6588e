"""``ullage models [NAME|CONFIG.json]``: the catalog, or the exact counts of one model."""

from __future__ import annotations

import argparse
from typing import Any

from ullage.errors import EXIT_OK
from ullage.i18n import _


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


def model_facts(model: Any) -> dict[str, Any]:
    """Return the counts of a model as plain values."""
    from ullage.account.parameters import count
    from ullage.spec.codec import encode

    counts = count(model)
    runs = encode(model)["layers"]
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
        "layers": [{"count": run["count"], "layer": _layer_text(runs, run)} for run in runs],
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "source": model.source,
        "assumed": list(model.assumed),
    }


def _layer_text(runs: list[dict[str, Any]], run: dict[str, Any]) -> str:
    layer = runs[run["layer"]]["layer"] if isinstance(run["layer"], int) else run["layer"]
    parts = [*layer.get("mixers", ()), *layer.get("ffns", ())]
    return " + ".join(part["kind"] + (f"(window {part['window']})" if part.get("window") else "") for part in parts)


def kv_bytes_per_token(model: Any) -> int | None:
    """Return what one more token of a long request keeps over all layers in the model's own dtype, unsharded."""
    from ullage.account.kv_cache import bytes_per_token
    from ullage.errors import UllageError

    try:
        return int(bytes_per_token(model, model.dtype))
    except UllageError:  # a cache that has no such dtype
        return None
