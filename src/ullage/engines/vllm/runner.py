"""Which model runner a version takes: the second one samples, profiles graphs and captures in its own way.

The first runner (``gpu_model_runner.py``) sorts or filters logits in its dummy sampler run. The second
(``gpu/model_runner.py``) draws by Gumbel noise in one kernel, and skips top-k and top-p where no request asks for them.
"""

from __future__ import annotations

from ullage.engines.vllm.defaults import Setup, has_state
from ullage.spec import model as spec

#: Speculative methods that the second runner has.
_SECOND_RUNNER_DRAFTS = ("eagle", "eagle3", "mtp", "dflash", "dspark", "extract_hidden_states")


def second_runner(setup: Setup) -> bool:
    """Tell whether the second model runner is the default for this model and version.

    Rule: 0.22.1 dense unquantised Qwen3; 0.23 also Llama and Mistral; 0.24 listed architectures however stored;
        0.25 every dense decoder without state layers, and listed ones; 0.29 on every model. Features that it lacks
        (n-gram drafts, dual batch overlap) keep the first.
    Source: vllm@0.22.1, vllm@0.24.0, vllm@0.25.0, vllm@0.29.0:vllm/config/vllm.py:VllmConfig.use_v2_model_runner,
        _is_default_v2_model_runner_model, _get_v2_model_runner_unsupported_features.
    """
    asked = setup.flag("VLLM_USE_V2_MODEL_RUNNER") or setup.flag("vllm_use_v2_model_runner")
    rule = str(setup.version.setting("second_runner"))
    if asked:
        return rule != "none" and asked not in ("0", "false", "False")
    drafts = setup.job.speculative
    if rule == "none" or (drafts and drafts.lower() not in _SECOND_RUNNER_DRAFTS) or setup.truth("enable_dbo", False):
        return False
    listed = setup.job.model.architecture in setup.version.setting("second_runner_architectures")
    if rule == "all":
        rocm = setup.job.machine.gpu.vendor == "amd"
        return not (rocm and setup.job.model.architecture in _FIRST_ON_ROCM and not setup.version.at_least("0.32.0"))
    if setup.pooling:
        return False
    if rule == "listed_plain":
        return listed and not _quantised(setup) and not _experts(setup.job.model)
    if rule == "listed":
        return listed
    return listed or not (_experts(setup.job.model) or has_state(setup.job.model))


#: Kept with the first runner on ROCm up to 0.31.
_FIRST_ON_ROCM = ("DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM")


def _quantised(setup: Setup) -> bool:
    return setup.job.model.quantization is not None or bool(setup.job.quantization)


def _experts(model: spec.Model) -> bool:
    return any(isinstance(block, spec.MoEFFN) for layer in model.layers for block in layer.ffns)
