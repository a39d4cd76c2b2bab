"""``patchmill run``, ``submit`` and what else goes by a plan, or by the folder of its run."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from launch.cli_options import Json, Smoke, print_result
from shards.errors import UserError

plan_app = typer.Typer()

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run: RUNS/NAME.")]


@plan_app.command()
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
            min=1,
            help="Processes of each training, evaluate and fewshot stage; default: the plan's, else of a training "
            "stage one a GPU.",
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
    from launch.choice import anew, chosen, print_choice, to_do
    from launch.launchers import Launch, print_commands
    from launch.plan import read_plan
    from launch.readable import check_readable
    from launch.run import run_plan
    from launch.slurm import check_idle

    if start is not None and only is not None:
        raise UserError("--from makes all that follows, and --only nothing else; give one of them")
    launch = Launch(launcher, nodes, node_rank, rdzv_endpoint, hostfile and hostfile.absolute(), remote)
    checked = read_plan(plan, runs, smoke, ranks, unsaid=launch.unsaid_ranks(), only=only)
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
        if to_do(checked, names, again):
            launch.follow()
        return
    run_plan(checked, start, only, launch)
    if any(stage.table.kind == "report" for stage in checked.stages if stage.table.name in names):
        from pipeline.report.run import read_run
        from pipeline.report.terminal import print_table

        print_table(read_run(checked.run))
        print(f"report: {checked.run / 'report.html'}")


@plan_app.command()
def doctor(
    plan: Annotated[Path, typer.Argument(metavar="PLAN|RUN", help="Plan file, or folder of a submitted run.")],
    runs: Annotated[Path, typer.Option(help="Folder of runs; this one gets RUNS/NAME.")] = Path("runs"),
    only: Annotated[str | None, typer.Option(metavar="STAGE", help="Look at this stage or sweep alone.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="As you will give `run`; default: the plan's.")] = None,
    as_json: Json = False,
) -> None:
    """Look whether a plan will run here: versions, data, memory, disks, and every rank's clock, arithmetic and network.

    By hand it starts as many ranks as the plan's largest stage, one a GPU or core at most; under a launcher it is one
    of the job's.
    """
    began = time.monotonic()
    from launch.doctor import diagnose, diagnose_together, stages_of
    from launch.findings import Finding, print_result
    from launch.plan import read_plan
    from launch.rankprobe import check_card, started_to_probe
    from launch.submission import read_submitted_plan
    from pipeline import distributed

    if plan.is_dir() and ranks is not None:
        raise UserError(f"--ranks {ranks} is for a plan, and {plan} is a run, whose jobs have theirs; leave it out")

    def tell(findings: list[Finding]) -> None:
        print_result([*findings, Finding("time", "ok", f"looked for {time.monotonic() - began:.1f} s")], as_json)

    checked = read_submitted_plan(plan) if plan.is_dir() else read_plan(plan, runs, ranks=ranks, only=only)
    stages = stages_of(checked, only)
    if "RANK" not in os.environ and (most := max(stage.table.ranks for stage in stages)) > 1:
        findings = diagnose(checked, stages, started_to_probe(most))
        tell(findings)
    else:
        check_card()
        with distributed.together():
            findings = diagnose_together(checked, stages)
            if distributed.rank() == 0:  # before others end with an error, at which a launcher kills the rest
                tell(findings)
    if errors := [each for each in findings if each.state == "error"]:
        if as_json:
            raise UserError(f"the plan will not run here: {'; '.join(f'{each.what}: {each.told}' for each in errors)}")
        raise UserError(f"the plan will not run here: {', '.join(each.what for each in errors)}; see above what to do")


@plan_app.command(hidden=True)
def probe() -> None:
    """Measure what this rank and the others of its job can do; rank 0 prints it. ``doctor`` starts it."""
    from launch.rankprobe import probe_ranks
    from pipeline import distributed

    with distributed.together():
        measured = probe_ranks()
    if distributed.rank() == 0:
        print(json.dumps(measured))


@plan_app.command()
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
    print_result({name: job.id for name, job in jobs.items()}, as_json)
    how = f"patchmill status {shlex.quote(str(checked.run))} --watch" if jobs else "all stages are done"
    print(how, file=sys.stderr)


@plan_app.command()
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


@plan_app.command()
def status(
    run_folder: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until nothing of it goes on.")] = False,
    as_json: Json = False,
) -> None:
    """Tell how the stages of a run are, how far, and why one ended; from the folder alone, and Slurm's queue."""
    from dataclasses import asdict

    from launch.status import print_status, status_of

    if as_json:
        print(json.dumps([asdict(stage) for stage in status_of(run_folder)]))
    else:
        print_status(run_folder, watch)


@plan_app.command()
def logs(
    stage: Annotated[str, typer.Argument(help="Stage, as `patchmill status` names it.")],
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="Folder of the run; default: the newest in ./runs.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Of which rank; the others than 0 say little.")] = 0,
    lines: Annotated[int, typer.Option(min=1, help="So many from the end.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", help="And what comes, until the stage ends, or Ctrl-C.")] = False,
) -> None:
    """Show what a stage said, as a job or under `patchmill run`."""
    from launch.status import newest_run, print_log

    print_log(run_folder or newest_run(Path("runs")), stage, rank, lines, follow)


@plan_app.command()
def cancel(run_folder: RunFolder, as_json: Json = False) -> None:
    """End all jobs of a run; submit its plan again to go on from what they saved."""
    from launch.status import cancel_run

    names = cancel_run(run_folder)
    if as_json:
        print(json.dumps(names))
    else:
        print(f"cancelled: {', '.join(names)}" if names else f"no job of {run_folder} is in the queue")
