"""VOLO, which is timm's: agreement with the published networks, MixToken and losses, through what distillkit adds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.volo import VOLO, ClassBlock, OutlookAttention, Outlooker
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import distillkit
from distillkit import TokenLabeling
from distillkit.distillers import token_labeling
from distillkit.losses.mix_token import mix, realised
from distillkit.losses.token_labels import smoothed, token_label_loss
from distillkit.models.vit import resize_grid

GOLDEN = Path(__file__).parent / "golden"
OPERATORS = np.load(GOLDEN / "models_volo_outlook.npz")
WHOLE = np.load(GOLDEN / "models_volo_tiny.npz")
MIXED = np.load(GOLDEN / "dense_volo_mixtoken_a.npz")
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["volo"]
CLASSES = {"outlooker": Outlooker, "class_block": ClassBlock}


def close(ours: Tensor, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal up to ``tolerance`` of the largest entry."""
    assert ours.shape == theirs.shape
    assert np.abs(ours.detach().numpy() - theirs).max() <= tolerance * np.abs(theirs).max()


def stored(golden: Any, prefix: str) -> dict[str, Tensor]:
    names = [k for k in golden.files if k.startswith(prefix)]
    values = {k.removeprefix(prefix): torch.from_numpy(golden[k]) for k in names}
    return {k: v.float() if v.is_floating_point() else v for k, v in values.items()}


def volo(config: dict[str, Any], weights: dict[str, Tensor]) -> VOLO:
    """timm's network with the sizes that the release names otherwise, and those of the weights that it has."""
    names = ("layers", "img_size", "num_classes", "stem_hidden_dim", "embed_dims", "num_heads")
    model = VOLO(
        **{name: config[name] for name in names},
        post_layers=config["post_layers"],
        use_aux_head=config.get("return_dense", True),
        global_pool="avg" if config.get("return_mean") else "token",
    )
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def gradients_agree(model: nn.Module, golden: Any, case: str) -> None:
    parameters = dict(model.named_parameters())
    names = golden[f"{case}/pnames"].tolist()
    assert sorted(names) == sorted(parameters)
    gradients = [parameters[name].grad for name in names]
    close(torch.stack([g.sum() for g in gradients]), golden[f"{case}/pgrad_sum"], 1e-4)
    close(torch.stack([g.norm() for g in gradients]), golden[f"{case}/pgrad_l2"], 1e-4)


def run(model: nn.Module, golden: Any, case: str) -> None:
    """Output, and the gradients of the input and of every parameter, in float64."""
    x = torch.from_numpy(golden[f"{case}/x0"]).double().requires_grad_()
    y = model(x)
    close(y, golden[f"{case}/y0"])
    (y * torch.from_numpy(golden[f"{case}/w0"])).sum().backward()
    close(x.grad, golden[f"{case}/gx0"], 1e-4)
    gradients_agree(model, golden, case)


@pytest.mark.parametrize("case", json.loads(str(OPERATORS["meta"]))["cases"])
def test_operators_agree_with_the_published_ones(case):
    sizes = json.loads(str(OPERATORS["meta"]))["cases"][case]
    module = CLASSES.get(case, OutlookAttention)(**sizes)
    module.load_state_dict(stored(OPERATORS, f"{case}/sd/"))
    run(module.double().eval(), OPERATORS, case)


def whole(case: str) -> VOLO:
    config = json.loads(str(WHOLE["meta"]))["cases"][case]
    return volo(config, stored(WHOLE, "eval/sd/")).double().eval()


@pytest.mark.parametrize("case", ["eval", "eval_mean", "eval_cls_only"])
def test_networks_agree_with_the_published_ones(case):
    run(whole(case), WHOLE, case)


def test_positions_are_resized_as_published():
    close(resize_grid(torch.from_numpy(WHOLE["posresize/old"]), (5, 5)), WHOLE["posresize/new"])


def mixed_logits(model: VOLO, x: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """Class and token logits of a training forward under MixToken, which stands outside of the model."""
    scale = model.pooling_scale
    handle = model.patch_embed.register_forward_hook(lambda m, i, tokens: mix(tokens, box * scale, "bchw"))
    features = model.forward_features(x)
    handle.remove()
    height, width = model.pos_embed.shape[1:3]
    return model.head(features[:, 0]), mix(model.aux_head(features[:, 1:]), box, "bnc", (height, width))


def test_mix_token_agrees_with_the_published_training():
    model = whole("train_mixtoken").train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = torch.from_numpy(WHOLE["train_mixtoken/x0"]).double().requires_grad_()
    outputs = mixed_logits(model, x, torch.from_numpy(WHOLE["train_mixtoken/y2"]))
    for i, y in enumerate(outputs):
        close(y, WHOLE[f"train_mixtoken/y{i}"])
    sum((y * torch.from_numpy(WHOLE[f"train_mixtoken/w{i}"])).sum() for i, y in enumerate(outputs)).backward()
    close(x.grad, WHOLE["train_mixtoken/gx0"], 1e-4)
    gradients_agree(model, WHOLE, "train_mixtoken")


def test_mix_token_agrees_with_statistics_of_the_batch_too():
    model = volo(json.loads(str(MIXED["meta"]))["config"], stored(MIXED, "state/"))
    x, box = torch.from_numpy(MIXED["x"]).float(), torch.from_numpy(MIXED["train/bbox"])
    close(model.eval()(x), MIXED["eval/out"])
    classes, tokens = mixed_logits(model.train(), x, box)
    close(classes, MIXED["train/x_cls"])
    close(tokens, MIXED["train/x_aux"])


def test_without_class_token_the_network_agrees_too():
    config = json.loads(str(MIXED["meta"]))["config"] | {
        "post_layers": None,
        "return_dense": False,
        "return_mean": True,
    }
    model = volo(config, stored(MIXED, "mean/state/")).eval()
    close(model(torch.from_numpy(MIXED["x"]).float()), MIXED["mean/out"])


def test_the_distiller_trains_as_published(monkeypatch):
    """With the stored box, its loss is that of the stored logits."""
    box = torch.from_numpy(MIXED["train/bbox"])
    monkeypatch.setattr(token_labeling, "draw_box", lambda grid, device: box)
    student = volo(json.loads(str(MIXED["meta"]))["config"], stored(MIXED, "state/")).train()
    labels = torch.tensor([0, 1, 2, 3])
    losses = distillkit.wrap(student, distillers=[TokenLabeling("labels")])(
        torch.from_numpy(MIXED["x"]).float(), labels
    )
    classes, tokens = torch.from_numpy(MIXED["train/x_cls"]), torch.from_numpy(MIXED["train/x_aux"])
    lam = realised(box, (4, 4))
    assert lam < 1
    wanted = token_label_loss(classes, tokens, smoothed(labels, 6), lam=lam).total
    torch.testing.assert_close(losses["token_labeling"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["TokenLabelGTCrossEntropy", "TokenLabelCrossEntropy"])
def test_the_loss_agrees_with_the_published_one(name):
    arrays = {k: torch.from_numpy(WHOLE[f"loss/{k}"]) for k in ("output", "aux", "target", "target2d", "bbox")}
    truth, image, tokens = arrays["target"][:, :, 0], arrays["target"][:, :, 1], arrays["target"][:, :, 2:].mT
    of_maps = token_label_loss(
        arrays["output"],
        arrays["aux"],
        image,
        tokens,
        ground_truth=truth if "GT" in name else None,
        lam=realised(arrays["bbox"], (3, 3)).double(),
    )
    close(of_maps.total, WHOLE[f"loss/{name}"])
    of_classes = token_label_loss(arrays["output"], arrays["aux"], arrays["target2d"])
    close(of_classes.total, WHOLE[f"loss/{name}_2d"])


@pytest.mark.parametrize("key", COUNTS)
def test_presets_have_the_published_sizes(key):
    name, size = key.split("@")
    expected = COUNTS[key]
    with torch.device("meta"):
        model = timm.create_model(f"{name}_224", img_size=int(size)).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, int(size), int(size)))
    count = sum(p.numel() for p in model.parameters())
    assert count == expected["params"]
    assert count - sum(p.numel() for p in model.aux_head.parameters()) == expected["params_no_aux"]
    assert sum(b.numel() for b in model.buffers()) == expected["buffers"]
    assert len(model.state_dict()) == expected["tensors"]
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected["macs_G"], abs=1e-4)
