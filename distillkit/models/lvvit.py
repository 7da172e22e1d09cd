"""LV-ViT: a vision transformer made to be trained with token labels. Jiang et al., All Tokens Matter, arXiv:2104.10858.

A deep stem of convolutions, blocks whose branches are divided by s ("enhanced residual connection"), and a second head
that classifies every patch. Modules are named as in the release (zihangJiang/TokenLabeling), so that its checkpoints
load by name:

    timm.create_model("lvvit_s", pretrained=True, pretrained_cfg_overlay={"file": "lvvit_s.pth.tar"})

Scores of published weights are those of both heads together (see ``vit``); with the class token's alone they are wrong.
"""

from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from distillkit.models.vit import ClassTokenViT, Size, Stem, create, default_cfg, drop_path_rates


class Attention(nn.Module):
    """Multi-head self-attention, ``softmax(Q K^T / sqrt(d)) V`` per head: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} cannot be split into num_heads={num_heads}")
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, d)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """``x + attention(LN(x)) / s``, then ``x + MLP(LN(x)) / s``, with stochastic depth on the branches."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        skip_lam: float,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.skip_lam = skip_lam
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x))) / self.skip_lam
        return x + self.drop_path(self.mlp(self.norm2(x))) / self.skip_lam


class LVViT(ClassTokenViT):
    """The network; ``vit.ClassTokenViT`` has its forward.

    Args:
        img_size: side of the images, or height and width.
        embed_dim, depth, num_heads, mlp_ratio: C, blocks, heads, hidden width of the MLP over C.
        qkv_bias: whether queries, keys and values have a bias.
        stem_width: channels of the three convolutions of the stem; 0 = patches are cut from the image itself.
        skip_lam: s, which divides every branch.
        dense_head: whether there is an ``aux_head`` on the patch tokens.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the heads, in the branches, on the attention maps.
        drop_path_rate: stochastic depth of the last block, see ``vit.drop_path_rates``.
        num_classes, global_pool, dynamic_img_size: see ``vit.ClassTokenViT``.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        stem_width: int = 64,
        skip_lam: float = 2.0,
        dense_head: bool = True,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(
            Stem(img_size, patch_size, in_chans, embed_dim, (stem_width,) * 3 if stem_width else ()),
            [
                Block(embed_dim, num_heads, mlp_ratio, qkv_bias, skip_lam, attn_drop_rate, proj_drop_rate, rate)
                for rate in drop_path_rates(drop_path_rate, depth)
            ],
            num_classes=num_classes,
            global_pool=global_pool,
            dense_head=dense_head,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            norm_eps=1e-5,
        )


def _cfg(crop_pct: float) -> dict[str, Any]:
    return default_cfg(
        "patch_embed.conv1",
        crop_pct=crop_pct,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier=("head", "aux_head"),
    )


default_cfgs = generate_default_cfgs(
    {"lvvit_t": _cfg(0.9), "lvvit_s": _cfg(0.9), "lvvit_m": _cfg(1.0), "lvvit_l": _cfg(1.0)}
)


@register_model
def lvvit_t(pretrained: bool = False, **options: Any) -> LVViT:
    """8.5 million parameters, 2.9 GMACs at 224."""
    sizes = {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}
    return create(LVViT, "lvvit_t", pretrained, sizes, options)


@register_model
def lvvit_s(pretrained: bool = False, **options: Any) -> LVViT:
    """26.2 million parameters, 6.6 GMACs at 224, 21.9 at 384."""
    sizes = {"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}
    return create(LVViT, "lvvit_s", pretrained, sizes, options)


@register_model
def lvvit_m(pretrained: bool = False, **options: Any) -> LVViT:
    """55.8 million parameters, 12.7 GMACs at 224 (the paper's table says 16.0), 41.6 at 384."""
    sizes = {"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}
    return create(LVViT, "lvvit_m", pretrained, sizes, options)


@register_model
def lvvit_l(pretrained: bool = False, **options: Any) -> LVViT:
    """150.0 million parameters, 34.6 GMACs at 224; published weights are for larger images: 288, 448, 512."""
    sizes = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128}
    return create(LVViT, "lvvit_l", pretrained, sizes, options)
