"""`distillkit search`: the space is learned, a network is found in it, and the recipe that trains it is written.

    OUTPUT/NAME-search/search.yaml    the recipe, with every default
                       space/         last.pt, space.jsonl
                       space.json     the learned space, in the published form
                       space.png      its losses, and how dense the best cells are, by round
                       supernet/      its training, as that of any job
                       networks.jsonl, fitness.png, front.png    the search in the space
                       network.json   the network that was found, in the published form
                       recipe.yaml    trains it: `distillkit run OUTPUT/NAME-search/recipe.yaml`

Every part goes on where an earlier call stopped, and is left as it is once it is done.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import yaml
from rich.console import Console

from distillkit import recipe as recipes
from distillkit.models.autospace_cells import NONE
from distillkit.models.autospace_network import LearnedSpace, read_space, write_network, write_space
from distillkit.schema import ClassificationRecipe, Recipe
from distillkit.search.autospace.nas import find_network, judged_batches, train_supernet
from distillkit.search.autospace.networks import NetworkSpace
from distillkit.search.autospace.space import Learning, learn_space
from distillkit.search.log import SearchError
from distillkit.search.plots import plot_space
from distillkit.training import checkpoint
from distillkit.training.build import build_classes, build_data
from distillkit.training.folder import alone_in
from distillkit.training.label import WAIT
from distillkit.training.processes import processes


def search(recipe: Recipe, console: Console, fresh: bool = False, command: str = "the same command") -> Path:
    """Do what the recipe's ``search`` says; returns the folder.

    Raises:
        SearchError: the recipe has no ``search``, or the folder holds another one. ValueError: the space file.
    """
    if not isinstance(recipe, ClassificationRecipe) or recipe.search is None:
        raise SearchError(f"recipe {recipe.name}: has no key search; `distillkit run` trains what it describes")
    state = processes(WAIT)
    shown = console if state.is_main_process else Console(quiet=True)
    torch.set_num_threads(recipe.train.threads or torch.get_num_threads())
    folder = Path(recipe.output) / f"{recipe.name}-search"
    if not state.is_main_process:
        state.wait_for_everyone()
        _networks(recipe, read_space(folder / "space.json"), folder, shown, command)
        return folder
    with alone_in(folder):
        _open(folder, recipe, fresh)
        space = _space(recipe, folder, shown)
        state.wait_for_everyone()
        _networks(recipe, space, folder, shown, command)
    return folder


def _open(folder: Path, recipe: ClassificationRecipe, fresh: bool) -> None:
    """Make the folder, or check that it holds a search of the same recipe."""
    record, now = folder / "search.yaml", recipes.resolved(recipe)
    there = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if there and not record.exists():
        raise SearchError(
            f"{folder} is not empty and holds no search.yaml: not a search; choose another name or output"
        )
    if fresh:
        for path in there:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif record.exists():
        before, after = (_reading(yaml.safe_load(text)) for text in (record.read_text(encoding="utf-8"), now))
        changed = [key for key in after if before.get(key) != after[key]]
        if changed:
            raise SearchError(
                f"{folder} holds a search of another recipe (changed: {', '.join(changed)}): start over with --fresh, "
                "or give this one another name, as in name=second"
            )
    checkpoint.write_text(record, now)


def _reading(raw: dict) -> dict:
    """What of a recipe a search reads, but for what may be different when it goes on."""
    search, data = raw["search"], {key: value for key, value in raw["data"].items() if key != "workers"}
    nas = {key: value for key, value in (search["nas"] or {}).items() if key not in ("evaluator", "workers")}
    parts = {f"search.{key}": search[key] for key in ("network", "space")}
    return {"seed": raw["seed"], "data": data, **parts, **{f"search.nas.{key}": value for key, value in nas.items()}}


# -- the space --------------------------------------------------------------------------------------------------------


def _space(recipe: ClassificationRecipe, folder: Path, console: Console) -> LearnedSpace:
    assert recipe.search is not None
    search, path = recipe.search, folder / "space.json"
    macro = search.network.macro()
    if search.space.file is not None:
        write_space(path, read_space(search.space.file))
    elif not path.exists():
        data = build_data(recipe, "train", augmented=True)
        learning = Learning(
            macro=macro,
            data=data,
            classes=len(build_classes(recipe).classes),
            side=recipe.data.size[0],
            batch=recipe.data.batch,
            workers=recipe.data.workers,
            seed=recipe.seed,
            how=search.space,
            folder=folder / "space",
        )
        write_space(path, learn_space(learning, console))
        plot_space(folder / "space" / "space.jsonl", folder / "space.png")
    space = read_space(path)
    console.print(f"space: {path}, {len(space)} layers; {said_edges(space)}", highlight=False, soft_wrap=True)
    return space


def said_edges(space: LearnedSpace) -> str:
    """How dense its cells are, the references left out: the share of skip edges (0->2, 1->3) that there are."""
    learned = [cell for cells in space for cell in cells[:-3]]
    skips = [op for cell in learned for op in (cell.ops[1], cell.ops[3])]
    if not skips:
        return "reference cells alone"
    present = sum(op != NONE for op in skips) / len(skips)
    return f"{len(learned)} learned cells, {100 * present:.0f} % of their skip edges used (reference cells: 0 %)"


# -- the network ------------------------------------------------------------------------------------------------------


def _networks(recipe: ClassificationRecipe, cells: LearnedSpace, folder: Path, console: Console, command: str) -> None:
    assert recipe.search is not None
    how = recipe.search.nas
    if how is None:
        return
    classes, side = len(build_classes(recipe).classes), recipe.data.size[0]
    space = NetworkSpace(recipe.search.network.macro(), cells, how.kernels, how.expands, classes, side)
    if space.madds(space.smallest()) > how.madds:
        raise SearchError(
            f"search.nas.madds is {how.madds}; the smallest network of {folder / 'space.json'} has "
            f"{space.madds(space.smallest())} multiply-adds"
        )
    judged = judged_batches(build_data(recipe, "val", augmented=False))
    supernet = train_supernet(
        space,
        how,
        build_data(recipe, "train", augmented=True),
        judged,
        folder / "supernet",
        console,
        seed=recipe.seed,
        batch=recipe.data.batch,
        workers=recipe.data.workers,
        resume=command,
    )
    found = find_network(space, how, supernet, judged, folder / "networks.jsonl", console, recipe.seed)
    if processes().is_main_process:
        network = space.network(found.best.genome)
        write_network(folder / "network.json", network)
        checkpoint.write_text(
            folder / "recipe.yaml", recipes.resolved(training_recipe(recipe, folder / "network.json"))
        )
        parameters, madds = network.costs(side)
        console.print(
            f"network: {folder / 'network.json'}, {parameters / 1e6:.2f} M parameters, {madds / 1e6:.1f} M "
            f"multiply-adds, top-1 {100 * found.best.fitness:.1f} % with the supernet's weights; train it with: "
            f"distillkit run {folder / 'recipe.yaml'}",
            highlight=False,
            soft_wrap=True,
        )


def training_recipe(recipe: ClassificationRecipe, network: Path) -> ClassificationRecipe:
    """The recipe without its search, whose student is the network of a file: teacher, distillers and all else stay."""
    options = {**recipe.student.options, "network": str(network)}  # type: ignore[union-attr]
    student = recipe.student.model_copy(update={"options": options})
    return recipe.model_copy(update={"student": student, "search": None})
