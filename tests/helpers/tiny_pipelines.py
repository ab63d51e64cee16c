"""Pipelines of diffusers from text to images and videos, of the real classes, with tiny networks of random weights."""

import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WIDTH = 32  # of text encoders, and so of prompts
POOLED_WIDTH = 32  # of the two CLIP encoders of Stable Diffusion 3 and of Flux's


def tiny_pipeline(name, scheduler, *, with_text=True):
    """The pipeline of the class `name`; without its text encoders it takes prompts as embeddings only."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make = next(make for start, make in _MAKERS.items() if name.startswith(start))
        parts, text = make()
        text = {part: maker() if with_text else None for part, maker in text.items()}
        return getattr(diffusers, name)(scheduler=scheduler, **parts, **text)


def embeddings(name):
    """Arguments in place of a prompt, for a pipeline without text encoders."""
    prompt = {"prompt_embeds": torch.zeros(1, 4, WIDTH)}
    if name.startswith("Wan"):
        return prompt | {"negative_prompt_embeds": torch.ones(1, 4, WIDTH)}
    if name.startswith("QwenImage"):
        return prompt | {"prompt_embeds_mask": torch.ones(1, 4, dtype=torch.int64)}
    pooled = 2 * POOLED_WIDTH if name.startswith("StableDiffusion3") else POOLED_WIDTH
    return prompt | {"pooled_prompt_embeds": torch.zeros(1, pooled)}


def _stable_diffusion_3():
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=1, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * POOLED_WIDTH,
    )  # fmt: skip
    text = {
        "text_encoder": lambda: _clip(True), "text_encoder_2": lambda: _clip(True), "text_encoder_3": lambda: _t5("T5"),
        "tokenizer": _clip_tokenizer, "tokenizer_2": _clip_tokenizer, "tokenizer_3": _t5_tokenizer,
    }  # fmt: skip
    return {"transformer": transformer, "vae": _image_autoencoder(16)}, text


def _flux():
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=POOLED_WIDTH, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    text = {
        "text_encoder": lambda: _clip(False), "text_encoder_2": lambda: _t5("T5"),
        "tokenizer": _clip_tokenizer, "tokenizer_2": _t5_tokenizer,
    }  # fmt: skip
    return {"transformer": transformer, "vae": _image_autoencoder(4)}, text


def _qwen_image():
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {"text_encoder": _qwen, "tokenizer": _qwen_tokenizer}
    return {"transformer": transformer, "vae": _video_autoencoder(AutoencoderKLQwenImage)}, text


def _wan():
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    text = {"text_encoder": lambda: _t5("UMT5"), "tokenizer": _t5_tokenizer}
    return {"transformer": transformer, "vae": _video_autoencoder(AutoencoderKLWan)}, text


_MAKERS = {"StableDiffusion3": _stable_diffusion_3, "Flux": _flux, "QwenImage": _qwen_image, "Wan": _wan}


def _image_autoencoder(channels):
    """One that leaves the size of an image as it is."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip


def _video_autoencoder(kind):
    """One of eight pixels and four frames per latent, as the pipelines expect."""
    return kind(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _clip(with_projection):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2, hidden_size=WIDTH // 2 if with_projection else WIDTH, intermediate_size=16,
        projection_dim=POOLED_WIDTH, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=2 * len(LETTERS), eos_token_id=2 * len(LETTERS) + 1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def _t5(kind):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=4 + len(LETTERS), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def _qwen():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = {"hidden_size": WIDTH, "intermediate_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, **sizes,
            "bos_token_id": 0, "eos_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "num_heads": 2, "out_hidden_size": WIDTH, **sizes},
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _clip_tokenizer():
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def _qwen_tokenizer():
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    return Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
