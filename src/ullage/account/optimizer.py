"""Optimizer states and what an optimizer step needs for a moment."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from ullage.account.projected import DEFAULT_RANK, PROJECTIONS, is_projected, projected_bytes, projected_work
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Term, exact, ranged, total
from ullage.units import dtype_bytes

#: Quantised states: one fp32 scale per block. Source: bitsandbytes@0.43.3:optim/optimizer.py:Optimizer2State
#: (blockwise, 256 from 0.43.2 on, 2048 before), torchao@0.14:optim/subclass_8bit.py (256).
BLOCK_8BIT = 256
#: Source: torchao@0.14:optim/subclass_4bit.py.
BLOCK_4BIT = 128
#: Smaller tensors keep fp32 states. Source: bitsandbytes@0.43.3:optim/optimizer.py (min_8bit_size).
MIN_8BIT_ELEMENTS = 4096


class OptimizerRule(Frozen):
    """What one optimizer keeps per parameter.

    Attributes:
        num_moments: tensors of the parameter's shape.
        state: dtype of a moment: None means the job's own.
        quantised: bits of quantised moments, or None.
        factored: Adafactor: a row and a column of each matrix instead of the second moment.
        matrices_only: Muon: one momentum for matrices; embeddings, head and vectors fall back to AdamW.
        paged: states live in unified memory and may be evicted to the host.
        master: an fp32 master copy of 16-bit parameters that the optimizer itself keeps.
        temporaries: multi-tensor step: copies of all parameters alive at once (for_loop: of the largest parameter).
    """

    num_moments: int
    quantised: Literal[4, 8] | None = None
    factored: bool = False
    matrices_only: bool = False
    paged: bool = False
    temporaries: int = 1
    source: str = ""


_ADAM = "torch@2.13.0:torch/optim/adam.py:_multi_tensor_adam (exp_avg_sq_sqrt is one copy of the parameters)"
_MIX = "bitsandbytes@0.45.0:optim/ademamix.py:AdEMAMix.init_state (a fast and a slow average, and the squares)"
_BNB = "bitsandbytes@0.43.3:optim/optimizer.py:Optimizer2State"
RULES: dict[str, OptimizerRule] = {
    "adamw": OptimizerRule(num_moments=2, source=_ADAM),
    "adam": OptimizerRule(num_moments=2, source=_ADAM),
    "sgd": OptimizerRule(num_moments=0, source="torch@2.13.0:torch/optim/sgd.py:_multi_tensor_sgd", temporaries=0),
    "sgd_momentum": OptimizerRule(num_moments=1, source="torch@2.13.0:torch/optim/sgd.py", temporaries=0),
    "lion": OptimizerRule(num_moments=1, source="arXiv:2302.06675 alg. 2"),
    "adafactor": OptimizerRule(
        num_moments=0, factored=True, source="transformers@5.23.0:optimization.py:Adafactor.step", temporaries=0
    ),
    "muon": OptimizerRule(num_moments=1, matrices_only=True, source="torch@2.13.0:torch/optim/_muon.py"),
    "adamw_8bit": OptimizerRule(num_moments=2, quantised=8, source=_BNB, temporaries=0),
    "paged_adamw": OptimizerRule(num_moments=2, paged=True, source=_BNB, temporaries=0),
    "paged_adamw_8bit": OptimizerRule(num_moments=2, quantised=8, paged=True, source=_BNB, temporaries=0),
    "lion_8bit": OptimizerRule(num_moments=1, quantised=8, source=_BNB, temporaries=0),
    "paged_lion": OptimizerRule(num_moments=1, paged=True, source=_BNB, temporaries=0),
    "paged_lion_8bit": OptimizerRule(num_moments=1, quantised=8, paged=True, source=_BNB, temporaries=0),
    "ademamix": OptimizerRule(num_moments=3, source=_MIX, temporaries=0),
    "ademamix_8bit": OptimizerRule(num_moments=3, quantised=8, source=_MIX, temporaries=0),
    "paged_ademamix": OptimizerRule(num_moments=3, paged=True, source=_MIX, temporaries=0),
    "paged_ademamix_8bit": OptimizerRule(num_moments=3, quantised=8, paged=True, source=_MIX, temporaries=0),
    "adagrad": OptimizerRule(num_moments=1, source="torch@2.13.0:torch/optim/adagrad.py:Adagrad (sum)"),
    "rmsprop": OptimizerRule(num_moments=1, source="torch@2.13.0:torch/optim/rmsprop.py:RMSprop (square_avg)"),
    "rmsprop_8bit": OptimizerRule(num_moments=1, quantised=8, source=_BNB, temporaries=0),
    "schedule_free_adamw": OptimizerRule(
        num_moments=2, source="schedulefree@1.4:schedulefree/adamw_schedulefree.py (z, exp_avg_sq)"
    ),
    "lora_fa": OptimizerRule(num_moments=2, source="peft@0.21.2:optimizers/lorafa.py:LoraFAOptimizer", temporaries=0),
    "adamw_4bit": OptimizerRule(num_moments=2, quantised=4, source="torchao@0.14:optim/adam.py", temporaries=0),
    **{name: OptimizerRule(num_moments=2, source=rule.source, temporaries=0) for name, rule in PROJECTIONS.items()},
}
ALIASES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    # peft@0.21.2:optimizers/loraplus.py, riemannian.py: AdamW with other learning rates and gradients.
    "lora_plus": "adamw",
    "riemannian": "adamw",
    "lorafa": "lora_fa",
}


class Trained(Frozen):
    """The tensors that one rank's optimizer works on: (shape, how many equal ones).

    ``frame``: shapes of embeddings and head, whose gradients are not projected; ``rank``: of optimizers that project.
    """

    tensors: tuple[tuple[tuple[int, ...], int], ...]
    frame: frozenset[tuple[int, ...]] = frozenset()
    rank: int = DEFAULT_RANK

    @property
    def num_elements(self) -> int:
        """All elements."""
        return sum(_elements(shape) * copies for shape, copies in self.tensors)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((_elements(shape) for shape, _copies in self.tensors), default=0)


def rule_name(name: str) -> str:
    """Return the name under which an optimizer's rule stands, whatever the spelling."""
    word = name.lower().replace("-", "_")
    return ALIASES.get(word, word)


def rule_of(name: str) -> OptimizerRule:
    """Return the rule of an optimizer.

    Raises:
        InputError: the optimizer is not known.
    """
    key = rule_name(name)
    if key not in RULES:
        raise InputError(
            _("unknown optimizer {name!r}").format(name=name[:40]),
            remedy=_("known are {known}").format(known=", ".join(RULES)),
        )
    return RULES[key]


def optimizer_terms(
    name: str, trained: Trained, *, moments: str, params: str, master: str | None, num_shards: int = 1
) -> Term:
    """Return the optimizer's states and master copy on one rank.

    Formula: elements x (moments x bytes of the state + bytes of the master copy) / shards; 8-bit: one fp32 scale
        per 256 elements, tensors below 4096 elements in fp32; Adafactor: rows + columns of each matrix.
    Source: the rule's own (RULES).
    Known error: none for full-precision states; paged states may lie on the host.
    """
    rule = rule_of(name)
    num_bytes = sum(_kept(name, rule, trained, shape, moments, params) * copies for shape, copies in trained.tensors)
    size = -(-num_bytes // num_shards)
    children = [_maybe_paged(rule, int(size))] if size else []
    if master is not None and dtype_bytes(master) != dtype_bytes(params):
        copy = -(-trained.num_elements * dtype_bytes(master) // num_shards)
        children.append(exact("master_weights", int(copy), formula=f"{trained.num_elements:,} x {master}"))
    return total("optimizer", children, source=rule.source)


def shard_state_bytes(name: str, num_elements: int, moments: str) -> int:
    """Return what an optimizer keeps for ``num_elements`` of a flat shard, whose matrices it does not see as such."""
    return int(_state_bytes(rule_of(name), (num_elements,), moments))


def temporaries(name: str, trained: Trained, *, impl: str | None, params: str, num_shards: int = 1) -> int:
    """Return the bytes an optimizer step allocates and frees again.

    Formula: foreach: one copy of all parameters (square root of the second moments); fused: none; for_loop: two copies
        of the largest tensor.
    Source: torch@2.13.0:torch/optim/adam.py:_multi_tensor_adam, :_fused_adam, :_single_tensor_adam.
    """
    rule = rule_of(name)
    width = dtype_bytes(params)
    projection = PROJECTIONS.get(rule_name(name))
    if projection is not None:
        matrices = [shape for shape, _copies in trained.tensors if is_projected(shape, trained.frame)]
        return max((projected_work(projection, shape, width) for shape in matrices), default=0)
    if impl == "fused" or not rule.temporaries:
        return 0
    if impl == "for_loop":
        return int(2 * trained.largest * width)
    return int(rule.temporaries * trained.num_elements * width) // num_shards


def _maybe_paged(rule: OptimizerRule, size: int) -> Term:
    if not rule.paged:
        return exact("moments", size, formula=f"{rule.num_moments} moments", source=rule.source)
    return ranged("moments", size, low=0, high=size, formula="paged: may lie on the host", source=rule.source)


def _kept(
    name: str, rule: OptimizerRule, trained: Trained, shape: tuple[int, ...], moments: str, params: str
) -> Fraction:
    """Return the states of one tensor; of a projected matrix in the format of its gradient."""
    projection = PROJECTIONS.get(rule_name(name))
    if projection is not None and is_projected(shape, trained.frame):
        return projected_bytes(projection, shape, trained.rank, Fraction(dtype_bytes(params)))
    return _state_bytes(rule, shape, moments)


def _state_bytes(rule: OptimizerRule, shape: tuple[int, ...], moments: str) -> Fraction:
    elements = _elements(shape)
    width = dtype_bytes(moments)
    if rule.factored:
        matrix = len(shape) >= 2
        return 4 * Fraction(elements // shape[-1] + elements // shape[-2] if matrix else elements)
    if rule.matrices_only and len(shape) < 2:
        return 2 * elements * width
    if rule.quantised is None:
        return rule.num_moments * elements * width
    if elements < MIN_8BIT_ELEMENTS:
        return rule.num_moments * elements * Fraction(4)
    block = BLOCK_8BIT if rule.quantised == 8 else BLOCK_4BIT
    return rule.num_moments * (elements * Fraction(rule.quantised, 8) + Fraction(4 * -(-elements // block)))


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
