"""What `virtio-bdev bench` shows: lines, fio's JSON, a comparison with an earlier run, a plot."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import msgspec

from virtio_bdev.bdev import human
from virtio_bdev.bench import Result, merged
from virtio_bdev.cli.options import SIZE

if TYPE_CHECKING:
    from virtio.ring.load import Histogram
    from virtio_bdev import Bdev

History = list[tuple[float, int]]  # seconds since the start, requests a second until then
Plotter = Callable[[str, list[Result], History], None]

_SHOWN = (50, 99, 99.9)  # percentiles
_MOST_BYTES = 64 << 20  # of an earlier result
_NINES = 5  # a plot's last mark: 99.999 %
_ALIKE = ("rw", "bs", "iodepth", "rwmixread", "random_distribution", "rate_iops")  # of loads to compare


def lines(bdev: Bdev, results: list[Result]) -> Iterator[str]:
    """One for all jobs together, or for reads and for writes where there are both."""
    job, several = results[0].job, len(results) > 1
    in_flight = f"{job.iodepth} in flight" + (f" on each of {len(results)} queues" if several else "")
    seen = _directions(results)
    seconds = max(result.seconds for result in results)
    for name, latency in (seen or {job.rw: results[0].latency}).items():
        what = f"{job.rw}, {name}s" if len(seen) > 1 else job.rw
        iops = latency.count / seconds if seconds else 0.0
        times = {"mean": latency.mean, **{f"p{p:g}": latency.percentile(p) for p in _SHOWN}}
        words = ", ".join(f"{key} {ns / 1000:.1f}" for key, ns in times.items())
        yield (
            f"{bdev.name}: {what} of {human(job.bs)}, {in_flight}: {iops:,.0f} IOPS, "
            f"{iops * job.bs / 2**20:,.1f} MiB/s, latency in us: {words}"
        )
    requests = sum(result.requests for result in results)
    busy = [result.busy for result in results if result.busy is not None]
    if busy and requests:
        yield f"{bdev.name}: {1e9 * sum(busy) / requests:,.0f} ns of the driver itself for each request"


def _directions(results: list[Result]) -> dict[str, Histogram]:
    both = {
        "read": merged(result.reads for result in results),
        "write": merged(result.writes for result in results),
    }
    return {name: latency for name, latency in both.items() if latency.count}


def fio(results: list[Result]) -> dict[str, object]:
    """As fio prints it with --output-format=json, a job for each of theirs."""
    now = time.time()
    return {
        "fio version": f"virtio-bdev-{version('virtio-bdev')}",  # by the name that others look for
        "timestamp": int(now),
        "timestamp_ms": int(now * 1000),
        "time": time.ctime(now),
        "jobs": [result.fio() for result in results],
    }


_Measure = Annotated[float, msgspec.Meta(ge=0, le=1e18)]  # of requests a second, or of ns


class _Latency(msgspec.Struct):
    mean: _Measure = 0.0
    percentile: dict[str, _Measure] = {}


class _Direction(msgspec.Struct):
    iops: _Measure = 0.0
    total_ios: Annotated[int, msgspec.Meta(ge=0, le=10**18)] = 0
    clat_ns: _Latency = msgspec.field(default_factory=_Latency)


class _Job(msgspec.Struct):
    options: dict[str, str] = msgspec.field(name="job options", default_factory=dict)
    read: _Direction = msgspec.field(default_factory=_Direction)
    write: _Direction = msgspec.field(default_factory=_Direction)


class Earlier(msgspec.Struct):
    """What `--json` printed once, or fio."""

    jobs: list[_Job]

    @classmethod
    def load(cls, path: Path) -> Earlier:
        """Read and checked; raises ClickException."""
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise click.ClickException(f"{path} is no regular file")
            with path.open("rb") as file:
                text = file.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                raise click.ClickException(
                    f"{path} has more than {_MOST_BYTES} bytes: it is no result of a run"
                )
            found = msgspec.json.decode(text, type=cls)
        except OSError as error:
            raise click.ClickException(f"cannot read {path}: {error.strerror}") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise click.ClickException(
                f"{path} is not what `bench --json`, or fio's --output-format=json, prints: {error}"
            ) from error
        if not any(job.read.total_ios or job.write.total_ios for job in found.jobs):
            raise click.ClickException(f"{path} has no job that has done anything")
        return found

    def compare(self, bdev: Bdev, results: list[Result]) -> Iterator[str]:
        """A line for each direction: now, by then. Percentiles of several jobs do not add up: left out."""
        if unlike := self._unlike(results):
            yield f"{bdev.name}: then it was another load, of {', '.join(unlike)}"
        for name, latency in _directions(results).items():
            before = [each for job in self.jobs if (each := getattr(job, name)).total_ios]
            iops = sum(
                (result.reads if name == "read" else result.writes).count / result.seconds
                for result in results
                if result.seconds
            )
            was = sum(each.iops for each in before)
            if not was or not iops:
                yield f"{bdev.name}: {name}s against then: there were none"
                continue
            total = sum(each.total_ios for each in before)
            mean = sum(each.clat_ns.mean * each.total_ios for each in before) / total
            words = [f"IOPS {_by(iops, was)}", f"mean {_by(latency.mean, mean)}"]
            if len(before) == 1:
                for percent in _SHOWN:
                    then = before[0].clat_ns.percentile.get(f"{percent:.6f}", 0.0)
                    words.append(f"p{percent:g} {_by(latency.percentile(percent), then)}")
            yield f"{bdev.name}: {name}s against then: {', '.join(words)}"

    def _unlike(self, results: list[Result]) -> list[str]:
        """What was asked for then, and is not now; of options that both tell."""
        now, then = results[0].job.fio(), self.jobs[0].options
        told = [
            f"{name}={then[name]}"
            for name in _ALIKE
            if name in now.keys() & then.keys() and _bytes(now[name]) != _bytes(then[name])
        ]
        return told + ([f"{len(self.jobs)} jobs"] if len(self.jobs) != len(results) else [])


def _bytes(text: str) -> object:
    """A size whichever way it is written, or the text if it is none."""
    try:
        return SIZE.convert(text, None, None)
    except click.UsageError:
        return text


def _by(now: float, then: float) -> str:
    return f"x{now / then:.2f}" if then else "x?"


def plotter(path: Path) -> Plotter:
    """What draws latencies, and the rate over time, into a file; raises ClickException if nothing can."""
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise click.ClickException(f"{path}: want a name that ends with .svg or .png")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise click.ClickException(f"cannot write {path}: {path.parent} is no folder that can be written to")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.ClickException(
            "--plot wants matplotlib: pip install 'virtio-bdev[plot]', or matplotlib itself"
        ) from error

    def draw(title: str, results: list[Result], history: History) -> None:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        figure.suptitle(title)
        left, right = figure.subplots(1, 2)
        for name, latency in _directions(results).items():
            seen, nines, times = 0, [], []
            for bucket in latency.buckets():
                nines.append(1 / (1 - seen / latency.count))
                times.append((bucket.low + bucket.high) / 2000)
                seen += bucket.values
            left.step([*nines, latency.count], [*times, times[-1]], where="post", label=name)
        marks = [2] + [10**nines for nines in range(1, _NINES + 1)]
        left.set_xscale("log")
        left.set_xticks(marks, [f"{100 - 100 / mark:g} %" for mark in marks])
        left.set_xlim(1, 10**_NINES)
        left.set_yscale("log")
        left.set(xlabel="of all requests take at most", ylabel="latency, us")
        left.grid(alpha=0.3)
        left.legend()
        iops = sum(result.iops for result in results)
        right.axhline(iops, linestyle="--", alpha=0.5, label=f"mean {iops:,.0f}")
        if results[0].job.ramp:
            right.axvspan(0, results[0].job.ramp, alpha=0.1, label="ramp")
        right.plot([seconds for seconds, _ in history], [rate for _, rate in history], marker=".")
        right.set(xlabel="seconds", ylabel="requests a second", ylim=(0, None))
        right.grid(alpha=0.3)
        right.legend()
        try:
            figure.savefig(path, format=kind[1:])
        except OSError as error:
            raise click.ClickException(f"cannot write {path}: {error.strerror}") from error

    return draw


@contextlib.contextmanager
def live(ramp: float, runtime: float) -> Iterator[Callable[[float, int], None]]:
    """A line that is written anew each second, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda seconds, requests: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
    # Nothing is drawn but when it is told: a thread of its own would take the time of what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("ramp" if ramp else "0 s", total=ramp + runtime, rate="")

        def tell(seconds: float, requests: int) -> None:
            what = "ramp" if seconds <= ramp else f"{seconds - ramp:.0f} s"
            bar.update(task, completed=seconds, description=what, rate=f"{requests:,} IOPS", refresh=True)

        yield tell
