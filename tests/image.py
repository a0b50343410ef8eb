"""The Dockerfile's steps, carried out in a bare Debian root, and containers of the result: no Docker is needed."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT

# Debian's release whose python3 is that of the base image python:VERSION-slim. With it, pip and a program `python`.
SUITES = {"3.13": "trixie", "3.11": "bookworm"}
PACKAGES = "python3,python3-pip,python-is-python3,ca-certificates"

# A container: the root read-only, mounts in it, no variable but those given, and another user. It replaces itself by
# the program, so that a signal to its process is one to the program.
CONTAINER = """
set -e
root=$1 folder=$2 user=$3 mounts=$4
shift 4
mount --make-rprivate /
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --bind /proc "$root/proc"
mount --bind /sys "$root/sys"
mount -o remount,bind,ro "$root/sys"
mount -t tmpfs tmpfs "$root/dev/shm"
mount --bind /etc/hosts "$root/etc/hosts" # every runtime puts the machine's name there
IFS='|'
for pair in $mounts; do
  source=${pair%%=*} target=$root${pair#*=}
  if [ "$source" = tmpfs ]; then mount -t tmpfs tmpfs "$target"; else mount --bind "$source" "$target"; fi
done
exec chroot --userspec="$user" "$root" /bin/sh -c 'cd "$1" && shift && exec "$@"' sh "$folder" "$@"
"""


@dataclass
class Image:
    """A root directory, and what the Dockerfile says of containers of it."""

    root: Path
    folder: str = "/"
    user: str = "0"
    arguments: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    entrypoint: list[str] = field(default_factory=list)

    def command(
        self, words: Sequence[str], mounts: dict[str, str], user: str | None = None, **variables: str
    ) -> list[str]:
        """Return the command line, for root, that runs words in a container.

        Args:
            mounts: path inside -> directory of this machine, or `tmpfs`.
            user: instead of the image's.
        """
        for path in mounts:
            (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        (self.root / "etc/hosts").touch()
        pairs = "|".join(f"{source}={path}" for path, source in mounts.items())
        number = user or self.user
        inside = [str(self.root), self.folder, f"{number}:{number}", pairs]
        given = [f"{name}={value}" for name, value in (self.variables | variables).items()]
        return ["unshare", "--mount", "sh", "-c", CONTAINER, "sh", *inside, "env", "-i", *given, *words]


def steps(dockerfile: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, each with its arguments as text."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def build(dockerfile: Path, root: Path, **arguments: str) -> Image:
    """Carry out a Dockerfile's steps in a new root directory.

    Args:
        arguments: values instead of the defaults of ARG.
    """
    image = Image(root)
    for name, text in steps(dockerfile):
        INSTRUCTIONS[name](image, text)
        image.arguments |= {k: v for k, v in arguments.items() if k in image.arguments}
    return image


def from_(image: Image, text: str) -> None:
    version = re.fullmatch(r"python:(3\.\d+)-slim", text)
    assert version is not None and version[1] in SUITES, f"say in SUITES which Debian has the Python of {text}"
    image.root.parent.mkdir(parents=True, exist_ok=True)
    command = ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", SUITES[version[1]], str(image.root)]
    subprocess.run(command, check=True, capture_output=True)


def arg(image: Image, text: str) -> None:
    name, _, value = text.partition("=")
    image.arguments[name] = value


def workdir(image: Image, text: str) -> None:
    image.folder = text
    (image.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)


def copy(image: Image, text: str) -> None:
    *sources, target = text.split()
    place = image.root / image.folder.lstrip("/") / target
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, place)


def run(image: Image, text: str) -> None:
    """Run a step as root, with the network of this machine and the certificates that its pip trusts."""
    certificates = os.environ.get("PIP_CERT", "/etc/ssl/certs/ca-certificates.crt")
    shutil.copy(certificates, image.root / "tmp/certificates")
    shutil.copy("/etc/resolv.conf", image.root / "etc/resolv.conf")
    # Debian keeps pip from its own folders; the base image's Python is not Debian's.
    pip = {"PIP_CERT": "/tmp/certificates", "PIP_BREAK_SYSTEM_PACKAGES": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    given = [f"{name}={value}" for name, value in (image.variables | image.arguments | pip).items()]
    inside = ["/bin/sh", "-c", f"cd {shlex.quote(image.folder)} && {text}"]
    done = subprocess.run(
        ["chroot", image.root, "env", "-i", *given, *inside], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (image.root / "tmp/certificates").unlink()


def env(image: Image, text: str) -> None:
    image.variables |= dict(word.split("=", 1) for word in shlex.split(text))


def user(image: Image, text: str) -> None:
    image.user = text


def entrypoint(image: Image, text: str) -> None:
    image.entrypoint = json.loads(text)


INSTRUCTIONS = {
    "FROM": from_,
    "ARG": arg,
    "WORKDIR": workdir,
    "COPY": copy,
    "RUN": run,
    "ENV": env,
    "USER": user,
    "ENTRYPOINT": entrypoint,
}
