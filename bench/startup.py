"""Seconds from `kubectl apply` to the first finished step: a FineTuneJob against a bare pod with the same image.

The bare pod does the least that trains: it fetches the model, loads it, adds LoRA and takes one step on four short
rows. The job does that too, and before it all that a job promises: every row read and checked, the run planned, the
plan and the prepared data verified in the bucket.
"""

import argparse
import json
from datetime import datetime
from typing import Any

import testbed
from bench import site, tables
from demo import setup
from demo.bucket import MODEL_PREFIX
from finetune_api.names import CREDENTIALS_DIR, LABEL_JOB_NAME

FIRST_STEP = "first step"
BARE = f"""
import datetime, os, pathlib, boto3, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
read = lambda name: pathlib.Path("{CREDENTIALS_DIR}", name).read_text()
s3 = boto3.client("s3", endpoint_url=os.environ["ENDPOINT"], region_name="us-east-1",
    aws_access_key_id=read("AWS_ACCESS_KEY_ID"), aws_secret_access_key=read("AWS_SECRET_ACCESS_KEY"))
folder = pathlib.Path("/scratch/model"); folder.mkdir()
for found in s3.list_objects_v2(Bucket="models", Prefix="{MODEL_PREFIX}/")["Contents"]:
    s3.download_file("models", found["Key"], str(folder / found["Key"].rpartition("/")[2]))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
ids = torch.randint(0, 49152, (4, 54))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print("{FIRST_STEP}", datetime.datetime.now(datetime.UTC).isoformat(), flush=True)
"""


def bare_pod(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The train pod's image, resources and security, without us."""
    resources = {"cpu": str(spec["resources"]["cpu"]), "memory": spec["resources"]["memory"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": site.NAMESPACE},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "bare",
                    "image": setup.TRAINER_IMAGE,
                    "imagePullPolicy": "Never",
                    "command": ["python", "-c", BARE],
                    "env": [{"name": "ENDPOINT", "value": spec["storage"]["endpoint"]}],
                    "resources": {"requests": resources, "limits": resources},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [
                        {"name": "scratch", "mountPath": "/scratch"},
                        {"name": "credentials", "mountPath": CREDENTIALS_DIR},
                    ],
                }
            ],
            "volumes": [
                {"name": "scratch", "emptyDir": {}},
                {"name": "credentials", "secret": {"secretName": spec["storage"]["secretRef"]["name"]}},
            ],
        },
    }


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def measure_bare(cluster: testbed.Cluster, name: str) -> float:
    """Seconds from apply to the first step of the bare pod."""
    site.remove(cluster, "pod", name)
    started = site.apply(cluster, bare_pod(name, site.job(name, 1)["spec"]))

    def first_step() -> float | None:
        log = cluster.kubectl("logs", name, "-n", site.NAMESPACE, check=False)
        found = [line for line in log.splitlines() if line.startswith(FIRST_STEP)]
        return _seconds(found[0].rpartition(" ")[2]) if found else None

    took_s = site.until(first_step, "the bare pod's first step") - started
    site.remove(cluster, "pod", name)
    return took_s


def measure_job(cluster: testbed.Cluster, name: str) -> dict[str, float]:
    """Seconds from apply to: prepared, train pod started, first step."""
    site.remove(cluster, "ftj", name)
    started = site.apply(cluster, site.job(name, 2))
    train = f"{LABEL_JOB_NAME}={name},finetune.dev/stage=train"

    def first_step() -> float | None:
        log = cluster.kubectl("logs", "-l", train, "-n", site.NAMESPACE, "--tail=-1", check=False)
        for line in log.splitlines():
            if line.startswith("{"):
                entry = json.loads(line)
                if entry["message"].startswith("step 1/"):
                    return _seconds(entry["time"])
        return None

    step = site.until(first_step, "the job's first step")
    status = json.loads(cluster.kubectl("get", "ftj", name, "-n", site.NAMESPACE, "-o", "json"))["status"]
    train_started = next(attempt["startedAt"] for attempt in status["attempts"] if attempt["stage"] == "train")
    site.remove(cluster, "ftj", name)
    return {"prepared, train Job created": _seconds(train_started) - started, FIRST_STEP: step - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs: int = parser.parse_args().runs
    cluster = site.set_up()
    bare: list[float] = []
    jobs: list[dict[str, float]] = []
    for _ in range(runs):
        bare.append(measure_bare(cluster, "bench-bare"))
        jobs.append(measure_job(cluster, "bench-startup"))
    rows = [["bare pod", FIRST_STEP, tables.spread(bare)]]
    rows += [["FineTuneJob", key, tables.spread([job[key] for job in jobs])] for key in jobs[0]]
    body = (
        f"SmolLM2-135M-Instruct from the testbed's S3 server, one core, {runs} runs in turns, seconds after "
        "`kubectl apply`, medians (quartiles).\n\n"
        + tables.table(["", "until", "seconds"], rows)
        + "\n\nThe job reads, checks and tokenises all 803 rows and verifies what it wrote before its training pod "
        "starts; the bare pod does none of it."
    )
    tables.write("startup", "From apply to the first step", "python -m bench.startup", ["torch", "transformers"], body)


if __name__ == "__main__":
    main()
