"""Facts have units, sources and dates, agree with what was measured, and are found under the names people use."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import need_shared

from ullage.account.parameters import count
from ullage.catalog import FOLDER, load, models
from ullage.catalog.gpus import entries as gpu_entries
from ullage.catalog.gpus import gpu_of
from ullage.engines.llamacpp.settings import resolve
from ullage.errors import InputError
from ullage.read.hf_config import read_config_object
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.records.compare import NotComparableError
from ullage.records.overrides import with_overrides
from ullage.spec.serving import ServingJob

ROOT = Path(__file__).parents[2]

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
        name = re.sub(r"(\d)[bB](\d)", r"\1.\2B", entry["name"])  # BLOOM's 1b7 is 1.7 B
        stated = re.findall(r"-(\d+(?:\.\d+)?)B(?![a-z])", name, re.IGNORECASE)
        if not stated or re.search(r"-\d+x\d|17B-|Falcon3-1B-", entry["name"]):  # Falcon3-1B holds 1.67 B
            continue
        assert 0.75 < entry["num_parameters"] / max(map(float, stated)) / 1e9 < 1.45, entry["name"]
        checked += 1
    assert checked > 60


def test_counts_agree_with_the_published_ones():
    published = json.loads(need_shared("configs", "param_counts.json").read_text())
    assert published
    known = {entry["name"]: entry["num_parameters"] for entry in models.entries()}
    assert known["deepseek-ai/DeepSeek-V3"] == 671026404352  # 671.0 B without the MTP module


def test_entries_written_by_hand_have_their_published_counts():
    extras = json.loads((ROOT / "tools/extra_models.json").read_text())
    published = {extra["name"]: extra["num_parameters"] for extra in extras if extra.get("num_parameters")}
    known = {entry["name"]: entry["num_parameters"] for entry in models.entries()}
    assert {name: known[name] for name in published} == published
    assert len(published) > 80


def test_every_entry_written_by_hand_names_its_source():
    for extra in json.loads((ROOT / "tools/extra_models.json").read_text()):
        assert re.search(r"arXiv:|https://|card|\w+/[\w.-]+[@:]|huggingface\.co|transformers@|et al\.", extra["source"])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Qwen/Qwen2.5-7B", 131072),
        ("Qwen/Qwen2.5-7B-Instruct", 32768),
        ("Qwen/Qwen2.5-1.5B", 131072),
        ("Qwen/Qwen2.5-1.5B-Instruct", 32768),
        ("Qwen/Qwen2.5-14B-Instruct", 32768),
        ("Qwen/Qwen2.5-32B-Instruct", 32768),
        ("Qwen/Qwen2.5-72B", 131072),
        ("Qwen/Qwen2.5-72B-Instruct", 32768),
        ("Qwen/Qwen2.5-Coder-32B-Instruct", 32768),
        ("Qwen/Qwen2.5-Math-7B", 4096),
        ("Qwen/Qwen2-72B", 131072),
        ("Qwen/Qwen2-72B-Instruct", 32768),
        ("Qwen/QwQ-32B", 131072),
        ("Qwen/QwQ-32B-Preview", 32768),
        ("Qwen/Qwen3-8B", 40960),
        ("Qwen/Qwen3-8B-Base", 32768),
        ("Qwen/Qwen3-4B-Instruct-2507", 262144),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507", 262144),
        ("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", 131072),
        ("deepseek-ai/DeepSeek-V3-0324", 163840),
        ("meta-llama/Llama-2-70b-chat-hf", 4096),
        ("zai-org/GLM-4.5", 131072),
        ("zai-org/GLM-4.7", 202752),
        ("moonshotai/Kimi-K2-Instruct-0905", 262144),
        ("microsoft/Phi-3-medium-128k-instruct", 131072),
    ],
)
def test_releases_of_one_shape_keep_their_own_context(text, tokens):
    assert load_model(text).max_position_embeddings == tokens


@pytest.mark.parametrize(
    "text",
    [
        "EleutherAI/pythia-1.4b-deduped",
        "tiiuae/falcon-7b-instruct",
        "facebook/opt-350m",
        "microsoft/phi-1.5",
        "Qwen/Qwen-7B-Chat",
        "Qwen/Qwen1.5-MoE-A2.7B-Chat",
        "stabilityai/stablelm-base-alpha-3b",
        "bigscience/bloom-7b1",
        "ibm-granite/granite-4.0-h-micro",
        "LiquidAI/LFM2-350M",
        "zai-org/GLM-4.7-Flash",
        "mistralai/Ministral-3-3B-Reasoning-2512",
        "codellama/CodeLlama-70b-Instruct-hf",
        "01-ai/Yi-9B",
    ],
)
def test_models_of_measured_runs_are_known(text):
    model = load_model(text)
    assert model.name == text and model.assumed == ()


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


# ----------------------------------------------------------------------------------- defaults of llama.cpp and ollama


def test_every_default_has_unit_source_and_date_and_what_is_unverified_says_what():
    facts = load("engines/llamacpp.json")
    for entry in facts["defaults"]:
        assert entry["unit"] and entry["source"], entry["name"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", entry["date"]) and re.fullmatch(r"20\d\d-\d\d-\d\d", entry["since"])
        assert (entry.get("certainty") == "unverified") == bool(entry.get("note")), entry
    for engine in facts["builds"].values():
        numbers, days = [tag[0] for tag in engine["tags"]], [tag[1] for tag in engine["tags"]]
        assert numbers == sorted(numbers) and days == sorted(days)


def ollama(version, model, gpu="RTX-4090", **fields):
    machine = parse_machine(gpu)
    return resolve(
        ServingJob(model=load_model(model), machine=machine, engine="ollama", engine_version=version, **fields)
    )


def test_the_context_of_ollama_steps_with_the_memory():
    assert ollama("2025-01-20", "llama-3.1-8b").n_ctx == 2048
    assert ollama("2025-06-01", "llama-3.1-8b").n_ctx == 4096
    assert ollama("2026-03-01", "llama-3.1-8b", "T4").n_ctx == 4096
    assert ollama("2026-03-01", "llama-3.1-8b").n_ctx == 32768
    assert ollama("2026-03-01", "llama-3.1-8b", "2xRTX-4090").n_ctx == 131072  # 262144, but trained on fewer
    assert ollama("2026-03-01", "llama-3.1-8b", max_model_len=8192).n_ctx == 8192


def test_automatic_flash_attention_needs_a_kernel_for_the_heads():
    assert not ollama("2025-06-01", "llama-3.1-8b").flash_attention
    assert ollama("2026-03-01", "llama-3.1-8b").flash_attention
    assert not ollama("2026-03-01", "deepseek-v2-lite").flash_attention  # keys of 192, values of 128


def test_unverified_defaults_are_told_as_assumed():
    def said(settings):
        return any("tried 4, later 2" in sentence for sentence in settings.assumed)

    assert said(ollama("2024-10-01", "llama-3.1-8b"))
    assert not said(ollama("2024-10-01", "llama-3.1-8b", max_num_seqs=1))
    assert not said(ollama("2025-09-01", "llama-3.1-8b"))


# --------------------------------------------------------------------------------------- records that cut a model down


def test_a_cut_in_depth_keeps_the_first_dense_layers():
    whole = load_model("deepseek-ai/DeepSeek-V3")
    cut = with_overrides(whole, {"num_hidden_layers": 4, "first_k_dense_replace": 1}, where="record")
    assert [type(layer.ffns[0]).__name__ for layer in cut.layers] == ["DenseFFN", "MoEFFN", "MoEFFN", "MoEFFN"]
    short = with_overrides(whole, {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}, where="record")
    assert short.layers == whole.layers[:4] and short.mtp == ()
    per_layer = (
        count(replace(whole, layers=whole.layers[:5])).total - count(replace(whole, layers=whole.layers[:4])).total
    )
    assert count(whole).total - count(short).total == 57 * per_layer


def test_frame_and_attention_can_be_changed():
    whole = load_model("openai-community/gpt2")
    changed = with_overrides(whole, {"tie_word_embeddings": False, "qkv_bias": False}, where="record")
    assert count(changed).total - count(whole).total == 50257 * 768 - 12 * 3 * 768
    assert with_overrides(whole, None, where="record") is whole


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_size": 64}, {"num_key_value_heads": 5}, {"first_k_dense_replace": 1}, {"num_nextn_predict_layers": 2}],
)
def test_what_cannot_be_told_is_not_compared(overrides):
    with pytest.raises(NotComparableError):
        with_overrides(load_model("meta-llama/Meta-Llama-3-70B"), overrides, where="record")


@pytest.mark.parametrize(
    "overrides", [[1], {"num_hidden_layers": "4"}, {"num_hidden_layers": True}, {"vocab_size": -1}, {"qkv_bias": 1}]
)
def test_wrong_changes_are_one_sentence(overrides):
    with pytest.raises(InputError) as caught:
        with_overrides(load_model("meta-llama/Meta-Llama-3-70B"), overrides, where="record")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- readers added for it


def test_mpt_counts_as_its_authors_count():
    """mosaicml/llm-foundry@8c8dd48f:scripts/train/benchmarking/README.md: the column NumParams."""
    sizes = {64862437376: (80, 8192, 64), 29975214080: (48, 7168, 56), 6658859008: (32, 4096, 32)}
    for wanted, (layers, hidden, heads) in sizes.items():
        config = {"model_type": "mpt", "d_model": hidden, "n_heads": heads, "n_layers": layers, "vocab_size": 50368}
        config |= {"max_seq_len": 2048, "expansion_ratio": 4, "attn_config": {"attn_impl": "flash"}}
        model = read_config_object(config, where="test", name="mpt")
        assert count(model).total == wanted
        assert model.assumed


def test_mpt_as_published_has_neither_biases_nor_positions():
    config = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 100, "max_seq_len": 32}
    config |= {"no_bias": True, "attn_config": {"alibi": True, "attn_type": "multiquery_attention"}}
    model = read_config_object(config, where="test", name="mpt")
    per_layer = 64 * (64 + 2 * 16) + 64 * 64 + 2 * 64 * 256 + 2 * 64
    assert count(model).total == 2 * per_layer + 100 * 64 + 64
    assert model.assumed == ()


def test_hy3_and_its_prediction_layer_fill_the_published_checkpoint():
    entry = models.find("tencent/Hy3-preview").entry
    biases = 4 * 192 * 80  # of the routers of 79 layers and the prediction layer, kept in float32
    stored = 2 * (entry["num_parameters"] + entry["num_mtp_parameters"]) + biases
    assert stored == 597_572_342_272  # metadata.total_size of its index


def test_kimi_k2_thinking_is_stored_in_int4():
    model = models.load_entry(models.find("moonshotai/Kimi-K2-Thinking"))
    assert model.quantization is not None and model.quantization.method == "compressed-tensors"
    assert not model.assumed


def test_a_release_of_a_quantised_model_says_whose_formats_it_takes():
    found = models.find("moonshotai/Kimi-K2.5-Preview")
    assert "number formats" in found.assumed[0]
