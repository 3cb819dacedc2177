"""Where things lie in object storage below one run's folder, `output.uri/NAME-UID5/`.

`adapter/` is for readers, `.job/` is working state. Readers trust only what `_COMMITTED.json` names.
"""

CLAIM = "_CLAIM.json"  # written first, If-None-Match: whose folder this is
COMMITTED = "_COMMITTED.json"  # written last, If-None-Match: digest and manifest of the adapter
LATEST = "latest.json"  # beside the run folders, moved with If-Match: what to serve

ADAPTER = "adapter"
JOB = ".job"
WRITERS = f"{JOB}/writers"  # epoch fence: EPOCH.json, If-None-Match, by every training attempt; the highest writes
PLAN = f"{JOB}/plan.json"  # the last one that a prepare stage wrote, for people
PLANS = f"{JOB}/plans"  # DIGEST.json: what train reads, so that no later prepare can change a plan in use
REPORT = f"{JOB}/report.json"
REPORT_PAGE = f"{JOB}/report.html"  # made of it, for people
DECISIONS = f"{JOB}/decisions.jsonl"
PREPARED = f"{JOB}/prepared"
PARTITIONS = f"{JOB}/partitions"  # KEY: partitions of rows that a prepare stage has finished, until there is a plan
REFERENCE = f"{JOB}/reference"  # KEY/PART: what the base model says of the answers, for methods that compare with it
CHECKPOINTS = f"{JOB}/checkpoints"
LOGS = f"{JOB}/logs"
METRICS = f"{JOB}/metrics.jsonl"


def join(uri: str, *parts: str) -> str:
    """Join with single slashes, whatever `uri` ends in."""
    return "/".join([uri.rstrip("/"), *parts])
