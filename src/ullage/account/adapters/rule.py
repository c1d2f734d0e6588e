"""What a rule of a parameter-efficient method says, and the words it says it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.activations.saved import SavedTensor
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.spec.training import Lora

Shape = tuple[int, ...]
#: The dtype of a buffer that is made in the base's.
BASE = "base"
#: (elements, canonical dtype, :data:`BASE`, or ``""``: the adapter's own)
Buffer = tuple[int, str]


class AdapterPrecision(Frozen):
    """Number formats around an adapter.

    Attributes:
        dtype: of the adapter's weights; peft makes 16-bit ones fp32 (autocast_adapter_dtype).
        compute_dtype: of the base's activations.
        autocast: its products run in ``compute_dtype`` although the weights are fp32.
        uncast: dtype of the layer's input where adapters take it as it comes; None: each casts it for itself.
        fused: they run as one function that keeps its input and what dropout left of it, no mask and no product.
    """

    dtype: str = "float32"
    compute_dtype: str = "bfloat16"
    autocast: bool = True
    uncast: str | None = None
    fused: bool = False

    @property
    def product(self) -> str:
        """Dtype in which products of adapters are computed."""
        return self.compute_dtype if self.autocast else self.dtype


class Target(Frozen):
    """A wrapped linear layer, or a norm (``in_features`` 1): ``copies`` equal ones, of one layer.

    ``module``: its path within the layer; ``bias``: it has one.
    """

    module: str
    out_features: int
    in_features: int
    copies: int = 1
    routed: bool = False
    bias: bool = False

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.module.rpartition(".")[2]

    @property
    def size(self) -> int:
        """Elements of its weight."""
        return self.out_features * self.in_features

    @property
    def both(self) -> int:
        """Width in and width out together: what one rank of a low-rank pair has."""
        return self.out_features + self.in_features


class Rows:
    """Collects what autograd keeps for one target; ``shared``: the inputs that targets of a layer have in common."""

    def __init__(
        self, target: Target, num_tokens: int, precision: AdapterPrecision, shared: set[str], source: str
    ) -> None:
        self.target, self.num_tokens, self.precision = target, num_tokens, precision
        self.product, self.wide, self.compute = precision.product, precision.dtype, precision.compute_dtype
        self.found: list[SavedTensor] = []
        self._shared, self._source = shared, source

    def keep(self, name: str, num_elements: int, dtype: str) -> None:
        """Keep one tensor."""
        module = self.target.module
        self.found.append(
            SavedTensor(
                name=f"{module}.{name}", module=module, num_elements=num_elements, dtype=dtype, source=self._source
            )
        )

    def per_token(self, name: str, width: int, dtype: str) -> None:
        """Keep ``width`` values of each token."""
        self.keep(name, self.num_tokens * width, dtype)

    def own_input(self) -> None:
        """Keep a cast of the input: every adapter casts for itself, and where none is needed the input is shared."""
        if self.product == self.compute == self.wide:
            self.shared_input()
        else:
            self.per_token("adapter input", self.target.in_features, self.product)

    def shared_input(self) -> None:
        """Keep the input as it is, once for all linears that read it."""
        key = f"{self.target.module.rpartition('.')[0]} {self.target.in_features}"
        if key not in self._shared:
            self._shared.add(key)
            self.per_token("shared input", self.target.in_features, self.compute)

    def frozen_casts(self, num_elements: int) -> None:
        """Keep casts of frozen fp32 factors: autocast caches only those of trained leaves."""
        if self.precision.autocast and self.wide != self.compute:
            self.keep("casts of frozen factors", num_elements, self.compute)


class Rule:
    """One method. Subclasses override what differs from a method that trains nothing and keeps nothing.

    Attributes:
        names: PEFT's name in lower case, and others it goes by.
        targets: what PEFT wraps where nothing is said, for models with Llama's names.
        rank: PEFT's default, 0 where the method has none.
        options: PEFT's names of further settings that matter here, with their defaults.
        solved: the number that a stated count of trained parameters determines: ``rank`` or an option.
        alternatives: other usual values of options: one of them holds where a stated count fits it alone.
        base_dtype: its tensors have the base's dtype, whatever ``autocast_adapter_dtype`` says.
        reaches_input: a gradient reaches the first layer's input.
        reads_weight: it needs the base's weight as a matrix, which a packed one is not.
        source: project@version:file:function.
    """

    names: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    rank: int = 0
    options: Mapping[str, int | float | str] = {}
    solved: str = "rank"
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {}
    base_dtype: bool = False
    reaches_input: bool = False
    reads_weight: bool = False
    source: str = ""

    def option(self, lora: Lora, name: str) -> int | float | str:
        """Return a setting, or its default."""
        return dict(lora.options).get(name, self.options[name])

    def whole(self, lora: Lora, name: str) -> int:
        """Return a setting that is a whole number."""
        return int(self.option(lora, name))

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        """Return the trained tensors of one target."""
        return ()

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        """Return the trained tensors that all targets have in common, or that have no target."""
        return ()

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        """Return what lies frozen beside one target."""
        return ()

    def shared_held(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Buffer, ...]:
        """Return what lies frozen once."""
        return ()

    def hosted(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        """Return buffers of one target that are made on the host, and come along where the whole model is moved."""
        return ()

    def freed_bytes(self, target: Target, lora: Lora, base_width: float) -> int:
        """Return what leaves the GPU of one target's base."""
        return 0

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        """Add what autograd keeps for one target."""

    def work_elements(self, target: Target, lora: Lora) -> int:
        """Return the elements that stand for a moment while one target's backward runs."""
        return 0

    def prompt_tokens(self, lora: Lora) -> int:
        """Return the tokens that every sequence becomes longer by."""
        return 0

    def prefix_tokens(self, lora: Lora) -> int:
        """Return the keys and values that stand before every sequence's own."""
        return 0

    def num_scores(self) -> int:
        """Return the fp32 copies of the trained tensors that the method keeps for itself."""
        return 0


def key_value_width(model: spec.Model) -> int:
    """Return the elements of one token's keys and values in all layers."""
    found = 0
    for layer in model.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, spec.Attention):
                found += mixer.num_kv_heads * (mixer.head_dim + (mixer.v_head_dim or mixer.head_dim))
    return found
