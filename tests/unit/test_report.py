"""A fit as JSON obeys its schema; as text it leads with the verdict and never cuts a figure."""

import io
import json
import re
from pathlib import Path

import fake_engine
import jsonschema
import pytest
from rich.console import Console

import ullage
from ullage.cli import main
from ullage.fitting import fit_serving
from ullage.ledger import Certainty, exact, merged, ranged
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.report.json import fit_json
from ullage.report.text import bar, print_fit, short_source
from ullage.request import serving_job
from ullage.units import format_bytes

SCHEMA = json.loads((Path(ullage.__file__).parent / "schema" / "fit.json").read_text())
SERVED = ["deepseek-v3 --on 8xH200", "llama-3.1-70b --on RTX4090", "deepseek-v3 --on 8xH200 --engine sglang"]
CASES = [
    ("qwen3-8b", "1x80GiB", 4),
    ("deepseek-v3", "8xH200", 1),
    ("deepseek-v3", "2x8xH200", 64),
    ("gpt-oss-20b", "RTX4090", 2),
]


def result_of(model, machine, concurrency, *, starter=fake_engine.start, engine="vllm@0.2.0"):
    job = serving_job(load_model(model), parse_machine(machine), engine=engine)
    return fit_serving(job, context=8192, concurrency=concurrency, starter=starter)


@pytest.mark.parametrize("case", CASES)
def test_json_obeys_the_schema(case):
    jsonschema.validate(json.loads(json.dumps(fit_json(result_of(*case)), allow_nan=False)), SCHEMA)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_json_of_the_engines_obeys_the_schema(engine):
    result = ullage.fit("deepseek-v3", on="8xH200", engine=engine, context=8192, concurrency=4)
    values = json.loads(json.dumps(ullage.fit_json(result), allow_nan=False))
    jsonschema.validate(values, SCHEMA)
    assert values["worst"]["low_bytes"] <= values["worst"]["device_used_bytes"] <= values["worst"]["high_bytes"]


def test_the_schema_can_refuse():
    values = fit_json(result_of(*CASES[0]))
    for change in ({"verdict": "maybe"}, {"terms": [{"name": "x"}]}, {"serving": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, **change}, SCHEMA)


def test_terms_add_up_to_the_device():
    values = fit_json(result_of(*CASES[0]))
    assert sum(term["bytes"] for term in values["terms"]) == values["worst"]["device_used_bytes"]


def text_of(result, width):
    out = io.StringIO()
    print_fit(result, metrics=True, console=Console(file=out, width=width, highlight=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("case", CASES)
def test_text_leads_with_the_verdict_and_fits_the_terminal(case, width):
    result = result_of(*case)
    lines = text_of(result, width).splitlines()
    assert lines[0].split("  ")[0].endswith(result.verdict.replace("_", " "))
    commands = lines[lines.index("Next") + 1 :]
    assert all(len(line) <= width for line in lines[1:] if line not in commands)


def test_figures_are_never_cut():
    result = result_of(*CASES[2])
    text = text_of(result, 80)
    for term in result.ledger.terms():
        assert format_bytes(term.bytes) in text or term.name not in text
    assert "…" not in "".join(line[:30] for line in text.splitlines())


TRAINED = ["llama-3.1-8b --on RTX4090 --lora r=16", "llama-3.1-70b --on 64xH100 --engine megatron --tp 8 --pp 4"]


@pytest.mark.parametrize("width", [40, 60, 70, 80, 99, 100, 140])
@pytest.mark.parametrize("line", [f"serve {line}" for line in SERVED] + [f"train {line}" for line in TRAINED])
def test_no_figure_is_cut_however_narrow_the_terminal(capsys, monkeypatch, line, width):
    """Where it is narrow, bars, sources and certainties go before a digit does."""
    monkeypatch.setenv("COLUMNS", str(width))
    words = ["fit", *line.split(), "--no-advice"]
    main(words)
    text = capsys.readouterr().out
    main([*words, "--json"])
    values = json.loads(capsys.readouterr().out)
    table = text.split("\n\n")[1].splitlines()
    total = values["device"]["total_bytes"]
    sizes = [row for row in table[1:] if re.search(r"-?[\d,.]+ (GiB|MiB|KiB|B)", row)]
    assert sizes[-1].startswith("free")
    merged_sizes = {}
    for term in values["terms"]:
        merged_sizes[term["name"]] = merged_sizes.get(term["name"], 0) + term["bytes"]
    shown = 0
    for name, size in merged_sizes.items():
        row = next((row for row in sizes if row.startswith(name[:7]) and f" {format_bytes(size)} " in f"{row} "), None)
        if row is not None:
            shown += 1
            assert f"{size / total:.0%}" in row
    assert shown >= 5
    assert all(len(row.rstrip()) <= width for row in sizes)


def test_nothing_that_fits_is_said_in_one_line(capsys):
    main(["fit", "serve", "deepseek-v3", "--on", "8xH100", "--no-advice"])
    text = capsys.readouterr().out
    assert "nothing: no room is left for a single request" in text
    assert "0 requests" not in text and "x 0" not in text


def test_lines_do_not_end_in_blanks(capsys):
    main(["fit", "serve", "deepseek-v3", "--on", "8xH200"])
    prose = capsys.readouterr().out.split("\n\n")
    assert not [line for block in (prose[0], *prose[2:]) for line in block.splitlines() if line != line.rstrip()]


def test_a_full_server_that_fits_is_explained(capsys):
    """9.91 GiB free where 27.97 GiB are asked to stay free, and yet it fits: the cache takes what is spare."""
    main(["fit", "serve", "deepseek-v3", "--on", "8xH200", "--no-advice"])
    text = " ".join(capsys.readouterr().out.split())
    assert "what the need leaves becomes KV cache" in text
    assert "(8 alike)" in text
    main(["fit", "serve", "qwen3-8b", "--on", "H100", "--no-advice"])
    assert "alike" not in capsys.readouterr().out


def test_what_was_assumed_is_said():
    assert "defaults of the small engine" in text_of(result_of(*CASES[0]), 80)


def test_no_colour_where_none_is_wanted(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = io.StringIO()
    print_fit(result_of(*CASES[0]), console=Console(file=out, force_terminal=True, width=80, highlight=False))
    assert "\x1b[3" not in out.getvalue()


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("vllm@0.33.0:vllm/v1/worker/gpu_worker.py:Worker.init", "vllm@0.33.0 gpu_worker.py:Worker.init"),
        ("arXiv:2405.04434 eq. 9", "arXiv:2405.04434 eq. 9"),
        ("", ""),
    ],
)
def test_sources_are_shortened(source, short):
    assert short_source(source) == short


@pytest.mark.parametrize(("share", "text"), [(0, "  0%"), (0.5, " 50%"), (1.2, "120%"), (-0.06, " -6%")])
def test_bars(share, text):
    assert bar(share, 8).endswith(text)
    assert len(bar(share, 8)) == 13


def test_terms_of_one_name_are_one_row():
    """The chunks of a pipeline stage keep activations each; a person reads their sum, and nothing is lost."""
    terms = [ranged("activations", 5, low=3, high=9), exact("weights", 2), exact("activations", 4)]
    found = merged(terms)
    assert [term.name for term in found] == ["activations", "weights"]
    assert (found[0].bytes, found[0].low_bytes, found[0].high_bytes) == (9, 7, 13)
    assert found[0].certainty is Certainty.MODELLED and found[1] is terms[1]
