"""torchvision's own models as student and teacher, unmodified; and plain regressors that get distributions."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import mobilenet_v2, shufflenet_v2_x0_5, squeezenet1_1
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import distillkit
from distillkit import LD, ClassLogits, FeatureImitation, LogitKD, Main, PixelKD, Teacher, Valuable, to_distribution
from distillkit.adapters import adapter_for, torchvision_dense
from distillkit.adapters.to_distribution import DistributionLayer
from distillkit.adapters.torchvision_rcnn import RegionLogits, RegionTeacher
from distillkit.bench.counting import Dispatched
from distillkit.boxes.fcos import FCOSMain, FCOSValuable
from distillkit.boxes.maps import Maps, Where, where_of
from distillkit.boxes.max_iou import MaxIoUMain, MaxIoUValuable
from distillkit.core.errors import AdapterError, TapError, ViewError
from distillkit.core.side import Reading, Side
from distillkit.core.taps import Place, Taps
from distillkit.core.views import DenseDetections
from distillkit.data.scenes import Scenes

CLASSES = 11  # the background and ten digits
SIZE = 64
DATA = os.environ.get("DISTILLKIT_DATA")


def body(width: float, *layers: int) -> tuple[nn.Module, dict[str, str], list[int]]:
    features = mobilenet_v2(width_mult=width).features
    widths = [features[i].out_channels for i in layers]
    return features, {str(layer): str(i) for i, layer in enumerate(layers)}, widths


def pyramid(width: float, extra: nn.Module, *layers: int) -> BackboneWithFPN:
    return BackboneWithFPN(*body(width, *layers), out_channels=32, extra_blocks=extra)


def dense_pyramid(width: float) -> BackboneWithFPN:
    return pyramid(width, LastLevelP6P7(32, 32), 6, 13, 17)


def fcos(width: float = 0.25, **options) -> FCOS:
    return FCOS(dense_pyramid(width), CLASSES, **{"min_size": SIZE, "max_size": SIZE, "score_thresh": 0.01, **options})


def retinanet(width: float = 0.25, **options) -> RetinaNet:
    return RetinaNet(
        dense_pyramid(width), CLASSES, **{"min_size": SIZE, "max_size": SIZE, "score_thresh": 0.001, **options}
    )


def ssd_body(width: float) -> nn.Module:
    features, layers, widths = body(width, 13, 17)
    getter = IntermediateLayerGetter(features, layers)
    getter.out_channels = widths
    return getter


def ssd(width: float = 0.25) -> SSD:
    return SSD(ssd_body(width), DefaultBoxGenerator([[2], [2, 3]]), (SIZE, SIZE), CLASSES)  # 4 and 6 anchors a cell


def ssdlite(width: float = 0.25) -> SSD:
    backbone, anchors = ssd_body(width), DefaultBoxGenerator([[2, 3], [2, 3]])
    head = SSDLiteHead(backbone.out_channels, anchors.num_anchors_per_location(), CLASSES, nn.BatchNorm2d)
    return SSD(backbone, anchors, (SIZE, SIZE), CLASSES, head=head, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def two_stage(kind: type[FasterRCNN], width: float, **options) -> FasterRCNN:
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 4)
    roi = {"box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 3, 2), "box_batch_size_per_image": 32}
    backbone = pyramid(width, LastLevelMaxPool(), 3, 6, 13)
    sizes = {"min_size": SIZE, "max_size": SIZE}
    return kind(backbone, CLASSES, rpn_anchor_generator=anchors, **{**sizes, **roi, **options})


def faster(width: float = 0.25, **options) -> FasterRCNN:
    return two_stage(FasterRCNN, width, **options)


def mask(width: float = 0.25) -> MaskRCNN:
    return two_stage(MaskRCNN, width, mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 4, 2))


def scene(n: int = 2) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Photographs with digits, as torchvision wants them: label 0 is the background."""
    data = Scenes(n, size=SIZE, extras=True)
    items = [data[(0, i)] for i in range(n)]
    images = [image for image, _ in items]
    return images, [
        {"boxes": t["boxes"], "labels": t["labels"] + 1, "masks": t["masks"].to(torch.uint8)} for _, t in items
    ]


def frozen_norms(model: nn.Module) -> nn.Module:
    """In train mode, with BatchNorm as in eval."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def steps(model, call, n: int = 20, lr: float = 2e-3) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    rows = []
    for _ in range(n):
        losses = model(*call)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        rows.append({k: float(v.detach()) for k, v in {**losses, "total": losses.total}.items() if k != "output"})
    return rows


def mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else list(zip(a, b, strict=True))
    return all(same(x, y) for x, y in pairs)


# ---- every family: unmodified, one training loop, unwrapped


DENSE = {
    "fcos": (fcos, lambda: [LogitKD(Main(), protocol="sigmoid"), FeatureImitation("whole", weight=0.1)]),
    "retinanet": (retinanet, lambda: [LogitKD(MaxIoUMain(), protocol="sigmoid"), FeatureImitation("fine-grained")]),
    "ssd": (ssd, lambda: [LogitKD(Main()), FeatureImitation("boxes", weight=0.1)]),
    "ssdlite": (ssdlite, lambda: [LogitKD(Main())]),
    "faster": (faster, lambda: [LogitKD(), LogitKD(Main(), protocol="sigmoid"), FeatureImitation("boxes")]),
    "mask": (mask, lambda: [LogitKD(weight=2.0), FeatureImitation("whole", weight=0.1)]),
}


@pytest.mark.parametrize("family", DENSE)
def test_a_detector_of_torchvision_learns_from_another(family):
    torch.manual_seed(0)
    make, distillers = DENSE[family]
    student, images = make(0.25), scene()[0]
    untouched = list(make(0.25).state_dict())
    model = distillkit.wrap(student, make(0.35), distillers())
    model.train()
    rows = steps(model, scene())
    assert not model._student_side.unproven
    assert mean(rows[-3:], "total") < 0.9 * mean(rows[:3], "total")
    for distiller in model._named:
        assert rows[0][distiller[0]] > 0
    wrapped = model.eval()(images)
    student = model.unwrap()
    assert list(student.state_dict()) == untouched
    assert type(student).__module__.startswith("torchvision.")
    assert same(student(images), wrapped)
    assert sum(len(row["boxes"]) for row in wrapped)


def test_a_classifier_of_torchvision_learns_from_another():
    torch.manual_seed(0)
    student = shufflenet_v2_x0_5(num_classes=10)
    model = distillkit.wrap(student, squeezenet1_1(num_classes=10), [LogitKD(temperature=4)], criterion=cross_entropy)
    model.train()
    images, targets = scene()
    call = torch.stack(images), torch.stack([t["labels"][0] - 1 for t in targets])
    rows = steps(model, call)
    assert mean(rows[-3:], "total") < mean(rows[:3], "total")
    before = model.eval()(call[0])
    assert torch.equal(model.unwrap()(call[0]), before)
    assert list(student.state_dict()) == list(shufflenet_v2_x0_5(num_classes=10).state_dict())


def test_deeplab_learns_from_another():
    def deeplab(width: float) -> DeepLabV3:
        features, _, (channels,) = body(width, 13)
        return DeepLabV3(IntermediateLayerGetter(features, {"13": "out"}), DeepLabHead(channels, CLASSES))

    torch.manual_seed(0)
    student = deeplab(0.25)
    criterion = lambda output, masks: cross_entropy(output["out"], masks)  # noqa: E731
    model = distillkit.wrap(student, deeplab(0.35), [PixelKD()], criterion=criterion)
    model.train()
    images, targets = scene()
    masks = torch.stack([(t["masks"] * t["labels"][:, None, None]).amax(0).long() for t in targets])
    rows = steps(model, (torch.stack(images), masks), n=20)
    assert mean(rows[-3:], "total") < mean(rows[:3], "total")
    before = model.eval()(torch.stack(images))["out"]
    assert torch.equal(model.unwrap()(torch.stack(images))["out"], before)
    assert list(student.state_dict()) == list(deeplab(0.25).state_dict())


@pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder that holds coco_mini")
def test_photographs_of_coco_of_another_shape():
    from distillkit.data.coco import CocoDetection

    torch.manual_seed(0)
    data = CocoDetection(f"{DATA}/coco_mini", "annotations/val.json")
    items = [data[(0, i)] for i in range(2)]
    images = [image for image, _ in items]
    targets = [{"boxes": t["boxes"], "labels": t["labels"] % (CLASSES - 1) + 1} for _, t in items]
    made = [to_distribution(fcos(width, min_size=128, max_size=160)) for width in (0.25, 0.35)]
    model = distillkit.wrap(*made, [LD(Main()), LD(Valuable())])
    model.train()
    rows = steps(model, (images, targets), n=20)
    assert not model._student_side.unproven
    assert mean(rows[-3:], "total") < mean(rows[:3], "total")


# ---- what is read, and how


def test_targets_are_in_the_pixels_of_the_resized_picture():
    """Pictures twice as large as given: the taps still explain what is predicted, in pixels of the picture given."""
    torch.manual_seed(0)
    images, targets = scene()
    student = fcos(min_size=2 * SIZE, max_size=2 * SIZE)
    model = distillkit.wrap(student, fcos(0.35, min_size=2 * SIZE, max_size=2 * SIZE), [LogitKD(Main())])
    model.train()
    model(images, targets)
    assert not model._student_side.unproven
    found = model._adapter.targets((images, targets), {}, None)
    assert found.sizes == [(2 * SIZE, 2 * SIZE)] * 2
    torch.testing.assert_close(found.boxes[0], 2 * targets[0]["boxes"])


def test_pictures_of_unequal_size_and_maps_that_are_no_whole_multiples():
    """torchvision pads to a multiple of 32, and places the anchors of strides 64 and 128 in fractions of that."""
    torch.manual_seed(0)
    images = [torch.rand(3, 96, 150), torch.rand(3, 140, 100)]
    targets = [{"boxes": torch.tensor([[10.0, 20, 90, 80]]), "labels": torch.tensor([3])} for _ in images]
    for make in (fcos, retinanet):
        model = distillkit.wrap(make(max_size=200), make(0.35, max_size=200), [LogitKD(Main(), protocol="sigmoid")])
        model.train()
        model(images, targets)
        assert not model._student_side.unproven
        assert not model._teacher_sides["teacher"].unproven


def test_sizes_are_those_of_torchvision_and_nothing_is_drawn_for_them():
    for model in (fcos(), fcos(max_size=200), retinanet(), faster(), ssd()):
        adapter, torch_sizes = adapter_for(model), []
        pictures = [torch.rand(3, height, width) for height, width in ((96, 150), (140, 100), (33, 71), (480, 640))]
        torch_sizes = [tuple(model.transform.resize(p)[0].shape[-2:]) for p in pictures]
        before = torch.get_rng_state()
        assert adapter.sizes(pictures) == torch_sizes
        assert torch.equal(torch.get_rng_state(), before)


def test_strides_and_anchors_are_those_that_torchvision_has():
    for model, strides in ((fcos(), (8, 16, 32, 64, 128)), (retinanet(), (8, 16, 32, 64, 128)), (ssd(), (16, 32))):
        assert adapter_for(model).strides == strides
    assert adapter_for(faster()).strides == (4, 8, 16, 32)


def test_an_own_head_that_predicts_otherwise_is_found_out():
    class Larger(FCOS):
        def postprocess_detections(self, *args):
            rows = super().postprocess_detections(*args)
            return [{**row, "boxes": row["boxes"] * 0.9} for row in rows]

    class Surer(FCOS):
        def postprocess_detections(self, *args):
            rows = super().postprocess_detections(*args)
            return [{**row, "scores": row["scores"].sqrt()} for row in rows]

    class Cooler(FasterRCNN):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            inner = self.roi_heads.postprocess_detections
            self.roi_heads.postprocess_detections = lambda logits, *rest: inner(logits * 3, *rest)

    options = {"min_size": SIZE, "max_size": SIZE, "score_thresh": 0.01}
    for kind, message in ((Larger, "Larger does not predict what its layers say"), (Surer, "detector's own scores")):
        model = distillkit.wrap(kind(dense_pyramid(0.25), CLASSES, **options), fcos(), [LogitKD(Main())])
        with pytest.raises(AdapterError, match=message):
            model.train()(*scene())
    model = distillkit.wrap(two_stage(Cooler, 0.25), faster(), [LogitKD()])
    with pytest.raises(AdapterError, match=r"Cooler does not predict what 'roi_heads\.box_predictor' says"):
        model.train()(*scene())


def test_what_does_not_match_is_an_error_that_names_the_knob():
    batch = scene()
    with pytest.raises(ViewError, match=r"min_size= and max_size= \(teacher: min_size=\(128,\).*student: min_size"):
        distillkit.wrap(fcos(), fcos(min_size=128, max_size=128), [LogitKD(Main())]).train()(*batch)
    with pytest.raises(ViewError, match=r"same min_size= and max_size="):
        distillkit.wrap(fcos(), fcos(min_size=128, max_size=128), [FeatureImitation()]).train()(*batch)
    drawn = fcos(min_size=(48, 64))
    with pytest.raises(ViewError, match=r"draws from min_size=\(48, 64\).*your data's transforms"):
        distillkit.wrap(drawn, fcos(), [LogitKD(Main())])
    distillkit.wrap(fcos(), drawn, [LogitKD(Main())]).train()(*batch)  # a teacher takes the last
    anchors = AnchorGenerator(((24,), (48,), (96,), (192,), (384,)), ((0.5, 1.0, 2.0),) * 5)
    other = retinanet(anchor_generator=AnchorGenerator(((16,), (48,), (96,), (192,), (384,)), ((0.5, 1, 2),) * 5))
    with pytest.raises(ViewError, match=r"anchors of stride 8 differ: .*same anchor_generator="):
        distillkit.wrap(retinanet(anchor_generator=anchors), other, [LogitKD(Main())]).train()(*batch)
    with pytest.raises(ViewError, match=r"class logits of every anchor.*LogitKD\(Main\(\)\)"):
        distillkit.wrap(fcos(), fcos(), [LogitKD()])
    with pytest.raises(ViewError, match=r"the student has no edge distributions.*to_distribution\(detector\)"):
        distillkit.wrap(fcos(), fcos(), [LD(Main())]).train()(*batch)
    classifier = squeezenet1_1(num_classes=CLASSES)
    wrapped = distillkit.wrap(classifier, faster(), [LogitKD()], criterion=cross_entropy).train()
    with pytest.raises(ViewError, match="the teacher has class logits of regions"):
        wrapped(torch.stack(batch[0]), torch.tensor([1, 2]))


def test_a_teachers_second_stage_runs_on_the_students_regions_and_its_first_not_at_all():
    torch.manual_seed(0)
    student, teacher = faster(), faster(0.35)
    ran = []
    for name, module in teacher.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    model = distillkit.wrap(student, teacher, [LogitKD(temperature=1)])
    model.train()(*scene())  # the first step proves the teacher, too
    ran.clear()
    losses = model(*scene())
    assert not any(name.startswith("rpn") for name in ran)
    assert ran.count("roi_heads.box_predictor") == 1

    # by hand: the same regions through the teacher's pooling and box head
    side, seen = model._student_side, {}
    inner = side.adapter.view
    side.adapter.view = lambda *args: seen.setdefault("view", inner(*args))
    torch.manual_seed(1)
    losses = model(*scene())
    view = seen["view"]
    with torch.no_grad():
        pictures, _ = teacher.transform(scene()[0])
        pooled = teacher.roi_heads.box_roi_pool(teacher.backbone(pictures.tensors), view.regions, view.sizes)
        wanted, _ = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(pooled))
    kl = nn.functional.kl_div(view.logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses["kd"], kl, rtol=1e-4, atol=1e-6)


def test_several_distillers_have_a_second_stage_run_once_in_the_precision_of_the_step():
    student, teacher = faster(), faster(0.35)
    distillers = [LogitKD(temperature=1, name="a"), LogitKD(temperature=4, name="b")]
    model = distillkit.wrap(student, teacher, distillers).train()
    model(*scene())
    ran = []
    for part in ("box_head", "box_predictor"):
        getattr(teacher.roi_heads, part).register_forward_hook(lambda m, a, out: ran.append(next(tensors_of(out))))
    losses = model(*scene())
    assert [out.dtype for out in ran] == [torch.float32] * 2
    assert losses["a"] > 0
    assert losses["b"] > 0
    ran.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(*scene()).total.backward()
    assert [out.dtype for out in ran] == [torch.bfloat16] * 2


def tensors_of(out):
    """Of a module's output."""
    return iter(out if isinstance(out, tuple) else (out,))


@pytest.mark.parametrize(("make", "name"), [(fcos, "_mean_of_both"), (ssd, "_of_objects")])
def test_scores_are_computed_where_they_are_read_and_nowhere_else(make, name, monkeypatch):
    """Nothing for a distiller that reads class logits; of the anchors of a region where it is weighed by scores."""
    rows, real = [], getattr(torchvision_dense, name)
    monkeypatch.setattr(torchvision_dense, name, lambda *of: (rows.append(of[0].shape), real(*of))[1])
    student, teacher = make(), make(0.35)
    for weight, count in (("one", 0), ("score", 1)):
        distiller = LogitKD(Main(), protocol="sigmoid", anchor_weight=weight)
        model = distillkit.wrap(student, teacher, [distiller]).train()
        model(*scene())  # proves both
        rows.clear()
        losses = model(*scene())
        assert losses.total > 0
        assert len(rows) == count
        assert all(len(shape) == 2 and 0 < shape[0] < 200 for shape in rows), "the main region's anchors alone"
        model.unwrap()
    adapter, caught = adapter_for(student), []
    side = Side("student", student, adapter, [Reading(DenseDetections, None)])
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "dense_view", lambda tensors: caught.append(tensors) or ClassLogits(tensors[0]))
        side.run(scene(), {}, exit_early=False)
    with torch.no_grad(), Dispatched() as ran:
        view = adapter.dense_view(caught[0])
    assert not [op for op in ran.operations if "sigmoid" in op or "softmax" in op]
    counts = view.classes.counts
    chosen = torch.zeros(view.classes.images, sum(counts))
    chosen[0, [0, 7, counts[0] + 1]] = 1
    where, _ = where_of(chosen, counts, view.classes.sizes)
    said = view.classes.all()
    if name == "_of_objects":
        expected = torch.cat([torch.zeros_like(said[..., :1]), said.softmax(-1)[..., 1:]], -1)
    else:
        expected = (said.sigmoid() * Maps(tuple(caught[0][-len(counts) :]), (1,)).all().sigmoid()).sqrt()
    scores = view.scores
    torch.testing.assert_close(scores.all(), expected)
    torch.testing.assert_close(scores.at(where), expected.flatten(0, 1)[view.classes.positions(where)])
    torch.testing.assert_close(scores.at(Where(None)), expected.flatten(0, 1))
    torch.testing.assert_close(scores.largest(), expected.amax(-1).flatten())
    torch.testing.assert_close(Maps(scores.levels, scores.shape, scores.anchors).all(), expected)
    torch.testing.assert_close(scores.only([1]).all(), expected[:, counts[0] : counts[0] + counts[1]])
    assert not scores.all().requires_grad


def test_a_copy_of_the_student_teaches_its_regions_nothing():
    student = frozen_norms(faster())
    model = distillkit.wrap(student, copy.deepcopy(student), [LogitKD()])
    assert model(*scene())["kd"].item() == pytest.approx(0, abs=1e-6)


def test_regions_are_resized_for_a_teacher_that_resizes_differently():
    seen = {}

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.box_head = nn.Linear(1, 2)
            self.box_predictor = lambda logits: (logits, None)

        def box_roi_pool(self, maps, regions, sizes):
            seen.update(maps=maps, regions=regions, sizes=sizes)
            return torch.zeros(sum(len(r) for r in regions), 1)

    regions = [torch.tensor([[0.0, 10, 20, 30]]), torch.tensor([[5.0, 5, 10, 15], [1, 2, 3, 4]])]
    student = RegionLogits(torch.zeros(3, 2), regions, [(50, 100), (40, 40)])
    sizes = [(100, 300), (40, 20)]
    taught = RegionTeacher(torch.empty(0), Heads(), {"0": torch.zeros(2, 1, 4, 4)}, sizes).match(student)
    assert taught.logits.shape == (3, 2)
    assert not taught.logits.requires_grad
    assert seen["regions"][0].tolist() == [[0, 20, 60, 60]]
    assert seen["regions"][1].tolist() == [[2.5, 5, 5, 15], [0.5, 2, 1.5, 4]]
    assert seen["sizes"] is sizes


def test_entries_of_a_dict_and_inputs_are_tapped_too():
    student, images = faster(), scene()[0]
    places = [
        Place(("backbone[0]", "backbone[pool]")),
        Place(("backbone[*]",)),
        Place(("roi_heads.box_roi_pool",), reads="input"),
        Place(("transform",), reads="output"),
    ]
    taps = Taps(student.eval(), places, "student")
    taps.start()
    student(images)
    caught = taps.stop()
    first, pool = taps.read(caught, places[0])
    maps = taps.read(caught, places[1])
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]
    assert first is maps[0]
    assert pool is maps[-1]
    ((features, regions, sizes),) = taps.read(caught, places[2])
    assert features["0"] is maps[0]
    assert len(regions) == 2
    assert sizes == [(SIZE, SIZE)] * 2
    assert taps.read(caught, places[3])[0][0].image_sizes == sizes
    with pytest.raises(TapError, match=r"no entry 'p6', only '0', '1', '2', 'pool'"):
        taps.read(caught, Place(("backbone[p6]",)))
    taps.remove()
    imitation = FeatureImitation(student_at="backbone[pool]", teacher_at="backbone[3]")
    assert distillkit.wrap(faster(), fcos(), [imitation])._student_side.places  # [3] is looked for when it has run


def test_maps_with_other_numbers_of_anchors_on_each_level():
    g = torch.Generator().manual_seed(0)
    levels = (torch.randn(2, 4 * 3, 3, 5, generator=g), torch.randn(2, 6 * 3, 2, 2, generator=g))
    maps = Maps(levels, (3,), (4, 6))
    assert maps.counts == (60, 24)
    every = maps.all()
    assert every.shape == (2, 84, 3)
    torch.testing.assert_close(every[1, 60 + 6 * 2 + 5], levels[1][1, 15:18, 1, 0])
    weight = (torch.rand(2, 84, generator=g) > 0.7).float()
    where, _ = where_of(weight, maps.counts, maps.sizes)
    torch.testing.assert_close(maps.at(where), every.flatten(0, 1)[maps.positions(where)])
    assert weight.flatten()[maps.positions(where)].all()
    assert len(maps.positions(where)) == weight.sum()
    torch.testing.assert_close(maps.largest(), every.amax(-1).flatten())
    torch.testing.assert_close(maps.at(Where(None)), every.flatten(0, 1))
    torch.testing.assert_close(maps.only([1]).all(), every[:, 60:])
    with pytest.raises(ValueError, match=r"level 1: expected \(B, 18, H, W\) for 6 anchor"):
        Maps((levels[0], levels[0]), (3,), (4, 6))


# ---- to_distribution


@pytest.mark.parametrize("bins", [range(-4, 17), [i / 4 for i in range(-12, 13)], range(0, 17)])
def test_the_first_prediction_is_the_old_one(bins):
    """To 1e-3 of the distance of two bins, and above 3 bins inside the support everywhere."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    values, step = torch.tensor(list(bins)), bins[1] - bins[0]
    layer = DistributionLayer(conv, values.float())
    low, high = float(values[0]) + 3 * step, float(values[-1]) - 3 * step
    x = torch.randn(4, 8, 16, 16)
    with torch.no_grad():
        spread = conv(x)
        scale = (high - low) / (spread.max() - spread.min())
        conv.weight *= scale
        conv.bias.copy_((conv.bias - spread.min()) * scale + low)
        old, new = conv(x), DistributionLayer(conv, values.float())(x)
    assert old.min() == pytest.approx(low, abs=1e-3)
    assert old.max() == pytest.approx(high, abs=1e-3)
    assert (new - old).abs().max() < 1e-3 * step
    assert layer.logits(x).shape == (4, 8 * len(values), 16, 16)


def test_the_weights_are_the_closed_form():
    """The softmax of W b / s2 x + b0 b / s2 - b^2 / (2 s2): logits are equal but for what is the same for all bins."""
    torch.manual_seed(0)
    conv, bins, x = nn.Conv2d(3, 4, 1), torch.arange(-4.0, 17), torch.randn(2, 3, 4, 4)
    layer, variance = DistributionLayer(conv, bins), 0.75
    y = conv(x)[:, :, None]
    wanted = (y * bins.view(-1, 1, 1) - bins.view(-1, 1, 1) ** 2 / 2) / variance
    torch.testing.assert_close(
        layer.logits(x).unflatten(1, (4, -1)).softmax(2), wanted.softmax(2), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("make", [fcos, retinanet])
def test_a_detector_predicts_the_same_with_distributions(make):
    torch.manual_seed(0)
    old, images = make().eval(), scene()[0]
    nn.init.normal_(old.head.regression_head.bbox_reg.weight, std=0.1)
    new = to_distribution(old)
    with torch.no_grad():
        before, after = old(images), new(images)
    for a, b in zip(before, after, strict=True):
        assert len(a["boxes"])
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=0.02)
        torch.testing.assert_close(a["scores"], b["scores"])
    assert type(new) is type(old)
    at = "head.regression_head.bbox_reg."
    left, came = set(old.state_dict()) - set(new.state_dict()), set(new.state_dict()) - set(old.state_dict())
    assert left == {f"{at}weight", f"{at}bias"}
    assert came == {f"{at}logits.weight", f"{at}logits.bias", f"{at}bins"}
    assert isinstance(old.head.regression_head.bbox_reg, nn.Conv2d)  # the one that was given stays as it is


@pytest.mark.parametrize(
    ("make", "regions"),
    [
        (fcos, (Main(), Valuable())),
        (fcos, (FCOSMain(), FCOSValuable())),
        (retinanet, (MaxIoUMain(), MaxIoUValuable())),
    ],
)
def test_ld_on_detectors_that_had_no_distributions(make, regions):
    torch.manual_seed(0)
    teacher = make(0.35)
    nn.init.normal_(teacher.head.regression_head.bbox_reg.bias, std=0.5)
    student = to_distribution(make())
    untouched = list(student.state_dict())
    distillers = [LD(region, anchor_weight="one", weight=2.0) for region in regions]
    model = distillkit.wrap(student, to_distribution(teacher), distillers)
    model.train()
    rows = steps(model, scene())
    assert not model._student_side.unproven
    assert not model._teacher_sides["teacher"].unproven
    for name in ("total", "ld_main", "ld_valuable"):
        assert mean(rows[-3:], name) < 0.95 * mean(rows[:3], name)
    images = scene()[0]
    before = model.eval()(images)
    assert same(model.unwrap()(images), before)
    assert list(student.state_dict()) == untouched


def test_numbers_outside_of_the_bins_are_an_error_that_names_them():
    images, _ = scene()
    far = fcos()
    nn.init.constant_(far.head.regression_head.bbox_reg.bias, 20.0)
    with pytest.raises(ValueError, match=r"go from .* to 2.*and its distributions only from -4 to 16.*bins="):
        to_distribution(far).eval()(images)
    to_distribution(far, bins=range(-4, 30)).eval()(images)
    near = fcos()
    nn.init.constant_(near.head.regression_head.bbox_reg.bias, -30.0)
    to_distribution(near).eval()(images)  # a distance below 0 is 0 in FCOS
    retina = retinanet()
    nn.init.constant_(retina.head.regression_head.bbox_reg.bias, -4.0)
    with pytest.raises(ValueError, match=r"only from -3 to 3.*bins="):
        to_distribution(retina).eval()(images)


def test_objects_outside_of_the_bins_are_an_error_that_names_them():
    student, teacher = to_distribution(retinanet()), to_distribution(retinanet())
    tiny = [{"boxes": torch.tensor([[10.0, 10, 10.5, 10.5]]), "labels": torch.tensor([1])} for _ in range(2)]
    model = distillkit.wrap(student, teacher, [LD(MaxIoUMain())])
    with pytest.raises(ValueError, match=r"the boxes of target 0: .*from -3 to 3.*bins="):
        model.train()(scene()[0], tiny)
    sizes = {"min_size": 4000, "max_size": 4000}
    adapter = adapter_for(to_distribution(fcos(**sizes), bins=range(-4, 10)))
    whole = [{"boxes": torch.tensor([[0.0, 0, SIZE, SIZE]]), "labels": torch.tensor([1])}]
    with pytest.raises(ValueError, match=r"the boxes of target 0: .*to 15\.6.*bins="):
        adapter.targets((scene()[0][:1], whole), {}, None)


def test_trained_weights_are_not_taken_for_the_old_layers():
    """After training the logits of two bins tell nothing of a number: whatever they are, nothing is said."""
    torch.manual_seed(0)
    layer = DistributionLayer(nn.Conv2d(3, 4, 1), torch.arange(-4.0, 17))
    with torch.no_grad():
        layer.logits.weight.normal_(std=50)
    x = torch.randn(1, 3, 8, 8)
    assert bool((layer(x) <= 16).all())
    copied = copy.deepcopy(layer)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(x), layer(x))


def test_what_is_trained_is_not_looked_at_any_more(monkeypatch):
    layer, x = DistributionLayer(nn.Conv2d(3, 4, 1), torch.arange(-4.0, 17)), torch.randn(1, 3, 8, 8)
    looked = []
    monkeypatch.setattr(DistributionLayer, "_due", lambda self, device: looked.append(device) or True)
    layer(x)
    layer(x)
    with torch.no_grad():
        layer.logits.weight.normal_()
    for _ in range(3):
        layer(x)
    assert len(looked) == 3  # the third found other weights


def test_an_accelerator_is_waited_for_at_calls_1_2_4_8(monkeypatch):
    """The extremes are kept there meanwhile: the fifteenth call meets 20, the sixteenth tells of it."""
    due = DistributionLayer._due
    monkeypatch.setattr(DistributionLayer, "_due", lambda self, device: due(self, torch.device("cuda")))
    conv = nn.Conv2d(1, 4, 1, bias=False)
    nn.init.ones_(conv.weight)
    layer, x = DistributionLayer(conv, torch.arange(-4.0, 17)), torch.ones(1, 1, 2, 2)
    layer(x)
    with Dispatched() as counted:
        for _ in range(7):
            layer(x)
    assert counted.syncs["Tensor.tolist"] == 3  # 2, 4 and 8
    for _ in range(6):
        layer(x)
    layer(20 * x)
    with pytest.raises(ValueError, match="to 20, and its distributions only from -4 to 16"):
        layer(x)  # the sixteenth


def test_bins_and_layers_that_cannot_be():
    for bins, message in (
        ([0, 1, 2, 3], "at least 7 increasing"),
        (range(17, 0, -1), "increasing"),
        ([0, 1, 2, 3, 4, 5, 6, 8, 16], "evenly apart"),
        (range(-4, 5), r"bins go from -4 to 4.*reach beyond 8"),
        (range(2, 17), "begin at 0 or below"),
    ):
        with pytest.raises(ValueError, match=message):
            to_distribution(fcos(), bins=bins)
    with pytest.raises(ValueError, match=r"SSD: its last regression layer is not known.*layer="):
        to_distribution(ssd())
    with pytest.raises(ValueError, match="no such module"):
        to_distribution(ssd(), bins=range(17), layer="head.nothing")
    with pytest.raises(ValueError, match="no convolution of 4 channels"):
        to_distribution(ssd(), bins=range(17), layer="head.classification_head")
    with pytest.raises(ValueError, match="bins= must say"):
        to_distribution(ssd(), layer="head.regression_head")
    with pytest.raises(ValueError, match="distribution head already"):
        to_distribution(to_distribution(fcos()))


def test_a_detector_of_ones_own_by_the_path_of_its_layer():
    """l, t, r, b in strides from the middle of a cell, read by DistributionHead afterwards."""
    from distillkit.boxes.anchors import grid_points
    from distillkit.boxes.distribution import decode

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.ReLU())
            self.kinds, self.sides = nn.Conv2d(16, 3, 1), nn.Conv2d(16, 4, 1)
            nn.init.constant_(self.sides.bias, 3.0)

        def forward(self, images, targets=None):
            x = self.body(torch.stack(images))
            scores, sides = self.kinds(x).flatten(2), self.sides(x).flatten(2).transpose(1, 2)
            if self.training:
                return {"kinds": scores.square().mean(), "sides": (sides - 2).square().mean()}
            points = grid_points([x.shape[2:]], [8], 0.5, x.device)
            best, labels = scores.sigmoid().max(1)
            rows = zip(decode(points, sides * 8), best, labels, strict=True)
            return [{"boxes": b, "scores": s, "labels": n} for b, s, n in rows]

    torch.manual_seed(0)
    bins = range(0, 9)
    head = distillkit.DistributionHead(classes="kinds", edges="sides.logits", strides=(8,), bins=list(bins), centre=0.5)
    student, teacher = (to_distribution(Own(), bins=bins, layer="sides") for _ in range(2))
    model = distillkit.wrap(student, Teacher(teacher, adapter=head), [LD(Main())], adapter=head)
    rows = steps(model.train(), scene(), lr=1e-2)
    assert mean(rows[-3:], "total") < mean(rows[:3], "total")
    assert not model._student_side.unproven


def test_class_logits_of_whole_pictures_are_still_read_by_path():
    torch.manual_seed(0)
    view = adapter_for(faster()).view(faster(), ClassLogits, [torch.zeros(3, CLASSES)], None)
    assert type(view) is ClassLogits
