"""``patchmill train``, ``convert``, ``evaluate`` and what else is done with one model."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launch.cli_options import Json, Smoke, print_result
from pipeline.settings import View
from shards.errors import UserError

model_app = typer.Typer()

Average = Annotated[bool, typer.Option("--ema", help="The moving average of the weights, which optim.ema keeps.")]
ViewOption = Annotated[
    View, typer.Option(help="The whole image, squeezed; its middle; or the middle of it all, squeezed to 8/7.")
]


@model_app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Settings of one training stage: a TOML file, or a recipe's name.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as optim.lr=1e-3.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/CONFIG.")] = None,
    smoke: Smoke = False,
    as_json: Json = False,
) -> None:
    """Run one training stage, alone or as one rank of a job (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."""
    from pipeline import distributed
    from pipeline.config import TrainSettings
    from pipeline.recipe import read_settings
    from pipeline.settings import check, override

    table, about = read_settings(config)
    table = override(table, settings or [])
    if smoke:
        from pipeline.smoke import smoke_run

        with distributed.together():
            print_result(smoke_run(table, about, str(config), out), as_json)
        return
    from pipeline.weights import check_model

    checked = check(TrainSettings, table, str(config))
    checked.accumulation(distributed.world_size())  # before ranks wait for each other
    check_model(checked, str(config))
    folder = out or Path("runs") / config.stem
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)

    from pipeline.train import train as run_training

    try:
        with distributed.together(), distributed.alone_in(folder):
            print_result(run_training(checked, folder), as_json)
    except UserError:
        with suppress(OSError):  # it holds something
            if new:
                folder.rmdir()
        raise


@model_app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint, training stage, or weights of any known format.")],
    destination: Annotated[Path, typer.Argument(help="File to write; of transformers a folder.")],
    to: Annotated[str, typer.Option(help="Format: safetensors (timm's names), transformers, or npz.")] = "safetensors",
    checkpoint: Annotated[str, typer.Option(help="Of a stage's folder: latest or best.")] = "latest",
    ema: Average = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="For images of this side, in pixels.")] = None,
    resize: Annotated[str, typer.Option(help="How positions get there: official zoom or bicubic.")] = "official",
    classes: Annotated[
        str | None, typer.Option(help="Classes: a number (0: no head; another: a new one), or a file of names.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the values: float32, bfloat16 or float16.")] = "float32",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="What SOURCE does not tell of its model, as num_heads=6."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model to another format, size, head or dtype, with a proof that it stays the same and a card."""
    if checkpoint not in ("latest", "best"):
        raise UserError(f"there is no checkpoint pointer {checkpoint!r}; give latest or best")
    from pipeline.convert.convert import convert as run_conversion

    print_result(
        run_conversion(source, destination, to, checkpoint, ema, image_size, resize, classes, dtype, settings), as_json
    )


@model_app.command()
def evaluate(
    weights: Annotated[Path, typer.Argument(help="Weights in any format, checkpoint, or a training stage's folder.")],
    data: Annotated[str, typer.Argument(help="Data set.")],
    batch: Annotated[int, typer.Option(min=1, help="Images a rank takes at once.")] = 64,
    view: ViewOption = "resize",
    short: Annotated[
        int | None, typer.Option(min=1, help="Short side that the middle is cut of, pixels; default: 8/7 of it.")
    ] = None,
    ema: Average = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for predictions.parquet and tables of classes, confusion, calibration.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate every image of a data set exactly once, on any number of ranks."""
    from pipeline import distributed
    from pipeline.convert.recognise import load_model
    from pipeline.evaluate.classify import check_classes, check_labelled
    from pipeline.evaluate.predict import predict
    from pipeline.evaluate.scores import Scores
    from pipeline.writable import make_writable
    from shards.augment import TRANSFORMS, CenterCrop
    from shards.dataset import Dataset

    if short is not None and view != "center_crop":
        raise UserError(f"--short {short} is of --view center_crop, and the view is {view}; leave one out")
    dataset = Dataset.open(data)
    model, classes = load_model(weights, ema)
    check_classes(model, classes, dataset)
    check_labelled(dataset)
    side = model.image_size
    if short is not None and short < side:
        raise UserError(f"--short {short} is less than the {side} pixels that the model sees; give {side} or more")
    transform = CenterCrop(side, short) if short else TRANSFORMS[view](side)
    with distributed.together():
        folder = out if distributed.rank() == 0 else None
        if folder:
            make_writable(folder)
        found = predict(model.to(distributed.device()), dataset, transform, batch, distributed.cores_each())
        scores = Scores(found, dataset)
        print_result(scores.summary(), as_json)  # which is not lost where no more can be written
        if folder:
            scores.write(folder)


@model_app.command()
def fewshot(
    weights: Annotated[Path, typer.Argument(help="Weights in any format, checkpoint, or a training stage's folder.")],
    train: Annotated[str, typer.Argument(help="Data set to take the shots from.")],
    test: Annotated[str, typer.Argument(help="Data set to test on.")],
    shots: Annotated[str, typer.Option(help="Images a class, comma-separated.")] = "1,5,10,25",
    knn: Annotated[
        int | None, typer.Option(min=1, help="Ask so many nearest training images, too; 20 is usual.")
    ] = None,
    linear: Annotated[
        bool, typer.Option("--linear", help="Linear probing, too: logistic regression on every training image.")
    ] = False,
    view: ViewOption = "resize_center_crop",
    ema: Average = False,
    as_json: Json = False,
) -> None:
    """Closed-form linear accuracy of frozen features, next to the same on raw pixels; on any number of ranks."""
    numbers = [int(text) for text in shots.split(",") if text.strip().isdigit()]
    if len(numbers) < len(shots.split(",")) or min(numbers) < 1:
        raise UserError(f"--shots {shots!r} are no numbers of images; write them like 1,5,10")
    from pipeline import distributed
    from pipeline.convert.recognise import load_model
    from pipeline.evaluate.frozen import frozen_features_accuracy
    from shards.dataset import Dataset

    model, _ = load_model(weights, ema)
    with distributed.together():
        sets = Dataset.open(train), Dataset.open(test)
        print_result(frozen_features_accuracy(model, *sets, numbers, knn, linear, view), as_json)


@model_app.command()
def estimate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG|RECIPE|PLAN [KEY=VALUE]...", help="Settings of a stage, a recipe, or a plan; and overrides."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model in place of a file; KEY=VALUE are its settings.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of --model: length of a training.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes, instead of asking data set or recipe.")] = None,
    epoch: Annotated[
        int | None, typer.Option(min=1, help="Samples an epoch, instead of asking data set or recipe.")
    ] = None,
    image_bytes: Annotated[
        int | None, typer.Option(min=1, help="Mean size of an image in the shards, instead of asking the data set.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Ranks, one a GPU: tells memory too. A plan's stages have their own.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Kind of GPU, as h100: tells what fits, images a second and days too.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPUs' peak arithmetic that is assumed.")
    ] = 0.4,
    as_json: Json = False,
) -> None:
    """Tell what a model or training stages will cost: parameters, arithmetic, memory, disk and time."""
    from launch.estimate import estimates, print_estimates

    size = {"classes": classes, "epoch": epoch, "image_bytes": image_bytes}
    found = estimates(arguments or [], model, samples, gpus=gpus, gpu=gpu, utilisation=utilisation, **size)
    print(json.dumps(found)) if as_json else print_estimates(found, Console().width if sys.stdout.isatty() else None)


@model_app.command()
def figures(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, folder of a training stage, or weights.")],
    images: Annotated[
        str | None, typer.Option(help="Data set, folder of images, or an image: attention is of what is seen.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write NAME.png into.")] = Path("figures"),
    ema: Average = False,
    as_json: Json = False,
) -> None:
    """Draw what a model learned: filters, positions, attention distance, attention rollout, hidden patches."""
    from pipeline.figures.write import write_figures

    print_result(write_figures(checkpoint, out, images, ema), as_json)


@model_app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or of training stages run by hand.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Page to write; default: RUN/report.html, of several runs report.html here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page: accuracies, curves, figures, lineage, settings; several runs over each other."""
    from pipeline.report.page import write_page
    from pipeline.report.run import read_run, reading
    from pipeline.report.terminal import print_table

    found = [read_run(folder) for folder in runs]
    page = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    with reading(*runs):
        write_page(found, page)
    if as_json:
        print_result({"report": str(page)}, True)
        return
    for each in found:
        with reading(each.folder):
            print_table(each)
    print(f"report: {page}")


@model_app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Of one recipe, to see it whole.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run it, or all of them, shrunk to seconds, here.")] = False,
    as_json: Json = False,
) -> None:
    """List the recipes of the paper and others, or show one with its command and where it comes from."""
    from launch.recipes import as_dict, in_order, print_recipe, print_table, run_smoke_forms
    from pipeline.recipe import read_recipe, recipe_names

    found = in_order([read_recipe(each) for each in ([name] if name else recipe_names())])
    if smoke:
        run_smoke_forms(found, as_json)
    elif as_json:
        listed = [as_dict(recipe) for recipe in found]
        print(json.dumps(listed[0] if name else listed))
    elif name:
        print_recipe(found[0])
    else:
        print_table(found, Console().width if sys.stdout.isatty() else None)
