"""`virtio-bdev bench`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from virtio.device.base import SMALL_BYTES
from virtio_bdev import Bdev, bench
from virtio_bdev.bdev import human
from virtio_bdev.channel import Wait
from virtio_bdev.cli import report
from virtio_bdev.cli.options import SIZE, choose, device_options, progress
from virtio_bdev.config import BdevSpec
from virtio_bdev.verify import How, verify

_SHALLOW = 32  # an iodepth up to which small queues are faster
_LEAVE_S = 0.1  # to stop a device, after Ctrl-C: it may be one that does not answer
# What --verify has no use for.
_OF_BENCH = {*bench.Job.__dataclass_fields__, "numjobs", "as_json", "earlier", "plot"}
_OF_BENCH -= {"bs", "offset", "size", "seed"}


@click.command()
@device_options
@click.option("--bdev", "disk_name", help="Name of the disk, where there are several.")
@click.option(
    "--rw",
    type=click.Choice(get_args(bench.Pattern)),
    default="randread",
    show_default=True,
    help="What to do: read, write, or both, in sequence or at random places.",
)
@click.option(
    "--rwmixread",
    type=click.IntRange(0, 100),
    default=50,
    show_default=True,
    help="Percent of reads, of rw and randrw.",
)
@click.option("--bs", type=SIZE, default="4k", show_default=True, help="Bytes of a request.")
@click.option("--iodepth", type=click.IntRange(1), default=32, show_default=True, help="Requests in flight.")
@click.option(
    "--numjobs",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="So many at once, each in a thread of its own, on a queue of its own.",
)
@click.option("--offset", type=SIZE, default="0", help="Byte of the disk to begin at.")
@click.option("--size", type=SIZE, help="Bytes to stay within; to the disk's end unless given.")
@click.option(
    "--runtime",
    type=click.FloatRange(0, bench.LONGEST_S, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds to go on for.",
)
@click.option(
    "--ramp",
    type=click.FloatRange(0, bench.LONGEST_S),
    default=0.0,
    help="Seconds before that, which are not counted.",
)
@click.option(
    "--wait",
    type=click.Choice(get_args(Wait)),
    default="adaptive",
    show_default=True,
    help="For an answer: spin, spin a moment and then sleep, or sleep.",
)
@click.option(
    "--random-distribution",
    default="random",
    metavar="random|zipf[:THETA]|pareto[:SHARE]",
    show_default=True,
    help="Which places random requests go to more often: none, by Zipf's law (THETA 1.1 unless given), or "
    "a SHARE by Pareto's (0.2).",
)
@click.option(
    "--rate-iops",
    type=click.FloatRange(0, bench.FASTEST, min_open=True),
    help="Requests a second of each job, reads and writes together, at even intervals; as many as there can "
    "be unless given.",
)
@click.option(
    "--iodepth-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Requests that are submitted together, when there is room for so many.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="The same seed gives the same places.")
@click.option("--busy", is_flag=True, help="Also tell how long the driver itself takes for a request.")
@click.option(
    "--verify",
    "verifies",
    type=click.Choice(get_args(How)),
    help="Write every block once and read it back, instead: whether what was written is there, by "
    "all its bytes or by a checksum.",
)
@click.option(
    "--verify-only", is_flag=True, help="Only read back what the same --verify and --seed have written."
)
@click.option("--yes", is_flag=True, help="Overwrite the disk without asking.")
@click.option("--json", "as_json", is_flag=True, help="As fio prints it.")
@click.option(
    "--compare",
    "earlier",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With the output of an earlier --json, or fio's.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Draw latencies, and the rate over time, into FILE.svg or FILE.png.",
)
def command(
    spec: BdevSpec,
    disk_name: str | None,
    numjobs: int,
    wait: Wait,
    verifies: How | None,
    verify_only: bool,
    yes: bool,
    as_json: bool,
    earlier: Path | None,
    plot: Path | None,
    **how: Any,
) -> None:
    """Measure a disk behind ADDRESS: requests a second, and how long each takes.

    All but read and randread overwrite the disk with random bytes. Ctrl-C ends it, and shows what was
    measured until then. Unless --queue-size is given, a queue is as small as an --iodepth of up to 32 allows,
    and unless --queues is, there are as many as --numjobs takes.
    """
    job = bench.Job(**how)
    if verifies or verify_only:
        _refuse_others(click.get_current_context())
        if verify_only and (verifies is None or job.seed is None):
            raise click.UsageError("--verify-only wants --verify and the --seed it was written with")
    elif as_json and earlier:
        raise click.UsageError(
            "--compare adds lines, which would not go with --json: compare its output later"
        )
    else:
        _refuse_idle(click.get_current_context(), job)
    if spec.queues is None and numjobs > len(os.sched_getaffinity(0)):
        spec = replace(spec, queues=numjobs)
    before = None if earlier is None else report.Earlier.load(earlier)
    draw = None if plot is None else report.plotter(plot)
    small = not verifies and job.iodepth <= _SHALLOW and job.bs <= SMALL_BYTES
    with spec.attach(depth=job.iodepth if small else None) as controller:
        bdev = choose(controller, disk_name)
        if job.writes or (verifies and not verify_only):
            bdev.check(job.offset, job.bs, write=True)
            if not yes:
                _ask(bdev)
        if verifies:
            _verify(bdev, wait, spec.timeout, job, verifies, verify_only)
        else:
            _measure(bdev, wait, spec.timeout, job, numjobs, as_json, before, draw)


def _measure(
    bdev: Bdev,
    wait: Wait,
    timeout: float,
    job: bench.Job,
    numjobs: int,
    as_json: bool,
    before: report.Earlier | None,
    draw: report.Plotter | None,
) -> None:
    history: report.History = []
    with report.live(job.ramp, job.runtime) as tell:

        def follow(seconds: float, requests: int) -> None:
            history.append((seconds, requests))
            tell(seconds, requests)

        results = bench.run_jobs(bdev, job, numjobs, wait=wait, timeout=timeout, progress=follow)
    lines = list(report.lines(bdev, results))
    if as_json:
        json.dump(report.fio(results), sys.stdout, indent=2)
        print()
    else:
        print(*lines, *(before.compare(bdev, results) if before else ()), sep="\n")
    if draw is not None and any(result.requests for result in results):
        titles = [line.partition(", latency")[0] for line in lines if ", latency" in line]
        draw("\n".join(titles), results, history)
    if results[0].interrupted:
        bdev.controller.close(_LEAVE_S)
        raise click.Abort


def _given(context: click.Context, names: set[str]) -> list[str]:
    """Those of these options that somebody has given."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and context.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
    ]


def _refuse_others(context: click.Context) -> None:
    """What was given of options that verification has no use for."""
    if given := _given(context, _OF_BENCH):
        raise click.UsageError(f"--verify measures nothing: {', '.join(given)} does not go with it")


def _refuse_idle(context: click.Context, job: bench.Job) -> None:
    """What was given and would do nothing."""
    idle = [] if job.mixed else _given(context, {"rwmixread"})
    if not job.rw.startswith("rand"):
        idle += _given(context, {"random_distribution"})
    if idle:
        raise click.UsageError(f"--rw {job.rw} has no use for {', '.join(idle)}")


def _verify(bdev: Bdev, wait: Wait, timeout: float, job: bench.Job, how: How, only: bool) -> None:
    size = bdev.size - job.offset if job.size is None else job.size
    total = size if only else 2 * size
    with bdev.open(wait=wait, timeout=timeout) as channel, progress("verifying", total) as advance:
        found = verify(
            channel,
            bs=job.bs,
            offset=job.offset,
            size=job.size,
            seed=job.seed,
            how=how,
            write=not only,
            progress=advance,
        )
    rates = (found.nbytes / 2**20 / max(1e-9, took) for took in (found.write_seconds, found.read_seconds))
    write, read = rates
    wrote = "" if only else f"written in {write:,.1f} MiB/s, "
    print(
        f"{bdev.name}: {found.blocks:,} blocks of {human(job.bs)} {wrote}read back in "
        f"{read:,.1f} MiB/s and verified"
    )


def _ask(bdev: Bdev) -> None:
    """Go on only if whoever is at the terminal says so."""
    words = f"{bdev.name} at {bdev.controller.address}, {human(bdev.size)}, will be overwritten"
    if not sys.stdin.isatty():
        raise click.UsageError(f"{words}: --yes says that this is wanted")
    if not click.confirm(f"{words}. Go on?", err=True):
        raise click.ClickException("nothing was written")
