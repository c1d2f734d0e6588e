"""Command lines as they stand in documents: what is taken from them, and what is asked for."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.engines.llamacpp.start import start as llama_start
from ullage.engines.vllm.start import start
from ullage.errors import InputError
from ullage.read import llamacpp_args, sglang_args, vllm_args
from ullage.read.gguf_name import named_gguf
from ullage.read.launch_line import read_launch_line
from ullage.read.shell_line import split_command


def vllm(line):
    return vllm_args.parse_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve m -tp 2",
        "$ vllm serve m -tp 2 > log.txt 2>&1 &",
        "cd /models && nohup vllm serve m -tp 2 2>&1 | tee log",
        "TP=2; vllm serve m -tp $TP",
        "export TP=2 MODEL=m\nvllm serve ${MODEL} -tp ${TP}",
        "# start it\nvllm serve m \\   # the model\n  # over both cards\n  -tp 2",
        "vllm serve m ^\n -tp 2",
        "uv run --with vllm vllm serve m -tp 2",
        "docker run --gpus all -p 8000:8000 vllm/vllm-openai:v0.11.0 --model m -tp 2",
        "docker run --rm rocm/vllm-openai:nightly m -tp 2",
        "docker exec -it node bash -i -c 'vllm serve m -tp 2'",
    ],
)
def test_one_job_in_many_clothes(line):
    command = vllm(line)
    assert (command.model, command.get("tensor_parallel_size")) == ("m", "2")


def test_a_container_brings_its_environment_and_its_cards():
    command = vllm("docker run --gpus '\"device=1,3\"' -e VLLM_USE_V1=1 vllm/vllm-openai:latest --model m")
    assert dict(command.environment) == {"VLLM_USE_V1": "1"}
    assert command.visible_gpus == 2


@pytest.mark.parametrize(
    ("before", "visible"),
    [
        ("CUDA_VISIBLE_DEVICES='2, 1, 0'", 3),
        ("HIP_VISIBLE_DEVICES=4", 1),
        ("CUDA_VISIBLE_DEVICES=all", None),
        ("", None),
    ],
)
def test_visible_devices(before, visible):
    assert vllm(f"{before} vllm serve m").visible_gpus == visible
    assert llamacpp_args.parse_command(f"{before} ./llama-server -c 1").visible_gpus == visible


def test_the_devices_of_llamacpp_are_counted():
    assert llamacpp_args.parse_command("CUDA_VISIBLE_DEVICES=0,1,2 llama-server -dev CUDA0,CUDA1").visible_gpus == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("vllm serve m -tp $TP", "shell variable .TP"),
        ("vllm serve m $ARGS", "shell variable .ARGS"),
        ("vllm serve m --seed 1 ...", "left out"),
        ("vllm serve m -tp <size>", "<size> is a placeholder"),
        ("vllm bench serve --model m", "starts no server"),
        ("vllm serve m --omni", "vLLM-Omni"),
        ("vllm serve 'm", "cannot be split"),
    ],
)
def test_what_only_a_shell_knows_is_asked_for(line, words):
    with pytest.raises(InputError, match=words):
        vllm_args.settings(vllm(line))


def test_a_secret_or_a_quoted_bracket_is_no_placeholder():
    command = vllm('vllm serve m --api-key <secret> --reasoning-config \'{"start": "<think>"}\'')
    assert command.get("api_key") == "<secret>"
    assert command.get("reasoning_config") == '{"start": "<think>"}'


@pytest.mark.parametrize(
    ("text", "level"), [("-O3", "3"), ("-O 0", "0"), ("-O=1", "1"), ("-O", "2"), ("--optimization-level 2", "2")]
)
def test_levels_of_optimization(text, level):
    assert vllm(f"vllm serve m {text} -tp 2").get("optimization_level") == level


def test_an_abbreviation_that_is_the_only_one_is_taken():
    assert vllm("vllm serve m --tensor-parallel 4").get("tensor_parallel_size") == "4"


def load(line, machine="8xH200", **options):
    return read_launch_line(line, machine=machine, **options)


def test_visible_devices_leave_fewer_cards():
    job = load("vllm:CUDA_VISIBLE_DEVICES=0,1 vllm serve qwen3-8b -tp 2")
    assert job.machine.num_gpus == 2
    assert "2 of 8" in job.assumed[0]


def test_a_draft_model_is_found_or_said_to_be_missing():
    line = 'vllm:vllm serve qwen3-8b --speculative-config \'{{"model": "{0}", "num_speculative_tokens": 3}}\''
    found = load(line.format("qwen3-0.6b"))
    assert found.draft_model is not None and found.draft_model.name == "Qwen/Qwen3-0.6B"
    missing = load(line.format("none-such-draft"))
    assert missing.draft_model is None
    assert any("none-such-draft" in sentence for sentence in missing.assumed)


def test_the_model_beside_the_line_wins_and_leaves_the_draft():
    line = "sglang:python -m sglang.launch_server --model-path $MODEL --speculative-algorithm STANDALONE"
    job = load(f"{line} --speculative-draft-model-path qwen3-0.6b", model="qwen3-8b")
    assert (job.model.name, job.draft_model.name) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B")
    with pytest.raises(InputError, match=r"\$MODEL"):
        load(line)


@pytest.mark.parametrize(
    ("override", "length"),
    [
        ('{"max_position_embeddings": 4096}', 4096),
        ('{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}', 131072),
        ('{"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2}}}', 81920),
    ],
)
def test_overrides_of_the_longest_context(override, length):
    for line in (
        f"vllm:vllm serve qwen3-8b --hf-overrides '{override}'",
        f"sglang:sglang serve --model-path qwen3-8b --json-model-override-args '{override}'",
    ):
        job = load(line)
        assert job.model.max_position_embeddings == length
        assert not any("not followed" in sentence for sentence in job.model.assumed)


def test_other_overrides_are_said():
    job = load("vllm:vllm serve qwen3-8b --hf-overrides '{\"num_hidden_layers\": 2}'")
    assert any("num_hidden_layers is not followed" in sentence for sentence in job.model.assumed)


def test_a_file_of_settings_is_laid_under_the_line(tmp_path):
    (tmp_path / "c.yaml").write_text("model: qwen3-8b\ntensor-parallel-size: 4\nmax-num-seqs: 8\n")
    job = load(f"vllm:vllm serve --config {tmp_path}/c.yaml --max-num-seqs 16")
    assert (job.parallel.tensor_parallel_size, job.max_num_seqs) == (4, 16)
    assert any("none.yaml" in sentence for sentence in load("vllm:vllm serve qwen3-8b --config none.yaml").assumed)


@pytest.mark.parametrize(
    ("text", "model", "kind"),
    [
        ("unsloth/DeepSeek-R1-GGUF:UD-Q2_K_XL", "DeepSeek-R1", "UD-Q2_K_XL"),
        ("/m/Qwen_Qwen3-30B-A3B-IQ4_XS-00001-of-00002.gguf", "Qwen3-30B-A3B", "IQ4_XS"),
        ("DeepSeek-V3-0324-UD-Q2_K_XL-merged.gguf", "DeepSeek-V3-0324", "UD-Q2_K_XL"),
        ("gemma-3-12b-it-q4_0.gguf", "gemma-3-12b-it", "q4_0"),
        ("/x/Qwen3-235B-A22B-GGUF/mix-IQ3_K-00001-of-00003.gguf", "Qwen3-235B-A22B", "mix-IQ3_K"),
        ("https://h.co/Qwen/Qwen3-8B-GGUF/resolve/main/Qwen3-8B-Q8_0.gguf?download=true", "Qwen3-8B", "Q8_0"),
        ("Qwen/Qwen3-8B-GGUF", "Qwen3-8B", ""),
    ],
)
def test_what_the_name_of_a_gguf_file_says(text, model, kind):
    found = named_gguf(text)
    assert found is not None
    assert (found.model.lower(), found.file_type) == (model.lower(), kind)


def test_a_name_that_says_nothing():
    assert named_gguf("/models/model.gguf") is None
    with pytest.raises(InputError, match="is not here"):
        load("llamacpp:llama-server -m /models/model.gguf", machine="1xH200")


def test_a_gguf_file_that_is_not_here_is_taken_by_its_name():
    job = load("llamacpp:./llama-server -hf bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M --mmproj x.gguf", "1xH200")
    assert (job.model.name, job.quantization) == ("Qwen/Qwen2.5-7B-Instruct", "gguf:Q4_K_M")
    assert any("taken as" in sentence for sentence in job.assumed)
    assert any("--mmproj" in sentence for sentence in job.assumed)


def test_the_file_type_stays_when_the_model_is_named_beside_the_line():
    job = load("llamacpp:llama-server -m /models/x-Q6_K.gguf", "1xH200", model="qwen3-8b")
    assert job.model.name == "Qwen/Qwen3-8B"


def test_a_gguf_repository_under_vllm_is_sent_to_llamacpp():
    with pytest.raises(InputError, match="GGUF file of type Q4_K_M"):
        load("vllm:vllm serve unsloth/Qwen3-0.6B-GGUF:Q4_K_M --tokenizer Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("flags", "pieces", "whole"),
    [
        ("", True, True),
        ("-O1", True, False),
        ("-O0", False, False),
        ("-cc.cudagraph_mode=PIECEWISE", True, False),
        ('--compilation-config \'{"cudagraph_mode": "FULL_DECODE_ONLY"}\'', False, True),
        ('--compilation-config \'{"cudagraph_mode": "NONE"}\'', False, False),
        ("--compilation-config '{\"mode\": 0}'", False, True),
        ("-O.cudagraph_mode=FULL", False, True),
    ],
)
def test_the_graphs_that_are_asked_for_are_captured(flags, pieces, whole):
    job = start(load(f"vllm:vllm serve qwen3-8b {flags}", "1xH100")).ranks[0]
    term = next((term for term in job.ledger.terms() if term.name == "cuda_graphs"), None)
    said = term.formula if term is not None else ""
    assert ("0 graphs of pieces" not in said and "graphs of pieces" in said) == pieces
    assert ("full graphs" in said and ", 0 full graphs" not in said) == whole


def test_the_attention_backend_may_stand_in_its_config():
    lines = (
        "--attention-backend FLASHINFER",
        "-ac.backend FLASHINFER",
        '--attention-config \'{"backend":"FLASHINFER"}\'',
    )
    jobs = [load(f"vllm:vllm serve qwen3-8b {flags}", "1xH100") for flags in ("", *lines)]
    plain, *asked = [start(job).ranks[0].ledger.device_used.bytes for job in jobs]
    assert len(set(asked)) == 1 and asked[0] != plain


def test_what_is_not_counted_under_vllm_is_said():
    line = 'VLLM_USE_V1=0 vllm serve m --enable-eplb --kv-transfer-config \'{"kv_connector": "NixlConnector"}\''
    said = " ".join(vllm_args.settings(vllm(line))["assumed"])
    assert all(word in said for word in ("--enable-eplb", "NixlConnector", "VLLM_USE_V1=0"))


def test_what_does_not_fit_is_shrunk_by_llamacpp_itself():
    line = "llamacpp:llama-server -hf x/Llama-3.3-70B-Instruct-GGUF:Q4_K_M"
    assert any("--fit" in warning for warning in llama_start(load(line, "24GiB")).warnings)
    for typed in ("-ngl 99 -c 65536", "--fit off"):
        assert not any("--fit is on" in warning for warning in llama_start(load(f"{line} {typed}", "24GiB")).warnings)


@given(st.text(max_size=120))
def test_any_text_is_split_or_refused(text):
    for reader in (vllm_args, sglang_args, llamacpp_args):
        with contextlib.suppress(InputError):
            split_command(text, reader.after_program)
    named_gguf(text)
