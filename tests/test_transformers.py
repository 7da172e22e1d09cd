"""Models of transformers as they come: what is read of them, what distils them, and its Trainer."""

import copy
import json
import os
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import distillkit
from distillkit import FeatureImitation, LogitKD, PixelKD, QueryDetections, QueryKD, QueryLD, Teacher
from distillkit.boxes.queries import corners, decode_around, moved_around
from distillkit.core.errors import AdapterError, ViewError, WrapError
from distillkit.core.result import OUTPUT
from distillkit.core.taps import is_tapped
from distillkit.distillers.logit_kd import binary_divergence
from distillkit.losses.iou import giou_loss
from distillkit.losses.queries import box_distances, partners

transformers = pytest.importorskip("transformers", reason='pip install "distillkit[transformers]"')

from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers.loss.loss_d_fine import weighting_function  # noqa: E402

from distillkit.adapters.transformers import support  # noqa: E402
from distillkit.integrations.transformers import REST, Distilled  # noqa: E402
from tests import hugging_models as tiny  # noqa: E402

# ---- unmodified models

PAIRS = {
    "vit": (tiny.vit, {"width": 48}, "class", lambda: [LogitKD(), FeatureImitation(**both("vit.layers.1"))]),
    "resnet": (tiny.resnet, {"width": 16}, "class", lambda: [LogitKD(temperature=4)]),
    "convnext": (tiny.convnext, {"width": 16}, "class", lambda: [LogitKD()]),
    "swin": (tiny.swin, {"width": 16}, "class", lambda: [LogitKD()]),
    "bert": (tiny.bert, {"width": 48}, "text", lambda: [LogitKD(), FeatureImitation(**both("bert.encoder.layer.1"))]),
    "segformer": (tiny.segformer, {"width": 16}, "masks", lambda: [PixelKD()]),
    "detr": (tiny.detr, {"queries": 15}, "objects", lambda: [QueryKD()]),
    "rt_detr": (tiny.rt_detr, {"queries": 15, "layers": 3}, "objects", lambda: [QueryKD()]),
    "d_fine": (tiny.d_fine, {"queries": 15, "layers": 3}, "objects", lambda: [QueryKD(), QueryLD()]),
}


def both(path: str) -> dict[str, str]:
    return {"student_at": path, "teacher_at": path}


def made(build, **options) -> nn.Module:
    torch.manual_seed(len(options))
    return build(**options)


def trained(model, call, steps: int, what=lambda losses: losses.total) -> list[float]:
    """One batch over and over: the loss in each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    values = []
    for _ in range(steps):
        loss = what(model(**call))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@lru_cache
def trained_d_fine() -> nn.Module:
    """A teacher whose boxes are near objects: those of random weights are nowhere near the student's."""
    teacher = made(tiny.d_fine, queries=15, layers=3).train()
    trained(teacher, tiny.batch("objects"), 25, lambda output: output.loss)
    return teacher


@pytest.mark.parametrize("name", PAIRS)
def test_an_unmodified_model_learns_from_another_and_comes_back_as_it_was(name):
    build, larger, kind, distillers = PAIRS[name]
    student, call = made(build), tiny.batch(kind)
    teacher = copy.deepcopy(trained_d_fine()) if name == "d_fine" else made(build, **larger)
    keys = list(student.state_dict())
    model = distillkit.wrap(student, teacher, distillers()).train()
    totals = trained(model, call, 20)
    losses = model(**call)
    assert list(losses) == ["task", *(d.name for d in model.distillers.values()), OUTPUT]
    torch.testing.assert_close(losses["task"], losses[OUTPUT]["loss"])
    assert sum(totals[-3:]) < sum(totals[:3])
    model.eval()
    call.pop("labels")
    with torch.no_grad():
        before = model(**call)
        same = model.unwrap()
        after = same(**call)
    assert same is student
    assert list(same.state_dict()) == keys
    assert not any(is_tapped(module) for module in same.modules())  # transformers puts hooks of its own
    for key in ("logits", "pred_boxes"):
        if key in before:
            assert torch.equal(before[key], after[key])


DATA = os.environ.get("DISTILLKIT_DATA")


@pytest.mark.skipif(not DATA, reason="set DISTILLKIT_DATA to the folder that holds coco_mini")
def test_d_fine_learns_from_pictures_of_coco():
    from distillkit.data.coco import read_coco
    from distillkit.data.detection import PictureDetection
    from distillkit.data.transforms import Resize

    split = read_coco(Path(DATA) / "coco_mini", "annotations/val.json")
    data = PictureDetection(split, Resize(tiny.SIDE))
    pictures, labels = [], []
    for i in range(3):
        picture, target = data[(0, i)]
        first, last = target["boxes"].split(2, 1)
        boxes = torch.cat([(first + last) / 2, last - first], 1) / tiny.SIDE
        pictures.append(picture)
        labels.append({"class_labels": target["labels"] % tiny.CLASSES, "boxes": boxes})
    model = distillkit.wrap(made(tiny.d_fine), made(tiny.d_fine, queries=15, layers=3), [QueryKD()]).train()
    totals = trained(model, {"pixel_values": torch.stack(pictures), "labels": labels}, 20)
    assert sum(totals[-3:]) < sum(totals[:3])


@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_queries_come_to_say_what_those_of_the_teacher_say(name):
    build, larger, kind, distillers = PAIRS[name]
    model = distillkit.wrap(made(build), made(build, **larger), distillers()).train()
    taught = trained(model, tiny.batch(kind), 10, lambda losses: losses["query_kd"])
    assert taught[-1] < 0.8 * taught[0]


def test_distributions_come_to_say_what_those_of_the_teacher_say():
    student, teacher = made(tiny.d_fine), made(tiny.d_fine)  # of the same boxes, but for what is changed here
    for head in teacher.model.decoder.bbox_embed:
        nn.init.normal_(head.layers[-1].bias, generator=torch.Generator().manual_seed(0))
    student.requires_grad_(False)
    student.model.decoder.bbox_embed.requires_grad_(True)
    model = distillkit.wrap(student, teacher, [QueryLD()]).train()
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=2e-2)
    taught = []
    for _ in range(12):
        loss = model(**tiny.batch("objects"))["query_ld"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taught.append(loss.item())
    assert taught[-1] < 0.8 * taught[0]


@pytest.mark.parametrize(("student", "teacher"), [("rt_detr", "d_fine"), ("yolos", "detr")])
def test_teacher_and_student_may_be_detectors_of_different_kinds(student, teacher):
    pair = made(getattr(tiny, student)), made(getattr(tiny, teacher), queries=15)
    losses = distillkit.wrap(*pair, [QueryKD()]).train()(**tiny.batch("objects"))
    losses.total.backward()
    assert losses["query_kd"] > 0


def test_the_teacher_gets_all_of_the_call_but_the_labels():
    student, teacher = made(tiny.detr), made(tiny.detr, queries=15)
    seen = {}
    teacher.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    call = tiny.batch("objects") | {"pixel_mask": torch.ones(4, tiny.SIDE, tiny.SIDE)}
    distillkit.wrap(student, teacher, [QueryKD()]).train()(**call)
    assert set(seen) == {"pixel_values", "pixel_mask"}


def test_attention_weights_are_features_of_models_that_compute_them():
    path = "bert.encoder.layer.1.attention.self[1]"
    student, teacher = (made(tiny.bert, attn_implementation="eager", width=w) for w in (32, 48))
    losses = distillkit.wrap(student, teacher, [FeatureImitation(**both(path))]).train()(**tiny.batch("text"))
    assert losses["imitation"] > 0
    student, teacher = made(tiny.bert), made(tiny.bert, width=48)
    with pytest.raises(ViewError, match='load the model with attn_implementation="eager"'):
        distillkit.wrap(student, teacher, [FeatureImitation(**both(path))])


def test_a_teacher_of_another_package_is_fed_the_pictures():
    import timm

    teacher = Teacher(
        timm.create_model("test_resnet", num_classes=tiny.CLASSES),
        feed=lambda args, kwargs: ((kwargs["pixel_values"],), {}),
    )
    losses = distillkit.wrap(made(tiny.vit), teacher, [LogitKD()]).train()(**tiny.batch("class"))
    assert losses["kd"] > 0


# ---- queries


def queries(count: int, seed: int = 0, images: int = 2, classes: int = 4, exclusive: bool = False, **more):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, count, classes + exclusive, generator=g)
    centre, side = torch.rand(2, images, count, 2, generator=g)
    return QueryDetections(logits, torch.cat([centre, 0.1 + 0.4 * side], -1), exclusive, **more)


def with_edges(view: QueryDetections, seed: int, layers: int = 2, bins: int = 9) -> QueryDetections:
    g = torch.Generator().manual_seed(seed)
    shape = (*view.boxes.shape, bins)
    edges = tuple(2 * torch.randn(shape, generator=g) for _ in range(layers))
    shift = 0.02 * torch.randn(view.boxes.shape, generator=g)
    bins_at = torch.linspace(-0.5, 0.5, bins)
    return QueryDetections(view.logits, view.boxes, view.exclusive, edges, view.boxes + shift, bins_at)


def in_another_order(view: QueryDetections) -> QueryDetections:
    order = torch.randperm(view.boxes.shape[1], generator=torch.Generator().manual_seed(3))
    edges = view.edges and tuple(e[:, order] for e in view.edges)
    reference = None if view.reference is None else view.reference[:, order]
    return QueryDetections(view.logits[:, order], view.boxes[:, order], view.exclusive, edges, reference, view.support)


def cost(student: QueryDetections, teacher: QueryDetections, pairs) -> torch.Tensor:
    """Of the first picture; pairs of (student's query, teacher's)."""
    total = 0
    for mine, theirs in pairs:
        confidence, label = teacher.scores[0, theirs].max(0)
        l1, giou = box_distances(student.boxes[0, mine], teacher.boxes[0, theirs])
        total += confidence * (1 - student.scores[0, mine, label] + 5 * l1 + 2 * giou)
    return total


def pairs_of(index: torch.Tensor) -> list[tuple[int, int]]:
    return [(mine, theirs) for mine, theirs in enumerate(index.tolist()) if theirs >= 0]


@pytest.mark.parametrize("exclusive", [False, True])
def test_no_other_assignment_costs_less(exclusive):
    student, teacher = queries(5, 0, exclusive=exclusive), queries(5, 1, exclusive=exclusive)
    index = partners(student.scores, student.boxes, teacher.scores, teacher.boxes)
    assert sorted(index[0].tolist()) == list(range(5))
    best = min(cost(student, teacher, enumerate(p)) for p in permutations(range(5)))
    torch.testing.assert_close(cost(student, teacher, pairs_of(index[0])), best)


def test_of_more_queries_than_the_student_has_the_most_confident_speak():
    student, teacher = queries(3, 0), queries(7, 1)
    index = partners(student.scores, student.boxes, teacher.scores, teacher.boxes)
    surest = teacher.confidence[0].topk(3).indices
    assert set(index[0].tolist()) == set(surest.tolist())


def test_of_fewer_queries_than_the_student_has_each_speaks_to_one():
    student, teacher = queries(7, 0), queries(3, 1)
    view = teacher.match(student)
    assert view.logits.shape == student.logits.shape
    assert view.paired.sum(1).tolist() == [3, 3]
    assert torch.equal(view.confidence > 0, view.paired)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_loss_is_nothing_of_a_teacher_that_says_the_same_in_another_order(exclusive):
    student = with_edges(queries(6, exclusive=exclusive), 2, layers=1)
    same, other = in_another_order(student), with_edges(queries(6, 1, exclusive=exclusive), 3)
    for distiller in (QueryKD(), QueryLD()):
        assert distiller(student, same.match(student), None).abs() < 1e-6
        assert distiller(student, other.match(student), None) > 1e-3


def test_query_kd_is_its_formula():
    student, teacher = queries(4, 0), queries(4, 1)
    index = partners(student.scores, student.boxes, teacher.scores, teacher.boxes)
    above = below = 0.0
    for image in range(2):
        for mine, theirs in pairs_of(index[image]):
            weight = teacher.logits[image, theirs].sigmoid().max()
            classes = binary_divergence(student.logits[image, mine], teacher.logits[image, theirs], 2.0).sum()
            a, b = student.boxes[image, mine], teacher.boxes[image, theirs]
            overlap = giou_loss(corners(a)[None], corners(b)[None])[0]
            above += weight * (3 * classes + 4 * (a - b).abs().sum() + 5 * overlap)
            below += weight
    loss = QueryKD(temperature=2.0, classes=3, l1=4, giou=5)(student, teacher.match(student), None)
    torch.testing.assert_close(loss, above / below)


def test_the_loss_of_a_batch_repeated_is_the_same():
    def of(repeats: int) -> list[torch.Tensor]:
        student, teacher = with_edges(queries(5, 0), 2), with_edges(queries(6, 1), 3)
        many = [
            QueryDetections(
                v.logits.repeat(repeats, 1, 1),
                v.boxes.repeat(repeats, 1, 1),
                False,
                tuple(e.repeat(repeats, 1, 1, 1) for e in v.edges),
                v.reference.repeat(repeats, 1, 1),
                v.support,
            )
            for v in (student, teacher)
        ]
        return [d(many[0], many[1].match(many[0]), None) for d in (QueryKD(), QueryLD())]

    torch.testing.assert_close(of(1), of(3))


def test_gradients_reach_what_the_student_says_and_nothing_of_the_teacher():
    student, teacher = with_edges(queries(5, 0), 2), with_edges(queries(5, 1), 3)
    mine = [student.logits, student.boxes, *student.edges]
    theirs = [teacher.logits, teacher.boxes, *teacher.edges]
    for tensor in (*mine, *theirs):
        tensor.requires_grad_()
    matched = teacher.match(student)
    (QueryKD()(student, matched, None) + QueryLD()(student, matched, None)).backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in mine)
    assert all(tensor.grad is None for tensor in theirs)


def test_a_distribution_seen_from_another_box_means_the_same_place():
    g = torch.Generator().manual_seed(0)
    view = with_edges(queries(5), 1, bins=17)
    mass = view.edges[0].softmax(-1)
    there, within = moved_around(mass, view.support, view.reference, view.support, view.reference)
    torch.testing.assert_close(there, mass)
    assert within.all()
    other = view.reference + 0.01 * torch.randn(view.reference.shape, generator=g)
    finer = torch.linspace(-2, 2, 65)
    moved, within = moved_around(mass, view.support, view.reference, finer, other)
    assert within.all()
    torch.testing.assert_close(moved.sum(-1), torch.ones_like(moved.sum(-1)))
    torch.testing.assert_close(
        decode_around(other, moved.log(), finer), decode_around(view.reference, mass.log(), view.support)
    )


def test_an_edge_that_the_student_has_no_bin_for_is_left_out():
    student = with_edges(queries(1, images=1), 2)
    far = torch.tensor([[[0.4, 0.0, 0.0, 0.0]]]) * 4  # to the right by more than half a width, the last bin
    teacher = with_edges(queries(1, images=1), 3)
    there = QueryDetections(
        teacher.logits, teacher.boxes, False, teacher.edges, teacher.reference + far, teacher.support
    )
    _, within = moved_around(
        there.edges[0].softmax(-1), there.support, there.reference, student.support, student.reference
    )
    assert within[0, 0].tolist() == [False, True, False, True]
    for layer in student.edges:
        layer.requires_grad_()
    QueryLD()(student, there.match(student), None).backward()
    reached = [bool(rows.abs().sum()) for rows in student.edges[0].grad[0, 0]]
    assert reached == [False, True, False, True]


def test_query_views_that_cannot_be_compared_say_what_to_do():
    student, detr = queries(4), queries(4, exclusive=True)
    with pytest.raises(ValueError, match="use classes=0, which learns the boxes alone"):
        QueryKD()(student, detr.match(student), None)
    assert QueryKD(classes=0)(student, detr.match(student), None) > 0
    with pytest.raises(ValueError, match="the teacher has 3 classes, the student 4"):
        queries(4, classes=3).match(student)
    with pytest.raises(ValueError, match="the student's queries have boxes and no distributions"):
        QueryLD()(student, student.match(student), None)
    with pytest.raises(ValueError, match="not all 0"):
        QueryKD(classes=0, l1=0, giou=0)
    with pytest.raises(ValueError, match="temperature must be at least 1"):
        QueryLD(temperature=0.5)
    with pytest.raises(ViewError, match="'pred_boxes' of queries in its output, got logits"):
        distillkit.wrap(made(tiny.vit), made(tiny.vit, width=48), [QueryKD()]).train()(**tiny.batch("class"))


# ---- D-FINE


def test_the_bins_of_d_fine_mean_what_transformers_decodes():
    decoder = made(tiny.d_fine).model.decoder
    theirs = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale) / decoder.reg_scale
    torch.testing.assert_close(support(decoder), theirs)


def test_queries_for_denoising_are_left_out():
    model = distillkit.wrap(made(tiny.d_fine), made(tiny.d_fine, queries=15, layers=3), [QueryLD()]).train()
    views = []
    model.distillers["query_ld"].register_forward_pre_hook(lambda m, args: views.extend(args[:2]))
    output = model(**tiny.batch("objects"))[OUTPUT]
    assert output["logits"].shape[1] > 12  # those of the objects with noise, and then the student's own
    student, teacher = views
    assert torch.equal(student.logits, output["logits"][:, -12:])
    assert torch.equal(student.boxes, output["pred_boxes"][:, -12:])
    assert [tuple(e.shape) for e in student.edges] == [(4, 12, 4, 33)] * 2
    assert len(teacher.edges) == 1  # in eval mode the last layer's alone
    decoded = decode_around(student.reference, student.edges[-1], student.support)
    torch.testing.assert_close(decoded, corners(student.boxes), atol=1e-5, rtol=0)


def test_distributions_that_do_not_explain_the_boxes_are_refused(monkeypatch):
    monkeypatch.setattr("distillkit.adapters.transformers.support", lambda decoder: 2 * support(decoder))
    teacher = made(tiny.d_fine, queries=15)
    for head in teacher.model.decoder.bbox_embed:
        nn.init.normal_(head.layers[-1].bias)
    model = distillkit.wrap(made(tiny.d_fine), teacher, [QueryLD()]).train()
    with pytest.raises(AdapterError, match="teacher: the distributions in the model's output do not explain its boxes"):
        model(**tiny.batch("objects"))


# ---- in the Trainer


class DistilledTrainer(Distilled, Trainer):
    pass


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: values[i] for name, values in tiny.batch("class").items()}


def arguments(folder: Path, **options) -> TrainingArguments:
    options = {"max_steps": 4, "logging_steps": 2, "save_steps": 2, "learning_rate": 1e-2, **options}
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to=[],
        lr_scheduler_type="constant",
        **options,
    )


def wrapped() -> distillkit.core.wrap.DistilledModel:
    distillers = [LogitKD(weight=0.5), FeatureImitation(**both("vit.layers.1"))]  # of unequal width: it has parameters
    return distillkit.wrap(made(tiny.vit), made(tiny.vit, width=48), distillers)


def test_the_trainer_logs_each_loss_evaluates_the_student_and_saves_it(tmp_path):
    trainer = DistilledTrainer(
        model=wrapped(),
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=4, gradient_accumulation_steps=2),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    student = trainer.model.student
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2
    for row in logs:
        parts = {name for name in row if name.startswith("loss/")}
        assert parts == {"loss/task", "loss/kd", "loss/imitation"}
        assert row["loss"] == pytest.approx(sum(row[name] for name in parts), rel=1e-4)
    (evaluated,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    call = tiny.batch("class")
    with torch.no_grad():
        expected = student.eval()(**call)
    assert evaluated["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert evaluated["eval_accuracy"] == (expected.logits.argmax(-1) == call["labels"]).float().mean()
    saved = type(student).from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(a, b) for a, b in zip(saved.state_dict().values(), student.state_dict().values()))
    assert json.loads((tmp_path / "checkpoint-4" / "config.json").read_text())["hidden_size"] == 32
    rest = torch.load(tmp_path / "checkpoint-4" / REST, weights_only=True)
    assert set(rest) == {"step", "distillers.imitation.projections.0.weight", "distillers.imitation.projections.0.bias"}
    assert rest["step"] == 8  # calls, of which two are accumulated


def test_accumulated_gradients_are_those_of_the_batch_in_one(tmp_path):
    def weights(**sizes) -> list[torch.Tensor]:
        args = arguments(tmp_path, max_steps=1, save_strategy="no", optim="sgd", **sizes)
        args.per_device_train_batch_size = 4 // args.gradient_accumulation_steps
        trainer = DistilledTrainer(model=wrapped(), args=args, train_dataset=Rows())
        trainer.train()
        return [p.detach().clone() for p in trainer.model.parameters()]

    before = [p.detach().clone() for p in wrapped().parameters()]
    whole, halves = weights(), weights(gradient_accumulation_steps=2)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(whole, before))
    torch.testing.assert_close(whole, halves, atol=1e-5, rtol=1e-3)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path):
    whole = DistilledTrainer(model=wrapped(), args=arguments(tmp_path / "a"), train_dataset=Rows())
    whole.train()
    again = wrapped()
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1.0)  # what is loaded counts
    trainer = DistilledTrainer(model=again, args=arguments(tmp_path / "b"), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.step == whole.model.step == 4
    for (name, a), b in zip(whole.model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)
    (tmp_path / "a" / "checkpoint-2" / REST).unlink()
    with pytest.raises(WrapError, match="no checkpoint of a distilling Trainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))


def test_the_best_student_is_loaded_at_the_end(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=0.5)
    trainer = DistilledTrainer(model=wrapped(), args=args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    best = type(trainer.model.student).from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), trainer.model.student.parameters()))


def test_what_a_trainer_cannot_train_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(WrapError, match="expected a wrapped model, got ViTForImageClassification"):
        DistilledTrainer(model=made(tiny.vit), args=args)
    student, teacher = made(tiny.vit), made(tiny.vit, width=48)
    with_criterion = distillkit.wrap(student, teacher, [LogitKD()], criterion=lambda o, y: cross_entropy(o.logits, y))
    with pytest.raises(WrapError, match="leave out criterion="):
        DistilledTrainer(model=with_criterion, args=args)
    smoothing = copy.copy(args)
    smoothing.label_smoothing_factor = 0.1
    for options in ({"args": smoothing}, {"args": args, "compute_loss_func": lambda *a, **k: None}):
        with pytest.raises(WrapError, match="replace the losses of a wrapped model"):
            DistilledTrainer(model=wrapped(), **options)
