"""`virtio-bdev bench`, as a process of its own."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from click import ClickException

from tests import needs
from tests.model import Backend, Blk
from tests.model.blk import BlkFeature, Type
from virtio.ring.load import Histogram
from virtio.target import serve
from virtio_bdev.bench import Job, Result
from virtio_bdev.cli.report import Earlier, fio

FIO = Path(__file__).parent.parent / "data/fio/keys.txt"
MAIN = "from virtio_bdev.cli import main; main()"
# The same, with a Ctrl-C as soon as requests are in flight; prints when that was.
INTERRUPTED = """
import os, signal, threading, time
from virtio_bdev import bench, cli

def interrupted(bdev, job, numjobs, run=bench.run_jobs, **how):
    def interrupt():
        while not any(lease.queue.in_flight for lease in bdev.controller.device.leases):
            time.sleep(0)
        print(time.monotonic(), flush=True)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt).start()
    return run(bdev, job, numjobs, **how)

bench.run_jobs = interrupted
cli.main()
"""


@pytest.fixture
def disk():
    with serve("blk", "ram:1M") as target:
        yield target


def bench(target, *options, code=MAIN, kind="blk", **how):
    """Run it on a target; exit status, standard output and standard error."""
    command = [sys.executable, "-c", code, "bench", target.address, f"--dev-type={kind}", *map(str, options)]
    how.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **how)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("rw", ["read", "randread"])
def test_a_line_has_what_was_measured(disk, rw):
    status, out, err = bench(disk, "--rw", rw, "--bs", "4k", "--iodepth", "4", "--runtime", "0.1")
    assert (status, err) == (0, "")
    number = r"[\d,]+(\.\d)?"
    assert re.fullmatch(
        rf"VirtioBlk0: {rw} of 4 KiB, 4 in flight: [\d,]+ IOPS, {number} MiB/s, "
        rf"latency in us: mean {number}, p50 {number}, p99 {number}, p99.9 {number}\n",
        out,
    )


def paths(value, path=""):
    """Every path in a json value; list items have no number."""
    found = set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= {f"{path}/{key}"} | paths(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for inner in value:
            found |= paths(inner, f"{path}[]")
    return found


def test_every_key_of_its_json_is_one_of_fios(disk):
    status, out, _ = bench(disk, "--runtime", "0.1", "--json")
    assert status == 0
    fio = {line for line in FIO.read_text().splitlines() if not line.startswith("#")}
    assert paths(json.loads(out)) - fio == {f"/jobs[]/job options/{key}" for key in ("runtime", "randseed")}


def test_every_option_of_its_json_is_one_of_fios():
    """But for the values' own form, what is told can be given to fio."""
    text = subprocess.run([needs.program("fio"), "--cmdhelp=all"], capture_output=True, text=True).stdout
    known = set(re.findall(r"^ *(\w+) +:", text, re.MULTILINE))
    job = Job(
        rw="randrw",
        bs=512,
        iodepth=3,
        runtime=1.5,
        requests=7,
        offset=512,
        size=1024,
        ramp=0.5,
        rwmixread=9,
        random_distribution="zipf:1.1",
        rate_iops=100.0,
        iodepth_batch=2,
        seed=1,
    )
    told = job.fio()
    assert len(told) == 13 and told.keys() <= known
    assert (told["ramp_time"], told["rate_iops"], told["number_ios"]) == ("0.5", "100", "7")


@pytest.mark.parametrize("rw, used, unused", [("randread", "read", "write"), ("write", "write", "read")])
def test_json_has_the_run_as_fio_would_tell_it(disk, rw, used, unused):
    options = ["--rw", rw, "--bs", "8k", "--iodepth", "2", "--runtime", "0.2", "--json", "--yes"]
    status, out, err = bench(disk, *options)
    assert (status, err) == (0, "")
    (job,) = json.loads(out)["jobs"]
    assert int(job["job options"].pop("randseed")) >= 0
    assert job["job options"] == {"rw": rw, "bs": "8192", "iodepth": "2", "runtime": "0.2"}
    told = job[used]
    assert told["io_bytes"] == 8192 * told["total_ios"] > 0
    assert 200 <= told["runtime"] < 5000
    assert told["iops"] == pytest.approx(1000 * told["total_ios"] / told["runtime"], rel=0.01)
    assert told["bw_bytes"] == pytest.approx(8192 * told["iops"], rel=0.01)
    assert told["bw"] == told["bw_bytes"] >> 10
    latency = told["clat_ns"]
    assert latency["N"] == told["total_ios"]
    assert 0 < latency["min"] <= latency["mean"] <= latency["max"] and latency["stddev"] > 0
    assert latency["min"] <= latency["percentile"]["50.000000"] <= latency["percentile"]["99.900000"]
    assert (job[unused]["total_ios"], job[unused]["iops"]) == (0, 0)


def test_a_scsi_disk_among_several_is_named():
    with serve("scsi", "ram:1M", "ram:2M") as target:
        status, _, err = bench(target, "--runtime", "0.1", kind="scsi")
        assert status == 1 and "name one with --bdev (VirtioScsi0t0, VirtioScsi0t1)" in err
        status, out, _ = bench(target, "--runtime", "0.1", "--bdev", "VirtioScsi0t1", kind="scsi")
        assert status == 0 and out.startswith("VirtioScsi0t1: randread of 4 KiB, 32 in flight: ")


@pytest.mark.parametrize("rw", ["write", "randwrite"])
def test_overwriting_a_disk_wants_yes_where_nobody_can_be_asked(disk, rw):
    status, out, err = bench(disk, "--rw", rw, "--runtime", "0.1")
    assert (status, out) == (2, "")
    assert f"VirtioBlk0 at {disk.address}, 1 MiB, will be overwritten: --yes says that this is wanted" in err
    assert bench(disk, "--rw", rw, "--runtime", "0.1", "--yes")[0] == 0


@pytest.mark.parametrize("answer, status", [(b"n\n", 1), (b"y\n", 0), (b"\n", 1)])
def test_overwriting_a_disk_asks_at_a_terminal(disk, answer, status):
    ours, theirs = os.openpty()
    try:
        os.write(ours, answer)
        got, out, err = bench(disk, "--rw", "write", "--runtime", "0.1", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert got == status
    assert "VirtioBlk0 at" in err and "will be overwritten. Go on? [y/N]" in err
    assert ("nothing was written" in err) == (status == 1) == (out == "")


@pytest.mark.parametrize(
    "options, status, words",
    [
        (["--bs", "1000"], 1, "1000 bytes at 0 are not on the 512-byte grid of VirtioBlk0"),
        (["--bs", "2M"], 1, "2097152 bytes at 0 do not lie within the 1048576 bytes of VirtioBlk0"),
        (["--bs", "many"], 2, "'many' is not a size"),
        (
            ["--iodepth", "1000"],
            1,
            "1000 requests in flight, want 1 to 256: more than VirtioBlk0 takes on each of",
        ),
        (["--iodepth", "0"], 2, "--iodepth"),
        (["--runtime", "0"], 2, "--runtime"),
        (["--rw", "trim"], 2, "--rw"),
        (["--random-distribution", "foo"], 1, "'foo', want random, zipf[:THETA] or pareto[:SHARE]"),
        (["--runtime", "1e300"], 2, "--runtime"),
        (["--ramp", "inf"], 2, "--ramp"),
        (["--rate-iops", "1e12"], 2, "--rate-iops"),
        (["--rwmixread", "70"], 2, "--rw randread has no use for --rwmixread"),
        (["--rw", "read", "--random-distribution", "zipf"], 2, "no use for --random-distribution"),
        (["--plot", "/nowhere/here.svg"], 1, "cannot write /nowhere/here.svg: /nowhere is no folder"),
        (["--compare", "/dev/null"], 1, "/dev/null is no regular file"),
        (["--rate-iops", "0"], 2, "--rate-iops"),
        (["--iodepth", "2", "--iodepth-batch", "3"], 1, "iodepth_batch=3, want 1 to 2, the iodepth"),
        (["--verify", "md5"], 2, "--verify"),
        (["--verify-only"], 2, "--verify-only wants --verify and the --seed"),
        (["--verify", "crc", "--verify-only"], 2, "--verify-only wants --verify and the --seed"),
        (["--verify", "crc", "--rw", "read", "--json"], 2, "measures nothing: --rw, --json does not go with"),
        (["--compare", __file__, "--json"], 2, "--compare adds lines, which would not go with --json"),
        (["--compare", "/nowhere"], 2, "--compare"),
        (["--compare", __file__], 1, "test_bench.py is not what `bench --json`, or fio's"),
        (["--plot", "here.gif"], 1, "here.gif: want a name that ends with .svg or .png"),
        (["--bdev", "Other"], 1, "has no disk Other; it has: VirtioBlk0"),
    ],
)
def test_what_cannot_be_is_one_line(disk, options, status, words):
    got, out, err = bench(disk, *options)
    assert (got, out) == (status, "")
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--verify-only"], "--verify-only wants --verify and the --seed"),
        (["--verify", "crc", "--numjobs", "2"], "measures nothing: --numjobs does not go with it"),
        (["--compare", __file__, "--json"], "--compare adds lines"),
    ],
)
def test_a_usage_error_is_told_before_anything_is_attached(tmp_path, options, words):
    nowhere = SimpleNamespace(address=f"user:{tmp_path}/none")
    status, out, err = bench(nowhere, *options)
    assert (status, out) == (2, "") and words in err and "no such socket" not in err
    status, _, err = bench(nowhere)
    assert status == 1 and "there is no such socket" in err


@pytest.mark.parametrize("kind", ["blk", "scsi"])
@pytest.mark.parametrize(
    "options, size",
    [
        (["--iodepth", "1"], 4),
        (["--iodepth", "4", "--bs", "64k"], 4),
        (["--iodepth", "5"], 8),
        ([], 32),
        (["--iodepth", "33"], 256),
        (["--iodepth", "1", "--bs", "128k"], 256),
        (["--iodepth", "1", "--queue-size", "64"], 64),
    ],
)
def test_queues_are_as_small_as_the_iodepth_allows_unless_their_size_is_given(kind, options, size):
    with serve(kind, "ram:1M", queues=2) as target:
        status, out, err = bench(target, *options, "--runtime", "0.1", "--queues", "1", "-v", kind=kind)
    assert status == 0 and f"{kind.capitalize()}0" in out
    asked = re.findall(r"> SET_VRING_NUM index=\d+ num=(\d+)", err)
    assert asked and {int(num) for num in asked} == {size}


def test_verifying_has_queues_of_the_usual_size(disk):
    _, out, err = bench(disk, "--verify", "crc", "--yes", "-v")
    assert " verified" in out and set(re.findall(r"> SET_VRING_NUM index=\d+ num=(\d+)", err)) == {"256"}


@pytest.mark.parametrize(
    "bs, size_max, queue_size", [(1 << 20, 128 << 10, 256), (64 << 10, 4096, 32), (64 << 10, 32 << 10, 4)]
)
def test_a_request_in_several_segments_is_still_one_at_an_iodepth_of_one(bs, size_max, queue_size):
    with Backend(Blk(size_max=size_max)) as model:
        model.device.features |= BlkFeature.SIZE_MAX
        status, _, err = bench(model, "--bs", bs, "--iodepth", "1", "--runtime", "0.1", "--queues", "1")
        assert (status, err) == (0, "")
        assert model.values("SET_VRING_NUM") == [(0, queue_size)]
        assert {r.nbytes for r in model.device.requests if r.type == Type.IN} == {bs}


def test_ctrl_c_exits_130_and_leaves_the_disk_to_the_next(disk):
    status, out, err = bench(disk, "--runtime", "60", code=INTERRUPTED)
    assert (status, err.strip()) == (130, "")
    when, measured = out.splitlines()
    assert time.monotonic() - float(when) < 5
    assert re.match(r"VirtioBlk0: randread of 4 KiB, 32 in flight: [\d,]+ IOPS, ", measured)
    assert bench(disk, "--runtime", "0.1")[0] == 0


def test_ctrl_c_leaves_a_disk_that_hangs_at_once():
    with serve("blk", "ram:1M,delay=60") as target:
        status, out, _ = bench(target, "--runtime", "60", "--json", code=INTERRUPTED)
    when, told = out.split("\n", 1)
    assert status == 130 and time.monotonic() - float(when) < 5  # 0.2, and what Python takes to end
    (job,) = json.loads(told)["jobs"]
    assert job["interrupted"] and job["read"]["total_ios"] == 0


def test_as_many_jobs_as_the_disk_has_queues_need_no_other_option():
    jobs = len(os.sched_getaffinity(0)) + 1
    with serve("blk", "ram:1M", queues=jobs) as target:
        status, out, err = bench(target, "--runtime", "0.1", "--numjobs", jobs)
        assert (status, err) == (0, "") and f"on each of {jobs} queues" in out
        status, out, err = bench(target, "--runtime", "0.1", "--numjobs", jobs + 1)
        assert status == 1 and f"{jobs} request queues; {jobs + 1} are wanted" in err


def test_a_target_that_dies_is_one_line():
    with serve("blk", "ram:1M") as target:
        code = INTERRUPTED.replace("os.getpid(), signal.SIGINT", f"{target.pid}, signal.SIGKILL")
        status, _, err = bench(target, "--runtime", "60", code=code)
    assert status == 1 and err.count("\n") == 1
    assert target.path in err


def test_jobs_and_mixes_are_lines_and_jobs_of_json(disk):
    options = ["--rw", "randrw", "--rwmixread", "70", "--numjobs", "2", "--queues", "2", "--runtime", "0.3"]
    options += ["--size", "64k", "--offset", "512k", "--ramp", "0.1", "--yes"]
    status, out, err = bench(disk, *options)
    assert (status, err) == (0, "")
    reads, writes = out.splitlines()
    assert reads.startswith("VirtioBlk0: randrw, reads of 4 KiB, 32 in flight on each of 2 queues: ")
    assert writes.startswith("VirtioBlk0: randrw, writes of 4 KiB, 32 in flight on each of 2 queues: ")
    status, out, err = bench(disk, *options, "--json")
    jobs = json.loads(out)["jobs"]
    assert len(jobs) == 2
    for job in jobs:
        assert job["read"]["total_ios"] > job["write"]["total_ios"] > 0
        assert job["read"]["runtime"] == job["write"]["runtime"]


def test_a_run_is_compared_with_an_earlier_one(disk, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(bench(disk, "--runtime", "0.2", "--json")[1])
    status, out, err = bench(disk, "--runtime", "0.2", "--compare", earlier)
    assert (status, err) == (0, "")
    number = r"x\d+\.\d\d"
    compared = (
        rf"reads against then: IOPS {number}, mean {number}, p50 {number}, p99 {number}, p99.9 {number}"
    )
    assert re.fullmatch(rf"VirtioBlk0: {compared}", out.splitlines()[1])


@pytest.mark.parametrize("then, words", [(0.5, "IOPS x2.00, mean x0.50"), (4, "IOPS x0.25, mean x4.00")])
def test_a_comparison_divides_now_by_then(then, words):
    result = Result(Job(), 2.0, Histogram(), Histogram())
    for _ in range(1000):
        result.reads.record(10_000)
    told = fio([result])
    read = told["jobs"][0]["read"]
    read["iops"], read["clat_ns"]["mean"] = read["iops"] * then, read["clat_ns"]["mean"] / then
    (line,) = msgspec.convert(told, Earlier).compare(SimpleNamespace(name="Disk"), [result])
    assert line.startswith(f"Disk: reads against then: {words}, p50 x1.00")


def test_fios_own_json_can_be_compared_with(disk, tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    job = [f"--filename={tmp_path}/file", "--rw=randread", "--bs=4k", "--runtime=0.2", "--time_based"]
    said = subprocess.run(
        [needs.program("fio"), "--name=job", "--output-format=json", "--size=1M", *job],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (tmp_path / "fio.json").write_text(said.stdout)
    status, out, _ = bench(disk, "--runtime", "0.1", "--compare", tmp_path / "fio.json")
    assert status == 0 and re.search(r"reads against then: IOPS x\d+\.\d\d, mean x[\d.]+, p50 x[\d.]+", out)


def test_another_load_is_not_compared_without_a_word(disk, tmp_path):
    earlier = tmp_path / "earlier.json"
    earlier.write_text(bench(disk, "--runtime", "0.1", "--json")[1])
    options = ["--runtime", "0.1", "--compare", earlier, "--bs", "8k", "--iodepth", "4"]
    assert "VirtioBlk0: then it was another load, of bs=4096, iodepth=32\n" in bench(disk, *options)[1]
    several = bench(disk, *options[:4], "--numjobs", "2", "--queues", "2")[1]
    assert "then it was another load, of 1 jobs\n" in several


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"jobs": []}', '{"jobs": [{"read": {"iops": "many"}}]}', "[" * 100_000),
        '{"jobs": [{"read": {"iops": -5, "total_ios": 1}}]}',
        '{"jobs": [{"read": {"iops": 1e300, "total_ios": 1}}]}',
        '{"jobs": [{"read": {"total_ios": 1}}, {"read": {"total_ios": -1}}]}',
        '{"jobs": [{"read": {"total_ios": 1%s}}]}' % ("0" * 400),
    ],
)
def test_what_is_no_earlier_run_is_told(tmp_path, text):
    (tmp_path / "earlier").write_text(text)
    with pytest.raises(ClickException, match="earlier (is not what|has no job)"):
        Earlier.load(tmp_path / "earlier")


@pytest.mark.parametrize("name, magic", [("plot.svg", b"<?xml"), ("plot.png", b"\x89PNG")])
def test_a_plot_is_a_picture(disk, tmp_path, name, magic):
    options = ["--rw", "randrw", "--yes", "--runtime", "0.2", "--plot", tmp_path / name]
    status, out, err = bench(disk, *options, *(["--json"] if name.endswith("png") else []))
    assert (status, err) == (0, "") and out.startswith("{" if name.endswith("png") else "VirtioBlk0: ")
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_a_disk_is_verified_and_looked_at_again_later(disk):
    how = ["--verify", "crc", "--seed", "7", "--bs", "8k"]
    status, out, err = bench(disk, *how, "--yes")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"VirtioBlk0: 128 blocks of 8 KiB written in .* read back in .* and verified\n", out)
    status, out, err = bench(disk, *how, "--verify-only")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"VirtioBlk0: 128 blocks of 8 KiB read back in [\d,.]+ MiB/s and verified\n", out)
    how[3] = "8"
    status, out, err = bench(disk, *how, "--verify-only")
    assert (status, out) == (1, "")
    assert "of a pass with seed 7: the write was lost; " in err and "; and 125 more near there" in err


def test_what_the_driver_itself_takes_is_a_line(disk):
    _, out, _ = bench(disk, "--runtime", "0.2", "--busy")
    assert re.fullmatch(r"VirtioBlk0: [\d,]+ ns of the driver itself for each request", out.splitlines()[1])
