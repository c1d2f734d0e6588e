"""Write catalog entries from ``config.json`` files.

    python tools/make_model_catalog.py --sources INDEX.md CONFIG.json ...

Every config is read with :func:`ullage.read.hf_config.read_config`; what is not understood is named and left out.
Beside the files given, the entries of ``tools/extra_models.json`` (dimensions with the public source each is from) and
the aliases of ``tools/model_aliases.json`` are written. An extra entry with ``like`` is the named entry's config with
the keys of its own ``config`` changed; an entry under the name of a file takes its place. The index is made anew.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ullage.account.parameters import count
from ullage.catalog.models import keys_of
from ullage.errors import UllageError
from ullage.read.hf_config import read_config_object
from ullage.read.jsonfile import read_json_object
from ullage.read.quantization_names import named_quantization
from ullage.spec.codec import decode_model, encode
from ullage.spec.model import Model

TOOLS = Path(__file__).parent
FOLDER = TOOLS.parent / "src/ullage/catalog/models"
#: Published files whose dimensions are not those of the model they are filed under.
WRONG = {"meta-llama/Meta-Llama-3-8B": "the file has the dimensions of the 70B model"}
#: Published files whose list of plain modules is shortened -> the method whose rule stands in its place.
#: Llama 3.1 405B keeps all of self-attention and the first and last layers in bf16 (arXiv:2407.21783 sec. 6.2); the
#: file at hand names those of two layers, which would make the checkpoint 14 % smaller than it is.
SHORTENED = {"meta-llama/Llama-3.1-405B-Instruct-FP8": "fbgemm_fp8"}
SKIPPED = re.compile(r"__(alt_|native|hf_quant_config|ome)")


def sources_of(index: Path | None) -> dict[str, str]:
    """Read the source column of a Markdown table of configs: file stem → where it is from."""
    if index is None:
        return {}
    found = {}
    for line in index.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) > 4 and "__" in cells[0]:
            found[cells[0]] = cells[-1].split(" (")[0].strip()
    return found


def write_entry(model: Model, source: str, aliases: list[str]) -> dict[str, Any]:
    """Write the file of one model and return its line of the index."""
    model = replace(model, source=source)
    file = model.name.replace("/", "__").lower() + ".json"
    body = {"format": "ullage.model/1", "model": encode(model)}
    assert decode_model(json.loads(json.dumps(body["model"]))) == model, model.name
    (FOLDER / file).write_text(json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n")
    counts = count(model)
    return {
        "name": model.name,
        "file": file,
        "aliases": aliases,
        "architecture": model.architecture,
        "num_parameters": counts.total,
        "num_active_parameters": counts.active,
        "num_mtp_parameters": counts.mtp,
        "num_layers": len(model.layers),
        "max_position_embeddings": model.max_position_embeddings,
        "quantization": model.quantization.method if model.quantization else None,
    }


def check_counts(lines: list[dict[str, Any]]) -> None:
    """Refuse an extra entry whose count is not the published one."""
    published = {
        extra["name"]: extra.get("num_parameters") for extra in json.loads((TOOLS / "extra_models.json").read_text())
    }
    wrong = [
        f"{line['name']}: {line['num_parameters']:,} parameters, published are {published[line['name']]:,}"
        for line in lines
        if published.get(line["name"]) not in (None, line["num_parameters"])
    ]
    if wrong:
        raise SystemExit("\n".join(wrong))


def configs_of(paths: list[Path], sources: dict[str, str]) -> list[tuple[str, dict[str, Any], str]]:
    """Return (name, config, source) of every file and of every extra entry."""
    found = []
    for path in paths:
        if SKIPPED.search(path.name):
            continue
        values = read_json_object(path)
        if "model_type" not in values and "architectures" not in values:
            continue
        sidecar = path.with_name(path.stem + "__hf_quant_config.json")
        if sidecar.is_file() and not values.get("quantization_config"):
            stated = read_json_object(sidecar)["quantization"]
            values = {**values, "quantization_config": {"quant_method": "modelopt", **stated}}
        source = sources.get(path.stem, "")
        wrong = WRONG.get(path.stem.replace("__", "/", 1))
        if not source or "unsourced" in source or wrong:
            print(f"left out {path.stem}: {wrong or 'no public source'}", file=sys.stderr)
            continue
        found.append((path.stem.replace("__", "/", 1), values, source))
    return with_extras(found)


def with_extras(found: list[tuple[str, dict[str, Any], str]]) -> list[tuple[str, dict[str, Any], str]]:
    """Add the extra entries; the last entry of a name stands."""
    known = {name: (values, source) for name, values, source in found}
    for extra in json.loads((TOOLS / "extra_models.json").read_text()):
        values, source = extra["config"], extra["source"]
        if "like" in extra:
            if extra["like"] not in known:
                raise SystemExit(f"{extra['name']}: no entry {extra['like']} to be like")
            base, base_source = known[extra["like"]]
            values = changed(base, values)
            source = f"{base_source}; {source}"
        known[extra["name"]] = (values, source)
    return [(name, values, source) for name, (values, source) in known.items()]


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a config with some keys changed; what is nested is changed key by key."""
    nested = {
        key: changed(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **changes, **nested}


def _with_whole_rule(model: Model) -> Model:
    """Put the method's own rule in the place of a shortened list."""
    if model.name not in SHORTENED:
        return model
    rules = named_quantization(SHORTENED[model.name], replace(model, quantization=None))
    return replace(model, quantization=rules)


def main() -> int:
    """Write all entries."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sources", type=Path, help="Markdown table with a row per config; its last column is the source"
    )
    parser.add_argument("configs", nargs="*", type=Path)
    options = parser.parse_args()
    aliases: dict[str, dict[str, Any]] = json.loads((TOOLS / "model_aliases.json").read_text())
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines, failed = [], 0
    for name, values, source in configs_of(options.configs, sources_of(options.sources)):
        try:
            model = _with_whole_rule(read_config_object(values, where=name, name=name))
            lines.append(write_entry(model, source, aliases.get(name, {}).get("aliases", [])))
        except (UllageError, NotImplementedError) as error:  # noqa: PERF203
            failed += 1
            print(f"left out {name}: {str(error)[:200]}", file=sys.stderr)
    check_counts(lines)
    lines.sort(key=lambda line: line["name"].lower())
    written = {line["file"] for line in lines} | {"index.json"}
    for stale in FOLDER.glob("*.json"):
        if stale.name not in written:
            stale.unlink()
    rows = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    keys = json.dumps(keys_of(lines), separators=(",", ":"))
    (FOLDER / "index.json").write_text(f'{{"format":"ullage.models/1","models":[\n{rows}\n],\n"keys":{keys}}}\n')
    print(f"{len(lines)} models written, {failed} not understood", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
