"""Small models of transformers with random weights, and real pictures to train them on."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from distillkit.data.scenes import Scenes

SIDE, CLASSES = 64, 10
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DECODER = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 32, 64],
    "d_model": 32,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_labels": CLASSES,
    "num_denoising": 10,
    "decoder_in_channels": [32, 32, 32],
}


def vit(width: int = 32, **options: Any) -> nn.Module:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=SIDE, patch_size=16, num_labels=CLASSES, hidden_dropout_prob=0.0, **options)
    )


def resnet(width: int = 8) -> nn.Module:
    sizes = [width, 2 * width, 4 * width, 8 * width]
    return ResNetForImageClassification(ResNetConfig(**{**RESNET, "hidden_sizes": sizes}, num_labels=CLASSES))


def convnext(width: int = 8) -> nn.Module:
    sizes = [width, 2 * width, 2 * width, 4 * width]
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=sizes, depths=[1] * 4, num_labels=CLASSES))


def swin(width: int = 8) -> nn.Module:
    sizes = {"embed_dim": width, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(**sizes, image_size=SIDE, patch_size=4, num_labels=CLASSES))


def bert(width: int = 32, **options: Any) -> nn.Module:
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 16, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes, hidden_dropout_prob=0.0, **options))


def segformer(width: int = 8) -> nn.Module:
    sizes = {
        "depths": [1] * 4,
        "hidden_sizes": [width, width, 2 * width, 2 * width],
        "num_attention_heads": [1, 1, 2, 2],
    }
    return SegformerForSemanticSegmentation(
        SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=CLASSES + 1, classifier_dropout_prob=0.0)
    )


def detr(queries: int = 12, **options: Any) -> nn.Module:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": queries, "dropout": 0.0}
    options = {"num_labels": CLASSES, **options}
    backbone = ResNetConfig(**RESNET, out_features=["stage4"])
    return DetrForObjectDetection(
        DetrConfig(use_timm_backbone=False, backbone_config=backbone, **sizes, **heads, **options)
    )


def yolos(queries: int = 12) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    picture = {"image_size": [SIDE, SIDE], "patch_size": 16, "num_detection_tokens": queries}
    return YolosForObjectDetection(YolosConfig(**sizes, **picture, num_labels=CLASSES))


def rt_detr(queries: int = 12, layers: int = 2) -> nn.Module:
    backbone = RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    return RTDetrForObjectDetection(
        RTDetrConfig(backbone_config=backbone, num_queries=queries, decoder_layers=layers, **DECODER)
    )


def d_fine(queries: int = 12, layers: int = 2) -> nn.Module:
    sizes = {
        "embedding_size": 8,
        "stem_channels": [3, 8, 8],
        "hidden_sizes": [16, 16, 32, 64],
        "stage_in_channels": [8, 16, 16, 32],
        "stage_mid_channels": [8, 8, 16, 16],
        "stage_out_channels": [16, 16, 32, 64],
        "stage_num_blocks": [1] * 4,
        "stage_numb_of_layers": [1] * 4,
    }
    backbone = HGNetV2Config(**sizes, out_features=["stage2", "stage3", "stage4"])
    neck = {"feat_strides": [8, 16, 32], "depth_mult": 0.34, "hidden_expansion": 0.5, "hidden_size": 32}
    return DFineForObjectDetection(
        DFineConfig(backbone_config=backbone, num_queries=queries, decoder_layers=layers, **neck, **DECODER)
    )


@lru_cache
def scenes(count: int = 4) -> tuple[Tensor, list[dict[str, Tensor]], Tensor]:
    """Digits on photographs: pictures, what is in them as DETR's processor says it, and masks (0: background)."""
    data = Scenes(count, SIDE, extras=True)
    pictures, objects, masks = [], [], torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for i in range(count):
        picture, target = data[(0, i)]
        first, last = target["boxes"].split(2, 1)
        boxes = torch.cat([(first + last) / 2, last - first], 1) / SIDE
        pictures.append(picture)
        objects.append({"class_labels": target["labels"], "boxes": boxes})
        for mask, label in zip(target["masks"], target["labels"]):
            masks[i][mask] = label + 1
    return torch.stack(pictures), objects, masks


def batch(kind: str) -> dict[str, Any]:
    """A call with labels: of "class", "objects", "masks" or "text"."""
    if kind == "text":
        g = torch.Generator().manual_seed(0)
        words = torch.randint(1, 50, (4, 8), generator=g)
        return {"input_ids": words, "attention_mask": torch.ones_like(words), "labels": torch.tensor([0, 1, 2, 0])}
    pictures, objects, masks = scenes()
    first = torch.stack([o["class_labels"][0] for o in objects])
    return {"pixel_values": pictures, "labels": {"class": first, "objects": objects, "masks": masks}[kind]}
