"""How the compiled modules are built; all else about the package is in pyproject.toml.

VIRTIO_BUILD chooses one of three build sets, each with folders of its own under build/. No source holds a
directive, as it would beat these.

  fast     what is installed
  checked  indices are checked, and `_mem` aborts on an access past the end of its memory
  asan     checked, with the address and undefined-behaviour sanitizers
"""

import filecmp
import os
import shutil
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build import build

# Each is src/.../NAME.py with its C types in NAME.pxd. (ring/_*.py and ring/codes.py are twins of what is
# in C already: never compiled.)
MODULES = [
    "virtio.ring.buffer",
    "virtio.ring.device",
    "virtio.ring.doorbell",
    "virtio.ring.gather",
    "virtio.ring.lease",
    "virtio.ring.load",
    "virtio.ring.packed",
    "virtio.ring.requests",
    "virtio.ring.skew",
    "virtio.ring.slots",
    "virtio.ring.split",
    "virtio.ring.stats",
    "virtio.ring.submit",
    "virtio.ring.task",
    "virtio.ring.template",
]

FAST = {
    "language_level": 3,
    "annotation_typing": False,  # the .pxd has the C types, the annotations are mypy's
    "infer_types": True,
    "cdivision": True,
    "initializedcheck": False,
    "boundscheck": False,
    "wraparound": False,
    "freethreading_compatible": True,
}
CHECKED = FAST | {"boundscheck": True, "initializedcheck": True}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
BUILDS = {  # set: directives, compiler flags, linker flags
    "fast": (FAST, ["-O2", "-g0"], []),
    "checked": (CHECKED, ["-O1", "-g", "-DVIRTIO_CHECKED"], []),
    "asan": (CHECKED, ["-O1", "-g", "-DVIRTIO_CHECKED", *SANITIZE], SANITIZE),
}

chosen = os.environ.get("VIRTIO_BUILD", "fast")
directives, compile_args, link_args = BUILDS[chosen]
folder = Path("build", chosen)

# Time stamps say nothing about flags and directives: after a change in this file, start the set afresh.
mark = folder / "setup.py"
if not mark.exists() or not filecmp.cmp(__file__, mark, shallow=False):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(__file__, mark)


class Build(build):
    """Keeps the extensions of the last build and nothing else, so that no deleted module is shipped."""

    def run(self):
        build_ext = self.get_finalized_command("build_ext")
        kept = {Path(build_ext.get_ext_fullpath(extension.name)).resolve() for extension in extensions}
        for path in Path(self.build_lib).rglob("*"):
            if path.is_file() and path.resolve() not in kept:
                path.unlink()
        super().run()


extensions = [
    Extension(
        name,
        ["src/" + name.replace(".", "/") + ".py"],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        libraries=["m"],
    )
    for name in MODULES
]
jobs = os.cpu_count() or 1
setup(
    cmdclass={"build": Build},
    ext_modules=cythonize(
        extensions, build_dir=str(folder / "c"), compiler_directives=directives, nthreads=jobs, quiet=True
    ),
    options={
        "build": {"build_base": str(folder)},
        "build_ext": {"parallel": jobs},
        "egg_info": {"egg_base": str(folder)},
    },
)
