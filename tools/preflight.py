"""Finds what this machine lacks before make needs it, and says or installs what is missing.

    preflight.py build    an interpreter, its headers and a C compiler; prints the interpreter to use
    preflight.py peers    the programs that are not ours and that tests run against
    preflight.py build peers
    preflight.py pythons  lists the interpreters that need nothing more, oldest first, one for each version

As root on a machine with apt-get, what is missing is installed, unless NO_APT=1. Else the one command that
would do it is printed; then a missing build need is an error, a missing peer is not (its tests are left out).
Standard library only, in the syntax of any Python 3.6, so that an old one can say that it is too old.
"""

import glob
import json
import os
import shlex
import shutil
import subprocess
import sys

OLDEST = (3, 11)

# The peers: program, Debian packages that have it (which one depends on the release), what it is for.
PEERS = [
    ("qemu-storage-daemon", "qemu-system-common qemu-utils", "a vhost-user-blk target that is not ours"),
    (
        "qemu-system-x86_64",
        "qemu-system-x86",
        "a guest that boots from our target, and PCI devices without a guest",
    ),
    ("fio", "fio", "what our benchmark's results are named after"),
    ("mkfs.ext4", "e2fsprogs", "makes a disk image with something in it"),
    ("e2fsck", "e2fsprogs", "checks a file system"),
    ("debugfs", "e2fsprogs", "reads files out of an ext4 image"),
    ("apt-get", "apt", "downloads the kernel of a guest"),
    ("virtiofsd", "qemu-system-common", "gives a guest its root"),
    ("busybox", "busybox-static", "the first program of a guest"),
    ("cpio", "cpio", "packs what a guest begins with"),
    ("depmod", "kmod", "what kernel modules need"),
    ("valgrind", "valgrind", "counts the instructions of a request"),
    ("sg_decode_sense", "sg3-utils", "decodes SCSI sense data"),
]

# Run by each candidate interpreter, to be known by what it has and not by its name.
PROBE = """
import json, os, sys, sysconfig
try:
    import ensurepip, venv
    pip = True
except ImportError:
    pip = False
print(json.dumps({
    "path": sys.executable,
    "version": sys.version_info[:2],
    "pip": pip,
    "headers": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    "debian": sys.base_prefix == "/usr",
}))
"""


def say(text):
    print("preflight: " + text, file=sys.stderr, flush=True)


def find(program):
    """Where a program is, or None; administrators' programs too, which a user's PATH may leave out."""
    folders = ":/usr/local/sbin:/usr/sbin:/sbin:/usr/libexec:/usr/lib/qemu"
    return shutil.which(program, path=os.environ.get("PATH", "") + folders)


def run(argv, **options):
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


def probe(python):
    """What an interpreter has; None if it is too old or does not run (pyenv has shims that do not)."""
    try:
        found = json.loads(run([python, "-c", PROBE]).stdout.decode())
    except (OSError, ValueError):
        return None
    return found if tuple(found["version"]) >= OLDEST else None


def complete(python):
    return python["pip"] and python["headers"]


def others():
    """Every other interpreter to try: those on PATH and pyenv's, newest first."""
    folders = os.get_exec_path()
    folders += sorted(glob.glob(os.path.join(os.environ.get("PYENV_ROOT", ""), "versions", "*", "bin")))
    for name in [f"python3.{minor}" for minor in range(30, OLDEST[1] - 1, -1)] + ["python3"]:
        for folder in folders:
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                yield path


def choose(first):
    """The interpreter asked for, if it lacks nothing; where that is just "python3", then any other that lacks
    nothing; else the first of them that apt-get can complete; else None."""
    fixable = None
    for path in [first] + (list(others()) if first == "python3" else []):
        python = probe(path)
        if python and complete(python):
            return python
        if python and python["debian"]:
            fixable = fixable or python
    return fixable


def compiles():
    """Whether there is a C compiler, and a C library's headers with it."""
    cc = shlex.split(os.environ.get("CC", "cc"))
    try:
        return run(cc + ["-E", "-x", "c", "-include", "stdlib.h", "/dev/null"]).returncode == 0
    except OSError:
        return False


def build_needs():
    """The interpreter, and (package, why) of what is missing; exits where no package would help."""
    first = os.environ.get("PYTHON", "python3")
    python = choose(first)
    if python is None:
        oldest = ".".join(map(str, OLDEST))
        where = "nothing on PATH" if first == "python3" else first
        wanted = f"Python {oldest} or newer, with ensurepip and Python.h"
        sys.exit(f"preflight: {where} is {wanted}; PYTHON=... names one from elsewhere")
    missing = []
    name = "python" + ".".join(map(str, python["version"]))
    if not python["pip"]:
        missing.append((name + "-venv", "a virtual environment"))
    if not python["headers"]:
        missing.append((name + "-dev", "Python.h"))
    if not compiles():
        missing += [("gcc", "a C compiler"), ("libc6-dev", "its headers")]
    return python["path"], missing


def peer_needs():
    return [(packages, f"{program}: {why}") for program, packages, why in PEERS if not find(program)]


def apt_command(missing):
    packages = []
    for names, _ in missing:
        packages += [name for name in names.split() if name not in packages]
    return ["apt-get", "install", "-y", "--no-install-recommends"] + packages


def apt(command):
    """Runs apt-get install; the lists of packages are fetched only where it fails without."""
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    done = run(command, env=environment)
    if done.returncode != 0:
        run(["apt-get", "update"], env=environment)
        done = run(command, env=environment)
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
    return done.returncode == 0


def provide(missing):
    """Installs what is missing where that is allowed, else says how; whether it is there now."""
    command = " ".join(apt_command(missing))
    if shutil.which("apt-get") and os.geteuid() == 0 and os.environ.get("NO_APT", "0") in ("", "0"):
        say(f"as root, running: {command} (NO_APT=1 forbids it)")
        return apt(command.split())
    for packages, why in missing:
        say(f"missing {packages} ({why})")
    say("to have it all: " + ("" if os.geteuid() == 0 else "sudo ") + command)
    return False


def list_pythons():
    """Prints the path of one complete interpreter a version, oldest first."""
    newest_first = {}
    for path in others():
        python = probe(path)
        if python and complete(python):
            newest_first.setdefault(tuple(python["version"]), python["path"])
    print("\n".join(newest_first[version] for version in sorted(newest_first)))


def main(jobs):
    python, needs = build_needs() if "build" in jobs else (None, [])
    peers = peer_needs() if "peers" in jobs else []
    if needs + peers and not provide(needs + peers):
        if needs and build_needs()[1]:
            sys.exit(1)
        if peers:
            say("going on; tests without their peer are left out, and named at the end")
    if python:
        print(python)


if __name__ == "__main__":
    if sys.argv[1:] == ["pythons"]:
        list_pythons()
    elif sys.argv[1:] and set(sys.argv[1:]) <= {"build", "peers"}:
        main(sys.argv[1:])
    else:
        sys.exit(__doc__)
