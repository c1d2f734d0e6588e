"""PEFT's methods as users and records state them, and what follows in a step."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ullage.account.adapters.names import canonical, method_names, rule_of
from ullage.account.adapters.rule import AdapterPrecision
from ullage.account.adapters.whole import held_bytes, hosted_bytes, solved_for, targets_of, trained_tensors
from ullage.account.lora import adapter_parameters
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.adapter_words import adapter_config, parse_adapters
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.recipe_fields import Fields
from ullage.read.recipes import with_recipe
from ullage.records.adapters import adapters_of, method_of, script_flags, stated_parameters
from ullage.records.compare import NotComparableError
from ullage.records.schema import read_record
from ullage.records.training import record_job
from ullage.spec.training import Lora, Precision, TrainingJob, TrainingParallel

MODEL = load_model("llama-3.2-3b-instruct")
QV = ("q_proj", "v_proj")


def job(lora: Lora | None = None, **changes: object) -> TrainingJob:
    first = TrainingJob(
        model=replace(MODEL, layers=MODEL.layers[:4]),
        machine=parse_machine("1xL40S"),
        engine="hf_trainer",
        engine_version="transformers 5.23.0",
        precision=Precision(grads="float32"),
        micro_batch_size=2,
        seq_len=256,
        attention="sdpa",
        method=lora.kind if lora else "full",
        lora=lora,
    )
    return replace(first, **changes)  # type: ignore[arg-type]


def peak(one: TrainingJob) -> int:
    return step(one).ranks[0].peak.allocated.bytes


def term(one: TrainingJob, name: str, *, moment: str = "") -> int:
    """A term of the fullest moment, or of one by name; 0 where there is none."""
    ledgers = [each for each in step(one).ranks[0].moments if each.moment == moment] or [step(one).ranks[0].peak]
    return next((each.bytes for each in ledgers[0].allocated.children if each.name == name), 0)


@pytest.mark.parametrize(
    ("said", "name"),
    [("IA3", "ia3"), ("P-Tuning", "p_tuning"), ("LN Tuning", "ln_tuning"), ("llama-adapter", "adaption_prompt"),
     ("DoRA", "dora"), ("BOFT", "boft"), ("p_tuning", "p_tuning"), ("prefix-tuning", "prefix_tuning")],
)  # fmt: skip
def test_a_method_is_known_however_it_is_written(said: str, name: str) -> None:
    assert canonical(said) == name


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown method 'nonsense'") as caught:
        parse_adapters("nonsense", None)
    assert all(name in str(caught.value.remedy) for name in ("full", "lora", "vera", "prompt_tuning"))


def test_every_method_has_a_source_and_defaults_of_its_own_settings() -> None:
    for name in method_names():
        if name not in ("lora", "qlora", "dora"):
            rule = rule_of(name)
            assert rule.source.startswith("peft@")
            assert rule.solved in ("", "rank", *rule.options)
            assert set(rule.alternatives) <= set(rule.options)


@pytest.mark.parametrize(
    ("method", "text", "count"),
    [
        # by hand, of 28 layers with 3072 -> 3072 and 3072 -> 1024
        ("vera", "r=256", 28 * (3072 + 256 + 1024 + 256)),
        ("ia3", None, 28 * (1024 + 1024 + 8192)),
        ("ln_tuning", None, 28 * 2 * 3072 + 3072),
        ("loha", "r=32", 28 * 2 * 32 * (6144 + 4096)),
        ("prompt_tuning", "num_virtual_tokens=200", 200 * 3072),
        ("prefix_tuning", "num_virtual_tokens=200", 200 * 28 * 2 * 8 * 128),
        ("p_tuning", None, 20 * 3072 + 3 * (3072 * 3072 + 3072)),
        ("boft", None, 28 * (3072 * 4 + 3072 + 3072 * 4 + 1024)),
        ("lokr", "r=32,decompose_factor=4", 28 * (16 + 32 * 1536 + 16 + 32 * 1024)),
        ("trainable_tokens", "num_tokens=2", 2 * 3072),
        ("adaption_prompt", "adapter_len=100", 28 * (100 * 3072 + 1)),
    ],
)
def test_counts_by_hand(method: str, text: str | None, count: int) -> None:
    lora, kind = parse_adapters(method, text)
    assert lora is not None and kind == method
    assert trained_tensors(MODEL, lora).num_elements == count


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("vera", "r=0"),
        ("vera", "r=-1"),
        ("vera", "dropout=0.1"),
        ("vblora", "vector_length=0"),
        ("supertuning", "sparsity=1.5"),
        ("frod", "sparse_rate=nan"),
        ("gralora", "gralora_k=2.5"),
        ("prompt_tuning", "num_virtual_tokens=many"),
        ("lora", ""),
        ("lora", "r=8,vector_length=3"),
        ("full", "r=8"),
    ],
)
def test_settings_that_a_method_cannot_have_are_one_sentence(method: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_adapters(method, text)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_pefts_own_file_says_the_same(tmp_path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "VBLORA", "r": 4, "num_vectors": 90, "target_modules": ["v_proj"]}))
    lora, kind = parse_adapters(None, str(path))
    assert kind == "vblora"
    assert lora == Lora(kind="vblora", rank=4, targets=("v_proj",), options=(("num_vectors", 90),))
    with pytest.raises(InputError, match="the file says vblora"):
        parse_adapters("vera", str(path))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"peft_type": 3},
        {"peft_type": "XLORA"},
        {"peft_type": "LORA", "r": "eight"},
        {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 4}},
        {"peft_type": "LORA", "r": 8, "target_modules": 5},
        {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": [3, 4]},
    ],
)
def test_a_file_of_something_else_is_one_sentence(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        adapter_config(values, where="adapter_config.json")


def test_adalora_allocates_its_initial_rank() -> None:
    said = {"peft_type": "ADALORA", "r": 8, "init_r": 64, "target_modules": list(QV)}
    assert adapter_config(said, where="")[0].rank == 64


# What a step makes of them


def test_prompts_lengthen_every_sequence_and_its_loss() -> None:
    lora = Lora(kind="prompt_tuning", rank=0, targets=(), options=(("num_virtual_tokens", 64),))
    longer = job(Lora(kind="prompt_tuning", rank=0, targets=(), options=(("num_virtual_tokens", 64),)))
    answer = step(longer)
    assert answer.job.seq_len == 256 + 64
    assert any("64 virtual tokens" in said for said in answer.warnings)
    logits = 12 * 2 * 64 * MODEL.vocab_size
    assert term(longer, "loss") - term(job(replace(lora, options=(("num_virtual_tokens", 1),))), "loss") >= logits * 0.9


def test_prefixes_lengthen_keys_and_values_alone() -> None:
    many = job(Lora(kind="prefix_tuning", rank=0, targets=(), options=(("num_virtual_tokens", 128),)))
    few = job(Lora(kind="prefix_tuning", rank=0, targets=(), options=(("num_virtual_tokens", 64),)))
    assert step(many).job.seq_len == 256
    # two sequences, 64 more tokens: repeated keys and values of four layers, and columns of their masks
    attention = 2 * 64 * 4 * 24 * 256 * 2 + 4 * 2 * 256 * 64 * 2
    assert term(many, "kept_activations") - term(few, "kept_activations") == attention


def test_a_loop_without_autocast_keeps_inputs_in_fp32() -> None:
    lora = Lora(rank=16, targets=("q_proj",))
    rows = {}
    for engine in ("hf_trainer", "single"):
        plain = job(lora, engine=engine, packing=True)
        without = job(Lora(rank=16, targets=("q_proj",), options=(("frozen", "a"),)), engine=engine, packing=True)
        rows[engine] = term(plain, "kept_activations") - term(without, "kept_activations")
    assert rows["hf_trainer"] == 4 * 512 * 3072 * 2
    assert rows["single"] == 2 * rows["hf_trainer"]


def test_a_loop_holds_keys_and_values_that_the_trainer_does_not_make() -> None:
    lora = Lora(rank=16, targets=("q_proj",))
    after = step(job(lora, engine="single")).ranks[0].after_step
    found = next(each.bytes for each in after.allocated.children if each.name == "last_outputs")
    assert found == 512 * (MODEL.vocab_size * 2 + 4 * 2 * 8 * 128 * 2)
    assert not any(each.name == "last_outputs" for each in step(job(lora)).ranks[0].after_step.allocated.children)


def test_lora_fa_trains_one_factor_and_keeps_no_inputs() -> None:
    lora = Lora(rank=16, targets=QV)
    plain, frozen = job(lora), job(lora, optimizer="lora_fa")
    elements = adapter_parameters(plain.model, lora).num_elements
    first = 4 * 16 * (3072 + 3072)
    assert term(frozen, "adapters") == 4 * (elements - first)
    assert term(frozen, "adapter_buffers") == 4 * first
    assert term(plain, "kept_activations") - term(frozen, "kept_activations") == 4 * 2 * 512 * 3072 * 2
    switched = job(lora, optimizer="lora-fa", flags=(("adapters_switched", "true"),))
    assert term(switched, "kept_activations") == term(plain, "kept_activations")
    assert term(switched, "optimizer") == term(frozen, "optimizer") < term(plain, "optimizer")


def test_what_a_method_makes_on_the_host_moves_with_the_trainers_model() -> None:
    lora = Lora(kind="boft", rank=0, targets=QV)
    hosted = hosted_bytes(job().model, lora, AdapterPrecision())
    assert hosted == 4 * 2 * 3072**2 * 4
    beside = {engine: term(job(lora, engine=engine), "adapter_buffers") for engine in ("hf_trainer", "single")}
    assert beside["hf_trainer"] - beside["single"] == hosted


def test_frozen_factors_of_a_full_decomposition_lie_there_whole() -> None:
    model, precision = job().model, AdapterPrecision()
    full = Lora(kind="psoft", rank=256, targets=QV)
    narrow = replace(full, options=(("psoft_svd", "lowrank"),))
    difference = held_bytes(model, full, precision, base_width=2) - held_bytes(model, narrow, precision, base_width=2)
    assert difference == 4 * 4 * 3072 * ((3072 - 256) + (1024 - 256))


def test_only_pefts_engines_follow_its_methods() -> None:
    lora = Lora(kind="vera", rank=8, targets=QV)
    for engine, parallel in (
        ("fsdp2", TrainingParallel(data_parallel_size=2, fsdp="full_shard")),
        ("deepspeed", TrainingParallel(data_parallel_size=2, zero_stage=2)),
        ("litgpt", TrainingParallel()),
        ("megatron", TrainingParallel()),
    ):
        gpus = parse_machine(f"{parallel.data_parallel_size}xL40S")
        with pytest.raises(InputError, match=r"do not follow the method vera"):
            step(job(lora, engine=engine, parallel=parallel, machine=gpus, attention=None, engine_version=""))


@pytest.mark.parametrize("kind", [name for name in method_names() if name not in ("lora", "qlora", "dora")])
def test_a_quantised_base_is_refused_where_its_weights_are_read(kind: str) -> None:
    rule = rule_of(kind)
    one = job(Lora(kind=kind, rank=rule.rank, targets=()), base_quantization="nf4")
    if rule.reads_weight:
        with pytest.raises(InputError, match="are packed"):
            step(one)
    else:
        assert step(one).ranks[0].peak.allocated.bytes < peak(replace(one, base_quantization=None))


def test_lora_fa_needs_lora() -> None:
    with pytest.raises(InputError, match="LoRA-FA is an optimizer of LoRA's factors alone"):
        step(job(None, optimizer="lora_fa"))


def test_a_target_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(InputError, match="no linear layer"):
        step(job(Lora(kind="loha", rank=8, targets=("no_such",))))


def test_experts_are_wrapped_one_by_one() -> None:
    model = load_model("qwen3-30b-a3b")
    lora = Lora(kind="hira", rank=2, targets=("gate_proj",))
    layer = replace(model, layers=model.layers[:1])
    assert sum(one.copies for one in targets_of(layer, lora)) == 128
    assert trained_tensors(layer, lora).num_elements == 128 * 2 * (2048 + 768)


# Recipes


def recipe(kind: str, values: dict[str, object]) -> TrainingJob:
    return with_recipe(kind, Fields(values, "recipe.yaml"), job())


def test_llamafactory_names_orthogonal_fine_tuning() -> None:
    found = recipe("llamafactory", {"finetuning_type": "oft", "oft_block_size": 64, "oft_target": "q_proj"})
    assert found.method == "oft"
    assert found.lora == Lora(kind="oft", rank=0, targets=("q_proj",), options=(("oft_block_size", 64),))


def test_axolotl_names_a_llama_adapter() -> None:
    found = recipe("axolotl", {"adapter": "llama-adapter", "peft_adapter": {"len": 12, "layers": 20}, "bf16": True})
    assert found.method == "adaption_prompt"
    assert found.lora is not None and dict(found.lora.options) == {"adapter_len": 12, "adapter_layers": 20}


def test_axolotl_may_leave_adapters_in_the_bases_format() -> None:
    said = {"adapter": "lora", "lora_target_linear": True, "bf16": True, "peft_autocast_adapter_dtype": False}
    found = recipe("axolotl", said)
    assert found.lora is not None and found.lora.dtype == "bfloat16"


# Records


def record(note: str = "", url: str = "https://example.org/x.json", **fields: object):
    job_fields = {"kind": "train", "model": "meta-llama/Llama-3.2-3B", "gpu": "L40S", "engine": "single", **fields}
    figure = {"quantity": "max_reserved", "value": 19.0, "unit": "GiB", "gib": 19.0, "rank": "0", "note": note}
    values = {"id": "a", "group": "g", "completeness": "mostly", "job": job_fields, "measured": [figure]}
    return read_record(values | {"source_url": url}, "records.jsonl:1")


@pytest.mark.parametrize(
    ("method", "fields", "count", "option", "value"),
    [
        ("prompt_tuning", {}, 614_400, "num_virtual_tokens", 200),
        ("prefix_tuning", {}, 2_867_200, "num_virtual_tokens", 50),
        ("p_tuning", {}, 28_382_208, "num_virtual_tokens", 20),
        ("adaption_prompt", {}, 8_601_628, "adapter_len", 100),
        ("trainable_tokens", {}, 6_144, "num_tokens", 2),
        ("glora", {"lora": {"rank": 8, "targets": list(QV)}}, 229_376, "config_A_B", "vector"),
        ("lokr", {"lora": {"rank": 32, "targets": list(QV)}}, 2_294_656, "decompose_factor", 4),
        ("tinylora", {"lora": {"rank": 2, "targets": list(QV)}}, 64, "weight_tying", 1.0),
        ("road", {}, 229_376, "variant", "road_2"),
        ("frod", {}, 10_741_640, "sparse_rate", 0.02),
        ("vblora", {"lora": {"rank": 4, "targets": list(QV)}}, 4_849_664, "num_vectors", 1024),
    ],
)
def test_a_stated_count_settles_what_a_record_leaves_open(method, fields, count, option, value) -> None:
    one = record(f"{count:,} trainable parameters", method=method, **fields)
    assert stated_parameters(one) == count
    lora = adapters_of(one.job, one, MODEL)
    assert lora is not None and lora.num_parameters == count
    found = rule_of(lora.kind).option(lora, option)
    assert found == value if isinstance(value, str) else found == pytest.approx(value, rel=1e-3)


def test_a_form_that_is_not_said_is_in_the_range() -> None:
    block = Lora(kind="miss", rank=64, targets=QV)
    said = replace(block, options=(("init_weights", "bat"),))
    count = trained_tensors(job().model, block).num_elements
    assert trained_tensors(job().model, said).num_elements == count
    found = step(job(replace(block, num_parameters=count))).ranks[0].peak.allocated
    assert found.high_bytes >= step(job(said)).ranks[0].peak.allocated.bytes > found.bytes
    assert step(job(block)).ranks[0].peak.allocated.high_bytes < found.high_bytes  # who says it himself has said it all


def test_a_count_that_nothing_fits_is_taken_as_it_is() -> None:
    lora = solved_for(MODEL, Lora(kind="vera", rank=256, targets=QV), 12_345, rank_known=True)
    assert lora.rank == 256
    assert trained_tensors(MODEL, lora).num_elements == 12_345


def test_a_count_of_one_factor_says_that_the_other_is_frozen() -> None:
    lora = {"rank": 32, "targets": list(QV)}
    one = record("5,505,024 trainable parameters", method="lora", lora=lora)
    found = adapters_of(one.job, one, MODEL)
    assert found is not None and dict(found.options) == {"frozen": "b"}


def test_a_record_of_an_unknown_method_is_not_comparable() -> None:
    with pytest.raises(NotComparableError, match="no rules for the method magic"):
        method_of({"method": "magic"})
    assert method_of({"method": "IA3"}) == "ia3"
    assert method_of({}) == "full"


def test_a_bound_on_the_length_is_three_quarters_give_or_take() -> None:
    one = record(
        method="lora", lora={"rank": 8, "targets": list(QV)}, micro_batch_size=4, precision={"compute": "bf16"},
        unknown=["length-bucketed batches, each padded to its longest sample, at most about 768 tokens"],
    )  # fmt: skip
    built, skipped = record_job(one)
    assert not skipped
    answer = step(built)
    assert answer.job.seq_len == 576
    loss = next(each for each in answer.ranks[0].peak.allocated.children if each.name == "kept_activations")
    assert loss.low_bytes < loss.bytes * 0.67 < loss.bytes * 1.33 < loss.high_bytes


def test_what_a_script_shows_is_looked_up() -> None:
    url = "https://github.com/huggingface/peft/blob/main/method_comparison/MetaMathQA/results/x.json"
    assert dict(script_flags(record(url=url))) == {"adapters_switched": "true", "mean_tokens": "210"}
    assert script_flags(record()) == ()
