"""DeepViT: re-attention, against attention maps that grow alike with depth. Zhou et al., arXiv:2103.11886.

Re-attention mixes the heads' maps by a learned H x H matrix before they meet the values:

    Re-Attention(Q, K, V) = Norm(Theta^T softmax(Q K^T / sqrt(d))) V

Norm is BatchNorm over the head channel, so rows no longer sum to 1, and batches of one image train badly. How alike the
maps of neighbouring blocks are, which is what the method is about, is measured by
``distillkit.evaluation.attention``, with re-attention and without (``re_attention=False``, the plain transformer of the
same width).

Modules are named as in the release (zhoudaquan/dvit_repo), so that its checkpoints load by name:

    timm.create_model("deepvit_32b", pretrained=True, pretrained_cfg_overlay={"file": "deepvit_32b.pth.tar"})

The paper shows re-attention in every block. The release does so in the networks of 16, 24 and 32 blocks, named here
``deepvit_16b`` and so on; its S and L have it in their last 5 of 16 and 12 of 32 blocks, with a stem of convolutions.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from distillkit.models.vit import ClassTokenViT, Size, Stem, create, default_cfg, drop_path_rates

EPS = 1e-6  # of every LayerNorm


class ReAttention(nn.Module):
    """Multi-head self-attention, its maps mixed between the heads (module docstring): (B, T, C) -> (B, T, C).

    The maps (B, heads, T, T), rows = queries, run through ``attn_map`` right before they meet the values: a module
    that does nothing, for hooks. Plain attention without hooks there makes no maps, which is faster.

    Args:
        re_attention: False = plain attention.
        transform_scale: multiply the mixed maps by 1 / sqrt(d), as the release's S does (and its L does not).
        attn_drop: dropout on the maps before they are mixed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        re_attention: bool = True,
        transform_scale: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim={dim} cannot be split into num_heads={num_heads}")
        self.num_heads, self.re_attention = num_heads, re_attention
        self.scale = (dim // num_heads) ** -0.5
        self.map_scale = self.scale if transform_scale else 1.0
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        if re_attention:
            self.reatten_matrix = nn.Conv2d(num_heads, num_heads, 1)
            self.var_norm = nn.BatchNorm2d(num_heads)
        self.attn_map = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, maps: bool = False) -> Tensor:
        """``maps``: make them, hooks or not."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, d)
        if self.re_attention or maps or self.hooked():
            y = self.attn_map(self._maps(q, k)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def hooked(self) -> bool:
        """Whether someone looks at the maps."""
        m = self.attn_map
        return any((m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))

    def _maps(self, q: Tensor, k: Tensor) -> Tensor:
        """Queries and keys, each (B, heads, T, d) -> (B, heads, T, T)."""
        maps = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1))
        if not self.re_attention:
            return maps
        return self.var_norm(self.reatten_matrix(maps)) * self.map_scale


class Block(nn.Module):
    """``x + attention(LN(a x)) / a``, then ``x + MLP(LN(a x)) / a``.

    LayerNorm forgets the factor in front of it, so a = 0.5 doubles both branches.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        re_attention: bool = True,
        transform_scale: bool = False,
        scale_adjustment: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.scale_adjustment = scale_adjustment
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = ReAttention(dim, num_heads, qkv_bias, re_attention, transform_scale, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, maps: bool = False) -> Tensor:
        """(B, T, C) in and out; ``maps`` as in ``ReAttention``."""
        a = self.scale_adjustment
        x = x + self.drop_path(self.attn(self.norm1(a * x), maps)) / a
        return x + self.drop_path(self.mlp(self.norm2(a * x))) / a


class DeepViT(ClassTokenViT):
    """The network; ``vit.ClassTokenViT`` has its forward. There is no dense head.

    Args:
        img_size: side of the images, or height and width.
        embed_dim, depth, num_heads, mlp_ratio: C, blocks, heads, hidden width of the MLP over C.
        qkv_bias: whether queries, keys and values have a bias.
        re_attention: True = in all blocks, False = in none, or one flag a block.
        transform_scale: see ``ReAttention``.
        scale_adjustment: a, see ``Block``.
        conv_stem: two convolutions before the patches are cut; False = they are cut from the image itself.
        drop_rate, proj_drop_rate, attn_drop_rate: dropout before the head, in the branches, on the attention maps.
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
        re_attention: bool | Sequence[bool] = True,
        transform_scale: bool = False,
        scale_adjustment: float = 1.0,
        conv_stem: bool = False,
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        if isinstance(re_attention, str) or not isinstance(re_attention, bool | Sequence):
            raise ValueError(f"re_attention must be True, False or a list of one flag a block, got {re_attention!r}")
        where = [re_attention] * depth if isinstance(re_attention, bool) else list(re_attention)
        if len(where) != depth:
            raise ValueError(
                f"re_attention has {len(where)} flags for depth={depth} blocks: give re_attention= too, as one flag a "
                "block, or True or False for all"
            )
        super().__init__(
            Stem(img_size, patch_size, in_chans, embed_dim, (64, 64) if conv_stem else ()),
            [
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    here,
                    transform_scale,
                    scale_adjustment,
                    attn_drop_rate,
                    proj_drop_rate,
                    rate,
                )
                for here, rate in zip(where, drop_path_rates(drop_path_rate, depth))
            ],
            num_classes=num_classes,
            global_pool=global_pool,
            dense_head=False,
            dynamic_img_size=dynamic_img_size,
            drop_rate=drop_rate,
            norm_eps=EPS,
        )

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        # decided here: hooks may be gone when a checkpointed block runs again, and it must do the same as before
        return super().run_block(block, *inputs, block.attn.hooked())  # type: ignore[operator,union-attr]


def _cfg(first_conv: str) -> dict[str, Any]:
    return default_cfg(first_conv, crop_pct=0.9, mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD)


default_cfgs = generate_default_cfgs(
    {
        "deepvit_16b": _cfg("patch_embed.proj"),
        "deepvit_24b": _cfg("patch_embed.proj"),
        "deepvit_32b": _cfg("patch_embed.proj"),
        "deepvit_s": _cfg("patch_embed.conv1"),
        "deepvit_l": _cfg("patch_embed.conv1"),
    }
)


@register_model
def deepvit_16b(pretrained: bool = False, **options: Any) -> DeepViT:
    """24.4 million parameters, 5.3 GMACs at 224; 79.1 % on ImageNet-1k, 78.9 % without re-attention."""
    return create(DeepViT, "deepvit_16b", pretrained, {"depth": 16}, options)


@register_model
def deepvit_24b(pretrained: bool = False, **options: Any) -> DeepViT:
    """36.3 million parameters, 7.9 GMACs at 224; 80.0 % on ImageNet-1k, 79.4 % without re-attention."""
    return create(DeepViT, "deepvit_24b", pretrained, {"depth": 24}, options)


@register_model
def deepvit_32b(pretrained: bool = False, **options: Any) -> DeepViT:
    """48.1 million parameters, 10.5 GMACs at 224; 80.9 % on ImageNet-1k, 79.3 % without re-attention."""
    return create(DeepViT, "deepvit_32b", pretrained, {"depth": 32}, options)


@register_model
def deepvit_s(pretrained: bool = False, **options: Any) -> DeepViT:
    """27.3 million parameters, 6.4 GMACs at 224; re-attention in the last 5 of 16 blocks."""
    sizes = {
        "embed_dim": 396,
        "depth": 16,
        "re_attention": [False] * 11 + [True] * 5,
        "transform_scale": True,
        "scale_adjustment": 0.5,
        "conv_stem": True,
    }
    return create(DeepViT, "deepvit_s", pretrained, sizes, options)


@register_model
def deepvit_l(pretrained: bool = False, **options: Any) -> DeepViT:
    """58.9 million parameters, 13.1 GMACs at 224, 44.8 at 384; re-attention in the last 12 of 32 blocks.

    Tables that say 55 million would fit a width of 408; the release has 420. At 384 the published crop is 1.0.
    """
    sizes = {
        "embed_dim": 420,
        "depth": 32,
        "re_attention": [False] * 20 + [True] * 12,
        "scale_adjustment": 0.5,
        "conv_stem": True,
    }
    return create(DeepViT, "deepvit_l", pretrained, sizes, options)
