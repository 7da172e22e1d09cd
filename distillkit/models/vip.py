"""Vision Permutator (ViP): mixing along rows, along columns and over channels, each by one linear layer.

Hou et al., arXiv:2106.12368; weighted fusion and the names of the variants as released by its authors. No attention, no
position embedding, no class token. timm makes the models by name once this module is imported:

    model = timm.create_model("vip_s7", num_classes=10)

Maps are (B, H, W, C) throughout. A linear layer over C = H * S channels sees all H rows at once, of S channels; so
every stage is bound to one number of rows and columns, ``segment_dim``, and the model to one size of pictures.
State-dict names are the release's, so its checkpoints load.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from distillkit.models.vit import check_classes, default_cfg, drop_path_rates, init_linear
from distillkit.models.weights import unwrapped

__all__ = ["VisionPermutator", "checkpoint_filter_fn"]  # register_model adds the entry points


class PermuteMLP(nn.Module):
    """Mix a square map along its height, its width and its channels, and add the three up.

        out = proj(a_h * H(x) + a_w * W(x) + a_c * C(x))

    Args:
        dim: C, divisible by ``segment_dim``.
        segment_dim: rows and columns of the map.
        qkv_bias: biases of the three mixing layers.
        weighted: the a's are a softmax over the three branches, for each picture and channel, from the mean of the map;
            else they are all 1.
        proj_drop: dropout rate of the output.

    Shapes: (B, segment_dim, segment_dim, C) in and out.
    """

    def __init__(
        self, dim: int, segment_dim: int, qkv_bias: bool = False, weighted: bool = True, proj_drop: float = 0.0
    ):
        super().__init__()
        if dim % segment_dim:
            raise ValueError(f"{dim} channels cannot be cut into {segment_dim} segments, one for each row of the map")
        self.segment_dim = segment_dim
        self.mlp_c = nn.Linear(dim, dim, bias=qkv_bias)
        self.mlp_h = nn.Linear(dim, dim, bias=qkv_bias)
        self.mlp_w = nn.Linear(dim, dim, bias=qkv_bias)
        self.reweight = Mlp(dim, dim // 4, dim * 3) if weighted else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        side = self.segment_dim
        if rows != side or columns != side:  # another size might run, and mix what is no row
            raise ValueError(f"the map has {rows}x{columns} tokens, this layer mixes {side}x{side}")
        groups = x.unflatten(-1, (self.segment_dim, -1))  # (B, H, W, G, S)
        by_row = self._mixed(groups, self.mlp_h, (0, 3, 2, 1, 4))  # (B, G, W, H, S)
        by_column = self._mixed(groups, self.mlp_w, (0, 1, 3, 2, 4))  # (B, H, G, W, S)
        by_channel = self.mlp_c(x)
        return self.proj_drop(self.proj(self._fused(by_row, by_column, by_channel)))

    @staticmethod
    def _mixed(groups: Tensor, layer: nn.Module, order: tuple[int, ...]) -> Tensor:
        """Swap rows (or columns) and groups, mix the last two dimensions, swap back: (B, H, W, C)."""
        swapped = groups.permute(order)
        return layer(swapped.flatten(3)).view(swapped.shape).permute(order).flatten(3)

    def _fused(self, by_row: Tensor, by_column: Tensor, by_channel: Tensor) -> Tensor:
        total = by_row + by_column + by_channel
        if self.reweight is None:
            return total
        logits = self.reweight(total.mean((1, 2)))  # (B, 3C): the branch is the fastest index
        share = logits.unflatten(-1, (-1, 3)).softmax(-1)[:, None, None]  # (B, 1, 1, C, 3)
        return share[..., 0] * by_row + share[..., 1] * by_column + share[..., 2] * by_channel


class Permutator(nn.Module):
    """A block: Permute-MLP, then an MLP over channels, each behind a norm and beside a shortcut."""

    def __init__(
        self,
        dim: int,
        segment_dim: int,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        weighted: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PermuteMLP(dim, segment_dim, qkv_bias, weighted, proj_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) in and out."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cut a picture (B, channels, H, W) into patches: (B, H / patch, W / patch, dim)."""

    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Transition(PatchEmbed):
    """Between two stages, (B, H, W, C) in and out: another width, and half the rows and columns if ``patch`` is 2."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class VisionPermutator(nn.Module):
    """The classifier: patches, stages of blocks, norm, mean over tokens, linear head.

    Args:
        img_size: side of the pictures, or (height, width), which must be equal. Every stage's ``segment_dim`` follows:
            its tokens a side, which must divide the stage's channels. Weights of 224 load at another size that fits,
            but their rows then mean other places.
        in_chans, num_classes: num_classes=0 leaves the head out.
        global_pool: ``avg``, or an empty string for logits of every token.
        layers, embed_dims: blocks and channels of each stage.
        transitions: after which stages rows and columns are halved (the last entry is unused).
        patch_size: side of the patches of the first stage.
        mlp_ratio: width of a block's MLP in channels.
        qkv_bias: biases of the mixing layers; the release has none.
        weighted: see ``PermuteMLP``; the released weights are all of the weighted form.
        drop_rate, proj_drop_rate: dropout before the head, and in the blocks.
        drop_path_rate: stochastic depth of the last block, see ``vit.drop_path_rates``.

    Raises:
        ValueError: sizes that do not fit each other, here or, for pictures, in ``forward``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        layers: Sequence[int] = (4, 3, 8, 3),
        embed_dims: Sequence[int] = (192, 384, 384, 384),
        transitions: Sequence[bool] = (True, False, False, False),
        patch_size: int = 7,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        weighted: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        if not len(layers) == len(embed_dims) == len(transitions):
            raise ValueError(
                "layers, embed_dims and transitions need one entry a stage, got "
                f"{len(layers)}, {len(embed_dims)} and {len(transitions)}"
            )
        segments = segment_dims(img_size, patch_size, embed_dims, transitions)
        self.img_size = patch_size * segments[0]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = _checked_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dims[-1]
        self.grad_checkpointing = False

        rates = iter(drop_path_rates(drop_path_rate, sum(layers)))
        self.patch_embed = PatchEmbed(in_chans, embed_dims[0], patch_size)
        network: list[nn.Module] = []
        self.stage_ends: list[int] = []
        self.feature_info: list[dict[str, Any]] = []
        for i, (depth, dim, segment_dim) in enumerate(zip(layers, embed_dims, segments)):
            if i and (transitions[i - 1] or embed_dims[i - 1] != dim):
                network.append(Transition(embed_dims[i - 1], dim, 2 if transitions[i - 1] else 1))
            self.stage_ends.append(len(network))
            reduction = self.img_size // segment_dim
            self.feature_info.append({"module": f"network.{len(network)}", "num_chs": dim, "reduction": reduction})
            network.append(
                nn.Sequential(
                    *(
                        Permutator(dim, segment_dim, mlp_ratio, qkv_bias, weighted, proj_drop_rate, next(rates))
                        for _ in range(depth)
                    )
                )
            )
        self.network = nn.ModuleList(network)
        self.norm: nn.Module = nn.LayerNorm(embed_dims[-1])
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._made_head()
        self.apply(init_linear)

    def _made_head(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    # ---- what timm asks of a model

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers in order, for layer-wise learning rates: every block and transition, or (coarse) every stage."""
        if coarse:
            return {"stem": r"^patch_embed", "blocks": [(r"^network\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [(r"^network\.(\d+)\.(\d+)", None), (r"^network\.(\d+)", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Refused: weights belong to the size that the model was built with."""
        raise ValueError(
            f"img_size={img_size}: this model stays with pictures of {self.img_size}x{self.img_size}, since its layers "
            "mix whole rows and columns, and what they learned holds for one size. Resize the pictures, or build a "
            "model with that img_size and train it"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        weight = self.patch_embed.proj.weight
        self.head = self._made_head().apply(init_linear).to(weight.device, weight.dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of chosen stages, as timm's models give them.

        Args:
            x: (B, in_chans, img_size, img_size).
            indices: which stages; a number: the last so many; None: all.
            norm: the model's last norm on the last stage's map (the others differ in width).
            stop_early: leave out what lies behind the last chosen stage.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: return the maps alone, else also what ``forward_features`` returns; after an early stop
                the tokens so far, without norm.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stage_ends), indices)
        ends = {self.stage_ends[i] for i in take}
        maps = []
        x = self._patches(x)
        for j, stage in enumerate(self.network):
            if stop_early and j > self.stage_ends[last]:
                break
            x = self._run(stage, x)
            if j in ends:
                y = self.norm(x) if norm and j == self.stage_ends[-1] else x
                maps.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if intermediates_only:
            return maps
        tokens = x.flatten(1, 2)
        stopped = stop_early and self.stage_ends[last] < len(self.network) - 1
        return tokens if stopped else self.norm(tokens), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen stages do not need, for ``features_only``; returns their indices."""
        take, last = feature_take_indices(len(self.stage_ends), indices)
        cut = last < len(self.stage_ends) - 1
        self.network = self.network[: self.stage_ends[last] + 1]
        self.stage_ends = self.stage_ends[: last + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.embed_dim = self.feature_info[last]["num_chs"]
        if prune_norm or cut:  # a norm of the last stage's width
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    # ---- forward

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (B, in_chans, img_size, img_size) -> normed tokens (B, N, C), row by row."""
        x = self._patches(x)
        for stage in self.network:
            x = self._run(stage, x)
        return self.norm(x.flatten(1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) -> logits (B, num_classes), or with ``pre_logits`` their mean (B, C)."""
        x = self.head_drop(x.mean(1) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _patches(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height != self.img_size or width != self.img_size:
            raise ValueError(
                f"pictures are {height}x{width}, this model takes {self.img_size}x{self.img_size} and no other size: "
                "its layers mix whole rows and columns. Resize the pictures, or build the model with their img_size="
            )
        return self.patch_embed(x)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and isinstance(stage, nn.Sequential):
            return checkpoint_seq(stage, x)
        return stage(x)


def segment_dims(
    img_size: int | tuple[int, int], patch_size: int, embed_dims: Sequence[int], transitions: Sequence[bool]
) -> list[int]:
    """Tokens a side in each stage, for pictures of this size; ValueError where sizes and channels do not fit."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    halvings = sum(bool(t) for t in transitions[:-1])
    unit = patch_size * 2**halvings
    if height != width or height <= 0 or height % unit:
        raise ValueError(
            f"img_size={img_size}: pictures must be square, their side a multiple of {unit} "
            f"(patches of {patch_size}, halved {halvings} times)"
        )
    side, sides = height // patch_size, []
    for i, dim in enumerate(embed_dims):
        if dim % side:
            raise ValueError(
                f"img_size={height} makes {side} tokens a side in stage {i}, which do not divide its {dim} channels: "
                f"use img_size=224 as released, or embed_dims that are multiples of {side}"
            )
        sides.append(side)
        side = side // 2 if transitions[i] else side
    return sides


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("", "avg"):
        raise ValueError(f"global_pool must be 'avg' or '' (none), got {global_pool!r}")
    return global_pool


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A released checkpoint as a plain state dict. ValueError: classes as ``vit.check_classes`` says."""
    weights = unwrapped(state_dict)
    check_classes(weights, model)
    return weights


def _cfg(crop_pct: float) -> dict[str, Any]:
    return default_cfg(
        "patch_embed.proj",
        crop_pct=crop_pct,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        paper_ids="arXiv:2106.12368",
        paper_name="Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition",
        origin_url="https://github.com/Andrew-Qibin/VisionPermutator",
    )


default_cfgs = generate_default_cfgs(
    {"vip_s14": _cfg(0.9), "vip_s7": _cfg(0.9), "vip_m7": _cfg(0.9), "vip_l7": _cfg(0.875)}
)


def _create_vip(variant: str, pretrained: bool, **options: Any) -> VisionPermutator:
    return build_model_with_cfg(
        VisionPermutator,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **options,
    )


@register_model
def vip_s14(pretrained: bool = False, **options: Any) -> VisionPermutator:
    """ViP-Small/14: 29,892,904 parameters, 6.86 GMACs at 224. No weights were released."""
    sizes = {"patch_size": 14, "layers": (4, 3, 8, 3), "embed_dims": (384,) * 4, "transitions": (False,) * 4}
    return _create_vip("vip_s14", pretrained, **{**sizes, **options})


@register_model
def vip_s7(pretrained: bool = False, **options: Any) -> VisionPermutator:
    """ViP-Small/7: 25,114,984 parameters, 6.90 GMACs at 224; 81.5 top-1 as released."""
    sizes = {"layers": (4, 3, 8, 3), "embed_dims": (192, 384, 384, 384), "transitions": (True, False, False, False)}
    return _create_vip("vip_s7", pretrained, **{**sizes, **options})


@register_model
def vip_m7(pretrained: bool = False, **options: Any) -> VisionPermutator:
    """ViP-Medium/7: 55,272,488 parameters, 16.28 GMACs at 224; 82.7 top-1 as released."""
    sizes = {"layers": (4, 3, 14, 3), "embed_dims": (256, 256, 512, 512), "transitions": (False, True, False, False)}
    return _create_vip("vip_m7", pretrained, **{**sizes, **options})


@register_model
def vip_l7(pretrained: bool = False, **options: Any) -> VisionPermutator:
    """ViP-Large/7: 87,784,936 parameters, 24.34 GMACs at 224; 83.2 top-1 as released."""
    sizes = {"layers": (8, 8, 16, 4), "embed_dims": (256, 512, 512, 512), "transitions": (True, False, False, False)}
    return _create_vip("vip_l7", pretrained, **{**sizes, **options})
