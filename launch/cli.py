"""The command line: stdout is for results, stderr for progress.

Exit codes: 0 done, 2 a user's mistake, 75 stopped on request with everything saved, 1 anything else.
"""

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from launch.cli_checkpoint import checkpoint_app
from launch.cli_shards import Json, shards_app
from shards.errors import PatchmillError, StoppedOnRequestError, UserError

# Torch takes seconds to import, so each command imports what it needs.

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Mill images into patches, and patches into pre-trained Vision Transformers.")  # fmt: skip
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")

Smoke = Annotated[
    bool, typer.Option("--smoke", help="Shrink depth, width, resolution, batch and steps to a run of seconds.")
]

Average = Annotated[bool, typer.Option("--ema", help="The moving average of the weights, which optim.ema keeps.")]


View = Annotated[
    Literal["resize", "center_crop", "resize_center_crop"],
    typer.Option(help="The whole image, squeezed; its middle; or the middle of it all, squeezed to 8/7."),
]


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs; this one gets RUNS/NAME.")] = Path("runs"),
    start: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Make this stage or sweep anew, and all that follows.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run this stage or sweep alone; what it needs must be there.")
    ] = None,
    smoke: Smoke = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the plan and what it reads, and tell what would run.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes of each training, evaluate and fewshot stage; default: the plan's, else one a GPU."
        ),
    ] = None,
    launcher: Annotated[str, typer.Option(help="What starts them: local, torchrun, accelerate, deepspeed.")] = "local",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes (torchrun, accelerate): give the same command on each of them ...")
    ] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="... with its own number, from 0 ...")] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="... and node 0 with a free port of it.")
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Nodes of deepspeed: lines like node1 slots=8.")] = None,
    remote: Annotated[str | None, typer.Option(help="How deepspeed reaches them: pdsh (default) or openmpi.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print what would be started, node by node.")] = False,
) -> None:
    """Run a plan on this machine; finished stages are skipped, interrupted ones go on. --smoke: in RUNS/NAME-smoke."""
    from launch.choice import anew, chosen, is_done, print_choice
    from launch.launchers import Launch, print_commands
    from launch.plan import read_plan
    from launch.readable import check_readable
    from launch.run import run_plan
    from launch.slurm import check_idle

    if start is not None and only is not None:
        raise UserError("--from makes all that follows, and --only nothing else; give one of them")
    launch = Launch(launcher, nodes, node_rank, rdzv_endpoint, hostfile and hostfile.absolute(), remote)
    checked = read_plan(plan, runs, smoke, ranks, unsaid=launch.unsaid_ranks())
    names = chosen(checked, only)
    again = anew(checked, start)
    launch.check([stage for stage in checked.stages if stage.table.name in names])
    check_readable(checked, names, again)
    if dry_run:
        print_choice(checked, names, again)
        return
    if print_only:
        print_commands(launch, checked, names)
        return
    check_idle(checked.run)
    if launch.follows():
        if not all(is_done(stage) for stage in checked.stages if stage.table.name in names):
            launch.follow()
        return
    run_plan(checked, start, only, launch)
    if any(stage.table.kind == "report" for stage in checked.stages if stage.table.name in names):
        from pipeline.report.run import read_run
        from pipeline.report.terminal import print_table

        print_table(read_run(checked.run))
        print(f"report: {checked.run / 'report.html'}")


@app.command()
def doctor(
    plan: Annotated[Path, typer.Argument(metavar="PLAN|RUN", help="Plan file, or folder of a submitted run.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs; this one gets RUNS/NAME.")] = Path("runs"),
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Look at this stage or sweep alone.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="As you will give `run`; default: the plan's.")] = None,
    as_json: Json = False,
) -> None:
    """Look whether a plan will run here: versions, data, memory, disks, and every rank's clock, arithmetic and network.

    By hand it starts as many ranks as the plan's largest stage; under a launcher it is one of the job's.
    """
    from launch.doctor import diagnose, stages_of
    from launch.findings import print_result
    from launch.plan import read_plan
    from launch.rankprobe import check_card, probe_ranks, started_to_probe
    from launch.submission import read_submitted_plan
    from pipeline import distributed

    if plan.is_dir() and ranks is not None:
        raise UserError(f"--ranks {ranks} is for a plan, and {plan} is a run, whose jobs have theirs; leave it out")
    checked = read_submitted_plan(plan) if plan.is_dir() else read_plan(plan, runs, ranks=ranks)
    stages = stages_of(checked, only)
    if "RANK" not in os.environ and (most := max(stage.table.ranks for stage in stages)) > 1:
        findings = diagnose(checked, stages, started_to_probe(most))
        print_result(findings, as_json)
    else:
        check_card()
        with distributed.together():
            measured = probe_ranks()
            findings = distributed.everyone(diagnose(checked, stages, measured) if distributed.rank() == 0 else [])[0]
            if distributed.rank() == 0:  # before others end with an error, at which a launcher kills the rest
                print_result(findings, as_json)
    if errors := [each for each in findings if each.state == "error"]:
        if as_json:
            raise UserError(f"the plan will not run here: {'; '.join(f'{each.what}: {each.told}' for each in errors)}")
        raise UserError(f"the plan will not run here: {', '.join(each.what for each in errors)}; see above what to do")


@app.command(hidden=True)
def probe() -> None:
    """Measure what this rank and the others of its job can do; rank 0 prints it. ``doctor`` starts it."""
    from launch.rankprobe import probe_ranks
    from pipeline import distributed

    with distributed.together():
        measured = probe_ranks()
    if distributed.rank() == 0:
        print(json.dumps(measured))


@app.command()
def submit(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    cluster: Annotated[
        Path | None, typer.Option(help="Profile of the cluster, a TOML file; without, Slurm's defaults hold.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs; this one gets RUNS/NAME.")] = Path("runs"),
    smoke: Smoke = False,
    as_json: Json = False,
) -> None:
    """Submit a plan to Slurm: a job for each stage that is not finished, chained; they come back by themselves."""
    from launch.cluster import Cluster
    from launch.plan import read_plan
    from launch.readable import check_readable
    from launch.slurm import submit as submit_plan

    profile = Cluster(cluster)
    checked = read_plan(plan.absolute(), runs, smoke)
    check_readable(checked, {stage.table.name for stage in checked.stages})
    jobs = submit_plan(checked, profile)
    _print({name: job.id for name, job in jobs.items()}, as_json)
    how = f"patchmill status {shlex.quote(str(checked.run))} --watch" if jobs else "all stages are done"
    print(how, file=sys.stderr)


@app.command()
def manifest(
    plan: Annotated[Path, typer.Argument(help="Plan file, as the pods find it, too.")],
    cluster: Annotated[Path, typer.Option(help="Profile of the cluster, a TOML file: image, volumes, GPUs a node.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs, likewise; this one gets RUNS/NAME.")] = Path("runs"),
    smoke: Smoke = False,
) -> None:
    """Print a plan as a Kubernetes manifest, a JobSet: for `kubectl apply -f -`, or a file."""
    from launch.cluster import Cluster
    from launch.kubernetes import manifest as text_of
    from launch.plan import read_plan

    print(text_of(read_plan(plan, runs, smoke), Cluster(cluster, of="Kubernetes"), plan, runs), end="")


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: RUNS/NAME.")]


@app.command()
def status(
    run_folder: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until no job is in the queue.")] = False,
    as_json: Json = False,
) -> None:
    """Tell how the stages of a run are, how far, and why one ended; from the folder alone, and Slurm's queue."""
    from dataclasses import asdict

    from launch.status import print_status, status_of

    if as_json:
        print(json.dumps([asdict(stage) for stage in status_of(run_folder)]))
    else:
        print_status(run_folder, watch)


@app.command()
def logs(
    stage: Annotated[str, typer.Argument(help="Stage, as `patchmill status` names it.")],
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run; default: the newest in ./runs.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Of which rank; the others than 0 say little.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="So many from the end.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", help="And what comes, until Ctrl-C.")] = False,
) -> None:
    """Show what a stage said as a job."""
    from launch.status import newest_run, print_log

    print_log(run_folder or newest_run(Path("runs")), stage, rank, lines, follow)


@app.command()
def cancel(run_folder: RunFolder, as_json: Json = False) -> None:
    """End all jobs of a run; submit its plan again to go on from what they saved."""
    from launch.status import cancel_run

    names = cancel_run(run_folder)
    if as_json:
        print(json.dumps(names))
    else:
        print(f"cancelled: {', '.join(names)}" if names else f"no job of {run_folder} is in the queue")


@app.command()
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
            _print(smoke_run(table, about, str(config), out), as_json)
        return
    from pipeline.weights import check_model

    checked = check(TrainSettings, table, str(config))
    checked.accumulation(distributed.world_size())  # before ranks wait for each other
    check_model(checked, str(config))
    folder = out or Path("runs") / config.stem
    folder.mkdir(parents=True, exist_ok=True)

    from pipeline.train import train as run_training

    with distributed.together(), distributed.alone_in(folder):
        _print(run_training(checked, folder), as_json)


@app.command()
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

    _print(
        run_conversion(source, destination, to, checkpoint, ema, image_size, resize, classes, dtype, settings), as_json
    )


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Argument(help="Weights in any format, checkpoint, or a training stage's folder.")],
    data: Annotated[str, typer.Argument(help="Data set.")],
    batch: Annotated[int, typer.Option(min=1, help="Images a rank takes at once.")] = 64,
    view: View = "resize",
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
        found = predict(model.to(distributed.device()), dataset, transform, batch, distributed.cores_each())
        scores = Scores(found, dataset)
        if out and distributed.rank() == 0:
            scores.write(out)
        _print(scores.summary(), as_json)


@app.command()
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
    view: View = "resize_center_crop",
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
        _print(frozen_features_accuracy(model, *sets, numbers, knn, linear, view), as_json)


@app.command()
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


@app.command()
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

    _print(write_figures(checkpoint, out, images, ema), as_json)


@app.command()
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
    from pipeline.report.run import read_run
    from pipeline.report.terminal import print_table

    found = [read_run(folder) for folder in runs]
    page = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_page(found, page)
    if as_json:
        _print({"report": str(page)}, True)
        return
    for each in found:
        print_table(each)
    print(f"report: {page}")


@app.command()
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


def _print(result: dict[str, Any], as_json: bool) -> None:
    """Print a command's result once, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(result))
        return
    table = Table(show_header=False)
    for key, value in result.items():
        table.add_row(key, _shown(value))
    Console().print(table)


def _shown(value: Any) -> str:
    """Return a value for people: numbers short, those of a table or a list in a line, a table of tables in several."""
    if isinstance(value, dict):
        apart = "\n" if any(isinstance(each, dict) for each in value.values()) else "  "
        return apart.join(f"{key}{':' * key.isdigit()} {_shown(each)}" for key, each in value.items())
    if isinstance(value, list) and value:
        return ", ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the command line; a known error is one line on stderr and its exit code."""
    end(run_command())


class _Asked(BaseException):
    """A command was asked to stop; nothing on the way that handles errors takes it for one."""


def _stop(number: int, frame: FrameType | None) -> None:
    _listen(signal.SIG_IGN)  # once is enough: what is being finished is not to be stopped, too
    raise _Asked("stopped on request")


def _listen(handler: Any) -> None:
    # To one of several ranks a SIGTERM may say no more than that another has failed: it is left to end it.
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in (signal.SIGUSR1, signal.SIGUSR2, *([signal.SIGTERM] if alone else [])):
        signal.signal(number, handler)


def run_command() -> int | str:
    """Run the command line; return its exit code, after a known error is told.

    SIGUSR1, SIGUSR2 and, where there are no other ranks, SIGTERM end a command wherever it is, as Ctrl-C does: files
    appear whole, and what is finished stays. Training, and what starts ranks, listen for themselves.
    """
    _listen(_stop)
    try:
        app()
    except PatchmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _Asked:
        print("error: stopped on request; what is finished stays, run again to go on", file=sys.stderr)
        return StoppedOnRequestError.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as exited:
        return exited.code or 0
    finally:
        _listen(signal.SIG_IGN)  # it is over: nobody is to take that for a crash
    return 0


def end(code: int | str) -> NoReturn:
    """End this process, which may be a rank."""
    if distributed := sys.modules.get("pipeline.distributed"):
        distributed.end_process(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
