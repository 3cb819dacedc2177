"""`python3 -m testbed`: the cluster from a terminal. See testbed/README.md."""

import argparse
import os
import sys
import time
from pathlib import Path

from testbed import binaries, cluster, debian, images
from testbed.instance import CHECKOUT, Instance, TestbedError
from testbed.processes import recorded_pid


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except TestbedError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m testbed", description="A real one-node Kubernetes without Docker."
    )
    parser.add_argument(
        "--instance", default=os.environ.get("FINETUNE_TESTBED_INSTANCE", "default"), help="name of the cluster"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start it (returns at once when it is up and healthy)")
    up.add_argument(
        "--control-plane-only", action="store_true", help="API server, controllers, scheduler and S3; no root needed"
    )
    down = commands.add_parser("down", help="stop it and leave nothing behind but the cache")
    down.add_argument("--force", action="store_true", help="also when another checkout started it")
    commands.add_parser("status", help="what runs and where; exit code 1 when it is not healthy")
    commands.add_parser("kubeconfig", help="print the path of the admin kubeconfig")
    commands.add_parser("path", help="print a PATH with kubectl, helm and the rest in front")
    commands.add_parser("build", help="install packages and build the programs, start nothing")
    load = commands.add_parser("load-image", help="make an image available to pods")
    load.add_argument("name")
    load.add_argument("source", nargs="?", help="archive file or buildah image; default: the buildah image NAME")
    build = commands.add_parser("build-image", help="build a target of the Dockerfile on the local base image")
    build.add_argument("target")
    build.add_argument("tag")
    build.add_argument("--context", type=Path, default=CHECKOUT)
    build.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    commands.add_parser("base-image", help=f"make {images.BASE_IMAGE} if it is missing")
    gpus = commands.add_parser("advertise-gpus", help="let the node offer this many nvidia.com/gpu that do nothing")
    gpus.add_argument("count", type=int)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    instance = Instance(arguments.instance)
    started = time.monotonic()
    match arguments.command:
        case "up":
            found = cluster.up(instance.name, node=not arguments.control_plane_only)
            print(f"up in {time.monotonic() - started:.1f} s")
            return _status(found)
        case "down":
            cluster.down(instance.name, force=arguments.force)
            print(f"down in {time.monotonic() - started:.1f} s")
        case "status":
            found = cluster.find(instance.name)
            if found:
                return _status(found)
            state = instance.load()
            dead = [name for name in state.commands if recorded_pid(instance.pid_file(name)) is None] if state else []
            broken = f"broken; dead: {', '.join(dead) or 'none'}; `up` renews it"
            print(f"instance {instance.name!r} is {broken if state else 'down'}")
            for trace in cluster.left_over(instance) if state is None else []:
                print(f"left over: {trace}")
            return 1
        case "kubeconfig":
            print(instance.kubeconfig)
        case "path":
            print(binaries.search_path())
        case "build":
            debian.ensure_packages(node=True)
            binaries.build()
        case "load-image":
            loaded = images.load_image(arguments.name, arguments.source)
            print(
                f"{arguments.name} {'loaded' if loaded else 'was loaded already'} ({time.monotonic() - started:.1f} s)"
            )
        case "build-image":
            images.build_image(arguments.target, arguments.tag, arguments.context, build_args=arguments.build_arg)
        case "base-image":
            print(images.ensure_base_image())
        case _:
            running = cluster.find(instance.name)
            if running is None or running.node_name is None:
                raise TestbedError(f"instance {instance.name!r} has no running node")
            running.advertise_gpus(arguments.count)
    return 0


def _status(found: cluster.Cluster) -> int:
    print(f"export KUBECONFIG={found.kubeconfig}")
    print(f"API server   {found.api_server}")
    print(
        f"S3           {found.s3_endpoint_host}  (access key {found.s3_access_key}, secret key {found.s3_secret_key})"
    )
    if found.node_name:
        print(f"S3 from pods {found.s3_endpoint_pod}")
        print(f"node         {found.node_name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
