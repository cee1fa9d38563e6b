"""Tiny models of many families, whose rows lie in many ways in what their modules get."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support.family import Family, custom, generated, generated_scores, made
from tests.support.family_inputs import (
    IMAGE,
    VOCABULARY,
    frames,
    ids,
    image_stack_in_text,
    images,
    images_in_text,
    large_images,
    padded,
    pair,
    patches_in_text,
    random,
    row_with_all_images,
    row_with_images,
    row_with_patches,
    text,
    texts_and_fewer_images,
    texts_and_images,
)
from tests.support.odd_models import (
    Experts,
    Guided,
    Packed,
    SequenceFirst,
    SharedTable,
    Shuffled,
    Windows,
)

_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
_PIXELS = {"image_size": 16, "patch_size": 8}
_VISION = {**_SMALL, **_PIXELS}


_VISION_PART = {**_VISION, "projection_dim": 16}
_LANGUAGE_PART = {**_SMALL, **_TEXT, "num_key_value_heads": 2}


def parts(vision: str, language: str, **vision_changes: Any) -> dict[str, Any]:
    """Configurations of the two halves of a model for images and text."""
    return {
        "vision_config": getattr(transformers, vision)(**_VISION_PART | vision_changes),
        "text_config": getattr(transformers, language)(**_LANGUAGE_PART),
    }


_GUIDED = {"guidance_scale": 3.0}
_QWEN = {
    "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "mlp_ratio": 2,
    },
    "text_config": {
        **_LANGUAGE_PART,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    },
    "image_token_id": IMAGE,
    "video_token_id": IMAGE - 1,
    "vision_start_token_id": IMAGE - 2,
}
_LLAVA = {"image_token_index": IMAGE, "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
_MUSIC = {
    "text_encoder": {
        "model_type": "t5",
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 1,
        "num_heads": 2,
    },
    "audio_encoder": {
        "model_type": "encodec",
        "audio_channels": 1,
        "num_filters": 2,
        "codebook_size": 32,
        "codebook_dim": 8,
        "hidden_size": 8,
        "num_lstm_layers": 1,
        "target_bandwidths": [1.5],
    },
    "decoder": {
        "vocab_size": 32,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "num_codebooks": 2,
        "pad_token_id": 32,
        "bos_token_id": 32,
    },
}

FAMILIES: dict[str, Family] = {
    # Text.
    "bert": Family(made("BertForSequenceClassification", **_SMALL, vocab_size=VOCABULARY), padded, True),
    "gpt2": Family(made("GPT2LMHeadModel", **_TEXT, n_embd=16, n_layer=1, n_head=2), text, True),
    "llama": Family(made("LlamaForCausalLM", **_LANGUAGE_PART), padded, True),
    "opt": Family(
        made(
            "OPTForCausalLM",
            **_TEXT,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
        ),
        text,
        True,
    ),
    "modernbert": Family(made("ModernBertForMaskedLM", **_SMALL, **_TEXT), padded, True),
    "mamba": Family(
        made("MambaForCausalLM", vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1), text, True
    ),
    "albert": Family(made("AlbertModel", **_SMALL, embedding_size=16, vocab_size=VOCABULARY), padded, True),
    "deberta, shared projections": Family(
        made(
            "DebertaV2Model",
            **_SMALL,
            vocab_size=VOCABULARY,
            relative_attention=True,
            position_buckets=4,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            type_vocab_size=0,
        ),
        padded,
        False,
    ),
    "xlnet": Family(
        made("XLNetLMHeadModel", vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24),
        text,
        False,
        targets=["layer_1", "layer_2"],
    ),
    "longformer": Family(
        made("LongformerModel", **_SMALL, vocab_size=VOCABULARY, attention_window=4, pad_token_id=1), text, False
    ),
    # Encoder-decoders.
    "t5": Family(
        made(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        pair,
        True,
    ),
    "bart": Family(made("BartForConditionalGeneration", **_TEXT, **_BART), pair, True),
    "fsmt": Family(
        made(
            "FSMTForConditionalGeneration",
            langs=["a", "b"],
            src_vocab_size=VOCABULARY,
            tgt_vocab_size=VOCABULARY,
            **_BART,
        ),
        pair,
        False,
    ),
    # Vision.
    "vit": Family(made("ViTForImageClassification", **_VISION), images, True),
    "swin": Family(
        made("SwinModel", image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4),
        large_images,
        True,
    ),
    "swinv2": Family(
        made("Swinv2Model", image_size=32, patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4),
        large_images,
        False,
    ),
    "convnext": Family(
        made("ConvNextModel", hidden_sizes=[8, 8], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0),
        large_images,
        True,
        targets=["pwconv1", "pwconv2"],
    ),
    "segformer": Family(
        made(
            "SegformerModel",
            hidden_sizes=[8, 8],
            depths=[1, 1],
            num_encoder_blocks=2,
            num_attention_heads=[1, 2],
            sr_ratios=[2, 1],
            patch_sizes=[3, 3],
            strides=[2, 2],
            mlp_ratios=[2, 2],
        ),
        images,
        True,
    ),
    # Video.
    "timesformer": Family(made("TimesformerModel", **_VISION, num_frames=4), frames, True),
    "videomae": Family(made("VideoMAEModel", **_VISION, num_frames=4), frames, True),
    "vivit": Family(made("VivitModel", **_SMALL, image_size=16, num_frames=4, tubelet_size=[2, 8, 8]), frames, True),
    # Speech.
    "whisper": Family(
        made(
            "WhisperForConditionalGeneration",
            **_BART,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=6,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        lambda rows, length: {"input_features": random(rows, 8, 12), "decoder_input_ids": ids(rows, length)},
        True,
    ),
    "wav2vec2": Family(
        made(
            "Wav2Vec2Model",
            **_SMALL,
            conv_dim=[8],
            conv_kernel=[4],
            conv_stride=[4],
            num_feat_extract_layers=1,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
        lambda rows, length: {"input_values": random(rows, 16 * length)},
        True,
    ),
    "audio spectrogram": Family(
        made("ASTModel", **_SMALL, patch_size=8, frequency_stride=8, time_stride=8, max_length=16, num_mel_bins=16),
        lambda rows, length: {"input_values": random(rows, 16, 16)},
        True,
    ),
    # Text with images.
    "llava": Family(
        made("LlavaForConditionalGeneration", **parts("CLIPVisionConfig", "LlamaConfig"), **_LLAVA),
        images_in_text,
        True,
        row_with_images,
    ),
    "gemma3": Family(
        made(
            "Gemma3ForConditionalGeneration",
            vision_config={**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            text_config={**_LANGUAGE_PART, "head_dim": 8},
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
        ),
        images_in_text,
        True,
        row_with_images,
    ),
    "idefics3": Family(
        made(
            "Idefics3ForConditionalGeneration",
            vision_config=_VISION,
            text_config={**_LANGUAGE_PART, "model_type": "llama"},
            image_token_id=IMAGE,
            scale_factor=1,
        ),
        image_stack_in_text,
        True,
    ),
    "qwen2-vl": Family(made("Qwen2VLForConditionalGeneration", **_QWEN), patches_in_text, True, row_with_patches),
    "clip, pairs": Family(
        made("CLIPModel", text_config={**_SMALL, **_TEXT}, vision_config=_VISION, projection_dim=16),
        texts_and_images,
        False,
    ),
    "clip, other numbers": Family(
        made("CLIPModel", text_config={**_SMALL, **_TEXT}, vision_config=_VISION, projection_dim=16),
        texts_and_fewer_images,
        False,
        row_with_all_images,
    ),
    "clip, text half": Family(
        made("CLIPModel", text_config={**_SMALL, **_TEXT}, vision_config=_VISION, projection_dim=16),
        texts_and_fewer_images,
        True,
        row_with_all_images,
        exclude=r"vision_model.*|visual_projection",
        run=lambda model, batch: model(**batch).text_embeds,
    ),
    "vilt, patches in random order": Family(
        made("ViltModel", **_VISION, vocab_size=VOCABULARY), texts_and_images, False
    ),
    "blip": Family(
        made(
            "BlipForQuestionAnswering",
            text_config={**_SMALL, **_TEXT, "encoder_hidden_size": 16},
            vision_config=_VISION,
        ),
        lambda rows, length: {**texts_and_images(rows, length), "decoder_input_ids": ids(rows, 3, seed=1)},
        False,
    ),
    # Generation.
    "llama, beams": Family(made("LlamaForCausalLM", **_LANGUAGE_PART), text, True, run=generated(num_beams=2)),
    "t5, returned beams": Family(
        made(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        ),
        text,
        True,
        run=generated(num_beams=4, num_return_sequences=2),
    ),
    "llama, guidance": Family(
        made("LlamaForCausalLM", **_LANGUAGE_PART), text, True, run=generated(guidance_scale=2.0)
    ),
    "musicgen, guidance": Family(
        made("MusicgenForConditionalGeneration", **_MUSIC),
        text,
        True,
        targets=["q_proj", "v_proj", "fc1", "q", "wi"],
        run=generated_scores,
    ),
    # Mixtures of experts.
    "mixtral": Family(made("MixtralForCausalLM", **_LANGUAGE_PART, num_local_experts=2), text, True),
    "qwen2 moe": Family(
        made(
            "Qwen2MoeForCausalLM",
            **_LANGUAGE_PART,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        text,
        True,
    ),
    "experts as modules": Family(custom(Experts), text, False),
    # What a model may do by itself.
    "sequence first": Family(custom(SequenceFirst), text, False),
    "guidance inside": Family(custom(Guided), text, True),
    "packed": Family(custom(Packed), padded, False),
    "shared table": Family(custom(SharedTable), text, False),
    "neighbours": Family(custom(Shuffled), text, False),
    "windows": Family(custom(Windows), text, True),
}
