"""A fit as JSON obeys its schema; as text it leads with the verdict and never cuts a figure."""

import io
import json
from pathlib import Path

import fake_engine
import jsonschema
import pytest
from rich.console import Console

import ullage
from ullage.fitting import fit_serving
from ullage.ledger import Certainty, exact, merged, ranged
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.report.json import fit_json
from ullage.report.text import bar, print_fit, short_source
from ullage.request import serving_job
from ullage.units import format_bytes

SCHEMA = json.loads((Path(ullage.__file__).parent / "schema" / "fit.json").read_text())
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
