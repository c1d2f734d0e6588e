"""What a record's quoted row says of the framework that ran: its settings, never its measurements."""

from typing import Any

import pytest

from ullage.account.lora import adapter_table
from ullage.catalog.models import find, load_entry
from ullage.engines.hf_trainer.defaults import resolve
from ullage.records.frameworks import framework, framework_flags, gptq_group_size
from ullage.records.schema import Record
from ullage.records.training import record_job

URL = "https://github.com/foundation-model-stack/fms-acceleration/blob/0/scripts/benchmarks/refs/a100_80gb.csv#L1"
MODEL = "mistralai/Mixtral-8x7B-Instruct-v0.1"


def record(quote: str, *, url: str = URL, model: str = MODEL, **job: Any) -> Record:
    fields = {
        "kind": "train", "model": model, "gpu": "A100-80GB-SXM", "engine": "hf_trainer", "method": "qlora",
        "engine_version": "torch 2.4.1, transformers 4.48.1, peft 0.13.2", "micro_batch_size": 4, "seq_len": 4096,
        "base_quantization": "nf4", "recompute": "full", "attention": "flash", "loss": "plain", "packing": True,
        "lora": {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "dropout": 0.1}, **job,
    }  # fmt: skip
    return Record(
        record_id="x",
        group="g",
        kind="train",
        completeness="full",
        job=fields,
        measured=(),
        source_url=url,
        quote=quote,
    )


@pytest.mark.parametrize(
    ("row", "autocast", "prepared", "fused"),
    [
        ("TRUE,0.15,,baseline-peft-bnb,2.00E-04,16", "bfloat16", True, ""),
        ("TRUE,0.15,,accelerated-peft-bnb,2.00E-04,16", "bfloat16", False, ""),
        ("True,0.14,,accelerated-peft-bnb-foak,0.0002", "bfloat16", False, "adapters,rms_norm,rope"),
        (",0.15,TRUE,accelerated-peft-autogptq-foak,2", "float16", False, "adapters,rms_norm,rope"),
        (",0.15,,none,2.00E-04,16", None, False, ""),
        (",,,foak-fast-kernels,2.00E-04,16", None, False, "rms_norm,rope"),
    ],
)
def test_a_row_names_its_configuration(row: str, autocast: str | None, prepared: bool, fused: str) -> None:
    found = framework(record(row))
    assert found is not None
    assert (found.autocast, found.prepared, ",".join(sorted(found.fused))) == (autocast, prepared, fused)


@pytest.mark.parametrize(
    ("row", "url"),
    [
        ("TRUE,0.15,,another-plug-in,2", URL),
        ("peak 0.15, baseline-peft-bnb,", URL),
        ("", URL),
        ("TRUE,0.15,,baseline-peft-bnb,2", "https://example.org/run.csv"),
    ],
)
def test_other_words_name_none(row: str, url: str) -> None:
    assert framework(record(row, url=url)) is None
    assert framework_flags(record(row, url=url)) == ()


def test_a_row_decides_whether_the_base_is_prepared() -> None:
    stream = {}
    for name in ("baseline-peft-bnb", "accelerated-peft-bnb"):
        job = record_job(record(f"TRUE,0.15,,{name},2.00E-04,16"))[0]
        stream[name] = resolve(job)[1].implementation.residual_dtype
    assert stream == {"baseline-peft-bnb": "float32", "accelerated-peft-bnb": "bfloat16"}


def test_a_checkpoint_says_its_groups() -> None:
    named = record(",0.15,TRUE,accelerated-peft-autogptq,2", model="TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ")
    assert gptq_group_size(named) == 0 and gptq_group_size(record("")) is None
    assert ("gptq_group_size", "0") in framework_flags(named)


def test_what_adapters_keep_depends_on_who_casts() -> None:
    """b s = 2048, h = 4096: a cast for each; one for q, k, v where none is made; fused, the input and what is left."""
    entry = find(MODEL)
    assert entry is not None
    model = load_entry(entry)
    found = {}
    for name, row, dropout in (
        ("prepared", "TRUE,0.15,,baseline-peft-bnb,2", 0.0),
        ("plug-in", "TRUE,0.15,,accelerated-peft-bnb,2", 0.0),
        ("dropout", "TRUE,0.15,,accelerated-peft-bnb,2", 0.1),
        ("fused", "TRUE,0.15,,accelerated-peft-bnb-foak,2", 0.1),
    ):
        lora = {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "dropout": dropout}
        job, recipe = resolve(record_job(record(row, lora=lora))[0])
        assert job.lora is not None
        rows = adapter_table(model.layers[0], 4096, job.lora, recipe.adapters, num_tokens=2048, num_routed_tokens=4096)
        found[name] = sum(one.bytes for one in rows if "product" not in one.name) / (2048 * 4096 * 2)
    assert found == {"prepared": 3, "plug-in": 1, "dropout": 4 + 4 * 0.5, "fused": 1 + 4}
