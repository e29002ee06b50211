"""An aarch64 Python with LiteRT on another machine, under QEMU: XNNPACK has no sparse convolutions on x86.

    python -m benchmarks.aarch64                                            # sets it up, once: 50 MB to download
    python -m benchmarks.aarch64 benchmarks/on_device.py model.tflite       # runs a script in it

Debian's packages and PyPI's wheels are unpacked into a folder (`--folder`, by default in ~/.cache), and nothing of the
host is changed; that takes Debian or Ubuntu with apt and a network. Emulation shows whether sparse kernels engage and
compares two models, but it is no phone: `on_device.py` marks its figures "emulated". On aarch64 itself the Python that
runs this is taken.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "tf_prune", "aarch64").expanduser()
# Bookworm whatever the host is: Python 3.11, for which the wheels are, and the one QEMU that this was tested with.
SOURCES = {
    "http://deb.debian.org/debian": ("bookworm", "bookworm-updates"),
    "http://deb.debian.org/debian-security": ("bookworm-security",),
}
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PYTHON = "3.11"
GUEST_PACKAGES = (
    f"python{PYTHON}-minimal",
    f"libpython{PYTHON}-minimal",
    f"libpython{PYTHON}-stdlib",
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5"),
)
# LiteRT 2.3.0 crashes under QEMU 7.2. The others are what it imports.
WHEELS = ("ai-edge-litert==2.1.2", "numpy==2.4.6", "flatbuffers==25.12.19")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
# A folder that was made by another list is made anew.
RECIPE = "\n".join([*SOURCES, *GUEST_PACKAGES, *WHEELS])


class UnavailableError(RuntimeError):
    """The emulator cannot be had here; the message is one line that says why."""


def run(arguments: Sequence[str], folder: Path | None = None) -> str:
    """Runs the aarch64 Python, which is set up first if it has not been.

    Args:
        arguments: Of Python: a script and what it takes. The script has the standard library, NumPy and LiteRT.
        folder: Where the emulated Python is or will be; `FOLDER` by default.

    Returns:
        What was printed to the standard output. Everything else appears where this process's errors do.

    Raises:
        UnavailableError: If the emulator cannot be had here.
        subprocess.CalledProcessError: If the script ends with another code than 0.
    """
    done = subprocess.run(
        [*command(folder), *arguments], env=environment(), stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def command(folder: Path | None = None) -> list[str]:
    """The command of an aarch64 Python, which is set up first if it has not been."""
    if is_native():
        return [sys.executable]
    folder = set_up(folder)
    root = folder / "root"
    return [str(folder / "qemu-aarch64-static"), "-L", str(root), str(root / "usr" / "bin" / f"python{PYTHON}")]


def environment() -> dict[str, str]:
    """The variables for it: none of the host's Python, and how `on_device.py` marks what it measures."""
    if is_native():
        return dict(os.environ)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LD_"))}
    return kept | {"ON_DEVICE_LABEL": "emulated"}


def is_native() -> bool:
    """Whether this machine runs aarch64 itself."""
    return platform.machine() in ("aarch64", "arm64")


def set_up(folder: Path | None = None) -> Path:
    """Makes the folder, if it is not there in full already; one that was interrupted is never taken for whole.

    Args:
        folder: Where; `FOLDER` by default.

    Returns:
        The folder: the emulator `qemu-aarch64-static`, and in `root/` what it runs.

    Raises:
        UnavailableError: If the packages cannot be had here.
    """
    folder = FOLDER if folder is None else Path(folder)
    if _is_whole(folder):
        return folder
    _require_tools()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as made:
        whole = Path(made, "whole")
        print(f"Setting up an emulated aarch64 Python in {folder} ...", file=sys.stderr, flush=True)
        _unpack_packages(Path(made), whole)
        _unpack_wheels(Path(made), whole)
        (whole / "recipe.txt").write_text(RECIPE)
        try:
            if folder.exists() and not _is_whole(folder):
                folder.rename(Path(made, "outdated"))
            whole.rename(folder)
        except OSError:
            if not _is_whole(folder):  # it is if another process was faster
                raise
    return folder


def _is_whole(folder: Path) -> bool:
    recipe = folder / "recipe.txt"
    return recipe.exists() and recipe.read_text() == RECIPE


def _require_tools() -> None:
    missing = [tool for tool in ("apt-get", "dpkg", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(f"no emulated aarch64: it is made of Debian's packages, and {missing[0]} is not here")
    if not KEYRING.exists():
        raise UnavailableError(f"no emulated aarch64: {KEYRING} is missing; the package debian-archive-keyring has it")


def _unpack_packages(temporary: Path, whole: Path) -> None:
    """Downloads with an apt that keeps its state in `temporary`, so that the host's one learns of no architecture."""
    host = _call(["dpkg", "--print-architecture"]).strip()
    state, packages = temporary / "apt", temporary / "packages"
    packages.mkdir()
    for made in ("lists/partial", "cache/archives/partial"):
        (state / made).mkdir(parents=True)
    (state / "status").touch()
    (state / "sources.list").write_text(
        "".join(f"deb [signed-by={KEYRING}] {url} {suite} main\n" for url in SOURCES for suite in SOURCES[url])
    )
    (state / "apt.conf").write_text(_configuration(state, host))
    apt = {**os.environ, "APT_CONFIG": str(state / "apt.conf")}
    _call(["apt-get", "update", "-qq", "--error-on=any"], env=apt)
    emulator = f"qemu-user-static:{host}"
    guest = [f"{name}:arm64" for name in GUEST_PACKAGES]
    _call(["apt-get", "download", "-qq", emulator, *guest], env=apt, cwd=packages)
    (whole / "root").mkdir(parents=True)
    for package in packages.iterdir():
        to = temporary / "emulator" if package.name.startswith("qemu-") else whole / "root"
        _call(["dpkg-deb", "-x", str(package), str(to)])
    (temporary / "emulator" / "usr" / "bin" / "qemu-aarch64-static").rename(whole / "qemu-aarch64-static")


def _configuration(state: Path, host: str) -> str:
    """Of an apt that reads and writes nothing of the host but its settings for downloads, such as a proxy."""
    acquire = [line for line in _call(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::http")]
    settings = {
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "Dir::Etc::sourcelist": state / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "APT::Architecture": host,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": 3,
    }
    lines = [f'{name} "{value}";' for name, value in settings.items()]
    return "\n".join([*lines, f'APT::Architectures {{ "{host}"; "arm64"; }};', *acquire, ""])


def _unpack_wheels(temporary: Path, whole: Path) -> None:
    wheels = temporary / "wheels"
    tags = [f"--platform={tag}" for tag in PLATFORMS]
    options = ["--quiet", "--only-binary=:all:", "--no-deps", f"--python-version={PYTHON}", f"--dest={wheels}"]
    _call([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options, *tags, *WHEELS])
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            # Where Debian's Python looks by itself.
            archive.extractall(whole / "root" / "usr" / "lib" / "python3" / "dist-packages")


def _call(arguments: Sequence[str], **options: object) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, **options)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        problem = next((line for line in lines if line.startswith("E: ")), lines[-1])  # apt's first is the cause
        raise UnavailableError(
            f"no emulated aarch64: {Path(arguments[0]).name} ended with {done.returncode}: {problem}"
        )
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Runs a script with an emulated aarch64 Python that has LiteRT.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where it is or will be (default: %(default)s)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="a script and its arguments; none: only set up")
    options = parser.parse_args(arguments)
    try:
        found = command(options.folder)
    except UnavailableError as problem:
        sys.exit(f"error: {problem}")
    if not options.arguments:
        print(" ".join(found))
        return
    sys.exit(subprocess.run([*found, *options.arguments], env=environment()).returncode)


if __name__ == "__main__":
    main()
