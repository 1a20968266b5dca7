"""Tiny random models of the real transformers classes, each with a tokenizer, made without network.

Hidden size 32, two layers, a byte-level tokenizer of 256 bytes and a few special tokens: a folder
of a few hundred kilobytes that loads and generates in well under a second.
"""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2VLImageProcessorPil,
    WhisperFeatureExtractor,
)

HIDDEN = 32
TEXT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'audio' %}AUDIO{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_AUDIO = "<|audio_bos|><|AUDIO|><|audio_eos|>"


def tokenizer(*special: str, template: str | None = TEXT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a byte, which can spell any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        # The tokenizer class of Qwen2 adds this token if it is not there.
        additional_special_tokens=["<|endoftext|>", *special],
    )
    made.chat_template = template
    return made


def _text(vocabulary: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 2048,
        # Wide enough that two random models, or a model and its rounding, differ visibly.
        "initializer_range": 0.3,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
        **more,
    }


def causal(folder: Path, *, seed: int = 0, tie: bool = False, **more: Any) -> Path:
    """A Llama. `more` goes to the config."""
    words = tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**_text(words, tie_word_embeddings=tie, **more)))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def classifier(folder: Path, *, labels: int = 1, seed: int = 0) -> Path:
    """A Qwen2 with a `score` head: what a converted critic or reward model is."""
    words = tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(**_text(words, num_labels=labels))
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _qwen_vl_config(words: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    return Qwen2_5_VLConfig(
        text_config=_text(words, rope_parameters=rope),
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )


def qwen_vl(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2.5-VL with its image processor; also what a `grm` export is."""
    words = tokenizer(
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        template=PARTS_TEMPLATE.replace("IMAGE", QWEN_IMAGE),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(_qwen_vl_config(words))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    # The processor itself needs torchvision for its videos; the hub's folders hold the same files.
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16).save_pretrained(folder)
    return folder


def llava(folder: Path, *, seed: int = 0) -> Path:
    """A LLaVA with a CLIP tower of 16 patches an image."""
    words = tokenizer("<image>", template=PARTS_TEMPLATE.replace("IMAGE", "<image>\n"))
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=HIDDEN,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**_text(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    ).save_pretrained(folder)
    return folder


def qwen_audio(folder: Path, *, seed: int = 0) -> Path:
    """A Qwen2-Audio that hears one second at most."""
    words = tokenizer(
        "<|AUDIO|>",
        "<|audio_bos|>",
        "<|audio_eos|>",
        template=PARTS_TEMPLATE.replace("AUDIO{%", QWEN_AUDIO + "{%"),
    )
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=16,
        d_model=HIDDEN,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        max_source_positions=50,
    )
    config = Qwen2AudioConfig(
        audio_config=audio,
        text_config=Qwen2Config(**_text(words)),
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(seed)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    Qwen2AudioProcessor(
        feature_extractor=WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        tokenizer=words,
        chat_template=words.chat_template,
    ).save_pretrained(folder)
    return folder


def reward(
    folder: Path, *, heads: tuple[str, ...] = ("preference",), pooling: str = "attn"
) -> Path:
    """Make a backbone's folder a scalar reward export: random heads and `reward_config.json`."""
    torch.manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for head in heads:
        tensors[f"{head}_head.0.weight"] = torch.randn(HIDDEN, HIDDEN) * 0.2
        tensors[f"{head}_head.0.bias"] = torch.randn(HIDDEN) * 0.2
        tensors[f"{head}_head.1.weight"] = 1 + torch.randn(HIDDEN) * 0.2
        tensors[f"{head}_head.3.weight"] = torch.randn(1, HIDDEN) * 0.2
        if pooling == "attn":
            tensors[f"{head}_attnpool.query"] = torch.randn(HIDDEN)
            tensors[f"{head}_attnpool.k.weight"] = torch.randn(HIDDEN, HIDDEN) * 0.2
            tensors[f"{head}_attnpool.v.weight"] = torch.randn(HIDDEN, HIDDEN) * 0.2
    save_file(tensors, folder / "reward_head.safetensors", metadata={"format": "pt"})
    config = {
        "head_types": list(heads),
        "pooling_method": pooling,
        "num_heads": 4,
        "probing_layer": -1,
        "scale_for_train": False,
        "hidden_size": HIDDEN,
    }
    (folder / "reward_config.json").write_text(json.dumps(config))
    return folder


def image(path: Path) -> Path:
    """A picture of 56 by 42 points, left half red."""
    picture = Image.new("RGB", (56, 42), "navy")
    picture.paste("red", (0, 0, 28, 42))
    picture.save(path)
    return path


def tone(path: Path, *, hertz: float = 440.0, rate: int = 16000, seconds: float = 0.5) -> Path:
    """A WAV file (16 bit, mono) of a sine tone at half of full scale."""
    time = np.arange(int(rate * seconds)) / rate
    samples = (np.sin(2 * np.pi * hertz * time) * 16384).astype("<i2")
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return path
