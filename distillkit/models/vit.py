"""What LV-ViT, DeepViT and Refiner-ViT share: stem, class token, positions, heads, and timm's interface to a model.

An image (B, 3, H, W) becomes a grid of patches (B, C, h, w), h = H / patch size, then N = h * w tokens in row-major
order behind one class token: (B, 1 + N, C). Blocks and a LayerNorm follow. The logits are

    head(class token) + 0.5 * max over the patches of aux_head(patch tokens)

or, without a dense head, those of the class token alone (Jiang et al., All Tokens Matter, arXiv:2104.10858). In
training mode too: token labelling and MixToken stand outside of the models and read ``patch_embed`` (B, C, h, w),
``head`` (B, classes) and ``aux_head`` (B, N, classes), each of which runs once in a forward.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distillkit.models.weights import unwrapped

Size = int | tuple[int, int]
AUX_WEIGHT = 0.5  # of the dense head's best patch, in the logits


class Stem(nn.Module):
    """Image (B, in_chans, H, W) -> patches (B, embed_dim, H / patch_size, W / patch_size).

    Args:
        img_size: the side of the images, or height and width.
        patch_size: pixels a patch; even where there are ``widths``.
        widths: channels of the convolutions before the patches are cut: 7 x 7 with stride 2, then 3 x 3 with stride 1,
            each with BatchNorm and ReLU. Without any, the patches are cut from the image itself.
    """

    def __init__(self, img_size: Size, patch_size: int, in_chans: int, embed_dim: int, widths: Collection[int] = ()):
        super().__init__()
        if widths and patch_size % 2:
            raise ValueError(
                f"patch_size={patch_size} must be even: the convolutions before the patches halve the image"
            )
        self.patch_size = (patch_size, patch_size)
        self.set_input_size(img_size)
        self.convs = len(widths)
        before = in_chans
        for i, channels in enumerate(widths, 1):
            kernel, stride = (7, 2) if i == 1 else (3, 1)
            conv = nn.Conv2d(before, channels, kernel, stride, padding=kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels))
            before = channels
        side = patch_size // 2 if widths else patch_size
        self.proj = nn.Conv2d(before, embed_dim, side, side)

    def set_input_size(self, img_size: Size) -> None:
        """Expect images of another size. No weight depends on it."""
        (height, width), patch = to_2tuple(img_size), self.patch_size[0]
        if height % patch or width % patch:
            raise ValueError(f"img_size={(height, width)} is not a multiple of the patch size, {patch}")
        self.img_size = (height, width)
        self.grid_size = (height // patch, width // patch)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.convs + 1):
            # never in place: the normalised map may be tapped
            x = F.relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)))
        return self.proj(x)


class ClassTokenViT(nn.Module):
    """A vision transformer around the blocks of one family.

    Args:
        stem, blocks: of the family. A block maps tokens (B, 1 + N, C) to tokens, or the family overrides
            ``run_blocks``.
        num_classes: 0 = no heads, the features are returned.
        global_pool: "token" = the class token; "avg" = the mean of the patch tokens, without a dense head only; "" =
            all tokens, for ``num_classes=0`` only.
        dense_head: whether there is an ``aux_head`` on the patch tokens.
        dynamic_img_size: take images of any multiple of the patch size, by resizing the position embedding.
        drop_rate: dropout before the heads.
        norm_eps: of the last LayerNorm.
    """

    def __init__(
        self,
        stem: Stem,
        blocks: Iterable[nn.Module],
        *,
        num_classes: int,
        global_pool: str,
        dense_head: bool,
        dynamic_img_size: bool,
        drop_rate: float,
        norm_eps: float,
    ):
        super().__init__()
        dim = stem.proj.out_channels
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.num_prefix_tokens = 1
        self.in_chans = next(m.in_channels for m in stem.modules() if isinstance(m, nn.Conv2d))
        self.dense_head = dense_head
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.patch_embed = stem
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + stem.num_patches, dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = global_pool
        self.reset_classifier(num_classes)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": dim, "reduction": stem.patch_size[0]} for i in range(len(self.blocks))
        ]
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for ``num_classes``; 0 = none."""
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("token", "avg", ""):
            raise ValueError(f"global_pool must be 'token', 'avg' or '', got {pool!r}")
        if pool == "avg" and self.dense_head:
            raise ValueError(
                "global_pool='avg' cannot stand beside a dense head, which reads the patch tokens already: "
                "use global_pool='token', or build the model with dense_head=False"
            )
        if pool == "" and num_classes:
            raise ValueError(
                f"global_pool='' keeps all tokens, and a classifier reads one: use global_pool='token', "
                f'or reset_classifier({num_classes}, "token")'
            )
        self.num_classes, self.global_pool = num_classes, pool
        self.head: nn.Module = self._classifier() if num_classes else nn.Identity()
        self.aux_head: nn.Module | None = self._classifier() if num_classes and self.dense_head else None

    def _classifier(self) -> nn.Linear:
        head = nn.Linear(self.embed_dim, self.num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
        init_linear(head)
        return head

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Depth by name, for timm's layer-wise decay: the stem, every block (the norm with the last), the heads."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_input_size(self, img_size: Size) -> None:
        """Take images of another size from now on: the position embedding is resized, as that of a checkpoint is."""
        before = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.patch_embed.grid_size != before:  # else an optimizer may go on with the parameter that it has
            resized = resize_pos_embed(self.pos_embed.detach(), before, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resized, self.pos_embed.requires_grad)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside of the blocks: they are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def forward(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1 + N, C), the class token first."""
        x, _ = self.run_blocks(self.embed(image), len(self.blocks))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, 1 + N, C) -> logits (B, num_classes); the pooled features with ``pre_logits`` or without classes."""
        pooled = self.head_drop(self._pooled(x))
        if pre_logits:
            return pooled
        logits = self.head(pooled)
        if self.aux_head is None:
            return logits
        return logits + AUX_WEIGHT * self.aux_head(self.head_drop(x[:, 1:])).max(1).values

    def _pooled(self, x: Tensor) -> Tensor:
        if self.global_pool == "avg":
            return x[:, 1:].mean(1)
        return x[:, 0] if self.global_pool else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The outputs of blocks, as timm's vision transformer gives them.

        Args:
            x: images (B, in_chans, H, W).
            indices: of the blocks; an int: the last so many; None: all.
            return_prefix_tokens: give each as a pair, with its class token (B, 1, C) in second place.
            norm: pass each through the last LayerNorm.
            stop_early: run no block behind the last one wanted.
            output_fmt: "NCHW" = patches as (B, C, h, w), "NLC" = as (B, N, C).
            intermediates_only: leave out the last features.
            output_dict: return a dict: "image_intermediates", "image_intermediates_prefix" (the class tokens, with
                ``return_prefix_tokens``) and "image_features" (the last ones).

        Returns:
            (last features (B, 1 + N, C), list of intermediates), or the list alone, or the dict.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        grid = [side // patch for side, patch in zip(x.shape[-2:], self.patch_embed.patch_size)]
        x, taken = self.run_blocks(self.embed(x), last + 1 if stop_early else len(self.blocks), take)
        taken = [self.norm(t) if norm else t for t in taken]
        patches = [t[:, 1:] for t in taken]
        if output_fmt == "NCHW":
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        prefixes = [t[:, :1] for t in taken]
        if output_dict:
            named: dict[str, Any] = {"image_intermediates": patches}
            if return_prefix_tokens:
                named["image_intermediates_prefix"] = prefixes
            return named if intermediates_only else {**named, "image_features": self.norm(x)}
        found = list(zip(patches, prefixes)) if return_prefix_tokens else patches
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the blocks of ``indices`` do not need; for timm's ``features_only``."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def embed(self, image: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, 1 + N, C): patches behind the class token, with their positions."""
        self._check_size(image)
        x = self.patch_embed(image)
        positions: Tensor = self.pos_embed
        if self.dynamic_img_size:
            positions = resize_pos_embed(positions, self.patch_embed.grid_size, (x.shape[2], x.shape[3]))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return x + positions

    def _check_size(self, image: Tensor) -> None:
        size, patch = (image.shape[-2], image.shape[-1]), self.patch_embed.patch_size[0]
        if self.dynamic_img_size:
            if size[0] % patch or size[1] % patch:
                raise ValueError(
                    f"images of {size[0]} x {size[1]} pixels cannot be cut into patches of {patch} x {patch}: "
                    f"resize, crop or pad them to multiples of {patch}"
                )
        elif size != self.patch_embed.img_size:
            height, width = self.patch_embed.img_size
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels, but this {type(self).__name__} takes {height} x {width}: "
                f"resize them, or build the model with img_size=({size[0]}, {size[1]}) or dynamic_img_size=True"
            )

    def run_blocks(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, 1 + N, C) through the first ``count`` blocks -> the last tokens, and those behind ``take``."""
        taken = []
        for i, block in enumerate(self.blocks[:count]):
            x = self.run_block(block, x)
            if i in take:
                taken.append(x)
        return x, taken

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if torch.compiler.is_compiling():  # which takes no contexts, and does not repeat the update of statistics
            return checkpoint(block, *inputs, use_reentrant=False)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _SameBuffers(block)))


class _SameBuffers:
    """Undo what happens inside to a module's buffers: a BatchNorm that runs again would count its batch twice.

    It is entered once for every backward pass over the graph.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in self.module.buffers()]

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for buffer, value in self.before:
                buffer.copy_(value)


def init_linear(module: nn.Module) -> None:
    """The first weights of a linear layer, as published for all families; other modules stay as they are."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth: 0 in the first block, rising linearly to ``rate`` in the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


# ---- checkpoints


def resize_pos_embed(embedding: Tensor, old: tuple[int, int], new: tuple[int, int], prefix_tokens: int = 1) -> Tensor:
    """Resize a position embedding, bicubic without antialiasing, as the release of token labelling does.

    Args:
        embedding: (1, P + h * w, C), row-major behind P prefix tokens, which stay as they are.
        old, new: rows and columns of the grids.

    Returns:
        (1, P + H * W, C).
    """
    if old == new:
        return embedding
    prefix, grid = embedding[:, :prefix_tokens], embedding[:, prefix_tokens:]
    grid = resize_grid(grid.unflatten(1, old), new)
    return torch.cat([prefix, grid.flatten(1, 2)], 1)


def resize_grid(grid: Tensor, new: tuple[int, int]) -> Tensor:
    """(1, h, w, C) -> (1, H, W, C), bicubic."""
    resized = F.interpolate(grid.permute(0, 3, 1, 2).float(), new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(grid.dtype)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: ClassTokenViT) -> dict[str, Tensor]:
    """A published checkpoint, wrapped or not -> a state dict for a model, whatever its image size.

    No tensor is left out but those of a dense head where the model was built without one. A position embedding is read
    as that of a square grid if it can be one: weights of a model of 4 x 16 patches would be taken for 8 x 8, and belong
    into ``model.load_state_dict`` directly.

    Raises:
        ValueError: a position embedding of no square grid; classes as ``check_classes`` says.
    """
    weights = unwrapped(state_dict)
    if not model.dense_head:
        weights = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    check_classes(weights, model)
    if "pos_embed" in weights:
        weights["pos_embed"] = _fit_pos_embed(weights["pos_embed"], model.patch_embed.grid_size)
    return weights


def check_classes(weights: Mapping[str, Tensor], model: Any) -> None:
    """Whether timm does with the heads of a checkpoint what is meant. It goes by numbers of classes alone: it keeps
    them where the model's is that of its ``pretrained_cfg``, and else leaves them out, so that the model's stay new.

    Raises:
        ValueError: it would leave heads out that fit the model, or keep heads that do not.
    """
    wanted = model.num_classes
    found = len(weights["head.weight"]) if "head.weight" in weights else wanted
    known = getattr(model, "pretrained_cfg", {}).get("num_classes", wanted)
    if wanted and wanted == found != known:
        raise ValueError(
            f"the checkpoint has {found} classes as the model has, but timm would leave its heads out, since they are "
            f"said to be for {known}: pretrained_cfg_overlay=dict(..., num_classes={found})"
        )
    if wanted and wanted == known != found:
        raise ValueError(
            f"the checkpoint has {found} classes and the model {wanted}: say so in "
            f"pretrained_cfg_overlay=dict(..., num_classes={found}); the model then gets new heads, "
            f"or those of the checkpoint with num_classes={found}"
        )


def _fit_pos_embed(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """For a model of this grid. A file does not tell its own, and all published ones are square."""
    patches = embedding.shape[1] - 1
    side = math.isqrt(patches)
    if side * side == patches:
        return resize_pos_embed(embedding, (side, side), grid)
    if patches == grid[0] * grid[1]:
        return embedding
    raise ValueError(
        f"pos_embed {tuple(embedding.shape)} has positions for {patches} patches, which are no square grid, and "
        f"the model for {grid[0]} x {grid[1]}: build the model with the img_size of the checkpoint"
    )


# ---- timm

Model = TypeVar("Model", bound=ClassTokenViT)


def default_cfg(first_conv: str, **overrides: Any) -> dict[str, Any]:
    """What timm wants to know of a model. No weights are hosted: give a file as ``pretrained_cfg_overlay``."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "first_conv": first_conv,
        "classifier": "head",
        **overrides,
    }


def create(
    model_class: type[Model], variant: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]
) -> Model:
    """Build a preset through timm. ``given`` are the caller's options, which win over the preset's ``sizes``."""
    options = {**sizes, **given}
    return build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
    )
