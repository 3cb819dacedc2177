"""The end of the demo: what came out, or all that helps to see why nothing did."""

import json
from typing import Any

import testbed
from demo import bucket, watch
from demo.setup import RELEASE, SYSTEM_NAMESPACE
from finetune_api.printable import printable
from testbed import binaries


def success(cluster: testbed.Cluster, namespace: str, name: str) -> None:
    job = json.loads(cluster.kubectl("get", "ftj", name, "-n", namespace, "-o", "json"))
    status = job["status"]
    artifact, metrics = status["artifacts"][0], status.get("metrics", {})
    print(f"$ kubectl get ftj {name} -n {namespace} -o wide")
    print(cluster.kubectl("get", "ftj", name, "-n", namespace, "-o", "wide"))
    print(f"data      {watch.data_summary(status['data'])}")
    print(f"report    {status['data']['reportPageUri']}")
    if metrics.get("evalLoss") is not None:
        print(f"held out  loss {metrics.get('baseEvalLoss', float('nan')):.3f} before, {metrics['evalLoss']:.3f} after")
    _answers(bucket.read_json(cluster, artifact["uri"].rstrip("/") + "/eval.json"))
    run_uri = status["plan"]["uri"].rpartition("/.job/")[0]
    print(f"adapter   {artifact['uri']}")
    print(f"digest    {artifact['digest']}")
    print(f"metrics   {run_uri}/.job/metrics.jsonl, and /metrics of service {RELEASE} in {SYSTEM_NAMESPACE}")
    print(f"logs      {run_uri}/.job/logs/")
    print("\nThe cluster is still up. To look around, then to stop it:")
    print(f"  export KUBECONFIG={cluster.kubeconfig} PATH={binaries.binary('kubectl').rpartition('/')[0]}:$PATH")
    print(f"  kubectl describe ftj {name} -n {namespace}")
    print("  make demo-down")


def _answers(evaluation: dict[str, Any]) -> None:
    for sample in evaluation["samples"]:
        print(f"prompt    {_line(_last_question(sample['prompt']))}")
        print(f"  base    {_line(sample['base']['text'])}")
        print(f"  tuned   {_line(sample['tuned']['text'])}")


def _last_question(prompt: str) -> str:
    """The user's words in a rendered conversation of the demo's model."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]


def _line(text: str, limit: int = 100) -> str:
    one_line = " ".join(printable(text).split())
    return one_line if len(one_line) <= limit else one_line[: limit - 1] + "…"


def failure(cluster: testbed.Cluster, namespace: str, name: str) -> None:
    """Everything that a person would look at first."""
    logs = ("--tail=40", "--prefix", "--all-containers")
    for command in (
        ("describe", "ftj", name, "-n", namespace),
        ("get", "events", "-n", namespace, "--sort-by=.lastTimestamp"),
        ("get", "jobs,pods", "-n", namespace, "-o", "wide"),
        ("describe", "pods", "-n", namespace, "-l", f"finetune.dev/job-name={name}"),
        ("logs", "-n", namespace, "-l", f"finetune.dev/job-name={name}", *logs),
        ("logs", "-n", SYSTEM_NAMESPACE, f"deployment/{RELEASE}", *logs),
    ):
        print(f"\n$ kubectl {' '.join(command)}")
        try:
            print(cluster.kubectl(*command).rstrip() or "(nothing)")
        except testbed.TestbedError as error:  # what it says may be what is wrong; the others are still worth asking
            print(error)
