"""What a trainer reports of a job that goes well, in the shape of the status: for tests of the operator."""

from typing import Any

DIGEST = "sha256:" + "a" * 64
SPEC: dict[str, Any] = {
    "model": {"uri": "s3://models/model"},
    "method": {"type": "SFT"},
    "datasets": [{"uri": "s3://data/chat/*.jsonl"}],
    "output": {"uri": "s3://out/bot"},
}
PLAN: dict[str, Any] = {
    "uri": "s3://out/bot-1a2b3/.job/plan.json", "digest": DIGEST, "steps": 100, "trainTokens": 10, "labelTokens": 5,
    "memoryBytes": 1, "diskBytes": 1, "resolved": [],
}  # fmt: skip
DATA: dict[str, Any] = {
    "files": 1, "rowsIn": 10, "rowsUsed": 9, "rowsHeldOut": 1, "dropped": [], "digest": DIGEST,
    "reportUri": "s3://out/bot-1a2b3/.job/report.json",
}  # fmt: skip
ARTIFACT: dict[str, Any] = {
    "type": "Adapter", "uri": "s3://out/bot-1a2b3/adapter", "digest": DIGEST,
    "manifestUri": "s3://out/bot-1a2b3/adapter/manifest.json", "rank": 16,
}  # fmt: skip
CHECKPOINT: dict[str, Any] = {"step": 40, "uri": "s3://out/bot-1a2b3/.job/checkpoints/40", "digest": DIGEST}
PROGRESS: dict[str, Any] = {
    "step": 1, "totalSteps": 40, "percentage": 2, "text": "1/40", "lastUpdatedTime": "2026-01-01T00:00:00Z",
}  # fmt: skip
