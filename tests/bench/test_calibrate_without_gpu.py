"""Without a CUDA device: one sentence. And the step that loads a context's kernels runs, on a CPU."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.reference


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_one_sentence_without_a_device(capsys):
    from ullage.cli import main

    assert main(["calibrate"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "no CUDA device" in said.err and not said.out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_small_step_of_the_probes_runs(dtype):
    from ullage.bench.calibrate.probes import small_step

    small_step(getattr(torch, dtype), "cpu")
