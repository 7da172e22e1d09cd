"""Refiner-ViT: attention maps refined as if they were pictures. Zhou et al., Refiner, arXiv:2106.03714.

Between the softmax and the values, the maps A (B, H, T, T) of the H heads are

    expanded       A~_h = sum_i W_A[h, i] A_i, H -> E = r * H maps
    convolved      each map with a k x k kernel of its own ("distributed local attention")
    reduced        E -> H maps, linearly

To convolve a map and then multiply it with the values is to gather the values locally, then globally.

**Two conventions.** ``convention="paper"`` is these three linear steps, in every block, on the block's own maps.
``convention="release"``, the default, is what the published code (zhoudaquan/Refiner_ViT) runs, which differs:

- the three steps are an inverted residual: BatchNorm after each, ReLU6 after the first two, and their input added;
  another BatchNorm (``adapt_bn``) follows;
- blocks come in pairs. The second of a pair has no queries and keys: it refines the map of the first, times
  1 / sqrt(d), and uses that. The first uses its own map unrefined;
- a first block adds 1 / sqrt(d) times the map of the pair before it to its own.

It is the default because the published weights, results and numbers of parameters all belong to it, and modules are
named as in it:

    timm.create_model("refiner_vit_l", img_size=448, pretrained=True,
                      pretrained_cfg_overlay={"file": "refiner_l_448.pth.tar"})

Refined maps may be negative, and their rows need not sum to 1.
"""

from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from distillkit.models.vit import ClassTokenViT, Size, Stem, create, default_cfg, drop_path_rates

Convention = Literal["release", "paper"]
Form = Literal["plain", "transform", "share"]

EPS = 1e-6  # of every LayerNorm
ADJUST = 0.5  # r of ``Block``
MLP_SCALE = 1e-5  # every MLP branch starts with


class DLA(nn.Module):
    """The refinement as released: maps (B, H, T, T) -> (B, H, T, T).

        z = ReLU6(BN(conv 1x1 (A)))              H -> E; left out where ratio is 1
        z = ReLU6(BN(depthwise conv k x k (z)))
        A + BN(conv 1x1 (z))                     E -> H

    Args:
        heads: H.
        ratio: E / H.
        kernel: k, odd.
    """

    def __init__(self, heads: int, ratio: float = 3.0, kernel: int = 3):
        super().__init__()
        expanded = round(heads * ratio)
        self.expand = ratio != 1
        if self.expand:
            self.conv_exp = nn.Conv2d(heads, expanded, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(expanded)
        self.depth_sep_conv = nn.Conv2d(expanded, expanded, kernel, padding=kernel // 2, groups=expanded, bias=False)
        self.bn2 = nn.BatchNorm2d(expanded)
        self.conv_pro = nn.Conv2d(expanded, heads, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(heads)

    def forward(self, maps: Tensor) -> Tensor:
        z = F.relu6(self.bn1(self.conv_exp(maps))) if self.expand else maps
        z = F.relu6(self.bn2(self.depth_sep_conv(z)))
        return maps + self.bn3(self.conv_pro(z))


class LinearDLA(nn.Module):
    """The refinement as the paper describes it, three linear steps: maps (B, H, T, T) -> (B, H, T, T).

    Args:
        heads, ratio, kernel: as in ``DLA``.
    """

    def __init__(self, heads: int, ratio: float = 3.0, kernel: int = 3):
        super().__init__()
        expanded = round(heads * ratio)
        self.conv_exp = nn.Conv2d(heads, expanded, 1, bias=False)
        self.depth_sep_conv = nn.Conv2d(expanded, expanded, kernel, padding=kernel // 2, groups=expanded, bias=False)
        self.conv_pro = nn.Conv2d(expanded, heads, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv_pro(self.depth_sep_conv(self.conv_exp(maps)))


class ConvDLA(nn.Module):
    """The release's other mode, one convolution over all heads: (B, H, T, T) -> (B, H, T, T).

    No published network has it; for ablations, put it in the place of an attention's ``DLA``.
    """

    def __init__(self, heads: int, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(heads, heads, kernel, padding=kernel // 2, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv(maps)


class RefinedAttention(nn.Module):
    """Self-attention with refined maps.

    The maps (B, H, T, T), rows = queries, run through ``attn_map`` right before they meet the values: a module that
    does nothing, for hooks.

    Args:
        form: whose maps, and whether they are refined.
            "plain": A = softmax(Q K^T / sqrt(d)) + previous / sqrt(d); A is handed on.
            "transform": BN(DLA(A)), which is handed on too. The paper's form, there with neither BN nor previous maps.
            "share": BN(DLA(previous)) / sqrt(d), without queries and keys; previous is handed on as it came.
        ratio, kernel: E / H and k.
        convention: see the module's docstring.
        attn_drop: dropout on the maps before they are refined.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        form: Form = "plain",
        ratio: float = 3.0,
        kernel: int = 3,
        convention: Convention = "release",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} cannot be split into num_heads={num_heads}")
        self.num_heads, self.form, self.convention = num_heads, form, convention
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim if form == "share" else 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        if form != "plain":
            self.DLA: nn.Module = (DLA if convention == "release" else LinearDLA)(num_heads, ratio, kernel)
            self.adapt_bn = nn.BatchNorm2d(num_heads) if convention == "release" else nn.Identity()
        self.attn_map = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T, C) and maps (B, H, T, T) -> tokens (B, T, C) and the maps for the next block."""
        if self.form == "share":
            if previous is None:
                raise ValueError("a block that shares maps needs those of a block before it")
            v = self.qkv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, d)
            maps = self.adapt_bn(self.DLA(previous)) * self.scale
            handed_on: Tensor | None = previous
        else:
            q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            maps = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
            if previous is not None:
                maps = maps + self.scale * previous
            maps = self.attn_drop(maps)
            if self.form == "transform":
                maps = self.adapt_bn(self.DLA(maps))
            handed_on = maps if self.convention == "release" else None
        y = self.attn_map(maps) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2))), handed_on


class ScaledMlp(nn.Module):
    """An MLP whose output channels each have a learned factor, which starts near 0: (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.scale_channel = nn.Parameter(torch.full((dim,), MLP_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))) * self.scale_channel)


class Block(nn.Module):
    """``x + attention(LN(r x)) / r``, then ``x + MLP(LN(r x)) / r``, with r = 0.5: both branches are doubled."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        form: Form,
        ratio: float,
        kernel: int,
        convention: Convention,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = RefinedAttention(dim, num_heads, qkv_bias, form, ratio, kernel, convention, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = ScaledMlp(dim, int(dim * mlp_ratio), proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, previous: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As ``RefinedAttention.forward``."""
        y, handed_on = self.attn(self.norm1(ADJUST * x), previous)
        x = x + self.drop_path(y) / ADJUST
        return x + self.drop_path(self.mlp(self.norm2(ADJUST * x))) / ADJUST, handed_on


class RefinerViT(ClassTokenViT):
    """The network; ``vit.ClassTokenViT`` has its forward.

    Args:
        img_size: side of the images, or height and width. Position embeddings of checkpoints are resized as in
            ``vit.resize_pos_embed``; the release does so bilinearly with aligned corners.
        embed_dim, depth, num_heads, mlp_ratio: C, blocks, heads, hidden width of the MLP over C.
        qkv_bias: whether queries, keys and values have a bias.
        expansion, kernel: E / H and the odd k of the refinement (module docstring); 3 and 3 in all published networks.
        convention: see the module's docstring.
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
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        expansion: float = 3.0,
        kernel: int = 3,
        convention: Convention = "release",
        dense_head: bool = True,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        forms: dict[str, list[Form]] = {"release": ["plain", "share"], "paper": ["transform", "transform"]}
        if convention not in forms:
            raise ValueError(f"convention must be 'release' or 'paper', got {convention!r}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} must be odd: refined maps keep their size")
        if round(num_heads * expansion) < 1:
            raise ValueError(f"expansion={expansion} leaves no maps of num_heads={num_heads}: it must be larger")
        super().__init__(
            Stem(img_size, patch_size, in_chans, embed_dim, (32, 64, 128)),
            [
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    forms[convention][i % 2],
                    expansion,
                    kernel,
                    convention,
                    attn_drop_rate,
                    proj_drop_rate,
                    rate,
                )
                for i, rate in enumerate(drop_path_rates(drop_path_rate, depth))
            ],
            num_classes=num_classes,
            global_pool=global_pool,
            dense_head=dense_head,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            norm_eps=EPS,
        )

    def run_blocks(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """As in ``ClassTokenViT``, with the maps that blocks hand on."""
        taken: list[Tensor] = []
        maps: Tensor | None = None
        for i, block in enumerate(self.blocks[:count]):
            x, maps = self.run_block(block, x, maps)
            if i in take:
                taken.append(x)
        return x, taken


def _cfg(crop_pct: float) -> dict[str, Any]:
    return default_cfg(
        "patch_embed.conv1",
        crop_pct=crop_pct,
        mean=IMAGENET_INCEPTION_MEAN,
        std=IMAGENET_INCEPTION_STD,
        classifier=("head", "aux_head"),
    )


default_cfgs = generate_default_cfgs(
    {"refiner_vit_s": _cfg(0.9), "refiner_vit_m": _cfg(1.0), "refiner_vit_l": _cfg(1.13)}
)


@register_model
def refiner_vit_s(pretrained: bool = False, **options: Any) -> RefinerViT:
    """25.4 million parameters, 6.8 GMACs at 224, as released."""
    return create(RefinerViT, "refiner_vit_s", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 12}, options)


@register_model
def refiner_vit_m(pretrained: bool = False, **options: Any) -> RefinerViT:
    """55.5 million parameters, 13.5 GMACs at 224, as released."""
    return create(RefinerViT, "refiner_vit_m", pretrained, {"embed_dim": 420, "depth": 32, "num_heads": 12}, options)


@register_model
def refiner_vit_l(pretrained: bool = False, **options: Any) -> RefinerViT:
    """81.2 million parameters, 19.2 GMACs at 224, 102.4 at 448, as released. The published weights are for 448."""
    return create(RefinerViT, "refiner_vit_l", pretrained, {"embed_dim": 512, "depth": 32, "num_heads": 16}, options)
