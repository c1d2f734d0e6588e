"""What torch.compile keeps of a layer and of the loss: the tables against the partitioner's own choice, on a CPU.

The forward and backward graph of a model of one layer and of two are split by AOTAutograd's min-cut partitioner as
Inductor calls it; the tensors it hands from one to the other are counted, every storage once.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import AutoConfig, AutoModelForCausalLM

from ullage.account.activations.layer import layer_table
from ullage.account.activations.logits import LossRecipe, loss_peak
from ullage.account.activations.saved import Implementation, Shape, table_bytes
from ullage.read.hf_config import read_config_object

pytestmark = pytest.mark.reference
BATCH, LENGTH, VOCAB = 2, 128, 1000
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCAB,
}
GPT2 = {
    "n_embd": 256,
    "n_head": 8,
    "n_positions": 512,
    "n_ctx": 512,
    "vocab_size": VOCAB,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "activation_function": "gelu_new",
}
KINDS = {"llama": (LLAMA, "LlamaForCausalLM", "num_hidden_layers"), "gpt2": (GPT2, "GPT2LMHeadModel", "n_layer")}


def split(kind: str, num_layers: int, attention: str, *, trained: bool) -> list[Any]:
    """Return the tensors that the partitioner keeps between forward and backward."""
    values, _architecture, key = KINDS[kind]
    names = {name: value for name, value in values.items() if name != "n_ctx"}
    config = AutoConfig.for_model(kind, **names, **{key: num_layers})
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    for parameter in model.parameters():
        parameter.requires_grad_(trained)
    found: list[Any] = []

    def partition(joint: Any, inputs: Any, **options: Any) -> Any:
        options["compiler"] = "inductor"
        forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
        (output,) = [node for node in forward.graph.nodes if node.op == "output"]
        found.extend(output.args[0][options["num_fwd_outputs"] :])
        return forward, backward

    def eager(module: Any, _inputs: Any) -> Any:
        return module.forward

    backend = aot_autograd(
        fw_compiler=eager, bw_compiler=eager, partition_fn=partition, decompositions=select_decomp_table()
    )
    torch._dynamo.reset()
    x = torch.randn(BATCH, LENGTH, 256, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, VOCAB, (BATCH, LENGTH))
    torch.compile(model, backend=backend)(inputs_embeds=x, labels=labels).loss.backward()
    return [node for node in found if hasattr(node, "meta") and node.op != "placeholder"]


def storages(nodes: list[Any]) -> dict[str, int]:
    """Return bytes by the node that made the memory: views of one tensor count once."""
    sizes: dict[str, int] = {}
    for node in nodes:
        value, base = node.meta.get("val"), node
        if not isinstance(value, torch.Tensor):
            continue
        while "view" in str(base.target) or "permute" in str(base.target) or "alias" in str(base.target):
            base = base.args[0]
        sizes[base.name] = max(sizes.get(base.name, 0), value.numel() * value.element_size())
    return sizes


def per_layer(kind: str, attention: str, *, trained: bool) -> int:
    one, two = (sum(storages(split(kind, count, attention, trained=trained)).values()) for count in (1, 2))
    return two - one


def predicted(kind: str, attention: str, *, trained: bool) -> int:
    values, architecture, key = KINDS[kind]
    config = values | {key: 2, "model_type": kind, "architectures": [architecture], "torch_dtype": "bfloat16"}
    model = read_config_object(config, where=kind, name=kind)
    implementation = Implementation(
        attention=attention,  # type: ignore[arg-type]
        norm="fused",
        gated_ffn="fused",
        rotary="fused",
        compiled=True,
        repeat_kv=True,
        trained=trained,
        softmax_dtype="bfloat16" if kind == "gpt2" else "float32",
    )
    return table_bytes(layer_table(model.layers[1], 256, Shape(micro_batch_size=BATCH, seq_len=LENGTH), implementation))


@pytest.mark.parametrize(
    ("kind", "attention", "trained"),
    [("llama", "sdpa", True), ("llama", "sdpa", False), ("llama", "eager", True), ("gpt2", "sdpa", True)],
)
def test_tables_hold_what_the_partitioner_keeps(kind: str, attention: str, trained: bool) -> None:
    found = per_layer(kind, attention, trained=trained)
    assert predicted(kind, attention, trained=trained) == pytest.approx(found, rel=0.01)


def test_the_loss_keeps_narrow_logits_and_row_statistics() -> None:
    sizes = list(storages(split("llama", 1, "sdpa", trained=True)).values())
    peak = loss_peak(
        LossRecipe(compiled=True, shift_copies=False),
        num_tokens=BATCH * LENGTH,
        vocab_size=VOCAB,
        hidden_size=256,
        compute_dtype="bfloat16",
    )
    assert peak.kept_bytes == BATCH * LENGTH * VOCAB * 2
    assert sizes.count(peak.kept_bytes) == 1 and 2 * peak.kept_bytes not in sizes
    assert peak.backward_bytes == 2 * peak.kept_bytes
