"""Methods that put trained vectors before the sequence, or before the keys and values of every layer.

t virtual tokens, h the hidden size, L layers, n the tokens.
"""
# ruff: noqa: D102  (overrides of Rule, documented there)

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.adapters.rule import Rule, Shape, Target, key_value_width
from ullage.spec import model as spec
from ullage.spec.training import Lora


class PromptTuning(Rule):
    """Trained embeddings before the sequence: t h; every sequence is t tokens longer, for the loss too.

    Source: peft@0.21.2:tuners/prompt_tuning/model.py:PromptEmbedding; peft_model.py:PeftModelForCausalLM.forward;
        arXiv:2104.08691.
    """

    names: tuple[str, ...] = ("prompt_tuning",)
    targets = ()
    options: Mapping[str, int | float | str] = {"num_virtual_tokens": 20}
    solved = "num_virtual_tokens"
    reaches_input = True
    source = "peft@0.21.2:tuners/prompt_tuning/model.py:PromptEmbedding"

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        return ((self.whole(lora, "num_virtual_tokens"), model.hidden_size),)

    def prompt_tokens(self, lora: Lora) -> int:
        return self.whole(lora, "num_virtual_tokens")


class PTuning(PromptTuning):
    """The same with a small network that makes the embeddings.

    Formula: t h + 2 layers and an output, h e + e, e e + e, e h + h for its width e; LSTM: two layers in both
        directions, 4 (h e + 6 e e + 8 e ...) as PyTorch lays them, and 2e 2e + 2e, 2e h + h.
    Source: peft@0.21.2:tuners/p_tuning/model.py:PromptEncoder.__init__; arXiv:2103.10385.
    """

    names = ("p_tuning", "ptuning")
    options: Mapping[str, int | float | str] = {
        "num_virtual_tokens": 20,
        "encoder_hidden_size": 0,
        "encoder_reparameterization_type": "MLP",
        "encoder_num_layers": 2,
    }
    source = "peft@0.21.2:tuners/p_tuning/model.py:PromptEncoder.__init__"

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        hidden, tokens = model.hidden_size, self.whole(lora, "num_virtual_tokens")
        inner = self.whole(lora, "encoder_hidden_size") or hidden
        found: list[Shape] = [(tokens, hidden)]
        if self.option(lora, "encoder_reparameterization_type") == "LSTM":
            for layer in range(self.whole(lora, "encoder_num_layers")):
                width = hidden if not layer else 2 * inner
                found += [(4 * inner, width), (4 * inner, inner), (4 * inner,), (4 * inner,)] * 2
            return (*found, (2 * inner, 2 * inner), (2 * inner,), (hidden, 2 * inner), (hidden,))
        for wide, narrow in ((hidden, inner), (inner, inner), (inner, hidden)):
            found += [(narrow, wide), (narrow,)]
        return tuple(found)


class PrefixTuning(Rule):
    """Trained keys and values before those of every layer: t x 2 L x (key width); attention reads s + t of them.

    Formula: t 2 L k d; with ``prefix_projection`` t h + h e + e + e 2Lkd + 2Lkd.
    Source: peft@0.21.2:tuners/prefix_tuning/model.py:PrefixEncoder.__init__; peft_model.py:PeftModel.get_prompt
        (keys and values of the grouped heads); arXiv:2101.00190.
    """

    names = ("prefix_tuning", "prefix")
    targets = ()
    options: Mapping[str, int | float | str] = {
        "num_virtual_tokens": 20,
        "prefix_projection": 0,
        "encoder_hidden_size": 0,
    }
    solved = "num_virtual_tokens"
    source = "peft@0.21.2:tuners/prefix_tuning/model.py:PrefixEncoder.__init__"

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        tokens, width = self.whole(lora, "num_virtual_tokens"), key_value_width(model)
        if not self.whole(lora, "prefix_projection"):
            return ((tokens, width),)
        hidden = model.hidden_size
        inner = self.whole(lora, "encoder_hidden_size") or hidden
        return ((tokens, hidden), (inner, hidden), (inner,), (width, inner), (width,))

    def prefix_tokens(self, lora: Lora) -> int:
        return self.whole(lora, "num_virtual_tokens")


class AdaptionPrompt(Rule):
    """Trained tokens that the topmost layers attend to beside their own, through a gate that begins at zero.

    Formula: t h + 1 per layer, in the base's dtype; kept per layer: see
        :func:`ullage.account.adapters.whole.adaption_rows`.
    Source: peft@0.21.2:tuners/adaption_prompt/layer.py:AdaptedAttention.forward; arXiv:2303.16199.
    """

    names = ("adaption_prompt", "llama_adapter")
    targets = ()
    options: Mapping[str, int | float | str] = {"adapter_len": 10, "adapter_layers": 0}
    solved = "adapter_len"
    base_dtype = True
    source = "peft@0.21.2:tuners/adaption_prompt/layer.py:AdaptedAttention.forward"

    def layers(self, model: spec.Model, lora: Lora) -> int:
        """Return how many layers have a prompt; all, unless told."""
        return min(self.whole(lora, "adapter_layers") or len(model.layers), len(model.layers))

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        one = ((1, self.whole(lora, "adapter_len"), model.hidden_size), (1,))
        return one * self.layers(model, lora)


RULES: Sequence[Rule] = (PromptTuning(), PTuning(), PrefixTuning(), AdaptionPrompt())
