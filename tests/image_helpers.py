"""Pipelines of the real classes with tiny random weights, saved as folders; an images endpoint of another make.

python -m tests.image_helpers FOLDER        # writes cogview4, cogview3plus and sd there
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["<pad>", "<unk>", "</s>", "<s>", "a", "red", "kite", "over", "the", "sea", "一", "只", "红", "风", "筝"]


def tokenizer(**options: Any) -> Any:
    """Words of the tests' prompts; the rest is unknown."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", WORDS.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>", **options
    )


def vae(channels: int) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, layers_per_block=1, sample_size=32,
    )  # fmt: skip


def save_cogview4(folder: Path) -> Path:
    """CogView4: its transformer behind a GLM text encoder, with flow matching."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(1)
    config = GlmConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=len(WORDS), pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    encoder = GlmModel(config)
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=16, rope_axes_dim=(32, 32),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    words = tokenizer(padding_side="left")
    CogView4Pipeline(words, encoder, vae(4), transformer, scheduler).save_pretrained(folder)
    return folder


def save_cogview3plus(folder: Path) -> Path:
    """CogView3-Plus: its transformer behind T5, with its own DDIM scheduler."""
    from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    encoder = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=16,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True,
    )  # fmt: skip
    CogView3PlusPipeline(tokenizer(), encoder, vae(4), transformer, scheduler).save_pretrained(folder)
    return folder


def save_stable_diffusion(folder: Path) -> Path:
    """Another family: a U-Net behind CLIP."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip
    words, scheduler = tokenizer(model_max_length=16), DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae(4), encoder, words, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    here = Path(sys.argv[1])
    for save in (save_cogview4, save_cogview3plus, save_stable_diffusion):
        print(save(here / save.__name__.removeprefix("save_")))
