"""Megatron-LM flags from mappings, scripts and YAML; the models and jobs they make."""

import pytest

from ullage.account.parameters import count
from ullage.errors import InputError, LayoutError
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args, job_from_megatron_text, smallest_world
from ullage.read.megatron_model import moe_layers
from ullage.read.megatron_words import Arguments, from_mapping, parse_text
from ullage.spec.model import LatentAttention, MoEFFN

GPT = {
    "num-layers": 12,
    "hidden-size": 512,
    "num-attention-heads": 8,
    "micro-batch-size": 4,
    "global-batch-size": 32,
    "seq-length": 1024,
    "max-position-embeddings": 1024,
    "vocab-file": "vocab.json",
    "bf16": True,
}
MLA = {
    "multi-latent-attention": True,
    "q-lora-rank": 1536,
    "kv-lora-rank": 512,
    "qk-head-dim": 128,
    "qk-pos-emb-head-dim": 64,
    "v-head-dim": 128,
}


def job(extra=None, *, machine="8xH100-80GB-SXM", env=None):
    return job_from_megatron_args({**GPT, **(extra or {})}, env, machine=parse_machine(machine))


def test_gpt_has_the_parameters_of_its_flags():
    # 50257 padded to a multiple of 128 = 50304; 12 h^2 + 13 h a layer; learned positions; final norm
    expected = 50304 * 512 + 1024 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512
    assert count(job().model).total == expected == 64_109_568


def test_vocabulary_is_padded_to_tensor_parallel_ranks():
    assert job({"tensor-model-parallel-size": 4}).model.vocab_size == 50688
    null = {"tokenizer-type": "NullTokenizer", "vocab-size": 131072}
    assert job(null).model.vocab_size == 131200  # one more for the end of document
    assert job({"padded-vocab-size": 50_000}).model.vocab_size == 50_000


def test_swiglu_chooses_two_thirds():
    assert job({"swiglu": True}).model.layers[0].ffns[0].intermediate_size == 1344
    assert job({"swiglu": True, "ffn-hidden-size": 2048}).model.layers[0].ffns[0].intermediate_size == 2048


def test_latent_attention_and_experts():
    moe = {"num-experts": 8, "moe-router-topk": 2, "moe-ffn-hidden-size": 256, "moe-layer-freq": "([0]*3+[1]*9)"}
    model = job({**MLA, **moe}).model
    assert [isinstance(layer.ffns[0], MoEFFN) for layer in model.layers] == [False] * 3 + [True] * 9
    latent = model.layers[0].mixers[0]
    assert isinstance(latent, LatentAttention)
    assert (latent.q_lora_rank, latent.kv_lora_rank, latent.qk_rope_head_dim) == (1536, 512, 64)


@pytest.mark.parametrize(
    ("pattern", "expected"), [("2", [True, False] * 2), ("[0,1,1,1]", [False, True, True, True]), ("[1]*4", [True] * 4)]
)
def test_layer_frequency(pattern, expected):
    assert moe_layers(Arguments(values={"num-experts": "8", "moe-layer-freq": pattern}), 4) == expected


@pytest.mark.parametrize("pattern", ["[0]*3", "banana", "[1]*99999999", "0"])
def test_layer_frequency_that_does_not_fit_is_refused(pattern):
    with pytest.raises(InputError):
        moe_layers(Arguments(values={"num-experts": "8", "moe-layer-freq": pattern}), 4)


def test_gradients_are_fp32_for_bf16_and_fp16_for_fp16():
    assert job().precision.grads == "float32"
    assert job({"bf16": False, "fp16": True}).precision.grads == "float16"
    assert job({"grad-reduce-in-bf16": True}).precision.grads == "bfloat16"


def test_recompute():
    assert job().recompute.kind == "none"
    full = job({"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": 3}).recompute
    assert (full.kind, full.method, full.num_layers) == ("full", "block", 3)
    selective = job({"recompute-granularity": "selective", "recompute-modules": "[moe_act layernorm]"}).recompute
    assert selective.modules == ("moe_act", "layernorm")
    assert job({"recompute-activations": True}).recompute.modules == ("core_attn",)


def test_world_is_divided_and_batches_are_counted():
    found = job({"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2})
    assert found.parallel.data_parallel_size == 2
    assert found.grad_accum == 32 // (4 * 2)
    with pytest.raises(LayoutError, match="8 GPUs cannot be divided"):
        job({"tensor-model-parallel-size": 3})


def test_smallest_world_holds_expert_parallelism():
    experts = {"num-experts": 8, "expert-model-parallel-size": 4, "expert-tensor-parallel-size": 1}
    assert smallest_world({**GPT, "tensor-model-parallel-size": 2, **experts}) == 4
    assert smallest_world({**GPT, "tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 4}) == 8


def test_unknown_flags_are_named_and_harmless_ones_are_not():
    found = job({"frobnicate": "7", "log-throughput": True, "clip-grad": 1})
    assert any("frobnicate" in sentence for sentence in found.assumed)
    assert not any("clip-grad" in sentence or "log-throughput" in sentence for sentence in found.assumed)


@pytest.mark.parametrize(
    ("flag", "value"), [("hidden-size", "many"), ("num-layers", -3), ("num-layers", 10**9), ("seq-length", "1.5")]
)
def test_values_that_are_no_counts_are_refused(flag, value):
    with pytest.raises(InputError):
        job({flag: value})


def test_missing_sizes_are_named():
    with pytest.raises(InputError, match="--hidden-size is missing"):
        job_from_megatron_args({"num-layers": 2}, machine=parse_machine("1xH100"))


SCRIPT = """
#!/bin/bash
export CUDA_DEVICE_MAX_CONNECTIONS=1
TP=2
GPT_MODEL_ARGS=(
    --num-layers 12
    --hidden-size 512   # comment
    --num-attention-heads 8
    --seq-length 1024
    --max-position-embeddings 1024
    --recompute-modules moe_act layernorm
)
MODEL_PARALLEL_ARGS=(--tensor-model-parallel-size $TP --sequence-parallel)
torchrun --nproc_per_node 8 pretrain_gpt.py \\
    ${GPT_MODEL_ARGS[@]} \\
    ${MODEL_PARALLEL_ARGS[@]} \\
    --micro-batch-size=2 --bf16
"""


def test_shell_script():
    found = parse_text(SCRIPT)
    assert found.get("hidden-size") == "512"
    assert found.get("tensor-model-parallel-size") == "2"
    assert found.on("sequence-parallel") and found.on("bf16")
    assert found.get("micro-batch-size") == "2"
    assert found.words("recompute-modules") == ("moe_act", "layernorm")
    assert found.environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "nproc-per-node" not in found  # the launcher's


def test_yaml_of_a_functional_test():
    text = "ENV_VARS:\n  NVTE_ALLOW_NONDETERMINISTIC_ALGO: 0\nMODEL_ARGS:\n  --num-layers: 12\n  --bf16: true\n"
    found = parse_text(text)
    assert found.get("num-layers") == "12" and found.on("bf16")
    assert found.environment == {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}


def test_text_and_mapping_make_the_same_job():
    line = " ".join(f"--{name} {value}" if value is not True else f"--{name}" for name, value in GPT.items())
    machine = parse_machine("8xH100-80GB-SXM")
    from_text = job_from_megatron_text(line, machine=machine)
    assert from_text.flags == job().flags
    assert from_text.model == job().model


@pytest.mark.parametrize("text", ["--a 'unclosed", "x" * 300_000])
def test_text_that_cannot_be_read_is_refused(text):
    with pytest.raises(InputError):
        parse_text(text)


def test_names_with_underscores_and_lists():
    found = from_mapping({"num_layers": 3, "--recompute-modules": ["moe", "mlp"], "off": None, "lr": 1.0})
    assert found.get("num-layers") == "3"
    assert found.words("recompute-modules") == ("moe", "mlp")
    assert "off" not in found and found.get("lr") == "1"


def test_hybrid_pattern_and_encoder_decoder():
    hybrid = job({"hybrid-override-pattern": "M*-M", "num-layers": 4, "mamba-head-dim": 64}).model
    assert [len(layer.mixers) for layer in hybrid.layers] == [1, 1, 0, 1]
    with pytest.raises(InputError):
        job({"hybrid-override-pattern": "MZ"})
    t5 = job({"encoder-num-layers": 2, "decoder-num-layers": 3, "vocab-file": "bert-large-cased-vocab.txt"}).model
    assert [len(layer.mixers) for layer in t5.layers] == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("flags", "rows"),
    [
        ({"tokenizer-type": "TikTokenizer", "tokenizer-model": "mix.128k.vocab.json"}, 131_072),
        ({"tokenizer-type": "GPTSentencePieceTokenizer", "tokenizer-model": "nemotron_2_256k.model"}, 256_000),
        ({"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "deepseek-ai/DeepSeek-V3"}, 129_280),
    ],
)
def test_vocabulary_of_a_tokenizer_by_name(flags, rows):
    found = job(flags)
    assert found.model.vocab_size == rows
    assert any("vocabulary" in sentence for sentence in found.assumed)


def test_a_tokenizer_that_is_not_known_is_asked_for():
    with pytest.raises(InputError, match="--vocab-size"):
        job({"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": "my/own"})


def test_a_variable_that_names_itself_takes_its_default_or_what_it_was():
    text = 'N=${N:-4}\nARGS="--num-layers $N --hidden-size 64"\nARGS="$ARGS --num-attention-heads 4"\nrun.py $ARGS'
    values = parse_text(text).values
    assert (values["num-layers"], values["hidden-size"], values["num-attention-heads"]) == ("4", "64", "4")


def test_variables_that_double_are_refused():
    with pytest.raises(InputError, match="longer"):
        parse_text("A=abcdefgh\n" + "A=$A$A$A$A\n" * 40 + "run.py --num-layers $A")


BRANCHES = """
SCALE=${SCALE:-"800M"} # or "8B"
case "${SCALE}" in
    "800M"|small)
        TP=1; HIDDEN=1024
        ;;
    *)
        TP=4
        HIDDEN=4096
        ;;
esac
NODES=2
WORLD=$(($NODES*8))
while [[ $# -gt 0 ]]; do
    case $1 in
        --hidden) HIDDEN="$2"; shift 2 ;;
    esac
done
if [ -z "$1" ]; then LENGTH=2048; elif [[ $NODES -gt 1 && -n "$2" ]]; then LENGTH=1; else LENGTH=2; fi
ARGS=(
    --hidden-size $HIDDEN        # don't
    --tensor-model-parallel-size ${TP}
    "--seq-length ${LENGTH}"
    --pipeline-model-parallel-layout "E|t*2|(t|)*2mL"
    --tokenizer-model ${TOKENIZER}
)
if [ "$WORLD" -eq 16 ]; then
    ARGS+=(--context-parallel-size $(($WORLD / 8)))
fi
[ "$TP" = 4 ] && ARGS+=(--sequence-parallel)
cat <<EOF
--hidden-size 1 isn't read
EOF
if [ "$DEBUG" = true ]; then
    python pretrain_gpt.py --num-layers 1
else
    run="torchrun --nproc_per_node 8 pretrain_gpt.py ${ARGS[@]} $EXTRA --bf16 $MORE"
    srun sh -c "$run" > log.txt 2>&1
fi
"""


def test_a_script_takes_the_branches_that_its_words_decide():
    found = parse_text(BRANCHES)
    assert found.values == {
        "hidden-size": "1024",
        "tensor-model-parallel-size": "1",
        "seq-length": "2048",
        "pipeline-model-parallel-layout": "E|t*2|(t|)*2mL",
        "tokenizer-model": "${TOKENIZER}",
        "context-parallel-size": "2",
        "bf16": "true",
    }
    assert parse_text("SCALE=8B\n" + BRANCHES).get("hidden-size") == "4096"
    assert parse_text("SCALE=8B\n" + BRANCHES).on("sequence-parallel")


def test_what_a_script_leaves_open_is_named():
    with pytest.raises(InputError, match=r"--hidden-size needs a whole number, not '\$HIDDEN'"):
        job_from_megatron_text("python pretrain_gpt.py --hidden-size $HIDDEN --bf16", machine=parse_machine("1xH100"))


HALVES = (
    "case x in|if [ a|for|while|if|esac|a=(|$((|${a|x=$((9**9))|case|fi\ndone|((|[[|case a in b|for a in|if true; then"
    "|while true; do|! !|a() {|}|;;|x=${x:-$x}|[ ! ]|x=$x$x|'|`|<<EOF|$|&&|| a"
)


@pytest.mark.parametrize("tail", ["", "\n", " ;", "\npython a.py --bf16"])
@pytest.mark.parametrize("text", HALVES.split("|"))
def test_half_a_script_is_read_or_refused(text, tail):
    try:
        parse_text(text + tail)
    except InputError as error:
        assert "cannot be split" in str(error)
