"""Rules of parameter-efficient methods against PEFT's own layers: what is trained, what lies beside, what is kept.

The counts hold to the last parameter, on small models that are really made and on catalog widths without memory. What
a layer keeps is what a traced step keeps of it, with and without autocast.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from ullage.account.activations.saved import Shape, table_bytes
from ullage.account.adapters.names import method_names, rules
from ullage.account.adapters.rule import AdapterPrecision
from ullage.account.adapters.whole import held_bytes, hosted_bytes, layer_rows, solved_for, trained_tensors
from ullage.account.lora import adapter_table
from ullage.read.adapter_words import adapter_config
from ullage.read.hf_config import read_config_object
from ullage.read.model_source import load_model
from ullage.spec.training import Lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.reference

QV = ["q_proj", "v_proj"]
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
BASES = {
    "llama": SMALL | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "qwen2": SMALL | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False},
    "mistral": SMALL | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "intermediate_size": 384},
}
#: name -> PEFT's configuration class and settings. The names end where a method is meant in another of its forms.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8, "target_modules": QV}),
    "dora": ("LoraConfig", {"r": 8, "target_modules": QV, "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 6, "target_r": 2, "total_step": 100, "target_modules": QV}),
    "adamss": ("AdamssConfig", {"r": 12, "num_subspaces": 3, "target_modules": QV}),
    "adaption_prompt": ("AdaptionPromptConfig", {"adapter_len": 7, "adapter_layers": 2}),
    "beft": ("BeftConfig", {"target_modules": ["v_proj"]}),
    "boft": ("BOFTConfig", {}),
    "boft 2": ("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 1, "target_modules": ["o_proj"]}),
    "c3a": ("C3AConfig", {"block_size": 32, "target_modules": QV}),
    "deft": ("DeftConfig", {"r": 4, "target_modules": QV}),
    "deft para": ("DeftConfig", {"r": 4, "para": True, "target_modules": QV}),
    "delora": ("DeloraConfig", {"r": 4, "target_modules": QV}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 100, "target_modules": QV}),
    "frod": ("FrodConfig", {"sparse_rate": 0.02}),
    "glora": ("GloraConfig", {"r": 4, "target_modules": QV}),
    "glora vector": ("GloraConfig", {"config_A_B": "vector", "target_modules": QV}),
    "gralora": ("GraloraConfig", {"r": 8, "target_modules": QV}),
    "gralora hybrid": ("GraloraConfig", {"r": 8, "hybrid_r": 4, "target_modules": QV}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": QV}),
    "hra orthogonal": ("HRAConfig", {"r": 4, "apply_GS": True, "target_modules": QV}),
    "hira": ("HiraConfig", {"r": 4, "target_modules": QV}),
    "ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ia3 all": (
        "IA3Config",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "feedforward_modules": ["gate_proj", "up_proj", "down_proj"],
        },
    ),
    "lily": ("LilyConfig", {"r": 4, "stride_A": 2, "num_B": 2, "target_modules": QV}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "loha": ("LoHaConfig", {"r": 4, "target_modules": QV}),
    "lokr": ("LoKrConfig", {"r": 4, "target_modules": QV}),
    "lokr 4": ("LoKrConfig", {"r": 4, "decompose_factor": 4, "target_modules": ["q_proj", "down_proj"]}),
    "lokr both": ("LoKrConfig", {"r": 2, "decompose_both": True, "target_modules": ["gate_proj"]}),
    "miss": ("MissConfig", {"r": 8, "target_modules": QV}),
    "miss bat": ("MissConfig", {"r": 8, "init_weights": "bat", "target_modules": QV}),
    "miss mini": ("MissConfig", {"r": 8, "mini_r": 8, "init_weights": "mini", "target_modules": QV}),
    "oft": ("OFTConfig", {"r": 4, "oft_block_size": 0, "target_modules": QV}),
    "oft size": ("OFTConfig", {"oft_block_size": 16, "target_modules": QV}),
    "osf": ("OSFConfig", {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
    "p_tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 96}),
    "p_tuning lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 5, "encoder_hidden_size": 96, "encoder_reparameterization_type": "LSTM"},
    ),
    "peanut": ("PeanutConfig", {"r": 4, "depth": 0, "target_modules": QV}),
    "peanut deep": ("PeanutConfig", {"r": 4, "depth": 2, "target_modules": QV}),
    "prefix_tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prompt_tuning": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "psoft": ("PsoftConfig", {"r": 8, "target_modules": QV}),
    "pvera": ("PveraConfig", {"r": 8, "target_modules": QV}),
    "randlora": ("RandLoraConfig", {"r": 8, "target_modules": QV}),
    "road": ("RoadConfig", {"group_size": 32, "target_modules": QV}),
    "road 2": ("RoadConfig", {"variant": "road_2", "group_size": 32, "target_modules": QV}),
    "road 4": ("RoadConfig", {"variant": "road_4", "group_size": 32, "target_modules": QV}),
    "shira": ("ShiraConfig", {"r": 4, "target_modules": QV}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.95, "target_modules": QV}),
    "tinylora": ("TinyLoraConfig", {"target_modules": QV}),
    "tinylora tied": ("TinyLoraConfig", {"weight_tying": 1.0, "target_modules": QV}),
    "trainable_tokens": ("TrainableTokensConfig", {"token_indices": [3, 5, 8]}),
    "unilora": ("UniLoraConfig", {"r": 4, "theta_d_length": 64, "target_modules": QV}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 16, "vector_length": 32, "target_modules": QV}),
    "vera": ("VeraConfig", {"r": 8, "target_modules": QV}),
    "waveft": ("WaveFTConfig", {"n_frequency": 100, "target_modules": QV}),
}
#: Methods that one of the models above cannot take, and why.
NOT_FOR = {
    ("adaption_prompt", "qwen2"): "PEFT does not know where its attention reads a prompt",
    ("beft", "qwen2"): "its projections have biases of their own",
}
#: What tracing cannot follow: values decide (adamss, boft, shira, unilora, vblora), or the host takes part (frod).
NOT_TRACED = {"adamss", "boft", "boft 2", "shira", "unilora", "vblora", "frod", "waveft"}
#: Their tensors belong to no layer: prompts lengthen the sequence, embeddings come before.
NO_LAYER = {"p_tuning", "p_tuning lstm", "prefix_tuning", "prompt_tuning", "trainable_tokens", "adaption_prompt"}
SHAPE = Shape(micro_batch_size=2, seq_len=128)


def config_of(name: str) -> Any:
    kind, settings = METHODS[name]
    if kind == "AdamssConfig":
        pytest.importorskip("sklearn")
    found = getattr(peft, kind)
    if kind == "LNTuningConfig":
        return found(task_type="CAUSAL_LM", target_modules=settings["target_modules"])
    return found(task_type="CAUSAL_LM", **settings)


def stated(name: str) -> Lora:
    """The same adapters as ``adapter_config.json`` says them."""
    values = config_of(name).to_dict()
    as_json = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    as_json["peft_type"] = str(getattr(values["peft_type"], "value", values["peft_type"]))
    return adapter_config(as_json, where=name)[0]


def wrapped(base: str, name: str, dtype: Any = torch.bfloat16) -> Any:
    config = transformers.AutoConfig.for_model(**{k: v for k, v in BASES[base].items() if k != "architectures"})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config_of(name))


def trained_count(model: Any) -> int:
    """Trained parameters; AdaLoRA's count of ranks is marked as one on a CPU, on a GPU it is not."""
    return sum(
        each.numel() for name, each in model.named_parameters() if each.requires_grad and ".ranknum." not in name
    )


def test_every_method_has_a_case() -> None:
    assert set(method_names()) - {"qlora"} == {name.split()[0] for name in METHODS}
    assert len(rules()) > len(method_names()) - 3  # some go by two names


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", METHODS)
def test_trained_parameters_are_counted_to_the_last(name: str, base: str) -> None:
    if (name, base) in NOT_FOR:
        pytest.skip(NOT_FOR[name, base])
    model = read_config_object(dict(BASES[base]), where=base, name=base)
    lora = stated(name)
    count = trained_count(wrapped(base, name))
    if lora.kind == "lora":
        from ullage.account.lora import adapter_parameters

        assert adapter_parameters(model, lora).num_elements == count
        return
    assert trained_tensors(model, lora).num_elements == count
    assert solved_for(model, lora, count).num_parameters == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name][0] != "LoraConfig"])
def test_what_lies_beside_is_counted(name: str, dtype: Any) -> None:
    """All other tensors of the wrapped model, each storage once, are the base's and those of the rule."""
    lora, base = stated(name), BASES["llama"]
    model = read_config_object(dict(base), where="llama", name="llama")
    made = wrapped("llama", name, dtype)
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in (*made.parameters(), *made.buffers())
    }
    trained = sum(each.numel() * each.element_size() for each in made.parameters() if each.requires_grad)
    plain = wrapped("llama", "lora", dtype).unload()
    known = {each.untyped_storage().data_ptr(): each for each in (*plain.parameters(), *plain.buffers())}
    own = sum(each.untyped_storage().nbytes() for each in known.values())
    found = sum(storages.values()) - trained - own
    lora = replace(lora, options=(*lora.options, *UNMOVED.get(name, ())))
    precision = AdapterPrecision()
    counted = held_bytes(model, lora, precision, base_width=dtype.itemsize) + hosted_bytes(model, lora, precision)
    known_difference = (BESIDE if dtype == torch.bfloat16 else BESIDE_FP32).get(name, 0)
    assert counted - found == pytest.approx(known_difference, abs=64)


#: What the rule counts and such a model does not show, or shows and the rule does not count.
BESIDE = {
    "frod": -76032,  # the projections that all targets share lie on the host
    "psoft": 180224,  # a CPU's decomposition is copied; a GPU's stays whole behind its view
    "shira": 28672,  # positions are attributes, not buffers
}
#: The same of a base in fp32.
BESIDE_FP32 = BESIDE | {
    "frod": BESIDE["frod"] - 2 * 2 * 128 * 128,  # of which these, one for each name of two, have the base's format
    "osf": -6 * 64 * 4,  # trained singular values are a view of all of them
}
#: Settings with which nothing leaves the GPU.
UNMOVED = {"frod": (("runtime_offload_base_weight", 0),)}


@lru_cache
def catalog_layers(num_layers: int = 2) -> Any:
    model = load_model("llama-3.2-1b")
    return replace(model, layers=model.layers[:num_layers])


def traced_layer_bytes(name: str | None, *, autocast: bool) -> int:
    """Bytes that the last layer keeps until the backward begins, of a frozen model that a method is laid on."""
    from ullage.trace.api import trace
    from ullage.trace.job import TraceJob
    from ullage.trace.models.hf import build_described

    made: Any = build_described(catalog_layers(), TraceJob()).model
    if name is None:
        made.requires_grad_(False)
        made.get_input_embeddings().weight.requires_grad_(True)
    else:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.get_peft_model(made, config_of(name))
    ids = torch.arange(SHAPE.num_tokens).remainder(200).reshape(SHAPE.micro_batch_size, SHAPE.seq_len)

    def step() -> None:
        batch = ids.to("meta")
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = made(input_ids=batch, labels=batch.clone(), use_cache=False).loss
        loss.backward()

    found = trace(lambda: {"module": made, "step": step}, steps=1, engine="plain").trace
    begin = next(index for index, where in enumerate(found.where) if found.places[where].phase == "backward")
    kept = (found.allocations[number] for number in found.alive_at(begin - 1))
    return sum(
        -(-one.size_bytes // 512) * 512
        for one in kept
        if ".layers.1." in found.places[one.place].module
        and one.category in ("activation", "temporary")
        and one.shape[-1:] != (catalog_layers().vocab_size,)  # logits, whichever module ran last
    )


@lru_cache
def frozen_layer_bytes(autocast: bool) -> int:
    return traced_layer_bytes(None, autocast=autocast)


#: Of what the trace shows: vectors of a rank or of a width, the precision of norms of weights.
TOLERANCE = 0.004
#: Bytes more or less for a reason: tensors of shared modules are made in another layer's name.
ELSEWHERE = {"lily": 2 * SHAPE.num_tokens * 2048 * 2 + 4096}


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in NOT_TRACED | NO_LAYER])
def test_a_layer_keeps_what_a_traced_step_keeps(name: str, autocast: bool) -> None:
    model, lora = catalog_layers(), stated(name)
    layer = model.layers[1]
    precision = AdapterPrecision(autocast=autocast)
    if lora.kind == "lora":
        tokens = SHAPE.num_tokens
        rows = adapter_table(layer, model.hidden_size, lora, precision, num_tokens=tokens, num_routed_tokens=tokens)
    else:
        rows = layer_rows(layer, model.hidden_size, lora, precision, SHAPE, num_routed_tokens=0)
    kept = frozen_layer_bytes(autocast)
    traced = traced_layer_bytes(name, autocast=autocast)
    casts = weight_casts(model, lora) if autocast else 0  # counted apart: they live as long as the forward pass
    assert kept + table_bytes(rows) == pytest.approx(traced, rel=TOLERANCE, abs=casts + ELSEWHERE.get(lora.kind, 0))


def weight_casts(model: Any, lora: Lora) -> int:
    """The most that cached casts of one layer's trained tensors take."""
    if lora.kind == "lora":
        return 2 * lora.rank * 4 * model.hidden_size + 2**14  # DoRA: norms and magnitudes
    return 2 * trained_tensors(replace(model, layers=model.layers[:1]), lora).num_elements
