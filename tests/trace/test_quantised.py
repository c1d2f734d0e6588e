"""Frozen 4-bit bases on meta tensors: what they hold, what a step takes, and the same step in closed form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

import ullage
from ullage.engines.hf_trainer.states import GPTQ, NF4
from ullage.errors import InputError
from ullage.trace.compare.agreement import Case, compare
from ullage.trace.cuda.patches import cuda_stand_ins
from ullage.trace.job import LoraOptions, TraceJob
from ullage.trace.models.hf import build_model
from ullage.trace.models.prepare import prepare
from ullage.trace.recorder import events as names
from ullage.trace.stand_ins.quantised.bnb import Linear4bit
from ullage.trace.stand_ins.quantised.fused import fuse_adapters
from ullage.trace.stand_ins.quantised.gptq import QuantLinear
from ullage.trace.step.loops import to_device, token_batch
from ullage.trace.step.session import start

pytestmark = pytest.mark.reference
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA, QWEN = "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-8B"


def linear(inputs: int = 512, outputs: int = 768, dtype: Any = torch.bfloat16) -> Any:
    return torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype, device="meta")


def held_bytes(module: Any) -> int:
    return sum(each.numel() * each.element_size() for each in [*module.parameters(), *module.buffers()])


def made(module: Any, hidden: Any) -> list[int]:
    """Return the bytes of every storage that forward and backward take, in order."""
    tracker, functions = start(TraceJob(), stacks=False)
    with functions, tracker.watching():
        module(hidden).sum().backward()
    return [one.size_bytes for one in tracker.trace.allocations if one.category != names.WORKSPACE]


def test_a_layer_of_bitsandbytes_holds_what_the_format_says() -> None:
    nested, plain = Linear4bit(linear(), nested=True), Linear4bit(linear(), nested=False)
    count = 512 * 768
    assert held_bytes(plain) == count // 2 + count // 64 * 4 + 16 * 4
    assert held_bytes(nested) - 16 * 4 - 4 == NF4.stored_bytes((768, 512))


@pytest.mark.parametrize("group_size", [128, 0])
def test_a_layer_of_gptq_holds_what_the_format_says(group_size: int) -> None:
    from dataclasses import replace

    layer = QuantLinear(linear(dtype=torch.float16), group_size=group_size)
    assert held_bytes(layer) == replace(GPTQ, block=(1, group_size)).stored_bytes((768, 512))


@pytest.mark.parametrize("kind", ["nf4", "gptq"])
def test_a_weight_is_written_out_in_both_passes(kind: str) -> None:
    whole = 512 * 768 * 2
    dtype = torch.float16 if kind == "gptq" else torch.bfloat16
    layer = QuantLinear(linear(dtype=dtype), group_size=128) if kind == "gptq" else Linear4bit(linear(), nested=True)
    hidden = torch.empty(64, 512, dtype=dtype, device="meta", requires_grad=True)
    taken = made(layer, hidden)
    assert taken.count(whole) == 2
    assert taken.count(512 * 768 // 64 * 4) == (2 if kind == "nf4" else 0)  # its scales, beside it


def test_the_layer_takes_what_bitsandbytes_takes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    real = bnb.nn.Linear4bit(512, 768, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    weight = torch.randn(768, 512, dtype=torch.bfloat16)
    real.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state, stand_in = real.weight.quant_state, Linear4bit(linear(), nested=True)
    pairs = {
        "weight": real.weight, "absmax": state.absmax, "code": state.code, "nested_absmax": state.state2.absmax,
        "offset": state.offset,
    }  # fmt: skip
    for name, each in pairs.items():
        mine = getattr(stand_in, name)
        assert (mine.shape, mine.dtype) == (each.shape, each.dtype), name

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not func.is_view and not func._schema.is_mutable and "detach" not in func.name():
                sizes.append(out.numel() * out.element_size())
            return out

    sizes: list[int] = []
    hidden = torch.randn(64, 512, dtype=torch.bfloat16, requires_grad=True)
    with Seen():
        real(hidden).sum().backward()
    assert made(stand_in, hidden.detach().to("meta").requires_grad_()) == sizes


def small(tmp_path: Path, layers: int = 12) -> str:
    path = tmp_path / "config.json"
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 1024,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": 1000,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize(
    ("base", "options"),
    [("nf4", {}), ("nf4", {"prepare": "peft"}), ("nf4", {"prepare": "none", "nested": False}), ("gptq", {})],
)
def test_repeated_layers_are_those_run(tmp_path: Path, base: str, options: dict[str, Any]) -> None:
    both = [
        ullage.trace(
            small(tmp_path), seq_len=128, recompute="full", lora="r=8,dropout=0.1,targets=q_proj+v_proj", base=base,
            autocast="bf16", unroll=unroll, **options,
        )
        for unroll in (True, False)
    ]  # fmt: skip
    assert both[0].num_layers_traced == 4 and both[1].num_layers_traced == 0
    # When the loss is let go, two tensors of the last step go with it, in either order.
    few, full = (one.trace.running_bytes() for one in both)
    assert len(few) == len(full) and sum(a != b for a, b in zip(few, full, strict=True)) <= 8
    assert both[0].peak_allocated_bytes == both[1].peak_allocated_bytes
    assert both[0].num_parameters == both[1].num_parameters
    assert both[0].warnings == both[1].warnings
    assert bool(both[0].warnings) == ("nested" not in options)  # what was not stated of the base is said


def test_preparation_makes_norms_wide(tmp_path: Path) -> None:
    found = {}
    for how in ("trl", "peft", "none"):
        job = TraceJob(base="nf4", prepare=how, lora=LoraOptions(r=4, targets=HEADS))
        model = prepare(build_model(small(tmp_path), job).model, job)
        of = {name: each.dtype for name, each in model.named_parameters()}
        found[how] = [
            next(dtype for name, dtype in of.items() if part in name) for part in ("norm", "lm_head", "embed_tokens")
        ]
        assert next(dtype for name, dtype in of.items() if "lora_" in name) == torch.float32
        assert next(dtype for name, dtype in of.items() if "q_proj.base_layer.weight" in name) == torch.uint8
    wide, narrow = torch.float32, torch.bfloat16
    assert found == {"trl": [wide, narrow, narrow], "peft": [wide] * 3, "none": [narrow] * 3}


@pytest.mark.parametrize("base", ["nf4", "gptq"])
def test_fused_adapters_give_every_adapter_its_gradient(tmp_path: Path, base: str) -> None:
    dtype = "float16" if base == "gptq" else "bfloat16"
    job = TraceJob(
        seq_len=32, base=base, dtype=dtype, prepare="none", lora=LoraOptions(r=4, dropout=0.1, targets=HEADS)
    )
    model = prepare(build_model(small(tmp_path, layers=2), job).model, job)
    fuse_adapters(model)
    tracker, functions = start(job, stacks=False)
    with cuda_stand_ins(tracker, functions), functions, tracker.watching():
        tracker.hold(model)
        model(**to_device(tracker, token_batch(job, 1000))).loss.backward()
    for name, each in model.named_parameters():
        if "lora_" in name:
            assert each.grad is not None and each.grad.shape == each.shape, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": "r=4", "fsdp": 2},
        {"inference": True, "tp": 2},
        {"lora": "r=4", "base": "int3"},
        {"lora": "r=4", "prepare": "all"},
    ],
)
def test_what_has_no_stand_in_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ullage.trace(small(tmp_path), seq_len=64, **{"base": "nf4", **options})


@pytest.mark.parametrize("model", [LLAMA, QWEN])
@pytest.mark.parametrize(("base", "prepared"), [("nf4", True), ("nf4", False), ("gptq", True)])
def test_the_closed_form_agrees(model: str, base: str, prepared: bool) -> None:
    for recompute, loss in (("none", "plain"), ("full", "liger")):
        case = Case(
            model=model, overrides=(("num_hidden_layers", 3),), recompute=recompute, lora=HEADS, loss=loss,
            micro_batch=2, base=base, prepared=prepared,
        )  # fmt: skip
        found = compare(case)
        assert abs(found.peak_error) <= 0.01, found.moments
        assert abs(found.layer_error) <= 0.005, found.layers
