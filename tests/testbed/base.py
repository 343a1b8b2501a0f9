"""The base image of the build: the user's, the Dockerfile's if a registry answers, else one made by debootstrap."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.testbed.engines import Tools, debian_release, mirror
from tests.testbed.shell import PROJECT, BedError, cache_folder, run, say

REGISTRY = "https://registry-1.docker.io/v2/"
# What pip, uv and Python need to reach this machine's package index. PIP_FIND_LINKS is left out: the wheelhouse reaches
# the build as a named context, as on an air-gapped cluster.
PASSED_ON = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_CERT",
    "PIP_DEFAULT_TIMEOUT",
    "PIP_TRUSTED_HOST",
    "UV_INDEX_URL",
    "UV_SYSTEM_CERTS",
)
BUNDLE = "etc/ssl/certs/ca-certificates.crt"


def base_image(tools: Tools, docker_host: str) -> str:
    """Name of a base image that is present on the engine at `docker_host` after the call."""
    env = tools.environment({"DOCKER_HOST": docker_host})
    wanted = os.environ.get("BASE_IMAGE") or (dockerfile_default() if registry_answers() else "")
    if wanted:
        if not has_image(wanted, env):
            say(f"pulling {wanted}")
            run([tools.which("docker"), "pull", "-q", wanted], env=env, timeout=1800)
        return wanted
    name = f"local/torchrun-compose-base:{debian_release()}"
    if not has_image(name, env):
        archive = stand_in(tools)
        changes = [f"--change=ENV {key}={os.environ[key]}" for key in PASSED_ON if os.environ.get(key)]
        run([tools.which("docker"), "import", *changes, archive, name], env=env)
    return name


def has_image(name: str, env: dict[str, str]) -> bool:
    try:
        run(["docker", "image", "inspect", name], env=env, timeout=30)
    except BedError:
        return False
    return True


def dockerfile_default() -> str:
    """The BASE_IMAGE that the Dockerfile names."""
    found = re.search(r"^ARG BASE_IMAGE=(\S+)", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    if found is None:
        raise BedError("the Dockerfile has no line `ARG BASE_IMAGE=...`")
    return found.group(1)


def registry_answers() -> bool:
    """Whether Docker's public registry can be reached; 401 is its greeting to strangers."""
    try:
        urllib.request.urlopen(REGISTRY, timeout=5, context=ssl.create_default_context())
    except urllib.error.HTTPError as refused:
        return refused.code == 401 and "registry" in refused.headers.get("Docker-Distribution-Api-Version", "")
    except (OSError, ValueError):
        return False
    return True


def stand_in(tools: Tools) -> Path:
    """A tar of a minimal Debian of this machine's release with its certificates and pip settings."""
    suite = debian_release()
    archive = cache_folder("base") / f"{suite}.tar"
    if archive.exists():
        return archive
    say(f"no registry answers: making a stand-in base image with debootstrap ({suite}), about a minute")
    root = Path(tempfile.mkdtemp(prefix="rootfs-", dir=archive.parent))
    try:
        bootstrap(tools, suite, root)
        take_machine_settings(root)
        part = archive.with_suffix(".part")
        run(["tar", "-C", root, "--numeric-owner", "--exclude=./var/cache/apt/archives/*.deb", "-cf", part, "."])
        part.rename(archive)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return archive


def bootstrap(tools: Tools, suite: str, root: Path) -> None:
    env = tools.environment({key: value for key, value in os.environ.items() if key.endswith(("_proxy", "_PROXY"))})
    program = Path(tools.which("debootstrap"))
    # debootstrap looks for its scripts at their installed place unless it is told.
    env["DEBOOTSTRAP_DIR"] = str(program.parents[1] / "share/debootstrap")
    packages = "--include=ca-certificates,python3,python3-venv"
    run([program, "--variant=minbase", packages, suite, root, mirror()], env=env, timeout=900)


def take_machine_settings(root: Path) -> None:
    for name in (BUNDLE, "etc/pip.conf"):
        source = Path("/", name)
        if source.exists():
            shutil.copyfile(source, root / name)
