"""Compiling generated C with the machine's own compiler, and remembering the result.

The source is printed from traced expressions alone. Libraries are kept in a folder that only this user may write to.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from ...errors import RegardError

BLOCKS = (
    ("__AVX512F__", "8 x 32, AVX-512"),
    ("__AVX2__", "6 x 16, AVX2"),
    ("__AVX__", "6 x 16, AVX"),
    ("", "8 x 8, vectors of 4"),
)  # template.c's
PROBE = "int regard_probe(void) { return 1; }\n"


def compiler() -> list[str]:
    """The command of the C compiler: $CC, else cc, gcc or clang; empty when there is none."""
    wanted = shlex.split(os.environ.get("CC", ""))
    if wanted:
        return wanted if shutil.which(wanted[0]) else []
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])


def architecture() -> str:
    """What is compiled for: this processor, or what $REGARD_MARCH names (x86-64-v3 is AVX2, v4 AVX-512), which must run here."""
    return os.environ.get("REGARD_MARCH", "native")


@functools.cache
def block() -> str:
    """The register block that the kernels are built with, and its vectors."""
    asked = [*compiler(), *flags(), "-dM", "-E", "-x", "c", os.devnull]
    defined = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    wide = [(name, text) for name, text in BLOCKS if f"#define {name} " in defined]
    return (wide or BLOCKS[-1:])[0][1]


def flags() -> list[str]:
    common = ["-O3", "-std=gnu11", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC", "-pthread"]
    if platform.machine() in ("x86_64", "AMD64"):
        return [*common, f"-march={architecture()}", "-mprefer-vector-width=512"]
    return [*common, "-mcpu=native"]


@functools.cache
def signature() -> str:
    """What a library depends on besides its source: the compiler, its flags and this processor."""
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    known = Path("/proc/cpuinfo")
    processor = platform.processor() + platform.machine()
    if known.exists():
        processor += next((line for line in known.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return "\n".join([version, *flags(), processor])


@functools.cache
def folder() -> Path:
    """Where libraries are kept: the user's cache, or a private temporary folder where that cannot be had."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(home) / "regard" / "native"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
        if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and os.access(place, os.W_OK):
            return place
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="regard-native-"))


@functools.lru_cache(maxsize=512)
def library(text: str) -> ctypes.CDLL:
    """The loaded library of a source; compiled once a machine. Raises RegardError with the compiler's first words when it fails."""
    name = hashlib.sha256((signature() + text).encode()).hexdigest()[:32]
    target = folder() / f"{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as room:
            source, made = Path(room) / "kernel.c", Path(room) / "kernel.so"
            source.write_text(text)
            done = subprocess.run([*compiler(), *flags(), str(source), "-o", str(made), "-lm"], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RegardError(f"{compiler()[0]} cannot compile the generated kernel: {done.stderr.strip()[:300]}")
            os.replace(made, target)
    return ctypes.CDLL(str(target))


@functools.cache
def problem() -> str:
    """Why nothing can be compiled here, or the empty string."""
    if os.environ.get("REGARD_NATIVE") == "0":
        return "switched off by REGARD_NATIVE=0"
    if os.name != "posix":
        return "compiled kernels need a POSIX system"
    if not compiler():
        return "no C compiler found (looked for $CC, cc, gcc, clang)"
    try:
        library(PROBE)
    except (RegardError, OSError) as why:
        return str(why)
    return ""
