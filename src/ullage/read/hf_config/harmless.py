"""Config keys that never change a size: token ids, initialisation, dropout, rope scaling, bookkeeping."""

from __future__ import annotations

_TEXT = """
# names and versions
_name_or_path architectures auto_map finetuning_task model_type tokenizer_class transformers_version
trust_remote_code
# token ids
bad_words_ids begin_suppress_tokens boa_token_id boi_token_id bos_token_id decoder_start_token_id eoa_token_id
eod_token_id eoi_token_id eos_token_id forced_bos_token_id forced_eos_token_id image_end_token_id image_start_token_id
image_token_id mask_token_id pad_token_id sep_token_id suppress_tokens unk_token_id video_end_token_id
video_start_token_id video_token_id
# generation
diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty
length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
remove_invalid_values repetition_penalty temperature tf_legacy_loss top_k top_p typical_p use_cache
# heads for other tasks, and outputs
chunk_size_feed_forward id2label is_decoder label2id n_special
output_attentions output_hidden_states output_router_logits output_scores predict_special_tokens prefix problem_type
pruned_heads return_dict return_dict_in_generate summary_activation summary_first_dropout summary_proj_to_labels
summary_type summary_use_proj task_specific_params tie_encoder_decoder torchscript use_return_dict
# training: dropout, initialisation, router losses
attention_dropout attention_dropout_prob attn_pdrop aux_loss_alpha classifier_dropout dropout embd_pdrop
embed_dropout embedding_dropout embedding_dropout_prob expert_dropout ffn_dropout_prob hidden_dropout init_std
initializer_factor initializer_range input_jitter_noise layerdrop resid_pdrop residual_dropout router_aux_loss_coef
router_jitter_noise router_z_loss_coef scale_attn_weights seq_aux
# activations, scales and caps of values
activation activation_function attention_multiplier attn_logit_softcapping embedding_multiplier
final_logit_softcapping hidden_act hidden_activation logit_scale logits_scaling query_pre_attn_scalar
residual_multiplier swiglu_limit
# norms
eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon rms_norm_eps
# positions that are computed, not learned
initial_context_length original_max_position_embeddings partial_rotary_factor rope_interleave rope_local_base_freq
rope_parameters rope_scaling rope_theta rotary_emb_base rotary_pct
# how a framework runs it
attn_implementation cache_implementation context_window_size prefill_chunk_size pretraining_tp use_bfloat16 use_mrope
"""

#: Keys without influence on any tensor's shape or on what a request keeps, in any family read here.
HARMLESS = frozenset(key for line in _TEXT.splitlines() if not line.startswith("#") for key in line.split())
HARMLESS_PREFIXES = ("_",)

#: Keys that add a whole part (an encoder, attention to one) when they are on, in any family, and nothing when off.
HARMLESS_OFF = frozenset({"add_cross_attention", "is_encoder_decoder"})
