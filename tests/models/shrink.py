"""Small models of every MoE architecture of transformers, from its configuration's own defaults.

A configuration is shrunk by the names of its numbers: sizes to tens, layers to two, experts to
eight. What depends on these (a type for every layer, say) is left to the configuration to derive,
or else cut. Few architectures need a word of their own, in `WORDS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_eplb.layers.known import why_not
from torch_eplb.layers.spec import find_spec

MOST_PARAMETERS = 20_000_000
VOCABULARY = 128

# The first that matches a number's whole name says what becomes of it; None leaves it.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"(unpadded_)?vocab_size(_per_layer_input)?|mel_vocab_size", VOCABULARY),
    (r"zero_expert_num", 4),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", None),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_experts_per_layer", 2),
    (r"(moe_)?num_(local_)?(routed_)?experts|n_routed_experts", 8),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"moe_layer_end_index", 3),
    (r"(enc|dec)oder_sparse_step|interleave_moe_layer_step|moe_layer_(freq|interval)", 1),
    (r"num_sparse_(en|de)coder_layers", 2),
    (r"num_nextn_predict_layers|num_kv_shared_layers", 0),
    (r"(num_)?(hidden_|encoder_|decoder_)?layers|n_layers|depth", 2),
    (r"(swa_|num_sliding_|encoder_|decoder_|num_)?(attention_)?heads", 4),
    (r"num_sliding_attention_heads|swa_num_attention_heads|index_n_heads|n_heads", 4),
    (r"num_attention_heads|linear_num_(value_)?heads", 4),
    (r"(swa_)?num_(global_)?key_value_heads|linear_num_key_heads|kv_n_heads", 2),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|hc_lowrank", 16),
    (r"qk_head_dim", 16),
    (r"(qk_(rope|nope)|v|index|global|swa|linear(_key|_value)?)_head_dim|(global_)?head_dim", 8),
    (r"d_kv|kv_channels|rotary_dim", 8),
    (r"index_topk", 16),
    (r"index_topk_blocks|index_kpool", 2),
    (r"index_block_size|block_size", 8),
    (r"hidden_size|d_model|.*_hidden_size|hidden_dim|adapter_(in|out)_dim|output_dim", 32),
    (r"(.*_)?intermediate_size.*|.*ffn_(hidden_size|dim)|d_ff|mlp_dim|share_expert_dim", 32),
    (r"projector_(in|out)put_dim|vision_output_dim|output_proj_dims|projection_hidden_dim", 32),
    (r"router_hidden_size|downsample_hidden_size|conv_output_size|ple_embed_dim", 32),
    (r"max_position_embeddings|model_max_length|max_seq_len|max_source_positions", 256),
    (r"sliding_window(_size)?|attention_chunk_size|keep_window_size|canvas_length", 16),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_d_state|ssm_state_size|mamba_dt_rank", 8),
    (r"n_groups|mamba_n_groups|o_groups", 2),
    (r"mamba_chunk_size|chunk_size", 16),
    (r"expert_capacity", 2),  # so that choices are dropped
    (r"ngram_vocab_size_base", 1000),
    (r"split_ngram_parts", 4),
    (r"rel_extent", 16),
    (r"d_rel", 8),
    (r"layer_group_size", 2),
    (r"hidden_size_per_layer_input", 16),
    (r"attn_layer_period|expert_layer_period", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"position_embedding_size|num_position_embeddings", 256),
    (r"projection_dim|gated_norm_rank", 16),
)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What a configuration leaves open, and its model needs.
OPEN = {
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
}

# What the rules do not find: by the configuration's model_type.
WORDS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["sparse", "sparse"],
        "per_layer_config": {
            layer: {"num_local_experts": experts, "num_experts_per_tok": 2}
            for layer, experts in enumerate((4, 6))
        },
    },
    "ernie4_5_vl_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
    "gemma4_text": {"enable_moe_block": True},
    "glm4v_moe_text": {
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    },
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mistral4": {"head_dim": 16},
    "muse_spark_audio": {
        "num_hidden_layers": 2,
        "patch_sizes": [16, 6],
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 100},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_budget": 16,
        "indexer_compress_ratio": 2,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
    },
    "step3p5": {"sliding_window": 16},
    "switch_transformers": {"decoder_start_token_id": 0},
    "vitpose_backbone": {"part_features": 16, "num_experts": 6},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(kind: type, depth: int = 2, cut: bool = False) -> Any:
    """A small configuration of this class.

    Args:
        kind: a configuration class.
        depth: layers.
        cut: cut lists that have an entry per layer, rather than leave them out.
    """
    return kind(**_sizes(kind, depth, cut))


def _sizes(kind: Any, depth: int, cut: bool) -> dict[str, Any]:
    present = kind()
    values = dict(vars(present))
    layers = {values.get(name) for name in ("num_hidden_layers", "n_layers", "num_layers")}
    sizes: dict[str, Any] = {}
    marks = iter(range(VOCABULARY - 30, VOCABULARY))
    sub_configs = getattr(kind, "sub_configs", {})
    for name, value in values.items():
        if name in sub_configs or name.startswith("_"):
            continue
        if isinstance(value, bool) or name in ("id2label", "label2id"):
            continue
        if value is None and name in OPEN:
            sizes[name] = OPEN[name]
        if isinstance(value, int):
            if re.fullmatch(r"(pad|decoder_start)_token_id", name):
                sizes[name] = 0
            elif re.fullmatch(r"(bos|eos|sep|eod)_token_id", name):
                sizes[name] = None
            elif re.fullmatch(r".*_(token_id|token_index)", name):
                sizes[name] = next(marks)
            else:
                small = _small(name)
                if small is not None:
                    sizes[name] = depth if small == 2 and "layers" in name else small
                if name == "num_key_value_heads" and value == values.get("num_attention_heads"):
                    sizes[name] = 4
        elif isinstance(value, list) and len(value) in layers and len(value) > 2 and cut:
            sizes[name] = [*value[: depth - 1], value[-1]]
        elif isinstance(value, list) and value and re.fullmatch(r"moe_intermediate_size", name):
            sizes[name] = [16 for _ in value]
    for name, sub in sub_configs.items():
        of = values.get(name)
        if of is None and not isinstance(sub, type):
            continue
        sub_kind = type(of) if of is not None else sub
        if sub_kind.__name__ == "AutoConfig":
            continue
        inside = _sizes(sub_kind, depth, cut)
        model_type = getattr(sub_kind, "model_type", None)
        sizes[name] = {**inside, **({"model_type": model_type} if model_type else {})}
    return {**sizes, **WORDS.get(kind.model_type, {})}


def _small(name: str) -> int | None:
    return next((value for rule, value in RULES if re.fullmatch(rule, name)), None)


def architectures(
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, type, type]]:
    """Every model type of transformers with its configuration class and a model's class.

    Of several classes one that generates from text, else one that does from images, else the bare
    model. A class comes once.

    Args:
        names: these model types only.
    """
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    seen: set[type] = set()
    for model_type in auto.CONFIG_MAPPING_NAMES:
        if names is not None and model_type not in names:
            continue
        if not _mentions_experts(model_type_to_module_name(model_type)):
            continue
        for mapping in (
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
            auto.MODEL_MAPPING_NAMES,
        ):
            name = mapping.get(model_type)
            kind = getattr(transformers, name, None) if isinstance(name, str) else None
            config = CONFIG_MAPPING[model_type]
            if kind is None or not isinstance(kind.config_class, type):
                continue
            if not issubclass(config, kind.config_class):
                continue
            if kind not in seen:
                seen.add(kind)
                yield model_type, config, kind
            break


@functools.cache
def _mentions_experts(module: str) -> bool:
    import transformers

    folder = Path(transformers.__file__).parent / "models" / module
    return any(
        re.search("[Ee]xperts|MoE", path.read_text(encoding="utf-8"))
        for path in folder.glob("modeling_*.py")
    )


def has_experts(model: nn.Module) -> bool:
    """Whether a model has experts that are recognised, or refused by name."""
    return any(find_spec(module) is not None for module in model.modules()) or any(why_not(model))


def on_meta(kind: Any, config: Any) -> nn.Module:
    """The model without values."""
    with torch.device("meta"):
        return kind._from_config(config, attn_implementation="eager")


def small_inputs(config: Any, seed: int, length: int = 7) -> dict[str, Any]:
    """Tokens for a model's forward, two rows of them."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 40, (2, length), generator=draw)
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, :4]
    if config.model_type == "dots3_note":  # whose vision has experts, too
        vision = config.vision_config
        grid, merged = torch.tensor([[1, 4, 4]] * len(ids)), vision.spatial_merge_size**2
        ids[:, : 16 // merged] = config.image_token_id
        pixels = vision.num_channels * vision.patch_size**2
        inputs["pixel_values"] = torch.randn(16 * len(ids), pixels, generator=draw)
        inputs["image_grid_thw"] = grid
    return inputs


def small_config(config: type, kind: type) -> tuple[Any, str | None]:
    """A small configuration whose model has experts, few enough parameters, and runs.

    Returns:
        The configuration, and why its model does not run, or None; or None and why there is none.
    """
    reasons, fallback = [], None
    for depth in (2, 4, 6, 8):
        for cut in (False, True):
            try:
                small = shrunk(config, depth, cut)
                model = on_meta(kind, small)
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()
                reasons.append(f"{depth} layers: {' '.join(text)[:300]}")
                continue
            if not has_experts(model):
                continue
            parameters = sum(p.numel() for p in model.parameters())
            if parameters > MOST_PARAMETERS:
                reasons.insert(0, f"{parameters / 1e6:.0f}M parameters when it is shrunk")
                continue
            try:
                with torch.no_grad():
                    whole = kind._from_config(small, attn_implementation="eager").eval()
                    whole(**small_inputs(small, 0))
            except Exception as error:
                text = f"{type(error).__name__}: {error}".splitlines()
                fallback = fallback or (small, " ".join(text)[:300])
                continue
            return small, None
    return fallback or (None, reasons[0] if reasons else None)
