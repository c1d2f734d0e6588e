"""The model that a Megatron-LM command line describes, as typed parts.

Sizes and defaults as Megatron-LM resolves them; names of tensors are those of the published checkpoints of such models,
with ``mlp.fc1``-like two-layer blocks under ``up_proj`` and ``down_proj``.

Source: Megatron-LM@adc69db:megatron/training/arguments.py:validate_args, megatron/training/global_vars.py,
megatron/training/tokenizer/tokenizer.py:_vocab_size_with_padding.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from ullage.catalog import models as catalog
from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.megatron_words import Arguments
from ullage.spec import model as spec

MAX_LAYERS = 10_000
MAX_EXPERTS = 65_536
#: Vocabularies of the tokenizers that Megatron-LM builds in, before padding.
GPT2_VOCABULARY, BERT_UNCASED, BERT_CASED = 50_257, 30_522, 28_996
TIKTOKEN_VOCABULARY, LLAMA2_VOCABULARY = 2**17, 32_000
_LIST = re.compile(r"\[\s*([01](?:\s*,\s*[01])*)\s*\](?:\s*\*\s*(\d+))?")


def model_of(args: Arguments) -> tuple[spec.Model, tuple[str, ...]]:
    """Build the model; the sentences say what was assumed."""
    assumed: list[str] = []
    if "hidden-size" not in args:
        where = _("; the checkpoint says it (--use-checkpoint-args)") if args.on("use-checkpoint-args") else ""
        raise InputError(_("--hidden-size is missing") + where, remedy=_("add it, or name the model before --from"))
    hidden = args.size("hidden-size")
    vocabulary = _vocabulary(args, assumed)
    layers = _layers(args, hidden)
    kind = _norm_kind(args)
    positions = 0
    if args.get("position-embedding-type", "learned_absolute") == "learned_absolute" and not args.on(
        "use-rotary-position-embeddings"
    ):
        positions = args.count("max-position-embeddings")
    if args.on("no-position-embedding"):
        positions = 0
    final = spec.Norm(name="model.norm", size=hidden, kind=kind, bias=kind == "layer")
    built = spec.Model(
        name=args.get("model-name") or "megatron",
        architecture=_architecture(args),
        hidden_size=hidden,
        vocab_size=vocabulary,
        dtype="float16" if args.on("fp16") else "bfloat16" if args.on("bf16") else "float32",
        layers=layers,
        final_norms=(final,),
        tied_embeddings=not args.on("untie-embeddings-and-output-weights"),
        learned_positions=positions,
        max_position_embeddings=args.count("max-position-embeddings", 0),
        extras=_extras(args, hidden),
        mtp=_mtp(args, hidden, layers),
        lm_head_bias=_architecture(args) in ("bert", "t5"),
        source="megatron arguments",
    )
    return built, tuple(assumed)


def _architecture(args: Arguments) -> str:
    """Say which pretraining script the arguments are for: its own flags tell."""
    if "encoder-num-layers" in args and "decoder-num-layers" in args:
        return "t5"
    if args.get("vocab-file", "").endswith("vocab.txt") or "bert-no-binary-head" in args:
        return "bert"
    if args.pattern:
        return "hybrid"
    return "gpt"


def _vocabulary(args: Arguments, assumed: list[str]) -> int:
    """Return the padded vocabulary: rows of the embedding over all tensor-parallel ranks.

    Formula: ceil(V / (d * t)) * d * t, d make-vocab-size-divisible-by (128), t tensor-parallel size.
    """
    if "padded-vocab-size" in args:
        return args.size("padded-vocab-size")
    tokenizer = args.get("tokenizer-type")
    if "vocab-size" in args:
        size = args.size("vocab-size") + (1 if tokenizer == "NullTokenizer" else 0)
    else:
        model = args.get("tokenizer-model") or args.environment.get("TOKENIZER_MODEL", "")  # of a script
        size = _known_vocabulary(args.get("vocab-file"), tokenizer, model)
        assumed.append(_("vocabulary: {size} entries, as its tokenizer is known to have").format(size=size))
    if args.on("no-pad-vocab-size") or args.on("disable-pad-vocab-size"):
        return size
    multiple = args.size("make-vocab-size-divisible-by", 128) * args.size("tensor-model-parallel-size", 1)
    return -(-size // multiple) * multiple


def _known_vocabulary(file: str, tokenizer: str, model: str) -> int:
    """Vocabulary of a tokenizer whose size is not on the command line.

    WordPiece adds [BOS] and [EOS], T5 a hundred ids; tiktoken files are cut at 2**17; a name may say ``256k``; else the
    tokenizer of a model in the catalog.

    Raises:
        InputError: it cannot be known.
    Source: Megatron-LM@adc69db:megatron/training/tokenizer/tokenizer.py.
    """
    if tokenizer == "BertWordPieceCase":
        return BERT_CASED + 2 + 100
    if file.endswith("vocab.txt") or tokenizer == "BertWordPieceLowerCase":
        return BERT_UNCASED + 2
    if tokenizer in ("", "GPT2BPETokenizer") and not model:
        return GPT2_VOCABULARY
    if tokenizer == "TikTokenizer":
        return TIKTOKEN_VOCABULARY
    if tokenizer == "Llama2Tokenizer":
        return LLAMA2_VOCABULARY
    said = re.search(r"(?<![0-9])(\d{2,3})k(?![a-z0-9])", model.lower())
    if said:
        return int(said.group(1)) * 1000
    known = catalog.find(model) if model else None
    if known is not None:
        return catalog.load_entry(known).vocab_size
    raise InputError(
        _("the vocabulary of {tokenizer} is not known").format(tokenizer=(model or tokenizer)[:80]),
        remedy=_("add --vocab-size or --padded-vocab-size, or name the model before --from"),
    )


def _norm_kind(args: Arguments) -> Literal["rms", "layer"]:
    return "rms" if args.get("normalization") == "RMSNorm" else "layer"


def _attention(args: Arguments, hidden: int, *, cross: bool = False) -> spec.Attention | spec.LatentAttention:
    if args.on("multi-latent-attention"):
        return _latent_attention(args, sparse=args.get("experimental-attention-variant") == "dsa")
    return _plain_attention(args, hidden, cross=cross)


def _latent_attention(args: Arguments, *, sparse: bool) -> spec.LatentAttention:
    return spec.LatentAttention(
        num_heads=args.size("num-attention-heads"),
        q_lora_rank=args.count("q-lora-rank", 0) or None,
        kv_lora_rank=args.count("kv-lora-rank", 32),
        qk_nope_head_dim=args.count("qk-head-dim", 128),
        qk_rope_head_dim=args.count("qk-pos-emb-head-dim", 64),
        v_head_dim=args.count("v-head-dim", 128),
        indexer=_indexer(args) if sparse else None,
    )


def _plain_attention(args: Arguments, hidden: int, *, cross: bool = False) -> spec.Attention:
    heads, bias = args.size("num-attention-heads"), not args.on("disable-bias-linear")
    groups = args.size("num-query-groups", 1) if args.on("group-query-attention") else heads
    query_bias = bias or args.on("add-qkv-bias")
    return spec.Attention(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=args.size("kv-channels", hidden // heads),
        q_bias=query_bias,
        k_bias=query_bias,
        v_bias=query_bias,
        o_bias=bias,
        qk_norm="head" if args.on("qk-layernorm") else None,
        qk_norm_kind="rms" if _norm_kind(args) == "rms" else "layer",
        output_gate=args.on("attention-output-gate"),
        cross=cross,
        prefix="cross_attn" if cross else "self_attn",
    )


def _indexer(args: Arguments) -> spec.Indexer:
    """The indexer of sparse attention (``--experimental-attention-variant dsa``)."""
    return spec.Indexer(
        num_heads=args.size("dsa-indexer-n-heads", 64),
        head_dim=args.size("dsa-indexer-head-dim", 128),
        top_k=args.size("dsa-indexer-topk", 2048),
    )


def _delta_net(args: Arguments) -> spec.GatedDeltaNet:
    """A gated delta rule layer (``--experimental-attention-variant gated_delta_net``).

    Source: Megatron-LM@d98e8a6:megatron/core/models/gpt/experimental_attention_variant_module_specs.py.
    """
    return spec.GatedDeltaNet(
        num_k_heads=args.size("linear-num-key-heads", 16),
        num_v_heads=args.size("linear-num-value-heads", 32),
        k_head_dim=args.size("linear-key-head-dim", 128),
        v_head_dim=args.size("linear-value-head-dim", 128),
        conv_kernel=args.size("linear-conv-kernel-dim", 4),
    )


def _linear_layers(args: Arguments, number: int) -> list[bool]:
    """Say of each layer whether its attention is linear: all but every n-th (``--linear-attention-freq``)."""
    if args.get("experimental-attention-variant") != "gated_delta_net":
        return [False] * number
    text = args.get("linear-attention-freq") or "4"
    if text.isdigit() and int(text):
        return [(index + 1) % int(text) != 0 for index in range(number)]
    return _pattern("linear-attention-freq", text, number)


def _dense(args: Arguments, hidden: int) -> spec.DenseFFN:
    gated = args.on("swiglu") or args.on("quick-geglu")
    default = hidden * 4 * 2 // 3 // 64 * 64 if args.on("swiglu") else 4 * hidden
    return spec.DenseFFN(
        intermediate_size=args.count("ffn-hidden-size", default),
        gated=gated,
        bias=not args.on("disable-bias-linear"),
        activation=_activation(args),
    )


def _activation(args: Arguments) -> str:
    if args.on("swiglu"):
        return "silu"
    return "relu2" if args.on("squared-relu") else "gelu"


def _mixture(args: Arguments, hidden: int) -> spec.MoEFFN:
    dense = _dense(args, hidden)
    return spec.MoEFFN(
        num_experts=args.size("num-experts", most=MAX_EXPERTS),
        top_k=args.count("moe-router-topk", 2),
        intermediate_size=args.count("moe-ffn-hidden-size", dense.intermediate_size),
        shared_gate=args.on("moe-shared-expert-gate"),
        latent_size=args.count("moe-latent-size", 0) or None,
        shared_intermediate_size=args.count("moe-shared-expert-intermediate-size", 0),
        correction_bias=args.on("moe-router-enable-expert-bias"),
        expert_bias=dense.bias,
        gated=dense.gated,
        activation=dense.activation,
    )


def moe_layers(args: Arguments, num_layers: int) -> list[bool]:
    """Say of each layer whether it is a mixture: every n-th, or a pattern such as ``([0]*3+[1]*12)``.

    Source: Megatron-LM@adc69db:megatron/training/arguments.py:moe_freq_type.
    """
    if "num-experts" not in args:
        return [False] * num_layers
    text = args.get("moe-layer-freq") or "1"
    if text.isdigit() and int(text):
        return [index % int(text) == 0 for index in range(num_layers)]
    return _pattern("moe-layer-freq", text, num_layers)


def _pattern(name: str, text: str, num_layers: int) -> list[bool]:
    """Read ``([0]*3+[1]*12)``."""
    found: list[bool] = []
    for match in _LIST.finditer(text):
        times = int(match.group(2) or 1)
        if times > MAX_LAYERS:
            raise InputError(_("{name} {text!r} is not a pattern").format(name=name, text=text[:80]))
        found += [digit.strip() == "1" for digit in match.group(1).split(",")] * times
    if len(found) != num_layers:
        raise InputError(
            _("{name} {text!r} names {found} layers, the model has {layers}").format(
                name=name, text=text[:80], found=len(found), layers=num_layers
            )
        )
    return found


def _layers(args: Arguments, hidden: int) -> tuple[spec.Layer, ...]:
    if args.pattern:
        kinds = {letter: _hybrid_layer(args, hidden, letter) for letter in set(args.pattern) - set("|/")}
        return tuple(kinds[letter] for letter in args.pattern.split("/")[0].replace("|", ""))
    if _architecture(args) == "t5":
        encoder, decoder = _layer(args, hidden), _layer(args, hidden, cross=True)
        return (encoder,) * args.size("encoder-num-layers", most=MAX_LAYERS) + (decoder,) * args.size(
            "decoder-num-layers", most=MAX_LAYERS
        )
    number = args.count("num-layers")
    if number > MAX_LAYERS:
        raise InputError(_("{number} layers are more than any model has").format(number=number))
    moe, linear = moe_layers(args, number), _linear_layers(args, number)
    built = {kind: _layer(args, hidden, moe=kind[0], linear=kind[1]) for kind in set(zip(moe, linear, strict=True))}
    return tuple(built[kind] for kind in zip(moe, linear, strict=True))


def _norms(args: Arguments, hidden: int, names: tuple[str, ...]) -> tuple[spec.Norm, ...]:
    kind = _norm_kind(args)
    return tuple(spec.Norm(name=name, size=hidden, kind=kind, bias=kind == "layer") for name in names)


def _layer(args: Arguments, hidden: int, *, cross: bool = False, moe: bool = False, linear: bool = False) -> spec.Layer:
    mixers: tuple[spec.Mixer, ...] = (_delta_net(args) if linear else _attention(args, hidden),)
    names: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    if cross:
        mixers += (_attention(args, hidden, cross=True),)
        names += ("cross_attention_layernorm",)
    ffn = _mixture(args, hidden) if moe else _dense(args, hidden)
    return spec.Layer(mixers=mixers, ffns=(ffn,), norms=_norms(args, hidden, names))


def _hybrid_layer(args: Arguments, hidden: int, letter: str) -> spec.Layer:
    """One letter of a hybrid pattern.

    M Mamba-2, G gated delta rule, * attention, + latent attention, D sparse attention, - dense block, E mixture.

    Source: Megatron-LM@d98e8a6:megatron/core/models/hybrid/hybrid_layer_allocation.py:Symbols.
    """
    norms = _norms(args, hidden, ("norm",))
    if letter == "M":
        head_dim = args.size("mamba-head-dim", 64)
        mamba = spec.Mamba2(
            num_heads=args.count("mamba-num-heads", 2 * hidden // head_dim),
            head_dim=head_dim,
            state_size=args.count("mamba-state-dim", 128),
            num_groups=args.count("mamba-num-groups", 8),
            conv_kernel=4,
        )
        return spec.Layer(mixers=(mamba,), ffns=(), norms=norms)
    if letter == "G":
        return spec.Layer(mixers=(_delta_net(args),), ffns=(), norms=norms)
    if letter == "*":
        return spec.Layer(mixers=(_plain_attention(args, hidden),), ffns=(), norms=norms)
    if letter in "+D":
        return spec.Layer(mixers=(_latent_attention(args, sparse=letter == "D"),), ffns=(), norms=norms)
    if letter == "-":
        return spec.Layer(mixers=(), ffns=(_dense(args, hidden),), norms=norms)
    if letter == "E":
        return spec.Layer(mixers=(), ffns=(_mixture(args, hidden),), norms=norms)
    raise InputError(_("{letter!r} is no letter of a hybrid pattern").format(letter=letter))


def _mtp(args: Arguments, hidden: int, layers: tuple[spec.Layer, ...]) -> tuple[spec.MtpModule, ...]:
    """Multi-token prediction: two norms, a projection of both halves, a layer like the last, and a final norm.

    Source: Megatron-LM@adc69db:megatron/core/transformer/multi_token_prediction.py:MultiTokenPredictionLayer.
    """
    number = min(args.count("mtp-num-layers", 0), 64)
    if not number or not layers:
        return ()
    if args.on("mtp-use-repeated-layer"):
        number = 1
    module = spec.MtpModule(
        layer=_mtp_layer(args, hidden, layers),
        norms=_norms(args, hidden, ("enorm", "hnorm", "final_layernorm")),
        extras=(spec.ExtraTensor(name="eh_proj.weight", shape=(hidden, 2 * hidden), split="out"),),
    )
    return (module,) * number


def _mtp_layer(args: Arguments, hidden: int, layers: tuple[spec.Layer, ...]) -> spec.Layer:
    """A prediction module's layer: the last one's kind, or the blocks that a hybrid pattern names after a slash."""
    letters = args.pattern.partition("/")[2].partition("/")[0]
    if not letters:
        return layers[-1]
    blocks = [_hybrid_layer(args, hidden, letter) for letter in letters]
    return spec.Layer(
        mixers=tuple(mixer for block in blocks for mixer in block.mixers),
        ffns=tuple(ffn for block in blocks for ffn in block.ffns),
        norms=tuple(replace(norm, name=f"norm_{at}") for at, block in enumerate(blocks) for norm in block.norms),
    )


def _extras(args: Arguments, hidden: int) -> tuple[spec.ExtraTensor, ...]:
    """BERT's token types, language-model head and binary head.

    Source: Megatron-LM@adc69db:megatron/core/models/bert/bert_model.py:BertModel.__init__.
    """
    if _architecture(args) != "bert":
        return ()
    found: list[tuple[str, tuple[int, ...]]] = []
    if not args.on("bert-no-binary-head"):
        found.append(("embeddings.token_type.weight", (2, hidden)))
    found += [("lm_head.dense.weight", (hidden, hidden)), ("lm_head.dense.bias", (hidden,))]
    found += [("lm_head.norm.weight", (hidden,)), ("lm_head.norm.bias", (hidden,))]
    if not args.on("bert-no-binary-head"):
        found += [("pooler.dense.weight", (hidden, hidden)), ("pooler.dense.bias", (hidden,))]
        found += [("binary_head.weight", (2, hidden)), ("binary_head.bias", (2,))]
    return tuple(spec.ExtraTensor(name=name, shape=shape, linear=False) for name, shape in found)
