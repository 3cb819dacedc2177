"""Container images: from buildah's store into containerd's, each once.

The node has no registry: images are built by buildah as root (`--isolation chroot`, so it works inside containers and
VMs without systemd) and imported. containerd's store lies in the cache, and an imported image carries buildah's image
id as a label, so loading the same image again is one lookup, also after `down` and `up`.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from pathlib import Path

from testbed import debian
from testbed.binaries import binary
from testbed.components import CONTAINERD_SOCKET
from testbed.instance import TestbedError, cache_dir, containerd_root, file_lock
from testbed.processes import last_lines, run

BASE_IMAGE = "localhost/finetune-base:bookworm"
PAUSE_IMAGE = "localhost/pause:1"
LOAD_TIMEOUT_S = 900.0
DISK_RESERVE_BYTES = 1_000_000_000
_ID_LABEL = "testbed.finetune.dev/source"
_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


def ctr(*arguments: str, timeout_s: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run(
        [binary("ctr"), "--address", str(CONTAINERD_SOCKET), "--namespace", "k8s.io", *arguments],
        timeout_s=timeout_s,
        check=check,
    )


def load_image(name: str, source: str | None = None) -> bool:
    """Make `name` available to pods, from a buildah image (default: of that name) or an archive file. False when it was
    there.

    Raises TestbedError when there is no such image or archive."""
    source = source or name
    if Path(source).is_file():
        stat = Path(source).stat()
        identity = hashlib.sha256(f"{Path(source).resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    else:
        identity = run(
            ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", source], timeout_s=60
        ).stdout.strip()
    lock = cache_dir() / "load-image.lock"
    # One at a time: the second then finds the layers that both need, and does not write 6 GB twice.
    with file_lock(lock, LOAD_TIMEOUT_S, f"another image is being loaded (lock {lock})"):
        if _loaded_identity(name) == identity:
            return False
        if Path(source).is_file():
            ctr("images", "import", "--local", "--index-name", name, source, timeout_s=LOAD_TIMEOUT_S)
        else:
            _import_difference(source, name)
        if name not in ctr("images", "ls", "-q").stdout.split():
            raise TestbedError(f"{source} was imported, but holds no image {name}: give the name it was built with")
        # Last, so that an import killed half-way is done again.
        ctr("images", "label", name, f"{_ID_LABEL}={identity}")
        _forget_replaced()
        return True


def _forget_replaced() -> None:
    """Give back the disk of images that a newer one of the same name replaced: the kubelet's plugin keeps their ids."""
    lines = [line.split() for line in ctr("images", "ls").stdout.splitlines()[1:]]
    named = {digest for name, _type, digest, *_ in lines if not name.startswith("sha256:")}
    replaced = [name for name, _type, digest, *_ in lines if name.startswith("sha256:") and digest not in named]
    if replaced:
        ctr("images", "rm", *replaced)


def _loaded_identity(name: str) -> str | None:
    for line in ctr("images", "ls", f"name=={name}").stdout.splitlines()[1:]:
        for label in line.split()[-1].split(","):
            key, _, value = label.partition("=")
            if key == _ID_LABEL:
                return value
    return None


def _import_difference(source: str, name: str, timeout_s: float = LOAD_TIMEOUT_S) -> None:
    """Bring only the layers that containerd lacks: a change of code costs seconds, not the trainer's 6 GB again.

    skopeo writes an OCI layout and leaves out blobs that lie there already, so containerd's blobs are linked into it
    first (both are in the cache, on one file system). Uncompressed, so that a layer has one digest in both stores;
    that is what `buildah push` cannot do.
    """
    store = containerd_root() / "io.containerd.content.v1.content" / "blobs" / "sha256"
    _make_room(source, name, store)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="layout-") as directory:
        layout = Path(directory)
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        present = _blobs_of(store)
        for digest in present:
            os.link(store / digest, blobs / digest)
        (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        copy = ["skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
        run([*copy, f"containers-storage:{source}", f"oci:{layout}:{name}"], timeout_s=timeout_s)
        new = [f"blobs/sha256/{blob.name}" for blob in blobs.iterdir() if blob.name not in present]
        command = [binary("ctr"), "--address", str(CONTAINERD_SOCKET), "--namespace", "k8s.io", "images", "import"]
        with tempfile.TemporaryFile() as said:
            # Through a pipe: an archive of the trainer's first load would be 6 GB more on disk.
            importer = subprocess.Popen(
                [*command, "--local", "--index-name", name, "-"], stdin=subprocess.PIPE, stdout=said, stderr=said
            )
            deadline = threading.Timer(timeout_s, importer.kill)
            deadline.start()
            try:
                with contextlib.suppress(BrokenPipeError), tarfile.open(fileobj=importer.stdin, mode="w|") as tar:
                    for member in ["oci-layout", "index.json", *new]:
                        tar.add(layout / member, member)
                        (layout / member).unlink()  # containerd has it now: the disk never holds a layer three times
            finally:
                if importer.stdin:
                    with contextlib.suppress(BrokenPipeError):
                        importer.stdin.close()
                status = importer.wait(timeout=timeout_s)
                deadline.cancel()
            if status != 0:
                said.seek(0)
                raise TestbedError(f"loading {name} failed:\n{last_lines(said.read().decode(errors='replace'))}")


def _blobs_of(store: Path) -> set[str]:
    return {blob.name for blob in store.iterdir()} if store.exists() else set()


def _make_room(source: str, name: str, store: Path) -> None:
    """Remove the image that is about to be replaced where the disk cannot hold both.

    Raises TestbedError when the new layers do not fit then either, as a full disk ends whatever else runs."""
    if is_room_for(_bytes_of_new_layers(source, _blobs_of(store)), _free_bytes()):
        return
    # --sync waits until its layers are gone. Containers that run keep what they use.
    ctr("images", "rm", "--sync", name, timeout_s=LOAD_TIMEOUT_S, check=False)
    new_bytes, free_bytes = _bytes_of_new_layers(source, _blobs_of(store)), _free_bytes()
    if not is_room_for(new_bytes, free_bytes):
        raise TestbedError(
            f"{name} brings {new_bytes / 1e9:.1f} GB of layers, which containerd keeps packed and unpacked: "
            f"{disk_bytes_for(new_bytes) / 1e9:.1f} GB are needed in {cache_dir()}, and {free_bytes / 1e9:.1f} GB are "
            "free. Free some, or set FINETUNE_CACHE to a folder on a larger disk"
        )


def _bytes_of_new_layers(source: str, present: set[str]) -> int:
    manifest = json.loads(run(["skopeo", "inspect", "--raw", f"containers-storage:{source}"], timeout_s=120).stdout)
    layers = {layer["digest"].removeprefix("sha256:"): layer["size"] for layer in manifest["layers"]}
    return sum(size for digest, size in layers.items() if digest not in present)


def _free_bytes() -> int:
    return shutil.disk_usage(cache_dir()).free


def disk_bytes_for(new_bytes: int) -> int:
    """Return the disk that new layers take at most: packed, unpacked, and what pods write meanwhile."""
    return 2 * new_bytes + DISK_RESERVE_BYTES if new_bytes else 0


def is_room_for(new_bytes: int, free_bytes: int) -> bool:
    return disk_bytes_for(new_bytes) <= free_bytes


def ensure_base_image() -> str:
    """Debian bookworm with python3 and CA certificates in buildah's store: no image registry is needed."""
    debian.ensure_packages(node=True)
    if run(["buildah", "images", "-q", BASE_IMAGE], timeout_s=60, check=False).stdout.strip():
        return BASE_IMAGE
    print(f"making {BASE_IMAGE} with mmdebstrap (once)", flush=True)
    # The host's own apt sources decide where packages come from; no mirror is named here.
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="base-") as directory:
        rootfs = f"{directory}/rootfs.tar"
        run(
            ["mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", rootfs],
            timeout_s=900,
        )
        container = run(["buildah", "from", "scratch"], timeout_s=60).stdout.strip()
        try:
            run(["buildah", "add", "--quiet", container, rootfs, "/"], timeout_s=300)
            run(["buildah", "config", "--cmd", "/bin/bash", "--env", "LANG=C.UTF-8", container], timeout_s=60)
            run(["buildah", "commit", "--quiet", container, BASE_IMAGE], timeout_s=300)
        finally:
            run(["buildah", "rm", container], timeout_s=60, check=False)
    return BASE_IMAGE


def build_image(
    target: str, tag: str, context: Path, *, build_args: list[str] | None = None, timeout_s: float = 3600
) -> None:
    """Build one target of the Dockerfile in `context` on the local base image. Unchanged layers are reused."""
    command = ["buildah", "bud", "--isolation", "chroot", "--layers", "--target", target, "-t", tag]
    command += ["--build-arg", f"BASE_IMAGE={ensure_base_image()}"]
    for argument in build_args or []:
        command += ["--build-arg", argument]
    if _CA_BUNDLE.exists():
        # A machine behind a TLS-inspecting proxy trusts it through this file; images built there must too, while they
        # build.
        command += ["--volume", f"{_CA_BUNDLE}:{_CA_BUNDLE}:ro"]
    for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"):
        if os.environ.get(name) == str(_CA_BUNDLE):
            command += ["--build-arg", f"{name}={_CA_BUNDLE}"]
    try:
        subprocess.run([*command, str(context)], timeout=timeout_s, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise TestbedError(f"building {tag} failed: {error}") from error


def ensure_pause() -> None:
    """The sandbox image: one static C program, packed as a docker archive by hand (three small files)."""
    source = Path(__file__).parent / "pause" / "pause.c"
    identity = hashlib.sha256(source.read_bytes()).hexdigest()
    if _loaded_identity(PAUSE_IMAGE) == identity:
        return
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="pause-") as directory:
        program, archive = Path(directory) / "pause", Path(directory) / "pause.tar"
        run(["gcc", "-Os", "-static", "-s", "-o", str(program), str(source)], timeout_s=60)
        layer = _tar({"pause": program.read_bytes()})
        config = json.dumps(
            {
                "architecture": os.uname().machine.replace("x86_64", "amd64").replace("aarch64", "arm64"),
                "os": "linux",
                "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
            }
        ).encode()
        manifest = json.dumps([{"Config": "config.json", "RepoTags": [PAUSE_IMAGE], "Layers": ["layer.tar"]}]).encode()
        archive.write_bytes(_tar({"manifest.json": manifest, "config.json": config, "layer.tar": layer}))
        ctr("images", "import", "--local", str(archive))
    ctr("images", "label", PAUSE_IMAGE, f"{_ID_LABEL}={identity}")


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def remove_stale_containers(*, check: bool = True) -> None:
    """Forget an earlier cluster's containers: containerd's database lies with the images and remembers them."""
    for container in ctr("containers", "ls", "-q", check=check).stdout.split():
        ctr("tasks", "kill", "--signal", "SIGKILL", container, check=False)
        ctr("tasks", "delete", "--force", container, check=False)
        ctr("containers", "delete", container, check=False)
    for line in ctr("sandboxes", "ls", check=False).stdout.splitlines()[1:]:
        ctr("sandboxes", "remove", "--force", line.split()[0], check=False)
