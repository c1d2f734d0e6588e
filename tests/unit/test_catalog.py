"""Facts have units, sources and dates, agree with what was measured, and are found under the names people use."""

import json
import re
import time

import pytest
from conftest import need_shared

from ullage.account.parameters import count
from ullage.catalog import FOLDER, load, models
from ullage.catalog.gpus import entries as gpu_entries
from ullage.catalog.gpus import gpu_of
from ullage.errors import InputError
from ullage.read.model_source import load_model

# ---------------------------------------------------------------------------------------------------------------- GPUs


def without_source(catalog):
    """Return the values of a GPU catalog that lack a unit, a known source or a date of it."""
    bad = []
    for entry in catalog["gpus"]:
        values = {name: value for name, value in entry.items() if isinstance(value, dict) and name != "flops"}
        values |= {f"flops.{name}": value for name, value in entry.get("flops", {}).items()}
        if "total" not in values:
            bad.append((entry["name"], "total"))
        for name, value in values.items():
            source = catalog["sources"].get(value.get("source"), {})
            if (
                not value.get("unit")
                or not source.get("text")
                or not re.fullmatch(r"20\d\d-\d\d-\d\d", source.get("date", ""))
            ):
                bad.append((entry["name"], name))
        bad += [
            (entry["name"], name)
            for name, value in entry.items()
            if isinstance(value, (int, float)) and name not in ("nominal_gb", "unified")
        ]
    return bad


def test_every_gpu_value_has_unit_source_and_date():
    assert without_source(load("gpus.json")) == []


@pytest.mark.parametrize("damage", ["source", "unit"])
def test_the_check_for_sources_can_fail(damage):
    catalog = json.loads((FOLDER / "gpus.json").read_text())
    del catalog["gpus"][3]["bandwidth"][damage]
    assert without_source(catalog) == [(catalog["gpus"][3]["name"], "bandwidth")]


def test_totals_are_ordered_and_near_the_nominal_size():
    for entry in gpu_entries():
        gpu = gpu_of(entry)
        assert gpu.total_low_bytes <= gpu.total_bytes <= gpu.total_high_bytes, gpu.name
        assert 0.88 < gpu.total_bytes / (entry["nominal_gb"] * 1e9) < 1.08, gpu.name
        assert gpu.source


def test_derived_totals_say_so():
    derived = [entry for entry in gpu_entries() if entry["total"]["certainty"] != "measured"]
    assert derived
    assert all(gpu_of(entry).source.startswith("derived: ") for entry in derived)


def test_totals_agree_with_known_reports():
    known = {entry["name"]: gpu_of(entry) for entry in gpu_entries()}
    pairs = {"A100-SXM4-80GB": "A100-SXM4-80GB", "H100-SXM5-80GB": "H100-SXM5-80GB", "B200-SXM-180GB": "B200-SXM-180GB"}
    pairs |= {name: name for name in ("H200-SXM-141GB", "H20-96GB", "A100-SXM4-40GB", "V100-SXM2-32GB", "T4-16GB")}
    checked = 0
    for fact in json.loads(need_shared("configs", "gpus.json").read_text())["gpus"]:
        reported = fact["runtime_total_gib"]
        if fact["name"] in pairs and reported:
            gpu = known[pairs[fact["name"]]]
            assert gpu.total_low_bytes / 2**30 - 0.01 <= reported <= gpu.total_high_bytes / 2**30 + 0.01, fact["name"]
            checked += 1
    assert checked >= 6


# -------------------------------------------------------------------------------------------------------------- models


def test_every_model_has_a_source_and_its_count():
    for entry in models.entries():
        model = models.load_entry(models.Found(entry=entry, name=entry["name"]))
        assert model.source, entry["name"]
        counts = count(model)
        assert (counts.total, counts.active, counts.mtp) == (
            entry["num_parameters"],
            entry["num_active_parameters"],
            entry["num_mtp_parameters"],
        ), entry["name"]


def test_sizes_in_names_agree_with_the_counts():
    """A file of the wrong model under a name is found by the size that the name states."""
    checked = 0
    for entry in models.entries():
        stated = re.findall(r"-(\d+(?:\.\d+)?)B(?![a-z])", entry["name"], re.IGNORECASE)
        if not stated or re.search(r"-\d+x\d|17B-", entry["name"]):
            continue
        assert 0.75 < entry["num_parameters"] / max(map(float, stated)) / 1e9 < 1.45, entry["name"]
        checked += 1
    assert checked > 60


def test_counts_agree_with_the_published_ones():
    published = json.loads(need_shared("configs", "param_counts.json").read_text())
    assert published
    known = {entry["name"]: entry["num_parameters"] for entry in models.entries()}
    assert known["deepseek-ai/DeepSeek-V3"] == 671026404352  # 671.0 B without the MTP module


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("deepseek-v3", "deepseek-ai/DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3"),
        ("DEEPSEEK-R1", "deepseek-ai/DeepSeek-R1"),
        ("deepseek-v3-0324", "deepseek-ai/DeepSeek-V3-0324"),
        ("deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-ai/DeepSeek-V3.1-Terminus"),
        ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("qwq-32b", "Qwen/QwQ-32B"),
        ("llama-3.3-70b-instruct", "meta-llama/Llama-3.3-70B-Instruct"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"),
    ],
)
def test_names_and_aliases(text, name):
    assert load_model(text).name == name


@pytest.mark.parametrize(
    ("text", "base", "method"),
    [
        ("casperhansen/deepseek-r1-distill-qwen-14b-awq", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "awq_int4"),
        (
            "RedHatAI/DeepSeek-R1-Distill-Qwen-14B-FP8-dynamic",
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
            "fp8_dynamic",
        ),
        ("unsloth/Qwen3-14B-bnb-4bit", "Qwen/Qwen3-14B", "bnb_nf4"),
        ("Salyut1/GLM-4.7-NVFP4", "zai-org/GLM-4.7", "nvfp4"),
    ],
)
def test_quantised_copies_take_the_dimensions_and_say_so(text, base, method):
    model, original = load_model(text), load_model(base)
    assert model.name == text
    assert model.layers == original.layers
    assert model.quantization is not None and model.quantization.method == method
    assert any(base.rpartition("/")[2].lower() in sentence.lower() for sentence in model.assumed)


def test_the_index_states_the_same_for_a_plain_name():
    assert load_model("deepseek-v3").assumed == ()


@pytest.mark.parametrize("text", ["gpt-5", "deepseek-v33", "", "owner/nothing", "x" * 5000, "nul\0byte"])
def test_unknown_models_are_one_sentence(text):
    with pytest.raises(InputError) as caught:
        load_model(text)
    assert "\n" not in str(caught.value)


def test_near_names_are_offered():
    with pytest.raises(InputError, match="DeepSeek-V3"):
        load_model("deepseek-v33")


def test_the_network_is_not_used_unless_allowed(monkeypatch):
    def refuse(*_arguments, **_settings):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("ullage.read.model_source._from_hub", refuse)
    with pytest.raises(InputError):
        load_model("owner/nothing")
    with pytest.raises(AssertionError):
        load_model("owner/nothing", network=True)


def test_an_offline_hub_is_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*_arguments, **_settings):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match="no route to host") as caught:
        load_model("owner/nothing", network=True)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_config_is_read(tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 100, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(load_model(str(tmp_path)).layers) == 2
    assert len(load_model(str(tmp_path / "config.json")).layers) == 2
    with pytest.raises(InputError):
        load_model(str(tmp_path / "missing.json"))
    with pytest.raises(InputError):
        load_model(str(tmp_path / "missing.gguf"))


def test_the_keys_of_the_index_are_those_of_its_names():
    stored = {key: tuple(place) for key, place in load(models.INDEX)["keys"].items()}
    assert stored == models.keys_of(models.entries())


def test_one_lookup_is_quick():
    load_model("deepseek-v3")
    load.cache_clear()
    best = min(_seconds() for _ in range(5))
    assert best < 0.02  # 5 ms on a quiet machine


def _seconds():
    load.cache_clear()
    start = time.perf_counter()
    load_model("deepseek-v3")
    return time.perf_counter() - start
