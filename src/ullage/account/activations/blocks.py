"""Graphs of a decoder block as training frameworks write it: linear layers, norms, rotary embedding, attention, FFN.

A :class:`Style` says which implementation runs; a :class:`Builder` appends operations. Sizes in bytes; n tokens of the
micro-batch on this rank, h hidden size, a heads, k KV heads, d head size, i intermediate size, t tensor-parallel size.

Source of what autograd keeps: torch@2.13.0:tools/autograd/derivatives.yaml (mul, silu, native_dropout, linear/mm,
_scaled_dot_product_flash_attention, native_layer_norm); each framework's model code as named at the function.
Known error: none in the kept tensors of a dense block (tests/contract/test_block_graphs.py); order and temporaries of
compiled blocks are those of the eager block with pointwise operations fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ullage.account.activations.graph import Kind, Op
from ullage.spec.training import Lora
from ullage.units import cdiv


@dataclass(frozen=True, kw_only=True)
class Style:
    """Which implementation runs, as far as memory differs.

    Attributes:
        norm: "native" RMSNorm in fp32 with the cast before the weight (Transformers, torchtitan until 2025-03);
            "late_cast" with the cast after the weight (litgpt); "narrow" in the compute dtype (litgpt until 2024-02);
            "fused" one kernel (nn.RMSNorm, Triton).
        rope: "complex" fp32 complex product (torchtitan, Meta's code); "halves" rotate_half in the compute dtype
            (Transformers); "halves_fp32" with fp32 tables (litgpt); "fused" one kernel or a compiled block.
        repeat_kv: keys and values are copied to all heads before attention.
        rope_copy: a copy after rotary (litgpt's cat of the rotated and the plain part).
        fused_qkv: one projection for q, k and v.
        scores: attention written out: scores and probabilities b*a*s*s are kept.
        clamped_scores: masked scores pass ``torch.max``, whose gradient needs them.
            Source: transformers@4.28.1:models/opt/modeling_opt.py:OPTAttention.forward.
        gates_first: both FFN inputs are projected before the activation (litgpt).
        dropout: hidden and attention dropout keep masks.
        element_bytes: of the compute dtype.
        grad_bytes: of the unsharded gradients of weights.
        linear_weight_copy_bytes: bytes per weight of a copy made in forward and in backward: a dequantised 4-bit
            weight, or an fp8 cast.
        keeps_frozen_inputs: a frozen quantised linear keeps its input all the same, as an attribute that
            goes with the graph only. Source: bitsandbytes@0.42.0:bitsandbytes/autograd/_functions.py:MatMul4Bit.
        autocast: fp32 weights: a cast copy of each weight is kept from forward to backward by the operation.
    """

    norm: Literal["native", "late_cast", "narrow", "fused"] = "native"
    rope: Literal["complex", "halves", "halves_fp32", "fused", "none"] = "halves"
    repeat_kv: bool = False
    rope_copy: bool = False
    fused_qkv: bool = False
    scores: bool = False
    clamped_scores: bool = False
    gates_first: bool = False
    dropout: float = 0.0
    element_bytes: int = 2
    grad_bytes: int = 2
    linear_weight_copy_bytes: int = 0
    keeps_frozen_inputs: bool = False
    autocast: bool = False


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained in a block. ``lora`` None: the base itself, unless ``adapter`` names another small addition.

    ``adapter``: "prefix" a gated attention to learned tokens (LLaMA-Adapter); "scale" that, and a scale and a bias on
    every linear layer, and the norms (version 2). Source: litgpt@26857050:litgpt/adapter.py, adapter_v2.py.
    """

    base: bool = True
    lora: Lora | None = None
    adapter: Literal["", "prefix", "scale"] = ""

    @property
    def norms(self) -> bool:
        """Whether the weights of norms are trained."""
        return self.base or self.adapter == "scale"

    def lora_on(self, *names: str) -> bool:
        """Whether an adapter of low rank stands on a module that goes by one of ``names``."""
        if self.lora is None:
            return False
        targets = set(self.lora.targets)
        return "all-linear" in targets or bool(targets & set(names))


@dataclass
class Builder:
    """Appends operations of one block; every method returns the name of the tensor it made."""

    style: Style
    training: Training
    num_tokens: int
    ops: list[Op] = field(default_factory=list)

    def op(
        self,
        name: str,
        num_bytes: int,
        inputs: Sequence[str],
        *,
        keeps: Sequence[str] = (),
        kind: Kind = "pointwise",
        aside_bytes: int = 0,
        weight_grad_bytes: int = 0,
        work_bytes: int = 0,
        grad_work_bytes: int = 0,
        lingers: bool = False,
    ) -> str:
        """Append an operation."""
        made = Op(
            name=name,
            num_bytes=num_bytes,
            inputs=tuple(inputs),
            keeps=tuple(keeps),
            kind=kind,
            aside_bytes=aside_bytes,
            weight_grad_bytes=weight_grad_bytes,
            work_bytes=work_bytes,
            grad_work_bytes=grad_work_bytes,
            lingers=lingers,
        )
        self.ops.append(made)
        return name

    def view(self, name: str, source: str, num_bytes: int) -> str:
        """Append a view: no memory of its own."""
        return self.op(name, num_bytes, (source,), kind="view")

    def add(self, name: str, num_bytes: int, one: str, other: str) -> str:
        """Append a sum; its gradient passes through."""
        return self.op(name, num_bytes, (one, other), kind="add")

    def linear(
        self,
        name: str,
        x: str,
        in_features: int,
        out_features: int,
        *,
        names: Sequence[str] = (),
        num_tokens: int | None = None,
        split_lora: int = 1,
        pad_lora: bool = False,
        lora_out: int | None = None,
    ) -> str:
        """Append a linear layer with what is trained on it.

        Args:
            name: of its output.
            x: its input.
            in_features, out_features: on this rank.
            names: what LoRA targets may call it.
            num_tokens: rows, when not the block's.
            split_lora: low-rank pairs inside one projection (litgpt's query, key, value).
            pad_lora: their outputs are laid into zeros of the whole width.
            lora_out: output features the pairs cover, when not all.
        """
        style, training = self.style, self.training
        rows = self.num_tokens if num_tokens is None else num_tokens
        weights = in_features * out_features
        copy = style.linear_weight_copy_bytes * weights
        with_lora = training.lora_on(*(names or (name,)))
        scaled = training.adapter == "scale"
        plain = f"{name}.base" if with_lora or scaled else name
        self.op(
            plain,
            rows * out_features * style.element_bytes,
            (x,),
            keeps=(x,) if training.base or style.keeps_frozen_inputs else (),
            kind="mm",
            aside_bytes=weights * style.element_bytes if style.autocast else 0,
            weight_grad_bytes=weights * style.grad_bytes if training.base else 0,
            work_bytes=copy,
            grad_work_bytes=copy,
            lingers=style.keeps_frozen_inputs,
        )
        if with_lora:
            width = out_features if lora_out is None else lora_out
            plain = self._lora(name, plain, x, rows, in_features, out_features, width, split_lora, pad_lora)
        elif scaled:
            size = rows * out_features * style.element_bytes
            self.op(f"{name}.shifted", size, (plain,))
            self.op(name, size, (f"{name}.shifted",), keeps=(f"{name}.shifted",), grad_work_bytes=size)
        return name

    def _lora(
        self, name: str, plain: str, x: str, rows: int, fan_in: int, fan_out: int, width: int, pairs: int, pad: bool
    ) -> str:
        """A low-rank pair beside a linear: dropout, A, B, scaling, sum.

        Source: litgpt@26857050:litgpt/lora.py:LoRALinear.forward, LoRAQKVLinear.forward;
            peft@0.17:tuners/lora/layer.py:Linear.forward.
        """
        lora = self.training.lora
        assert lora is not None
        size, rank = self.style.element_bytes, lora.rank * pairs
        source = x
        if lora.dropout:
            masked = rows * fan_in
            source = self.op(f"{name}.dropped", masked * size, (x,), aside_bytes=masked)
        self.op(
            f"{name}.a",
            rows * rank * size,
            (source,),
            keeps=(source,),
            kind="mm",
            weight_grad_bytes=fan_in * rank * self.style.grad_bytes,
        )
        self.op(
            f"{name}.b",
            rows * width * size,
            (f"{name}.a",),
            keeps=(f"{name}.a",),
            kind="mm",
            weight_grad_bytes=lora.rank * width * self.style.grad_bytes,
        )
        last = f"{name}.b"
        if pad:
            last = self.op(
                f"{name}.padded", rows * fan_out * size, (last,), keeps=(last,)
            )  # index_copy keeps its source
        last = self.op(f"{name}.scaled", rows * fan_out * size, (last,))
        return self.add(name, rows * fan_out * size, plain, last)

    def norm(self, name: str, x: str, size: int, *, kind: str = "rms", rows: int | None = None) -> str:
        """Append a norm over ``size`` values a row (``rows`` default: the block's tokens).

        Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaRMSNorm; torchtitan@9dec370:
            torchtitan/models/norms.py:RMSNorm; litgpt@26857050:litgpt/model.py:RMSNorm.
        """
        rows = self.num_tokens if rows is None else rows
        values, element = rows * size, self.style.element_bytes
        grads = self._norm_grads(size)
        if kind == "layer" or self.style.norm == "fused":
            statistics = 4 * rows * (2 if kind == "layer" else 1)
            return self.op(
                name,
                values * element,
                (x,),
                keeps=(x,),
                aside_bytes=statistics,
                kind="norm",
                weight_grad_bytes=grads * (2 if kind == "layer" else 1),
            )
        if self.style.norm == "narrow":
            return self._narrow_norm(name, x, rows, size)
        return self._wide_norm(name, x, rows, size)

    def _norm_grads(self, size: int) -> int:
        return size * self.style.grad_bytes if self.training.norms else 0

    def _narrow_norm(self, name: str, x: str, rows: int, size: int) -> str:
        """In the compute dtype: variance of x, x times its root, times the weight."""
        element, unit = self.style.element_bytes, f"{name}.unit"
        work = rows * size * element
        self.op(f"{name}.variance", rows * element, (x,), keeps=(x,), work_bytes=work, grad_work_bytes=work)
        self.op(unit, work, (x, f"{name}.variance"), keeps=(x,), aside_bytes=rows * element)
        kept = (unit,) if self.training.norms else ()
        return self.op(name, work, (unit,), keeps=kept, weight_grad_bytes=self._norm_grads(size))

    def _wide_norm(self, name: str, x: str, rows: int, size: int) -> str:
        """In fp32, cast back before the weight, or after it."""
        values, element = rows * size, self.style.element_bytes
        wide, unit, grads = f"{name}.wide", f"{name}.unit", self._norm_grads(size)
        self.op(wide, 4 * values, (x,))
        work = 4 * values
        self.op(f"{name}.variance", 4 * rows, (wide,), keeps=(wide,), work_bytes=work, grad_work_bytes=work)
        self.op(unit, 4 * values, (wide, f"{name}.variance"), keeps=(wide,), aside_bytes=4 * rows)
        if self.style.norm == "late_cast":
            kept = (unit,) if self.training.norms else ()
            self.op(f"{name}.weighted", 4 * values, (unit,), keeps=kept, weight_grad_bytes=grads)
            return self.op(name, values * element, (f"{name}.weighted",))
        self.op(f"{name}.narrow", values * element, (unit,))
        kept = (f"{name}.narrow",) if self.training.norms else ()
        return self.op(name, values * element, (f"{name}.narrow",), keeps=kept, weight_grad_bytes=grads)

    def rope(self, name: str, x: str, num_values: int, *, whole: bool = True) -> str:
        """Append a rotary embedding of ``num_values`` values.

        Source: torchtitan@9dec370:torchtitan/models/llama/model.py:apply_rotary_emb;
            transformers@5.23.0:models/llama/modeling_llama.py:apply_rotary_pos_emb;
            litgpt@26857050:litgpt/model.py:apply_rope.
        """
        element = self.style.element_bytes
        rope = self.style.rope
        if rope == "none":
            return x
        if rope == "fused":
            return self.op(name, num_values * element, (x,))
        wide = 4 if rope in ("complex", "halves_fp32") else element
        if rope == "complex":
            self.op(f"{name}.wide", num_values * 4, (x,))
            self.op(f"{name}.turned", num_values * 4, (f"{name}.wide",))
            return self.op(name, num_values * element, (f"{name}.turned",))
        self.op(f"{name}.halves", num_values * element, (x,), work_bytes=num_values * element // 2)
        self.op(f"{name}.cosine", num_values * wide, (x,))
        self.op(f"{name}.sine", num_values * wide, (f"{name}.halves",))
        rotated = f"{name}.sum" if wide != element or self.style.rope_copy else name
        self.add(rotated, num_values * wide, f"{name}.cosine", f"{name}.sine")
        if wide != element:
            rotated = self.op(f"{name}.cast", num_values * element, (rotated,))
        if self.style.rope_copy:
            rotated = self.op(f"{name}.joined", num_values * element, (rotated,))
        return rotated

    def flash(
        self, name: str, q: str, k: str, v: str, *, batch: int, heads: int, seq_len: int, width: int, head_dim: int
    ) -> str:
        """Append fused attention: q, k, v, output and the log-sum-exp are kept; backward sums dq in fp32.

        Source: torch@2.13.0:aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp:mha_fwd, mha_bwd.
        """
        rows = batch * seq_len
        padded = batch * heads * cdiv(seq_len, 128) * 128
        return self.op(
            name,
            rows * width * self.style.element_bytes,
            (q, k, v),
            keeps=(q, k, v, name),
            aside_bytes=4 * batch * heads * seq_len,
            grad_work_bytes=4 * padded * (head_dim + 1),
            kind="sdpa",
        )

    def written_out(
        self, name: str, q: str, k: str, v: str, *, batch: int, heads: int, seq_len: int, width: int
    ) -> str:
        """Append attention written out: scores, fp32 softmax and its cast, dropout mask, product with v.

        Source: transformers@5.23.0:models/llama/modeling_llama.py:eager_attention_forward;
            torch@2.13.0:aten/src/ATen/native/cuda/SoftMax.cu:softmax_backward_cuda_out (gradient times output).
        """
        scores, element = batch * heads * seq_len * seq_len, self.style.element_bytes
        self.op(f"{name}.scores", scores * element, (q, k), keeps=(q, k), kind="mm")
        self.op(f"{name}.scaled", scores * element, (f"{name}.scores",))
        self.op(f"{name}.masked", scores * element, (f"{name}.scaled",))
        last = f"{name}.masked"
        if self.style.clamped_scores:
            last = self.op(f"{name}.clamped", scores * element, (last,), keeps=(last,))
        self.op(
            f"{name}.wide",
            scores * 4,
            (last,),
            keeps=(f"{name}.wide",),
            work_bytes=scores * 4,
            grad_work_bytes=scores * 4,
        )
        last = self.op(f"{name}.probabilities", scores * element, (f"{name}.wide",))
        if self.style.dropout:
            last = self.op(f"{name}.dropped", scores * element, (last,), aside_bytes=scores)
        rows = batch * seq_len
        self.op(f"{name}.heads", rows * width * element, (last, v), keeps=(last, v), kind="mm")
        return self.op(name, rows * width * element, (f"{name}.heads",))
