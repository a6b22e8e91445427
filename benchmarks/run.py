"""`make bench`: ours beside other clients of the same disks, by turns, on two cores; a table and a record.

The target has one core and the client another. Every client has its turn before any has its next one; a
row gives medians, and the median of the ratios turn by turn with a 95 % bootstrap interval. What is not there
to be compared with is left out, and said. docs/performance.md has one run, and what bounds each figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import driver
import growth
import instructions
import msgspec
import noise
import peers
import spdk

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "build" / "bench"
SCHEMA = "virtio-bdev bench 2"  # of the record; another number when its fields change
_BUSY = 8.0  # percent of the two cores: somebody is doing something else
_SETTLE_S = 60  # how long to wait for him
_RESAMPLES = 2000


class Row(msgspec.Struct):
    """One thing measured: of each contender a figure for each turn, the first one being ours."""

    what: str
    unit: str
    figures: dict[str, list[float]]
    more_is_better: bool = True
    load: float = 0.0  # of the machine, when it was measured: each process that polls is 1

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.figures.items()}

    def ratio(self, other: str) -> tuple[float, float, float]:
        """Ours by the other's, so that more is better, and the ends of a 95 % bootstrap interval."""
        ours, theirs = next(iter(self.figures.values())), self.figures[other]
        pairs = zip(*((ours, theirs) if self.more_is_better else (theirs, ours)), strict=True)
        each = [a / b if b else math.inf for a, b in pairs]
        chance = random.Random(1)
        resampled = sorted(statistics.median(chance.choices(each, k=len(each))) for _ in range(_RESAMPLES))
        return statistics.median(each), resampled[_RESAMPLES // 40], resampled[-_RESAMPLES // 40]


class Record(msgspec.Struct):
    """A run, and where it was made."""

    schema: str
    when: str
    commit: str
    cpu: str
    cores: int
    used: tuple[int, int]  # the target's core, and the client's
    kernel: str
    python: str
    peers: dict[str, str]  # versions
    load: float
    busy: float  # percent of the two cores' time that others had, just before
    interruptions: dict[str, noise.Noise]  # of each core
    turns: int
    seconds: float
    rows: list[Row]
    left_out: list[str]


class Plan(NamedTuple):
    """How often, for how long, and which rows."""

    turns: int
    seconds: float
    only: re.Pattern[str]

    def wants(self, what: str) -> bool:
        """Whether that row is to be measured."""
        return self.only.search(what) is not None


Suite = Callable[[Plan, list[str]], Iterator[Row]]


def vhost(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """qemu-storage-daemon's vhost-user-blk: ours and libblkio."""
    if not peers.has_daemon(left_out):
        return
    for backing in ("null-co", "file in RAM"):
        for rw, bs, depths in (("randread", 4096, (1, 32, 128)), ("randwrite", 4096, (1, 32, 128))):
            for wait in get_args(peers.Wait):
                for depth in depths:
                    yield from _compare(backing, rw, bs, depth, wait, plan, left_out)
        for wait in get_args(peers.Wait):
            yield from _compare(backing, "read", 131072, 32, wait, plan, left_out)


def _compare(
    backing: str, rw: str, bs: int, depth: int, wait: peers.Wait, plan: Plan, left_out: list[str]
) -> Iterator[Row]:
    what = f"{backing}, {bs // 1024} KiB {rw}, QD {depth}, {'polled' if wait == 'poll' else 'eventfd'}"
    if not plan.wants(what):
        return
    load = rw, bs, depth, wait, plan.seconds
    clients = {"ours": lambda socket: peers.ours(socket, *load)}
    if blkio := peers.blkio(left_out):
        clients["libblkio"] = lambda socket: peers.blkio_bench(blkio, socket, *load)
    if fio := peers.fio(left_out):
        clients["fio on libblkio"] = lambda socket: peers.fio_on_libblkio(fio, socket, *load)
    got: dict[str, list[peers.Measured]] = {who: [] for who in clients}
    with peers.leaving_out(what, left_out):
        for turn in range(plan.turns):
            for who in list(clients)[:: 1 if turn % 2 else -1]:
                with peers.storage_daemon(backing) as socket:  # a fresh one: it adapts to what it has seen
                    got[who].append(clients[who](socket))
        yield Row(what, "IOPS", {who: [each.iops for each in turns] for who, turns in got.items()})
        tell = {who: [each.p99_us or math.nan for each in got[who]] for who in got if who != "libblkio"}
        yield Row(f"{what}, p99", "us", tell, more_is_better=False)


def against_spdk(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """SPDK's vhost target: ours and its own initiator."""
    tree = spdk.tree(left_out)
    if tree is not None:
        for kind in ("blk", "scsi"):
            for backing in ("RAM disk", "null"):
                for depth in (1, 32, 128 if kind == "blk" else 127):  # of cmd_per_lun one is for probes
                    yield from _beside_bdevperf(tree, kind, backing, depth, plan, left_out)
            yield from _beside_bdevperf(tree, kind, "delayed", 32, plan, left_out)


def _beside_bdevperf(
    tree: Path, kind: str, backing: str, depth: int, plan: Plan, left_out: list[str]
) -> Iterator[Row]:
    what = f"SPDK {kind}, {backing}, QD {depth}"
    if not plan.wants(what):
        return
    with peers.leaving_out(what, left_out):
        yield from _turns_with_bdevperf(tree, kind, backing, depth, plan, what)


def _turns_with_bdevperf(
    tree: Path, kind: str, backing: str, depth: int, plan: Plan, what: str
) -> Iterator[Row]:
    seconds = plan.seconds
    rows = {
        "iops": Row(what, "IOPS", {}),
        "p99": Row(f"{what}, p99", "us", {}, more_is_better=False),
        "busy": Row(f"{what}, the driver's own time", "ns a request", {}, more_is_better=False),
        "theirs": Row(f"{what}, the target's own time", "ns a request", {}, more_is_better=False),
        "share": Row(f"{what}, the target at work", "%", {}),
        "mean": Row(f"{what}, a blocking call", "us", {}, more_is_better=False),
    }
    for turn in range(plan.turns):
        with spdk.target(tree, kind, backing) as (socket, rpc):
            for who in ("ours", "bdevperf")[:: 1 if turn % 2 else -1]:
                with spdk.at_work(rpc, seconds) as work:
                    if who == "ours":
                        got = peers.ours(socket, "randread", 4096, depth, "poll", seconds, kind=kind)
                    else:
                        got = spdk.bdevperf(tree, socket, kind, "randread", 4096, depth, seconds)
                found = {"iops": got.iops, "p99": got.p99_us, "busy": got.busy_ns}
                found |= {"theirs": work.busy_ns, "share": work.percent}
                if who == "ours":
                    own = peers.ours(socket, "randread", 4096, depth, "poll", seconds, kind=kind, busy=True)
                    found["busy"] = own.busy_ns
                if depth == 1:
                    rate = got.iops if who != "ours" else peers.way_to("blocking", socket, 1, seconds, kind)
                    found["mean"] = 1e6 / rate
                for name, value in found.items():
                    rows[name].figures.setdefault(who, []).append(value or math.nan)
    for row in rows.values():
        if row.figures:
            row.figures = {who: row.figures[who] for who in ("ours", "bdevperf")}
            yield row


def python(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """Ways from Python to the same disk."""
    if not peers.has_daemon(left_out):
        return
    for depth in (1, 32):
        row = Row(f"null-co from Python, 4 KiB randread, QD {depth}", "IOPS", {})
        if not plan.wants(row.what):
            continue
        ways = ["batch", "asyncio"] if depth > 1 else ["blocking", "asyncio"]
        row.figures = {way: [] for way in ways}
        if peers.has_libnbd(left_out):
            row.figures["libnbd"] = []
        with peers.leaving_out(row.what, left_out):
            for _ in range(plan.turns):
                for way, values in row.figures.items():
                    values.append(peers.python_way(way, depth, plan.seconds))
            yield row


def alone(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """The driver on a device that answers at once."""
    requests = int(200_000 * min(1.0, plan.seconds))
    with peers.on_core(peers.CLIENT_CORE):
        figures = driver.measure(plan.turns, requests, lambda way: plan.wants(f"driver alone, {way}"))
    for way, by_layout in figures.items():
        yield Row(f"driver alone, {way}", "ns a request", by_layout, more_is_better=False)
    for way in instructions.WAYS:
        what = f"driver alone, instructions, {way}"
        if plan.wants(what) and instructions.can_count(left_out):
            counted = {layout: [instructions.total(layout, way)] for layout in driver.LAYOUTS}
            yield Row(what, "a request", counted, more_is_better=False)


def grown(plan: Plan, left_out: list[str]) -> Iterator[Row]:
    """What more of everything costs."""
    for what, unit, values in growth.measure(plan.turns, plan.wants):
        yield Row(what, unit, values, more_is_better=False)


SUITES: dict[str, Suite] = {
    "vhost": vhost,
    "spdk": against_spdk,
    "python": python,
    "driver": alone,
    "growth": grown,
}


def machine(turns: int, seconds: float) -> Record:
    """Where this is, and what."""
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    return Record(
        schema=SCHEMA,
        when=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit or "?",
        cpu=cpu,
        cores=os.cpu_count() or 1,
        used=(peers.TARGET_CORE, peers.CLIENT_CORE),
        kernel=platform.release(),
        python=platform.python_version(),
        peers=peers.versions(),
        load=os.getloadavg()[0],
        busy=noise.busy(1.0),
        interruptions={},
        turns=turns,
        seconds=seconds,
        rows=[],
        left_out=[],
    )


def show(row: Row) -> None:
    """A line of the table."""
    medians = row.medians()
    words = [
        f"{name} {median:,.1f}" if median < 1000 else f"{name} {median:,.0f}"
        for name, median in medians.items()
    ]
    line = f"{row.what:52} {row.unit:>12}  {'  '.join(words)}"
    for name in list(medians)[1:]:
        middle, low, high = row.ratio(name)
        line += f"  x{middle:.2f} ({low:.2f}..{high:.2f}) of {name}"
    print(line, flush=True)


def save(record: Record, folder: Path) -> Path:
    """Write the record as far as it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record.when.replace(':', '')}.json"
    told = msgspec.to_builtins(record)
    for row in told["rows"]:  # json knows no NaN
        row["figures"] = {
            name: [None if math.isnan(value) else value for value in values]
            for name, values in row["figures"].items()
        }
    path.write_text(json.dumps(told, indent=1, allow_nan=False))
    return path


def settle() -> None:
    """Wait until nobody has the two cores; SystemExit if somebody keeps them."""
    for left in range(_SETTLE_S, 0, -1):
        busy = noise.busy(1.0)
        if busy < _BUSY:
            return
        print(f"others have {busy:.0f} % of the two cores: waiting, {left} s at most", file=sys.stderr)
    sys.exit(f"others have {busy:.0f} % of the two cores, want {_BUSY:.0f} at most: end them, or use --force")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; all unless given"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn")
    parser.add_argument(
        "--only",
        type=re.compile,
        default=re.compile(""),
        metavar="REGEX",
        help="rows (of SPDK: rates, and what goes with them) whose names it finds",
    )
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder to keep the record in")
    parser.add_argument("--force", action="store_true", help="also on a machine that is busy")
    options = parser.parse_args()
    if unknown := set(options.suites) - set(SUITES):
        parser.error(f"{', '.join(unknown)}: want any of {', '.join(SUITES)}")
    if options.seconds % 1 and {"vhost", "spdk"} & set(options.suites or SUITES):
        parser.error(f"--seconds {options.seconds}: libblkio's benchmark and bdevperf want whole seconds")
    if options.turns < 1:
        parser.error(f"--turns {options.turns}, want 1 or more")
    plan = Plan(options.turns, options.seconds, options.only)
    if not options.force:
        settle()
    record = machine(options.turns, options.seconds)
    print(
        f"{record.cpu}, {record.cores} cores, Linux {record.kernel}, Python {record.python}, {record.commit}"
    )
    record.interruptions = noise.measure(2 * options.seconds)
    for core, (times, percent) in record.interruptions.items():
        print(
            f"core {core}: interrupted for 16 us or more {times:,.0f} times a second, {percent:.1f} % of it"
        )
    for name in options.suites or SUITES:
        for row in SUITES[name](plan, record.left_out):
            row.load = os.getloadavg()[0]
            record.rows.append(row)
            show(row)
            save(record, options.records)  # a run takes most of an hour, and may be broken off
    for what in dict.fromkeys(record.left_out):
        print(f"left out: {what}")
    if not record.rows:
        sys.exit("nothing was measured")
    print(f"recorded in {save(record, options.records)}")


if __name__ == "__main__":
    main()
