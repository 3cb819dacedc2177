"""`python -m demo run`: from a cluster without us to a committed adapter, with everything real. See `make demo`."""

import argparse
import sys
import time

import testbed
from demo import bucket, report, setup, watch

DEADLINE_S = 1500.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("command", choices=["run"])
    parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    started = time.monotonic()

    def chapter(text: str) -> None:
        print(f"\n== {text}  [{time.monotonic() - started:.0f} s]")

    chapter("The cluster: one real node, with an S3 server beside it")
    try:
        cluster = testbed.up()
    except testbed.TestbedError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    try:
        for image in (setup.OPERATOR_IMAGE, setup.TRAINER_IMAGE):
            print(f"{image}: {'loaded' if testbed.load_image(image) else 'is there'}")
        chapter("The operator, by Helm")
        setup.install_operator(cluster)
        chapter("The bucket: SmolLM2-135M-Instruct and real conversations, a dozen broken rows among them")
        bucket.fill(cluster)
        chapter("The user: a Secret and one YAML")
        setup.make_secret(cluster)
        setup.apply_quickstart(cluster)
        chapter("The job")
        problem = None if watch.follow(cluster, setup.NAMESPACE, setup.JOB, DEADLINE_S) else "the job failed"
    except testbed.TestbedError as error:
        problem = str(error)
    if problem:
        chapter("It failed; what is known of it")
        report.failure(cluster, setup.NAMESPACE, setup.JOB)
        print(f"\ndemo: {problem}", file=sys.stderr)
        return 1
    chapter("What came out")
    report.success(cluster, setup.NAMESPACE, setup.JOB)
    chapter("Done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
